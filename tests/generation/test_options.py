"""Options of public methods: names that do not exist, streams, and the checkpoint's own sampling."""

import dataclasses
import json

import pytest
import torch
from support.chat_models import make
from support.letters import Letters
from support.tiny_chat import write_chat_checkpoint

import pop
from pop.generation.sampling import DEFAULTS, SamplingParams, sampling_params

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def model():
    return make("llama", pop.PrunePlan((3, 4)))


def test_the_time_to_the_first_token_counts_from_the_call_on(model, monkeypatch):
    """By a clock that moves by one for each text that is tokenized."""
    now = [0.0]
    encode_pieces = Letters.encode_pieces

    def encode(*args, **options):
        now[0] += 1
        return encode_pieces(*args, **options)

    prefix = model.prefix("Once")
    chat = model.start_chat()
    monkeypatch.setattr(Letters, "encode_pieces", encode)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    for method, prompt in ((model.generate, "a"), (prefix.generate, "a"), (chat.send, "a"), (model.chat, MESSAGES)):
        now[0] = 0.0
        answer = method(prompt, max_new_tokens=2)
        assert answer.ttft_s == now[0] >= 1


def test_what_a_method_cannot_take_is_said_at_once(model):
    """The name of an unknown option, with the known ones. Streams refuse before they start."""
    chat, prefix = model.start_chat(), model.prefix("Once")
    for method in (model.generate, model.stream, chat.send, chat.stream, prefix.generate, prefix.stream, model.chat):
        with pytest.raises(pop.InputError, match="'temprature'") as raised:
            method(MESSAGES if method == model.chat else "a", temprature=1)
        assert all(name in str(raised.value) for name in (*DEFAULTS, "sampling"))
    for method, given, options, words in (
        (chat.send, "Hi", {"plan": None}, "no option 'plan', but there is that of start_chat and prefix"),
        (model.generate, "a", {"max_tokens": 3}, "no option 'max_tokens', but there is max_new_tokens"),
        (model.generate, "a", {"response_format": {}}, "but there is tools/examples/json_schema.py"),
        (
            chat.send,
            "Hi",
            {"stream": True},
            r"no option 'stream', but there is model.stream, .*chat_tokens\(messages\)",
        ),
        (prefix.stream, "Hi", {"plan": None}, "no option 'plan'"),
        (model.generate, "a", {"tools": []}, "no option 'tools', but there is that of model.chat"),
        (model.generate, "a", {"messages": []}, "no option 'messages', but there is model.chat"),
        (model.generate, "a", {"prune": None}, "no option 'prune', but there is plan, of which 'none' is full depth"),
        (model.chat, MESSAGES, {"images": []}, "no option 'images', but there is the part .* of a message"),
        (model.stream, "", {}, "prompt"),
        (model.stream, ["a", "b"], {}, "one prompt"),
    ):
        with pytest.raises(pop.InputError, match=words):
            method(given, **options)
    with pytest.raises(pop.PlanError, match="'most'"):
        model.stream("a", plan="most")


@pytest.fixture(params=["prompt", "conversation", "prefix"])
def calls(request, model):
    """A method that streams an answer, and the one that returns it whole."""
    if request.param == "prompt":
        return model.stream, model.generate
    if request.param == "conversation":
        return model.start_chat().stream, model.start_chat().send
    return model.prefix("x").stream, model.prefix("x").generate


STREAMED = {"max_new_tokens": 12, "temperature": 1.0, "seed": 2, "logprobs": True}


def test_a_stream_has_the_generation_from_its_last_piece_on(calls):
    stream, generate = calls
    expected = generate("abc", **STREAMED)
    pieces = stream("abc", **STREAMED)
    first = next(pieces)
    assert pieces.generation is None
    rest = list(pieces)
    assert first and all(rest)
    assert first + "".join(rest) == expected.text
    times = {"ttft_s": 0, "decode_s": 0}
    assert dataclasses.replace(pieces.generation, **times) == dataclasses.replace(expected, **times)
    assert pieces.generation.decode_s > 0 < pieces.generation.ttft_s
    pieces.close()
    assert pieces.generation.finish_reason == expected.finish_reason


def test_a_closed_stream_has_the_generation_up_to_there(calls):
    stream, _ = calls
    unread, pieces = stream("abc", **STREAMED), stream("abc", **STREAMED)
    unread.close()
    assert list(unread) == [] and unread.generation is None
    begun = next(pieces)
    pieces.close()
    found = pieces.generation
    assert list(pieces) == [] and found.finish_reason == "cancelled"
    assert found.text.startswith(begun)
    assert 0 < len(found.tokens) == len(found.logprobs) < 12


