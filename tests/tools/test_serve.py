"""tools/serve over HTTP, with the OpenAI client where it can ask, and with plain sockets where it cannot."""

import base64
import copy
import io
import itertools
import json
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
from support.tiny_qwen3_vl import IMAGE, seeing_model

import pop
from pop.generation.sampling import SamplingParams
from tools.serve import requests as limits
from tools.serve.__main__ import main
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


def data_url(pixels):
    file = io.BytesIO()
    pytest.importorskip("PIL.Image").fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_images(tmp_path):
    model = seeing_model()
    A = random_bytes(256, 264, 3, 1)
    B = random_bytes(256, 264, 3, 2)
    what = {"type": "text", "text": "What is this?"}

    def image(url, **more):
        return {"type": "image_url", "image_url": {"url": url, **more}}

    with serving(model) as (_, url):
        client = client_of(url)

        def answer(pixels, *more):
            messages = [*user([image(data_url(pixels)), what]), *more]
            answered = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, temperature=0)
            return answered.choices[0].message, answered.usage.prompt_tokens_details.cached_tokens

        messages = user([{"type": "image", "image": A}, what])
        tokens = model.chat_tokens(messages)
        message, cached = answer(A)
        assert message.content == model.chat(messages, max_new_tokens=4).text
        assert cached == 0
        _, cached = answer(A, message, *user("And this?"))
        assert cached >= len(tokens)
        _, cached = answer(B)
        assert cached == tokens.index(IMAGE)  # nothing of another image is taken

        small = {"model": "tiny", "max_tokens": 1}
        low = user([image(data_url(random_bytes(600, 600, 3, 1)), detail="low")])
        assert client.chat.completions.create(**small, messages=low).usage.prompt_tokens < 2**18 // 32**2 + 20

        file = tmp_path / "a.png"
        file.write_bytes(base64.b64decode(data_url(A).partition(",")[2]))
        urls = (str(file), file.as_uri(), "http://127.0.0.1/a.png", "data:image/png;base64,AAAA", "data:,a", 7)
        urls += ("data:image/png;base64,A", "data:image/png;base64,A!==", data_url(A).replace(";base64", ""))
        refused = [[image(bad)] for bad in urls]
        refused += [[{"type": "image", "image": str(file)}], [{"type": "video", "video": [str(file)]}]]
        refused += [[image(data_url(A[:32, :32]))] * (limits.MAX_IMAGES + 1)]
        for content in refused:
            status, error = ask(url, "/chat/completions", CHAT | {"messages": user(content)})
            assert status == 400 and error["error"]["message"]
        assert "images" in error["error"]["message"]


def test_tool_calls(monkeypatch):
    model = seeing_model()
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    monkeypatch.setattr(type(model.tokenizer), "text_stream", lambda self: lambda token, last: call if last else "")
    function = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    asked = {"model": "tiny", "tools": [{"type": "function", "function": function}], "max_tokens": 3}
    with serving(model) as (_, url):
        create = client_of(url).chat.completions.create
        (choice,) = create(**asked, messages=HELLO).choices
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (found,) = choice.message.tool_calls
        assert (found.function.name, json.loads(found.function.arguments)) == ("add", {"a": 1})
        *_, last = create(**asked, messages=HELLO, stream=True)
        (streamed,) = last.choices
        assert (streamed.finish_reason, streamed.delta.tool_calls[0].function.name) == ("tool_calls", "add")
        assert create(**asked, messages=HELLO, tool_choice="none").choices[0].message.content == call
        turns = [*HELLO, choice.message, {"role": "tool", "tool_call_id": found.id, "content": "1"}]
        assert create(**asked, messages=turns).usage.prompt_tokens > 0


ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_what_thoughts_mention_is_no_call(monkeypatch):
    """A call after them is one, and they stay with the text before it."""
    model = seeing_model()
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    said = ""
    monkeypatch.setattr(type(model.tokenizer), "text_stream", lambda self: lambda token, last: said if last else "")
    asked = {"model": "tiny", "tools": [ADD], "max_tokens": 3, "messages": HELLO}
    with serving(model) as (_, url):
        create = client_of(url).chat.completions.create
        said = f"<think>\nPerhaps {call}?\n</think>\n\nNo."
        message = create(**asked).choices[0].message
        assert (message.content, message.tool_calls) == (said, None)
        said = f"<think>\nA <tool_call>?\n</think>\n\nYes. {call}{call}"
        for options, count in (({}, 2), ({"parallel_tool_calls": False}, 1)):
            message = create(**asked, **options).choices[0].message
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
    for path, body in (
        ("/responses", {"model": "tiny", "input": "Hi", "max_output_tokens": 2}),
        ("/chat/completions", CHAT | {"max_tokens": 2}),
    ):
        also = {"top_logprobs": 0, "parallel_tool_calls": True, "stream_options": {"include_usage": None}}
        also |= {"background": False} if path == "/responses" else {"chat_template_kwargs": {}}
        assert ask(url, path, body | also)[0] == 200, path
    found = ask(url, "/responses", {"model": "tiny", "input": "Hi", "parallel_tool_calls": False})[1]
    assert found["parallel_tool_calls"] is False
    status, found = ask(url, "/responses", {"model": "tiny", "input": "Hi", "background": True})
    assert (status, found["error"]["param"]) == (400, "background")


