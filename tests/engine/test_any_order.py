"""Calls of the engine and of its cache in any order: each row's logits are the reference's for what the row holds."""

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import assert_close, cases, new_cache, random_corrections, turns_by_reference
from support.replay import Replay

from pop import PrunePlan, engine
from pop.engine.stages import EAGER, Stages

SLOTS = 60
MOST = 8  # tokens a row and call
REPLAYED = Stages(replay=Replay, replayed_tokens=SLOTS)


class Rows:
    """A cache, and what each of its rows holds: a list of turns (prompt, answer), each a list of token ids."""

    def __init__(self, data, module, plan, stages, num_rows: int):
        self.data = data
        self.module = module
        self.plan = plan
        self.stages = stages
        self.held = [[] for _ in range(num_rows)]
        self.chunk = data.draw(st.sampled_from([3, MOST, 1000]))
        self.cache = new_cache(module, num_rows, SLOTS, self.chunk)

    @property
    def longest(self) -> int:
        return int(self.cache.lengths.max())

    def random_tokens(self, num_tokens: int) -> torch.Tensor:
        """[B, T]."""
        random = torch.Generator().manual_seed(self.data.draw(st.integers(0, 10**6)))
        return torch.randint(self.module.config.vocab_size, (len(self.held), num_tokens), generator=random)

    def check(self, logits: torch.Tensor, call: str) -> None:
        """logits [B, T, V] are those of each row's last T tokens."""
        for row, turns in enumerate(self.held):
            expected, _ = turns_by_reference(self.module, self.plan, turns)
            assert_close(logits[row], expected[-logits.shape[1] :], f"row {row} after {call}:")

    # Calls of the engine

    def prefill(self) -> None:
        tokens = self.random_tokens(self.data.draw(st.integers(1, MOST)))
        lengths = self.data.draw(st.lists(st.integers(1, tokens.shape[1]), min_size=len(tokens), max_size=len(tokens)))
        chunk = self.data.draw(st.sampled_from([2, 1000]))
        logits = engine.prefill(self.module, tokens, self.cache, torch.tensor(lengths), self.plan, chunk, self.stages)
        for turns, prompt, length in zip(self.held, tokens.tolist(), lengths, strict=True):
            turns.append((prompt[:length], []))
        self.check(logits[:, None], "a prompt")

    def decode(self) -> None:
        for step in self.random_tokens(self.data.draw(st.integers(1, 3))).T:
            logits = engine.decode(self.module, step, self.cache, self.stages)
            self.append(step[:, None])
            self.check(logits[:, None], "a decode step")

    def extend(self) -> None:
        tokens = self.random_tokens(self.data.draw(st.integers(1, MOST)))
        logits = engine.extend(self.module, tokens, self.cache, self.stages)
        self.append(tokens)
        self.check(logits, "extend")

    def append(self, tokens: torch.Tensor) -> None:
        """Add tokens [B, T] to the answers of the last turns."""
        for turns, new in zip(self.held, tokens.tolist(), strict=True):
            prompt, answer = turns.pop() if turns else ([], [])
            turns.append((prompt, answer + new))

    # Calls of the cache

    def keep_rows(self) -> None:
        """Some rows, in another order, some of them perhaps twice."""
        last = len(self.held) - 1
        rows = self.data.draw(st.lists(st.integers(0, last), min_size=1, max_size=3))
        self.cache.keep_rows(torch.tensor(rows))
        self.held = [copy.deepcopy(self.held[row]) for row in rows]

    def copy_from(self) -> None:
        """All rows of another cache, with other rings, become copies of one row."""
        row = self.data.draw(st.integers(0, len(self.held) - 1))
        source = copy.deepcopy(self.cache)
        source.keep_rows(torch.tensor([row]))
        num_rows = self.data.draw(st.integers(1, 3))
        self.cache = new_cache(self.module, num_rows, SLOTS + 2, self.data.draw(st.sampled_from([MOST, 1000])))
        self.cache.copy_from(source)
        self.held = [copy.deepcopy(self.held[row]) for _ in range(num_rows)]

    def deepcopy(self) -> None:
        """The copy goes on, after the original has taken other tokens."""
        mine = copy.deepcopy(self.cache)
        engine.decode(self.module, self.random_tokens(1)[:, 0], self.cache, self.stages)
        self.cache = mine

    def reset(self) -> None:
        self.cache.reset()
        self.held = [[] for _ in self.held]


OF_ENGINE = st.sampled_from([Rows.prefill, Rows.prefill, Rows.decode, Rows.extend])
OF_CACHE = st.sampled_from([Rows.keep_rows, Rows.copy_from, Rows.deepcopy, Rows.reset, lambda rows: None])


@given(cases(), st.sampled_from([EAGER, REPLAYED, REPLAYED]), st.data())
def test_calls_in_any_order_are_the_reference(case, stages, data):
    """The plan is calibrated, so a prompt also needs the states of the token before it.

    It is the same for all prompts, which show no images, and each ends with its boundary. It selects no tokens, since
    rounding may decide between equal scores (test_selection.py).
    """
    module, plan, tokens, *_ = case
    if plan.layers:
        plan = PrunePlan(
            plan.layers, min(plan.full_depth_last, 2), 1, random_corrections(module.config, plan.layers, 0)
        )
    rows = Rows(data, module, plan, stages, len(tokens))
    rows.prefill()
    rows.decode()
    for of_cache, of_engine in data.draw(st.lists(st.tuples(OF_CACHE, OF_ENGINE), min_size=4, max_size=7)):
        if rows.longest + MOST + 1 > SLOTS:
            rows.reset()
        of_cache(rows)
        of_engine(rows)
