"""Translation of RLinf's YAMLs into the keys of this project, with one line for each key that has no effect.

`translate` works on the plain values of a tree that carries RLinf's marks, before the schema reads them. A key that is
neither in RLinf's table (`rlinf_keys.py`) nor in our schema is left for the schema to reject. See docs/guides/rlinf.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from searchr1.config.rlinf_keys import (
    ENOUGH_MARKS,
    FSDP_PRECISION,
    KEYS,
    MARKS,
    READ,
    Ignored,
    Only,
    Rejected,
    Renamed,
    Section,
)

DEFAULTS = {
    "algorithm.shuffle_rollout": True,
    "actor.optim.adam_beta2": 0.999,
    "actor.optim.adam_eps": 1e-8,
    "rollout.gpu_memory_utilization": 0.65,
    "runner.val_before_train": False,
}
"""RLinf's defaults that differ from those of the schema."""
OURS_TOO = ("reward.reward_scale", "actor.lr_sched.max_lr")
"""Keys of the schema that appear in RLinf's YAMLs, although RLinf does not read them."""
AGENT = {
    "agentloop.toolcall_parser": "searchr1-qwen",
    "agentloop.information_style": "rlinf",
    "agentloop.tool_text_tokens": "whole",
    "agentloop.no_call_ends": True,
    "agentloop.end_token_ends": True,
    "agentloop.force_final_turn": True,
}
"""Settings of RLinf's Search-R1 agent; turns and lengths follow from the YAML."""
PARSERS = {"qwen": "searchr1-qwen", "searchr1-qwen": "searchr1-qwen", "searchr1": "searchr1", "tags": "tags"}
"""Tool-call parsers by RLinf's names and ours; RLinf's other parsers belong to agents that are not supported."""
TASKS = ("reasoning", "reasoning_eval")
PRECISIONS = {"16": "fp16", "16-mixed": "fp16", "bf16-mixed": "bf16", "32": "fp32", "32-true": "fp32"}
"""Names of precisions that only RLinf has, and their equivalents."""
LOSS_SCALE = "fp16's scaling of the loss, which FSDP2 does not need: it computes in bf16"
LR_SCHED = "RLinf's FSDP does not read it: actor.optim.lr_scheduler and lr_warmup_steps_ratio count"
MEGATRON_TRAIN_ITERS = 100_000
"""Length in steps of RLinf's Megatron schedule if `lr_decay_iters` is not set."""
CONSTANT_WINDOW = 2**31 - 1
"""Updates without overflow before a loss scale grows: never."""


@dataclass(frozen=True, order=True, slots=True)
class Note:
    """How one key was treated."""

    kind: str
    """`ignored`, `read` (under another name) or `set` (a default of RLinf)."""
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind:<9} {self.key}: {self.text}"


def is_rlinf(values: Mapping[str, Any], named: Sequence[str] = ()) -> bool:
    """Return whether a tree is RLinf's; keys from the command line do not count."""
    tree = Tree(dict(values), named)
    return sum(tree.has(mark) and not tree.is_named(mark) for mark in MARKS) >= ENOUGH_MARKS


def translate(values: dict[str, Any], named: Sequence[str]) -> tuple[list[Note], list[tuple[str, str]]]:
    """Turn an RLinf tree into ours, in place.

    Args:
        values: plain values, interpolations resolved.
        named: keys set on the command line; their values are kept.

    Returns:
        Notes on how RLinf's keys were treated, and problems as pairs of key and message.
    """
    tree = Tree(values, named)
    _weights(tree)
    evaluates = _task(tree)
    _agent(tree)
    _sampling(tree)
    _correction(tree)
    if not evaluates:
        _validation(tree)
    if tree.get("actor"):
        _optimizer(tree)
    _batches(tree)
    for key in tree.leaves():
        _apply(tree, key)
    _drop_empty(tree)
    for key, value in DEFAULTS.items():
        if not (evaluates and not key.startswith("rollout.")):
            tree.default(key, value, "RLinf's own default")
    return sorted(tree.notes), tree.problems