def test_the_first_token_is_waited_for_from_when_the_request_has_arrived(model, monkeypatch):
    """Also while others are encoded."""
    understand = app.understand

    def slowly(*args):
        time.sleep(0.5)
        return understand(*args)

    monkeypatch.setattr(app, "understand", slowly)
    with serving(model) as (_, url):
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
    """It continues caches of its own plan only."""
    with serving(model, plans={"half": (half := pop.PrunePlan((1, 2)))}) as (_, url):
        client = client_of(url)
        listed = client.models.retrieve("tiny")
        assert (listed.plans, listed.max_model_len) == (["default", "none", "half"], model.max_seq_len)
        plans = {"none": pop.PrunePlan.none(), "half": half, "default": model.plan}
        cached = []
        for name in ("default", "none", "half", "none", "half", "default"):
            asked = {"model": "tiny", "prompt": "Hello, who are you?", "max_tokens": 9, "temperature": 0}
            answer = client.completions.create(**asked, extra_body={"plan": name})
            assert answer.choices[0].text == model.generate(asked["prompt"], max_new_tokens=9, plan=plans[name]).text
            cached.append(answer.usage.prompt_tokens_details.cached_tokens > 0)
        assert cached == [False] * 3 + [True] * 3
        asked["extra_body"] = {"plan": "half", "cache_prompt": False}
        assert client.completions.create(**asked).usage.prompt_tokens_details.cached_tokens == 0


def test_every_route_says_how_many_tokens_were_pruned_and_when_the_first_one_came(client, model):
    """The plan runs the first 2 and the last 3 tokens at full depth."""
    text = "abc" * 9
    answers = [
        client.completions.create(model="tiny", prompt=[text, text[:4]], max_tokens=2, extra_body=FRESH),
        client.chat.completions.create(model="tiny", messages=user(text), max_tokens=2, extra_body=FRESH),
        client.responses.create(model="tiny", input=text, max_output_tokens=2, extra_body=FRESH),
    ]
    chat = client.chat.completions.create(
        model="tiny", messages=user(text), max_tokens=2, stream=True, stream_options={"include_usage": True}
    )
    answers.append([*chat][-1])
    in_chat = len(model.chat_tokens(user(text)))
    pruned = []
    for answer in answers:
        usage = answer.usage
        assert 0 < usage.time_to_first_token < 600
        pruned.append(getattr(usage, "prompt_tokens_details", None) or usage.input_tokens_details)
    assert [one.pruned_tokens for one in pruned[:3]] == [len(text) - 5, in_chat - 5, in_chat - 5]
    # An earlier answer's cache has this prompt, with its last tokens at full depth. Only the boundary token runs again.
    assert (pruned[3].cached_tokens, pruned[3].pruned_tokens) == (in_chat - 1, 0)


def test_the_options_reach_the_model(tmp_path, monkeypatch, capsys):
    """A plan that does not fit is refused before the weights are read."""
    folder = str(write_chat_checkpoint(tmp_path / "chat"))
    calls = []

    def load(name, **options):
        calls.append(options)
        raise pop.CheckpointError("enough")

    monkeypatch.setattr(pop, "load", load)
    words = [folder, *shlex.split("--port 0 --dtype bfloat16 --chat-format gemma --prune 0.5 --prune none")]
    assert main([*words, "--prune", "1,3"]) == 2
    expected = {"dtype": torch.bfloat16, "chat_format": "gemma", "prune": "0.5", "compile": "auto"}
    assert calls == [expected | {"device": None, "max_seq_len": None}]
    assert main([*words, "--prune", "99-100"]) == 2
    assert len(calls) == 1 and "100" in capsys.readouterr().err


