"""A decode step on fixed memory, laid out on the device, so that a graph can replay it.

    tokens [B], positions [B], offsets [B]  ──step──►  logits [B, V], hidden [L, B, D], and positions + 1

The step takes no number from the host: slots, rotary tables and spans follow from `positions`. The host counts
cache.lengths by itself. Shape letters: pop/models/layers.py.
"""

import torch

from pop.engine.attention import AttentionMetadata
from pop.engine.cache import KVCache
from pop.engine.parts import Seen
from pop.engine.stages import EAGER, Stages
from pop.system.memory import to_device


@torch.inference_mode(False)
@torch.no_grad()
def decode(module, tokens: torch.Tensor, cache: KVCache, stages: Stages = EAGER) -> torch.Tensor:
    """Append one token a row at full depth: tokens [B] -> logits [B, V] float32.

    A full row may be decoded with the others. Its token goes to the spare slot, and its logits are meaningless.
    """
    if stages.replay is None:
        return DecodeStep(module, cache, stages)(tokens, cache)
    if cache.step is None or not cache.step.serves(module, cache, stages):
        cache.step = DecodeStep(module, cache, stages)
    return cache.step(tokens, cache)


class DecodeStep:
    """The step of one cache. It owns the memory of its inputs, and `stages.replay` that of its outputs."""

    def __init__(self, module, cache: KVCache, stages: Stages):
        self.module, self.stages = module, stages
        # The tensors and not the cache, which holds the step: a cycle would delay freeing them.
        self.layers = list(zip(cache.keys, cache.values, strict=True))
        self.max_seq_len = cache.max_seq_len
        self.rings = {window: cache.slots(window) for window in module.config.windows}
        B = cache.batch_size
        self.tokens, self.positions, self.offsets = torch.zeros(3, B, dtype=torch.int64, device=cache.device).unbind()
        self.snapshot: tuple[torch.Tensor, torch.Tensor] | None = None  # cache.lengths and rope_offsets as of now
        self.replay, self.seen = None, Seen()
        if stages.replay is not None:
            self.seen.look((module, *module.layers))
            if None not in self.seen.values():  # otherwise there are hooks, for example, which a graph would leave out
                self.replay = stages.replay(cache.device)  # it does not hold the step: that would be a cycle

    def serves(self, module, cache: KVCache, stages: Stages) -> bool:
        """Whether it was made for this module as it is now, these stages, and the tensors that the cache has now."""
        same = all(mine[0] is keys for mine, keys in zip(self.layers, cache.keys, strict=True))
        look = self.snapshot is None or not getattr(stages.replay, "keeps_memory", False)  # a tenth of a small step
        return same and module is self.module and stages is self.stages and self.seen.unchanged(look)

    def __call__(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        lengths, offsets = cache.lengths, cache.rope_offsets
        if self.snapshot is None or not all(map(torch.equal, self.snapshot, (lengths, offsets))):
            positions, offsets_there = to_device([lengths, offsets], cache.device)
            self.positions.copy_(positions)
            self.offsets.copy_(offsets_there)
        self.tokens.copy_(tokens, non_blocking=True)
        self.snapshot = None  # if the step fails, its positions are unknown
        logits, hidden = self.step() if self.replay is None else self.replay(self.step)
        cache.restore((lengths + 1, hidden, offsets))
        self.snapshot = cache.lengths.clone(), offsets.clone()
        return logits

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one token a row: -> logits [B, V] and hidden states [L, B, D]."""
        module, positions = self.module, self.positions[:, None]  # [B, 1]
        last = positions.clamp(max=self.max_seq_len - 1)
        ropes, metadata = module.rope(positions + self.offsets[:, None]), {}
        for window, ring in self.rings.items():
            slots = torch.where(positions < self.max_seq_len, positions % ring, ring)  # full rows: to the spare slot
            first = torch.zeros_like(last) if window is None else (last - window + 1).clamp(min=0)
            spans = torch.stack((first, last), dim=-1).to(torch.int32)  # [B, 1, 2]
            metadata[window] = AttentionMetadata(ropes[window], slots, spans)
        h, hidden = module.embed(self.tokens[:, None]), []  # [B, 1, D]
        for layer, (keys, values) in zip(module.layers, self.layers, strict=True):
            hidden.append(h[:, 0])
            h = self.stages.full_layer(layer, h, keys, values, metadata[layer.window])
        logits, hidden = self.stages.head(module, h)[:, 0], torch.stack(hidden)
        self.positions.add_(1)
        return logits, hidden
