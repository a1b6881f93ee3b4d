"""tools/serve over HTTP, with the OpenAI client where it can ask, and with plain sockets where it cannot."""

import base64
import copy
import io
import itertools
import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from support.chat_models import PLANS, make
from support.goldens import REFUSED
from support.nightly import NIGHTLY
from support.readme import blocks
from support.serving import HEADERS, process, serving, until
from support.tiny_chat import write_chat_checkpoint
from support.tiny_images import random_bytes
from support.tiny_qwen3_vl import A, seeing_model

import pop
from pop.generation.sampling import SamplingParams
from tools.serve import requests as limits
from tools.serve.__main__ import main, work
from tools.serve.replies import error_object
from tools.serve.rows import Row

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
app = pytest.importorskip("tools.serve.app")

README = "tools/serve/README.md"


def user(content):
    """The messages of a conversation that only has this text, or these parts."""
    return [{"role": "user", "content": content}]


HELLO = user("Hello")
CHAT = {"model": "tiny", "messages": HELLO}
TEXT = {"model": "tiny", "prompt": "Hello"}
FRESH = {"cache_prompt": False}
BODIES = {"/responses": {"model": "tiny", "input": "Hello"}, "/chat/completions": CHAT, "/completions": TEXT}


@pytest.fixture(scope="module")
def model():
    return make("llama", PLANS["first 2, last 3"])


@pytest.fixture(scope="module")
def url(model):
    with serving(model) as (_, address):
        yield address


@pytest.fixture(scope="module")
def client(url):
    return client_of(url)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A process that the command in the README has started, and its address."""
    weights = tmp_path_factory.mktemp("weights")
    write_chat_checkpoint(weights / "smollm2-135m")
    command = blocks("bash", README)[0]
    assert command.startswith("python -m tools.serve smollm2-135m ")
    options = ("--no-compile", "--cache-mb", "1", "--queue", "8")
    with process(*shlex.split(command)[3:], *options, POP_WEIGHTS=str(weights)) as running:
        yield running


def client_of(url, key="none"):
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=600)


def ask(url, path, body, headers=HEADERS):
    """Status and JSON of the answer to a POST of bytes or of JSON; of a stream, the first chunk."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=600) as answer:
            return answer.status, json.loads(answer.read().removeprefix(b"data: ").split(b"\n")[0])
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def health(url):
    return ask(url.removesuffix("/v1"), "/health", None)[1]


# ---- Answers ----


def test_the_answers_are_the_models(client, model):
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 7}
    expected = model.chat(HELLO, max_new_tokens=9, **options)
    answer = client.chat.completions.create(**CHAT, max_tokens=9, **options)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == len(expected.tokens)

    options = {"min_p": 0.1, "repetition_penalty": 1.2}
    expected = model.generate("Hello", max_new_tokens=9, **options)
    answer = client.completions.create(**TEXT, max_tokens=9, temperature=0, extra_body=options)
    assert answer.choices[0].text == expected.text


