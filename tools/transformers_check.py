"""What `python -m tools.transformers_pop --check` does: compare transformers with pop's engine, and time both.

    python -m tools.transformers_pop --check --model smollm2-135m --prune 0.5

Both run the same weights in float32. Logits are compared step by step, over the turns of a chat, in batches of prompts
of different lengths. Their largest difference must be below 1e-4 of their standard deviation, and the greedy texts must
be equal. Times to first token are medians of rounds, in which full and pruned prefills take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import random
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from statistics import median

import torch

import pop
from pop import PrunePlan
from pop.checkpoints.registry import find_folder
from pop.errors import InputError, UnsupportedError
from pop.pruning.corrections import Corrections
from tools.common import exit_status, integers_in, table
from tools.transformers_pop import FAMILIES, STATIC, as_pop, library, pruned

TOLERANCE = 1e-4  # of the logits' standard deviation
STEPS = 4  # tokens of an answer
RANK = 7  # of random corrections
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
GREEDY = {
    "max_new_tokens": STEPS,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}
# Options of generate that would encode a prompt in parts, or take several new tokens for a prompt.
REFUSED = {
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 2,
    "prefill_chunk_size": 8,
    "cache_implementation": "paged",
    "custom_generate": print,
}
CHAT = [3, 17, 9], [2, 1, 30]  # the lengths of the rows' first and second messages
# For layers with windows: transformers counts padding between messages as places in the window.
EVEN_CHAT = [3, 17, 9], [11, 11, 11]


def tiny(family: str):
    """A random model of a family."""
    transformers, _ = library()
    if family.startswith("Gemma3"):
        config = transformers.Gemma3TextConfig(**SIZES, **GEMMA3)
    else:
        config = getattr(transformers, family.replace("ForCausalLM", "Config"))(**SIZES)
    return getattr(transformers, family)(config).eval().requires_grad_(False)


def plans(twin: pop.Model) -> Iterator[PrunePlan]:
    """Plain plans, and some with random corrections: of a single group, and with updates of h after two groups.

    Some select tokens: before all pruned layers, or between two groups.
    """
    yield PrunePlan((4, 5))
    yield PrunePlan((2, 3, 5), full_depth_selected=0.3, selecting_layer=4)
    yield _calibrated(twin, (3, 4, 5), num_groups=1, num_updates=0)
    updating = _calibrated(twin, (1, 2, 4), num_groups=2, num_updates=2)
    yield updating
    yield dataclasses.replace(updating, full_depth_below=18)  # the chats' first turns are shorter
    yield dataclasses.replace(updating, full_depth_selected=0.2)
    yield dataclasses.replace(updating, full_depth_selected=0.4, selecting_layer=3)


def _calibrated(twin: pop.Model, layers: tuple[int, ...], num_groups: int, num_updates: int) -> PrunePlan:
    D = twin.config.hidden_size
    KE = twin.config.num_kv_heads * twin.config.head_dim
    corrections = Corrections(
        layers,
        weight=torch.randn(len(layers), 2, KE, RANK) / RANK**0.5,
        shared=torch.randn(num_groups, RANK, 2 * D) / (2 * D) ** 0.5,
        update=torch.randn(num_updates, D, RANK) / RANK**0.5 if num_updates else None,
        sketch=twin.sketch[list(layers)],
    )
    return PrunePlan(layers, full_depth_last=2, full_depth_first=2, corrections=corrections)


class Chat:
    """The turns of a chat with random tokens, padded on the left for transformers and on the right for pop.

    Args:
        lengths: The lengths of the rows' messages, for each turn.
    """

    def __init__(self, lengths):
        self.lengths = lengths
        self.num_rows = len(lengths[0])
        self.ids = torch.zeros(self.num_rows, 0, dtype=torch.long)  # of all turns so far, as generate takes them
        self.mask = self.ids  # of their padding
        self._random = random.Random(0)

    def turns(self) -> Iterator[list[list[int]]]:
        """The rows of each message."""
        for turn in self.lengths:
            yield [self._random.choices(range(3, 97), k=length) for length in turn]

    def append(self, rows: list[list[int]]) -> None:
        """Extend ids and mask by rows, padded on the left."""
        T = max(map(len, rows))
        ids = torch.tensor([[0] * (T - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])
        self.ids = torch.cat((self.ids, ids), dim=1)
        self.mask = torch.cat((self.mask, mask), dim=1)

    def right(self, rows: list[list[int]]) -> torch.Tensor:
        """The rows [B, T], padded on the right."""
        T = max(map(len, rows))
        return torch.tensor([row + [0] * (T - len(row)) for row in rows])


def compare(model, twin: pop.Model, plan: PrunePlan, cache, lengths) -> tuple[float, bool]:
    """The largest difference of logits, over their standard deviation, and whether the greedy texts are equal."""
    chat = Chat(lengths)
    is_new_name = "cache" in inspect.signature(type(model.model).forward).parameters
    options = GREEDY | {"cache" if is_new_name else "past_key_values": cache}
    other = twin.new_cache(chat.num_rows, sum(max(turn) + STEPS for turn in lengths))
    last = [[] for _ in range(chat.num_rows)]  # each answer's last token is encoded with the next message
    worst = 0.0
    same = True
    for message in chat.turns():
        rows = [token + tokens for token, tokens in zip(last, message, strict=True)]
        chat.append(rows)
        with pruned(model, plan):
            out = model.generate(chat.ids, attention_mask=chat.mask, **options)
        answer = out.sequences[:, chat.ids.shape[1] :]  # [B, STEPS]
        row_lengths = torch.tensor([len(row) for row in rows])
        other.skipped.fill_(-1)  # `pruned` selects among the new tokens only
        logits = twin.prefill(chat.right(rows), other, lengths=row_lengths, plan=plan)
        for step, found in enumerate(out.logits):
            difference = (found - logits).abs().max() / logits.std()
            worst = max(worst, difference.item())
            same &= torch.equal(answer[:, step], logits.argmax(-1))
            if step + 1 < STEPS:
                logits = twin.decode(answer[:, step], other)
        last = answer[:, -1:].tolist()
        chat.append(answer[:, :-1].tolist())
    return worst, same


def compare_beams(model, twin: pop.Model, plan: PrunePlan) -> float:
    """The largest difference of the log-likelihoods of texts that beam search has found."""
    ids = torch.randint(3, SIZES["vocab_size"], (2, 20))
    count = 3
    beams = {"num_beams": count, "num_return_sequences": count, "length_penalty": 0.0, "output_scores": True}
    with pruned(model, plan):
        found = model.generate(ids, **GREEDY, **beams)
    answer = found.sequences[:, ids.shape[1] :]  # [2 * count, STEPS]
    cache = twin.new_cache(len(answer), found.sequences.shape[1])
    logits = twin.prefill(ids.repeat_interleave(count, dim=0), cache, plan=plan)
    score = torch.zeros(len(answer))
    for token in answer.T:
        score += logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        logits = twin.decode(token, cache)
    return (found.sequences_scores - score).abs().max().item()


def check_refusals(model, plan: PrunePlan) -> None:
    """Raise InputError unless each call is refused in which some tokens would look like a prompt."""
    ids = torch.ones(1, 9, dtype=torch.long)
    with pruned(model, plan):
        calls = {name: partial(model.generate, ids, **{name: value}) for name, value in REFUSED.items()}
        calls["assistant_model"] = partial(model.generate, ids, assistant_model=model)
        calls["generate_batch"] = partial(model.generate_batch, [[3, 4, 5]])
        calls["labels"] = partial(model, ids, None, None, None, None, ids)
        for name, call in calls.items():
            try:
                call()
            except UnsupportedError:
                continue
            raise InputError(f"pruned took {name}, which it must refuse")


def check_families() -> bool:
    """Print the largest differences by family, attention and cache. Returns whether all are small enough."""
    transformers, version = library()
    caches = ("DynamicCache", "StaticCache") if version >= STATIC else ("DynamicCache",)
    rows = [("model", "attention", "cache", "largest difference", "texts")]
    passed = True
    torch.manual_seed(0)
    for family in FAMILIES:
        model = tiny(family)
        twin = as_pop(model)
        lengths = EVEN_CHAT if family.startswith("Gemma3") else CHAT
        for attention, kind in product(("sdpa", "eager"), caches):
            model.set_attn_implementation(attention)
            size = {"max_cache_len": 80} if kind == "StaticCache" else {}
            worst = 0.0
            same = True
            for plan in plans(twin):
                cache = getattr(transformers, kind)(config=model.config, **size)
                difference, is_same = compare(model, twin, plan, cache, lengths)
                worst = max(worst, difference)
                same &= is_same
            passed &= same and worst < TOLERANCE
            rows.append((family, attention, kind, f"{worst:.1e}", "equal" if same else "DIFFERENT"))
        check_refusals(model, plan)
        worst = max(compare_beams(model, twin, plan) for plan in plans(twin))
        passed &= worst < TOLERANCE
        rows.append((family, attention, "of beams", f"{worst:.1e}", ""))
    print(table(rows, words=(0, 1, 2, 4)))
    return passed


def check_checkpoint(args: argparse.Namespace) -> bool:
    """Compare a real model on random tokens, and print its times. Returns whether the difference is small enough."""
    transformers, _ = library()
    folder = find_folder(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    twin = as_pop(model)
    plan = PrunePlan.of(args.prune, twin.config.num_layers)
    cache = transformers.DynamicCache(config=model.config)
    worst, same = compare(model, twin, plan, cache, ([70, 200], [50, 50]))
    print(f"\n{folder.name}: largest difference {worst:.1e}, texts {'equal' if same else 'DIFFERENT'}")
    clock = time.process_time if args.cpu_time else time.perf_counter
    rows = [("tokens", "transformers, full", "pruned", "speedup", "pop, full", "pruned", "speedup", "ratio")]
    for length in integers_in("--lengths", args.lengths):
        ids = torch.randint(3, twin.config.vocab_size, (1, length))
        rows.append((f"{length:,}", *time_prefills(model, twin, plan, ids, args.rounds, clock)))
    print(table(rows, words=()))
    return same and worst < TOLERANCE


def time_prefills(model, twin: pop.Model, plan: PrunePlan, ids: torch.Tensor, rounds: int, clock) -> list[str]:
    """Times of full and pruned prefills in turn, by transformers and by pop, as cells of a table."""
    context = pruned(model, plan)

    def theirs():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)

    def theirs_pruned():
        with context:
            theirs()

    def ours():
        twin.prefill(ids, twin.new_cache(1, ids.shape[1]), plan=PrunePlan.none())

    def ours_pruned():
        twin.prefill(ids, twin.new_cache(1, ids.shape[1]), plan=plan)

    cases = (theirs, theirs_pruned, ours, ours_pruned)
    times = {case: [] for case in cases}
    for _ in range(rounds + 1):  # the first one warms up
        for case in cases:
            begin = clock()
            case()
            times[case].append(clock() - begin)
    seconds = [median(times[case][1:]) for case in cases]
    their_speedup = seconds[0] / seconds[1]
    our_speedup = seconds[2] / seconds[3]
    return [
        f"{seconds[0]:.2f} s",
        f"{seconds[1]:.2f} s",
        f"{their_speedup:.2f}x",
        f"{seconds[2]:.2f} s",
        f"{seconds[3]:.2f} s",
        f"{our_speedup:.2f}x",
        f"{their_speedup / our_speedup:.2f}",
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("tools.transformers_pop", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", required=True, help="compare and time")
    parser.add_argument("--model", default="smollm2-135m", help="a model's name or folder, or none: tiny models only")
    parser.add_argument("--prune", default="third", help="a share of the layers or a saved plan, as for pop")
    parser.add_argument("--lengths", default="512,1024,2048", help="prompt lengths to time")
    parser.add_argument("--rounds", type=int, default=5, help="how often each case is timed")
    parser.add_argument("--cpu-time", action="store_true", help="count seconds of the CPU, on a machine that is shared")
    args = parser.parse_args(argv)

    def work():
        if not check_families() or (args.model != "none" and not check_checkpoint(args)):
            raise InputError("transformers and pop differ; the rows above say where")

    return exit_status("tools.transformers_pop", work)
