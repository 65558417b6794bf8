"""`searchr1 verify` on every kind of folder: intact, with any bit changed, and what it does not know."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from support.bit_flips import flipped, random_flips

from searchr1.checkpoints.hf2mg import MegatronOptions, hf2mg
from searchr1.checkpoints.manifest import new_checkpoint
from searchr1.checkpoints.metadata import read_metadata
from searchr1.checkpoints.model_folder import MODEL_SUMS, verify_weights
from searchr1.checkpoints.to_hf import Options, mg2hf
from searchr1.cli import main
from searchr1.commands import build_index as build
from searchr1.errors import UserError
from searchr1.retrieval.index.corpus import Corpus


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, what hf2mg makes of it, a run with two checkpoints of that, and a model converted back."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=128, num_key_value_heads=2, max_position_embeddings=64, **small)
    Qwen2ForCausalLM(config).save_pretrained(root / "hf")
    for step in (9, 10):
        with new_checkpoint(root / "run/checkpoints", step) as folder:
            (folder / "runner.json").write_text(json.dumps({"step": step}))
            hf2mg(root / "hf", folder / "actor", MegatronOptions(file_bytes=20_000))
            (folder / "actor" / MODEL_SUMS).unlink()  # a trainer writes none
    hf2mg(root / "hf", root / "megatron")
    mg2hf(root / "run/checkpoints/global_step_9/actor", root / "exported", options=Options(shard_bytes=20_000))
    return root


def run(capsys, *words):
    code = main(["verify", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_what_is_intact_is_said_to_be_with_what_it_was_compared_with(world, capsys):
    code, out, err = run(capsys, world / "run/checkpoints/global_step_9", world / "exported", world / "hf")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert re.fullmatch(r"\S+global_step_9: intact \(checkpoint, [\d.]+ kB, by checksums\)", lines[0])
    assert re.fullmatch(r"\S+exported: intact \(model, [\d.]+ kB, by checksums\)", lines[1])
    assert re.fullmatch(r"\S+hf: intact \(model, [\d.]+ kB, by headers and sizes; it has no checksums\)", lines[2])


@pytest.mark.parametrize("name", ["run", "run/checkpoints"])
def test_a_run_is_all_of_its_checkpoints_in_order(world, capsys, name):
    code, out, _ = run(capsys, world / name)
    assert code == 0
    assert [line.partition(":")[0].rpartition("/")[2] for line in out.splitlines()] == ["global_step_9", "global_step_10"]
    aside = world / "run/checkpoints/abandoned_step_12"
    shutil.copytree(world / "run/checkpoints/global_step_10", aside)
    try:
        with flipped(aside / "actor/__0_0.distcp", 99):
            code, out, _ = run(capsys, world / name)
    finally:
        shutil.rmtree(aside)
    assert code == 1
    assert f"{aside / 'actor/__0_0.distcp'} has changed since it was written" in out
    assert "abandoned_step_12: 1 damaged" in out


def test_a_part_of_a_checkpoint_is_verified_alone(world, capsys):
    checkpoint = world / "run/checkpoints/global_step_9"
    with flipped(checkpoint / "runner.json", 3):
        assert run(capsys, checkpoint / "actor")[0] == 0
        assert run(capsys, checkpoint)[0] == 1
    with flipped(checkpoint / "manifest.json", 50):
        code, out, _ = run(capsys, checkpoint / "actor")
    assert code == 1
    assert f"{checkpoint / 'manifest.json'} " in out


@pytest.mark.parametrize("name", ["exported", "megatron", "run/checkpoints/global_step_10"])
def test_every_flipped_bit_is_named(world, capsys, name):
    for path, bit in random_flips(world / name, 60, seed=1):
        with flipped(path, bit):
            code, out, err = run(capsys, world / name)
        assert (code, err) == (1, "")
        assert out.startswith(f"{path} "), (path, bit, out)
        assert len(out.splitlines()) == 2


def test_machines_are_answered_in_json(world, capsys, tmp_path):
    damaged = world / "exported/config.json"
    with flipped(damaged, 4):
        code, out, err = run(capsys, "--json", world / "exported", world / "megatron", tmp_path)
    assert code == 2
    said = json.loads(out)
    assert said["intact"] is False
    assert [(row["kind"], row["by"], len(row["damaged"])) for row in said["results"]] == [
        ("model", "checksums", 1),
        ("weights", "checksums", 0),
    ]
    assert said["results"][0]["damaged"][0]["path"] == str(damaged)
    assert [row["path"] for row in said["refused"]] == [str(tmp_path)]
    assert err.startswith(f"searchr1 verify: {tmp_path}: is no folder that can be verified; give ")


@pytest.mark.parametrize("name", ["nowhere", "notes.md", "empty"])
def test_what_it_does_not_know_is_rejected(tmp_path, capsys, name):
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "empty").mkdir()
    code, out, err = run(capsys, tmp_path / name)
    assert (code, out) == (2, "")
    assert str(tmp_path / name) in err
    assert "give " in err


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    return path


def no_json(folder):
    (folder / "generation_config.json").write_text("{")
    return folder / "generation_config.json"


def deep_json(folder):
    (folder / "tokenizer.json").write_text("[" * 200_000)
    return folder / "tokenizer.json"


def long_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])
    return path


def no_shard(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    return folder / "model-00001-of-00001.safetensors"


def other_index(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model.safetensors.index.json"


def short_index(folder):
    path = other_index(folder)
    path.write_text(path.read_text().replace("lm_head", "model.norm"))
    return path


@pytest.mark.parametrize("damage", [cut, no_json, deep_json, long_header, no_shard, other_index, short_index])
def test_models_without_sums_are_verified_as_far_as_their_files_say(world, tmp_path, capsys, damage):
    shutil.copytree(world / "hf", tmp_path / "model")
    path = damage(tmp_path / "model")
    code, out, _ = run(capsys, tmp_path / "model")
    assert code == 1
    assert out.startswith(str(path)), out


def test_adapters_and_pickled_weights_are_models_too(world, tmp_path, capsys):
    adapter, pickled = tmp_path / "adapter", tmp_path / "pickled"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    shutil.copy(world / "hf/model.safetensors", adapter / "adapter_model.safetensors")
    pickled.mkdir()
    shutil.copy(world / "hf/config.json", pickled)
    torch.save({"weight": torch.zeros(1000)}, pickled / "pytorch_model.bin")
    assert run(capsys, adapter, pickled)[0] == 0
    with flipped(pickled / "pytorch_model.bin", 8 * 2000):
        code, out, _ = run(capsys, pickled)
    assert code == 1
    assert "pytorch_model.bin is damaged (wrong checksum of" in out
    (adapter / "adapter_model.safetensors").write_bytes(b"short")
    assert run(capsys, adapter)[0] == 1


def test_checkpoints_without_sums_are_verified_by_pytorchs_own(world, tmp_path, capsys):
    folder = tmp_path / "megatron"
    shutil.copytree(world / "megatron", folder)
    (folder / MODEL_SUMS).unlink()
    code, out, _ = run(capsys, folder)
    assert code == 0
    assert "by PyTorch's checksums of each part" in out
    info = next(info for index, info in read_metadata(folder).storage_data.items() if "embedding" in index.fqn)
    with flipped(folder / info.relative_path, 8 * (info.offset + info.length // 2)):
        code, out, _ = run(capsys, folder)
    assert code == 1
    assert re.match(rf"{folder}/\S+\.distcp is damaged where embedding\S+ should be \(wrong checksum", out)
    ranks = tmp_path / "iter_0000001/mp_rank_00"
    ranks.mkdir(parents=True)
    torch.save({"model": {"a": torch.zeros(1000)}}, ranks / "model_optim_rng.pt")
    assert run(capsys, ranks.parent)[0] == 0
    with flipped(ranks / "model_optim_rng.pt", 8 * 2000):
        assert run(capsys, ranks.parent)[0] == 1


def test_a_changed_model_is_not_loaded_but_its_configuration_may_be_edited(world):
    exported = world / "exported"
    verify_weights(exported)
    verify_weights("Qwen/on-the-hub")
    weights = sorted(exported.glob("*.safetensors"))
    assert len(weights) > 1
    with flipped(weights[1], 12345), pytest.raises(UserError) as caught:
        verify_weights(exported)
    assert str(caught.value).startswith(f"{weights[1]} has changed since it was written")
    assert f"delete {MODEL_SUMS} there" in str(caught.value)
    with flipped(exported / "config.json", 4):
        verify_weights(exported)
    with flipped(exported / MODEL_SUMS, 99), pytest.raises(UserError, match=MODEL_SUMS):
        verify_weights(exported)


def test_a_corpus_is_compared_with_what_its_first_reader_noted(tmp_path, capsys):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "0", "contents": "\\"A\\"\\nfirst"}\n{"id": "1", "contents": "\\"B\\"\\nsecond"}\n')
    code, out, err = run(capsys, path)
    assert (code, out) == (2, "")
    assert "nothing is known of its contents" in err
    Corpus(path)
    capsys.readouterr()
    assert run(capsys, path)[0] == 0
    with flipped(path, 8 * 40):
        code, out, _ = run(capsys, path)
    assert code == 1
    assert out.startswith(f"{path} has changed")


def test_an_index_is_compared_with_its_manifest(tmp_path, capsys):
    corpus, index = tmp_path / "corpus.jsonl", tmp_path / "index"
    corpus.write_text('{"id": "0", "contents": "\\"A\\"\\nfirst"}\n{"id": "1", "contents": "\\"B\\"\\nsecond"}\n')
    build.main(["--corpus_path", str(corpus), "--save_dir", str(index), "--retriever_name", "bm25"])
    capsys.readouterr()
    code, out, _ = run(capsys, index)
    assert code == 0
    assert re.fullmatch(r"\S+index: intact \(index, [\d.]+ \w+, by checksums\)\n", out)
    for path, bit in random_flips(index, 14):
        with flipped(path, bit):
            code, out, _ = run(capsys, index)
        assert code == 1
        assert out.startswith(f"{path} ")


def test_an_index_is_verified_without_torch():
    imports = "import sys, searchr1.commands.verify, searchr1.retrieval.index.verify"
    code = f"{imports}; print({{'torch', 'transformers'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


def test_sums_are_not_copied_with_a_models_configuration(world, tmp_path):
    hf2mg(world / "exported", tmp_path / "again")
    assert not (tmp_path / "again/hf" / MODEL_SUMS).exists()
    mg2hf(tmp_path / "again", tmp_path / "out")
    assert main(["verify", str(tmp_path / "out")]) == 0
    with flipped(tmp_path / "again/__0_0.distcp", 77), pytest.raises(UserError, match=r"__0_0\.distcp has changed"):
        mg2hf(tmp_path / "again", tmp_path / "out2")


def test_other_libraries_do_not_mind_the_sums(world):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "exported", dtype=torch.float32)
    with safe_open(world / "hf/model.safetensors", "pt") as file:
        assert torch.equal(model.model.embed_tokens.weight, file.get_tensor("model.embed_tokens.weight"))
