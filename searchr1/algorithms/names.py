"""Names of algorithms' variants, for the modules here and for the configuration's types. Imports nothing."""

from __future__ import annotations

from typing import Literal

LossAggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
LldsGate = Literal["action", "response"]
CorrectionLevel = Literal["token", "sequence", "geometric"]
CorrectionBound = Literal["truncate", "clip", "mask", "reject"]
