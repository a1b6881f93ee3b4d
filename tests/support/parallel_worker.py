"""The program that tests/backends/test_tensor_parallel.py starts: parallel_worker.py FOLDER.

FOLDER has checkpoints, and the cases of 2 and of 4 ranks in cases-N.json. The program forks the ranks, so libraries are
imported once. Each rank writes its results to rank-N-of-SIZE.safetensors, as tensors "case/what".
"""

import faulthandler
import io
import json
import os
import signal
import socket
import sys
import traceback
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from support import fake_captures
from support.nightly import NIGHTLY
from torch._inductor import config as inductor

import pop
from pop import backends, engine, runner
from pop.backends import cuda_graph
from pop.backends.tensor_parallel import end
from pop.checkpoints import weights as checkpoint
from pop.engine import compile
from pop.pruning import selection
from pop.system import memory

PROMPT = [[5, 12, 44, 3, 60, 8, 33, 2, 19], [7, 1, 50, 21, 4, 0, 0, 0, 0]]
LENGTHS = [9, 5]
# For the tiny models with a vision tower: pixels a side of an image, and a prompt.
IMAGE_PROMPTS = {"gemma3": (28, [5, 64, 66, 66, 66, 66, 65, 7]), "qwen3_vl": (256, [5, 63, *[65] * 64, 64, 7])}
STEPS = [[11, 31], [9, 2], [40, 66]]


def run(model: pop.Model) -> dict[str, torch.Tensor]:
    """Everything that a model computes, on fixed tokens. Also called in one process, for comparison."""
    found = {"logits": model.logits([PROMPT[0]])}
    cache = model.new_cache(2, 40)
    with patch.object(model, "chunk_size", 4):
        prefilled = model.prefill(PROMPT, cache, lengths=LENGTHS)
    found["steps"] = torch.stack([prefilled, *(model.decode(step, cache) for step in STEPS)])
    selecting = pop.PrunePlan((1,), full_depth_selected=0.25)
    with patch.object(selection, "POOLED", 1):  # so that it matters which heads attend a token
        found["selected"] = model.prefill([list(range(40))], model.new_cache(1, 40), plan=selecting)
    answers = model.generate([PROMPT[0], PROMPT[1][:5]], max_new_tokens=6)
    sampled = model.generate(PROMPT[0], max_new_tokens=6, temperature=2.0)  # unseeded: each rank would draw its own
    found["tokens"] = torch.tensor([(answer.tokens + [-1] * 6)[:6] for answer in (*answers, sampled)])
    if model.tokenizer is not None:
        chat = model.start_chat("Be brief.")
        chat.send("Hello", max_new_tokens=4)
        next(chat.stream("No", max_new_tokens=4))  # not read to the end, so it does not count
        "".join(chat.stream("And?", max_new_tokens=4))
        answers = model.prefix("Once").generate([" upon", " more"], max_new_tokens=4)
        found["chat"] = torch.tensor(sum((answer.tokens for answer in answers), chat.tokens))
    if hasattr(model.config, "vision") and model.config.vision is not None:
        side, tokens = IMAGE_PROMPTS[model.config.family]
        image = np.random.RandomState(0).randint(0, 256, (side, side, 3), dtype=np.uint8)
        found["images"] = model.prefill([tokens], model.new_cache(1, 80), images=[[image]])
    found["cache"] = torch.tensor([cache.nbytes])
    found["sketch"] = model.sketch
    return found


def compiled(model: pop.Model) -> torch.Tensor:
    """A step of a batch through torch.compile. The nightly run also compiles its calibrated prefill."""
    ready = compile.ReadyStages(model.module, compile=True, required=True)
    ready._renew()
    stages = ready._stages
    cache, tokens, lengths = model.new_cache(2, 16), torch.tensor(PROMPT), torch.tensor(LENGTHS)
    prefill_stages = stages if NIGHTLY else engine.EAGER
    engine.prefill(model.module, tokens, cache, lengths, model.resolve(None), 16, prefill_stages)
    return engine.decode(model.module, torch.tensor([3, 8]), cache, stages)


def corrections(plan: pop.PrunePlan) -> dict[str, torch.Tensor]:
    """What is added to K and V of layers 1, 3 and 4, and to h after layer 1, as products with the states."""
    found = plan.corrections
    shared = found.shared[[0, 1, 1]][:, None]  # [3, 1, R, 2 * D]
    return {"corrections": found.weight @ shared, "update": found.update @ found.shared[:1]}


