"""Runs on eight GPUs, executed on a CPU: who starts when, who holds what while another one works, and in which order."""

from __future__ import annotations

import itertools
import signal
from collections import defaultdict
from pathlib import Path

import pytest
from support import gpu_machine

from searchr1.checkpoints.manifest import checkpoint_steps
from searchr1.cluster.launch import evaluation_cluster
from searchr1.config.load import load_config
from searchr1.device import Device
from searchr1.preflight.memory_layout import layout_of
from searchr1.preflight.memory_plan import GIB, SHAPES, plan_memory
from searchr1.tracking.loggers import read_metrics
from searchr1.training import train as train_module
from searchr1.training.run_folder import RunFolder
from searchr1.training.train import train

RECIPES = Path(__file__).parents[2] / "examples/searchr1/config"
SHORT = (
    "runner.max_steps=2", "runner.save_interval=1", "runner.val_check_interval=1", "runner.logger.logger_backends=[]",
    "runner.health.warn_only=True", "runner.health.save_unhealthy=True", "data.rollout_batch_size=8",
    "algorithm.group_size=2", "runner.resume_dir=auto",
)  # fmt: skip
MEGATRON = "qwen2.5-3b-tool-1node.yaml"
LAYOUTS = {
    "megatron": (MEGATRON,),
    "tensor parallel": (MEGATRON, "actor.model.tensor_model_parallel_size=2", "rollout.tensor_parallel_size=2"),
    "fsdp": (MEGATRON, "actor.training_backend=fsdp"),
    "adapters": (
        MEGATRON, "actor.training_backend=fsdp", "actor.lora.rank=2", "actor.lora.target_modules=[q_proj]",
        "actor.lora.weight_update=adapter",
    ),
    "critic": ("qwen2.5-3b-searchr1-v0.3-ppo.yaml", "actor.offload_weight=True"),
    "some shared": (MEGATRON, "cluster.component_placement.rollout=0-3"),
    "separated": (MEGATRON, "cluster.component_placement.actor=0-3", "cluster.component_placement.rollout=4-7"),
    "background": (MEGATRON, "runner.async_save=True"),
    "kept": (MEGATRON, "actor.offload_weight=False", "actor.offload_grad=False", "actor.offload_optimizer=False"),
}  # fmt: skip
SIZES = {
    "rollout": {"weights": 60, "kv_cache": 500},
    "actor": {"weight": 61, "optimizer": 45, "grad": 120},
    "critic": {"weight": 62, "optimizer": 46, "grad": 121},
    "inference": {"weight": 30},
}
ENGINE, ACTOR, CRITIC = ({f"{group}/{kind}" for kind in SIZES[group]} for group in ("rollout", "actor", "critic"))


def configured(layout, folder):
    name, *overrides = LAYOUTS[layout]
    return load_config(RECIPES / name, [*SHORT, f"runner.output_dir={folder}", *overrides])


def executed(config, run=train, sizes=None):
    """The machine on which a run has ended."""
    root = Path(config.runner.output_dir) / config.runner.experiment_name
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)
        machine = gpu_machine.build(patch, config, sizes or SIZES, lambda: checkpoint_steps(root / "checkpoints"))
        try:
            run(config)
        finally:
            machine.close()
    return machine


@pytest.fixture(scope="module", params=[name for name in LAYOUTS if name not in ("separated", "kept")])
def shared(request, tmp_path_factory):
    config = configured(request.param, tmp_path_factory.mktemp("run"))
    return request.param, config, executed(config)


def test_engines_and_trainers_that_share_gpus_never_hold_them_at_once(shared):
    layout, _, machine = shared
    residents = {"inference/weight"}  # stays: it scores while the engines generate
    allowed = {
        ("start", "rollout"): ENGINE,
        ("start", "inference"): residents,
        ("start", "critic"): residents | CRITIC | ACTOR,
        ("start", "actor"): residents | CRITIC | ACTOR,
        ("load", "actor"): residents | ACTOR - {"actor/grad"},
        ("load", "critic"): residents | CRITIC - {"critic/grad"},
        ("probe", "actor"): residents | {"actor/weight"},
        ("probe", "rollout"): residents | ENGINE,
        ("rollout", "rollout"): residents | ENGINE,
        ("rollout", "inference"): residents | ENGINE,
        ("train", "critic"): residents | CRITIC,
        ("train", "actor"): residents | ACTOR,
        ("save", "actor"): residents | ACTOR - {"actor/grad"},
        ("save", "critic"): residents | CRITIC - {"critic/grad"},
        ("sync", "actor"): residents | {"rollout/weights", "actor/weight"},
        ("sync", "rollout"): residents | {"rollout/weights", "actor/weight"},
        ("wake", "rollout"): residents | ENGINE,
    }
    for note in machine.notes:
        assert set(note.held) <= allowed[note.phase, note.by], note
    seen = {(note.phase, note.by) for note in machine.notes}
    missing = {("load", "actor"), ("load", "critic")}
    if layout != "critic":
        missing |= {(phase, "critic") for phase, _ in allowed}
    assert set(allowed) - seen <= missing


