"""Chat messages of any dialect -> `role` and a `content` that is text, as chat templates expect them."""

from __future__ import annotations

import json
from typing import Any

from searchr1.data.golds import column_names, shown
from searchr1.errors import UserError

Message = dict[str, Any]
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
"""ShareGPT's `from` -> `role`."""
TEXT_PARTS = ("text", "input_text", "output_text")
EXPECTED = 'expected chat messages: [{"role": "user", "content": "…"}]'


def read_messages(value: object, name: str) -> list[Message]:
    """Normalise messages: parts become one text, ShareGPT's `from` and `value` become `role` and `content`.

    Args:
        value: the column's value.
        name: of the column, for messages about it.

    Raises:
        UserError: no list of messages; a message without role or text; a part that is not text.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"{name}: is {shown(value)}; {EXPECTED}")
    return [_message(item, f"{name}[{number}]") for number, item in enumerate(value)]


def require_rendered(messages: list[Message], rendered: str) -> None:
    """Refuse a chat template that left a message's text out.

    Raises:
        UserError: a text (or a tool call) of these messages is not in `rendered`.
    """
    packed: str | None = None
    for message in messages:
        texts = [message["content"]]
        texts += [message["reasoning_content"]] if isinstance(message.get("reasoning_content"), str) else []
        texts += [str(call.get("function", call).get("name", "")) for call in message.get("tool_calls", ())]
        for text in texts:
            if text.strip() in rendered:
                continue
            packed = _packed(rendered) if packed is None else packed
            quoted = json.dumps(text, ensure_ascii=False)[1:-1]  # as templates write what tools return
            if _packed(text) not in packed and _packed(quoted) not in packed:
                raise UserError(
                    f"the model's chat template leaves out (part of) the {message['role']}'s {shown(text)}; use a template "
                    "that shows it, or prompt and response, or segments"
                )


def _packed(text: str) -> str:
    return "".join(text.split())


def _message(item: object, name: str) -> Message:
    if not isinstance(item, dict):
        raise UserError(f"{name}: is {shown(item)}; {EXPECTED}")
    # Columnar files fill keys that other messages have with nulls.
    message = {key: value for key, value in item.items() if value is not None}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise UserError(f"{name}.from: is {shown(speaker)}; expected one of {', '.join(SPEAKERS)}")
        message["role"] = SPEAKERS[speaker]
        if "value" in message:
            message["content"] = message.pop("value")
    role = message.get("role")
    if not isinstance(role, str) or not role.strip():
        raise UserError(f"{name}: has no role, only {column_names(message)}; {EXPECTED}")
    calls = message.get("tool_calls")
    if calls is not None:
        message["tool_calls"] = _tool_calls(calls, f"{name}.tool_calls")
    if "content" not in message and calls:
        message["content"] = ""
    if "content" not in message:
        raise UserError(f"{name}: the {role}'s message has no content; {EXPECTED}")
    message["content"] = _content(message["content"], f"{name}.content")
    return message


def _content(value: object, name: str) -> str:
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text" if "text" in part else None) if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS or not isinstance(text, str):
            what = f"a part of type {kind}" if isinstance(kind, str) and kind not in TEXT_PARTS else shown(part)
            raise UserError(f'{name}: holds {what}; expected a text, or parts {{"type": "text", "text": "…"}}')
        texts.append(text)
    return "".join(texts)


def _tool_calls(value: object, name: str) -> list[Message]:
    """Give calls an object as their arguments, as templates expect them; OpenAI writes them as JSON text."""
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise UserError(f"{name}: is {shown(value)}; expected a list of objects")
    calls = []
    for call in value:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{name}: {shown(call)} has no function name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{name}: the arguments of {function['name']} are not valid JSON ({error})") from error
        function = function | {"arguments": arguments if arguments is not None else {}}
        calls.append(call | {"function": function} if "function" in call else function)
    return calls
