"""The memory plan against what PyTorch and transformers count, and against arithmetic done by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.checkpoints.model_shape import (
    ModelShape,
    guess_shape,
    read_shape,
    shard_adapters,
    shard_parameters,
    stage_parameters,
)
from searchr1.commands.plan_memory import main
from searchr1.config.load import load_config
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.preflight.memory_layout import layout_of
from searchr1.preflight.memory_plan import (
    GIB,
    PHASES,
    SHAPES,
    Layout,
    kept_activations,
    knobs,
    layer_activation,
    layouts_table,
    plan_memory,
    remedy,
)

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "examples/searchr1/config/qwen2.5-3b-tool-1node.yaml"
CPU = Device.detect("cpu")
TINY = ModelShape("qwen2", 64, 96, 3, 4, 2, 2048, tied=True, head_dim=16)


def hf_config(shape: ModelShape):
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    kind = Qwen2Config if shape.qkv_bias else Qwen3Config if shape.qk_norm else LlamaConfig
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "head_dim", "rms_norm_eps",
    )  # fmt: skip
    return kind(**{name: getattr(shape, name) for name in names}, tie_word_embeddings=shape.tied)


def hf_model(shape: ModelShape, device: str = "meta"):
    from transformers import AutoModelForCausalLM

    import searchr1.learner.attention  # noqa: F401

    with torch.device(device):
        return AutoModelForCausalLM.from_config(hf_config(shape), attn_implementation="searchr1_packed")


def line(plan, name):
    return next(item for item in plan.lines if item.name.startswith(name))


def held(plan, name, phase):
    return sum(item.size for item in plan.lines if item.name.startswith(name) and phase in item.phases)


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_what_transformers_builds(name, tmp_path):
    shape = SHAPES[name]
    model = hf_model(shape)
    parameters = dict(model.named_parameters())
    assert shape.parameters == sum(parameter.numel() for parameter in parameters.values())
    hf_config(shape).save_pretrained(tmp_path)
    assert read_shape(tmp_path) == read_shape(tmp_path / "config.json") == shape
    for ranks in (1, 3, 8, 64):
        shards = sum(p.chunk(ranks)[0].numel() for p in parameters.values())
        assert shard_parameters(shape, ranks) == shards
    for tp in (1, 2):
        whole = ("norm.weight", "layernorm.weight")
        cut = sum(p.numel() // (1 if key.endswith(whole) else tp) for key, p in parameters.items() if ".layers." in key)
        table = shape.padded_vocab // tp * shape.hidden_size
        assert stage_parameters(shape, tp, 1, 0) == cut + table * (1 if shape.tied else 2) + shape.hidden_size
        # Two stages hold the same layers, and a table each also when it is tied.
        stages = [stage_parameters(shape, tp, 2, stage) for stage in (0, 1)]
        assert sum(stages) == cut + 2 * table + shape.hidden_size
        assert stages[1] - stages[0] == shape.hidden_size


def test_published_sizes():
    # From the models' cards: 0.49, 3.09, 7.61, 14.7, 32.5 and 72.7 billion.
    expected = {"0.5b": 0.49, "3b": 3.09, "7b": 7.61, "14b": 14.7, "32b": 32.5, "72b": 72.7}
    for name, billions in expected.items():
        assert SHAPES[f"qwen2.5-{name}"].parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_what_the_loss_works_on():
    from searchr1.algorithms.entropy import CHUNK_ELEMENTS
    from searchr1.preflight.memory_host import CPU_LOSS_BYTES

    assert Layout().loss_bytes == 4 * 4 * CHUNK_ELEMENTS["cuda"]
    assert 4 * 4 * CHUNK_ELEMENTS["cpu"] == CPU_LOSS_BYTES


def test_vocabulary_is_padded():
    assert SHAPES["qwen2.5-3b"].padded_vocab == 151936
    assert replace(TINY, vocab_size=2049).padded_vocab == 2176


# Against PyTorch: a small model on the CPU with the FSDP backend, alone.


@pytest.fixture(scope="module")
def process_group():
    from searchr1.learner.model import init_process_group

    init_process_group(CPU)
    yield
    torch.distributed.destroy_process_group()


def trajectories(count, prompt, response):
    rng = np.random.default_rng(0)
    return [
        Trajectory(
            sample=Sample(f"s/{index}", index, rng.integers(0, 512, prompt).tolist(), "", []),
            rollout_id=0,
            response_ids=rng.integers(0, 512, response).astype(np.int32),
            loss_mask=np.ones(response, dtype=np.bool_),
            rollout_logprobs=np.zeros(response, dtype=np.float32),
            turns=[],
            stop="answer",
        )
        for index in range(count)
    ]


class Actor:
    """The parts of an FSDP actor that hold memory."""

    def __init__(self, shape, precision="fp32", checkpointing=False):
        from searchr1.config.schema_model import OptimConfig
        from searchr1.learner.model import shard_model
        from searchr1.learner.optimizer import build_optimizer

        model = hf_model(shape, "cpu").float()
        self.model = shard_model(model, CPU, precision=precision, gradient_checkpointing=checkpointing)
        self.optimizer = build_optimizer(self.model, OptimConfig())

    def gradients(self, batch):
        from searchr1.learner.model import policy_logprobs

        policy_logprobs(self.model, batch, 1.0).logprobs_M.sum().backward()

    def step(self, batch):
        self.gradients(batch)
        self.optimizer.step()


def batch_of(count=4, prompt=4, response=28):
    from searchr1.learner.packing import pack

    (batch,) = pack(trajectories(count, prompt, response), count * (prompt + response))
    return batch


def local_bytes(tensors):
    return sum(t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes for t in tensors)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [TINY, replace(TINY, tied=False, family="qwen3")], ids=["qwen2", "qwen3"])
def test_fsdp_state_is_exact(process_group, shape, precision):
    actor = Actor(shape, precision)
    actor.step(batch_of())
    plan = plan_memory(shape, Layout(gpus=1, compute_bytes={"fp32": 4, "bf16": 2}[precision]))
    parameters = list(actor.model.parameters())
    assert local_bytes(parameters) == line(plan, "weights").size
    assert local_bytes(p.grad for p in parameters) == line(plan, "gradients (fp32)").size
    moments = [t for state in actor.optimizer.state.values() for name, t in state.items() if name != "step"]
    assert local_bytes(moments) == line(plan, "Adam moments").size


def test_nothing_stays_gathered_after_scoring(process_group):
    from torch.distributed.tensor import DTensor

    from searchr1.learner.fsdp import FsdpModel

    model = FsdpModel(Actor(TINY).model, CPU)
    (found,) = model.logprobs([batch_of()], 1.0)
    assert found.numel() == 4 * 28
    assert all(isinstance(parameter, DTensor) for parameter in model.model.parameters())
    assert torch.equal(model.logprobs([batch_of()], 1.0)[0], found)


class Saved:
    """Bytes of the distinct storages that autograd keeps, a model's own excluded."""

    def __init__(self, model):
        own = [*model.parameters(), *model.buffers()]
        self._known = {t.untyped_storage().data_ptr() for t in own}
        self._kept = []
        self.bytes = 0

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self._kept.append(tensor)  # so that its address is not used again
            self.bytes += storage.nbytes()
        return tensor

    def forward(self, model, batch):
        from searchr1.learner.attention import packed_model_inputs

        with torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor):
            self.output = model.model(**packed_model_inputs(batch))
        return self.bytes


