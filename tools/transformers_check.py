"""What `python -m tools.transformers_pop --check` does: compare transformers with pop's engine, and time both.

    python -m tools.transformers_pop --check --model smollm2-135m --prune 0.5

Both run the same weights in float32. Logits are compared step by step, over the turns of a chat, in batches of prompts
of different lengths. Their largest difference must be below 1e-4 of their standard deviation, and the greedy texts must
be equal. Times to first token are medians of rounds, in which full and pruned prefills take turns.
"""

from __future__ import annotations

import argparse
import inspect
import random
import time
from collections.abc import Iterator
from contextlib import nullcontext
from statistics import median

import torch

import pop
from pop import PrunePlan
from pop.checkpoints.registry import find_folder
from pop.errors import InputError
from pop.pruning.corrections import Corrections
from tools.common import exit_status, integers_in, table
from tools.transformers_pop import FAMILIES, as_pop, library, pruned

TOLERANCE = 1e-4  # of the logits' standard deviation
STEPS = 4  # tokens of an answer
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA3 = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 14,
}
CHAT = [3, 17, 9], [2, 1, 30]  # the lengths of the rows' first and second messages
EVEN_CHAT = [3, 17, 9], [11, 11, 11]  # where layers have windows, whose places transformers gives to padding between


def tiny(family: str):
    """A random model of a family."""
    transformers, is_gemma = library(), family.startswith("Gemma3")
    config = getattr(transformers, "Gemma3TextConfig" if is_gemma else family.replace("ForCausalLM", "Config"))
    model = getattr(transformers, family)(config(**SIZES, **(GEMMA3 if is_gemma else {})))
    return model.eval().requires_grad_(False)


def plans(twin: pop.Model) -> Iterator[PrunePlan]:
    """A plain plan, one with two groups, and those with random projections: of one and two taps, and of low rank."""
    yield PrunePlan((4, 5))
    D, KE = twin.config.hidden_size, twin.config.num_kv_heads * twin.config.head_dim
    for taps, layers, rank in ((1, (3, 4, 5), None), (2, (1, 2, 4), None), (2, (3, 4, 5), 7)):
        weight = torch.randn(len(layers), 2, KE, rank or taps * D) / (rank or D) ** 0.5
        shared = None if rank is None else torch.randn(1, rank, taps * D) / (taps * D) ** 0.5
        biases = torch.randn(len(layers), 2, KE) / 10
        update = torch.randn(2, D, taps * D) / D if layers == (1, 2, 4) else None  # h is updated after both groups
        projections = Corrections(layers, weight, biases, twin.fingerprint, taps, shared, update)
        yield PrunePlan(layers, full_depth_last=taps, full_depth_first=taps, corrections=projections)


