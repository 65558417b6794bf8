"""What an evaluation asks: folders, prompts of each method, passages; and answers that stream over a fake channel."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from searchr1.agent.settings import AgentSettings, GenerateParams
from searchr1.agent.trajectory import Chunk, Sample, Trajectory
from searchr1.cluster import channels
from searchr1.cluster.collect import Collection, collect_batch
from searchr1.cluster.failure import WorkerError
from searchr1.cluster.reward_worker import RewardGroup
from searchr1.cluster.rollout_worker import RolloutGroup, RolloutReport
from searchr1.config.schema import Config
from searchr1.errors import UserError
from searchr1.evaluation import evaluate
from searchr1.evaluation import tasks as eval_tasks
from searchr1.evaluation.tasks import (
    add_passages,
    begin,
    evaluation_path,
    load_questions,
    open_tasks,
    require_server,
    retrieve_passages,
)
from searchr1.tracking.trajectory_log import eval_file

MODEL = Path(__file__).parents[2] / "examples/demo/cold_start"


@pytest.fixture
def config(tmp_path):
    rows = [
        {"question": f"Where was {name} born?", "prompt": f"Question: Where was {name} born?\n", "solutions": ["Oro"]}
        for name in ("Ann", "Bob", "Eve")
    ]
    (tmp_path / "nq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = Config()
    made.algorithm.group_size = 1
    made.rollout.model.model_path = str(MODEL)
    made.runner.output_dir = str(tmp_path / "results")
    made.runner.seq_length = 600
    made.data.max_prompt_length = 400
    made.data.val_data_paths = [str(tmp_path / "nq.jsonl")]
    made.evaluation.methods = ["direct", "cot", "rag", "search"]
    return made


def tasks_of(config):
    questions = load_questions(config)
    return questions, {task.method.name: task for task in open_tasks(config, evaluation_path(config), questions)}


def close(tasks):
    for task in tasks.values():
        task.ledger.close()


def prompt(questions, sample):
    return questions.tokenizer.decode(sample.prompt_ids)


def test_every_method_asks_the_same_questions_with_its_own_prompt(config):
    questions, tasks = tasks_of(config)
    assert {name: [s.index for s in task.pending] for name, task in tasks.items()} == {name: [0, 1, 2] for name in tasks}
    assert prompt(questions, tasks["search"].samples[0]) == "Question: Where was Ann born?\n"
    for name, words in (("direct", "nothing but the answer"), ("cot", "step by step")):
        text = prompt(questions, tasks[name].samples[0])
        assert words in text
        assert text.rstrip().endswith("Question: Where was Ann born?")
        assert "<search>" not in text
    close(tasks)


def test_rows_of_questions_alone_will_do_without_the_search_loop(config, tmp_path):
    (tmp_path / "nq.jsonl").write_text('{"question": "Who?", "golden_answers": ["Ann"]}\n')
    config.evaluation.methods = ["direct", "cot"]
    questions, tasks = tasks_of(config)
    assert prompt(questions, tasks["cot"].samples[0]).rstrip().endswith("Question: Who?")
    close(tasks)
    config.evaluation.methods = ["search"]
    with pytest.raises(UserError, match="prompt_template"):
        load_questions(config)


def test_chat_prompts_make_chat_prompts_for_the_baselines(config, tmp_path):
    row = {"prompt": [{"role": "user", "content": "Think. Question: Who?"}], "solutions": ["Ann"]}
    (tmp_path / "nq.jsonl").write_text(json.dumps(row) + "\n")
    config.evaluation.methods = ["direct", "search"]
    questions, tasks = tasks_of(config)
    assert questions.chat
    plain = prompt(questions, tasks["direct"].samples[0])
    # The demo's chat template writes "Question: " before a user's message.
    assert plain.startswith("Question: Answer the question below")
    assert "Question: Who?" in plain
    close(tasks)


def test_prompts_that_were_rendered_from_chat_messages_are_recognised(config, tmp_path):
    text = "<|im_start|>user\nThink. Question: Who?<|im_end|>\n<|im_start|>assistant\n"
    (tmp_path / "nq.jsonl").write_text(json.dumps({"prompt": text, "solutions": ["Ann"]}) + "\n")
    config.evaluation.methods = ["direct", "search"]
    questions, tasks = tasks_of(config)
    assert questions.chat
    assert questions.samples[0].question == "Who?"
    assert prompt(questions, tasks["search"].samples[0]) == text
    assert prompt(questions, tasks["direct"].samples[0]).rstrip().endswith("Question: Who?")
    close(tasks)


def test_passages_are_cut_like_a_tools_text_and_only_pending_questions_get_them(config, monkeypatch):
    config.agentloop.max_tool_response_length = 12
    questions, tasks = tasks_of(config)
    task = tasks["rag"]
    task.ledger.finished.add(1)
    asked = []

    def found(config, style, queries, progress):
        asked.extend(queries)
        progress(len(queries))
        return ["word " * 100 + "END" for _ in queries]

    monkeypatch.setattr(eval_tasks, "retrieve_passages", found)
    samples = add_passages(config, task, questions)
    assert asked == ["Where was Ann born?", "Where was Eve born?"]
    assert [sample.index for sample in samples] == [0, 2]
    text = prompt(questions, samples[0])
    assert "word" in text
    assert "END" not in text
    close(tasks)


def test_a_prompt_that_does_not_fit_is_reported(config):
    config.data.max_prompt_length = 20
    with pytest.raises(UserError, match=r"data\.max_prompt_length: 3 prompts of direct inference"):
        tasks_of(config)


def test_a_folder_is_gone_on_with_but_never_a_training_runs(config):
    _, tasks = tasks_of(config)
    folder = evaluation_path(config)
    assert not folder.exists()
    begin(config, folder, tasks.values())
    close(tasks)
    assert (folder / "search/evaluation.json").is_file()
    config.runner.seed += 1
    with pytest.raises(UserError, match="seed was 1234, is 1235"):
        tasks_of(config)
    config.runner.overwrite = True
    _, tasks = tasks_of(config)
    close(tasks)
    (folder / "metrics.jsonl").write_text("{}\n")
    config.runner.overwrite = False
    with pytest.raises(UserError, match="already holds a run"):
        evaluation_path(config)
    (folder / "checkpoints").mkdir()
    config.runner.overwrite = True
    with pytest.raises(UserError, match="holds a training run"):
        evaluation_path(config)
    assert (folder / "metrics.jsonl").exists()


def everything_in(folder):
    return {path: (path.is_file() and path.read_bytes(), path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def finished_evaluation(config, method):
    config.evaluation.methods = [method]
    _, tasks = tasks_of(config)
    folder = evaluation_path(config)
    begin(config, folder, tasks.values())
    close(tasks)
    row = {"number": 0, "replica": 0, "stop": "answer", "turns": []}
    eval_file(folder / method, 0).write_text(json.dumps(row) + '\n{"number": 1, "re')  # a kill in the middle of a line
    (folder / "results.json").write_text("{}")
    return folder


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_evaluation_that_is_rejected_changes_nothing(config, monkeypatch, overwrite):
    folder = finished_evaluation(config, "search")
    before = everything_in(folder)
    config.runner.overwrite = overwrite
    config.evaluation.methods = ["direct", "search"]
    config.tools.search.server_addr = "127.0.0.1:1"
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1"):
        evaluate.evaluate(config)
    monkeypatch.setattr(evaluate, "require_server", lambda config: None)

    def no_start(*_):
        raise UserError("the groups do not start")

    monkeypatch.setattr(evaluate, "evaluation_cluster", no_start)
    with pytest.raises(UserError, match="the groups do not start") as error:
        evaluate.evaluate(config)
    assert ("was changed" in str(error.value)) == overwrite
    config.runner.logger.logger_backends = ["no-such-backend"]
    with pytest.raises(UserError, match="no-such-backend"):
        evaluate.evaluate(config)
    assert everything_in(folder) == before


def test_other_settings_for_one_of_several_methods_change_no_other(config):
    folder = finished_evaluation(config, "search")
    before = everything_in(folder)
    config.evaluation.methods = ["direct", "search"]
    config.agentloop.max_turns += 1  # `direct`, which comes first, does not depend on it
    with pytest.raises(UserError, match=r"limits\.max_turns"):
        evaluate.evaluate(config)
    assert everything_in(folder) == before


def test_overwriting_begins_anew_once_the_groups_have_started(config):
    folder = finished_evaluation(config, "search")
    config.runner.overwrite = True
    config.evaluation.methods = ["direct"]
    _, tasks = tasks_of(config)
    begin(config, folder, tasks.values())
    close(tasks)
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "direct"]
    assert tasks["direct"].ledger.finished == set()


def test_a_judged_row_is_judged_whatever_reward_it_names(config, tmp_path):
    row = {"prompt": "Question: Who?", "solutions": ["Ann"], "reward_model": "f1_score"}
    (tmp_path / "nq.jsonl").write_text(json.dumps(row) + "\n")
    config.evaluation.methods = ["search"]
    assert load_questions(config).samples[0].reward_name == "f1_score"
    config.evaluation.judge = True
    assert load_questions(config).samples[0].reward_name is None


def test_a_server_that_is_down_is_reported_before_anything_starts(config):
    config.tools.search = replace(config.tools.search, server_addr="127.0.0.1:9", retries=0, timeout_s=5)
    with pytest.raises(UserError, match=r"tools\.search\.server_addr: .*127\.0\.0\.1:9.*searchr1 retrieval-server"):
        require_server(config)
    with pytest.raises(UserError, match=r"tools\.search\.server_addr"):
        retrieve_passages(config, "searchr1", ["q"] * 100, lambda count: None)


class FakeChannel:
    def __init__(self):
        self.queues = defaultdict(deque)

    def put(self, item, key):
        self.queues[key].append(item)

    def get(self, key):
        return self.queues[key].popleft()

    def qsize(self, key):
        return len(self.queues[key])


class FakeResult:
    """RLinf's result of a call: done once `parts` are put into a queue one by one."""

    def __init__(self, channel, parts, result):
        self.channel, self.parts, self.result = channel, deque(parts), result

    def done(self):
        if self.parts:
            self.channel.put(self.parts.popleft(), channels.FINISHED)
            return False
        return self.result is not None

    def wait(self):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


