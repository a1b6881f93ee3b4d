"""The READMEs are true: links exist, Python and commands run as printed, names and options are real.

`python -m tools...` lines are run by tests/tools/test_readme_tools.py, torchrun lines by tests/backends, and what
tools/serve/README.md prints by tests/tools/test_serve.py.
"""

import ast
import copy
import dataclasses
import functools
import inspect
import json
import re
import shlex
import shutil
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from support.chat_templates import QWEN3
from support.compiler import IS_OLD
from support.nightly import NIGHTLY
from support.readme import README, READMES, ROOT, TEXT, blocks, prose
from support.tiny import write_weights
from support.tiny_chat import write_chat_checkpoint
from support.tiny_images import picture
from support.tiny_qwen3_vl import seeing_model

import pop
from pop.calibration import calibrate as calibrate_file
from pop.calibration.held_out import Losses
from pop.checkpoints.config_json import read_config
from pop.cli import main
from pop.cli.parser import parse
from pop.inputs.tokenizers import load_tokenizer
from tools import demo
from tools.evaluate import selection
from tools.evaluate.ruler import RULER

REAL = "smollm2-135m"
# Pages with links and without commands to run.
OTHERS = ("tests/README.md", "tools/results/LOG.md", "tools/results/DECISIONS.md", "tools/results/PLANS.md")
real_load = functools.cache(functools.partial(pop.load, compile=False))  # compiling would take most of the time
read_tokenizer = functools.cache(load_tokenizer)
qwen3_vl = functools.cache(functools.partial(seeing_model, QWEN3))  # stands for any Qwen3 and Qwen3-VL


def changeable(model: pop.Model) -> pop.Model:
    """A model whose weights may be changed."""
    return copy.deepcopy(model, {id(model.tokenizer): model.tokenizer})


@pytest.fixture(scope="module")
def weights(smollm2, tmp_path_factory):
    """SmolLM2, or by default a model as deep, but narrow and of random weights, with its tokenizer."""
    if NIGHTLY:
        return smollm2
    folder = tmp_path_factory.mktemp("weights") / REAL
    shutil.copytree(smollm2, folder, ignore=lambda *_: ["model.safetensors"])
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"hidden_size": 72, "head_dim": 8, "intermediate_size": 96}
    (folder / "config.json").write_text(json.dumps(fields))
    write_weights(folder, read_config(folder), seed=0)
    return folder


def shortened(calibrate, model, texts=None, plan=None, *, steps=200, **options):
    """pop.calibrate, with at most a step on short windows."""
    return calibrate(model, texts, plan, **options | {"steps": min(1, steps), "longest": 300})


def shortened_check(check, model, plan, texts=None, **options):
    """pop.check, with one question of each kind about a short prompt."""
    return check(model, plan, texts, **options | {"lengths": (512,), "questions": 1})


@pytest.fixture
def folder(weights, tmp_path, monkeypatch):
    """A folder to run in, with the files that the READMEs name. Small models stand for those that they load."""
    from PIL import Image

    def load(name, **options):
        if str(name).startswith("qwen3"):
            inspect.signature(pop.load).bind(name, **options)
            return copy.copy(qwen3_vl())
        prune = str(options.get("prune"))
        if name == REAL and prune.startswith(REAL) and not NIGHTLY:  # its corrections fit the real weights only
            options["prune"] = dataclasses.replace(pop.PrunePlan.load(prune), corrections=None)
        if name == REAL:
            name = weights
        return copy.copy(real_load(name, **options))  # a block may set its plan

    monkeypatch.setattr(pop, "load", load)
    monkeypatch.setattr("pop.loading.load_tokenizer", read_tokenizer)
    (tmp_path / "pop").symlink_to(ROOT / "pop", target_is_directory=True)
    (tmp_path / "notes.txt").write_bytes((ROOT / "pop/data/alice.txt").read_bytes())
    for seed, name in enumerate(("cat.jpg", "dog.jpg")):
        Image.fromarray(picture(256, seed)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrate_file, "RIDGES", (1e-2,))  # the search would take most of the time
    monkeypatch.setattr("pop.calibration.texts.PER_INPUT", 1)  # notes.txt suffices
    if not NIGHTLY:
        monkeypatch.setattr("pop.calibration.search.SAMPLES", 4)  # texts on which gates are measured
        monkeypatch.setattr("pop.cli.plans.PROMPT", 600)  # tokens whose prefill is timed
    monkeypatch.setattr(pop, "calibrate", functools.partial(shortened, pop.calibrate))
    monkeypatch.setattr(pop, "check", functools.partial(shortened_check, pop.check))