WIDE = {name: replace(SHAPES[name], vocab_size=512, num_hidden_layers=2) for name in ("qwen2.5-0.5b", "qwen3-0.6b")}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", WIDE)
def test_kept_activations_are_what_autograd_saves(name, precision):
    shape, batch, found = WIDE[name], batch_of(4, 4, 28), []
    for layers in (1, 2):
        model = hf_model(replace(shape, num_hidden_layers=layers), "cpu").to(precision).train()
        found.append(Saved(model).forward(model, batch))
    layout = Layout(compute_bytes=precision.itemsize, max_tokens=batch.tokens)
    planned, _ = kept_activations(shape, layout)
    assert planned == pytest.approx(found[1], rel=0.25)
    # One layer more, to the byte: attention on a CPU runs a sequence at a time and joins the outputs in a copy, which
    # on a GPU it does not.
    copy = precision.itemsize * shape.query_size
    assert found[1] - found[0] == (layer_activation(shape, layout) + copy) * batch.tokens


@pytest.mark.parametrize("name", WIDE)
def test_kept_activations_with_gradient_checkpointing(name):
    shape, batch = WIDE[name], batch_of(4, 4, 28)
    model = hf_model(shape, "cpu").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    saved = Saved(model)

    def note(_, args):
        saved.add(args[0])

    for layer in model.model.layers:  # checkpoints keep their inputs outside of autograd's hooks
        layer.register_forward_pre_hook(note)
    layout = Layout(compute_bytes=4, max_tokens=batch.tokens, recompute="full")
    planned, again = kept_activations(shape, layout)
    end = (4 + 4) * shape.hidden_size * batch.tokens  # the final norm
    assert planned + end == pytest.approx(saved.forward(model, batch), rel=0.25)
    # What a layer makes again in the backward pass.
    alone = hf_model(replace(shape, num_hidden_layers=1), "cpu").train()
    assert again == pytest.approx(Saved(alone).forward(alone, batch), rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_a_training_step(process_group, checkpointing):
    from torch.distributed._tools.mem_tracker import MemTracker

    shape = ModelShape("qwen2", 128, 512, 4, 4, 2, 4096, tied=True, head_dim=32)
    actor, batch = Actor(shape, "fp32", checkpointing), batch_of(32, 4, 124)
    actor.step(batch)
    tracker = MemTracker()
    tracker.track_external(actor.model, actor.optimizer)
    with tracker:
        actor.gradients(batch)
    (peak,) = [sizes["Total"] for sizes in tracker.get_tracker_snapshot("peak").values()]
    layout = Layout(
        gpus=1, compute_bytes=4, max_tokens=batch.tokens, policy_share=124 / 128, reference=False, shared=False,
        loss_bytes=64 << 20, recompute="full" if checkpointing else "none",
    )  # fmt: skip
    plan = plan_memory(shape, layout)
    planned = plan.total("train") - line(plan, "contexts").size - line(plan, "margin").size
    assert planned == pytest.approx(peak, rel=0.1)


# Against Megatron-Core on the CPU, in processes of their own.

MEGATRON = """
import json, os, sys
from pathlib import Path
jobs = json.loads(sys.argv[1])
import torch
torch.set_num_threads(1)
from searchr1.learner.megatron.backend import MegatronBackend
from searchr1.learner.trainer_config import TrainerConfig
from searchr1.preflight.memory_layout import layout_of
from searchr1.checkpoints.model_shape import read_shape
from searchr1.config.schema import Config
from searchr1.device import Device
sys.path.insert(0, sys.argv[2])
from test_memory_plan import Saved, batch_of
found = []
for path, precision, tp, pp in jobs:
    config = Config()
    config.rollout.model.model_path, config.actor.training_backend = path, "megatron"
    config.actor.model.precision = precision
    config.actor.model.tensor_model_parallel_size, config.actor.model.pipeline_model_parallel_size = tp, pp
    config.runner.max_tokens_per_mbs = 256
    backend = MegatronBackend.start(TrainerConfig.for_actor(config, 10), Device.detect("cpu"))
    saved, batch = Saved(backend.module), batch_of(8, 4, 28)
    with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
        backend.run_schedule([batch], 1.0, False, lambda batch, values: values.logprobs_M.sum())
    backend.optimizer.step()
    optimizers = [part.optimizer for part in getattr(backend.optimizer, "chained_optimizers", [backend.optimizer])]
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    found.append({
        "weights": sum(p.nbytes for p in backend.model.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in backend.model.buffers),
        "Adam": sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq")),
        "fp32 master": sum(p.nbytes for p in held) if precision == "bf16" else 0,
        "saved": saved.bytes,
    })
print("found", json.dumps(found), flush=True)
if torch.distributed.get_world_size() > 1:
    torch.distributed.barrier()
"""


def megatron(world, *jobs):
    """What each rank found for each (model folder, precision, TP, PP)."""
    import os
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = [
        sys.executable,
        "-c",
        MEGATRON,
        json.dumps([[str(job[0]), *job[1:]] for job in jobs]),
        str(Path(__file__).parent),
    ]
    ranks = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            words, env=os.environ | ranks | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    results = []
    for process in processes:
        output, errors = process.communicate(timeout=200)
        lines = [text for text in output.splitlines() if text.startswith("found ")]
        assert lines, errors[-3000:]
        results.append(json.loads(lines[0].removeprefix("found ")))
    return results


SMALL = ModelShape("qwen2", 128, 512, 4, 8, 2, 512, tied=True, head_dim=32)


@pytest.mark.slow
def test_megatron_on_one_rank(tmp_path):
    shapes = {"qwen2": SMALL, "qwen3": replace(SMALL, tied=False, family="qwen3")}
    jobs = []
    for name, shape in shapes.items():
        for layers in (2, 4):
            hf_model(replace(shape, num_hidden_layers=layers), "cpu").save_pretrained(tmp_path / f"{name}-{layers}")
            jobs.append((tmp_path / f"{name}-{layers}", "bf16", 1, 1))
    jobs.append((tmp_path / "qwen2-4", "fp32", 1, 1))
    (found,) = megatron(1, *jobs)
    for (_, precision, _, _), (name, layers), sizes in zip(
        jobs, [("qwen2", 2), ("qwen2", 4), ("qwen3", 2), ("qwen3", 4), ("qwen2", 4)], found, strict=True
    ):
        shape = replace(shapes[name], num_hidden_layers=layers)
        plan = plan_memory(shape, Layout("megatron", 1, compute_bytes=2 if precision == "bf16" else 4))
        for key in ("weights", "Adam", "fp32 master"):
            assert sizes[key] == line(plan, key).size, (name, precision, key)
        # The buffer's parts start at multiples of 256 bytes.
        assert 0 <= sizes["gradients"] - line(plan, "gradients").size <= 256 * 13 * layers
    for name, (two, four) in (("qwen2", found[:2]), ("qwen3", found[2:4])):
        shape = shapes[name]
        a_layer = (four["saved"] - two["saved"]) / 2 / 256
        h, f, q, k = shape.hidden_size, shape.intermediate_size, shape.query_size, shape.key_size
        # On a CPU norms are not fused (two fp32 copies in place of the input), nor is SwiGLU (SiLU of gate, and up once
        # more), and attention joins its outputs in a copy.
        extra = 2 * (8 - 2) * h + 2 * 2 * f + 2 * q + (8 * (q + k) if shape.qk_norm else 0)
        assert a_layer == layer_activation(shape, Layout("megatron")) + extra


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (1, 1)], ids=["tp", "pp", "dp"])
def test_megatron_state_on_two_ranks(tmp_path, tp, pp):
    hf_model(SMALL, "cpu").save_pretrained(tmp_path)
    layout = Layout("megatron", 2, tp=tp, pp=pp)
    for rank, (sizes,) in enumerate(megatron(2, (tmp_path, "bf16", tp, pp))):
        own = stage_parameters(SMALL, tp, pp, rank if pp == 2 else 0)
        expected = {"weights": 2 * own, "fp32 master": 4 * own // layout.dp, "Adam": 8 * own // layout.dp}
        for key, size in expected.items():
            assert sizes[key] == pytest.approx(size, rel=1e-3), key
        assert sizes["gradients"] == pytest.approx(4 * own, rel=1e-2)


# By hand.


def test_megatron_bytes_of_7b_on_8_gpus():
    shape = SHAPES["qwen2.5-7b"]
    plan = plan_memory(shape, Layout("megatron", 8, tp=2))
    # Column and row parallel halves; biases are cut, norms are not.
    h, f, q, k = 3584, 18944, 3584, 512
    layer = (h * (q + 2 * k) + (q + 2 * k) + q * h + 3 * h * f) // 2 + 2 * h
    own = 28 * layer + 2 * (152064 // 2) * h + h
    assert plan.parameters == own
    assert line(plan, "weights").size == 2 * own
    assert line(plan, "gradients").size == 4 * own
    assert line(plan, "fp32 master").size == 4 * own // 4
    assert line(plan, "Adam").size == 8 * own // 4
    plain = plan_memory(shape, Layout("megatron", 8, tp=2, distributed_optimizer=False))
    assert line(plain, "Adam").size == 8 * own
    single = plan_memory(shape, Layout("megatron", 8, tp=2, compute_bytes=4))
    assert line(single, "fp32 master").size == 0
    assert line(single, "weights").size == 4 * own
    # Vocabulary-parallel logits and their gradient in bf16.
    assert line(plan, "logits").size == 2 * 2 * 11008 * 152064 // 2 + (256 << 20)


def test_megatron_layer_by_hand():
    # 3B, bf16, a token: norm and linear inputs 4 x 2 h; projected q, k, v and rotated q, k and output 2 (3q + 3k);
    # gate, up, product 6 f; log-sum-exp 4 a; two inverse roots; cosines and sines, of queries and keys, of each rank.
    h, f, q, k, a, rotation = 2048, 11008, 2048, 256, 16, 4 * 2 * 128
    shape = SHAPES["qwen2.5-3b"]
    whole = 8 * h + 6 * (q + k) + 6 * f + 4 * a + 8
    assert layer_activation(shape, Layout("megatron")) == whole + rotation
    halves = layer_activation(shape, Layout("megatron", tp=2, sequence_parallel=True))
    assert halves == whole / 2 + rotation
    assert layer_activation(shape, Layout("megatron", tp=2)) == 8 * h + 8 + (whole - 8 * h - 8) / 2 + rotation
    assert layer_activation(shape, Layout("megatron", recompute="selective")) == whole + rotation - 4 * a


def test_pipeline_stages():
    shape = SHAPES["qwen2.5-3b"]
    whole, _ = kept_activations(shape, Layout("megatron", 4))
    # The first of four stages holds four micro-batches of a quarter of the layers, the last holds one.
    assert kept_activations(shape, Layout("megatron", 4, pp=4), 0)[0] == whole
    assert kept_activations(shape, Layout("megatron", 4, pp=4), 3)[0] * 4 == whole
    assert plan_memory(shape, Layout("megatron", 4, pp=4, shared=False)).stage == 0
    # With full recomputation it is the last: the logits are there.
    assert plan_memory(shape, Layout("megatron", 4, pp=4, recompute="full", shared=False)).stage == 3


def test_full_recomputation_keeps_inputs():
    shape, inputs = SHAPES["qwen2.5-3b"], 2 * 2048 * 11008
    layout = Layout("megatron", recompute="full")
    one = layer_activation(shape, layout) * 11008
    assert kept_activations(shape, layout) == (36 * inputs, one)
    assert kept_activations(shape, replace(layout, recompute_layers=6)) == (6 * inputs, 6 * one)
    block = replace(layout, recompute_method="block", recompute_layers=30)
    assert kept_activations(shape, block) == (30 * inputs + 6 * one, one)
    # The recomputed layer and the logits are never there together.
    plan = plan_memory(shape, Layout(recompute="full"))
    assert line(plan, "recomputed").size == 0


def test_engine_and_reference():
    shape = SHAPES["qwen2.5-3b"]
    plan = plan_memory(shape, Layout())
    assert line(plan, "rollout engine").size == 60 * GIB
    assert line(plan, "rollout engine").phases == ("rollout", "wake")
    assert line(plan, "reference").size == 4 * shard_parameters(shape, 8)
    apart = plan_memory(shape, Layout(shared=False, reference=False))
    assert not any(item.name.startswith(("rollout engine", "reference", "sleeping")) for item in apart.lines)
    # 14.4 GiB of weights need two GPUs of 16 GiB.
    seven = SHAPES["qwen2.5-7b"]
    assert "rollout.tensor_parallel_size" in plan_memory(seven, Layout(gpus=64), 16 * GIB).problem
    assert not plan_memory(seven, Layout(gpus=64, engine_tp=2), 16 * GIB).problem


def test_offloads():
    shape = SHAPES["qwen2.5-3b"]
    layout = Layout("megatron", offload_weight=True, offload_grad=True, offload_optimizer=True)
    kept, away = plan_memory(shape, replace(layout, offload_weight=False)), plan_memory(shape, layout)
    assert kept.total("rollout") - away.total("rollout") == line(away, "weights").size
    assert kept.total("sync") == away.total("sync")
    assert line(away, "Adam").phases == ("start", "train", "save")
    assert line(away, "gradients").phases == ("start", "train")
    host = plan_memory(shape, Layout(cpu_offload=True))
    assert [line(host, name).size for name in ("weights", "Adam", "gradients (fp32)")] == [0, 0, 0]


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout("megatron", 8, tp=3), "tensor_model_parallel_size"),
        (Layout("megatron", 8, tp=4), "num_key_value_heads = 2"),
        (Layout("megatron", 5, pp=5), "pipeline_model_parallel_size: 5 does not divide num_hidden_layers = 36"),
        (Layout("megatron", 2, tp=2, pp=2), "does not divide the actor's 2 GPUs"),
        (Layout("megatron", 2, tp=0), "must be 1 or more"),
    ],
)
def test_layouts_that_cannot_be(layout, words):
    with pytest.raises(UserError, match=words):
        plan_memory(SHAPES["qwen2.5-3b"], layout)


