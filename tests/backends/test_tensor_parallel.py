"""Tensor parallelism: several processes compute what one computes, and end when one of them dies."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.compiler import requires_compiler, requires_new_torch
from support.goldens import GOLDENS
from support.nightly import NIGHTLY
from support.parallel_worker import LENGTHS, PROMPT, corrections, run
from support.readme import READMES, blocks
from support.tiny import tiny_config, tiny_olmo2_config, write_weights
from support.tiny_chat import write_chat_checkpoint

import pop
from pop import backends
from pop.backends.tensor_parallel import Part, join
from pop.checkpoints.config_json import read_config
from pop.checkpoints.registry import lookup
from pop.cli import main
from pop.engine.cache import KVCache
from tools.checkpoints.make_random import config_of

VISION = ("vision_tower.", "multi_modal_projector.", "model.visual.")  # how names in vision towers begin
WORKER = Path(__file__).parents[1] / "support" / "parallel_worker.py"
# Awkward sizes: the MLP and the vocabulary do not divide evenly. In "llama", each rank has its own K/V heads, or shares
# one. In "tied", four ranks hold two copies of each K/V head, and the head is the embedding. The norms of q and k in
# "olmo2" span the heads of all ranks, which include copies of K/V heads.
CONFIGS = json.loads((GOLDENS / "parallel.json").read_bytes())
CASES = {
    **{name: {"checkpoint": name} for name in CONFIGS},
    "calibrated": {"checkpoint": "llama", "plan": "plan", "calibrate": True, "compile": True},
    "conversation": {"checkpoint": "chat"},
}
# By number of processes. Four take long; what two cannot show is more than one head that has copies.
RUNS = {2: [*CASES], 4: [*CASES] if NIGHTLY else ["tied", "calibrated"]}
TEXTS = torch.randint(67, (6, 40), generator=torch.Generator().manual_seed(0)).tolist()
LAYERS = pop.PrunePlan((1, 3, 4))
TORCHRUN = [re.sub(r"\\\n *", "", block).strip() for block in blocks("bash") if block.startswith("torchrun ")]
TABLE = re.findall(
    r"^\| (llama3\.1-\S+) \| (\d+) \| (.*?) \| (.*?) \| (.*?) \|$", READMES["pop/backends/README.md"], re.M
)


def start(command: list, **variables) -> subprocess.Popen:
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    command = [str(word) for word in command]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    for name, fields in CONFIGS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        write_weights(folder / name, read_config(folder / name), seed=1)
    write_chat_checkpoint(folder / "chat", num_heads=8, num_kv_heads=4)
    pop.calibrate(pop.load(folder / "llama"), TEXTS, LAYERS, progress=False, steps=0).save(folder / "plan")
    for size, names in RUNS.items():
        cases = {name: CASES[name] for name in names}
        (folder / f"cases-{size}.json").write_text(json.dumps(cases), encoding="utf-8")
    ran = start([sys.executable, WORKER, folder])
    said = ran.communicate(timeout=300)[1]  # in each of two runs, a rank that hangs ends after 120 s
    assert ran.returncode == 0, said[-4000:]
    return folder


@pytest.fixture(scope="module", params=RUNS)
def ranks(request, folder):
    """What each of several processes got."""
    size = request.param
    return [load_file(folder / f"rank-{rank}-of-{size}.safetensors") for rank in range(size)]


def test_several_processes_compute_what_one_computes(ranks, folder):
    """Logits, tokens, images and conversations. Among themselves, they agree bit for bit."""
    for name in RUNS[len(ranks)]:
        case = CASES[name]
        prune = pop.PrunePlan.load(folder / case["plan"]) if "plan" in case else "default"
        expected = run(pop.load(folder / case["checkpoint"], prune=prune))
        for found in (_of(name, rank) for rank in ranks):
            for what in {"logits", "steps", "selected", "images", "sketch"} & expected.keys():
                named = f"{name}, {what}: {{}}".format
                torch.testing.assert_close(found[what], expected[what], rtol=0, atol=2e-5, msg=named)
            for what in {"logits", "steps", "selected", "tokens", "sketch"}:  # the last row of tokens is sampled
                assert torch.equal(found[what], _of(name, ranks[0])[what]), (name, what)
            if "chat" in expected:
                assert torch.equal(found["chat"], expected["chat"]), name
            assert torch.equal(found["tokens"][:2], expected["tokens"][:2]), name
            batches = 6 if name == "conversation" else 2
            agreed = found["agreed"].item()
            assert agreed == batches, f"{name}: the ranks agreed on seeds {agreed} times, and not once for each batch"


def test_a_rank_holds_and_reads_its_part(ranks, folder):
    """The cache of its heads, and its rows or columns of each matrix. The rest is whole on every rank."""
    N = len(ranks)
    for name in [name for name in CONFIGS if name in RUNS[N]]:
        config = read_config(folder / name)
        held = max(1, config.num_kv_heads // N)  # K/V heads of each rank
        slots = sum((40 if window is None else min(40, window - 1 + 2048)) + 1 for window in config.windows)
        cache = 2 * 4 * (2 * slots * held * config.head_dim + (config.num_layers + 1) * config.hidden_size)
        expected = 0
        for key, weight in load_file(folder / name / "model.safetensors").items():
            vision = key.startswith(VISION)
            # The norms of q and k in OLMo-2 are as wide as the projections.
            matrix = key.replace("_norm", "_proj") if name == "olmo2" else key
            whole = matrix.endswith(("o_proj.bias", "down_proj.bias", "mlp.gate.weight")) or "norm" in matrix
            if ".k_proj" in matrix or ".v_proj" in matrix:
                expected += weight.nbytes * (1 if vision else held / config.num_kv_heads)
            else:
                expected += weight.nbytes / (1 if vision or whole else N)
        for found in (_of(name, rank) for rank in ranks):
            assert found["cache"].item() == cache, name
            assert found["read"].item() == pytest.approx(expected, rel=0.03), name  # 67 tokens, 46 wide: no even shares


def test_several_processes_calibrate_and_compile_as_one_does(ranks, folder):
    """The corrections and the updates are compared, since other codes may give the same ones. Two ranks compile."""
    plan = pop.PrunePlan.load(folder / "plan")
    model = pop.load(folder / "llama", prune=plan)
    cache = model.new_cache(2, 16)
    model.prefill(PROMPT, cache, lengths=LENGTHS)
    step = model.decode([3, 8], cache)
    for found in (_of("calibrated", rank) for rank in ranks):
        for name, tensor in corrections(plan).items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)
        if NIGHTLY or len(ranks) == 2:
            torch.testing.assert_close(found["compiled"], step, rtol=0, atol=2e-5)


def test_a_number_of_processes_that_does_not_divide_the_heads_is_refused(folder):
    with pytest.raises(pop.InputError, match="8 query heads"):
        Part(tiny_config(num_heads=8, num_kv_heads=4), 0, 3)
    with pytest.raises(pop.InputError, match="3 key-value heads"):
        Part(tiny_config(num_heads=6, num_kv_heads=3), 0, 2)
    with pytest.raises(pop.InputError, match="parallel is 2"):
        pop.load(folder / "llama", parallel=2)


@requires_new_torch  # torch 2.8 prints lines of Gloo's as well
@pytest.mark.parametrize("line", TORCHRUN if NIGHTLY else TORCHRUN[:1], ids=lambda line: line.split()[1])
def test_the_readmes_lines_print_once_what_one_process_prints(line, tmp_path, monkeypatch, capsys):
    """With a tiny model under the given name, two processes, and this machine instead of two machines."""
    monkeypatch.setenv("POP_WEIGHTS", str(tmp_path))
    options, _, words = line.partition("-m pop ")
    words = shlex.split(words)
    write_chat_checkpoint(tmp_path / words[1])
    words += ["--max-new-tokens", "5"]
    assert main(words) == 0
    expected = capsys.readouterr().out
    two = "--nnodes 2" in options
    options = options.replace("FIRST_MACHINE:29500", f"localhost:{free_port()}").replace(
        "node 8", f"node {1 if two else 2}"
    )
    command = [sys.executable, "-m", "torch.distributed.run", *shlex.split(options)[1:], "-m", "pop", *words]
    started = [start(command) for _ in range(1 + two)]
    outputs = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0] * len(started), outputs
    assert sorted(out for out, _ in outputs) == sorted(["", expected][-len(started) :])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chat", "llama"], "torchrun"),
        (["calibrate", "llama"], "torchrun"),
        (["generate", "llama", "-"], "standard input"),
    ],
)
def test_what_needs_one_process_is_refused(words, said, folder, monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    assert main([words[0], str(folder / words[1]), *words[2:]]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def alone(monkeypatch):
    """What `join` asks of torch in the first of two processes that torchrun has started, on a machine with two GPUs.

    The group that it gets has one process.
    """
    asked, init = {}, dist.init_process_group
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name, value in {"is_available": lambda: True, "device_count": lambda: 2}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(device=device))
    monkeypatch.setattr("atexit.register", lambda function: asked.update(at_exit=function))

    def stand_in(backend, **options):
        asked.update(options, backend=backend)
        init("gloo", store=dist.HashStore(), rank=0, world_size=1)

    monkeypatch.setattr(dist, "init_process_group", stand_in)
    yield asked
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_group_is_made_for_the_device(alone):
    """NCCL's on GPUs. The second time, it is there already."""
    gpu = torch.device("cuda", 0)
    assert join(None) == (0, 1, gpu)
    assert (alone["backend"], alone["device_id"], alone["device"]) == ("nccl", gpu, gpu)
    alone.clear()
    assert join("cuda:1") == (0, 1, torch.device("cuda:1"))
    assert alone == {"device": torch.device("cuda:1")}
    dist.destroy_process_group()
    alone.clear()
    assert join("cpu") == (0, 1, "cpu")
    assert (alone["backend"], alone["device_id"]) == ("gloo", None)
    assert "device" not in alone


