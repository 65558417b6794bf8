"""A run's folder: what a resume prints and records, and that a refused run changes nothing in it."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import yaml

from searchr1.agent.trajectory import Sample
from searchr1.checkpoints.manifest import checkpoint_steps, new_checkpoint, read_contents, verify_checkpoint
from searchr1.config.load import ConfigError
from searchr1.config.schema import Config
from searchr1.data.loader import PromptLoader
from searchr1.errors import UserError
from searchr1.tracking.legs import settings_changes
from searchr1.tracking.loggers import JsonlLogger, read_metrics
from searchr1.training import run as run_module
from searchr1.training.run_folder import RunFolder
from searchr1.training.train import train


class DoneCall:
    def wait(self, timeout_s=None):
        return []


class Actor:
    """Writes a file where a checkpoint is wanted."""

    def __init__(self):
        self.loaded = []

    def save(self, folder, in_background):
        (folder / "hf").mkdir(parents=True)
        (folder / "weights").write_text("w")
        return DoneCall()

    def load(self, folder):
        self.loaded.append(folder)
        return DoneCall()


def make_config(tmp_path, **runner):
    made = Config()
    made.runner.output_dir = str(tmp_path)
    made.runner.logger.logger_backends = []
    for name, value in runner.items():
        setattr(made.runner, name, value)
    return made


def make_loader(seed=1, count=8):
    samples = [Sample(f"s/{i}", i, [1, i], f"Q{i}", ["a"]) for i in range(count)]
    return PromptLoader(samples, 2, seed=seed, shuffle=True, max_epochs=9)


def trained(config, steps, save_at=()):
    """What a run of `steps` steps leaves, by the same calls as train()."""
    loader = make_loader()
    folder = RunFolder.open(config, loader)
    cluster = SimpleNamespace(actor=Actor(), critic=None)
    folder.load(cluster)
    folder.begin()
    log = JsonlLogger(folder.path / "metrics.jsonl", folder.step)
    for step in range(folder.step + 1, steps + 1):
        loader.next_batch()
        log.log(step, {"reward/mean": 0.5})
        if step in save_at:
            folder.save(cluster, loader, step)
            folder.finish_save()
    log.close()
    return folder


def everything_in(folder):
    return {path: (path.is_file() and path.read_bytes(), path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def resumed(tmp_path, **runner):
    return make_config(tmp_path, **{"resume_dir": "auto"} | runner)


def test_used_folder_is_rejected_unless_asked_for(tmp_path):
    path = trained(make_config(tmp_path), 7, save_at=[7]).path
    with pytest.raises(UserError, match=r"already holds a run.*resume_dir=auto"):
        RunFolder.open(make_config(tmp_path), make_loader())
    over = RunFolder.open(make_config(tmp_path, overwrite=True), make_loader())
    assert checkpoint_steps(path / "checkpoints") == [7]
    over.begin()
    assert not (path / "checkpoints").exists()
    assert not (path / "metrics.jsonl").exists()
    assert RunFolder.open(resumed(tmp_path), make_loader()).resume_from is None
    assert not RunFolder.open(make_config(tmp_path, experiment_name="other"), make_loader()).path.exists()


def test_a_resume_without_a_checkpoint_says_that_it_begins_anew(tmp_path):
    assert RunFolder.open(resumed(tmp_path), make_loader()).describe() == ""
    path = trained(make_config(tmp_path), 3).path
    anew = RunFolder.open(resumed(tmp_path), make_loader())
    assert anew.describe().startswith(f"no checkpoint in {path} to go on from: beginning with step 1")
    assert RunFolder.open(make_config(tmp_path, overwrite=True), make_loader()).describe() == ""


def test_a_folder_that_cannot_be_written_is_rejected_by_its_key(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"runner\.output_dir"):
        RunFolder.open(make_config(tmp_path / "file"), make_loader())


def test_a_resume_prints_every_changed_key_with_both_values(tmp_path):
    trained(make_config(tmp_path, max_steps=4), 4, save_at=[4])
    config = resumed(tmp_path, max_steps=6)
    config.actor.optim.lr = 2e-6
    config.algorithm.group_size = 8
    config.algorithm.kl_beta = 0.0
    config.reward.reward_type = "f1_score"
    config.reward.weights = {"f1_score": 1.0}
    folder = RunFolder.open(config, make_loader())
    lines = folder.describe().splitlines()
    assert lines[0] == f"going on after step 4 from {folder.path}/checkpoints/global_step_4"
    assert lines[1] == "  changed from step 5 on:"
    assert [line.strip() for line in lines[2:7]] == [
        "actor.optim.lr: 1e-06 -> 2e-06",
        "algorithm.group_size: 5 -> 8",
        "algorithm.kl_beta: 0.001 -> 0.0",
        "reward.reward_type: searchr1 -> f1_score",
        "reward.weights.f1_score: not set -> 1.0",
    ]
    assert lines[7] == "  also changed, without effect on what is learned:"
    assert [line.strip() for line in lines[8:]] == ["runner.max_steps: 4 -> 6"]


def test_every_leg_is_kept_with_its_first_step(tmp_path):
    path = trained(make_config(tmp_path), 4, save_at=[4]).path
    second = resumed(tmp_path)
    second.actor.optim.lr = 2e-6
    trained(second, 6, save_at=[6])
    third = resumed(tmp_path)
    third.actor.optim.lr = 2e-6
    third.runner.max_steps = 9
    trained(third, 7)
    assert sorted(file.name for file in (path / "configs").iterdir()) == ["step_1.yaml", "step_5.yaml", "step_7.yaml"]
    rates = [float(yaml.safe_load((path / f"configs/step_{n}.yaml").read_text())["actor"]["optim"]["lr"]) for n in (1, 5, 7)]
    assert rates == [1e-6, 2e-6, 2e-6]
    assert (path / "config.yaml").read_bytes() == (path / "configs/step_7.yaml").read_bytes()
    # The third leg changed nothing that is learned from.
    (change,) = settings_changes(path)
    assert (change.step, [str(d) for d in change.settings]) == (5, ["actor.optim.lr: 1e-06 -> 2e-06"])


def test_steps_that_are_taken_again_take_their_settings_and_checkpoints_along(tmp_path, caplog):
    path = trained(make_config(tmp_path, keep_checkpoints=2), 6, save_at=[2, 4]).path
    later = resumed(tmp_path, keep_checkpoints=2)
    later.actor.optim.lr = 2e-6
    trained(later, 8, save_at=[8])  # a leg from step 5 on
    again = make_config(tmp_path, resume_dir=str(path / "checkpoints/global_step_4"), keep_checkpoints=2)
    again.actor.optim.lr = 3e-6
    folder = RunFolder.open(again, make_loader())
    assert [str(d) for d in folder.changed if not d.harmless] == ["actor.optim.lr: 1e-06 -> 3e-06"]
    trained(again, 6, save_at=[5])
    assert [row["step"] for row in read_metrics(path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert sorted(file.name for file in (path / "configs").iterdir()) == ["step_1.yaml", "step_5.yaml"]
    assert [str(d) for d in settings_changes(path)[0].settings] == ["actor.optim.lr: 1e-06 -> 3e-06"]
    # The checkpoint of a step that was lost is neither the newest one, nor one of the two that are kept.
    assert checkpoint_steps(path / "checkpoints") == [4, 5]
    assert (path / "checkpoints/abandoned_step_8/actor/weights").exists()
    assert "abandoned_step_8" in caplog.text


def test_a_run_without_a_record_of_its_legs_is_gone_on_with(tmp_path):
    path = trained(make_config(tmp_path), 4, save_at=[4]).path
    (path / "configs/step_1.yaml").unlink()
    (path / "configs").rmdir()
    config = resumed(tmp_path)
    config.algorithm.kl_beta = 0.01
    trained(config, 5)
    (change,) = settings_changes(path)
    assert (change.step, [str(d) for d in change.settings]) == (5, ["algorithm.kl_beta: 0.001 -> 0.01"])
    (path / "config.yaml").unlink()
    (path / "configs/step_1.yaml").unlink()
    (path / "configs/step_5.yaml").unlink()
    assert "not recorded" in RunFolder.open(resumed(tmp_path), make_loader()).describe()


def test_another_runs_checkpoint_is_compared_with_that_runs_settings(tmp_path):
    source = trained(make_config(tmp_path), 4, save_at=[2, 4]).path
    config = make_config(tmp_path, experiment_name="fork", resume_dir=str(source / "checkpoints/global_step_2"))
    config.algorithm.group_size = 3
    fork = trained(config, 4, save_at=[4])
    assert "algorithm.group_size: 5 -> 3" in fork.describe()
    (change,) = settings_changes(fork.path)
    assert change.step == 3
    assert [row["step"] for row in read_metrics(fork.path / "metrics.jsonl")] == [3, 4]
    # The same command once more begins at the same checkpoint.
    trained(config, 3)
    assert [row["step"] for row in read_metrics(fork.path / "metrics.jsonl")] == [3]


def test_another_runs_checkpoint_does_not_go_on_in_a_folder_with_steps_of_its_own(tmp_path):
    source = trained(make_config(tmp_path), 4, save_at=[4]).path
    used = trained(make_config(tmp_path, experiment_name="used"), 3, save_at=[3]).path
    before = everything_in(used)
    config = make_config(tmp_path, experiment_name="used", resume_dir=str(source / "checkpoints/global_step_4"))
    with pytest.raises(UserError, match="holds another run than"):
        RunFolder.open(config, make_loader())
    assert everything_in(used) == before
    config.runner.overwrite = True
    trained(config, 5)
    assert [row["step"] for row in read_metrics(used / "metrics.jsonl")] == [5]


def other_seed(path, config, loader):
    return config, make_loader(seed=2)


def other_questions(path, config, loader):
    return config, make_loader(count=6)


def no_critic(path, config, loader):
    config.critic.use_critic_model = True
    return config, loader


def truncated(path, config, loader):
    (path / "checkpoints/global_step_4/actor/weights").write_text("")
    return config, loader


def flipped_bit(path, config, loader):
    weights = path / "checkpoints/global_step_4/actor/weights"
    weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]))
    return config, loader


def damaged_state(path, config, loader):
    # As of a checkpoint from before there were sums, whose sizes still fit.
    checkpoint = path / "checkpoints/global_step_4"
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "sizes.json").write_text("{}")
    state = checkpoint / "runner.json"
    state.write_text(" " * state.stat().st_size)
    return config, loader


def no_checkpoint(path, config, loader):
    config.runner.resume_dir = str(path)
    return config, loader


def unreadable_settings(path, config, loader):
    (path / "configs/step_1.yaml").write_text("a: [")
    return config, loader


REFUSED = [other_seed, other_questions, no_critic, truncated, flipped_bit, damaged_state, no_checkpoint, unreadable_settings]


@pytest.mark.parametrize("spoil", REFUSED)
def test_a_resume_that_is_rejected_changes_nothing(tmp_path, monkeypatch, spoil):
    """Through train() itself: what refuses does so before any group starts."""
    path = trained(make_config(tmp_path), 6, save_at=[4]).path
    config, loader = spoil(path, resumed(tmp_path), make_loader())
    config.actor.optim.lr = 1.0
    before = everything_in(path)
    monkeypatch.setattr(run_module, "check_before_start", lambda *_, **__: None)
    monkeypatch.setattr(run_module, "load_data", lambda config: SimpleNamespace(train=[], val=[]))
    monkeypatch.setattr(run_module, "PromptLoader", lambda *_, **__: loader)
    with pytest.raises(UserError):
        train(config)
    assert everything_in(path) == before


@pytest.mark.parametrize("resume_dir", ["auto", None])
@pytest.mark.parametrize("stage", ["training_cluster", "load", "sync_weights", "hosted_loggers", "logger_backends"])
def test_a_run_that_fails_before_its_first_step_changes_nothing(tmp_path, monkeypatch, stage, resume_dir):
    path = trained(make_config(tmp_path), 6, save_at=[4]).path
    config = make_config(tmp_path, resume_dir=resume_dir, overwrite=resume_dir is None, val_before_train=False)
    config.actor.optim.lr = 1.0
    before = everything_in(path)

    def fails(*_, **__):
        raise UserError(f"{stage} failed")

    class Launched:
        def __enter__(self):
            return SimpleNamespace(actor=Actor(), critic=None, engines_asleep=nullcontext)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(run_module, "check_before_start", lambda *_, **__: None)
    monkeypatch.setattr(run_module, "load_data", lambda config: SimpleNamespace(train=[], val=[]))
    monkeypatch.setattr(run_module, "PromptLoader", lambda *_, **__: make_loader())
    monkeypatch.setattr(run_module, "training_cluster", lambda *_: Launched())
    monkeypatch.setattr(run_module, "sync_weights", lambda *_: None)
    if stage == "load":
        monkeypatch.setattr(RunFolder, "load", fails)
    elif stage == "logger_backends":
        config.runner.logger.logger_backends = ["logger_backends failed"]
    else:
        monkeypatch.setattr(run_module, stage, fails)
    with pytest.raises(UserError, match=rf"{stage} failed"):
        train(config)
    assert everything_in(path) == before


def test_the_order_goes_on_where_the_checkpoint_was_taken(tmp_path):
    trained(make_config(tmp_path), 6, save_at=[4])
    straight, again = make_loader(), make_loader()
    for _ in range(4):
        straight.next_batch()
    folder = RunFolder.open(resumed(tmp_path), again)
    assert folder.step == 4
    assert [s.id for s in straight.next_batch()] == [s.id for s in again.next_batch()]
    actor, critic = Actor(), Actor()
    folder.load(SimpleNamespace(actor=actor, critic=critic))
    assert [where.name for where in actor.loaded + critic.loaded] == ["actor", "critic"]


@pytest.mark.parametrize(
    "text",
    ['{"step": 3, "loader": {"epoch": 0}}', '{"step": Infinity, "loader": {"epoch": 0, "position": 0}}', "[" * 200_000],
)
def test_a_damaged_state_names_the_file(tmp_path, text):
    root = tmp_path / "searchr1/checkpoints"
    with new_checkpoint(root, 3) as folder:
        (folder / "runner.json").write_text(text)
    with pytest.raises(UserError, match=r"global_step_3/runner\.json: not readable .*damaged"):
        RunFolder.open(resumed(tmp_path), make_loader())


class Trained:
    """A group that writes in the background, and what it was asked."""

    def __init__(self):
        self.asked = []

    def save(self, folder, in_background):
        self.asked.append("save")
        (folder / "hf").mkdir(parents=True)
        return DoneCall()

    def finish_save(self):
        self.asked.append("finish_save")
        return DoneCall()


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_saved_checkpoint_is_one_only_when_its_step_is_over(tmp_path, in_background, keep):
    config = make_config(tmp_path, async_save=in_background)
    folder = RunFolder.open(config, make_loader())
    folder.begin()
    actor, critic = Trained(), Trained()
    folder.save(SimpleNamespace(actor=actor, critic=critic), make_loader(), 3)
    checkpoints = folder.path / "checkpoints"
    assert checkpoint_steps(checkpoints) == []
    assert RunFolder.open(resumed(tmp_path), make_loader()).resume_from is None  # after a kill in between
    if keep:
        folder.finish_save()
    else:
        folder.drop_save()
    assert actor.asked == critic.asked == (["save", "finish_save"] if in_background else ["save"])
    assert [path.name for path in checkpoints.iterdir()] == (["global_step_3"] if keep else [])
    if keep:
        assert sorted(read_contents(checkpoints / "global_step_3").files) == ["actor/hf/searchr1.json", "runner.json"]
        verify_checkpoint(checkpoints / "global_step_3")
    folder.finish_save()
    folder.drop_save()  # there is nothing left to do
    assert checkpoint_steps(checkpoints) == ([3] if keep else [])


def test_a_run_started_from_python_is_checked_too():
    with pytest.raises(ConfigError, match=r"rollout\.model\.model_path: is empty"):
        train(Config())
