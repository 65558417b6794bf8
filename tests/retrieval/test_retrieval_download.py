"""download.py as a process, with the real hub library against a hub of the test's own."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from aiohttp import web

SCRIPT = Path(__file__).parents[2] / "examples/searchr1/download.py"
COMMIT = "a" * 40
ENCODER = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 100,
    "pytorch_model.bin": b"the same",
    "onnx/model.onnx": b"x",
}
ROWS18 = b'{"contents": "x"}\n' * 1000


def gzipped_tar(rows):
    """As the corpus is published: under a path of its author's machine."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("data00/somebody/wiki_dpr_100w/wiki_dump.jsonl")
        member.size = len(rows)
        archive.addfile(member, io.BytesIO(rows))
    return gzip.compress(buffer.getvalue())


FILES = {
    "datasets/inclusionAI/ASearcher-Local-Knowledge": {
        "wiki_corpus.jsonl": b'{"contents": "a"}\n',
        "wiki_webpages.jsonl": b"p" * 9000,
    },
    "datasets/PeterJinGo/wiki-18-corpus": {"wiki-18.jsonl.gz": gzipped_tar(ROWS18)},
    "datasets/PeterJinGo/wiki-18-e5-index": {"part_aa": b"A" * 70_000, "part_ab": b"B" * 30_000},
    "models/intfloat/e5-base-v2": ENCODER,
}  # fmt: skip


class FakeHub:
    """Answers what huggingface_hub asks."""

    def __init__(self):
        self.asked: list[str] = []
        self.spoil: dict[str, bytes] = {}
        self.refuse: set[str] = set()

    async def info(self, request):
        kind, repo = request.match_info["kind"], f"{request.match_info['owner']}/{request.match_info['name']}"
        siblings = [
            {"rfilename": name, "size": len(body), "blobId": "0" * 40}
            | {"lfs": {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 1}}
            for name, body in FILES[f"{kind}/{repo}"].items()
        ]
        return web.json_response(
            {"id": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "downloads": 0, "private": False}
        )

    async def file(self, request):
        kind = "datasets" if request.path.startswith("/datasets/") else "models"
        name = request.match_info["file"]
        body = FILES[f"{kind}/{request.match_info['owner']}/{request.match_info['name']}"][name]
        etag = hashlib.sha256(body).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if request.method == "HEAD":
            return web.Response(headers=headers | {"Content-Length": str(len(body))})
        self.asked.append(name)
        if name in self.refuse:
            return web.Response(status=404)
        body = self.spoil.get(name, body)
        start = int(request.headers.get("range", "bytes=0-").partition("=")[2].partition("-")[0])
        return web.Response(body=body[start:], status=206 if start else 200, headers=headers)


@pytest.fixture
def hub():
    fake = FakeHub()
    app = web.Application()
    for path in ("/api/{kind}/{owner}/{name}", "/api/{kind}/{owner}/{name}/revision/{revision}"):
        app.router.add_get(path, fake.info)
    for path in ("/datasets/{owner}/{name}/resolve/{revision}/{file:.*}", "/{owner}/{name}/resolve/{revision}/{file:.*}"):
        app.router.add_route("*", path, fake.file)
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
    fake.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield fake
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def run(hub, folder, *flags, what="wiki18"):
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "no_proxy": "*"}
    words = [sys.executable, str(SCRIPT), "--save_path", str(folder / "wiki"), "--what", what, *flags]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def module():
    spec = importlib.util.spec_from_file_location("searchr1_download", SCRIPT)
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    yield found
    del sys.modules[spec.name]


def test_asearcher_set_without_weights_in_other_formats(hub, tmp_path):
    result = run(hub, tmp_path, what="asearcher")
    assert result.returncode == 0, result.stderr
    assert "asearcher: 4 files" in result.stdout
    assert (tmp_path / "wiki/wiki_webpages.jsonl").read_bytes() == b"p" * 9000
    encoder = tmp_path / "wiki/e5-base-v2"
    assert sorted(file.name for file in encoder.iterdir() if file.is_file()) == ["config.json", "model.safetensors"]
    hub.asked.clear()
    assert run(hub, tmp_path, what="asearcher").returncode == 0
    assert hub.asked == []


def test_wiki18_is_unpacked_and_joined_without_a_second_copy(hub, tmp_path):
    result = run(hub, tmp_path, "--verify")
    assert result.returncode == 0, result.stderr
    wiki = tmp_path / "wiki"
    assert (wiki / "e5.index/e5_Flat.index").read_bytes() == b"A" * 70_000 + b"B" * 30_000
    assert (wiki / "wiki-18.jsonl").read_bytes() == ROWS18
    assert not (wiki / "part_aa").exists()
    assert not (wiki / "part_ab").exists()
    assert not list(wiki.rglob("*.partial"))
    hub.asked.clear()
    assert run(hub, tmp_path, "--verify").returncode == 0
    assert hub.asked == []


