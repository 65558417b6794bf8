"""Output in encodings that lack characters, on streams that are closed, full or read no more."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from searchr1.chat.events import Text
from searchr1.chat.terminal import Terminal
from searchr1.cli import COMMANDS, main
from searchr1.streams import open_streams

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "examples/searchr1/config"
ENCODINGS = ("ascii", "latin-1", "gbk", "shift_jis", "utf-8")


class Streams:
    """Standard streams of an encoding, strict as Python makes them, for as long as the block runs."""

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding
        self.both = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]

    def __enter__(self) -> Streams:
        self.before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = self.both
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout, sys.stderr = self.before

    def written(self) -> str:
        for stream in self.both:
            stream.flush()
        return "".join(stream.buffer.getvalue().decode(self.encoding) for stream in self.both)


def run(*arguments) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code or 0


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_help_text_can_be_written(encoding):
    subcommands = [("convert", kind) for kind in ("fsdp2hf", "mg2hf", "hf2mg")]
    for words in [*((name,) for name in COMMANDS), *subcommands]:
        with Streams(encoding) as streams:
            assert run(*words, "--help") == 0, words
        assert "usage: " in streams.written(), words


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_tables_messages_and_answers_can_be_written(encoding, tmp_path):
    rows = [{"question": "谁 → “é”?", "golden_answers": ["東京 😀"]}, {"question": "Où?", "golden_answers": ["Orléans"]}]
    (tmp_path / "naïve…東.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    commands = {
        ("prepare-data", "--input", f"東京={tmp_path}/naïve…東.jsonl", "--out", tmp_path / "出"): 0,
        ("plan-memory", CONFIGS / "tiny-gpu.yaml", f"rollout.model.model_path={ROOT}/examples/demo/cold_start"): 0,
        ("check-config", tmp_path / "不存在…\udcff.yaml"): 2,
        ("check-config", CONFIGS / "tiny-cpu.yaml", "runner.nosuch→=é"): 2,
        ("不",): 2,
    }
    for words, code in commands.items():
        with Streams(encoding) as streams:
            assert run(*words) == code, words
        assert len(streams.written()) > 50, words
    with Streams(encoding) as streams:
        open_streams()
        Terminal(Console(highlight=False, markup=False, emoji=False)).show(Text("answer", "東京 – naïve 😀 \ud83d"))
    assert streams.written().startswith("answer ")


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "a -> b... 2 x 3 +- 1 - | - \\xe9 \\u6771 \\U0001f600 \\ud83d"),
        ("latin-1", "a -> b... 2 × 3 ± 1 - | - é \\u6771 \\U0001f600 \\ud83d"),
        ("gbk", "a → b… 2 × 3 ± 1 – │ ─ é 東 \\U0001f600 \\ud83d"),
        ("utf-8", "a → b… 2 × 3 ± 1 – │ ─ é 東 😀 \\ud83d"),
    ],
)
def test_what_an_encoding_lacks_stays_readable(encoding, expected):
    with Streams(encoding) as streams:
        open_streams()
        print("a → b… 2 × 3 ± 1 – │ ─ é 東 😀 \ud83d")
    assert streams.written() == expected + "\n"


CLOSED = """
import os, sys
from searchr1.streams import open_streams
open_streams()
print("to nobody"); print("to nobody", file=sys.stderr); assert sys.stdin.read() == ""
with open(sys.argv[1], "w", encoding="utf-8") as file:
    assert file.fileno() > 2, file.fileno()
    os.system("echo a library writes to descriptor 1; echo and to 2 >&2")
"""
ENDLESS = """
import sys, types
from searchr1.cli import COMMANDS, main
COMMANDS["endless"] = ("endless", "")
sys.modules["endless"] = types.SimpleNamespace(main=lambda argv: [print("line", number) for number in range(10**6)] and 0)
sys.exit(main(["endless"]))
"""


def test_closed_streams_are_the_null_device(tmp_path):
    file = tmp_path / "file"
    for closed in ("<&- >&- 2>&-", ">&-", "2>&-", "<&-"):
        rest = " ".join(f"{mark}/dev/null" for mark in ("<", ">", "2>") if f"{mark}&-" not in closed.split())
        script = f'exec "$0" -c "$1" "$2" {closed} {rest}'
        ended = subprocess.run(["sh", "-c", script, sys.executable, CLOSED, str(file)])
        assert (ended.returncode, file.read_text(encoding="utf-8")) == (0, ""), closed


def test_a_locale_of_ascii_alone_takes_any_file_name_and_value(tmp_path):
    folder = tmp_path / "é東"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(json.dumps({"question": "谁?", "golden_answers": ["é"]}) + "\n", encoding="utf-8")
    words = [sys.executable, "-m", "searchr1.cli", "prepare-data", "--input", f"東京:train={folder}/rows.jsonl"]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = subprocess.run([*words, "--out", folder / "출력"], env=os.environ | locale, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert (folder / "출력/train.parquet").is_file()
    assert ended.stdout.isascii()
    assert rb"\u6771\u4eac" in ended.stdout


def test_a_reader_that_leaves_ends_the_command_quietly():
    process = subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"line 0\n"
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == (b"", 141)


def test_a_full_disk_under_the_output_is_one_sentence():
    with open("/dev/full", "w", encoding="utf-8") as full:
        ended = subprocess.run([sys.executable, "-c", ENDLESS], stdout=full, stderr=subprocess.PIPE, text=True)
    sentence = "searchr1 endless: the output: No space left on device; make room and start again\n"
    assert (ended.returncode, ended.stderr) == (2, sentence)
