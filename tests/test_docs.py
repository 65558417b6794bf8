"""The pages: links lead somewhere, commands, flags, keys and paths exist, and translations keep up with the English."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from searchr1.cli import COMMANDS
from searchr1.config.load import known_keys
from searchr1.config.schema import ALIASES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    str(page.relative_to(ROOT))
    for pattern in ("README*.rst", "CONTRIBUTING.md", "docs/**/*.md", "examples/**/README*")
    for page in ROOT.glob(pattern)
)
TRANSLATED = [("README.rst", "README.zh.rst")] + [
    (f"docs/get-started/{name}.md", f"docs/zh/get-started/{name}.md") for name in ("reproduce-8-gpus", "one-gpu", "laptop")
]
KEYS = set(known_keys()) | set(ALIASES)
SECTIONS = {key for key in known_keys() if "." not in key}
FREE = ("cluster.component_placement", "reward.weights", "reward.judge.request", "vars")
"""Keys whose contents are the user's own."""
WITH_SUBCOMMANDS = {"convert"}
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w+-]*)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S)
DIRECTIVE = re.compile(r" *\.\. code-block:: *(\w*)")
FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")
COMMAND = re.compile(r"(?<![\w/.-])(?<!from )(?:searchr1|searchr1\.cli)[ \t]+([a-z][a-z0-9-]*)((?:[^\n;&|`#)]|\|(?=\w))*)")
KEY = re.compile(rf"(?<![\w./-])((?:{'|'.join(sorted(SECTIONS))})(?:\.[a-z_][a-z0-9_]*)+)(?![\w/(*{{:]|\.\*|\.\w)")
OVERRIDE = re.compile(r"(?<![\w./-])([a-z]+(?:\.[a-z_][a-z0-9_]*)+)=(?!=)")
FOLDERS = ("examples", "toolkits", "tests", "benchmarks", "docs", "searchr1")
PATH = re.compile(rf"(?<![\w/.$}}…-])(?:\./)?((?:{'|'.join(FOLDERS)})/[\w./-]*\w|\w+\.sh)(?![\w/*{{…<])")
ROOMS = sorted(folder.name for folder in (ROOT / "searchr1").iterdir() if (folder / "__init__.py").exists())
ROOM_FILE = re.compile(rf"(?<![\w/.-])((?:{'|'.join(ROOMS)})/[\w/]*\w\.py)(?!\w)")
MODULE = re.compile(r"(?<![\w/.-])(searchr1(?:\.[A-Za-z_]\w*)+)(?![\w/*{{<-])")
FILE_ENDINGS = (".md", ".py", ".rst", ".sh", ".jsonl", ".json", ".parquet", ".yaml", ".html", ".sqlite", ".npy")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str]]:
    """Code blocks without their indentation, each with its language."""
    text = read(page)
    if page.endswith(".md"):
        return [(match["language"], match["body"]) for match in FENCE.finditer(text)]
    return [(language, body) for language, body, _ in rst_literals(text.splitlines())]


def rst_literals(lines: list[str]) -> Iterator[tuple[str, str, range]]:
    """What stands indented below a line that ends in `::` or opens a code block: language, text, line numbers."""
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        directive = DIRECTIVE.match(line)
        if not (directive or line.rstrip().endswith("::")):
            continue
        indent = len(line) - len(line.lstrip())
        start = at
        while at < len(lines) and (not lines[at].strip() or len(lines[at]) - len(lines[at].lstrip()) > indent):
            at += 1
        body = [text for text in lines[start:at] if not re.match(r"\s+:[\w-]+:", text)]
        least = min((len(text) - len(text.lstrip()) for text in body if text.strip()), default=0)
        text = "\n".join(text[least:] for text in body).strip("\n") + "\n"
        yield directive[1] if directive else "", text, range(start, at)


def prose(page: str) -> str:
    """The page without its code blocks."""
    text = read(page)
    if page.endswith(".md"):
        return FENCE.sub("", text)
    lines = text.splitlines()
    in_code = {number for _, _, numbers in rst_literals(lines) for number in numbers}
    return "\n".join(line for number, line in enumerate(lines) if number not in in_code)


