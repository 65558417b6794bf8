"""The three commands as a user runs them: precision, shards, verification, scripts, memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.models import FAMILIES, assert_same_tensors, make_model, tensors_of

from searchr1.checkpoints import compare as verify
from searchr1.checkpoints import to_hf
from searchr1.checkpoints.hf2mg import MegatronOptions, hf2mg
from searchr1.checkpoints.hf_folder import StoredWeights
from searchr1.checkpoints.to_hf import Options, mg2hf
from searchr1.checkpoints.torch_dist import TorchDistFolder, TorchDistWriter
from searchr1.cli import main
from searchr1.commands.convert import carry_settings
from searchr1.config.load import load_config, save_config
from searchr1.data.model_settings import ModelSettings
from searchr1.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`hf` with a tokenizer, and `mg` made from it."""
    from searchr1.demo.cold_start_rows import train_tokenizer

    root = tmp_path_factory.mktemp("commands")
    make_model("qwen2", True, root / "hf", seed=7, vocab_size=2048)
    train_tokenizer().save_pretrained(root / "hf")
    hf2mg(root / "hf", root / "mg")
    return root


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_verify_compares_bits_and_logits_both_ways(tmp_path, family, dtype):
    make_model(family, family != "qwen3", tmp_path / "hf", seed=7)
    for lines in (
        hf2mg(tmp_path / "hf", tmp_path / "mg", MegatronOptions(dtype, verify=True)),
        mg2hf(tmp_path / "mg", tmp_path / "out", None, Options(dtype, verify=True)),
    ):
        assert "identical bit by bit" in lines[1]
        difference, largest = (float(text) for text in lines[2].split("largest difference ")[1].split(", largest logit "))
        assert difference <= 1e-4 * largest


def test_what_a_model_was_trained_with_goes_both_ways(folders, tmp_path, capsys):
    """Out of the run that the checkpoint lies in, into the model folder, and back into a checkpoint."""
    recipe = ROOT / "examples/searchr1/config/tiny-cpu.yaml"
    actor = tmp_path / "run/checkpoints/global_step_2/actor"
    shutil.copytree(folders / "mg", actor)
    save_config(load_config(recipe), tmp_path / "run/config.yaml")
    assert main(["convert", "mg2hf", "--checkpoint", str(actor), "--output", str(tmp_path / "hf")]) == 0
    assert "searchr1.json: template demo, 4 tool turns, 640 tokens" in capsys.readouterr().out
    found = ModelSettings.of_model(str(tmp_path / "hf"))
    assert found.values == ModelSettings.of(load_config(recipe)).values
    hf2mg(tmp_path / "hf", tmp_path / "mg")
    lines = mg2hf(tmp_path / "mg", tmp_path / "again", options=Options(carry=carry_settings))
    assert "searchr1.json: template demo" in lines[-1]
    assert (tmp_path / "again/searchr1.json").read_bytes() == (tmp_path / "hf/searchr1.json").read_bytes()
    # A base model's own settings are not those of a checkpoint that has some.
    (tmp_path / "hf/searchr1.json").write_text('{"format": 1}')
    mg2hf(tmp_path / "mg", tmp_path / "third", tmp_path / "hf", Options(carry=carry_settings))
    assert (tmp_path / "third/searchr1.json").read_bytes() == (tmp_path / "again/searchr1.json").read_bytes()


def test_verify_notices_a_wrong_bit_and_leaves_nothing(folders, tmp_path, monkeypatch):
    right = to_hf.stream_weights

    def wrong(specs, named, folder, shard_bytes):
        right(specs, named, folder, shard_bytes)
        file = folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(to_hf, "stream_weights", wrong)
    with pytest.raises(UserError, match=r"--verify: \S+ differs from the source"):
        mg2hf(folders / "mg", tmp_path / "out", options=Options(verify=True))
    assert not list(tmp_path.iterdir())


def test_the_probe_notices_an_error_of_the_mapping(folders, tmp_path, monkeypatch):
    right = verify.megatron_logits

    def other(source, arch, frequencies, ids_T, dtype):
        read = source.read
        # Queries, keys and values in another order, as in checkpoints of Megatron before version 2.
        monkeypatch.setattr(source, "read", lambda entry: read(entry).flip(0) if entry.kind == "qkv" else read(entry))
        return right(source, arch, frequencies, ids_T, dtype)

    monkeypatch.setattr(verify, "megatron_logits", other)
    with pytest.raises(UserError, match="--verify: the logits differ by"):
        mg2hf(folders / "mg", tmp_path / "out", options=Options(verify=True))