def test_a_port_that_is_in_use_is_refused_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(pop, "load", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["smollm2-135m", "--port", str(port)]) == 2
    assert f"127.0.0.1 port {port} cannot be served" in capsys.readouterr().err
    assert main(["smollm2-135m", "--port", "99999"]) == 2
    assert "cannot be served" in capsys.readouterr().err


def test_the_first_plan_is_the_default_and_has_its_own_name_too(tmp_path, monkeypatch, capsys):
    folder = write_chat_checkpoint(tmp_path / "chat")
    made, load = [], pop.load
    warmed = Mock()
    monkeypatch.setattr(pop.Model, "warmup", warmed)
    monkeypatch.setattr("tools.serve.__main__.threading.Thread", Mock())
    monkeypatch.setattr("tools.serve.__main__.uvicorn", Mock())
    monkeypatch.setattr("tools.serve.__main__.Server", lambda *args: made.append(args) or Mock())
    saved = pop.PrunePlan((2,))
    saved.save(tmp_path / "my.plan")
    assert main([str(folder), "--port", "0", *offered("0.2", "1,3", tmp_path / "my.plan")]) == 0
    engine, *_, plans = made.pop()
    assert engine.model.plan.layers == (4,)
    assert plans == {"1,3": pop.PrunePlan((1, 3)), "my": saved, "0.2": None}
    assert warmed.call_args.args[1:] == ([plans["1,3"], plans["my"]],)
    assert "skips 1 of 5 layers" in capsys.readouterr().err

    shipped = pop.PrunePlan((2, 3), name="shipped.plan")
    monkeypatch.setattr(pop, "load", lambda *args, prune, **options: load(*args, prune=shipped, **options))
    assert main([str(folder), "--port", "0"]) == 0
    assert made.pop()[-1] == {"shipped": None}
    assert "requests that name no plan" not in capsys.readouterr().err  # `load` says it


def offered(*plans) -> list[str]:
    """The options of the command line that offer plans."""
    return [word for plan in plans for word in ("--prune", str(plan))]


def test_two_plans_of_one_name_are_refused(tmp_path, capsys):
    """Requests could not say which of them they mean."""
    folder = write_chat_checkpoint(tmp_path / "chat")
    (tmp_path / "other").mkdir()
    files = [tmp_path / "my.plan", tmp_path / "other" / "my.plan", tmp_path / "none.plan"]
    for file in files:
        pop.PrunePlan((2,)).save(file)
    for plans in (("0.2", *files[:2]), ("0.2", files[2])):
        assert main([str(folder), "--port", "0", *offered(*plans)]) == 2
        assert "rename the file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, said",
    [(offered("none", "default"), "--prune default first"), (["--cache-mb", "-7"], "--cache-mb is -7")],
)
def test_options_are_checked_before_the_model_is_loaded(options, said, tmp_path, capsys):
    folder = write_chat_checkpoint(tmp_path / "chat")
    assert main([str(folder), "--port", "0", *options]) == 2
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken_while_the_model_loads_is_refused(tmp_path, monkeypatch, capsys):
    folder = write_chat_checkpoint(tmp_path / "chat")
    loaded = pop.load(folder)
    other = socket.socket()
    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    other.bind(("127.0.0.1", 0))
    monkeypatch.setattr(pop, "load", lambda *args, **kwargs: other.listen() or loaded)
    monkeypatch.setattr("tools.serve.__main__.threading.Thread", Mock())
    with other:
        port = other.getsockname()[1]
        assert main([str(folder), "--port", str(port)]) == 2
    assert f"127.0.0.1 port {port} cannot be served" in capsys.readouterr().err


# ---- /v1/responses ----


