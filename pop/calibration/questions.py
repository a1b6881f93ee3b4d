"""Questions whose answers are in the prompt, or follow from it.

    codes        sentences such as "The code of the red box 3 is 52817."; one of the codes
    tables       rows with three columns; one cell, by its row and its column
    quotations   a passage of the text, whose first tokens the prompt repeats; the tokens after them
    edits        lines that begin with a name; the same lines with another name
    sums         numbers of several things; the sum of two or three of them
    brackets     nested brackets around numbers; the brackets that close them
    tool calls   facts about persons; a call with a name and two facts, in the model's chat format if that has tools

A prompt has exactly the length that is asked for. What is not part of the question is text.
"""

import json
import random
from collections.abc import Callable, Sequence
from itertools import chain, takewhile
from typing import NamedTuple

from pop.errors import InputError, PopError
from pop.inputs.messages import tool_call

CUE = 12  # tokens of a quoted passage that the prompt repeats
QUOTED = 8  # tokens after them that are asked for
LINE = 8  # tokens of a line that is edited
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
            raise InputError(f"the prompts are too short to hold their questions; make them longer by {-count} tokens")
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
    everything = [f"{colour} {thing} {n}" for colour in COLOURS for thing in THINGS for n in range(1, 6)]
    facts = []
    lines = []
    for name, number in zip(writer.rng.sample(everything, CODES), writer.numbers(CODES), strict=True):
        facts.append(f"\nThe code of the {name} is {number}.\n")
        lines.append((f"\nQuestion: What is the code of the {name}?\nAnswer: The code of the {name} is", f" {number}"))
    return _asked("codes", writer, length, depth, facts, lines, examples=0)


def tables(writer: Writer, length: int, depth: float) -> Question:
    rng = writer.rng
    facts = []
    lines = []
    for name, room, colour, price in zip(
        rng.sample(NAMES, ROWS),
        rng.sample(ROOMS, ROWS),
        rng.sample(COLOURS, ROWS),
        writer.numbers(ROWS, 3),
        strict=True,
    ):
        facts.append(f"\n| {name} | room: {room} | colour: {colour} | price: {price} |\n")
        column, value = rng.choice([("room", room), ("colour", colour), ("price", price)])
        lines.append((f"\n{name}, {column}:", f" {value}"))
    return _asked("tables", writer, length, depth, facts, lines)


def quotations(writer: Writer, length: int, depth: float) -> Question:
    """The passage is the nearest to the depth that its cue decides."""
    return quote("quotations", writer, length, depth, writer.filler, CUE, QUOTED)


def quote(kind, writer, length, depth, text, cue: int, quoted: int) -> Question:
    """Ask for `quoted` tokens of `text` by the `cue` tokens before them.

    The prompt is the text with the passage, a request, and the cue.
    """
    asking = writer.encode("\n\nThe same passage again:\n")
    text = writer.cut(text, length - len(writer.head) - len(asking) - cue)
    room = len(text) - cue - quoted
    if room < 0:
        writer.cut(text, room)  # raises, since the text is too short
    follows = {}  # by cue, all that stands after it
    for at in range(len(text) - cue + 1):
        follows.setdefault(tuple(text[at : at + cue]), set()).add(tuple(text[at + cue : at + cue + quoted]))
    clear = [at for at in range(room + 1) if len(follows[tuple(text[at : at + cue])]) == 1]
    if not clear:
        raise InputError("the text only repeats itself, so nothing in it can be quoted; give another")
    begin = min(clear, key=lambda at: abs(at - round(depth * room)))
    passage = text[begin : begin + cue + quoted]
    return Question(kind, writer.head + text + asking + passage[:cue], passage[cue:])


def edits(writer: Writer, length: int, depth: float) -> Question:
    """Three lines at the depth. The prompt repeats the first of them with the new name."""
    old, new = writer.rng.sample(NAMES, 2)
    decode = writer.model.tokenizer.decode
    lines = [" ".join(decode(writer.cut(writer.filler, LINE)).replace("\ufffd", "").split()) for _ in range(3)]
    asking = f"\n\nThe same lines, with {new} in place of {old}:\n\n{new}: {lines[0]}\n{new}:"
    prompt = writer.prompt(length, [f"\n\n{old}: " + f"\n{old}: ".join(lines) + "\n\n"], asking, [depth])
    return Question("edits", prompt, writer.encode(f" {lines[1]}\n{new}: {lines[2]}"))


def sums(writer: Writer, length: int, depth: float) -> Question:
    facts = []
    lines = []
    for name in writer.rng.sample(NAMES, FACTS):
        numbers = writer.rng.choices(range(1, 10), k=writer.rng.choice((2, 2, 3)))
        bill = f"\nThe bill of {name}:"
        added = " + ".join(map(str, numbers))
        facts.append(f"{bill} {added}\n")
        lines.append((bill, f" {added} = {sum(numbers)}"))
    return _asked("sums", writer, length, depth, facts, lines)


def brackets(writer: Writer, length: int, depth: float) -> Question:
    """Three short lists are examples. The numbers in the last list keep its brackets apart. The depth plays no part."""
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
    """In the model's chat format if that has tools. Otherwise another call is an example."""
    facts = []
    calls = []
    lines = []
    for name, town, number in zip(
        writer.rng.sample(NAMES, FACTS),
        writer.rng.sample(TOWNS, FACTS),
        writer.numbers(FACTS, 3),
        strict=True,
    ):
        facts.append(f'\nname: "{name}", town: "{town}", number: {number}\n')
        arguments = {"name": name, "town": town, "number": number}
        task = f"Call the function register for {name}, with the town and the number."
        calls.append((task, arguments))
        lines.append((f'\n{task}\n{{"name":', f' "register", "arguments": {json.dumps(arguments)}}}'))
    found = _chat_call(writer.model, *calls[round(depth * (FACTS - 1))])
    if found is None:
        return _asked("tool calls", writer, length, depth, facts, lines, examples=1)
    head, asking, answer = found
    return Question("tool calls", writer.prompt(length, facts, asking, head=head), answer)


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
    begin = [one == another for one, another in zip(prompt, other, strict=False)].index(False)
    answer = takewhile(lambda token: token not in form.end_ids, called[len(prompt) :])
    return prompt[:begin], prompt[begin:], list(answer)


def _asked(
    kind: str, writer: Writer, length: int, depth: float, facts: list[str], lines, *, examples: int = 2
) -> Question:
    """Ask for the fact nearest to the depth, after some others as examples. lines: (question, answer) of each fact."""
    question, answer = lines.pop(round(depth * (len(facts) - 1)))
    told = chain.from_iterable(writer.rng.sample(lines, examples))
    asking = "".join(["\n", *told, question])
    return Question(kind, writer.prompt(length, facts, asking), writer.encode(answer))


KINDS: tuple[Maker, ...] = (codes, tables, quotations, edits, sums, brackets, tool_calls)


def make_questions(writer: Writer, makers: Sequence[Maker], length: int, per_kind: int) -> list[Question]:
    """`per_kind` questions of each kind, with answers from the beginning of the prompt to its end."""
    return [make(writer, length, depth) for make in makers for depth in spread(per_kind)]