def spans(page: str) -> list[str]:
    """Code within sentences; line breaks are blanks."""
    pattern = r"(?<!`)`([^`]+)`(?!`)" if page.endswith(".md") else r"``([^`]+)``"
    return [" ".join(found.split()) for found in re.findall(pattern, prose(page))]


def code(page: str) -> list[str]:
    """All code, with continued lines joined."""
    return [re.sub(r"\\\n\s*", " ", part) for part in [*(body for _, body in blocks(page)), *spans(page)]]


def links(page: str) -> list[str]:
    """Targets of links and pictures, external ones left out."""
    text = prose(page)
    if page.endswith(".md"):
        found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text))
    else:
        found = re.findall(r"<([^<>`\s]+)>`__", text) + re.findall(r"^\s*\.\. (?:image|figure|include):: (\S+)", text, re.M)
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def headings(page: str) -> list[str]:
    if page.endswith(".md"):
        return re.findall(r"^#{1,6} (.+)$", prose(page), re.M)
    return [title for title, _ in re.findall(r"^(\S.*)\n([=~-])\2{2,}$", prose(page), re.M)]


def anchor(heading: str) -> str:
    """As GitHub makes them."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")


def link_problems(page: str) -> Iterator[str]:
    for target in links(page):
        path, _, fragment = target.partition("#")
        name = os.path.normpath(Path(page).parent / path) if path else page
        if not (ROOT / name).exists():
            yield f"no file {target}"
        elif fragment and fragment not in map(anchor, headings(name)):
            yield f"no heading {target}"


@functools.cache
def flags_of(command: str, sub: str | None) -> frozenset[str]:
    """Long flags that a command's help names."""
    main = importlib.import_module(COMMANDS[command][0]).main
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*([sub] if sub else []), "--help"])
    found = frozenset(FLAG.findall(text.getvalue()))
    assert found, f"searchr1 {command} --help names no flag"
    return found


def command_problems(page: str) -> Iterator[str]:
    """`searchr1 COMMAND …`, up to the end of the shell's command."""
    for command, arguments in (found for part in code(page) for found in COMMAND.findall(part)):
        used = set(FLAG.findall(arguments))
        if command not in COMMANDS:
            yield f"no command searchr1 {command}"
        elif used:
            sub = next(iter(arguments.split()), None) if command in WITH_SUBCOMMANDS else None
            for flag in sorted(used - flags_of(command, sub)):
                yield f"no flag searchr1 {' '.join(filter(None, (command, sub, flag)))}"


def leaves(tree: Any, prefix: str = "") -> Iterator[str]:
    if not isinstance(tree, dict) or not tree:
        yield prefix
        return
    for name, value in tree.items():
        yield from leaves(value, f"{prefix}.{name}" if prefix else str(name))


def is_key(key: str) -> bool:
    free = any(key == name or key.startswith(f"{name}.") for name in FREE)
    return free or key in KEYS


def key_problems(page: str) -> Iterator[str]:
    named = {key for part in code(page) for key in [*KEY.findall(part), *OVERRIDE.findall(part)]}
    for language, body in blocks(page):
        tree = yaml.safe_load(body) if language == "yaml" else None
        if isinstance(tree, dict) and set(tree) <= SECTIONS:
            named.update(leaves(tree))
    for key in sorted(named):
        if not (key.endswith(FILE_ENDINGS) or is_key(key)):
            yield f"no key {key}"


@functools.cache
def scripts() -> frozenset[str]:
    places = [ROOT.glob("*.sh"), ROOT.glob("examples/**/*.sh"), ROOT.glob("toolkits/**/*.sh")]
    return frozenset(path.name for place in places for path in place)


def path_problems(page: str) -> Iterator[str]:
    for path in sorted({found for part in code(page) for found in PATH.findall(part)}):
        if path not in scripts() and not (ROOT / path).exists():
            yield f"no path {path}"


