"""Random models, plans and batches for property-based tests, and the parts of a run that tests compare."""

import dataclasses
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from support.tiny import random_model, tiny_config, tiny_gemma3_config, tiny_qwen3_config, tiny_qwen3_vl_config

from pop import engine
from pop.engine import forward
from pop.engine.cache import KVCache
from pop.models.config import ExpertsConfig, RopeConfig
from pop.pruning import reference
from pop.pruning.corrections import Corrections
from pop.pruning.plan import PrunePlan

NONE = PrunePlan.none()


def assert_close(actual, expected):
    """To 1e-4 of the scale of the expected values, the bound of the whole suite for float32."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-4 * expected.std(correction=0) + 1e-7


@st.composite
def models(draw):
    """A random model of any family: any head grouping, head width, depth, RoPE; bias and tying; windows."""
    kv_heads, num_layers = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    ropes = st.sampled_from(
        [
            RopeConfig(base=10_000.0),
            RopeConfig(base=500.0, kind="linear", factor=3.0),
            RopeConfig(base=100.0, kind="llama3", factor=8.0, original_max_positions=16),
        ]
    )
    sizes = {
        "hidden_size": draw(st.sampled_from([6, 17, 30])),
        "num_heads": kv_heads * draw(st.integers(1, 3)),
        "num_kv_heads": kv_heads,
        "head_dim": draw(st.sampled_from([2, 6, 10])),
        "rope": draw(ropes),
    }
    family = draw(st.sampled_from(["llama", "gemma3", "qwen3", "qwen3_vl"]))
    if family == "gemma3":
        windows = st.sampled_from([draw(st.sampled_from([1, 2, 5, 9, 100])), None])
        config = tiny_gemma3_config(
            **sizes,
            local_rope=draw(ropes),
            windows=tuple(draw(st.lists(windows, min_size=num_layers, max_size=num_layers))),
        )
    elif family == "qwen3":
        tied, mixture = draw(st.booleans()), draw(experts(num_layers))
        config = tiny_qwen3_config(**sizes, num_layers=num_layers, tie_embeddings=tied, experts=mixture)
    elif family == "qwen3_vl":
        config = qwen3_vl_config(draw, **sizes, num_layers=num_layers, experts=draw(experts(num_layers)))
    else:
        config = tiny_config(
            **sizes,
            num_layers=num_layers,
            tie_embeddings=draw(st.booleans()),
            attention_bias=draw(st.booleans()),
            mlp_bias=draw(st.booleans()),
        )
    return random_model(config, seed=draw(st.integers(0, 9)))


@st.composite
def experts(draw, num_layers):
    """A mixture in any layers, of few experts or many, or None."""
    if draw(st.booleans()):
        return None
    sparse, count = draw(st.sets(st.integers(0, num_layers - 1))), draw(st.sampled_from([1, 4, 40]))
    return ExpertsConfig(count, draw(st.integers(1, min(count, 3))), 9, tuple(sorted(sparse)), draw(st.booleans()))


def qwen3_vl_config(draw, **sizes):
    """A config with any number of DeepStack layers and any shares of rotated pairs for time, row and column."""
    config = tiny_qwen3_vl_config()
    pairs = sizes.get("head_dim", config.head_dim) // 2
    rows, columns = (draw(st.integers(0, (pairs + 2 - axis) // 3)) for axis in (1, 2))
    most = min(sizes["num_layers"], 3)
    vision = dataclasses.replace(
        config.vision,
        out_size=sizes.get("hidden_size", config.hidden_size),
        deepstack=tuple(range(draw(st.integers(0, most)))),
    )
    return tiny_qwen3_vl_config(**sizes, mrope_sections=(pairs - rows - columns, rows, columns), vision=vision)


@st.composite
def plans(draw, config):
    """Any layers and full-depth tokens, half of them with random projections of one or two taps, whole or low-rank."""
    pruned = draw(st.lists(st.booleans(), min_size=config.num_layers, max_size=config.num_layers))
    layers = tuple(index for index, is_pruned in enumerate(pruned) if is_pruned)
    last, selected = draw(st.sampled_from([1, 1, 2, 3, 7, 40])), draw(st.sampled_from([0.0, 0.4, 0.1, 1.0]))
    at = [layer for layer in range(max(layers, default=-1) + 1) if not {layer - 1, layer} <= {*layers}]
    selected = {"full_depth_selected": selected, "selecting_layer": draw(st.sampled_from([None, *at]))}
    if not draw(st.booleans()):
        return PrunePlan(layers, last, draw(st.sampled_from([0, 0, 1, 4])), **selected)
    options = draw(st.integers(0, 10**6)), draw(st.sampled_from([1, 2])), draw(st.sampled_from([None, None, 1, 3, 9]))
    return PrunePlan(layers, last, draw(st.sampled_from([1, 1, 4])), random_refit(config, layers, *options), **selected)


def random_refit(config, layers, seed: int, taps: int, rank: int | None = None, fingerprint: str = "") -> Corrections:
    """Random projections and updates for layers of a model, with inputs and outputs of about the same size.

    seed: also decides after how many of the groups h is updated. -1: after all of them.
    """
    random, inputs = torch.Generator().manual_seed(seed), taps * config.hidden_size
    shape = (len(layers), 2, config.num_kv_heads * config.head_dim, rank or inputs)
    weight = torch.randn(shape, generator=random) / shape[-1] ** 0.5
    bias = 0.1 * torch.randn(shape[:3], generator=random)
    groups = max(1, sum(layer - 1 not in layers for layer in layers))
    shared = None if rank is None else torch.randn(groups, rank, inputs, generator=random) / inputs**0.5
    update = torch.randn(groups, config.hidden_size, shape[-1], generator=random) / shape[-1] ** 0.5
    update = update[: seed % (groups + 1)]
    return Corrections(layers, weight, bias, fingerprint, taps, shared, update if len(update) else None)


def plain(plan, **fields):
    """The plan without projections and selecting layer, with any other field replaced."""
    return dataclasses.replace(plan, corrections=None, selecting_layer=None, **fields)


@st.composite
def batches(draw, vocab_size, max_rows=3, max_tokens=24):
    """A right-padded batch: tokens [B, T] with random padding, lengths [B]."""
    lengths = draw(st.lists(st.integers(1, max_tokens), min_size=1, max_size=max_rows))
    width = max(lengths) + draw(st.integers(0, 3))
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return torch.randint(vocab_size, (len(lengths), width), generator=random), torch.tensor(lengths)


@st.composite
def cases(draw):
    """(module, plan, tokens, lengths, chunk size)"""
    module = draw(models())
    plan = draw(plans(module.config))
    tokens, lengths = draw(batches(module.config.vocab_size))
    return module, plan, tokens, lengths, draw(st.sampled_from([1, 2, 5, 11, 1000]))


def new_cache(module, rows, slots=64, chunk=1000):
    """An empty cache. The smaller the chunk, the sooner layers with a window reuse their slots."""
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "chunk_size": chunk}
    return KVCache(module.config, rows, slots, **options)


def prefill(module, tokens, lengths, plan, chunk=1000, cache=None, full_depth=None, chosen=None):
    """Logits and cache. `chosen` [B, T] replaces what the plan would select."""
    cache = new_cache(module, len(tokens), chunk=chunk) if cache is None else cache
    select = forward.select if chosen is None else lambda *_: chosen
    with patch.object(forward, "select", select):
        return engine.prefill(module, tokens, cache, lengths, plan, chunk, full_depth=full_depth), cache


@contextmanager
def recorded_choices(where=forward):
    """A list of what the engine's prefills, or another file's passes, select meanwhile, each [B, T] bool."""
    found, select = [], where.select
    with patch.object(where, "select", lambda *args: found.append(select(*args)) or found[-1]):
        yield found


def by_position(plan):
    """The plan without selection."""
    return dataclasses.replace(plan, full_depth_selected=0.0)


def prefill_with_choice(module, tokens, lengths, plan, chunk=1000, cache=None):
    """As `prefill`, and also returns which tokens were selected, [B, T] bool.

    Scores can be equal up to rounding, which then decides. So tests compare all else for the engine's choice.
    tests/engine/test_selection.py compares the choice.
    """
    with recorded_choices() as found:
        logits, cache = prefill(module, tokens, lengths, plan, chunk, cache)
    return logits, cache, found[0] if found else torch.zeros(tokens.shape, dtype=torch.bool)


def full_depth_tokens(plan, n, num_tokens, chosen):
    """The reference's, for a prompt of n tokens of which `chosen` [T] were selected."""
    full_depth = reference.full_depth_tokens(n, num_tokens, by_position(plan))
    return by_layer(plan, full_depth, F.pad(chosen[:n], (0, num_tokens - n)))


