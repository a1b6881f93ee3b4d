"""Which format a checkpoint has, and templates as formats, with texts and templates that do harm.

The judge is jinja2, which renders the template with the texts as they are.
"""

import copy
import json
import re
import sys
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from support.chat_formats import FORMATS
from support.chat_templates import NAMES, OTHERS, PLAIN_CHATML, tokenizer_with, written
from support.goldens import GOLDENS

from pop.errors import InputError, MissingExtra, PopError, UnsupportedError
from pop.inputs.chat import chat_format
from pop.inputs.processors import TEXT_ONLY, Prepared, Processor

ASKED = {"role": "user", "content": "Hi"}
# What templates write of a message: "changes" of texts; "conditions", each with a text that makes it write a control
# token of its own; "forms", each with a text of which it forms </s>; and bodies that are broken or hostile.
BODIES = json.loads((GOLDENS / "chat_templates" / "bodies.json").read_bytes())
CONVERSATION = [{"role": "system", "content": " Be\nbrief. "}, ASKED]
CONVERSATION += [{"role": "assistant", "content": "Hello. "}, {"role": "user", "content": "  Bye\n"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tokenizer without a template."""
    return tokenizer_with(None, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def form_of(base):
    """Return the format of a checkpoint with this template."""

    def form_of(template, vision=TEXT_ONLY):
        tokenizer = copy.copy(base)
        tokenizer.chat_template = template
        return chat_format(tokenizer, vision)

    return form_of


def rendered(template: str, messages, **options) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, ensure_ascii=False, indent=None: json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent
    )
    template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    options = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"} | options
    return environment.from_string(template).render(messages=messages, **options)


def control_tokens(form, messages) -> list[int]:
    special = set(form.tokenizer.special_tokens.values())
    return [id for id in form.encode(messages) if id in special]


def saying(body: str) -> str:
    """A template that writes `body` in place of a message's content."""
    return PLAIN_CHATML.replace("{{ m.content }}", body)


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def test_the_callers_choice_comes_first_and_a_model_without_a_template_is_a_base_model(base, form_of):
    with pytest.raises(UnsupportedError, match=r"base model.*'llama-3\.1'"):
        form_of(None)
    for choice in ("llama-3.1", PLAIN_CHATML):
        assert chat_format(base, choice=choice).encode([ASKED])
    for choice in ("gpt-4", 3, object(), str):
        with pytest.raises(InputError, match="chat_format is"):
            chat_format(base, choice=choice)
    chosen = written(chat_format(form_of(OTHERS["zephyr"]).tokenizer, choice="chatml"), [ASKED])
    assert chosen == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_tools_and_calls_are_refused_where_the_template_leaves_them_out(form_of):
    form = form_of(PLAIN_CHATML)
    with pytest.raises(UnsupportedError, match="leaves out the tools"):
        form.encode([ASKED], tools=[{"name": "f"}])
    with pytest.raises(UnsupportedError, match="leaves out the tool calls"):
        form.encode([ASKED, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}])


def test_without_jinja2_the_error_says_what_to_install(form_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    with pytest.raises(MissingExtra, match=r"pop-prefill\[jinja\]"):
        form_of(PLAIN_CHATML)


@pytest.mark.parametrize("name", OTHERS)
def test_it_writes_and_encodes_as_the_template_does(form_of, name):
    form = form_of(OTHERS[name])
    thought = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello."}
    for messages in (CONVERSATION[:2], CONVERSATION, [ASKED, thought, ASKED], CONVERSATION[1:3]):
        for prompt in (True, False):
            expected = rendered(OTHERS[name], messages, add_generation_prompt=prompt)
            assert written(form, messages, prompt) == expected
            assert form.encode(messages, prompt) == form.tokenizer.encode(expected, bos=False, allow_special=True)
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert form.encode([{"role": "user", "content": parts}]) == form.encode([ASKED])


@pytest.mark.parametrize("name", [*FORMATS, *OTHERS])
@given(data=st.data())
def test_no_text_becomes_a_control_token(form_of, name, data):
    """The texts change neither the control tokens nor the rest of what the template writes."""
    form = FORMATS[name] if name in FORMATS else form_of(OTHERS[name])
    least = 32 if name == "smollm2" else 0  # its tiny tokenizer lacks some bytes
    characters = st.characters(codec="utf-8", min_codepoint=least, max_codepoint=0x3FFFF if least else None)
    parts = st.sampled_from([*form.tokenizer.special_tokens, *NAMES, "{{ eos_token }}", "<|", "a", " ", "\n"])
    text = st.lists(parts | st.text(characters, max_size=3), max_size=6).map("".join)
    roles = data.draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=4))
    if name not in ("llama-3.1", "smollm2"):  # which take turns in any order
        roles = ["user", "assistant", "user", "assistant"][: len(roles)]
    roles = ["system"] * data.draw(st.booleans()) + roles
    texts = [f"x{data.draw(text)}x" for _ in roles]  # formats remove whitespace at the ends
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    plain = [{"role": role, "content": f"[{n}]"} for n, role in enumerate(roles)]
    assert control_tokens(form, messages) == control_tokens(form, plain)
    texts = [text.replace("▁", " ") if name == "gemma3" else text for text in texts]  # sentencepiece's own space
    expected = re.sub(r"\[(\d)\]", lambda match: texts[int(match[1])], written(form, plain))
    assert written(form, messages) == expected


