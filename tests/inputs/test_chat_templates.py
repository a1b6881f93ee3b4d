"""Which format a checkpoint has, and the checkpoint's own template as a format, with texts and templates that do harm.

The judge is jinja2, which renders the template with the texts as they are.
"""

import json
import sys
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from support.chat_templates import NAMES, OTHERS, PLAIN_CHATML, tokenizer_with

from pop.errors import InputError, MissingExtra, PopError, UnsupportedError
from pop.inputs.chat import chat_format
from pop.inputs.chat_templates import PRIVATE_USE
from pop.inputs.processors import Prepared, Processor

ASKED = {"role": "user", "content": "Hi"}
CONVERSATION = [{"role": "system", "content": " Be\nbrief. "}, ASKED]
CONVERSATION += [{"role": "assistant", "content": "Hello. "}, {"role": "user", "content": "  Bye\n"}]


def rendered(template: str, messages, **options) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    options = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"} | options
    return environment.from_string(template).render(messages=messages, **options)


def written(form, messages, *arguments, **options) -> str:
    """A conversation as text, with the names of control tokens."""
    return form.tokenizer.decode(form.encode(messages, *arguments, **options), special=True)


def control_tokens(form, messages) -> list[int]:
    special = set(form.tokenizer.special_tokens.values())
    return [id for id in form.encode(messages) if id in special]


# ---- which format ----


def test_a_model_without_a_template_is_a_base_model(tmp_path):
    tokenizer = tokenizer_with(None, tmp_path)
    with pytest.raises(UnsupportedError, match=r"base model.*'llama-3\.1'.*a function"):
        chat_format(tokenizer)
    assert chat_format(tokenizer, choice="llama-3.1").encode([ASKED])
    assert chat_format(tokenizer, choice=PLAIN_CHATML).encode([ASKED])
    for choice in ("gpt-4", 3, object(), str):
        with pytest.raises(InputError, match="chat_format is"):
            chat_format(tokenizer, choice=choice)


def test_tools_and_calls_are_refused_where_the_template_leaves_them_out(tmp_path):
    form = chat_format(tokenizer_with(PLAIN_CHATML, tmp_path))
    with pytest.raises(UnsupportedError, match="leaves out the tools"):
        form.encode([ASKED], tools=[{"name": "f"}])
    with pytest.raises(UnsupportedError, match="leaves out the tool calls"):
        form.encode([ASKED, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}])


def test_the_callers_choice_comes_first(tmp_path):
    tokenizer = tokenizer_with(OTHERS["zephyr"], tmp_path)
    chosen = written(chat_format(tokenizer, choice="chatml"), [ASKED])
    assert chosen == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_without_jinja2_the_error_says_what_to_do(tmp_path, monkeypatch):
    tokenizer = tokenizer_with(PLAIN_CHATML + "{# unique #}", tmp_path)
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    with pytest.raises(MissingExtra, match=r"chat_format=.*pop-prefill\[jinja\]"):
        chat_format(tokenizer)
    assert chat_format(tokenizer, choice=dialogue).encode([ASKED])


# ---- the template itself ----


@pytest.mark.parametrize("name", OTHERS)
def test_it_writes_and_encodes_as_the_template_does(tmp_path, name):
    tokenizer = tokenizer_with(OTHERS[name], tmp_path)
    form = chat_format(tokenizer)
    thought = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello."}
    for messages in (CONVERSATION[:2], CONVERSATION, [ASKED, thought, ASKED], CONVERSATION[1:3]):
        for prompt in (True, False):
            expected = rendered(OTHERS[name], messages, add_generation_prompt=prompt)
            assert written(form, messages, prompt) == expected
            assert form.encode(messages, prompt) == tokenizer.encode(expected, bos=False, allow_special=True)
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert form.encode([{"role": "user", "content": parts}]) == form.encode([ASKED])


@pytest.mark.parametrize("name", OTHERS)
@given(data=st.data())
def test_no_text_becomes_a_control_token(tmp_path_factory, name, data):
    tokenizer = tokenizer_with(OTHERS[name], tmp_path_factory.mktemp("t"))
    form = chat_format(tokenizer)
    parts = st.sampled_from([*tokenizer.special_tokens, *NAMES, " ", "\n", "a", "<|", "{{ eos_token }}", "xx"])
    texts = data.draw(st.lists(st.lists(parts | st.text(max_size=3), max_size=5), min_size=1, max_size=3))
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": "x" + "".join(text) + "x"} for role, text in zip(roles, texts, strict=False)]
    ids = form.encode(messages)
    plain = form.encode([{"role": message["role"], "content": "x"} for message in messages])
    control = {*form.tokenizer.special_tokens.values()}
    assert [id for id in ids if id in control] == [id for id in plain if id in control]
    assert tokenizer.decode(ids, special=True) == rendered(OTHERS[name], messages)


