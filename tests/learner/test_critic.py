"""The critic on either backend, in every layout, against a plain loop; and across a stop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import policy_ranks as ranks
from support.models import make_model
from support.trajectories import random_trajectories

# The fixture trains the critic on two processes in five layouts, half a minute before the first test.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TWO_RANKS = {
    "fsdp2": {"backend": "fsdp"},
    "tp2": {"backend": "megatron", "tp": 2},
    "tp2-sequence": {"backend": "megatron", "tp": 2, "sequence_parallel": True},
    "pp2": {"backend": "megatron", "pp": 2},
    "dp2": {"backend": "megatron"},
}
RESUMED = {"tp2": ("tp2", "pp2", "dp2"), "fsdp2": ("fsdp2",)}
"""Where a run is stopped, and where it goes on."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("critic-models")
    return {pair: str(make_model(*pair, folder / f"{pair[0]}")) for pair in (("qwen2", True), ("llama", False))}


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("critic")
    model, other = models["qwen2", True], models["llama", False]
    jobs = [{"name": f"critic-{layout}", "model": model, "poison": True} | job for layout, job in TWO_RANKS.items()]
    jobs += [{"name": f"critic-llama-{layout}", "model": other} | TWO_RANKS[layout] for layout in ("tp2-sequence", "pp2")]
    for first, following in RESUMED.items():
        saved = folder / first / "critic"
        saved.parent.mkdir()
        (saved.parent / "sizes.json").write_text("{}")
        first_steps = {"name": f"critic-first-{first}", "model": model, "steps": [0, 1], "save": str(saved)}
        jobs.append(first_steps | {"background": first == "tp2"} | TWO_RANKS[first])
        jobs += [
            {"name": f"critic-{first}-{layout}", "model": model, "steps": [1, 3], "load": str(saved)} | TWO_RANKS[layout]
            for layout in following
        ]
    policy = folder / "policy" / "actor"
    jobs += [
        {"name": "policy", "model": model, "tp": 2, "steps": [0, 1], "save": str(policy)},
        {"name": "critic-from-policy", "model": model, "steps": [0, 0], "pp": 2, "backend": "megatron",
         "megatron_checkpoint": str(policy)},
        {"name": "critic-bf16", "model": model, "precision": "bf16"} | TWO_RANKS["tp2-sequence"],
        {"name": "critic-fp16", "model": model, "precision": "fp16"} | TWO_RANKS["pp2"],
    ]  # fmt: skip
    return ranks.run(2, jobs, folder / "two")


@pytest.fixture(scope="module")
def expected(models):
    return {pair: plain_loop(model) for pair, model in models.items()}


def plain_loop(model):
    """Three steps of two mini-batches, a sequence at a time, with transformers and torch alone."""
    from transformers import AutoModel

    decoder = AutoModel.from_pretrained(model, attn_implementation="eager")
    head = torch.nn.Linear(decoder.config.hidden_size, 1, bias=False)
    torch.nn.init.zeros_(head.weight)
    config = ranks.critic_config(model)
    optim = config.critic.optim
    parameters = [*decoder.parameters(), head.weight]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optim.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=optim.lr, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_eps,
    )  # fmt: skip

    def values(t):
        ids = torch.tensor([*t.sample.prompt_ids, *t.response_ids.tolist()])[None]
        hidden = decoder(ids)[0][0]
        return head(hidden[len(t.sample.prompt_ids) - 1 : -1]).squeeze(-1)

    metrics = []
    for step in range(3):
        trajectories, _ = random_trajectories(step)
        returns = ranks.critic_returns(trajectories, step)
        with torch.no_grad():
            old = [values(t) for t in trajectories]
        total = tokens = 0.0
        norms = []
        for minibatch in range(2):
            members = [i for i, t in enumerate(trajectories) if t.sample.index % 2 == minibatch]
            count = sum(int(trajectories[i].loss_mask.sum()) for i in members)
            for i in members:
                mask = torch.tensor(trajectories[i].loss_mask)
                found, target = values(trajectories[i])[mask], torch.tensor(returns[i])[mask]
                bounded = old[i][mask] + (found - old[i][mask]).clamp(-0.1, 0.1)
                loss = 0.5 * torch.maximum((found - target) ** 2, (bounded - target) ** 2).sum()
                (loss / count).backward()
                total += loss.item()
            tokens += count
            norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, optim.clip_grad)))
            optimizer.step()
            optimizer.zero_grad()
        metrics.append({"critic/loss": total / tokens, "critic/grad_norm": sum(norms) / 2})
    weights = {f"model.{name}": weight.detach() for name, weight in decoder.named_parameters()}
    last_values = [np.where(t.loss_mask, value.numpy(), 0) for t, value in zip(trajectories, old, strict=True)]
    return metrics, weights | {"value_head.weight": head.weight.detach()}, last_values


def assert_equal(found, expected, steps=3):
    """Losses, norms, values and weights to 1e-5; the same on every rank."""
    metrics, weights, last_values = expected
    for rank in found:
        for ours, theirs in zip(rank["metrics"], metrics[-steps:], strict=True):
            for key, value in theirs.items():
                assert ours[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
        for number, values in rank["last_values"].items():
            assert np.allclose(values, last_values[number], atol=1e-5)
    assert found[0]["weights"].keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.allclose(found[0]["weights"][name], weight, atol=1e-5), name


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_three_steps_equal_a_plain_loop(runs, expected, layout):
    found = runs[f"critic-{layout}"]
    assert_equal(found, expected["qwen2", True])
    assert any(m["critic/clip_fraction"] > 0 for m in found[0]["metrics"])
    assert found[0]["metrics"][-1]["critic/lr"] == pytest.approx(1e-2)
    assert all(not values.any() for rank in found for values in rank["first_values"].values())  # the head starts at 0


@pytest.mark.parametrize("layout", ["tp2-sequence", "pp2"])
def test_an_untied_model(runs, expected, layout):
    assert_equal(runs[f"critic-llama-{layout}"], expected["llama", False])


@pytest.mark.parametrize("layout", TWO_RANKS)
def test_gradients_that_are_not_finite_cost_their_update_and_nothing_else(runs, layout):
    """The three steps that followed are those of a run that never saw them, as the test above shows."""
    for rank in runs[f"critic-{layout}"]:
        assert rank["poisoned"]["critic/skipped_updates"] == 2
        assert np.isnan(rank["poisoned"]["critic/grad_norm"])
        assert all(metrics["critic/skipped_updates"] == 0 for metrics in rank["metrics"])


@pytest.mark.parametrize(("first", "following"), [(a, b) for a, others in RESUMED.items() for b in others])
def test_resuming_equals_never_having_stopped(runs, expected, first, following):
    assert_equal(runs[f"critic-{first}-{following}"], expected["qwen2", True], steps=2)


def test_it_starts_as_the_policy_does(runs):
    """Also from a Megatron checkpoint, which has no head."""
    policy, critic = runs["policy"][0]["weights"], runs["critic-from-policy"][0]["weights"]
    assert not critic.pop("value_head.weight").any()
    assert critic.keys() == policy.keys()
    assert all(torch.equal(critic[name], weight) for name, weight in policy.items())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_fp32(runs, expected, precision):
    for ours, theirs in zip(runs[f"critic-{precision}"][0]["metrics"], expected["qwen2", True][0], strict=True):
        assert ours["critic/skipped_updates"] == 0
        assert ours["critic/loss"] == pytest.approx(theirs["critic/loss"], rel=0.05)