@pytest.mark.parametrize("is_chat", [True, False])
def test_a_stream_brings_what_a_whole_answer_has(client, is_chat):
    create = client.chat.completions.create if is_chat else client.completions.create
    asked = {**(CHAT if is_chat else TEXT), "max_tokens": 12, "temperature": 0.8, "seed": 3}
    asked |= {"logprobs": True, "top_logprobs": 2} if is_chat else {"logprobs": 2}
    create(**asked)  # leaves a kept cache, from which both answers below continue, so that they round alike
    whole = create(**asked)
    *parts, last = create(**asked, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    choices = [chunk.choices[0] for chunk in parts]
    (expected,) = whole.choices
    assert {choice.finish_reason for choice in choices[:-1]} <= {None}
    assert choices[-1].finish_reason == expected.finish_reason
    logprobs = [choice.logprobs for choice in choices if choice.logprobs]
    if is_chat:
        assert choices[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in choices) == expected.message.content
        assert [one for each in logprobs for one in each.content] == expected.logprobs.content
    else:
        assert "".join(choice.text for choice in choices) == expected.text
        assert [one for each in logprobs for one in each.token_logprobs] == expected.logprobs.token_logprobs


def test_logprobs_are_the_models(client, model):
    asked = {**CHAT, "max_tokens": 9, "temperature": 0, "logprobs": True}
    expected = model.chat(HELLO, max_new_tokens=9, logprobs=True)
    content = client.chat.completions.create(**asked, top_logprobs=3).choices[0].logprobs.content
    assert [one.logprob for one in content] == pytest.approx(expected.logprobs, abs=1e-4)
    assert [one.bytes for one in content] == [list(model.tokenizer.token_bytes(token)) for token in expected.tokens]
    assert {len(one.top_logprobs) for one in content} == {3}
    assert all(one.top_logprobs[0].logprob == one.logprob for one in content)  # greedy
    bare = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert [one.top_logprobs for one in bare] == [[]] * len(content)


def test_several_answers_and_several_prompts(client, model):
    create = client.completions.create
    sampled = {"temperature": 1.0, "seed": 4}
    answer = create(model="tiny", prompt=["Hello", "Hi"], n=2, max_tokens=5, **sampled)
    for choice, (text, seed) in zip(answer.choices, itertools.product(("Hello", "Hi"), (4, 5)), strict=True):
        assert choice.text == model.generate(text, max_new_tokens=5, temperature=1.0, seed=seed).text
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == len("Hello") + len("Hi")

    expected = [one.text for one in model.generate(["Hello", "Hi"], max_new_tokens=5)]
    for prompt, texts in (([list(b"Hello"), list(b"Hi")], expected), (list(b"Hi"), expected[1:])):
        tokens = create(model="tiny", prompt=prompt, max_tokens=5, temperature=0)
        assert [choice.text for choice in tokens.choices] == texts

    texts = ["", ""]
    for chunk in client.chat.completions.create(**CHAT, n=2, max_tokens=5, stream=True, **sampled):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content
    assert texts == [model.chat(HELLO, max_new_tokens=5, temperature=1.0, seed=seed).text for seed in (4, 5)]


def test_models_and_stop_strings(client, model):
    text = model.generate("Hello", max_new_tokens=30).text
    stop = text[4:6]
    for stops in (stop, ["no such", stop]):
        (choice,) = client.completions.create(**TEXT, max_tokens=30, temperature=0, stop=stops).choices
        assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
    assert [one.id for one in client.models.list()] == [client.models.retrieve("tiny").id] == ["tiny"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_temperature_is_the_protocols_unless_the_checkpoint_states_one():
    model = make("llama", PLANS["none"])

    def params(is_chat, **asked):
        served = limits.Served(model, "tiny")
        return limits.understand(served, json.dumps(asked).encode(), is_chat, print).jobs[0].params

    assert params(False, **TEXT).temperature == 1
    model.sampling = {"temperature": 0.6, "top_p": 0.9}
    assert params(False, **TEXT) == SamplingParams(max_new_tokens=16, temperature=0.6, top_p=0.9)
    assert params(True, **CHAT, temperature=0) == SamplingParams(max_new_tokens=512, top_p=0.9)


def test_texts_spell_no_control_tokens(client):
    def count(create, **asked):
        return create(model="tiny", max_tokens=1, **asked).usage.prompt_tokens

    text = "<|im_end|>"
    chat = client.chat.completions.create
    assert count(client.completions.create, prompt=text) == len(text)
    assert count(chat, messages=user(text)) == count(chat, messages=user("x")) - 1 + len(text)
    assert count(chat, messages=[HELLO[0] | {"name": text}]) == count(chat, messages=HELLO)  # a name is not shown


# ---- Conversations, images and tools ----


ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
TOOLS = [{"type": "function", "function": ADD}]
RESPONSES_TOOLS = [{"type": "function", **ADD, "strict": True}]
LARGE_SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"description": "a" * 70_000}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
WHAT = {"type": "text", "text": "What is this?"}


@pytest.fixture(scope="module")
def qwen():
    """A tiny Qwen3-VL, which takes images and tools."""
    return seeing_model()


@pytest.fixture(scope="module")
def qwen_url(qwen):
    with serving(qwen) as (_, address):
        yield address


@pytest.fixture(scope="module")
def qwen_client(qwen_url):
    return client_of(qwen_url)


@pytest.fixture
def says(monkeypatch):
    """says(*pieces): every answer has this text from now on, a piece with each token and the rest with the last one."""

    def says(*pieces):
        def decoder(errors):
            left = [*pieces]

            def decode(data, last):
                count = len(left) if last else min(1, len(left) - 1)
                found = "".join(left[:count])
                del left[:count]
                return found

            return Mock(decode=decode)

        monkeypatch.setattr("pop.generation.answers.getincrementaldecoder", lambda encoding: decoder)
        monkeypatch.setattr("tools.serve.rows.end_ids", lambda model: frozenset())  # no answer ends before max_tokens

    return says


def data_url(pixels):
    file = io.BytesIO()
    pytest.importorskip("PIL.Image").fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def image(url, **more):
    return {"type": "image_url", "image_url": {"url": url, **more}}


def test_an_image_is_what_its_data_url_holds(qwen, qwen_client):
    asked = {"model": "tiny", "max_tokens": 4, "temperature": 0, "extra_body": FRESH}
    answer = qwen_client.chat.completions.create(**asked, messages=user([image(data_url(A)), WHAT]))
    expected = qwen.chat(user([{"type": "image", "image": A}, WHAT]), max_new_tokens=4)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == expected.prompt_tokens


def test_no_file_and_no_address_that_a_client_names_is_opened(qwen_url, tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(base64.b64decode(data_url(A).partition(",")[2]))
    urls = (str(file), file.as_uri(), "http://127.0.0.1/a.png", "data:image/png;base64,AAAA", "data:,a", 7, None)
    urls += ("data:image/png;base64,A", "data:image/png;base64,A!==", data_url(A).replace(";base64", ""))
    parts = [*map(image, urls), {"type": "image", "image": str(file)}, {"type": "video", "video": [str(file)]}]
    bodies = [("/chat/completions", CHAT | {"messages": user([part])}) for part in parts]
    items = [user([{"type": "input_image", "image_url": bad}]) for bad in urls]
    bodies += [("/responses", {"model": "tiny", "input": item}) for item in items]
    for path, body in bodies:
        status, answer = ask(qwen_url, path, body)
        assert status == 400 and answer["error"]["message"], body
    many = user([image(data_url(A[:32, :32]))] * (limits.MAX_IMAGES + 1))
    status, answer = ask(qwen_url, "/chat/completions", CHAT | {"messages": many})
    assert status == 400 and "images" in answer["error"]["message"]


def test_tool_calls(qwen_client, says):
    create = partial(qwen_client.chat.completions.create, model="tiny", tools=TOOLS, max_tokens=3)
    says(CALL)
    (choice,) = create(messages=HELLO).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (found,) = choice.message.tool_calls
    assert (found.function.name, json.loads(found.function.arguments)) == ("add", {"a": 1})
    *_, last = create(messages=HELLO, stream=True)
    (streamed,) = last.choices
    assert (streamed.finish_reason, streamed.delta.tool_calls[0].function.name) == ("tool_calls", "add")
    assert create(messages=HELLO, tool_choice="none").choices[0].message.content == CALL
    turns = [*HELLO, choice.message, {"role": "tool", "tool_call_id": found.id, "content": "1"}]
    assert create(messages=turns).usage.prompt_tokens > 0


SPOKEN = [
    ([CALL[:3], CALL[3:20], CALL[20:]], ["", None]),
    (["Let me ", "see.\n", CALL[:3], CALL[3:]], ["", "Let me", " see.", None]),
    (["I <t", "ook> ", "it. <tool_call>", "{no}"], ["", "I", " <took>", " it.", " <tool_call>{no}"]),
    ([" ", '{"name": "add", ', '"parameters": {"a": 1}}'], ["", None]),
    (["{a", " set}"], ["", "{a set}"]),
    (['{"name": "add", "parameters":', ' {"a": "<tool_call>"}}'], ["", None]),
    (["Yes", ", so."], ["", "Yes", ", so."]),
    (["Or <tool_call>?", "</think>", "\n", "So", CALL], ["", "Or", " <tool_call>?</think>", "\nSo", None]),
]


@pytest.mark.parametrize(("pieces", "expected"), SPOKEN)
def test_a_stream_beside_tools_waits_for_what_may_be_a_call(qwen_client, says, pieces, expected):
    options = {"tools": TOOLS, "max_tokens": len(pieces), "temperature": 0, "logprobs": True}
    create = partial(qwen_client.chat.completions.create, model="tiny", messages=HELLO, **options)
    says(*pieces)
    (whole,) = create().choices
    message = whole.message
    choices = [chunk.choices[0] for chunk in create(stream=True)]
    tokens = [one.token for choice in choices if choice.logprobs for one in choice.logprobs.content]
    assert tokens == [one.token for one in whole.logprobs.content] and len(tokens) == len(pieces)
    deltas = [choice.delta for choice in choices]
    assert [delta.content for delta in deltas] == expected
    assert "".join(delta.content or "" for delta in deltas) == (message.content or "")
    assert bool(deltas[-1].tool_calls) == bool(message.tool_calls) == (expected[-1] is None)
    asked = {"input": "Hello", "model": "tiny", "tools": RESPONSES_TOOLS, "max_output_tokens": len(pieces)}
    events = [*qwen_client.responses.create(**asked, stream=True)]
    said = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert said == [text for text in expected if text]
    assert events[-1].response.output_text == "".join(said)


def test_what_thoughts_mention_is_no_call(qwen_client, says):
    """A call after them is one, and they stay with the text before it."""
    create = partial(qwen_client.chat.completions.create, model="tiny", tools=TOOLS, max_tokens=3, messages=HELLO)
    said = f"<think>\nPerhaps {CALL}?\n</think>\n\nNo."
    says(said)
    message = create().choices[0].message
    assert (message.content, message.tool_calls) == (said, None)
    says(f"<think>\nA <tool_call>?\n</think>\n\nYes. {CALL}{CALL}")
    for options, count in (({}, 2), ({"parallel_tool_calls": False}, 1)):
        message = create(**options).choices[0].message
        assert message.content == "<think>\nA <tool_call>?\n</think>\n\nYes."
        assert len(message.tool_calls) == count


def test_system_messages_at_the_beginning_are_one(client, model):
    told = [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": "Be kind."}, *HELLO]
    expected = len(model.chat_tokens([{"role": "system", "content": "Be brief.\n\nBe kind."}, *HELLO]))
    parts = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *told[1:]]
    assert client.chat.completions.create(model="tiny", messages=parts, max_tokens=2).usage.prompt_tokens == expected
    assert client.chat.completions.create(model="tiny", messages=told, max_tokens=2).usage.prompt_tokens == expected
    answer = client.responses.create(model="tiny", instructions="Be brief.", input=told[1:], max_output_tokens=2)
    assert answer.usage.input_tokens == expected


def test_values_that_ask_for_nothing(url):
    nothing = {"top_logprobs": 0, "parallel_tool_calls": True, "stream_options": {"include_usage": None}}
    response = BODIES["/responses"] | nothing | {"background": False, "max_output_tokens": 2}
    chat = CHAT | nothing | {"chat_template_kwargs": {}, "max_tokens": 2, "reasoning_effort": "low"}
    assert ask(url, "/responses", response)[0] == 200
    assert ask(url, "/chat/completions", chat)[0] == 200


def test_the_first_token_is_waited_for_from_when_the_request_has_arrived(url, monkeypatch):
    """Also while others are encoded."""
    understand = app.understand
    monkeypatch.setattr(app, "understand", lambda *args: time.sleep(0.5) or understand(*args))
    usage = ask(url, "/chat/completions", CHAT | {"max_tokens": 2})[1]["usage"]
    assert usage["time_to_first_token"] > 0.5


def test_the_readme_runs_as_printed(started, capsys, tmp_path, monkeypatch):
    _, url = started
    document = tmp_path / "pop" / "data" / "alice.txt"
    document.parent.mkdir(parents=True)
    document.write_text("Alice was beginning to get very tired. " * 5)  # the whole story has too many bytes
    monkeypatch.chdir(tmp_path)
    _, asked, *_ = (block.replace("http://127.0.0.1:8000/v1", url) for block in blocks("bash", README))
    names = {}
    for code in blocks("python", README):
        code = code.replace("http://127.0.0.1:8000/v1", url).replace(
            "output_tokens=24", "output_tokens=24, temperature=0"
        )
        exec(compile(code, README, "exec"), names)  # greedy, because a sampled answer may be empty
        out = capsys.readouterr().out
        assert out
        if "cached_tokens" in code:
            _, *others = (int(line.split()[0]) for line in out.splitlines() if line[:1].isdigit())
            assert others and min(others) > 100, "the document was not taken from the cache"
    if shutil.which("curl"):
        ran = subprocess.run(["bash", "-c", asked], capture_output=True, check=True)
        assert json.loads(ran.stdout)["usage"]["completion_tokens"] <= 24


# ---- Plans, and what usage says ----


def test_a_request_chooses_its_plan(model):
    half = pop.PrunePlan((1, 2))
    with serving(model, plans={"half": half}) as (_, url):
        client = client_of(url)
        listed = client.models.retrieve("tiny")
        assert (listed.plans, listed.max_model_len) == (["default", "none", "half"], model.max_seq_len)
        asked = {"prompt": "Hello, who are you?", "temperature": 0}
        for name, plan in (("none", pop.PrunePlan.none()), ("half", half), ("default", model.plan)):
            answer = client.completions.create(model="tiny", **asked, max_tokens=9, extra_body={"plan": name})
            assert answer.choices[0].text == model.generate(**asked, max_new_tokens=9, plan=plan).text


def test_prompts_of_more_tokens_than_the_longest_run_at_full_depth(model):
    served = limits.Served(model, "tiny", {"half": pop.PrunePlan((1, 2))}, longest=20)

    def plans(**asked):
        body = {"model": "tiny", "prompt": [[5] * 20, [5] * 21], **asked}
        return [job.plan for job in limits.understand(served, json.dumps(body).encode(), False, print).jobs]

    assert plans() == [None, pop.PrunePlan.none()]
    assert plans(plan="half") == [pop.PrunePlan((1, 2)), pop.PrunePlan.none()]
    served.longest = None
    assert plans() == [None, None]


def test_every_route_says_how_many_tokens_were_pruned_and_when_the_first_one_came(url, model):
    """The plan runs the first 2 and the last 3 tokens at full depth."""
    text = "abc" * 9
    chat = {"messages": user(text), "max_tokens": 2}
    in_chat = len(model.chat_tokens(chat["messages"]))

    def details_of(path, body):
        usage = ask(url, path, {"model": "tiny", **body})[1]["usage"]
        assert 0 < usage["time_to_first_token"] < 600
        return usage.get("prompt_tokens_details") or usage["input_tokens_details"]

    def pruned(path, body):
        return details_of(path, body | FRESH)["pruned_tokens"]

    assert pruned("/completions", {"prompt": [text, text[:4]], "max_tokens": 2}) == len(text) - 5
    assert pruned("/chat/completions", chat) == in_chat - 5
    assert pruned("/responses", {"input": text, "max_output_tokens": 2}) == in_chat - 5
    details_of("/chat/completions", chat)  # leaves its cache, with the prompt's last tokens at full depth
    # Only the boundary token runs again.
    assert details_of("/chat/completions", chat) == {"cached_tokens": in_chat - 1, "pruned_tokens": 0}


@pytest.fixture
def start(tiny_folder, monkeypatch):
    """start(*words) runs the command with a tiny model up to where it would answer. Returns its status."""
    monkeypatch.setattr("tools.serve.__main__.threading.Thread", Mock())
    monkeypatch.setattr("tools.serve.__main__.uvicorn", Mock())
    return lambda *words: main([tiny_folder, "--port", "0", *words])


def test_the_options_reach_the_model(start, monkeypatch, capsys):
    """A plan that does not fit is refused before the weights are read."""
    load = Mock(side_effect=pop.CheckpointError("enough"))
    monkeypatch.setattr(pop, "load", load)
    words = shlex.split("--dtype bfloat16 --chat-format gemma --prune 0.5 --prune none --prune")
    assert start(*words, "1,3") == 2
    options = {"dtype": torch.bfloat16, "chat_format": "gemma", "prune": "0.5", "compile": "auto"}
    assert load.call_args.kwargs == options | {"device": None, "max_seq_len": None}
    assert start(*words, "99-100") == 2
    load.assert_called_once()
    assert "100" in capsys.readouterr().err


@pytest.mark.parametrize("while_it_loads", [False, True])
def test_a_port_that_another_server_has_is_refused(while_it_loads, start, monkeypatch, capsys):
    """Before the model is loaded, or after it, if the other server has come meanwhile."""
    load = pop.load
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        if while_it_loads:
            monkeypatch.setattr(pop, "load", lambda *args, **options: other.listen() or load(*args, **options))
        else:
            other.listen()
            monkeypatch.setattr(pop, "load", lambda *_, **__: pytest.fail("the model was loaded"))
        port = other.getsockname()[1]
        assert start("--port", str(port)) == 2
    assert f"127.0.0.1 port {port} cannot be served" in capsys.readouterr().err


def offered(*plans) -> list[str]:
    """The options of the command line that offer plans."""
    return [word for plan in plans for word in ("--prune", str(plan))]


def test_the_first_plan_is_the_default_and_has_its_own_name_too(start, tmp_path, monkeypatch, capsys):
    made, warmed, load = Mock(), Mock(), pop.load
    monkeypatch.setattr("tools.serve.__main__.Server", made)
    monkeypatch.setattr(pop.Model, "warmup", warmed)
    saved = pop.PrunePlan((2,))
    saved.save(tmp_path / "my.plan")
    assert start(*offered("0.2", "1,3", tmp_path / "my.plan")) == 0
    engine, *_, plans = made.call_args.args
    assert engine.model.plan.layers == (4,)
    assert plans == {"1,3": pop.PrunePlan((1, 3)), "my": saved, "0.2": None}
    assert warmed.call_args.args[1:] == ([plans["1,3"], plans["my"]],)
    assert "skips 1 of 5 layers" in capsys.readouterr().err

    shipped = pop.PrunePlan((2, 3), name="shipped.plan")
    monkeypatch.setattr(pop, "load", lambda *args, prune, **options: load(*args, prune=shipped, **options))
    assert start() == 0
    *_, plans = made.call_args.args
    assert plans == {"shipped": None}
    assert "requests that name no plan" not in capsys.readouterr().err  # `load` says it


@pytest.mark.parametrize(("host", "is_local"), [("127.0.0.1", True), ("0.0.0.0", False)])
def test_the_key_and_whether_others_reach_the_host_go_to_the_server(host, is_local, start, monkeypatch):
    """Without the first, anybody could use it. The second decides which names of hosts are checked.

    The longest prompt that is pruned goes there, too.
    """
    made = Mock()
    monkeypatch.setattr("tools.serve.__main__.Server", made)
    monkeypatch.setenv("POP_API_KEY", "secret")
    assert start("--prune", "none", "--host", host, "--longest", "900") == 0
    assert made.call_args.args[2:4] == ("secret", is_local)
    assert made.call_args.kwargs == {"longest": 900}


@pytest.mark.parametrize("files", [["a/my.plan", "b/my.plan"], ["a/none.plan"]])
def test_two_plans_of_one_name_are_refused(files, start, tmp_path, capsys):
    """Requests could not say which of them they mean."""
    for file in files:
        (tmp_path / file).parent.mkdir()
        pop.PrunePlan((2,)).save(tmp_path / file)
    files = [tmp_path / file for file in files]
    assert start(*offered("0.2", *files)) == 2
    assert "rename the file" in capsys.readouterr().err
    pop.PrunePlan((3,)).save(files[0])
    assert start(*offered(*files)) == 2
    assert "rename the file" in capsys.readouterr().err


def test_the_default_may_be_offered_again(start, tmp_path):
    pop.PrunePlan((2,)).save(tmp_path / "my.plan")
    assert start(*offered(tmp_path / "my.plan", tmp_path / "my.plan")) == 0
    assert start(*offered("none", "none")) == 0


def test_a_server_whose_engine_fails_ends(model, monkeypatch, capsys):
    """So that what supervises it starts another one."""
    leave = Mock()
    monkeypatch.setattr(os, "_exit", leave)
    work(Mock(run=Mock(side_effect=RuntimeError("lost")), model=model))
    leave.assert_called_once_with(1)
    assert "cpu cannot be used: lost" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--prune none --prune default", "--prune default first"),
        ("--prune none --cache-mb -7", "--cache-mb is -7"),
        ("--prune none --longest 0", "--longest is 0"),
        ("--port 99999", "cannot be served"),
    ],
)
def test_options_that_are_refused(words, says, start, capsys):
    assert start(*words.split()) == 2
    assert says in capsys.readouterr().err


