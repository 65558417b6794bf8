"""Tables, the page and the files; hostile text in any of them; published numbers."""

from __future__ import annotations

import asyncio
import json
from html.parser import HTMLParser

import pytest
from support.chromium import chromium, find_chromium

from searchr1.evaluation.page import page
from searchr1.evaluation.published import LABELS, PUBLISHED, nearest
from searchr1.evaluation.result_files import write_results
from searchr1.evaluation.results import RIGHT_SHOWN, WRONG_SHOWN, Results, method_result
from searchr1.evaluation.tables import markdown, plain
from searchr1.tracking.trajectory_log import trajectory_row

HOSTILE = (
    '</title></style><script>window.hit=1</script><img src=x onerror="window.hit=2">| [x](javascript:alert(1)) `*_\n# y'
)


def rows_of(trajectories):
    return [{"number": t.sample.index, **trajectory_row(t)} for t in trajectories]


@pytest.fixture
def make_results(make_trajectory):
    def make(sources=("nq", "one_hop"), methods=("direct", "search"), model="models/mine", billions=3.0, **fields):
        found = {}
        for method in methods:
            trajectories = [make_trajectory(20 * s + i, source=name, right=i % 3 == 0, **fields)
                            for s, name in enumerate(sources) for i in range(12)]  # fmt: skip
            found[method] = method_result(rows_of(trajectories), len(trajectories), "x", "greedy", 0)
        return Results(model, billions, found, {"model": model})

    return make