def test_a_response_is_the_models_answer(client, model):
    said = {"instructions": "Be short.", "input": "Hello"}
    options = {"temperature": 0.9, "top_p": 0.8}
    answer = client.responses.create(model="tiny", **said, max_output_tokens=9, **options, extra_body={"seed": 7})
    messages = [{"role": "system", "content": "Be short."}, *HELLO]
    expected = model.chat(messages, max_new_tokens=9, seed=7, **options)
    assert answer.output_text == expected.text
    assert answer.usage.input_tokens == expected.prompt_tokens
    assert answer.usage.output_tokens == len(expected.tokens)
    assert answer.usage.total_tokens == expected.prompt_tokens + len(expected.tokens)
    assert (answer.status, expected.finish_reason) == ("completed", "stop")
    cut = client.responses.create(model="tiny", **said, max_output_tokens=2, **options, extra_body={"seed": 7})
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.temperature, answer.top_p, answer.instructions) == (0.9, 0.8, "Be short.")

    items = [{"role": "developer", "content": "Be short."}, *HELLO, *answer.output]
    items.append({"type": "reasoning", "summary": [], "id": "rs_1"})
    items += user([{"type": "input_text", "text": "An"}, {"type": "input_text", "text": "d?"}])
    messages += [{"role": "assistant", "content": expected.text}, *user("And?")]
    answer = client.responses.create(model="tiny", input=items, max_output_tokens=9, temperature=0, extra_body=FRESH)
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


def test_tool_calls_in_responses(monkeypatch, notes):
    model = seeing_model()
    call = 'Wait.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    monkeypatch.setattr(type(model.tokenizer), "text_stream", lambda self: lambda token, last: call if last else "")
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tools = [{"type": "function", "name": "add", "parameters": parameters, "strict": True}]
    asked = {"model": "tiny", "tools": tools, "max_output_tokens": 3}
    prompts = notes(type(model.chat_format()), "prompt", lambda self, *args, **tools: args)
    with serving(model) as (_, url):
        create = client_of(url).responses.create
        answer = create(**asked, input="Hello")
        message, found = answer.output
        assert message.content[0].text == "Wait."
        assert (found.type, found.name, json.loads(found.arguments)) == ("function_call", "add", {"a": 1})
        events = [*create(**asked, input="Hello", stream=True)]
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
        create(**asked, input=[*HELLO, *answer.output, output])
    (messages,) = prompts[-1]
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert messages[1]["content"] == "Wait."
    assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"] == found.call_id
    assert messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": found.arguments}


def test_images_in_responses():
    model = seeing_model()
    image = data_url(random_bytes(256, 264, 3, 1))
    what = {"type": "input_text", "text": "What?"}
    with serving(model) as (_, url):
        client = client_of(url)
        items = user([{"type": "input_image", "image_url": image, "detail": "low"}, what])
        answer = client.responses.create(
            model="tiny", input=items, max_output_tokens=4, temperature=0, extra_body=FRESH
        )
        parts = [{"type": "image_url", "image_url": {"url": image, "detail": "low"}}, {"type": "text", "text": "What?"}]
        chat = client.chat.completions.create(model="tiny", messages=user(parts), max_tokens=4, temperature=0)
        assert answer.output_text == chat.choices[0].message.content
        assert answer.usage.input_tokens == chat.usage.prompt_tokens
        for bad in ("http://127.0.0.1/a.png", "/etc/passwd", None):
            items = user([{"type": "input_image", "image_url": bad}])
            assert ask(url, "/responses", {"model": "tiny", "input": items})[0] == 400


# ---- Answers of a form ----


def test_a_schema_decides_what_an_answer_may_be(model, monkeypatch):
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
    with serving(model) as (_, url):
        client = client_of(url)
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

BODIES = {"/responses": {"model": "tiny", "input": "Hello"}, "/chat/completions": CHAT}


def changed(path, changes):
    """The body of a request with some fields changed, or without those that are None."""
    body = BODIES.get(path, TEXT) | changes
    return {name: value for name, value in body.items() if value is not None}


