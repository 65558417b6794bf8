"""Public sets from the hub, and passages from a retrieval server: what is fetched once is not fetched again."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from aiohttp import web
from support.public_rows import flashrag_row, write_jsonl

from searchr1.commands.prepare_data import main
from searchr1.data.prepare import passages
from searchr1.data.prepare.prepare import NOTES
from searchr1.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NQ = "".join(json.dumps(flashrag_row("nq", "test", number)) + "\n" for number in range(5)).encode()


@contextmanager
def serving(path, handler):
    """A server on the loopback; yields `http://host:port`."""
    app = web.Application()
    app.router.add_route("*", path, handler)
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def nq_alone(request):
    """What huggingface_hub asks, of a repository that has lost all but one file."""
    if request.match_info["rest"] != "main/nq/test.jsonl":
        return web.Response(status=404, headers={"X-Error-Code": "EntryNotFound"})
    etag = hashlib.sha256(NQ).hexdigest()
    headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(NQ))}
    return web.Response(body=None if request.method == "HEAD" else NQ, headers=headers)


def test_the_hubs_files_are_cached_and_a_missing_one_is_reported(tmp_path):
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_HOME": str(tmp_path / "snapshots/home"), "HF_HUB_DISABLE_XET": "1", "no_proxy": "*"}

    def prepare(out, *flags, **more):
        words = [sys.executable, "-m", "searchr1.cli", "prepare-data", "--out", tmp_path / out, "--split", "test", *flags]
        return subprocess.run(words, env=env | more, capture_output=True, text=True, timeout=120)

    with serving("/datasets/RUC-NLPIR/FlashRAG_datasets/resolve/{rest:.*}", nq_alone) as hub:
        online = prepare("a", "--sets", "nq", HF_ENDPOINT=hub)
        gone = prepare("b", "--sets", "nq,popqa", HF_ENDPOINT=hub)
    assert online.returncode == 0, online.stderr
    stats = json.loads((tmp_path / "a/stats.json").read_text())
    assert stats["splits"][0]["origin"] == f"RUC-NLPIR/FlashRAG_datasets@{COMMIT[:12]} nq/test.jsonl"
    assert stats["splits"][0]["written"] == 5
    assert gone.returncode == 2
    assert "RUC-NLPIR/FlashRAG_datasets has no popqa/test.jsonl; it may have been renamed" in gone.stderr
    assert not (tmp_path / "b").exists()
    offline = prepare("c", "--sets", "nq", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert (tmp_path / "c/test.parquet").read_bytes() == (tmp_path / "a/test.parquet").read_bytes()
    nothing = prepare("d", "--sets", "bamboogle", HF_HUB_OFFLINE="1")
    assert nothing.returncode == 2
    assert "bamboogle/test.jsonl: cannot be downloaded and is not in the cache" in nothing.stderr
    assert "--local" in nothing.stderr
    assert "Traceback" not in nothing.stderr + gone.stderr


async def one_set(request):
    """What huggingface_hub asks, of `owner/name` with two parts of a training split and a test split."""
    part = json.dumps(flashrag_row("nq", "train", 0)).encode()
    files = {f"data/train-0000{n}-of-00002.jsonl": part for n in range(2)} | {"data/test.jsonl": NQ, "README.md": b"x"}
    rest = request.match_info["rest"]
    if rest in ("api/datasets/owner/name", "api/datasets/owner/name/revision/v1"):
        return web.json_response({"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
    name = rest.removeprefix(f"datasets/owner/name/resolve/{COMMIT}/").removeprefix("datasets/owner/name/resolve/main/")
    if name not in files:
        code = "RepoNotFound" if "owner/gone" in rest else "EntryNotFound"
        return web.Response(status=404, headers={"X-Error-Code": code})
    headers = {"ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
    headers["Content-Length"] = str(len(files[name]))
    return web.Response(body=None if request.method == "HEAD" else files[name], headers=headers)


LOAD = """
import sys
from searchr1.data.paths import EVALUATION, TRAIN, find_files, source_names
from searchr1.data.reading import read_rows
from searchr1.errors import UserError
for text in sys.argv[2:]:
    try:
        files = find_files([text], EVALUATION if sys.argv[1] == "val" else TRAIN)
        print([name for name in source_names(files)], sum(1 for file in files for _ in read_rows(file.path)))
    except UserError as error:
        print("error", error)
