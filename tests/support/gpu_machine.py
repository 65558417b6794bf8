"""A machine with GPUs that exists in a test only: the real groups, workers, policy and engine thread run in one process, and
every tensor that a process would hold on a GPU is a small one whose bytes are counted.

What is replaced: Ray (ranks are objects, a group's call runs on all of them), the channel, the models' arithmetic, the agent
loop and vLLM. What is real, and so cannot differ from a run: train(), the worker groups' handles, RLinf's placement, the
workers' methods, `Policy.train_step`, `Offload`, the engine's states, checkpoints and logs.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch

from searchr1.agent.settings import GenerateParams
from searchr1.agent.trajectory import Sample, Trajectory, Turn
from searchr1.algorithms.sums import Sums
from searchr1.config.layout import actor_layout, critic_layout
from searchr1.device import Device
from searchr1.learner.critic import Critic
from searchr1.learner.policy import Policy
from searchr1.rollout.backend import Finished
from searchr1.rollout.engine import Engine

WEIGHT_ELEMENTS = 4
"""Of the one tensor that travels to the engines."""


def rlinf_cluster():
    """RLinf's view of one node with eight GPUs, without Ray."""
    from rlinf.scheduler.cluster.node import NodeGroupInfo, NodeInfo
    from rlinf.scheduler.hardware import Accelerator
    from rlinf.scheduler.hardware.hardware import HardwareInfo, HardwareResource

    hardware = [HardwareResource(type="Accelerator", infos=[HardwareInfo("Accelerator", "NV_GPU:H100")] * 8)]
    assert Accelerator.HW_TYPE == "Accelerator"
    node = NodeInfo(
        node_labels=[], node_rank=0, ray_id="a", node_ip="127.0.0.1", num_cpus=8, python_interpreter_path="python",
        default_env_vars={}, env_vars={}, hardware_resources=hardware,
    )  # fmt: skip
    group = NodeGroupInfo(label=NodeGroupInfo.DEFAULT_GROUP_LABEL, nodes=[node])
    return SimpleNamespace(num_nodes=1, get_node_info=lambda rank: node, get_node_group=lambda label=None: group)


