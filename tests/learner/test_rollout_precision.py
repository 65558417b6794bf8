"""What precision weights are sent to the rollout engine in."""

from __future__ import annotations

import pytest
import torch

from searchr1.config.schema import Config
from searchr1.learner.policy import Policy


@pytest.mark.parametrize(
    ("precision", "expected"),
    # 1 + 2^-10 + 2^-20: fp16 keeps ten binary places, bf16 seven.
    [("fp32", 1 + 2**-10 + 2**-20), ("fp16", 1 + 2**-10), ("bf16", 1.0)],
)
def test_an_engine_gets_weights_that_are_rounded_once(precision, expected):
    class Backend:
        device = torch.device("cpu")

        def named_weights(self, dtype):
            yield "w", torch.tensor([1 + 2**-10 + 2**-20]).to(dtype)

    config = Config()
    config.rollout.model.precision = precision
    ((_, weight),) = Policy(Backend(), config).named_weights()
    assert weight.dtype == {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert weight.item() == expected