def name_problems(page: str) -> Iterator[str]:
    """Modules and their names, `searchr1.room.module.name`, and files of a room, `room/module.py`."""
    for part in spans(page):
        for path in ROOM_FILE.findall(part):
            if not (ROOT / "searchr1" / path).exists():
                yield f"no file of a room {path}"
        for name in MODULE.findall(part):
            if not name.endswith(FILE_ENDINGS) and not name_exists(name):
                yield f"no name {name}"


def name_exists(name: str) -> bool:
    """Import the longest module that a dotted name begins with, and look the rest up in it."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            value: Any = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        missing = object()
        for part in parts[count:]:
            value = getattr(value, part, missing)
        return value is not missing
    return False


def page_problems(page: str) -> list[str]:
    kinds = (link_problems, command_problems, key_problems, path_problems, name_problems)
    return [problem for kind in kinds for problem in kind(page)]


def translation_problems(english: str, chinese: str) -> Iterator[str]:
    """Where a translation says something else: code (comments may differ), headings, links, what stands in code style."""

    def commands(page: str) -> list[str]:
        return [re.sub(r"(?:^|[ \t]+)#(?: .*)?$", "", body, flags=re.M) for _, body in blocks(page)]

    def targets(page: str) -> Counter[str]:
        found = (os.path.normpath(Path(page).parent / target) for target in links(page))
        return Counter(english_of.get(target, target) for target in found)

    english_of = {translated: original for original, translated in TRANSLATED}
    for number, (left, right) in enumerate(zip(commands(english), commands(chinese), strict=False)):
        if left != right:
            yield f"code block {number + 1} differs:\n{left}\n{right}"
    if len(blocks(english)) != len(blocks(chinese)):
        yield "another number of code blocks"
    if len(headings(english)) != len(headings(chinese)):
        yield "another number of headings"
    for what, of in (("code", lambda page: Counter(spans(page))), ("links", targets)):
        here, there = of(english), of(chinese)
        if here != there:
            yield f"{what} only in English: {dict(here - there)}, only in Chinese: {dict(there - here)}"


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    assert page_problems(page) == []


@pytest.mark.parametrize(("english", "chinese"), TRANSLATED)
def test_translations_keep_up(english, chinese):
    assert list(translation_problems(english, chinese)) == []
    assert os.path.relpath(chinese, Path(english).parent) in links(english)
    assert os.path.relpath(english, Path(chinese).parent) in links(chinese)


def test_mistakes_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    mistakes = {
        "no file gone.md",
        "no heading #missing",
        "no command searchr1 trane",
        "no flag searchr1 convert mg2hf --adapter",
        "no key runner.max_step",
        "no key actor.optim.rate",
        "no path examples/gone.sh",
        "no name searchr1.agent.loop.gone",
        "no file of a room agent/gone.py",
    }
    text = (
        "# A page\n`searchr1.agent.loop.gone` `searchr1.agent.loop.run_trajectory` `agent/gone.py` `agent/loop.py`\n\n"
        "[a](gone.md) [b](#missing) [c](#a-page)\n\n```bash\nsearchr1 trane x\n"
        "searchr1 convert mg2hf --output y \\\n   --adapter\nbash examples/gone.sh runner.max_step=1 runner.seed=1\n```\n"
        "\n```yaml\nactor:\n  optim: {rate: 1, lr: 1}\n```\n"
    )
    (tmp_path / "page.md").write_text(text)
    (tmp_path / "searchr1/agent").mkdir(parents=True)
    (tmp_path / "searchr1/agent/loop.py").touch()
    assert set(page_problems("page.md")) == mistakes
    (tmp_path / "zh.md").write_text(text.replace("runner.seed=1", "runner.seed=2").replace("# A page", "一页"))
    differing = list(translation_problems("page.md", "zh.md"))
    assert [problem.split(":")[0] for problem in differing] == ["code block 1 differs", "another number of headings"]
