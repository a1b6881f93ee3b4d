"""tools/results: rows from figures, and a table that states what the other README.md files state."""

import copy
import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from support.goldens import GOLDENS
from support.readme import READMES

import pop
from pop.checkpoints.config_json import read_config
from pop.pruning.cost import speedup_limit
from tools.evaluate.retrieval import share_of
from tools.evaluate.text import interval, read_domains
from tools.results import compare, leaderboard
from tools.results.rows import main

RESULTS = Path(leaderboard.__file__).parent
SHIPPED = {path.stem for path in (Path(pop.__file__).parent / "data" / "plans").glob("*.plan")}
FIGURE = RESULTS.parent / "figures" / "loss-over-speed.svg"
# Made-up figures, as tools.evaluate writes them.
FIGURES = json.loads((GOLDENS / "evaluate" / "run.json").read_bytes())


@pytest.mark.parametrize(
    ("left_out", "full", "half"),
    [
        (
            (),
            "18.28 |  | 98 % |  |  |  | -1.50 | 300 | 1.00x | 1.00x",
            "+9.4 % [+8.4 %, +10.4 %] | 0.050 [0.040, 0.060] | 50 % | 51 % [41 %, 61 %] | 1 | 1 | -0.50 [-0.75, -0.25]"
            " | 200 | 1.50x | -",
        ),
        (("text", "ttft"), "98 % |  |  |  | -1.50", "50 % | 51 % [41 %, 61 %] | 1 | 1 | -0.50 [-0.75, -0.25]"),
    ],
)
def test_figures_become_rows(left_out, full, half, tmp_path, capsys):
    path = tmp_path / "run.json"
    figures = {name: value for name, value in FIGURES.items() if name not in left_out}
    path.write_text(json.dumps(figures | {"unfinished": list(left_out)}))
    assert main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "## run: mine in float32"
    assert [line for line in lines if line.startswith("Unfinished")] == [f"Unfinished: {task}." for task in left_out]
    windows = "" if left_out else "24 windows of text after 64 tokens, "
    times = "" if left_out else "TTFT after 64 tokens, "
    counts = f"{windows}180 questions about prompts of 512, 2,048 tokens, {times}seed 3"
    machine = "A|B, 2 threads, torch 2.0, Python 3.11.0, pop 0.1.0 at 0123456-dirty"
    assert f"{machine}. {counts}. Intervals cover 95 %." in lines and FIGURES["command"] in lines
    assert lines[-2:] == [f"| the full model | {full} |", f"| half: calibrated | {half} |"]


@pytest.fixture
def figures():
    return copy.deepcopy(FIGURES)


