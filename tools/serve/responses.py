"""The route /v1/responses, which agents speak: its requests become those of a chat, and events its items.

The server keeps no answers, so a request holds the whole conversation. An answer has a message with its text, if there
is any, and then an item for each call of a tool.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator

from tools.serve.replies import Streamed, split_calls, usage_of
from tools.serve.requests import MAX_MESSAGES, SAMPLING, UNREAD, Asked, Wrong, unknown
from tools.serve.rows import Event

# As in a chat.
SAME = SAMPLING | {
    "model",
    "stream",
    "plan",
    "cache_prompt",
    "chat_template_kwargs",
    "tool_choice",
    "parallel_tool_calls",
}
IGNORED = UNREAD | {"include", "reasoning", "truncation", "prompt_cache_retention", "client_metadata", "stream_options"}
ONLY = {"background": False, "top_logprobs": 0}  # the value that asks for nothing
OWN = {"input", "instructions", "max_output_tokens", "text", "tools"}


# ---- Requests ----


def as_chat(body: dict) -> dict:
    """The body of a chat for the body of a request to this route. Raises Wrong."""
    for key in body:
        if key in ("previous_response_id", "conversation"):
            raise Wrong(f"{key} is given, but this server keeps no answers; send the whole conversation", param=key)
        if key in ONLY and body[key] != ONLY[key]:
            raise Wrong(f"{key} is {body[key]!r:.80}; this server takes {ONLY[key]!r} only", param=key)
        if key not in SAME | IGNORED | OWN | ONLY.keys():
            raise unknown(key, SAME | OWN)
    if "input" not in body:
        raise Wrong("input is missing", param="input")
    chat = {key: body[key] for key in SAME & body.keys()}
    chat["messages"] = _messages(body["input"])
    if "instructions" in body:
        chat["messages"].insert(0, {"role": "system", "content": body["instructions"]})
    if "max_output_tokens" in body:
        chat["max_completion_tokens"] = body["max_output_tokens"]
    if "tools" in body:
        chat["tools"] = _tools(body["tools"])
    text = body.get("text", {})
    if not isinstance(text, dict):
        raise Wrong("text must be an object", param="text")
    if text.get("format") is not None:
        chat["response_format"] = _format(text["format"])
    return chat


def _messages(given) -> list[dict]:
    """The messages of an input: a text, or a list of items."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise Wrong("input must be a text or a list of items", param="input")
    if len(given) > MAX_MESSAGES:
        raise Wrong(f"there are {len(given)} items; at most {MAX_MESSAGES} are read", param="input")
    messages: list[dict] = []
    for item in given:
        kind = item.get("type", "message")
        if kind == "message":
            messages.append({"role": item.get("role"), "content": _content(item.get("content"))})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = _content(item.get("output"))
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        elif kind != "reasoning":  # which the model has not written
            raise Wrong(f"an item of the type {kind!r:.80} cannot be read", param="input")
    return messages


def _content(content):
    """The content of a chat's message for that of an item."""
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("input_text", "output_text"):
            parts.append({"type": "text", "text": part.get("text")})
        elif kind == "input_image":
            image = {"url": part.get("image_url"), "detail": part.get("detail", "auto")}
            parts.append({"type": "image_url", "image_url": image})
        else:
            raise Wrong("a part of an item must be input_text, output_text or input_image", param="input")
    if all(part["type"] == "text" and isinstance(part["text"], str) for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _tools(tools) -> list[dict]:
    if not isinstance(tools, list):
        raise Wrong("tools must be a list", param="tools")
    found = []
    for tool in tools:
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise Wrong("a tool must be of the type function; this server has no tools of its own", param="tools")
        function = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
        found.append({"type": "function", "function": function})
    return found


def _format(wanted) -> dict:
    if not isinstance(wanted, dict):
        raise Wrong("text.format must be an object", param="text")
    if wanted.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {"schema": wanted.get("schema")}}
    return {"type": wanted.get("type")}


# ---- Answers ----


