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

TEMPLATES = {"searchr1": SEARCHR1, "demo": DEMO}


def render_prompt(prompt: object, question: str | None, tokenizer: Any, template: str | None, chat: bool) -> str:
    """The prompt of one row as text.

    A list of chat messages goes through the tokenizer's chat template; a plain prompt is taken as it stands, or as a
    user message if `chat`; a row with only a question takes `template`.

    Raises:
        UserError: the row has neither, or the tokenizer has no chat template.
    """
    if template is not None:
        if template not in TEMPLATES:
            raise UserError(f"data.prompt_template: unknown {template!r}; use one of {', '.join(TEMPLATES)}")
        if question is not None:
            prompt = TEMPLATES[template].format(question=question)
    if isinstance(prompt, str) and prompt.strip() and chat:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "content" in m for m in prompt):
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("the prompt is a list of chat messages, but the model's tokenizer has no chat template")
        return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if question is not None:
        raise UserError("the row has a question but no prompt; set data.prompt_template (searchr1 or demo)")
    raise UserError("the prompt is empty")
