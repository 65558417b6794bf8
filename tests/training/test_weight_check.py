"""The check after the first weight update: what counts as rounding, and what as other weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from searchr1.errors import UserError
from searchr1.training.weight_sync import actor_logprobs, check_gap, validate_weights

PROBE = [[5, 6, 7], [8, 9]]


def cluster_that_differs_by(gap: float) -> SimpleNamespace:
    """An actor, and two engines of which the second one differs at one token of three."""

    def group(*answers):
        return SimpleNamespace(probe_logprobs=lambda probe: SimpleNamespace(wait=lambda: list(answers)))

    ours = [[0.0, -1.5, -2.0], [0.0, -0.5]]
    return SimpleNamespace(actor=group(ours), rollout=group(ours, [[0.0, -1.5, -2.0 + gap], [0.0, -0.5]]))


@pytest.mark.parametrize("precisions", [("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "bf16")])
def test_rounding_of_the_coarser_side_is_no_difference(precisions):
    cluster = cluster_that_differs_by(0.12)
    gap = validate_weights(cluster, PROBE, actor_logprobs(cluster, PROBE), precisions)
    assert (gap.mean, gap.worst, gap.tokens) == (pytest.approx(0.04), pytest.approx(0.12), 3)


@pytest.mark.parametrize(
    ("gap", "precisions"),
    [
        (0.002, ("fp32", "fp32")),
        (0.12, ("fp32", "fp16")),
        (0.4, ("fp32", "bf16")),
        (float("nan"), ("bf16", "bf16")),
        (float("-inf"), ("bf16", "bf16")),
    ],
)
def test_more_than_rounding_in_one_engine_ends_the_run(gap, precisions):
    cluster = cluster_that_differs_by(gap)
    expected = actor_logprobs(cluster, PROBE)
    with pytest.raises(UserError, match="validate_weight_first_sync"):
        validate_weights(cluster, PROBE, expected, precisions)


def rows(*differences):
    """A sequence whose first token has no log-probability, and one that differs from it by these."""
    return [[0.0] * (len(differences) + 1)], [[0.0, *differences]]


def rounding(scale: float, tokens: int = 1000) -> list[float]:
    """Normal noise with a mean absolute value of `scale`."""
    return (np.random.default_rng(0).normal(0, scale * np.sqrt(np.pi / 2), tokens)).tolist()


@pytest.mark.parametrize(("precision", "scale"), [("bf16", 0.03), ("fp16", 0.004), ("fp32", 1e-4)])
def test_noise_of_a_precision_passes(precision, scale):
    assert check_gap(*rows(*rounding(scale)), precision).mean == pytest.approx(scale, rel=0.1)


@pytest.mark.parametrize(("precision", "outlier"), [("bf16", 1.5), ("fp16", 0.2)])
@pytest.mark.parametrize("tokens", [101, 1000])
def test_one_token_far_off_passes_in_half_precision(precision, outlier, tokens):
    scale = {"bf16": 0.03, "fp16": 0.004}[precision]
    gap = check_gap(*rows(outlier, *rounding(scale, tokens - 1)), precision)
    assert gap.worst == outlier


def test_in_fp32_no_token_is_an_exception():
    with pytest.raises(UserError, match=r"largest 0\.002 of 1000 tokens"):
        check_gap(*rows(0.002, *rounding(1e-5, 999)), "fp32")


def test_weights_that_few_tokens_use_show_in_the_percentile():
    with pytest.raises(UserError, match="99th percentile"):
        check_gap(*rows(*[1.5] * 20, *rounding(0.02, 980)), "bf16")


def test_the_first_tokens_do_not_thin_the_mean_and_one_token_prompts_prove_nothing():
    with pytest.raises(UserError, match="mean"):
        check_gap([[0.0, -1.0]] * 50, [[0.0, -1.11]] * 50, "bf16")
    with pytest.raises(UserError, match="longer prompts"):
        check_gap([[0.0]], [[0.0]], "bf16")


@pytest.fixture(scope="module")
def model():
    """A random model as sure of its tokens as a trained one: log-probabilities of 0 to -20."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, tie_word_embeddings=False, initializer_range=0.15,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def scores(model, ids):
    with torch.no_grad():
        logprobs = model(ids).logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return [[0.0, *row] for row in logprobs.tolist()]


def test_a_real_model_rounds_within_the_limits_and_a_torn_one_does_not(model):
    ids = torch.randint(300, (8, 60), generator=torch.Generator().manual_seed(1))
    exact = scores(model, ids)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        rounded = check_gap(exact, scores(copy.deepcopy(model).to(dtype), ids), precision)
        assert rounded.worst > 1e-3
    for name in ("model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
        torn = copy.deepcopy(model)
        tensor = torn.get_parameter(name)
        with torch.no_grad():  # half of its rows are another model's
            tensor[: len(tensor) // 2] = 0.15 * torch.randn(len(tensor) // 2, tensor.shape[1])
        with pytest.raises(UserError):
            check_gap(exact, scores(torn, ids), "bf16")
    stale = copy.deepcopy(model)
    stale.model.layers[1] = copy.deepcopy(model.model.layers[0])
    with pytest.raises(UserError):
        check_gap(exact, scores(stale, ids), "bf16")
