"""Loading and checking YAMLs: every problem told with its key, RLinf's trees accepted, the shipped ones right."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1.cli import main
from searchr1.commands.check_config import main as check_main
from searchr1.config.layout import shares_gpus
from searchr1.config.load import ConfigError, known_keys, load_config, save_config
from searchr1.config.schema import Config
from searchr1.device import Device
from searchr1.errors import UserError
from searchr1.preflight.check import check_config, warnings

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples/searchr1/config"
FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "model").mkdir()
    model = {"model_type": "qwen2", "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2}
    (tmp_path / "model/config.json").write_text(
        json.dumps(model | {"hidden_size": 2048, "intermediate_size": 11008, "vocab_size": 151936})
    )
    (tmp_path / "train.jsonl").write_text("{}\n")
    return [
        f"rollout.model.model_path={tmp_path}/model",
        f"data.train_data_paths=[{tmp_path}/train.jsonl]",
        f"data.val_data_paths=[{tmp_path}/train.jsonl]",
        "cluster.device=cpu",
    ]


def problems(path, *overrides, training=True):
    try:
        return {problem.key: problem.message for problem in check_config(load_config(path, overrides), training)}
    except ConfigError as error:
        return {problem.key: problem.message for problem in error.problems}


def check(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(["check-config", *map(str, arguments)])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.mark.parametrize("name", ["rlinf-train", "rlinf-train-dynamic"])
def test_rlinf_trees_pass_with_only_paths_edited(name, files):
    result = check(FIXTURES / f"{name}.yaml", *files)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ignored   actor.megatron.ckpt_format: " in result.stdout
    config = load_config(FIXTURES / f"{name}.yaml", files)
    assert config.actor.optim.lr == 1e-6
    assert config.algorithm.sampling_params.max_new_tokens == 3000


@pytest.mark.parametrize("name", ["qwen2.5-3b-tool-1node", "qwen2.5-3b-tool-1node-eval", "tiny-cpu", "tiny-cpu-eval"])
def test_shipped_yamls_need_only_their_paths(name, files):
    assert problems(CONFIGS / f"{name}.yaml", *files, training="eval" not in name) == {}


def test_the_unedited_recipe_names_the_three_paths():
    found = problems(CONFIGS / "qwen2.5-3b-tool-1node.yaml", "cluster.device=cpu")
    assert set(found) == {"rollout.model.model_path", "data.train_data_paths", "data.val_data_paths"}


def test_all_problems_are_reported_at_once_and_the_command_exits_with_2(files):
    result = check(
        CONFIGS / "tiny-cpu.yaml", *files, "algorithm.group_siz=3", "runner.max_steps=many", "rollout.detokenize=1",
        "nonsense.key=1",
    )  # fmt: skip
    assert result.returncode == 2
    assert "algorithm.group_siz: unknown key; did you mean algorithm.group_size?" in result.stderr
    assert "runner.max_steps: expects a whole number, found 'many'" in result.stderr
    assert "rollout.detokenize: expects true or false" in result.stderr
    assert "nonsense" in result.stderr
    assert "4 problems" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("algorithm.n_minibatches=3", "algorithm.n_minibatches"),
        ("runner.max_tokens_per_mbs=100", "runner.max_tokens_per_mbs"),
        ("data.max_prompt_length=640", "data.max_prompt_length"),
        ("rollout.detokenize=False", "rollout.detokenize"),
        ("rollout.tensor_parallel_size=3", "rollout.tensor_parallel_size x rollout.pipeline_parallel_size"),
        ("cluster.component_placement={actor:0-7,rollout:all,reward:all}", "cluster.component_placement.actor"),
        ("rollout.model.model_path=/nowhere/model", "rollout.model.model_path"),
        ("data.train_data_paths=[/nowhere.jsonl]", "data.train_data_paths"),
        ("data.train_data_paths=[]", "data.train_data_paths"),
        ("algorithm.loss_agg_func=mean", "algorithm.loss_agg_func"),
        ("reward.reward_type=no_such.module:f", "reward.reward_type"),
        ("agentloop.generate_fn=json:nothing", "agentloop.generate_fn"),
        ("data.prompt_template=serachr1", "data.prompt_template"),
        ("data.prompt_template=/nowhere/own.txt", "data.prompt_template"),
        ("algorithm.group_size=0", "algorithm.group_size"),
        ("critic.use_critic_model=True", "critic.use_critic_model"),
        ("cluster.component_placement.inference=99", "cluster.component_placement.inference"),
        ("algorithm.kl_beta=null", "algorithm.kl_beta"),
    ],
)
def test_each_bad_value_is_reported_with_its_key(files, override, key):
    found = problems(CONFIGS / "tiny-cpu.yaml", *files, override)
    assert any(name.startswith(key) for name in found), found


def test_one_mistake_is_reported_once(files):
    config = load_config(
        CONFIGS / "tiny-cpu.yaml",
        [*files, "actor.training_backend=megatron", "cluster.component_placement.actor=99"],
    )
    assert [problem.key for problem in check_config(config, True)] == ["cluster.component_placement.actor"]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["actor.lora.weight_update=adapter"], "actor.lora.weight_update"),
        (["actor.lora.weight_update=adapter", "actor.lora.rank=4"], None),
        (["critic.use_critic_model=True", "algorithm.adv_type=gae", "critic.warmup_steps=3", "runner.max_steps=3"],
         "critic.warmup_steps"),
        (["critic.use_critic_model=True", "algorithm.adv_type=gae", "critic.warmup_steps=3", "runner.max_steps=4"], None),
    ],
)  # fmt: skip
def test_what_trains_nothing_is_warned_of(files, overrides, key):
    found = warnings(load_config(CONFIGS / "tiny-cpu.yaml", [*files, *overrides]))
    assert [text.partition(":")[0] for text in found] == ([key] if key else [])


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("a: [", "not readable|while parsing|flow"), ("a: ${nothing.here}\n", "a: ")],
)
def test_unreadable_files(tmp_path, content, message):
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_config(path)


def test_numbers_written_like_text_and_nulls(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("actor: {optim: {lr: 1e-6}}\nrunner: {resume_dir: null}\n")
    assert load_config(path).actor.optim.lr == 1e-6


def test_saved_configuration_loads_to_the_same(tmp_path, files):
    config = load_config(CONFIGS / "tiny-cpu.yaml", files)
    save_config(config, tmp_path / "saved.yaml")
    again = load_config(tmp_path / "saved.yaml")
    assert again == config


def test_defaults_are_valid_values():
    assert check_config(Config(), for_training=False)  # no model, no data: problems, not exceptions


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([key for key in known_keys() if key.count(".") == 1 and not key.startswith("vars")]), st.integers(0, 20)
)
def test_a_misspelt_key_is_reported_with_the_right_one_near(key, position):
    section, _, name = key.partition(".")
    wrong = name[: position % len(name)] + "q" + name[position % len(name) :]
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS / "tiny-cpu.yaml", [f"{section}.{wrong}=1"])
    assert f"{section}.{wrong}" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("actor.model.tensor_model_parallel_size=4", "actor.model.tensor_model_parallel_size", "num_key_value_heads = 2"),
        ("actor.model.pipeline_model_parallel_size=5", "actor.model.pipeline_model_parallel_size", "num_hidden_layers = 36"),
        ("actor.model.sequence_parallel=True", "actor.model.sequence_parallel", "needs tensor_model_parallel_size"),
        ("actor.model.gradient_checkpointing=True", "actor.model.gradient_checkpointing", "recompute_granularity: full"),
        ("actor.model.recompute_num_layers=null", "actor.model.recompute_granularity", "needs recompute_method"),
        ("actor.model.normalization=layernorm", "actor.model.normalization", "only rmsnorm is supported"),
        ("actor.model.context_parallel_size=2", "actor.model.context_parallel_size", "only 1 is supported"),
        ("actor.mcore_gpt=False", "actor.mcore_gpt", "only True is supported"),
        ("actor.optim.bf16=True", "actor.optim.bf16", "contradicts actor.model.precision: fp16"),
        ("actor.lr_sched.max_lr=1", "actor.lr_sched.max_lr", "contradicts actor.optim.lr: 1e-06"),
        ("actor.megatron.use_profiler=True", "actor.megatron.use_profiler", "only False is supported"),
        ("actor.model.seq_length=512", "actor.model.seq_length", "less than runner.seq_length"),
        ("actor.model.megatron_checkpoint=/nowhere", "actor.model.megatron_checkpoint", "no torch_dist checkpoint"),
    ],
)
def test_what_megatron_cannot_do_is_rejected_with_the_key(files, override, key, message):
    found = problems(FIXTURES / "rlinf-train.yaml", *files, override)
    assert list(found) == [key]
    assert message in found[key]


def test_a_model_without_a_mapping_is_pointed_to_fsdp(files, tmp_path):
    (tmp_path / "model/config.json").write_text('{"model_type": "gpt2", "n_positions": 8192}')
    found = problems(FIXTURES / "rlinf-train.yaml", *files)
    assert "'gpt2' has no Megatron mapping" in found["actor.training_backend"]
    assert problems(FIXTURES / "rlinf-train.yaml", *files, "actor.training_backend=fsdp") == {}


def test_on_a_cpu_the_actor_gets_as_many_processes_as_one_copy_of_the_model_needs(files):
    result = check(FIXTURES / "rlinf-train.yaml", *files, "actor.model.tensor_model_parallel_size=2")
    assert "actor     2 processes on slots 0 1" in result.stdout
    assert "inference 1 process on slots 0" in result.stdout
    assert "megatron, tensor x pipeline x data parallel 2 x 1 x 1" in result.stdout


def test_overrides_may_follow_the_flag(capsys, files):
    assert check_main([str(CONFIGS / "tiny-cpu.yaml"), "--eval", *files]) == 0
    assert "\nevaluation " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("placement", "critic", "kl_beta", "shared"),
    [
        ({"actor,rollout": "all"}, False, 0.0, True),
        ({"actor": "0-3", "rollout": "4-7"}, False, 0.0, False),
        ({"actor": "0-4", "rollout": "4-7"}, False, 0.0, True),
        # The reference model and the critic are where the actor is, unless they are placed themselves.
        ({"actor": "0-3", "rollout": "4-7"}, True, 0.1, False),
        ({"actor": "0-3", "rollout": "4-7", "inference": "7"}, False, 0.1, True),
        ({"actor": "0-3", "rollout": "4-7", "inference": "7"}, False, 0.0, False),  # there is no reference model
        ({"actor": "0-3", "rollout": "5,7", "critic": "6,7"}, True, 0.0, True),
        ({"actor": "0-3", "rollout": "5,7", "critic": "4,6"}, True, 0.0, False),
    ],
)
def test_engines_share_gpus_where_any_training_group_is_on_one_of_theirs(placement, critic, kl_beta, shared):
    config = Config()
    config.cluster.component_placement = placement
    config.critic.use_critic_model, config.algorithm.kl_beta = critic, kl_beta
    assert shares_gpus(config, Device("cuda", slots=8, cores=16)) is shared
    assert not shares_gpus(config, Device("cpu", slots=8, cores=8))
