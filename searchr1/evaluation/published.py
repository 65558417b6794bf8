"""The seven question sets of the Search-R1 paper, and exact match as published."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

LABELS = {
    "nq": "NQ",
    "triviaqa": "TriviaQA",
    "popqa": "PopQA",
    "hotpotqa": "HotpotQA",
    "2wikimultihopqa": "2Wiki",
    "musique": "MuSiQue",
    "bamboogle": "Bamboogle",
}
"""FlashRAG's names, in the paper's order -> how tables call them."""

_ALIASES = {
    "nq": ("nqopen", "naturalquestions", "naturalquestionsopen"),
    "triviaqa": ("tqa", "trivia"),
    "popqa": (),
    "hotpotqa": ("hotpot",),
    "2wikimultihopqa": ("2wiki", "2wikiqa", "2wikimultihop", "2wikimqa", "wikimultihopqa"),
    "musique": ("musiqueans",),
    "bamboogle": (),
}
_SET_OF = {alias: name for name, aliases in _ALIASES.items() for alias in (name, *aliases)}
_SPLIT = re.compile(r"(?:test|dev|val|validation|train|full|distractor|rand\d+|subset\d*|\d{3,})+$")


def canonical(data_source: str) -> str:
    """Return the name in `LABELS` for any spelling of a set (`NQ`, `hotpot_qa`, `searchR1_nq`, `2Wiki_rand1000`), any other
    name as it is."""
    key = re.sub(r"[^a-z0-9]", "", data_source.lower())
    for candidate in (key, key.removeprefix("searchr1")):
        for spelling in (candidate, _SPLIT.sub("", candidate)):
            if spelling in _SET_OF:
                return _SET_OF[spelling]
    return data_source


def label(name: str) -> str:
    """Return a set's name in tables."""
    return LABELS.get(name, name)


def in_order(names: set[str]) -> list[str]:
    """Return the seven in the paper's order, then the others by name."""
    return [name for name in LABELS if name in names] + sorted(names - LABELS.keys())


PAPER = "Search-R1, arXiv 2503.09516, table 2"
PPO_GRPO = "Search-R1, arXiv 2503.09516, table 3"
LARGEST = "Search-R1, arXiv 2503.09516, 14B results"


@dataclass(frozen=True, slots=True)
class Published:
    """One row of a published table."""

    system: str
    model: str
    billions: float
    """Size of the model."""
    average: float
    """As published: the mean over the seven sets."""
    source: str
    values: tuple[float, ...] = ()
    """By set in the order of `LABELS`; empty where only the average was published."""

    def average_over(self, sets: Sequence[str]) -> float | None:
        """Return the mean over some of the seven, or None if it is not known."""
        if set(sets) == set(LABELS):
            return self.average
        values = [value for value in map(self.value, sets) if value is not None]
        return sum(values) / len(values) if values else None

    def value(self, name: str) -> float | None:
        """Return one set's number, or None."""
        return dict(zip(LABELS, self.values, strict=True)).get(name) if self.values else None


def _table(model: str, billions: float, source: str, rows: str) -> list[Published]:
    """Return rows of `system: seven numbers and the average`, in thousandths."""
    table = []
    for line in rows.strip().splitlines():
        system, _, numbers = line.strip().partition(": ")
        *values, average = (int(number) / 1000 for number in numbers.split())
        table.append(Published(system, model, billions, average, source, tuple(values)))
    return table


PUBLISHED = [
    *_table("Qwen2.5-3B, base or instruct", 3.1, PAPER, """
        Direct inference: 106 288 108 149 244 020 024 134
        Chain of thought: 023 032 005 021 021 002 000 015
        IRCoT: 111 312 200 164 171 067 240 181
        Search-o1: 238 472 262 221 218 054 320 255
        RAG: 348 544 387 255 226 047 080 270
        SFT: 249 292 104 186 248 044 112 176
        R1-base: 226 455 173 201 268 055 224 229
        R1-instruct: 210 449 171 208 275 060 192 224
        Rejection sampling: 294 488 332 240 233 059 210 265
    """),
    *_table("Qwen2.5-3B", 3.1, PPO_GRPO, """
        Search-R1 base, PPO: 406 587 435 284 273 049 088 303
        Search-R1 instruct, PPO: 341 545 378 324 319 103 264 325
        Search-R1 base, GRPO: 421 583 413 297 274 066 128 312
        Search-R1 instruct, GRPO: 397 565 391 331 310 124 232 336
    """),
    *_table("Qwen2.5-7B, base or instruct", 7.6, PAPER, """
        Direct inference: 134 408 140 183 250 031 120 181
        Chain of thought: 048 185 054 092 111 022 232 106
        IRCoT: 224 478 301 133 149 072 224 239
        Search-o1: 151 443 131 187 176 058 296 206
        RAG: 349 585 392 299 235 058 208 304
        SFT: 318 354 121 217 259 066 112 207
        R1-base: 297 539 202 242 273 083 296 276
        R1-instruct: 270 537 199 237 292 072 293 271
        Rejection sampling: 360 592 380 331 296 123 355 348
    """),
    *_table("Qwen2.5-7B", 7.6, PPO_GRPO, """
        Search-R1 base, PPO: 480 638 457 433 382 196 432 431
        Search-R1 instruct, PPO: 393 610 397 370 414 146 368 385
        Search-R1 base, GRPO: 395 560 388 326 297 125 360 350
        Search-R1 instruct, GRPO: 429 623 427 386 346 162 400 396
    """),
    *_table("Qwen2.5-14B", 14.8, LARGEST, "Search-R1 base, PPO: 486 676 480 468 470 241 528 479"),
    Published("Agent Lightning", "Llama-3.2-3B instruct", 3.2, 0.406, "Agent Lightning's Search-R1 example"),
    Published("Agent Lightning", "Qwen2.5-7B instruct", 7.6, 0.452, "Agent Lightning's Search-R1 example"),
    Published("AutoRefine", "Qwen2.5-3B", 3.1, 0.405, "AutoRefine's own report"),
    Published("RLinf", "Qwen2.5-7B", 7.6, 0.554, "RLinf's Search-R1 example; it does not say which metric"),
]  # fmt: skip
"""The paper's rows are with E5 on the wiki-18 corpus and three passages; other systems may differ. IRCoT's average at 7B is
the paper's, although its seven numbers give .226."""


def nearest(billions: float | None) -> list[Published]:
    """Return the rows of the size nearest to a model's (by ratio), or all of them if it is not known."""
    if not billions:
        return list(PUBLISHED)

    def distance(row: Published) -> float:
        return round(abs(math.log(row.billions / billions)), 1)

    least = min(map(distance, PUBLISHED))
    return [row for row in PUBLISHED if distance(row) == least]