def test_every_knob_lowers_the_peak_and_a_remedy_fits():
    shape = SHAPES["qwen2.5-7b"]
    layout = Layout("megatron", 8, distributed_optimizer=False)
    now = plan_memory(shape, layout)
    assert not now.fits(80 * GIB)
    found = knobs(shape, layout, 80 * GIB)
    assert {"actor.model.tensor_model_parallel_size: 2", "actor.optim.use_distributed_optimizer: True"} <= {
        k[0] for k in found
    }
    assert all(plan.peak < now.peak for _, _, plan in found)
    taken, plan = remedy(shape, layout, 80 * GIB)
    assert plan.fits(80 * GIB)
    assert taken
    seventy = SHAPES["qwen2.5-72b"]
    assert not remedy(seventy, Layout(gpus=1), 80 * GIB)[1].fits(80 * GIB)
    # An engine that cannot hold the model is told, with the size that can.
    starved = Layout("megatron", 64, tp=8, pp=4, recompute="full", offload_weight=True, offload_grad=True)
    assert "rollout.tensor_parallel_size" in plan_memory(seventy, starved).problem
    taken, plan = remedy(seventy, starved, 80 * GIB)
    assert plan.fits(80 * GIB)
    assert any("rollout.tensor_parallel_size" in text for text in taken)
    # As docs/guides/layouts.md says.
    eight = Layout(gpus=8, cpu_offload=True, recompute="full", engine_tp=4, engine_share=0.6)
    assert not plan_memory(seventy, eight).fits(80 * GIB)
    assert plan_memory(seventy, replace(eight, reference=False)).fits(80 * GIB)


