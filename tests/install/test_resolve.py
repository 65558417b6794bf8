"""The pinned versions exist and agree: every extra is resolved for its platform, and nothing is downloaded."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.network

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements/cpu.lock"
CONSTRAINTS = ROOT / "requirements/gpu.constraints"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PYTHON = ["--python-version", "3.11"]
PLATFORM = ["--python-platform", "x86_64-manylinux_2_28", "--no-annotate", "--no-header"]
TOOLS = {"pip", "setuptools"}
"""install.sh brings these up to date itself."""
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
"""vLLM asks for them; their builds do not match the CPU build of torch, and text needs none of them (install.sh)."""
CPU_TORCH_INDEX = os.environ.get("TORCH_CPU_INDEX", "https://download.pytorch.org/whl/cpu")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9][\w.-]*)==(\S+)", text, re.M)
    return {canonical(name): version for name, version in found}


def pip_settings() -> dict[str, str]:
    """What pip is configured with on this machine, by files and by the environment, which comes last and wins."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    lines = re.findall(r"^(global|install|:env:)\.([\w-]+)=(.+)$", listed, re.M)
    order = ("global", "install", ":env:")
    return {name: ast.literal_eval(value) for _, name, value in sorted(lines, key=lambda line: order.index(line[0]))}


def compile_pins(*arguments: str, find_links: bool = False) -> subprocess.CompletedProcess[str]:
    """`uv pip compile` with pip's indexes.

    Links are for the CPU build of torch; to the GPU extra it would pass for the build of that version.
    """
    settings = pip_settings()
    words = [sys.executable, "-m", "uv", "pip", "compile", "-q", *PLATFORM, "--index-strategy", "unsafe-best-match"]
    words += [] if "--python-version" in arguments else PYTHON
    if index := settings.get("index-url"):
        words += ["--index-url", index]
    for index in settings.get("extra-index-url", "").split():
        words += ["--extra-index-url", index]
    if find_links:
        for link in settings.get("find-links", "").split():
            words += ["--find-links", link]
    for host in settings.get("trusted-host", "").split():
        words += ["--allow-insecure-host", host]
    env = dict(os.environ)
    if timeout := settings.get("timeout", settings.get("default-timeout")):
        env.setdefault("UV_HTTP_TIMEOUT", str(timeout))
    if certificate := settings.get("cert"):
        env.setdefault("SSL_CERT_FILE", certificate)
    return subprocess.run([*words, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def compile_cpu_pins(*arguments: str) -> subprocess.CompletedProcess[str]:
    """With the CPU build of torch from where pip looks, else from its own index, as install.sh does it."""
    result = compile_pins(*arguments, find_links=True)
    if result.returncode and "torch==" in result.stderr:
        result = compile_pins(*arguments, "--extra-index-url", CPU_TORCH_INDEX, find_links=True)
    return result


def extras(*names: str) -> list[str]:
    return [word for name in names for word in ("--extra", name)]


def test_every_extra_is_resolved_by_a_test_here():
    assert set(EXTRAS) == {"train", "cpu", "gpu", "retrieval", "wandb", "swanlab", "docs", "dev"}


def test_gpu_extra_resolves_to_the_constraints():
    result = compile_pins("-c", str(CONSTRAINTS), *extras("gpu", "retrieval", "dev", "wandb", "swanlab"), "pyproject.toml")
    assert result.returncode == 0, result.stderr
    resolved, constrained = pins(result.stdout), pins(CONSTRAINTS.read_text())
    assert {name: version for name, version in resolved.items() if name not in TOOLS} == constrained


def test_cpu_extra_resolves_to_the_lock():
    result = compile_cpu_pins("-c", str(LOCK), *extras("cpu", "retrieval", "dev", "wandb", "swanlab"), "pyproject.toml")
    assert result.returncode == 0, result.stderr
    resolved, locked = pins(result.stdout), pins(LOCK.read_text())
    assert {name for name in resolved if name not in locked} <= TOOLS | LEFT_OUT
    assert {name: version for name, version in resolved.items() if name in locked} == {
        name: version for name, version in locked.items() if name in resolved
    }


def test_gpu_extra_resolves_to_the_constraints_on_python_3_12():
    result = compile_pins(
        "--python-version", "3.12", "-c", str(CONSTRAINTS), *extras("gpu", "dev", "wandb", "swanlab"), "pyproject.toml"
    )
    assert result.returncode == 0, result.stderr
    resolved, constrained = pins(result.stdout), pins(CONSTRAINTS.read_text())
    assert {name: version for name, version in resolved.items() if name not in TOOLS} == constrained


def test_gpu_extra_waits_for_cuda_python_on_python_3_13():
    """If this fails because it resolves, add 3.13 to the test above."""
    result = compile_pins("--python-version", "3.13", "-c", str(CONSTRAINTS), *extras("gpu"), "pyproject.toml")
    assert result.returncode != 0
    assert "cuda-python" in result.stderr


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_cpu_extra_resolves_to_the_lock_on_later_pythons(version, tmp_path):
    """But for torch, whose CPU build comes from PyTorch's own index, and what the ordinary build of torch brings."""
    lock, override = tmp_path / "lock.txt", tmp_path / "override.txt"
    lock.write_text(re.sub(r"^(torch|triton)==.*\n", "", LOCK.read_text(), flags=re.M))
    override.write_text("torch==2.13.0\n")
    words = ["--python-version", version, "-c", str(lock), "--override", str(override)]
    result = compile_pins(*words, *extras("cpu", "dev", "wandb", "swanlab"), "pyproject.toml")
    assert result.returncode == 0, result.stderr
    resolved, locked = pins(result.stdout), pins(LOCK.read_text())
    same = {name for name in resolved if name in locked} - {"torch", "triton"}
    assert len(same) > 150
    assert {name: resolved[name] for name in same} == {name: locked[name] for name in same}


def test_every_line_of_the_lock_can_be_installed():
    result = compile_cpu_pins("--no-deps", str(LOCK))
    assert result.returncode == 0, result.stderr
    assert pins(result.stdout) == pins(LOCK.read_text())


@pytest.mark.parametrize("names", [(), ("train",), ("retrieval",), ("wandb", "swanlab"), ("docs",), ("dev",)])
@pytest.mark.parametrize("version", ["3.11", "3.13"])
def test_extras_without_torch_resolve_alone(names, version):
    result = compile_pins("--python-version", version, *extras(*names), "pyproject.toml")
    assert result.returncode == 0, result.stderr


def test_a_pin_that_does_not_exist_is_seen(tmp_path):
    wrong = tmp_path / "requirements.in"
    wrong.write_text("faiss-gpu-cu12==1.15.1\n")
    assert compile_pins(str(wrong)).returncode != 0


def test_a_pin_that_contradicts_another_is_seen(tmp_path):
    wrong = tmp_path / "constraints.txt"
    wrong.write_text(re.sub(r"^apache-tvm-ffi==.*", "apache-tvm-ffi==0.1.15.post2", CONSTRAINTS.read_text(), flags=re.M))
    result = compile_pins("-c", str(wrong), *extras("gpu"), "pyproject.toml")
    assert result.returncode != 0
    assert "apache-tvm-ffi" in result.stderr
