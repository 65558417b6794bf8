"""The demo world on disk, in the formats of the real corpus, pages and question sets."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from searchr1.demo.questions import HOP_NAMES, Question, make_questions
from searchr1.demo.world import Entity, World, make_world, page_text, passage

TRAIN_QUESTIONS = 2400
TEST_QUESTIONS = 480


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write `rows`, one JSON object per line; return their number."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def contents(entity: Entity) -> str:
    """Return a passage in the corpus format: the quoted title, a line break, the text."""
    return f'"{entity.name}"\n{passage(entity)}'


def corpus_rows(world: World) -> Iterable[dict[str, Any]]:
    """Yield the corpus as rows `{"id", "contents", "url"}`, the format of the wiki-18 corpus."""
    for i, entity in enumerate(world.entities):
        yield {"id": str(i), "contents": contents(entity), "url": entity.url}


def page_rows(world: World) -> Iterable[dict[str, Any]]:
    """Yield the pages that `/access` serves as rows `{"url", "title", "contents", "links"}`."""
    mentioned_by: dict[int, list[Entity]] = defaultdict(list)
    for entity in world.entities:
        for value in entity.relations.values():
            mentioned_by[value.id].append(entity)
    for entity in world.entities:
        backlinks = mentioned_by[entity.id]
        links = [value.url for value in entity.relations.values()] + [other.url for other in backlinks]
        yield {"url": entity.url, "title": entity.name, "contents": page_text(entity, backlinks), "links": links}


def golden_answers(question: Question) -> list[str]:
    """Return the answer's name, then its aliases."""
    return [question.answer.name, *question.answer.aliases]


def prompt_text(question: str) -> str:
    """Return the prompt's text, to which the tokenizer's chat template renders a user message, too."""
    return f"Question: {question}\n"


def jsonl_row(question: Question, index: int) -> dict[str, Any]:
    """Return a row in RLinf's format (`prompt`, `solutions`)."""
    return {
        "id": index,
        "data_source": HOP_NAMES[question.hops],
        "question": question.text,
        "prompt": prompt_text(question.text),
        "solutions": golden_answers(question),
        "hops": question.hops,
    }


def parquet_row(question: Question, index: int, split: str) -> dict[str, Any]:
    """Return a row in Search-R1's format."""
    return {
        "data_source": HOP_NAMES[question.hops],
        "prompt": [{"role": "user", "content": question.text}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": golden_answers(question)}},
        "extra_info": {"split": split, "index": index},
    }


def write_world(seed: int, out: Path) -> dict[str, Any]:
    """Write corpus, pages and questions of the world of `seed` into folder `out`.

    Returns:
        Numbers of rows, also written to `world.json`.
    """
    out.mkdir(parents=True, exist_ok=True)
    world = make_world(seed)
    counts: dict[str, Any] = {
        "seed": seed,
        "passages": write_jsonl(out / "corpus.jsonl", corpus_rows(world)),
        "pages": write_jsonl(out / "pages.jsonl", page_rows(world)),
    }
    for split, part, count in (("train", "train", TRAIN_QUESTIONS), ("test", "test", TEST_QUESTIONS)):
        questions = make_questions(world, "test" if part == "test" else "train", count, seed)
        write_jsonl(out / f"{split}.jsonl", (jsonl_row(q, i) for i, q in enumerate(questions)))
        table = pa.Table.from_pylist([parquet_row(q, i, split) for i, q in enumerate(questions)])
        pq.write_table(table, out / f"{split}.parquet")
        counts[split] = {name: sum(q.hops == hops for q in questions) for hops, name in HOP_NAMES.items()}
    (out / "world.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    return counts
