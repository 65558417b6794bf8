"""One of two ranks that run Megatron: `python convert_ranks.py RANK PORT FOLDER`.

For every model of FOLDER (`NAME/hf`, and `NAME/stacked`, `NAME/separate` from hf2mg) and every layout it saves a checkpoint,
and loads one of hf2mg's and compares. What differs is written to `FOLDER/differences-RANK`. The ways of naming go round, so
that each family meets each way in each layout.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}
WAYS = {
    "stacked": {},
    "separate": {"non_homogeneous_layers": True},
    "halves": {"singleton_local_shards": True},
}
"""Ways of naming: the metadata that make Megatron use them."""


def main(rank: int, port: int, folder: Path) -> None:
    from searchr1.config.layout import Layout
    from searchr1.learner.megatron.parallel import start_megatron

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    problems = []
    models = sorted(path for path in folder.iterdir() if path.is_dir())
    for turn, (name, (tensor_parallel, pipeline_parallel)) in enumerate(LAYOUTS.items()):
        layout = Layout.of(2, tensor_parallel, pipeline_parallel)
        parallel_state = start_megatron(layout, 1)
        for number, model in enumerate(models):
            saved = list(WAYS)[(turn + number % 4) % 3]  # a family has four models
            loaded = ("stacked", "separate")[(turn + number) % 2]
            problems += [f"{model.name} {name}: {text}" for text in one(model, name, layout, saved, loaded)]
        parallel_state.destroy_model_parallel()
    (folder / f"differences-{rank}").write_text("\n".join(problems))
    dist.barrier()


def one(folder: Path, name: str, layout, saved: str, loaded: str) -> list[str]:
    from megatron.core import dist_checkpointing

    from searchr1.checkpoints.model_shape import read_megatron_shape
    from searchr1.config.schema_model import ActorModelConfig
    from searchr1.device import Device
    from searchr1.learner.megatron.model import build_model, first_layer_of_stage, load_hugging_face, local_parameters

    arch, config = read_megatron_shape(folder / "hf")
    settings = ActorModelConfig(precision="bf16" if folder.name.endswith("bf16") else "fp32")
    model = build_model(arch, config, layout, settings, Device.detect("cpu"), 4096)
    parameters = local_parameters(model, arch, first_layer_of_stage(arch, layout))
    load_hugging_face(parameters, folder / "hf", arch)
    expected = {item.entry.name: item.parameter.detach().clone() for item in parameters}
    target = folder / f"megatron-{name}-{saved}"
    if dist.get_rank() == 0:
        target.mkdir()
    dist.barrier()
    # As our trainer saves: no prefix, an optimizer beside; or as others do, under `model.`.
    prefix = "model." if saved == "separate" else ""
    state = {"model": model.sharded_state_dict(prefix=prefix, metadata=dict(WAYS[saved])), "step": 3}
    if saved == "stacked":
        state["optimizer"] = renamed(model.sharded_state_dict(metadata={}))
    dist_checkpointing.save(state, str(target))
    save_as_torch(model, folder / f"torch-{name}", tensor_rank=dist.get_rank() if name == "tp2" else 0,
                  stage=dist.get_rank() if name == "pp2" else None)  # fmt: skip
    for item in parameters:
        item.parameter.data.fill_(float("nan"))
    state = {"model": model.sharded_state_dict(metadata=dict(WAYS[loaded]))}
    model.load_state_dict(dist_checkpointing.load(state, str(folder / loaded))["model"])
    return [
        f"{loaded}: {item.entry.name} differs"
        for item in parameters
        if not torch.equal(item.parameter, expected[item.entry.name])
    ]


def save_as_torch(model, folder: Path, tensor_rank: int, stage: int | None) -> None:
    """As `ckpt_format: torch` does, whose first data-parallel rank writes."""
    if folder.name == "torch-tp1" and dist.get_rank():
        return
    rank = folder / f"iter_0000003/mp_rank_{tensor_rank:02d}{'' if stage is None else f'_{stage:03d}'}"
    rank.mkdir(parents=True)
    state = {"args": argparse.Namespace(save="x"), "checkpoint_version": 3.0, "iteration": 3}
    state["model"] = model.state_dict_for_save_checkpoint()
    torch.save(state, rank / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("3")


def renamed(state):
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    found = {}
    for key, item in state.items():
        if isinstance(item, (ShardedTensor, ShardedTensorFactory)):
            item.key = "optimizer.state.exp_avg." + item.key
            found[key] = item
    return found


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    except BaseException:
        traceback.print_exc()
        raise
    dist.destroy_process_group()
