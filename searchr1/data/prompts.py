"""From a row to the text that the policy is given."""

from __future__ import annotations

import re
from typing import Any

from searchr1.data.messages import Message, read_messages, require_rendered
from searchr1.data.model_settings import template_text
from searchr1.data.questions import bare_question, is_rendered
from searchr1.errors import UserError

LONGEST_REASON = 300
"""Characters of what a chat template says of messages that it refuses."""
_PLACES = re.compile(r"\{(question|passages)\}")


def wants_passages(template: str | None) -> bool:
    """Return whether the template shows passages beside the question."""
    return "{passages}" in (template_text(template) or "")


def fill_template(template: str, question: str, passages: str | None = None) -> str:
    """Return a template's text with the question in its place, and the passages in theirs; neither is searched for places.

    Args:
        template: a name in `TEMPLATES` with a text, or a `.txt` file.
        question: not blank.
        passages: a text as `searchr1.agent.protocol.render_body` makes it, for templates that show passages, and only those.

    Raises:
        UserError: an unknown or a textless template, a blank question, passages missing or unasked for.
    """
    text = template_text(template)
    if text is None:
        raise UserError("data.prompt_template", f"{template} has no text to put a question into")
    if not question.strip():
        raise UserError("the question is empty")
    if "{passages}" in text:
        if passages is None:
            raise UserError(f"the template {template} shows passages, but none came with the question")
    elif passages is not None:
        raise UserError(f"the template {template} shows no passages; use rag, or leave them out")
    values = {"question": question.strip(), "passages": passages or ""}
    return _PLACES.sub(lambda place: values[place.group(1)], text)


def render_prompt(
    prompt: object, question: str | None, tokenizer: Any, template: str | None, chat: bool, passages: str | None = None
) -> str:
    """Return the prompt of one row as text.

    A list of chat messages goes through the tokenizer's chat template; where it has none, their text alone is the prompt.
    A plain prompt is taken as it stands, or as one user message if `chat`. With a `template`, the prompt is made from the
    row's question instead (from the plain prompt, if the row has no question of its own).

    Args:
        prompt: the row's prompt: a text, a list of `{"role", "content"}`, or None.
        question: the row's bare question, if it has one.
        tokenizer: read for its chat template only.
        template: a name in `TEMPLATES` or a `.txt` file; None means "none".
        chat: `data.apply_chat_template`.
        passages: what the search found, rendered, for a template that shows passages (`wants_passages`), and only for one.

    Raises:
        UserError: nothing to make a prompt from, passages missing or unasked for, or the tokenizer cannot render chat
            messages.
    """
    subject = question if question is not None else prompt
    if question is None and isinstance(prompt, str) and is_rendered(prompt):
        subject = bare_question(prompt)
    if template is not None and template_text(template) is not None and isinstance(subject, str):
        prompt = fill_template(template, subject, passages)
    elif passages is not None:
        raise UserError(
            "passages came with a prompt that no template makes; set data.prompt_template to rag and give the row a question"
        )
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError("the prompt is empty")
        if not chat:
            return prompt
        if not has_chat_template(tokenizer):
            raise UserError("data.apply_chat_template", "the model's tokenizer has no chat template; set it to False")
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        return _render_chat(read_messages(prompt, "prompt"), tokenizer)
    if prompt is None and question is not None:
        raise UserError("the row has a question but no prompt; set data.prompt_template, for example to searchr1")
    if prompt is None:
        raise UserError("the row has no prompt; name its column in data.prompt_key")
    raise UserError(f"the prompt is a {type(prompt).__name__}; expected a text or a list of chat messages")


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether the tokenizer can render chat messages."""
    return bool(getattr(tokenizer, "chat_template", None))


def _render_chat(messages: list[Message], tokenizer: Any) -> str:
    if not any(message["content"].strip() for message in messages):
        raise UserError("the prompt is empty")
    if not has_chat_template(tokenizer):
        return "\n\n".join(message["content"] for message in messages if message["content"])
    text = apply_template(tokenizer, messages, add_generation_prompt=True)
    require_rendered([message for message in messages if message["role"] == "user"], text)
    return text


def apply_template(tokenizer: Any, messages: list[Message], **options: Any) -> str:
    """Return messages as the tokenizer's chat template renders them.

    Raises:
        UserError: the template refuses them, or fails in any other way: it is a program that came with the model.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:
        roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))[:LONGEST_REASON] or "none"
        why = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
        raise UserError(
            f"the model's chat template refuses the messages (roles {roles}): {why}; use roles that the template "
            "knows, or another tokenizer's template"
        ) from error