class FakeScoring(FakeResult):
    """Goes on until its end is asked for, or fails at once."""

    def done(self):
        return super().done() if self.channel.queues[channels.ROLLOUTS] else isinstance(self.result, Exception)


class FakeCluster:
    """A rollout group of two ranks that answers all or fails; the last chunk leaves the reward group late."""

    inference = None

    def __init__(self, chunks, late, result, scored=(1, 1), timeout_s=30.0):
        self.channel, self.timeout_s = FakeChannel(), timeout_s
        handle = SimpleNamespace(
            rollout=lambda *_: FakeResult(self.channel, chunks, result),
            score=lambda: FakeScoring(self.channel, late, list(scored) if isinstance(scored, tuple) else scored),
        )
        self.rollout = RolloutGroup(handle, "rollout", 2, self.channel, timeout_s)
        self.reward = RewardGroup(handle, "reward", 2, self.channel, timeout_s)


def rollout(index):
    ids = np.zeros(0)
    return Trajectory(Sample(f"s/{index}", index, [1], "", []), 0, ids, ids, ids, [], "answer")


def chunk(*indices):
    return Chunk(0, "eval", [rollout(index) for index in indices])


def collect(cluster, count):
    """What came, and how the collection ended."""
    seen = []
    settings = AgentSettings(GenerateParams(max_new_tokens=1), max_model_len=10)
    samples = [rollout(index).sample for index in range(count)]
    keywords = {"step": 0, "mode": "eval", "group_size": 1, "seed": 0, "settings": settings, "in_flight": 4}
    collection = Collection(cluster, samples, **keywords)
    try:
        for trajectories in collection:
            seen.extend(t.sample.index for t in trajectories)
    except UserError as error:
        return seen, error
    return seen, collection.stats()


