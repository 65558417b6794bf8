"""A resumed schedule goes on at the configured rate, not at the rate of the run that wrote the optimizer's state."""

from __future__ import annotations

import pytest
import torch

from searchr1.config.schema_model import LrSchedConfig
from searchr1.errors import UserError
from searchr1.learner.checkpoint import load_state
from searchr1.learner.optimizer import build_schedule, resume_schedule


def make(rate):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [weight]}], lr=rate)
    config = LrSchedConfig(lr_warmup_iters=4, lr_decay_style="constant")
    return weight, optimizer, build_schedule(optimizer, config, rate, None)


def advance(weight, optimizer, schedule):
    """Returns how far the update went, which is the rate if the gradient is 1."""
    before = weight.detach().clone()
    weight.grad = torch.ones(2)
    optimizer.step()
    schedule.step()
    return float((before - weight.detach())[0])


def test_going_on_with_another_rate():
    weight, optimizer, schedule = make(1e-2)
    for _ in range(2):
        advance(weight, optimizer, schedule)
    later_weight, later_optimizer, later_schedule = make(1e-4)
    later_optimizer.load_state_dict(optimizer.state_dict())  # brings the old rate along
    assert later_optimizer.param_groups[0]["lr"] > 1e-4
    resume_schedule(later_schedule, 2)
    assert later_schedule.get_last_lr() == [pytest.approx(0.75e-4)]
    with torch.no_grad():
        later_weight.zero_()  # small numbers, so that float32 can tell the difference
    rates = [advance(later_weight, later_optimizer, later_schedule) for _ in range(3)]
    assert rates == pytest.approx([0.75e-4, 1e-4, 1e-4], rel=1e-3)


def test_going_on_with_the_same_rate_changes_nothing():
    whole = make(1e-2)
    for _ in range(3):
        advance(*whole)
    resumed = make(1e-2)
    resumed[1].load_state_dict(whole[1].state_dict())
    resume_schedule(resumed[2], 3)
    assert resumed[2].get_last_lr() == whole[2].get_last_lr()
    assert resumed[1].param_groups[0]["lr"] == whole[1].param_groups[0]["lr"]
    assert advance(*resumed) == pytest.approx(advance(*whole))


def test_a_checkpoint_of_the_other_backend_is_named(tmp_path):
    (tmp_path / "critic").mkdir()
    (tmp_path / "critic/metadata.json").write_text("{}")
    (tmp_path / "sizes.json").write_text('{"critic/metadata.json": 2}')
    _, optimizer, schedule = make(1.0)
    with pytest.raises(UserError, match="was written by training_backend: megatron"):
        load_state(tmp_path / "critic", torch.nn.Linear(2, 2), optimizer, schedule)
