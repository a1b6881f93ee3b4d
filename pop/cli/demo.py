"""`pop demo`: one prompt, prefilled by the whole model and with pruned layers, side by side.

The rows are the full model, the paper's plan (a third of the layers), and calibrated plans of a third, half and two
thirds of the layers. Calibrated plans run the prompt's last 32 tokens at full depth, and are kept beside the weights.
After an untimed turn, the plans take turns. The losses are those of pop/calibration/judge.py, on windows of the story.
"""

import contextlib
import dataclasses
import json
import platform
import re
import sys
import time
from collections.abc import Callable
from itertools import pairwise, takewhile
from pathlib import Path
from statistics import median
from textwrap import shorten

import torch

import pop
from pop.calibration.judge import JUDGED, Judge
from pop.checkpoints import embedded, registry
from pop.errors import PlanError, UnsupportedError, check_count
from pop.pruning.cost import prefill_flops, speedup_limit

STORY = Path(__file__).parents[1] / "data" / "alice.txt"
QUESTION = "What is the title of Chapter I?"
DECODE_STEPS = 8  # timed in each run
FRACTIONS = (1 / 3, 1 / 2, 2 / 3)  # of the layers, in calibrated plans
FULL_DEPTH_LAST = 32  # in calibrated plans: enough for the question


def run(name: str, text: str | None, prune, *, max_new_tokens: int, runs: int, as_json: bool) -> None:
    """Load a model, compare its prefills of the text (None: the story), and print a report or one JSON object.

    The prune "default" shows the rows named above. Any other shows the full model and that plan, plain and calibrated.
    """
    check_count("max_new_tokens", max_new_tokens)
    check_count("runs", runs)
    story = STORY.read_text(encoding="utf-8").strip()
    about = "the given text"
    if text is None:
        text = f"{story}\n\nQuestion: {QUESTION}"
        about = f"the opening of Alice's Adventures in Wonderland, and a question: {QUESTION}"
    folder = embedded.fetch(name) if name in embedded.EMBEDDED else registry.find_folder(name)
    model = pop.load(folder, dtype=torch.float32, prune=prune)
    try:
        prompt = model.chat_tokens([{"role": "user", "content": text}])
    except UnsupportedError:  # a base model, or a chat template that fails
        prompt, about = model.encode(f"{text.strip()}\n\nAnswer:"), f"{about}, as plain text to continue"
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


def calibrated(plans: list, model, folder: Path) -> list:
    """The plans, calibrated on the built-in texts: read from `folder`, or made now and kept there."""
    paths = {plan: folder / f"calibrated-{_name(plan)}.plan" for plan in plans}
    kept = {}
    for plan, path in paths.items():
        with contextlib.suppress(PlanError):  # missing, broken, or made for other weights or layers
            loaded = pop.PrunePlan.load(path)
            model.resolve(loaded)
            first = max(1, plan.full_depth_first)
            wanted = dataclasses.replace(plan, full_depth_first=first, projections=loaded.projections)
            if loaded.projections and loaded == wanted:
                kept[plan] = loaded
    if missing := [plan for plan in paths if plan not in kept]:
        progress("calibrating, some minutes, once")
        for plan, result in zip(missing, pop.calibrate(model, None, missing), strict=True):
            kept[plan] = result
            try:
                result.save(paths[plan])
            except PlanError as error:
                progress(f"calibrated, but not kept: {error}")
    return [kept[plan] for plan in plans]


def _name(plan) -> str:
    """A plan in a file's name, such as 20-29 or 0-3+20-29-last32."""
    groups = [group for pruned, group in plan.groups(max(plan.layers) + 1) if pruned]
    name = "+".join(f"{group[0]}-{group[-1]}" for group in groups)
    name += f"-last{plan.full_depth_last}" if plan.full_depth_last > 1 else ""
    return name + (f"-first{plan.full_depth_first}" if plan.full_depth_first > 1 else "")


