"""Model folders whose files do not fit their config.json: rejected by name, by every reader alike."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import VOCAB, make_model

from searchr1.checkpoints.hf2mg import hf2mg
from searchr1.checkpoints.hf_folder import StoredWeights
from searchr1.checkpoints.model_shape import read_megatron_shape
from searchr1.checkpoints.weight_check import check_model_folder, load_pretrained
from searchr1.config.load import ConfigError
from searchr1.config.schema import Config
from searchr1.errors import UserError
from searchr1.preflight.check import require_valid
from searchr1.preflight.check_models import check_models

Weights = dict[str, torch.Tensor]
NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    root = tmp_path_factory.mktemp("models")
    return {tied: make_model("qwen2", tied, root / str(tied)) for tied in (True, False)}


@pytest.fixture
def make(models: dict[bool, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tied or untied model with other tensors or another configuration."""

    def changed(tied: bool, change: Callable[[Weights], Weights] = lambda weights: weights, **config: object) -> Path:
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(models[tied], folder)
        weights = change(load_file(folder / "model.safetensors"))
        save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
        settings = json.loads((folder / "config.json").read_text()) | config
        settings = {name: value for name, value in settings.items() if value != "left out"}
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    return changed


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda found: {key: tensor for key, tensor in found.items() if key != name}


def put(name: str, tensor: torch.Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: tensor}


def renamed(change: Callable[[str], str]) -> Callable[[Weights], Weights]:
    return lambda found: {change(name): tensor for name, tensor in found.items()}


def assert_rejected(message: str, action: Callable[..., object], *args: object) -> None:
    with pytest.raises(UserError, match=message):
        action(*args)


# Every way in which tensors do not fit


