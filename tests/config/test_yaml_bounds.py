"""A YAML that is made to take memory, time or control is one sentence."""

from __future__ import annotations

import time

import pytest

from searchr1.config.load import load_config
from searchr1.errors import UserError

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
)
MERGED = "m0: &m0 {" + ", ".join(f"k{i}: 1" for i in range(20)) + "}\n" + "".join(
    f"m{n}: &m{n} {{" + ", ".join(f"k{i}: *m{n - 1}" for i in range(20)) + "}\n" for n in range(1, 20)
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (BOMB, r"line \d: stands for more than 100000 values"),
        (MERGED, r"line \d: stands for more than 100000 values"),
        ("a: " + "[" * 50_000 + "]" * 50_000, "nested more than 100 deep"),
        ("a:" + "".join("\n" + " " * depth + "b:" for depth in range(1, 1000)), "nested more than 100 deep"),
        ("# " + "x" * (10 << 20), "larger than 1 MiB"),
        ("a: &a [*a]", "x.yaml: "),
        ("a: !!python/object/apply:os.system ['touch SEEN']", "not readable as YAML.*python/object/apply"),
        ("a: !!python/name:os.system", "not readable as YAML.*python/name"),
        ("a: !!python/object/new:type {args: [X, [], {}]}", "not readable as YAML.*python/object/new"),
        ("a: !!int 'x'", "not readable as YAML"),
        ("runner: {output_dir: '${multiply:aaaa,1000000000}'}", "runner.output_dir: .*no number"),
        ("\x00", "x.yaml: not readable as YAML"),
        ("a: 1\na: 2", "x.yaml: not readable as YAML.*duplicate key"),
    ],
    ids=lambda value: value[:20],
)
def test_hostile_yaml_is_one_sentence(tmp_path, monkeypatch, text, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text(text)
    started = time.monotonic()
    with pytest.raises(UserError, match=f"(?s){problem}"):
        load_config(tmp_path / "x.yaml")
    assert time.monotonic() - started < 10
    assert [file.name for file in tmp_path.iterdir()] == ["x.yaml"]


REFERRED = "a0: xxxxxxxxxx\n" + "".join(f"a{n}: '{f'${{a{n - 1}}}' * 10}'\n" for n in range(1, 30))
SECTIONS = "s0: {x: 1}\n" + "".join(
    f"s{n}: {{" + ", ".join(f"k{i}: '${{s{n - 1}}}'" for i in range(10)) + "}\n" for n in range(1, 20)
)  # fmt: skip
BESIDE = "r:\n  a0: xxxxxxxxxx\n" + "".join(f"  a{n}: ['{f'${{..a{n - 1}}}' * 10}']\n" for n in range(1, 2)) + "".join(
    f"  a{n}: '{f'${{.a{n - 1}}}' * 10}'\n" for n in range(2, 30)
)  # fmt: skip
CHAIN = "a0: 1\n" + "".join(f"a{n}: ${{a{n - 1}}}\n" for n in range(1, 3000))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (REFERRED, r"x.yaml: a\d+: stands for more than 16 MiB"),
        (SECTIONS, r"x.yaml: s\d+: stands for more than 16 MiB"),
        (BESIDE, r"x.yaml: r.a\d+: stands for more than 16 MiB"),
        (CHAIN, r"x.yaml: a\d+: leads over more than 100 references"),
        ("\n".join(reversed(CHAIN.splitlines())), r"x.yaml: a\d+: leads over more than 100 references"),
        ("runner: {output_dir: '${runner.output_dir}'}", "runner.output_dir"),
    ],
    ids=["text", "sections", "relative", "chain", "chain from its end", "itself"],
)
def test_references_are_bounded(tmp_path, text, problem):
    (tmp_path / "x.yaml").write_text(text)
    started = time.monotonic()
    with pytest.raises(UserError, match=f"(?s){problem}"):
        load_config(tmp_path / "x.yaml")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("defaults", ["[bomb]", "[{group: bomb}]", "[{override /group@here: bomb}]", "[_self_, between]"])
def test_what_defaults_name_is_bounded_too(tmp_path, defaults):
    (tmp_path / "group").mkdir()
    (tmp_path / "group/bomb.yaml").write_text(BOMB)
    (tmp_path / "bomb.yaml").write_text(BOMB)
    (tmp_path / "between.yaml").write_text("defaults: [between, bomb]")
    (tmp_path / "x.yaml").write_text(f"defaults: {defaults}")
    with pytest.raises(UserError, match=r"bomb.yaml: line \d: stands for more"):
        load_config(tmp_path / "x.yaml")