# ---- /v1/responses ----


def test_a_response_is_the_models_answer(client, model):
    options = {"temperature": 0.9, "top_p": 0.8}
    asked = {"model": "tiny", "instructions": "Be short.", "input": "Hello", "extra_body": {"seed": 7}} | options
    answer = client.responses.create(**asked, max_output_tokens=9, parallel_tool_calls=False)
    expected = model.chat([{"role": "system", "content": "Be short."}, *HELLO], max_new_tokens=9, seed=7, **options)
    assert answer.output_text == expected.text
    assert answer.usage.input_tokens == expected.prompt_tokens
    assert answer.usage.output_tokens == len(expected.tokens)
    assert answer.usage.total_tokens == expected.prompt_tokens + len(expected.tokens)
    assert (answer.status, expected.finish_reason) == ("completed", "stop")
    assert (answer.temperature, answer.top_p, answer.instructions) == (0.9, 0.8, "Be short.")
    assert answer.parallel_tool_calls is False
    cut = client.responses.create(**asked, max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_items_are_the_messages_of_a_chat(client, model):
    asked = {"model": "tiny", "max_output_tokens": 9, "temperature": 0, "extra_body": FRESH}
    first = client.responses.create(**asked, input=HELLO)
    items = [{"role": "developer", "content": "Be short."}, *HELLO, *first.output]
    items.append({"type": "reasoning", "summary": [], "id": "rs_1"})
    items += user([{"type": "input_text", "text": "An"}, {"type": "input_text", "text": "d?"}])
    answer = client.responses.create(**asked, input=items)
    messages = [{"role": "system", "content": "Be short."}, *HELLO]
    messages += [{"role": "assistant", "content": first.output_text}, *user("And?")]
    assert answer.output_text == model.chat(messages, max_new_tokens=9).text


def test_a_streamed_response_is_the_whole_one(client):
    asked = {"model": "tiny", "input": "Hello", "max_output_tokens": 9, "temperature": 0.8}
    asked["extra_body"] = {"seed": 3} | FRESH
    whole = client.responses.create(**asked)
    events = [*client.responses.create(**asked, stream=True)]
    assert [event.sequence_number for event in events] == [*range(len(events))]
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert {*kinds[4:-4]} == {"output_text.delta"} and len(kinds) > 9
    assert "".join(event.delta for event in events[4:-4]) == events[-4].text == whole.output_text
    last = events[-1].response
    assert last.output_text == whole.output_text and last.output[0] == events[-2].item
    assert last.usage.output_tokens == whole.usage.output_tokens
    assert events[0].response.usage is None and events[0].response.id == last.id

    asked["extra_body"] |= {"stop": whole.output_text[3:5]}
    with client.responses.stream(**asked) as stream:  # the client library puts the events together
        final = stream.get_final_response()
    assert (final.status, final.output_text) == ("completed", whole.output_text[:3])


def test_tool_calls_in_responses(qwen, qwen_client, says, notes):
    create = partial(qwen_client.responses.create, model="tiny", tools=RESPONSES_TOOLS, max_output_tokens=3)
    prompts = notes(type(qwen.chat_format()), "prompt", lambda self, *args, **tools: args)
    says(f"Wait.\n{CALL}")
    answer = create(input="Hello")
    message, found = answer.output
    assert message.content[0].text == "Wait."
    assert (found.type, found.name, json.loads(found.arguments)) == ("function_call", "add", {"a": 1})
    events = [*create(input="Hello", stream=True)]
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[2:] == [
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done"),
        *("output_item.done", "incomplete"),
    ]
    assert events[-3].arguments == events[-4].delta == found.arguments
    assert [item.type for item in events[-1].response.output] == ["message", "function_call"]

    output = {"type": "function_call_output", "call_id": found.call_id, "output": "1"}
    create(input=[*HELLO, *answer.output, output])
    (messages,) = prompts[-1]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert messages[1]["content"] == "Wait."
    assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"] == found.call_id
    assert messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": found.arguments}


def test_images_in_responses(qwen_client):
    shown = data_url(random_bytes(600, 600, 3, seed=1))
    asked = {"model": "tiny", "temperature": 0, "extra_body": FRESH}
    items = user([{"type": "input_image", "image_url": shown, "detail": "low"}, WHAT | {"type": "input_text"}])
    answer = qwen_client.responses.create(**asked, input=items, max_output_tokens=4)
    messages = user([image(shown, detail="low"), WHAT])
    chat = qwen_client.chat.completions.create(**asked, messages=messages, max_tokens=4)
    assert answer.output_text == chat.choices[0].message.content
    assert answer.usage.input_tokens == chat.usage.prompt_tokens < 2**18 // 32**2 + 40


# ---- Answers of a form ----


def test_a_schema_decides_what_an_answer_may_be(url, client, monkeypatch):
    """Here, with a processor that allows one token. What llguidance allows: test_json_schema.py."""
    schemas = []

    def processor(served, schema):
        if schema == {"type": "objekt"}:
            raise pop.InputError("the JSON schema cannot be used")
        schemas.append(schema)
        allowed = len(schemas) + 64

        def only(tokens, logits):
            return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor([allowed]), 0.0)

        return only

    monkeypatch.setattr(limits.Served, "schema", processor)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    chat = client.chat.completions.create(**CHAT, max_tokens=3, response_format=form)
    assert chat.choices[0].message.content == "AAA"
    text = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
    assert client.responses.create(model="tiny", input="Hi", max_output_tokens=3, text=text).output_text == "BBB"
    body = {"response_format": {"type": "json_object"}}
    assert client.completions.create(**TEXT, max_tokens=3, extra_body=body).choices[0].text == "CCC"
    assert schemas == [schema, schema, {"type": "object"}]
    bad = {"type": "json_schema", "json_schema": {"schema": {"type": "objekt"}}}
    status, answer = ask(url, "/completions", TEXT | {"response_format": bad})
    assert (status, answer["error"]["param"]) == (400, "response_format")


