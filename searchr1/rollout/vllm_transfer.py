"""Loads published weights into a running vLLM model: the weight-transfer engine "shm".

vLLM imports this module in every worker process because `WorkerExtension` is named as its worker extension; importing
it registers the engine.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from searchr1.rollout.weights import WeightManifest, WeightReader

BACKEND = "shm"


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """What to load."""

    bucket: WeightManifest


class ShmWeightTransferEngine(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Feeds buckets to the model's own loader, which cuts tensors to any TP or PP layout."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parameters = {name for name, _ in self.model.named_parameters()}
        self._loaded: set[str] = set()
        self.reader = WeightReader(self.device)

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Put the model into loading state; it cannot run until `finish_weight_update`."""
        self._loaded = set()
        self.reader.start()
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket; the trainer may write its buffer again as soon as this returns.

        (The base class would synchronize an accelerator that a CPU does not have.)
        """
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        """Read the bucket and load its tensors."""
        with _quiet():
            self._loaded |= set(self.model.load_weights(self.reader.read(update_info.bucket)) or ())
        _own_what_waits(self.model, self.reader)

    def finish_weight_update(self) -> None:
        """Make the new weights live.

        Raises:
            RuntimeError: a parameter got no new value, or the model's loader does not say which did.
        """
        with _quiet():
            finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the copies on the way; a trainer may share the GPU
        if self.device.type == "cpu":
            _repack_shared_weights(self.model)
        # vLLM itself only warns, and goes on with a mixture of old and new weights.
        if not self._loaded:
            raise RuntimeError(f"{type(self.model).__name__}.load_weights does not report what it loaded")
        missing = sorted(self._parameters - self._loaded)
        if missing:
            raise RuntimeError(f"the weight update left {len(missing)} parameters as they were: {missing[:5]}")

    def shutdown(self) -> None:
        """Unmap the buffers."""
        self.reader.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without vLLM's warnings about modules that have no weights of their own and about two layers loading at once.

    What matters is checked at the end: that every parameter got its value.
    """
    logger = logging.getLogger(finalize_layerwise_reload.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _own_what_waits(model: torch.nn.Module, reader: WeightReader) -> None:
    """vLLM keeps the tensors of a layer until it has all of them, which may be buckets later; the buffer is written again
    before that, so what waits there gets memory of its own."""

    def own(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if reader.holds(tensor) else tensor

    for module in model.modules():
        for _, bound in get_layerwise_info(module).loaded_weights:
            for name, value in bound.arguments.items():
                bound.arguments[name] = tree_map_only(torch.Tensor, own, value)


def _repack_shared_weights(model: torch.nn.Module) -> None:
    """On a CPU a linear layer computes with a packed copy of its weight; reloading repacks it only in the module that
    owns the weight. An output layer tied to the embedding would go on with the old copy."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.ndim == 2 and weight.numel() > 0:
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


class WorkerExtension:
    """Mixed into every vLLM worker; naming it makes each worker process import this module."""

    weight_transfer_engine: Any

    def take_weight_warnings(self) -> list[str]:
        """Return what made the last update slower than it should be in this worker."""
        return list(self.weight_transfer_engine.reader.take_warnings())


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, ShmWeightTransferEngine)
