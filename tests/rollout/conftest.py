"""A tiny random Qwen2 with tied embeddings, its tokenizer, and one vLLM engine for all rollout tests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from searchr1.device import Device
from searchr1.rollout.engine import Engine
from searchr1.rollout.settings import EngineSettings

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]

MAX_MODEL_LEN = 512
SETTINGS = EngineSettings(max_model_len=MAX_MODEL_LEN, max_num_seqs=128, kv_cache_memory_gb=0.25, request_timeout_s=120.0)


def save_tiny_model(path: Path, *, vocab_size: int = 512, hidden: int = 64) -> None:
    """Saves a random two-layer Qwen2 (tied embeddings) and a byte-level BPE tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [a + b + c for a in ("ka", "lo", "mi", "ra") for b in ("ne", "si", "pu", "do") for c in ("", "r", "n", "st")]
    tokenizer.train_from_iterator([" ".join(words) + " <search> </search> <answer> </answer>"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=hidden // 32,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.1,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    Qwen2ForCausalLM(config).save_pretrained(path)


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], bool]], Coroutine[Any, Any, None]]:
    """`await until(condition)`: waits until `condition()` holds."""

    async def wait(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    return wait


@pytest.fixture(scope="session")
def publish_once() -> Callable[[Iterable[tuple[str, Any]], int, Path], Any]:
    """`publish_once(named, version, directory)`: all of the weights in one bucket."""
    from searchr1.rollout.weights import WeightPublisher

    def publish(named: Iterable[tuple[str, Any]], version: int, directory: Path) -> Any:
        named = list(named)
        publisher = WeightPublisher(directory, sum(tensor.nbytes for _, tensor in named))
        return next(publisher.publish(named, version, sum(tensor.numel() for _, tensor in named)))

    return publish


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model and its tokenizer."""
    path = tmp_path_factory.mktemp("tiny-qwen2")
    save_tiny_model(path)
    return path


@pytest.fixture(scope="session")
def run() -> Iterator[Run[Any]]:
    """Runs a coroutine to its end in one event loop that lives for the session, as in a rollout worker."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(timeout=180)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=10)
    loop.close()


@pytest.fixture(scope="session")
def engine(model_path: Path, run: Run[Any]) -> Iterator[Engine]:
    """The session's engine. Tests that change its weights put the first ones back."""
    device = Device.detect("cpu")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in device.worker_env("rollout").items():
            patch.setenv(name, value)
        started = run(Engine.start(str(model_path), device, SETTINGS))
    yield started
    run(started.close())