def test_a_process_without_a_gpu_of_its_own_is_refused(alone, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(pop.InputError, match="process 3 of a machine with 2 GPUs"):
        join(None)


@requires_compiler
def test_all_processes_compile_or_none(folder):
    """The second one cannot. Both generate what one eager process does, and both refuse if compiling is required."""
    expected = pop.load(folder / "llama").generate([1, 2, 3], max_new_tokens=4).tokens
    for rank, reason in enumerate(("another process cannot compile", "/no/compiler")):
        *found, refusal = json.loads((folder / f"compiling-{rank}.json").read_text())
        assert found == [True, expected, False]
        assert "cannot be compiled here" in refusal and reason in refusal


def test_all_processes_replay_the_same_graph_or_none(folder):
    """Two answers of ten steps each, which run (.), are captured (c) or replayed (r). NCCL hangs if processes differ.

    The captures are a stand-in's. The second process has too little memory to keep a cache, with its captured step, for
    the next answer. So none is kept in the first one, and chunks are equal. At last, the second one cannot capture.
    """
    for rank in range(2):
        found = json.loads((folder / f"capturing-{rank}.json").read_text())
        assert found == [".......crr" * 2, ".......c" + "." * 12, backends.CUDA_CHUNK_SIZE]


FAILING = """
import os, sys, time
import torch.distributed as dist
import pop
from pop.backends.tensor_parallel import end
from pop.generation.batch import Batch
from pop.generation.sampling import SamplingParams
dist.destroy_process_group = lambda: time.sleep(600)  # as with NCCL, while another process waits in a collective
model = pop.load(sys.argv[1], parallel="auto")
params = SamplingParams(max_new_tokens=400)
for count, _ in enumerate(Batch(model, [[1, 2, 3]], [[]], params, model.resolve(None), 0.0).steps()):
    if model.part.rank == 1 and count == 5:
        print(f"failed at {time.time()}", file=sys.stderr, flush=True)
        if sys.argv[2] == "killed":
            os.kill(os.getpid(), 9)
        if sys.argv[2] == "ended":
            end(2)
        raise RuntimeError("broken on purpose")
"""


ENDS = {"killed": "Signal 9", "raised": "on purpose", "ended": "exitcode"}


@pytest.mark.parametrize("how", ENDS if NIGHTLY else ["raised"])
def test_a_rank_that_fails_ends_the_others(how, folder, tmp_path):
    """Within seconds, although they wait for its sums during a generation."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    ran = start([*torchrun, script, folder / "llama", how])
    try:
        said = ran.communicate(timeout=200)[1]
    except subprocess.TimeoutExpired:
        pytest.fail("torchrun has not ended after 200 s; if a rank has failed, see `end`")
    finally:
        ran.terminate()  # torchrun ends the others
    assert ran.returncode != 0
    assert ENDS[how] in said
    assert time.time() - float(re.search(r"failed at (\S+)", said)[1]) < 20


def test_the_norm_of_keys_is_cut_as_the_keys_are():
    """Four ranks hold two copies of each of OLMo-2's two K/V heads, so two of them hold the same half of the norm."""
    config = tiny_olmo2_config(num_heads=4, num_kv_heads=2)
    cut = []
    for rank in range(4):
        part = Part(config, rank, 4)
        part.build()
        attention = "model.layers.0.self_attn."
        keys = part.shards[f"{attention}k_proj.weight"].share
        assert part.shards[f"{attention}k_norm.weight"].share == keys
        cut.append(keys)
    assert len(set(cut)) == 2


@pytest.mark.parametrize("row", TABLE, ids=[" ".join(row[:2]) for row in TABLE])
def test_the_readmes_bytes_per_device(row, tmp_path):
    """All matrices are cut, norms are whole, and with more devices than K/V heads, K and V are copied."""
    name, devices, *shown = row[0], int(row[1]), *row[2:]
    (tmp_path / "config.json").write_text(json.dumps(config_of(name)), encoding="utf-8")
    config = read_config(tmp_path)
    part = Part(config, devices - 1, devices)  # no other has more
    found = 2 * sum(parameter.numel() for parameter in part.build().parameters())
    short = KVCache.size_in_bytes(part.config, 1, 8192, torch.bfloat16)
    long = KVCache.size_in_bytes(part.config, 1, config.max_positions, torch.bfloat16)
    assert [f"{size / 1e9:.2f} GB" for size in (found, short, long)] == shown
    D, E, K, L = config.hidden_size, config.head_dim, config.num_kv_heads, config.num_layers
    norms, kv = (2 * L + 1) * D, L * 2 * D * K * E
    assert found == 2 * ((lookup(name).parameters - norms - kv) / devices + kv / min(devices, K) + norms)
    assert short == 4 * L * E * max(1, K // devices) * 8193 + 2 * (L + 1) * D


def _of(name: str, rank: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A rank's results in one case."""
    return {key.partition("/")[2]: tensor for key, tensor in rank.items() if key.partition("/")[0] == name}
