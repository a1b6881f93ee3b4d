"""Questions whose answers are in the prompt, or follow from it.

    codes        sentences such as "The code of the red box 3 is 52817."; one of the codes
    tables       rows with three columns; one cell, by its row and its column
    quotations   a passage of the text, whose first tokens the prompt repeats; how it goes on
    edits        lines that begin with a name; the same lines with another name
    sums         numbers of several things; the sum of two or three of them
    brackets     nested brackets around numbers; the brackets that close them
    tool calls   facts about persons; a call with a name and two facts, in the model's chat format if that has tools

A prompt has exactly the length that is asked for. What is not part of the question is text.
"""

import json
import random
from collections.abc import Callable
from itertools import takewhile
from typing import NamedTuple

from pop.errors import InputError, PopError
from pop.inputs.messages import tool_call

CUE = 12  # tokens of a quoted passage that the prompt repeats
QUOTED = 8  # tokens after them that are asked for
CODES = 6  # sentences with a code in a prompt
ROWS = 5  # rows of a table in a prompt
FACTS = 4  # facts in prompts of other kinds
COLOURS = ["red", "blue", "green", "black", "white", "grey", "pink", "brown"]
THINGS = ["box", "door", "car", "shelf", "safe", "drawer"]
NAMES = ["Anna", "Peter", "Maria", "David", "Laura", "Thomas", "Julia", "Martin", "Helen", "Robert"]
ROOMS = ["kitchen", "office", "garden", "garage", "library", "studio"]
TOWNS = ["Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Dublin", "Athens"]
CLOSING = {"[": "]", "{": "}", "(": ")"}
TOOL = {
    "type": "function",
    "function": {
        "name": "register",
        "description": "Register where a person lives, and the person's number.",
        "parameters": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "town": {"type": "string"}, "number": {"type": "integer"}},
            "required": ["name", "town", "number"],
        },
    },
}


class Question(NamedTuple):
    """A prompt and its answer.

    Args:
        kind: Such as "codes".
        prompt: Token ids.
        answer: Token ids.
        counted: Which tokens of the answer count, such as the numbers in a list of numbers. None: all.
    """

    kind: str
    prompt: list[int]
    answer: list[int]
    counted: list[bool] | None = None


