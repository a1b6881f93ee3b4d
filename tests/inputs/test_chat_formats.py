"""The families' chat formats with tools and thoughts, against the checkpoints' own templates (goldens)."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.chat_templates import QWEN3, QWEN3_INSTRUCT, QWEN3_THINKING, written
from support.goldens import REFUSED
from support.text import GOLDENS, golden_tokenizer

from pop.errors import InputError
from pop.generation.answers import Generation
from pop.inputs.chat import chat_format
from pop.inputs.chat_templates import TEMPLATES

GOLDEN = json.loads((GOLDENS / "chats.json").read_bytes())
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
ASKED = {"role": "user", "content": "Hi"}
WRITTEN = TEMPLATES | {"qwen3": QWEN3, "qwen3-instruct": QWEN3_INSTRUCT, "qwen3-thinking": QWEN3_THINKING}
WRITTEN["llama-3.2"] = TEMPLATES["llama-3.1"].replace("26 Jul 2024", GOLDEN["date"])


def form_of(name: str):
    return chat_format(golden_tokenizer("llama-3.1" if name.startswith("llama") else "qwen3"), choice=WRITTEN[name])


@pytest.mark.parametrize("name", GOLDEN["templates"])
def test_conversations_with_tools_and_thoughts_are_as_the_template_writes_them(name):
    form = form_of(name)
    golden = GOLDEN["templates"][name]
    number = 0
    for (messages, options), text in zip(GOLDEN["cases"], golden["texts"], strict=True):
        if text is None:
            with pytest.raises(InputError, match="one tool at a time"):
                form.encode(messages, **options)
        else:
            assert written(form, messages, **options) == text
            number += 1
    assert number >= 12
    messages, options = GOLDEN["cases"][4]
    assert form.encode(messages, **options) == golden["ids"]


def test_calls_in_an_answer_are_found():
    qwen, llama = form_of("qwen3"), form_of("llama-3.1")
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": [1, "é"]}}}]
    calls.append({"type": "function", "function": {"name": "g", "arguments": {}}})
    texts = [f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>" for call in calls]
    assert qwen.parse_tool_calls("Let me see.\n" + "\n".join(texts)) == calls
    assert llama.parse_tool_calls('{"name": "f", "parameters": {"x": [1, "é"]}}') == calls[:1]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    assert "\n".join(texts[1:]) in written(qwen, [ASKED, message])
    same = {"name": "f", "arguments": json.dumps(calls[0]["function"]["arguments"])}
    for form in (qwen, llama):  # arguments may be JSON
        first = form.encode([ASKED, {"role": "assistant", "tool_calls": calls[:1]}])
        assert form.encode([ASKED, {"role": "assistant", "tool_calls": [same]}]) == first
    assert qwen.parse_tool_calls(f"<tool_call>{json.dumps(same)}</tool_call>") == calls[:1]
    thoughts = f"<think>Perhaps {texts[0]}, <tool_call>?\n</think>\n\n"
    assert qwen.parse_tool_calls(f"{thoughts}No.") == []
    assert qwen.parse_tool_calls(thoughts + texts[1]) == calls[1:2]
    quoting = json.dumps({"name": "f", "arguments": {"x": "</think>"}})
    assert len(qwen.parse_tool_calls(f"<tool_call>{quoting}</tool_call>")) == 1
    assert len(qwen.parse_tool_calls(f"{thoughts}<tool_call>{quoting}</tool_call>")) == 1
    assert len(llama.parse_tool_calls(quoting.replace("arguments", "parameters"))) == 1
    for text in ("", "No tools.", "[1]", '{"name": "f"}', "<tool_call>", "{" * 100_000):
        assert qwen.parse_tool_calls(text) == llama.parse_tool_calls(text) == []


# Names and arguments of calls that no message can hold.
NO_CALLS = [(3, {}), (None, {}), ("f", 3), ("f", "x"), ("f", "3"), ("f", None), ("f", [1]), ("f", {"x": "\ud800"})]


def test_what_is_no_call_in_an_answer_is_refused_or_words():
    qwen, llama = form_of("qwen3"), form_of("llama-3.1")
    wrong = [{"name": name, "arguments": arguments} for name, arguments in NO_CALLS]
    for broken in ("{", "[]", '{"name": "f"}', '"name"', "[" * 100_000, *map(json.dumps, wrong)):
        with pytest.raises(InputError, match="tool call is not JSON"):
            qwen.parse_tool_calls(f"<tool_call>{broken}</tool_call>")
    for call in wrong:
        assert llama.parse_tool_calls(json.dumps({"name": call["name"], "parameters": call["arguments"]})) == []
        with pytest.raises(InputError):
            qwen.encode([ASKED, {"role": "assistant", "tool_calls": [call]}])


def test_messages_and_tools_that_are_refused():
    called = {"role": "assistant", "content": ""}
    wrong = [(called | {"tool_calls": calls}, "tool_calls must be") for calls in REFUSED["tool calls"]]
    wrong.append((called | {"tool_calls": [{"name": "f", "arguments": {"x": {1, 2}}}]}, "cannot be written as JSON"))
    for message, named in [*wrong, *REFUSED["messages of assistants and tools"]]:
        with pytest.raises(InputError, match=named):
            form_of("qwen3").encode([ASKED, message])
    for tools in (3, {"name": "f"}, ["f"], [{"f": {1}}], [{"f": float}]):
        with pytest.raises(InputError, match="tool"):
            form_of("qwen3").encode([ASKED], tools=tools)


def test_llama_needs_a_users_message_for_its_tools():
    with pytest.raises(InputError, match="user's first message"):
        form_of("llama-3.1").encode([{"role": "assistant", "content": "x"}], tools=[TOOL])
    assert form_of("llama-3.1").encode([ASKED], tools=[]) == form_of("llama-3.1").encode([ASKED])


FORMS = {name: form_of(name) for name in WRITTEN if name != "gemma"}
FORMS |= {"gemma": chat_format(golden_tokenizer("gemma3"), choice="gemma")}


@given(st.text("aé <|\n", max_size=9), st.text("b?\n", min_size=1, max_size=5).filter(str.strip))
def test_the_next_prompt_is_what_the_conversation_adds(answer, text):
    """So what an answer turns into does not depend on what follows."""
    for form in FORMS.values():
        messages = [ASKED, {"role": "assistant", "content": answer}]
        whole = form.encode([*messages, {"role": "user", "content": text}])
        rest, _ = form.next_prompt(text)
        assert whole[-len(rest) :] == rest
        assert rest[0] == form.end_ids[0]
        before = form.encode(messages, add_generation_prompt=False)
        if form is not FORMS["qwen3"] and form is not FORMS["qwen3-thinking"]:  # which drop thoughts of earlier turns
            assert whole[: len(before)] == before


def test_thoughts_are_apart_from_the_answer():
    for text, thoughts, answer in (
        ("<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ("Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ("Yes.", "", "Yes."),
        ("<think>\n\n</think>\n\nYes.", "", "Yes."),
        ("", "", ""),
        ("<think>\nHm. Is it", "Hm. Is it", ""),  # cut
        ("Write <think> first.", "", "Write <think> first."),
    ):
        generation = Generation(text, [1], 1, 0.0, 0.0, "stop")
        assert (generation.thoughts, generation.answer) == (thoughts, answer)
