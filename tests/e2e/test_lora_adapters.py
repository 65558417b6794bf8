"""A LoRA run whose engine gets adapters samples and learns as one whose engine gets merged weights."""

from __future__ import annotations

import pytest
from support.training_runs import NO_EVAL

from searchr1.tracking.loggers import read_metrics

LORA = ("actor.lora.rank=8", "actor.optim.lr=1e-3", "runner.max_steps=3", "runner.save_interval=-1", *NO_EVAL)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_adapters_and_merged_weights_give_the_same_run(demo, address):
    rows = {}
    for update in ("merged", "adapter"):
        words = (f"runner.experiment_name=lora-{update}", f"actor.lora.weight_update={update}")
        run = demo.train(address, *words, *LORA, timeout=400)
        assert run.returncode == 0, run.stdout[-3000:]
        rows[update] = read_metrics(demo.path / f"lora-{update}/metrics.jsonl")
    assert len(rows["adapter"]) == 3
    for ours, theirs in zip(rows["adapter"], rows["merged"], strict=True):
        # Engine and actor agree on every sampled token, with weights that have changed.
        assert ours["mismatch/logprob_gap_max"] < 1e-4
        assert ours["reward/mean"] == theirs["reward/mean"]
        assert ours["actor/loss"] == pytest.approx(theirs["actor/loss"], rel=1e-2, abs=1e-5)
    assert abs(rows["adapter"][-1]["actor/kl"]) > 0