# ---- Wrong requests ----


def changed(path, changes):
    """The body of a request with some fields changed, or without those that are None."""
    body = BODIES.get(path, TEXT) | changes
    return {name: value for name, value in body.items() if value is not None}


NO_TEXT = {"type": "text", "text": None}
WRONG = [  # path, a body or changes of one, status, and what the message or the code says
    ("/chat/completions", b'{"model": "tiny"', 400, "JSON"),
    ("/chat/completions", b"\xff\xfe", 400, "JSON"),
    ("/chat/completions", b"[" * 100_000, 400, "nested"),
    ("/chat/completions", b'{"model": "tiny", "seed": 1' + b"0" * 5000 + b"}", 400, "JSON"),
    ("/chat/completions", b"[]", 400, "object"),
    ("/chat/completions", {"messages": HELLO * 3000}, 400, "messages"),
    ("/chat/completions", {"messages": user("a" * 600)}, 400, "context_length_exceeded"),
    ("/chat/completions", {"messages": user("a" * 200_000)}, 400, " bytes"),
    ("/chat/completions", {"temperature": float("nan")}, 400, "temperature"),
    ("/chat/completions", {"max_new_tokens": 5}, 400, "near names are max_tokens"),
    ("/chat/completions", {"prediction": {}}, 400, "leave it out"),
    ("/chat/completions", {"tools": 129 * TOOLS}, 400, "there are 129 tools"),
    ("/chat/completions", {"messages": user([image("a")])}, 400, "text only"),
    ("/chat/completions", {"messages": [{"role": "system", "content": [image("a")]}]}, 400, "must be a text"),
    ("/chat/completions", {"messages": [{"role": "system", "content": [NO_TEXT]}]}, 400, "must be a text"),
    ("/chat/completions", {"parallel_tool_calls": "x"}, 400, "parallel_tool_calls is 'x'"),
    ("/responses", {"parallel_tool_calls": 0}, 400, "parallel_tool_calls is 0"),
    ("/completions", {"prompt": HELLO}, 400, "send these to /v1/chat/completions"),
    ("/completions", {"response_format": {"type": "json_schema", "schema": {}}}, 400, "must be a JSON schema"),
    ("/completions", {"response_format": LARGE_SCHEMA}, 400, "a schema may have 65,536 characters"),
    ("/responses", {"text": {"format": {"type": "json_schema"}}}, 400, "text.format.schema"),
    ("/responses", {"max_new_tokens": 5}, 400, "max_output_tokens"),
    ("/responses", {"background": True}, 400, "background"),
    ("/responses", {"input": HELLO * 3000}, 400, "items"),
    ("/responses", {"input": "a" * 600}, 400, "context_length_exceeded"),
    *REFUSED["requests to tools.serve"],
]