class Tree:
    """Nested values by dotted keys, with the notes and problems about them."""

    def __init__(self, values: dict[str, Any], named: Sequence[str]) -> None:
        self.values = values
        self.named = frozenset(named)
        self.notes: list[Note] = []
        self.problems: list[tuple[str, str]] = []

    def is_named(self, key: str) -> bool:
        """Return whether the command line sets a key, or a section around it."""
        parts = key.split(".")
        return any(".".join(parts[:n]) in self.named for n in range(1, len(parts) + 1))

    def _holder(self, key: str) -> tuple[dict[str, Any] | None, str]:
        holder: Any = self.values
        *sections, name = key.split(".")
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        return (holder if isinstance(holder, dict) else None), name

    def has(self, key: str) -> bool:
        """Return whether the tree has a key."""
        holder, name = self._holder(key)
        return holder is not None and name in holder

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key."""
        holder, name = self._holder(key)
        return default if holder is None else holder.get(name, default)

    def pop(self, key: str, default: Any = None) -> Any:
        """Remove a key and return its value."""
        holder, name = self._holder(key)
        return default if holder is None else holder.pop(name, default)

    def put(self, key: str, value: Any) -> None:
        """Set a value, unless the command line sets the key."""
        if self.is_named(key) and self.has(key):
            return
        holder: dict[str, Any] = self.values
        *sections, name = key.split(".")
        for section in sections:
            inner = holder.get(section)
            if not isinstance(inner, dict):
                inner = holder[section] = {}
            holder = inner
        holder[name] = value

    def default(self, key: str, value: Any, why: str) -> None:
        """Set a value that the tree lacks, with a note."""
        if not self.has(key):
            self.put(key, value)
            self.note("set", key, f"{value} ({why})")

    def note(self, kind: str, key: str, text: str) -> None:
        """Record a line for the user."""
        self.notes.append(Note(kind, key, text))

    def ignore(self, key: str, reason: str) -> None:
        """Drop a key if the tree has it, with a note of the reason."""
        if self.has(key):
            self.pop(key)
            self.note("ignored", key, reason)

    def read(self, key: str, *settings: tuple[str, Any]) -> None:
        """Replace a key by the settings that it stands for."""
        if not settings:
            return self.ignore(key, "its parts are named themselves")
        self.pop(key)
        for new, value in settings:
            self.put(new, value)
        self.note("read", key, ", ".join(f"{new} = {self.get(new)}" for new, _ in settings))

    def reject(self, key: str, message: str) -> None:
        """Remove a key and record its problem."""
        self.pop(key)
        self.problems.append((key, message))

    def leaves(self) -> Iterator[str]:
        """Yield the keys of values, and of whole sections that the table lists."""

        def walk(node: dict[str, Any], prefix: str) -> Iterator[str]:
            for name, value in node.items():
                key = f"{prefix}{name}"
                if isinstance(value, dict) and value and key not in KEYS:
                    yield from walk(value, f"{key}.")
                else:
                    yield key

        yield from list(walk(self.values, ""))


def _apply(tree: Tree, key: str) -> None:
    """Apply the table's entry for one key; a key of the schema that the command line sets is not RLinf's."""
    entry = None if key in OURS_TOO and tree.is_named(key) else KEYS.get(key)
    value = tree.get(key)
    match entry:
        case Ignored(reason) | Section(reason):
            tree.ignore(key, reason)
        case Only(values, reason):
            if value in values:
                tree.ignore(key, reason)
            else:
                tree.reject(key, f"{value!r} would change the run: {reason}")
        case Rejected(reason):
            tree.reject(key, reason)
        case Renamed(new):
            if tree.has(new) and not tree.is_named(new) and tree.get(new) != value:
                tree.reject(key, f"is RLinf's name of {new}, which is set too; keep one")
            else:
                tree.read(key, (new, value))


def _drop_empty(tree: Tree) -> None:
    """Drop sections of RLinf that are empty, or that the translation has emptied."""
    sections = {key.rpartition(".")[0] for key in (*KEYS, *READ)}
    sections |= {section.rpartition(".")[0] for section in sections}
    for section in sorted(sections, key=lambda key: -key.count(".")):
        if section.count(".") and tree.get(section, 0) in (None, {}):
            tree.pop(section)


def _weights(tree: Tree) -> None:
    """Translate the paths of weights and tokenizer, and their precision."""
    for key in ("actor.model.precision", "rollout.model.precision", "rollout.precision"):
        if str(tree.get(key)) in PRECISIONS:
            tree.put(key, PRECISIONS[str(tree.get(key))])
    if tree.has("rollout.model_dir") and tree.is_named("rollout.model.model_path"):
        tree.ignore("rollout.model_dir", "the command line names rollout.model.model_path")
    model = tree.get("rollout.model.model_path", tree.get("rollout.model_dir"))
    old = "actor.megatron.ckpt_convertor.hf_model_path"
    if tree.has(old):
        weights, training = tree.get(old), tree.get("actor.training_backend") == "megatron"
        if training and tree.get("actor.megatron.use_hf_ckpt") and weights not in (None, model):
            tree.read(old, ("actor.model.path", weights))
        else:
            tree.ignore(old, "the actor starts from rollout.model.model_path")
    tokenizer = "actor.tokenizer.tokenizer_model"
    if tree.has(tokenizer):
        folder = tree.get(tokenizer)
        if folder in (None, model) or tree.is_named("rollout.model.model_path"):
            tree.ignore(tokenizer, "the tokenizer is the model's own")
        else:
            tree.reject(tokenizer, f"{folder} is not the model's folder; put the tokenizer's files into {model}")


def _task(tree: Tree) -> bool:
    """Return whether the tree is for evaluation: by its task, by `is_eval`, or because it places no actor."""
    placement = tree.get("cluster.component_placement")
    places = placement if isinstance(placement, dict) else {}
    for names in [names for names in places if "agentloop" in str(names).split(",") and names != "agentloop"]:
        kept = ",".join(name for name in str(names).split(",") if name != "agentloop")
        places[kept] = places.pop(names)
        tree.note("ignored", f"cluster.component_placement.{names}", "the agent loop runs inside the rollout group")
    placed = {name.strip() for names in places for name in str(names).split(",")}
    evaluates = tree.get("runner.task_type") == "reasoning_eval" or (bool(placed) and "actor" not in placed)
    if tree.has("rollout.is_eval"):
        evaluates = evaluates or bool(tree.get("rollout.is_eval"))
        if evaluates:
            tree.read("rollout.is_eval", ("runner.task_type", "reasoning_eval"))
        else:
            tree.ignore("rollout.is_eval", "runner.task_type says what the YAML is for")
    task = tree.get("runner.task_type")
    if task is not None and task not in TASKS:
        tree.reject("runner.task_type", f"{task!r} is not one of {', '.join(TASKS)}")
    if evaluates:
        tree.put("runner.task_type", "reasoning_eval")
    return evaluates


def _agent(tree: Tree) -> None:
    """Set what RLinf's agent does with these settings."""
    turns = "agentloop.max_turns"
    for old in ("agentloop.maxturn", "tools.maxturn"):
        if tree.has(old):
            if tree.has(turns):
                tree.ignore(old, f"{turns} counts")
            else:
                tree.read(old, (turns, tree.get(old)))
    generations = tree.get(turns)
    ours = tree.has("agentloop.force_final_turn")
    if not ours and isinstance(generations, int) and not isinstance(generations, bool) and generations >= 1:
        # Also where the command line names it: it stands for the YAML's own value.
        tree.values["agentloop"]["max_turns"] = generations - 1
        tree.note("set", turns, f"{generations - 1}, and a last one without tools: RLinf's {generations} generations in all")
    parser = tree.get("agentloop.toolcall_parser")
    if parser in PARSERS:
        tree.values["agentloop"]["toolcall_parser"] = PARSERS[parser]
    elif parser is not None:
        tree.reject("agentloop.toolcall_parser", f"{parser!r} is of an agent that is not in here; there is searchr1-qwen")
    for key, value in AGENT.items():
        tree.default(key, value, "RLinf's agent")
    limit = tree.get("runner.seq_length")
    for key in ("agentloop.max_tool_response_length", "agentloop.tool_response_truncate_side"):
        if tree.has(key) and not tree.is_named(key):
            tree.ignore(key, "RLinf's Search-R1 agent does not read it: documents are cut at 5,000 characters each")
    if isinstance(limit, int):
        tree.default("agentloop.max_tool_response_length", limit, "RLinf's agent cuts no tool text")


