"""Which GPUs the slots of a run are, and placements that name slots that are not there."""

from __future__ import annotations

import re

import pytest

from searchr1.commands.check_config import explain
from searchr1.config.layout import group_ranks, parse_slots, visible_gpus
from searchr1.config.load import load_config
from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.preflight.check import check_config


def gpus(count: int) -> Device:
    return Device("cuda", slots=count, cores=16)


@pytest.mark.parametrize(
    ("value", "seen", "numbers"),
    [
        (None, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("4,5,6,7", 4, [4, 5, 6, 7]),
        (" 7, 3 ", 2, [7, 3]),  # CUDA numbers them in this order, so slot 0 is GPU 7
        ("2", 1, [2]),
    ],
)
def test_slots_are_the_gpus_that_cuda_visible_devices_names(value, seen, numbers):
    assert visible_gpus(gpus(seen), {} if value is None else {"CUDA_VISIBLE_DEVICES": value}) == numbers


@pytest.mark.parametrize(
    ("value", "seen", "message"),
    [
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", 1, "a GPU by its UUID"),
        ("0,GPU-8932f937", 1, "a GPU by its UUID"),
        ("MIG-GPU-8932f937/1/0", 1, "a part of a GPU (MIG)"),
        ("MIG-4c4a6a50", 1, "a part of a GPU (MIG)"),
        ("0,1,,3", 2, "'' in '0,1,,3' is no GPU's number"),
        ("", 1, "'' in '' is no GPU's number"),
        ("0,1,-1,2", 2, "'-1' in '0,1,-1,2' is no GPU's number"),  # CUDA stops at it
        ("1gpu2,2", 2, "'1gpu2' in"),  # CUDA reads 1
        ("0x1", 1, "'0x1' in"),
        ("0-3", 1, "'0-3' in '0-3' is no GPU's number"),
        ("all", 1, "'all' in"),
        ("0,1,0", 1, "names GPU 0 twice"),  # CUDA shows none
        ("4,04", 1, "names GPU 4 twice"),
        ("6,7,8,9", 2, "names 4 GPUs, but torch sees 2"),  # of 8: torch trims the list
    ],
)
def test_what_cannot_be_mapped_is_rejected_by_name(value, seen, message):
    with pytest.raises(UserError, match=f"^CUDA_VISIBLE_DEVICES: .*{re.escape(message)}"):
        visible_gpus(gpus(seen), {"CUDA_VISIBLE_DEVICES": value})


@pytest.mark.parametrize(
    ("placement", "slots", "expected"),
    [
        ("all", 4, [0, 1, 2, 3]),
        ("0,2", 4, [0, 2]),
        ("3,0-1", 4, [0, 1, 3]),
        (2, 4, [2]),
        ([2, 0], 4, [0, 2]),
        ("1 - 2", 4, [1, 2]),
    ],
)
def test_placements(placement, slots, expected):
    assert parse_slots(placement, slots, "key") == expected


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ("0-7", "key: '0-7' asks for slot 7, but there are 4 slots (numbered 0 to 3)"),
        ("0-99999999999999", "asks for slot 99999999999999, but there are 4"),
        ([0, 4], "'0,4' asks for slot 4"),
        ("3-1", "runs backwards; write 1-3"),
        ("0,0-1", "names slot 0 twice"),
        ("0-3:0-7", "numbers processes"),
        ("1-", "is no placement"),
        ("²", "is no placement"),
        ("", "is no placement"),
        ({"placement": "0-3"}, "is no placement"),
        (-1, "is no placement"),
    ],
)
def test_placements_that_are_none(placement, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_slots(placement, 4, "key")


def test_engines_of_several_gpus_may_leave_slots_out():
    config = Config()
    config.cluster.component_placement = {"rollout": "0,2,5-6"}
    config.rollout.tensor_parallel_size = 2
    assert group_ranks(config, "rollout", gpus(8)) == [(0, 2), (5, 6)]


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (8, "cluster.slots: 8 is more than the 4 GPUs"),
        (0, "cluster.slots: must be 1 or more"),
        (-1, "cluster.slots: must be"),
    ],
)
def test_more_slots_than_gpus_are_rejected(slots, message):
    config = Config()
    config.cluster.slots = slots
    with pytest.raises(UserError, match=message):
        group_ranks(config, "rollout", gpus(4))


def test_check_config_knows_the_gpus(tmp_path, monkeypatch):
    """On a machine of 8 GPUs of which this process was given the last four."""
    monkeypatch.setattr("searchr1.device._cuda_device_count", lambda: 4)
    (tmp_path / "run.yaml").write_text("cluster: {component_placement: {'actor,rollout,reward': all}}\n")

    def problems(*overrides):
        config = load_config(tmp_path / "run.yaml", overrides)
        return {p.key: p.message for p in check_config(config, for_training=True) if p.key.startswith(("cluster", "CUDA"))}

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert problems() == {}
    text = explain(load_config(tmp_path / "run.yaml"), for_training=True)
    assert "device      cuda, GPUs 4 5 6 7\n" in text
    assert "rollout   4 processes on slots 0 1 2 3\n" in text
    [message] = problems("cluster.component_placement={actor:4-7,rollout:all,reward:all}").values()
    assert message == "'4-7' asks for slot 7, but there are 4 slots (numbered 0 to 3); name only what is there, or all"
    assert problems("cluster.component_placement={actor:[0,2],rollout:all,reward:all}") == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,GPU-2,GPU-3,GPU-4")
    assert list(problems()) == ["CUDA_VISIBLE_DEVICES"]
    assert problems("cluster.device=cpu") == {}
