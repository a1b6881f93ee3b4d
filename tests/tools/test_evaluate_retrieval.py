"""Retrieval in tools/evaluate: questions as described, and scores as of the plain model."""

import re
from collections import Counter
from itertools import compress

import numpy as np
import pytest
import torch
from support.harness import naive_logits

import pop
from pop.calibration.exercises import FORMS
from pop.calibration.questions import Question, make_questions
from pop.pruning import reference
from tools.evaluate import baselines
from tools.evaluate.contender import Contender
from tools.evaluate.questions import CUE, QUOTED, Writer, codes, documents, needle, quotes
from tools.evaluate.retrieval import evaluate_retrieval
from tools.evaluate.ruler import HOPS, RULER, VALUES, common, frequent, multikey, multiquery, multivalue, variables


@pytest.fixture
def writer(tiny):
    texts = {"hay": tiny.tokenizer.encode("hay " * 90, bos=False), "code": [*range(40, 120)]}
    return Writer(tiny, texts, 0)


def asked(writer, make, length=900, count=4):
    """(prompt, answer) as text, of `count` questions that have the asked length."""
    questions = make_questions(writer, [make], length, count)
    assert [len(question.prompt) for question in questions] == [length] * count
    decode = writer.model.tokenizer.decode
    return [(decode(question.prompt), decode(question.answer), question) for question in questions]


def test_a_code_is_one_of_six_in_a_form_that_no_exercise_has(writer):
    places = []
    for prompt, answer, _ in asked(writer, codes, count=6):
        facts = dict(re.findall(r"A label on the (\w+ \w+ \d) reads (\d{5})\.", prompt))
        assert len(facts) == 6
        name = re.search(r"What does the label on the (.*) read\?", prompt)[1]
        assert answer == f" {facts[name]}"
        assert prompt.endswith(f"\nAnswer: A label on the {name} reads")
        places.append([*facts].index(name))
        for form in FORMS:
            assert form.format("label", name, facts[name]) not in prompt
    assert places == [0, 1, 2, 3, 4, 5]


def test_a_needle_lies_at_its_depth(writer):
    for number, (prompt, answer, _) in enumerate(asked(writer, needle)):
        before, after = prompt.split(f"\nThe secret number is{answer}.\n")
        after, _ = after.split("\n\nQuestion")
        assert len(before) == pytest.approx((number + 0.5) / 4 * len(before + after), abs=1)


def test_a_question_about_documents_is_answered_by_one_of_them(writer):
    places = []
    for prompt, answer, _ in asked(writer, documents, count=8):
        name = prompt.split("does ")[-1].split(" live")[0]
        places.append(int(re.search(rf"Document (\d)\n{name} lives in the town of{answer}\.", prompt)[1]))
        assert prompt.endswith(f"{name} lives in the town of") and prompt.count(answer) == 1
        assert prompt.index("Document 1") < 20
    assert places == sorted(places) and (places[0], places[-1]) == (1, 8)


def test_a_quotation_is_in_the_prompt_and_begins_as_the_prompt_ends(writer):
    writer.texts["code"] = np.random.default_rng(0).integers(40, 120, size=400).tolist()
    asking = writer.encode("\n\nThe same passage again:\n")
    for number, (_, _, question) in enumerate(asked(writer, quotes("code"), length=300)):
        text, cue = question.prompt[: -CUE - len(asking)], question.prompt[-CUE:]
        begin = round((number + 0.5) / 4 * (len(text) - len(writer.head) - CUE - QUOTED)) + len(writer.head)
        assert question.prompt == text + asking + cue
        assert text[begin : begin + CUE + QUOTED] == cue + question.answer
        assert len(question.answer) == QUOTED and set(text[len(writer.head) :]) <= set(range(40, 120))


def test_a_quotation_is_the_only_passage_that_follows_its_cue(tiny):
    """The text has few phrases, in random order."""
    rng = np.random.default_rng(0)
    phrases = rng.integers(40, 120, size=(16, 12))
    writer = Writer(tiny, {"code": phrases[rng.integers(16, size=80)].flatten().tolist()}, 0)
    for question in make_questions(writer, [quotes("code")], 500, 40):
        prompt, cue = question.prompt, question.prompt[-CUE:]
        places = [at + CUE for at in range(len(prompt) - CUE) if prompt[at : at + CUE] == cue]
        assert places and all(prompt[at : at + QUOTED] == question.answer for at in places)
    writer.texts["code"] = [40]
    with pytest.raises(pop.InputError, match="only repeats itself"):
        quotes("code")(writer, 500, 0.5)


