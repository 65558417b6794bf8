"""Code that comes with a model is never run, and nobody is asked whether it should be."""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path

import pytest

from searchr1.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
LOADERS = {"from_pretrained", "SentenceTransformer"}


def calls_of_loaders() -> list[tuple[str, ast.Call]]:
    found = []
    for path in sorted((ROOT / "searchr1").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) in LOADERS:
                found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


def test_every_call_of_a_loader_forbids_the_models_own_code():
    calls = calls_of_loaders()
    assert len(calls) > 15  # the search finds them
    for place, call in calls:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        value = getattr(given.get("trust_remote_code"), "value", None)
        assert value is False, f"{place}: without trust_remote_code=False"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model whose config.json, tokenizer and weights name code beside them; a user who would say yes."""
    folder = tmp_path / "model"
    folder.mkdir()
    marker = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    classes = "class C:\n    pass\n"
    (folder / "own.py").write_text(code + classes)
    names = {
        "AutoConfig": "own.C",
        "AutoModel": "own.C",
        "AutoModelForCausalLM": "own.C",
        "AutoTokenizer": ["own.C", "own.C"],
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": names}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "C", "auto_map": names}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    yield folder
    assert not marker.exists()


def test_a_model_with_code_of_its_own_is_rejected_where_it_is_checked(folder):
    from searchr1.checkpoints.weight_check import check_model_folder

    for trained in (True, False):
        with pytest.raises(UserError, match=r"no usable config\.json"):
            check_model_folder(folder, trained=trained)


def test_its_tokenizer_and_configuration_are_rejected(folder):
    from searchr1.chat.load import load_tokenizer
    from searchr1.preflight.check_models import model_positions

    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        load_tokenizer(str(folder))
    assert model_positions(str(folder)) is None


def test_an_encoder_and_a_reranker_with_code_of_their_own_are_rejected(folder):
    from searchr1.retrieval.encode.encoder import Encoder
    from searchr1.retrieval.rerank.reranker import CrossEncoder

    with pytest.raises(UserError, match="cannot load an encoder"):
        Encoder("e5", str(folder))
    with pytest.raises(UserError, match="cannot load a cross-encoder"):
        CrossEncoder(str(folder))
    module = {"idx": 0, "name": "0", "path": "", "type": "own.C"}
    (folder / "modules.json").write_text(json.dumps([module]))
    with pytest.raises(UserError, match="cannot load an encoder"):
        Encoder("sentence-transformers", str(folder))
