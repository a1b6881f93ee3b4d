"""tools/serve over HTTP, with the OpenAI client where it can ask, and with plain sockets where it cannot."""

import base64
import io
import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from support.chat_models import PLANS, make
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
MANY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
HELLO = [{"role": "user", "content": "Hello"}]
CHAT, TEXT = {"model": "tiny", "messages": HELLO}, {"model": "tiny", "prompt": "Hello"}


@pytest.fixture(scope="module")
def model():
    return make("llama", PLANS["first 2, last 3"])


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as served:
        yield served


@pytest.fixture(scope="module")
def url(server):
    return server[1]


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
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.prompt_tokens, len(expected.tokens))
    assert answer.model == "tiny" and answer.object == "chat.completion"
    expected = model.generate("Hello", max_new_tokens=9, min_p=0.1, repetition_penalty=1.2)
    answer = client.completions.create(
        **TEXT, max_tokens=9, temperature=0, extra_body={"min_p": 0.1, "repetition_penalty": 1.2}
    )
    assert answer.choices[0].text == expected.text


@pytest.mark.parametrize("is_chat", [True, False])
def test_a_stream_brings_what_a_whole_answer_has(client, is_chat):
    create = client.chat.completions.create if is_chat else client.completions.create
    asked = {**(CHAT if is_chat else TEXT), "max_tokens": 12, "temperature": 0.8, "seed": 3}
    asked |= {"logprobs": True, "top_logprobs": 2} if is_chat else {"logprobs": 2}
    create(**asked)  # leaves a kept cache, from which both answers below continue: they round alike
    whole, chunks = create(**asked), list(create(**asked, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens
    choices = [chunk.choices[0] for chunk in parts]
    assert [choice.finish_reason for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1].finish_reason == whole.choices[0].finish_reason
    logprobs = [choice.logprobs for choice in choices if choice.logprobs]
    if is_chat:
        assert choices[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
        assert [one for each in logprobs for one in each.content] == whole.choices[0].logprobs.content
    else:
        assert "".join(choice.text for choice in choices) == whole.choices[0].text
        assert [one for each in logprobs for one in each.token_logprobs] == whole.choices[0].logprobs.token_logprobs


def test_logprobs_are_the_models(client, model):
    expected = model.chat(HELLO, max_new_tokens=9, logprobs=True)
    answer = client.chat.completions.create(**CHAT, max_tokens=9, temperature=0, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert [one.logprob for one in content] == pytest.approx(expected.logprobs, abs=1e-4)
    assert [one.bytes for one in content] == [list(model.tokenizer.token_bytes(token)) for token in expected.tokens]
    for one in content:
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].logprob == one.logprob  # greedy
    bare = client.chat.completions.create(**CHAT, max_tokens=9, temperature=0, logprobs=True)
    assert [one.top_logprobs for one in bare.choices[0].logprobs.content] == [[]] * len(content)


def test_several_answers_and_several_prompts(client, model):
    answer = client.completions.create(model="tiny", prompt=["Hello", "Hi"], n=2, max_tokens=5, temperature=1, seed=4)
    expected = [
        model.generate(text, max_new_tokens=5, temperature=1.0, seed=4 + n) for text in ("Hello", "Hi") for n in (0, 1)
    ]
    assert [choice.text for choice in answer.choices] == [one.text for one in expected]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == len("Hello") + len("Hi")
    tokens = client.completions.create(model="tiny", prompt=[list(b"Hello"), list(b"Hi")], max_tokens=5, temperature=0)
    assert [choice.text for choice in tokens.choices] == [
        one.text for one in model.generate(["Hello", "Hi"], max_new_tokens=5)
    ]
    assert client.completions.create(model="tiny", prompt=list(b"Hi"), max_tokens=5, temperature=0).choices[0].text
    texts = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(**CHAT, n=3, max_tokens=5, temperature=1, seed=4, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content
    assert [*texts.values()] == [
        model.chat(HELLO, max_new_tokens=5, temperature=1.0, seed=4 + n).text for n in range(3)
    ]


def test_stop_strings(client, model):
    text = model.generate("Hello", max_new_tokens=30).text
    stop = text[4:6]
    answer = client.completions.create(**TEXT, max_tokens=30, temperature=0, stop=stop)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
    answer = client.completions.create(**TEXT, max_tokens=30, temperature=0, stop=["no such", stop])
    assert answer.choices[0].text == text[: text.index(stop)]


def test_models_and_health(client, url):
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    assert health(url)["status"] == "ok"


def test_temperature_is_the_protocols_unless_the_checkpoint_states_one():
    model = make("llama", PLANS["none"])
    body = json.dumps(TEXT).encode()
    assert limits.understand(model, "tiny", body, False, print).jobs[0].params.temperature == 1
    model.sampling = {"temperature": 0.6, "top_p": 0.9}
    params = limits.understand(model, "tiny", body, False, print).jobs[0].params
    assert (params.temperature, params.top_p, params.max_new_tokens) == (0.6, 0.9, 16)
    body = json.dumps(CHAT | {"temperature": 0}).encode()
    params = limits.understand(model, "tiny", body, True, print).jobs[0].params
    assert params == SamplingParams(max_new_tokens=512, top_p=0.9)


def test_texts_spell_no_control_tokens(client, model):
    def count(create, **asked):
        return create(model="tiny", max_tokens=1, **asked).usage.prompt_tokens

    text = "<|im_end|>"
    assert count(client.completions.create, prompt=text) == len(text)
    empty = count(client.chat.completions.create, messages=[{"role": "user", "content": "x"}]) - 1
    assert count(client.chat.completions.create, messages=[{"role": "user", "content": text}]) == empty + len(text)


# ---- Conversations, images and tools ----


def test_a_conversation_of_the_real_model_prefills_new_tokens_only(smollm2):
    model = pop.load("smollm2-135m", compile=False, progress=False)
    messages, held = [{"role": "system", "content": "Answer in one sentence."}], 0
    with serving(model, "smollm2-135m") as (_, url):
        create = client_of(url).chat.completions.create
        for text in ("What is a whale?", "How large is it?", "What does it eat?", "Where is it?", "Is it a fish?"):
            messages.append({"role": "user", "content": text})
            answer = create(model="smollm2-135m", messages=messages, max_tokens=8, temperature=0)
            usage = answer.usage
            # The last token of a truncated answer has never run. A cut word may encode to other tokens.
            assert max(0, held - 2) <= usage.prompt_tokens_details.cached_tokens <= held
            held = usage.total_tokens
            messages.append(answer.choices[0].message)
    assert held > 100


def data_url(pixels):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_images(tmp_path):
    pytest.importorskip("PIL")
    model, (A, B) = seeing_model(), (random_bytes(256, 264, 3, seed) for seed in (1, 2))

    def messages(pixels, *more):
        image = {"type": "image_url", "image_url": {"url": data_url(pixels)}}
        return [{"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]}, *more]

    with serving(model) as (_, url):
        client = client_of(url)

        def answer(*given):
            asked = {"model": "tiny", "messages": messages(*given), "max_tokens": 4, "temperature": 0}
            usage = (answer := client.chat.completions.create(**asked)).usage
            return answer.choices[0].message, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens

        content = [{"type": "image", "image": A}, {"type": "text", "text": "What is this?"}]
        expected = model.chat([{"role": "user", "content": content}], max_new_tokens=4)
        message, length, cached = answer(A)
        assert (message.content, length, cached) == (expected.text, expected.prompt_tokens, 0)
        _, _, cached = answer(A, message, {"role": "user", "content": "And this?"})
        assert cached >= length
        tokens = model.chat_tokens([{"role": "user", "content": content}])
        _, _, cached = answer(B)
        assert cached == tokens.index(IMAGE)  # nothing of another image is taken
        file = tmp_path / "a.png"
        file.write_bytes(base64.b64decode(data_url(A).partition(",")[2]))
        for bad in (str(file), file.as_uri(), "http://127.0.0.1/a.png", "data:image/png;base64,AAAA", "data:,a", 7):
            part = {"type": "image_url", "image_url": {"url": bad}}
            status, error = ask(url, "/chat/completions", CHAT | {"messages": [{"role": "user", "content": [part]}]})
            assert status == 400 and error["error"]["message"]
        for part in ({"type": "image", "image": str(file)}, {"type": "video", "video": [str(file)]}):
            assert ask(url, "/chat/completions", CHAT | {"messages": [{"role": "user", "content": [part]}]})[0] == 400
        many = [{"type": "image_url", "image_url": {"url": data_url(A[:32, :32])}}] * (limits.MAX_IMAGES + 1)
        status, error = ask(url, "/chat/completions", CHAT | {"messages": [{"role": "user", "content": many}]})
        assert status == 400 and "images" in error["error"]["message"]
        detail = {"url": data_url(random_bytes(600, 600, 3, 1)), "detail": "low"}
        low = messages(A, {"role": "user", "content": [{"type": "image_url", "image_url": detail}]})[1:]
        asked = {"model": "tiny", "messages": low, "max_tokens": 1}
        assert client.chat.completions.create(**asked).usage.prompt_tokens < 2**18 // 32**2 + 20


def test_tool_calls(monkeypatch):
    model = seeing_model()
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    function = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    asked = {"model": "tiny", "messages": HELLO, "tools": [{"type": "function", "function": function}], "max_tokens": 3}
    monkeypatch.setattr(type(model.tokenizer), "text_stream", lambda self: lambda token, last: call if last else "")
    with serving(model) as (_, url):
        create = client_of(url).chat.completions.create
        choice = create(**asked).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (found,) = choice.message.tool_calls
        assert (found.function.name, json.loads(found.function.arguments)) == ("add", {"a": 1})
        *_, last = create(**asked, stream=True)
        assert last.choices[0].delta.tool_calls[0].function.name == "add"
        assert last.choices[0].finish_reason == "tool_calls"
        assert create(**asked, tool_choice="none").choices[0].message.content == call
        asked["messages"] = [*HELLO, choice.message, {"role": "tool", "tool_call_id": found.id, "content": "1"}]
        assert create(**asked).usage.prompt_tokens > 0


def test_the_readme_runs_as_printed(started, capsys):
    (_, asked), (code,) = blocks("bash", README), blocks("python", README)
    code, asked = (text.replace("http://127.0.0.1:8000/v1", started[1]) for text in (code, asked))
    exec(compile(code, README, "exec"), {})
    assert capsys.readouterr().out
    if shutil.which("curl"):
        ran = subprocess.run(["bash", "-c", asked], capture_output=True, check=True)
        assert json.loads(ran.stdout)["usage"]["completion_tokens"] <= 24


# ---- Wrong requests ----

DEEP = b"[" * 100_000
BAD = [  # path, body, status, and what the message or the code says
    ("/chat/completions", b"", 400, "JSON"),
    ("/chat/completions", b'{"model": "tiny"', 400, "JSON"),
    ("/chat/completions", b"\xff\xfe", 400, "JSON"),
    ("/chat/completions", DEEP, 400, "nested"),
    ("/chat/completions", b'{"model": "tiny", "seed": 1' + b"0" * 5000 + b"}", 400, "JSON"),
    ("/chat/completions", [], 400, "object"),
    ("/chat/completions", {"messages": HELLO}, 400, "model is missing"),
    ("/chat/completions", {"model": "tiny"}, 400, "messages is missing"),
    ("/chat/completions", CHAT | {"model": "gpt-4"}, 404, "model_not_found"),
    ("/chat/completions", CHAT | {"model": ["tiny"]}, 404, "model_not_found"),
    ("/chat/completions", CHAT | {"messages": []}, 400, "at least one"),
    ("/chat/completions", CHAT | {"messages": "Hello"}, 400, "messages"),
    ("/chat/completions", CHAT | {"messages": [1]}, 400, "message 0"),
    ("/chat/completions", CHAT | {"messages": [{"role": "user"}]}, 400, "message 0"),
    ("/chat/completions", CHAT | {"messages": [{"role": "robot", "content": "a"}]}, 400, "robot"),
    ("/chat/completions", CHAT | {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
    ("/chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "part"),
    ("/chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "part"),
    ("/chat/completions", CHAT | {"messages": HELLO * 3000}, 400, "messages"),
    (
        "/chat/completions",
        CHAT | {"messages": [{"role": "user", "content": "a" * 600}]},
        400,
        "context_length_exceeded",
    ),
    ("/chat/completions", CHAT | {"messages": [{"role": "user", "content": "a" * 200_000}]}, 400, " bytes"),
    ("/chat/completions", CHAT | {"max_tokens": 0}, 400, "max_tokens"),
    ("/chat/completions", CHAT | {"max_completion_tokens": 1.5}, 400, "max_completion_tokens"),
    ("/chat/completions", CHAT | {"temperature": -1}, 400, "temperature"),
    ("/chat/completions", CHAT | {"temperature": float("nan")}, 400, "temperature"),
    ("/chat/completions", CHAT | {"top_p": "high"}, 400, "top_p"),
    ("/chat/completions", CHAT | {"seed": -1}, 400, "seed"),
    ("/chat/completions", CHAT | {"stop": [""]}, 400, "stop"),
    ("/chat/completions", CHAT | {"stop": ["a"] * 5}, 400, "stop"),
    ("/chat/completions", CHAT | {"stop": "a" * 300}, 400, "stop"),
    ("/chat/completions", CHAT | {"stop": {"a": 1}}, 400, "stop"),
    ("/chat/completions", CHAT | {"n": 100}, 400, "n is 100"),
    ("/chat/completions", CHAT | {"stream": "yes"}, 400, "stream"),
    ("/chat/completions", CHAT | {"stream_options": []}, 400, "stream_options"),
    ("/chat/completions", CHAT | {"logprobs": 2}, 400, "logprobs"),
    ("/chat/completions", CHAT | {"top_logprobs": 2}, 400, "top_logprobs"),
    ("/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 50}, 400, "top_logprobs"),
    ("/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 20, "n": 8}, 400, "65536 logprobs"),
    ("/chat/completions", CHAT | {"tools": "all"}, 400, "tools"),
    ("/chat/completions", CHAT | {"tools": [1]}, 400, "tools"),
    ("/chat/completions", CHAT | {"tools": [{"type": "function"}]}, 400, "tools"),
    ("/chat/completions", CHAT | {"tool_choice": "required"}, 400, "tool_choice"),
    ("/chat/completions", CHAT | {"chat_template_kwargs": {"x": 1}}, 400, "chat_template_kwargs"),
    ("/chat/completions", CHAT | {"frequency_penalty": 1}, 400, "frequency_penalty"),
    ("/chat/completions", CHAT | {"response_format": {"type": "json_object"}}, 400, "response_format"),
    ("/chat/completions", CHAT | {"prompt": "Hello"}, 400, "prompt"),
    ("/chat/completions", CHAT | {"\ud800": 1}, 400, "argument"),
    ("/completions", {"model": "tiny"}, 400, "prompt is missing"),
    ("/completions", TEXT | {"prompt": ""}, 400, "empty"),
    ("/completions", TEXT | {"prompt": []}, 400, "empty"),
    ("/completions", TEXT | {"prompt": 5}, 400, "prompt"),
    ("/completions", TEXT | {"prompt": {"a": 1}}, 400, "prompt"),
    ("/completions", TEXT | {"prompt": ["a", 1]}, 400, "token"),
    ("/completions", TEXT | {"prompt": [1, 2**70]}, 400, "token"),
    ("/completions", TEXT | {"prompt": [1, 9999]}, 400, "9999"),
    ("/completions", TEXT | {"prompt": [-1]}, 400, "-1"),
    ("/completions", TEXT | {"prompt": ["a"] * 50}, 400, "prompts"),
    ("/completions", TEXT | {"echo": True}, 400, "echo"),
    ("/completions", TEXT | {"best_of": 3}, 400, "best_of"),
    ("/completions", TEXT | {"messages": HELLO}, 400, "messages"),
    ("/elsewhere", TEXT, 404, "Not Found"),
    ("/models", TEXT, 405, "Method"),
]


@pytest.mark.parametrize(("path", "body", "status", "says"), BAD)
def test_a_wrong_request_gets_an_error_object(url, path, body, status, says):
    got, answer = ask(url, path, body)
    error = answer["error"]
    assert got == status and error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and len(error["message"]) <= 500
    assert says in error["message"] or says in str(error["code"])
    assert "Traceback" not in error["message"] and ".py" not in error["message"]


def test_errors_of_the_client_library(client):
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(**CHAT, max_tokens=-1, stream=True)
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def junk(random):
    """A JSON value that fits hardly anywhere."""
    plain = [None, True, 0, -1, 10**30, 1.5, float("inf"), "", "\x00", "\ud800", "a" * 3000, [], {}, [[]], {"": {}}]
    nested = [[random.choice(plain)] * 3, {"role": random.choice(plain)}, {"type": "image_url", "image_url": plain[9]}]
    return random.choice(plain + nested)


def spoil(random, value):
    """The value with one part of it replaced, left out or added."""
    if isinstance(value, dict) and value and random.random() < 0.8:
        key = random.choice([*value])
        if random.random() < 0.2:
            return {name: part for name, part in value.items() if name != key}
        return value | {key: spoil(random, value[key])}
    if isinstance(value, list) and value and random.random() < 0.8:
        at = random.randrange(len(value))
        return [*value[:at], spoil(random, value[at]), *value[at + 1 :]]
    return junk(random)


def test_nothing_that_a_client_sends_stops_the_server(started):
    """It runs in another process, whose memory stays flat."""
    count, settled = (1000, 200) if MANY else (60, 20)
    chance, asked = random.Random(1), {"temperature": 0.5, "seed": 3, "stop": ["a"], "n": 1, "stream": False}
    asked |= {"max_tokens": 2, "stream_options": {}, "tools": [], "logprobs": True, "top_p": 0.5}
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    messages = [{"role": "system", "content": "b"}, {"role": "user", "content": parts[:1]}, *HELLO]
    server, url = started
    chat, text = (body | {"model": "smollm2-135m"} for body in (CHAT, TEXT))
    statuses = []
    for n in range(count):
        body = chat | {"messages": messages} | asked if n % 2 else text | asked | {"logprobs": 1}
        data = json.dumps(spoil(chance, {name: part for name, part in body.items() if name != "tools" or n % 2}))
        data = data[: chance.randrange(len(data))] if chance.random() < 0.2 else data
        status, answer = ask(url, "/chat/completions" if n % 2 else "/completions", data.encode())
        statuses.append(status)
        assert status in (200, 400, 404) and ("error" in answer) == (status != 200), (data, status, answer)
        if n == settled:
            before = resident_of(server)
    assert statuses.count(200) < count / 2
    assert client_of(url).chat.completions.create(**chat, max_tokens=3).choices[0].finish_reason
    assert resident_of(server) - before < 20 * 2**20
    hang_up(chat, url, server, *((100, 20) if MANY else (10, 5)))


def resident_of(server):
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def hang_up(chat, url, server, count, settled):
    """Clients that leave: before their request is there, while they wait, and during a stream."""
    client = client_of(url)
    for n in range(count):
        if n % 3 == 0:
            stream = client.chat.completions.create(**chat, max_tokens=900, temperature=1, stream=True)
            next(iter(stream))
            stream.close()
        else:
            send(url, "/chat/completions", chat | {"max_tokens": 900, "stream": n % 2 == 0}, missing=n % 3 - 1).close()
        if n == settled:
            before = resident_of(server)
    until(lambda: health(url) == {"status": "ok", "running": 0, "waiting": 0})
    assert resident_of(server) - before < 20 * 2**20
    assert client.chat.completions.create(**chat, max_tokens=3).choices[0].finish_reason


# ---- Clients ----


def test_two_clients_at_once(model):
    """Each gets its own answer, and both are in one batch."""
    texts, answers, sizes = ("Hello", "Hi there"), {}, set()
    with serving(model) as (server, url):
        step = server.engine._step
        server.engine._step = lambda: (sizes.add(len(server.engine.rows)), step())
        barrier = threading.Barrier(2)

        def run(text):
            client = client_of(url)
            barrier.wait()
            stream = client.completions.create(model="tiny", prompt=text, max_tokens=200, temperature=0, stream=True)
            answers[text] = "".join(chunk.choices[0].text for chunk in stream)

        threads = [threading.Thread(target=run, args=(text,)) for text in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {text: model.generate(text, max_new_tokens=200).text for text in texts}
    assert sizes >= {2}


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
        for host, status in (("evil.example:8000", 403), ("localhost:8000", 200), ("[::1]:8000", 200), ("", 403)):
            assert ask(url, "/models", None, {"host": host})[0] == status
        assert ask(url, "/completions", TEXT, {"content-type": "text/plain"})[0] == 415
        server.is_local = False
        assert ask(url, "/models", None, {"host": "server.example"})[0] == 200


def test_a_request_is_bounded_in_size_and_in_time(model, monkeypatch):
    monkeypatch.setattr(app, "MAX_BYTES", 2000)
    with serving(model, most_waiting=1) as (server, url):
        assert ask(url, "/completions", TEXT | {"prompt": "a" * 3000})[0] == 413
        slow = send(url, "/completions", TEXT, missing=5)
        until(lambda: server.arriving)
        status, answer = ask(url, "/completions", TEXT)
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        slow.close()
        until(lambda: not server.arriving)
        with monkeypatch.context() as patch:
            patch.setattr(app, "BODY_SECONDS", 0.05)
            assert b" 408 " in send(url, "/completions", TEXT, missing=5).recv(100)
        assert ask(url, "/completions", TEXT)[0] == 200


def send(url, path, body, missing=0):
    """Begin a request, but for its last bytes. Returns the connection."""
    body, port = json.dumps(body).encode(), int(re.search(r":(\d+)/", url)[1])
    head = f"POST /v1{path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[: len(body) - missing])
    return connection
