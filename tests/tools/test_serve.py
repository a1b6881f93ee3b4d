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
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.chat_models import PLANS, make
from support.nightly import NIGHTLY
from support.readme import blocks
from support.serving import HEADERS, process, serving, until
from support.tiny_chat import write_chat_checkpoint
from support.tiny_images import random_bytes
from support.tiny_qwen3_vl import IMAGE, seeing_model

import pop
from pop.generation.sampling import SamplingParams
from tools.serve import requests as limits
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
        return limits.understand(model, "tiny", json.dumps(asked).encode(), is_chat, print).jobs[0].params

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


def test_a_conversation_of_the_real_model_prefills_new_tokens_only(smollm2):
    model = pop.load("smollm2-135m", prune=1 / 3, compile=False, progress=False)
    messages = [{"role": "system", "content": "Answer in one sentence."}]
    held = 0
    with serving(model) as (_, url):
        create = client_of(url).chat.completions.create
        for text in ("What is a whale?", "How large is it?", "What does it eat?"):
            messages += user(text)
            answer = create(model="tiny", messages=messages, max_tokens=6, temperature=0)
            # The last token of a truncated answer has never run. A cut word may encode to other tokens.
            assert max(0, held - 2) <= answer.usage.prompt_tokens_details.cached_tokens <= held
            held = answer.usage.total_tokens
            messages.append(answer.choices[0].message)
    assert held > 50


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


def test_the_readme_runs_as_printed(started, capsys):
    _, url = started
    _, asked = (block.replace("http://127.0.0.1:8000/v1", url) for block in blocks("bash", README))
    (code,) = (block.replace("http://127.0.0.1:8000/v1", url) for block in blocks("python", README))
    exec(compile(code, README, "exec"), {})
    assert capsys.readouterr().out
    if shutil.which("curl"):
        ran = subprocess.run(["bash", "-c", asked], capture_output=True, check=True)
        assert json.loads(ran.stdout)["usage"]["completion_tokens"] <= 24


# ---- Wrong requests ----
NO_REQUESTS = [  # path, body, status, and what the message or the code says
    ("/chat/completions", b'{"model": "tiny"', 400, "JSON"),
    ("/chat/completions", b"\xff\xfe", 400, "JSON"),
    ("/chat/completions", b"[" * 100_000, 400, "nested"),
    ("/chat/completions", b'{"model": "tiny", "seed": 1' + b"0" * 5000 + b"}", 400, "JSON"),
    ("/chat/completions", [], 400, "object"),
    ("/chat/completions", {"messages": HELLO}, 400, "model is missing"),
    ("/chat/completions", {"model": "tiny"}, 400, "messages is missing"),
    ("/chat/completions", CHAT | {"model": "gpt-4"}, 404, "model_not_found"),
    ("/completions", TEXT | {"model": ["tiny"]}, 404, "model_not_found"),
    ("/completions", {"model": "tiny"}, 400, "prompt is missing"),
    ("/elsewhere", TEXT, 404, "Not Found"),
    ("/models", TEXT, 405, "Method"),
]
BAD_MESSAGES = [
    ([], "at least one"),
    ([1], "message 0"),
    ([{"role": "robot", "content": "a"}], "robot"),
    ([HELLO[0] | {"name": 1}], "name"),
    (user("\ud800"), "surrogate"),
    (user([{"type": "text"}]), "part"),
    (user([{"type": "audio"}]), "part"),
    (HELLO * 3000, "messages"),
    (user("a" * 600), "context_length_exceeded"),
    (user("a" * 200_000), " bytes"),
]
BAD_PROMPTS = [("", "empty"), ({"a": 1}, "prompt"), (["a", 1], "token"), ([1, 2**70], "token"), (["a"] * 50, "prompts")]
BAD_FIELDS = {  # of a chat: the values of a field, whose name is in the message
    "messages": ["Hello"],
    "max_tokens": [0],
    "max_completion_tokens": [1.5],
    "temperature": [-1, float("nan")],
    "seed": [-1],
    "stop": [[""], ["a"] * 5, "a" * 300, {"a": 1}],
    "n": [100],
    "stream": ["yes"],
    "logprobs": [2],
    "top_logprobs": [2],  # without logprobs
    "tools": ["all", [1], [{"type": "function"}]],
    "tool_choice": ["required"],
    "chat_template_kwargs": [{"x": 1}],
    "response_format": [{"type": "json_object"}],
    "prompt": ["Hello"],
    "\ud800": [1],
}
BAD = [
    *NO_REQUESTS,
    *[("/chat/completions", CHAT | {"messages": messages}, 400, says) for messages, says in BAD_MESSAGES],
    *[("/completions", TEXT | {"prompt": prompt}, 400, says) for prompt, says in BAD_PROMPTS],
    *[("/chat/completions", CHAT | {key: one}, 400, ascii(key)[1:-1]) for key in BAD_FIELDS for one in BAD_FIELDS[key]],
    ("/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 50}, 400, "top_logprobs"),
    ("/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 20, "n": 8}, 400, "65536 logprobs"),
    ("/completions", TEXT | {"echo": True}, 400, "echo"),
    ("/completions", TEXT | {"messages": HELLO}, 400, "messages"),
]


@pytest.mark.parametrize(("path", "body", "status", "says"), BAD)
def test_a_wrong_request_gets_an_error_object(url, path, body, status, says):
    got, answer = ask(url, path, body)
    error = answer["error"]
    assert got == status and error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and len(error["message"]) <= 500
    assert says in error["message"] or says in str(error["code"])
    assert "Traceback" not in error["message"] and ".py" not in error["message"]


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
    statuses = []
    for n in range(count):
        path = [*bodies][n % 2]
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


def test_two_clients_at_once(model, monkeypatch):
    """Each gets its own answer, and both are in one batch: the first step waits for both."""
    texts, sizes = ["Hello", "Hi there"], []
    asked = {"max_tokens": 30, "temperature": 0, "stream": True}
    with serving(model) as (server, url), ThreadPoolExecutor(2) as clients:
        engine, step = server.engine, server.engine._step

        def watched():
            until(lambda: sizes or len(engine.rows) + len(engine.waiting) == 2)
            sizes.append(len(engine.rows))
            step()

        def answer(text):
            stream = client_of(url).completions.create(**TEXT | asked | {"prompt": text})
            return "".join(chunk.choices[0].text for chunk in stream)

        monkeypatch.setattr(engine, "_step", watched)
        assert list(clients.map(answer, texts)) == [model.generate(text, max_new_tokens=30).text for text in texts]
    assert 2 in sizes


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


def test_an_error_within_a_stream_ends_it(model, monkeypatch):
    """Before the first piece, the status tells of it. The client learns nothing of what failed."""
    draws = []

    def draw(row):
        if len(draws) > 3:
            raise RuntimeError("a secret of the server")
        draws.append(1)
        return torch.tensor([65])

    monkeypatch.setattr(Row, "draw", draw)
    with serving(model) as (_, url):
        stream = client_of(url).completions.create(**TEXT, max_tokens=30, stream=True)
        with pytest.raises(openai.APIError, match="the server failed") as caught:
            list(stream)
        assert "secret" not in str(caught.value.body)
        with pytest.raises(openai.InternalServerError, match="the server failed"):
            client_of(url).completions.create(**TEXT, max_tokens=30, stream=True)


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