# From a YAML.


def test_layout_of_the_recipe():
    layout = layout_of(load_config(RECIPE), 8)
    assert layout == Layout(
        backend="megatron",
        recompute="full",
        recompute_method="block",
        recompute_layers=36,
        offload_weight=True,
        offload_grad=True,
        offload_optimizer=True,
        longest=7096,
        probe_tokens=8 * 4096,
    )
    fsdp = ["actor.training_backend=fsdp", "actor.model.gradient_checkpointing=True", "actor.offload_weight=False"]
    fsdp += ["actor.offload_grad=False", "actor.offload_optimizer=False"]
    assert replace(layout_of(load_config(RECIPE, fsdp), 8), recompute_method="uniform", recompute_layers=1) == Layout(
        recompute="full", longest=7096, probe_tokens=8 * 4096
    )
    config = load_config(
        RECIPE,
        ["actor.training_backend=megatron", "actor.model.tensor_model_parallel_size=2", "algorithm.kl_beta=0",
         "++cluster.component_placement={actor: 0-3, rollout: 4-7, reward: 0-3}"],
    )  # fmt: skip
    layout = layout_of(config, 8)
    assert (layout.backend, layout.gpus, layout.tp, layout.dp) == ("megatron", 4, 2, 2)
    assert not layout.shared
    assert not layout.reference
    with pytest.raises(UserError, match="component_placement"):
        layout_of(config, 4)