@pytest.fixture(autouse=True)
def tables_of_evaluate():
    """Its README adds a method and a task, which are here for one test only."""
    kept = [*RULER]
    with patch.dict(selection.BASELINES), patch.dict(selection.TITLES):
        yield
    RULER[:] = kept


def test_the_readme_is_short():
    words = [word for line in prose("README.md").splitlines() if not line.startswith("|") for word in line.split()]
    assert len(words) <= 1600  # without code and tables; move longer texts to the README of a folder


def test_the_line_that_is_the_method_is_the_references():
    (line,) = re.findall(r"^.*# the method$", README, re.M)
    assert line in (ROOT / "pop/pruning/reference.py").read_text(encoding="utf-8")


def test_the_lines_explained_are_the_references_in_order():
    explained = re.findall(r"^\| `(.+?)` \| [^|]+ \|$", READMES["pop/pruning/README.md"], re.M)
    source = (ROOT / "pop/pruning/reference.py").read_text(encoding="utf-8")
    assert len(explained) > 10
    places = [source.find(line) for line in explained]
    assert -1 not in places and places == sorted(places)


@pytest.mark.parametrize("path", READMES)
def test_every_table_is_whole(path):
    """A blank line in a table, or rows that were joined, would be shown as text."""
    without_code = re.sub(r"^```.*?^```", "", READMES[path], flags=re.M | re.S)
    for block in re.findall(r"(?:^\|.*\n)+", without_code, re.M):
        head = block.splitlines()
        assert len(head) > 2 and re.fullmatch(r"\|[-:| ]+\|", head[1]), block
    assert "| |-" not in without_code


@pytest.mark.parametrize("path", [*READMES, *OTHERS])
def test_every_link_leads_to_a_file(path):
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / path).read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        file, _, heading = link.partition("#")
        target = (ROOT / path).parent / file if file else ROOT / path
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            # As GitHub makes them.
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, link


def test_each_promise_names_a_test_that_exists():
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", READMES["pop/README.md"])
    assert len(named) > 20
    for path, name in named:
        assert f"\ndef {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), f"{path}::{name}"


@pytest.mark.parametrize("path", [path for path in READMES if path.startswith("pop/")])
def test_the_readme_of_a_folder_names_all_its_files(path):
    for file in (ROOT / path).parent.glob("[!_]*.py"):
        assert f"]({file.name})" in READMES[path], file.name


@pytest.mark.parametrize("path", [path for path in READMES if blocks("python", path) and "serve" not in path])
def test_the_python_runs_as_printed(path, folder, capsys, monkeypatch):
    """The blocks of a README continue each other, and end by showing something."""
    if "torchao" in READMES[path] and not IS_OLD:
        pytest.importorskip("torchao")
        monkeypatch.setattr(pop, "load", lambda *name, load=pop.load, **options: changeable(load(*name, **options)))
    names = {}
    code = [block for block in blocks("python", path) if not (IS_OLD and "torchao" in block)]
    for number, block in enumerate(code, start=1):
        exec(compile(block, f"{path}, block {number}", "exec"), names)
    assert capsys.readouterr().out.strip() or not code


@pytest.mark.parametrize("path", [path for path in READMES if re.search("^pop ", READMES[path], re.M)])
def test_the_commands_run_as_printed(path, folder, capsys):
    for block in blocks("bash", path):
        for line in block.splitlines():
            if line.startswith("pop "):
                assert main(shlex.split(line, comments=True)[1:]) == 0, line
                assert capsys.readouterr().out.strip(), line


COMMANDS = sorted({line for line in re.findall(r"`pop ([^`]+)`", TEXT) if " " in line})


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_in_the_text_are_ones(line):
    """Their words are understood; other tests run them, with models and files that exist."""
    args = parse(shlex.split(line.replace(" ...", "")))
    assert args.__dict__.get("model", REAL) in (*pop.list_models(), "OWNER/REPOSITORY")


def test_the_python_in_the_text_fits_what_it_names(tmp_path):
    """Names and arguments, that is: other tests check what they do."""
    model = pop.load(write_chat_checkpoint(tmp_path / "chat"))
    scores = pop.Importance(*torch.ones(4, 5, dtype=torch.float64), num_samples=2)
    known = {"pop": pop, "model": model, "chat": model.start_chat(), "scores": scores}
    snippets = re.findall(rf"`((?:{'|'.join(known)})\.[^`]+)`", TEXT)
    assert len(snippets) > 20
    for snippet in snippets:
        code = ast.parse(snippet, mode="eval").body
        called = isinstance(code, ast.Call)
        found = eval(ast.unparse(code.func if called else code), known)
        if called:
            given = [arg for arg in code.args if ast.unparse(arg) != "..."]
            inspect.signature(found).bind_partial(*given, **{word.arg: None for word in code.keywords})