class Tags(HTMLParser):
    """Which tags and attributes a page really has."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text.append(data)


def test_all_files_are_written_and_agree(make_results, tmp_path):
    results = make_results()
    metrics = write_results(tmp_path, results)
    assert json.loads((tmp_path / "eval.json").read_text()) == metrics
    assert metrics["val/exact_match"] == pytest.approx(1 / 3)
    assert metrics["val/nq/questions"] == 12
    everything = json.loads((tmp_path / "results.json").read_text())
    found = everything["methods"]["search"]
    value = found["sets"]["nq"]["scores"]["exact_match"]
    assert value["low"] < value["mean"] == metrics["val/nq/exact_match"] < value["high"]
    assert found["macro"]["exact_match"]["mean"] == metrics["val/macro/exact_match"]
    assert everything["published"][0]["values"]["nq"] == 0.106
    document = (tmp_path / "results.md").read_text()
    assert "| **mine, search loop** |" in document
    assert "| Direct inference (Qwen2.5-3B, base or instruct) | .106 |" in document
    assert not list(tmp_path.glob("*.partial"))


def test_the_same_rows_in_another_order_give_the_same_files(make_results, make_trajectory, tmp_path):
    rows = rows_of([make_trajectory(i, right=i % 3 == 0) for i in range(12)])
    pages = [page(Results("m", 3.0, {"search": method_result(r, 12, "x", "greedy", 0)})) for r in (rows, rows[::-1])]
    assert pages[0] == pages[1]


def test_published_rows_stand_beside_sets_of_the_papers_only(make_results):
    assert "Search-R1" in make_results(sources=("NQ",)).text()
    text = make_results(sources=("one_hop",)).text()
    assert "Search-R1" not in text
    assert "direct inference" in text
    assert len(make_results(sources=("one_hop",), methods=("search",)).tables()) == 1


def test_published_averages_are_over_the_sets_that_were_evaluated(make_results):
    table = make_results(sources=("nq", "popqa", "mine"), methods=("search",)).tables()[0]
    row = next(row for row in table.rows if row[0].startswith("RAG ("))
    assert row[1:3] == [".348", ".387"]
    assert row[3:] == ["–", f"{(0.348 + 0.387) / 2:.3f}"[1:]]
    assert not any(row[0].startswith("AutoRefine") for row in table.rows)
    every = make_results(sources=tuple(LABELS), methods=("search",)).tables()[0]
    assert next(row for row in every.rows if row[0].startswith("AutoRefine"))[-1] == ".405"


def test_each_published_average_is_its_values_mean():
    for row in PUBLISHED:
        assert len(row.values) in (0, 7)
        if row.values and row.average != 0.239:  # IRCoT at 7B, as the paper has it
            assert row.average == pytest.approx(sum(row.values) / 7, abs=0.0011), row


@pytest.mark.parametrize(("billions", "models"), [(3.09, {"3B"}), (0.002, {"3B"}), (8.0, {"7B"}), (70, {"14B"})])
def test_the_nearest_size_is_shown(billions, models):
    rows = nearest(billions)
    assert {model for model in ("3B", "7B", "14B") if any(model in row.model for row in rows)} == models
    assert len(nearest(None)) == len(PUBLISHED)


def test_examples_are_few_wrong_and_right_by_number(make_trajectory):
    rows = rows_of([make_trajectory(i, right=i % 2 == 0) for i in range(40)])
    examples = method_result(rows[::-1], 40, "x", "greedy", 0).examples
    assert [row["number"] for row in examples] == [1, 3, 5, 7][:WRONG_SHOWN] + [0, 2][:RIGHT_SHOWN]


def test_text_of_models_and_files_stays_text_in_the_page(make_results, make_trajectory):
    results = make_results(sources=(HOSTILE,), model=HOSTILE)
    hostile = make_trajectory(0, source=HOSTILE, answer=HOSTILE, right=False, stop=HOSTILE)
    hostile.sample.question = HOSTILE
    hostile.sample.golden_answers = [HOSTILE]
    hostile.turns[0].policy_text = hostile.turns[0].tool_text = hostile.turns[0].tool_error = HOSTILE
    results.methods["search"] = method_result(rows_of([hostile]), 1, "x", "greedy", 0)
    results.methods.pop("direct")
    text = page(results)
    found = Tags(text)
    allowed = set("html head meta title style body main h1 h2 h4 p div span b small table tr th td".split())
    allowed |= set("svg line circle text details summary".split())
    assert found.tags <= allowed, found.tags - allowed
    assert not {name for name in found.attributes if name.startswith("on") or name in ("src", "href")}
    assert "".join(found.text).count("window.hit=1") > 6
    assert "default-src 'none'" in text


def test_failed_tool_calls_are_warned_of_everywhere(make_trajectory):
    lost = make_trajectory(1)
    lost.turns[0].tool_error = "no answer"
    results = Results("m", 3.0, {"search": method_result(rows_of([make_trajectory(0), lost]), 2, "x", "greedy", 0)})
    words = "50.0% of the tool calls failed. The same command asks those questions again."
    table = results.tables()[-1]
    assert f"WARNING: {words}" in results.text()
    assert f"**{words}**" in markdown(table)
    assert f'<b class="bad">{words}</b>' in page(results)


def test_hostile_text_stays_in_its_cell_of_a_markdown_table(make_results):
    table = make_results(sources=(HOSTILE,), model=HOSTILE).tables()[0]
    lines = markdown(table).splitlines()
    bars = {line.count("|") - line.count("\\|") for line in lines if line.startswith("|")}
    assert bars == {len(table.head) + 1}
    assert not any("<" in line for line in lines)
    assert not any(line.startswith("# ") for line in lines)
    assert plain(table)


@pytest.mark.browser
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium")
def test_the_page_loads_nothing_and_runs_nothing(make_results, tmp_path):
    write_results(tmp_path, make_results(sources=("nq", HOSTILE), model=HOSTILE))

    async def run():
        async with chromium() as tab:
            await tab.open((tmp_path / "results.html").as_uri())
            assert await tab.run("typeof window.hit") == "undefined"
            assert await tab.run("document.scripts.length + document.images.length") == 0
            assert await tab.run("performance.getEntriesByType('resource').length") == 0
            assert await tab.run("document.querySelectorAll('table').length") == 4
            assert await tab.run("document.documentElement.scrollWidth <= innerWidth")
            await tab.run("document.querySelector('details summary').click()")
            assert await tab.run("document.querySelector('details').open")
            assert tab.console == []

    asyncio.run(run())
