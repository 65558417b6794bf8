"""What an evaluation's answers depend on, its model among it, so that it goes on with nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from searchr1.agent.settings import AgentSettings
from searchr1.agent.trajectory import Sample
from searchr1.checkpoints.safetensors_header import read_header
from searchr1.config.schema import Config
from searchr1.data.model_settings import FILE
from searchr1.errors import UserError
from searchr1.evaluation.methods import Method

SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
_WHOLE_BYTES = 32 << 20
"""Files up to this size are read whole; of larger ones blocks are taken all over the file."""
_BLOCK, _BLOCKS = 1 << 14, 256


def fingerprint(model_path: str) -> str:
    """Return a hash of a model's files, wherever the folder is; the name itself for a model of the hub.

    searchr1.json is left out: what an evaluation takes from it is compared by itself.

    Weights that were trained further differ in nearly all bytes, so blocks all over a large file differ too.
    """
    folder = Path(model_path)
    if not folder.is_dir():
        return model_path
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.name != FILE and p.is_file()):
        size = path.stat().st_size
        digest.update(os.fsencode(f"{path.name}\0{size}\0"))
        with path.open("rb") as file:
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
                continue
            for number in range(_BLOCKS):
                file.seek((size - _BLOCK) * number // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def billions(model_path: str) -> float | None:
    """Return the parameters in billions, from the weights' headers or a name such as `Qwen2.5-3B`, else None."""
    folder = Path(model_path)
    count = 0
    for path in folder.glob("*.safetensors") if folder.is_dir() else ():
        with suppress(UserError):  # said where the model is loaded
            count += sum(math.prod(tensor.shape) for tensor in read_header(path).values())
    if count:
        return count / 1e9
    named = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)\s?b(?![a-z0-9])", folder.name, re.IGNORECASE)
    return float(named.group(1)) if named else None


Manifest = dict[str, Any]


def manifest(config: Config, method: Method, settings: AgentSettings, samples: Sequence[Sample]) -> Manifest:
    """Return everything that changes answers or scores, by name. Where servers run and how fast they are changes neither."""
    reward, search = config.reward, config.tools.search
    sampling = dataclasses.asdict(settings.sampling) | {"stop": list(settings.sampling.stop)}
    del sampling["seed"]
    content: Manifest = {
        "method": method.name,
        "model": fingerprint(config.rollout.model.model_path),
        "precision": config.rollout.model.precision,
        "seed": config.runner.seed,
        "attempts": config.algorithm.group_size,
        "questions": questions_hash(samples, with_prompts=not method.retrieves),
        "sampling": sampling,
        "limits": {
            name: getattr(settings, name)
            for name in ("max_model_len", "max_turns", "force_final_turn", "max_new_tokens_per_turn")
        },
        "reward": {"type": reward.reward_type, "weights": dict(reward.weights), "judge": reward.judge.model},
    }
    if config.evaluation.untagged != "reject":
        content["untagged"] = config.evaluation.untagged
    if method.searches:
        content["tools"] = {
            "access": config.tools.access.enabled,
            "invalid_action_message": settings.invalid_action_message,
            "generate_fn": config.agentloop.generate_fn,
            "dummy_mode": search.dummy_mode,
        } | _changed(settings, "toolcall_parser", "no_call_ends", "end_token_ends", "tool_text_tokens")
    if method.retrieves:
        # Prompts of other methods already contain it.
        content["apply_chat_template"] = config.data.apply_chat_template
    if method.searches or method.retrieves:
        content["passages"] = {
            "topk": search.topk,
            "max_tool_response_length": settings.max_tool_response_length,
            "truncate_side": settings.truncate_side,
            "information_style": settings.information_style,
        } | _changed(settings, "no_results_message")
    return content


def _changed(settings: AgentSettings, *names: str) -> Manifest:
    """Return the settings that differ from their defaults: manifests from before these settings existed stay equal."""
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    return {name: value for name in names if (value := getattr(settings, name)) != defaults[name]}


def questions_hash(samples: Sequence[Sample], with_prompts: bool) -> str:
    """Return a hash of the questions in their order. RAG's prompts are left out: their passages are fetched anew."""
    digest = hashlib.sha256()
    for sample in samples:
        parts = (sample.id, sample.question, sample.golden_answers, sample.data_source, sample.reward_name)
        digest.update(repr(parts).encode("utf-8", "backslashreplace"))
        if with_prompts:
            digest.update(repr(sample.prompt_ids).encode())
    return f"{len(samples)} questions, {digest.hexdigest()[:16]}"


def differences(ours: Manifest, theirs: Manifest, prefix: str = "") -> Iterator[str]:
    """Yield every part in which two manifests differ, with both values."""
    for name in sorted({*ours, *theirs}):
        mine, other = ours.get(name), theirs.get(name)
        if isinstance(mine, dict) and isinstance(other, dict):
            yield from differences(mine, other, f"{prefix}{name}.")
        elif mine != other:
            yield f"{prefix}{name} was {other!r}, is {mine!r}"
