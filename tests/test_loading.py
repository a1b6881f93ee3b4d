"""`pop.load`: from a name or a folder to a model, and what stands in the way."""

import dataclasses
import json
import platform
import subprocess
import sys

import pytest
import torch
from support.cases import random_corrections
from support.goldens import Golden
from support.letters import Letters
from support.plans import contents
from support.tiny import random_model, tiny_config, write_checkpoint, write_weights
from support.tiny_chat import write_chat_checkpoint

import pop
from pop.pruning.corrections import Corrections


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "tiny", seed=4)


def test_a_folder_without_tokenizer_files_loads(folder):
    model = pop.load(folder)
    assert model.tokenizer is None
    assert model.config == tiny_config()
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.plan == pop.PrunePlan.deepest(5, 1 / 3) == pop.PrunePlan((4,))
    expected = random_model(tiny_config(), seed=4)(torch.tensor([[1, 2, 3]]))
    torch.testing.assert_close(model.logits([[1, 2, 3]]), expected)


def test_a_tokenizer_that_cannot_be_read_need_not_be(folder, tmp_path):
    """The error names the ways out: none, and another path."""
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(pop.TokenizerError, match=r"tokenizer=None .*path"):
        pop.load(folder)
    assert pop.load(folder, tokenizer=None).tokenizer is None
    other = write_chat_checkpoint(tmp_path / "other")
    assert pop.load(folder, tokenizer=str(other)).tokenizer.encode("a") == pop.load_tokenizer(other).encode("a")
    letters = Letters()
    assert pop.load(folder, tokenizer=letters).tokenizer is letters
    with pytest.raises(pop.InputError, match="tokenizer is 3"):
        pop.load(folder, tokenizer=3)


def calibrated(folder, layers, **about) -> pop.PrunePlan:
    """A plan with random corrections for the weights in a folder."""
    model = pop.load(folder, prune=None)
    return pop.PrunePlan(layers, 1, 1, random_corrections(model.config, layers, 1, model=model), about=about)


def test_the_default_is_the_best_plan_that_ships_for_the_weights(folder, tmp_path, monkeypatch, capsys):
    """Whether it holds comes first, then how few layers it prunes. The package has plans of others."""
    shipped = tmp_path / "plans"
    shipped.mkdir()
    monkeypatch.setattr("pop.loading.SHIPPED", shipped)
    others = calibrated(write_checkpoint(tmp_path / "other", seed=5), (3, 4))
    others.save(shipped / "other.plan")
    calibrated(write_checkpoint(tmp_path / "deep", seed=4, num_layers=9), (7, 8)).save(shipped / "deep.plan")
    assert pop.load(folder).plan == pop.PrunePlan((4,))
    assert "prefill skips 1 of 5 layers, at most" in capsys.readouterr().err
    steps = [
        ("b", (1, 2, 3), {}),
        ("c", (3, 4), {}),
        ("d", (2,), {"verdict": {"holds": False, "kept": [0.8, 0.7, 0.9]}}),
        ("e", (2, 3, 4), {"verdict": {"holds": True, "kept": [0.98, 0.9, 1.0]}}),
        ("f", (2, 3), {"verdict": {"holds": True, "kept": [0.97, 0.91, 1.0]}}),
    ]
    for name, layers, about in steps:  # each is better than those before
        plan = calibrated(folder, layers, **about)
        plan.save(shipped / f"{name}.plan")
        model = pop.load(folder)
        assert (contents(model.plan), model.plan.name) == (contents(plan), f"{name}.plan")
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"pop: {model}"
        limit = f"at most {plan.speedup(model, 512):.2f}x as fast at 512 tokens"
        assert f"skips {len(layers)} of 5 layers by {name}.plan, {limit}" in line
        assert ("keeps 97% [91%, 100%] of pop check's answers" in line) == (name == "f")
    near = pop.load(folder, progress=False)
    near.sketch *= 1.01
    assert "f.plan" in repr(near) and "answers" not in repr(near)  # nobody has judged these weights
    assert contents(near.plan) == contents(plan)
    assert pop.load(folder, prune="0.2").plan == pop.PrunePlan((4,))
    assert capsys.readouterr().err == ""


