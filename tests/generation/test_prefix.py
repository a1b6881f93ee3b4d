"""Prefixes: an answer to a prefix and a rest is the answer to the whole prompt, and the prefix runs once."""

import threading
from functools import partial

import PIL.Image
import pytest
import torch
from support.cases import assert_close
from support.chat_models import OTHER_END, make
from support.tiny import tiny_config, tiny_model, tiny_olmo2_config
from support.tiny_qwen3_vl import A, seeing_model

import pop
from pop.generation import batch
from pop.pruning import reference


@pytest.mark.parametrize("length", [1, 3, 30])
def test_a_prefix_and_a_rest_are_one_prompt(model, length, notes):
    tokens = [(7 * n + 3) % 250 for n in range(length)]
    prefix = model.prefix(tokens)
    ahead = max(0, length - model.plan.full_depth_last)
    rests = [[9], list(range(40, 61))]
    expected = [model.generate(tokens + rest, max_new_tokens=4).tokens for rest in rests]
    logits = notes(batch, "sample_tokens", lambda x, *_: x)
    ran = notes(type(model.module), "embed", lambda self, tokens: tokens.numel())
    for rest, answer in zip(rests, expected, strict=True):
        logits.clear()
        ran.clear()
        alone = prefix.generate(rest, max_new_tokens=4)
        assert (alone.tokens, alone.prompt_tokens) == (answer, length + len(rest))
        skips = [not model.plan.at_full_depth(at, length + len(rest)) for at in range(ahead, length + len(rest))]
        assert alone.pruned_tokens == (sum(skips) if model.plan.layers else 0)
        assert sum(ran) == length - ahead + len(rest) + len(logits) - 1
        assert_close(logits[0][0], reference.prefill(model.module, torch.tensor(tokens + rest), model.plan))
    logits.clear()
    assert [each.tokens for each in prefix.generate(rests, max_new_tokens=4)] == expected
    for row, rest in zip(logits[0], rests, strict=True):
        assert_close(row, reference.prefill(model.module, torch.tensor(tokens + rest), model.plan))


@pytest.mark.parametrize(
    ("config", "chunk_size"), [(tiny_config(num_layers=6), 20), (tiny_olmo2_config(num_layers=6), 99)]
)
def test_a_rest_selects_among_the_tokens_of_its_prefix(config, chunk_size, notes):
    """With pruned layers that are the deepest, prefix and rest are one prompt. Each rest may select other tokens."""
    plan = pop.PrunePlan((1, 4, 5), 16, 1, full_depth_selected=0.3, selecting_layer=3)
    model = tiny_model(config, seed=3, plan=plan, chunk_size=chunk_size)
    tokens = [(7 * n + 3) % 50 for n in range(60)]
    prefix = model.prefix(tokens)
    rests = [[9], list(range(30, 51)), list(range(9))]
    logits = notes(batch, "sample_tokens", lambda x, *_: x)
    prefix.generate(rests, max_new_tokens=1)
    for row, rest in zip(logits[0], rests, strict=True):
        assert_close(row, reference.prefill(model.module, torch.tensor(tokens + rest), model.plan))
        plain = reference.prefill(model.module, torch.tensor(tokens + rest), pop.PrunePlan((1, 4, 5), 16, 1))
        assert not torch.allclose(row, plain, atol=1e-3)


def test_a_rest_competes_with_a_prefix_of_which_no_token_may_be_selected(notes):
    """Its first tokens are all at full depth, and count in the softmax nevertheless."""
    plan = pop.PrunePlan((4, 5), 16, 44, full_depth_selected=0.3, selecting_layer=3)
    model = tiny_model(tiny_config(num_layers=6), seed=3, plan=plan)
    tokens = [(7 * n + 3) % 50 for n in range(60)]
    rest = [(11 * n + 5) % 50 for n in range(100)]
    logits = notes(batch, "sample_tokens", lambda x, *_: x)
    model.prefix(tokens).generate(rest, max_new_tokens=1)
    assert_close(logits[0][0], reference.prefill(model.module, torch.tensor(tokens + rest), plan))


@pytest.mark.parametrize("length", [12, 20])
def test_a_rest_decides_whether_a_prompt_is_short(length):
    model = make("llama", pop.PrunePlan((2, 3), full_depth_below=20))
    tokens = [(7 * n + 3) % 250 for n in range(length)]
    prefix = model.prefix(tokens)
    for rest in ([9], list(range(40, 61))):
        expected = reference.generate(model.module, torch.tensor(tokens + rest), model.plan, 4)
        assert prefix.generate(rest, max_new_tokens=4).tokens == expected


def test_prefixes_of_text_and_what_they_refuse():
    model = make("llama", pop.PrunePlan((3, 4)), max_seq_len=40)
    model.tokenizer.bos_id = OTHER_END
    prefix = model.prefix("Once upon")
    expected = model.generate("Once upon a", max_new_tokens=9)
    assert prefix.tokens == [OTHER_END, *b"Once upon"]
    assert repr(prefix) == "<Prefix: 10 tokens, 1 of them encoded with each prompt>"
    assert prefix.generate(" a", max_new_tokens=9).tokens == expected.tokens
    assert "".join(prefix.stream(" a", max_new_tokens=9)) == expected.text
    other = model.prefix("Once upon", plan=pop.PrunePlan.none())
    full = model.generate("Once upon a", max_new_tokens=9, plan=pop.PrunePlan.none())
    assert other.generate(" a", max_new_tokens=9).tokens == full.tokens != expected.tokens
    for call, named in (
        (lambda: prefix.generate(""), "prompt is empty"),
        (lambda: model.prefix(""), "prefix is empty"),
    ):
        with pytest.raises(pop.InputError, match=named):
            call()
    with pytest.raises(pop.ContextOverflow, match=r"\b32 tokens .*\b9 earlier .*\b41 .*\b40\b"):
        prefix.generate("a" * 31)
    with pytest.raises(pop.ContextOverflow, match="prefix has 41"):
        model.prefix("a" * 40)


