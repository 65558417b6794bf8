"""The wheel: what is in it, and that the package works from it, without a clone."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from searchr1 import __version__

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.rst", "LICENSE", "searchr1", "examples/searchr1/config", "examples/demo/cold_start")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built from a copy: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    words = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(folder / "source"),
    ]
    built = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_it_holds_every_file_of_the_package(wheel: Path) -> None:
    expected = {
        str(Path(folder, name).relative_to(ROOT))
        for folder, _, names in os.walk(ROOT / "searchr1", followlinks=True)
        for name in names
        if "__pycache__" not in folder
    }
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if name.startswith("searchr1/")}
        assert held == expected
        for link, folder in (
            ("searchr1/recipes", "examples/searchr1/config"),
            ("searchr1/demo/cold_start", "examples/demo/cold_start"),
        ):
            files = sorted((ROOT / folder).iterdir())
            assert len(files) > 4
            for path in files:
                assert file.read(f"{link}/{path.name}") == path.read_bytes()


def test_its_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(file.read(name))
    assert (metadata["Name"], metadata["Version"]) == ("searchr1", __version__)
    assert metadata["Requires-Python"] == "<3.14,>=3.11"
    assert metadata["Author"] == "searchr1 contributors"
    core = [text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text]
    assert core
    heavy = ("torch", "transformers", "tokenizers", "vllm", "ray", "rlinf", "megatron", "fastapi", "faiss")
    assert [text for text in core if text.startswith(heavy)] == []


@pytest.mark.slow  # processes that import torch, after pip
@pytest.mark.timeout(300)
def test_commands_work_from_it_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    environment, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=60)
    python = environment / "bin/python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, timeout=100)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # behind the wheel's own files
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str) -> str:
        done = subprocess.run([*words], cwd=empty, env=env, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    searchr1 = str(environment / "bin/searchr1")
    assert run(searchr1, "--version").strip() == __version__
    assert str(site) in run(str(python), "-c", "import searchr1; print(searchr1.__file__)")
    run(searchr1, "demo-world", "--out", "runs/demo/world")
    assert "output      runs/demo/train" in run(searchr1, "check-config", "tiny-cpu", "runner.max_steps=2")
    run(searchr1, "demo", "--help")