REPORT = RolloutReport(trajectories=2, generated_tokens=10, seconds=2.0, engine_busy_seconds=1.0, search_retries=3)


def test_everything_comes_also_what_is_scored_last():
    cluster = FakeCluster([chunk(0, 2), chunk(1)], [chunk(4), chunk(3)], [REPORT, REPORT])
    seen, stats = collect(cluster, 5)
    assert seen == [0, 2, 1, 4, 3]
    assert (stats.generated_tokens, stats.engine_busy_share, stats.search_retries) == (20, 0.5, 6)
    assert [sample.index for sample in cluster.channel.queues[channels.prompts_key(1)][0]] == [1, 3]
    assert list(cluster.channel.queues[channels.ROLLOUTS]) == [None, None]


def test_a_batch_is_sorted_whatever_finished_first():
    cluster = FakeCluster([chunk(2), chunk(1)], [chunk(0)], [REPORT, REPORT])
    samples = [rollout(index).sample for index in range(3)]
    batch = collect_batch(cluster, samples, step=1, mode="train", group_size=1, seed=0)
    assert [t.sample.index for t in batch.trajectories] == [0, 1, 2]
    assert batch.stats.generated_tokens == 20


def test_what_was_finished_before_a_failure_comes_first():
    seen, error = collect(FakeCluster([chunk(0)], [chunk(1)], UserError("the server died")), 5)
    assert seen == [0, 1]
    assert str(error) == "the server died"


def test_a_reward_that_fails_is_reported_while_questions_are_still_answered():
    seen, error = collect(FakeCluster([chunk(0)], [], None, UserError("the judge gives no verdict")), 5)
    assert seen == [0]
    assert str(error) == "the judge gives no verdict"


def test_answers_that_are_missing_are_noticed():
    with pytest.raises(RuntimeError, match="1 rollouts came back, 3 were asked for"):
        collect(FakeCluster([chunk(0)], [], [REPORT, REPORT]), 3)


def test_an_engine_that_stands_still_is_reported():
    _, error = collect(FakeCluster([], [], None, timeout_s=0.05), 3)
    assert "no question was finished for" in str(error)
    assert "runner.step_timeout_s" in str(error)


def test_without_a_window_the_whole_has_a_limit():
    cluster = FakeCluster([], [], None, timeout_s=0.05)
    with pytest.raises(WorkerError, match=r"rollout\.rollout did not finish within 0 s \(runner\.step_timeout_s\)"):
        collect_batch(cluster, [rollout(0).sample], step=1, mode="train", group_size=1, seed=0)
