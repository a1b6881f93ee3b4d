"""Conversations that commands read: a line of a .jsonl file each."""

import json

import pytest

import pop
from pop.cli.texts import CONVERSATION, calibration_texts, conversation, encoded, read_text
from pop.errors import InputError

ASKED = [{"role": "user", "content": "What is the square of two?\u2028And of three?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "Four and nine."}]


def write(folder, *conversations) -> str:
    """Write a file with a line for each conversation, and return its path."""
    path = folder / "chats.jsonl"
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in conversations]
    path.write_text("".join(lines), encoding="utf-8-sig")
    return str(path)


@pytest.fixture
def file(tmp_path):
    """Ten conversations, of which every other ends with an answer, with keys that logs have."""
    logged = [{**message, "refusal": None, "annotations": [], "name": "Ann", "weight": 1} for message in ANSWERED]
    conversations = [{"model": "m", "messages": logged[: 1 + number % 2]} for number in range(10)]
    return write(tmp_path, *conversations)


@pytest.fixture(scope="module")
def ids(model):
    """What the model gets of the ten."""
    write = model.chat_format().encode
    return [write(ASKED), write(ANSWERED, add_generation_prompt=False)] * 5


def test_a_base_model_has_no_format_for_them(file, model):
    class Base:
        def chat_format(self):
            raise InputError("no chat_template")

    with pytest.raises(InputError, match="^no chat_template$"):  # and not of line 1
        encoded(Base(), read_text(file))


def test_conversations_that_cannot_be_used_are_left_out_with_a_note(tmp_path, model, ids, capsys):
    odd = [{"messages": [{"role": "critic", "content": "Hi"}]}, {"messages": [{"role": "user", "content": ""}]}]
    path = write(tmp_path, odd[0], {"messages": ASKED}, odd[1])
    assert encoded(model, read_text(path)) == ids[:1]
    note = capsys.readouterr().err
    assert note.startswith(f"2 of 3 conversations cannot be used; the first is {path}, line 1: message 0 has the role")


SYSTEM = {"role": "system", "content": "Be brief."}
DEVELOPER = {"role": "developer", "content": "Be polite."}
EMPTY = {"role": "system", "content": ""}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([DEVELOPER], SYSTEM | {"content": "Be polite."}),
        ([SYSTEM, DEVELOPER], SYSTEM | {"content": "Be brief.\n\nBe polite."}),
        ([EMPTY], EMPTY),
    ],
)
def test_messages_of_the_system_and_of_a_developer_become_one(given, told, tmp_path, model):
    path = write(tmp_path, {"messages": [*given, *ASKED]})
    assert encoded(model, read_text(path)) == [model.chat_format().encode([told, *ASKED])]


def test_a_server_gets_each_system_message_and_the_name_of_a_tool():
    messages = [SYSTEM, SYSTEM, *ASKED, {"role": "tool", "name": "f", "content": "1"}]
    assert conversation(json.dumps({"messages": messages}), "line 1")["messages"] == messages


def test_tools_are_written_as_the_chat_format_writes_them(tmp_path, model, monkeypatch):
    told = []
    monkeypatch.setattr(type(model.chat_format()), "encode", lambda _, **given: told.append(given) or [5])
    tools = [{"type": "function", "function": {"name": "f"}}]
    path = write(tmp_path, {"messages": ASKED, "tools": tools})
    assert encoded(model, read_text(path)) == [[5]]
    assert told == [{"messages": ASKED, "tools": tools, "add_generation_prompt": True}]


def test_one_conversation_judges_and_is_not_fitted(tmp_path, model, ids, monkeypatch, capsys):
    monkeypatch.setattr("pop.cli.texts.texts_to_fit", lambda model: ["x" * 800])
    path = write(tmp_path, {"messages": ASKED})
    assert calibration_texts(model, {path: read_text(path)}) == (["x" * 800], ids[:1])
    assert capsys.readouterr().err.startswith("0 of ")


def test_built_in_texts_make_up_the_rest_until_they_suffice(model, monkeypatch, capsys):
    monkeypatch.setattr("pop.calibration.texts.PER_INPUT", 20)
    monkeypatch.setattr("pop.cli.texts.texts_to_fit", lambda model: ["x" * 80] * 20)
    assert calibration_texts(model, {}) == (["x" * 80] * 20, None)
    assert capsys.readouterr().err == ""
    text = "Hello, world. " * 100
    assert calibration_texts(model, {"a.txt": text}) == ([text[:1120], *["x" * 80] * 5], [text[1120:]])
    assert "1,120 of 1,500 tokens to fit are given; with built-in texts, there are 1,520" in capsys.readouterr().err


def test_calibrate_and_check_get_what_ends_with_an_answer_or_where_one_begins(file, folder, ids, run, monkeypatch):
    """The last fifth judges what is fitted to the others."""
    monkeypatch.setattr("pop.calibration.texts.PER_INPUT", 1)
    monkeypatch.setattr("pop.cli.commands.compared", lambda *_, **__: None)  # refuses texts this short
    got = []
    monkeypatch.setattr(pop, "calibrate", lambda model, texts, **_: got.append(texts) or pop.PrunePlan((1,)))

    def check(model, plan, texts, **_):
        got.append(texts)
        raise InputError("enough")

    monkeypatch.setattr(pop, "check", check)
    run("calibrate", folder, file, "--out", file + ".plan", status=2)
    run("check", folder, "0.5", file, status=2)
    assert got == [ids[:8], ids[8:], ids]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("{", ", line 1 is not a conversation"),
        ("[" * 100_000, ", line 1 is not a conversation"),
        ("[]", ", line 1 is not a conversation"),
        ('{"messages": ["Hi"]}', ", line 1 is not a conversation"),
        ('{"messages": 5}', ", line 1 is not a conversation"),
        ('{"prompt": "Hi"}', ", line 1 is not a conversation"),
        ('{"messages": []}', ", line 1 is not a conversation"),
        ('{"messages": [{"content": "Hi"}, {"role": "user", "content": "Hi"}]}', ", line 1 is not a conversation"),
        (" \n\n", " holds no conversation"),
        (f"{CONVERSATION}\n\nHi", ", line 3 is not a conversation"),  # blank lines are left out
        ('{"messages": [{"role": "user", "mood": "A"}]}', ", line 1: message 0 has ['mood'], which the role user"),
        ('{"messages": [{"role": "me"}]}', ", line 1: message 0 has the role 'me'"),
        (f'{{"messages": {json.dumps(ASKED)}, "tools": 5}}', ", line 1: tools must be a list"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_line(lines, said, folder, run, tmp_path, monkeypatch):
    monkeypatch.setattr(pop, "calibrate", lambda *_, **__: pytest.fail("calibrated"))
    path = tmp_path / "chats.jsonl"
    path.write_text(lines)
    assert f"{path}{said}" in run("calibrate", folder, path, "--out", tmp_path / "plan", status=2).err
