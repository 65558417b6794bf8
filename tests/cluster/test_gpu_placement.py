"""Which GPUs RLinf's worker processes get: its own strategies and cluster, on a machine whose GPUs are pretended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import gpu_machine

from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).parents[1] / "support/gpu_workers.py"


@pytest.fixture(scope="module")
def cluster():
    return gpu_machine.rlinf_cluster()


class Launched:
    """In place of a worker class: records where its group would be launched."""

    def __init__(self, cluster):
        self.cluster = cluster

    def create_group(self, *args):
        return self

    def launch(self, cluster, placement_strategy, name, catch_system_failure):
        node = cluster.get_node_info(0)
        self.placements = placement_strategy.get_placement(cluster)
        self.accelerator = node.accelerator_type
        return self


def launched(cluster, component, visible, placement, **sizes):
    """CUDA_VISIBLE_DEVICES of each process of a group."""
    from searchr1.cluster.launch import Launcher
    from searchr1.cluster.worker_group import WorkerGroup

    config = Config()
    config.cluster.component_placement = {component: placement}
    for name, size in sizes.items():
        setattr(config.rollout, name, size)
    device = Device("cuda", slots=len(visible.split(",")), cores=16)
    worker = Launched(cluster)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", visible)
        group = Launcher(config, device, cluster, channel=None).launch(WorkerGroup, worker, component)
    assert group.size == len(worker.placements)
    assert [p.rank for p in worker.placements] == list(range(group.size))
    return worker


@pytest.mark.parametrize(
    ("component", "visible", "placement", "sizes", "expected"),
    [
        ("actor", "0,1,2,3,4,5,6,7", "all", {}, list("01234567")),
        ("actor", "4,5,6,7", "all", {}, list("4567")),
        ("actor", "0,1,2,3,4,5,6,7", "0,2", {}, list("02")),  # not three processes
        ("actor", "4,5,6,7", "0,2-3", {}, list("467")),
        ("inference", "7", "0", {}, ["7"]),
        ("rollout", "4,5,6,7", "all", {"tensor_parallel_size": 2}, ["4,5", "6,7"]),
        ("rollout", "0,1,2,3,4,5,6,7", "1,3,4,7", {"tensor_parallel_size": 2}, ["1,3", "4,7"]),
        ("rollout", "0,1,2,3,4,5,6,7", "all", {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}, ["0,1,2,3,4,5,6,7"]),
        # Neighbours are those that the variable lists side by side: 0 with 4, and so on.
        ("rollout", "6,2,0,4", "all", {"tensor_parallel_size": 2}, ["6,2", "0,4"]),
        ("actor", "6,2,0,4", "all", {}, list("6204")),
    ],
)
def test_processes_get_the_gpus_of_their_slots(cluster, component, visible, placement, sizes, expected):
    worker = launched(cluster, component, visible, placement, **sizes)
    assert [",".join(p.visible_accelerators) for p in worker.placements] == expected
    # RLinf's workers then take LOCAL_RANK 0: the first of those that they see.
    assert all(p.isolate_accelerator for p in worker.placements)
    assert [p.local_world_size for p in worker.placements] == [len(expected)] * len(expected)
    assert worker.accelerator == "NV_GPU"


def test_processes_without_a_gpu_are_launched_as_on_a_machine_without(cluster):
    worker = launched(cluster, "reward", "4,5", "all")
    assert [p.visible_accelerators for p in worker.placements] == [[], []]
    assert worker.accelerator == "NO_ACCEL"
    assert cluster.get_node_info(0).num_accelerators == 8  # for the next group


def test_a_gpu_that_the_driver_does_not_list_is_reported_before_workers_start(cluster):
    with pytest.raises(UserError, match=r"cluster\.device: torch uses GPU 11, but .* lists 8 GPUs"):
        launched(cluster, "actor", "3,11", "all")


NVML = """
#include <string.h>
int nvmlInitWithFlags(unsigned f) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 8; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **d) { *d = (void *)(unsigned long)(i + 1); return 0; }
int nvmlDeviceGetName(void *d, char *name, unsigned n) { strncpy(name, "NVIDIA H100 80GB HBM3", n); return 0; }
const char *nvmlErrorString(int e) { return "unknown"; }
"""
"""As much of the driver's management library as Ray and RLinf call."""


@pytest.fixture(scope="module")
def driver_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    (folder / "nvml.c").write_text(NVML)
    library = folder / "libnvidia-ml.so.1"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, folder / "nvml.c"], check=True)
    except FileNotFoundError:
        pytest.skip("there is no C compiler")
    return folder


def start(folder, visible):
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "RAY_ADDRESS")}
    environment |= {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(ROOT), "RLINF_LOG_LEVEL": "WARNING"}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return subprocess.Popen(
        [sys.executable, DRIVER], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


# Two Ray clusters, each with five worker processes that import torch: about a minute.
@pytest.mark.slow
def test_two_runs_on_one_machine_keep_to_their_own_gpus(driver_folder):
    """RLinf and Ray as they are, with a management library that lists eight GPUs."""
    runs = [start(driver_folder, visible) for visible in ("4,5,7", None)]
    outputs = [run.communicate(timeout=600) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(error[-3000:] for _, error in outputs)
    some, everything = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
    own = {"LOCAL_RANK": "0", "ACCELERATOR_TYPE": "NV_GPU"}
    assert some["actor"] == [{"CUDA_VISIBLE_DEVICES": gpu} | own for gpu in "47"]  # slots 0 and 2
    assert some["rollout"] == [{"CUDA_VISIBLE_DEVICES": "4,5"} | own]
    assert some["reward"] == [{"CUDA_VISIBLE_DEVICES": "4,5,7", "LOCAL_RANK": "0", "ACCELERATOR_TYPE": "NO_ACCEL"}]
    assert everything["actor"] == [{"CUDA_VISIBLE_DEVICES": gpu} | own for gpu in "02"]
    assert everything["rollout"] == [{"CUDA_VISIBLE_DEVICES": "0,1"} | own]
    assert everything["reward"][0]["CUDA_VISIBLE_DEVICES"] is None
    # What a worker with a GPU sends through the channel arrives at one without: no NCCL is opened between them.
    assert some["received"] == everything["received"] == ["from rollout"]
