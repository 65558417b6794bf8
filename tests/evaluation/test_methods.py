"""How each method's rollouts go, what identifies an evaluation, and mistakes in its section of the YAML."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from searchr1.agent.settings import AgentSettings
from searchr1.agent.trajectory import Sample
from searchr1.config.choices import choices_of
from searchr1.config.load import load_config
from searchr1.config.schema import Config, SamplingParams
from searchr1.evaluation.manifest import billions, differences, fingerprint, manifest
from searchr1.evaluation.methods import METHODS, agent_settings, main_method, sampling_note
from searchr1.evaluation.tasks import judged, with_judge
from searchr1.preflight.check_reward import check_evaluation

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = EXAMPLES / "demo/cold_start"


def config(**sections):
    made = Config()
    made.algorithm.group_size = 1
    made.runner.seq_length = 100
    for key, value in sections.items():
        section, _, name = key.partition("__")
        setattr(getattr(made, section), name, value)
    return made


def test_the_checked_names_are_the_methods():
    assert set(choices_of("evaluation.methods")) == set(METHODS)
    assert main_method(["direct", "search"]) == "search"
    assert main_method(["rag", "direct"]) == "rag"


def test_the_search_loop_goes_as_in_a_training_runs_evaluation():
    made = config(agentloop__max_turns=4, agentloop__max_new_tokens_per_turn=20)
    assert agent_settings(made, METHODS["search"]) == AgentSettings.from_config(made, "eval")


@pytest.mark.parametrize("name", ["direct", "cot", "rag"])
def test_the_other_methods_are_one_generation_that_an_answer_ends(name):
    settings = agent_settings(config(agentloop__max_turns=4, agentloop__max_new_tokens_per_turn=20), METHODS[name])
    assert (settings.max_turns, settings.force_final_turn, settings.max_new_tokens_per_turn) == (0, True, None)
    assert settings.sampling.stop == ("</answer>",)
    assert settings.sampling.temperature == 0


def test_several_rollouts_are_sampled_and_one_is_greedy_unless_configured():
    search = METHODS["search"]
    assert sampling_note(agent_settings(config(), search), 1) == "greedy"
    several = config(algorithm__group_size=4, algorithm__sampling_params=SamplingParams(temperature=0.7, top_p=0.9))
    assert sampling_note(agent_settings(several, search), 4) == "4 rollouts, sampled at temperature 0.7, top_p 0.9"
    several.algorithm.sampling_params.do_sample = False
    assert "all of them are the same" in sampling_note(agent_settings(several, search), 4)
    several.algorithm.eval_sampling_params = SamplingParams(temperature=0.3)
    assert agent_settings(several, search).sampling.temperature == 0.3
    chosen = config(algorithm__eval_sampling_params=SamplingParams(temperature=0.5))
    assert sampling_note(agent_settings(chosen, search), 1) == "1 rollout, sampled at temperature 0.5"


def test_a_model_is_known_by_its_content_wherever_it_lies(tmp_path, monkeypatch):
    copy = tmp_path / "elsewhere"
    shutil.copytree(MODEL, copy)
    assert fingerprint(str(copy)) == fingerprint(str(MODEL))
    (copy / "notes.md").write_text("mine")
    assert fingerprint(str(copy)) == fingerprint(str(MODEL))
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    for place in range(len(data) // 2, len(data), 5000):
        data[place] ^= 1
    weights.write_bytes(data)
    assert fingerprint(str(copy)) != fingerprint(str(MODEL))
    # The same for files too large to be read whole.
    monkeypatch.setattr("searchr1.evaluation.manifest._WHOLE_BYTES", 1 << 16)
    assert fingerprint(str(copy)) != fingerprint(str(MODEL))
    assert fingerprint("org/model-on-the-hub") == "org/model-on-the-hub"


def test_sizes_come_from_weights_or_from_the_name(tmp_path):
    from safetensors import safe_open

    with safe_open(MODEL / "model.safetensors", "pt") as file:
        expected = sum(file.get_tensor(name).numel() for name in file.keys()) / 1e9  # noqa: SIM118
    assert billions(str(MODEL)) == expected
    assert billions("Qwen/Qwen2.5-3B-Instruct") == 3
    assert billions("org/Qwen3-0.6B") == 0.6
    assert billions("org/model") is None
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 20)
    assert billions(str(tmp_path)) is None


def test_what_changes_answers_changes_the_manifest_and_nothing_else_does():
    samples = [Sample(f"nq/{i}", i, [1, i], "Who?", ["Ann"], "nq") for i in range(3)]

    def of(made, method="search", given=samples):
        return manifest(made, METHODS[method], agent_settings(made, METHODS[method]), given)

    base = of(config())
    assert json.loads(json.dumps(base)) == base
    # Evaluations from before a setting existed go on; one with another value is another evaluation.
    settings = {"toolcall_parser": "searchr1", "no_call_ends": True, "end_token_ends": False, "tool_text_tokens": "whole"}
    assert not {*settings, "no_results_message"} & {*base["tools"], *base["passages"]}
    for name, value in (settings | {"no_results_message": ""}).items():
        section = "passages" if name == "no_results_message" else "tools"
        other = of(config(**{f"agentloop__{name}": value}))
        assert list(differences(other, base)) == [f"{section}.{name} was None, is {value!r}"]
    same = config(
        tools__search=replace(Config().tools.search, server_addr="elsewhere:1", timeout_s=5.0),
        rollout__max_running_requests=4,
        runner__output_dir="elsewhere",
        reward__concurrency=2,
    )
    assert of(same) == base
    changed = [
        config(agentloop__max_turns=3),
        config(runner__seed=1),
        config(runner__seq_length=99),
        config(algorithm__group_size=2),
        config(tools__search=replace(Config().tools.search, topk=5)),
        config(reward__reward_type="f1_score"),
    ]
    for made in changed:
        assert list(differences(of(made), base))
    other = [replace(samples[0], golden_answers=["Bob"]), *samples[1:]]
    assert list(differences(of(config(), given=other), base)) == [
        f"questions was {base['questions']!r}, is {of(config(), given=other)['questions']!r}"
    ]
    longer = [replace(sample, prompt_ids=[9, 9, 9]) for sample in samples]
    assert of(config(), given=longer) != base
    # The passages of RAG are fetched anew, and need not be the same.
    assert of(config(), "rag", longer) == of(config(), "rag")
    assert of(config(data__apply_chat_template=not Config().data.apply_chat_template), "rag") != of(config(), "rag")
    assert "passages" not in of(config(), "direct")


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"evaluation__methods": []}, "evaluation.methods", "is empty"),
        ({"evaluation__methods": ["serach"]}, "evaluation.methods", "'serach' is not one of direct, cot, rag, search"),
        ({"evaluation__methods": ["cot", "cot"]}, "evaluation.methods", "cot stands there twice"),
        ({"evaluation__methods": ["direct"], "agentloop__generate_fn": "a:b"}, "agentloop.generate_fn", "search] alone"),
        ({"evaluation__judge": True}, "reward.judge.base_url", "is empty"),
        ({"runner__resume_dir": "/some/where"}, "runner.resume_dir", "goes on by itself"),
    ],
)
def test_mistakes_are_named(changes, key, message):
    (problem,) = check_evaluation(config(**changes))
    assert problem.key == key
    assert message in problem.message


def test_rag_needs_a_server():
    made = config(evaluation__methods=["rag"])
    assert not list(check_evaluation(made))
    made.tools.search.dummy_mode = True
    assert [problem.key for problem in check_evaluation(made)] == ["tools.search.dummy_mode"]


def test_the_judge_is_asked_beside_the_configured_reward():
    plain = config()
    assert not judged(plain)
    assert with_judge(plain) is plain
    assert with_judge(config(evaluation__judge=True)).reward.weights == {"judge": 0.0, "searchr1": 1.0}
    assert with_judge(config(reward__reward_type="judge")).reward.weights == {"judge": 1.0}
    weights = {"f1_score": 0.5, "judge": 0.5}
    assert with_judge(config(evaluation__judge=True, reward__weights=weights)).reward.weights == weights


@pytest.mark.parametrize("name", ["qwen2.5-3b-tool-1node-eval", "tiny-cpu-eval"])
def test_shipped_recipes_lack_nothing_but_their_paths(name):
    from searchr1.preflight.check import check_config

    made = load_config(EXAMPLES / f"searchr1/config/{name}.yaml", ["cluster.device=cpu", "cluster.slots=8"])
    found = {problem.key for problem in check_config(made, for_training=False)}
    assert found <= {"rollout.model.model_path", "data.val_data_paths"}


def test_rlinfs_evaluation_recipe_runs_with_only_its_paths_edited(tmp_path, capsys):
    from searchr1.commands.check_config import main

    (tmp_path / "eval.jsonl").write_text("{}\n")
    fixture = Path(__file__).parents[1] / "config/fixtures/rlinf-eval.yaml"
    model = shutil.copytree(MODEL, tmp_path / "model")
    shape = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 8192}))  # RLinf's sequences: 7,096
    words = [f"rollout.model.model_path={model}", f"data.val_data_paths=[{tmp_path}/eval.jsonl]", "cluster.device=cpu"]
    assert main(["--eval", str(fixture), *words]) == 0
    printed = capsys.readouterr().out
    assert "evaluation  search; greedy" in printed
    assert "4 tool turns and a final one" in printed  # RLinf counts generations: 5
    assert main(["--eval", str(fixture), *words, "algorithm.group_size=4", "evaluation.methods=[rag,cot]"]) == 0
    assert "evaluation  rag, cot; 4 greedy rollouts: all of them are the same" in capsys.readouterr().out