@pytest.mark.parametrize("path", ["pop/generation/README.md", "tools/serve/README.md"])
def test_the_services_of_fastapi_compile(path):
    """They cannot run, because the tests do not need FastAPI."""
    (service,) = (block for block in blocks("", path) if "import fastapi" in block)
    compile(service, "README.md", "exec")


def test_the_extras_in_the_text_are_ones():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    notebook = (ROOT / "tools/examples/tutorial.ipynb").read_text(encoding="utf-8")
    extras = re.findall(r"pip install [^`\n]*(?:pop-prefill|\.)\[([\w,]+)\]'", "\n".join([*READMES.values(), notebook]))
    assert len(extras) > 5 and all(f'"{extra}": ' in setup for extra in ",".join(extras).split(","))


def test_every_file_of_data_is_packaged():
    """setup.py lists patterns of files that are not Python."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    patterns = re.findall(r'"([^"]+)"', re.search(r'package_data=\{"pop": \[(.*?)\]', setup)[1])
    packaged = {path for pattern in patterns for path in (ROOT / "pop").glob(pattern)}
    others = (path for path in (ROOT / "pop").rglob("*.*") if path.suffix not in (".py", ".md", ".pyc"))
    assert set(others) == packaged
    assert ROOT / "pop/py.typed" in packaged


def test_ci_runs_the_two_commands_as_printed():
    lines = [line for block in blocks("bash", "README.md") for line in block.splitlines() if line.startswith("pip ")]
    assert lines == ["pip install -e '.[demo]' && python -m tools.demo", "pip install -e '.[test]' && pytest"]
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert lines[1] in script
    assert "pip install --quiet -e '.[demo]' && python -m tools.demo" in script


def test_the_demo_prints_what_the_readme_shows(smollm2, monkeypatch, capsys):
    """All but the times: these are of a machine that the README names. By default, the losses are not computed.

    The answers of calibrated plans are left out: they turn on the last digits, which differ by machine.
    """
    if not NIGHTLY:
        generation = pop.Generation("", [7], 1, 1.0, 0.0, "length")
        monkeypatch.setattr(pop.Model, "generate", lambda *_, **__: generation)
        judge = SimpleNamespace(losses=lambda plan: Losses(0.0, 0.0, 1.0, 0.0))
        monkeypatch.setattr(demo, "Judge", lambda *_: judge)
    monkeypatch.setattr(sys, "argv", ["demo", "--runs", "1", "--max-new-tokens", "48", "--json"])
    assert demo.main() == 0
    result = json.loads(capsys.readouterr().out)
    rows = result["rows"]
    assert f"{result['prompt_tokens']:,} tokens" in " ".join(READMES["pop/calibration/README.md"].split())
    assert len(rows) == 4
    (shown,) = (block for block in blocks("text") if "\nanswers\n" in block)
    numbers, answers = shown.split("\nanswers\n")
    for row in rows:
        label = row["plan"] + "  "
        (line,) = (line for line in numbers.splitlines() if line.startswith(label))
        *_, speedup, limit, kl, repeated, copied = line.split()
        assert speedup.endswith("x")
        assert limit == f"{row['speedup_limit']:.2f}x"
        if not NIGHTLY:
            continue
        near = {"rel": 0.02 if row["calibrated"] else 0, "abs": 0.001}
        found = (row["kl_nats"], row["repetition_kl_nats"], row["copied"])
        assert (float(kl), float(repeated)) == pytest.approx(found[:2], **near)
        assert float(copied[:-1]) == pytest.approx(100 * found[2], abs=2 if row["calibrated"] else 0.6)
        (line,) = (line for line in answers.splitlines() if line.startswith(label))
        assert row["calibrated"] or line.removeprefix(label).strip() == row["answer"]


def test_the_citation_names_this_version_and_the_paper():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {pop.__version__}\n" in citation
    assert f'version="{pop.__version__}"' in (ROOT / "tools/vllm/setup.py").read_text(encoding="utf-8")
    for text in (citation, README):
        assert "POP: Prefill-Only Pruning for Efficient Large Model Inference" in text
        assert "2602.03295" in text
