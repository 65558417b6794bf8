"""Which characters of a turn's text each sampled token stands for, without tokenizing any text again."""

from __future__ import annotations

import codecs
import functools
import json
import logging
import re
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger(__name__)

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenText:
    """What every token of a vocabulary adds to a text, in bytes.

    Args:
        pieces: by token id; None where a tokenizer has no such token.
    """

    def __init__(self, pieces: Sequence[bytes | None]) -> None:
        self._pieces = pieces

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> TokenText | None:
        """Return the vocabulary of a fast tokenizer: byte-level (GPT, Qwen, Llama 3) or with byte fallback (Llama 2).

        Returns None for any other kind.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        kind = json.dumps(json.loads(backend.to_str()).get("decoder"))
        if "ByteLevel" in kind:
            piece_of = _byte_level
        elif "ByteFallback" in kind:
            piece_of = _byte_fallback
        else:
            return None
        added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
        tokens = tokenizer.convert_ids_to_tokens(range(max([len(tokenizer) - 1, *added]) + 1))
        pieces = [None if token is None else piece_of(token) for token in tokens]
        for index, content in added.items():
            pieces[index] = content.encode()
        return cls(pieces)

    def lengths(self, token_ids: Sequence[int], text: str) -> list[int] | None:
        """Return characters of `text` per token, adding up to all of it.

        A token that completes no character (part of one that takes several) has 0; the last may have fewer than it stands
        for, where a stop string ended the text within it.

        Returns:
            None if the tokens do not spell the text.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        spelled: list[str] = []
        for index in token_ids:
            piece = self._pieces[index] if 0 <= index < len(self._pieces) else None
            if piece is None:
                return None
            spelled.append(decoder.decode(piece))
        if spelled:
            spelled[-1] += decoder.decode(b"", final=True)
        whole = "".join(spelled)
        lengths = [len(part) for part in spelled]
        excess = len(whole) - len(text)
        if not whole.startswith(text) or (excess and excess >= lengths[-1]):
            return None
        if excess:
            lengths[-1] -= excess
        return lengths


def load_token_text(model_path: str) -> TokenText | None:
    """Return the vocabulary of a model's tokenizer; None, with one warning in the log, if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        vocabulary = TokenText.of_tokenizer(AutoTokenizer.from_pretrained(model_path, trust_remote_code=False))
        reason = "an unknown kind of tokenizer"
    except (OSError, ValueError) as error:
        vocabulary, reason = None, str(error).split("\n")[0]
    if vocabulary is None:
        logger.warning("%s: %s; trajectories are logged without their tokens' log-probabilities", model_path, reason)
    return vocabulary


@functools.cache
def _bytes_of_letters() -> dict[str, int]:
    """Return the letters that byte-level vocabularies write bytes with: printable ones as such, the others from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}


def _byte_level(token: str) -> bytes:
    letters = _bytes_of_letters()
    return bytes(letters[letter] for letter in token) if all(letter in letters for letter in token) else token.encode()


def _byte_fallback(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
