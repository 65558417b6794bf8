"""One rank that loads a model and prints how its memory grew: `python loading_memory.py HOW FOLDER RANK WORLD PORT`."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

SIZES = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip


def make_folder(folder: Path) -> int:
    """An untied Qwen2 in bf16, one tensor in memory at a time. Returns its number of parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from searchr1.checkpoints.safetensors import SafetensorsWriter, TensorSpec

    config = AutoConfig.for_model("qwen2", architectures=["Qwen2ForCausalLM"], tie_word_embeddings=False, **SIZES)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()}
    specs = [TensorSpec(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    with SafetensorsWriter(folder / "model.safetensors", specs) as writer:
        for spec in specs:
            writer.write(spec.name, torch.full(spec.shape, 0.01, dtype=torch.bfloat16))
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def load(how: str, folder: str, world: int) -> Any:
    """As the FSDP actor (rows), as transformers (whole), or as Megatron in `world` tensor-parallel parts."""
    from searchr1.device import Device

    device = Device.detect("cpu")
    if how == "rows":
        from searchr1.learner.model import load_model

        return load_model(folder, device)
    if how == "whole":
        from transformers import AutoModelForCausalLM

        from searchr1.learner.model import shard_model

        return shard_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), device)
    from searchr1.checkpoints.model_shape import read_megatron_shape
    from searchr1.config.layout import Layout
    from searchr1.config.schema import Config
    from searchr1.learner.megatron import model as parts
    from searchr1.learner.megatron.parallel import start_megatron

    settings = Config().actor.model
    settings.precision = "fp32"
    layout = Layout(world, tensor_parallel=world, pipeline_parallel=1)
    arch, hf_config = read_megatron_shape(folder)
    start_megatron(layout, 0)
    model = parts.build_model(arch, hf_config, layout, settings, device, 4096)
    parts.load_hugging_face(parts.local_parameters(model, arch, 0), folder, arch)
    return model


def main() -> None:
    how, folder, rank, world, port = sys.argv[1:]
    os.environ |= {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM, Qwen2ForCausalLM  # noqa: F401  (imports are not what is measured)

    from searchr1.device import Device
    from searchr1.learner.model import init_process_group

    init_process_group(Device.detect("cpu"))
    if how == "megatron":
        from searchr1.learner.megatron.modules import PolicyModel  # noqa: F401
    torch.distributed.barrier()
    before, started = peak_bytes(), time.perf_counter()
    model = load(how, folder, int(world))
    seconds = time.perf_counter() - started
    held = sum(getattr(p, "to_local", lambda p=p: p)().nbytes for p in model.parameters())
    print(json.dumps({"grown": peak_bytes() - before, "held": held, "seconds": seconds}))
    torch.distributed.barrier()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
