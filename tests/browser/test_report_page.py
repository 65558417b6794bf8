"""The report, in a real browser."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from support.chromium import Tab, chromium, find_chromium
from support.runs import HOSTILE, evaluation, hostile_row, make_run, row, write_metrics, write_settings, write_step

from searchr1.commands.report import main

pytestmark = [pytest.mark.browser, pytest.mark.skipif(find_chromium() is None, reason="no Chromium")]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    run = make_run(tmp_path_factory.mktemp("runs") / "my run")
    write_settings(run, 1, 1e-6)
    write_settings(run, 11, 2e-6)
    main([str(run)])
    return (run / "report.html").as_uri()


async def texts(tab: Tab, selector: str) -> list[str]:
    return list(await tab.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(node => node.textContent)"))


async def choose(tab: Tab, control: str, value: str) -> None:
    await tab.run(f"$({control!r}).value = {json.dumps(value)}; $({control!r}).dispatchEvent(new Event('change'))")


async def there(tab: Tab, *selectors: str) -> None:
    for selector in selectors:
        await tab.until(f"document.querySelector({json.dumps(selector)}) !== null")


async def search(tab: Tab, query: str) -> None:
    await tab.run(f"$('query').value = {json.dumps(query)}; $('query').dispatchEvent(new Event('input'))")


async def press(tab: Tab, *keys: str) -> None:
    for key in keys:
        text = {"text": key} if len(key) == 1 else {}
        await tab.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        await tab.send("Input.dispatchKeyEvent", type="keyUp", key=key)


async def counted(tab: Tab, text: str) -> None:
    await tab.until(f"$('count').textContent === {json.dumps(text)}")


async def quiet(tab: Tab) -> None:
    """Nothing was complained about, and nothing was asked for."""
    assert await tab.run("performance.getEntriesByType('resource').length") == 0
    assert tab.console == []


def test_what_happened_is_shown_in_words_numbers_and_curves(page, tmp_path):
    async def run():
        async with chromium() as tab:
            await tab.open(page)
            await there(tab, ".item")
            assert await tab.run("$('title').textContent") == "my run"
            assert await texts(tab, ".story h2") == ["The model learned to search."]
            assert "rose from 10% to 90% between step 0 and step 20" in (await texts(tab, ".story p"))[0]
            assert "0.1 → 0.9" in await texts(tab, ".tile b")
            assert "Where a step's time goes" in await texts(tab, "figcaption")
            assert (await texts(tab, "#table tr:last-child td"))[:4] == ["all", "60", "0.100", "0.900"]
            await tab.run(
                "(() => { const chart = document.querySelectorAll('#charts svg')[1], box = chart.getBoundingClientRect();"
                "chart.dispatchEvent(new PointerEvent('pointermove', { clientX: box.right - 5, clientY: box.top + 9 })) })()"
            )
            assert "held-out 0.9" in await tab.run("$('tip').innerText")
            assert await texts(tab, "#change-list b") == ["From step 11 on"]
            assert await texts(tab, "#change-list li") == ["actor.optim.lr: 1e-06 -> 2e-06"]
            marked = (
                "[...document.querySelectorAll('#charts svg')].map(chart => chart.querySelectorAll('line.change').length)"
            )
            # Exact match has steps 0 to 20; the training reward's two steps come before the change.
            assert (await tab.run(marked))[:2] == [0, 1]
            # The example's second link opens the rollout that was right.
            await tab.run("document.querySelectorAll('.example .link')[1].click()")
            await there(tab, "#detail .answer")
            assert "evaluation, step 20" in await tab.run("$('detail').innerText")
            await tab.screenshot(tmp_path / "report.png")
            assert (tmp_path / "report.png").stat().st_size > 5000
            await quiet(tab)

    asyncio.run(run())


def test_search_and_filters(page):
    async def run():
        async with chromium() as tab:
            await tab.open(page)
            await counted(tab, "60 trajectories")
            assert await tab.run("$('scope').selectedOptions[0].textContent") == "evaluation, step 20 (60)"
            await choose(tab, "scope", "all")
            await counted(tab, "212 trajectories")
            await search(tab, '"FACT 0 of 7" thing')
            await counted(tab, "3 of 212 trajectories")
            await tab.run("document.querySelector('.item').click()")
            await tab.until("CSS.highlights.get('found').size === 2")
            await search(tab, "no such words")
            await counted(tab, "0 of 212 trajectories")
            await tab.run("$('clear').click()")
            await counted(tab, "212 trajectories")
            for flag, number in (("wrong", 54 + 30 + 6 + 16), ("length", 2), ("failures", 2), ("silent", 2)):
                await tab.run(f"$('flag-{flag}').click()")
                await counted(tab, f"{number} of 212 trajectories")
                assert await tab.run(f"$('flag-{flag}').getAttribute('aria-pressed')") == "true"
                await tab.run(f"$('flag-{flag}').click()")
            await choose(tab, "source", "two_hop")
            await counted(tab, "90 of 212 trajectories")
            await choose(tab, "order", "searches")
            await tab.until("document.querySelector('.item .facts').textContent.includes('2 searches')")
            await choose(tab, "scope", "train")
            await counted(tab, "32 trajectories")
            assert await tab.run("$('flag-invalid').disabled")
            await quiet(tab)

    asyncio.run(run())


def test_a_trajectory_in_full(page):
    async def run():
        async with chromium() as tab:
            await tab.open(page)
            await search(tab, '"thing 1?"')
            await counted(tab, "1 of 60 trajectories")
            await tab.run("document.querySelector('.item').click()")
            await tab.until("document.querySelectorAll('#detail .block').length === 8")
            heads = [text.split("12 tokens")[0] for text in await texts(tab, "#detail .block h4")]
            assert heads == ["think", "search", "information"] * 2 + ["think", "answer"]
            seen = await tab.run("$('detail').innerText")
            for part in (
                "What is thing 1?",
                "ended by",
                "its answer",
                "0.25 s",
                "Page 1",
                "rollout 1",
            ):
                assert part in seen
            assert await texts(tab, ".part") == ["reward1", "exact_match1", "format0.25"]
            # Shading: every token by its probability, with its value under the pointer.
            assert await tab.run("document.querySelectorAll('#detail .block .token.p0').length") > 10
            assert await tab.run("document.querySelectorAll('#detail .block .token.p1').length") > 10
            assert (await texts(tab, ".block.search .text"))[0] == "<search> fact 0 of 1 </search>"
            await tab.run(
                "document.querySelector('.block .token.p1').dispatchEvent(new PointerEvent('pointerenter', { clientX: 5 }))"
            )
            tip = await tab.run("$('tip').innerText")
            assert "probability 0.500" in tip
            assert "log-probability -0.693" in tip
            await tab.run("$('shade').click()")
            await tab.until("!document.querySelector('#detail .token')")
            assert (await texts(tab, ".block.search .text"))[0] == "<search> fact 0 of 1 </search>"
            # The same question at other steps.
            assert await texts(tab, ".same .chip") == ["✓ eval 0", "✓ eval 10", "✓ eval 20"]
            await tab.run("document.querySelector('.same .chip').click()")
            await tab.until("$('detail').innerText.includes('evaluation, step 0')")
            assert await tab.run("$('scope').selectedOptions[0].textContent") == "evaluation, step 0 (60)"
            await tab.run("$('beside').click()")
            await tab.until("document.querySelectorAll('.column').length === 3")
            assert [head.split()[-1] for head in await texts(tab, ".column > h3:first-child")] == ["0", "10", "20"]
            await quiet(tab)

    asyncio.run(run())


def test_keys_and_links(page):
    async def run():
        async with chromium() as tab:
            await tab.open(page)
            await there(tab, "#detail .block")
            assert await tab.run("location.hash") == ""
            await press(tab, "/")
            assert await tab.run("document.activeElement.id") == "query"
            await tab.send("Input.insertText", text='"thing 4')
            await counted(tab, "11 of 60 trajectories")
            await press(tab, "Enter", "ArrowDown", "ArrowDown")
            await tab.until("document.querySelector('.item.chosen') && $('detail').innerText.includes('thing 41?')")
            active = await tab.run("$($('list').getAttribute('aria-activedescendant')).getAttribute('aria-posinset')")
            assert active == "3"
            await press(tab, "k")
            await tab.until("$('detail').innerText.includes('thing 40?')")
            await press(tab, "[")
            await tab.until("$('detail').innerText.includes('evaluation, step 10')")
            await press(tab, "t")
            await tab.until("!document.querySelector('#detail .token')")
            await press(tab, "s")
            await tab.until("document.querySelectorAll('.column').length === 3")
            await press(tab, "?")
            assert await tab.run("$('help').open")
            address = await tab.run("location.href")
            assert "row=0%2Feval%2F10%2F0%2Fone_hop%2F40" in address
            await quiet(tab)
            # The address alone brings another reader to the same trajectory.
            await tab.open("about:blank#")
            await tab.send("Page.navigate", url=address)
            await tab.until("typeof $ === 'function' && /thing 40[^]*step 10/.test($('detail').innerText)")
            await tab.send("Page.navigate", url=page + "#row=0/eval/10/0/nothing")
            await tab.until("$('problem').textContent === 'The trajectory of this link is not in the page.'")

    asyncio.run(run())


def test_what_models_and_pages_wrote_is_text_and_never_markup(tmp_path):
    run = make_run(tmp_path / "<img src=x onerror=window.hit=5>")
    write_step(run, "eval_step_0", [hostile_row()])
    write_step(run, "eval_step_20", [hostile_row() | {"reward_parts": {"exact_match": 1.0}}])
    name = f"val/{HOSTILE}/"
    write_metrics(run, [evaluation(30, 54, 2.0) | {name + "questions": 1, name + "exact_match": 0.5, HOSTILE: 3}])
    main([str(run), "--output", str(tmp_path / "report.html")])

    async def look():
        async with chromium() as tab:
            await tab.open((tmp_path / "report.html").as_uri())
            await there(tab, "#detail .block")
            assert "<script>window.hit=1</script>" in await tab.run("$('detail').innerText")
            assert await tab.run("$('title').textContent") == "<img src=x onerror=window.hit=5>"
            for script in ("$('shade').click()", "$('beside').click()"):
                await tab.run(script)
                await asyncio.sleep(0.2)
            assert "<script>window.hit=1</script>" in await tab.run("document.querySelector('.columns').innerText")
            await search(tab, HOSTILE[:30])
            await counted(tab, "1 trajectory")
            await tab.run(
                "document.querySelectorAll('#charts svg').forEach(s => s.dispatchEvent(new PointerEvent('pointermove')))"
            )
            assert "window.hit" in await tab.run("$('charts').innerText"), "the data source is in a legend"
            assert (
                await tab.run("document.querySelectorAll('img, iframe, object, a, form, main script, main style').length")
                == 0
            )
            assert await tab.run("window.hit") is None
            assert await tab.run("/[\\u202e\\x1b]/.test(document.body.innerText)") is False
            await quiet(tab)

    asyncio.run(look())


def test_what_is_missing_is_reported(tmp_path):
    run = make_run(tmp_path / "run")
    bare = row(3)
    for one in bare["turns"]:
        del one["token_chars"], one["token_surprise"]
    write_step(run, "eval_step_20", [bare])
    main([str(run)])
    whole = (run / "report.html").read_text()
    (tmp_path / "cut.html").write_text(whole[: whole.index('<script type="text/plain" id="chunk-0">')])

    async def look():
        async with chromium() as tab:
            await tab.open((run / "report.html").as_uri())
            await there(tab, "#detail .block")
            assert await tab.run("$('shade').disabled")
            assert await tab.run("!document.querySelector('.shades')")
            await tab.open((tmp_path / "cut.html").as_uri())
            await tab.until("$('problem').textContent.includes('this page is not complete')")

    asyncio.run(look())


@pytest.mark.slow
def test_ten_thousand_trajectories_stay_responsive(tmp_path):
    run = tmp_path / "large"
    filler = " ".join(f"word{i}" for i in range(1200))
    for step in range(10):
        rows = [row(1000 * step + i, searches=3) for i in range(1000)]
        for one in rows:
            one["turns"][0]["tool_text"] += filler
        write_step(run, f"eval_step_{step}", rows)
        write_metrics(run, [evaluation(step, 6 * step, 3.0)])
    main([str(run)])

    async def look():
        async with chromium() as tab:
            started = time.monotonic()
            await tab.open((run / "report.html").as_uri())
            await there(tab, ".item", "#detail .block")
            seconds = time.monotonic() - started
            print(f"first view after {seconds:.2f} s, page of {(run / 'report.html').stat().st_size / 1e6:.0f} MB")
            assert seconds < 20, "two seconds on a machine of one's own"
            await choose(tab, "scope", "all")
            await counted(tab, "10,000 trajectories")
            assert await tab.run("document.querySelectorAll('.item').length") < 60
            await search(tab, '"fact 2 of 7777"')
            await counted(tab, "1 of 10,000 trajectories")

    asyncio.run(look())
