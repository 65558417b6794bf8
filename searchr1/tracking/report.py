"""`searchr1 report RUN_DIR`: one HTML page of curves, the evaluation and trajectories; needs nothing from outside."""

from __future__ import annotations

import argparse
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from searchr1.errors import UserError
from searchr1.tracking.loggers import read_metrics

Row = dict[str, Any]
Series = list[tuple[str, list[tuple[float, float]]]]

SHOWN = 12
"""Trajectories shown of the first and of the last step."""
COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#64748b")
CHARTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Reward (training)", (("reward", "reward/mean"), ("exact match", "reward/exact_match"))),
    (
        "Held-out exact match",
        (
            ("all", "val/exact_match"),
            ("one hop", "val/one_hop/exact_match"),
            ("two hops", "val/two_hop/exact_match"),
            ("three hops", "val/three_hop/exact_match"),
        ),
    ),
    ("Searches per question", (("training", "rollout/searches"), ("held-out", "val/searches"))),
    ("Response length (tokens)", (("all", "rollout/response_length"), ("written by the policy", "rollout/policy_tokens"))),
    ("KL to the reference", (("KL", "actor/kl"),)),
    ("Entropy (nats)", (("entropy", "actor/entropy"),)),
    ("Engine vs actor: largest log-probability gap", (("gap", "mismatch/logprob_gap_max"),)),
    ("Invalid turns, uniform groups", (("invalid", "rollout/invalid_rate"), ("uniform groups", "rollout/uniform_groups"))),
    (
        "Seconds per step",
        (
            ("rollout", "time/rollout"),
            ("reference", "time/reference"),
            ("train", "time/train"),
            ("weight update", "time/weight_update"),
            ("whole step", "time/step"),
        ),
    ),
)
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1e293b;background:#f8fafc;margin:0 auto;max-width:1120px;padding:24px}
h1{font-size:22px}h2{font-size:17px;margin-top:32px}.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:16px}
.card,details{background:#fff;border:1px solid #e2e8f0;border-radius:8px;padding:12px}.card h3{font-size:14px;margin:0 0 4px}
svg{width:100%;height:auto}table{border-collapse:collapse;background:#fff}td,th{border:1px solid #e2e8f0;padding:4px 10px;text-align:right}
td:first-child,th:first-child{text-align:left}details{margin:8px 0}summary{cursor:pointer}pre{white-space:pre-wrap;margin:6px 0}
.policy{background:#eff6ff;border-left:3px solid #2563eb;padding:4px 8px}.tool{background:#f1f5f9;border-left:3px solid #94a3b8;padding:4px 8px;color:#475569}
.key{font-size:12px;margin-right:10px}.good{color:#15803d}.bad{color:#b91c1c}
"""


def chart(title: str, series: Series) -> str:
    """A line chart as SVG; empty if there is nothing to draw."""
    points = [point for _, values in series for point in values]
    if not points:
        return ""
    width, height, left, bottom, top = 330.0, 190.0, 44.0, 22.0, 8.0
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = min(0.0, min(y for _, y in points)), max(y for _, y in points)
    y_high = y_high if y_high > y_low else y_low + 1.0

    def px(x: float) -> float:
        return left + (x - x_low) / max(x_high - x_low, 1e-9) * (width - left - 8)

    def py(y: float) -> float:
        return height - bottom - (y - y_low) / (y_high - y_low) * (height - bottom - top)

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = y_low + share * (y_high - y_low)
        y = py(value)
        parts.append(f'<line x1="{left}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e2e8f0"/>')
        parts.append(
            f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end" font-size="10" fill="#64748b">{value:.3g}</text>'
        )
    for x in (x_low, x_high):
        parts.append(
            f'<text x="{px(x):.1f}" y="{height - 6}" text-anchor="middle" font-size="10" fill="#64748b">{x:g}</text>'
        )
    keys = []
    for (name, values), colour in zip(series, COLOURS, strict=False):
        if not values:
            continue
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in values)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        if len(values) <= 12:
            parts += [f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.6" fill="{colour}"/>' for x, y in values]
        keys.append(f'<span class="key" style="color:{colour}">&#9632; {html.escape(name)}</span>')
    return (
        f'<div class="card"><h3>{html.escape(title)}</h3><svg viewBox="0 0 {width:.0f} {height:.0f}" role="img">'
        f"{''.join(parts)}</svg><div>{''.join(keys)}</div></div>"
    )


def values_of(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    """(step, value) wherever the metric was logged."""
    return [(float(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]


def evaluation_table(rows: Sequence[Row]) -> str:
    """First and last evaluation per data source."""
    logged = [row for row in rows if row.get("val/exact_match") is not None]
    if not logged:
        return "<p>No evaluation yet.</p>"
    first, last = logged[0], logged[-1]
    sources = sorted({key.split("/")[1] for key in last if key.startswith("val/") and key.count("/") == 2} - {"macro"})
    lines = [
        f"<tr><th></th><th>questions</th><th>exact match, step {first['step']}</th><th>exact match, step {last['step']}</th>"
        f"<th>searches, step {first['step']}</th><th>searches, step {last['step']}</th></tr>"
    ]
    for label, prefix in [*((source, f"val/{source}") for source in sources), ("all", "val")]:
        cells = [f"{last.get(f'{prefix}/questions', 0):.0f}"]
        cells += [_number(row.get(f"{prefix}/exact_match")) for row in (first, last)]
        cells += [_number(row.get(f"{prefix}/searches")) for row in (first, last)]
        lines.append(f"<tr><td>{html.escape(label)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def trajectory_block(row: Row) -> str:
    """One trajectory; everything that a model or a page wrote is escaped."""
    right = row["reward_parts"].get("exact_match", 0) > 0
    verdict = f'<b class="{"good" if right else "bad"}">{"right" if right else "wrong"}</b>'
    turns = []
    for turn in row["turns"]:
        turns.append(f'<pre class="policy">{html.escape(turn["policy_text"])}</pre>')
        if turn["tool_text"]:
            turns.append(f'<pre class="tool">{html.escape(turn["tool_text"].strip())}</pre>')
    return (
        f"<details><summary>{verdict} · {row['searches']} searches · {html.escape(row['question'])}</summary>"
        f"<p>Gold: {html.escape(' | '.join(map(str, row['golden_answers'])))} · answer: {html.escape(str(row['answer']))} · "
        f"reward {row['reward']:.3g}</p>{''.join(turns)}</details>"
    )


def page(folder: Path) -> str:
    """The whole page.

    Raises:
        UserError: the folder holds no run.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: no run there (metrics.jsonl is missing)")
    rows = read_metrics(path)
    charts = [chart(title, [(name, values_of(rows, key)) for name, key in lines]) for title, lines in CHARTS]
    sections = []
    files = sorted((folder / "trajectories").glob("eval_step_*.jsonl"), key=_step_of) or sorted(
        (folder / "trajectories").glob("step_*.jsonl"), key=_step_of
    )
    for file in dict.fromkeys([*files[:1], *files[-1:]]):
        with file.open(encoding="utf-8") as lines:
            shown = [json.loads(line) for _, line in zip(range(SHOWN), lines, strict=False)]
        sections.append(f"<h2>What the model did at step {_step_of(file)}</h2>{''.join(map(trajectory_block, shown))}")
    title = html.escape(f"Run {folder.resolve().name}")
    steps = max((row["step"] for row in rows), default=0)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1><p>{steps} steps. Blue is what the policy "
        f"wrote, grey what it read.</p><h2>Evaluation</h2>{evaluation_table(rows)}<h2>Curves over steps</h2>"
        f'<div class="charts">{"".join(charts)}</div>{"".join(sections)}</body></html>\n'
    )


def _step_of(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def main(argv: list[str]) -> int:
    """Entry point of the sub-command."""
    parser = argparse.ArgumentParser(prog="searchr1 report", description="Write a page about a run.")
    parser.add_argument("run_dir", type=Path, help="the run's folder")
    parser.add_argument("--output", type=Path, help="the page (default RUN_DIR/report.html)")
    args = parser.parse_args(argv)
    output = args.output or args.run_dir / "report.html"
    output.write_text(page(args.run_dir), encoding="utf-8")
    print(f"report -> {output}")
    return 0
