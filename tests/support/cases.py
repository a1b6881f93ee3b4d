"""Random models, plans and batches for property-based tests, and the parts of a run that tests compare."""

import dataclasses
from contextlib import contextmanager
from unittest.mock import patch

import torch
from hypothesis import strategies as st
from support.tiny import (
    random_model,
    tiny_config,
    tiny_gemma3_config,
    tiny_olmo2_config,
    tiny_qwen3_config,
    tiny_qwen3_vl_config,
)

from pop import engine
from pop.engine import two_phases
from pop.engine.cache import KVCache
from pop.models.config import ExpertsConfig, RopeConfig
from pop.models.images import TEXT
from pop.pruning import reference
from pop.pruning.corrections import Corrections
from pop.pruning.plan import PrunePlan
from pop.pruning.sketch import SKETCH_SIZE

NONE = PrunePlan.none()
FAMILIES = {
    "llama": tiny_config,
    "gemma3": tiny_gemma3_config,
    "qwen3": tiny_qwen3_config,
    "qwen3_vl": tiny_qwen3_vl_config,
    "olmo2": tiny_olmo2_config,
}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected, where=""):
    """To 1e-4 of the scale of the expected values, the bound of the whole suite for float32. An error says `where`."""
    assert actual.shape == expected.shape
    errors = (actual - expected).abs()
    error = errors.max().item()
    allowed = max(1e-4 * expected.std(correction=0).item(), 1e-7)
    place = tuple(map(int, torch.unravel_index(errors.argmax(), errors.shape)))
    assert error <= allowed, f"{where} values differ by up to {error:.2g}, at {place}, but {allowed:.2g} is allowed"


@st.composite
def models(draw, families=FAMILIES):
    """A random model of one of the families: any head grouping, head width, depth, RoPE; bias and tying; windows."""
    kv_heads = draw(st.integers(1, 3))
    num_layers = draw(st.integers(1, 6))
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
    family = draw(st.sampled_from(sorted(families)))
    if family == "gemma3":
        windows = st.sampled_from([draw(st.sampled_from([1, 2, 5, 9, 100])), None])
        sizes["local_rope"] = draw(ropes)
        sizes["windows"] = tuple(draw(st.lists(windows, min_size=num_layers, max_size=num_layers)))
    else:
        sizes["num_layers"] = num_layers
    if family in ("llama", "qwen3", "olmo2"):
        sizes["tie_embeddings"] = draw(st.booleans())
    if family in ("llama", "olmo2"):
        sizes["attention_bias"] = draw(st.booleans())
    if family == "llama":
        sizes["mlp_bias"] = draw(st.booleans())
    if family in ("qwen3", "qwen3_vl"):
        sizes["experts"] = draw(experts())
    config = qwen3_vl_config(draw, **sizes) if family == "qwen3_vl" else FAMILIES[family](**sizes)
    return random_model(config, seed=draw(st.integers(0, 9)))


@st.composite
def experts(draw):
    """A mixture of few experts or many, or None."""
    if draw(st.booleans()):
        return None
    count = draw(st.sampled_from([1, 4, 40]))
    return ExpertsConfig(count, draw(st.integers(1, min(count, 3))), 9)


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
    """Any layers, full-depth tokens and selecting layer, half of them with random corrections."""
    pruned = draw(st.lists(st.booleans(), min_size=config.num_layers, max_size=config.num_layers))
    layers = tuple(index for index, is_pruned in enumerate(pruned) if is_pruned)
    last = draw(st.sampled_from([1, 1, 2, 3, 7, 40]))
    kept = [layer for layer in range(max(layers, default=-1)) if layer not in layers]
    default = [] if 0 in layers else [None]
    fields = {"full_depth_below": draw(st.sampled_from([0, 0, 0, 9]))}
    if kept or default:
        fields["full_depth_selected"] = draw(st.sampled_from([0.0, 0.4, 0.1, 1.0]))
        fields["selecting_layer"] = draw(st.sampled_from([*default, *kept]))
    if not layers or not draw(st.booleans()):
        return PrunePlan(layers, last, draw(st.sampled_from([0, 0, 1, 4])), **fields)
    seed = draw(st.integers(0, 10**6))
    corrections = random_corrections(config, layers, seed, draw(st.sampled_from([1, 3, 9, 30])))
    return PrunePlan(layers, last, draw(st.sampled_from([1, 1, 4])), corrections, **fields)