def test_the_ends_of_a_turn_are_those_that_the_template_writes(form_of):
    ends = {"hermes": ["<|im_end|>", "</s>"], "tulu": ["</s>"], "dates": ["<|eot_id|>", "</s>"]}
    forms = {name: form_of(OTHERS[name]) for name in ends} | FORMATS
    ends = {name: [*names, "<|end_of_text|>", "<|eom_id|>"] for name, names in ends.items()}  # the tokenizer's ends
    ends |= {"llama-3.1": ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"], "smollm2": ["<|im_end|>", "<|endoftext|>"]}
    for name, names in (ends | {"gemma3": ["<end_of_turn>", "<eos>"]}).items():
        assert forms[name].end_ids == tuple(forms[name].tokenizer.special_tokens[end] for end in names)


def test_the_next_turn_continues_the_conversation(form_of):
    for name in ("hermes", "zephyr", "mistral", "dates", "deepseek"):
        form = form_of(OTHERS[name])
        begun, expected = written(form, [ASKED, {"role": "assistant", "content": "Yes"}, ASKED]).split("Yes")
        assert written(form, [ASKED]).startswith(begun.rstrip())
        assert form.next_prompt("Hi")[0] == form.tokenizer.encode(expected, bos=False, allow_special=True)


def test_a_template_that_rewrites_earlier_turns_has_no_next_prompt(form_of):
    last = "{% for m in messages %}{{ '<|im_start|>' if loop.last }}{{ m.content }}<|im_end|>{% endfor %}"
    numbered = saying("{{ loop.index if m.role == 'user' }} {{ m.content }}")
    told_last = saying("{{ messages[0].content if loop.last and messages[0].role == 'system' }}{{ m.content }}")
    system = [{"role": "system", "content": "Be brief."}]
    for template, before in ((last, []), (numbered, []), (told_last, system)):
        with pytest.raises(UnsupportedError, match="rewrites earlier turns"):
            form_of(template).next_prompt("Hi", system=before)
    assert form_of(told_last).next_prompt("Hi")


def test_tools_are_text_too(form_of):
    form = form_of(BODIES["tools"])
    properties = {"<|im_end|>": {"type": "<|im_start|>"}, 'a "b"': {}}
    tools = [{"type": "function", "function": {"name": "<|im_end|>", "parameters": {"properties": properties}}}]
    call = {"type": "function", "function": {"name": "<|im_end|>", "arguments": {"<|im_end|>": ["</s>", 1.5, None]}}}
    messages = [ASKED, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "<|im_end|>"}]
    ids, special = form.encode(messages, tools=tools), form.tokenizer.special_tokens
    assert ids.count(special["<|im_end|>"]) == 4 and special["</s>"] not in ids
    told = [m | {"content": m.get("content") or ""} for m in messages]
    assert form.tokenizer.decode(ids, special=True) == rendered(BODIES["tools"], told, tools=tools)


@pytest.mark.parametrize(
    "text", ["a tale</s>of <|im_end|> \u00e9", "a<|IM_END|></S>", "a/no ", "\U000f0000\U00100000\\ud800"]
)
def test_a_template_may_change_texts_and_ask_about_them(form_of, text):
    """It writes what it does with the texts as they are, and never a control token of theirs."""
    for body in BODIES["changes"]:
        form = form_of(saying(body))
        assert written(form, user(text)) == rendered(saying(body), user(text))
        assert control_tokens(form, user(text)) == control_tokens(form, [ASKED])


@pytest.mark.parametrize("body", BODIES["conditions"])
def test_a_control_token_may_depend_on_what_a_message_says(form_of, body):
    form = form_of(saying(body))
    for messages, more in ((user(BODIES["conditions"][body]), 1), ([ASKED], 0)):
        assert written(form, messages) == rendered(saying(body), messages)
        assert len(control_tokens(form, messages)) == 3 + more


def test_a_template_that_forms_control_tokens_from_parts_is_refused(form_of):
    """Elsewhere they would be control tokens."""
    for body, text in BODIES["forms"].items():
        form = form_of(saying(body))
        assert control_tokens(form, [ASKED])
        with pytest.raises(UnsupportedError, match="forms the control token '</s>'"):
            form.encode(user(text))
    with pytest.raises(UnsupportedError, match="'<|im_start|>'"):
        form_of(PLAIN_CHATML.replace("<|im_start|>", "{{ '<|im' ~ '_start|>' }}")).encode([ASKED])


