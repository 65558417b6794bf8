"""Tensors cut for any number of ranks and put together again, for random heads, groups and vocabularies."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import FAMILIES, architecture

from searchr1.checkpoints.mapping import entries, hugging_face_shapes


@st.composite
def architectures(draw):
    tensor_parallel = draw(st.sampled_from([1, 2, 4]))
    kv_heads = tensor_parallel * draw(st.integers(1, 3))
    return tensor_parallel, architecture(
        draw(st.sampled_from(FAMILIES)),
        num_hidden_layers=draw(st.integers(1, 2)),
        hidden_size=draw(st.integers(1, 9)),
        num_attention_heads=kv_heads * draw(st.integers(1, 3)),
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 3)),
        intermediate_size=tensor_parallel * draw(st.integers(1, 5)),
        vocab_size=draw(st.integers(1, 400)),
        tied=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=80)
@given(architectures())
def test_parts_of_all_ranks_give_the_sources_again_and_the_whole_does_too(drawn):
    tensor_parallel, arch = drawn
    shapes = hugging_face_shapes(arch)
    tensors = {name: torch.arange(torch.Size(shape).numel()).view(shape) + 1 for name, shape in shapes.items()}

    def read(name, dim, start, stop):
        return tensors[name].narrow(dim, start, stop - start)

    seen = set()
    for entry in entries(arch):
        whole = entry.read(read, 0, 1)
        parts = [entry.read(read, rank, tensor_parallel) for rank in range(tensor_parallel)]
        assert tuple(whole.shape) == entry.global_shape
        assert all(tuple(part.shape) == entry.local_shape(tensor_parallel) for part in parts)
        for found in (dict(entry.to_hugging_face(parts)), dict(entry.to_hugging_face([whole]))):
            assert tuple(found) == entry.sources
            assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())
        seen |= set(entry.sources)
    assert seen == shapes.keys()