def test_nobody_is_on_a_gpu_while_its_engine_measures_what_is_free(shared):
    machine = shared[2]
    first = [note for note in machine.notes if (note.phase, note.by) == ("start", "rollout") and not note.held]
    assert sorted(note.slot for note in first) == sorted(s for worker in machine.workers["rollout"] for s in worker.slots)
    started = [component for component, method, *_ in machine.calls if method == "start"]
    assert started[0] == "rollout"
    assert machine.calls[1][:2] == ("rollout", "sleep")


def test_every_process_stands_on_the_gpus_of_its_slots(shared):
    layout, config, machine = shared
    found = {group: [worker.slots for worker in workers] for group, workers in machine.workers.items()}
    each = [[gpu] for gpu in range(8)]
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]
    engines = {"tensor parallel": pairs, "some shared": each[:4]}.get(layout, each)
    expected = {"rollout": engines, "actor": each, "reward": [[]] * 8}
    expected |= {"inference": each} if config.algorithm.kl_beta else {}
    assert found == expected | ({"critic": each} if layout == "critic" else {})


def test_a_step_has_one_order(shared):
    layout, _, machine = shared
    calls = [f"{component}.{method}" for component, method, *_ in machine.calls]
    second = calls[len(calls) - calls[::-1].index("rollout.sleep") - 1 :]
    critic = ["critic.values", "critic.train_step"] if layout == "critic" else []
    saves = ["actor.save", *(["critic.save"] if layout == "critic" else [])]
    assert second == [
        "rollout.sleep", *critic, "actor.train_step", *saves, "rollout.wake", "actor.publish_weights",
        "rollout.update_weights", "actor.release_weights", "rollout.wake", "rollout.rollout", "reward.score",
        *(["actor.finish_save"] if layout == "background" else []),
    ]  # fmt: skip
    tags = [call[2] for call in machine.calls if call[1] == "wake"]
    assert tags == [("weights",), ("kv_cache",)] * 3  # before the first rollout, and in both steps


def test_weights_are_dropped_unless_adapters_are_sent(shared):
    layout, _, machine = shared
    assert machine.levels == {1 if layout == "adapters" else 2}


def test_a_checkpoint_counts_when_its_step_has_been_evaluated(shared):
    """A run that is killed while it evaluates resumes before that step, and so evaluates it again."""
    _, config, machine = shared
    saves = [note.seen for note in machine.notes if note.phase == "save" and note.by == "actor"]
    assert [step for step, _ in itertools.groupby(saves)] == [[], [1]]
    after_step = [note for note in machine.notes if note.phase == "rollout" and note.by == "rollout"]
    assert after_step[-1].seen == [1]  # the evaluation of step 2
    root = Path(config.runner.output_dir) / config.runner.experiment_name
    assert checkpoint_steps(root / "checkpoints") == [1, 2]
    rows = read_metrics(root / "metrics.jsonl")
    assert [row["step"] for row in rows if "reward/mean" in row] == [1, 2]
    assert [row["step"] for row in rows if "val/exact_match" in row] == [0, 1, 2]


class Killed(BaseException):
    """Ends a run where it stands."""