def _sampling(tree: Tree) -> None:
    """Translate the sampling settings, which RLinf uses for training and evaluation alike."""
    section = "algorithm.sampling_params"
    greedy = f"{section}.use_greedy"
    if tree.has(greedy):
        tree.read(greedy, (f"{section}.do_sample", not tree.get(greedy)))
    length, prompt, limit = tree.get("runner.seq_length"), tree.get("data.max_prompt_length"), f"{section}.max_new_tokens"
    if isinstance(length, int) and isinstance(prompt, int) and length > prompt:
        room = length - prompt
        if tree.get(limit) != room and not tree.is_named(limit):
            tree.put(limit, room)
            tree.note("set", limit, f"{room} (runner.seq_length - data.max_prompt_length, which is RLinf's limit)")
    sampling = tree.get(section)
    if isinstance(sampling, dict):
        if sampling.get("stop_token_ids") in (None, []):
            tree.ignore(f"{section}.stop_token_ids", "is empty")
        # RLinf evaluates with the sampling that it trains with.
        if not tree.has("algorithm.eval_sampling_params"):
            tree.put("algorithm.eval_sampling_params", dict(sampling))
            tree.note("set", "algorithm.eval_sampling_params", "as algorithm.sampling_params: RLinf's evaluation samples")


def _correction(tree: Tree) -> None:
    """Translate RLinf's importance-sampling fix: advantages times min(exp(recomputed - rollout), clip) for each token."""
    fix, clip = "algorithm.importance_sampling_fix", "algorithm.importance_sampling_clip"
    if tree.get(fix):
        if not isinstance(tree.get(clip), int | float):
            tree.reject(fix, f"needs {clip}, the largest weight")
            return
        ours = "algorithm.mismatch_correction"
        tree.read(fix, (f"{ours}.level", "token"), (f"{ours}.bound", "truncate"))
        tree.read(clip, (f"{ours}.upper", tree.get(clip)))
    else:
        tree.ignore(fix, "is off")
        tree.ignore(clip, "algorithm.importance_sampling_fix is off")