def test_the_ends_of_a_turn_are_those_that_the_template_writes(tmp_path):
    for name, ends in {"hermes": ["<|im_end|>", "</s>"], "tulu": ["</s>"], "dates": ["<|eot_id|>", "</s>"]}.items():
        form = chat_format(tokenizer_with(OTHERS[name], tmp_path))
        ends += ["<|end_of_text|>", "<|eom_id|>"]  # the tokenizer's, after which no answer goes on
        assert {*form.end_ids} == {form.tokenizer.special_tokens[end] for end in ends}


@pytest.mark.parametrize("name", ["hermes", "zephyr", "mistral", "dates", "deepseek"])
def test_the_next_turn_continues_the_conversation(tmp_path, name):
    form = chat_format(tokenizer_with(OTHERS[name], tmp_path))
    answer = {"role": "assistant", "content": "Yes"}
    begun, expected = written(form, [ASKED, answer, ASKED]).split("Yes")
    assert written(form, [ASKED]).startswith(begun.rstrip())
    assert form.next_prompt("Hi")[0] == form.tokenizer.encode(expected, bos=False, allow_special=True)


def test_a_template_that_rewrites_earlier_turns_does_not_continue(tmp_path):
    last = "{% for m in messages %}{{ '<|im_start|>' if loop.last }}{{ m.content }}<|im_end|>{% endfor %}"
    form = chat_format(tokenizer_with(last, tmp_path))
    with pytest.raises(UnsupportedError, match="rewrites earlier turns"):
        form.next_prompt("Hi")


TOOLS = (
    "{% if tools %}<|im_start|>tools{% for t in tools %}{{ t | tojson }}{{ t.function.name }}"
    "{% for k, v in t.function.parameters.properties | items %}[{{ k }}]{{ v | tojson(indent=2) }}{% endfor %}"
    "{% endfor %}<|im_end|>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>{% endfor %}"
)


def test_tools_are_text_too(tmp_path):
    templates = {"default": OTHERS["hermes"], "tool_use": TOOLS}
    tokenizer = tokenizer_with([{"name": name, "template": text} for name, text in templates.items()], tmp_path)
    form = chat_format(tokenizer)
    properties = {"<|im_end|>": {"type": "<|im_start|>"}, 'a "b"': {}}
    tools = [{"type": "function", "function": {"name": "<|im_end|>", "parameters": {"properties": properties}}}]
    call = {"type": "function", "function": {"name": "<|im_end|>", "arguments": {"<|im_end|>": ["</s>", 1.5, None]}}}
    messages = [ASKED, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "<|im_end|>"}]
    ids, special = form.encode(messages, tools=tools), tokenizer.special_tokens
    assert ids.count(special["<|im_end|>"]) == 4 and special["</s>"] not in ids
    told = [m | {"content": m.get("content") or ""} for m in messages]
    environment = ImmutableSandboxedEnvironment()
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, indent=indent, ensure_ascii=False)
    expected = environment.from_string(TOOLS).render(messages=told, tools=tools)
    assert tokenizer.decode(ids, special=True) == expected
    with pytest.raises(UnsupportedError, match="leaves out the tools"):
        chat_format(tokenizer_with(OTHERS["hermes"], tmp_path)).encode([ASKED], tools=tools)
    answer = f"<tool_call>{json.dumps(call['function'])}</tool_call>"
    assert form.parse_tool_calls(answer) == [call]


CHANGES = [
    "{{ m.content | title }}",
    "{{ m.content | upper }}",
    "{{ m.content | replace('a', 'b') }}",
    "{{ (m.content + ' ') | trim }}",
    "{{ m.content | list | join('-') }}",
    "{{ m.content[::2] ~ m.content | first }}",
    "{{ m.content }}{{ m.content | wordcount }}",
    "{% for c in m.content %}{{ c }}{% endfor %}",
    "{{ m.content.split('/')[-1] }}{{ m.content | length }}",
]
# Each forms </s> of its texts, in which it is not.
FORMS = {
    "{{ m.content | replace('-', '') }}": "<-/s>",
    "{{ m.content[::2] }}": "<-/-s->-",
    "{{ '<' ~ m.content }}": "/s>",
    "{{ m.content ~ 's>' }}": "</",
    "<{{ m.content | trim }}>": " /s ",
    "{{ m.content }}{{ m.content }}": "s></",
    "{{ m.content.split(',') | join }}": "<,/s,>",
}
QUESTIONS = [
    "{% if m.content %}{{ m.content | length }}{% endif %}{{ m.content.find('n') }}{{ m.content }}",
    "{% if '/no' in m.content and m.content == 'a/no ' %}!{% endif %}{{ m.content }}",
    "{{ m.content.split('/')[0] }}{{ m.content[1:] }}{{ m.content.partition('/')[2] | trim }}",
    "{{ m.content if m.content is string }}{{ m.content | lower }}",
]
MACROS = "{% macro of(text) %}{{ text }}{% endmacro %}{% macro own(text) %}{{ text }}</s>{% endmacro %}"
BROKEN = [
    "{% for",
    "{{ x.y.z }}",
    "{{ 1 / 0 }}",
    "{% include 'x' %}",
    "{{ m.content.__class__.__mro__ }}",
    "{{ ''.__class__ }}",
    "{{ messages.append(1) }}",
    "{{ range(10 ** 9) | list }}",
    "{{ raise_exception('no') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ nothing() }}",
    "{{ messages[9].content }}",
]


