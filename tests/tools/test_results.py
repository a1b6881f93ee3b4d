"""tools/results: rows from figures, and a table that states what the other README.md files state."""

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
from tools.evaluate import report
from tools.evaluate.retrieval import share_of
from tools.evaluate.text import interval, read_domains
from tools.results import compare, leaderboard
from tools.results.rows import main

RESULTS = Path(leaderboard.__file__).parent
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
    machine = "A|B, 2 threads, torch 2.0, Python 3.11.0, pop 0.1.0"
    assert f"{machine}. {counts}. Intervals cover 95 %." in lines and FIGURES["command"] in lines
    assert lines[-2:] == [f"| the full model | {full} |", f"| half: calibrated | {half} |"]


def test_code_that_is_written_to_be_read_has_no_speed(tmp_path, capsys, notes):
    """In the figure, its method is at its limit, or left out if nothing counts its FLOPs."""
    result = json.loads(json.dumps(FIGURES))
    result["contenders"]["half"]["is_own"] = True
    path = tmp_path / "run.json"
    path.write_text(json.dumps(result))
    assert main([str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("| 200 | - | - |")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install matplotlib)")
    for row in next(iter(result["text"].values()))["rows"].values():
        row.setdefault("kl", {"value": 0.0, "low": 0.0, "high": 0.0})
    drawn = notes(report, "_draw_line", lambda axes, method, points, number: [speedup for speedup, *_ in points])
    for is_own, limit, speedups in ((False, None, [1.5]), (True, 1.75, [1.75]), (True, None, [])):
        result["contenders"]["half"]["is_own"] = is_own
        result["ttft"]["half"]["limit"] = limit
        report.plot(result, "svg")
        assert all(points == speedups for points in drawn) and bool(drawn) == bool(speedups)
        drawn.clear()


def test_a_stored_run_is_drawn_again(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install matplotlib)")
    run, figure = RESULTS / "runs" / "smollm2-135m.json", tmp_path / "a.svg"
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


def test_two_methods_of_a_run_are_compared_pair_by_pair(tmp_path, capsys):
    """A method that is better in every window is surely better, although the windows differ more than the methods."""
    path = tmp_path / "run.json"
    losses = np.linspace(0.1, 0.9, 8)
    rows = {name: {"by_window": {"kl": [*losses + more]}} for name, more in (("a", 0.01), ("b", 0.0))}
    exact = {"a": [1, 0, 1, 1, 0, 1], "b": [1, 1, 1, 1, 0, 1]}
    answers = {name: {"by_question": {"exact": found, "log_prob": [-1.0] * 6}} for name, found in exact.items()}
    result = {"text": {"all": {"rows": rows}}, "retrieval": {"rows": answers}, "contenders": {"a": {}, "b": {}}}
    path.write_text(json.dumps(result))
    assert compare.main([str(path), "a", "b"]) == 0
    everything, low, high = interval(np.array([0, -1, 0, 0, 0, 0])).values()
    assert capsys.readouterr().out.splitlines() == [
        "a minus b, with intervals of 95 %",
        "KL, all, nats: +0.0100 [+0.0100, +0.0100]",
        f"exact answers, share: -0.1667 [{low:+.4f}, {high:+.4f}]",
        "log-probability, nats: +0.0000 [+0.0000, +0.0000]",
    ]
    for row in answers.values():
        row["by_question"]["kind"] = ["codes 512", *["needle 512"] * 5]
    path.write_text(json.dumps({"retrieval": result["retrieval"], "contenders": result["contenders"]}))
    assert compare.main([str(path), "a", "b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and everything == pytest.approx(-1 / 6)
    assert "exact answers, codes 512, share: +0.0000 too few for an interval" in lines
    assert any(line.startswith("exact answers, needle 512, share: -0.2000 [") for line in lines)
    for row in answers.values():
        row["by_question"]["kind"] = [*["needle 512"] * 4, "quotes-prose 512", "variables 512"]
    path.write_text(json.dumps({"retrieval": result["retrieval"], "contenders": result["contenders"]}))
    assert compare.main([str(path), "a", "b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("exact answers, all of retrieval, share: -0.2000 [") for line in lines)
    assert "exact answers, all of other tasks, share: +0.0000 too few for an interval" in lines
    other = tmp_path / "other.json"
    for own in (0.0, 0.5):  # of the full model in the other run
        for file, name, moved in ((path, "a", 0.0), (other, "b", own)):
            texts = {"all": {"rows": {name: rows[name], "full": {"by_window": {"nll": [1.0 + moved]}}}}}
            asked = {"rows": {name: answers[name], "full": {"by_question": {"log_prob": [-1.0] * 6}}}}
            file.write_text(json.dumps({"text": texts, "retrieval": asked, "contenders": {name: {}}}))
        assert compare.main([str(path), "a", "b", "--other", str(other)]) == (2 if own else 0)
        assert ("the full models of the two runs differ" in capsys.readouterr().err) == bool(own)
    capsys.readouterr()
    again = tmp_path / "again.json"  # the first method, changed
    again.write_text(path.read_text().replace("[1, 0, 1, 1, 0, 1]", "[1, 1, 1, 1, 0, 1]"))
    assert compare.main([str(path), "a", "z", "--other", str(again)]) == 2
    assert "the other run lacks z; it has the methods a" in capsys.readouterr().err
    assert compare.main([str(path), "a", "a", "--other", str(again)]) == 0
    assert f"exact answers, share: -0.1667 [{low:+.4f}, {high:+.4f}]" in capsys.readouterr().out
    capsys.readouterr()
    other.write_text(json.dumps(json.loads(other.read_text()) | {"text": {"mine": {}}}))
    assert compare.main([str(path), "a", "b", "--other", str(other)]) == 2
    assert "and the other one mine" in capsys.readouterr().err
    for name, changed in (("c", result), ("b", result | {"text": {"all": {"rows": {}}}})):
        path.write_text(json.dumps(changed))
        assert compare.main([str(path), "a", name]) == 2
        assert "it has the methods a, b" in capsys.readouterr().err


ROW = {"model": "m", "plan": "p|q", "machine": "two cores", "commit": "0123456789abcdef-dirty", "kl": 0.0123}
ROW |= {
    "run": "r.json",
    "texts": "alice",
    "seed": 3,
    "kept": [0.62, 0.49, 0.74],
    "prompt_tokens": 512,
    "questions": 180,
    "question_tokens": 2048,
}
ROW |= {
    "dtype": "float32",
    "speedup_2048": 1.5,
    "limit_2048": 1.61,
    "kinds": {"codes": 0.876},
    "retrieved": 0.5,
    "lambada": None,
}


def test_a_row_of_the_leaderboard_shows_its_figures(tmp_path, capsys):
    paths = []
    faster = {"limit_2048": 2, "speedup_2048": 2, "commit": None, "run": None}
    for row in (ROW, ROW | {"plan": "faster"} | faster, {"model": "a", "plan": "b\n", "kinds": None}):
        paths.append(str(tmp_path / f"{len(paths)}.json"))
        Path(paths[-1]).write_text(json.dumps(row))
    assert leaderboard.main(paths) == 0
    figures = "| 0.012 | 512 | 88 % | 50 % | 62 % [49 %, 74 %] | two cores |"
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:2] in ("##", "| ")]
    assert [line for line in lines if not line.startswith(("| plan |", "| --- |"))] == [
        "## m: alice, 180 questions of 2,048 tokens, seed 3, float32, Python not known",
        f"| faster | 2.00x | 2.00x {figures} - | - |",
        f"| p/q | 1.61x | 1.50x {figures} 0123456-dirty | [figures](runs/r.json) |",
        "## a, measured in other ways",
        "| b |",
    ]


def test_columns_that_say_nothing_of_a_plan_are_left_out():
    """Those of the full model alone count if there is no other row."""
    full = {"model": "m", "plan": "the full model", "kl": 0.0, "lambada": 0.3}
    for rows, heads in (
        ([full, {"model": "m", "plan": "p", "kl": 0.1}], "| plan | KL, nats |"),
        ([full], "| LAMBADA |"),
    ):
        assert heads in leaderboard.page(rows)
        assert ("LAMBADA" in leaderboard.page(rows)) == (len(rows) == 1)


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
    path.write_text(json.dumps(ROW | changed))
    assert leaderboard.main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and str(path) in err and err.count("\n") == 1


def test_a_row_comes_from_the_figures_of_a_run(tmp_path, capsys):
    path = tmp_path / "run.json"
    kinds = {"codes 512": (10, 0.5), "quotes-prose 512": (10, 0.2), "quotes-code 512": (30, 0.6)}
    result = json.loads(json.dumps(FIGURES)) | {"commit": "0123456-dirty"}
    result["retrieval"]["rows"]["half"]["kinds"] = {
        name: {"questions": count, "exact": exact, "log_prob": -1.0} for name, (count, exact) in kinds.items()
    }
    path.write_text(json.dumps(result))
    assert leaderboard.main(["--from", str(path), "--plan", "half"]) == 0
    out = capsys.readouterr().out
    row = json.loads(out)
    assert (row["kl"], row["retrieved"], row["kept"]) == (0.05, 0.5, [0.51, 0.41, 0.61])
    assert row["kinds"] == {"codes": 0.5, "quotes": 0.5}
    assert (row["windows"], row["questions"], row["seed"], row["dtype"]) == (24, 180, 3, "float32")
    assert row["texts"] == "a 0123456"
    assert (row["question_tokens"], row["python"], row["run"]) == (512, result["machine"]["python"], "run.json")
    assert row["speedup_2048"] is row["limit_2048"] is None  # it was measured for prompts of 64 tokens
    for limit in (None, 1.61):  # nothing counts the FLOPs of some methods
        result["ttft"]["half"]["limit"] = limit
        path.write_text(json.dumps(result | {"tokens": {"prompt": 2048}}))
        row = leaderboard.row_of(path, "half")
        assert (row["speedup_2048"], row["limit_2048"]) == (1.5, limit)
    few = json.loads(json.dumps(result | {"tokens": {"prompt": 2048}}))
    few["ttft"]["half"]["low"] = None  # too few rounds for an interval
    path.write_text(json.dumps(few))
    assert leaderboard.row_of(path, "half")["speedup_2048"] is None
    result["contenders"]["half"]["is_own"] = True  # its speed says nothing
    path.write_text(json.dumps(result | {"tokens": {"prompt": 2048}}))
    assert leaderboard.row_of(path, "half")["speedup_2048"] is None
    path.with_name("row.json").write_text(out)
    assert leaderboard.main([str(path.with_name("row.json"))]) == 0
    assert "| half | 0.050 | 64 | 50 % |" in capsys.readouterr().out
    result["retrieval"]["rows"]["half"]["share"] = {"value": 1.0, "low": None, "high": None}
    path.write_text(json.dumps(result))
    assert leaderboard.row_of(path, "half")["kept"] is None
    for wrong, says in ((result, "it has full, half"), (result | {"text": {}}, "run.json lacks")):
        path.write_text(json.dumps(wrong))
        assert leaderboard.main(["--from", str(path), "--plan", "third"]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("it with tools.evaluate") == ("lacks" in says)  # one advice
    cells = result["retrieval"]["rows"]["half"]["kinds"]
    cells["codes 1024"] = cells["codes 512"]  # a second length
    path.write_text(json.dumps(result))
    assert leaderboard.main(["--from", str(path), "--plan", "half"]) == 2
    assert "codes 1024; measure with" in capsys.readouterr().err
    result["retrieval"]["rows"]["half"]["kinds"] = {"variables 512": cells["codes 512"]}  # of ruler, and no other
    path.write_text(json.dumps(result))
    assert leaderboard.main(["--from", str(path), "--plan", "half"]) == 2
    assert "has the questions variables 512; measure with" in capsys.readouterr().err
    path.write_text(json.dumps(result | {"unfinished": ["retrieval"]}))
    for command in (leaderboard.main, ["--from", str(path)]), (compare.main, [str(path), "full", "half"]):
        assert command[0](command[1]) == 2
        assert "unfinished: ['retrieval']" in capsys.readouterr().err


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


def test_a_row_leaves_other_kinds_of_questions_out(tmp_path):
    """It is that of a run without them: by the same seed, the same questions are resampled."""
    result = json.loads(json.dumps(FIGURES)) | {"commit": "0123456"}
    rng = np.random.default_rng(0)
    asked = ["codes 512"] * 9 + ["variables 512"] * 7 + ["needle 512"] * 8
    exact = {"full": rng.integers(2, size=24), "half": rng.integers(2, size=24)}
    found = []
    for is_asked in (np.ones(24, bool), np.array([kind != "variables 512" for kind in asked])):
        kinds = np.array(asked)[is_asked]
        for name, values in exact.items():
            row = result["retrieval"]["rows"][name]
            row["exact"] = values[is_asked].mean()
            row["share"] = share_of(values[is_asked], exact["full"][is_asked], seed=result["seed"])
            row["by_question"] = {"kind": kinds.tolist(), "exact": values[is_asked].tolist()}
            row["kinds"] = {
                kind: {"questions": int((kinds == kind).sum()), "exact": values[is_asked][kinds == kind].mean()}
                for kind in dict.fromkeys(kinds.tolist())
            }
        result["retrieval"]["questions"] = len(kinds)
        path = tmp_path / "run.json"
        path.write_text(json.dumps(result))
        found.append(leaderboard.row_of(path, "half"))
    assert found[0] == found[1]
    assert found[0]["questions"] == 17 and {*found[0]["kinds"]} == {"codes", "needle"}


ENDS = ("value", "low", "high")  # of an interval
SPEEDUP = r"\d\.\d\dx( of \d\.\d\dx)?"  # measured, and its limit


def test_the_leaderboard_has_the_plans_that_ship(capsys):
    """Their figures are those of the README."""
    assert leaderboard.main([]) == 0
    out = capsys.readouterr().out
    assert (RESULTS / "PLANS.md").read_text(encoding="utf-8") == out, "python -m tools.results.leaderboard > PLANS.md"
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


SHIPPED = {path.stem for path in (Path(pop.__file__).parent / "data" / "plans").glob("*.plan")}


@pytest.mark.parametrize("weights", ["smollm2", "gemma3"])
def test_limits_of_plans_are_those_of_the_shapes(weights, request):
    """Of the plans that ship, and of plain ones, whose name says how many of the deepest layers they prune."""
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


def test_the_tables_are_those_of_the_run():
    """The first table of tools/results, its kinds of questions, and README's rows of the same plans."""
    result = json.loads((RESULTS / "runs" / "smollm2-135m.json").read_bytes())
    text, answers, ttft = result["text"]["all"]["rows"], result["retrieval"]["rows"], result["ttft"]
    results = rows("tools/results/README.md")
    kinds = [name.partition(" ")[0] for name in answers["full"]["kinds"]]
    assert any(kinds == row[:-1] for row in results)
    for name in [*ttft]:
        shares = [cell["exact"] for cell in answers[name]["kinds"].values()]
        assert [f"{share:.0%}".replace("%", " %") for share in [*shares, answers[name]["exact"]]] in results
        if name == "full":
            continue
        speed = f"{ttft[name]['speedup']:.2f}x of {ttft[name]['limit']:.2f}x"
        kl = f"{text[name]['kl']['value']:.3f}"
        kept = f"{answers[name]['share']['value']:.0%}".replace("%", " %")
        change = f"{text[name]['perplexity_change']['value']:+.1%}".replace("%", " %")
        same = f"{text[name]['same']['value']:.1%}".replace("%", " %")
        assert [speed, change, kl, same, f"{text[name]['kl_first']['value']:.3f}", kept] in results
        if name != "shortgpt 0.1":
            assert [speed, kl, kept] in rows("README.md")
            pairs = list(
                zip(answers["full"]["by_question"]["exact"], answers[name]["by_question"]["exact"], strict=True)
            )
            assert f": {pairs.count((1, 0))} lost, {pairs.count((0, 1))} gained |" in READMES["README.md"]


@pytest.mark.parametrize(
    "run",
    [
        "smollm2-135m-512",
        "smollm2-135m-2048-others",
        "smollm2-135m-unseen",
        "smollm2-135m-unseen-2048",
        "gemma3-270m-512",
    ],
)
def test_kl_and_answers_in_the_tables_are_those_of_the_run(run):
    result = json.loads((RESULTS / "runs" / f"{run}.json").read_bytes())
    text, answers = result["text"]["all"]["rows"], result["retrieval"]["rows"]
    results = rows("tools/results/README.md")
    for name in [*text][1:]:
        pairs = list(zip(answers["full"]["by_question"]["exact"], answers[name]["by_question"]["exact"], strict=True))
        kept = f"{answers[name]['share']['value']:.0%}".replace("%", " %")
        changes = f"{pairs.count((1, 0))}, {pairs.count((0, 1))}"
        wanted = {f"{text[name]['kl']['value']:.3f}", f"{text[name]['kl_first']['value']:.3f}", kept, changes}
        assert any(wanted <= {*row} for row in results), (name, wanted)
        if run.startswith("smollm2-135m-unseen"):
            perplexity = f"{text[name]['perplexity_change']['value']:+.1%}".replace("%", " %")
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
