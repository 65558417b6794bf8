"""How a turn's call is read: this project's way, Search-R1's and RLinf's (`agentloop.toolcall_parser`). Pure functions."""

from __future__ import annotations

import re
from bisect import bisect_left
from typing import Any

from searchr1.agent.protocol import Action, ToolcallParser, parse_action
from searchr1.agent.settings import Generation

TURN_ENDS: dict[ToolcallParser, tuple[str, ...]] = {
    "tags": (),
    "searchr1": ("</search>", "</answer>"),
    "searchr1-qwen": ("</search>",),
}
"""A turn is cut after its first tag of these, the earlier in the list first."""

_SEARCH = re.compile(r"<search>(.*?)</search>", re.DOTALL)
_SEARCH_OR_ANSWER = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)


def read_call(text: str, parser: ToolcallParser) -> Action:
    """Read what a turn asks for.

    `tags` is `parse_action`. The others know one search a turn, with everything between its tags as the query, a blank
    one too: with `searchr1` the first complete tag decides, with `searchr1-qwen` an answer counts only where nothing is
    searched.
    """
    if parser == "tags":
        return parse_action(text)
    if parser == "searchr1-qwen":
        queries = _SEARCH.findall(text)
        if queries:
            return Action("search", [queries[-1].strip()])
    first = _SEARCH_OR_ANSWER.search(text)
    if first is None:
        return Action("invalid")
    return Action("search" if first.group(1) == "search" else "answer", [first.group(2).strip()])


def cut_turn(generation: Generation, parser: ToolcallParser, tokenizer: Any) -> Generation:
    """Cut a generation after the tag that ends its turn, between two tokens: one that holds more than the tag stays whole.

    With the peers' stop strings an engine stops there by itself and nothing is cut.
    """
    tag = next((tag for tag in TURN_ENDS[parser] if tag in generation.text), None)
    if tag is None:
        return generation
    ids = generation.token_ids
    kept = 1 + bisect_left(range(1, len(ids)), True, key=lambda count: tag in tokenizer.decode(ids[:count]))
    return Generation(
        token_ids=ids[:kept],
        logprobs=generation.logprobs[:kept],
        text=generation.text[: generation.text.index(tag) + len(tag)],
        finish_reason=generation.finish_reason if kept == len(ids) else "stop",
        weight_version=generation.weight_version,
    )