def test_the_plan_beside_the_weights_is_the_default(folder, tmp_path, capsys):
    plan = calibrated(folder, (1, 3))
    plan.save(folder / "default.plan")
    assert contents(pop.load(folder).plan) == contents(plan)
    assert "by default.plan" in capsys.readouterr().err
    assert pop.load(folder, prune=None).plan == pop.PrunePlan()
    calibrated(write_checkpoint(tmp_path / "other", seed=5), (1, 3)).save(folder / "default.plan")
    with pytest.raises(pop.PlanError, match=r"default\.plan .*other weights .*pop calibrate"):
        pop.load(folder)
    assert pop.load(folder, prune=0.5).plan == pop.PrunePlan((3, 4))
    (folder / "default.plan").write_text("{")
    with pytest.raises(pop.PlanError, match=r"default\.plan"):
        pop.load(folder)


def test_a_shipped_plan_of_near_weights_is_the_default_with_a_second_line(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "plans").mkdir()
    monkeypatch.setattr("pop.loading.SHIPPED", tmp_path / "plans")
    plan = calibrated(folder, (3, 4))
    sketch = 1.1 * plan.corrections.sketch
    corrections = Corrections(plan.layers, **plan.corrections.tensors, sketch=sketch)
    near = dataclasses.replace(plan, corrections=corrections)
    near.save(tmp_path / "plans" / "near.plan")
    assert contents(pop.load(folder).plan) == contents(near)
    note, line = capsys.readouterr().err.splitlines()
    assert "near.plan was calibrated for weights 9.1% from these" in note and "by near.plan" in line


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"prune": "much"}, pop.PlanError, "plan.*'much'"),
        ({"prune": 1}, pop.PlanError, "plan is 1;.*1.0 for all"),
        ({"prune": 1.5}, pop.PlanError, r"fraction.*1\.5"),
        ({"prune": pop.PrunePlan((5,))}, pop.PlanError, "layer 5.*0 to 4"),
        ({"dtype": "bf16"}, pop.InputError, "dtype.*'bf16'"),
        ({"dtype": torch.float8_e4m3fn}, pop.InputError, r"dtype.*torch\.float8_e4m3fn"),
        ({"device": "abacus"}, pop.InputError, "device.*'abacus'"),
        ({"device": "cuda:99"}, pop.InputError, "device.*'cuda:99'"),
        ({"max_seq_len": 513}, pop.ContextOverflow, "max_seq_len.*513.*512"),
        ({"compile": "always"}, pop.InputError, "compile.*'always'"),
    ],
)
def test_a_bad_option_is_refused_before_weights_are_read(folder, options, error, named, monkeypatch):
    monkeypatch.setattr("pop.loading.load_weights", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises(error, match=named):
        pop.load(folder, **options)


def test_a_model_that_does_not_fit_is_refused_before_weights_are_read(folder, monkeypatch):
    """The message has the bytes of weights, cache and activations, and what is free."""
    model = pop.load(folder, dtype="float32")
    assert model.dtype == torch.float32
    sizes = (4 * model.num_parameters, model.new_cache().nbytes, 4 * 5 * model.config.intermediate_size * 512)
    monkeypatch.setattr("pop.loading.free_bytes", lambda device: sum(sizes))
    assert pop.load(folder, dtype=torch.float32).max_seq_len == 512
    free = sum(sizes) - 1
    monkeypatch.setattr("pop.loading.free_bytes", lambda device: free)
    monkeypatch.setattr("pop.loading.load_weights", lambda *args, **kwargs: pytest.fail("weights were read"))
    named = "weights take {:,} .* 512 tokens takes {:,} .* {:,} for activations, .* {:,} free".format(*sizes, free)
    with pytest.raises(pop.CacheMemoryError, match=named):
        pop.load(folder, dtype=torch.float32)


@pytest.mark.parametrize(("rank", "progress"), [(0, True), (1, False)])
def test_only_the_first_of_several_processes_shows_progress(rank, progress, folder, monkeypatch):
    wanted = []

    def load_weights(*args, progress, **options):
        wanted.append(progress)
        raise pop.CheckpointError("far enough")

    monkeypatch.setattr("pop.loading.join", lambda device: (rank, 2, device))
    monkeypatch.setattr("pop.loading.load_weights", load_weights)
    for choice in (True, False):
        with pytest.raises(pop.CheckpointError, match="far enough"):
            pop.load(folder, parallel="auto", progress=choice)
    assert wanted == [progress, False]


def test_a_known_name_wins_over_a_directory_of_that_name(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "weights/smollm2-135m", num_layers=3)
    write_checkpoint(tmp_path / "smollm2-135m", num_layers=4)
    monkeypatch.setenv("POP_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)
    assert pop.load("smollm2-135m").config.num_layers == 3
    assert pop.load("./smollm2-135m").config.num_layers == 4


def test_the_home_directory_is_expanded(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pop.load("~/tiny").name == "tiny"
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(pop.TokenizerError, match=str(tmp_path / "tokenizer.json")):
        pop.load_tokenizer("~/tokenizer.json")


@pytest.mark.parametrize(
    ("name", "error", "named"),
    [
        *((name, pop.InputError, f"name_or_path is {name!r};") for name in (None, 5, b"bytes", "")),
        ("lama3.1-8b", pop.UnknownModel, "llama3.1-8b"),
        (".", pop.ConfigError, "lacks config.json"),
    ],
)
def test_what_is_no_model_is_refused(name, error, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=named):
        pop.load(name)


def test_gemma_does_not_run_in_float16(tmp_path):
    """Whether the caller asks for it, the checkpoint is of it, or the module was cast by hand."""
    golden = Golden("gemma3/bfloat16")
    single = golden.checkpoint(tmp_path)
    half = tmp_path / "half"
    half.mkdir()
    fields = json.loads((single / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(fields | {"dtype": "float16", "torch_dtype": "float16"}))
    write_weights(half, dataclasses.replace(golden.config, dtype=torch.float16), seed=0)
    for call in (
        lambda: pop.load(single, dtype=torch.float16),
        lambda: pop.load(half),
        lambda: pop.Model(random_model(golden.config).half(), golden.config),
    ):
        with pytest.raises(pop.InputError, match="float16.*gemma3.*bfloat16"):
            call()
    for dtype in (torch.float32, torch.bfloat16):
        assert pop.load(half, dtype=dtype).logits([[1, 2, 3]]).isfinite().all()


CODE = """
import sys
import torch

def state():
    return torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), torch.is_grad_enabled()

before, modules = state(), set(sys.modules)
import pop
pop.load
assert state() == before
heavy = {"transformers", "tokenizers", "huggingface_hub", "gguf", "matplotlib", "PIL", "tqdm", "tiktoken",
         "sentencepiece", "torch._dynamo", "torch._inductor"}
assert not heavy & (set(sys.modules) - modules), heavy & (set(sys.modules) - modules)

from resource import RUSAGE_SELF, getrusage

def run(times):  # what a layer does to memory: blocks that are there together, and then all free
    for _ in range(times):
        blocks = [torch.ones(6 * 2**20, dtype=torch.uint8) for _ in range(4)]
        del blocks

pop.load(sys.argv[1])
run(3)
before = getrusage(RUSAGE_SELF).ru_minflt
run(10)
print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""


def test_importing_pop_loads_little_and_a_loaded_model_keeps_the_memory_of_activations(folder):
    """Importing leaves torch as it was. Of 6144 pages of temporaries, glibc would give all back each time."""
    done = subprocess.run([sys.executable, "-c", CODE, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000 or platform.libc_ver()[0] != "glibc"
