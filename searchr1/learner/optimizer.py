"""AdamW and its learning-rate schedule, from a trainer's configuration."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from searchr1.config.schema_model import LrSchedConfig, OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW; weight decay acts on matrices only, not on norms and biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]  # adapters are all matrices
    return torch.optim.AdamW(
        filled, lr=config.lr, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps, fused=True
    )


def lr_factor(config: LrSchedConfig, peak: float, total_steps: int | None) -> Callable[[int], float]:
    """Return a function: optimizer step (from 0) -> learning rate as a share of the peak rate."""
    decay_steps = config.lr_decay_iters or total_steps or 0
    warmup = config.lr_warmup_iters or round(config.lr_warmup_fraction * decay_steps)
    start, end = config.lr_warmup_init / peak, config.min_lr / peak

    def factor(step: int) -> float:
        if step < warmup:
            return start + (1 - start) * (step + 1) / warmup
        if config.lr_decay_style == "constant" or decay_steps <= warmup:
            return 1.0
        done = min(1.0, (step - warmup) / (decay_steps - warmup))
        shape = 1 - done if config.lr_decay_style == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return end + (1 - end) * shape

    return factor


def build_schedule(
    optimizer: torch.optim.Optimizer, config: LrSchedConfig, peak: float, total_steps: int | None
) -> LambdaLR:
    """Return the schedule; call `step()` once per optimizer step."""
    return LambdaLR(optimizer, lr_factor(config, peak, total_steps))


def resume_schedule(schedule: LambdaLR, updates: int) -> None:
    """Go on after so many optimizer steps, at the rates that the schedule was built with.

    The optimizer's state may come from a run with others, and a run that is resumed with another rate is meant to train with
    it.
    """
    schedule.last_epoch = updates
    rates = [base * factor(updates) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, base, rate in zip(schedule.optimizer.param_groups, schedule.base_lrs, rates, strict=True):
        group["initial_lr"], group["lr"] = base, rate
    schedule._last_lr = rates


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale gradients down to `max_norm`. Return the norm before, over all ranks (nan or inf if a gradient is)."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    full: Tensor = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return float(full)
