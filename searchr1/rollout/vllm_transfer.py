"""Loads published weights into a running vLLM model: the weight-transfer engine "shm".

vLLM imports this module in every worker process because `WorkerExtension` is named as its worker extension; importing
it registers the engine.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from searchr1.rollout.weights import read_weights

BACKEND = "shm"


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """Which files to load."""

    files: list[str]


class ShmWeightTransferEngine(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Maps safetensors files and feeds them to the model's own loader, which cuts them to any TP or PP layout."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parameters = {name for name, _ in self.model.named_parameters()}
        self._loaded: set[str] = set()

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Puts the model into loading state; it cannot run until `finish_weight_update`."""
        self._loaded = set()
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Loads one set of files. (The base class would synchronize an accelerator that a CPU does not have.)"""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        """Maps the files and loads them."""
        self._loaded |= set(self.model.load_weights(read_weights(update_info.files)) or ())

    def finish_weight_update(self) -> None:
        """Makes the new weights live.

        Raises:
            RuntimeError: a parameter got no new value.
        """
        # It warns about modules without weights of their own; what matters is checked below.
        logger = logging.getLogger(finalize_layerwise_reload.__module__)
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            finalize_layerwise_reload(self.model, self.model_config)
        finally:
            logger.setLevel(level)
        if self.device.type == "cpu":
            _repack_shared_weights(self.model)
        # vLLM itself only warns, and goes on with a mixture of old and new weights.
        missing = sorted(self._parameters - self._loaded) if self._loaded else []
        if missing:
            raise RuntimeError(f"the weight update left {len(missing)} parameters as they were: {missing[:5]}")

    def shutdown(self) -> None:
        """Nothing to release."""


def _repack_shared_weights(model: torch.nn.Module) -> None:
    """On a CPU a linear layer computes with a packed copy of its weight; reloading repacks it only in the module that
    owns the weight. An output layer tied to the embedding would go on with the old copy."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.ndim == 2 and weight.numel() > 0:
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


class WorkerExtension:
    """Mixed into every vLLM worker; naming it makes each worker process import this module."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, ShmWeightTransferEngine)
