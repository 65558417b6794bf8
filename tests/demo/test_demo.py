"""`searchr1 demo`: the order of its steps, with fake sub-commands that only write their files."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest

from searchr1 import device
from searchr1.commands.demo import main as demo_command
from searchr1.config.layout import group_ranks
from searchr1.config.load import load_config
from searchr1.demo import demo
from searchr1.demo.demo import CPU_RECIPES, GPU_RECIPES
from searchr1.demo.processes import Server
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.preflight.check import check_config


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Replace the sub-commands by fakes; `train` makes checkpoint number `steps`."""

    def command(name, *arguments, env=None, server=None):
        words = [str(argument) for argument in arguments]
        out = Path(env["SEARCHR1_DEMO_DIR"]) if env else tmp_path
        if name == "train":
            step = next(word.partition("=")[2] for word in words if word.startswith("runner.max_steps="))
            (out / f"train/checkpoints/global_step_{step}/actor").mkdir(parents=True)
            row = {"step": int(step), "val/exact_match": 0.5, "val/searches": 1.0}
            (out / "train/metrics.jsonl").write_text(json.dumps(row) + "\n")
        elif name == "convert":
            model = Path(words[words.index("--output") + 1])
            model.mkdir()  # like the real command, this fails if the folder exists
            (model / "from").write_text(words[words.index("--checkpoint") + 1])
        elif name == "eval":
            (out / "eval").mkdir(exist_ok=True)
            (out / "eval/eval.json").write_text(json.dumps({"val/exact_match": 0.5, "val/searches": 1.0}))

    @contextmanager
    def retrieval_server(world, log):
        yield Server("127.0.0.1:1", None, log)

    monkeypatch.setattr(demo, "run_command", command)
    monkeypatch.setattr(demo, "retrieval_server", retrieval_server)


@pytest.mark.usefixtures("commands")
def test_a_continued_demo_converts_its_newest_checkpoint(tmp_path, capsys):
    for steps in (2, 40):
        assert demo_command(["--out", str(tmp_path), "--steps", str(steps)]) == 0
        assert (tmp_path / "model/from").read_text() == str(tmp_path / f"train/checkpoints/global_step_{steps}/actor")
    assert f"page    {tmp_path}/train/report.html" in capsys.readouterr().out


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """Return a folder with the files that the demo's YAMLs name."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "world").mkdir()
    for name in ("train", "test"):
        (folder / f"world/{name}.jsonl").write_text("{}\n")
    return folder


@pytest.mark.parametrize("gpus", [0, 1, 3, 8])
def test_training_and_evaluation_use_one_device(monkeypatch, demo_folder, gpus):
    monkeypatch.setenv("SEARCHR1_DEMO_DIR", str(demo_folder))
    monkeypatch.setattr(device, "_cuda_device_count", lambda: gpus)
    monkeypatch.setattr(device.nvidia, "vllm_build", lambda: "cuda" if gpus else "cpu")
    kind = "cuda" if gpus else "cpu"
    recipes = demo.pick_recipes([])
    for path, groups in (
        (recipes.train, ["rollout", "reward", "actor", "inference"]),
        (recipes.eval, ["rollout", "reward"]),
    ):
        config = load_config(path, [f"rollout.model.model_path={demo.COLD_START}"])
        detected = Device.detect(config.cluster.device)
        assert detected.kind == kind
        assert all(group_ranks(config, group, detected) == [(0,)] for group in groups)
        assert check_config(config, "actor" in groups) == []


def test_the_gpu_recipes_equal_the_cpu_recipes_except_for_the_device():
    differing = {"cluster", "rollout", "actor"}
    for cpu_recipe, gpu_recipe in ((CPU_RECIPES.train, GPU_RECIPES.train), (CPU_RECIPES.eval, GPU_RECIPES.eval)):
        cpu, gpu = load_config(cpu_recipe), load_config(gpu_recipe)
        assert {name for name in vars(cpu) if getattr(cpu, name) != getattr(gpu, name)} - {"given", "notes"} == differing
        assert cpu.rollout.model.model_path == gpu.rollout.model.model_path


def test_overrides_for_the_machine_apply_to_the_evaluation_too(monkeypatch, commands, tmp_path):
    calls = []
    make_files = demo.run_command

    def command(name, *words, env=None, server=None):
        calls.append((name, words))
        make_files(name, *words, env=env, server=server)

    monkeypatch.setattr(demo, "run_command", command)
    words = ["cluster.device=cpu", "rollout.model.precision=fp16", "rollout.max_running_requests=4"]
    assert demo_command(["--out", str(tmp_path), "--steps", "1", *words]) == 0
    (evaluation,) = [words for name, words in calls if name == "eval"]
    assert evaluation == (CPU_RECIPES.eval, "runner.overwrite=True", "cluster.device=cpu", "rollout.model.precision=fp16")


def test_a_device_override_takes_precedence(monkeypatch):
    monkeypatch.setattr(device, "_cuda_device_count", lambda: 8)
    assert demo.pick_recipes(["cluster.device=cpu", "runner.seed=1"]) == CPU_RECIPES
    monkeypatch.setattr(device.nvidia, "vllm_build", lambda: "cuda")
    problems = {problem.key: problem.message for problem in check_config(load_config(CPU_RECIPES.train), True)}
    assert "cpu, but the vLLM installed here is the build for GPUs" in problems["cluster.device"]
    monkeypatch.setattr(device, "_cuda_device_count", lambda: 0)
    with pytest.raises(UserError, match="cuda was asked for"):
        demo.pick_recipes(["cluster.device=cuda"])


def test_a_machine_with_a_gpu_uses_the_cpu_only_on_request(monkeypatch, capsys):
    monkeypatch.setattr(device, "_cuda_device_count", lambda: 0)
    monkeypatch.setattr(device.nvidia, "device_files", lambda: ("/dev/nvidia0",))
    monkeypatch.delenv("SEARCHR1_EXTRA", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device.nvidia, "RECORD", "no-record")
    with pytest.raises(UserError, match="auto finds a GPU"):
        demo.pick_recipes([])
    monkeypatch.setenv("SEARCHR1_EXTRA", "cpu")
    device.nvidia._report_once.cache_clear()
    assert demo.pick_recipes([]) == CPU_RECIPES
    assert "auto is the CPU although a GPU is here (/dev/nvidia0): SEARCHR1_EXTRA=cpu" in capsys.readouterr().err