def compare(model, twin: pop.Model, plan: PrunePlan, cache, chat) -> tuple[float, bool]:
    """The largest difference of logits, over their standard deviation, and whether the greedy texts are equal."""
    B, draw = len(chat[0]), random.Random(0)
    name = "cache" if "cache" in inspect.signature(type(model.model).forward).parameters else "past_key_values"
    options = {name: cache, "max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    other = twin.new_cache(B, sum(max(turn) + STEPS for turn in chat))
    answers, masks, worst, same = [[]] * B, [], 0.0, True
    for turn in chat:
        rows = [old + draw.choices(range(3, 97), k=length) for old, length in zip(answers, turn, strict=True)]
        T, lengths = max(map(len, rows)), torch.tensor([len(row) for row in rows])
        left = torch.tensor([[0] * (T - len(row)) + row for row in rows])
        right = torch.tensor([row + [0] * (T - len(row)) for row in rows])
        masks.append((torch.arange(T) >= T - lengths[:, None]).long())
        with pruned(model, plan):
            out = model.generate(left, attention_mask=torch.cat(masks, dim=1), **options)
        answer = out.sequences[:, T:]  # [B, STEPS]
        logits = twin.prefill(right, other, lengths=lengths, plan=plan)
        for step, found in enumerate(out.logits):
            worst = max(worst, ((found - logits).abs().max() / logits.std()).item())
            same &= torch.equal(answer[:, step], logits.argmax(-1))
            if step + 1 < STEPS:  # the last token is encoded with the next turn
                logits = twin.decode(answer[:, step], other)
        answers, masks = answer[:, -1:].tolist(), [*masks, torch.ones(B, STEPS - 1, dtype=torch.long)]
    return worst, same


def check_families() -> bool:
    """Print the largest differences by family, attention and cache. Returns whether all are small enough."""
    caches, rows, passed = library(), [("model", "attention", "cache", "largest difference", "texts")], True
    torch.manual_seed(0)
    for family in FAMILIES:
        model = tiny(family)
        twin, chat = as_pop(model), EVEN_CHAT if family.startswith("Gemma3") else CHAT
        for attention in ("sdpa", "eager"):
            model.set_attn_implementation(attention)
            for kind in ("DynamicCache", "StaticCache"):
                size = {"max_cache_len": 80} if kind == "StaticCache" else {}
                results = [
                    compare(model, twin, plan, getattr(caches, kind)(config=model.config, **size), chat)
                    for plan in plans(twin)
                ]
                worst, same = max(result[0] for result in results), all(result[1] for result in results)
                passed &= same and worst < TOLERANCE
                rows.append((family, attention, kind, f"{worst:.1e}", "equal" if same else "DIFFERENT"))
    print(table(rows, words=(0, 1, 2, 4)))
    return passed


def check_checkpoint(args: argparse.Namespace) -> bool:
    """Compare a real model on random tokens, and print its times. Returns whether the difference is small enough."""
    transformers, folder = library(), find_folder(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    twin, full, clock = as_pop(model), PrunePlan.none(), time.process_time if args.cpu_time else time.perf_counter
    plan = PrunePlan.of(args.prune, twin.config.num_layers)
    worst, same = compare(model, twin, plan, transformers.DynamicCache(config=model.config), ([70, 200], [50, 50]))
    print(f"\n{folder.name}: largest difference {worst:.1e}, texts {'equal' if same else 'DIFFERENT'}")

    def theirs(ids, plan):
        with contexts[plan]:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)

    def ours(ids, plan):
        twin.prefill(ids, twin.new_cache(1, ids.shape[1]), plan=plan)

    contexts = {full: nullcontext(), plan: pruned(model, plan)}
    rows = [("tokens", "transformers, full", "pruned", "speedup", "pop, full", "pruned", "speedup", "ratio")]
    for length in integers_in("--lengths", args.lengths):
        ids, times = torch.randint(3, twin.config.vocab_size, (1, length)), {}
        for _ in range(args.rounds + 1):  # the first one warms up
            for case in ((run, one) for one in (full, plan) for run in (theirs, ours)):
                begin = clock()
                case[0](ids, case[1])
                times.setdefault(case, []).append(clock() - begin)
        a, b, c, d = (median(times[run, one][1:]) for run in (theirs, ours) for one in (full, plan))
        numbers = f"{a:.2f} s", f"{b:.2f} s", f"{a / b:.2f}x", f"{c:.2f} s", f"{d:.2f} s", f"{c / d:.2f}x"
        rows.append((f"{length:,}", *numbers, f"{a / b / (c / d):.2f}"))
    print(table(rows, words=()))
    return same and worst < TOLERANCE


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tools.transformers_pop", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", required=True, help="compare and time")
    parser.add_argument("--model", default="smollm2-135m", help="a model's name or folder, or none: tiny models only")
    parser.add_argument("--prune", default="default", help="a share of the layers or a saved plan, as for pop")
    parser.add_argument("--lengths", default="512,1024,2048", help="prompt lengths to time")
    parser.add_argument("--rounds", type=int, default=5, help="how often each case is timed")
    parser.add_argument("--cpu-time", action="store_true", help="count seconds of the CPU, on a machine that is shared")
    args = parser.parse_args(argv)

    def work():
        if not check_families() or (args.model != "none" and not check_checkpoint(args)):
            raise InputError("transformers and pop differ; the rows above say where")

    return exit_status("tools.transformers_pop", work)
