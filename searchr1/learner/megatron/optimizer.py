"""Megatron's gradient buffers and (distributed) optimizer, from a trainer's configuration."""

from __future__ import annotations

from typing import Any

import torch

from searchr1.learner.megatron.model import PARAMETER_DTYPES
from searchr1.learner.trainer_config import TrainerConfig


def build_ddp(module: Any, trainer: TrainerConfig) -> Any:
    """Return the model with gradient buffers, which are summed over the data-parallel ranks at a mini-batch's end."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    ddp = DistributedDataParallel(
        module.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=trainer.optim.use_distributed_optimizer,
            overlap_grad_reduce=trainer.optim.overlap_grad_reduce,
            overlap_param_gather=trainer.optim.overlap_param_gather,
            bucket_size=trainer.megatron.ddp_bucket_size,
        ),
        module,
    )
    module.config.finalize_model_grads_func = finalize_model_grads
    module.config.no_sync_func = ddp.no_sync
    return ddp


def build_optimizer(ddp: Any, trainer: TrainerConfig) -> Any:
    """Return AdamW with fp32 master weights; weight decay acts on matrices only, not on norms and biases."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    optim = trainer.optim
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=0.0,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.adam_beta1,
            adam_beta2=optim.adam_beta2,
            adam_eps=optim.adam_eps,
            clip_grad=optim.clip_grad,
            bf16=trainer.model.precision == "bf16",
            fp16=trainer.model.precision == "fp16",
            params_dtype=PARAMETER_DTYPES[trainer.model.precision],
            use_distributed_optimizer=optim.use_distributed_optimizer,
            overlap_param_gather=optim.overlap_param_gather,
            initial_loss_scale=optim.initial_loss_scale,
            loss_scale_window=optim.loss_scale_window,
            min_loss_scale=optim.min_loss_scale,
            hysteresis=optim.hysteresis,
        ),
        [ddp],
    )
    use_fused_adam(optimizer)
    # Megatron leaves it to its scheduler to apply the multiplier, which is 0 for norms and biases.
    for group in optimizer.param_groups:
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
    return optimizer


def use_fused_adam(optimizer: Any) -> None:
    """Update all parameters in one kernel without temporaries, as Transformer Engine's and Apex's Adam do: Megatron does not
    ask torch's for that. Needed again after loading a checkpoint, which may have been saved without."""
    for part in torch_optimizers(optimizer):
        if isinstance(part, torch.optim.AdamW):
            for group in part.param_groups:
                group["fused"] = True
                for parameter in group["params"]:
                    state = part.state.get(parameter)
                    if state:  # the kernel reads the number of the step where the parameter is
                        state["step"] = state["step"].to(parameter.device, torch.float32)


def torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return the torch (or fused) optimizers inside Megatron's."""
    return [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
