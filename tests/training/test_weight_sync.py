"""The order in which trainer and engines take turns in a weight update, with worker groups that only take notes."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from searchr1.rollout.weights import WeightManifest
from searchr1.training.weight_sync import sync_weights

BUCKETS = [
    WeightManifest(3, "d", f"d/bucket-{i % 2}", (), 8, first=i == 0, last=i == 3, warnings=("slow folder",) if i < 2 else ())
    for i in range(4)
]


def cluster(log: list[str], buckets: list[WeightManifest]) -> Any:
    left = iter(buckets)

    def actor(method: str) -> Any:
        def call(*args: Any) -> Any:
            log.append(f"actor.{method}")
            answer = [None, None] if method == "release_weights" else [next(left), None]
            return SimpleNamespace(wait=lambda: answer)

        return call

    def update_weights(bucket: WeightManifest) -> Any:
        number = buckets.index(bucket)
        log.append(f"load {number}")

        def wait() -> list[list[str]]:
            log.append(f"loaded {number}")
            return [["no pinned memory"], []] if bucket.last else [[], []]

        return SimpleNamespace(wait=wait)

    methods = ("publish_weights", "next_bucket", "release_weights")
    return SimpleNamespace(
        actor=SimpleNamespace(**{method: actor(method) for method in methods}),
        rollout=SimpleNamespace(update_weights=update_weights),
        wake_kv_caches=lambda: log.append("wake"),
    )


def test_a_bucket_is_written_while_one_is_read_and_never_over_it(caplog: pytest.LogCaptureFixture) -> None:
    log: list[str] = []
    with caplog.at_level(logging.WARNING):
        sync_weights(cluster(log, BUCKETS), 3)
    assert log == [
        "actor.publish_weights",
        "load 0", "actor.next_bucket", "loaded 0",
        "load 1", "actor.next_bucket", "loaded 1",
        "load 2", "actor.next_bucket", "loaded 2",
        "load 3", "loaded 3",
        "actor.release_weights", "wake",
    ]  # fmt: skip
    # Bucket 2 goes where 0 was: it is asked for after all engines have loaded 0.
    assert log.index("loaded 0") < log.index("load 1")
    assert [record.message for record in caplog.records] == ["slow folder", "no pinned memory"]


def test_a_model_of_one_bucket_takes_three_messages() -> None:
    log: list[str] = []
    sync_weights(cluster(log, [replace(BUCKETS[0], last=True)]), 3)
    assert log == ["actor.publish_weights", "load 0", "loaded 0", "actor.release_weights", "wake"]
