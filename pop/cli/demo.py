"""`pop demo`: one prompt, prefilled by the whole model and with pruned layers, side by side.

The rows are the full model, the paper's plan (a third of the layers), and the calibrated plans that ship with the
package. For other models these are plans of a third and of 45 % of the layers, with the prompt's last 32 tokens at full
depth. They are made once, and kept beside the weights. The losses are those of pop/calibration/judge.py, on windows of
the story.

On a CPU the model runs uncompiled: compiling takes longer than a row, and saves a tenth of such a long prefill at most.
"""

import contextlib
import dataclasses
import functools
import json
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import shorten

import torch

import pop
from pop.calibration.held_out import JUDGED, Judge
from pop.checkpoints import embedded, registry
from pop.errors import PlanError, UnsupportedError, check_count
from pop.pruning.cost import prefill_flops, speedup_limit

DATA = Path(__file__).parents[1] / "data"
STORY = DATA / "alice.txt"
QUESTION = "What is the title of Chapter I?"
FRACTIONS = (1 / 3, 0.45)  # of the layers, in calibrated plans
FULL_DEPTH_LAST = 32  # in calibrated plans: enough for the question
CLOSE = 1.05  # two times whose ratio is smaller need no third
WINDOWS = 2  # of the story, for the losses


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
    compile = "auto" if torch.cuda.is_available() else False
    model = pop.load(folder, dtype=torch.float32, prune=prune, compile=compile)
    try:
        prompt = model.chat_tokens([{"role": "user", "content": text}])
    except UnsupportedError:  # a base model, or a chat template that fails
        prompt, about = model.encode(f"{text.strip()}\n\nAnswer:"), f"{about}, as plain text to continue"
    model.check_fits(len(prompt))
    result = {"model": name, "machine": machine(model.device), "num_layers": model.config.num_layers}
    result |= {"dtype": str(model.dtype).removeprefix("torch."), "prompt_tokens": len(prompt), "rows": []}
    show = (lambda text: None) if as_json else functools.partial(print, flush=True)
    show(_introduction(result, model, about))
    show(TABLE)
    plans = plans_to_show(model, prune, Path(folder))
    for row in compare(model, prompt, plans, story, max_new_tokens=max_new_tokens, runs=runs):
        result["rows"].append(row)
        cells = [f"{row['ttft_s'] * 1e3:,.0f}", f"{row['speedup']:.2f}x", f"{row['speedup_limit']:.2f}x"]
        cells += [f"{row['kl_nats']:.3f}", f"{row['repetition_kl_nats']:.3f}", f"{row['copied']:.0%}"]
        show(f"{describe(row):58}" + "".join(f"{cell:>10}" for cell in cells))
    print(json.dumps(result, ensure_ascii=False) if as_json else _conclusion(result))


def plans_to_show(model, prune, folder: Path) -> Iterator[pop.PrunePlan]:
    """Yield the plans of the rows. Calibrated ones come last, and are made no sooner than the first of them is due."""
    yield pop.PrunePlan.none()
    if model.plan.layers:
        yield model.plan
    if model.plan.layers and model.plan.projections is None:
        deepest = [pop.PrunePlan.deepest(model.config.num_layers, fraction).layers for fraction in FRACTIONS]
        wanted = [pop.PrunePlan(layers, FULL_DEPTH_LAST) for layers in deepest] if prune == "default" else [model.plan]
        shipped = shipped_plans(model) if prune == "default" else []
        yield from shipped or calibrated([plan for plan in dict.fromkeys(wanted) if plan.layers], model, folder)


def shipped_plans(model) -> list[pop.PrunePlan]:
    """The plans of the package for these weights, from fewer layers to more."""
    found = map(pop.PrunePlan.load, (DATA / "plans").glob(f"{model.name}-*.plan"))
    plans = [plan for plan in found if plan.projections.fingerprint == model.fingerprint]
    return sorted(plans, key=lambda plan: len(plan.layers))


def calibrated(plans: list, model, folder: Path) -> list:
    """The plans, calibrated on the built-in texts: found ready, or made now and kept in `folder`."""
    ready = {plan: ready_plan(plan, model, folder) for plan in plans}
    if missing := [plan for plan, found in ready.items() if found is None]:
        progress("calibrating, some minutes, once")
        for plan, result in zip(missing, pop.calibrate(model, None, missing), strict=True):
            ready[plan] = result
            try:
                result.save(folder / _file(plan))
            except PlanError as error:
                progress(f"calibrated, but not kept: {error}")
    return [ready[plan] for plan in plans]


