"""Questions about a prompt: each has the asked length, and its answer is in the prompt or follows from it."""

import json
import re

import pytest
import torch
from support.tiny_chat import write_chat_checkpoint

import pop
from pop.calibration.lookup import found_by_layer, selecting_scores
from pop.calibration.questions import CLOSING, KINDS, Writer, codes, edits, make_questions, quotations, tool_calls

LENGTH = 900
TEXT = " ".join(f"word{n} of line{n * n}" for n in range(200))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pop.load(write_chat_checkpoint(tmp_path_factory.mktemp("models") / "chat"), prune=None)


@pytest.fixture
def writer(model):
    return Writer(model, model.encode(TEXT, bos=False), [1], 0)


def asked(writer, make, count=6):
    """(prompt, answer) as text, of `count` questions."""
    questions = make_questions(writer, [make], LENGTH, count)
    assert [len(question.prompt) for question in questions] == [LENGTH] * count
    assert all(question.prompt[0] == 1 for question in questions)
    decode = writer.model.tokenizer.decode
    return [(decode(question.prompt), decode(question.answer)) for question in questions]


def answer_of(kind: str, prompt: str) -> str:
    """The answer to a question, read from its prompt."""
    line = prompt.splitlines()[-1]
    if kind == "codes":
        return re.search(rf"\n{re.escape(line.removeprefix('Answer: '))}( \d+)\.\n", prompt)[1]
    if kind == "tables":
        name, column = re.match(r"(\w+), (\w+):", line).groups()
        return re.search(rf"\| {name} \|.* {column}:( \w+) \|", prompt)[1]
    if kind == "sums":
        added = re.search(rf"\n{line}( [\d +]+)\n", prompt)[1]
        return f"{added} = {eval(added)}"
    if kind == "brackets":
        opened = re.findall(r"[\[{(]", prompt.rpartition("numbers = ")[2])
        closed = "".join("\n" + "    " * n + CLOSING[opened[n]] for n in (2, 1, 0))
        return closed.removeprefix("\n")  # each byte is a token
    if kind == "edits":
        new, old = re.search(r"with (\w+) in place of (\w+):\n\n", prompt).groups()
        lines = re.findall(rf"{old}: (.*)", prompt)
        return f" {lines[1]}\n{new}: {lines[2]}"
    if kind == "tool calls":
        name = re.findall(r"register for (\w+),", prompt)[-1]
        town, number = re.search(rf'name: "{name}", town: "(\w+)", number: (\d+)', prompt).groups()
        return f' "register", "arguments": {{"name": "{name}", "town": "{town}", "number": {number}}}}}'
    assert kind == "quotations", f"say here how a prompt answers a question about {kind}"
    cue = prompt.partition("The same passage again:\n")[2]
    begin = prompt.index(cue) + len(cue)
    return prompt[begin : begin + 8]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_the_prompt_decides_the_answer(make, writer):
    kind = make.__name__.replace("_", " ")
    answers = []
    for prompt, answer in asked(writer, make):
        assert answer == answer_of(kind, prompt)
        answers.append(answer)
    assert len(set(answers)) > 1


def test_answers_lie_from_the_beginning_to_the_end(writer):
    for make, fact in ((codes, "\nThe code of the {}"), (edits, "{}: ")):
        places = []
        for prompt, _ in asked(writer, make):
            name = re.findall(r"The code of the (.*) is|in place of (\w+):", prompt)[-1]
            places.append(prompt.index(fact.format("".join(name))) / LENGTH)
        assert places == sorted(places)
        assert places[0] < 0.2
        assert places[-1] > 0.5


TOOLS = """{% if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}{% if message['tool_calls'] %}<tool_call>{{ message['tool_calls'][0]['function'] | tojson \
}}</tool_call>{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_a_tool_call_has_the_form_of_the_chat_template(model, writer):
    pytest.importorskip("jinja2")
    talking = pop.Model(model.module, model.config, model.tokenizer, chat_format=TOOLS)
    writer.model = talking
    for question in make_questions(writer, [tool_calls], LENGTH, 3):
        assert len(question.prompt) == LENGTH
        decode = talking.tokenizer.decode
        prompt = decode(question.prompt, special=True)
        name = re.search(r"Call the function register for (\w+),", prompt)[1]
        town, number = re.search(rf'name: "{name}", town: "(\w+)", number: (\d+)', prompt).groups()
        (call,) = talking.parse_tool_calls(decode(question.answer))
        assert call["function"]["arguments"] == {"name": name, "town": town, "number": int(number)}
        assert prompt.startswith("<|im_start|>system\n[")
        assert prompt.endswith("and the number.<|im_end|>\n<|im_start|>assistant\n")
        json.loads(prompt.splitlines()[1].removesuffix("<|im_end|>"))  # the tools


def test_what_cannot_be_asked_is_refused(writer):
    for make in KINDS:
        with pytest.raises(pop.InputError, match="too short"):
            make_questions(writer, [make], 20, 1)
    writer.filler = [7]
    with pytest.raises(pop.InputError, match="only repeats itself"):
        quotations(writer, LENGTH, 0.5)


def test_the_scores_of_layers_are_means_over_the_prompts_that_hold_their_answers(model, writer):
    """tests/tools/test_lookup.py has those of one prompt."""
    questions = make_questions(writer, [codes, quotations], LENGTH, 2)
    pairs = [(question.prompt, question.answer) for question in questions]
    expected = torch.stack([found_by_layer(model, *pair, 0.2, 100) for pair in pairs]).mean(0)
    without_answer = [*range(20)], [30]
    assert torch.equal(selecting_scores(model, [without_answer, *pairs], 0.2, 100), expected)
    with pytest.raises(pop.InputError, match="before its last"):
        selecting_scores(model, pairs, 0.2, LENGTH)
    with pytest.raises(pop.InputError, match="no prompt holds its answer"):
        selecting_scores(model, [without_answer], 0.2, 5)
