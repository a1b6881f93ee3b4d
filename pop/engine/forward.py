"""Pruned prefill, and several tokens at full depth, on a static KV cache.

A call takes Prompts, cuts them into Chunks, and runs one chunk after the other through the layers (layer_pass.py).
FullDepth says which tokens of a chunk run every layer, and Selection which tokens the plan has added to them. These
four records are in chunks.py. decode_step.py runs decode: every layer, for one token of each row.

The only state is the cache. It counts new tokens only once their logits exist. `pop.Model` checks the arguments. Shape
letters: pop/models/layers.py.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pop.engine.attention import by_row
from pop.engine.cache import KVCache
from pop.engine.chunks import (
    ALL_KEYS,
    Chunk,
    FullDepth,
    Prompts,
    Selection,
    attention_metadata,
    chunk_bounds,
    full_depth_by_position,
)
from pop.engine.earlier import Earlier, remember
from pop.engine.layer_pass import LayerPass, ReplayedPasses
from pop.engine.modes import engine_modes
from pop.engine.selection import select
from pop.engine.stages import EAGER, Stages
from pop.models.images import TEXT, Images
from pop.pruning.plan import PrunePlan
from pop.system.memory import to_device


@engine_modes()
def prefill(
    module, tokens: Tensor, cache: KVCache, lengths: Tensor, plan: PrunePlan, chunk_size: int,
    stages: Stages = EAGER, images: Images = TEXT, boundary: bool = True,
) -> Tensor:  # fmt: skip
    """Append prompts to the cache. Returns logits [B, V] float32 of each row's boundary token.

    Args:
        module: A PrunableModel.
        tokens: Ids [B, T], right-padded.
        cache: Of B rows, with room for the prompts.
        lengths: The prompts' lengths [B], int64 on the CPU.
        plan: Its corrections are on the module's device, in its dtype.
        chunk_size: Tokens of a row that run at once, at most cache.chunk_size. Bounds the memory for activations. But a
            plan that selects tokens keeps h of all T tokens, and one layer's keys and scores of all of them.
        stages: The functions to call, eager or compiled.
        images: What images bring to these prompts. A chunk must be able to hold an image with look-ahead.
        boundary: False if more of the same prompts follows in a later call. The logits are then meaningless, and the
            plan selects no tokens.
    """
    full_depth = full_depth_by_position(cache, lengths, plan, boundary)
    is_one_chunk = full_depth.shape[1] <= min(chunk_size, cache.chunk_size)
    is_replayable = is_one_chunk and full_depth.numel() <= stages.replayed_tokens
    # Replayed passes are to have few sizes, so these go up in steps.
    has_stepped_sizes = is_replayable and images is TEXT and not cache.lengths.any()
    prompts = Prompts(tokens, lengths, images, full_depth, has_stepped_sizes, boundary)
    call = Call(module, cache, plan, stages, chunk_size, replays=has_stepped_sizes)
    last = 0.0  # then [B, D], each row's h after the last layer, at its last token so far
    for chunk, h in call.chunks(prompts):
        last = chunk.latest(h).where(chunk.has_tokens[:, None], last)  # each row has tokens in the first chunk
    logits = stages.head(module, last[:, None])[:, 0]  # [B, 1, D] as in decode, so one compiled head serves both
    call.commit(lengths, images.rope_offset(lengths))
    return logits


@engine_modes()
def extend(module, tokens: Tensor, cache: KVCache, stages: Stages = EAGER) -> Tensor:
    """Append tokens [B, T] at full depth, as decode would one by one. Returns logits [B, T, V] at every position."""
    B, T = tokens.shape
    lengths = torch.full((B,), T)
    prompts = Prompts(tokens, lengths, TEXT, full_depth=torch.ones(B, T, dtype=torch.bool))
    call = Call(module, cache, PrunePlan.none(), stages, T)
    logits = [stages.head(module, h) for _, h in call.chunks(prompts)]
    call.commit(lengths)
    return torch.cat(logits, dim=1)


class Call:
    """One call of prefill or extend: its chunks run through the layers of a module and fill a cache.

    `hidden` [L, B, D] is the state of each row's latest token as it entered each layer, for the code of the next token.
    `skipped` says which tokens a later prompt may select. The cache gets both at the end.
    """

    def __init__(self, module, cache: KVCache, plan: PrunePlan, stages: Stages, chunk_size: int, replays: bool = False):
        self.module = module
        self.cache = cache
        self.plan = plan
        self.stages = stages
        self.hidden = cache.previous_hidden
        self.skipped = cache.skipped
        self.chunk_size = min(chunk_size, cache.chunk_size)
        passes = ReplayedPasses.of if replays else LayerPass
        self.passes = passes(module, cache, stages)

    def commit(self, lengths: Tensor, rope_offset: Tensor | int = 0) -> None:
        """Let the cache count the tokens, `lengths` [B] a row, now that their logits exist."""
        cache = self.cache
        cache.intact = False  # until both `lengths` and `skipped` are set
        cache.move_to((cache.lengths + lengths, self.hidden, cache.rope_offsets + rope_offset))
        cache.skipped.copy_(self.skipped)
        cache.intact = True

    def chunks(self, prompts: Prompts) -> Iterator[tuple[Chunk, Tensor]]:
        """Run prompts in chunks of at most chunk_size tokens a row. Yield each chunk and its h after the last layer.

        A plan that selects tokens needs the states of a prompt's last tokens at the selecting layer. So all chunks run
        up to that layer before the first one continues. It selects among the new tokens, and among earlier ones in the
        cache, if the prompts end with their `boundary`.
        """
        cache = self.cache
        # Chunks after the first overwrite slots of a ring. If such a call fails midway, tokens that the cache counts
        # are lost. `commit` makes the cache intact again.
        has_several = int(prompts.lengths.max()) > self.chunk_size
        cache.intact = not (has_several and cache.has_windows and cache.lengths.any())

        chunks = (Chunk.of(self.module, cache, prompts, edges) for edges in chunk_bounds(prompts, self.chunk_size))
        if self.plan.selects:
            earlier = Earlier.of(cache, self.plan.selects_at, prompts.boundary)
            if not prompts.full_depth.all() or earlier.others.any():
                chunks = list(chunks)
                entering = self.run_to_selecting_layer(prompts, chunks)
                selection = self.select_tokens(prompts, entering, earlier)
                yield from self.run_from_selecting_layer(prompts, chunks, entering, selection)
                return
        for chunk in chunks:
            full = FullDepth.of(cache, chunk, prompts, self.plan)
            layers = range(len(self.module.layers))
            h, self.hidden = self.passes.run(layers, chunk, full, self.embed(chunk), self.hidden)
            yield chunk, h

    def run_to_selecting_layer(self, prompts: Prompts, chunks: list[Chunk]) -> Tensor:
        """The first phase of a plan that selects: h [B, T + 1, D] of all tokens, enters the selecting layer."""
        first = self.plan.selects_at
        # If no layer is pruned in this phase, its chunks need no full-depth tokens.
        plan = self.plan if self.plan.layers[0] < first else PrunePlan.none()
        B, T = prompts.full_depth.shape
        entering = self.hidden.new_zeros(B, T + 1, self.hidden.shape[2])  # column T takes padding
        for chunk in chunks:
            full = FullDepth.of(self.cache, chunk, prompts, plan)
            # Without a name for h, which would keep it in memory while the next chunk runs.
            entering[by_row(chunk.target)], self.hidden = self.passes.run(
                range(first), chunk, full, self.embed(chunk), self.hidden
            )
        return entering

    def select_tokens(self, prompts: Prompts, entering: Tensor, earlier: Earlier) -> Selection:
        """Choose among the N earlier and the T new tokens. Returns the chosen new ones.

        It also keeps states for later prompts, and runs the chosen earlier tokens again. Without a boundary,
        it chooses none, and only keeps states.
        """
        cache = self.cache
        plan = self.plan
        B, T = prompts.full_depth.shape
        N = earlier.slots.shape[1]
        entering = entering[:, :T]
        index = torch.arange(T).expand(B, -1)
        rotary = (cache.lengths + cache.rope_offsets)[:, None] + prompts.images.rotary(index)

        others = torch.cat((earlier.others, ~prompts.full_depth), dim=1)  # [B, N + T]
        counts = torch.tensor(
            [plan.num_selected(number) if prompts.boundary else 0 for number in others.sum(1).tolist()]
        )
        # Scores of earlier tokens are not compiled, because N differs with each call.
        received = earlier.received(cache, plan.selects_at) if N else self.stages.received
        (others_there,) = to_device([others], cache.device)
        if counts.any():
            chosen = select(self.module, plan, entering, rotary, prompts.lengths, others, counts, received)
        else:
            chosen = torch.zeros_like(others_there)

        # Tokens that get features later, or that look ahead, cannot run again by themselves.
        has_features_later = plan.selects_at < self.module.deepstack_layers
        has_look_ahead = prompts.images.look_ahead is not None
        if not (cache.has_windows or has_features_later or has_look_ahead):
            skips = (others_there & ~chosen)[:, N:]
            self.skipped = remember(cache, entering, rotary, skips, plan.selects_at)

        if N:
            again = chosen[:, :N].cpu()
            self.run_again([row[is_chosen] for row, is_chosen in zip(earlier.slots, again, strict=True)])
            counts = counts - again.sum(1)
        return Selection(chosen[:, N:], counts)

    def run_again(self, slots: list[Tensor]) -> None:
        """Run the tokens of each row in these slots of the cache from the selecting layer on."""
        cache = self.cache
        positions = pad_sequence(slots, True, cache.max_seq_len)  # [B, W]; padding is in the spare slot
        if not positions.numel():
            return
        cache.intact = False  # until `commit`, since K and V of tokens that the cache counts change, layer by layer
        for at in positions.split(self.chunk_size, dim=1):
            # Without windows and images, a token's slot is its position, and its rotary position too.
            (there,) = to_device([at], cache.device)
            attention = attention_metadata(self.module.rope(there), cache, at, cache.lengths)
            if at.shape[1] > 1:  # these tokens are not consecutive; a single one has no band, as in decode
                band = torch.tensor(ALL_KEYS)
                attention = {window: metadata._replace(band=band) for window, metadata in attention.items()}
            places = by_row(there)
            f = cache.entered[places]  # [B, W, D]
            for index in range(self.plan.selects_at, len(self.module.layers)):
                f = self.passes.run_layer(index, f, attention)
            self.skipped[places] = -1

    def run_from_selecting_layer(
        self, prompts: Prompts, chunks: list[Chunk], entering: Tensor, selection: Selection
    ) -> Iterator[tuple[Chunk, Tensor]]:
        """The second phase: from the selecting layer on, the selected tokens run at full depth. Yields as `chunks`."""
        if len(chunks) > 1:
            # The sizes of a chunk's tensors depend on how many of its tokens are selected, and only the device knows.
            # So wait for it, and treat the selected tokens as full-depth tokens by their position.
            prompts = prompts._replace(full_depth=prompts.full_depth | selection.tokens.cpu())
            selection = None
        layers = range(self.plan.selects_at, len(self.module.layers))
        for chunk in chunks:
            full = FullDepth.of(self.cache, chunk, prompts, self.plan, selection)
            # The first phase has replaced the states of its own layers only.
            h, self.hidden = self.passes.run(layers, chunk, full, entering[by_row(chunk.target)], self.hidden)
            yield chunk, h

    def embed(self, chunk: Chunk) -> Tensor:
        """h [B, C, D] that enters the first layer."""
        return chunk.images.place(self.module.embed(chunk.ids))
