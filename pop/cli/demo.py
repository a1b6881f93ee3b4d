"""`pop demo`: one prompt, prefilled by the whole model and with pruned layers, side by side.

The rows are the full model, the paper's plan (a third of the layers), and calibrated plans of a third, half and two
thirds of the layers. Calibrated plans run the prompt's last 32 tokens at full depth, and are kept beside the weights.

    TTFT     time to first token: from the prompt's ids to the first new id, without tokenization and without allocating
             the cache. After an untimed turn, the plans take turns. The median is reported.
    limit    the speedup that the shapes allow (pop/pruning/cost.py)
    KL       KL(full || pruned) = Σ p_full · ln(p_full / p_pruned) over the vocabulary, in nats. It is the mean over the
             last third of windows of the story; the first two thirds are the prompt. Weights are in float32.
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
from textwrap import shorten

import torch

import pop
from pop.calibration.refit import JUDGED, Judge
from pop.checkpoints import embedded
from pop.errors import PlanError, check_count
from pop.pruning.cost import prefill_flops, speedup_limit

STORY = Path(__file__).parents[1] / "data" / "alice.txt"
QUESTION = "What is the title of Chapter I?"
DECODE_STEPS = 8  # timed in each run
FRACTIONS = (1 / 3, 1 / 2, 2 / 3)  # of the layers, in calibrated plans
FULL_DEPTH_LAST = 32  # in calibrated plans: enough for the question


def run(name: str, text: str | None, prune, *, max_new_tokens: int, runs: int, as_json: bool) -> None:
    """Load the model, compare prefills, and print a report or one JSON object.

    Args:
        name: a known model, or a checkpoint directory. An embedded model is fetched if its files are missing.
        text: the user's message; None takes the story and a question about it.
        prune: as in `pop.load`. "default" shows the rows named above; anything else shows the full model and that plan,
            plain and calibrated.
        max_new_tokens, runs, as_json: the options of `pop demo`.
    """
    check_count("max_new_tokens", max_new_tokens)
    check_count("runs", runs)
    story = STORY.read_text(encoding="utf-8").strip()
    about = "the given text"
    if text is None:
        text = f"{story}\n\nQuestion: {QUESTION}"
        about = f"the opening of Alice's Adventures in Wonderland, and a question: {QUESTION}"
    is_name = name in pop.list_models() or not os.path.isdir(name)
    folder = embedded.fetch(name) if is_name else name
    model = pop.load(folder, dtype=torch.float32, prune=prune)
    prompt = _prompt(model, text)
    model.check_fits(len(prompt))
    result = {"model": name, "machine": machine(model.device), "num_layers": model.config.num_layers}
    result |= {"dtype": str(model.dtype).removeprefix("torch."), "prompt_tokens": len(prompt), "runs": runs}
    if not as_json:
        print(_introduction(result, model, about), flush=True)
    plans = list(dict.fromkeys([pop.PrunePlan.none(), model.plan]))
    if model.plan.layers and model.plan.projections is None:
        deepest = [pop.PrunePlan.deepest(model.config.num_layers, fraction).layers for fraction in FRACTIONS]
        wanted = [pop.PrunePlan(layers, FULL_DEPTH_LAST) for layers in deepest] if prune == "default" else [model.plan]
        plans += calibrated([plan for plan in dict.fromkeys(wanted) if plan.layers], model, Path(folder))
    result["rows"] = compare(model, prompt, plans, story, max_new_tokens=max_new_tokens, runs=runs)
    print(json.dumps(result, ensure_ascii=False) if as_json else _report(result))


def _prompt(model, text: str) -> list[int]:
    """The text as a question in the chat format; as plain text if the tokenizer lacks a chat template."""
    if model.tokenizer is not None and model.tokenizer.chat_template is None:
        return model.encode(f"{text.strip()}\n\nAnswer:")
    return model.chat_tokens([{"role": "user", "content": text}])


def calibrated(plans: list, model, folder: Path) -> list:
    """The plans, calibrated on the built-in texts: read from `folder`, or made now and kept there."""
    paths = {plan: folder / f"calibrated-{_name(plan)}.plan" for plan in plans}
    kept = {}
    for plan, path in paths.items():
        try:
            loaded = pop.PrunePlan.load(path)
            model.resolve(loaded)
        except PlanError:
            continue  # missing, broken, or made for other weights
        wanted = dataclasses.replace(plan, full_depth_first=max(1, plan.full_depth_first))
        if loaded.projections is not None and dataclasses.replace(loaded, projections=None) == wanted:
            kept[plan] = loaded
    missing = [plan for plan in paths if plan not in kept]
    if missing:
        _progress("calibrating, some minutes, once")
        for plan, result in zip(missing, pop.calibrate(model, None, missing), strict=True):
            kept[plan] = result
            try:
                result.save(paths[plan])
            except PlanError as error:
                _progress(f"calibrated, but not kept: {error}")
    return [kept[plan] for plan in plans]


def _name(plan) -> str:
    """A plan in a file's name, such as 20-29 or 0-3+20-29-last32."""
    groups = [group for pruned, group in plan.groups(max(plan.layers) + 1) if pruned]
    name = "+".join(f"{group[0]}-{group[-1]}" for group in groups)
    name += f"-last{plan.full_depth_last}" if plan.full_depth_last > 1 else ""
    return name + (f"-first{plan.full_depth_first}" if plan.full_depth_first > 1 else "")


