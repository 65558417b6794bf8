"""Hugging Face folders that cannot be loaded, and what is read of those that can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import make_model

from searchr1.checkpoints.hf_folder import INDEX, SINGLE, StoredWeights
from searchr1.checkpoints.mapping import TABLES, checkpoint_name, entries, hugging_face_shapes
from searchr1.checkpoints.model_shape import ModelShape, read_megatron_shape, rotary_frequencies
from searchr1.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_model("qwen2", True, tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(source, tmp_path):
    for name in ("config.json", SINGLE):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    return tmp_path


def check(folder: Path) -> None:
    with StoredWeights.open(folder, pickles=False) as weights:
        weights.check(read_megatron_shape(folder)[0])


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    found = load_file(folder / SINGLE)
    for name, tensor in tensors.items():
        found.pop(name, None)
        if tensor is not None:
            found[name] = tensor
    save_file(found, folder / SINGLE)


def test_a_whole_folder_passes_also_with_a_copy_of_the_tied_output_layer(folder):
    check(folder)
    embedding = load_file(folder / SINGLE)["model.embed_tokens.weight"]
    change(folder, **{"lm_head.weight": embedding.clone()})
    check(folder)
    change(folder, **{"lm_head.weight": embedding + 1})
    with pytest.raises(UserError, match="tie_word_embeddings: true, but lm_head"):
        check(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.norm.weight": None}, "missing model.norm.weight"),
        ({"model.norm.bias": torch.zeros(64)}, "unexpected model.norm.bias"),
        ({"model.norm.weight": torch.zeros(32)}, r"model.norm.weight is \(32,\) instead of \(64,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, tensors, message):
    change(folder, **tensors)
    with pytest.raises(UserError, match=f"does not fit the model's config.json: {message}"):
        check(folder)


def test_files_that_are_damaged_or_missing_are_named(folder):
    whole = (folder / SINGLE).read_bytes()
    for size in (4, 100, len(whole) - 10):
        (folder / SINGLE).write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"model.safetensors is damaged or cut short"):
            check(folder)
    (folder / SINGLE).unlink()
    with pytest.raises(UserError, match=r"no model.safetensors and no model.safetensors.index.json"):
        check(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(
        UserError, match=r"model-00001-of-00002.safetensors is missing; model.safetensors.index.json names it"
    ):
        check(folder)
    (folder / INDEX).write_text("{")
    with pytest.raises(UserError, match=r"index.json is damaged"):
        check(folder)


def test_a_rank_reads_only_its_part(source):
    """Of every tensor that is shared out, a rank of two reads half the elements."""
    arch, _ = read_megatron_shape(source)
    with StoredWeights.open(source, pickles=False) as weights:
        for entry in entries(arch):
            elements = 0

            def read(name, dim, start, stop):
                nonlocal elements
                found = weights.read(name, dim, start, stop)
                elements += found.numel()
                return found

            part = entry.read(read, 1, 2)
            assert tuple(part.shape) == entry.local_shape(2)
            whole = sum(torch.Size(shape).numel() for shape in entry.shapes)
            assert elements == whole if entry.kind == "copy" else elements <= (whole + 1) // 2 + part.numel() % 2


@pytest.mark.parametrize("family", TABLES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_table_has_every_tensor_of_transformers(family, tied, tmp_path):
    make_model(family, tied, tmp_path)
    arch, _ = read_megatron_shape(tmp_path)
    stored = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / SINGLE).items()}
    assert hugging_face_shapes(arch) == stored


def test_names_with_and_without_transformer_engine():
    names = ["decoder.layers.3.input_layernorm.weight", "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"]
    assert {checkpoint_name(name) for name in names} == {names[1]}
    names = ["decoder.layers.3.pre_mlp_layernorm.weight", "decoder.layers.3.mlp.linear_fc1.layer_norm_weight"]
    assert {checkpoint_name(name) for name in names} == {names[1]}
    assert checkpoint_name("decoder.final_layernorm.weight") == "decoder.final_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' has no Megatron mapping"),
        ({"use_sliding_window": True}, "use_sliding_window is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope_type 'yarn' is not supported"),
    ],
)
def test_models_that_megatron_would_compute_wrongly_are_rejected(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        rotary_frequencies(read_megatron_shape(folder)[1])


def test_layouts_that_do_not_fit_are_rejected():
    arch = ModelShape("qwen2", 2048, 11008, 36, 16, 2, 151936, True)
    arch.check_layout(2, 4)
    for sizes, message in (((4, 1), "num_key_value_heads = 2"), ((1, 5), "num_hidden_layers = 36")):
        with pytest.raises(UserError, match=message):
            arch.check_layout(*sizes)