def _validation(tree: Tree) -> None:
    """Turn evaluation off if the tree has no questions of its own for it."""
    paths = tree.get("data.val_data_paths")
    reason = None
    if not paths:
        reason = "data.val_data_paths is empty"
    elif paths == tree.get("data.train_data_paths"):
        reason = "data.val_data_paths are the training questions"
    if reason and not tree.is_named("runner.val_check_interval"):
        tree.put("runner.val_check_interval", -1)
        tree.put("runner.val_before_train", False)
        tree.note("set", "runner.val_check_interval", f"-1: no evaluation, because {reason}")
    if not paths:
        tree.pop("data.val_data_paths")


def _optimizer(tree: Tree) -> None:
    offload = "actor.enable_offload"
    if tree.has(offload):
        names = [name for name in ("optimizer", "weight", "grad") if not tree.has(f"actor.offload_{name}")]
        tree.read(offload, *((f"actor.offload_{name}", tree.get(offload)) for name in names))
    if tree.get("actor.training_backend") == "fsdp":
        _fsdp(tree)
    else:
        _megatron(tree)


def _fsdp(tree: Tree) -> None:
    """Translate precision, learning rate and loss scale of RLinf's FSDP trainer."""
    config, precision = "actor.fsdp_config", "actor.model.precision"
    compute = tree.get(f"{config}.mixed_precision.param_dtype")
    if compute in (None, "fp32"):
        amp = next((name for name in ("amp_autocast", "amp") if tree.get(f"{config}.{name}.enabled")), None)
        compute = tree.get(f"{config}.{amp}.precision", "bf16") if amp else tree.get(precision)
    if isinstance(compute, str) and compute != tree.get(precision) and not tree.is_named(precision):
        tree.put(precision, compute)
        tree.note(
            "set", precision, f"{compute}, in which RLinf computes (mixed_precision, amp); the weights are kept in fp32"
        )
    for name in FSDP_PRECISION.split():
        about = LOSS_SCALE if "scaler" in name else "actor.model.precision says it; gradients are summed in fp32"
        tree.ignore(f"{config}.{name}", about)
    tree.ignore("actor.optim.loss_scale", LOSS_SCALE)
    for name in ("bf16", "fp16"):
        if not tree.is_named(f"actor.optim.{name}"):
            tree.ignore(f"actor.optim.{name}", "RLinf's FSDP does not read it")
    # A YAML for Megatron that the command line takes to FSDP keeps its schedule.
    for name in list(tree.get("actor.lr_sched") or ()):
        if not (tree.is_named(f"actor.lr_sched.{name}") or tree.is_named("actor.training_backend")):
            tree.ignore(f"actor.lr_sched.{name}", LR_SCHED)
    tree.default("algorithm.clip_ratio_c", 3.0, "RLinf's own default")
    _fsdp_schedule(tree)


