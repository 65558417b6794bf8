"""The bare question, whatever a chat template or a base model's prompt put around it."""

from __future__ import annotations

import time

import pytest

from searchr1.data.questions import bare_question, question_of_prompt

ASKED = "Answer with <answer> and </answer>. Question: Who wrote it?\n"


@pytest.mark.parametrize(
    "text",
    [
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n",
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{ASKED}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        f"<bos><start_of_turn>user\n{ASKED}<end_of_turn>\n<start_of_turn>model\n",
        f"<s>[INST] <<SYS>>\nBe brief. Question: none\n<</SYS>>\n\n{ASKED} [/INST]",
        f"<|user|>\n{ASKED}<|end|>\n<|assistant|>\n",
        f"<｜begin▁of▁sentence｜><｜User｜>{ASKED}<｜Assistant｜><think>\n",
        f"<|start|>system<|message|>x<|end|><|start|>user<|message|>{ASKED}<|end|><|start|>assistant",
        f"<|start_of_role|>user<|end_of_role|>{ASKED}<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        "<|im_start|>user\nWho wrote it?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nQuestion: Old?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
        "<|im_start|>user\nWho wrote it?<|im_end|>\n<|im_start|>assistant\n<think>\n",
        ASKED,
        "Question: Who wrote it?\nAnswer:",
        "A conversation between User and Assistant.\nUser: Who wrote it?\nAssistant: <think>",
        "Who wrote it?",
    ],
)
def test_rendered_prompts(text):
    assert bare_question(text) == "Who wrote it?"


def test_of_several_messages_the_users_last_one_asks():
    messages = [
        ("system", "Question: no"),
        ("user", "Old?"),
        ("assistant", "No."),
        ("user", ASKED),
        ("assistant", "<think>"),
    ]
    assert question_of_prompt([{"role": role, "content": text} for role, text in messages]) == "Who wrote it?"


@pytest.mark.parametrize("text", ["Is </s> a tag?", "Who is User: or Assistant?", "What does [/INST] end?"])
def test_a_question_may_speak_of_markers(text):
    assert bare_question(text) == text


@pytest.mark.parametrize(
    "text",
    ["\n" * 999_999 + "x", "\nAnswer:" * 200_000 + "x", "x" + "\nAnswer: <think>" * 100_000, "[INST]" + "<<SYS>>" * 200_000,
     "[INST]" + "<<SYS>><</SYS>>" * 100_000, "User:" * 200_000, "User: " + " Assistant:" * 20_000 + "x"],
    ids=["blank lines", "cues inside", "cues", "never ends", "many", "users", "assistants"],
)  # fmt: skip
def test_a_prompt_made_to_take_long_does_not(text):
    started = time.monotonic()
    bare_question(text)
    assert time.monotonic() - started < 3