def test_code_that_is_written_to_be_read_has_no_speed(figures, tmp_path, capsys):
    figures["contenders"]["half"]["is_own"] = True
    (tmp_path / "run.json").write_text(json.dumps(figures))
    assert main([str(tmp_path / "run.json")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("| 200 | - | - |")


def test_a_stored_run_is_drawn_again(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install matplotlib)")
    run, figure = RESULTS / "runs" / "smollm2-135m-2048.json", tmp_path / "a.svg"
    assert main([str(run), "--plot", str(figure)]) == 0
    drawn = figure.read_text()
    stored = re.findall("<text[^>]*>([A-Za-z][^<]+)", FIGURE.read_text())  # without the numbers on the axes
    assert stored and re.findall("<text[^>]*>([A-Za-z][^<]+)", drawn) == stored
    assert main([str(RESULTS / "runs" / "smollm2-135m-512.json"), "--plot", str(figure)]) == 2
    assert "has no text or no ttft" in capsys.readouterr().err
    assert figure.read_text() == drawn


def test_figures_without_a_table_are_refused(tmp_path, capsys):
    others = {name: value for name, value in FIGURES.items() if name not in ("text", "retrieval", "ttft")}
    for wrong in (FIGURES | {"text": []}, others):
        (tmp_path / "run.json").write_text(json.dumps(wrong))
        assert main([str(tmp_path / "run.json")]) == 2
        assert "run.json lacks figures" in capsys.readouterr().err


A, B = [1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 0, 1]  # which of six answers are exact


def run_of(exact: dict[str, list[int]], nll: float = 1.0) -> dict:
    """A run of methods and the full model. Method a loses 0.01 nats more than the others, in each of eight windows."""
    texts = {"full": {"by_window": {"nll": [nll]}}}
    answers = {"full": {"by_question": {"log_prob": [-1.0] * 6}}}
    for name, found in exact.items():
        texts[name] = {"by_window": {"kl": [*np.linspace(0.1, 0.9, 8) + 0.01 * (name == "a")]}}
        answers[name] = {"by_question": {"exact": found, "log_prob": [-1.0] * 6}}
    return {"text": {"all": {"rows": texts}}, "retrieval": {"rows": answers}, "contenders": dict.fromkeys(exact)}


@pytest.fixture
def compared(tmp_path, monkeypatch, capsys):
    """compared(words, **runs) writes the runs and compares. Returns the lines that are printed, or the error."""
    monkeypatch.chdir(tmp_path)

    def compared(words, status=0, **runs):
        for name, run in runs.items():
            Path(f"{name}.json").write_text(json.dumps(run))
        assert compare.main(["run.json", *words.split()]) == status
        out, err = capsys.readouterr()
        return err if status else out.splitlines()

    return compared


def test_two_methods_of_a_run_are_compared_pair_by_pair(compared):
    """A method that is better in every window is surely better, although the windows differ more than the methods."""
    _, low, high = interval(np.subtract(A, B)).values()
    assert compared("a b", run=run_of({"a": A, "b": B})) == [
        "a minus b, with intervals of 95 %",
        "KL, all, nats: +0.0100 [+0.0100, +0.0100]",
        f"exact answers, share: -0.1667 [{low:+.4f}, {high:+.4f}]",
        "log-probability, nats: +0.0000 [+0.0000, +0.0000]",
    ]


@pytest.mark.parametrize(
    ("kinds", "few", "many", "count"),
    [
        (["codes 512", *["needle 512"] * 5], "codes 512", "needle 512", 8),
        ([*["needle 512"] * 4, "quotes-prose 512", "variables 512"], "all of other tasks", "all of retrieval", 14),
    ],
)
def test_answers_are_also_compared_by_kind_and_by_task(kinds, few, many, count, compared):
    run = run_of({"a": A, "b": B})
    for row in run["retrieval"]["rows"].values():
        row["by_question"]["kind"] = kinds
    lines = compared("a b", run=run)
    assert f"exact answers, {few}, share: +0.0000 too few for an interval" in lines
    assert any(line.startswith(f"exact answers, {many}, share: -0.2000 [") for line in lines)
    assert len(lines) == count


def test_a_method_is_compared_with_that_of_another_run(compared):
    _, low, high = interval(np.subtract(A, B)).values()
    lines = compared("a a --other other.json", run=run_of({"a": A}), other=run_of({"a": B}))
    assert f"exact answers, share: -0.1667 [{low:+.4f}, {high:+.4f}]" in lines


def test_a_plan_is_named_by_its_path_as_it_was_to_evaluate(compared):
    run = run_of({"a.plan": A, "b": B})
    assert compared("plans/a.plan b", run=run)[1:] == compared("a.plan b", run=run)[1:]


@pytest.mark.parametrize(
    ("words", "other", "said"),
    [
        ("a c", {}, "run.json has no method c; it has a, b"),
        ("a z --other other.json", run_of({"a": A}), "other.json has no method z; it has a"),
        ("a b --other other.json", run_of({"b": B}, nll=1.5), "the full models of the two runs differ"),
        ("a b --other other.json", run_of({"b": B}) | {"text": {"mine": {}}}, "and the other one mine"),
        ("a b --other other.json", {"unfinished": ["text"]}, "other.json is unfinished: ['text']"),
    ],
)
def test_methods_that_cannot_be_compared_are_refused(words, other, said, compared):
    assert said in compared(words, status=2, run=run_of({"a": A, "b": B}), other=other)


def test_columns_that_say_something_of_the_full_model_only_stay_if_there_is_no_other_row():
    assert "| LAMBADA |" in leaderboard.page([{"model": "m", "plan": "the full model", "lambada": 0.3}])


def test_a_name_cannot_break_the_table():
    assert "| p/q r |" in leaderboard.page([{"model": "m", "plan": "p|q\nr"}])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model": None}, "model is None"),
        ({"plan": ""}, "plan is ''"),
        ({"machine": 2}, "machine is 2"),
        ({"commit": "main"}, "commit is 'main'"),
        ({"kl": "small"}, "kl is 'small'"),
        ({"kl": -0.1}, "kl is -0.1"),
        ({"kl": float("nan")}, "NaN is not a JSON number"),
        ({"retrieved": 53}, "retrieved is 53"),
        ({"kinds": {"codes": 2}}, "kinds.codes is 2"),
        ({"kinds": {"riddles": 1}}, "kinds is"),
        ({"kept": [0.5]}, "kept is [0.5]"),
        ({"kept": [1.0, None, None]}, "kept is [1.0, None"),
        ({"kept": [0.5, 0.4, "high"]}, "kept is 'high'"),
        ({"kept": [0.5, 0.9, 0.1]}, "the lower end"),
        ({"questions": 1.5}, "questions is 1.5"),
        ({"speed": 1.5}, "field 'speed'"),
    ],
)
def test_a_row_that_is_wrong_is_refused(changed, says, tmp_path, capsys):
    path = tmp_path / "row.json"
    path.write_text(json.dumps({"model": "m", "plan": "p"} | changed))
    assert leaderboard.main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and str(path) in err and err.count("\n") == 1