def test_a_critic_is_counted_in_every_phase():
    shape = SHAPES["qwen2.5-3b"]
    without, plan = plan_memory(shape, Layout()), plan_memory(shape, Layout(critic=Layout(section="critic")))
    # Weights and moments; the gradients are there when it trains, and the actor's are not.
    value = replace(shape, value_head=True)
    state = 12 * shard_parameters(value, 8)
    for phase in ("start", "rollout", "save", "sync", "wake"):
        assert plan.total(phase) == without.total(phase) + state + (1 << 30)  # and a process more
    assert next(item for item in plan.lines if item.name == "critic").size == state
    # An untied output layer is not the critic's.
    seven = replace(SHAPES["qwen2.5-7b"], value_head=True)
    assert sum(map(prod, seven.root_tensors)) == 152064 * 3584 + 2 * 3584
    recipe = ROOT / "examples/searchr1/config/qwen2.5-3b-searchr1-v0.2-ppo.yaml"
    found = layout_of(load_config(recipe), 8)
    assert found.recompute == "full"
    assert found.critic == replace(found, critic=None, section="critic", recompute_method="uniform", recompute_layers=1)


def test_a_critic_on_megatron():
    shape = SHAPES["qwen2.5-7b"]
    critic = Layout("megatron", 8, tp=2, pp=2, section="critic")
    plan = plan_memory(shape, Layout(gpus=8, critic=critic))
    value = replace(shape, value_head=True)
    first, last = (stage_parameters(value, 2, 2, stage) for stage in (0, 1))
    assert first - last == 152064 * 3584 // 2 - 2 * 3584  # the embedding, against final norm and head
    # bf16 weights and fp32 gradients; master weights and moments over two replicas. The first stage needs most.
    assert held(plan, "critic", "rollout") == 6 * first + 12 * first // 2
    away = {"offload_weight": True, "offload_grad": True, "offload_optimizer": True}
    layout = Layout("megatron", 8, recompute="full", critic=replace(critic, **away), **away)
    gone = plan_memory(shape, layout)
    assert held(gone, "critic", "rollout") == held(gone, "critic", "sync") == 0
    assert held(gone, "critic", "start") == 6 * first + 12 * first // 2
    assert held(gone, "critic", "save") == 2 * first + 12 * first // 2
    assert gone.total("train") >= plan_memory(shape, replace(layout, critic=None)).total("train")
    # Without recomputing, its activations are more than all that the actor has then.
    assert held(gone, "critic", "train") == 0
    plain = replace(layout, critic=replace(layout.critic, tp=1, pp=1))
    assert held(plan_memory(shape, plain), "critic", "train") > 0
    with pytest.raises(UserError, match=r"critic\.model\.tensor_model_parallel_size: 8 does not divide"):
        plan_memory(shape, Layout(critic=replace(critic, tp=8, pp=1)))


