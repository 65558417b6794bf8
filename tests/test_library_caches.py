"""Users without a home or an entry in the password file: where libraries are sent, and what stays as it was chosen."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

import pytest

from searchr1 import caches
from searchr1.caches import FOLDERS, MOVED_BY, RAY_TOKEN, provide_caches

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No variable of these is set, and temporary files go to a folder of the test's."""
    for name in (*FOLDERS, *MOVED_BY.values(), *NAMES, *RAY_TOKEN, "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(caches, "is_private", lambda folder: Path(folder).is_dir())
    return monkeypatch


def without_passwd(monkeypatch):
    def refuse(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", refuse)


@pytest.mark.parametrize("home", [None, "/nonexistent/home", "not/absolute"])
def test_without_a_home_every_library_has_a_folder_and_the_user_a_name(bare, home, tmp_path, capsys):
    without_passwd(bare)
    bare.delenv("HOME") if home is None else bare.setenv("HOME", home)
    with pytest.raises(KeyError):
        getpass.getuser()
    provide_caches()
    assert getpass.getuser() == f"uid{os.getuid()}"
    folder = tmp_path / f"searchr1-caches-{os.getuid()}"
    assert {name: os.environ[name] for name in FOLDERS} == {name: str(folder / place) for name, place in FOLDERS.items()}
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 32
    assert folder.stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err == (
        f"note: no home folder; what libraries download and compile goes to {folder} (set HOME to keep it)\n"
    )
    provide_caches()  # a child, which inherits all of it, does not say it again
    assert capsys.readouterr().err == ""
    assert os.environ["RAY_AUTH_TOKEN"] == token


@pytest.mark.parametrize("name", [*RAY_TOKEN, "RAY_ADDRESS"])
def test_the_token_of_a_cluster_that_is_there_is_not_replaced(bare, name):
    bare.setenv("HOME", "/nonexistent/home")
    bare.setenv(name, "given")
    provide_caches()
    assert {one: os.environ[one] for one in (*RAY_TOKEN, "RAY_ADDRESS") if one in os.environ} == {name: "given"}


def test_a_home_that_can_only_be_read_keeps_the_models_in_it(bare, tmp_path, capsys):
    home = tmp_path / "home"
    (home / ".cache/huggingface").mkdir(parents=True)
    bare.setenv("HOME", str(home))
    bare.setattr("os.access", lambda path, mode: False)  # what a user who is not root sees of a read-only folder
    bare.setenv("TRITON_CACHE_DIR", "/mine")
    bare.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    provide_caches_without_check(bare)
    assert "HF_HOME" not in os.environ
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"
    assert not {"VLLM_CONFIG_ROOT", "MPLCONFIGDIR", "WANDB_CONFIG_DIR"} & set(os.environ)
    assert Path(os.environ["VLLM_CACHE_ROOT"]).parts[-2:] == (".cache", "vllm")
    assert f"the home folder {home} cannot be written to" in capsys.readouterr().err


def provide_caches_without_check(monkeypatch):
    monkeypatch.setattr(caches, "make_private", lambda folder: folder.mkdir(mode=0o700, exist_ok=True) is None)
    provide_caches()


def test_a_home_that_can_be_written_to_is_used(bare, tmp_path, capsys):
    bare.setenv("HOME", str(tmp_path))
    provide_caches()
    assert not {*FOLDERS, *RAY_TOKEN} & set(os.environ)
    assert capsys.readouterr().err == ""