def ready_plan(plan: pop.PrunePlan, model, folder: Path) -> pop.PrunePlan | None:
    """The plan, calibrated for these weights, from its file in `folder`, or None."""
    with contextlib.suppress(PlanError):  # missing, broken, or made for other weights or layers
        found = pop.PrunePlan.load(folder / _file(plan))
        model.resolve(found)
        first = max(1, plan.full_depth_first)
        wanted = dataclasses.replace(plan, full_depth_first=first, projections=found.projections)
        return found if found.projections and found == wanted else None


def _file(plan) -> str:
    """The name of a plan's file. Plans that share it replace each other, see `ready_plan`."""
    return f"calibrated-{plan.layers[0]}-{plan.layers[-1]}-last{plan.full_depth_last}.plan"


def compare(model, prompt: list[int], plans: Iterable, story: str, *, max_new_tokens: int, runs: int) -> Iterator[dict]:
    """Yield a row for each plan: its answer to a prompt of token ids, its fastest prefill, and its loss on the story.

    The first plan prunes nothing. A prefill is timed up to `runs` times, until two of the times are close.
    """
    tokens, size = model.encode(story), min(JUDGED, model.max_seq_len)
    windows = [(tokens[begin : begin + size], []) for begin in range(0, len(tokens) - size + 1, size)]
    judge, fields = None, ("full_depth_last", "full_depth_first", "full_depth_selected", "selecting_layer")
    for plan in plans:
        model.generate(prompt[:64], max_new_tokens=2, plan=plan)  # warms up
        answer = model.generate(prompt, max_new_tokens=max_new_tokens, plan=plan)
        times = [answer.ttft_s]
        while len(times) < runs and (len(times) < 2 or times[1] > CLOSE * times[0]):
            times = sorted([*times, model.generate(prompt, max_new_tokens=1, plan=plan).ttft_s])
        if judge is None:
            full_s, judge = times[0], Judge(model, windows[:WINDOWS])
        losses = judge.losses(plan)
        yield {
            "layers": list(plan.layers),
            **{name: getattr(plan, name) for name in fields},
            "taps": plan.projections.taps if plan.projections else None,
            "prefill_flops": prefill_flops(model.config, len(prompt), plan),
            "ttft_s": times[0],
            "runs": len(times),
            "speedup": full_s / times[0],
            "speedup_limit": speedup_limit(model.config, len(prompt), plan),
            "kl_nats": max(losses.continuation, 0.0),  # rounding can leave a sum just below zero
            "repetition_kl_nats": max(losses.repetition, 0.0),
            "copied": losses.copied,
            "answer": answer.text,
            "answer_tokens": len(answer.tokens),
            "finish_reason": answer.finish_reason,
        }


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
    computer, compiled = result["machine"], "" if model.compiled else ", uncompiled"
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    return f"""\
One prompt, encoded by the whole model, and with some of its {result["num_layers"]} layers skipped in prefill only.

model    {result["model"]}, {parameters:,} parameters, in float32, so that the KL below comes from pruning only
machine  {computer["device"]}, {computer["threads"]} threads, torch {computer["torch"]}{compiled}
prompt   {result["prompt_tokens"]:,} tokens: {about}"""


def describe(row: dict) -> str:
    """How the prompt of a row is encoded, in words."""
    layers = row["layers"]
    if not layers:
        return "the whole model"
    consecutive = layers[-1] - layers[0] + 1 == len(layers)
    text = f"without layers {layers[0]} to {layers[-1]}" if consecutive else f"without {len(layers)} layers"
    last, share = row["full_depth_last"], row.get("full_depth_selected")
    text += f", last {last} {f'and {share:.0%}' if share else 'tokens'} whole" if last > 1 or share else ""
    return text + (", calibrated" if row["taps"] else "")


HEADS = ("TTFT*, ms", "speedup", "limit", "KL, nats", "repeated", "copied")
TABLE = f"\n{'prompt encoded by':58}" + "".join(f"{head:>10}" for head in HEADS)


def _conclusion(result: dict) -> str:
    answers = [f"{describe(row):58}  {shorten(row['answer'], 68, placeholder=' ...')}" for row in result["rows"]]
    answers = "\n".join(answers)
    return f"""
* time to first token, of the fastest run; limit: the speedup that the shapes allow; KL(full || pruned): how much the
  predictions differ from the full model's, for text that continues and for a passage of the prompt that is repeated,
  and the share of its tokens that are copied; a percentage in a row's name: tokens that the prompt's end attends to

answers
{answers}

Decode runs all layers, whatever the plan.

Next: `pop chat {result["model"]}`, `pop demo --prune 0.5`, or the ten lines of Python in README.md."""
