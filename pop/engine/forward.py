"""Pruned prefill, and several tokens at full depth, on a static KV cache.

A call takes Prompts, cuts them into Chunks, and runs one chunk after the other through the layers (layer_pass.py).
FullDepth says which tokens of a chunk run every layer. These three records are in chunks.py. If a plan also selects
tokens, two_phases.py runs the chunks. decode_step.py runs decode: every layer, for one token of each row.

The only state is the cache. It counts new tokens only once their logits exist. `pop.Model` checks the arguments. Shape
letters: pop/models/layers.py.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pop.engine import two_phases
from pop.engine.cache import KVCache
from pop.engine.chunks import Chunk, FullDepth, Prompts, chunk_bounds, full_depth_by_position
from pop.engine.earlier import Earlier
from pop.engine.layer_pass import LayerPass, ReplayedPasses
from pop.engine.modes import engine_modes
from pop.engine.stages import EAGER, Stages
from pop.models.images import TEXT, Images
from pop.pruning.plan import PrunePlan


@engine_modes()
def prefill(
    module, tokens: Tensor, cache: KVCache, lengths: Tensor, plan: PrunePlan, chunk_size: int,
    stages: Stages = EAGER, images: Images = TEXT, is_last_part: bool = True,
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
        is_last_part: False if more of the same prompts follows in a later call. Then the logits are meaningless,
            and the plan selects no tokens.
    """
    full_depth = full_depth_by_position(cache, lengths, plan, is_last_part)
    is_one_chunk = full_depth.shape[1] <= min(chunk_size, cache.chunk_size)
    is_replayable = is_one_chunk and full_depth.numel() <= stages.replayed_tokens
    # Replayed passes are to have few sizes, so these go up in steps.
    has_stepped_sizes = is_replayable and images is TEXT and not cache.lengths.any()
    prompts = Prompts(tokens, lengths, images, full_depth, has_stepped_sizes, is_last_part)
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
        cache.move_to(cache.lengths + lengths, self.hidden, cache.rope_offsets + rope_offset)
        cache.skipped.copy_(self.skipped)
        cache.intact = True

    def chunks(self, prompts: Prompts) -> Iterator[tuple[Chunk, Tensor]]:
        """Run prompts in chunks of at most chunk_size tokens a row. Yield each chunk and its h after the last layer."""
        cache = self.cache
        # Chunks after the first overwrite slots of a ring. If such a call fails midway, tokens that the cache counts
        # are lost. `commit` makes the cache intact again.
        has_several = int(prompts.lengths.max()) > self.chunk_size
        cache.intact = not (has_several and cache.has_windows and cache.lengths.any())

        chunks = (Chunk.of(self.module, cache, prompts, edges) for edges in chunk_bounds(prompts, self.chunk_size))
        if self.plan.selects:
            earlier = Earlier.of(cache, self.plan.selects_at, prompts.is_last_part)
            if not prompts.full_depth.all() or earlier.others.any():
                yield from two_phases.run(self, prompts, list(chunks), earlier)
                return
        for chunk in chunks:
            full = FullDepth.of(cache, chunk, prompts, self.plan)
            layers = range(len(self.module.layers))
            h, self.hidden = self.passes.run(layers, chunk, full, self.embed(chunk), self.hidden)
            yield chunk, h

    def embed(self, chunk: Chunk) -> Tensor:
        """h [B, C, D] that enters the first layer."""
        return chunk.images.place(self.module.embed(chunk.ids))
