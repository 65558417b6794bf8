"""Run Megatron-Core, which takes a GPU for granted, in a process without one.

`prepare()` is called before Megatron is imported, `adapt()` after. Only Megatron's own modules are changed, and of torch
only functions that cannot work without CUDA anyway: wrapping factories such as `torch.empty` for everybody would silently
corrupt other libraries (transformers' rotary tables were seen to break).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

_FACTORIES = ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_like", "zeros_like", "ones_like", "rand", "randn")
_CPU = torch.device("cpu")
_CPU_TYPES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}


def prepare() -> None:
    """Replace what Megatron calls of `torch.cuda` while it is imported and runs."""
    if torch.cuda.is_available():
        return
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = cuda.empty_cache = _nothing
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    tensor: Any = torch.Tensor
    module: Any = torch.nn.Module
    tensor.cuda = module.cuda = _itself
    # The optimizer sorts parameters by the name of their type.
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = original(self, *args, **kwargs)
        return _CPU_TYPES.get(name, name) if not args and not kwargs else name

    tensor.type = type_name


def adapt() -> None:
    """Give every imported Megatron module a `torch` whose factories read `device="cuda"` as the CPU."""
    if torch.cuda.is_available():
        return
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    proxy = _TorchOnCpu("torch")
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            vars(module)["torch"] = proxy


class _TorchOnCpu(ModuleType):
    """`torch`, but for the devices that factories are asked for."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name in _FACTORIES:
            value = _on_cpu(value)
            setattr(self, name, value)
        return value


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return make


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _itself(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self
