"""Pruned prefill, and several tokens at full depth, on a static KV cache.

    h, all prompt tokens     ──layer 0──layer 1── ... ──┬── K, V only of every pruned layer ──► cache
                                                        │
    full-depth rows, f                                  └──layer l──layer l+1── ... ──► logits

Read literally, the method runs the prompt without the pruned layers, and then the boundary token as a decode step that
reads all weights again. Here both happen in one pass (`fused boundary`). At a group of pruned layers, all tokens write
their K and V, computed from the h that enters the group: by the layers' own projections, or by a calibrated plan's.
Then only the full-depth rows f go through the group's layers. They overwrite their K and V, and attend the cache.
After the group, a calibrated plan may update the other tokens' h, for kept layers that follow.

The only state is the cache. Its lengths count tokens only once their logits exist. `pop.Model` checks the arguments.
Shape letters: pop/models/layers.py.
"""

from collections.abc import Iterator

import torch

from pop.engine.cache import KVCache
from pop.engine.layout import Chunk, attention_metadata, chunk_bounds, full_depth_tokens
from pop.engine.selection import select
from pop.engine.stages import EAGER, Stages
from pop.models.images import TEXT, TextOnly
from pop.pruning.plan import PrunePlan


@torch.inference_mode(False)
@torch.no_grad()
def prefill(
    module, tokens: torch.Tensor, cache: KVCache, lengths: torch.Tensor, plan: PrunePlan, chunk_size: int,
    stages: Stages = EAGER, images: TextOnly = TEXT, boundary: bool = True, full_depth: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Append prompts to the cache. Returns logits [B, V] float32 of each row's boundary token.

    Args:
        module: A PrunableModel.
        tokens: Ids [B, T], right-padded.
        cache: Of B rows, with room for the prompts.
        lengths: The prompts' lengths [B], int64 on the CPU.
        plan: Its projections are on the module's device, in its dtype.
        chunk_size: Tokens of a row that run at once, at most cache.chunk_size. Bounds the memory for activations.
        stages: The functions to call, eager or compiled.
        images: What images bring to these prompts. A chunk must be able to hold an image with look-ahead.
        boundary: False if more of the same prompts follows in a later call. The logits are then meaningless, and the
            plan selects no tokens.
        full_depth: Which tokens run at full depth besides those of the plan: [B, T] bool on the CPU.
    """
    out = None  # [B, D], each row's h after the last layer, at its last token so far
    options = stages, images, boundary, full_depth
    for chunk, h, hidden in _chunks(module, tokens, cache, lengths, plan, chunk_size, *options):  # noqa: B007
        latest = chunk.latest(h)
        out = latest if out is None else latest.where(chunk.has_tokens[:, None], out)  # all have tokens in the first
    logits = stages.head(module, out[:, None])[:, 0]  # of decode's shape
    cache.restore((cache.lengths + lengths, hidden, cache.rope_offsets + images.rope_offset(lengths)))
    cache.intact = True
    return logits


@torch.inference_mode(False)
@torch.no_grad()
def extend(module, tokens: torch.Tensor, cache: KVCache, stages: Stages = EAGER) -> torch.Tensor:
    """Append tokens [B, T] at full depth, as decode would one by one. Returns logits [B, T, V] at every position."""
    B, T = tokens.shape
    lengths, hidden, logits = torch.full((B,), T), cache.previous_hidden, []
    for _, h, hidden in _chunks(module, tokens, cache, lengths, PrunePlan.none(), T, stages):  # noqa: B007
        logits.append(stages.head(module, h))
    cache.restore((cache.lengths + lengths, hidden, cache.rope_offsets))
    cache.intact = True
    return torch.cat(logits, dim=1)


def _chunks(
    module, tokens, cache: KVCache, lengths, plan, chunk_size, stages, images=TEXT, boundary=True, full_depth=None
) -> Iterator[tuple[Chunk, torch.Tensor, torch.Tensor]]:
    """Yield each chunk, its h [B, C, D] after the last layer, and the rows' latest hidden states [L, B, D].

    A plan that selects tokens needs the last token's state at the selecting layer. So all chunks run up to that layer
    before the first one runs on.
    """
    chunk_size, hidden = min(chunk_size, cache.chunk_size), cache.previous_hidden
    # Chunks after the first overwrite slots of a ring, so a call that fails midway loses tokens that the cache counts.
    overwrites = int(lengths.max()) > chunk_size and bool(cache.lengths.any()) and cache.has_windows
    cache.intact = not overwrites
    by_position = full_depth_tokens(cache, lengths, plan, boundary)  # [B, T]
    full_depth = by_position if full_depth is None else by_position | full_depth[:, : by_position.shape[1]]
    counts = [plan.num_selected(others) if boundary else 0 for others in (~full_depth).sum(1).tolist()]
    L, bounds = len(module.layers), list(chunk_bounds(lengths, chunk_size, images))
    first, selection, entering = 0, (), None
    if any(counts):
        (B, T), first = full_depth.shape, plan.selects_at
        below = plan if first > plan.layers[0] else PrunePlan.none()
        rows = torch.arange(B, device=cache.device)[:, None]
        for begin, end in bounds:
            chunk = Chunk.of(cache, tokens, lengths, begin, end, below, images, full_depth)
            h, hidden = _run_chunk(module, cache, hidden, chunk, stages, range(first))
            entering = h.new_zeros(B, T + 1, h.shape[2]) if entering is None else entering
            entering[rows, chunk.index] = h
        rotary = (cache.lengths + cache.rope_offsets)[:, None] + images.rotary(torch.arange(T).expand(B, T))
        counts = torch.tensor(counts)
        selected = select(module, plan, entering[:, :T], rotary, lengths, ~full_depth, counts)
        if len(bounds) == 1:
            selection = selected, counts
        else:  # only the device knows how many of them each chunk has
            full_depth = full_depth | selected.cpu()
    for begin, end in bounds:
        chunk = Chunk.of(cache, tokens, lengths, begin, end, plan, images, full_depth, *selection)
        h = None if entering is None else entering[rows, chunk.index]
        h, hidden = _run_chunk(module, cache, hidden, chunk, stages, range(first, L), h)
        yield chunk, h, hidden


def _run_chunk(module, cache: KVCache, hidden, chunk: Chunk, stages: Stages, layers: range, h=None):
    """One chunk, its h or None at first, through some layers -> h [B, C, D], and new hidden states [L, B, D]."""
    h = chunk.images.place(module.embed(chunk.ids)) if h is None else h
    metadata = attention_metadata(module, cache, chunk.tokens, chunk.ends, chunk)
    rows = chunk.rows[..., None].expand(-1, -1, h.shape[2])  # [B, W, D]
    W = rows.shape[1]
    rows_metadata = attention_metadata(module, cache, chunk.full_depth, chunk.ends) if W else {}
    new_hidden = list(hidden)
    for whole in chunk.plan.groups(len(module.layers), module.deepstack_layers):
        group = [index for index in whole.layers if index in layers]
        if whole.is_pruned and group:
            passed = _write_pruned(module, whole, h, hidden[group[0]], cache, chunk, metadata, stages)
            f = h.gather(1, rows)
            for index in group:
                new_hidden[index] = chunk.latest(h, f if W else None)
                if W:
                    layer = module.layers[index]
                    f = stages.full_layer(layer, f, *cache.layer(index), rows_metadata[layer.window])
            h = passed.scatter(1, rows, f.where(chunk.rows_valid[..., None], passed.gather(1, rows)))
        else:
            for index in group:
                new_hidden[index] = chunk.latest(h)
                layer = module.layers[index]
                h = stages.full_layer(layer, h, *cache.layer(index), metadata[layer.window])
        h = chunk.images.add_deepstack(h, group[-1]) if group else h
    return h, torch.stack(new_hidden).where(chunk.has_tokens[:, None], hidden)


def _write_pruned(module, group, h, previous, cache: KVCache, chunk: Chunk, metadata, stages: Stages) -> torch.Tensor:
    """Write K and V of a group of pruned layers, all from the h [B, C, D] that enters it. Returns the h that leaves it.

    previous: [B, D], the h that entered the group at the token before the chunk.
    """
    refit = group.corrections
    stage, tokens, passed = stages.pruned_layer, (h,), h
    if refit is not None:
        normalised = module.layers[group.layers[0]].normalised
        z = refit.code(normalised(h), normalised(previous), stages.linear)  # [B, C, R]
        passed = refit.updated(h, z, stages.linear)
        stage, tokens = stages.corrected_layer, (h, z)
    for number, index in enumerate(group.layers):
        layer = module.layers[index]
        at = metadata[layer.window]
        # With a window, tokens that no later token attends need no K and V.
        first = 0 if layer.window is None else max(0, chunk.needed_from - layer.window + 1)
        if first >= h.shape[1]:
            continue
        x, slots, rope = tokens, at.slots, at.rope
        if first:
            *x, slots = (tensor[:, first:] for tensor in (*x, slots))
            rope = tuple(table[:, first:] for table in rope)
        fitted = () if refit is None else (refit.weight[number], refit.bias[number])
        stage(layer, *x, *fitted, rope, slots, *cache.layer(index))
    return passed
