"""A training rank's state in PyTorch DCP shards, and what comes with it."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_map

from searchr1.checkpoints.distributed import load_distributed
from searchr1.checkpoints.manifest import HF_FOLDER, verify_checkpoint, write_rank_sums
from searchr1.checkpoints.metadata import reason
from searchr1.checkpoints.torch_files import load_tensors
from searchr1.errors import UserError
from searchr1.learner.optimizer import resume_schedule

SAVE_TIMEOUT_S = 3600.0


def save_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: LambdaLR,
    model_path: str,
    *,
    in_background: bool = False,
) -> Future[None] | None:
    """Write everything a training rank holds, but for weights that are frozen; a collective.

    In the background: copy the state to host memory and return what `finish_save` waits for, else None.
    """
    state = _trained_state(model, optimizer)
    saving: Future[None] | None = None
    if in_background:
        # On a CPU nothing is copied on its way to host memory, and training would write into what is being saved.
        host = tree_map(lambda value: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value, state)
        # A thread of its own needs a group of its own.
        writing: Any = dcp.async_save(host, checkpoint_id=folder, process_group=_background_group())
        saving = _in_thread(functools.partial(_finish_writing, writing, folder, dist.get_rank()))
    else:
        dcp.save(state, checkpoint_id=folder)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        extra = {"schedule": schedule.state_dict(), "rng": _random_state()}
        extra["schedule"].pop("lr_lambdas", None)
        torch.save(extra, folder / "extra.pt")
        save_hf_files(model_path, folder / HF_FOLDER)
    dist.barrier()
    return saving


def _finish_writing(writing: Future[Any], folder: Path, rank: int) -> None:
    writing.result(SAVE_TIMEOUT_S)
    write_rank_sums(folder, rank)


def _in_thread(work: Callable[[], None]) -> Future[None]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


@contextmanager
def disk_errors_named(folder: Path) -> Iterator[None]:
    """Turn what PyTorch and Megatron raise when they cannot write into an error that names the problem.

    Raises:
        UserError: instead of theirs.
    """
    try:
        yield
    except (OSError, CheckpointException, RuntimeError) as error:
        text = str(error).strip() or repr(error)
        # torch's zip writer notices a write that came up short only by its position.
        full = any(mark in text for mark in ("No space left", "Errno 28", "File too large", "unexpected pos"))
        reason = "the disk is full" if full else text.splitlines()[-1][:200]
        if isinstance(error, CheckpointException) and not error.failures:
            reason = "another rank could not write its part (is the disk full?)"
        raise UserError(
            f"cannot write a checkpoint below {folder}: {reason}; earlier checkpoints are untouched. Free space (or set "
            "runner.keep_checkpoints) and go on with runner.resume_dir=auto"
        ) from error


@functools.cache
def _background_group() -> dist.ProcessGroup | None:
    return dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None


def verify_on_first_rank(folder: Path) -> None:
    """Compare `folder`, part of a checkpoint, with what was written; one rank reads for all; a collective.

    Raises:
        UserError: a file is missing or changed; on all ranks.
    """
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            verify_checkpoint(folder.parent, folder.name)
        except UserError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem)
    if problem[0] is not None:
        raise UserError(problem[0])


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> None:
    """Read what `save_state` wrote, and `TrainedModel.load` has verified, into a model of the same shape; a collective.

    Raises:
        UserError: damaged, of another model, or of the other backend.
    """
    if (folder / "metadata.json").is_file():  # Megatron's; ours is called .metadata
        raise UserError(
            f"{folder} was written by training_backend: megatron; resume with the backend that wrote it, or convert it "
            "(searchr1 convert) and start from the model"
        )
    state = _trained_state(model, optimizer)
    try:
        load_distributed(state, folder)
        extra = load_tensors(folder / "extra.pt")
    except (CheckpointException, AssertionError, RuntimeError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"cannot load {folder}: it is damaged or belongs to another model ({reason(error)})") from error
    # What is frozen is not in the checkpoint, and what is trained has been asked for by name in `load_distributed`.
    options = StateDictOptions(strict=not _frozen(model))
    try:
        parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(model, optimizer, **parts, options=options)
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder} is damaged or belongs to another model ({reason(error)}); use another checkpoint"
        ) from error
    try:
        resume_schedule(schedule, int(extra["schedule"]["last_epoch"]))
        _restore_random_state(extra["rng"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise UserError(f"{folder / 'extra.pt'} is damaged ({reason(error)}); use another checkpoint") from error


def _trained_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    frozen = _frozen(model)
    trained = {name: value for name, value in model_state.items() if name not in frozen}
    return {"model": trained, "optimizer": optimizer_state}


def _frozen(model: nn.Module) -> set[str]:
    """Return the names of weights that do not train, both names of a tied one."""
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}


def save_hf_files(model_path: str, folder: Path) -> None:
    """Write configuration, generation configuration and tokenizer, so that an export needs no other folder."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    AutoConfig.from_pretrained(model_path, trust_remote_code=False).save_pretrained(folder)
    # A model without a generation configuration or a tokenizer of its own is fine here.
    with suppress(OSError, ValueError):
        GenerationConfig.from_pretrained(model_path, trust_remote_code=False).save_pretrained(folder)
    with suppress(OSError, ValueError):
        AutoTokenizer.from_pretrained(model_path, trust_remote_code=False).save_pretrained(folder)


def _random_state() -> dict[str, Any]:
    legacy: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, gauss = legacy
    return {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": _listed(random.getstate()),
    }


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
