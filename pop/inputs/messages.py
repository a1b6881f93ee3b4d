"""The messages of a conversation: checks them, and brings them into the form that chat templates take."""

import json
from itertools import takewhile
from typing import Any

from pop.errors import InputError
from pop.inputs.images import Image
from pop.inputs.processors import Prepared, Processor

# The roles, and what a message may have besides its role and content.
_RESULT = ("name", "tool_call_id")
KEYS = {
    "system": (),
    "user": (),
    "assistant": ("tool_calls", "reasoning_content"),
    "tool": _RESULT,
    "ipython": _RESULT,
}


def read_messages(messages: list[dict], vision: Processor) -> tuple[list[dict], list[Prepared]]:
    """Check all messages. Return them as templates take them, and their images and videos in order.

    Raises InputError for a message that is wrong, and for images or videos that the model does not take.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError("messages must be a list with at least one {'role': ..., 'content': ...}.")
    told = []
    media = []
    for n, message in enumerate(messages):
        checked, shown = _read_message(message, n, vision)
        told.append(checked)
        media += shown
    return told, media


def with_one_system_message(messages: list[dict]) -> list[dict]:
    """The messages, with one system message at the beginning: chat formats have one, and agents send several."""
    # Those with a text and nothing else, which a joined message could not hold.
    leading = takewhile(lambda one: one == {"role": "system", "content": str(one.get("content"))}, messages)
    texts = [message["content"] for message in leading]
    if len(texts) < 2:
        return messages
    return [{"role": "system", "content": "\n\n".join(texts)}, *messages[len(texts) :]]


def _read_message(message: dict, n: int, vision: Processor) -> tuple[dict, list[Prepared]]:
    where = f"message {n}"
    _check_keys(message, n)
    role = message["role"]
    try:
        calls = [read_call(call) for call in message.get("tool_calls") or ()]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise InputError(f"{where}: tool_calls must be a list like {[tool_call('f', {'x': 1})]}") from None
    given = message.get("content")
    if calls and given is None:
        given = ""
    if isinstance(given, str):
        given = [{"type": "text", "text": given}]
    if not isinstance(given, list) or not given:
        raise InputError(f"{where}: the content must be text or a list of parts, got {given!r:.80}.")
    parts = [_read_part(part, where, vision) for part in given]
    text = "".join(part for part in parts if isinstance(part, str))
    shown = [part for part in parts if isinstance(part, Prepared)]
    if shown and role != "user":
        raise InputError(f"{where} has an image or video; only messages with the role user may have one.")
    if role == "user" and not shown and not text.strip():
        raise InputError(f"{where} has the role user, but it is empty.")
    thoughts = message.get("reasoning_content")
    if not isinstance(thoughts, str | None):
        raise InputError(f"{where}: reasoning_content must be text, got {thoughts!r:.80}.")
    written = text
    if shown:  # templates need no pixels
        written = [{"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind} for part in parts]
    checked = message | {"content": written}
    checked.pop("tool_calls", None)
    if calls:
        checked["tool_calls"] = calls
    return checked, shown


def _check_keys(message: dict, n: int) -> None:
    """Check the role of message `n`, and that it has the keys of its role."""
    if not isinstance(message, dict):
        raise InputError(f"message {n} must be a dict of 'role' and 'content', got {message!r:.80}.")
    role = message.get("role")
    if not isinstance(role, str) or role not in KEYS or (role == "system" and n > 0):
        raise InputError(f"message {n} has the role {role!r}; use user, assistant, tool or, for the first, system.")
    unknown = message.keys() - {"role", "content", *KEYS[role]}
    if unknown:
        raise InputError(f"message {n} has {[*unknown]!r:.80}, which the role {role} cannot have; leave it out")


def _read_part(part: dict[str, Any], where: str, vision: Processor) -> str | Prepared:
    """Return a part's text, or its image or video, prepared."""
    match part:
        case {"type": "text", "text": str(text), **rest} if not rest:
            return text
        case {"type": "image", "image": given, **limits} if limits.keys() <= {"min_pixels", "max_pixels"}:
            if limits:
                given = Image(given, **limits)
        case {"type": "video", "video": given, **rest} if not rest:
            pass
        case _:
            raise InputError(
                f"{where}: a part must be like "
                "{'type': 'text', 'text': 'Hi'}, or have the type image or video, with a path or bytes under that key; "
                f"got {part!r:.80}."
            )
    return vision.prepare(part["type"], given)


def read_call(given: dict) -> dict:
    """Return one call, given in either of two forms, and with arguments as a dict or as JSON.

    Raises KeyError, TypeError, ValueError, AttributeError or RecursionError for anything else.
    """
    function = given.get("function", given)
    name = function["name"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise TypeError
    return tool_call(name, arguments)


def tool_call(name: str, arguments: Any) -> dict:
    """Return a call in the form that messages and templates have."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}
