"""Check that the rollout engine is right on a GPU, and how fast: one engine as a rollout worker runs it, random weights.

    python benchmarks/gpu/check_engine.py [--shape small|0.5b|3b] [--device cuda|cpu] [--dtype fp32|bf16] [--eager]

Prints one line per check and exits with 1 if one fails. `small` has a tokenizer and so tests stop strings; the others are
for speed and memory. The last lines compare decoding beside an idle event loop and beside a busy one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from searchr1.device import Device
    from searchr1.rollout.engine import Engine
    from searchr1.rollout.weights import WeightPublisher

Array = npt.NDArray[np.float64]

SHAPES: dict[str, dict[str, int]] = {
    "small": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512,
    },
    "0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
    "3b": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
}  # fmt: skip
LIMITS = {"fp32": 2e-4, "bf16": 0.06}
"""Of the mean difference of a log-probability."""
GIB = 1 << 30


class Report:
    """Prints a line for each check and remembers which failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def check(self, name: str, ok: bool | np.bool_, text: str) -> None:
        """A check that can fail."""
        print(f"{'ok   ' if ok else 'FAIL '}{name}: {text}", flush=True)
        if not ok:
            self.failed.append(name)

    def note(self, name: str, text: str) -> None:
        """A measurement."""
        print(f"     {name}: {text}", flush=True)


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    """Save a tokenizer of bytes and pairs of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(
        [" ".join(a + b + c for a in "kstr" for b in "aeiou" for c in ("n", "r", "st", "ll"))], trainer
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(folder)


def save_model(shape: str, folder: Path, device: str, dtype: torch.dtype) -> None:
    """Save a model of this shape with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    if shape == "small":
        save_tokenizer(folder, SHAPES[shape]["vocab_size"])
    torch.manual_seed(0)
    config = Qwen2Config(
        **SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=32768, eos_token_id=2, bos_token_id=None
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if shape == "small":  # peaked enough for log-probabilities to mean something
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.08)
    model.save_pretrained(folder)


def reference(folder: Path, sequences: list[list[int]], device: str, dtype: torch.dtype) -> list[Array]:
    """Log-probabilities of transformers, one sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device)
    scores = []
    with torch.no_grad():
        for ids in sequences:
            row = torch.tensor(ids, device=device)[None]
            logprobs = model(row).logits[0, :-1].float().log_softmax(-1)
            scores.append(logprobs.gather(-1, row[0, 1:, None])[:, 0].double().cpu().numpy())
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return scores


def gaps(ours: Sequence[Sequence[float]], theirs: Sequence[Array]) -> Array:
    """Differences of all tokens but the sequences' first."""
    return np.concatenate([np.abs(np.array(a[1:]) - b) for a, b in zip(ours, theirs, strict=True)])


def described(values: Array) -> str:
    """Mean, 99th percentile and largest."""
    return f"mean {values.mean():.2g}, p99 {np.quantile(values, 0.99):.2g}, max {values.max():.2g} of {len(values)} tokens"


def free_bytes() -> int:
    """What the GPU has left."""
    import torch

    return int(torch.cuda.mem_get_info()[0])


