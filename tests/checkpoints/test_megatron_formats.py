"""Hugging Face -> Megatron -> Hugging Face, with Megatron itself in between."""

from __future__ import annotations

import pytest
from support.convert_ranks import LAYOUTS, WAYS
from support.models import FAMILIES, MODELS, assert_same_tensors, model_name

from searchr1.checkpoints.to_hf import Options, mg2hf

NAMES = [model_name(family, tied, dtype) for family, tied in MODELS for dtype in ("fp32", "bf16")]


def test_every_family_met_every_way_of_naming_in_every_layout(saved_by_megatron):
    found = {(path.parent.name.split("-")[0], *path.name.split("-")[1:]) for path in saved_by_megatron.glob("*/megatron-*")}
    assert found == {(family, layout, way) for family in FAMILIES for layout in LAYOUTS for way in WAYS}


def test_megatron_loads_what_hf2mg_wrote_in_every_layout(saved_by_megatron):
    for rank in range(2):
        assert (saved_by_megatron / f"differences-{rank}").read_text() == ""


@pytest.mark.parametrize("name", NAMES)
def test_what_megatron_saved_in_every_layout_comes_back_bit_by_bit(saved_by_megatron, name, tmp_path):
    folder = saved_by_megatron / name
    checkpoints = sorted(folder.glob("megatron-*"))
    assert len(checkpoints) == len(LAYOUTS)
    for checkpoint in checkpoints:
        mg2hf(checkpoint, tmp_path / checkpoint.name, folder / "hf")
        assert_same_tensors(folder / "hf", tmp_path / checkpoint.name)


@pytest.mark.parametrize("name", NAMES)
def test_what_megatron_saved_rank_by_rank_comes_back_bit_by_bit(saved_by_megatron, name, tmp_path):
    folder = saved_by_megatron / name
    for layout in LAYOUTS:
        mg2hf(folder / f"torch-{layout}", tmp_path / layout, folder / "hf", Options(verify=True))
        assert_same_tensors(folder / "hf", tmp_path / layout)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers", ["stacked", "separate"])
def test_what_hf2mg_wrote_comes_back_bit_by_bit(saved_by_megatron, name, layers, tmp_path):
    folder = saved_by_megatron / name
    mg2hf(folder / layers, tmp_path / "out", options=Options(shard_bytes=100_000))
    assert (tmp_path / "out/model.safetensors.index.json").is_file()
    assert_same_tensors(folder / "hf", tmp_path / "out")
