"""`pop demo`: one real prompt, prefilled by the whole model and by the pruned one, side by side.

What is measured, and how:

    TTFT        time to first token: from the prompt's token ids to the id of the first new token, without
                tokenization and the allocation of the cache. Full and pruned runs take turns, after an
                untimed one of each; the median is reported, with the fastest and the slowest.
    limit       the speedup that the shapes allow (pop/cost.py); efficiency is the measured speedup over it.
    decode      tokens a second behind the first one. Decode runs the whole model either way.
    KL          KL(full || pruned) = Σ p_full · ln(p_full / p_pruned) over the vocabulary at the first new
                token, in nats. The weights are loaded in float32, so that it is the pruning's alone.

Answers are greedy, so all but the times is the same on every run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from itertools import pairwise, takewhile
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

import pop
from pop import embedded
from pop.cost import prefill_flops, speedup_limit
from pop.errors import check_count

STORY = Path(__file__).parent / "data" / "alice.txt"
QUESTION = "What is the title of Chapter I?"
DECODE_STEPS = 8  # decode's speed is measured over that many tokens a run


def run(name: str, text: str | None, prune, *, max_new_tokens: int, runs: int, as_json: bool) -> None:
    """Fetch and load the model, compare full and pruned prefill, print a report or one JSON object.

    name: a known model, fetched if it is an embedded one that is not there, or a checkpoint directory.
    text: the user message; None takes the story and a question about it. prune: as `pop.load` takes it.
    """
    check_count("max_new_tokens", max_new_tokens)
    check_count("runs", runs)
    about = "the given text"
    if text is None:
        text = f"{STORY.read_text(encoding='utf-8').strip()}\n\nQuestion: {QUESTION}"
        about = f"the opening of Alice's Adventures in Wonderland, and a question: {QUESTION}"
    is_name = name in pop.list_models() or not os.path.isdir(name)
    folder = embedded.fetch(name) if is_name else name
    model = pop.load(folder, dtype=torch.float32, prune=prune)
    prompt = model.chat_tokens([{"role": "user", "content": text}])
    model.check_fits(len(prompt))
    result = {"model": name, "machine": machine(model.device), "num_layers": model.config.num_layers}
    if not as_json:
        print(_introduction(result, model, prompt, about), flush=True)
    result |= compare(model, prompt, max_new_tokens=max_new_tokens, runs=runs)
    print(json.dumps(result, ensure_ascii=False) if as_json else _report(result))


def compare(model, prompt: list[int], *, max_new_tokens: int, runs: int) -> dict:
    """Measure `prompt`, token ids, with a full prefill and with the model's plan: all that --json prints."""
    plans = {"full": pop.PrunePlan.none(), "pruned": model.plan}
    _progress("answering")  # which is also the warm-up
    answers = {side: model.generate(prompt, max_new_tokens=max_new_tokens, plan=plan) for side, plan in plans.items()}
    steps = min(DECODE_STEPS, max_new_tokens - 1, model.max_seq_len - len(prompt))
    cache = model.new_cache(1, len(prompt) + steps)
    ttfts = {side: [] for side in plans}
    step_times = {side: [] for side in plans}
    log_probs = {}
    for number in range(1, runs + 1):
        _progress(f"timing, run {number} of {runs}")
        for side, plan in plans.items():
            ttft, times, logits = _time(model, prompt, cache, plan, steps)
            ttfts[side].append(ttft)
            step_times[side] += times
            log_probs[side] = logits[0].double().log_softmax(-1)
    speedup = median(ttfts["full"]) / median(ttfts["pruned"])
    limit = speedup_limit(model.config, len(prompt), model.plan)
    # kl_div takes its arguments the other way round: (ln q, ln p) gives KL(p || q).
    kl = F.kl_div(log_probs["pruned"], log_probs["full"], log_target=True, reduction="sum").item()
    pairs = zip(answers["full"].tokens, answers["pruned"].tokens, strict=False)
    agreeing = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    result = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "plan": dataclasses.asdict(model.plan),
        "prompt_tokens": len(prompt),
        "runs": runs,
        "speedup": speedup,
        "speedup_limit": limit,
        "efficiency": speedup / limit,
        "kl_nats": max(kl, 0.0),  # rounding can leave a sum just below zero
        "agreeing_tokens": agreeing,
    }
    for side, plan in plans.items():
        result[side] = {
            "prefill_flops": prefill_flops(model.config, len(prompt), plan),
            "ttft_s": median(ttfts[side]),
            "ttft_fastest_s": min(ttfts[side]),
            "ttft_slowest_s": max(ttfts[side]),
            "decode_tokens_per_s": 1 / median(step_times[side]) if steps else None,
            "answer": answers[side].text,
            "answer_tokens": len(answers[side].tokens),
            "finish_reason": answers[side].finish_reason,
        }
    return result


