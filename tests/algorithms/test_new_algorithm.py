"""A user's own advantage and policy loss: one file each, named in the YAML or registered with a line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.algorithms.advantages import ADVANTAGES, AdvantageInputs, AdvantageSettings, compute_advantages
from searchr1.algorithms.policy_losses import POLICY_LOSSES, ClipSettings, PolicyInputs, policy_loss
from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.importing import is_dotted_path
from searchr1.learner.policy import Policy
from searchr1.preflight.check import check_config

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/custom_algorithm"
REWARDS = [1.0, 0.0, 0.25, 1.0, 0.0, 0.0]
GROUPS = [4, 4, 4, 9, 9, 9]
LENGTHS = [5, 20, 11, 7, 3, 30]


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        yield


def inputs() -> AdvantageInputs:
    return AdvantageInputs(torch.tensor(REWARDS, dtype=torch.float64), torch.tensor(GROUPS), torch.tensor(LENGTHS))


def opo_by_hand() -> list[float]:
    found = []
    for reward, group in zip(REWARDS, GROUPS, strict=True):
        mates = [i for i, other in enumerate(GROUPS) if other == group]
        found.append(reward - sum(LENGTHS[i] * REWARDS[i] for i in mates) / sum(LENGTHS[i] for i in mates))
    return found


@pytest.mark.parametrize("path", ["opo:opo", "opo.opo"])
def test_an_advantage_by_its_dotted_path(path):
    found = compute_advantages(inputs(), AdvantageSettings(adv_type=path))
    assert found.tolist() == pytest.approx(opo_by_hand(), abs=1e-12)


def test_whitening_follows_an_own_advantage_too():
    found = compute_advantages(inputs(), AdvantageSettings(adv_type="opo:opo", normalize=True))
    lengths = torch.tensor(LENGTHS, dtype=torch.float64)
    assert float((found * lengths).sum()) == pytest.approx(0, abs=1e-9)
    assert found.tolist() != pytest.approx(opo_by_hand(), abs=1e-3)


def test_registering_takes_one_line(monkeypatch):
    import opo
    import topr

    monkeypatch.setitem(ADVANTAGES, "opo", opo.opo)
    monkeypatch.setitem(POLICY_LOSSES, "topr", topr.topr)
    assert compute_advantages(inputs(), AdvantageSettings(adv_type="opo")).tolist() == pytest.approx(opo_by_hand())
    assert policy_loss("topr") is topr.topr


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.floats(-2, 2), st.lists(st.tuples(st.floats(-8, -0.01), st.floats(-2, 2)), min_size=1, max_size=5)),
        min_size=1,
        max_size=4,
    )
)
def test_topr_and_its_gradient(sequences):
    tokens = [(s, advantage, logp, gap) for s, (advantage, row) in enumerate(sequences) for logp, gap in row]
    logp_P = torch.tensor([t[2] for t in tokens], dtype=torch.float64, requires_grad=True)
    old_P = torch.tensor([t[2] - t[3] for t in tokens], dtype=torch.float64)
    advantages_P = torch.tensor([t[1] for t in tokens], dtype=torch.float64)
    segments_P = torch.tensor([t[0] for t in tokens])
    token = policy_loss("topr:topr")(PolicyInputs(logp_P, old_P, advantages_P, segments_P), ClipSettings(0.2, 0.2))
    token.loss_P.sum().backward()
    slopes = []
    for s, advantage, _, _ in tokens:
        weight = 1.0 if advantage > 0 else min(1.0, math.exp(sum(gap for _, gap in sequences[s][1])))
        slopes.append(-weight * advantage)
    assert logp_P.grad is not None
    assert logp_P.grad.tolist() == pytest.approx(slopes, abs=1e-9)
    expected = [slope * t[2] for slope, t in zip(slopes, tokens, strict=True)]
    assert token.loss_P.tolist() == pytest.approx(expected, abs=1e-9)
    assert token.ratio_P.tolist() == pytest.approx([math.exp(t[3]) for t in tokens], rel=1e-9)


def test_topr_takes_a_micro_batch_without_policy_tokens():
    none = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    token = policy_loss("topr:topr")(PolicyInputs(none, none.detach(), none.detach(), none.long()), ClipSettings(0.2, 0.2))
    assert token.loss_P.shape == (0,)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("opoo", "algorithm.loss_type: unknown 'opoo'; use one of actor, cispo, gspo, sapo, or package.module:function"),
        ("nowhere.module:f", "algorithm.loss_type: cannot import 'nowhere.module:f': No module named 'nowhere'"),
        ("opo:nothing", "algorithm.loss_type: cannot import 'opo:nothing'"),
        ("math:pi", "algorithm.loss_type: 'math:pi' is not a function"),
        (":f", "algorithm.loss_type: cannot import ':f'"),
        ("opo:", "algorithm.loss_type: cannot import 'opo:'"),
    ],
)
def test_what_is_wrong_with_a_path_is_reported(path, message):
    with pytest.raises(UserError) as caught:
        policy_loss(path)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("result", [torch.zeros(5), torch.zeros(6, 1), torch.full((6,), math.nan)])
def test_an_advantage_of_another_shape_or_not_finite_is_reported(monkeypatch, result):
    import opo

    monkeypatch.setattr(opo, "opo", lambda *_: result)
    with pytest.raises(UserError, match=r"algorithm\.adv_type: opo:opo must return 6 finite numbers, one per trajectory"):
        compute_advantages(inputs(), AdvantageSettings(adv_type="opo:opo"))


def test_check_config_takes_paths_that_lead_somewhere():
    def keys(**algorithm: object) -> set[str]:
        config = Config()
        config.cluster.device = "cpu"
        for name, value in algorithm.items():
            setattr(config.algorithm, name, value)
        return {problem.key for problem in check_config(config, for_training=True) if problem.key.startswith("algorithm")}

    assert keys(adv_type="opo:opo", loss_type="topr:topr") == set()
    assert keys(adv_type="opo:missing", loss_type="topr") == {"algorithm.adv_type", "algorithm.loss_type"}
    assert not any(is_dotted_path(name) for name in [*ADVANTAGES, *POLICY_LOSSES])


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Iterator[str]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(path)
    yield str(path)
    # Other tests of this process (vLLM's engine) need to make a process group of their own.
    torch.distributed.destroy_process_group()


def trajectories() -> list[Trajectory]:
    rng = np.random.default_rng(0)
    return [
        Trajectory(
            sample=Sample(f"s/{i}", GROUPS[i], rng.integers(0, 256, 6).tolist(), "", []),
            rollout_id=i % 3,
            response_ids=rng.integers(0, 256, length).astype(np.int32),
            loss_mask=np.ones(length, dtype=np.bool_),
            # Off the policy on both sides, so that the taper shows.
            rollout_logprobs=(-5.5 + 0.3 * (-1) ** i + rng.normal(0, 0.01, length)).astype(np.float32),
            turns=[],
            stop="answer",
        )
        for i, length in enumerate(LENGTHS)
    ]


def gradient_by_hand(model_path: str, steps: list[Trajectory]) -> dict[str, torch.Tensor]:
    """With transformers alone, a sequence at a time, token mean."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="eager")
    for t, advantage in zip(steps, opo_by_hand(), strict=True):
        ids = torch.tensor([*t.sample.prompt_ids, *t.response_ids.tolist()])[None]
        logp = model(ids).logits[0, 5:-1].log_softmax(-1).gather(-1, torch.tensor(t.response_ids).long()[:, None])[:, 0]
        drift = float((logp.detach() - torch.tensor(t.rollout_logprobs)).sum())
        weight = 1.0 if advantage > 0 else min(1.0, math.exp(drift))
        (-weight * advantage * logp.sum() / sum(LENGTHS)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_one_training_step_with_both(model_path):
    config = Config()
    config.rollout.model.model_path = model_path
    config.rollout.model.precision = "fp32"
    config.runner.seq_length = config.runner.max_tokens_per_mbs = 48
    config.algorithm.adv_type, config.algorithm.loss_type = "opo:opo", "topr:topr"
    config.algorithm.recompute_logprobs = False
    config.algorithm.kl_beta = 0.0
    config.actor.optim.adam_eps = 1e6  # so large that a step of AdamW is lr / eps = 1 gradient
    config.actor.optim.clip_grad = 1e9
    config.actor.optim.weight_decay = 0.0
    config.actor.optim.lr = 1e6
    policy = Policy.start(config, Device.detect("cpu"))
    before = {name: tensor.clone() for name, tensor in policy.named_weights()}
    steps = trajectories()
    advantages = compute_advantages(inputs(), AdvantageSettings(adv_type=config.algorithm.adv_type)).tolist()
    metrics = policy.train_step(steps, advantages, [0] * len(steps))
    after = dict(policy.named_weights())
    expected = gradient_by_hand(model_path, steps)
    assert metrics["actor/updates"] == 1
    assert expected.keys() == before.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(before[name] - after[name], gradient, atol=1e-6, rtol=1e-3)