@pytest.mark.parametrize("moment", ["save", "sync", "evaluation", "evaluated"])
@pytest.mark.parametrize("layout", ["megatron", "background"])
def test_a_run_killed_between_saving_and_the_end_of_its_step_repeats_all_of_it(layout, moment, tmp_path, monkeypatch):
    """Neither the metrics nor the evaluation of a step are lost or written twice."""
    config = configured(layout, tmp_path)
    real_sync, real_validate, real_save = train_module.sync_weights, train_module.validate, RunFolder.save

    def kill(when, step):
        if (when, step) == (moment, 2):
            raise Killed

    def save(folder, cluster, loader, step):
        real_save(folder, cluster, loader, step)
        kill("save", step)

    def sync_weights(cluster, step):
        real_sync(cluster, step)
        kill("sync", step)

    def validate(cluster, samples, config, log, step):
        kill("evaluation", step)
        real_validate(cluster, samples, config, log, step)
        kill("evaluated", step)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", save)
        patch.setattr(train_module, "sync_weights", sync_weights)
        patch.setattr(train_module, "validate", validate)
        with pytest.raises(Killed):
            executed(config)
    root = tmp_path / config.runner.experiment_name
    assert checkpoint_steps(root / "checkpoints") == [1]
    executed(config)
    assert checkpoint_steps(root / "checkpoints") == [1, 2]
    rows = read_metrics(root / "metrics.jsonl")
    assert [row["step"] for row in rows if "reward/mean" in row] == [1, 2]
    assert [row["step"] for row in rows if "val/exact_match" in row] == [0, 1, 2]
    assert [path.name for path in (root / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_a_resume_loads_while_the_engines_sleep(shared):
    layout, config, _ = shared
    config.runner.max_steps = 3
    machine = executed(config)
    loads = [note for note in machine.notes if note.phase == "load"]
    assert {note.by for note in loads} == ({"actor", "critic"} if layout == "critic" else {"actor"})
    assert all("optimizer" in " ".join(note.held) for note in loads)
    assert not any(kind in ENGINE for note in loads for kind in note.held)
    calls = [f"{component}.{method}" for component, method, *_ in machine.calls]
    assert calls.index("rollout.sleep") < calls.index("actor.load") < calls.index("rollout.wake")


def test_every_process_gets_its_groups_environment(shared):
    machine = shared[2]
    for (component, _), variables in machine.environment.items():
        if component != "reward":
            assert variables["TOKENIZERS_PARALLELISM"] == "false"
        assert (variables.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0") == (component == "rollout")
        assert "OMP_NUM_THREADS" not in variables


def test_engines_on_gpus_of_their_own_never_sleep(tmp_path):
    machine = executed(configured("separated", tmp_path))
    assert not {"sleep", "wake"} & {method for _, method, *_ in machine.calls}
    assert {worker._engine._settings.sleep_mode for worker in machine.workers["rollout"]} == {False}
    for note in machine.notes:
        assert ("rollout" in " ".join(note.held)) <= (note.slot >= 4)
    assert {slot for worker in machine.workers["actor"] for slot in worker.slots} == {0, 1, 2, 3}


TENSORS = {
    "weights": "weight", "weights (fp32, also the master copy)": "weight", "fp32 master weights": "optimizer",
    "Adam moments": "optimizer", "gradients (fp32 buffer)": "grad",
}  # fmt: skip
"""The memory plan's lines of a model in training that are tensors of a lasting size (FSDP's gradients are not)."""
OTHERS = {"reference model": "inference/weight", "rollout engine": "rollout/kv_cache", "engine's weights": "rollout/weights"}


def planned(config):
    """Of a 3B model on 8 GPUs: `group/kind` -> MiB on the fullest, `group/kind` -> phases, and MiB of all in a phase."""
    plan = plan_memory(SHAPES["qwen2.5-3b"], layout_of(config, 8), 80 * GIB)
    sizes, phases = defaultdict(int), {}
    for line in plan.lines:
        group, _, name = line.name.rpartition(": ")
        key = f"{group or 'actor'}/{TENSORS[name]}" if name in TENSORS else OTHERS.get(line.name)
        if key is not None:
            sizes[key] += line.size >> 20
            assert phases.setdefault(key, line.phases) == line.phases
    phases["rollout/weights"] += phases["rollout/kv_cache"]  # the line of the engine is of both
    sizes["rollout/kv_cache"] -= sizes["rollout/weights"]
    return sizes, phases, lambda phase: plan.total(phase) >> 20


PHASE_OF = {"load": "start", ("probe", "actor"): "start", ("probe", "rollout"): "rollout"}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("separated", "some shared", "background")])
def test_every_process_holds_in_each_phase_what_the_memory_plan_says(layout, tmp_path):
    """The plan's sizes, a byte for each MiB; which of them are on a GPU at once comes from the run."""
    config = configured(layout, tmp_path)
    sizes, phases, total = planned(config)
    by_group = {group: {} for group in SIZES}
    for key, size in sizes.items():
        group, kind = key.split("/")
        by_group[group][kind] = size
    machine = executed(config, sizes=by_group)
    most = dict.fromkeys(("start", "rollout", "train", "save", "sync", "wake"), frozenset())
    for note in machine.notes:
        if (note.phase, note.by) == ("start", "rollout"):
            continue  # alone
        phase = PHASE_OF.get((note.phase, note.by), PHASE_OF.get(note.phase, note.phase))
        assert sum(note.held.values()) <= total(phase), note
        most[phase] = max(most[phase], frozenset(note.held), key=lambda keys: sum(sizes[key] for key in keys))
    for phase, held in most.items():
        expected = {key for key, named in phases.items() if phase in named and sizes[key]}
        if phase == "train":  # a critic trains before the actor; the plan counts the larger of the two
            expected -= {key for key in expected if key.startswith("critic/")}
        if held & CRITIC:  # then the actor is away, and the other way round; the plan counts both, or the larger
            expected = expected - ACTOR | {key for key in CRITIC if sizes[key]}
        else:
            expected -= CRITIC
        assert held == expected, phase


def test_an_evaluation_has_no_one_to_sleep_for(tmp_path):
    config = configured("megatron", tmp_path)

    def evaluation(config):
        with evaluation_cluster(config, Device.detect()):
            pass

    machine = executed(config, evaluation)
    assert [call[:2] for call in machine.calls] == [("rollout", "start"), ("reward", "start")]
    assert {worker._engine._settings.sleep_mode for worker in machine.workers["rollout"]} == {False}