DOCUMENT = [{"role": "system", "content": "A whale is no fish."}, {"role": "user", "content": "Read it."}]
DOCUMENT.append({"role": "assistant", "content": "Done."})


def test_after_messages_a_rest_is_the_users_next_message(model, notes):
    """The answers are those of `chat`, and only what is new runs."""
    prefix = model.prefix(DOCUMENT)
    questions = ["Why?", "A", "\n\n1 2"]
    expected = [model.chat([*DOCUMENT, {"role": "user", "content": text}], max_new_tokens=4) for text in questions]
    ran = notes(type(model.module), "embed", lambda self, tokens: tokens.numel())
    for question, answer in zip(questions, expected, strict=True):
        ran.clear()
        found = prefix.generate(question, max_new_tokens=4)
        assert (found.tokens, found.prompt_tokens) == (answer.tokens, answer.prompt_tokens)
        ahead = max(0, len(prefix.tokens) - model.plan.full_depth_last)
        assert sum(ran) == answer.prompt_tokens - ahead + len(answer.tokens) - 1
    assert [answer.tokens for answer in prefix.generate(questions, max_new_tokens=4)] == [a.tokens for a in expected]
    assert "".join(prefix.stream("Why?", max_new_tokens=4)) == expected[0].text


def test_a_prefix_of_messages_takes_tools_and_thinking_as_chat_does():
    template = (
        "{% if tools %}{{ tools[0].name }}{% endif %}"
        "{% for message in messages %}<|im_start|>{{ message.role }}: {{ message.content }}<|im_end|>{% endfor %}"
        "<|im_start|>assistant: {% if enable_thinking is false %}at once{% endif %}"
    )
    model = make("llama", pop.PrunePlan((3, 4)), chat_format=template)
    options = {"tools": [{"name": "weigh"}], "enable_thinking": False}
    question = [*DOCUMENT, {"role": "user", "content": "Why?"}]
    prompt = model.chat_tokens(question, **options)
    expected = model.chat(question, max_new_tokens=4, **options).tokens
    prefix = model.prefix(DOCUMENT, **options)
    options["tools"][0]["name"] = "count"
    assert prompt[: len(prefix.tokens)] == prefix.tokens
    answer = prefix.generate("Why?", max_new_tokens=4)
    assert (answer.tokens, answer.prompt_tokens) == (expected, len(prompt))


def test_what_a_prefix_of_messages_refuses():
    model = make("llama", pop.PrunePlan.none())
    prefix = model.prefix(DOCUMENT)
    for call, named in (
        (lambda: model.prefix(DOCUMENT, images=[]), "images are in the messages"),
        (lambda: prefix.generate("a", videos=[]), "images are in the messages"),
        *(
            (partial(prefix.generate, rest), "the text of the user's next message")
            for rest in ([5, 6], [], [[{"type": "text", "text": "a"}]], ["a", 5])
        ),
        (lambda: model.prefix("a", tools=[{"name": "weigh"}]), "a prefix of messages"),
        (lambda: model.prefix("a", enable_thinking=False), "a prefix of messages"),
        (lambda: model.prefix(DOCUMENT, enable_thinking="no"), "enable_thinking is 'no'"),
        (lambda: model.prefix([{"role": "bishop", "content": "a"}]), "'bishop'"),
        (lambda: model.prefix([{"role": "user", "content": threading.Lock()}]), "content must be text"),
        (lambda: model.generate(DOCUMENT), "prefix take these"),
    ):
        with pytest.raises(pop.InputError, match=named):
            call()


def test_a_question_that_changes_the_messages_before_it_is_refused():
    template = (
        "{% if messages[-1].content|length > 1 %}long{% endif %}{% for message in messages %}<|im_start|>"
        "{{ message.role }}: {{ message.content }}<|im_end|>{% endfor %}"
    )
    prefix = make("llama", pop.PrunePlan.none(), chat_format=template).prefix(DOCUMENT)
    prefix.generate("B", max_new_tokens=1)
    with pytest.raises(pop.InputError, match="call chat"):
        prefix.generate("BC")


def test_a_prefix_of_messages_is_as_it_was_when_it_was_made(tmp_path):
    """Whatever the caller does with the messages, the tools and the files of images. These are prepared once."""
    model = seeing_model()
    path = tmp_path / "a.png"
    PIL.Image.fromarray(A).save(path)
    shown = [{"type": "image", "image": str(path)}, {"type": "text", "text": "Look."}]
    messages = [{"role": "user", "content": shown}, {"role": "assistant", "content": "Yes."}]
    expected = model.chat([*messages, {"role": "user", "content": "What?"}], max_new_tokens=4, plan="none").tokens
    prefix = model.prefix(messages, plan="none")
    path.unlink()
    messages[1]["content"] = "No."
    shown[1]["text"] = "Do not look."
    assert prefix.generate("What?", max_new_tokens=4).tokens == expected