def test_a_closed_stream_has_text_that_might_have_begun_a_stop_string(model):
    text = model.generate("abc", **STREAMED).text
    pieces = model.stream("abc", **STREAMED, stop=[f"{character}never" for character in {*text}])
    for _ in zip(range(3), pieces._steps, strict=False):
        pass
    (answer,) = pieces._batch.answers
    pieces.close()
    assert answer.pending and pieces.generation.text.endswith(answer.pending)


def test_a_stream_may_change_the_mode_of_inference_midway(model):
    """As a notebook does that makes a stream in a cell with torch.inference_mode() and reads it in another."""
    options = {"max_new_tokens": 9, "repetition_penalty": 1.2}
    expected = model.generate("abc", **options).text
    with torch.inference_mode():
        pieces = model.stream("abc", **options)
        text = next(pieces)
    text += next(pieces)
    with torch.inference_mode():
        text += next(pieces)
    assert text + "".join(pieces) == expected
    with torch.inference_mode():
        prefix, chat = model.prefix("ab"), model.start_chat()
        begun = chat.send("Hi", max_new_tokens=3).tokens
    assert prefix.generate("c", **options).text == expected
    twin = model.start_chat()
    assert twin.send("Hi", max_new_tokens=3).tokens == begun
    assert chat.send("And?", max_new_tokens=4).tokens == twin.send("And?", max_new_tokens=4).tokens


def test_rows_leave_a_batch_in_another_mode_than_it_began_in(model):
    batch = model._batch([[3] * 5, [4] * 9], None, None, None, {"max_new_tokens": 250}, began=0.0)
    batch.answers[0].max_new_tokens = 2
    steps = batch.steps()
    next(steps)
    with torch.inference_mode():
        next(steps)
        next(steps)  # one row is left
    cache = batch.cache
    assert cache.batch_size == 1
    steps.close()
    assert not any(x.is_inference() for x in (*cache.keys, cache.previous_hidden))


STATED = [
    ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
    ({"do_sample": True, "top_k": 20, "min_p": 0.0}, {"temperature": 1.0, "top_k": 20}),
    ({"do_sample": True, "min_p": 0.05}, {"temperature": 1.0, "min_p": 0.05}),
    ({"do_sample": True, "top_k": 0, "temperature": None}, {"temperature": 1.0}),
    ({"do_sample": False, "temperature": 0.6, "top_k": 3}, {}),
    ({"temperature": 0.6, "repetition_penalty": 1.1, "eos_token_id": 2}, {"repetition_penalty": 1.1}),
    ({}, {}),
]


def test_the_checkpoints_sampling_is_applied_only_if_asked_for(tmp_path):
    """A model whose file is missing, or cannot be used, loads."""
    file = write_chat_checkpoint(tmp_path) / "generation_config.json"
    model = pop.load(tmp_path)
    for sampling, words in (("checkpoint", "no generation_config.json"), ("greedy", "sampling is 'greedy'")):
        with pytest.raises(pop.InputError, match=words):
            model.generate("Hi", sampling=sampling)
    given = {"temperature": 0.3, "max_new_tokens": 4}
    for stated, expected in STATED:
        file.write_text(json.dumps(stated))
        model = pop.load(tmp_path)
        params = sampling_params({"sampling": "checkpoint", "seed": 1}, model.sampling)
        assert params == SamplingParams(**expected, seed=1)
        assert sampling_params({"seed": 1}, model.sampling) == SamplingParams(seed=1)
        params = sampling_params({"sampling": "checkpoint"} | given, model.sampling)
        assert params == SamplingParams(**(expected | given))
    file.write_text(json.dumps(STATED[0][0]))
    model = pop.load(tmp_path)
    asked = model.generate("Hi", sampling="checkpoint", max_new_tokens=8, seed=3)
    assert asked.tokens == model.generate("Hi", **STATED[0][1], max_new_tokens=8, seed=3).tokens
    file.write_text('{"do_sample": true, "top_p": 7}')
    model = pop.load(tmp_path)
    assert model.generate("Hi", max_new_tokens=2).tokens
    with pytest.raises(pop.InputError, match="top_p is 7"):
        model.generate("Hi", sampling="checkpoint")