def test_precision_and_shards_and_files(folders, tmp_path, capsys):
    argv = [
        "--checkpoint",
        str(folders / "mg"),
        "--output",
        str(tmp_path / "out"),
        "--dtype",
        "bf16",
        "--shard-gib",
        "0.0001",
    ]
    assert main(["convert", "mg2hf", *argv]) == 0
    assert "50 tensors" in capsys.readouterr().out
    found, original = tensors_of(tmp_path / "out"), tensors_of(folders / "hf")
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in original.items())
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    left, right = (AutoTokenizer.from_pretrained(path) for path in (folders / "hf", tmp_path / "out"))
    assert left.get_vocab() == right.get_vocab()
    assert left.chat_template == right.chat_template
    kept = {path.name for path in (folders / "hf").iterdir() if "safetensors" not in path.name}
    written = {path.name for path in (tmp_path / "out").iterdir() if "safetensors" not in path.name}
    assert written == kept | {"checksums.json"}


def test_hf2mg_changes_the_precision_too(folders, tmp_path):
    hf2mg(folders / "hf", tmp_path / "mg", MegatronOptions(torch.float16))
    folder = TorchDistFolder(tmp_path / "mg")
    assert {folder.dtype(name) for name in folder.tensors} == {torch.float16}
    assert json.loads((tmp_path / "mg/hf/config.json").read_text())["dtype"] == "float16"


def test_fsdp2hf_through_the_command(folders, tmp_path, capsys):
    checkpoint = tmp_path / "global_step_1/actor"
    checkpoint.mkdir(parents=True)
    writer = TorchDistWriter(checkpoint)
    with StoredWeights.open(folders / "hf") as reader:
        for name in reader.specs:
            writer.add(f"model.{name}", reader.tensor(name))
        writer.add("model.lm_head.weight", reader.tensor("model.embed_tokens.weight"))  # tied: a second name
    writer.add("optimizer.state.model.embed_tokens.weight.exp_avg", torch.zeros(3))
    writer.finish()
    argv = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), "--hf-model", str(folders / "hf")]
    assert main(["convert", "fsdp2hf", *argv, "--verify"]) == 0
    assert "identical bit by bit" in capsys.readouterr().out
    assert_same_tensors(folders / "hf", tmp_path / "out")


def test_slices_of_a_tensor_cut_both_ways(tmp_path):
    """Chunks that no layer ends with: read through PyTorch's own writer, as FSDP and other frameworks save."""
    import torch.distributed.checkpoint as dcp

    whole = torch.randn(5, 7, 3)
    dcp.save(
        {"model": {"decoder.x": whole, "b": whole.bfloat16().t() if whole.ndim == 2 else whole[0]}}, checkpoint_id=tmp_path
    )
    folder = TorchDistFolder(tmp_path)
    assert torch.equal(folder.read("model.decoder.x"), whole)
    assert all(torch.equal(folder.read("model.decoder.x", layer), whole[layer]) for layer in range(5))
    assert torch.equal(folder.read("model.b", check=True), whole[0])
    folder.close()


@pytest.mark.parametrize(
    ("script", "source", "target"),
    [
        ("megatron_convertor/mg2hf_7b.sh", "mg", "hf"),
        ("megatron_convertor/hf2mg_3b.sh", "hf", "mg"),
    ],
)
def test_scripts_from_any_folder(folders, tmp_path, script, source, target):
    path = ROOT / "toolkits/ckpt_convertor" / script
    base = [str(folders / "hf")] if source == "mg" else []
    out = tmp_path / "out"
    # As an executable, or through `sh`, which is not bash everywhere.
    command = ["sh", str(path)] if "hf2mg" in script else [str(path)]
    done = subprocess.run([*command, str(folders / source), str(out), *base], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if target == "hf":
        assert_same_tensors(folders / "hf", out)
    else:
        assert (out / "common.pt").is_file()
    usage = subprocess.run(["sh", str(path)], capture_output=True, text=True)
    assert usage.returncode == 2
    assert path.name in usage.stderr


def test_the_scripts_of_all_sizes_are_the_same():
    small, large = (
        (ROOT / f"toolkits/ckpt_convertor/megatron_convertor/mg2hf_{size}.sh").read_text() for size in ("3b", "7b")
    )
    assert small == large.replace("mg2hf_7b", "mg2hf_3b")


def benchmark(shape, folder):
    command = [sys.executable, "benchmarks/convert.py", "--shape", shape, "--repeats", "1", "--folder", str(folder)]
    out = folder / "numbers.json"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(out.read_text())


@pytest.mark.slow
def test_memory_is_that_of_the_largest_tensor_not_of_the_model(tmp_path):
    """783 MB of weights, the largest tensor 65 MB."""
    steps = benchmark("tiny", tmp_path)["steps"]
    for step in ("hf2mg", "mg2hf"):
        assert steps[step]["peak_mib"] - steps[step]["imports_mib"] < 500, steps


@pytest.mark.soak
def test_a_3b_model_is_converted_in_less_than_2_gib(tmp_path):
    steps = benchmark("3b", tmp_path)["steps"]
    assert max(steps[step]["peak_mib"] for step in ("hf2mg", "mg2hf")) < 2048, steps