def test_a_lack_of_memory_is_no_failure_of_the_server():
    """Neither where a cache does not fit, nor where a GPU or a CPU lacks the memory for activations."""
    with pytest.raises(RuntimeError) as of_cpu:
        torch.empty(2**60)
    for error in (pop.CacheMemoryError("no memory"), torch.OutOfMemoryError("CUDA out of memory"), of_cpu.value):
        status, content = error_object(error)
        assert (status, content["error"]["type"]) == (503, "server_error")
        assert "memory" in content["error"]["message"] and "CUDA" not in content["error"]["message"]


def test_a_package_that_the_server_lacks_is_named(url, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(openai.APIStatusError, match="pip install llguidance") as caught:
        client_of(url).completions.create(**TEXT, extra_body={"response_format": {"type": "json_object"}})
    assert caught.value.status_code == 501
    assert caught.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(("path", "body", "status", "says"), WRONG)
def test_a_wrong_request_gets_an_error_object(url, path, body, status, says):
    got, answer = ask(url, path, body if isinstance(body, bytes) else changed(path, body))
    error = answer["error"]
    assert got == status and error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and len(error["message"]) <= 500
    assert says in error["message"] or says in str(error["code"])
    first = error["message"].partition(" ")[0]
    assert first not in limits.CHAT | limits.TEXT or error["param"] == first
    assert "Traceback" not in error["message"] and ".py" not in error["message"]


@pytest.mark.parametrize(
    ("path", "changes", "param"),
    [
        ("/completions", {"prompt": "a" * 600}, None),
        ("/completions", {"prompt": [1, "a"]}, "prompt"),
        ("/chat/completions", {"messages": [{"role": "usr", "content": "a"}]}, "messages"),
        ("/chat/completions", {"messages": [{"role": "usr", "content": "a"}], "tools": TOOLS}, "messages"),
        ("/chat/completions", {"tools": TOOLS}, "tools"),
    ],
)
def test_an_error_that_begins_otherwise_names_its_argument(url, path, changes, param):
    status, answer = ask(url, path, changed(path, changes))
    assert status == 400 and answer["error"]["param"] == param, answer


JUNK = [None, True, 0, -1, 10**30, 1.5, float("inf"), "", "\x00", "\ud800", "a" * 3000, [], {}, [[]], [None] * 3]
JUNK += [{"": {}}, {"role": 1}, {"type": "image_url", "image_url": "\ud800"}]


def spoil(random, value):
    """The value with one part of it replaced."""
    if not value or not isinstance(value, dict | list) or random.random() < 0.2:
        return random.choice(JUNK)
    spoilt = copy.copy(value)
    key = random.choice([*value] if isinstance(value, dict) else range(len(value)))
    spoilt[key] = spoil(random, value[key])
    return spoilt


def test_nothing_that_a_client_sends_stops_the_server(started):
    """It runs in another process, whose memory stays flat. Some clients leave before or while they are answered."""
    count, settled = (1000, 200) if NIGHTLY else (60, 20)
    server, url = started
    chance = random.Random(1)
    asked = {"model": "smollm2-135m", "temperature": 0.5, "seed": 3, "stop": ["a"], "n": 1, "stream": False}
    asked |= {"max_tokens": 2, "stream_options": {}, "top_p": 0.5, "logprobs": 1}
    messages = [{"role": "system", "content": "b"}, *user([{"type": "text", "text": "a"}]), *HELLO]
    bodies = {
        "/chat/completions": asked | {"messages": messages, "tools": [], "logprobs": True},
        "/completions": asked | {"prompt": "Hello"},
    }
    items = [{"type": "function_call", "call_id": "c", "name": "n", "arguments": "{}"}, *messages[:1], *HELLO]
    items.append({"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]})
    bodies["/responses"] = {"model": "smollm2-135m", "input": items, "max_output_tokens": 2, "tools": [], "text": {}}
    statuses = []
    for n in range(count):
        path = [*bodies][n % 3]
        data = json.dumps(spoil(chance, bodies[path]))
        data = data[: chance.randrange(len(data))] if chance.random() < 0.2 else data
        status, answer = ask(url, path, data.encode())
        statuses.append(status)
        assert status in (200, 400, 404), (data, status, answer)
        assert ("error" in answer) == (status != 200), (data, status, answer)
        if n % 5 == 0:
            kind = n // 5 % 3  # leaves during a stream, before its request is whole, or while it waits
            leaving = send(url, path, bodies[path] | {"max_tokens": 900, "stream": kind == 0}, missing=int(kind == 1))
            if kind == 0:
                leaving.recv(1)
            leaving.close()
        if n == settled:
            before = resident_of(server)
    assert statuses.count(200) < count / 2
    until(lambda: health(url) == {"status": "ok", "running": 0, "waiting": 0})
    assert resident_of(server) - before < 20 * 2**20
    assert ask(url, "/completions", bodies["/completions"])[0] == 200


def resident_of(server):
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text())[1])


# ---- Clients ----


def test_a_client_that_hangs_up_frees_its_place(model, monkeypatch):
    """With one place in the batch and one in the queue. The batch waits between two tokens."""
    with serving(model, most_rows=1, most_waiting=1) as (server, url):
        engine, go = server.engine, threading.Event()
        step = engine._step
        monkeypatch.setattr(engine, "_step", lambda: (go.wait(600), step()))
        running = send(url, "/completions", TEXT | {"max_tokens": 400, "stream": True})
        until(lambda: engine.rows)
        waiting = send(url, "/completions", TEXT | {"max_tokens": 400})
        until(lambda: engine.waiting)
        assert health(url) == {"status": "ok", "running": 1, "waiting": 1}
        with pytest.raises(openai.RateLimitError) as caught:
            client_of(url).completions.create(**TEXT)
        assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("queue_full", "1")
        waiting.close()
        until(lambda: not engine.waiting)
        (job,) = (row.job for row in engine.rows)
        running.close()
        until(lambda: job.cancelled)
        go.set()
        until(lambda: not engine.rows)
        assert job.answer_tokens < 3
        assert client_of(url).completions.create(**TEXT, max_tokens=3).choices[0].finish_reason


def test_health_counts_a_prompt_that_is_being_prefilled(model, monkeypatch):
    """So that nobody stops a server that is about to answer."""
    with serving(model, most_rows=1, most_waiting=1) as (server, url):
        engine, go = server.engine, threading.Event()
        admit = engine._admit
        monkeypatch.setattr(engine, "_admit", lambda job: (go.wait(600), admit(job)))
        with send(url, "/completions", TEXT | {"max_tokens": 3, "stream": True}) as asking:
            until(lambda: engine.admitting)
            assert health(url) == {"status": "ok", "running": 1, "waiting": 0} and not engine.rows
            go.set()
            assert asking.recv(1)
        until(lambda: health(url) == {"status": "ok", "running": 0, "waiting": 0})


@pytest.mark.parametrize("route", ["completions", "responses"])
def test_an_error_within_a_stream_ends_it(client, monkeypatch, route):
    """Before the first piece, the status tells of it. The client learns nothing of what failed."""
    draws = []

    def draw(row):
        if len(draws) > 3:
            raise RuntimeError("a secret of the server")
        draws.append(1)
        return torch.tensor([65])

    monkeypatch.setattr(Row, "draw", draw)
    asked = {"completions": TEXT | {"max_tokens": 30}, "responses": {"model": "tiny", "input": "Hello"}}[route]
    create = getattr(client, route).create
    stream = create(**asked, stream=True)
    with pytest.raises(openai.APIError, match="the server failed") as caught:
        list(stream)
    assert "secret" not in str(caught.value.body)
    with pytest.raises(openai.InternalServerError, match="the server failed"):
        list(create(**asked, stream=True))


def test_who_may_ask(model):
    with serving(model, key="a key") as (_, url):
        assert client_of(url, "a key").models.list().data
        for key in ("another", "", "a ke\u00ff"):
            status, answer = ask(url, "/models", None, {"authorization": f"Bearer {key}"})
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert ask(url, "/chat/completions", CHAT)[0] == 401
        assert health(url)["status"] == "ok"
    with serving(model) as (server, url):
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]", "[::1]:8000"):
            assert ask(url, "/models", None, {"host": host})[0] == 200
        for host in ("evil.example:8000", "localhost.evil.example", "[::1].evil.example", ""):
            assert ask(url, "/models", None, {"host": host})[0] == 403
        assert ask(url, "/completions", TEXT, {"content-type": "text/plain"})[0] == 415
        server.is_local = False
        assert ask(url, "/models", None, {"host": "server.example"})[0] == 200


