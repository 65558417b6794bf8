"""The seven question sets of the Search-R1 paper under the names that files give them."""

from __future__ import annotations

import re

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
    """The set's name in `LABELS` for any of its spellings (`NQ`, `hotpot_qa`, `searchR1_nq`, `2Wiki_rand1000`); any other
    name as it is."""
    key = re.sub(r"[^a-z0-9]", "", data_source.lower())
    for candidate in (key, key.removeprefix("searchr1")):
        for spelling in (candidate, _SPLIT.sub("", candidate)):
            if spelling in _SET_OF:
                return _SET_OF[spelling]
    return data_source


def label(name: str) -> str:
    """How tables call a set."""
    return LABELS.get(name, name)


def in_order(names: set[str]) -> list[str]:
    """The seven in the paper's order, then the others by name."""
    return [name for name in LABELS if name in names] + sorted(names - LABELS.keys())
