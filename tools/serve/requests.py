"""The requests of the OpenAI protocol: from their JSON to jobs.

Nothing in a request is trusted. Images are data URLs only: the server opens no file and no address that a client names.
Texts cannot spell control tokens.
"""

from __future__ import annotations

import base64
import dataclasses
import difflib
import functools
import json
from collections.abc import Callable
from typing import Any

import pop
from pop.errors import ContextOverflow, check_count
from pop.generation.batch import as_prompts
from pop.generation.sampling import SamplingParams
from pop.inputs.messages import with_one_system_message
from tools.examples.json_schema import JsonSchema, tokenizer_of
from tools.serve.rows import Event, Job

MAX_BYTES = 2**24  # of a request
BYTES_A_TOKEN = 64  # of a request without its images, more than any text has
MAX_MESSAGES, MAX_TOOLS, MAX_IMAGES, MAX_ANSWERS = 2048, 128, 8, 8  # of a request
MAX_STOPS, MAX_STOP = 4, 200  # stop strings, and characters of one
MAX_LOGPROBS = 2**16  # of all answers together
MAX_SCHEMA = 2**16  # characters of a JSON schema
PIXELS = {"low": 2**18, "high": 2**20, "auto": 2**20}  # to which an image is resized, if its family chooses its size

SAMPLING = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop"}
BOTH = SAMPLING | {"model", "stream", "stream_options", "n", "max_tokens", "logprobs", "response_format"}
BOTH |= {"plan", "cache_prompt"}  # extras of this server
TEXT = BOTH | {"prompt"}
CHAT = BOTH | {"messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"}
CHAT |= {"tools", "tool_choice", "parallel_tool_calls"}
ONLY = {  # what this server does not do: only the value that asks for nothing is accepted
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "modalities": ["text"],
}
UNREAD = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
UNREAD |= {"reasoning_effort", "verbosity"}  # no model here knows them

ADDED = {"refusal", "annotations", "audio", "parsed"}  # to an answer, by the client library


