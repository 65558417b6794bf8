"""Every loss option against the formulas of oracles.py in float64: value, gradient, and what must change nothing.

A row of `TABLE` is a setting, a row of `LAYOUTS` a way to lay the same sequences out. Every setting in every layout must
give the oracle's loss and gradients to 1e-10, and the oracle knows of no layout. Values at masked tokens are NaN throughout.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracles
from support.oracles import Token
from torch import Tensor

from searchr1.algorithms.aggregation import Denominators, check_aggregation
from searchr1.algorithms.correction import CorrectionSettings, correction_weights
from searchr1.algorithms.kl import KL_FUNCTIONS
from searchr1.algorithms.loss import LossConfig, LossInputs, loss_metrics, policy_gradient_loss
from searchr1.algorithms.policy_losses import POLICY_LOSSES, ClipSettings
from searchr1.algorithms.sums import Sums
from searchr1.algorithms.value_loss import clipped_value_loss

AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
LEVELS = ("token", "sequence", "geometric")
BOUNDS = ("truncate", "clip", "mask", "reject")
LONGEST = 9
PLAIN = LossConfig(ClipSettings(0.2, 0.2))
DUAL = ClipSettings(0.2, 0.28, 2.0)
TIS = CorrectionSettings("token", "clip", 0.5, 2.0, veto=1e-4)
EVERYTHING = LossConfig(DUAL, kl_beta=0.05, entropy_bonus=0.01, llds_coef=0.1, correction=TIS)

TABLE: dict[str, LossConfig] = {
    "clip": PLAIN,
    "clip-higher": replace(PLAIN, clip=ClipSettings(0.2, 0.28)),
    "no clip": replace(PLAIN, clip=ClipSettings(1.0, 1e30)),
    **{f"dual {name}": LossConfig(DUAL, name) for name in ("actor", "gspo")},
    "gspo": LossConfig(ClipSettings(0.03, 0.04), "gspo", check_aggregation("seq-mean-token-mean")),
    "cispo": LossConfig(ClipSettings(1.0, 0.5), "cispo"),
    "sapo": LossConfig(ClipSettings(0.2, 0.2, tau_positive=0.8, tau_negative=1.3), "sapo"),
    **{f"kl {name}": replace(PLAIN, kl_beta=0.3, kl_penalty_type=name) for name in ("k1", "k2", "k3", "abs")},
    "entropy": replace(PLAIN, entropy_bonus=0.2),
    **{f"llds {gate}": replace(PLAIN, llds_coef=0.4, llds_gate=gate) for gate in ("action", "response")},
    **{
        f"correction {level} {bound}": replace(PLAIN, correction=CorrectionSettings(level, bound, 0.7, 1.5, veto=0.3))
        for level in LEVELS
        for bound in BOUNDS
    },
    **{
        f"off-policy {level} {bound}": replace(
            PLAIN, correction=CorrectionSettings(level, bound, 0.7, 1.5, veto=0.3), ratio_is_correction=True
        )
        for level, bound in (("token", "mask"), ("geometric", "reject"), ("sequence", "clip"))
    },
    **{
        f"{name} {aggregation}, all options": replace(EVERYTHING, loss_type=name, aggregation=check_aggregation(aggregation))
        for name, aggregation in zip(("actor", "gspo", "cispo", "sapo"), AGGREGATIONS, strict=True)
    },
    **{
        f"{name} {aggregation}, all options but the KL": replace(
            EVERYTHING, loss_type=name, aggregation=check_aggregation(aggregation), kl_beta=0.0
        )
        for name, aggregation in zip(("sapo", "cispo", "actor", "gspo"), AGGREGATIONS, strict=True)
    },
}

Parts = list[list[int]]
"""Which sequences lie in which micro-batch."""
LAYOUTS: dict[str, tuple[Callable[[int, random.Random], Parts], bool]] = {
    "packed": (lambda n, r: [list(range(n))], False),
    "in another order": (lambda n, r: [r.sample(range(n), n)], False),
    "padded": (lambda n, r: [list(range(n))], True),
    "one sequence a micro-batch": (lambda n, r: [[i] for i in range(n)], False),
    "three ranks with two micro-batches each": (lambda n, r: _spread(n, 6, r), True),
}


def _spread(n: int, parts: int, r: random.Random) -> Parts:
    """Anywhere; some parts stay empty, as on a rank that is handed a filler batch."""
    found: Parts = [[] for _ in range(parts)]
    for index in r.sample(range(n), n):
        found[r.randrange(parts)].append(index)
    return found


def make_sequences(masks: list[list[bool]], seed: int, wild: bool) -> list[list[Token]]:
    """Random numbers for given masks. Wild ones leave every bound that there is, also the ±20 of the exponents."""
    rng = np.random.default_rng(seed)
    spread = 15.0 if wild else 0.4

    def token(policy: bool, advantage: float) -> Token:
        old = -float(rng.exponential(1.5))
        near = old + spread * rng.normal(size=3)
        return Token(float(near[0]), old, float(near[1]), float(near[2]), float(rng.exponential()), advantage, policy)

    found = []
    for mask in masks:
        advantage = float(rng.choice([-1.5, 0.0, 0.7]))
        per_token = rng.random() < 0.3
        found.append([token(policy, float(rng.normal()) if per_token else advantage) for policy in mask])
    return found


batches = st.builds(
    make_sequences,
    st.lists(st.lists(st.booleans(), max_size=7), min_size=1, max_size=5),
    st.integers(0, 2**31),
    st.sampled_from([False, False, True]),
)


def column(sequence: list[Token], name: str) -> Tensor:
    """A number of each token; NaN where nobody may look."""
    return torch.tensor([getattr(t, name) if t.policy else np.nan for t in sequence], dtype=torch.float64)


def counted(sequences: list[list[Token]]) -> Denominators:
    lengths = [sum(t.policy for t in sequence) for sequence in sequences]
    return Denominators(sum(lengths), sum(length > 0 for length in lengths), LONGEST)


def run(
    sequences: list[list[Token]], config: LossConfig, parts: Parts, padded: bool, scale: float
) -> tuple[float, list[Tensor], list[Tensor], dict[str, float]]:
    """Loss, both gradients by sequence, and metrics."""
    leaves = {name: [column(s, name).requires_grad_() for s in sequences] for name in ("logp", "entropy")}
    fixed = {name: [column(s, name) for s in sequences] for name in ("old", "rollout", "ref", "advantage")}
    longest = max(map(len, sequences))
    total, sums = torch.zeros((), dtype=torch.float64), Sums()
    for part in parts:
        # A prompt before, padding behind: more masked tokens of the same sequence.
        around = [(2, longest - len(sequences[i]) + 1) if padded else (0, 0) for i in part]

        def row(pieces: list[Tensor], part: list[int] = part, around: list[tuple[int, int]] = around) -> Tensor:
            found = [
                torch.nn.functional.pad(pieces[i], sides, value=float("nan")) for i, sides in zip(part, around, strict=True)
            ]
            return torch.cat([*found, torch.full((0 if part else 2,), torch.nan, dtype=torch.float64)])

        mask_T = row([torch.tensor([t.policy for t in s], dtype=torch.float64) for s in sequences])
        lengths = [sum(sides) + len(sequences[i]) for i, sides in zip(part, around, strict=True)] or [2]
        output = policy_gradient_loss(
            LossInputs(
                logprobs_T=row(leaves["logp"]),
                old_logprobs_T=row(fixed["old"]),
                advantages_T=row(fixed["advantage"]),
                loss_mask_T=mask_T == 1,
                segment_ids_T=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
                denominators=counted(sequences),
                rollout_logprobs_T=row(fixed["rollout"]),
                weight_scale=scale,
                ref_logprobs_T=row(fixed["ref"]),
                entropy_T=row(leaves["entropy"]),
            ),
            config,
        )
        total = total + output.loss
        sums = sums + output.sums
    flat = [*leaves["logp"], *leaves["entropy"]]
    slopes = torch.autograd.grad(total, flat, allow_unused=True, materialize_grads=True)
    return total.item(), list(slopes[: len(sequences)]), list(slopes[len(sequences) :]), loss_metrics(sums)


@pytest.mark.parametrize("name", TABLE)
@settings(max_examples=8)
@given(sequences=batches, seed=st.integers(0, 2**31))
def test_every_setting_equals_its_formula_in_every_layout(name: str, sequences: list[list[Token]], seed: int) -> None:
    config, scale = TABLE[name], 1.0
    if config.correction is not None and counted(sequences).tokens:
        mean = oracles.mean_weight(sequences, config.correction)
        scale = 1 / mean if mean > 0 else 1.0  # as with `normalize`
    expected = oracles.loss(sequences, config, LONGEST, scale)
    first: dict[str, float] | None = None
    for layout, (divide, padded) in LAYOUTS.items():
        parts = divide(len(sequences), random.Random(seed))
        found, d_logp, d_entropy, metrics = run(sequences, config, parts, padded, scale)
        first = first or metrics
        assert found == pytest.approx(expected.loss, rel=1e-10, abs=1e-10), layout
        assert metrics == pytest.approx(first, rel=1e-10, abs=1e-10), layout
        assert metrics["loss"] == pytest.approx(expected.loss, rel=1e-10, abs=1e-10), layout
        for gradients, slopes in ((d_logp, expected.d_logp), (d_entropy, expected.d_entropy)):
            for sequence, gradient, slope in zip(sequences, gradients, slopes, strict=True):
                assert gradient.tolist() == pytest.approx(slope, rel=1e-10, abs=1e-10), layout
                assert all(gradient[i] == 0 for i, t in enumerate(sequence) if not t.policy), layout


def test_the_table_has_every_name_that_the_yaml_may_use() -> None:
    rows = TABLE.values()
    assert {row.loss_type for row in rows} == set(POLICY_LOSSES)
    assert {row.aggregation for row in rows} == set(AGGREGATIONS)
    assert {(row.correction.level, row.correction.bound) for row in rows if row.correction} == {
        (level, bound) for level in LEVELS for bound in BOUNDS
    }
    covered = {KL_FUNCTIONS[row.kl_penalty_type] for row in rows if row.kl_beta}
    assert covered == set(KL_FUNCTIONS.values())


@settings(max_examples=40)
@given(
    st.lists(st.tuples(*[st.floats(-3, 3)] * 3), min_size=1, max_size=12),
    st.sampled_from([0.1, 0.5, 2.0]),
)
def test_the_value_loss_equals_its_formula(tokens: list[tuple[float, float, float]], clip: float) -> None:
    values_P, old_P, returns_P = torch.tensor(tokens, dtype=torch.float64).unbind(1)
    values_P = values_P.clone().requires_grad_()
    loss_P, _ = clipped_value_loss(values_P, old_P, returns_P, clip)
    (slope_P,) = torch.autograd.grad(loss_P.sum(), values_P)
    for token, value, slope in zip(tokens, loss_P.tolist(), slope_P.tolist(), strict=True):
        expected = oracles.value_term(*token, clip)
        assert value == pytest.approx(expected[0], abs=1e-10)
        # On the very edge of the clip either slope is right.
        if abs(abs(token[0] - token[1]) - clip) > 1e-9:
            assert slope == pytest.approx(expected[1], abs=1e-10)


@pytest.mark.parametrize(("dtype", "name"), [*zip([torch.bfloat16, torch.float16] * 2, sorted(POLICY_LOSSES), strict=True)])
def test_low_precision_is_added_up_in_at_least_fp32(dtype: torch.dtype, name: str) -> None:
    """4096 tokens: bf16 sums of ones end at 256, fp16 ones at 2048."""
    torch.manual_seed(0)
    old_T = (-torch.rand(4096) - 0.1).to(dtype)
    logp_T, rollout_T = ((old_T + 0.1 * torch.randn(4096)).to(dtype) for _ in range(2))
    outputs = []
    for cast in (dtype, torch.float64):
        output = policy_gradient_loss(
            LossInputs(
                logprobs_T=logp_T.to(cast),
                old_logprobs_T=old_T.to(cast),
                rollout_logprobs_T=rollout_T.to(cast),
                ref_logprobs_T=old_T.to(cast),
                entropy_T=-old_T.to(cast),
                advantages_T=torch.ones(4096, dtype=cast),
                loss_mask_T=torch.ones(4096, dtype=torch.bool),
                segment_ids_T=torch.arange(4096) // 512,
                denominators=Denominators(4096, 8, 512),
            ),
            replace(EVERYTHING, loss_type=name, correction=CorrectionSettings("token")),
        )
        assert output.loss.dtype == torch.promote_types(cast, torch.float32)
        outputs.append(loss_metrics(output.sums))
    for key, value in outputs[1].items():
        assert outputs[0][key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("level", LEVELS)
def test_weights_without_tokens_and_of_the_extremes(level: str) -> None:
    none = torch.zeros(0, dtype=torch.long)
    assert len(correction_weights(torch.zeros(0), none, CorrectionSettings(level)).weights_P) == 0  # type: ignore[arg-type]
    d_P = torch.tensor([1e4, -1e4, 0.0], dtype=torch.float64, requires_grad=True)
    found = correction_weights(d_P, none.new_zeros(3), CorrectionSettings(level, upper=1e9))  # type: ignore[arg-type]
    assert bool(found.weights_P.isfinite().all())
    assert not found.weights_P.requires_grad
