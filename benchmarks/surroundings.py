"""Run the commands as another user, without a home, in other locales, on read-only folders and closed streams, and see.

    python benchmarks/surroundings.py [--only TEXT] [--quick | --commands NAME ...] [--markdown FILE]

As root on Linux (it becomes user 12345 and mounts folders in a name space of its own). Of every command is required: its
exit code is 0, it does what it is for, and nothing that it prints is a traceback. Exit code 1 if something is not so.
`--quick` leaves out what starts vLLM or Ray. About ten minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLD_START = ROOT / "examples/demo/cold_start"
OTHER_USER = 12345
SECONDS = 600


@dataclass(frozen=True)
class Surrounding:
    """What a command finds around it."""

    name: str
    env: dict[str, str | None] = field(default_factory=dict)
    """Variables that are set, or (None) missing."""
    other_user: bool = False
    """Without an entry in the password file; it may read everything, as this checkout may lie in root's home."""
    read_only: tuple[str, ...] = ()
    """Folders, below the work folder, that cannot be written to."""
    shell: str = '"$@"'
    """How the command is started."""


C_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SURROUNDINGS = [
    Surrounding("as it is"),
    Surrounding("user 12345, HOME=/nonexistent", {"HOME": "/nonexistent"}, other_user=True),
    Surrounding("user 12345, HOME=/", {"HOME": "/"}, other_user=True),
    Surrounding("user 12345, no HOME", {"HOME": None}, other_user=True),
    Surrounding("Latin-1 output", {"PYTHONIOENCODING": "latin-1"}),
    Surrounding("GBK output", {"PYTHONIOENCODING": "gbk"}),
    Surrounding("C locale, no UTF-8 mode", C_LOCALE),
    Surrounding("TMPDIR of 120 characters", {"TMPDIR": "{work}/" + "t" * 110}),
    Surrounding("read-only corpus and model", read_only=("corpus", "model")),
    Surrounding("closed standard streams", shell='"$@" <&- >&- 2>&-'),
]


@dataclass(frozen=True)
class Command:
    """One command, and what it must leave behind."""

    name: str
    words: tuple[str, ...]
    leaves: str
    """A file below the folder of the surrounding."""
    slow: bool = False


TRAIN = """tools.search.dummy_mode=True runner.max_steps=1 data.rollout_batch_size=4 algorithm.group_size=2
algorithm.n_minibatches=1 runner.val_check_interval=0 runner.output_dir={out} runner.experiment_name=run=(é)
rollout.model.model_path={work}/model data.train_data_paths=[{out}/questions/train.parquet] data.val_data_paths=[]
cluster.device=cpu"""
COMMANDS = [
    Command("demo-world", ("demo-world", "--out", "{out}/world"), "world/corpus.jsonl"),
    Command("prepare-data", ("prepare-data", "--input", "东京:train={work}/corpus/rows.jsonl", "--out", "{out}/questions"),
            "questions/train.parquet"),
    Command("check-config", ("check-config", "{root}/examples/searchr1/config/tiny-cpu.yaml", *TRAIN.split()), ""),
    Command("build-index", ("build-index", "--retriever_name", "bm25", "--corpus_path", "{work}/corpus/corpus.jsonl.gz",
                            "--save_dir", "{out}/index"), "index/manifest.json"),
    Command("sft", ("sft", "--model", "{work}/model", "--data", "{work}/corpus/sft.jsonl", "--output", "{out}/sft",
                    "--max-steps", "1", "--device", "cpu"), "sft/model.safetensors"),
    Command("infer", ("infer", "--model_path", "{work}/model", "--no-search", "--device", "cpu", "--prompt", "谁 é?"), "",
            slow=True),
    Command("train", ("train", "{root}/examples/searchr1/config/tiny-cpu.yaml", *TRAIN.split()), "run=(é)/metrics.jsonl",
            slow=True),
    Command("report", ("report", "{out}/run=(é)"), "run=(é)/report.html", slow=True),
]  # fmt: skip


