"""Is an agent's tenth turn still fast and still right? One conversation, at full depth and with plans.

    python -m tools.examples.agent_trace --engine pop          # or transformers, or vllm

Each turn brings a tool's output, which is public-domain text with a code on one line, and asks for the code.
The turns before are in a cache. After a turn, the right answer goes into the history, whatever the model has said. So
every plan and every engine reads the same tokens. An answer is exact if greedy decoding gives each of its tokens.

An engine is a function from a checkpoint's folder and the length of the trace to `converse`, a generator:

    converse(trace, plan) -> Reply, Reply, ...                 # one for each turn, on a cache that begins empty
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import accumulate, cycle, islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

import pop
from pop.calibration.questions import COLOURS, THINGS
from pop.checkpoints.config_json import read_config
from pop.checkpoints.registry import find_folder
from pop.errors import ContextOverflow, InputError, MissingExtra, check_count
from tools import transformers_pop
from tools.common import ROOT, Countdown, exit_status, integers_in, machine, table

TEXTS = ROOT / "tools" / "evaluate" / "texts"  # no plan was fitted to these
PLANS = ["smollm2-135m-third", "smollm2-135m-14"]
WIDTH = 70  # letters of a line
CODES = 1  # lines with a code in an output


class Turn(NamedTuple):
    """Token ids: a tool's output with a question, and the answer."""

    prompt: list[int]
    answer: list[int]


class Reply(NamedTuple):
    """What an engine does in a turn.

    Args:
        seconds: Wall-clock time from the prompt's token ids to the first new token.
        cached: How many tokens of the history are in the cache.
        tokens: The greedy tokens, as many as the answer has.
    """

    seconds: float
    cached: int
    tokens: list[int]


Converse = Callable[[list[Turn], pop.PrunePlan], Iterator[Reply]]


# ---- The trace ----