def row_of(figures: dict, tmp_path: Path) -> dict:
    """The row of the method "half"."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps(figures))
    return leaderboard.row_of(path, "half")


def test_a_row_that_is_printed_is_one_that_the_page_takes(tmp_path, capsys):
    assert leaderboard.main(["--from", str(RESULTS / "runs" / "smollm2-135m-2048.json"), "--plan", "third"]) == 0
    path = tmp_path / "row.json"
    path.write_text(capsys.readouterr().out)
    assert leaderboard.main([str(path)]) == 0
    assert "| third | 1.47x | 1.43x | 0.240 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tokens", "times", "is_own", "expected"),
    [
        (64, {}, False, (None, None)),
        (2048, {}, False, (1.5, 1.61)),
        (2048, {"limit": None}, False, (1.5, None)),  # nothing counts the FLOPs of some methods
        (2048, {"low": None}, False, (None, 1.61)),  # too few rounds for an interval
        (2048, {}, True, (None, 1.61)),  # the speed of code that is written to be read says nothing
    ],
)
def test_a_row_has_the_speed_if_it_was_measured_for_2048_tokens(tokens, times, is_own, expected, figures, tmp_path):
    figures["tokens"]["prompt"] = tokens
    figures["ttft"]["half"] |= {"limit": 1.61} | times
    figures["contenders"]["half"]["is_own"] = is_own
    row = row_of(figures, tmp_path)
    assert (row["speedup_2048"], row["limit_2048"]) == expected


def test_a_share_without_an_interval_is_left_out(figures, tmp_path):
    figures["retrieval"]["rows"]["half"]["share"] = {"value": 1.0, "low": None, "high": None}
    assert row_of(figures, tmp_path)["kept"] is None


@pytest.mark.parametrize(
    "kinds", [["codes 512", "codes 1024"], ["variables 512"]], ids=["two lengths", "none of retrieval"]
)
def test_a_row_needs_questions_of_retrieval_and_of_one_length(kinds, figures, tmp_path):
    figures["retrieval"]["rows"]["half"]["kinds"] = {kind: {"questions": 10, "exact": 0.5} for kind in kinds}
    with pytest.raises(pop.InputError, match=f"has the questions {', '.join(kinds)}; measure with"):
        row_of(figures, tmp_path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [({}, "it has full, half"), ({"text": {}}, "run.json lacks"), ({"unfinished": ["text"]}, "unfinished: ['text']")],
)
def test_a_run_that_makes_no_row_is_refused(changed, said, tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps(FIGURES | changed))
    assert leaderboard.main(["--from", str(tmp_path / "run.json"), "--plan", "third"]) == 2
    assert said in capsys.readouterr().err


def test_texts_of_ones_own_are_named_by_their_hash():
    """Two people may give different files one name, even that of a text of tools.evaluate."""
    assert leaderboard._text("prose", {"prose.txt": "0123456789"}) == "prose 0123456"
    (own,) = read_domains([])["prose"]
    assert leaderboard._text("prose", {own.name: hashlib.sha256(own.read_bytes()).hexdigest()}) == "prose"
    assert leaderboard._text("code", {path.name: "0" for path in read_domains([])["code"]}) == "code"
    assert leaderboard._text("mine", ["mine.txt"]) == "mine"
    assert leaderboard._text("prose", ["prose.txt"]) == "prose"  # in older runs
    assert leaderboard._text("prose", {"mine.txt": "0123456789"}) == "prose 0123456"
    both = [leaderboard._text("b", {"1.txt": "01", "2.txt": second}) for second in ("23", "45")]
    assert both[0] != both[1] and all(len(name) == 9 for name in both)


def test_a_row_takes_texts_whose_name_has_a_space(figures, tmp_path):
    kinds = figures["retrieval"]["rows"]["half"]["kinds"]
    kinds["quotes-my notes 512"] = {"questions": 10, "exact": 0.5}
    assert "quotes" in row_of(figures, tmp_path)["kinds"]


def test_a_row_leaves_other_kinds_of_questions_out(figures, tmp_path):
    """It is that of a run without them: by the same seed, the same questions are resampled."""
    rng = np.random.default_rng(0)
    asked = ["codes 512"] * 9 + ["variables 512"] * 7 + ["needle 512"] * 8
    exact = {"full": rng.integers(2, size=24), "half": rng.integers(2, size=24)}
    found = []
    for is_asked in (np.ones(24, bool), np.array([kind != "variables 512" for kind in asked])):
        kinds = np.array(asked)[is_asked]
        for name, values in exact.items():
            row = figures["retrieval"]["rows"][name]
            row["exact"] = values[is_asked].mean()
            row["share"] = share_of(values[is_asked], exact["full"][is_asked], seed=figures["seed"])
            row["by_question"] = {"kind": kinds.tolist(), "exact": values[is_asked].tolist()}
            row["kinds"] = {
                kind: {"questions": int((kinds == kind).sum()), "exact": values[is_asked][kinds == kind].mean()}
                for kind in dict.fromkeys(kinds.tolist())
            }
        figures["retrieval"]["questions"] = len(kinds)
        found.append(row_of(figures, tmp_path))
    assert found[0] == found[1]
    assert found[0]["questions"] == 17 and {*found[0]["kinds"]} == {"codes", "needle"}


ENDS = ("value", "low", "high")  # of an interval


def percent(share: float, form: str = ".0%") -> str:
    """As the tables write it."""
    return f"{share:{form}}".replace("%", " %")


SPEEDUP = r"\d\.\d\dx( of \d\.\d\dx)?"  # measured, and its limit


def test_the_leaderboard_has_the_plans_that_ship(capsys):
    """Their figures are those of the README."""
    assert leaderboard.main([]) == 0
    out = capsys.readouterr().out
    assert (RESULTS / "PLANS.md").read_text(encoding="utf-8") == out, "python -m tools.results.leaderboard > PLANS.md"
    assert {*re.findall(r"\| \*\*(\S+)\*\*", out)} == SHIPPED
    out = "".join(part for part in out.split("\n## ") if part.startswith("smollm2-135m"))
    shipped = [row for row in rows("README.md") if re.fullmatch(SPEEDUP, row[0])]
    for row in shipped:
        speedup, kl, _ = row
        speedup, _, limit = speedup.partition(" of ")
        kl = f"{float(kl):.3f}"
        assert re.search(rf"\| {limit or speedup} \| {speedup} \|( [^|]+ \|)? {kl} \|", out), row
    assert len(shipped) == 5


def test_rows_that_name_a_stored_run_have_its_figures():
    """The row has its own name for a plan and a machine, and may add figures that tools.evaluate does not measure."""
    own = {"plan", "machine", "commit", "lambada", "speedup_8192"}  # a row may shorten its commit
    with_runs = [row for row in map(leaderboard.read_row, leaderboard.PLANS.glob("*.json")) if row.get("run")]
    assert len(with_runs) >= 9
    for row in with_runs:
        run = RESULTS / "runs" / row["run"]
        result = json.loads(run.read_bytes())
        measured = [leaderboard.row_of(run, plan) for plan in result["retrieval"]["rows"]]
        wanted = {name for name, value in row.items() if name not in own and value is not None}
        if "ttft" not in result or result["tokens"]["prompt"] != 2048:
            wanted -= {"speedup_2048", "limit_2048"}
        assert [all(row[name] == figures[name] for name in wanted) for figures in measured].count(True) == 1, row
        assert result["commit"].startswith(row["commit"])
    assert leaderboard.row_of(RESULTS / "runs" / "smollm2-135m-2048.json", "full")["kept"] is None


@pytest.mark.parametrize("weights", ["smollm2", "gemma3"])
def test_limits_of_plans_are_those_of_the_shapes(weights, request):
    """Of the plans that ship and of older ones, and of plain ones, whose name says how many layers they prune."""
    folder = request.getfixturevalue(weights)
    config = read_config(folder)
    found = 0
    for row in map(leaderboard.read_row, leaderboard.PLANS.glob(f"{folder.name}-*.json")):
        name = row["plan"].partition(", unseen")[0]
        plain = re.fullmatch(r"(\d+) of (\d+), the paper's method", name)
        if plain:
            pruned, layers = map(int, plain.groups())
            plan = pop.PrunePlan(range(layers - pruned, layers))
        elif name in SHIPPED:
            plan = pop.PrunePlan.load(name)
        elif name in ("smollm2-135m-third-old", "gemma3-270m-7-old:96"):  # whose corrections have the same shapes
            now = pop.PrunePlan.load(re.sub("-old(:96)?$", "", name))
            plan = dataclasses.replace(now, full_depth_last=96, full_depth_selected=0.0558)
        else:
            continue
        found += 1
        assert row["limit_2048"] == round(speedup_limit(config, 2048, plan), 2), row["plan"]
    assert found >= 4


def rows(path: str) -> list[list[str]]:
    """The rows of all tables of a README, without the first column and without intervals."""
    lines = re.findall(r"^\|(.+)\|$", READMES[path], re.M)
    table = [[re.sub(r"( \[.*\])?(: .*)?$", "", cell.strip()) for cell in line.split("|")] for line in lines]
    return [row[1:] for row in table]


def lost_and_gained(answers: dict, name: str) -> tuple[int, int]:
    pairs = list(zip(answers["full"]["by_question"]["exact"], answers[name]["by_question"]["exact"], strict=True))
    return pairs.count((1, 0)), pairs.count((0, 1))


def test_the_tables_are_those_of_the_run():
    """The first table of tools/results, its kinds of questions, and README's rows of the same plans."""
    result = json.loads((RESULTS / "runs" / "smollm2-135m-2048.json").read_bytes())
    text, answers, ttft = result["text"]["all"]["rows"], result["retrieval"]["rows"], result["ttft"]
    results = rows("tools/results/README.md")
    kinds = [name.partition(" ")[0] for name in answers["full"]["kinds"]]
    assert any(kinds == row[:-1] for row in results)
    for name in [*ttft]:
        shares = [cell["exact"] for cell in answers[name]["kinds"].values()]
        assert [percent(share) for share in [*shares, answers[name]["exact"]]] in results
        if name == "full":
            continue
        speed = f"{ttft[name]['speedup']:.2f}x of {ttft[name]['limit']:.2f}x"
        kl = f"{text[name]['kl']['value']:.3f}"
        kept = percent(answers[name]["share"]["value"])
        change = percent(text[name]["perplexity_change"]["value"], "+.1%")
        same = percent(text[name]["same"]["value"], ".1%")
        assert [speed, change, kl, same, f"{text[name]['kl_first']['value']:.3f}", kept] in results
        assert [speed, kl, kept] in rows("README.md")
        lost, gained = lost_and_gained(answers, name)
        assert f": {lost} lost, {gained} gained |" in READMES["README.md"]


