from __future__ import annotations

import os
import sys
import types

import pytest

from searchr1.errors import UserError
from searchr1.tracking.loggers import require_logins

KEY = "0" * 40


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user who is not logged in anywhere; the working directory is another one."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "SWANLAB_")) or name == "NETRC":
            monkeypatch.delenv(name)
    monkeypatch.setenv("SWANLAB_CONFIG_DIR", str(tmp_path / "no-etc"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is asked"))
    for name in ("wandb", "swanlab"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    return tmp_path / "home"


def refused(backend: str) -> bool:
    message = ""
    try:
        require_logins(["tensorboard", backend])
    except UserError as error:
        message = str(error)
    expected = f"runner.logger.logger_backends: {backend} is not logged in; run {backend} login, set "
    expected += f"{backend.upper()}_API_KEY, log offline ({backend.upper()}_MODE=offline)"
    assert not message or message.startswith(expected)
    return bool(message)


@pytest.mark.parametrize("backend", ["wandb", "swanlab"])
def test_without_a_key_a_run_is_rejected(home, monkeypatch, backend):
    assert refused(backend)
    require_logins(["tensorboard"])
    for name, value, right in (
        ("API_KEY", KEY, True), ("API_KEY", "", False), ("MODE", "offline", True), ("MODE", "disabled", True),
        ("MODE", "online", False),
    ):  # fmt: skip
        monkeypatch.setenv(f"{backend.upper()}_{name}", value)
        assert refused(backend) is not right, (name, value)
        monkeypatch.delenv(f"{backend.upper()}_{name}")


def netrc(machine: str, password: str = KEY) -> str:
    return f"machine github.com login me password x\nmachine {machine}\n  login user\n  password {password}\n"


def test_wandb_reads_netrc_files(home, monkeypatch):
    file = home / ".netrc"
    for text, right in (
        (netrc("api.wandb.ai"), True),
        ("machine github.com login me password x\n", False),
        (netrc("api.wandb.ai", '""'), False),
        ("machine\nmachine", False),
    ):
        file.write_text(text)
        assert refused("wandb") is not right, text
    file.write_bytes(b"\xff\xfe machine")
    assert refused("wandb")
    file.write_text(netrc("wandb.example:8080"))
    assert refused("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080")
    assert not refused("wandb")
    monkeypatch.setenv("NETRC", str(home / "elsewhere"))
    assert refused("wandb")
    (home / "elsewhere").write_text(netrc("wandb.example:8080"))
    assert not refused("wandb")


@pytest.mark.parametrize(
    ("setting", "right"), [("mode = offline", True), ("mode = online", False), ("anonymous = must", True)]
)
@pytest.mark.parametrize("place", ["home/.config/wandb", "work/wandb"])
def test_wandb_reads_its_settings_files(home, setting, right, place):
    folder = home.parent / place
    folder.mkdir(parents=True)
    (folder / "settings").write_text(f"[default]\nentity = me\n{setting}\n")
    assert refused("wandb") is not right
    (folder / "settings").write_text("no section\n")
    assert refused("wandb")


def test_a_session_that_was_logged_in_by_code_is(home, monkeypatch):
    for key, right in ((KEY, True), (None, False)):
        sys.modules["wandb"].api = types.SimpleNamespace(api_key=key)  # type: ignore[attr-defined]
        assert refused("wandb") is not right


def test_swanlab_reads_its_own_folder(home, monkeypatch):
    (home / ".netrc").write_text(netrc("api.swanlab.cn"))  # not the one that it reads
    assert refused("swanlab")
    for place in (home / ".swanlab", home.parent / "work/.swanlab"):
        place.mkdir()
        (place / ".netrc").write_text(netrc("https://api.swanlab.cn"))
        assert not refused("swanlab")
        (place / ".netrc").unlink()
        assert refused("swanlab")
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(home.parent / "saved"))
    (home.parent / "saved").mkdir()
    (home.parent / "saved/.netrc").write_text(netrc("swanlab.example"))
    assert not refused("swanlab")


@pytest.mark.parametrize(
    ("name", "text", "right"),
    [
        (".env", "SWANLAB_API_KEY=abc\n", True),
        (".env", "OTHER_API_KEY=abc\n", False),
        ("swanlab.yaml", "project: x\nmode: local\n", True),
        ("swanlab.yml", "api_key:\n", False),
    ],
)
def test_swanlab_reads_its_settings_files(home, name, text, right):
    (home.parent / "work" / name).write_text(text)
    assert refused("swanlab") is not right
