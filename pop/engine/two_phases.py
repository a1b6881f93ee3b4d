"""A plan that selects tokens runs a call in two phases, before and after the selecting layer.

The choice needs the states of a prompt's last tokens at that layer. So all chunks run up to it. Then the plan chooses
among the new tokens, and among earlier ones in the cache (earlier.py). Earlier tokens that are chosen run again from
there on. At last, each chunk continues from its states, and the chosen new tokens run all remaining layers.

Shape letters: pop/models/layers.py. T tokens of a row are new, and N are earlier.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pop.engine.attention import by_row
from pop.engine.chunks import ALL_KEYS, Chunk, FullDepth, Prompts, Selection, attention_metadata
from pop.engine.earlier import Earlier, remember
from pop.engine.selection import select
from pop.pruning.plan import PrunePlan
from pop.system.memory import to_device


def run(call, prompts: Prompts, chunks: list[Chunk], earlier: Earlier) -> Iterator[tuple[Chunk, Tensor]]:
    """Run the chunks of prompts through all layers. Yields each chunk and its h after the last layer.

    Args:
        call: The Call (forward.py). Its plan selects tokens.
        prompts: Their tokens. Nothing is selected before their last part.
        chunks: The parts of the prompts, in order.
        earlier: The tokens that the cache holds.
    """
    entering = _run_to_selecting_layer(call, prompts, chunks)
    selection = _select_tokens(call, prompts, entering, earlier)
    if len(chunks) > 1:
        # The sizes of a chunk's tensors depend on how many of its tokens are selected, and only the device knows.
        # So wait for it, and treat the selected tokens as full-depth tokens by their position.
        prompts = prompts._replace(full_depth=prompts.full_depth | selection.tokens.cpu())
        selection = None
    layers = range(call.plan.selects_at, len(call.module.layers))
    for chunk in chunks:
        full = FullDepth.of(call.cache, chunk, prompts, call.plan, selection)
        # The first phase has replaced the states of its own layers only.
        h, call.hidden = call.passes.run(layers, chunk, full, entering[by_row(chunk.target)], call.hidden)
        yield chunk, h


def _run_to_selecting_layer(call, prompts: Prompts, chunks: list[Chunk]) -> Tensor:
    """The first phase. Returns h [B, T + 1, D] of all tokens, which enters the selecting layer."""
    first = call.plan.selects_at
    # If no layer is pruned in this phase, its chunks need no full-depth tokens.
    plan = call.plan if call.plan.layers[0] < first else PrunePlan.none()
    B, T = prompts.full_depth.shape
    entering = call.hidden.new_zeros(B, T + 1, call.hidden.shape[2])  # column T takes padding
    for chunk in chunks:
        full = FullDepth.of(call.cache, chunk, prompts, plan)
        # Without a name for h, which would keep it in memory while the next chunk runs.
        entering[by_row(chunk.target)], call.hidden = call.passes.run(
            range(first), chunk, full, call.embed(chunk), call.hidden
        )
    return entering


def _select_tokens(call, prompts: Prompts, entering: Tensor, earlier: Earlier) -> Selection:
    """Choose among the N earlier and the T new tokens. Returns the chosen new ones.

    It also keeps states for later prompts, and runs the chosen earlier tokens again. Before the last part, it chooses
    none, and only keeps states.
    """
    cache = call.cache
    plan = call.plan
    B, T = prompts.full_depth.shape
    N = earlier.slots.shape[1]
    entering = entering[:, :T]
    index = torch.arange(T).expand(B, -1)
    rotary = (cache.lengths + cache.rope_offsets)[:, None] + prompts.images.rotary(index)

    others = torch.cat((earlier.others, ~prompts.full_depth), dim=1)  # [B, N + T]
    counts = torch.tensor(
        [plan.num_selected(number) if prompts.is_last_part else 0 for number in others.sum(1).tolist()]
    )
    # Scores of earlier tokens are not compiled, because N differs with each call.
    received = earlier.received(cache, plan.selects_at) if N else call.stages.received
    (others_there,) = to_device([others], cache.device)
    if counts.any():
        chosen = select(call.module, plan, entering, rotary, prompts.lengths, others, counts, received)
    else:
        chosen = torch.zeros_like(others_there)

    # Tokens that get features later, or that look ahead, cannot run again by themselves.
    has_features_later = plan.selects_at < call.module.deepstack_layers
    has_look_ahead = prompts.images.look_ahead is not None
    if not (cache.has_windows or has_features_later or has_look_ahead):
        skips = (others_there & ~chosen)[:, N:]
        call.skipped = remember(cache, entering, rotary, skips, plan.selects_at)

    if N:
        again = chosen[:, :N].cpu()
        _run_again(call, [row[is_chosen] for row, is_chosen in zip(earlier.slots, again, strict=True)])
        counts = counts - again.sum(1)
    return Selection(chosen[:, N:], counts)


def _run_again(call, slots: list[Tensor]) -> None:
    """Run the tokens of each row in these slots of the cache from the selecting layer on."""
    cache = call.cache
    positions = pad_sequence(slots, True, cache.max_seq_len)  # [B, W]; padding is in the spare slot
    if not positions.numel():
        return
    cache.intact = False  # until `commit`, since K and V of tokens that the cache counts change, layer by layer
    for at in positions.split(call.chunk_size, dim=1):
        # Without windows and images, a token's slot is its position, and its rotary position too.
        (there,) = to_device([at], cache.device)
        attention = attention_metadata(call.module.rope(there), cache, at, cache.lengths)
        if at.shape[1] > 1:  # these tokens are not consecutive; a single one has no band, as in decode
            band = torch.tensor(ALL_KEYS)
            attention = {window: metadata._replace(band=band) for window, metadata in attention.items()}
        places = by_row(there)
        f = cache.entered[places]  # [B, W, D]
        for index in range(call.plan.selects_at, len(call.module.layers)):
            f = call.passes.run_layer(index, f, attention)
        call.skipped[places] = -1