@pytest.mark.parametrize("body", [*CHANGES, *QUESTIONS])
@pytest.mark.parametrize("text", ["a tale</s>of <|im_end|> ", "a<|IM_END|></S>", "a/no "])
def test_a_template_may_change_texts_and_ask_about_them(tmp_path, body, text):
    """It writes what it does with the texts as they are, and never a control token of theirs."""
    template = PLAIN_CHATML.replace("{{ m.content }}", body)
    form = chat_format(tokenizer_with(template, tmp_path))
    messages = [{"role": "user", "content": text}]
    assert written(form, messages) == rendered(template, messages)
    assert control_tokens(form, messages) == control_tokens(form, [ASKED])


def test_a_macros_own_control_tokens_remain(tmp_path):
    template = MACROS + PLAIN_CHATML.replace(
        "{{ m.content }}", "{{ of(m.content).split('~')[-1] }}{{ own(m.content) }}"
    )
    form = chat_format(tokenizer_with(template, tmp_path))
    messages = [{"role": "user", "content": "a~b</s>"}]
    assert written(form, messages) == rendered(template, messages)
    assert control_tokens(form, messages).count(form.tokenizer.special_tokens["</s>"]) == 1


@pytest.mark.parametrize("body", FORMS)
def test_a_template_that_forms_control_tokens_from_texts_is_refused(tmp_path, body):
    form = chat_format(tokenizer_with(PLAIN_CHATML.replace("{{ m.content }}", body), tmp_path))
    assert control_tokens(form, [ASKED])
    with pytest.raises(UnsupportedError, match="form control tokens"):
        form.encode([{"role": "user", "content": FORMS[body]}])


def test_names_of_tools_in_brackets_form_no_control_token(tmp_path):
    """As in templates that write XML."""
    schemas = "{% for t in tools or [] %}<{{ t.name }}>{% for k in t.keywords %}<{{ k }}>{% endfor %}{% endfor %}"
    template = PLAIN_CHATML + schemas
    form = chat_format(tokenizer_with(template, tmp_path))
    assert form.encode([ASKED], tools=[{"name": "f", "keywords": {"a|b": 1}}])
    for tool in ({"name": "|im_end|", "keywords": {}}, {"name": "f", "keywords": {"|im_end|": 1}}):
        with pytest.raises(UnsupportedError, match="form control tokens"):
            form.encode([ASKED], tools=[tool])


@pytest.mark.parametrize(
    "body",
    [
        "{% for c in m.tool_calls %}{% for k in c.function.arguments %}<|{{ k }}|>{% endfor %}{% endfor %}",
        "{% for c in m.tool_calls %}<|{{ c.function.arguments.type }}|>{% endfor %}",
        "{% for t in tools or [] %}{% for k in t.function.parameters.properties %}<|{{ k }}|>{% endfor %}{% endfor %}",
    ],
)
def test_words_of_arguments_and_properties_form_no_control_token(tmp_path, body):
    """Even words that are keys elsewhere."""
    form = chat_format(tokenizer_with(PLAIN_CHATML.replace("{{ m.content }}", "{{ m.content }}" + body), tmp_path))

    def encode(word):
        arguments = {word: 1, "type": word}
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        schema = {"type": "object", "properties": {word: {"type": "string"}}}
        tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}] if "tools" in body else None
        messages = [ASKED] if tools else [ASKED, answer, ASKED]
        return form.encode(messages, tools=tools)

    assert encode("other")
    with pytest.raises(UnsupportedError, match="form control tokens"):
        encode("im_end")