@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), ("k_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")]
)
def test_adapters_are_those_that_peft_makes(targets):
    from searchr1.checkpoints.lora import is_adapter
    from searchr1.config.schema_model import LoraConfig
    from searchr1.learner.lora import add_adapters

    shape = replace(TINY, tied=False)
    model = hf_model(shape)
    add_adapters(model, LoraConfig(rank=4, target_modules=list(targets)))
    counted = sum(p.numel() for name, p in model.named_parameters() if is_adapter(name))
    assert shard_adapters(shape, 4, targets, 1) == counted


def test_lora_by_hand():
    shape, rank = SHAPES["qwen2.5-3b"], 16
    config = load_config(RECIPE, ["actor.training_backend=fsdp", "actor.lora.rank=16", "actor.lora.base_precision=compute",
                                  "actor.model.precision=bf16", "actor.offload_weight=False",
                                  "actor.offload_optimizer=False"])  # fmt: skip
    layout = layout_of(config, 1)
    assert (layout.lora_rank, layout.base_bytes) == (16, 2)
    h, f, q, k = 2048, 11008, 2048, 256
    adapters = 36 * rank * (2 * (q + h) + 2 * (k + h) + 3 * (f + h))
    assert 29e6 < adapters < 31e6
    plan = plan_memory(shape, layout)
    assert line(plan, "weights").size == 2 * shape.parameters + 4 * adapters
    assert line(plan, "Adam").size == 8 * adapters
    assert line(plan, "gradients (fp32)").size == 4 * adapters
    assert line(plan, "gradients before sharding").size == (2 + 4) * adapters // 36
    whole = plan_memory(shape, replace(layout, lora_rank=0, lora_targets=(), base_bytes=4))
    assert whole.total("rollout") - plan.total("rollout") == 10 * shape.parameters - 12 * adapters
    sent = plan_memory(shape, replace(layout, adapter_updates=True))
    assert line(plan, "weight update").size == 2 * 151936 * h + (512 << 20)
    assert line(sent, "weight update").size == 6 * adapters
    few = plan_memory(shape, replace(layout, lora_targets=("q_proj",)))
    assert few.total("train") < plan.total("train") < whole.total("train")
    assert line(few, "Adam").size == 8 * 36 * rank * (q + h)


