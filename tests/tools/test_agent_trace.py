"""tools/examples/agent_trace.py: the trace, and the turns of the engine `pop` against the naive reference."""

import re
import sys

import pytest
import torch
from support.cases import turns_by_reference

import pop
from pop.pruning import reference
from tools.examples import agent_trace
from tools.examples.agent_trace import Turn, make_trace

PLAN = pop.PrunePlan((1, 3, 4), full_depth_last=70, full_depth_first=1)


def marks(trace: list[Turn], plan: pop.PrunePlan) -> list[torch.Tensor]:
    """For each turn, which tokens of its prompt run at full depth."""
    found = []
    begin = 0
    for prompt, answer in trace:
        end = begin + len(prompt)
        found.append(reference.full_depth_tokens(end, end, plan)[begin:])
        begin = end + len(answer)
    return found


def greedy(module, trace: list[Turn], plan: pop.PrunePlan) -> list[list[int]]:
    """The reference's greedy tokens in each turn, given the right tokens before them."""
    best = turns_by_reference(module, plan, trace)[0].argmax(-1).tolist()
    found = []
    end = 0
    for prompt, answer in trace:
        end += len(prompt) + len(answer)
        found.append(best[end - len(answer) - 1 : end - 1])
    return found


def test_the_table_says_what_the_reference_does(tiny, tiny_folder, tmp_path, monkeypatch, capsys):
    """Turn 1 has the answer that the plan gives, which is not the full model's, and turn 2 that of the full model."""
    PLAN.save(tmp_path / "my.plan")
    plans = pop.PrunePlan.none(), PLAN
    first, second = make_trace(tiny.tokenizer, 2, 150, 200, seed=0)
    # One token is asked for, so that the answer does not depend on itself.
    first = Turn(first.prompt, greedy(tiny.module, [Turn(first.prompt, [0])], PLAN)[0])
    second = Turn(second.prompt, [0])
    second = Turn(second.prompt, greedy(tiny.module, [first, second], plans[0])[1])
    trace = [first, second]
    monkeypatch.setattr(agent_trace, "make_trace", lambda *_: trace)
    words = ["--model", tiny_folder, "--prune", str(tmp_path / "my.plan"), "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["agent_trace", *words])
    assert agent_trace.main() == 0
    _, table = capsys.readouterr().out.split("\n\n")
    rows = [re.split("  +", line.strip()) for line in table.splitlines()[1:]]

    begin = 0
    for row, turn in zip(rows, trace, strict=False):
        begin += len(turn.prompt)
        assert row[1:3] == [str(begin), str(len(turn.prompt))]
        begin += len(turn.answer)
    assert rows[2][:2] == ["all", str(begin)]
    for column, plan in zip((3, 6), plans, strict=True):
        exact = [got == turn.answer for got, turn in zip(greedy(tiny.module, trace, plan), trace, strict=True)]
        assert [row[column + 2] for row in rows[:2]] == ["yes" if right else "no" for right in exact]
        assert rows[2][column + 2] == f"{sum(exact)} of 2"
        pruned = [~at_full_depth for at_full_depth in marks(trace, plan)] if plan.layers else [torch.zeros(1)] * 2
        assert [row[column + 1] for row in rows[:2]] == [f"{mask.float().mean():.0%}" for mask in pruned]
    assert {row[column] for row in rows[:2] for column in (5, 8)} == {"yes", "no"}


@pytest.mark.parametrize("plan", [pop.PrunePlan.none(), PLAN])
def test_a_conversation_equals_the_reference(tiny, tiny_folder, plan):
    trace = make_trace(tiny.tokenizer, 2, 150, 200, seed=1)
    replies = list(agent_trace.pop_engine(tiny_folder, 1024)(trace, plan))
    assert [reply.tokens for reply in replies] == greedy(tiny.module, trace, plan)
    assert [reply.cached for reply in replies] == [0, len(trace[0].prompt) + len(trace[0].answer)]


def test_the_answer_is_on_one_line_of_the_newest_output(tiny):
    """Lengths are of outputs without their last line, which may be longer than what was wanted."""
    trace = make_trace(tiny.tokenizer, 6, 300, 900, seed=3)
    asked = set()
    lengths = []
    for prompt, answer in trace:
        output, _, question = tiny.tokenizer.decode(prompt).partition("\n\nQuestion: ")
        fact = question.partition("Answer: ")[2] + tiny.tokenizer.decode(answer)
        assert output.splitlines().count(f"{fact}.") == 1
        asked.add(fact)
        lengths.append(len(output))
    assert len(asked) == 6
    assert 300 <= min(lengths) < 420 and 900 <= max(lengths) < 1020
    assert trace == make_trace(tiny.tokenizer, 6, 300, 900, seed=3)
    assert trace != make_trace(tiny.tokenizer, 6, 300, 900, seed=4)
