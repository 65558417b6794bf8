"""Packed attention: exact, without cross-talk, and loud when it is misused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from searchr1.errors import UserError
from searchr1.learner.attention import Borders, packed_attention, packed_model_inputs
from searchr1.learner.packing import PackedBatch, PackedSequence

LENGTHS = (7, 1, 12, 5)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}


def make_batch(ids_T: Tensor, lengths: tuple[int, ...] = LENGTHS) -> PackedBatch:
    zeros_T = torch.zeros(len(ids_T))
    offsets = [sum(lengths[:index]) for index in range(len(lengths))]
    return PackedBatch(
        input_ids_T=ids_T,
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        segment_ids_T=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        loss_mask_T=torch.zeros(len(ids_T), dtype=torch.bool),
        advantages_T=zeros_T,
        rollout_logprobs_T=zeros_T,
        old_logprobs_T=None,
        ref_logprobs_T=None,
        policy_positions_P=torch.zeros(0, dtype=torch.long),
        cu_seqlens=torch.tensor([*offsets, sum(lengths)], dtype=torch.int32),
        lengths=lengths,
        sequences=tuple(
            PackedSequence(index, offset, length, 0)
            for index, (offset, length) in enumerate(zip(offsets, lengths, strict=True))
        ),
    )


def make_model(family: str = "qwen2", key_value_heads: int = 2, attention: str = "searchr1_packed") -> PreTrainedModel:
    torch.manual_seed(1)
    config = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}[family](
        **SIZES, num_key_value_heads=key_value_heads, head_dim=8
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model


def random_ids(seed: int = 0) -> Tensor:
    return torch.randint(64, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_each_sequence_gets_the_logits_it_gets_alone(family: str, key_value_heads: int) -> None:
    ids_T = random_ids()
    packed, alone = (make_model(family, key_value_heads, name) for name in ("searchr1_packed", "eager"))
    logits_TV = packed(**packed_model_inputs(make_batch(ids_T))).logits[0]
    expected_TV = torch.cat([alone(input_ids=part[None]).logits[0] for part in ids_T.split(LENGTHS)])
    torch.testing.assert_close(logits_TV, expected_TV, atol=2e-5, rtol=1e-5)


def test_gradients_equal_those_of_separate_sequences_with_and_without_recomputation() -> None:
    ids_T = random_ids()
    weights_TV = torch.randn(sum(LENGTHS), 64, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    alone = make_model(attention="sdpa").double()
    expected_TV = torch.cat([alone(input_ids=part[None]).logits[0] for part in ids_T.split(LENGTHS)])
    (expected_TV * weights_TV).sum().backward()
    for recompute in (False, True):
        packed = make_model().double()
        packed.train()
        if recompute:
            packed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        (packed(**packed_model_inputs(make_batch(ids_T))).logits[0] * weights_TV).sum().backward()
        for mine, theirs in zip(packed.parameters(), alone.parameters(), strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            # transformers' norms work in fp32 whatever the model's dtype.
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_changing_a_sequence_changes_no_other_at_all(changed: int) -> None:
    model = make_model()
    ids_T = random_ids()
    other_T = ids_T.clone()
    start = sum(LENGTHS[:changed])
    mine = slice(start, start + LENGTHS[changed])
    other_T[mine] = (other_T[mine] + 1) % 64
    before_TV, after_TV = (model(**packed_model_inputs(make_batch(ids))).logits[0] for ids in (ids_T, other_T))
    others_T = torch.ones(len(ids_T), dtype=torch.bool)
    others_T[mine] = False
    assert torch.equal(before_TV[others_T], after_TV[others_T])
    assert not torch.equal(before_TV[mine], after_TV[mine])


def test_no_gradient_crosses_a_border() -> None:
    query, key, value = (torch.randn(1, 4, sum(LENGTHS), 8, requires_grad=True) for _ in range(3))
    output, _ = packed_attention(torch.nn.Module(), query, key, value, None, packed_borders=Borders(LENGTHS))
    output[0, 8:20].sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert (tensor.grad[0, :, :8] == 0).all()
        assert (tensor.grad[0, :, 20:] == 0).all()
        assert tensor.grad[0, :, 8:20].abs().sum() > 0


def test_the_future_is_not_seen() -> None:
    model = make_model()
    ids_T = random_ids()
    changed_T = ids_T.clone()
    changed_T[19] = (changed_T[19] + 1) % 64  # the last token of the sequence at 8 … 19
    before_TV, after_TV = (model(**packed_model_inputs(make_batch(ids))).logits[0] for ids in (ids_T, changed_T))
    assert (before_TV != after_TV).any(-1).nonzero().flatten().tolist() == [19]


def test_scaling_is_passed_on() -> None:
    query, key, value = torch.randn(3, 1, 4, 6, 8).unbind()
    found, _ = packed_attention(torch.nn.Module(), query, key, value, None, scaling=0.5, packed_borders=Borders((6,)))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5).transpose(1, 2)
    assert found.shape == (1, 6, 4, 8)
    torch.testing.assert_close(found, expected)


def test_a_call_without_borders_is_rejected() -> None:
    with pytest.raises(UserError, match="no sequence borders"):
        make_model()(input_ids=random_ids()[None])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"dropout": 0.1}, "attention_dropout"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, "attention_mask"),
        ({"sliding_window": 5}, "sliding_window=5"),
    ],
)
def test_what_it_cannot_do_is_rejected(arguments: dict[str, object], named: str) -> None:
    query, key, value = torch.randn(3, 1, 4, 6, 8).unbind()
    call: dict[str, object] = {"attention_mask": None, "packed_borders": Borders((6,)), "sliding_window": 6, **arguments}
    with pytest.raises(UserError, match=named):
        packed_attention(torch.nn.Module(), query, key, value, **call)  # type: ignore[arg-type]


def test_borders_that_do_not_fit_are_rejected() -> None:
    query, key, value = torch.randn(3, 1, 4, 6, 8).unbind()
    with pytest.raises(ValueError, match="one packed row of 5 tokens"):
        packed_attention(torch.nn.Module(), query, key, value, None, packed_borders=Borders((3, 2)))


@pytest.mark.gpu
@pytest.mark.parametrize("key_value_heads", [2, 4])
def test_gpu_half_precision_equals_fp32(key_value_heads: int) -> None:
    shapes = [(1, 4, sum(LENGTHS), 64), *[(1, key_value_heads, sum(LENGTHS), 64)] * 2]
    tensors = [torch.randn(shape, device="cuda").bfloat16() for shape in shapes]
    borders = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device="cuda")
    outputs, grads = [], []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [tensor.detach().to(dtype).clone().requires_grad_() for tensor in tensors]
        output, _ = packed_attention(torch.nn.Module(), *leaves, None, packed_borders=Borders(LENGTHS, borders))
        output.float().square().sum().backward()
        outputs.append(output.float())
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(outputs[0], outputs[1], atol=2e-2, rtol=2e-2)
    for half, full in zip(*grads, strict=True):
        assert half is not None
        torch.testing.assert_close(half.float(), full, atol=5e-2, rtol=5e-2)
