"""What rows for supervised fine-tuning say of the prompts that their model will be asked with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from searchr1.agent.trajectory import Trajectory
from searchr1.config.model_settings import TEMPLATE, ModelSettings
from searchr1.data.prompts import TEMPLATES, fill_template, render_prompt, wants_passages
from searchr1.errors import UserError

_QUESTION = "QUESTION"
CHAT = "data.apply_chat_template"


def rows_settings(rows: Sequence[Trajectory], tokenizer: Any, before: ModelSettings | None) -> ModelSettings:
    """Build the settings of the trained model: the template that all rows' prompts show, the rest as it was before.

    A template that no row shows is no longer known: the model was trained away from it.

    Args:
        rows: at least one; what stands before the first trained token is the prompt.
        tokenizer: of the model.
        before: the settings of the model that training started from.
    """
    before = before or ModelSettings({})
    known = {key: value for key, value in before.values.items() if key not in (TEMPLATE, CHAT)}
    frames = list(_frames(tokenizer, before))
    for row in rows:
        prompt = _prompt(row, tokenizer)
        frames = [frame for frame in frames if _fits(prompt, *frame[2:])]
        if not frames:
            return replace(before, values=known, text=None)
    template, chat, _, _ = frames[0]
    text = before.text if template == before.values.get(TEMPLATE) else None
    return replace(before, values=known | {TEMPLATE: template, CHAT: chat}, text=text)


def _frames(tokenizer: Any, before: ModelSettings) -> list[tuple[str, bool, str, str]]:
    """Every template, plain and as a chat message, with what stands before and after its question."""
    own = before.values.get(TEMPLATE) if before.text is not None else None
    texts = {name: fill_template(name, _QUESTION) for name, text in TEMPLATES.items() if text and not wants_passages(name)}
    if own is not None and before.text is not None and "{passages}" not in before.text:
        texts[own] = before.text.replace("{question}", _QUESTION)
    found = []
    for chat in (False, True):
        for name, text in texts.items():
            try:
                rendered = render_prompt(text, None, tokenizer, None, chat)
            except UserError:  # no chat template
                continue
            head, mark, tail = rendered.rpartition(_QUESTION)
            if mark:
                found.append((name, chat, head, tail))
    return found


def _fits(prompt: str, head: str, tail: str) -> bool:
    return len(prompt) > len(head) + len(tail) and prompt.startswith(head) and prompt.endswith(tail)


def _prompt(row: Trajectory, tokenizer: Any) -> str:
    """What a row's model reads before it writes."""
    length = int(row.loss_mask.argmax())
    ids = [*row.sample.prompt_ids, *map(int, row.response_ids[:length])]
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