PREFIXES = ("_orig_mod.", "module.", "model.", "base_model.model.", "_fsdp_wrapped_module.", "actor.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("tied", [True, False])
def test_names_under_a_prefix_are_rejected_and_the_prefix_is_named(make, tied, prefix):
    folder = make(tied, renamed(lambda name: prefix + name))
    assert_rejected(
        rf"missing \S+.*and \d+ more; unexpected {prefix}.*The names in the files begin with {prefix}",
        check_model_folder,
        folder,
    )


def test_names_of_a_bare_decoder_are_rejected(make):
    folder = make(True, renamed(lambda name: name.removeprefix("model.")))
    assert_rejected("The names in the files lack model.: the bare decoder was saved", check_model_folder, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(HEAD), "missing lm_head.weight. Untied models store their output layer.*tie_word_embeddings: true"),
        (without(NORM), "missing model.norm.weight. A file was not copied"),
        (put(NORM, torch.zeros(32)), r"model.norm.weight is \(32,\) instead of \(64,\)"),
        (put(UP, torch.zeros(64, 96)), r"up_proj.weight is \(64, 96\) instead of \(96, 64\)"),
        (lambda weights: weights | dict.fromkeys((EMBEDDING, HEAD), torch.zeros(320, 64)), "Set vocab_size in config.json"),
        (put("score.weight", torch.zeros(1, 64)), "unexpected score.weight. A reward model or critic"),
        (put("v_head.summary.weight", torch.zeros(1, 64)), "unexpected v_head.summary.weight"),
        (put(UP.replace("weight", "lora_A.default.weight"), torch.zeros(2, 64)), "These are LoRA adapters"),
        (put(UP, torch.zeros(96, 64, dtype=torch.int8)), "up_proj.weight is stored as int8: .* quantized"),
        (put(UP, torch.zeros(96, 64).to(torch.float8_e4m3fn)), "stored as float8_e4m3fn"),
        (put(UP.replace("weight", "weight_scale"), torch.ones(1)), "The weights are quantized"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_its_likely_cause(make, change, message):
    assert_rejected(message, check_model_folder, make(False, change))


def test_another_architecture_is_named(make):
    assert_rejected("missing .*q_norm.weight.*config.json and the files are of different models", check_model_folder,
            make(True, model_type="qwen3", architectures=["Qwen3ForCausalLM"]))  # fmt: skip
    assert_rejected("no usable config.json", check_model_folder, make(True, model_type="nonsense"))
    assert_rejected(
        r"quantization_config; train the unquantized", check_model_folder, make(True, quantization_config={"bits": 8})
    )


def test_legitimate_extras_pass(make):
    check_model_folder(
        make(False, lambda weights: weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    check_model_folder("Qwen/not-a-folder")  # a hub name, which is checked when it is loaded


# Tied and untied


def test_tied_and_untied_variants(make):
    copy = make(True, lambda weights: weights | {HEAD: weights[EMBEDDING].clone()})
    check_model_folder(copy)
    other = make(True, lambda weights: weights | {HEAD: weights[EMBEDDING] + 1e-3})
    message = "tie_word_embeddings: true, but lm_head.weight differs from model.embed_tokens.weight"
    assert_rejected(message, check_model_folder, other)
    assert_rejected("missing model.embed_tokens.weight", check_model_folder,
            make(True, lambda weights: {HEAD: weights[EMBEDDING]} | without(EMBEDDING)(weights)))  # fmt: skip
    assert_rejected("missing lm_head.weight", check_model_folder, make(True, tie_word_embeddings=False))


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma"])
def test_a_familys_default_counts_where_the_configuration_is_silent(family, tmp_path):
    """Gemma is tied by default, Qwen2 and Llama are not (transformers' configuration classes)."""
    from transformers import AutoConfig

    default = family == "gemma"
    assert AutoConfig.for_model(family).tie_word_embeddings is default
    settings = {"head_dim": 16} if family == "gemma" else {}
    for tied in (True, False):
        folder = make_model(family, tied, tmp_path / f"{family}-{tied}", **settings)
        config = json.loads((folder / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        (folder / "config.json").write_text(json.dumps(config))
        if tied == default:
            check_model_folder(folder)
        else:
            assert_rejected(
                "missing lm_head" if tied else "tie_word_embeddings: true, but lm_head", check_model_folder, folder
            )


# Files


def test_damaged_missing_and_contradicting_files_are_named(make):
    folder = make(False)
    os.truncate(folder / "model.safetensors", 5000)
    assert_rejected("model.safetensors is damaged or cut short", check_model_folder, folder)

    def sharded(change: Callable[[dict[str, str], Path], None]) -> Path:
        folder = make(False)
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        places = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(weights)}
        for file in set(places.values()):
            save_file({name: weights[name] for name in weights if places[name] == file}, folder / file)
        change(places, folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        return folder

    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    check_model_folder(sharded(lambda places, folder: None))
    gone = sharded(lambda places, folder: (folder / second).unlink())
    assert_rejected(rf"{second} is missing; model.safetensors.index.json names it", check_model_folder, gone)
    swapped = sharded(lambda places, folder: places.update({NORM: first if places[NORM] == second else second}))
    assert_rejected(
        "index.json does not fit its files: model.norm.weight not where it lists them", check_model_folder, swapped
    )

    def twice(places: dict[str, str], folder: Path) -> None:
        for file in (first, second):
            save_file(load_file(folder / file) | {"model.norm.weight": torch.ones(64)}, folder / file)

    assert_rejected(f"model.norm.weight is in both {first} and {second}", check_model_folder, sharded(twice))
    outside = sharded(lambda places, folder: places.update({NORM: "../x.safetensors"}))
    assert_rejected("names '../x.safetensors', which is outside", check_model_folder, outside)
    stale = sharded(lambda places, folder: shutil.copy(folder / first, folder / "model.safetensors"))
    assert_rejected("has both model.safetensors and model.safetensors.index.json", check_model_folder, stale)
    beside = make(False)
    shutil.copy(beside / "model.safetensors", beside / "old.safetensors")
    assert_rejected("has old.safetensors beside model.safetensors", check_model_folder, beside)


def test_folders_of_adapters_and_without_weights_are_named(make, tmp_path):
    folder = make(True)
    (folder / "model.safetensors").unlink()
    assert_rejected("no model.safetensors and no model.safetensors.index.json", check_model_folder, folder)
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert_rejected("holds LoRA adapters .* merge them", check_model_folder, folder)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch evil",)


def test_pickled_weights_are_read_without_running_what_is_in_them(make, tmp_path, monkeypatch):
    def pickled(content: object) -> Path:
        folder = make(False)
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")
        return folder

    weights = load_file(make(False) / "model.safetensors")
    whole = pickled(weights)
    check_model_folder(whole)
    from transformers import AutoModelForCausalLM

    loaded = load_pretrained(AutoModelForCausalLM, str(whole))
    assert torch.equal(loaded.get_output_embeddings().weight, weights[HEAD])
    assert_rejected("missing lm_head.weight", check_model_folder, pickled(without(HEAD)(weights)))
    tied = pickled(weights | {HEAD: weights[EMBEDDING]})
    (tied / "config.json").write_text(
        json.dumps(json.loads((tied / "config.json").read_text()) | {"tie_word_embeddings": True})
    )
    check_model_folder(tied)
    monkeypatch.chdir(tmp_path)
    message = "pytorch_model.bin is damaged, cut short or holds more than tensors"
    assert_rejected(message, check_model_folder, pickled(weights | {"x": Evil()}))
    assert not (tmp_path / "evil").exists()


def test_a_tokenizer_larger_than_the_vocabulary(make, caplog):
    folder = make(True)
    tokenizer = {"model": {"vocab": {"a": 0, "b": VOCAB}}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert_rejected(f"has tokens up to {VOCAB}, but config.json says vocab_size={VOCAB}", check_model_folder, folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"added_tokens": [{"id": VOCAB, "content": "b"}]}))
    check_model_folder(folder)
    assert "1 added tokens of tokenizer.json have no embedding" in caplog.text


# Every reader


BROKEN = {
    "no output layer": (without(HEAD), "missing lm_head.weight"),
    "a prefix": (renamed(lambda name: "_orig_mod." + name), "begin with _orig_mod"),
    "another shape": (lambda weights: weights | {NORM: torch.zeros(32)}, r"is \(32,\) instead of \(64,\)"),
    "one more": (lambda weights: weights | {"model.norm.bias": torch.zeros(64)}, "unexpected model.norm.bias"),
}


def read_by_transformers(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    load_pretrained(AutoModelForCausalLM, str(folder))


def read_by_fsdp(folder: Path, tmp_path: Path) -> None:
    from searchr1.device import Device
    from searchr1.learner.model import load_model

    load_model(str(folder), Device.detect("cpu"))


def read_by_megatron(folder: Path, tmp_path: Path) -> None:
    with StoredWeights.open(folder, pickles=False) as weights:
        weights.check(read_megatron_shape(folder)[0])


def read_by_engine(folder: Path, tmp_path: Path) -> None:
    from searchr1.device import Device
    from searchr1.rollout.settings import EngineSettings
    from searchr1.rollout.vllm_backend import VllmBackend

    VllmBackend(str(folder), Device.detect("cpu"), EngineSettings(max_model_len=64))


def read_by_sft(folder: Path, tmp_path: Path) -> None:
    from searchr1.commands.sft import parse
    from searchr1.training.sft import train

    train(parse(["--model", str(folder), "--data", "rows.jsonl", "--output", str(tmp_path / "out"), "--device", "cpu"]))


def read_by_converter(folder: Path, tmp_path: Path) -> None:
    hf2mg(folder, tmp_path / "converted")


def named_by_a_yaml(folder: Path, tmp_path: Path) -> None:
    config = Config()
    config.rollout.model.model_path = str(folder)
    with pytest.raises(ConfigError) as caught:
        require_valid(config, for_training=False)
    problems = [line for line in str(caught.value).splitlines() if "rollout.model.model_path" in line]
    raise UserError("\n".join(problems))


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize(
    "read",
    [read_by_transformers, read_by_fsdp, read_by_megatron, read_by_engine, read_by_sft, read_by_converter, named_by_a_yaml],
)
def test_every_reader_rejects_alike(make, tmp_path, case, read, monkeypatch):
    change, message = BROKEN[case]
    if read is read_by_sft:
        from searchr1.training import sft

        monkeypatch.setattr(sft, "init_process_group", lambda device: None)
        monkeypatch.setattr(sft.dist, "get_rank", lambda: 0)
    assert_rejected(message, read, make(False, change), tmp_path)
    assert not (tmp_path / "converted").exists()


def test_a_megatron_checkpoint_that_has_more_than_the_model_is_rejected(models, tmp_path):
    """Megatron would leave an untied model's output layer out of a tied one without a word."""
    config = Config()
    config.actor.training_backend = "megatron"
    config.actor.model.megatron_checkpoint = str(tmp_path / "untied")
    hf2mg(models[False], tmp_path / "untied")
    for tied in (False, True):
        config.rollout.model.model_path = str(models[tied])
        found = list(check_models(config, for_training=True))
        assert [problem.key for problem in found] == ["actor.model.megatron_checkpoint"] * tied
        assert all("unexpected output_layer.weight" in problem.message for problem in found)


def test_two_output_layers_are_rejected_at_loading_too(make, tmp_path):
    folder = make(True, lambda weights: weights | {HEAD: weights[EMBEDDING] + 1})
    assert_rejected("tie_word_embeddings: true, but lm_head.weight differs", read_by_transformers, folder, tmp_path)


def test_a_critic_takes_the_decoder_alone(make, caplog):
    """Its head is new: neither the language model's nor another's is used, and another's is mentioned."""
    check_model_folder(make(False, without(HEAD)), decoder_only=True)
    check_model_folder(make(True, lambda weights: weights | {HEAD: weights[EMBEDDING] + 1}), decoder_only=True)
    assert not caplog.text
    reward_model = make(False, lambda weights: without(HEAD)(weights) | {"score.weight": torch.zeros(1, 64)})
    check_model_folder(reward_model, decoder_only=True)
    assert "score.weight not used: the critic's head is new" in caplog.text
    folder = make(False, without(NORM))
    assert_rejected("missing model.norm.weight", lambda: check_model_folder(folder, decoder_only=True))

    from transformers import AutoModel

    assert load_pretrained(AutoModel, str(reward_model), decoder_only=True).embed_tokens.weight.shape == (VOCAB, 64)


def test_families_whose_tensors_transformers_fuses_are_checked_too(tmp_path):
    """Mixture-of-experts files hold each expert's matrices, the model one tensor of all."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    folder = make_model("qwen3_moe", False, tmp_path / "moe", **sizes)
    check_model_folder(folder)
    weights = load_file(folder / "model.safetensors")
    assert any("experts.0." in name for name in weights)
    save_file(without(NORM)(weights), folder / "model.safetensors", {"format": "pt"})
    assert_rejected("missing model.norm.weight", check_model_folder, folder)