class Wrong(Exception):
    """A request that gets an error object."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def unknown(key: str, known: set[str]) -> Wrong:
    """The error for an argument that the route does not have. It names those that resemble it."""
    near = difflib.get_close_matches(key[:80], sorted(known), n=2)
    advice = f"near names are {', '.join(near)}" if near else "leave it out"
    return Wrong(f"there is no argument {key!r:.80}; {advice}", param=key[:80])


class Served:
    """What requests ask of.

    Args:
        model: A model with a tokenizer.
        name: What clients call it.
        plans: What requests may name as their plan, besides "default", the model's own, and "none".
        longest: Prompts of more tokens run at full depth. None: every plan prunes prompts of any length.
    """

    def __init__(
        self,
        model: pop.Model,
        name: str,
        plans: dict[str, pop.PrunePlan] | None = None,
        longest: int | None = None,
    ):
        self.model = model
        self.name = name
        self.longest = longest
        self.plans = {"default": None, "none": pop.PrunePlan.none(), **(plans or {})}

    @functools.cached_property
    def _schema_tokenizer(self):
        return tokenizer_of(self.model)

    def schema(self, schema: dict) -> JsonSchema:
        """The processor of logits whose answers follow a JSON schema."""
        return JsonSchema(self.model, schema, self._schema_tokenizer)


@dataclasses.dataclass
class Asked:
    """A request that has been understood."""

    model: pop.Model
    name: str  # of the model
    body: dict  # the request, for the route that repeats it
    began: float  # when the request had arrived, as time.monotonic() counts
    is_chat: bool
    jobs: list[Job]
    answers: int  # for each prompt
    stream: bool
    include_usage: bool
    has_tools: bool


def understand(
    served: Served,
    raw: bytes,
    is_chat: bool,
    emit: Callable[[Event], object],
    as_chat: Callable[[dict], dict] = dict,
    began: float = 0.0,
) -> Asked:
    """Check a request, and encode its prompts. Raises Wrong or a PopError.

    Args:
        served: The model, and what else a request may name.
        raw: The request.
        is_chat: Whether it has messages. Otherwise it has a prompt.
        emit: What gets its events.
        as_chat: The body of a chat for the request's body, if it has another form.
        began: When the request had arrived, as time.monotonic() counts.
    """
    try:
        try:
            body = json.loads(raw)
        except ValueError:
            raise Wrong("the request is not JSON in UTF-8") from None
        if not isinstance(body, dict):
            raise Wrong("the request must be a JSON object")
        body = {key: value for key, value in body.items() if value is not None}
        asked = _understand(served, as_chat(body), is_chat, emit, len(raw))
        return dataclasses.replace(asked, body=body, began=began)
    except RecursionError:
        raise Wrong("the request is nested too deeply") from None


def _understand(served: Served, body: dict, is_chat: bool, emit, size: int) -> Asked:
    model, name = served.model, served.name
    for key, value in body.items():
        if key in ONLY and value != ONLY[key]:
            raise Wrong(f"{key} is {value!r:.80}; this server takes {ONLY[key]!r} only", param=key)
        read = CHAT if is_chat else TEXT
        if key not in ONLY and key not in UNREAD and key not in read:
            raise unknown(key, read)
    for key in ("model", "messages" if is_chat else "prompt"):
        if key not in body:
            raise Wrong(f"{key} is missing", param=key)
    if body["model"] != name:
        found = f"there is no model {body['model']!r:.80}; this server has {name!r}"
        raise Wrong(found, 404, "model", "model_not_found")
    stream = _typed(body, "stream", bool, False)
    options = _typed(body, "stream_options", dict, {})
    answers = check_count("n", body.get("n", 1), 1, MAX_ANSWERS)
    params, top_logprobs = _sampling(model, body, is_chat)
    params = dataclasses.replace(params, logits_processor=_format(served, body))
    plan = body.get("plan", "default")
    if not isinstance(plan, str) or plan not in served.plans:
        raise Wrong(
            f"plan is {plan!r:.80}; this server has {', '.join(served.plans)}; start it with --prune for others",
            param="plan",
        )
    uses_kept = _typed(body, "cache_prompt", bool, True)
    tools = None
    if is_chat:
        messages, characters = _messages(model, _typed(body, "messages", list, []))
        _check_size(model, size - characters)
        tools = _typed(body, "tools", list, [])
        choice = body.get("tool_choice", "auto")
        if choice not in ("auto", "none"):
            raise Wrong(f"tool_choice is {choice!r:.80}; it must be 'auto' or 'none'", param="tool_choice")
        if len(tools) > MAX_TOOLS:
            raise Wrong(f"there are {len(tools)} tools; there may be {MAX_TOOLS}", param="tools")
        tools = None if choice == "none" else tools or None
        if tools and params.logits_processor:
            raise Wrong(
                "an answer of a response_format cannot call a tool; leave one of them out, or send tool_choice 'none'",
                param="response_format",
            )
        template = _typed(body, "chat_template_kwargs", dict, {"enable_thinking": True})
        if template.keys() - {"enable_thinking"}:
            raise Wrong("chat_template_kwargs may have enable_thinking only", param="chat_template_kwargs")
        thinks = _typed(template, "enable_thinking", bool, True)
        try:
            prompts = [model.chat_format().prompt(messages, tools=tools, enable_thinking=thinks)]
        except (pop.InputError, pop.UnsupportedError) as error:
            param = "tools" if tools and "tools" in str(error) else "messages"
            if "enable_thinking" in str(error):
                param = "chat_template_kwargs"
            raise Wrong(str(error), param=param) from None
    else:
        _check_size(model, size)
        if isinstance(body["prompt"], list) and any(isinstance(one, dict) for one in body["prompt"]):
            raise Wrong("the prompt is a list of messages; send these to /v1/chat/completions", param="prompt")
        try:
            texts, _ = as_prompts(body["prompt"])
            if len(texts) * answers > MAX_ANSWERS:
                raise Wrong(f"there are {len(texts)} prompts; a request may have {MAX_ANSWERS} answers", param="prompt")
            prompts = [(model.encode(text), []) for text in texts]
        except pop.InputError as error:
            raise Wrong(str(error), param="prompt") from None
    jobs = []
    for tokens, media in prompts:
        model.check_fits(len(tokens))
        is_too_long = served.longest is not None and len(tokens) > served.longest
        depth = served.plans["none" if is_too_long else plan]
        for number in range(answers):
            seed = None if params.seed is None else (params.seed + number) % 2**63
            one = dataclasses.replace(params, seed=seed)
            job = Job(len(jobs), tokens, media, one, top_logprobs, emit, depth, uses_kept)
            jobs.append(job)
    most = sum(min(params.max_new_tokens, model.max_seq_len - len(job.tokens)) for job in jobs)
    if params.logprobs and most * (top_logprobs + 1) > MAX_LOGPROBS:
        raise Wrong(f"there may be {MAX_LOGPROBS} logprobs; lower max_tokens or top_logprobs", param="logprobs")
    include_usage = _typed(options, "include_usage", bool, False)
    _typed(body, "parallel_tool_calls", bool, True)
    return Asked(model, name, body, 0.0, is_chat, jobs, answers, stream, include_usage, bool(tools))


def _format(served: Served, body: dict) -> JsonSchema | None:
    """What makes answers follow a response_format. None: nothing need be done."""
    wanted = _typed(body, "response_format", dict, {"type": "text"})
    if wanted.get("type") == "text":
        return None
    schema = {"type": "object"}
    if wanted.get("type") == "json_schema":
        schema = _typed(wanted, "json_schema", dict, {}).get("schema")
        if not isinstance(schema, dict):
            place = "response_format.json_schema.schema (in /v1/responses: text.format.schema)"
            raise Wrong(f"{place} is {schema!r:.80}; it must be a JSON schema", param="response_format")
    elif wanted.get("type") != "json_object":
        raise Wrong("the type of response_format is text, json_object or json_schema", param="response_format")
    if len(json.dumps(schema)) > MAX_SCHEMA:
        raise Wrong(f"a schema may have {MAX_SCHEMA:,} characters", param="response_format")
    try:
        return served.schema(schema)
    except pop.InputError as error:
        raise Wrong(str(error), param="response_format") from None


def _typed(values: dict, key: str, kind: type, default):
    value = default if values.get(key) is None else values[key]
    if not isinstance(value, kind):
        raise Wrong(f"{key} is {value!r:.80}; it must be of the type {kind.__name__}", param=key)
    return value


def _check_size(model: pop.Model, size: int) -> None:
    """Refuse at once what would take long to encode, and could not fit."""
    if size > BYTES_A_TOKEN * model.max_seq_len + 2**16:
        raise ContextOverflow(f"the request has {size:,} bytes, but the model takes {model.max_seq_len:,} tokens")


def _sampling(model: pop.Model, body: dict, is_chat: bool) -> tuple[SamplingParams, int]:
    """The options of sampling, and how many of the likeliest tokens an answer lists."""
    stops = body.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    if isinstance(stops, list) and (len(stops) > MAX_STOPS or any(len(str(stop)) > MAX_STOP for stop in stops)):
        raise Wrong(f"there may be {MAX_STOPS} stop strings of {MAX_STOP} characters", param="stop")
    if is_chat:
        logprobs = _typed(body, "logprobs", bool, False)
        top = body.get("top_logprobs", 0)
    else:
        logprobs = "logprobs" in body
        top = body.get("logprobs", 0)
    top = check_count("top_logprobs" if is_chat else "logprobs", top, 0, 20 if is_chat else 5)
    if top and not logprobs:
        raise Wrong("top_logprobs needs logprobs to be true", param="top_logprobs")
    limits = [name for name in ("max_completion_tokens", "max_tokens") if name in body]
    limits = [check_count(name, body[name]) for name in limits] or [model.max_seq_len if is_chat else 16]
    # The protocol's temperature is 1, unless the checkpoint states another.
    options = {"temperature": 1.0} | (model.sampling or {}) | {name: body[name] for name in SAMPLING & body.keys()}
    return SamplingParams(**options, max_new_tokens=min(limits), logprobs=logprobs), top


def _messages(model: pop.Model, messages: list) -> tuple[list, int]:
    """The messages as `pop.Model.chat` takes them, and the characters of their images."""
    if len(messages) > MAX_MESSAGES:
        raise Wrong(f"there are {len(messages)} messages; at most {MAX_MESSAGES} are read", param="messages")
    read, urls = [], []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise Wrong(f"message {number} is not an object", param="messages")
        # The client library adds these keys to an answer, and None for each key without a value.
        message = {key: value for key, value in message.items() if value is not None and key not in ADDED}
        if message.get("role") == "developer":
            message["role"] = "system"
        if message.get("role") in ("system", "user", "assistant"):
            _typed(message, "name", str, "")  # of a participant; chat templates do not show it
            message.pop("name", None)
        if isinstance(message.get("content"), list):
            if message.get("role") == "system":
                message["content"] = "".join(map(_system_text, message["content"]))
            else:
                message["content"] = [_part(model, part, urls) for part in message["content"]]
        read.append(message)
    if len(urls) > MAX_IMAGES:
        raise Wrong(f"there are {len(urls)} images; at most {MAX_IMAGES} are read", param="messages")
    return with_one_system_message(read), sum(map(len, urls))


def _system_text(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise Wrong("a part of a system message must be a text", param="messages")
    return part["text"]


def _part(model: pop.Model, part: Any, urls: list[str]) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return part
    if kind == "image_url" and "image" not in model.vision.marks:
        raise Wrong("this model takes text only; leave out the images", param="messages")
    image = part.get("image_url") if kind == "image_url" else None
    if not isinstance(image, dict) or image.get("detail", "auto") not in (*PIXELS, None):
        raise Wrong("a part of a message must be a text or an image_url", param="messages")
    url = image.get("url")
    if not isinstance(url, str) or url[:5].lower() != "data:":
        raise Wrong("an image must be a data URL; this server opens no addresses and no files", param="messages")
    header, _, encoded = url.partition(",")
    try:
        content = base64.b64decode(encoded, validate=True)
    except ValueError:
        content = b""
    if not (content and header.lower().endswith(";base64")):
        raise Wrong("an image must be a data URL in base64: data:image/TYPE;base64,...", param="messages")
    urls.append(url)
    limits = {"max_pixels": PIXELS[image.get("detail") or "auto"]} if model.vision.limits.get("image") else {}
    return {"type": "image", "image": content, **limits}