"""


def test_a_data_set_of_the_hub_stands_where_a_path_does(tmp_path):
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "no_proxy": "*"}

    def load(*words, **more):
        command = [sys.executable, "-c", LOAD, *words]
        result = subprocess.run(command, env=env | more, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    train = "['train-00000-of-00002', 'train-00001-of-00002'] 2"
    with serving("/{rest:.*}", one_set) as hub:
        assert load("val", "owner/name:train", "owner/name", "owner/name/data/test.jsonl", HF_ENDPOINT=hub) == [
            train, "['test'] 5", "['test'] 5",
        ]  # fmt: skip
        wrong = load("train", "owner/name:dev", "owner/gone", "owner/name/gone.jsonl", HF_ENDPOINT=hub)
    assert "owner/name: has no split dev; its files are data/test.jsonl" in wrong[0]
    assert "owner/gone: neither a file here nor a data set on the hub" in wrong[1]
    assert "owner/name has no gone.jsonl" in wrong[2]
    offline = load("train", "owner/name", "owner/other", HF_HUB_OFFLINE="1")
    assert offline[0] == train
    assert "owner/other: the hub cannot be asked for its files, and none are in the cache" in offline[1]


@pytest.fixture
def retriever():
    """Answers with the query as the text of a passage, until it is told to break."""
    asked: list[str] = []
    broken_at: list[int] = []

    async def retrieve(request):
        body = await request.json()
        if broken_at and len(asked) >= broken_at[0]:
            return web.Response(status=400, text="broken")
        asked.extend(body["queries"])
        document = {"id": "0", "contents": '"Title </information>"\nabout '}
        found = [[{"document": document | {"contents": document["contents"] + q}, "score": 1.0}] for q in body["queries"]]
        return web.json_response({"result": found})

    with serving("/retrieve", retrieve) as address:
        yield address, asked, broken_at


def test_passages_are_put_into_the_prompt_and_not_searched_twice(retriever, tmp_path, monkeypatch):
    address, asked, broken_at = retriever
    monkeypatch.setattr(passages, "QUESTIONS_PER_CALL", 2)
    monkeypatch.setattr(passages, "CALLS_AT_ONCE", 1)
    own = write_jsonl(tmp_path / "a.jsonl", [flashrag_row("nq", "train", number) for number in range(7)])
    words = ["--input", f"a={own}", "--search", address, "--format", "jsonl", "--out", str(tmp_path / "o")]
    broken_at.append(4)
    with pytest.raises(UserError, match=r"--search: .*400: broken.* 4 questions are done"):
        main([*words, "--template", "rag"])
    assert [path.name for path in (tmp_path / "o").iterdir()] == [NOTES]
    with (tmp_path / "o" / NOTES).open("a+") as notes:
        notes.seek(0)
        kept = [json.loads(line) for line in notes]
        last = flashrag_row("nq", "train", 6)["question"] + "?"
        for other in ({"servers": ["another"]}, {"topk": 9}):
            notes.write(json.dumps(kept[0] | {"question": last, "passages": "of another search"} | other) + "\n")
        notes.write('{"question": "cut o')
    broken_at.clear()
    main([*words, "--template", "rag"])
    assert len(asked) == len(set(asked)) == 7
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["stats.json", "train.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "o/train.jsonl").read_text().splitlines()]
    for row in rows:
        shown = f'Doc 1(Title: "Title ‹/information>") about {row["question"]}'
        assert f"{shown}\n\nQuestion: {row['question']}\n" in row["prompt"][0]["content"]
    main([*words, "--rows", "plain"])
    plain = [json.loads(line) for line in (tmp_path / "o/train.jsonl").read_text().splitlines()]
    assert [row["passages"] for row in plain] == [f'Doc 1(Title: "Title ‹/information>") about {q}' for q in asked[:7]]


def test_a_server_that_does_not_answer_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(passages, "TIMEOUT_S", 0.5)
    own = write_jsonl(tmp_path / "a.jsonl", [flashrag_row("nq", "train", 0)])
    with pytest.raises(UserError, match="Start the retrieval server"):
        main(["--input", f"a={own}", "--search", "127.0.0.1:9", "--rows", "plain", "--out", str(tmp_path)])
