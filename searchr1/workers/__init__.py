"""Thin RLinf workers around rollout, rewards and actor: no algorithm lives here."""

import os

os.environ.setdefault("RLINF_LOG_LEVEL", "WARNING")  # read when RLinf is first imported
