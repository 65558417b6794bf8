"""install.sh with a fake nvidia-smi and a fake virtual environment: what it decides, refuses, and leaves behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from searchr1.nvidia import device_files

pytestmark = pytest.mark.skipif(bool(device_files()), reason="fakes the answers of a machine that has no GPU")

ROOT = Path(__file__).resolve().parents[2]
TOOLS = "bash cat cut date dirname env grep rm sed sha256sum sh"
# A path of the repository is imported; everything else is written down.
PYTHON = """#!/bin/sh
case "$*" in
  "-m searchr1.nvidia choose"*|-c*) exec {real} "$@" ;;
  "-m venv"*)
    for folder; do :; done
    case "$*" in *--clear*) rm -rf "$folder"; echo clear >> {log} ;; esac
    mkdir -p "$folder/bin"; cp {inner} "$folder/bin/python"; echo venv >> {log} ;;
esac
"""
INNER = """#!/bin/sh
case "$*" in
  *"pip "*) echo "$*" >> {log} ;;
  "-m searchr1.nvidia verify") [ -n "$CUDA_WORKS" ] || {{ echo "install.sh: CUDA: no" >&2; exit 2; }}; echo "a fake GPU" ;;
esac
"""
SMI = """#!/bin/sh
case "$*" in
  -L) printf '%s\\n' "{list}"; exit {code} ;;
  *) echo "{driver}" ;;
esac
"""
H100 = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)"


class Machine:
    """A copy of what install.sh reads, with a PATH of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.log = folder / "repo", folder / "bin", folder / "log"
        (self.folder / "searchr1").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("install.sh", "pyproject.toml", "requirements"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.folder / name)
        for name in ("__init__.py", "errors.py", "exports.py", "nvidia.py"):
            shutil.copy(ROOT / "searchr1" / name, self.folder / "searchr1" / name)
        for tool in [*TOOLS.split(), "mkdir", "cp"]:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.script("gcc", "#!/bin/sh\n")
        inner = folder / "inner"
        self.script(inner, INNER.format(log=self.log))
        self.script("python3.11", PYTHON.format(real=sys.executable, log=self.log, inner=inner))

    def script(self, name: str | Path, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def smi(self, driver: str = "", listed: str = H100, code: int = 0) -> None:
        self.script("nvidia-smi", SMI.format(list=listed, code=code, driver=driver))

    def install(self, **env: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": str(self.bin), "HOME": os.environ["HOME"]} | env
        return subprocess.run(["bash", "install.sh"], cwd=self.folder, env=env, capture_output=True, text=True, timeout=60)

    @property
    def downloads(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def record(self) -> str | None:
        path = self.folder / ".venv/.searchr1-extra"
        return path.read_text().strip() if path.exists() else None

    @property
    def stamped(self) -> bool:
        return (self.folder / ".venv/.searchr1-stamp").exists()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_no_gpu_takes_the_cpu_build(machine):
    result = machine.install()
    assert result.returncode == 0, result.stderr
    assert "requirements/cpu.lock" in machine.downloads
    assert (machine.record, machine.stamped) == ("cpu", True)


@pytest.mark.parametrize("driver", ["550.54", "550.54.15", "470.256.02", "579.99"])
@pytest.mark.parametrize("forced", [{}, {"SEARCHR1_EXTRA": "gpu"}])
def test_an_old_driver_is_rejected_before_anything_is_downloaded(machine, driver, forced):
    machine.smi(driver)
    result = machine.install(**forced)
    assert result.returncode != 0
    message = f"driver: {driver} is too old for the CUDA 13 wheels; install 580 or newer, or SEARCHR1_EXTRA=cpu"
    assert message in result.stderr
    assert (machine.downloads, machine.record) == ("", None)
    assert machine.install(SEARCHR1_EXTRA="cpu").returncode == 0
    assert machine.record == "cpu chosen"


@pytest.mark.parametrize("driver", ["580.65.06", "610.1"])
def test_a_new_driver_is_taken_and_cuda_must_work_afterwards(machine, driver):
    machine.smi(driver)
    result = machine.install()
    assert result.returncode != 0
    assert "CUDA: no" in result.stderr
    assert ".[gpu,retrieval,dev]" in machine.downloads
    assert not machine.stamped
    result = machine.install(CUDA_WORKS="1")
    assert result.returncode == 0, result.stderr
    assert "a fake GPU" in result.stdout
    assert (machine.record, machine.stamped) == ("gpu", True)


def test_a_failing_nvidia_smi_is_reported_and_the_cpu_must_be_chosen(machine):
    machine.smi(listed="Failed to initialize NVML: Driver/library version mismatch", code=18)
    result = machine.install()
    assert result.returncode != 0
    assert "nvidia-smi fails here: Failed to initialize NVML: Driver/library version mismatch" in result.stderr
    assert "SEARCHR1_EXTRA=cpu" in result.stderr
    assert machine.downloads == ""


def test_nvidia_smi_without_a_gpu_takes_the_cpu_build(machine):
    machine.smi(listed="No devices were found", code=6)
    assert machine.install().returncode == 0
    assert machine.record == "cpu"


def test_a_forced_gpu_build_needs_a_driver_that_something_shows(machine):
    result = machine.install(SEARCHR1_EXTRA="gpu")
    assert result.returncode != 0
    assert "driver: neither nvidia-smi nor libcuda.so.1 shows one" in result.stderr
    assert machine.downloads == ""


def test_no_compiler_is_reported_before_anything_is_downloaded(machine):
    machine.smi("580.65")
    (machine.bin / "gcc").unlink()
    result = machine.install()
    assert result.returncode != 0
    assert "compiler: no gcc here" in result.stderr
    assert machine.downloads == ""


def test_a_chosen_build_stays_until_the_other_is_named(machine):
    machine.smi("580.65")
    assert machine.install(SEARCHR1_EXTRA="cpu").returncode == 0
    again = machine.install(CUDA_WORKS="1")
    assert "was made with SEARCHR1_EXTRA=cpu and stays so" in again.stdout
    assert "up to date (cpu)" in again.stdout
    assert (machine.record, "clear" in machine.downloads) == ("cpu chosen", False)
    changed = machine.install(SEARCHR1_EXTRA="gpu", CUDA_WORKS="1")
    assert changed.returncode == 0, changed.stderr
    assert "made anew" in changed.stdout
    assert (machine.record, "clear" in machine.downloads) == ("gpu chosen", True)


def test_a_build_that_nobody_chose_follows_the_machine_up_but_not_down(machine):
    assert machine.install().returncode == 0
    machine.smi("580.65")
    assert machine.install(CUDA_WORKS="1").returncode == 0
    assert (machine.record, "clear" in machine.downloads) == ("gpu", True)
    (machine.bin / "nvidia-smi").unlink()
    result = machine.install()
    assert result.returncode != 0
    assert "no GPU here, but .venv has the GPU build" in result.stderr
    assert machine.record == "gpu"


def test_an_environment_from_before_the_record_is_known_by_its_stamp(machine):
    assert machine.install().returncode == 0
    (machine.folder / ".venv/.searchr1-extra").unlink()
    machine.smi("580.65")
    assert "has the cpu build: it is made anew" in machine.install(CUDA_WORKS="1").stdout


def test_an_unknown_extra_is_rejected(machine):
    result = machine.install(SEARCHR1_EXTRA="cuda")
    assert result.returncode != 0
    assert "SEARCHR1_EXTRA must be cpu or gpu, not 'cuda'" in result.stderr