def test_keys_of_unequal_lengths_leave_room_for_the_question(tiny):
    """Each key may be asked for. Half of them have one token, and the others 35."""
    writer = Writer(tiny, {"hay": [*range(40, 120)]}, 0)
    encode = tiny.tokenizer.encode
    size = {True: "X", False: 35 * "X"}
    writer.encode = lambda text: encode(
        re.sub(r"\b[A-Z][a-z]{5}[lnrs]\b", lambda word: size[word[0] < "M"], text), bos=False
    )
    for seed in range(5):
        writer.rng.seed(seed)
        asked(writer, multikey, length=600)


def answer_of(kind: str, prompt: str) -> str:
    """The answer to a question of ruler, read from its prompt."""
    if kind.startswith("multi"):
        found = re.findall(r"secret number of (\w+) is (\d{5})\.", prompt)
        names = re.search(r"secret numbers? of (.+)\?", prompt)[1].split(", ")
        return " " + ", ".join(number for name in names for key, number in found if key == name)
    if kind == "variables":
        given = {value: name for name, value in re.findall(r"VAR (\w+) = (\w+)", prompt)}
        chain = [given[re.search(r"have the value (\d+)\?", prompt)[1]]]
        while chain[-1] in given:
            chain.append(given[chain[-1]])
        return " " + ", ".join(chain)
    words = Counter(re.findall(r" ([A-Z][a-z]{5}[lnrs])\b", prompt.split("\nQuestion")[0]))
    (best, count), (_, second) = words.most_common(2)
    assert count > second
    return f" {best}"


ITEMS = {multikey: 1, multivalue: VALUES, multiquery: VALUES, variables: 1 + HOPS, common: 1, frequent: 1}


@pytest.mark.parametrize("make", RULER, ids=lambda make: make.__name__)
def test_the_prompt_decides_the_answer_to_a_question_of_ruler(make, writer):
    assert [*ITEMS] == RULER, "each kind needs an answer here"
    for prompt, answer, question in asked(writer, make):
        assert answer == answer_of(make.__name__, prompt)
        assert answer.count(",") + 1 == ITEMS[make]
        counted = question.counted or [True] * len(question.answer)
        assert writer.model.tokenizer.decode([*compress(question.answer, counted)]) == answer.replace(",", "")


def test_a_prompt_of_keys_holds_little_else_and_asks_for_keys_at_all_depths(writer):
    places = []
    for prompt, *_ in asked(writer, multikey):
        keys = re.findall(r"The secret number of (\w+) is \d", prompt)
        key = re.search(r"What is the secret number of (\w+)", prompt)[1]
        assert len(keys) > 5 and prompt.count("hay") < 20
        places.append(keys.index(key) / (len(keys) - 1))
    assert places == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.1)


@pytest.mark.parametrize("make", [multivalue, multiquery, variables], ids=lambda make: make.__name__)
def test_the_facts_of_a_question_lie_at_random_depths(make, writer):
    prompts = [prompt for prompt, *_ in asked(writer, make, length=2000)]
    places = [re.search(r"secret number|VAR ", prompt).start() / len(prompt) for prompt in prompts]
    assert min(places) < 0.3 and len(set(places)) == 4


def test_the_seed_decides_and_short_prompts_are_refused(tiny, writer):
    again, other = (Writer(tiny, writer.texts, seed) for seed in (0, 1))
    makers = [codes, needle, documents, quotes("code"), *RULER]
    first, second, third = (make_questions(w, makers, 900, 2) for w in (writer, again, other))
    assert first == second and first != third
    assert len(first) == 2 * len(makers)
    for make in makers:
        with pytest.raises(pop.InputError, match="too short"):
            make_questions(writer, [make], 20, 1)
    with pytest.raises(pop.InputError) as refused:
        make_questions(writer, [needle], 20, 1)
    missing = int(re.search(r"make them longer by (\d+) tokens", str(refused.value))[1])
    make_questions(writer, [needle], 20 + missing, 1)  # its sentences are equally long
    with pytest.raises(pop.InputError, match="too short"):
        make_questions(writer, [needle], 19 + missing, 1)