def _fsdp_schedule(tree: Tree) -> None:
    optim, sched = "actor.optim", "actor.lr_sched"
    styles = {"constant": "constant", "cosine": "cosine", "torch_constant": "constant"}
    style = tree.get(f"{optim}.lr_scheduler", "constant")
    if style not in styles:
        tree.reject(f"{optim}.lr_scheduler", f"{style!r} is not one of {', '.join(styles)}")
    elif tree.has(f"{optim}.lr_scheduler"):
        tree.read(f"{optim}.lr_scheduler", (f"{sched}.lr_decay_style", styles[style]))
    steps, ratio = tree.get(f"{optim}.total_training_steps"), tree.get(f"{optim}.lr_warmup_steps_ratio")
    warmup = tree.get(f"{optim}.lr_warmup_steps", -1)
    if tree.has(f"{optim}.total_training_steps"):
        tree.read(f"{optim}.total_training_steps", (f"{sched}.lr_decay_iters", steps or None))
    if not isinstance(warmup, int) or warmup < 0:
        warmup = int((ratio or 0.0) * (steps or 0))
    if style == "torch_constant":
        warmup = 0
    for name in ("lr_warmup_steps", "lr_warmup_steps_ratio"):
        if tree.has(f"{optim}.{name}"):
            tree.read(f"{optim}.{name}", (f"{sched}.lr_warmup_iters", warmup))
    if tree.has(f"{optim}.min_lr"):
        tree.read(f"{optim}.min_lr", (f"{sched}.min_lr", tree.get(f"{optim}.min_lr")))


def _megatron(tree: Tree) -> None:
    """Translate loss scale and schedule of RLinf's Megatron trainer."""
    scale = "actor.optim.loss_scale"
    if tree.get(scale) is not None and tree.get("actor.model.precision") == "fp16":
        optim, value = "actor.optim", tree.get(scale)
        tree.read(
            scale,
            (f"{optim}.initial_loss_scale", value),
            (f"{optim}.min_loss_scale", value),
            (f"{optim}.loss_scale_window", CONSTANT_WINDOW),
        )
    else:
        tree.ignore(scale, "is for fp16 only")
    tree.ignore("actor.optim.min_lr", "actor.lr_sched.min_lr counts")
    if tree.get("actor.lr_sched.lr_decay_iters") is None and tree.has("actor.lr_sched"):
        tree.put("actor.lr_sched.lr_decay_iters", MEGATRON_TRAIN_ITERS)
        tree.note("set", "actor.lr_sched.lr_decay_iters", f"{MEGATRON_TRAIN_ITERS} (RLinf's own default)")


def _batches(tree: Tree) -> None:
    length = tree.get("runner.seq_length")
    if isinstance(length, int):
        tree.default("runner.max_tokens_per_mbs", max(length, 8192), "a micro-batch holds the longest trajectory")
    for key in ("data.train_data_paths", "data.val_data_paths"):
        if isinstance(tree.get(key), str):
            tree.put(key, [tree.get(key)])