class Writer:
    """The objects of one answer."""

    def __init__(self, asked: Asked):
        self.asked = asked
        self.id = f"resp_{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.message_id = f"msg_{secrets.token_hex(12)}"

    def response(self, status: str, output: list[dict]) -> dict:
        body = self.asked.body
        params = self.asked.jobs[0].params
        is_cut = status == "incomplete"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata", {}),
            "model": self.asked.name,
            "output": output,
            "parallel_tool_calls": body.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "temperature": params.temperature,
            "text": body.get("text", {"format": {"type": "text"}}),
            "tool_choice": body.get("tool_choice", "auto"),
            "tools": body.get("tools", []),
            "top_p": 1.0 if params.top_p is None else params.top_p,
            "usage": None if status == "in_progress" else self.usage(),
        }

    def usage(self) -> dict:
        found = usage_of(self.asked)
        return {
            "input_tokens": found["prompt_tokens"],
            "input_tokens_details": found["prompt_tokens_details"],
            "output_tokens": found["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": found["total_tokens"],
            "time_to_first_token": found["time_to_first_token"],
        }

    def message(self, text: str | None, status: str) -> dict:
        """The message item. text: None has no part yet."""
        content = [] if text is None else [self.part(text)]
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def part(self, text: str) -> dict:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def items(self, events: list[Event]) -> tuple[str, list[dict]]:
        """The status and the items of a finished answer."""
        status = "incomplete" if events[-1].finish_reason == "length" else "completed"
        text, functions = split_calls(self.asked, "".join(event.text for event in events))
        output = [self.message(text, status)] if text or not functions else []
        for function in functions:
            ids = {"id": f"fc_{secrets.token_hex(12)}", "call_id": f"call_{secrets.token_hex(12)}"}
            output.append({"type": "function_call", "status": "completed", **ids, **function})
        return status, output


def whole(asked: Asked, events: list[Event]) -> dict:
    """The object of a finished answer."""
    writer = Writer(asked)
    return writer.response(*writer.items(events))


async def chunks_of(asked: Asked, events: AsyncIterator[Event]) -> AsyncIterator[dict]:
    """The events of a stream, each with its type and number. Text that may belong to a tool call waits."""
    writer = Writer(asked)
    number = 0
    async for chunk in _chunks(writer, events):
        yield chunk | {"sequence_number": number}
        number += 1


async def _chunks(writer: Writer, events: AsyncIterator[Event]) -> AsyncIterator[dict]:
    at_text = {"item_id": writer.message_id, "output_index": 0, "content_index": 0}
    is_open = False  # whether the message has been announced
    seen = []
    answer = Streamed(writer.asked)
    async for event in events:
        if not seen:  # not before an event has come: a request that is refused gets no stream
            yield {"type": "response.created", "response": writer.response("in_progress", [])}
            yield {"type": "response.in_progress", "response": writer.response("in_progress", [])}
        seen.append(event)
        text = answer.more(event)
        if not text:
            continue
        if not is_open:
            is_open = True
            for chunk in _opening(writer, at_text):
                yield chunk
        yield {"type": "response.output_text.delta", **at_text, "delta": text, "logprobs": []}
    status, output = writer.items(seen)
    for index, item in enumerate(output):
        if item["type"] == "function_call":
            at = {"item_id": item["id"], "output_index": index}
            begun = item | {"arguments": "", "status": "in_progress"}
            yield {"type": "response.output_item.added", "output_index": index, "item": begun}
            yield {"type": "response.function_call_arguments.delta", **at, "delta": item["arguments"]}
            named = {"name": item["name"], "arguments": item["arguments"]}
            yield {"type": "response.function_call_arguments.done", **at, **named}
        else:
            (part,) = item["content"]
            if not is_open:
                for chunk in _opening(writer, at_text):
                    yield chunk
            rest, _ = answer.rest()
            if rest:
                yield {"type": "response.output_text.delta", **at_text, "delta": rest, "logprobs": []}
            yield {"type": "response.output_text.done", **at_text, "text": part["text"], "logprobs": []}
            yield {"type": "response.content_part.done", **at_text, "part": part}
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
    yield {"type": f"response.{status}", "response": writer.response(status, output)}


def _opening(writer: Writer, at_text: dict) -> list[dict]:
    """The events that announce the message."""
    item = writer.message(None, "in_progress")
    return [
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        {"type": "response.content_part.added", **at_text, "part": writer.part("")},
    ]