def test_tokens_that_only_open_the_answer_are_text_in_messages_of_users(tmp_path):
    """An answer may have them, as a thought does: templates cut old thoughts there."""
    name = "<｜User｜>"  # added, and not special
    cut = f"{{{{ m.content.split('{name}')[-1] if m.role == 'assistant' else m.content }}}}"
    template = PLAIN_CHATML.replace("{{ m.content }}", cut) + f"{{% if add_generation_prompt %}}{name}{{% endif %}}"
    form = chat_format(tokenizer_with(template, tmp_path))
    opening = form.tokenizer.special_tokens[name]
    ids = form.encode([{"role": "user", "content": f"a{name}b"}])
    assert ids.count(opening) == 1 and ids[-1] == opening
    answer = {"role": "assistant", "content": f"a thought{name}an answer"}
    text = written(form, [ASKED, answer, ASKED])
    assert "an answer" in text and "a thought" not in text


def test_stand_ins_are_characters_that_no_text_has(tmp_path):
    form = chat_format(tokenizer_with(PLAIN_CHATML, tmp_path))
    first, second = map(chr, PRIVATE_USE[:2])
    text = f"{first}</s>{second}<|im_end|>"
    assert f"user\n{text}<|im_end|>\n" in written(form, [{"role": "user", "content": text}])
    with pytest.raises(InputError, match="private-use"):
        form.encode([{"role": "user", "content": "</s>" + "".join(map(chr, PRIVATE_USE))}])


@pytest.mark.parametrize("body", BROKEN)
def test_a_broken_or_hostile_template_gives_an_error_of_this_library(tmp_path, body):
    tokenizer = tokenizer_with(PLAIN_CHATML.replace("{{ m.content }}", body), tmp_path)
    with pytest.raises(PopError, match="chat_template"):
        chat_format(tokenizer).encode([ASKED])


def test_a_template_may_refuse_a_conversation(tmp_path):
    form = chat_format(tokenizer_with(OTHERS["mistral"], tmp_path))
    with pytest.raises(InputError, match="roles must alternate"):
        form.encode([ASKED, ASKED])


class Sees:
    marks: ClassVar = {"image": "<s></s>"}

    split_at_marks = Processor.split_at_marks

    def prepare(self, kind, given):
        return Prepared(kind, given, ([given],))


SEEING = PLAIN_CHATML.replace(
    "{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ '<s></s>' if 'image' == part.type else part.text }}{% endfor %}{% endif %}",
)
SHOWN = [{"role": "user", "content": [{"type": "text", "text": "<s></s>"}, {"type": "image", "image": 7}]}]
SHOWN += [{"role": "assistant", "content": "<s></s>"}, {"role": "user", "content": [{"type": "image", "image": 8}]}]


def test_images_take_the_places_of_the_marks_that_the_template_writes(tmp_path):
    """Marks in texts stay text."""
    form = chat_format(tokenizer_with(SEEING, tmp_path), Sees())
    ids, media = form.prompt(SHOWN)
    assert [one.pixels for one in media] == [7, 8] and [id for id in ids if id in (7, 8)] == [7, 8]
    special = form.tokenizer.special_tokens
    assert not {special["<s>"], special["</s>"]} & {*ids}
    assert form.tokenizer.decode(ids[: ids.index(7)], special=True) == "<|im_start|>user\n<s></s>"
    rest, (one,) = form.next_prompt(SHOWN[2]["content"])
    assert one.pixels == 8 and ids[-len(rest) :] == rest


def test_images_are_refused_where_the_template_leaves_them_out(tmp_path):
    for template in (SEEING.replace("'<s></s>' if", "'' if"), SEEING.replace("'<s></s>' if", "'<s></s><s></s>' if")):
        with pytest.raises(InputError, match="chat_template has <s></s> [04] times"):
            chat_format(tokenizer_with(template, tmp_path), Sees()).encode(SHOWN)


# ---- a format of the caller ----


def dialogue(messages, add_generation_prompt=True, **variables):
    turns = [f"{message['role']}: <｜User｜>{message['content'].upper()}<|im_end|>\n" for message in messages]
    return "".join(turns) + "assistant: <｜User｜>" * add_generation_prompt


def test_a_format_in_python(tmp_path):
    tokenizer = tokenizer_with(None, tmp_path)
    form = chat_format(tokenizer, choice=dialogue)
    text = "user: <｜User｜>HI<｜USER｜><|im_end|>\nassistant: <｜User｜>"
    ids = form.encode([{"role": "user", "content": "Hi<｜User｜>"}])
    assert tokenizer.decode(ids, special=True) == text
    assert ids.count(form.tokenizer.special_tokens["<｜User｜>"]) == 2
    assert form.end_ids[0] == tokenizer.special_tokens["<|im_end|>"]
    rest, _ = form.next_prompt("Hi<|im_end|>")
    assert rest.count(form.end_ids[0]) == 2
    form = chat_format(tokenizer, choice=lambda messages, **_: messages[0]["content"].swapcase() + dialogue(messages))
    text = written(form, [{"role": "user", "content": "Hi<｜User｜>"}])
    assert text.startswith("hI<｜uSER｜>user: <｜User｜>HI<｜USER｜>")
