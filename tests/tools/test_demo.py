"""The demo: every number but the times, against the model itself."""

import json
import sys

import pytest
import torch
from support.cases import random_corrections
from support.plans import contents
from support.tiny_chat import write_chat_checkpoint

import pop
from pop.calibration.held_out import Judge, Losses
from pop.pruning import cost
from tools import demo

PLAN = pop.PrunePlan(layers=(2, 3, 4), full_depth_last=3, full_depth_first=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_chat_checkpoint(tmp_path_factory.mktemp("models") / "chat", dtype=torch.bfloat16))


def main(arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["demo", *arguments])
        return demo.main()


@pytest.fixture
def arguments(folder, tmp_path):
    PLAN.save(tmp_path / "plan.json")
    (tmp_path / "prompt.txt").write_text("Why is the sky blue?\n", encoding="utf-8")
    prompt, plan = str(tmp_path / "prompt.txt"), str(tmp_path / "plan.json")
    return ["--model", folder, "--prompt-file", prompt, "--prune", plan, "--max-new-tokens", "12"]


def test_json_is_one_object_with_true_numbers(folder, arguments, capsys):
    assert main([*arguments, "--runs", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)

    model = pop.load(folder, dtype=torch.float32)
    prompt = torch.tensor(model.chat_tokens([{"role": "user", "content": "Why is the sky blue?\n"}]))
    story = model.encode(demo.STORY.read_text(encoding="utf-8").strip())
    judge = Judge(model, [(story[:640], []), (story[640:1280], [])])
    assert result["prompt_tokens"] == len(prompt)
    assert (result["model"], result["dtype"], result["num_layers"]) == (folder, "float32", 5)
    assert result["machine"].keys() == {"device", "threads", "torch", "python"}
    for row, plan in zip(result["rows"], [pop.PrunePlan(), PLAN], strict=True):
        answer = model.generate(prompt, max_new_tokens=12, plan=plan)
        expected = {
            "calibrated": False,
            "layers": list(plan.layers),
            "full_depth_last": plan.full_depth_last,
            "full_depth_first": plan.full_depth_first,
            "full_depth_selected": plan.full_depth_selected,
            "answer": answer.text,
            "answer_tokens": len(answer.tokens),
            "finish_reason": answer.finish_reason,
            "prefill_flops": cost.prefill_flops(model.config, len(prompt), plan),
            "speedup": pytest.approx(result["rows"][0]["ttft_s"] / row["ttft_s"]),
            "speedup_limit": cost.speedup_limit(model.config, len(prompt), plan),
        }
        assert {key: row[key] for key in expected} == expected
        found = (row["kl_nats"], row["repetition_kl_nats"], row["copied"])
        assert found == pytest.approx(tuple(judge.losses(plan)[:3]), rel=1e-3, abs=1e-6)
        assert row["ttft_s"] > 0 and row["runs"] in (2, 3)


def test_the_rows_are_the_paper_s_plan_and_those_of_the_package(folder, monkeypatch, tmp_path):
    model = pop.load(folder, dtype=torch.float32)
    made = []
    for name, layers in (("0.4", (1, 3, 4)), ("0.6", (3, 4))):
        corrections = random_corrections(model.config, layers, 1, model=model)
        pop.PrunePlan(layers, 1, 1, corrections).save(tmp_path / f"{model.name}-{name}.plan")
        made.append(pop.PrunePlan.load(tmp_path / f"{model.name}-{name}.plan"))
    monkeypatch.setattr("pop.loading.SHIPPED", tmp_path)
    shown = demo.plans_to_show(model, "default")
    expected = [pop.PrunePlan(), pop.PrunePlan((4,)), *made[::-1]]
    assert [contents(plan) for plan in shown] == [contents(plan) for plan in expected]
    assert demo.plans_to_show(model, "0.2") == [pop.PrunePlan(), pop.PrunePlan((4,))]
    other = pop.load(folder, dtype=torch.float32, prune=None)
    other.module.layers[4].self_attn.k_proj.weight.data += 1
    assert demo.shipped_plans(other) == []


@pytest.mark.parametrize(
    ("rounds", "seconds", "fastest", "count"),
    [
        (3, [8.0, 5.0, 8.1, 6.0, 9.0, 4.0], (8.0, 4.0), 3),  # those of the second plan are never close
        (9, [9.0, 5.0, 8.0, 5.1, 8.1, 7.0], (8.0, 5.0), 3),  # those of the first are after three rounds
        (1, [9.0, 7.0], (9.0, 7.0), 1),
    ],
)
def test_prefills_are_timed_in_turn_until_all_have_close_times(rounds, seconds, fastest, count, folder, monkeypatch):
    calls, left = [], list(seconds)

    def generate(model, prompt, *, max_new_tokens, plan):
        calls.append((len(prompt), max_new_tokens))
        taken = 1000.0 if len(prompt) == 64 else left.pop(0)  # a warm-up may take any time
        return pop.Generation("", [7], len(prompt), taken, 0.0, "length")

    monkeypatch.setattr(pop.Model, "generate", generate)
    monkeypatch.setattr(demo.Judge, "losses", lambda judge, plan: Losses(0.0, 0.0, 1.0, 0.0))
    model = pop.load(folder, prune=0.6)
    rows = list(demo.compare(model, [5] * 70, [pop.PrunePlan(), model.plan], "text", max_new_tokens=4, runs=rounds))
    assert tuple(row["ttft_s"] for row in rows) == fastest
    assert [row["runs"] for row in rows] == [count, count]
    assert rows[1]["speedup"] == fastest[0] / fastest[1]
    assert left == []
    assert calls[:4] == [(64, 2), (64, 2), (70, 4), (70, 4)]


@pytest.mark.parametrize(
    ("speedup", "words"), [(1.0, ""), (1.45, ""), (1.47, "above its limit"), (0.99, "slower than the full model")]
)
def test_a_row_that_an_idle_machine_would_not_show_says_so(speedup, words):
    row = {"plan": "a plan", "ttft_s": 1.0, "speedup": speedup, "speedup_limit": 1.46}
    row |= {"kl_nats": 0.1, "repetition_kl_nats": 0.1, "copied": 0.9}
    text = demo.cells_of(row, has_gpu=False)
    assert len(text.splitlines()) == (2 if words else 1)
    assert words in text
    assert "slower" not in demo.cells_of(row, has_gpu=True)


@pytest.mark.parametrize(("has_gpu", "dtype"), [(False, "float32"), (True, "bfloat16")])
def test_a_gpu_takes_bfloat16_and_promises_no_speedup(has_gpu, dtype, arguments, capsys, monkeypatch):
    load = pop.load
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(
        pop, "load", lambda folder, **options: load(folder, **options | {"compile": False}, device="cpu")
    )
    monkeypatch.setattr(demo, "compare", lambda *_, **__: [])
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"parameters, in {dtype}, so" in out
    assert ("launches bound short prompts" in out) == has_gpu


def test_the_story_fills_the_prompt(folder, tmp_path, capsys, monkeypatch):
    """The built-in text ends in its question, and reaches the model whole. No line tells of one plan for all rows."""
    asked = []
    monkeypatch.setattr(pop.Model, "chat_tokens", lambda self, messages: asked.extend(messages) or [1, 2, 3])
    assert main(["--model", folder, "--runs", "1", "--max-new-tokens", "2"]) == 0
    (message,) = asked
    assert message["role"] == "user"
    assert message["content"].startswith("ALICE'S ADVENTURES IN WONDERLAND")
    assert message["content"].endswith(f"a row of lamps hanging from the roof.\n\nQuestion: {demo.QUESTION}")
    out, err = capsys.readouterr()
    assert demo.QUESTION in out and "skips" not in err


@pytest.mark.parametrize("settings", [{}, {"chat_template": "{{ 1 / 0 }}"}])
def test_a_model_without_a_chat_format_continues_the_text(settings, tmp_path, arguments, capsys, monkeypatch):
    """A base model has no chat template, and others have one that cannot be used."""
    folder = write_chat_checkpoint(tmp_path / "base")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    asked = []
    monkeypatch.setattr(demo, "compare", lambda model, prompt, *_, **__: asked.append(prompt) or [])
    assert main(["--model", str(folder), *arguments[2:], "--runs", "1"]) == 0
    assert asked == [pop.load_tokenizer(folder).encode("Why is the sky blue?\n\nAnswer:")]
    assert "the given text, as plain text to continue\n" in capsys.readouterr().out
