"""A model folder alone asks as its run did: the same prompt, settings and stop strings, without --config."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from support.chat_flags import planned
from support.scripted_chat import ANSWER, SEARCH, ScriptedSearch

from searchr1.agent.loop import run_trajectory
from searchr1.agent.settings import AgentSettings, Generation
from searchr1.chat.async_chat import AsyncChat
from searchr1.chat.infer import collect
from searchr1.chat.load import build_tools, load_tokenizer, prompt_settings
from searchr1.commands.convert import carry_settings
from searchr1.config.load import load_config, save_config
from searchr1.data.dataset import load_data
from searchr1.data.model_settings import FILE, ModelSettings
from searchr1.errors import UserError

ROOT = Path(__file__).parents[2]
COLD_START, DEMO = ROOT / "examples/demo/cold_start", ROOT / "examples/searchr1/config/tiny-cpu.yaml"
QUESTION = "Who is the mayor of Quosta?"


@pytest.fixture
def run(tmp_path):
    """The demo's run and question, and its checkpoint's model folder."""
    (tmp_path / "test.jsonl").write_text(f'{{"question": "{QUESTION}", "solutions": ["Ann"]}}\n')
    config = load_config(DEMO, [f"data.val_data_paths=[{tmp_path / 'test.jsonl'}]"])
    config.rollout.model.model_path = str(COLD_START)
    actor = tmp_path / "run/checkpoints/global_step_2/actor"
    actor.mkdir(parents=True)
    save_config(config, tmp_path / "run/config.yaml")
    shutil.copytree(COLD_START, tmp_path / "model")
    carry_settings(actor, tmp_path / "model")
    return config, tmp_path / "model"


class Engine:
    """Says prepared lines, and keeps what it was asked."""

    def __init__(self, tokenizer, *lines):
        self.tokenizer, self.lines, self.asked = tokenizer, list(lines), []

    async def generate(self, prompt_ids, params, timeout_s=None, on_text=None):
        self.asked.append((list(prompt_ids), params))
        line = self.lines[len(self.asked) - 1]
        ids = self.tokenizer.encode(line, add_special_tokens=False)
        return Generation(ids, [-1.0] * len(ids), line, "stop", weight_version=0)


def asked_of(engine):
    return [(ids, params.stop, params.temperature, params.max_new_tokens) for ids, params in engine.asked]


def chat_of(chosen, tokenizer, engine):
    return AsyncChat(
        engine=engine, tokenizer=tokenizer, tools=build_tools(chosen.config, ScriptedSearch()), backend=None,
        settings=AgentSettings.from_config(chosen.config, "eval"), prompt=prompt_settings(chosen, tokenizer),
        run=run_trajectory, seed=0, about={},
    )  # fmt: skip


def test_the_same_tokens_go_to_the_engine_as_in_the_runs_evaluation(run, capsys):
    config, model = run
    tokenizer = load_tokenizer(str(model))
    theirs = Engine(tokenizer, SEARCH, ANSWER)
    (sample,) = load_data(config, training=False).val
    asyncio.run(
        run_trajectory(
            sample=sample, rollout_id=0, engine=theirs, tools=build_tools(config, ScriptedSearch()), tokenizer=tokenizer,
            settings=AgentSettings.from_config(config, "eval"), seed=0,
        )
    )  # fmt: skip
    ours = Engine(tokenizer, SEARCH, ANSWER)
    chosen = planned("--model_path", str(model))
    asyncio.run(collect(chat_of(chosen, tokenizer, ours), QUESTION))
    assert len(ours.asked) == 2
    assert asked_of(ours) == asked_of(theirs)
    assert tokenizer.decode(ours.asked[0][0]) == f"Question: {QUESTION}\n"
    err = capsys.readouterr().err
    assert err == f"{model / FILE}: template demo, 4 tool turns, 640 tokens, top 2, 2 stop strings\n"


def test_flags_overrides_and_another_config_count_and_are_warned_of(run, tmp_path, capsys):
    config, model = run
    chosen = planned("--model_path", str(model), "--max_turns", "1", "--prompt_template", "cot", "tools.search.topk=5")
    assert (chosen.config.agentloop.max_turns, chosen.config.data.prompt_template) == (1, "cot")
    assert (chosen.config.tools.search.topk, chosen.config.runner.seq_length) == (5, 640)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line.split()[1] for line in warnings] == ["data.prompt_template", "agentloop.max_turns", "tools.search.topk"]
    config.agentloop.max_turns, config.runner.seq_length = 3, 500
    save_config(config, tmp_path / "other.yaml")
    chosen = planned("--model_path", str(model), "--config", str(tmp_path / "other.yaml"))
    assert (chosen.config.agentloop.max_turns, chosen.config.runner.seq_length) == (3, 500)
    assert capsys.readouterr().err == (
        f"warning: agentloop.max_turns is 3; the model's is 4 ({model / FILE})\n"
        f"warning: runner.seq_length is 500; the model's is 640 ({model / FILE})\n"
    )


def test_a_template_of_the_users_own_comes_with_the_model(run, tmp_path):
    config, model = run
    (tmp_path / "mine.txt").write_text("Say who.\n{question}\n")
    config.data.prompt_template = str(tmp_path / "mine.txt")
    ModelSettings.of(config).write(model)
    (tmp_path / "mine.txt").unlink()
    tokenizer = load_tokenizer(str(model))
    engine = Engine(tokenizer, ANSWER)
    asyncio.run(collect(chat_of(planned("--model_path", str(model)), tokenizer, engine), QUESTION))
    assert tokenizer.decode(engine.asked[0][0]) == f"Say who.\n{QUESTION}\n"


def test_a_model_of_whole_prompts_takes_the_known_template_and_reports_it(run, capsys):
    config, model = run
    config.data.prompt_template = None
    ModelSettings.of(config).write(model)
    chosen = planned("--model_path", str(model))
    assert (chosen.config.data.prompt_template, chosen.auto_chat) == ("searchr1", True)
    assert f"{model / FILE}: names no data.prompt_template" in capsys.readouterr().err


def test_a_file_that_cannot_be_used_ends_the_command(run):
    _, model = run
    (model / FILE).write_text('{"format": 1, "agentloop": {"max_turn": 3}}')
    with pytest.raises(UserError, match=r"searchr1\.json: cannot be used.*\n.*agentloop\.max_turn: unknown key"):
        planned("--model_path", str(model))


def test_a_hub_model_in_the_cache_has_its_settings_too(run, monkeypatch):
    _, model = run
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: str(model / file))
    assert planned("--model_path", "org/name").config.data.prompt_template == "demo"