NO_REQUEST = [  # to /v1/chat/completions, and what the message says
    (b'{"model": "tiny"', "JSON"),
    (b"\xff\xfe", "JSON"),
    (b"[" * 100_000, "nested"),
    (b'{"model": "tiny", "seed": 1' + b"0" * 5000 + b"}", "JSON"),
    ([], "object"),
]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CHANGES = [  # path, changes of a body, status, and what the message or the code says
    ("/chat/completions", {"messages": HELLO * 3000}, 400, "messages"),
    ("/chat/completions", {"messages": user("a" * 600)}, 400, "context_length_exceeded"),
    ("/chat/completions", {"messages": user("a" * 200_000)}, 400, " bytes"),
    ("/chat/completions", {"temperature": float("nan")}, 400, "temperature"),
    ("/chat/completions", {"max_new_tokens": 5}, 400, "near names are max_tokens"),
    (
        "/chat/completions",
        {"tools": 129 * [{"type": "function", "function": {"name": "f"}}]},
        400,
        "there are 129 tools",
    ),
    ("/chat/completions", {"messages": user([{"type": "image_url", "image_url": {"url": "a"}}])}, 400, "text only"),
    ("/completions", {"prompt": HELLO}, 400, "send these to /v1/chat/completions"),
    ("/completions", {"response_format": {"type": "json_schema", "schema": {}}}, 400, "must be a JSON schema"),
    ("/responses", {"text": {"format": {"type": "json_schema"}}}, 400, "text.format.schema"),
    ("/responses", {"max_new_tokens": 5}, 400, "max_output_tokens"),
    ("/responses", {"input": HELLO * 3000}, 400, "items"),
    ("/responses", {"input": "a" * 600}, 400, "context_length_exceeded"),
    *REFUSED["requests to tools.serve"],
]
BAD = [("/chat/completions", body, 400, says) for body, says in NO_REQUEST]
BAD += [(path, changed(path, changes), *told) for path, changes, *told in CHANGES]


def test_a_lack_of_memory_is_no_failure_of_the_server():
    """Neither where a cache does not fit, nor where a GPU or a CPU lacks the memory for activations."""
    with pytest.raises(RuntimeError) as of_cpu:
        torch.empty(2**60)
    for error in (pop.CacheMemoryError("no memory"), torch.OutOfMemoryError("CUDA out of memory"), of_cpu.value):
        status, content = error_object(error)
        assert (status, content["error"]["type"]) == (503, "server_error")
        assert "memory" in content["error"]["message"] and "CUDA" not in content["error"]["message"]


def test_a_package_that_the_server_lacks_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with serving(model) as (_, url):
        status, answer = ask(url, "/completions", TEXT | {"response_format": {"type": "json_object"}})
    assert status == 501 and "pip install llguidance" in answer["error"]["message"]


@pytest.mark.parametrize(("path", "body", "status", "says"), BAD)
def test_a_wrong_request_gets_an_error_object(url, path, body, status, says):
    got, answer = ask(url, path, body)
    error = answer["error"]
    assert got == status and error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and len(error["message"]) <= 500
    assert says in error["message"] or says in str(error["code"])
    assert "Traceback" not in error["message"] and ".py" not in error["message"]


@pytest.mark.parametrize(
    ("path", "changes", "param"),
    [
        ("/chat/completions", {"max_tokens": "x"}, "max_tokens"),
        ("/chat/completions", {"temperature": -1}, "temperature"),
        ("/completions", {"top_p": 2}, "top_p"),
        ("/completions", {"top_k": 0.5}, "top_k"),
        ("/completions", {"prompt": "a" * 600}, None),
        ("/chat/completions", {"messages": [{"role": "usr", "content": "a"}]}, "messages"),
        ("/chat/completions", {"messages": [{"role": "usr", "content": "a"}], "tools": TOOLS}, "messages"),
        ("/chat/completions", {"tools": TOOLS}, "tools"),
        ("/chat/completions", {"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
    ],
)
def test_an_error_names_its_argument(url, path, changes, param):
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


@pytest.mark.parametrize("route", ["completions", "responses"])
def test_an_error_within_a_stream_ends_it(model, monkeypatch, route):
    """Before the first piece, the status tells of it. The client learns nothing of what failed."""
    draws = []

    def draw(row):
        if len(draws) > 3:
            raise RuntimeError("a secret of the server")
        draws.append(1)
        return torch.tensor([65])

    monkeypatch.setattr(Row, "draw", draw)
    asked = {"completions": TEXT | {"max_tokens": 30}, "responses": {"model": "tiny", "input": "Hello"}}[route]
    with serving(model) as (_, url):
        create = getattr(client_of(url), route).create
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
