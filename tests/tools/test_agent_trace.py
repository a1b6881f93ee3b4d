"""tools/examples/agent_trace.py: the trace, and the turns of the engine `pop` against the naive reference."""

import sys

import pytest
from support.cases import turns_by_reference

import pop
from tools.examples import agent_trace
from tools.examples.agent_trace import Reply, Turn, make_trace

PLAN = pop.PrunePlan((1, 3, 4), full_depth_last=70, full_depth_first=1)


def greedy(module, trace: list[Turn], plan: pop.PrunePlan) -> list[list[int]]:
    """The reference's greedy tokens in each turn, given the right tokens before them."""
    best = turns_by_reference(module, plan, trace)[0].argmax(-1).tolist()
    found = []
    end = 0
    for prompt, answer in trace:
        end += len(prompt) + len(answer)
        found.append(best[end - len(answer) - 1 : end - 1])
    return found


def test_the_table_says_what_an_engine_did_with_each_plan(tiny_folder, tmp_path, monkeypatch, capsys):
    """In turn 2, a hundred tokens are new, and the last 70 of them run at full depth."""
    PLAN.save(tmp_path / "my.plan")
    trace = [Turn([5] * 80, [7, 8]), Turn([6] * 100, [9])]
    rounds = {  # by layers: answers, and the seconds before them. The first conversation warms up
        (): ([[7, 8], [9]], [(9, 9), (0.3, 0.1), (0.1, 0.1), (0.2, 0.7)]),
        PLAN.layers: ([[7, 7], [9]], [(9, 9), (0.02, 0.01), (0.03, 0.01), (0.03, 0.01)]),
    }

    def converse(turns, plan):
        answers, seconds = rounds[plan.layers]
        return map(Reply, seconds.pop(0), (0, 82), answers[: len(turns)])

    monkeypatch.setattr(agent_trace, "make_trace", lambda *_: trace)
    monkeypatch.setitem(agent_trace.ENGINES, "pop", lambda folder, length: converse)
    words = ["--model", tiny_folder, "--prune", str(tmp_path / "my.plan"), "--rounds", "3"]
    monkeypatch.setattr(sys, "argv", ["agent_trace", *words])
    assert agent_trace.main() == 0
    _, table = capsys.readouterr().out.split("\n\n")
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["1", "80", "80", "200", "0%", "yes", "30", "11%", "no"],
        ["2", "182", "100", "100", "0%", "yes", "10", "30%", "yes"],
        ["all", "183", "180", "300", "0%", "2", "of", "2", "40", "22%", "1", "of", "2"],
    ]


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
