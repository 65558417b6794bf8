"""Megatron's distributed checkpoints (`torch_dist`): one set of files for every layout.

A folder holds the model's tensors under the names of mapping.py's table, the optimizer's moments and master weights,
`common.pt` (what is the same everywhere) and `hf/` (configuration and tokenizer, so that a conversion needs no other
folder). `checkpoints/manifest.py` makes it atomic.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from searchr1.checkpoints.distributed import load_megatron
from searchr1.checkpoints.manifest import HF_FOLDER, write_rank_sums
from searchr1.checkpoints.mapping import VALUE_HEAD
from searchr1.errors import UserError
from searchr1.learner.checkpoint import save_hf_files
from searchr1.learner.megatron.optimizer import torch_optimizers, use_fused_adam

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}
_OURS = "searchr1"


@dataclass(frozen=True, slots=True)
class Trained:
    """What a checkpoint holds: a rank's part of a model, and its share of the optimizer."""

    module: Any
    optimizer: Any


def save_checkpoint(trained: Trained, updates: int, model_path: str, folder: Path, in_background: bool) -> Any:
    """Write model and optimizer after so many updates; a collective.

    In the background: a forked process of each rank writes what it holds now, and Megatron's queue of such calls is returned
    (whose `maybe_finalize_async_calls(blocking=True)` must follow), else None.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_hf_files(model_path, folder / HF_FOLDER)
    dist.barrier()
    # No moments yet: saving before the first update.
    if updates == 0:
        _make_optimizer_state(trained.optimizer)
    state = _sharded_state(trained, is_loading=False)
    state[_OURS] = {"updates": updates}
    queue = AsyncCallsQueue() if in_background else None
    with _quiet():
        request = dist_checkpointing.save(
            state, str(folder), content_metadata=dict(_METADATA), async_sharded_save=in_background
        )
        if queue is not None:
            if request.async_fn is not None:
                request = request._replace(async_fn=partial(_write_and_sum, request.async_fn, folder, dist.get_rank()))
            queue.schedule_async_request(request)
    dist.barrier()
    return queue


def _write_and_sum(write: Callable[..., None], folder: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """Do what the forked process is for, and take the sums of what it has written while training goes on."""
    write(*args, **kwargs)
    with suppress(OSError):  # what could not be written has been reported by `write`; sums that are missing are taken later
        write_rank_sums(folder, rank)


def load_checkpoint(trained: Trained, folder: Path, section: str) -> int:
    """Read what `save_checkpoint` wrote, and `TrainedModel.load` has verified, in this layout or another; a collective.

    Args:
        trained: filled from the checkpoint.
        folder: of the checkpoint.
        section: of the YAML, for messages.

    Returns:
        Updates that the checkpoint was written after.

    Raises:
        UserError: damaged, of another model, or of the other backend.
    """
    if not (folder / "metadata.json").is_file():
        raise UserError(
            f"{folder} was not written by {section}.training_backend: megatron; resume with the backend that wrote "
            "it, or convert it (searchr1 convert) and start from the model"
        )
    _make_optimizer_state(trained.optimizer)
    state = _sharded_state(trained, is_loading=True)
    try:
        with _quiet():
            loaded = load_megatron(state, folder)
        trained.module.load_state_dict(loaded["model"])
        with _steps_left_out(trained.optimizer):
            trained.optimizer.load_state_dict(loaded["optimizer"])
        updates = int(loaded[_OURS]["updates"])
    except _unreadable() as error:
        raise UserError(f"cannot load {folder}: it is damaged or belongs to another model ({_reason(error)})") from error
    _separate_steps(trained.optimizer, updates)
    use_fused_adam(trained.optimizer)
    return updates


def load_weights(module: Any, folder: Path) -> None:
    """Load the model's weights alone, from any Megatron distributed checkpoint of this model; a collective.

    A policy's has all that a critic needs but its head, which stays as it is.

    Raises:
        UserError: damaged, or of another model.
    """
    try:
        with _quiet():
            wanted = module.sharded_state_dict(metadata=dict(_METADATA))
            has_head = wanted.pop(VALUE_HEAD, None) is not None
            loaded = load_megatron({"model": wanted}, folder)
        module.load_state_dict(loaded["model"], strict=not has_head)
    except UserError as error:
        raise UserError(f"actor.model.megatron_checkpoint: {error}") from error
    except _unreadable() as error:
        raise UserError(
            f"actor.model.megatron_checkpoint: cannot load {folder}: it is damaged or belongs to another model "
            f"({_reason(error)})"
        ) from error


def _unreadable() -> tuple[type[BaseException], ...]:
    """Return what Megatron and PyTorch raise at a checkpoint that is damaged or of something else."""
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    return (
        CheckpointingException, CheckpointException, RuntimeError, OSError, LookupError, ValueError, EOFError,
        AssertionError, AttributeError, TypeError,
    )  # fmt: skip


def _reason(error: BaseException) -> str:
    """Return the end of what is often a traceback in a message."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[-1][:200]


def _sharded_state(trained: Trained, is_loading: bool) -> dict[str, Any]:
    metadata = dict(_METADATA)  # Megatron adds process groups to it
    model = trained.module.sharded_state_dict(metadata=metadata)
    optimizer = trained.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer}


def _make_optimizer_state(optimizer: Any) -> None:
    """Give every parameter its moments, which Adam makes at its first step only."""
    for part in torch_optimizers(optimizer):
        for group in part.param_groups:
            for parameter in group["params"]:
                state = part.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter.data)
                    state["exp_avg_sq"] = torch.zeros_like(parameter.data)


@contextmanager
def _steps_left_out(optimizer: Any) -> Iterator[None]:
    """Keep Megatron from looking for torch's `step` among the saved tensors, where it does not put it: a KeyError."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    name = "_set_main_param_and_optimizer_states"
    changed = [part for part in parts if hasattr(part, name)]
    zero = torch.zeros((), dtype=torch.float32)
    for part in changed:
        original = getattr(part, name)
        setattr(part, name, lambda parameter, tensors, set_state=original: set_state(parameter, {"step": zero, **tensors}))
    try:
        yield
    finally:
        for part in changed:
            delattr(part, name)


def _separate_steps(optimizer: Any, updates: int) -> None:
    """Give each parameter its own `step` after loading.

    Without Transformer Engine all share one tensor: each update would add to it once a parameter, and Adam's bias correction
    would run away.
    """
    for part in torch_optimizers(optimizer):
        for state in part.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = torch.tensor(float(updates), dtype=torch.float32, device=state["step"].device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Megatron, which warns about things that are as they should be."""
    logger = logging.getLogger("megatron")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