def random_corrections(config, layers, seed: int, rank: int = 9, model=None) -> Corrections:
    """Random corrections and updates for layers of a model, with codes and outputs of about the size of the inputs.

    model: whose weights they are for. None: the engine and the reference do not look.
    """
    random = torch.Generator().manual_seed(seed)
    D, KE = config.hidden_size, config.num_kv_heads * config.head_dim
    weight = torch.randn(len(layers), 2, KE, rank, generator=random) / rank**0.5
    groups = max(1, sum(layer - 1 not in layers for layer in layers))
    shared = torch.randn(groups, rank, 2 * D, generator=random) / (2 * D) ** 0.5
    num_updates = groups - (layers[-1] + 1 == config.num_layers)
    update = torch.randn(num_updates, D, rank, generator=random) / rank**0.5
    sketch = torch.zeros(len(layers), 2, SKETCH_SIZE) if model is None else model.sketch[list(layers)]
    return Corrections(layers, weight, shared, update if num_updates else None, sketch=sketch)


def plain(plan, **fields):
    """The plan without corrections and selection, with any other field replaced."""
    return dataclasses.replace(plan, corrections=None, selecting_layer=None, full_depth_selected=0.0, **fields)


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


def prefill(module, tokens, lengths, plan, chunk=1000, cache=None):
    """Logits and cache."""
    cache = new_cache(module, len(tokens), chunk=chunk) if cache is None else cache
    return engine.prefill(module, tokens, cache, lengths, plan, chunk), cache


@contextmanager
def recorded_choices(where=two_phases):
    """A list of what the engine's prefills, or another file's passes, select meanwhile, each [B, T] bool.

    In a later prompt it is [B, N + T], with the last N tokens before the prompt.
    """
    found, select = [], where.select
    with patch.object(where, "select", lambda *args: found.append(select(*args)) or found[-1]):
        yield found


def by_position(plan):
    """The plan without selection."""
    return dataclasses.replace(plan, full_depth_selected=0.0)


def prefill_with_choice(module, tokens, lengths, plan, chunk=1000, cache=None):
    """As `prefill`, and also returns which tokens were selected, [B, T] bool, or in a later prompt [B, N + T].

    Scores can be equal up to rounding, which then decides. So tests compare all else for the engine's choice.
    tests/engine/test_selection.py compares the choice.
    """
    with recorded_choices() as found:
        logits, cache = prefill(module, tokens, lengths, plan, chunk, cache)
    return logits, cache, found[0] if found else torch.zeros(tokens.shape, dtype=torch.bool)


def by_reference(module, tokens, plan, n, chosen):
    """The reference's logits [T, V], K and V for a prompt of n tokens [T], of which `chosen` [N] were selected."""
    full_depth = reference.full_depth_tokens(n, len(tokens), plan)
    return with_chosen(module, tokens, full_depth, plan, chosen[:n])


def turns_by_reference(module, plan, turns, images=TEXT):
    """The reference's logits [T, V], K and V for a conversation of turns (prompt, answer), each [N] ids."""
    tokens = []
    full_depth = []
    for prompt, answer in turns:
        boundary = len(tokens) + len(prompt) - plan.full_depth_last
        positions = range(len(tokens), len(tokens) + len(prompt) + len(answer))
        full_depth += [at < plan.full_depth_first or at >= boundary for at in positions]
        tokens += [*prompt, *answer]
    return reference.forward(module, torch.tensor(tokens), torch.tensor(full_depth), plan, images)


def hidden_by_reference(module, tokens, plan, n, chosen, layer):
    """The h [T, D] of the same tokens, as it enters a layer."""
    full_depth = reference.full_depth_tokens(n, len(tokens), plan)
    chosen = chosen[:n] if chosen.any() else None
    return reference.run_layers(module, tokens, full_depth, plan, selected=chosen, stop=layer)[0][0]


def with_chosen(module, tokens, full_depth, plan, chosen, images=TEXT):
    """reference.forward, in which `chosen` [T] were selected, perhaps none."""
    return reference.forward(module, tokens, full_depth, plan, images, chosen if chosen.any() else None)


def in_windows(module, kv):
    """K and V [2, L, N, K, E] that the next token can attend, with zeros where a layer's window does not reach."""
    n = kv.shape[2]
    reaches = [range(n) if layer.window is None else range(max(0, n - layer.window + 1), n) for layer in module.layers]
    return kv * torch.tensor([[position in reach for position in range(n)] for reach in reaches])[..., None, None]


def cached_kv(module, cache, row):
    """K and V [2, L, N, K, E] that the cache holds for one row's next token."""
    positions = torch.arange(int(cache.lengths[row]))
    slots = [positions % cache.slots(layer.window) for layer in module.layers]
    kv = [[x[row, at] for x, at in zip(part, slots, strict=True)] for part in (cache.keys, cache.values)]
    return in_windows(module, torch.stack([torch.stack(part) for part in kv]))


def stack_layers(kv):
    """A list of each layer's k, v [N, K, E] -> [2, L, N, K, E]."""
    return torch.stack([torch.stack([pair[i] for pair in kv]) for i in (0, 1)])