def captures(folder: Path) -> list:
    """What each decode step of some answers does: it runs, it is captured, or it is replayed. Then the chunk size.

    The model decides as on a GPU. The second rank has so little memory that it could keep no cache for a later answer.
    """
    with patch.object(runner.Runner, "device", torch.device("cuda")):
        model = pop.load(folder / "llama", prune=None, parallel="auto", compile=False, device="cpu")
    model._stages = compile.ReadyStages(model.module, cuda_graph.Graph)
    found = []
    available = f"MemAvailable: {2 * model.new_cache(1, 256).nbytes // 1024} kB\n"
    little_memory = patch.object(memory, "open", lambda *_, **__: io.StringIO(available), create=True)
    with little_memory if dist.get_rank() == 1 else nullcontext(), fake_captures.installed() as fake:
        for fake.refuses in (False, dist.get_rank() == 1):
            letters = []
            for _ in range(2):
                cache = model.caches.take(model, 1, 40)
                model.prefill([[1, 2, 3]], cache)
                for _ in range(10):
                    counts = fake.captures, fake.replays
                    model.decode([5], cache)
                    letters.append({(1, 0): "c", (0, 1): "r", (0, 0): "."}[fake.since(counts)])
                model.caches.give(cache)
            found.append("".join(letters))
        with patch.object(backends, "_is_on_gpu", lambda module: True):
            found.append(backends.chunk_size_of(model.module))
    return found


def compile_or_not(folder: Path) -> list:
    """What a model says of itself before and after its first answer, the answer, and why compiling is refused.

    The second rank has no C++ compiler. The first one needs none.
    """
    if dist.get_rank() == 0:
        torch.compile = partial(torch.compile, backend="eager")
    inductor.cpp.cxx = (None, "/no/compiler")
    inductor.force_disable_caches = True
    runner.SMALLEST_COMPILED = 0
    model = pop.load(folder / "llama", parallel="auto")
    found = [model.compiled, model.generate([1, 2, 3], max_new_tokens=4).tokens, model.compiled]
    try:
        pop.load(folder / "llama", parallel="auto", compile=True).warmup()
    except pop.UnsupportedError as error:
        found.append(str(error))
    return found


def main(folder: Path) -> None:
    read = []
    slices = checkpoint._slices

    def counted(*args):
        for source, target in slices(*args):
            read.append(source.nbytes)
            yield source, target

    checkpoint._slices = counted
    agreed, broadcast = [], dist.broadcast
    dist.broadcast = lambda *args: agreed.append(args) or broadcast(*args)
    found = {}
    size = int(os.environ["WORLD_SIZE"])
    cases = json.loads((folder / f"cases-{size}.json").read_text())

    def run_case(name: str, case: dict) -> None:
        prune = pop.PrunePlan.load(folder / case["plan"]) if "plan" in case else "default"
        read.clear()
        agreed.clear()
        model = pop.load(folder / case["checkpoint"], prune=prune, parallel="auto", compile=False)
        found.update({f"{name}/{what}": tensor.contiguous() for what, tensor in run(model).items()})
        found[f"{name}/read"] = torch.tensor([sum(read)])
        found[f"{name}/agreed"] = torch.tensor([len(agreed)])
        if case.get("compile") and (size == 2 or NIGHTLY):
            found[f"{name}/compiled"] = compiled(model)
        if case.get("calibrate"):
            texts = torch.randint(67, (6, 40), generator=torch.Generator().manual_seed(0)).tolist()
            plan = pop.calibrate(model, texts, pop.PrunePlan((1, 3, 4)), progress=False, steps=0)
            found.update({f"{name}/{what}": tensor for what, tensor in corrections(plan).items()})

    for name, case in cases.items():
        try:
            run_case(name, case)
        except Exception as error:  # the last line of the output says which case it was
            raise RuntimeError(f"{name}, rank {os.environ['RANK']} of {size}: {error}") from error
    rank = dist.get_rank()
    save_file(found, folder / f"rank-{rank}-of-{size}.safetensors")
    if size == 2:
        (folder / f"capturing-{rank}.json").write_text(json.dumps(captures(folder)))
        (folder / f"compiling-{rank}.json").write_text(json.dumps(compile_or_not(folder)))


def start(rank: int, folder: Path) -> int:
    """Fork a rank, and return the process's number."""
    child = os.fork()
    if child == 0:
        os.environ["RANK"] = str(rank)
        faulthandler.dump_traceback_later(120, exit=True)  # a rank that hangs says where, and ends
        try:
            main(folder)
            end()
        except BaseException:
            traceback.print_exc()
            end(1)
    return child


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ |= {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "localhost"}
    inductor.compile_threads = 1  # no pool of processes
    for size in (2, 4):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            os.environ |= {"WORLD_SIZE": str(size), "MASTER_PORT": str(free.getsockname()[1])}
        children = {start(rank, Path(sys.argv[1])) for rank in range(size)}
        while children:
            child, status = os.wait()
            children.remove(child)
            if status:
                for other in children:
                    os.kill(other, signal.SIGKILL)
                sys.exit(1)
