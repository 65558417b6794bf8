from __future__ import annotations

from searchr1.report.curves import (
    MOST_POINTS,
    charts,
    compared_charts,
    comparison_table,
    evaluation_table,
    evaluations_of,
    points_of,
    tiles,
)


def by_title(found):
    return {chart["title"]: chart for chart in found}


def test_points_are_by_step_and_finite_and_the_last_of_a_step_counts():
    rows = [
        {"step": 2, "x": 1},
        {"step": 1, "x": 3},
        {"step": 2, "x": 5},
        {"step": 3, "x": float("nan")},
        {"step": 4, "x": None},
    ]
    assert points_of(rows, "x") == [(1, 3), (2, 5)]


def test_tiles_report_first_and_last_or_the_median():
    rows = [{"step": 1, "reward/mean": 0.25, "time/step": 9.0}, {"step": 2, "reward/mean": 0.5, "time/step": 1.0}]
    rows.append({"step": 3, "time/step": 2.0})
    assert tiles(rows) == [("Training reward", "0.25 → 0.5"), ("Seconds a step, median", "2")]
    assert tiles([]) == []


def test_the_table_compares_before_and_after():
    rows = [
        {"step": step, "val/exact_match": match, "val/questions": 30, "val/a/b/exact_match": match, "val/a/b/questions": 15}
        for step, match in ((0, 0.0), (4, 1.0), (9, 0.5))
    ]
    head, source, everything = evaluation_table(evaluations_of(rows))
    assert head[:4] == ["data source", "questions", "exact match, step\u00a00", "exact match, step\u00a09"]
    assert source[:4] == ["a/b", "15", "0.000", "0.500"]
    assert everything[:5] == ["all", "30", "0.000", "0.500", ""]
    assert len(evaluation_table(evaluations_of(rows[:1]))[0]) == 6
    assert evaluation_table([]) == []


def test_charts_of_one_run():
    rows = [{"step": s, "time/step": 5.0, "time/rollout": 3.0, "time/train": 1.5, "actor/kl": 0.1} for s in (1, 2)]
    rows.append(
        {"step": 2, "val/exact_match": 0.5}
        | {f"val/s{i}/{name}": 1.0 for i in range(8) for name in ("exact_match", "questions")}
    )
    found = charts(rows)
    named = by_title(found)
    assert [line["name"] for line in named["KL to the reference model"]["lines"]] == ["KL"]
    time = named["Where a step's time goes"]
    assert time["kind"] == "stack"
    assert [(line["name"], line["points"]) for line in time["lines"]] == [
        ("rollout", [(1, 3.0), (2, 3.0)]),
        ("training", [(1, 1.5), (2, 1.5)]),
        ("other", [(1, 0.5), (2, 0.5)]),
    ]
    sources = [[line["name"] for line in c["lines"]] for c in found if c["title"].startswith("Held-out exact match by")]
    assert sources == [[f"s{i}" for i in range(6)], ["s6", "s7"]]
    assert "Gradient norm" not in named
    assert charts([]) == []


def test_a_long_run_is_thinned_and_keeps_its_ends():
    rows = [{"step": step, "actor/kl": float(step)} for step in range(10_001)]
    points = by_title(charts(rows))["KL to the reference model"]["lines"][0]["points"]
    assert len(points) <= MOST_POINTS + 1
    assert (points[0], points[-1]) == ((0, 0), (10_000, 10_000))


def test_several_runs_are_compared_line_by_line():
    short = [{"step": 1, "reward/mean": 0.1, "reward/exact_match": 0.1}]
    long = [{"step": 1, "reward/mean": 0.2}, {"step": 2, "reward/mean": 0.3, "val/exact_match": 0.4, "val/a/b/questions": 5}]
    named = by_title(compared_charts(["one", "two"], [short, long]))
    assert [line["name"] for line in named["Reward: mean"]["lines"]] == ["one", "two"]
    assert [line["colour"] for line in named["Exact match: held-out"]["lines"]] == [1]
    assert "Exact match: training" in by_title(compared_charts(["one", "two"], [short, short]))
    head, first, second = comparison_table(["one", "two"], [short, long])
    assert (head[:2], first[:2], second[:2]) == (["run", "steps"], ["one", "1"], ["two", "2"])
    assert second[head.index("Held-out exact match")] == "0.4"
    assert comparison_table(["none"], [[]])[1][:2] == ["none", "0"]
