"""download.py with a hub of the test's own: space, resuming, joining; never the network."""

from __future__ import annotations

import gzip
import importlib.util
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from searchr1.errors import UserError

SCRIPT = Path(__file__).parents[2] / "examples/searchr1/download.py"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("searchr1_download", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def disk(monkeypatch):
    def set_free(gib):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, gib * 2**30))

    set_free(1000)
    return set_free


class Hub:
    """Serves small files."""

    def __init__(self, fail_on=None):
        self.asked = []
        self.fail_on = fail_on

    def __call__(self, item, save_path):
        self.asked.append((item.repo, item.file))
        if item.file and item.file == self.fail_on:
            raise OSError("connection lost")
        target = save_path / item.folder
        if item.file is None:
            target.mkdir(exist_ok=True)
            (target / "config.json").write_text("{}")
            (target / "model.safetensors").write_bytes(b"weights")
            return target
        content = gzip.compress(b'{"contents": "x"}\n') if item.file.endswith(".gz") else item.file.encode()
        (target / item.file).write_bytes(content)
        return target / item.file


def test_asearcher_set(script, disk, tmp_path):
    hub = Hub()
    found = script.download("asearcher", tmp_path / "new", hub)
    assert [path.name for path in found] == ["wiki_corpus.jsonl", "wiki_webpages.jsonl", "e5-base-v2"]
    assert {repo for repo, _ in hub.asked} == {"inclusionAI/ASearcher-Local-Knowledge", "intfloat/e5-base-v2"}


def test_wiki18_is_unpacked_and_joined_once(script, disk, tmp_path):
    script.download("wiki18", tmp_path, Hub())
    index = tmp_path / "e5.index/e5_Flat.index"
    assert index.read_bytes() == b"part_aapart_ab"
    assert (tmp_path / "wiki-18.jsonl").read_bytes() == b'{"contents": "x"}\n'
    before = index.stat().st_mtime_ns
    script.download("wiki18", tmp_path, Hub())
    assert index.stat().st_mtime_ns == before
    assert not list(tmp_path.rglob("*.partial"))


def test_too_little_space_is_told_before_anything_is_fetched(script, disk, tmp_path, capsys):
    disk(20)
    hub = Hub()
    with pytest.raises(UserError, match="20 GiB free, about 56 GiB more needed"):
        script.download("asearcher", tmp_path, hub)
    assert hub.asked == []
    assert "56 GiB" in capsys.readouterr().out


def test_what_is_there_already_needs_no_space(script, disk, tmp_path):
    disk(20)
    with (tmp_path / "wiki_webpages.jsonl").open("wb") as file:
        file.truncate(40 << 30)  # sparse: takes no space
    script.check_space("asearcher", tmp_path)
    with (tmp_path / "somebody else's.bin").open("wb") as file:
        file.truncate(500 << 30)
    disk(10)
    with pytest.raises(UserError, match="about 16 GiB more"):
        script.check_space("asearcher", tmp_path)


def test_a_lost_connection_is_told_and_the_next_run_goes_on(script, disk, tmp_path):
    with pytest.raises(UserError, match="HF_ENDPOINT"):
        script.download("wiki18", tmp_path, Hub(fail_on="part_ab"))
    assert not (tmp_path / "e5.index").exists()
    script.download("wiki18", tmp_path, Hub())
    assert (tmp_path / "e5.index/e5_Flat.index").exists()


def test_damaged_archive_is_told(script, disk, tmp_path):
    class Damaged(Hub):
        def __call__(self, item, save_path):
            path = super().__call__(item, save_path)
            if item.file == "wiki-18.jsonl.gz":
                path.write_bytes(path.read_bytes()[:-9])
            return path

    with pytest.raises(UserError, match="unpack"):
        script.download("wiki18", tmp_path, Damaged())
    assert not (tmp_path / "wiki-18.jsonl").exists()


def test_an_encoder_that_only_seems_to_be_there_is_told(script, disk, tmp_path):
    class Offline(Hub):
        def __call__(self, item, save_path):
            if item.file is None:  # what the hub library does without a connection
                (save_path / item.folder).mkdir(exist_ok=True)
                return save_path / item.folder
            return super().__call__(item, save_path)

    with pytest.raises(UserError, match="not complete"):
        script.download("asearcher", tmp_path, Offline())
