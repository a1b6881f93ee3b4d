"""tools/evaluate/answers.py: what a plan changes in the predictions of given answers."""

import json
import re

import pytest
import torch
from support.harness import naive_logits
from support.tiny_qwen3_vl import seeing_model

import pop
from tools.evaluate import answers

PLAN = pop.PrunePlan(range(2, 5), full_depth_below=120)


def conversation(number: int, answer: str | None = "A number.") -> dict:
    """A question with an answer, or without. Its prompt has 100 tokens and more."""
    asked = {"role": "user", "content": f"{'Once more. ' * 10}What is {number} times {number}?"}
    return {"messages": [asked] if answer is None else [asked, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def model(tiny_folder):
    return pop.load(tiny_folder, prune=PLAN, compile=False)


def written(path, conversations: list) -> str:
    path.write_text("".join(f"{json.dumps(one)}\n" for one in conversations))
    return str(path)


def test_the_changes_are_those_of_the_reference(model, tmp_path):
    path = written(tmp_path / "log.jsonl", [conversation(4)])
    (answer,), refused = answers.split(model, path, most=256)
    assert not refused
    (cut,), _ = answers.split(model, path, most=3)
    assert (cut.prompt, cut.tokens) == (answer.prompt, answer.tokens[:3])
    assert answer.prompt == model.chat_tokens(conversation(4)["messages"][:1])
    assert model.tokenizer.decode(answer.tokens[:-1]) == "A number." and answer.tokens[-1] == 2  # the end token
    found = answers.change(model, answer)

    plans = (pop.PrunePlan.none(), PLAN)
    full, pruned = (naive_logits(model, plan, answer.prompt, answer.tokens).log_softmax(-1) for plan in plans)
    kl = torch.nn.functional.kl_div(pruned, full, log_target=True, reduction="none").sum(-1)
    assert found.kl == pytest.approx(kl.mean().item(), rel=1e-3) and found.kl > 1e-6
    assert found.first == pytest.approx(kl[0].item(), rel=1e-3)
    assert found.same == (full.argmax(-1) == pruned.argmax(-1)).double().mean()
    of_full, of_pruned = (rows.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0] for rows in (full, pruned))
    lost = of_full - of_pruned
    count = len(answer.tokens)
    assert found.full * count == pytest.approx(of_full.sum().item(), abs=1e-4)
    assert found.change * count == pytest.approx(-lost.sum().item(), abs=1e-4)
    assert found.lost == pytest.approx(lost.sum().item(), abs=1e-4)
    assert found.most == pytest.approx(lost.max().item(), abs=1e-4)
    assert lost[found.place] == pytest.approx(lost.max().item(), abs=1e-4)
    assert answers.words_at(model, answer, 0) == f"{model.tokenizer.decode(answer.tokens[:1])!r} after ''"
    end = len(answer.tokens) - 2
    before = model.tokenizer.decode(answer.tokens[:end])
    assert before and answers.words_at(model, answer, end).endswith(f"'.' after {before!r}")


def test_short_prompts_and_unusable_lines_are_counted(tiny_folder, tmp_path, capsys):
    PLAN.save(tmp_path / "my.plan")
    short = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}
    lines = [*map(conversation, range(6)), conversation(7, answer=None), short]
    path = written(tmp_path / "log.jsonl", lines)
    assert answers.main([path, "--model", tiny_folder, "--prune", str(tmp_path / "my.plan"), "--worst", "1"]) == 0
    told = capsys.readouterr().out
    assert len(re.findall(r"line \d: [0-9.]+ nats, and [0-9.]+ at '", told)) == 1
    assert "6 answers. Those that lose most:\n" in told
    assert "1 prompts are too short" in told
    assert "1 lines cannot be used. The first: " in told and "log.jsonl, line 7: " in told


def test_the_table_has_means_and_names_the_largest_losses(model):
    lost = (0.5, -0.2, 3.0, 1.25)
    rows = [answers.Change(-2.0, -0.01 * n, 0.1 * n, 0.3, 0.75, nats, nats / 2, 0) for n, nats in enumerate(lost)]
    changes = [(answers.Answer(f"line {n}", [], model.encode(str(n), bos=False)), row) for n, row in enumerate(rows)]
    assert answers.report(model, changes[1:2], most=3).endswith("1 answers. None loses anything.")
    told = answers.report(model, changes, most=3)
    figures = [re.split(r"  +", line.strip())[1] for line in told.splitlines()[1:6]]
    assert figures == ["-2.000", "-0.0150", "0.1500", "0.3000", "75.0%"]
    named = [
        "4 answers. Those that lose most:",
        "line 2: 3.0 nats, and 1.5 at '2' after ''",
        "line 3: 1.2 nats, and 0.6 at '3' after ''",
        "line 0: 0.5 nats, and 0.2 at '0' after ''",
    ]
    assert told.splitlines()[-4:] == named
    assert answers.report(model, changes, most=1).splitlines()[-2:] == named[:2]


def test_a_format_that_begins_in_another_way_is_named(model, tmp_path, monkeypatch):
    """Some formats write an earlier answer without its thoughts."""
    path = written(tmp_path / "log.jsonl", [conversation(4)])
    encode = type(model.chat_format()).encode
    monkeypatch.setattr(
        type(model.chat_format()),
        "encode",
        lambda self, messages, *args, **rest: encode(self, messages[-1:], *args, **rest),
    )
    found, (refused,) = answers.split(model, path, most=256)
    assert not found and "begins in another way" in refused


def test_an_answer_without_thoughts_follows_a_prompt_that_asks_for_none(tmp_path):
    model = seeing_model()
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi there"}]
    (answer,), _ = answers.split(model, written(tmp_path / "log.jsonl", [{"messages": said}]), most=99)
    assert answer.prompt == model.chat_tokens(said[:1], enable_thinking=False)
