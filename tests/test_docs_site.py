"""The site: its navigation, the generated and the checked reference pages, and a strict build."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
import subprocess
import tomllib
import venv
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import searchr1
from searchr1.chat.events import Event
from searchr1.chat.server import Address, Question
from searchr1.retrieval.rerank.server import RerankRequest
from searchr1.retrieval.server.app import AccessRequest, RetrieveRequest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
HTTP = (DOCS / "reference/http.md").read_text(encoding="utf-8")
API = (DOCS / "reference/api.md").read_text(encoding="utf-8")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages_in(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for item in (nav.values() if isinstance(nav, dict) else nav) for page in pages_in(item)]


def section(heading: str) -> str:
    """The part of the HTTP page below a heading, up to the next heading of any level."""
    match = re.search(rf"^### `{re.escape(heading)}`\n(.*?)(?=^##|\Z)", HTTP, re.M | re.S)
    assert match, f"docs/reference/http.md has no heading {heading}"
    return match[1]


def test_the_navigation_has_every_page_once():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages_in(nav)) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_the_commands_page_is_current():
    written = (DOCS / "reference/cli.md").read_text(encoding="utf-8")
    assert written == load(DOCS / "cli_reference.py").page(), "run: python docs/cli_reference.py"


def test_the_configuration_page_is_current():
    written = (DOCS / "reference/config.md").read_text(encoding="utf-8")
    assert written == load(DOCS / "config_reference.py").page(), "run: python docs/config_reference.py"


def test_the_configuration_page_explains_every_key():
    rows = re.findall(r"^\| `(\w+)` \| ([^|\\]+) \|.*\| (.*) \|$", (DOCS / "reference/config.md").read_text("utf-8"), re.M)
    assert len(rows) > 200
    assert [key for key, kind, text in rows if not (kind.strip() and text.strip())] == []


def test_the_http_page_has_every_path_of_the_servers():
    served = {("GET", "/api/" + path) for path in re.findall(r'"/api/(\w+)"', sources("**/*.py"))}
    assert served, "no paths in the watch server"
    served |= {(method.upper(), path) for method, path in re.findall(r'@app\.(get|post)\("(/[^"]*)"', sources("**/*.py"))}
    named = set(re.findall(r"`(GET|POST) (/[\w/]*)`", HTTP))
    assert {path for path in served if path != ("GET", "/")} == {path for path in named if path != ("GET", "/")}


def sources(pattern: str) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "searchr1").glob(pattern)))


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("POST /retrieve", RetrieveRequest),
        ("POST /access", AccessRequest),
        ("POST /rerank", RerankRequest),
        ("POST /ask", Question),
        ("POST /page", Address),
    ],
)
def test_the_http_page_has_every_field_of_a_request(heading, model):
    table = section(heading).split("| --- | --- | --- |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == list(model.model_fields)


def test_the_http_page_has_every_event_of_an_answer():
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", section("POST /ask").split("`type` |")[1], re.M))
    events = {kind.type: kind for kind in Event.__subclasses__()}
    assert set(rows) == set(events)
    for name, kind in events.items():
        fields = [field.name for field in dataclasses.fields(kind) if field.name != "trajectory"]  # not sent
        assert re.findall(r"`(\w+)`", rows[name]) == fields, name


def test_every_name_of_the_python_page_exists():
    for path in re.findall(r"^::: (\S+)$", API, re.M):
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).__module__ == module, path


def test_the_python_page_has_every_public_name():
    documented = {path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)$", API, re.M)}
    assert {name for name in getattr(searchr1, "__all__", ()) if not name.startswith("__")} <= documented


def test_links_out_of_the_docs_become_paths():
    hooks = load(DOCS / "hooks.py")

    class Page:
        class file:
            src_uri = "guides/data.md"

    class Config:
        repo_url = ""

    text = "[a](retrieval.md#x) [R](../../README.rst) [b](https://example.org) ![c](../images/algorithms.svg)"
    here = hooks.on_page_markdown(text, page=Page, config=Config, files=None)
    assert here == text.replace("[R](../../README.rst)", "R (`README.rst`)")
    Config.repo_url = "https://example.org/repo/"
    there = hooks.on_page_markdown(text, page=Page, config=Config, files=None)
    assert there == text.replace("../../README.rst", "https://example.org/repo/blob/main/README.rst")
    with pytest.raises(FileNotFoundError, match=r"gone\.py"):
        hooks.on_page_markdown("[x](../../gone.py)", page=Page, config=Config, files=None)


def docs_extra() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["optional-dependencies"]["docs"]


def test_what_builds_the_site_is_pinned():
    pinned = dict(requirement.split("==") for requirement in docs_extra())
    assert {"mkdocs", "mkdocs-material", "mkdocstrings[python]"} <= set(pinned)


@pytest.mark.network
def test_the_site_builds_without_a_warning(tmp_path):
    """Installs the extra `docs`, which the other tests do without."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    install = [python, "-m", "pip", "install", "-q", *docs_extra()]
    subprocess.run(install, check=True, timeout=240)
    build = [python, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).with_suffix("")
        folder = name.parent if name.name == "index" else name
        assert (tmp_path / "site" / folder / "index.html").is_file(), page