@pytest.mark.parametrize(
    "run",
    [
        "smollm2-135m-512",
        "smollm2-135m-2048-others",
        "smollm2-135m-unseen",
        "smollm2-135m-unseen-2048",
        "smollm2-135m-unseen-old",
        "smollm2-135m-unseen-2048-old",
        "gemma3-270m-512",
    ],
)
def test_kl_and_answers_in_the_tables_are_those_of_the_run(run):
    result = json.loads((RESULTS / "runs" / f"{run}.json").read_bytes())
    text, answers = result["text"]["all"]["rows"], result["retrieval"]["rows"]
    results = rows("tools/results/README.md")
    for name in [*text][1:]:
        if run.endswith("-old") and not name.startswith(("fastkv", "snapkv")):
            continue  # plans that no longer ship, and plain ones, which newer runs have too
        kept = percent(answers[name]["share"]["value"])
        changes = "{}, {}".format(*lost_and_gained(answers, name))
        wanted = {f"{text[name]['kl']['value']:.3f}", f"{text[name]['kl_first']['value']:.3f}", kept, changes}
        assert any(wanted <= {*row} for row in results), (name, wanted)
        if run.startswith("smollm2-135m-unseen"):
            perplexity = percent(text[name]["perplexity_change"]["value"], "+.1%")
            kl = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**text[name]["kl"])
            share = "{:.0f} % [{:.0f}, {:.0f}]".format(*(100 * answers[name]["share"][end] for end in ENDS))
            nats = "{value:.2f} [{low:.2f}, {high:.2f}]".format(**answers[name]["difference"])
            table = READMES["tools/results/README.md"]
            assert re.search(rf"\| {re.escape(perplexity)} \| {re.escape(kl)} .* {re.escape(nats)} \|", table), name
            if name.startswith("smollm2"):
                assert f"{text[name]['kl']['value']:.3f}, {share}" in table


@pytest.mark.parametrize("model", ["smollm2-135m", "gemma3-270m"])
def test_the_shares_of_importance_are_those_of_the_stored_scores(model):
    scores = pop.Importance.load(RESULTS / "runs" / f"importance-{model}.json")
    deepest = len(scores.prefill) // 3
    prefill, decode = (stage[-deepest:].sum() / stage.sum() for stage in (scores.prefill, scores.decode))
    text = " ".join(READMES["pop/calibration/README.md"].split())
    assert f"{prefill:.0%} of prefill's importance and {decode:.0%} of decode's".replace("%", " %") in text


def test_each_loss_of_the_readme_is_among_the_results():
    """KL and the share of answers kept, in the README's rows that begin with a measured speedup."""
    results = [set(row) for row in rows("tools/results/README.md")]
    _full, *losses = [row[1:] for row in rows("README.md") if re.fullmatch(SPEEDUP, row[0])]
    assert len(losses) == 4
    for row in losses:
        assert any(set(row) <= figures for figures in results), row
