"""The repository's public files: versions and names in them are those of the package."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

from searchr1 import __version__

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_citation_has_what_the_format_requires_and_the_package_s_facts():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["license"])
    assert citation["authors"] == PROJECT["authors"]


def test_the_changelog_has_the_version():
    assert f"## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_hooks_run_tools_that_the_dev_extra_pins():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repository["repo"] == "local"
    tools = {hook["entry"].split()[0] for hook in repository["hooks"]}
    assert tools == {"ruff", "mypy"}
    assert tools <= {text.split("==")[0] for text in PROJECT["optional-dependencies"]["dev"] if "==" in text}


def test_the_workflow_runs_the_tests():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"].values()
    assert job["steps"][-1]["run"] == "./test.sh"


def test_the_agents_map_names_folders_that_exist():
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    paths = re.findall(r"`((?:searchr1|tests|examples|docs)/[\w./]*)`", text)
    assert len(paths) > 8
    assert [path for path in paths if not (ROOT / path).exists()] == []
