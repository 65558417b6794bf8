"""On a machine with a GPU: it is seen, and what install.sh asks for holds."""

from __future__ import annotations

import pytest

from searchr1 import nvidia
from searchr1.device import Device

pytestmark = pytest.mark.gpu


def test_the_gpu_is_seen_and_computes():
    assert Device.detect("auto").is_cuda
    assert nvidia.usable_gpu()
    assert nvidia.vllm_mismatch("cuda") is None


def test_the_driver_is_new_enough_by_every_witness():
    versions = [version for version in (nvidia.ask_smi().driver, nvidia.kernel_driver()[1]) if version is not None]
    assert not any(map(nvidia.is_old, versions))
    cuda = nvidia.libcuda_version()
    assert cuda is not None
    assert cuda >= nvidia.OLDEST_CUDA
    assert nvidia.choose_extra("gpu") == "gpu"
