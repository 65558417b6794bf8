"""`key=value`: every text can be given, lists and numbers are read as before, and what is refused shows how to write it."""

from __future__ import annotations

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from searchr1.config.load import ConfigError, load_config
from searchr1.config.overrides import quoted
from searchr1.errors import UserError

NAME = "runner.experiment_name"


@pytest.fixture(scope="module")
def yaml(tmp_path_factory):
    path = tmp_path_factory.mktemp("yaml") / "a=b (c).yaml"
    path.write_text("runner:\n  max_steps: 40\n  output_dir: runs\n", encoding="utf-8")
    return path


TEXTS = r"""a=b/model x(y x) é 模型 #x 50% {a} C:\x\ C:\x [1,2 it's ( ! a,b choice(1,2) glob(*) a;b a&b * ~x @x = == 😀"""


@pytest.mark.parametrize("text", [*TEXTS.split(), "/models/q (1)", 'say "a"', "a\nb", "key: value", ""])
def test_a_text_arrives_as_it_is_written(yaml, text):
    assert load_config(yaml, [f"{NAME}={text}"]).runner.experiment_name == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("'q x'", "q x"),
        ('"5"', "5"),
        ("${runner.output_dir}/a=b", "runs/a=b"),
        ("x(${runner.max_steps})", "x(40)"),
        (" x ", "x"),
    ],
)
def test_quotes_and_references_mean_what_they_did(yaml, text, value):
    assert load_config(yaml, [f"{NAME}={text}"]).runner.experiment_name == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[/x/a=b/c,/d]", ["/x/a=b/c", "/d"]),
        ("[a (1),'b,c',é]", ["a (1)", "b,c", "é"]),
        ("[it's, C:\\x\\]", ["it's", "C:\\x\\"]),
        ("[a,b]", ["a", "b"]),
        ("[]", []),
    ],
)
def test_lists_hold_any_text(yaml, text, value):
    assert load_config(yaml, [f"data.train_data_paths={text}"]).data.train_data_paths == value


@pytest.mark.parametrize("text", ["{stop: a=b, n: 3, deep: {k: (x)}}", '{"stop": "a=b", "n": 3, "deep": {"k": "(x)"}}'])
def test_mappings_hold_any_text(yaml, text):
    request = load_config(yaml, [f"reward.judge.request={text}"]).reward.judge.request
    assert request == {"stop": "a=b", "n": 3, "deep": {"k": "(x)"}}


@settings(max_examples=50)
@given(st.text(max_size=12) | st.text("ab1 =,:'\"\\${}[]()#%.~+@?\n", max_size=10))
@example("\\${x}")
@example("\\\\${")
@example("\ud83d")
@example("null")
@example("1e5")
def test_any_text_arrives_or_its_message_shows_how_to_write_it(yaml, text):
    """A text that Hydra reads is what Hydra reads; another is itself. What is refused can be typed as the message says."""
    assume(text.strip() != "???")  # OmegaConf's mark of a missing value
    try:
        parsed = OverridesParser.create().parse_override(f"k={text}")
        expected = text if parsed.is_sweep_override() else parsed.value()
    except HydraException:
        expected = text
    try:
        arrived = load_config(yaml, [f"{NAME}={text}"]).runner.experiment_name
    except UserError as error:
        message = str(error)
        assert f"{NAME}: " in message
        assert quoted(NAME, text) in message
    else:
        assert arrived == expected or "${" in text or "\\$" in text
    (argument,) = shlex.split(quoted(NAME, text))
    assert load_config(yaml, [argument]).runner.experiment_name == text


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("=value", "'': is no key; write KEY=VALUE"),
        ("", "'': is no key"),
        ("a b=1", "'a b': is no key"),
        ("runner.max_steps =3", "'runner.max_steps ': is no key"),
        ("é=3", "'é': is no key"),
        ("runner.max_steps@x=3", "'runner.max_steps@x': is no key"),
        ("+++runner.max_steps=3", "'+++runner.max_steps': is no key"),
        (
            "runner.max_steps",
            "runner.max_steps: has no value; write runner.max_steps=VALUE (runner.max_steps=null for none)",
        ),
        ("+runner.max_steps=3", "runner.max_steps: {yaml} sets it already; leave the + out"),
        ("~runner.seed", "runner.seed: cannot be removed from {yaml}"),
        ("~runner.max_steps=9", "runner.max_steps: cannot be removed from {yaml}"),
        ("runner.experiment_name=${", "runner.experiment_name: '${{' holds a ${{ that begins no readable reference"),
    ],
)
def test_what_is_no_override_is_one_sentence(yaml, argument, said):
    with pytest.raises(UserError) as error:
        load_config(yaml, [argument])
    assert str(error.value).startswith(said.format(yaml=yaml))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("runner.experiment_name=5", "expects text, found 5; a text as it stands is written 'runner.experiment_name=\"5\"'"),
        (
            "data.train_data_paths=a,b",
            "expects a list of text, found 'a,b'; a list is written 'data.train_data_paths=[a,b]'",
        ),
        ("runner.max_steps=1=2", "expects a whole number, found '1=2'"),
        ("runner.max_steps=", "expects a whole number, found ''"),
        ("runner.nosuch=a=b", "unknown key"),
    ],
)
def test_a_wrong_value_is_a_problem_of_its_key(yaml, argument, said):
    with pytest.raises(ConfigError) as error:
        load_config(yaml, [argument])
    (problem,) = error.value.problems
    assert problem.key == argument.partition("=")[0]
    assert problem.message.startswith(said)


def test_the_last_of_two_counts_and_a_removed_key_has_its_default(yaml):
    assert load_config(yaml, ["runner.max_steps=1", "runner.max_steps=2"]).runner.max_steps == 2
    config = load_config(yaml, ["~runner.max_steps"])
    assert (config.runner.max_steps, "runner.max_steps" in config.given) == (-1, False)


def test_settings_of_the_launcher_are_said_to_be_ignored(yaml):
    assert load_config(yaml, ["hydra.run.dir=x"]).notes == ["ignored   hydra.run.dir: is a setting of Hydra's launcher"]
