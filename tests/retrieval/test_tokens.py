"""BM25 in other scripts than Latin: the passage that a reader of the language would take, and no other."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchr1.commands import build_index as build
from searchr1.commands import retrieval_server as server_flags
from searchr1.errors import UserError
from searchr1.retrieval.index.bm25_index import Bm25Index
from searchr1.retrieval.index.corpus import Corpus
from searchr1.retrieval.index.tokens import choose_tokenizer, get_tokenizer, split_as_bm25s, split_words, without_accents
from searchr1.retrieval.online.searcher import PASSAGE_CHARACTERS, best_part
from searchr1.retrieval.server.load import load_index

CASES = Path(__file__).resolve().parents[3] / "shared/cases/corpora"

PASSAGES = {
    "chinese": ["锡港是北岛最大的港口，以玻璃灯塔闻名。", "泥山位于锡港以南，盛产泥炭。", "茶是一种饮料。"],
    "japanese": ["錫港は北の島でいちばん大きな港で、ガラスの灯台で知られている。", "泥山は沼の多い山である。"],
    "korean": ["주석항은 북섬에서 가장 큰 항구이며 유리 등대로 유명하다.", "진흙산은 토탄이 많은 산이다."],
    "thai": ["ท่าเรือดีบุกเป็นท่าเรือที่ใหญ่ที่สุดของเกาะเหนือ", "ภูเขาโคลนมีพีตมากมาย"],
    "lao": ["ວຽງຈັນເປັນເມືອງຫຼວງຂອງລາວ", "ຫຼວງພະບາງເປັນເມືອງມໍລະດົກ"],
    "khmer": ["ភ្នំពេញជារាជធានីនៃប្រទេសកម្ពុជា។", "សៀមរាបនៅជិតប្រាសាទអង្គរវត្ត។"],
    "burmese": ["ရန်ကုန်မြို့သည် မြန်မာနိုင်ငံ၏ အကြီးဆုံးမြို့ဖြစ်သည်။", "ပုဂံတွင် စေတီများ ရှိသည်။"],
    "hindi": ["गंगा भारत की सबसे लंबी नदी है।", "दिल्ली भारत की राजधानी है।"],
    "mixed": ["OpenAI的GPT-4模型于2023年发布。", "Tin Harbour（锡港）is a port."],
}
QUERIES = [
    ("chinese", "锡港最大的是什么", [0]),
    ("chinese", "泥炭在哪里？", [1]),
    ("chinese", "锡港", [0, 1]),
    ("chinese", "茶", [2]),
    ("chinese", "蜂蜜", []),
    ("japanese", "玻璃", []),
    ("japanese", "ガラスの灯台", [0]),
    ("japanese", "ｶﾞﾗｽ", [0]),
    ("japanese", "沼", [1]),
    ("korean", "유리 등대", [0]),
    ("korean", "주석항", [0]),
    ("korean", "토탄은 어디에", [1]),
    ("korean", "벌꿀", []),
    ("thai", "ท่าเรือ", [0]),
    ("thai", "โคลน", [1]),
    ("lao", "ວຽງຈັນ", [0]),
    ("lao", "ພະບາງ", [1]),
    ("khmer", "រាជធានី", [0]),
    ("khmer", "អង្គរ", [1]),
    ("burmese", "ရန်ကုန်", [0]),
    ("burmese", "စေတီ", [1]),
    ("hindi", "नदी", [0]),
    ("hindi", "दिल्ली", [1]),
    ("mixed", "ＧＰＴ 模型", [0]),
    ("mixed", "2023年", [0]),
    ("mixed", "锡港", [1]),
    ("mixed", "harbour", [1]),
]


def write(path, texts):
    rows = [{"id": str(number), "contents": f'"{number}"\n{text}'} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["built", "in memory"])
def indexes(request, tmp_path_factory):
    """Language -> index, as a server loads it; the flags choose nothing."""
    folder = tmp_path_factory.mktemp("scripts")
    found = {}
    for name, texts in PASSAGES.items():
        path = write(folder / f"{name}.jsonl", texts)
        flags = ["--retriever_name", "bm25", "--corpus_path", str(path)]
        if request.param == "built":
            flags += ["--index_path", str(folder / name)]
            build.main([*flags[:4], "--save_dir", str(folder / name)])
            assert json.loads((folder / name / "manifest.json").read_text())["tokenizer"] == "multilingual"
        found[name] = load_index(server_flags.parse(flags), Corpus(path))
    return found


@pytest.mark.parametrize(("script", "query", "rows"), QUERIES)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_the_right_passages_and_no_others(indexes, script, query, rows, form):
    hits = indexes[script].search([unicodedata.normalize(form, query)], 10)[0]
    if len(rows) == 1:  # a shared ending may find others too, but behind
        assert [row for row, _ in hits][:1] == rows
    else:
        assert sorted(row for row, _ in hits) == rows
    assert all(score > 0 for _, score in hits)


def test_the_cases(tmp_path):
    if not CASES.is_dir():
        pytest.skip("the cases are not beside this checkout")
    for name, query, row in (
        ("chinese", "北岛最大的港口", 0),
        ("chinese", "泥炭", 1),
        ("accents", "Ke\u0301roual", 0),
        ("accents", "KÉROUAL", 0),
        ("accents", "Zoe Keroual", 0),
    ):
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes((CASES / f"{name}.jsonl").read_bytes())
        index = load_index(server_flags.parse(["--retriever_name", "bm25", "--corpus_path", str(path)]), Corpus(path))
        assert index.search([query], 10)[0][0][0] == row
        assert index.search(["nothing of it"], 10) == [[]]


@pytest.mark.parametrize("tokenizer", ["words", "multilingual"])
def test_an_accent_matches_in_every_form_and_is_left_out_only_where_the_word_is_unknown(tmp_path, tokenizer):
    texts = ["Zoé naquit à Brévin", "Zoe\u0301 Kéroual", "Zoe was born", "plain Keroual"]
    index = Bm25Index.build(texts, tokenizer=tokenizer)
    rows = {query: sorted(row for row, _ in index.search([query], 9)[0]) for query in ("Zoé", "Zoe\u0301", "Zoe", "Brevin")}
    assert rows == {"Zoé": [0, 1], "Zoe\u0301": [0, 1], "Zoe": [2], "Brevin": [0]}
    assert [row for row, _ in index.search(["Brèvin"], 9)[0]] == [0]
    assert [row for row, _ in index.search(["Këroual"], 9)[0]] == [3], "the word without accents is known"


def test_an_index_that_names_no_tokenizer_is_searched_as_before(tmp_path):
    path = write(tmp_path / "c.jsonl", ["Zoe\u0301 naquit", "锡港 是"])
    words = ["--retriever_name", "bm25", "--corpus_path", str(path)]
    build.main([*words, "--save_dir", str(tmp_path / "index"), "--tokenizer", "words"])
    manifest = tmp_path / "index" / "manifest.json"
    values = json.loads(manifest.read_text())
    assert values.pop("tokenizer") == "words"
    values = {key: value for key, value in values.items() if key not in ("files", "xxh3")} | {"version": 1}
    manifest.write_text(json.dumps(values))
    index = load_index(server_flags.parse([*words, "--index_path", str(tmp_path / "index")]), Corpus(path))
    assert index.search(["锡港", "锡港最大"], 9)[1] == []
    assert [row for row, _ in index.search(["锡港"], 9)[0]] == [1]
    assert index.search(["zoe"], 9) == index.search(["zoe\u0301"], 9), "its words end at a combining mark"
    with pytest.raises(UserError, match=r"--tokenizer multilingual: --index_path .* leave the flag out"):
        load_index(
            server_flags.parse([*words, "--index_path", str(tmp_path / "index"), "--tokenizer", "multilingual"]),
            Corpus(path),
        )
    manifest.write_text(json.dumps(values | {"tokenizer": "jieba"}))
    with pytest.raises(UserError, match="--tokenizer jieba: unknown"):
        load_index(server_flags.parse([*words, "--index_path", str(tmp_path / "index")]), Corpus(path))


def test_what_is_chosen():
    english = ["The harbour of Zoé Kéroual, naïve café", "A hill"] * 50
    assert choose_tokenizer(english) == "words"
    assert choose_tokenizer([*english, "Li Bai (李白) was a poet of the Tang dynasty"] * 3) == "words"
    assert choose_tokenizer([*english, "锡港是北岛最大的港口"]) == "words", "less than one in a hundred"
    assert choose_tokenizer([*english[:98], "锡港是北岛最大的港口"]) == "multilingual"
    assert choose_tokenizer(["Thành phố Hồ Chí Minh", "Москва", "القاهرة", "תל אביב", "Αθήνα"]) == "words"
    assert choose_tokenizer(["कोलकाता"]) == choose_tokenizer(["مَدِينَةٌ"]) == "multilingual"
    assert choose_tokenizer([]) == choose_tokenizer(["", "123"]) == "words"


@given(st.text(st.characters(max_codepoint=0x24F), max_size=80))
def test_words_are_those_of_bm25s_for_text_in_nfc(text):
    text = unicodedata.normalize("NFC", text)
    assert split_words(text) == split_as_bm25s(text)


@given(st.text(max_size=60))
def test_a_passage_has_all_words_of_the_same_text_as_a_query(text):
    """So that every text finds itself; in every Unicode form."""
    tokenizer = get_tokenizer("multilingual")
    words = set(tokenizer.passage(text))
    assert set(tokenizer.query(text)) <= words
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert set(tokenizer.passage(unicodedata.normalize(form, text))) == words


def test_optional_signs_make_no_difference():
    tokenizer = get_tokenizer("multilingual")
    assert tokenizer.query("كَتَبَ") == tokenizer.query("كتب") == ["كتب"]
    assert tokenizer.query("שָׁלוֹם") == tokenizer.query("שלום")
    assert tokenizer.query("ភ្នំ\u200bពេញ") == tokenizer.query("ភ្នំពេញ")
    assert without_accents("Kéroual") == "Keroual"
    assert without_accents("がç") == "がc"


def test_the_part_of_a_page_without_spaces_that_answers():
    filler = "泥山盛产泥炭。" * 400
    page = filler + "玻璃灯塔在锡港。 " + filler
    assert "玻璃灯塔在锡港" in best_part(page, "锡港的玻璃灯塔")
    assert len(best_part(page, "锡港的玻璃灯塔")) > PASSAGE_CHARACTERS * 0.9


def test_many_passages_are_reported_apart():
    """A name of two characters among 400 passages of the same few thousand characters."""
    rng = random.Random(0)
    letters = [chr(code) for code in range(0x4E00, 0x5500)]
    names = ["".join(rng.sample(letters, 2)) for _ in range(400)]
    texts = [name + "".join(rng.choices(letters, k=60)) for name in names]
    index = Bm25Index.build(texts, tokenizer="multilingual")
    found = index.search([f"{name}是什么" for name in names], 1)
    assert sum(bool(hits) and hits[0][0] == row for row, hits in enumerate(found)) >= 396


def test_the_passage_about_the_name_comes_before_one_that_mentions_it():
    about, mentions = "锡港 锡港是北岛最大的港口，以玻璃灯塔闻名。", "泥山 泥山位于锡港以南，盛产泥炭。"
    tokenizer = get_tokenizer("multilingual")
    query = tokenizer.query("锡港以什么闻名")
    assert {"闻", "名"} < set(query) & set(tokenizer.passage(about))
    assert not set("以什么") & set(query)
    assert sum(query.count(word) > 0 for word in tokenizer.passage(about)) > sum(
        query.count(word) > 0 for word in tokenizer.passage(mentions)
    )
    assert set(tokenizer.query("的 のか")) == {"的", "のか"}