def by_layer(plan, full_depth, chosen):
    """Which tokens run at full depth, [n, T] for each pruned layer: `full_depth` [T], and `chosen` [T] later on."""
    late = torch.tensor([layer >= plan.selects_at for layer in plan.layers], dtype=torch.bool)
    return full_depth | chosen & late[:, None]


def seen(module, kv):
    """K and V [2, L, N, K, E] that the next token can attend, with zeros where a layer's window does not reach."""
    n = kv.shape[2]
    reaches = [range(n) if layer.window is None else range(max(0, n - layer.window + 1), n) for layer in module.layers]
    return kv * torch.tensor([[position in reach for position in range(n)] for reach in reaches])[..., None, None]


def held(module, cache, row):
    """K and V [2, L, N, K, E] that the cache holds for one row's next token."""
    positions = torch.arange(int(cache.lengths[row]))
    slots = [positions % cache.slots(layer.window) for layer in module.layers]
    kv = [[x[row, at] for x, at in zip(part, slots, strict=True)] for part in (cache.keys, cache.values)]
    return seen(module, torch.stack([torch.stack(part) for part in kv]))


def stacked(kv):
    """A list of each layer's k, v [N, K, E] -> [2, L, N, K, E]."""
    return torch.stack([torch.stack([pair[i] for pair in kv]) for i in (0, 1)])
