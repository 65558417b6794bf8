"""searchr1.json: what it holds, what is refused in it, and who goes by it where."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1.agent.settings import AgentSettings
from searchr1.agent.trajectory import Sample, Trajectory
from searchr1.commands.convert import carry_settings
from searchr1.config.load import given_keys, load_config, save_config
from searchr1.config.schema import AgentLoopConfig, Config, SamplingParams
from searchr1.data.model_settings import FILE, ModelSettings, template_text
from searchr1.data.templates import SEARCHR1
from searchr1.errors import UserError
from searchr1.evaluation.manifest import fingerprint
from searchr1.evaluation.tasks import follow_model
from searchr1.training.run_folder import RunFolder
from searchr1.training.sft_data import rows_settings

ROOT = Path(__file__).parents[2]
COLD_START = ROOT / "examples/demo/cold_start"
DEMO = ROOT / "examples/searchr1/config/tiny-cpu.yaml"
OWN = "Find it with <search>.\n{question}\nGo!"


@pytest.fixture
def config(tmp_path):
    """A run in which nothing has its default."""
    made = Config()
    made.agentloop = AgentLoopConfig(
        max_turns=7, force_final_turn=False, max_new_tokens_per_turn=33, max_tool_response_length=44,
        tool_response_truncate_side="left", information_style="rlinf", invalid_action_message="no.",
        generate_fn="my_package.loop:run",
    )  # fmt: skip
    made.algorithm.sampling_params = SamplingParams(True, 0.5, 9, 0.8, 1.1, 300, 2, ["END", "\u202eend\n"])
    made.algorithm.eval_sampling_params = SamplingParams(True, 0.25, 8, 0.7, 1.2, 200, 0, ["STOP"])
    made.runner.seq_length, made.data.max_prompt_length = 999, 77
    made.tools.search.topk, made.tools.access.enabled = 6, True
    made.data.apply_chat_template = True
    (tmp_path / "mine.txt").write_text(OWN)
    made.data.prompt_template = str(tmp_path / "mine.txt")
    made.tools.search.server_addr = "secret-host:8000"
    return made


def written(settings, folder):
    folder.mkdir(exist_ok=True)
    settings.write(folder)
    return ModelSettings.read(folder / FILE)


def test_everything_that_makes_prompts_and_limits_comes_back(config, tmp_path):
    found = written(ModelSettings.of(config), tmp_path / "model")
    (tmp_path / "mine.txt").unlink()
    other = Config()
    found.apply(other)
    ours, theirs = AgentSettings.from_config(other, "eval"), AgentSettings.from_config(config, "eval")
    assert dataclasses.replace(ours, tool_timeout_s=0) == dataclasses.replace(theirs, tool_timeout_s=0)
    assert AgentSettings.from_config(other, "train").sampling == AgentSettings.from_config(config, "train").sampling
    assert template_text(other.data.prompt_template) == OWN
    assert (other.data.apply_chat_template, other.data.max_prompt_length, other.tools.search.topk) == (True, 77, 6)
    assert other.tools.access.enabled
    # Nothing of the machine, no address, and no code that would be run.
    text = (tmp_path / "model" / FILE).read_text()
    assert str(tmp_path) not in text
    assert "secret-host" not in text
    assert other.agentloop.generate_fn is None
    assert list(found.differences(other)) == [
        "agentloop.generate_fn is null; the model's is 'my_package.loop:run' (not run unless it is given)"
    ]


def test_every_key_of_the_agent_loop_is_carried_but_a_name_and_code():
    carried = {key.removeprefix("agentloop.") for key in ModelSettings.of(Config()).values if key.startswith("agentloop.")}
    assert carried == {field.name for field in dataclasses.fields(AgentLoopConfig)} - {"generate_fn"}


def test_a_key_that_is_newer_than_the_file_has_its_default(config, tmp_path):
    folder = tmp_path / "model"
    written(ModelSettings.of(config), folder)
    tree = json.loads((folder / FILE).read_text())
    del tree["agentloop"]["information_style"], tree["algorithm"]["eval_sampling_params"]["top_p"], tree["tools"]
    (folder / FILE).write_text(json.dumps(tree))
    other = Config()
    other.agentloop.information_style, other.tools.search.topk = "rlinf", 5
    ModelSettings.read(folder / FILE).apply(other)
    assert (other.agentloop.information_style, other.algorithm.eval_sampling_params.top_p) == ("searchr1", 1.0)
    assert other.tools.search.topk == 5, "a section that is not there says nothing"


def changed(path, value):
    def change(tree):
        *sections, name = path.split(".")
        for section in sections:
            tree = tree.setdefault(section, {})
        tree[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("format", 2), "format that this version does not know"),
        (changed("format", True), 'no "format"'),
        (changed("agentloop.max_turn", 3), "agentloop.max_turn: unknown key"),
        (changed("agentloop.generate_fn", "os.system"), "agentloop.generate_fn: unknown key"),
        (changed("rollout.model.model_path", "/x"), "rollout.model.model_path: unknown key"),
        (changed("tools.search.server_addr", "evil:80"), "tools.search.server_addr: unknown key"),
        (changed("\x1b[2J", 1), r"\\x1b\[2J: unknown key"),
        (changed("agentloop", 5), "agentloop: unknown key|agentloop: expects a section"),
        (changed("agentloop.max_turns", "4"), "agentloop.max_turns: expects a whole number"),
        (changed("agentloop.max_turns", -1), "agentloop.max_turns: -1 is too small"),
        (changed("agentloop.information_style", "x"), "agentloop.information_style: 'x' is not one of"),
        (changed("runner.seq_length", 0), "runner.seq_length: 0 is too small"),
        (changed("algorithm.sampling_params.stop", "END"), "sampling_params.stop: expects a list"),
        (changed("algorithm.sampling_params.temperature", -1.0), "temperature: -1.0 must be a number"),
        (changed("algorithm.sampling_params.temperature", float("nan")), "NaN is no JSON"),
        (changed("algorithm.sampling_params.top_p", 1e999), "Infinity is no JSON"),
        (changed("data.prompt_template", "../../etc/passwd.txt"), "is not a template's name"),
        (changed("data.prompt_template", "demo"), "template_text: does not belong"),
        (changed("template_text", "no place"), "template_text: has no {question}"),
        (changed("template_text", 7), "template_text: must be text"),
        (changed("template_text", "{question}" + "x" * (1 << 20)), "more than"),
    ],
)
def test_a_file_that_cannot_be_used_is_rejected_by_key(config, tmp_path, change, message):
    folder = tmp_path / "model"
    written(ModelSettings.of(config), folder)
    tree = json.loads((folder / FILE).read_text())
    change(tree)
    (folder / FILE).write_text(json.dumps(tree))
    with pytest.raises(UserError, match=message) as caught:
        ModelSettings.of_model(str(folder))
    assert str(folder / FILE) in str(caught.value)
    assert "\x1b" not in str(caught.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.dictionaries(st.text(), x) | st.lists(x)
    )
)
def test_any_json_is_read_or_rejected_in_words(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("any")
    if isinstance(tree, dict):
        tree = {"format": 1, "data": tree, "agentloop": tree}
    (folder / FILE).write_text(json.dumps(tree))
    with contextlib.suppress(UserError):  # anything else fails the test
        ModelSettings.of_model(str(folder)).apply(Config())


def test_what_is_given_stays_and_every_difference_has_a_line(tmp_path):
    model = written(ModelSettings.of(load_config(DEMO)), tmp_path)
    config = load_config(DEMO, ["agentloop.max_turns=2", "algorithm.sampling_params.stop=[END]", "data.prompt_template=cot",
                                "algorithm.eval_sampling_params.temperature=0.5"])  # fmt: skip
    before = dataclasses.asdict(config)
    model.apply(config, given_keys(config))
    after = dataclasses.asdict(config)
    for found in (before, after):
        found["vars"].clear()
        # Left out by the YAML: the demo's own values are the schema's there.
        assert found["agentloop"]["max_turns"] == 2
    assert before == after
    lines = list(model.differences(config))
    assert [line.split(" is ")[0] for line in lines] == [
        "algorithm.eval_sampling_params", "data.prompt_template", "agentloop.max_turns", "algorithm.sampling_params.stop",
    ]  # fmt: skip
    assert lines[2] == "agentloop.max_turns is 2; the model's is 4"
    assert not list(model.differences(load_config(DEMO)))


def test_an_evaluation_takes_what_its_yaml_leaves_out_and_warns_where_it_differs(tmp_path, capsys):
    rows = tmp_path / "nq.jsonl"
    rows.write_text('{"question": "Who?", "prompt": "Question: Who?\\n", "solutions": ["Ann"]}\n')
    written(ModelSettings.of(load_config(DEMO)), tmp_path / "model")
    (tmp_path / "eval.yaml").write_text(
        f"rollout: {{model: {{model_path: {tmp_path / 'model'}}}}}\nagentloop: {{max_turns: 3}}\n"
        f"data: {{val_data_paths: [{rows}]}}\n"
    )
    config = load_config(tmp_path / "eval.yaml", ["tools.search.topk=9"])
    follow_model(config, given_keys(config))
    assert (config.agentloop.max_turns, config.tools.search.topk) == (3, 9)
    assert (config.data.prompt_template, config.runner.seq_length, config.agentloop.max_new_tokens_per_turn) == (
        "demo",
        640,
        48,
    )
    assert config.algorithm.sampling_params.stop == ["</search>", "</answer>"]
    out, err = capsys.readouterr()
    assert f"{tmp_path / 'model' / FILE}: template demo, 4 tool turns, 640 tokens, top 2, 2 stop strings" in out
    assert [line.split(" (")[0] for line in err.splitlines()] == [
        "warning: agentloop.max_turns is 3; the model's is 4", "warning: tools.search.topk is 9; the model's is 2",
    ]  # fmt: skip
    # A row that is nothing but a prompt is not put into another instruction.
    rows.write_text('{"prompt": "Think. Question: Who?", "solutions": ["Ann"]}\n')
    config = load_config(tmp_path / "eval.yaml")
    follow_model(config, given_keys(config))
    assert config.data.prompt_template is None
    assert "the rows have prompts of their own" in capsys.readouterr().out


def test_the_file_is_no_part_of_a_models_fingerprint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(str(tmp_path))
    ModelSettings.of(Config()).write(tmp_path)
    assert fingerprint(str(tmp_path)) == before


class Group:
    """Saves nothing."""

    def __init__(self):
        self.folders = []

    def save(self, folder, in_background):
        (folder / "hf").mkdir(parents=True)
        return self

    def wait(self, _):
        return []


def test_a_checkpoint_knows_its_settings_wherever_it_is_copied_to(tmp_path):
    config = load_config(DEMO)
    config.runner.output_dir, config.runner.experiment_name = str(tmp_path), "run"
    folder = RunFolder.open(config, loader=None)
    folder.begin()
    groups = type("Groups", (), {"actor": Group(), "critic": None})
    folder.save(groups, type("Loader", (), {"state_dict": lambda self: {}})(), 3)
    folder.finish_save()
    actor = tmp_path / "elsewhere"
    (tmp_path / "run/checkpoints/global_step_3/actor").rename(actor)
    out = tmp_path / "model"
    out.mkdir()
    assert "template demo, 4 tool turns" in carry_settings(actor, out)
    assert ModelSettings.of_model(str(out)).values == ModelSettings.of(config).values


def test_a_checkpoint_without_settings_takes_its_runs(tmp_path):
    actor, out = tmp_path / "run/checkpoints/global_step_3/actor", tmp_path / "model"
    actor.mkdir(parents=True)
    out.mkdir()
    assert "not written; the checkpoint has none" in carry_settings(actor, out)
    assert not list(out.iterdir())
    (tmp_path / "run/config.yaml").write_text("nonsense: 1\n")
    assert "not written; ask the model with --config" in carry_settings(actor, out)
    save_config(load_config(DEMO), tmp_path / "run/config.yaml")
    assert f"template demo, 4 tool turns, 640 tokens, top 2, 2 stop strings (from {tmp_path}" in carry_settings(actor, out)
    assert ModelSettings.of_model(str(out)).values == ModelSettings.of(load_config(DEMO)).values


@pytest.mark.parametrize(
    "stranger",
    [
        "agentloop:\n  generate_fn: ${oc.env:SEARCHR1_SECRET}\n",
        "algorithm:\n  sampling_params:\n    stop: ['${oc.env:SEARCHR1_SECRET}']\n",
        "defaults: [other]\n",
    ],
)
def test_a_strangers_run_cannot_carry_what_only_this_user_knows(tmp_path, monkeypatch, stranger):
    monkeypatch.setenv("SEARCHR1_SECRET", "token-of-this-user")
    actor, out = tmp_path / "run/checkpoints/global_step_3/actor", tmp_path / "model"
    actor.mkdir(parents=True)
    out.mkdir()
    (tmp_path / "run/config.yaml").write_text(stranger)
    (tmp_path / "run/other.yaml").write_text("agentloop:\n  generate_fn: ${oc.env:SEARCHR1_SECRET}\n")
    printed = carry_settings(actor, out)
    assert "config.yaml: refers to other files or to the environment" in printed
    assert "token-of-this-user" not in printed
    assert not list(out.iterdir())


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(COLD_START)
    found.chat_template = "<|im_start|>user\n{{ messages[0]['content'] }}<|im_end|>\n<|im_start|>assistant{{ '\\n' }}"
    return found


def rows_of(tokenizer, *prompts):
    found = []
    for prompt in prompts:
        ids, said = tokenizer.encode(prompt, add_special_tokens=False), tokenizer.encode("<answer> x </answer>")
        mask = np.array([False] * (len(ids) - 1) + [True] * len(said))
        sample = Sample("s/0", 0, ids[:1], "", [])
        found.append(Trajectory(sample, 0, np.array(ids[1:] + said), mask, np.zeros(len(mask)), [], "eos"))
    return found


def test_fine_tuning_says_which_template_its_rows_show(tokenizer):
    chat = "<|im_start|>user\n" + SEARCHR1.replace("{question}", "Who?") + "<|im_end|>\n<|im_start|>assistant\n"
    for prompts, expected in (
        (["Question: Who?\n", "Question: When?\n"], {"data.prompt_template": "demo", "data.apply_chat_template": False}),
        ([chat], {"data.prompt_template": "searchr1", "data.apply_chat_template": True}),
        (["Question: Who?\n", chat], {}),
        (["Tell me who."], {}),
    ):
        assert rows_settings(rows_of(tokenizer, *prompts), tokenizer, None).values == expected
    # What training does not touch stays; a template that it does not show is no longer known.
    before = ModelSettings.of(load_config(DEMO))
    assert rows_settings(rows_of(tokenizer, "Question: Who?\n"), tokenizer, before).values == before.values
    after = rows_settings(rows_of(tokenizer, "Tell me who."), tokenizer, before).values
    assert set(before.values) - set(after) == {"data.prompt_template", "data.apply_chat_template"}
    own = ModelSettings({"data.prompt_template": "mine.txt"}, OWN)
    found = rows_settings(rows_of(tokenizer, OWN.replace("{question}", "Who?")), tokenizer, own)
    assert (found.values["data.prompt_template"], found.text) == ("mine.txt", OWN)