def test_a_request_is_bounded_in_size_and_in_time(model, monkeypatch):
    """Requests that are only half sent take nobody's place. Only large ones must wait for their memory."""
    monkeypatch.setattr(app, "MAX_BYTES", 2000)
    monkeypatch.setattr(app, "SMALL", 500)
    monkeypatch.setattr(app, "MOST_READING", 1000)
    with serving(model, most_waiting=1) as (server, url):
        assert ask(url, "/completions", TEXT | {"prompt": "a" * 3000})[0] == 413
        large = TEXT | {"prompt": "a" * 100, "user": "a" * 600}
        slow = [send(url, "/completions", large, missing=5), send(url, "/completions", TEXT, missing=5)]
        until(lambda: server.reading > 700)
        assert ask(url, "/completions", TEXT)[0] == 200
        status, answer = ask(url, "/completions", large)
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        for connection in slow:
            connection.close()
        until(lambda: not server.reading)
        assert ask(url, "/completions", large)[0] == 200
        monkeypatch.setattr(app, "BODY_SECONDS", 0.05)
        assert b" 408 " in send(url, "/completions", TEXT, missing=5).recv(100)


def send(url, path, body, missing=0):
    """Begin a request, but for its last bytes. Returns the connection."""
    body, port = json.dumps(body).encode(), int(re.search(r":(\d+)/", url)[1])
    head = f"POST /v1{path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[: len(body) - missing])
    return connection
