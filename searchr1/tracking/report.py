"""`searchr1 report RUN_DIR`: one HTML page of curves, the evaluation and trajectories; it loads nothing from outside."""

from __future__ import annotations

import argparse
import html
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from searchr1.errors import UserError
from searchr1.tracking.loggers import METRICS_FILE, read_metrics
from searchr1.tracking.metrics import data_sources
from searchr1.tracking.report_style import STYLE
from searchr1.tracking.svg import Points, Series, compact, line_chart, stacked_chart
from searchr1.tracking.trajectory_log import eval_file, logged_steps, read_some_trajectories, train_file

Row = dict[str, Any]

SAMPLES = 20
"""Trajectories shown of a step."""
CHARTS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Reward", "mean over the step's trajectories", (("mean", "reward/mean"), ("std", "reward/std"))),
    ("Exact match", "", (("training", "reward/exact_match"), ("held-out", "val/exact_match"))),
    ("Searches per question", "", (("training", "rollout/searches"), ("held-out", "val/searches"))),
    (
        "Response length",
        "tokens, mean",
        (("with retrieved text", "rollout/response_length"), ("policy alone", "rollout/policy_tokens")),
    ),
    ("KL to the reference model", "per policy token", (("KL", "actor/kl"),)),
    ("Entropy", "nats per policy token", (("entropy", "actor/entropy"),)),
    (
        "Mismatch of engine and actor",
        "absolute difference of log-probabilities",
        (("mean", "mismatch/logprob_gap"), ("largest", "mismatch/logprob_gap_max")),
    ),
    ("Gradient norm", "before clipping", (("norm", "actor/grad_norm"),)),
    (
        "How trajectories go",
        "shares",
        (
            ("invalid turns", "rollout/invalid_rate"),
            ("out of tokens", "rollout/truncated"),
            ("forced last turn", "rollout/forced_final"),
            ("groups that teach nothing", "rollout/uniform_groups"),
            ("failed tool calls", "tool/failure_rate"),
        ),
    ),
    ("Tool calls", "seconds", (("median", "tool/seconds_p50"), ("99th percentile", "tool/seconds_p99"))),
)
PHASES = (
    ("rollout", "time/rollout"),
    ("reward", "time/reward"),
    ("reference", "time/reference"),
    ("log-probabilities", "time/logprob"),
    ("training", "time/train"),
    ("weight update", "time/weight_update"),
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(value: object) -> str:
    """Any text as HTML that shows it and does nothing else.

    Control characters, halves of surrogate pairs and characters that turn the direction of text become U+FFFD.
    """
    return html.escape(_CONTROL.sub("\ufffd", str(value)), quote=True)


def points_of(rows: Sequence[Row], name: str) -> Points:
    """(step, value) wherever the metric was logged; of a step that was logged twice the last value."""
    found = {float(row["step"]): row[name] for row in rows if isinstance(row.get(name), int | float)}
    return sorted((step, float(value)) for step, value in found.items() if math.isfinite(value))


def page(run: Path, samples: int = SAMPLES) -> str:
    """The whole page about the run in a folder.

    Args:
        run: the run's folder.
        samples: trajectories shown of each step.

    Raises:
        UserError: the folder holds no run, or a file in it is damaged.
    """
    path = run / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{run}: no run there ({METRICS_FILE} is missing); give a run's folder")
    rows = read_metrics(path)
    if not rows:
        raise UserError(f"{path}: no metrics yet; wait for the first step or evaluation")
    evaluations = [row for row in rows if row.get("val/exact_match") is not None]
    name = escape(run.resolve().name)
    sections = [
        f"<h1>{name}</h1><p>{max(row['step'] for row in rows)} steps</p>",
        tiles(rows),
        f"<h2>Evaluation</h2>{evaluation_table(evaluations)}",
        f'<h2>Curves</h2><div class="charts">{"".join(charts(rows, evaluations))}</div>',
        *trajectory_sections(run, samples),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{name}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def tiles(rows: Sequence[Row]) -> str:
    """The run in a few numbers: first and last value, or a median."""
    parts = []
    for label, name in (
        ("Held-out exact match", "val/exact_match"),
        ("Searches per held-out question", "val/searches"),
        ("Training reward", "reward/mean"),
        ("Response tokens", "rollout/response_length"),
    ):
        points = points_of(rows, name)
        if points:
            first, last = compact(points[0][1]), compact(points[-1][1])
            parts.append((label, f"{first} → {last}" if len(points) > 1 else last))
    for label, name in (("Seconds a step, median", "time/step"), ("Rollout tokens/s, median", "rollout/tokens_per_second")):
        points = points_of(rows, name)
        if points:
            parts.append((label, compact(statistics.median(value for _, value in points))))
    boxes = (f'<div class="tile"><span>{label}</span><b>{text}</b></div>' for label, text in parts)
    return f'<div class="tiles">{"".join(boxes)}</div>'


def evaluation_table(evaluations: Sequence[Row]) -> str:
    """The first and the last evaluation: a row per data source, and one for all."""
    if not evaluations:
        return "<p>No evaluation was logged.</p>"
    first, last = evaluations[0], evaluations[-1]
    both = [first, last] if first["step"] != last["step"] else [last]
    columns = (("exact match", "exact_match"), ("F1", "f1"), ("searches", "searches"), ("tokens", "response_length"))
    heads = "".join(f"<th>{label}, step {row['step']}</th>" for label, _ in columns for row in both)
    prefixes = {source: f"val/{source}" for source in data_sources(last)} | {"all": "val"}
    lines = []
    for label, prefix in prefixes.items():
        values = [row.get(f"{prefix}/{name}") for _, name in columns for row in both]
        shown = "".join(f"<td>{'' if value is None else compact(float(value))}</td>" for value in values)
        questions = f"<td>{last.get(f'{prefix}/questions') or 0:,.0f}</td>"
        lines.append(f"<tr><td>{escape(label)}</td>{questions}{shown}</tr>")
    return f'<div class="table"><table><tr><th>data source</th><th>questions</th>{heads}</tr>{"".join(lines)}</table></div>'


def charts(rows: Sequence[Row], evaluations: Sequence[Row]) -> list[str]:
    """All curves for which there are values."""
    drawn = [
        line_chart(title, [Series(name, points_of(rows, key)) for name, key in lines], note) for title, note, lines in CHARTS
    ]
    if evaluations:
        sources = data_sources(evaluations[-1])
        for start in range(0, len(sources), 6):
            lines = [
                Series(_short(source), points_of(rows, f"val/{source}/exact_match")) for source in sources[start : start + 6]
            ]
            drawn.insert(2, line_chart("Held-out exact match by data source", lines))
    phases = [Series(name, points_of(rows, key)) for name, key in PHASES]
    spent: Counter[float] = Counter()
    for phase in phases:
        spent.update(dict(phase.points))
    rest = [(step, max(total - spent[step], 0.0)) for step, total in points_of(rows, "time/step")]
    drawn.append(stacked_chart("Where a step's time goes", [*phases, Series("other", rest)], "seconds, stacked"))
    return drawn


def trajectory_sections(run: Path, samples: int) -> list[str]:
    """Trajectories of the first and the last evaluation, and of the first and the last training step."""
    sections = []
    for title, prefix, file in (
        ("Held-out questions", "eval_step_", eval_file),
        ("Training questions", "step_", train_file),
    ):
        steps = logged_steps(run, prefix)
        for step in dict.fromkeys([*steps[:1], *steps[-1:]]):
            cards = "".join(card(row) for row in read_some_trajectories(file(run, step), samples))
            note = "<p>Blue is what the policy wrote, grey what it was given to read.</p>"
            sections.append(f"<h2>{title}, step {step}</h2>{note}{cards}")
    return sections


def card(row: Row) -> str:
    """One trajectory, folded up. All that a model, a page or a data file wrote is escaped."""
    parts = row.get("reward_parts") or {}
    right = (parts.get("exact_match") or 0) > 0
    facts = [
        f"gold: {' | '.join(map(str, row.get('golden_answers') or []))}",
        f"answer: {'none' if row.get('answer') is None else row['answer']}",
        f"reward {_value(row.get('reward'))}",
        *(f"{name} {_value(value)}" for name, value in parts.items() if name != "reward"),
        f"ended by {row.get('stop')}{', last turn forced' if row.get('forced_final') else ''}",
        f"{row.get('response_length')} tokens",
    ]
    verdict = '<b class="good">✓</b>' if right else '<b class="bad">✗</b>'
    small = f"{row.get('data_source')}, searches: {row.get('searches')}, reward {_value(row.get('reward'))}"
    return (
        f'<details class="card"><summary>{verdict} {escape(row.get("question"))} <small>{escape(small)}</small></summary>'
        f'<div class="inside"><p class="meta">{escape(" · ".join(facts))}</p>{"".join(map(_turn, row["turns"]))}</div>'
        "</details>\n"
    )


def _turn(turn: Row) -> str:
    parts = [
        f'<div class="turn">policy, {escape(turn.get("policy_tokens"))} tokens, {escape(turn.get("action"))}</div>'
        f'<pre class="policy">{escape(turn.get("policy_text") or "").strip()}</pre>'
    ]
    error = turn.get("tool_error")
    if turn.get("tool_text") or error:
        asked = " | ".join(map(str, turn.get("queries") or []))
        head = f"{asked} · {turn.get('tool_tokens')} tokens, {_value(turn.get('tool_seconds'))} s".lstrip(" ·")
        failed = f' <b class="bad">{escape(error)}</b>' if error else ""
        parts.append(f'<div class="turn">{escape(head)}{failed}</div>')
        parts.append(f'<pre class="tool">{escape(turn.get("tool_text") or "").strip()}</pre>')
    return "".join(parts)


def _value(value: object) -> str:
    return compact(value) if isinstance(value, int | float) else "not finite"


def _short(name: str) -> str:
    return name if len(name) <= 40 else name[:39] + "…"


def main(argv: list[str]) -> int:
    """Entry point of the sub-command."""
    parser = argparse.ArgumentParser(prog="searchr1 report", description="Write a page about a run.")
    parser.add_argument("run_dir", type=Path, help="the run's folder, where metrics.jsonl is")
    parser.add_argument("--output", type=Path, help="the page (default RUN_DIR/report.html)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"trajectories shown of a step (default {SAMPLES})")
    args = parser.parse_args(argv)
    if args.samples < 0:
        raise UserError(f"--samples {args.samples}: give 0 or more")
    output: Path = args.output or args.run_dir / "report.html"
    text = page(args.run_dir, args.samples)
    partial = output.with_name(output.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"--output {output}: not writable ({error.strerror})") from error
    print(f"report -> {output}")
    return 0