def compare(model, prompt: list[int], plans: list, story: str, *, max_new_tokens: int, runs: int) -> list[dict]:
    """A row for each plan: its answer to a prompt of token ids, its times, and its loss on the story.

    The first plan prunes nothing.
    """
    progress("answering")  # also warms up
    answers = [model.generate(prompt, max_new_tokens=max_new_tokens, plan=plan) for plan in plans]
    steps = min(DECODE_STEPS, max_new_tokens - 1, model.max_seq_len - len(prompt))
    cache = model.new_cache(1, len(prompt) + steps)
    ttfts, step_times = [[] for _ in plans], [[] for _ in plans]
    for number in range(1, runs + 1):
        progress(f"timing, run {number} of {runs}")
        for row, plan in enumerate(plans):
            cache.reset()
            ttft, decode = timed(
                lambda plan=plan: int(model.prefill([prompt], cache, plan=plan).argmax()),
                lambda token: int(model.decode([token], cache).argmax()),
                steps,
            )
            ttfts[row].append(ttft)
            step_times[row] += decode
    progress("measuring the loss")
    tokens = model.encode(story)
    size = min(JUDGED, model.max_seq_len)
    judge = Judge(model, [(tokens[begin : begin + size], []) for begin in range(0, len(tokens) - size + 1, size)])
    rows = []
    for plan, answer, ttft, decode in zip(plans, answers, ttfts, step_times, strict=True):
        losses = judge.losses(plan)
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
            "kl_nats": max(losses.continuation, 0.0),  # rounding can leave a sum just below zero
            "repetition_kl_nats": max(losses.repetition, 0.0),
            "copied": losses.copied,
            "agreeing_tokens": len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))),
            "answer": answer.text,
            "answer_tokens": len(answer.tokens),
            "finish_reason": answer.finish_reason,
        }
        rows.append(row)
    return rows


def timed(first: Callable[[], int], step: Callable[[int], int], steps: int) -> tuple[float, list[float]]:
    """Seconds of a prefill, and of each decode step after it, without the allocation of a cache.

    `first` returns the first new token's id, and `step` maps an id to the next. Both return a Python integer, so they
    wait for the device.
    """
    times = [time.perf_counter()]
    token = first()
    times.append(time.perf_counter())
    for _ in range(steps):
        token = step(token)
        times.append(time.perf_counter())
    ttft, *decode = (after - before for before, after in pairwise(times))
    return ttft, decode


def machine(device: torch.device) -> dict:
    """What the numbers were measured on: the processor or GPU, torch's threads, and its version."""
    cpus = Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif cpus.exists() and (found := re.search(r"^model name\s*: (.+)$", cpus.read_text(errors="replace"), re.M)):
        name = found[1]
    else:
        name = platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def progress(text: str) -> None:
    """Tell the user on stderr what happens now."""
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
    """How the prompt of a row is encoded, in words."""
    layers = row["layers"]
    if not layers:
        return "the whole model"
    consecutive = layers[-1] - layers[0] + 1 == len(layers)
    text = f"without layers {layers[0]} to {layers[-1]}" if consecutive else f"without {len(layers)} layers"
    text += f", last {row['full_depth_last']} tokens whole" if row["full_depth_last"] > 1 else ""
    text += f", {share:.0%} of the others selected" if (share := row.get("full_depth_selected", 0)) else ""
    return text + (", calibrated" if row["taps"] else "")


def _report(result: dict) -> str:
    heads = ("TTFT*, ms", "speedup", "limit", "KL, nats", "repeated", "copied")
    table = [f"{'prompt encoded by':58}" + "".join(f"{head:>10}" for head in heads)]
    answers = []
    for row in result["rows"]:
        cells = [f"{row['ttft_s'] * 1e3:,.0f}", f"{row['speedup']:.2f}x", f"{row['speedup_limit']:.2f}x"]
        cells += [f"{row['kl_nats']:.3f}", f"{row['repetition_kl_nats']:.3f}", f"{row['copied']:.0%}"]
        table.append(f"{describe(row):58}" + "".join(f"{cell:>10}" for cell in cells))
        answers.append(f"{describe(row):58}  {shorten(row['answer'], 68, placeholder=' ...')}")
    table, answers = "\n".join(table), "\n".join(answers)
    speeds = [row["decode_tokens_per_s"] for row in result["rows"] if row["decode_tokens_per_s"]]
    decode = f"Decode runs all layers whatever the plan: {median(speeds):.1f} tokens/s here.\n\n" if speeds else ""
    return f"""
{table}

* time to first token, median of {result["runs"]} runs in turn, without tokenization and cache allocation;
  limit: the speedup that the shapes allow; KL(full || pruned): how much the predictions differ from the full model's,
  for text that continues and for a passage of the prompt that is repeated, and the share of its tokens that are copied

answers
{answers}

{decode}Next: `pop chat {result["model"]}`, `pop demo --prune 0.5`, or the ten lines of Python in README.md."""