@pytest.mark.parametrize("appended", [None, 0, 1, 12_345, 30_000])
def test_a_join_that_was_killed_goes_on(hub, tmp_path, appended):
    assert run(hub, tmp_path, "--keep_parts").returncode == 0
    wiki = tmp_path / "wiki"
    index = wiki / "e5.index/e5_Flat.index"
    if appended is not None:  # killed while it was appending
        index.rename(index.with_suffix(".partial"))
        os.truncate(index.with_suffix(".partial"), 70_000 + appended)
        (wiki / "part_aa").unlink()
    hub.asked.clear()
    assert run(hub, tmp_path, "--verify").returncode == 0
    assert hub.asked == []
    assert index.read_bytes() == b"A" * 70_000 + b"B" * 30_000
    assert not (wiki / "part_ab").exists()


def test_a_lost_connection_is_reported_and_the_next_run_goes_on(hub, tmp_path):
    hub.refuse = {"part_ab"}
    result = run(hub, tmp_path)
    assert result.returncode == 2
    assert "HF_ENDPOINT" in result.stderr
    assert "Traceback" not in result.stderr
    hub.refuse = set()
    hub.asked.clear()
    assert run(hub, tmp_path).returncode == 0
    assert sorted(hub.asked) == ["config.json", "model.safetensors", "part_ab"]


def test_a_hub_that_does_not_answer_is_reported(hub, tmp_path):
    hub.address = "http://127.0.0.1:9"
    result = run(hub, tmp_path)
    assert result.returncode == 2
    assert "cannot download" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_wrong_file_is_named_and_repaired_on_request(hub, tmp_path):
    assert run(hub, tmp_path, what="wiki18-corpus").returncode == 0
    archive = tmp_path / "wiki/wiki-18.jsonl.gz"
    archive.write_bytes(archive.read_bytes()[:-1] + b"?")
    result = run(hub, tmp_path, what="wiki18-corpus")  # the size is right, but the rows are of other contents
    assert (result.returncode, "wiki-18.jsonl.gz: cannot unpack it" in result.stderr) == (2, True)
    result = run(hub, tmp_path, "--verify", what="wiki18-corpus")
    assert result.returncode == 2
    assert "wiki-18.jsonl.gz: its SHA-256 is not the hub's" in result.stderr
    assert archive.exists()
    assert run(hub, tmp_path, "--verify", "--repair", what="wiki18-corpus").returncode == 0
    assert "build-index" in run(hub, tmp_path, "--verify", what="wiki18-corpus").stdout


@pytest.mark.parametrize("older", ["another archive's rows", "the tar that gzip -d leaves"])
def test_rows_of_another_archive_are_written_again(module, tmp_path, capsys, older):
    archive = tmp_path / "wiki-18.jsonl.gz"
    archive.write_bytes(gzipped_tar(b'{"contents": "old"}\n'))
    rows = tmp_path / "wiki-18.jsonl"
    if older.startswith("another"):
        assert module.unpack(archive) == rows
    else:
        rows.write_bytes(gzip.decompress(archive.read_bytes()))
    archive.write_bytes(gzipped_tar(ROWS18))
    capsys.readouterr()
    for said in ("wiki-18.jsonl: is not known to be the contents of wiki-18.jsonl.gz; written again", ""):
        assert module.unpack(archive) == rows
        assert rows.read_bytes() == ROWS18
        assert said in capsys.readouterr().out.replace("\n", "")


def test_damaged_archive_is_reported_and_leaves_nothing(module, tmp_path):
    archive = tmp_path / "a.jsonl.gz"
    archive.write_bytes(gzip.compress(b"x" * 1000)[:-9])
    with pytest.raises(module.UserError, match="cannot unpack"):
        module.unpack(archive)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl.gz"]


def test_too_little_space_is_reported_before_anything_is_fetched(module, tmp_path, monkeypatch):
    class Big:
        def files(self, item):
            return [module.RemoteFile(item, item.file or "config.json", 30 << 30, None)]

        def fetch(self, *_):
            raise AssertionError("fetched")

    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda _: os.terminal_size((0, 0)) and type("U", (), {"free": 50 << 30})
    )
    with pytest.raises(module.UserError, match=r"50\.0 GiB free, 90\.0 GiB needed"):
        module.download("asearcher", tmp_path / "new", Big())
