"""Chat formats against the families' own chat templates (goldens), and messages that are refused."""

import datetime
import json

import pytest
from support.chat_formats import FAMILIES, FORMATS, TOKENIZERS
from support.chat_templates import assert_chats, written
from support.goldens import REFUSED
from support.text import GOLDENS, golden_tokenizer

from pop.errors import InputError, UnsupportedError
from pop.inputs.chat import chat_format
from pop.inputs.chat_templates import TEMPLATES


def golden(name: str) -> dict:
    return json.loads((GOLDENS / name).read_bytes())


def test_conversations_are_as_the_template_writes_them():
    """The ids in Gemma's golden are those of the real tokenizer, which test_real_model.py has."""
    for family in FAMILIES[:2]:
        assert_chats(FORMATS[family], golden(f"{family}/golden.json"))
    cases = golden("gemma3-270m.json")["chat"]
    assert len(cases) == 10
    for case in cases:
        assert written(FORMATS["gemma3"], case["messages"], case["prompt"]) == case["rendered"]


def test_gemma_takes_user_and_assistant_in_turn():
    for roles, named in (
        (["system"], "of system"),
        (["assistant", "user"], "assistant, user"),
        (["system", "assistant"], "of assistant"),
        (["user", "user"], "user, user"),
        (["user", "assistant", "assistant"], "user, assistant, assistant"),
    ):
        with pytest.raises(InputError, match=f"Gemma .*{named}"):
            FORMATS["gemma3"].encode([{"role": role, "content": "x"} for role in roles])


def test_llama_3_2_has_todays_date():
    template = TEMPLATES["llama-3.1"].replace("26 Jul 2024", "' + strftime_now('%d %b %Y') + '")
    text = written(chat_format(TOKENIZERS["llama-3.1"], choice=template), [{"role": "user", "content": "Hi"}])
    today = datetime.date.today()
    days = [f"{day:%d %b %Y}" for day in (today, today - datetime.timedelta(1))]  # midnight may have passed
    assert any(f"Today Date: {day}\n" in text for day in days)


def test_invalid_messages():
    for messages, message in REFUSED["messages"]:
        with pytest.raises(InputError, match=message):
            FORMATS["smollm2"].encode(messages)


def test_a_tokenizer_without_the_formats_tokens():
    with pytest.raises(UnsupportedError, match="'gemma' ends an answer with no token"):
        chat_format(TOKENIZERS["smollm2"], choice="gemma")


def test_line_breaks_stay_text_where_the_tokenizer_has_tokens_for_them():
    """As in Gemma's tokenizer.json. A template also cuts texts at line breaks."""
    template = TEMPLATES["gemma"].replace("message.content", "message.content.split('\\n')[-1]")
    assert template != TEMPLATES["gemma"]
    tokenizer = golden_tokenizer("gemma3")
    assert "\n" in tokenizer.added_tokens
    form = chat_format(tokenizer, choice=template)
    assert "\n" not in form.tokenizer.special_tokens
    messages = [{"role": "user", "content": "a\nb"}]
    assert written(form, messages) == "<bos><start_of_turn>user\nb<end_of_turn>\n<start_of_turn>model\n"