def make_trace(tokenizer, turns: int, least: int, most: int, seed: int) -> list[Turn]:
    """Turns whose outputs have about `least` to `most` tokens. Most of them are short."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, bos=False)

    rng = random.Random(seed)
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted(TEXTS.glob("*.txt")))
    lines = textwrap.wrap(text, WIDTH)
    begin = rng.randrange(len(lines))
    lines = cycle(lines[begin:] + lines[:begin])
    names = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
    rng.shuffle(names)
    names = cycle(names)
    sizes = [least + (most - least) * (turn / max(turns - 1, 1)) ** 4 for turn in range(turns)]
    rng.shuffle(sizes)
    head = tokenizer.encode("", bos=True)
    trace = []
    for number, size in enumerate(sizes, start=1):
        codes = {name: rng.randrange(10_000, 100_000) for name in islice(names, CODES)}
        facts = [f"The code of the {name} is {code}." for name, code in codes.items()]
        output = []
        length = len(encode("\n".join(facts)))
        while length < size:
            output.append(next(lines))
            length += len(encode(f"{output[-1]}\n"))
        for fact in facts:
            output.insert(rng.randint(0, len(output)), fact)
        asked = rng.choice([*codes])
        question = f"Question: What is the code of the {asked}?\nAnswer: The code of the {asked} is"
        prompt = "\n".join([f"Output of tool call {number}:", *output, "", question])
        trace.append(Turn(head + encode(prompt), encode(f" {codes[asked]}")))
        head = encode("\n\n")
    return trace


# ---- The engines ----


def pop_engine(folder: Path, length: int) -> Converse:
    compile = "auto" if torch.cuda.is_available() else False
    model = pop.load(folder, dtype=torch.float32, prune=None, compile=compile, progress=False)

    def converse(trace, plan):
        plan = model.resolve(plan)
        cache = model.new_cache(1, length)
        for prompt, answer in trace:
            cached = int(cache.lengths[0])
            began = time.perf_counter()
            first = int(model.prefill([prompt], cache, plan=plan).argmax())
            seconds = time.perf_counter() - began
            others = model.extend([answer], cache)[0, :-1].argmax(-1)
            yield Reply(seconds, cached, [first, *others.tolist()])

    return converse


def transformers_engine(folder: Path, length: int) -> Converse:
    transformers, _ = transformers_pop.library()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def converse(trace, plan):
        cache = transformers.DynamicCache(config=model.config)

        def next_token(tokens: list[int]) -> int:
            return int(model(torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1).logits.argmax())

        with transformers_pop.pruned(model, plan) if plan.layers else nullcontext():
            for prompt, answer in trace:
                cached = cache.get_seq_length()
                began = time.perf_counter()
                first = next_token(prompt)
                seconds = time.perf_counter() - began
                tokens = [first, *(next_token([token]) for token in answer)]
                yield Reply(seconds, cached, tokens[:-1])

    return converse


def vllm_engine(folder: Path, length: int) -> Converse:
    if None in (find_spec("vllm"), find_spec("pop_vllm")):
        raise MissingExtra("--engine vllm needs vLLM and the plugin; tools/vllm/README.md says how to install them")
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "POP_PLAN": "none",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    from pop_vllm.prefix_cache import limit_hits
    from vllm import LLM, SamplingParams

    options = {"max_model_len": length, "max_num_batched_tokens": length, "kv_cache_memory_bytes": 1 << 30}
    llm = LLM(str(folder), dtype="float32", enforce_eager=True, block_size=32, disable_log_stats=False, **options)

    def converse(trace, plan):
        llm.apply_model(lambda module: module.use(plan))
        limit_hits(llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager, plan)
        llm.reset_prefix_cache()
        history = []
        for prompt, answer in trace:
            history += prompt
            params = SamplingParams(temperature=0, max_tokens=len(answer), ignore_eos=True, detokenize=False)
            (output,) = llm.generate({"prompt_token_ids": history}, params, use_tqdm=False)
            yield Reply(output.metrics.first_token_latency, output.num_cached_tokens, [*output.outputs[0].token_ids])
            history += answer

    return converse


ENGINES = {"pop": pop_engine, "transformers": transformers_engine, "vllm": vllm_engine}


# ---- The table ----


def report(trace: list[Turn], plans: dict[str, pop.PrunePlan], rounds: dict[str, list[list[Reply]]]) -> str:
    """The table. rounds: by plan, the replies of each conversation."""
    added = [len(turn.prompt) + len(turn.answer) for turn in trace]
    ends = [end - len(turn.answer) for end, turn in zip(accumulate(added), trace, strict=True)]
    rows = [["turn", "tokens", "new"]]
    rows += [[str(n), f"{end:,}", f"{len(trace[n - 1].prompt):,}"] for n, end in enumerate(ends, start=1)]
    rows.append(["all", f"{sum(added):,}", f"{sum(len(turn.prompt) for turn in trace):,}"])
    for name, plan in plans.items():
        times = [1000 * median(reply.seconds for reply in replies) for replies in zip(*rounds[name], strict=True)]
        replies = rounds[name][0]
        pruned = [plan.num_pruned(end, reply.cached) for end, reply in zip(ends, replies, strict=True)]
        encoded = [end - reply.cached for end, reply in zip(ends, replies, strict=True)]
        exact = [reply.tokens == turn.answer for reply, turn in zip(replies, trace, strict=True)]
        cells = [[f"{name}, ms", "pruned", "exact"]]
        for ms, skipped, tokens, is_exact in zip(times, pruned, encoded, exact, strict=True):
            cells.append([f"{ms:,.0f}", f"{skipped / tokens:.0%}", "yes" if is_exact else "no"])
        cells.append([f"{sum(times):,.0f}", f"{sum(pruned) / sum(encoded):.0%}", f"{sum(exact)} of {len(exact)}"])
        rows = [row + more for row, more in zip(rows, cells, strict=True)]
    return table(rows, words=())


def run(args: argparse.Namespace) -> str:
    turns = check_count("--turns", args.turns)
    number_of_rounds = check_count("--rounds", args.rounds)
    sizes = integers_in("--tokens", args.tokens)
    if len(sizes) != 2 or not 0 < sizes[0] <= sizes[1]:
        raise InputError(f"--tokens is {args.tokens!r}; write the least and the most of an output, as in 500,1500")
    folder = find_folder(args.model)
    config = read_config(folder)
    given = {name: pop.PrunePlan.of(name, config.num_layers) for name in args.prune or PLANS}
    plans = {"full depth": pop.PrunePlan.none()} | given
    trace = make_trace(pop.load_tokenizer(folder), turns, *sizes, args.seed)
    length = sum(len(prompt) + len(answer) for prompt, answer in trace)
    if length > config.max_positions:
        limit = f"the model's context has {config.max_positions:,}"
        raise ContextOverflow(f"the trace has {length:,} tokens, but {limit}; give fewer --turns or smaller --tokens")
    converse = ENGINES[args.engine](folder, length)
    for plan in plans.values():
        list(converse(trace[:1], plan))  # warms up
    rounds = {name: [] for name in plans}
    step = Countdown("conversation", number_of_rounds * len(plans))
    for _ in range(number_of_rounds):
        for name, plan in plans.items():
            step()
            rounds[name].append(list(converse(trace, plan)))
    is_on_cpu = args.engine == "transformers" or not torch.cuda.is_available()
    computer = machine(torch.device("cpu" if is_on_cpu else "cuda"))
    title = f"{args.engine}, {computer['device']}, {computer['threads']} threads, torch {computer['torch']}"
    return f"{title}\n\n{report(trace, plans, rounds)}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.examples.agent_trace", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--engine", choices=ENGINES, default="pop", help="what runs the conversation (pop)")
    add("--model", default="smollm2-135m", help="a name in `pop models`, or a directory (smollm2-135m)")
    add("--prune", action="append", help=f"a plan to compare with full depth, repeatable ({', '.join(PLANS)})")
    add("--turns", type=int, default=10, help="turns of the conversation (10)")
    add("--tokens", default="500,1500", help="the least and the most tokens of an output (500,1500)")
    add("--seed", type=int, default=0, help="the seed of the trace (0)")
    add("--rounds", type=int, default=1, help="conversations of each plan, whose median times are shown (1)")
    args = parser.parse_args()

    return exit_status("agent_trace", lambda: print(run(args)))


if __name__ == "__main__":
    sys.exit(main())
