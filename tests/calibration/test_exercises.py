"""Exercises for distillation: what is repeated or asked for stands in the prompt."""

import random
import re
from itertools import pairwise

import pytest
from support.chat_formats import TOKENIZERS
from support.tiny import tiny_config, tiny_model

from pop.calibration.exercises import (
    CONTINUATION,
    FORMS,
    KINDS,
    PASSAGE,
    ROWS,
    SHORTEST_PROMPT,
    TOKENS_IN_BATCH,
    exercise,
)

WORDS = "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec romeo"
TEXT, REPETITION, TABLE = (KINDS.index(kind) for kind in ("text", "repetition", "table"))


def texts(*lengths, first=5):
    """Windows in which each token is the one before it plus one, modulo 60."""
    return [([(first + index) % 60 for index in range(length)], []) for length in lengths]


@pytest.fixture(scope="module")
def bare():
    """A model without a tokenizer."""
    return tiny_model(tiny_config(bos_id=3))


@pytest.fixture(scope="module")
def model():
    tokenizer = TOKENIZERS["smollm2"]
    return tiny_model(tiny_config(vocab_size=tokenizer.vocab_size, hidden_size=6), tokenizer=tokenizer)


@pytest.mark.parametrize("longest", [900, 3000, 20])
def test_lengths_go_up_to_the_longest_window_by_their_logarithm(bare, longest):
    """A batch is parts of windows, with as many rows as its tokens allow."""
    windows = texts(longest - 1, longest, 10)
    sizes = []
    for seed in range(100):
        tokens, cut, media = exercise(bare, windows, TEXT, random.Random(seed))
        B, T = tokens.shape
        sizes.append(T)
        assert min(ROWS, max(1, TOKENS_IN_BATCH // T)) == B and media == [[]] * B
        assert cut == T - min(CONTINUATION, T // 3)
        assert all([(row, [])] == texts(T, first=row[0]) for row in tokens.tolist())
    shortest = min(SHORTEST_PROMPT + CONTINUATION, longest)
    assert shortest <= min(sizes) <= 1.05 * shortest and 0.95 * longest <= max(sizes) <= longest
    middle = (shortest * longest) ** 0.5
    assert longest == 20 or 35 < sum(size < middle for size in sizes) < 65


@pytest.mark.parametrize("number", [TEXT, REPETITION, TABLE])
def test_exercises_of_every_kind_begin_with_bos_and_are_as_short_as_their_text(bare, number):
    windows = [([3, *window], []) for window, _ in texts(700, 800, first=4)]
    for seed in range(3):
        rows = exercise(bare, windows, number, random.Random(seed)).tokens.tolist()
        assert all(row[0] == 3 for row in rows)
        assert len({row[1] for row in rows}) > 1
    tokens, cut, _ = exercise(bare, texts(30, 30), number, random.Random(0))
    assert (tokens.shape, cut) == ((ROWS, 30), 20)


@pytest.mark.parametrize("number", [REPETITION, TABLE])
def test_passages_are_repeated(bare, number):
    """Without a tokenizer a table becomes a repetition. In half of the rows, a token of each passage changes."""
    breaks = [n for seed in range(20) for n in breaks_of(exercise(bare, texts(500), number, random.Random(seed)))]
    passages = 1 + CONTINUATION // PASSAGE[0]  # at most
    assert min(breaks) > 0 and max(breaks) <= 3 * passages
    assert 0.2 < sum(n > passages for n in breaks) / len(breaks) < 0.6


@pytest.mark.parametrize("more", [0, 8])  # embeddings that no token has
def test_a_prompt_without_words_is_repeated_not_made_a_table(more):
    tokenizer = TOKENIZERS["smollm2"]
    config = tiny_config(vocab_size=tokenizer.vocab_size + more, hidden_size=6)
    window = random.Random(0).choices(range(tokenizer.vocab_size), k=700)
    window[::30] = [tokenizer.vocab_size + 2] * len(window[::30])
    if not more:
        window = tokenizer.encode("1 + 2 = 3; " * 300, bos=False)
    model = tiny_model(config, tokenizer=tokenizer)
    assert max(breaks_of(exercise(model, [(window, [])], TABLE, random.Random(1)))) <= 4 * CONTINUATION / PASSAGE[0]


def breaks_of(exercise):
    """How many tokens of each row's continuation follow another one than in its prompt."""
    found = []
    for row in exercise.tokens.tolist():
        follow = set(pairwise(row[: exercise.cut]))
        found.append(sum(pair not in follow for pair in pairwise(row[exercise.cut :])))
    return found


def test_a_table_has_each_fact_that_it_asks_for(model):
    """The values of the continuation stand in the prompt, with the same two words. The prompt keeps its length.

    A value is a number in hexadecimal or decimal digits, a list of digits, or a word.
    """
    rng, found = random.Random(0), set()
    window = model.encode(" ".join(rng.choice(WORDS.split()) for _ in range(3000)), bos=False)
    filled = [re.escape(form.format("WORD", "WORD", "VALUE")) for form in FORMS]
    patterns = [form.replace("WORD", r"(\w+)").replace("VALUE", r"(\d(?:, \d)+|[0-9a-z.]*[0-9a-z])") for form in filled]
    for _ in range(24):
        tokens, cut, _ = exercise(model, [(window, [])], TABLE, rng)
        size = tokens.shape[1]
        assert size >= SHORTEST_PROMPT + CONTINUATION and cut == size - min(CONTINUATION, size // 3)
        for row in tokens.tolist():
            prompt, rest = (model.tokenizer.decode(part) for part in (row[:cut], row[cut:]))
            rest = rest.rpartition("\n")[0]  # the last line may be cut
            stated, asked = (
                {tuple(sorted(fact)) for pattern in patterns for fact in re.findall(pattern, text)}
                for text in (prompt, rest)
            )
            assert asked <= stated
            found |= asked
    assert len(found) > 50
    values = [fact[0] for fact in found]  # digits come before letters in a sorted fact
    assert any(", " in value for value in values) and any(value.isdecimal() for value in values)
    assert any(set(fact) <= set(WORDS.split()) for fact in found)


def test_the_seed_decides(model):
    windows = [(model.encode(WORDS * 9, bos=False), [])]
    first, again, other = (exercise(model, windows, TABLE, random.Random(seed)).tokens.tolist() for seed in (1, 1, 2))
    assert first == again != other