class Writer:
    """What makers of questions share: a model's tokenizer, a long text and a random number generator.

    Args:
        model: A pop.Model.
        filler: Token ids of a long text. A short one is repeated.
        head: The token ids that every prompt begins with: BOS, or none.
        seed: The seed of the questions.
    """

    def __init__(self, model, filler: list[int], head: list[int], seed: int):
        self.model = model
        self.filler = filler
        self.head = head
        self.rng = random.Random(seed)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text. Empty without a tokenizer."""
        tokenizer = self.model.tokenizer
        return [] if tokenizer is None else tokenizer.encode(text, bos=False)

    def cut(self, text: list[int], count: int) -> list[int]:
        """`count` consecutive tokens of `text` from a random place. After its end, the text begins again."""
        if count < 0:
            raise InputError("the prompts are too short to hold their questions; ask for longer ones")
        begin = self.rng.randrange(len(text))
        return [text[(begin + index) % len(text)] for index in range(count)]

    def prompt(self, length: int, facts: list[str], asking, depths: list[float] | None = None, head=None) -> list[int]:
        """A prompt of `length` tokens: a long text with facts in it, and then a question.

        Args:
            length: In tokens.
            facts: Texts.
            asking: The question, as text or as token ids.
            depths: Increasing places of the facts in the long text, from 0 to 1. None: evenly spread.
            head: Token ids that the prompt begins with. None: the writer's.
        """
        if depths is None:
            depths = spread(len(facts))
        encoded = [self.encode(fact) for fact in facts]
        question = self.encode(asking) if isinstance(asking, str) else asking
        prompt = list(self.head if head is None else head)
        text = self.cut(self.filler, length - len(prompt) - len(question) - sum(map(len, encoded)))
        begin = 0
        for fact, depth in zip(encoded, depths, strict=True):
            end = round(depth * len(text))
            prompt += text[begin:end] + fact
            begin = end
        return prompt + text[begin:] + question

    def numbers(self, count: int, digits: int = 5) -> list[int]:
        """Distinct numbers of `digits` digits."""
        return self.rng.sample(range(10 ** (digits - 1), 10**digits), count)


Maker = Callable[[Writer, int, float], Question]  # from a writer, a length in tokens, and a depth from 0 to 1


def spread(count: int) -> list[float]:
    """Evenly spread depths."""
    return [(n + 0.5) / count for n in range(count)]


def codes(writer: Writer, length: int, depth: float) -> Question:
    """The asked sentence is the one nearest to the depth."""
    everything = [f"{colour} {thing} {n}" for colour in COLOURS for thing in THINGS for n in range(1, 6)]
    names = writer.rng.sample(everything, CODES)
    numbers = writer.numbers(CODES)
    asked = round(depth * (CODES - 1))
    facts = [f"\nThe code of the {name} is {number}.\n" for name, number in zip(names, numbers, strict=True)]
    asking = f"\n\nQuestion: What is the code of the {names[asked]}?\nAnswer: The code of the {names[asked]} is"
    return Question("codes", writer.prompt(length, facts, asking), writer.encode(f" {numbers[asked]}"))


def tables(writer: Writer, length: int, depth: float) -> Question:
    """The asked row is the one nearest to the depth. Two other rows are examples."""
    rng = writer.rng
    names = rng.sample(NAMES, ROWS)
    columns = {"room": rng.sample(ROOMS, ROWS), "colour": rng.sample(COLOURS, ROWS)}
    columns["price"] = writer.numbers(ROWS, 3)
    facts = []
    for row, name in enumerate(names):
        cells = [f"{column}: {values[row]}" for column, values in columns.items()]
        facts.append(f"\n| {name} | {' | '.join(cells)} |\n")
    asked = round(depth * (ROWS - 1))
    rows = [*rng.sample([row for row in range(ROWS) if row != asked], 2), asked]
    lines = [
        (f"\n{names[row]}, {column}:", f" {columns[column][row]}")
        for row, column in zip(rows, rng.choices([*columns], k=3), strict=True)
    ]
    return _after_examples("tables", writer, length, facts, lines)


def quotations(writer: Writer, length: int, depth: float) -> Question:
    """The passage is the nearest to the depth that its cue decides."""
    asking = writer.encode("\n\nThe same passage again:\n")
    return quote("quotations", writer, length, depth, writer.filler, asking, CUE, QUOTED)


def quote(kind, writer, length, depth, text, asking, cue: int, quoted: int) -> Question:
    """A passage of `text` [cue + quoted tokens], after the token ids `asking` and its cue."""
    text = writer.cut(text, length - len(writer.head) - len(asking) - cue)
    room = len(text) - cue - quoted
    if room < 0:
        writer.cut(text, -1)
    nearest = sorted(range(room + 1), key=lambda begin: abs(begin - round(depth * room)))
    for begin in nearest:
        passage = text[begin : begin + cue + quoted]
        if _is_clear(text, passage, cue):
            return Question(kind, writer.head + text + asking + passage[:cue], passage[cue:])
    raise InputError("the text only repeats itself, so nothing in it can be quoted; give another")


def _is_clear(text: list[int], passage: list[int], cue: int) -> bool:
    """Whether the passage follows its cue wherever `text` has the cue."""
    same = [at for at, token in enumerate(text) if token == passage[0] and text[at : at + cue] == passage[:cue]]
    return all(text[at : at + len(passage)] == passage for at in same)


def edits(writer: Writer, length: int, depth: float) -> Question:
    """Three lines of the text at the depth. The prompt repeats the first of them with the new name."""
    old, new = writer.rng.sample(NAMES, 2)
    words = writer.model.tokenizer.decode(writer.cut(writer.filler, 80)).split()[1:]
    lines = [" ".join(words[begin : begin + 4]) for begin in (0, 4, 8)]
    asking = f"\n\nThe same lines, with {new} in place of {old}:\n\n{new}: {lines[0]}\n{new}:"
    prompt = writer.prompt(length, [f"\n\n{old}: " + f"\n{old}: ".join(lines) + "\n\n"], asking, [depth])
    return Question("edits", prompt, writer.encode(f" {lines[1]}\n{new}: {lines[2]}"))


def sums(writer: Writer, length: int, depth: float) -> Question:
    """The asked sum is the one nearest to the depth. Two others are examples."""
    rng = writer.rng
    names = rng.sample(NAMES, FACTS)
    numbers = [rng.choices(range(1, 10), k=rng.choice((2, 2, 3))) for _ in names]
    added = [" + ".join(map(str, amounts)) for amounts in numbers]
    facts = [f"\nThe bill of {name}: {amounts}\n" for name, amounts in zip(names, added, strict=True)]
    asked = round(depth * (FACTS - 1))
    order = [*rng.sample([n for n in range(FACTS) if n != asked], 2), asked]
    lines = [(f"\nThe bill of {names[n]}:", f" {added[n]} = {sum(numbers[n])}") for n in order]
    return _after_examples("sums", writer, length, facts, lines)


def brackets(writer: Writer, length: int, depth: float) -> Question:
    """Three short lists are examples. The numbers in the last list keep its brackets apart."""
    lists = []
    for size in (3, 3, 3, 14):
        kinds = writer.rng.sample([*CLOSING], 3)
        numbers = ", ".join(map(str, writer.numbers(size, 3)))
        opened = "".join(f"{'    ' * n}{kind}\n" for n, kind in enumerate(kinds))
        closed = "".join(f"\n{'    ' * n}{CLOSING[kinds[n]]}" for n in (2, 1, 0))
        lists.append((f"\n\nnumbers = {opened}{'    ' * 3}{numbers}", closed))
    opened, closed = map(writer.encode, lists.pop())
    facts = ["".join(example) + "\n\n" for example in lists]
    # Not the indentation: the list might go on.
    return Question("brackets", writer.prompt(length, facts, opened + closed[:1]), closed[1:])


def tool_calls(writer: Writer, length: int, depth: float) -> Question:
    """The asked person is the one nearest to the depth. Without a chat format, another call is an example."""
    rng = writer.rng
    names = rng.sample(NAMES, FACTS)
    towns = rng.sample(TOWNS, FACTS)
    calls = [
        {"name": name, "town": town, "number": number}
        for name, town, number in zip(names, towns, writer.numbers(FACTS, 3), strict=True)
    ]
    facts = ['\nname: "{name}", town: "{town}", number: {number}\n'.format(**call) for call in calls]
    asked = round(depth * (FACTS - 1))
    order = [(asked + 1) % FACTS, asked]
    found = _chat_call(writer.model, _task(names[asked]), calls[asked])
    if found is None:
        lines = []
        for call in (calls[n] for n in order):
            text = json.dumps({"name": TOOL["function"]["name"], "arguments": call})
            start = '{"name":'
            lines.append((f"\n{_task(call['name'])}\n{start}", text.removeprefix(start)))
        return _after_examples("tool calls", writer, length, facts, lines)
    head, asking, answer = found
    prompt = writer.prompt(length, [*facts, "\n\n"], asking, [*spread(FACTS), 1.0], head)
    return Question("tool calls", prompt, answer)


def _task(name: str) -> str:
    return f"Call the function register for {name}, with the town and the number."


def _chat_call(model, task: str, arguments: dict) -> tuple[list[int], list[int], list[int]] | None:
    """A conversation up to the user's message, its rest, and the call: token ids. None without tools in its format."""
    asked = {"role": "user", "content": task}
    call = tool_call(TOOL["function"]["name"], arguments)
    options = {"tools": [TOOL], "enable_thinking": False}
    try:
        form = model.chat_format()
        prompt = form.encode([asked], **options)
        other = form.encode([asked | {"content": "?"}], **options)
        called = form.encode([asked, {"role": "assistant", "content": "", "tool_calls": [call]}], False, **options)
    except PopError:
        return None
    if called[: len(prompt)] != prompt:
        return None
    begin = next(n for n, pair in enumerate(zip(prompt, other, strict=False)) if len({*pair}) == 2)
    answer = takewhile(lambda token: token not in form.end_ids, called[len(prompt) :])
    return prompt[:begin], prompt[begin:], list(answer)


def _after_examples(kind: str, writer: Writer, length: int, facts: list[str], lines) -> Question:
    """The last of several lines (question, answer), after the others."""
    *examples, (question, answer) = lines
    asking = "".join(["\n", *("".join(example) for example in examples), question])
    return Question(kind, writer.prompt(length, facts, asking), writer.encode(answer))


KINDS: tuple[Maker, ...] = (codes, tables, quotations, edits, sums, brackets, tool_calls)


def make_questions(writer: Writer, makers: list[Maker], lengths: list[int], per_kind: int) -> dict[int, list[Question]]:
    """`per_kind` questions of each kind at each length, with answers from the beginning of the prompt to its end."""
    questions = {}
    for length in lengths:
        questions[length] = [make(writer, length, depth) for make in makers for depth in spread(per_kind)]
    return questions
