"""Schema-driven fuzzing: whatever a client sends, the server answers with what its schema says, and never with a 5xx."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import checks

WANTED = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    rows = [{"id": str(i), "contents": f'"Title {i}"\ntext {i}', "url": f"https://w.example/{i}"} for i in range(20)]
    for name in ("corpus", "pages"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [sys.executable, "-m", "searchr1.cli", "retrieval-server", "--retriever_name", "bm25", "--port", "0"]
    words += ["--corpus_path", str(folder / "corpus.jsonl"), "--pages_path", str(folder / "pages.jsonl")]
    process = subprocess.Popen([*words, "--save-address-to", str(folder / "address")])
    deadline = time.monotonic() + 60
    while not (folder / "address").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield schemathesis.openapi.from_url(f"http://{(folder / 'address').read_text()}/openapi.json")
    process.terminate()
    process.wait(10)


OPERATIONS = ["GET /health", "GET /ready", "GET /metrics", "POST /retrieve", "POST /access"]


@pytest.mark.parametrize("label", OPERATIONS)
def test_every_answer_is_what_the_schema_says(schema, label):
    operations = {operation.ok().label: operation.ok() for operation in schema.get_all_operations()}
    assert sorted(operations) == sorted(OPERATIONS)
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    cases = st.sampled_from(modes).flatmap(lambda mode: operations[label].as_strategy(generation_mode=mode))

    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def check(case):
        case.call_and_validate(checks=WANTED, timeout=20)

    check()
