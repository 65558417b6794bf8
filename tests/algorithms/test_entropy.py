"""Log-probabilities and entropies from logits: values, gradients, memory, odd inputs."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1.algorithms import entropy as entropy_module
from searchr1.algorithms.entropy import logprobs_from_logits


def naive(logits_MV: torch.Tensor, targets_M: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    log_p_MV = (logits_MV / temperature).log_softmax(-1)
    return log_p_MV.gather(-1, targets_M[:, None]).squeeze(-1), -(log_p_MV.exp() * log_p_MV).sum(-1)


@settings(max_examples=40)
@given(st.integers(0, 9), st.integers(1, 17), st.sampled_from([0.5, 1.0, 1.7]), st.integers(0, 1000))
def test_values_and_gradients_equal_autograd_for_any_chunking(
    rows: int, vocabulary: int, temperature: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_MV = (5 * torch.randn(rows, vocabulary, dtype=torch.float64, generator=generator)).requires_grad_()
    targets_M = torch.randint(vocabulary, (rows,), generator=generator)
    first_M, second_M = torch.randn(2, rows, dtype=torch.float64, generator=generator)
    expected = naive(logits_MV, targets_M, temperature)
    (expected_grad,) = torch.autograd.grad((expected[0] * first_M + expected[1] * second_M).sum(), logits_MV)
    with mock.patch.dict(entropy_module.CHUNK_ELEMENTS, cpu=2 * vocabulary):
        found = logprobs_from_logits(logits_MV, targets_M, temperature, with_entropy=True)
        assert found.entropy_M is not None
        (found_grad,) = torch.autograd.grad((found.logprobs_M * first_M + found.entropy_M * second_M).sum(), logits_MV)
    torch.testing.assert_close(found.logprobs_M, expected[0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found.entropy_M, expected[1], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found_grad, expected_grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("part", ["logprobs_M", "entropy_M"])
def test_gradient_of_one_output_alone(part: str) -> None:
    logits_MV = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    targets_M = torch.tensor([0, 6, 3, 3, 1])
    torch.autograd.gradcheck(
        lambda logits: getattr(logprobs_from_logits(logits, targets_M, 0.8, with_entropy=True), part), logits_MV
    )


def test_low_precision_logits_are_worked_on_in_fp32() -> None:
    logits_MV = torch.randn(6, 1000).bfloat16().requires_grad_()
    targets_M = torch.arange(6)
    found = logprobs_from_logits(logits_MV, targets_M)
    assert found.logprobs_M.dtype == torch.float32
    torch.testing.assert_close(found.logprobs_M, naive(logits_MV.float(), targets_M, 1.0)[0])
    found.logprobs_M.sum().backward()
    assert logits_MV.grad is not None
    assert logits_MV.grad.dtype == torch.bfloat16


def test_shift_invariance_and_large_logits() -> None:
    logits_MV = torch.randn(4, 9, dtype=torch.float64)
    targets_M = torch.tensor([1, 2, 3, 4])
    plain = logprobs_from_logits(logits_MV, targets_M, with_entropy=True)
    shifted = logprobs_from_logits(logits_MV + 1e4, targets_M, with_entropy=True)
    torch.testing.assert_close(shifted.logprobs_M, plain.logprobs_M, atol=1e-10, rtol=0)
    torch.testing.assert_close(shifted.entropy_M, plain.entropy_M, atol=1e-10, rtol=0)


def test_forbidden_tokens_give_no_nan() -> None:
    logits_MV = torch.tensor([[0.0, -torch.inf, 1.0], [2.0, 0.0, -torch.inf]], requires_grad=True)
    found = logprobs_from_logits(logits_MV, torch.tensor([0, 1]), with_entropy=True)
    assert found.entropy_M is not None
    (found.logprobs_M.sum() + found.entropy_M.sum()).backward()
    assert found.logprobs_M.isfinite().all()
    assert found.entropy_M.isfinite().all()
    assert logits_MV.grad is not None
    assert logits_MV.grad.isfinite().all()


def test_uniform_entropy() -> None:
    found = logprobs_from_logits(torch.zeros(2, 64), torch.tensor([3, 9]), with_entropy=True)
    assert found.entropy_M is not None
    torch.testing.assert_close(found.entropy_M, torch.full((2,), 64.0).log())


def test_wrong_shapes_and_temperatures_are_rejected() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        logprobs_from_logits(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature"):
        logprobs_from_logits(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), temperature=0.0)
