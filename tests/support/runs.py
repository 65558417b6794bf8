"""A small run on disk, for the tests of the pages about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HOSTILE = (
    "</script><script>window.hit=1</script><img src=x onerror='window.hit=2'><svg onload='window.hit=3'></svg>"
    "<style>*{display:none}</style><a href='javascript:window.hit=4'>link</a> \"'&lt; \u202e \x1b \u2028 ]]>"
)


def row(
    number: int, *, rollout_id: int = 0, right: bool = True, searches: int = 1, source: str = "one_hop", **fields: Any
) -> dict[str, Any]:
    """A logged trajectory: some searches, then an answer; every word is a token, of probability 0.5 and 0.97 in turn."""
    turns = [
        turn(f"<think> I need fact {n} </think> <search> fact {n} of {number} </search>", "search", n)
        for n in range(searches)
    ]
    answer = "right" if right else "wrong"
    turns.append(turn(f"<think> done </think> <answer> {answer} </answer>", "answer"))
    score = float(right)
    return {
        "id": f"{source}/{number}",
        "data_source": source,
        "replica": rollout_id,
        "question": f"What is thing {number}?",
        "golden_answers": ["right"],
        "answer": answer,
        "reward": score,
        "reward_parts": {"reward": score, "exact_match": score, "format": 0.25},
        "stop": "answer",
        "forced_final": False,
        "searches": searches,
        "response_length": 50 + number,
        "policy_tokens": sum(one["policy_tokens"] for one in turns),
        "weight_version": 0,
        "turns": turns,
    } | fields


def turn(text: str, action: str, number: int = 0, **fields: Any) -> dict[str, Any]:
    """One turn of a trajectory."""
    words = [word + " " for word in text.split(" ")]
    words[-1] = words[-1][:-1]
    found = f'\n\n<information>Doc 1(Title: "Page {number}") passage number {number}</information>\n\n'
    return {
        "policy_text": text,
        "action": action,
        "policy_tokens": len(words),
        "queries": [f"fact {number}"] if action == "search" else [],
        "tool_text": found if action == "search" else "",
        "tool_tokens": 12 if action == "search" else 0,
        "tool_seconds": 0.25,
        "tool_error": None,
        "token_chars": [len(word) for word in words],
        "token_surprise": [693 if i % 2 else 30 for i in range(len(words))],
    } | fields


def hostile_row() -> dict[str, Any]:
    """A trajectory whose every text tries to break out."""
    wicked = turn(f"<think>{HOSTILE}</think><search>{HOSTILE}</search>", "search", queries=[HOSTILE], tool_text=HOSTILE)
    made_up = turn(f"<information>{HOSTILE}</information>{HOSTILE}", "invalid", tool_error=HOSTILE, token_chars=None)
    return row(
        99, source=HOSTILE, question=HOSTILE, golden_answers=[HOSTILE], answer=HOSTILE, right=False, stop=HOSTILE,
        reward_parts={HOSTILE: 1.0, "exact_match": 0.0}, turns=[wicked, made_up],
    )  # fmt: skip


def write_step(run: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """A trajectory file."""
    folder = run / "trajectories"
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.partial"
    partial.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    partial.replace(folder / f"{name}.jsonl")


def write_metrics(run: Path, rows: list[dict[str, Any]], mode: str = "a") -> None:
    """Lines of metrics.jsonl."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "metrics.jsonl").open(mode) as file:
        file.write("".join(json.dumps(one) + "\n" for one in rows))


def write_settings(run: Path, first_step: int, rate: float) -> None:
    """What a run records when it is started or resumed."""
    (run / "configs").mkdir(exist_ok=True)
    (run / f"configs/step_{first_step}.yaml").write_text(f"actor:\n  optim:\n    lr: {rate}\n")


def evaluation(step: int, right: int, searches: float) -> dict[str, Any]:
    """An evaluation's metrics."""
    share = right / 60
    return {"step": step, "val/exact_match": share, "val/f1": share, "val/searches": searches, "val/questions": 60}


def make_run(run: Path) -> Path:
    """Evaluations of 60 questions at steps 0, 10 and 20, better each time, and two training steps."""
    for step, right in ((0, 6), (10, 30), (20, 54)):
        rows = [
            row(i, right=i < right, searches=1 + (step > 0 and i % 2), source=("one_hop", "two_hop")[i % 2])
            for i in range(60)
        ]
        write_step(run, f"eval_step_{step}", rows)
        write_metrics(run, [evaluation(step, right, 1.0 + step / 20)])
    for step in (1, 2):
        rows = [row(i, rollout_id=r, right=r > 1) for i in range(4) for r in range(4)]
        rows[0] |= {"stop": "length", "answer": None, "right": False}
        rows[1]["turns"][0] |= {"tool_error": "no answer within 20 s"}
        write_step(run, f"step_{step}", rows)
        write_metrics(run, [{"step": step, "reward/mean": step / 4, "time/step": 2.0, "time/rollout": 1.0}])
    return run
