"""Conversations and prefixes: what is in the cache, token by token, and that it is what the reference computes.

Answers are scripted, so that they end in every way there is; the logits that they would have been sampled from are
compared with pop/pruning/reference.py, given which tokens of the whole sequence are at full depth.
"""

import copy
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.cases import assert_close, cached_kv, in_windows, stack_layers, turns_by_reference
from support.chat_models import END, OTHER_END, START, make
from support.chat_templates import PLAIN_CHATML
from support.letters import Letters

import pop
from pop import engine
from pop.generation import batch


@pytest.fixture
def script(monkeypatch, notes):
    """script.says: the tokens to be sampled next. script.logits: what they were to be sampled from, [1, V] each.

    script.turns: a Batch for each turn that has begun. script.send: send a message, which gets these tokens.
    """

    def pick(logits, params, generators):
        script.logits.append(logits)
        return torch.tensor([script.says.pop(0)])

    def send(chat, message, says, **options):
        script.says[:] = says
        return chat.send(message, **options)

    monkeypatch.setattr(batch, "sample_tokens", pick)
    turns = notes(batch.Batch, "__init__", lambda turn, *_, **__: turn)
    script = types.SimpleNamespace(says=[], logits=[], turns=turns, send=send)
    return script


def chatml(*messages, opened=True):
    """ChatML by hand: (role, text) of each message."""
    ids = []
    for role, text in messages:
        ids += [START, *f"{role}\n{text}".encode(), END, *b"\n"]
    return [*ids, START, *b"assistant\n"] if opened else ids


def assert_is_reference(model, chat, script, sampled):
    """sampled: how many tokens each turn sampled, the end token included."""
    turns = [(*turn.prompts, turn.answers[0].tokens) for turn in script.turns]
    expected, kv = turns_by_reference(model.module, model.plan, turns)
    kv = stack_layers(kv)
    begin, logits = 0, iter(script.logits)
    for (prompt, answer), count in zip(turns, sampled, strict=True):
        for step in range(count):
            assert_close(next(logits)[0], expected[begin + len(prompt) - 1 + step])
        begin += len(prompt) + len(answer)
    assert next(logits, None) is None
    cache = chat._state.cache
    assert_close(cached_kv(model.module, cache, 0), in_windows(model.module, kv[:, :, : int(cache.lengths[0])]))


def test_every_turn_is_the_reference_however_the_answers_end(model, script):
    chat = model.start_chat("Be brief.")
    turns = [  # message, what is sampled, options, the answer's text, its tokens, why it ended
        ("Hi", [*b"Hello", END], {}, "Hello", [*b"Hello"], "stop"),
        ("How are you?", [*b"Fin"], {"max_new_tokens": 3}, "Fin", [*b"Fin"], "length"),
        ("And?", [*b"I stop"], {"stop": "st"}, "I ", [*b"I st"], "stop"),
        ("Really", [OTHER_END], {}, "", [], "stop"),
        ("x", [0xC3, 0xA9, 0xC3, END], {}, "é�", [0xC3, 0xA9, 0xC3], "stop"),  # half a character at the end
        ("Last.", [*b"o"], {"max_new_tokens": 1}, "o", [*b"o"], "length"),
        ("The very last.", [*b"ok", END], {}, "ok", [*b"ok"], "stop"),
    ]
    expected = chatml(("system", "Be brief."), opened=False)
    for message, sampled, options, text, tokens, reason in turns:
        expected += [*chatml(("user", message)), *tokens]
        answer = script.send(chat, message, sampled, **options)
        assert (answer.text, answer.tokens, answer.finish_reason) == (text, tokens, reason)
        assert answer.prompt_tokens == len(expected) - len(tokens)
        assert chat.tokens == expected
        expected += [END, *b"\n"]
    assert chat.messages[0] == {"role": "system", "content": "Be brief."}
    assert [m["content"] for m in chat.messages[1:]] == [part for turn in turns for part in (turn[0], turn[3])]
    assert_is_reference(model, chat, script, [6, 3, 4, 1, 4, 1, 3])


def test_a_stream_is_a_turn_of_the_chat_format_from_its_last_piece_on(script):
    """Where each answer's text encodes to its own tokens, the whole conversation encoded again is what is held."""
    model = make("llama", pop.PrunePlan((3, 4)))
    chat = model.start_chat()
    for message, says, count in (("Hi", [*b"Hello", END], 9), ("You?", [*"né".encode()], 3), ("Me", [END], 9)):
        script.send(chat, message, says, max_new_tokens=count)
    script.says[:] = [*b"abc"]
    pieces = chat.stream("Hi", max_new_tokens=3)
    assert [next(pieces), next(pieces), len(chat.messages)] == ["a", "b", 6]
    assert [next(pieces), len(chat.messages)] == ["c", 8]
    assert chat.messages[-1] == {"role": "assistant", "content": "abc"}
    assert [*chat.tokens, END, *b"\n"] == model.chat_tokens(chat.messages)[: -len(chatml())]


