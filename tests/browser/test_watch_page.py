"""`searchr1 watch`, in a real browser, while a run goes on."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import sys
import threading

import pytest
from support.chromium import chromium, find_chromium
from support.runs import HOSTILE, evaluation, hostile_row, make_run, row, write_metrics, write_step

from searchr1.report.watch import WatchedRuns, WatchServer

pytestmark = [pytest.mark.browser, pytest.mark.skipif(find_chromium() is None, reason="no Chromium")]


@contextlib.contextmanager
def served(run, port=0):
    with WatchServer(("127.0.0.1", port), WatchedRuns([run]), []) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_a_run_is_watched_from_before_its_first_step(tmp_path):
    run = tmp_path / "run"

    async def look(port):
        async with chromium() as tab:
            await tab.open(f"http://127.0.0.1:{port}/")
            await tab.until("$('problem').textContent.includes('There is no folder')")
            assert await tab.run("$('viewer').hidden")
            make_run(run)
            await tab.until("!$('viewer').hidden && $('problem').hidden")
            await tab.until("$('scope').selectedOptions[0].textContent === 'evaluation, step 20'")
            await tab.until("$('count').textContent === '60 trajectories'")
            await tab.until("document.querySelectorAll('#detail .block').length > 2")
            # The next evaluation appears, and is followed as long as nobody reads an older one.
            write_step(run, "eval_step_30", [row(i, right=True) for i in range(50)])
            write_metrics(run, [evaluation(30, 60, 2.5)])
            await tab.until("$('scope').selectedOptions[0].textContent === 'evaluation, step 30'")
            await tab.until("$('count').textContent === '50 trajectories'")
            await tab.until("document.querySelector('.tile b').textContent === '0.1 → 1'")
            await tab.run("document.querySelectorAll('.item')[2].click()")
            await tab.until("$('detail').innerText.includes('thing 2?')")
            assert await tab.run("document.querySelectorAll('.same .chip').length") == 4 + 8
            write_step(run, "eval_step_40", [hostile_row()])
            write_metrics(
                run, [evaluation(40, 60, 2.5) | {f"val/{HOSTILE}/questions": 1, f"val/{HOSTILE}/exact_match": 1.0}]
            )
            await tab.until("$('scope').options.length === 7")
            assert "step 30" in await tab.run("$('scope').selectedOptions[0].textContent")
            assert "thing 2?" in await tab.run("$('detail').innerText")
            await tab.run("$('scope').value = '0-eval-40'; $('scope').onchange()")
            await tab.until("$('count').textContent === '1 trajectory'")
            await tab.run("document.querySelector('.item').click()")
            await tab.until("$('detail').innerText.includes('window.hit=1')")
            assert await tab.run("window.hit") is None
            assert await tab.run("document.querySelectorAll('img, a, main script').length") == 0
            # Started again: what is gone is not shown any more.
            shutil.rmtree(run)
            write_step(run, "eval_step_0", [row(i, right=False) for i in range(7)])
            write_metrics(run, [evaluation(0, 0, 1.0)])
            await tab.until("$('count').textContent === '7 trajectories' && $('scope').options.length === 1")
            await tab.until("$('detail').innerText.includes('thing 0?')")
            assert tab.console == []

    with served(run) as port:
        asyncio.run(look(port))


def test_an_evaluation_that_is_being_written_grows(tmp_path):
    run = tmp_path / "run"
    write_step(run, "eval_step_0", [row(i) for i in range(3)])
    path = run / "trajectories" / "eval_step_0.jsonl"

    async def look(port):
        async with chromium() as tab:
            await tab.open(f"http://127.0.0.1:{port}/")
            await tab.until("$('count').textContent === '3 trajectories'")
            write_step(tmp_path / "more", "rows", [row(i) for i in range(3, 60)])
            with path.open("ab") as file:
                file.write((tmp_path / "more/trajectories/rows.jsonl").read_bytes())
            await tab.until("$('count').textContent === '60 trajectories'")
            assert (
                await tab.run("document.querySelector('.story h2').textContent")
                == "100% of 60 questions are answered exactly right."
            )
            for number in (1, 59):
                await tab.run(f"$('query').value = '\"thing {number}?\"'; $('query').oninput()")
                await tab.until(
                    f"$('spacer').innerText.includes('thing {number}?') && $('count').textContent.startsWith('1 of')"
                )
                await tab.run("document.querySelector('.item').click()")
                await tab.until(f"$('detail').innerText.includes('thing {number}?')")
            assert tab.console == []

    with served(run) as port:
        asyncio.run(look(port))


@contextlib.contextmanager
def served_by_the_command(run, port=0):
    """A process of its own, which takes its open connections with it when it ends."""
    words = [sys.executable, "-m", "searchr1.cli", "watch", str(run), "--port", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://127.0.0.1:(\d+)/", process.stdout.readline())
        assert found is not None
        yield int(found[1])
    finally:
        process.kill()
        process.communicate()


def test_a_server_that_stops_and_comes_back_is_reported(tmp_path):
    run = make_run(tmp_path / "run")

    async def look():
        async with chromium() as tab:
            with served_by_the_command(run) as port:
                await tab.open(f"http://127.0.0.1:{port}/#row=0/eval/10/0/one_hop/4")
                await tab.until("$('detail').innerText.includes('evaluation, step 10')")
                assert await tab.run("$('live').className") == "live on"
            await tab.until("$('live').className === 'live off'")
            assert "the server does not answer" in await tab.run("$('live').textContent")
            await tab.run("$('scope').value = '0-train-1'; $('scope').onchange()")
            await tab.until("$('problem').textContent.includes('could not be read')")
            with served_by_the_command(run, port):
                await tab.until("$('live').className === 'live on'")
                await tab.run("$('scope').onchange()")
                await tab.until("$('count').textContent === '16 trajectories' && $('problem').hidden")

    asyncio.run(look())