def test_keys_of_the_actor():
    config = load_config(RECIPE, ["actor.training_backend=megatron"])
    for section, name, value in (
        (config.actor.model, "sequence_parallel", True),
        (config.actor.model, "recompute_granularity", "full"),
        (config.actor.model, "recompute_method", "block"),
        (config.actor.model, "recompute_num_layers", 4),
        (config.actor.optim, "use_distributed_optimizer", False),
        (config.actor, "offload_optimizer", True),
    ):
        setattr(section, name, value)
    layout = layout_of(config, 8)
    assert (layout.sequence_parallel, layout.recompute, layout.recompute_method, layout.recompute_layers) == (
        True, "full", "block", 4,
    )  # fmt: skip
    assert layout.offload_optimizer
    assert not layout.distributed_optimizer


def test_command(capsys, tmp_path):
    assert main([str(RECIPE)]) == 0
    text = capsys.readouterr().out
    assert "qwen2.5-3b, by the name in rollout.model.model_path" in text
    assert "Fits" in text
    assert main([str(RECIPE), "runner.max_tokens_per_mbs=60000", "--gpu-gib", "40", "--shape", "Qwen2.5-7B"]) == 1
    text = capsys.readouterr().out
    assert "Does not fit" in text
    assert "runner.max_tokens_per_mbs: 30000" in text
    hf_config(SHAPES["llama-3.2-3b"]).save_pretrained(tmp_path)
    assert main([str(RECIPE), "--json", "--model-config", str(tmp_path), "--gpus", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["parameters"] == SHAPES["llama-3.2-3b"].parameters
    assert found["layout"]["gpus"] == 4
    for phase in PHASES:
        assert found["totals"][phase] == sum(item["size"] for item in found["lines"] if phase in item["phases"])
    assert main([str(RECIPE), f"rollout.model.model_path={tmp_path}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["source"] == f"{tmp_path}/config.json"


def test_mistakes_are_reported(tmp_path):
    path = tmp_path / "config.json"
    for words, arguments in (
        ("qwen2.5-3b", [RECIPE, "--shape", "qwen9"]),
        ("cannot be read", [RECIPE, "--model-config", tmp_path]),
        (r"rollout\.model\.model_path", [RECIPE, "rollout.model.model_path=/nowhere/thing"]),
        ("give a YAML", []),
        ("--gpu-gib", [RECIPE, "--gpu-gib", "0"]),
        ("training_backend", [RECIPE, "actor.training_backend=deepspeed"]),
        (r"actor\.model\.precision", [RECIPE, "actor.model.precision=fp8"]),
    ):
        with pytest.raises(UserError, match=words):
            main([str(argument) for argument in arguments])
    for words, content in (
        ("no JSON", "{"),
        ("model_type", '{"model_type": "mamba"}'),
        ("model_type", "[]"),
        ("hidden_size", '{"model_type": "qwen2"}'),
        ("attention_bias", '{"model_type": "llama", "attention_bias": true}'),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=words):
            read_shape(path)


def test_names_of_models():
    assert guess_shape("/models/Qwen2.5-3B-Instruct/") == "qwen2.5-3b"
    assert guess_shape("Qwen/Qwen3-0.6B") == "qwen3-0.6b"
    assert guess_shape("meta-llama/Llama-3.2-3B") == "llama-3.2-3b"
    assert guess_shape("Qwen2.5-32B") == "qwen2.5-32b"
    assert guess_shape("mine") is None


def test_the_page_shows_what_the_command_prints():
    assert layouts_table() in (ROOT / "docs/guides/layouts.md").read_text()


def test_plan_needs_no_torch():
    code = """
import sys
import searchr1.preflight.memory_plan as m
m.plan_memory(m.SHAPES["qwen2.5-3b"], m.Layout())
print("torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "False\n", result.stderr