def test_a_turn_runs_what_is_new_and_nothing_else(script, notes):
    model = make("gemma3", "calibrated")
    ran = notes(type(model.module), "embed", lambda self, tokens: tokens.numel())
    chat = model.start_chat()
    script.send(chat, "A question that is long enough to tell", [*b"Hello", END])
    assert sum(ran) == len(chat.tokens)
    ran.clear()
    script.send(chat, "And?", [*b"Fine"], max_new_tokens=4)
    prompt = [END, *b"\n", *chatml(("user", "And?"))]
    assert sum(ran) == len(prompt) + 3
    ran.clear()
    script.send(chat, "And?", [END])
    assert sum(ran) == 1 + len(prompt)  # the last token of the cut answer


class Broken(Exception):
    pass


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(model, script, monkeypatch):
    """The broken turns are longer than the window and the chunk. They would have overwritten what is kept."""
    chat, twin = (model.start_chat() for _ in range(2))
    for each in (chat, twin):
        script.send(each, "Hi", [*b"Hello"], max_new_tokens=5)
    before, decode = chat.tokens, engine.decode

    def broken(module, tokens, cache, stages):
        if cache.lengths[0] > len(before) + 55:
            raise Broken
        return decode(module, tokens, cache, stages)

    script.says[:] = [*b"and" * 60]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "decode", broken)
        with pytest.raises(Broken):
            chat.send("Something else", max_new_tokens=60)
    stream = chat.stream("Something else", max_new_tokens=60)
    for _ in range(8):
        next(stream)
    stream.close()
    unread = chat.stream("Something else")  # not even begun
    for options in ({"temperature": -1}, {"stop": ""}, {"plan": model.plan}, {"images": "a.png"}, {"videos": 5}):
        with pytest.raises(pop.InputError):
            chat.send("Something else", **options)
    for text in ("", " \n", None, ["x"], "\ud800"):
        with pytest.raises(pop.InputError):
            chat.send(text)
    assert (chat.tokens, len(chat.messages)) == (before, 2)
    logits = []
    for each in (chat, twin):
        script.logits.clear()
        script.send(each, "And?", [*b"Yes", END])
        logits.append(torch.cat(script.logits))
    assert torch.equal(*logits)
    cache, expected = chat._state.cache, twin._state.cache
    assert torch.equal(cached_kv(model.module, cache, 0), cached_kv(model.module, expected, 0))
    assert torch.equal(cache.previous_hidden, expected.previous_hidden)
    script.says[:] = [*b"No", END]
    with pytest.raises(pop.InputError, match="another turn"):
        list(unread)
    assert chat.tokens == twin.tokens


def test_a_full_context_is_an_error_with_numbers(script):
    model = make("gemma3", pop.PrunePlan((3, 4)), max_seq_len=70)
    chat = model.start_chat()
    script.send(chat, "Hi", [*b"abc"], max_new_tokens=3)
    prompt = [END, *b"\n", *chatml(("user", "x" * 60))]
    with pytest.raises(pop.ContextOverflow, match=rf"\b{len(prompt)} tokens .*\b{len(chat.tokens)} earlier .*\b70\b"):
        chat.send("x" * 60)
    assert len(chat.messages) == 2
    room = 70 - len(chat.tokens) - len(prompt) + 60 - 2 + 1
    answer = script.send(chat, "ab", [7] * 70)
    assert (len(answer.tokens), answer.finish_reason) == (room, "length")
    with pytest.raises(pop.ContextOverflow, match=r"\b70\b"):
        chat.send("c")


def test_a_conversation_continues_from_messages(model, script):
    """The first turn prefills them, with its own message, as one prompt of the chat format. Messages are copied."""
    told = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Hello"},
    ]
    chat = model.start_chat(messages=told)
    assert (chat.messages, chat.tokens) == (told, [])
    for messages in (told, chat.messages):
        messages[1]["content"][0]["text"] = "Bye"
    part = {"type": "text", "text": "And?"}
    script.send(chat, [part], [*b"Fine", END])
    part["text"] = "Bye"
    script.send(chat, "Why?", [*b"ok", END])
    first = chatml(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "And?"))
    assert [*chat.tokens] == [*first, *b"Fine", END, *b"\n", *chatml(("user", "Why?")), *b"ok"]
    sent = [[{"type": "text", "text": "Hi"}], "Hello", [{"type": "text", "text": "And?"}], "Fine", "Why?", "ok"]
    assert [message["content"] for message in chat.messages] == ["Be brief.", *sent]
    assert_is_reference(model, chat, script, [5, 3])


