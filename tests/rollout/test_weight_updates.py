"""Publishing weights, and loading them into a running engine."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2ForCausalLM

from searchr1.agent.settings import GenerateParams
from searchr1.errors import UserError
from searchr1.rollout import weights
from searchr1.rollout.engine import Engine, EngineError
from searchr1.rollout.weights import (
    publish_buckets,
    publish_weights,
    read_weights,
    release,
    same_buckets,
    weight_directory,
)

PROBES = [[5, 9, 200, 31, 7, 44, 120], list(range(3, 103))]


def expected_logprobs(model: Qwen2ForCausalLM, ids: list[int], never: int | None = None) -> torch.Tensor:
    """[len(ids) - 1] log-probabilities; token `never` cannot be sampled (`min_new_tokens` forbids the end)."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    if never is not None:
        logits[:, never] = float("-inf")
    scores = logits.log_softmax(-1)
    return scores[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def worst_difference(engine: Engine, model: Qwen2ForCausalLM, run: Any) -> float:
    scored = run(engine.logprobs(PROBES))
    return max(
        float((torch.tensor(scores[1:]) - expected_logprobs(model, ids)).abs().max())
        for ids, scores in zip(PROBES, scored, strict=True)
    )


def load(engine: Engine, model: Qwen2ForCausalLM, version: int, directory: Path, run: Any) -> None:
    manifest = publish_weights(model.named_parameters(), version, directory, bucket_bytes=100_000)
    run(engine.update_weights(manifest))
    release(manifest)


@pytest.fixture
def restored(engine: Engine, model_path: Path, tmp_path: Path, run: Any) -> Any:
    """The engine; its first weights come back afterwards."""
    yield engine
    load(engine, Qwen2ForCausalLM.from_pretrained(model_path), 0, tmp_path, run)


def test_engine_follows_ten_updates_of_a_tied_model(restored: Engine, model_path: Path, tmp_path: Path, run: Any) -> None:
    model = Qwen2ForCausalLM.from_pretrained(model_path)
    assert model.config.tie_word_embeddings
    assert worst_difference(restored, model, run) < 1e-4
    # A prompt that stays the same, so that a stale prefix cache would show.
    prompt = PROBES[1]
    greedy = GenerateParams(max_new_tokens=4, temperature=0.0)
    generator = torch.Generator().manual_seed(1)
    for version in range(1, 11):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        load(restored, model, version, tmp_path, run)
        assert restored.weight_version == version
        assert worst_difference(restored, model, run) < 1e-4
        generation = run(restored.generate(prompt, greedy))
        assert generation.weight_version == version
        ids = prompt + generation.token_ids
        expected = expected_logprobs(model, ids)[len(prompt) - 1 :]
        assert torch.allclose(torch.tensor(generation.logprobs), expected, atol=1e-4)
    assert list(tmp_path.iterdir()) == []


def test_an_update_in_mid_flight_loses_and_changes_nothing_it_should_not(
    restored: Engine, model_path: Path, tmp_path: Path, run: Any, until: Any
) -> None:
    """The same weights loaded again while 32 requests run: same tokens as undisturbed, seeds included."""
    model = Qwen2ForCausalLM.from_pretrained(model_path)
    load(restored, model, 7, tmp_path, run)
    prompts = [[3 + (i * j) % 290 for j in range(1, 40 + i)] for i in range(1, 33)]
    params = [GenerateParams(max_new_tokens=120, min_new_tokens=120, seed=i) for i in range(32)]

    async def generate(update: bool) -> list[Any]:
        tasks = [asyncio.create_task(restored.generate(p, q)) for p, q in zip(prompts, params, strict=True)]
        if update:
            for _ in range(2):
                steps = restored.stats().steps
                await until(lambda seen=steps: restored.stats().steps >= seen + 15)
                manifest = publish_weights(model.named_parameters(), 8, tmp_path)
                await restored.update_weights(manifest)
                release(manifest)
        assert not (update and all(task.done() for task in tasks))
        return await asyncio.gather(*tasks)

    undisturbed = run(generate(update=False))
    disturbed = run(generate(update=True))
    assert restored.weight_version == 8
    for one, other in zip(undisturbed, disturbed, strict=True):
        assert one.token_ids == other.token_ids
        assert torch.allclose(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-4)
        assert other.weight_version == 7


def test_a_mid_flight_update_takes_effect_at_once(
    restored: Engine, model_path: Path, tmp_path: Path, run: Any, until: Any
) -> None:
    old = Qwen2ForCausalLM.from_pretrained(model_path)
    new = Qwen2ForCausalLM.from_pretrained(model_path)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    prompt = PROBES[1]

    async def generate() -> Any:
        params = GenerateParams(max_new_tokens=150, min_new_tokens=150, seed=1)
        task = asyncio.create_task(restored.generate(prompt, params))
        steps = restored.stats().steps
        await until(lambda: restored.stats().steps >= steps + 20)
        manifest = publish_weights(new.named_parameters(), 1, tmp_path)
        await restored.update_weights(manifest)
        release(manifest)
        return await task

    generation = run(generate())
    ids = prompt + generation.token_ids
    actual = torch.tensor(generation.logprobs)
    # The first tokens fit the old weights and the last ones the new; somewhere between is one switch.
    eos = old.config.eos_token_id
    fits_old = (actual - expected_logprobs(old, ids, never=eos)[len(prompt) - 1 :]).abs() < 1e-4
    fits_new = (actual - expected_logprobs(new, ids, never=eos)[len(prompt) - 1 :]).abs() < 1e-4
    switch = int(fits_new.nonzero()[0])
    assert 15 <= switch < 150
    assert bool(fits_old[:switch].all())
    assert bool(fits_new[switch:].all())


def test_an_update_in_buckets_is_one_update(
    restored: Engine, model_path: Path, tmp_path: Path, run: Any, until: Any
) -> None:
    """Requests wait from the first bucket to the last; no more than two buckets exist at any time."""
    model = Qwen2ForCausalLM.from_pretrained(model_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    elements = sum(parameter.numel() for parameter in model.parameters())
    updates = restored.stats().weight_updates

    async def update() -> int:
        buckets = publish_buckets(model.named_parameters(), 9, tmp_path, elements, bucket_bytes=50_000)
        params = GenerateParams(max_new_tokens=100, min_new_tokens=100, seed=1)
        task = asyncio.create_task(restored.generate(PROBES[1], params))
        steps = restored.stats().steps
        await until(lambda: restored.stats().steps >= steps + 10)
        bucket, count = next(buckets), 1
        assert bucket.first
        while not bucket.last:
            following = next(buckets)
            assert len(list(Path(bucket.directory).glob("*.safetensors"))) <= 2
            await restored.update_weights(bucket)
            seen = restored.stats().steps
            await asyncio.sleep(0.05)
            assert restored.stats().steps == seen
            assert restored.weight_version != 9
            bucket, count = following, count + 1
        await restored.update_weights(bucket)
        release(bucket)
        await task
        return count

    assert run(update()) > 3
    assert restored.weight_version == 9
    assert restored.stats().weight_updates == updates + 1
    assert worst_difference(restored, model, run) < 1e-4
    assert list(tmp_path.iterdir()) == []


def test_every_rank_of_the_trainer_goes_in_the_same_steps(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(7 * i + 1) for i in range(20)}
    shells = [(name, torch.empty(tensor.shape, device="meta")) for name, tensor in tensors.items()]
    elements = sum(tensor.numel() for tensor in tensors.values())
    for bucket_bytes in (1, 100, 1000, 10**6):
        buckets = list(publish_buckets(tensors.items(), 1, tmp_path, elements, bucket_bytes))
        assert len(list(same_buckets(shells, bucket_bytes))) == len(buckets)
        assert [bucket.first for bucket in buckets] == [True] + [False] * (len(buckets) - 1)
        assert [bucket.last for bucket in buckets] == [False] * (len(buckets) - 1) + [True]
    with pytest.raises(ValueError, match="needs 5 elements and got 1350"):
        list(publish_buckets(tensors.items(), 1, tmp_path, 5))


def test_an_update_that_names_missing_files_leaves_the_engine_running(
    engine: Engine, model_path: Path, tmp_path: Path, run: Any
) -> None:
    model = Qwen2ForCausalLM.from_pretrained(model_path)
    manifest = publish_weights(model.named_parameters(), 3, tmp_path)
    release(manifest)
    version = engine.weight_version
    with pytest.raises(EngineError, match="version 3 are gone"):
        run(engine.update_weights(manifest))
    assert engine.weight_version == version
    assert worst_difference(engine, model, run) < 1e-4


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=3), min_size=1, max_size=8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bucket_bytes=st.integers(1, 200),
)
def test_published_tensors_come_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtype: torch.dtype, bucket_bytes: int
) -> None:
    root = tmp_path_factory.mktemp("weights")
    tensors = {f"layer.{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
    manifest = publish_weights(tensors.items(), 4, root, bucket_bytes=bucket_bytes)
    assert pickle.loads(pickle.dumps(manifest)) == manifest
    back = dict(read_weights(manifest.files))
    assert list(back) == list(tensors) == [info.name for info in manifest.tensors]
    for info in manifest.tensors:
        assert torch.equal(back[info.name], tensors[info.name])
        assert info.shape == tuple(back[info.name].shape)
        assert info.dtype == str(dtype).removeprefix("torch.")
    assert manifest.total_bytes >= sum(t.numel() * t.element_size() for t in tensors.values())
    release(manifest)
    release(manifest)
    assert list(root.iterdir()) == []


def test_views_and_tied_tensors_can_be_published(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    named = [("embed", base), ("head", base), ("transposed", base.t()), ("row", base[1])]
    back = dict(read_weights(publish_weights(named, 1, tmp_path).files))
    assert torch.equal(back["head"], base)
    assert torch.equal(back["transposed"], base.t())
    assert torch.equal(back["row"], base[1])


def test_publishing_is_all_or_nothing(tmp_path: Path) -> None:
    def broken() -> Any:
        yield "a", torch.ones(4)
        raise RuntimeError("the trainer died")

    with pytest.raises(RuntimeError, match="trainer died"):
        publish_weights(broken(), 1, tmp_path, bucket_bytes=1)
    for named in ([], [("a", torch.ones(1)), ("a", torch.ones(1))]):
        for bucket_bytes in (1, 100):
            with pytest.raises(ValueError, match="publish_weights"):
                publish_weights(named, 1, tmp_path, bucket_bytes=bucket_bytes)
    assert list(tmp_path.iterdir()) == []


def test_release_deletes_only_what_was_published(tmp_path: Path) -> None:
    manifest = publish_weights([("a", torch.ones(4))], 1, tmp_path)
    neighbour = tmp_path / "keep.safetensors"
    guest = Path(manifest.directory) / "keep.txt"
    for path in (neighbour, guest):
        path.write_text("mine")
    release(manifest)
    assert neighbour.exists()
    assert guest.exists()
    assert not Path(manifest.files[0]).exists()


def test_folders_of_killed_publishers_are_removed_and_live_ones_kept(tmp_path: Path) -> None:
    code = (
        "import sys, torch, os, signal\n"
        "from searchr1.rollout.weights import publish_weights\n"
        "print(publish_weights([('a', torch.ones(4))], 1, sys.argv[1]).directory, flush=True)\n"
        "sys.stdin.read()\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        folders = [Path(child.stdout.readline().strip()) for child in children if child.stdout is not None]
        children[0].kill()
        children[0].wait(timeout=30)
        old = time.time() - 3600
        for folder in folders:
            os.utime(folder, (old, old))
        mine = publish_weights([("a", torch.ones(4))], 2, tmp_path)
        os.utime(mine.directory, (old, old))
        publish_weights([("a", torch.ones(4))], 3, tmp_path)
        assert not folders[0].exists()
        assert folders[1].exists()
        assert Path(mine.directory).exists()
    finally:
        for child in children:
            child.kill()
            child.communicate(timeout=30)


def test_an_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(UserError, match="give a writable folder"):
        publish_weights([("a", torch.ones(1))], 1, blocker)


def test_a_full_folder_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(UserError, match="shm-size"):
        publish_weights([("a", torch.ones(1))], 1, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_shared_memory_is_chosen_only_with_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHARED_MEMORY", tmp_path)
    assert weight_directory(1, Path("elsewhere")) == tmp_path
    assert weight_directory(1 << 60, Path("elsewhere")) == Path("elsewhere")
    monkeypatch.setattr(weights, "SHARED_MEMORY", tmp_path / "missing")
    assert weight_directory(1, Path("elsewhere")) == Path("elsewhere")
