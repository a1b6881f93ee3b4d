"""`pop demo`: every number but the times, against the naive reference and the model itself."""

import json
import re

import pytest
import torch
from tiny_chat import write_chat_checkpoint

import pop
from pop import cost, demo, reference
from pop.cli import main

PLAN = pop.PrunePlan(layers=(2, 3, 4), full_depth_last=3, full_depth_first=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_chat_checkpoint(tmp_path_factory.mktemp("models") / "chat", dtype=torch.bfloat16))


@pytest.fixture
def arguments(folder, tmp_path):
    PLAN.save(tmp_path / "plan.json")
    (tmp_path / "prompt.txt").write_text("Why is the sky blue?\n", encoding="utf-8")
    prompt, plan = str(tmp_path / "prompt.txt"), str(tmp_path / "plan.json")
    return ["demo", "--model", folder, "--prompt-file", prompt, "--prune", plan, "--max-new-tokens", "12"]


def test_json_is_one_object_with_true_numbers(folder, arguments, capsys):
    assert main([*arguments, "--runs", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert "run 3 of 3" in err

    model = pop.load(folder, dtype=torch.float32)
    prompt = torch.tensor(model.chat_tokens([{"role": "user", "content": "Why is the sky blue?\n"}]))
    log_p, log_q = (
        reference.prefill(model.module, prompt, plan).double().log_softmax(-1) for plan in (pop.PrunePlan(), PLAN)
    )
    kl = float((log_p.exp() * (log_p - log_q)).sum())
    answers = [model.generate(prompt, max_new_tokens=12, plan=plan) for plan in (pop.PrunePlan(), PLAN)]
    agreeing = 0
    while answers[0].tokens[: agreeing + 1] == answers[1].tokens[: agreeing + 1] and agreeing < 12:
        agreeing += 1

    assert kl > 0.01
    assert result["kl_nats"] == pytest.approx(kl, rel=1e-3)
    assert result["agreeing_tokens"] == agreeing < 12
    assert result["prompt_tokens"] == len(prompt)
    assert (result["model"], result["dtype"], result["num_layers"]) == (folder, "float32", 5)
    assert result["plan"] == {"layers": [2, 3, 4], "full_depth_last": 3, "full_depth_first": 1}
    assert result["machine"].keys() == {"device", "threads", "torch"}
    for side, answer, plan in zip(("full", "pruned"), answers, (pop.PrunePlan(), PLAN), strict=True):
        numbers = result[side]
        assert (numbers["answer"], numbers["answer_tokens"]) == (answer.text, len(answer.tokens))
        assert numbers["finish_reason"] == answer.finish_reason
        assert numbers["prefill_flops"] == cost.prefill_flops(model.config, len(prompt), plan)
        assert 0 < numbers["ttft_fastest_s"] <= numbers["ttft_s"] <= numbers["ttft_slowest_s"]
        assert numbers["decode_tokens_per_s"] > 0
    assert result["speedup"] == pytest.approx(result["full"]["ttft_s"] / result["pruned"]["ttft_s"])
    assert result["speedup_limit"] == cost.speedup_limit(model.config, len(prompt), PLAN)
    assert result["efficiency"] == pytest.approx(result["speedup"] / result["speedup_limit"])


def test_the_clock_runs_from_the_token_ids_to_the_first_token(folder, monkeypatch):
    """A model whose prefill takes 5 and whose decode takes 2 seconds, and a clock that knows."""
    now, calls = [0.0], []
    prefill, decode, reset = pop.Model.prefill, pop.Model.decode, pop.KVCache.reset

    def slow(method, seconds):
        def wrapped(self, *args, **options):
            now[0] += seconds(options.get("plan"))
            calls.append(options.get("plan"))
            return method(self, *args, **options)

        return wrapped

    monkeypatch.setattr(demo.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(pop.Model, "prefill", slow(prefill, lambda plan: 5.0 if plan.layers else 8.0))
    monkeypatch.setattr(pop.Model, "decode", slow(decode, lambda plan: 2.0))
    monkeypatch.setattr(pop.KVCache, "reset", slow(reset, lambda plan: 100.0))  # outside of what is timed
    model = pop.load(folder, prune=0.6)
    result = demo.compare(model, [5, 6, 7], max_new_tokens=4, runs=2)
    assert (result["full"]["ttft_s"], result["pruned"]["ttft_s"], result["speedup"]) == (8, 5, 1.6)
    assert result["full"]["decode_tokens_per_s"] == result["pruned"]["decode_tokens_per_s"] == 0.5
    timed = [bool(plan.layers) for plan in calls if plan is not None]
    assert timed == [False, True] * 3  # a warm-up of each, then two runs of each, in turn


def test_agreement_ends_at_the_first_difference(folder, monkeypatch):
    def generate(self, prompt, *, max_new_tokens, plan):
        tokens = [7, 8, 9, 4] if plan.layers else [7, 8, 3, 4]
        return pop.Generation("", tokens, len(prompt), 0.0, 0.0, "length")

    monkeypatch.setattr(pop.Model, "generate", generate)
    result = demo.compare(pop.load(folder, prune=0.6), [5, 6], max_new_tokens=4, runs=1)
    assert result["agreeing_tokens"] == 2


def test_the_report_is_readable(arguments, capsys):
    assert main([*arguments, "--runs", "1"]) == 0
    out = capsys.readouterr().out
    first, *_, last = out.strip().splitlines()
    assert "3 of its 5 layers skipped" in first
    assert "README" in last
    assert "layers 2 to 4, counted from 0, for all of the prompt's tokens but the last 3 and the first 1" in out
    assert "float32" in out
    rows = [line for line in out.splitlines() if re.search(r"  \d[\d,.]*x?$", line)]
    assert len({len(row) for row in rows}) == 1  # aligned
    assert len(rows) >= 6


@pytest.mark.parametrize("plan", ["none", "1"])
def test_pruning_nothing_or_everything_and_a_single_token(plan, arguments, capsys):
    assert main([*arguments, "--prune", plan, "--max-new-tokens", "1", "--runs", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["full"]["decode_tokens_per_s"] is None
    if plan == "none":
        assert (result["kl_nats"], result["agreeing_tokens"], result["speedup_limit"]) == (0, 1, 1)
    assert main([*arguments, "--prune", plan, "--max-new-tokens", "1", "--runs", "1"]) == 0


def test_the_story_fills_the_prompt(folder, tmp_path, capsys, monkeypatch):
    """The built-in text ends in its question, and reaches the model whole."""
    asked = []
    monkeypatch.setattr(pop.Model, "chat_tokens", lambda self, messages: asked.extend(messages) or [1, 2, 3])
    assert main(["demo", "--model", folder, "--runs", "1", "--max-new-tokens", "2"]) == 0
    (message,) = asked
    assert message["role"] == "user"
    assert message["content"].startswith("ALICE'S ADVENTURES IN WONDERLAND")
    assert message["content"].endswith(f"a row of lamps hanging from the roof.\n\nQuestion: {demo.QUESTION}")
    assert demo.QUESTION in capsys.readouterr().out


def test_the_real_model_answers_the_question_right(capsys, monkeypatch, smollm2):
    def answer(model, prompt, **_):
        full = model.generate(prompt, max_new_tokens=16, plan=pop.PrunePlan.none())
        return {"answer": full.text, "prompt_tokens": len(prompt), "end": full.finish_reason}

    monkeypatch.setattr(demo, "compare", answer)
    assert main(["demo", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["answer"], result["end"]) == ('Chapter I is "Down the Rabbit-Hole"', "stop")
    assert result["prompt_tokens"] == 1433