class Machine:
    """Eight GPUs, who holds what on them, and what happened."""

    def __init__(self, config, sizes, on_note=lambda: None):
        """`sizes`: group -> kind of tensor -> bytes on one of its GPUs."""
        self.device = Device(kind="cuda", slots=8, cores=64)
        self.config, self.sizes, self.on_note = config, sizes, on_note
        self.holders = []
        self.notes = []
        self.calls = []
        self.levels = set()
        self.environment = {}
        self.workers = defaultdict(list)
        self.starting = None
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def held(self, slot):
        """`group/kind` -> bytes on a GPU now, without what is away."""
        found = {}
        for holder in list(self.holders):
            if slot in holder.slots:
                found |= {f"{holder.group}/{kind}": size for kind, size in holder.held().items() if size}
        return found

    def note(self, phase, holder):
        """Keep what is on a process's GPUs while it is at work on something that needs memory."""
        for slot in holder.slots:
            self.notes.append(
                SimpleNamespace(phase=phase, by=holder.group, slot=slot, held=self.held(slot), seen=self.on_note())
            )

    def await_(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def close(self):
        for worker in self.workers["rollout"]:
            if hasattr(worker, "_engine"):
                self.await_(worker._engine.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Channel:
    """RLinf's, as far as it is used; `async_op` calls come from workers."""

    def __init__(self, machine):
        self._machine = machine
        self._queues = defaultdict(asyncio.Queue)

    def put(self, item, key, async_op=False):
        return self._do(self._queues[key].put(item), async_op)

    def get(self, key, async_op=False):
        return self._do(self._queues[key].get(), async_op)

    def qsize(self, key):
        return self._queues[key].qsize()

    def _do(self, coroutine, async_op):
        return SimpleNamespace(async_wait=lambda: coroutine) if async_op else self._machine.await_(coroutine)


class Result:
    def __init__(self, future):
        self._future = future
        self.done = future.done

    def wait(self):
        return self._future.result(60)


class Handle:
    """A launched group: every method runs on all ranks at once."""

    def __init__(self, machine, component, workers):
        self._machine, self._component, self._workers = machine, component, workers

    def __getattr__(self, method):
        def call(*args):
            self._machine.calls.append((self._component, method, *args))

            async def on_all():
                return await asyncio.gather(*(getattr(worker, method)(*args) for worker in self._workers))

            return Result(asyncio.run_coroutine_threadsafe(on_all(), self._machine.loop))

        return call


class Launcher:
    """What `Worker.create_group` returns."""

    def __init__(self, machine, worker, args):
        self._machine, self._worker, self._args = machine, worker, args

    def launch(self, cluster, placement_strategy, name, catch_system_failure):
        machine = self._machine
        component = self._worker.__name__.removesuffix("Worker").lower()
        placements = placement_strategy.get_placement(cluster)
        for placement in placements:
            slots, rank = [int(gpu) for gpu in placement.visible_accelerators], placement.rank
            machine.starting = SimpleNamespace(rank=rank, world=len(placements), slots=slots)
            before = dict(os.environ)
            os.environ.clear()
            try:
                worker = self._worker(*self._args)
                machine.environment[component, rank] = dict(os.environ)
            finally:
                os.environ.clear()
                os.environ.update(before)
            machine.workers[component].append(worker)
        return Handle(machine, component, machine.workers[component])


class Holder:
    """Tensors of a process on a GPU, one of each kind."""

    def __init__(self, machine, group, slots):
        self.machine, self.group, self.slots = machine, group, slots
        machine.note("start", SimpleNamespace(group=group, slots=slots))
        self.tensors = {kind: torch.ones(size, dtype=torch.uint8) for kind, size in machine.sizes[group].items()}
        machine.holders.append(self)
        machine.note("start", self)

    def held(self):
        return {kind: tensor.untyped_storage().nbytes() for kind, tensor in self.tensors.items()}

    def require(self, *kinds):
        """Fail where a GPU would: what is computed with has to be there."""
        away = [kind for kind in kinds if kind in self.tensors and self.tensors[kind].numel() and not self.held()[kind]]
        assert not away, f"{self.group} computes with {away}, which is not on the GPU"


class Nothing(list):
    """The share of a rank that does not lead its data-parallel rank."""

    trajectories = advantages = minibatch_ids = returns = ()


class Trainer(Holder):
    """A training backend of policy or critic: no arithmetic, but all that it would touch."""

    data_group = None
    learning_rate = 1e-6
    parameter_count = WEIGHT_ELEMENTS

    def __init__(self, machine, group, rank, slots, layout):
        super().__init__(machine, group, slots)
        self.device = torch.device("cuda")
        self.dp_rank, self.is_dp_leader = layout.dp_rank(rank), layout.is_dp_leader(rank)

    def broadcast_from_dp_leader(self, value):
        return Nothing() if value is None else value

    def resident(self, kind):
        if kind in self.tensors:
            yield self.tensors[kind]

    def clip_gradients(self, max_norm):
        self.require("weight", "grad", "optimizer")
        self.machine.note("train", self)
        return 1.0

    def step(self):
        self.require("weight", "grad", "optimizer")

    zero_grad = step

    def values(self, batches):
        self.require("weight")
        self.machine.note("train", self)
        return [None] * len(batches)

    def named_weights(self, dtype):
        self.require("weight")
        self.machine.note("sync", self)
        yield "model.norm.weight", torch.ones(WEIGHT_ELEMENTS, dtype=dtype)

    def named_adapters(self, dtype):
        self.require("weight")
        self.machine.note("sync", self)
        for side, shape in (("A", (2, 4)), ("B", (4, 2))):
            yield f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight", torch.ones(shape)

    def save(self, folder, in_background):
        self.require("weight", "optimizer")
        self.machine.note("save", self)
        (folder / "hf").mkdir(parents=True, exist_ok=True)
        (folder / "weights").write_text("w")

    def finish_save(self):
        pass

    def load(self, folder):
        self.require("weight", "optimizer")
        self.machine.note("load", self)


class Reference(Holder):
    def logprobs(self, trajectories):
        self.machine.note("rollout", self)
        return [np.zeros(len(t.response_ids), dtype=np.float32) for t in trajectories]


class EngineMemory(Holder):
    """What stands in for vLLM below the real engine thread. Awake or asleep, its tensors are there or not."""

    def __init__(self, machine, slots, settings):
        super().__init__(machine, "rollout", slots)
        self.settings, self.left = settings, {}
        self.away, self.valid = {}, True

    @property
    def has_work(self):
        return bool(self.left)

    def add(self, request_id, prompt_ids, params, on_text=None):
        self.left[request_id] = None

    def add_scoring(self, request_id, token_ids):
        self.left[request_id] = [0.0] * len(token_ids)

    def step(self):
        self.require("weights", "kv_cache")
        assert self.valid, "tokens from weights that were dropped"
        self.machine.note("probe" if any(self.left.values()) else "rollout", self)
        ended, self.left = self.left, {}
        return [Finished(name, [7], [-0.5], "x", "stop", 1, 0, scores) for name, scores in ended.items()]

    def take_ended(self):
        return []

    def load_weights(self, *args, **kwargs):
        self.require("weights")
        self.machine.note("sync", self)
        self.valid = True
        return []

    def load_adapter(self, folder, version):
        self.require("weights")
        self.machine.note("sync", self)

    def sleep(self, level):
        assert self.settings.sleep_mode, "vLLM was not started with its sleep mode"
        self.machine.levels.add(level)
        self.valid = level == 1
        for kind, tensor in self.tensors.items():
            self.away[kind] = tensor.untyped_storage().nbytes()
            tensor.untyped_storage().resize_(0)

    def wake(self, tags):
        for tag in tags:
            self.tensors[tag].untyped_storage().resize_(self.away.pop(tag))
        self.machine.note("wake", self)

    def close(self):
        pass


class Batch:
    """A packed batch of the critic: one trajectory."""

    def __init__(self, trajectory):
        self.length = len(trajectory.response_ids)

    def scatter_policy(self, values):
        return np.zeros(self.length, dtype=np.float32)


async def answer(run, group_size, *, sample, engine, **rest):
    """One generation, whatever the agent loop is."""
    await engine.generate(sample.prompt_ids, GenerateParams(max_new_tokens=1))
    turns = [Turn("<answer>x</answer>", "answer", 2)]
    mask, logprobs = np.ones(2, dtype=np.bool_), np.full(2, -0.5, dtype=np.float32)
    ids = np.array([7, 8], dtype=np.int32)
    return [Trajectory(sample, r, ids, mask, logprobs, turns, "answer") for r in range(group_size)]


class Scorer:
    def __init__(self, config):
        pass

    async def score_all(self, trajectories, untagged):
        for trajectory in trajectories:
            trajectory.reward = float(trajectory.rollout_id % 2)

    async def aclose(self):
        pass


def zeros_of_critic(self, trajectories, returns, old_values):
    names = ("tokens", "loss", "clipped", "values", "returns", "returns_squared", "error_squared")
    return Sums({name: torch.zeros((), dtype=torch.float64) for name in names})


def build(monkeypatch, config, sizes, on_note=lambda: None):
    """A machine on which `train(config)` runs until the test ends; close it."""
    import ray
    import transformers
    from rlinf import scheduler

    from searchr1.cluster import launch as launch_module
    from searchr1.cluster import rollout_worker as rollout_module
    from searchr1.learner import critic as critic_module
    from searchr1.learner import policy as policy_module
    from searchr1.rewards import scorer as scorer_module
    from searchr1.tracking import run_log
    from searchr1.training import run as run_module

    machine = Machine(config, sizes, on_note)

    def begin_worker(self):
        self._rank, self._world_size = machine.starting.rank, machine.starting.world
        self.slots = machine.starting.slots

    monkeypatch.setattr(scheduler.Worker, "__init__", begin_worker)
    monkeypatch.setattr(
        scheduler.Worker, "create_group", classmethod(lambda cls, *args: Launcher(machine, cls, args)), raising=True
    )
    # The paths of its recipes are placeholders.
    monkeypatch.setattr("searchr1.training.run.check_before_start", lambda *_, **__: None)
    monkeypatch.setattr(launch_module, "Cluster", lambda **_: rlinf_cluster())
    monkeypatch.setattr(launch_module, "Channel", SimpleNamespace(create=lambda name: Channel(machine)))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(Device, "detect", classmethod(lambda cls, setting="auto": machine.device))
    monkeypatch.setattr(Device, "empty_cache", lambda self: None)
    # One process stands for all of them.
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    # Ranks start in order, so the workers' order says which one it is.
    started = defaultdict(int)

    def next_worker(component):
        rank = started[component]
        started[component] += 1
        return rank, machine.workers[component][rank]

    def start_policy(cls, run, device, total_steps=None):
        rank, worker = next_worker("actor")
        layout = actor_layout(config, len(machine.workers["actor"]))
        return Policy(Trainer(machine, "actor", rank, worker.slots, layout), run)

    def start_critic(cls, run, device, total_steps):
        rank, worker = next_worker("critic")
        layout = critic_layout(config, len(machine.workers["critic"]))
        return Critic(Trainer(machine, "critic", rank, worker.slots, layout), run)

    async def start_engine(cls, model_path, device, settings):
        _, worker = next_worker("rollout")
        memory = EngineMemory(machine, worker.slots, settings)
        return await Engine.start_backend(lambda: memory, settings)

    def score(self, trajectories, temperature):
        self.backend.require("weight")
        machine.note("probe" if trajectories and trajectories[0].sample.id.startswith("probe") else "train", self.backend)
        return [np.zeros(len(t.response_ids), dtype=np.float32) for t in trajectories]

    monkeypatch.setattr(Policy, "start", classmethod(start_policy))
    monkeypatch.setattr(Policy, "_score", score)
    monkeypatch.setattr(Policy, "_pack", lambda self, *_: [])
    monkeypatch.setattr(Policy, "_accumulate", lambda self, *_: (Sums(), Sums()))
    monkeypatch.setattr(policy_module, "loss_metrics", lambda sums: {"loss": 0.0, "ratio": 1.0})
    monkeypatch.setattr(policy_module, "mismatch_metrics", lambda sums: {})
    monkeypatch.setattr(
        policy_module.ScoringModel,
        "start_reference",
        classmethod(lambda cls, run, device: Reference(machine, "inference", next_worker("inference")[1].slots)),
    )
    monkeypatch.setattr(Critic, "start", classmethod(start_critic))
    monkeypatch.setattr(Critic, "_accumulate", zeros_of_critic)
    monkeypatch.setattr(
        critic_module, "micro_batches", lambda part, most, trajectories, **_: [Batch(t) for t in trajectories]
    )
    monkeypatch.setattr(critic_module, "unpack_all", lambda batches, values: list(values))
    monkeypatch.setattr(Engine, "start", classmethod(start_engine))
    monkeypatch.setattr(rollout_module, "run_group", answer)
    monkeypatch.setattr(rollout_module, "build_tools", lambda *_: {})
    monkeypatch.setattr(scorer_module, "Scorer", Scorer)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path, **_: SimpleNamespace())
    monkeypatch.setattr(run_log, "load_token_text", lambda path: None)
    questions = [Sample(f"s/{i}", i, [1, 2, 3], f"Q{i}", ["a"]) for i in range(16)]
    monkeypatch.setattr(run_module, "load_data", lambda config: SimpleNamespace(train=questions, val=questions[:8]))
    return machine