def main() -> int:
    """Run everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="surroundings whose name holds this text")
    parser.add_argument("--commands", nargs="+", choices=[one.name for one in COMMANDS], help="only these")
    parser.add_argument("--quick", action="store_true", help="without what starts vLLM or Ray")
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    args = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("has to become another user and mount folders; run it as root")
    work = Path(tempfile.mkdtemp(prefix="surroundings-"))
    chosen = [one for one in COMMANDS if not (args.quick and one.slow) and one.name in (args.commands or one.name)]
    lines = ["| surrounding | " + " | ".join(one.name for one in chosen) + " |", "| --- |" + " --- |" * len(chosen)]
    failed = False
    try:
        _write_inputs(work)
        for number, surrounding in enumerate(SURROUNDINGS):
            if args.only not in surrounding.name:
                continue
            out = work / f"out{number}"
            out.mkdir()
            os.chown(out, OTHER_USER if surrounding.other_user else 0, -1)
            cells = []
            for command in chosen:
                cell, said = _run(command, surrounding, work, out)
                cells.append(cell)
                print(f"{surrounding.name}: {command.name}: {cell}", flush=True)
                if said:
                    failed = True
                    print("    " + "\n    ".join(said.splitlines()[-12:]), flush=True)
            lines.append(f"| {surrounding.name} | " + " | ".join(cells) + " |")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("\n" + "\n".join(lines))
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(failed)


def _write_inputs(work: Path) -> None:
    import gzip
    import json

    work.chmod(0o755)
    (work / ("t" * 110)).mkdir()
    corpus = work / "corpus"
    corpus.mkdir()
    shutil.copytree(COLD_START, work / "model")
    rows = [{"question": f"谁 is number {number}?", "golden_answers": ["é"]} for number in range(8)]
    (corpus / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sft = {"prompt": "Question: who?\n", "response": "<answer> me </answer>"}
    (corpus / "sft.jsonl").write_text(json.dumps(sft) + "\n", encoding="utf-8")
    with gzip.open(corpus / "corpus.jsonl.gz", "wt", encoding="utf-8") as file:
        for number in range(100):
            file.write(json.dumps({"id": str(number), "contents": f'"Title {number}"\nsome word{number}'}) + "\n")


def _run(command: Command, surrounding: Surrounding, work: Path, out: Path) -> tuple[str, str]:
    """The cell of the table, and what was printed if the command did not do what it should."""
    places = {"work": work, "out": out, "root": ROOT}
    words = [sys.executable, "-m", "searchr1.cli", *(word.format(**places) for word in command.words)]
    env = {name: value for name, value in os.environ.items() if name not in ("USER", "LOGNAME")}
    env["PYTHONPATH"] = str(ROOT)
    for name, value in surrounding.env.items():
        env.pop(name, None)
        if value is not None:
            env[name] = value.format(**places)
    words = ["sh", "-c", surrounding.shell, "sh", *words]
    if surrounding.other_user:
        user = str(OTHER_USER)
        keep = ["--inh-caps", "-all,+dac_read_search", "--ambient-caps", "-all,+dac_read_search"]
        words = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", *keep, *words]
    if surrounding.read_only:
        binds = " && ".join(f'mount --bind "{work / name}" "{work / name}" && mount -o remount,bind,ro "{work / name}"'
                            for name in surrounding.read_only)  # fmt: skip
        words = ["unshare", "-m", "sh", "-c", f'{binds} && exec "$@"', "sh", *words]
    started = time.monotonic()
    try:
        ended = subprocess.run(words, env=env, cwd=out, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as late:
        return f"not within {SECONDS} s", (late.output or b"").decode("utf-8", "replace")
    said = (ended.stdout + ended.stderr).decode("utf-8", "replace")
    seconds = time.monotonic() - started
    if ended.returncode:
        return f"exit code {ended.returncode}", said or "nothing was printed"
    if "Traceback" in said:
        return "a traceback", said
    if not (out / command.leaves).exists():
        return f"no {command.leaves}", said or "nothing was printed"
    return f"ok, {seconds:.0f} s", ""


if __name__ == "__main__":
    sys.exit(main())
