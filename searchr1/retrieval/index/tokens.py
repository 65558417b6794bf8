"""How text becomes the words that BM25 counts. An index names its tokenizer in the manifest; queries use the same one.

* `None`: the pattern of bm25s on the text as it is; what an index without a name was built with.
* `words`: the same after Unicode's NFC, so that a letter and its accent match however they are stored. Nothing changes for
  text that is in NFC already.
* `multilingual`: after NFKC; scripts that are written without spaces (and Hangul, where particles stick to words) become
  pairs of neighbouring characters, everything else words, whose combining marks belong to them. A passage has its single
  characters too; queries count those of them that mean something alone.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from searchr1.errors import UserError

WORD = re.compile(r"(?u)\b\w\w+\b")
"""bm25s' pattern."""
Split = Callable[[str], list[str]]

UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1100, 0x11FF),  # Hangul jamo
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x2FDF),  # Han radicals
    (0x3005, 0x3007),
    (0x3021, 0x3029),
    (0x3040, 0x31BF),  # Kana, Bopomofo, Hangul jamo
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xA960, 0xA9FF),  # Hangul jamo, Javanese, Burmese
    (0xAA60, 0xAA7F),
    (0xAC00, 0xD7FF),  # Hangul
    (0xF900, 0xFAFF),
    (0xFF66, 0xFFDC),  # halfwidth forms
    (0x1AFF0, 0x1B16F),  # Kana
    (0x20000, 0x323AF),  # Han
)
"""Code points of the scripts that become pairs of characters."""
MARKS_UNTIL = 0x1F000
"""Beyond it are the variation selectors only, which are dropped."""
DROPPED = dict.fromkeys(
    [
        0x00AD, 0x0640, 0x0670, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0),
        *(code for code in range(0x0591, 0x05C8) if unicodedata.category(chr(code)) == "Mn"),
        *range(0x0610, 0x061B), *range(0x064B, 0x0660), *range(0x06D6, 0x06DD), *range(0x06DF, 0x06E5),
    ]
)  # fmt: skip
"""What text is written with or without: invisible characters, and the vowel signs of Arabic and Hebrew."""
HAN_PARTICLES = frozenset(
    "的了是在和与與以及之其也就都而着著或被把有不这這那个個们們什么麼吗嗎呢吧为為于於对對从從到哪谁誰何几幾"
)
"""Han characters that stand in nearly every sentence: in a query they count in pairs only."""
ACCENTS = re.compile("[\u0300-\u036f]+")
SHARE_OF_LETTERS = 0.3
SHARE_OF_PASSAGES = 0.01
"""`choose_tokenizer`: so many passages with so many letters that `words` would not split."""


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Passages and queries in, words out."""

    passage: Split
    query: Split
    normalizes: bool
    """Whether queries may be written in other forms than passages: then unknown words are looked up without accents."""


def get_tokenizer(name: str | None) -> Tokenizer:
    """Return the tokenizer of a name; None is the one of indexes that name none.

    Raises:
        UserError: unknown name.
    """
    if name is None:
        return Tokenizer(split_as_bm25s, split_as_bm25s, normalizes=False)
    if name == "words":
        return Tokenizer(split_words, split_words, normalizes=True)
    if name == "multilingual":
        return Tokenizer(split_passage, split_query, normalizes=True)
    raise UserError(f"--tokenizer {name}: unknown; use one of {', '.join(TOKENIZERS)}, or update searchr1")


TOKENIZERS = ("words", "multilingual")


def split_as_bm25s(text: str) -> list[str]:
    """Split as `bm25s.tokenize` does without stop words."""
    return WORD.findall(text.lower())


def split_words(text: str) -> list[str]:
    """Split the NFC form of a text."""
    return WORD.findall((text if text.isascii() else unicodedata.normalize("NFC", text)).lower())


def split_passage(text: str) -> list[str]:
    """Split a passage for `multilingual`: words, single characters and pairs of them."""
    if text.isascii():
        return WORD.findall(text.lower())
    words, runs = _pieces(text)
    for units in runs:
        words += units
        words += map("".join, pairwise(units))
    return words


def split_query(text: str) -> list[str]:
    """Split a query for `multilingual`: words, pairs of characters, and those Han characters that mean something alone.

    Any other character counts by itself only where it stands alone.
    """
    if text.isascii():
        return WORD.findall(text.lower())
    words, runs = _pieces(text)
    for units in runs:
        if len(units) == 1:
            words += units
            continue
        words += map("".join, pairwise(units))
        words += [unit for unit in units if "\u3400" <= unit <= "\u9fff" and unit not in HAN_PARTICLES]
    return words


def _pieces(text: str) -> tuple[list[str], list[list[str]]]:
    """Return the words of a text, and its runs of characters without spaces."""
    patterns = _patterns()
    words, runs = [], []
    for run in patterns.run.findall(unicodedata.normalize("NFKC", text).translate(DROPPED).lower()):
        if run.isascii():
            if len(run) > 1:
                words.append(run)
            continue
        for unspaced, word in patterns.piece.findall(run):
            if unspaced:
                runs.append(patterns.unit.findall(unspaced))
            elif len(word) > 1:
                words.append(word)
    return words, runs


def without_accents(word: str) -> str:
    """Return a word without the accents of Latin, Greek and Cyrillic letters."""
    return unicodedata.normalize("NFC", ACCENTS.sub("", unicodedata.normalize("NFD", word)))


def choose_tokenizer(passages: Iterable[str]) -> str:
    """Choose the tokenizer for a corpus by a sample of its passages.

    `multilingual` if at least one in a hundred is mostly in a script that `words` would not split: one without spaces, or
    one whose words have combining marks. Others are served by `words`, whose scores are those of bm25s.
    """
    special = _patterns().special
    count = needing = 0
    for passage in passages:
        count += 1
        if not passage.isascii():
            text = unicodedata.normalize("NFC", passage)
            letters = sum(map(str.isalpha, text))
            needing += len(special.findall(text)) > SHARE_OF_LETTERS * letters
    return "multilingual" if needing and needing >= SHARE_OF_PASSAGES * count else "words"


@dataclass(frozen=True, slots=True)
class _Patterns:
    run: re.Pattern[str]
    """Letters, digits and marks next to each other."""
    piece: re.Pattern[str]
    """Of a run: a part without spaces, or a word."""
    unit: re.Pattern[str]
    """Of a part without spaces: a character with its marks."""
    special: re.Pattern[str]
    """Characters that `words` does not split, or splits at."""


@functools.cache
def _patterns() -> _Patterns:
    """Compile the patterns, which takes some 30 ms."""
    letters = [
        code for first, last in UNSPACED for code in range(first, last + 1)
        if unicodedata.category(chr(code))[0] in "LN"
    ]  # fmt: skip
    marks = [code for code in range(0x300, MARKS_UNTIL) if unicodedata.category(chr(code))[0] == "M"]
    unspaced, mark = _char_class(letters), _char_class(marks)
    unit = f"[{unspaced}][{mark}]*"
    return _Patterns(
        run=re.compile(rf"[\w{mark}]+"),
        piece=re.compile(f"((?:{unit})+)|([^{unspaced}]+)"),
        unit=re.compile(unit),
        special=re.compile(f"[{unspaced}{mark}]"),
    )


def _char_class(codes: list[int]) -> str:
    """Write ascending code points as the ranges of a character class."""
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)