def compare(model, prompt: list[int], plans: list, story: str, *, max_new_tokens: int, runs: int) -> list[dict]:
    """Answer a prompt of token ids with each plan, time it, and measure the plan's loss on the story.

    The first plan prunes nothing. Returns a row for each plan.
    """
    _progress("answering")  # also warms up
    answers = [model.generate(prompt, max_new_tokens=max_new_tokens, plan=plan) for plan in plans]
    steps = min(DECODE_STEPS, max_new_tokens - 1, model.max_seq_len - len(prompt))
    cache = model.new_cache(1, len(prompt) + steps)
    ttfts, step_times = [[] for _ in plans], [[] for _ in plans]
    for number in range(1, runs + 1):
        _progress(f"timing, run {number} of {runs}")
        for row, plan in enumerate(plans):
            ttft, *decode = _time(model, prompt, cache, plan, steps)
            ttfts[row].append(ttft)
            step_times[row] += decode
    _progress("measuring the loss")
    tokens = model.encode(story)
    size = min(JUDGED, model.max_seq_len)
    judge = Judge(model, [(tokens[begin : begin + size], []) for begin in range(0, len(tokens) - size + 1, size)])
    rows = []
    for plan, answer, ttft, decode in zip(plans, answers, ttfts, step_times, strict=True):
        pairs = zip(answers[0].tokens, answer.tokens, strict=False)
        row = {
            "layers": list(plan.layers),
            "full_depth_last": plan.full_depth_last,
            "full_depth_first": plan.full_depth_first,
            "taps": plan.projections.taps if plan.projections else None,
            "prefill_flops": prefill_flops(model.config, len(prompt), plan),
            "ttft_s": median(ttft),
            "ttft_fastest_s": min(ttft),
            "ttft_slowest_s": max(ttft),
            "speedup": median(ttfts[0]) / median(ttft),
            "speedup_limit": speedup_limit(model.config, len(prompt), plan),
            "decode_tokens_per_s": 1 / median(decode) if steps else None,
            "kl_nats": max(judge(plan), 0.0),  # rounding can leave a sum just below zero
            "agreeing_tokens": len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))),
            "answer": answer.text,
            "answer_tokens": len(answer.tokens),
            "finish_reason": answer.finish_reason,
        }
        rows.append(row)
    return rows


def _time(model, prompt: list[int], cache, plan, steps: int) -> list[float]:
    """Seconds of the prefill, and then of each decode step."""
    cache.reset()
    times = [time.perf_counter()]
    token = int(model.prefill([prompt], cache, plan=plan).argmax())  # waits for the device
    times.append(time.perf_counter())
    for _ in range(steps):
        token = int(model.decode([token], cache).argmax())
        times.append(time.perf_counter())
    return [end - begin for begin, end in pairwise(times)]


def machine(device: torch.device) -> dict:
    """What the numbers were measured on: the processor or GPU, torch's threads, and its version."""
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


# The report


def _introduction(result: dict, model, about: str) -> str:
    computer = result["machine"]
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    return f"""\
One prompt, encoded by the whole model, and with some of its {result["num_layers"]} layers skipped in prefill only.

model    {result["model"]}, {parameters:,} parameters, in float32, so that the KL below comes from pruning only
machine  {computer["device"]}, {computer["threads"]} threads, torch {computer["torch"]}
prompt   {result["prompt_tokens"]:,} tokens: {about}"""


def describe(row: dict) -> str:
    """How the row's prompt is encoded, in words."""
    layers = row["layers"]
    if not layers:
        return "the whole model"
    consecutive = layers[-1] - layers[0] + 1 == len(layers)
    text = f"without layers {layers[0]} to {layers[-1]}" if consecutive else f"without {len(layers)} layers"
    text += f", last {row['full_depth_last']} tokens whole" if row["full_depth_last"] > 1 else ""
    return text + (", calibrated" if row["taps"] else "")


def _report(result: dict) -> str:
    lines = [("prompt encoded by", "TTFT*, ms", "speedup", "limit", "KL, nats")]
    for row in result["rows"]:
        numbers = [f"{row['ttft_s'] * 1e3:,.0f}", f"{row['speedup']:.2f}x", f"{row['speedup_limit']:.2f}x"]
        lines.append((describe(row), *numbers, f"{row['kl_nats']:.3f}"))
    table = "\n".join(f"{label:58}" + "".join(f"{number:>11}" for number in numbers) for label, *numbers in lines)
    answers = "\n".join(
        f"{describe(row):58}  {shorten(row['answer'], 68, placeholder=' ...')}" for row in result["rows"]
    )
    speeds = [row["decode_tokens_per_s"] for row in result["rows"] if row["decode_tokens_per_s"]]
    decode = f"Decode runs all layers whatever the plan: {median(speeds):.1f} tokens/s here.\n\n" if speeds else ""
    return f"""
{table}

* time to first token, median of {result["runs"]} runs in turn, without tokenization and cache allocation;
  limit: the speedup that the shapes allow; KL(full || pruned): how much the predictions differ from the full model's

answers
{answers}

{decode}Next: `pop chat {result["model"]}`, `pop demo --prune 0.5`, or the ten lines of Python in README.md."""