class Checks:
    """The checks of one engine, in order."""

    def __init__(self, args: argparse.Namespace, folder: Path, report: Report) -> None:
        import torch

        from searchr1.device import Device

        self.args, self.folder, self.report = args, folder, report
        self.device: Device = Device.detect(args.device)
        self.precision: str = args.dtype or ("bf16" if self.device.is_cuda else "fp32")
        self.publisher: WeightPublisher | None = None
        self.dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.limit = LIMITS[self.precision]
        self.small, self.vocabulary = args.shape == "small", SHAPES[args.shape]["vocab_size"]
        self.rng = np.random.default_rng(0)
        self.sequences = [self.rng.integers(3, self.vocabulary, int(n)).tolist() for n in self.rng.integers(20, 300, 8)]

    async def start(self) -> None:
        """Make the model, and start the engine on it."""
        import torch

        from searchr1.rollout.engine import Engine
        from searchr1.rollout.settings import EngineSettings

        args = self.args
        save_model(args.shape, self.folder, args.device, self.dtype)
        if self.device.is_cuda:
            torch.cuda.empty_cache()
        self.expected = reference(self.folder, self.sequences, args.device, self.dtype)
        settings = EngineSettings(
            max_model_len=2048 if self.small else 4096,
            dtype="bfloat16" if self.precision == "bf16" else "float32",
            max_num_seqs=args.sequences,
            sleep_mode=True,
            gpu_memory_utilization=args.utilization,
            kv_cache_memory_gb=None if self.device.is_cuda else 0.25,
            enforce_eager=args.eager,
            detokenize=self.small,
            request_timeout_s=90,
            update_timeout_s=120,
        )
        if args.batched is not None:
            settings = replace(settings, max_num_batched_tokens=args.batched)
        started = time.perf_counter()
        self.engine: Engine = await Engine.start(str(self.folder), self.device, settings)
        left = f", {free_bytes() / GIB:.1f} GiB of the GPU free" if self.device.is_cuda else ""
        self.report.note("start", f"{time.perf_counter() - started:.0f} s{left}")

    async def compare(self, name: str, expected: Sequence[Array]) -> None:
        """Score the sequences and compare with other scores of them."""
        differences = gaps(await self.engine.logprobs(self.sequences), expected)
        self.report.check(name, differences.mean() < self.limit, described(differences))

    async def sampling(self) -> None:
        """What is sampled: the same from a seed, with the log-probabilities it was sampled with, to a stop string."""
        from searchr1.agent.settings import GenerateParams

        engine, sequences, check = self.engine, self.sequences, self.report.check
        # No min_new_tokens: it takes the end out of the distribution, and the scores below have it.
        params = [GenerateParams(max_new_tokens=64, seed=i) for i in range(len(sequences))]
        once, again = [
            await asyncio.gather(*(engine.generate(ids, one) for ids, one in zip(sequences, params, strict=True)))
            for _ in range(2)
        ]
        same = sum(a.token_ids == b.token_ids for a, b in zip(once, again, strict=True))
        text = f"{same} of {len(once)} generations are the same twice (all, unless half precision had near ties)"
        check("seeds", same == len(once) or self.precision == "bf16", text)
        scored = await engine.logprobs([ids + one.token_ids for ids, one in zip(sequences, once, strict=True)])
        sampled = np.concatenate(
            [np.abs(np.array(s[len(ids) :]) - one.logprobs) for ids, s, one in zip(sequences, scored, once, strict=True)]
        )
        check("log-probabilities as sampled against scored", sampled.mean() < self.limit, described(sampled))
        hot = await engine.generate(sequences[0], GenerateParams(max_new_tokens=200, temperature=0.7, seed=3))
        plain = (await engine.logprobs([sequences[0] + hot.token_ids]))[0][len(sequences[0]) :]
        change = float(np.abs(np.array(plain) - hot.logprobs).mean())
        check("temperature", change > 1e-3, f"0.7 changes the log-probabilities that come back by {change:.3f}")
        if self.small:
            stopped = await engine.generate(sequences[0], GenerateParams(max_new_tokens=400, stop=("a",), seed=5))
            ended = stopped.text.endswith("a") if stopped.finish_reason == "stop" else "a" not in stopped.text
            check("stop strings", ended, f"{stopped.finish_reason} after {len(stopped.token_ids)} tokens")

    def changed_weights(self, version: int, change: float) -> dict[str, torch.Tensor]:
        """The saved weights plus noise, on the device; noisy ones are also saved as `v{version}`."""
        import torch
        from safetensors.torch import load_file, save_file

        named: dict[str, torch.Tensor] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            named |= load_file(file)
        named = {name: value.to(self.args.device) for name, value in named.items() if name != "lm_head.weight"}
        if change:
            generator = torch.Generator(self.args.device).manual_seed(version)
            for value in named.values():
                if value.ndim > 1:
                    noise = torch.randn(value.shape, generator=generator, device=value.device, dtype=torch.float32)
                    value += change * noise.to(value.dtype)
            copy = self.folder.parent / f"v{version}"
            shutil.copytree(self.folder, copy, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
            held = {name: value.cpu().contiguous() for name, value in named.items()}
            save_file(held, copy / "model.safetensors", metadata={"format": "pt"})
        return named

    async def update(self, version: int, named: dict[str, torch.Tensor]) -> None:
        """Send weights to the engine, a bucket at a time, as the actor does."""
        from searchr1.rollout.shared_memory import weight_directory
        from searchr1.rollout.weights import WeightPublisher, bucket_size

        self.device.synchronize()
        began = time.perf_counter()
        total = sum(value.numel() for value in named.values())
        if self.publisher is None:
            size = bucket_size(total, self.dtype)
            self.publisher = WeightPublisher(weight_directory(2 * size, self.folder.parent), size)
        pending: asyncio.Task[list[str]] | None = None
        for bucket in self.publisher.publish(named.items(), version, total):
            for warning in bucket.warnings + tuple(await pending if pending is not None else ()):
                self.report.note("weight update", warning)
            pending = asyncio.create_task(self.engine.update_weights(bucket))
            await asyncio.sleep(0)
        assert pending is not None
        for warning in await pending:
            self.report.note("weight update", warning)
        seconds = time.perf_counter() - began
        self.publisher.release()
        gigabytes = sum(value.nbytes for value in named.values()) / 1e9
        self.report.note("weight update", f"{gigabytes:.2f} GB in {seconds:.2f} s, {gigabytes / seconds:.2f} GB/s")

    async def updates(self) -> None:
        """New weights: taken over, kept while asleep, and no generation lost when they come in mid-flight."""
        from searchr1.agent.settings import GenerateParams

        engine, check = self.engine, self.report.check
        await self.update(1, self.changed_weights(1, 0.02))
        changed = reference(self.folder.parent / "v1", self.sequences, self.args.device, self.dtype)
        await self.compare("after the update", changed)
        stale = gaps(await engine.logprobs(self.sequences), self.expected)
        check("the old weights are gone", stale.mean() > 2 * self.limit, f"against them: mean {stale.mean():.4f}")
        original = self.changed_weights(2, 0.0)
        if self.device.is_cuda:
            await self.sleep(changed, original)
        lengths = [20 + i % 40 for i in range(64)]
        running = [
            asyncio.create_task(
                engine.generate(
                    self.sequences[i % 8], GenerateParams(max_new_tokens=n, min_new_tokens=n, seed=i), timeout_s=60
                )
            )
            for i, n in enumerate(lengths)
        ]
        for version in range(3, 9):
            await asyncio.sleep(0.03)
            await self.update(version, original)
        results = await asyncio.gather(*running, return_exceptions=True)
        whole = sum(
            not isinstance(one, BaseException) and len(one.token_ids) == n for one, n in zip(results, lengths, strict=True)
        )
        check("generations across six updates", whole == len(lengths), f"{whole} of {len(lengths)} came back whole")

    async def sleep(self, changed: list[Array], original: dict[str, torch.Tensor]) -> None:
        """Memory handed back and taken again, with weights kept and with weights dropped, as a training step does it."""
        from searchr1.rollout.backend import KV_CACHE, WEIGHTS

        before, began = free_bytes(), time.perf_counter()
        await self.engine.sleep()
        slept, asleep = time.perf_counter() - began, free_bytes()
        began = time.perf_counter()
        await self.engine.wake()
        text = f"{before / GIB:.1f} -> {asleep / GIB:.1f} GiB free in {slept:.2f} s"
        self.report.check("sleep", asleep > before + GIB, f"{text}, awake in {time.perf_counter() - began:.2f} s")
        await self.compare("after waking", changed)
        await self.engine.sleep(2)
        began = time.perf_counter()
        await self.engine.wake((WEIGHTS,))
        await self.update(2, original)
        await self.engine.wake((KV_CACHE,))
        self.report.note("awake in two stages", f"{time.perf_counter() - began:.2f} s, the update between them included")
        await self.compare("sleep level 2 and an update", self.expected)

    async def speed(self, label: str, busy: bool) -> None:
        """Decode `--tokens` tokens of `--sequences` sequences; `busy`: an agent loop takes a third of a core meanwhile."""
        from searchr1.agent.settings import GenerateParams

        args = self.args
        prompts = [self.rng.integers(3, self.vocabulary, args.prompt).tolist() for _ in range(args.sequences)]
        params = GenerateParams(max_new_tokens=args.tokens, min_new_tokens=args.tokens, seed=1)
        late: list[float] = []

        async def work() -> None:
            while True:
                until = time.perf_counter() + 0.003
                while time.perf_counter() < until:
                    pass
                asked = time.perf_counter()
                await asyncio.sleep(0.006)
                late.append(time.perf_counter() - asked - 0.006)

        before = self.engine.stats()
        worker = asyncio.create_task(work()) if busy else None
        began = time.perf_counter()
        await asyncio.gather(*(self.engine.generate(p, replace(params, seed=i)) for i, p in enumerate(prompts)))
        seconds = time.perf_counter() - began
        if worker is not None:
            worker.cancel()
        steps = self.engine.stats().steps - before.steps
        turns = f", the loop's turns {1000 * float(np.mean(late)):.1f} ms late" if late else ""
        text = f"{args.sequences * args.tokens / seconds:.0f} tokens/s, {1000 * seconds / steps:.1f} ms a step{turns}"
        self.report.note("speed", f"{label}: {text}")

    async def run(self) -> None:
        """All checks."""
        await self.start()
        await self.compare("log-probabilities of a prompt against transformers", self.expected)
        await self.sampling()
        await self.updates()
        await self.speed("warm-up", False)
        await self.speed("loop idle", False)
        own = sys.getswitchinterval()
        for interval in (0.005, 0.002, own, 0.0001):
            sys.setswitchinterval(interval)
            await self.speed(f"loop busy, threads switch after {1000 * interval:g} ms", True)
        sys.setswitchinterval(own)
        await self.engine.close()


def main() -> None:
    """Run the checks on one engine; exit code 1 if one failed."""
    parser = argparse.ArgumentParser(description="Check the rollout engine on a device, and measure it.")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=list(LIMITS), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--sequences", type=int, default=256, help="generated at once")
    parser.add_argument("--prompt", type=int, default=600, help="tokens of a prompt of the speed test")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to decode in the speed test")
    parser.add_argument("--batched", type=int, help="tokens of an engine step; default: as in a run")
    parser.add_argument("--utilization", type=float, default=0.5, help="share of the GPU's memory for the engine")
    args = parser.parse_args()
    from searchr1.device import Device

    for name, value in Device.detect(args.device).worker_env("rollout").items():
        os.environ.setdefault(name, value)
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        path.mkdir()
        asyncio.run(Checks(args, path, report).run())
    print(f"{len(report.failed)} failed: {report.failed}" if report.failed else "all ok", flush=True)
    sys.exit(bool(report.failed))


if __name__ == "__main__":
    main()