def _time(model, prompt: list[int], cache, plan, steps: int) -> tuple[float, list[float], torch.Tensor]:
    """One run: TTFT in seconds, the seconds of each decode step, and the first token's logits [1, V]."""
    cache.reset()
    times = [time.perf_counter()]
    logits = model.prefill([prompt], cache, plan=plan)
    token = int(logits.argmax())  # waits for the device: on a GPU, too, the work is done here
    times.append(time.perf_counter())
    for _ in range(steps):
        token = int(model.decode([token], cache).argmax())
        times.append(time.perf_counter())
    ttft, *decode = [after - before for before, after in pairwise(times)]
    return ttft, decode, logits


def machine(device: torch.device) -> dict:
    """What the numbers were measured on: the processor or GPU, torch's threads, its version."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _progress(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


# ---- The report ----


def _introduction(result: dict, model, prompt: list[int], about: str) -> str:
    computer, layers = result["machine"], f"{len(model.plan.layers)} of its {result['num_layers']} layers"
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    return f"""\
One prompt, encoded twice: by the whole model, and with {layers} skipped (prefill-only pruning).

model    {result["model"]}, {parameters:,} parameters, in float32, so that the KL below is the pruning's alone
machine  {computer["device"]}, {computer["threads"]} threads, torch {computer["torch"]}
prompt   {len(prompt):,} tokens: {about}
pruned   {_describe(model.plan)}"""


def _describe(plan) -> str:
    if not plan.layers:
        return "nothing"
    first, last = plan.layers[0], plan.layers[-1]
    run = last - first + 1 == len(plan.layers)
    layers = f"{first} to {last}" if run else ", ".join(map(str, plan.layers))
    except_for = f"last {plan.full_depth_last}" if plan.full_depth_last > 1 else "last"
    except_for += f" and the first {plan.full_depth_first}" if plan.full_depth_first else ""
    return f"layers {layers}, counted from 0, for all of the prompt's tokens but the {except_for}"


def _report(result: dict) -> str:
    sides = full, pruned = result["full"], result["pruned"]
    longest = max(side["answer_tokens"] for side in sides)
    spreads = [f"{s['ttft_fastest_s'] * 1e3:,.0f} to {s['ttft_slowest_s'] * 1e3:,.0f}" for s in sides]
    decode_speeds = [s["decode_tokens_per_s"] for s in sides]
    rows = [
        ("", "full prefill", "pruned prefill"),
        ("prompt tokens", *[f"{result['prompt_tokens']:,}"] * 2),
        ("arithmetic, GFLOP", *[f"{s['prefill_flops'] / 1e9:,.1f}" for s in sides]),
        ("time to first token (TTFT)*, ms", *[f"{s['ttft_s'] * 1e3:,.0f}" for s in sides]),
        ("  fastest to slowest, ms", *spreads),
        ("speedup", "", f"{result['speedup']:.2f}x"),
        ("speedup that the shapes allow", "", f"{result['speedup_limit']:.2f}x"),
        ("efficiency: measured / allowed", "", f"{result['efficiency']:.2f}"),
        ("decode (full depth), tokens/s", *[f"{s:.1f}" if s else "-" for s in decode_speeds]),
        ("KL(full || pruned), first token", "", f"{result['kl_nats']:.3f} nats"),
        ("leading tokens that agree", "", f"{result['agreeing_tokens']} of {longest}"),
    ]
    table = "\n".join(f"{label:32}{left:>18}{right:>18}" for label, left, right in rows)
    return f"""
{table}

* median of {result["runs"]} runs each, in turn, after a warm-up; without tokenization and cache allocation

full answer:    {full["answer"].strip()}
pruned answer:  {pruned["answer"].strip()}

Next: `pop chat {result["model"]}`, `pop demo --prune 0.5`, or the ten lines of Python in README.md."""
