"""Load a checkpoint of full size, prefill and decode: time against the disk, memory against the weights, TTFT.

    python -m tools.checkpoints.make_random llama3.1-8b FOLDER
    python -m tools.checkpoints.measure FOLDER --lengths 1024,2048

Disk: the first gigabytes of the weight files are read once, behind the system's back as far as it can be asked to
forget them. Load: `pop.load` of what has been forgotten again. Memory: the high-water mark of the process, from
/proc. Prompts are random token ids; each length is prefilled whole and pruned in turn, behind a short one that is not
timed, without compiling; of several runs the medians count.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median

import torch

import pop
from pop.errors import InputError, PopError, check_count
from pop.pruning.cost import speedup_limit

SAMPLE = 2 * 2**30  # bytes of the files that tell the disk's speed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a checkpoint")
    parser.add_argument("--lengths", default="1024,2048", help="tokens of the prompts (1024,2048)", metavar="N,N")
    parser.add_argument("--prune", type=float, default=1 / 3, help="share of the layers (a third)", metavar="P")
    parser.add_argument("--runs", type=int, default=1, help="timed prefills of each kind (1)", metavar="N")
    parser.add_argument("--decode-steps", type=int, default=4, help="timed steps of decode (4)", metavar="N")
    args = parser.parse_args(argv)
    try:
        lengths = [check_count("--lengths", int(length)) for length in args.lengths.split(",")]
        measure(args.folder, lengths, args.prune, args.runs, args.decode_steps)
    except (PopError, ValueError) as error:
        print(f"measure_checkpoint.py: {error}", file=sys.stderr)
        return 2
    return 0


def measure(folder: Path, lengths: list[int], prune: float, runs: int, steps: int) -> None:
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.pth")])
    if not files:
        raise InputError(f"{folder} holds no weights; make some with tools/checkpoints/make_random.py")
    forget(files)
    speed = read_speed(files)
    print(f"disk     {speed / 1e9:.2f} GB/s", flush=True)

    forget(files)
    before = resident("VmRSS")
    began = time.perf_counter()
    model = pop.load(folder, prune=prune, compile=False, progress=False)
    seconds = time.perf_counter() - began
    weights = sum(weight.nbytes for weight in model.module.parameters())
    print(
        f"load     {seconds:.1f} s, {weights / seconds / 1e9:.2f} GB/s: {weights / seconds / speed:.2f} of the disk's"
    )
    peak = resident("VmHWM") - before
    print(
        f"memory   {peak / 1e9:.2f} GB at most for {weights / 1e9:.2f} GB of weights: {peak / weights:.3f}", flush=True
    )

    random = torch.Generator().manual_seed(0)
    model.prefill(
        torch.randint(model.config.vocab_size, (1, min(64, *lengths)), generator=random), model.new_cache(1, 64)
    )
    for length in lengths:
        tokens = torch.randint(model.config.vocab_size, (1, length), generator=random)
        plans = (pop.PrunePlan.none(), model.plan)
        times = {plan: [] for plan in plans}
        for plan in plans * runs:
            cache = model.new_cache(1, length + steps)
            began = time.perf_counter()
            token = model.prefill(tokens, cache, plan=plan).argmax(-1)
            times[plan].append(time.perf_counter() - began)
        full, pruned = (median(times[plan]) for plan in plans)
        limit = speedup_limit(model.config, length, model.plan)
        print(f"prefill  {length} tokens: {full:.2f} s, {pruned:.2f} s without {len(model.plan.layers)} of the layers")
        print(f"         {full / pruned:.2f}x, of {limit:.2f}x that the shapes allow", flush=True)
    began = time.perf_counter()
    for _ in range(steps):
        token = model.decode(token, cache).argmax(-1)
    print(f"decode   {(time.perf_counter() - began) / steps:.3f} s a token")
    print(f"memory   {(resident('VmHWM') - before) / 1e9:.2f} GB at most, with prefill and decode")


def forget(files: list[Path]) -> None:
    """Ask the system to drop the files from its cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_speed(files: list[Path]) -> float:
    """Bytes per second of plain reading in the files' order."""
    done, began = 0, time.perf_counter()
    buffer = bytearray(2**24)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while done < SAMPLE and (count := stream.readinto(buffer)):
                done += count
    return done / (time.perf_counter() - began)


def resident(name: str) -> int:
    """Bytes of this process in memory: now, VmRSS, or at most so far, VmHWM."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    sys.exit(main())
