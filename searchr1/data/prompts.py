"""From a row to the text that the policy is given."""

from __future__ import annotations

from typing import Any

from searchr1.errors import UserError

SEARCHR1 = """\
Answer the question below. Whenever you get new information, first reason about it between <think> and </think>. \
If you find that you lack some knowledge, call a search engine with <search> query </search>; it returns the top \
results between <information> and </information>. You may search as often as you want. When no further knowledge is \
needed, give the answer between <answer> and </answer> without explanations, for example <answer> Beijing </answer>. \
Question: {question}
"""
DEMO = "Question: {question}\n"

TEMPLATES: dict[str, str | None] = {"none": None, "searchr1": SEARCHR1, "demo": DEMO}
"""By name in `data.prompt_template`; None leaves the row's prompt as it is."""


def render_prompt(prompt: object, question: str | None, tokenizer: Any, template: str | None, chat: bool) -> str:
    """The prompt of one row as text.

    A list of chat messages goes through the tokenizer's chat template. A plain prompt is taken as it stands, or as one
    user message if `chat`. With a `template`, the prompt is made from the row's question instead (from the plain
    prompt, if the row has no question of its own).

    Args:
        prompt: the row's prompt: a text, a list of `{"role", "content"}`, or None.
        question: the row's bare question, if it has one.
        tokenizer: read for its chat template only.
        template: a name in `TEMPLATES`; None means "none".
        chat: `data.apply_chat_template`.

    Raises:
        UserError: nothing to make a prompt from, or the tokenizer cannot render chat messages.
    """
    if template is not None and template not in TEMPLATES:
        raise UserError(f"data.prompt_template: {template!r} is not known; use one of {', '.join(TEMPLATES)}")
    text = TEMPLATES[template] if template is not None else None
    if text is not None:
        subject = question if question is not None else prompt
        if isinstance(subject, str):
            if not subject.strip():
                raise UserError("the question is empty")
            prompt = text.replace("{question}", subject.strip())
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError("the prompt is empty")
        if not chat:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        return _render_chat(prompt, tokenizer)
    if prompt is None and question is not None:
        raise UserError("the row has a question but no prompt; set data.prompt_template to searchr1 or demo")
    if prompt is None:
        raise UserError("the row has no prompt; name its column in data.prompt_key")
    raise UserError(f"the prompt is a {type(prompt).__name__}; expected a text or a list of chat messages")


def _render_chat(messages: list[Any], tokenizer: Any) -> str:
    from jinja2 import TemplateError

    if not messages or not all(_is_message(message) for message in messages):
        raise UserError('the prompt is a list; expected chat messages: [{"role": "user", "content": "…"}]')
    if not any(message["content"].strip() for message in messages):
        raise UserError("the prompt is empty")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the prompt is chat messages, but the model's tokenizer has no chat template; use rows with a plain prompt, "
            "or a model with one"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise UserError(f"the model's chat template refuses the messages: {error}") from error


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
