"""The critic against a plain loop, over processes, and across a stop."""

from __future__ import annotations

import policy_ranks as ranks
import pytest
import torch

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("critic")
    model = str(ranks.make_model("qwen2", True, folder / "model"))
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint/sizes.json").write_text("{}")
    saved = str(folder / "checkpoint/critic")
    jobs = [
        {"name": "critic-whole", "model": model},
        {"name": "critic-first", "model": model, "steps": [0, 1], "save": saved},
        {"name": "critic-rest", "model": model, "steps": [1, 3], "load": saved},
    ]
    one = ranks.run(1, jobs, folder / "one")
    two = ranks.run(2, [{"name": "critic-two", "model": model}], folder / "two")
    return model, one | two


def plain_loop(model):
    """Values before training, then three steps of two mini-batches, a sequence at a time."""
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

    losses = []
    for step in range(3):
        trajectories, _ = ranks.make_trajectories(step)
        returns = ranks.critic_returns(trajectories, step)
        with torch.no_grad():
            old = [values(t) for t in trajectories]
        total = tokens = 0.0
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
            torch.nn.utils.clip_grad_norm_(parameters, optim.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total / tokens)
    return losses, dict(decoder.named_parameters()) | {"head": head.weight}


def test_three_steps_equal_a_plain_loop_on_one_rank_and_on_two(runs):
    model, found = runs
    losses, weights = plain_loop(model)
    for name in ("critic-whole", "critic-two"):
        result = found[name][0]
        assert [m["critic/loss"] for m in result["metrics"]] == pytest.approx(losses, rel=1e-5)
        assert any(m["critic/clip_fraction"] > 0 for m in result["metrics"])
        for key, weight in weights.items():
            ours = result["weights"]["value_head.weight" if key == "head" else f"model.{key}"]
            assert torch.allclose(ours, weight.detach(), atol=2e-6), key


def test_it_starts_at_zero_and_learns(runs):
    _, found = runs
    result = found["critic-whole"][0]
    assert all(not values.any() for values in result["values"])
    assert result["metrics"][-1]["critic/value"] != 0


def test_resuming_equals_never_having_stopped(runs):
    _, found = runs
    whole, rest = found["critic-whole"][0], found["critic-rest"][0]
    assert all(torch.equal(whole["weights"][name], weight) for name, weight in rest["weights"].items())
    assert [m["critic/loss"] for m in rest["metrics"]] == [m["critic/loss"] for m in whole["metrics"][1:]]