def naive_mark(model, plan, question):
    """Exact and log-probability by the naive reference."""
    log_probs = naive_logits(model, plan, question.prompt, question.answer).double().log_softmax(-1)
    answer, counted = torch.tensor(question.answer), torch.tensor(question.counted)
    exact = (log_probs.argmax(-1) == answer)[counted].all()
    return bool(exact), float(log_probs.gather(1, answer[:, None])[counted].sum())


def test_scores_equal_the_naive_page(tiny, contenders):
    """Answers of unequal lengths in one batch. Some are greedy, and in some only the counted tokens are."""
    rng = np.random.default_rng(3)
    questions = {20: [], 25: []}
    for length, count in ((20, 7), (25, 5)):
        for number in range(count):
            prompt = rng.integers(3, 259, size=length).tolist()
            answer = reference.generate(tiny.module, torch.tensor(prompt), pop.PrunePlan.none(), 2 + number % 3)
            if number % 3 == 0:
                answer[-1] = (answer[-1] + 1) % 259
            counted = [True] * (len(answer) - 1) + [number % 2 == 1]
            questions[length].append(Question("odd" if number % 2 else "even", prompt, answer, counted))
    result = evaluate_retrieval(contenders, questions, samples=200)
    everything = [question for group in questions.values() for question in group]
    marks = {c.name: np.array([naive_mark(tiny, c.plan, q) for q in everything]) for c in contenders}
    assert result["questions"] == 12
    assert 5 <= marks["full"][:, 0].sum() < 12
    for name, found in marks.items():
        row = result["rows"][name]
        assert (row["exact"], row["log_prob"]) == pytest.approx(tuple(found.mean(0)), rel=1e-4)
        share, difference = row["share"], row["difference"]
        assert share["value"] == pytest.approx(found[:, 0].sum() / marks["full"][:, 0].sum())
        assert difference["value"] == pytest.approx((found - marks["full"])[:, 1].mean(), abs=1e-4)
        assert share["low"] <= share["value"] <= share["high"]
        assert difference["low"] <= difference["value"] <= difference["high"]
        cell = row["kinds"]["odd 20"]
        chosen = found[[n for n, q in enumerate(everything[:7]) if q.kind == "odd"]]
        assert cell["questions"] == 3
        assert (cell["exact"], cell["log_prob"]) == pytest.approx(tuple(chosen.mean(0)), rel=1e-4)
    assert result["rows"]["full"]["share"] == {"value": 1, "low": 1, "high": 1}


def test_a_full_model_with_few_or_no_exact_answers_gives_no_interval_or_no_share(tiny, contenders):
    prompts = np.random.default_rng(4).integers(3, 259, size=(6, 9)).tolist()
    greedy = [int(tiny.logits([prompt])[0, -1].argmax()) for prompt in prompts]
    wrong = [Question("x", prompt, [(token + 1) % 259]) for prompt, token in zip(prompts, greedy, strict=True)]
    rows = evaluate_retrieval(contenders, {9: wrong})["rows"]
    assert rows["pruned"]["share"] is None and rows["pruned"]["difference"]["low"] is not None
    right = [Question("x", prompts[0], [greedy[0]])]
    rows = evaluate_retrieval(contenders, {9: right + wrong[1:]})["rows"]
    assert rows["full"]["share"] == {"value": 1.0, "low": None, "high": None}


class Reversed(Contender):
    """It reads a prompt in its own way, of which a batch knows nothing."""

    def prefill(self, tokens, cache):
        return super().prefill(tokens[::-1], cache)


def test_a_batch_gives_what_its_rows_give_apart(tiny, contenders):
    prompts = [np.random.default_rng(n).integers(3, 259, size=9 + 4 * n).tolist() for n in range(3)]
    answers = [[5, 6, 7], [8], [9, 10]]
    plan = contenders[1].plan
    for contender in (contenders[1], baselines.NoKV("x", tiny, plan), Reversed("x", tiny, plan)):
        assert contender.is_own == (contender is not contenders[1])
        for logits, *pair in zip(contender.batch_logits(prompts, answers), prompts, answers, strict=True):
            torch.testing.assert_close(logits, contender.logits(*pair), rtol=1e-4, atol=1e-4)