def test_conversations_that_are_refused_at_once():
    model = make("llama", pop.PrunePlan())
    with pytest.raises(pop.UnsupportedError, match="base model"):
        pop.Model(model.module, model.config, Letters()).start_chat()
    with pytest.raises(pop.TokenizerError, match="tokenizer"):
        pop.Model(model.module, model.config).start_chat()
    system = {"role": "system", "content": "Be brief."}
    for options, words in (
        ({"messages": [{"role": "user", "content": "Hi"}]}, "role user"),
        ({"messages": [{"role": "nobody", "content": "Hi"}]}, "message 0 .*'nobody'"),
        ({"messages": ["Hi"]}, "message 0 "),
        ({"messages": [system], "system": "Be long."}, "message 1 .*'system'"),
        ({"messages": 3}, "messages"),
        ({"system": 3}, "system is 3, and must be text"),
        ({"system": [system]}, r"start_chat\(messages="),
        ({"system": "\ud800"}, "surrogate"),
    ):
        with pytest.raises(pop.InputError, match=words):
            model.start_chat(**options)
    assert model.start_chat(messages=[system]).messages == model.start_chat("Be brief.").messages


# ChatML, whose turns begin with empty thoughts if thinking is off, as Qwen3's.
THINKING = PLAIN_CHATML.replace(
    "assistant\n", "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)


def test_a_conversation_without_thinking_stays_without(script):
    model = make("llama", pop.PrunePlan((3, 4)), chat_format=THINKING)
    chat = model.start_chat("Be brief.", enable_thinking=False)
    script.send(chat, "Hi", [*b"Yes", END])
    no_thoughts = [*b"<think>\n\n</think>\n\n"]
    first = [*chatml(("system", "Be brief."), ("user", "Hi")), *no_thoughts]
    later = [END, *b"\n", *chatml(("user", "And?")), *no_thoughts]
    script.send(chat, "And?", [*b"Yes", END])
    assert chat.tokens == [*first, *b"Yes", *later, *b"Yes"]
    assert first == model.chat_tokens([*chat.messages[:2]], enable_thinking=False)
    with pytest.raises(pop.InputError, match="enable_thinking is 'no'"):
        model.start_chat(enable_thinking="no").send("Hi")


def test_threads_share_a_model():
    """Two threads, each with its own caches, and one prefix between them."""
    model = make("gemma3", "calibrated")
    prefix = model.prefix("A long story that both of them were told")
    barrier = threading.Barrier(2)

    def work(text, wait=lambda: None):
        wait()
        chat = model.start_chat(text)
        options = {"max_new_tokens": 4, "temperature": 1.0, "seed": 4}
        answers = [chat.send(f"{text} {n}", **options).tokens for n in range(2)]
        rows = prefix.generate([text, text * 2], **options)
        return answers + [row.tokens for row in rows], cached_kv(model.module, chat._state.cache, 0)

    texts = ("Tell me of whales", "No")
    expected = [work(text) for text in texts]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda text: [work(text, barrier.wait) for _ in range(2)], texts))
    assert expected[0][0] != expected[1][0]
    for (tokens, cache), got in zip(expected, results, strict=True):
        for each, kept in got:
            assert each == tokens
            assert torch.equal(kept, cache)


def test_conversations_of_the_real_model(smollm2):
    """Its answers end with the end token, and encode to their own tokens. The cache holds what the format writes."""
    model = pop.load("smollm2-135m", dtype=torch.float32, compile=False)
    chat = model.start_chat()
    for text in ("Hi", "Bye"):  # whose answers are short
        assert chat.send(text, max_new_tokens=60).finish_reason == "stop"
        whole = model.chat_tokens([*chat.messages, {"role": "user", "content": "x"}])
        assert whole == chat.tokens + chat._format.next_prompt("x")[0]


def test_a_template_may_write_the_system_message_in_each_turn(script):
    template = "{% for message in messages if message.role != 'system' %}<|im_start|>{{ message.role }}: "
    template += "{{ message.content }}{% if message.role == 'user' %} ({{ messages[0].content }}){% endif %}<|im_end|>"
    template += "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    model = make("llama", pop.PrunePlan.none(), chat_format=template)
    chat = model.start_chat("Be brief.")
    for text in ("Hi", "And?"):
        script.send(chat, text, [*b"Yes", END])
    asked = chat.messages[:-1]
    assert chat.tokens[: -len(b"Yes")] == model.chat_tokens(asked)


def test_a_conversation_is_not_copied(model):
    """Two that share a cache would give it away twice."""
    with pytest.raises(pop.InputError, match="start_chat"):
        copy.copy(model.start_chat())
