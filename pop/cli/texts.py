"""Texts and conversations that commands read."""

import contextlib
import json
import os
import random
import sys
from collections.abc import Iterator

from pop.calibration.held_out import HELD_OUT
from pop.calibration.texts import DATE, SHORTEST, parted, texts_to_fit, tokens_needed
from pop.errors import InputError, PopError
from pop.inputs.messages import with_one_system_message

MOST = 20_000_000  # characters of a text
NOT_WRITTEN = {"name", "parsed", "weight"}  # keys of logged messages that no template writes
CONVERSATION = '{"messages": [{"role": "user", "content": "Hi"}]}'

Text = str | list[tuple[str, dict]]  # a file's text; or its conversations, each after where it stands


def read_file(path: str) -> str:
    with reading(path), open(os.path.expanduser(path), encoding="utf-8-sig") as file:
        text = file.read(MOST + 1)  # a pipe may have no end
    if len(text) > MOST:
        raise InputError(f"{path} has more than {MOST:,} characters; give a part of it")
    if not text:
        raise InputError(f"{path} holds no text; give another file")
    return text


@contextlib.contextmanager
def reading(source: str) -> Iterator[None]:
    """Raise InputError, which names the source, if the block cannot read it."""
    try:
        yield
    except UnicodeDecodeError:
        raise InputError(f"{source} is not text in UTF-8; convert it, or give another file") from None
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error.strerror}); check the path") from None


def read_text(path: str) -> Text:
    """The text of a file or, if its name ends in .jsonl, its conversations: a JSON object with "messages" a line."""
    if not path.endswith(".jsonl"):
        return read_file(path)
    found = []
    for where, line in read_lines(path):
        told = conversation(line, where)
        found.append((where, told | {"messages": with_one_system_message(told["messages"])}))
    return found


def read_lines(path: str) -> list[tuple[str, str]]:
    """The lines of a file of conversations that hold something, each after where it stands."""
    lines = read_file(path).split("\n")  # splitlines would also split at what a JSON string may contain
    found = [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"{path} holds no conversation; give another file")
    return found


def conversation(line: str, where: str) -> dict:
    """A conversation as ChatFormat.encode takes it. Other keys, such as those of a logged request, are left out."""
    try:
        read = json.loads(line)
        messages = [_message(one) for one in read["messages"]]
        is_open = messages[-1]["role"] != "assistant"
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise InputError(f"{where} is not a conversation on one line, such as {CONVERSATION}") from None
    return {"messages": messages, "tools": read.get("tools"), "add_generation_prompt": is_open}


def _message(one: dict) -> dict:
    """A message as a chat format takes it: only with what is written, and with the older name of its role."""
    left_out = () if one["role"] == "tool" else NOT_WRITTEN
    message = {key: part for key, part in one.items() if key not in left_out and part not in (None, [])}
    if message["role"] == "developer":
        message["role"] = "system"
    return message


def encoded(model, text: Text) -> list[str] | list[list[int]]:
    """A text as it is, or the token ids of conversations. One that does not end with an answer ends where one begins.

    Those that the chat format refuses are left out, and a note on stderr says so.

    Args:
        model: A pop.Model, or what else has its chat_format().

    Raises:
        InputError: All conversations are refused.
    """
    if isinstance(text, str):
        return [text]
    chat_format = model.chat_format().as_of(DATE)
    ids = []
    refused = []
    for where, conversation in text:
        try:
            ids.append(chat_format.encode(**conversation))
        except PopError as error:
            refused.append(f"{where}: {error}")
    if refused:
        note = f"{len(refused)} of {len(text)} conversations cannot be used; the first is {refused[0]}"
        if not ids:
            raise InputError(note)
        print(note, file=sys.stderr)
    return ids


def calibration_texts(model, given: dict[str, Text]) -> tuple[list, list | None]:
    """The parts of texts to fit and to judge the plan by. Built-in texts make up the rest if the given ones are short.

    The last fifth of a text, or of the conversations in a file, judges. None: no text is given, so the plan is judged
    as by pop.check without texts.
    """
    model.need_tokenizer("calibrate on text")
    fitted = []
    rest = []
    for path, text in given.items():
        texts = encoded(model, text)
        if isinstance(text, str):
            seen, unseen = parted(texts)
        else:
            [seen], [unseen] = parted([texts])
        count = _tokens_in(model, unseen)
        if count < SHORTEST:
            raise InputError(
                f"the last fifth of {path}, which judges the plan, has {count} tokens, but needs {SHORTEST}; "
                "give a longer text"
            )
        fitted += seen
        rest += unseen
    builtin = texts_to_fit(model)
    if not given:
        return builtin, None
    given_tokens = _tokens_in(model, fitted)
    needed = tokens_needed(model) * HELD_OUT // (HELD_OUT - 1)  # some are held out
    found = given_tokens
    random.Random(0).shuffle(builtin)
    while found < needed and builtin:
        fitted.append(builtin.pop())
        found += _tokens_in(model, fitted[-1:])
    if found > given_tokens:
        print(
            f"{given_tokens:,} of {needed:,} tokens to fit are given; with built-in texts, there are {found:,}",
            file=sys.stderr,
        )
    return fitted, rest


def _tokens_in(model, texts: list) -> int:
    return sum(len(model.encode(text, bos=False)) for text in texts)
