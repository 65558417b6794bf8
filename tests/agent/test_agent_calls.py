"""How calls are read and turns are cut: expected values read off the peers' own sources."""

from __future__ import annotations

import pytest

from searchr1.agent.calls import cut_turn, read_call
from searchr1.agent.settings import Generation


class Characters:
    def decode(self, ids):
        return "".join(map(chr, ids))


# Search-R1: the first complete <search> or <answer> decides, the rest is the content, stripped (generation.py,
# postprocess_predictions). RLinf: the last <search>...</search>, whatever else there is (toolcall_parsers.py). Both read a
# text that is cut at its first </search> already.
@pytest.mark.parametrize(
    ("text", "tags", "searchr1", "rlinf"),
    [
        ("<search> a </search>", ("search", ["a"]), ("search", ["a"]), ("search", ["a"])),
        ("<answer> b </answer>", ("answer", ["b"]), ("answer", ["b"]), ("answer", ["b"])),
        ("no tag", ("invalid", []), ("invalid", []), ("invalid", [])),
        ("<search>a", ("invalid", []), ("invalid", []), ("invalid", [])),
        ("a</search>", ("invalid", []), ("invalid", []), ("invalid", [])),
        ("<search> </search>", ("invalid", []), ("search", [""]), ("search", [""])),
        ("<search>a <search>b</search>", ("search", ["b"]), ("search", ["a <search>b"]), ("search", ["a <search>b"])),
        ("<search>a\nb</search>", ("search", ["a\nb"]), ("search", ["a\nb"]), ("search", ["a\nb"])),
        ("<answer>b</answer><search>a</search>", ("answer", ["b"]), ("answer", ["b"]), ("search", ["a"])),
        ("<answer>b<search>a</search>", ("search", ["a"]), ("search", ["a"]), ("search", ["a"])),
        ("<search>a<answer>b</answer>", ("answer", ["b"]), ("answer", ["b"]), ("answer", ["b"])),
        ("<access>u</access>", ("access", ["u"]), ("invalid", []), ("invalid", [])),
        ("<Search>a</Search>", ("invalid", []), ("invalid", []), ("invalid", [])),
        ("<search >a</search>", ("invalid", []), ("invalid", []), ("invalid", [])),
    ],
)
def test_each_parser_reads_a_turn_as_its_system_does(text, tags, searchr1, rlinf):
    for parser, expected in (("tags", tags), ("searchr1", searchr1), ("searchr1-qwen", rlinf)):
        action = read_call(text, parser)
        assert (action.kind, action.arguments) == expected, parser


@pytest.mark.parametrize(
    ("text", "searchr1", "rlinf"),
    [
        ("<search>a</search> <search>b</search>", "<search>a</search>", "<search>a</search>"),
        ("<search>a</search>\n\n", "<search>a</search>", "<search>a</search>"),
        ("<answer>b</answer> more", "<answer>b</answer>", "<answer>b</answer> more"),
        (
            "<answer>b</answer><search>a</search>!",
            "<answer>b</answer><search>a</search>",
            "<answer>b</answer><search>a</search>",
        ),
        ("<search>a", "<search>a", "<search>a"),
        ("", "", ""),
    ],
)
def test_each_parser_cuts_a_turn_as_its_system_does(text, searchr1, rlinf):
    ids = [ord(c) for c in text]
    made = Generation(ids, [-float(i) for i in range(len(ids))], text, "length", 7)
    for parser, expected in (("tags", text), ("searchr1", searchr1), ("searchr1-qwen", rlinf)):
        cut = cut_turn(made, parser, Characters())
        assert cut.text == expected == Characters().decode(cut.token_ids)
        assert cut.logprobs == made.logprobs[: len(expected)]
        assert cut.finish_reason == ("stop" if len(expected) < len(text) else "length")
        assert cut.weight_version == 7


def test_a_token_that_holds_more_than_the_tag_stays_whole():
    class Pairs:
        def decode(self, ids):
            return "".join("<search>a</search>\n\nmore"[2 * i : 2 * i + 2] for i in ids)

    ids = list(range(12))  # the ninth token ends the tag, with "\n\n" in the tenth
    cut = cut_turn(Generation(ids, [0.0] * 12, Pairs().decode(ids), "stop", 1), "searchr1", Pairs())
    assert cut.token_ids == ids[:9]
    odd = Generation([0, 1], [0.0, 0.0], "<search>a</search>", "stop", 1)

    class Two:
        def decode(self, ids):
            return ["<search>a", "</search>\n"][0] if len(ids) == 1 else "<search>a</search>\n"

    assert cut_turn(odd, "searchr1-qwen", Two()) == odd