@pytest.mark.parametrize("body", BODIES["words"])
def test_words_of_calls_and_tools_form_no_control_token(form_of, body):
    """As in templates that write XML. Even words that are keys elsewhere."""
    form = form_of(saying("{{ m.content }}" + body))

    def encode(word):
        call = {"type": "function", "function": {"name": "f", "arguments": {word: 1, "type": word}}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        schema = {"type": "object", "properties": {word: {"type": "string"}}}
        tools = [{"type": "function", "function": {"name": word, "parameters": schema}}]
        if "tools" in body:
            return form.encode([ASKED], tools=tools)
        return form.encode([ASKED, answer, ASKED])

    assert encode("other")
    with pytest.raises(UnsupportedError, match="forms the control token"):
        encode("im_end")


def test_added_tokens_that_the_template_writes_are_text_in_messages(base, form_of):
    name = "<｜User｜>"  # added, and not special
    ids = form_of(OTHERS["deepseek"]).encode(user(f"a{name}b"))
    assert ids.count(base.added_tokens[name]) == 1


def test_tokens_that_only_open_the_answer_are_text_in_messages_of_users(form_of):
    """An answer may have them, as a thought does: templates cut old thoughts there."""
    name = "<｜User｜>"  # added, and not special
    cut = f"{{{{ m.content.split('{name}')[-1] if m.role == 'assistant' else m.content }}}}"
    form = form_of(saying(cut) + f"{{% if add_generation_prompt %}}{name}{{% endif %}}")
    opening = form.tokenizer.special_tokens[name]
    ids = form.encode(user(f"a{name}b"))
    assert ids.count(opening) == 1 and ids[-1] == opening
    answer = {"role": "assistant", "content": f"a thought{name}an answer"}
    text = written(form, [ASKED, answer, ASKED])
    assert "an answer" in text and "a thought" not in text


def test_lone_surrogates_are_refused_wherever_they_are(form_of):
    """In a template, they stand for control tokens."""
    form = form_of(saying("{{ m.content }}{{ (m.tool_calls or tools) | tojson }}"))
    call = {"function": {"name": "f", "arguments": {"\ud800": 1}}}
    for messages, tools in (
        (user("\ud800"), None),
        ([ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}], None),
        ([ASKED], [{"name": "\ud801"}]),
    ):
        with pytest.raises(InputError, match="surrogate"):
            form.encode(messages, tools=tools)
    with pytest.raises(InputError, match="surrogate"):
        form.next_prompt("\udfff")


def test_thousands_of_names_are_found_in_a_long_text_of_their_beginnings(tmp_path):
    """Names share beginnings in the pattern, so that the search need not begin anew for each of them."""
    names = [f"<|reserved_{n}|>" for n in range(6000)]
    tokenizer = tokenizer_with(PLAIN_CHATML, tmp_path, additional_special_tokens=names)
    assert {*names} <= tokenizer.special_tokens.keys()
    form = chat_format(tokenizer)
    text = "<|reserved_" * 20_000
    assert written(form, user(text)) == rendered(PLAIN_CHATML, user(text))


def test_a_broken_or_hostile_template_gives_an_error_of_this_library(form_of):
    for body in BODIES["broken"]:
        with pytest.raises(PopError, match="chat_template"):
            form_of(saying(body)).encode([ASKED])
    with pytest.raises(InputError, match="roles must alternate"):
        form_of(OTHERS["mistral"]).encode([ASKED, ASKED])


class Sees:
    marks: ClassVar = {"image": "<s></s>"}

    replace_marks = Processor.replace_marks

    def prepare(self, kind, given):
        return Prepared(kind, given, ([given],))


SEEING = saying(
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ '<s></s>' if 'image' == part.type else part.text }}{% endfor %}{% endif %}",
)
SHOWN = [{"role": "user", "content": [{"type": "text", "text": "<s></s>"}, {"type": "image", "image": 7}]}]
SHOWN += [{"role": "assistant", "content": "<s></s>"}, {"role": "user", "content": [{"type": "image", "image": 8}]}]


def test_images_take_the_places_of_the_marks_that_the_template_writes(form_of):
    """Marks in texts stay text. A template that leaves images out, or shows them twice, is refused."""
    for template in (SEEING, SEEING.replace("'<s></s>' if", "marks.image if")):
        form = form_of(template, Sees())
        ids, media = form.prompt(SHOWN)
        assert [one.pixels for one in media] == [7, 8] and [id for id in ids if id in (7, 8)] == [7, 8]
        special = form.tokenizer.special_tokens
        assert not {special["<s>"], special["</s>"]} & {*ids}
        assert form.tokenizer.decode(ids[: ids.index(7)], special=True) == "<|im_start|>user\n<s></s>"
        rest, (one,) = form.next_prompt(SHOWN[2]["content"])
        assert one.pixels == 8 and ids[-len(rest) :] == rest
    for places in ("''", "'<s></s><s></s>'"):
        with pytest.raises(InputError, match="chat_template has <s></s> [04] times"):
            form_of(SEEING.replace("'<s></s>' if", f"{places} if"), Sees()).encode(SHOWN)
