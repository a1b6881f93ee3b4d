"""A decode step on fixed memory, laid out on the device, so that a graph can replay it.

    tokens [B], positions [B], offsets [B]  ──step──►  logits [B, V], hidden [L, B, D], and positions + 1

The step takes no number from the host: slots, rotary tables and spans follow from `positions`. The host counts
cache.lengths by itself. Shape letters: pop/models/layers.py.
"""

from functools import partial

import torch
from torch import Tensor

from pop.engine.cache import KVCache
from pop.engine.chunks import attention_metadata
from pop.engine.layer_pass import LayerPass
from pop.engine.modes import engine_modes
from pop.engine.stages import EAGER, Stages
from pop.system.memory import to_device


@engine_modes()
def decode(module, tokens: Tensor, cache: KVCache, stages: Stages = EAGER) -> Tensor:
    """Append one token a row at full depth: tokens [B] -> logits [B, V] float32.

    A full row may be decoded with the others. Its token goes to the spare slot, and its logits are meaningless.
    """
    step = DecodeStep if stages.replay is None else DecodeStep.of
    return step(module, cache, stages)(tokens, cache)


class DecodeStep(LayerPass):
    """The step of one cache. It owns the memory of its inputs, and `stages.replay` that of its outputs."""

    def __init__(self, module, cache: KVCache, stages: Stages):
        super().__init__(module, cache, stages)
        inputs = torch.zeros(3, cache.batch_size, dtype=torch.int64, device=cache.device)
        self.tokens, self.positions, self.offsets = inputs.unbind()
        self.ends = torch.full_like(self.positions, cache.max_seq_len)  # the token of a full row goes to the spare slot
        # The cache.lengths and rope_offsets that are on the device now. None: unknown.
        self.on_device: tuple[Tensor, Tensor] | None = None
        # The runner does not hold this object, which would be a cycle.
        self.replay = stages.replay and stages.replay(module, f"decode of {cache.batch_size} rows")

    def __call__(self, tokens: Tensor, cache: KVCache) -> Tensor:
        lengths = cache.lengths
        offsets = cache.rope_offsets
        if self.on_device is None or not all(map(torch.equal, self.on_device, (lengths, offsets))):
            positions, offsets_there = to_device([lengths, offsets], cache.device)
            self.positions.copy_(positions)
            self.offsets.copy_(offsets_there)
        self.tokens.copy_(tokens, non_blocking=True)
        self.on_device = None  # if the step fails, its positions are unknown
        step = partial(self.step, cache)
        logits, hidden = step() if self.replay is None else self.replay(step)
        cache.move_to(lengths + 1, hidden, offsets)
        self.on_device = (cache.lengths.clone(), offsets.clone())
        return logits

    def step(self, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Run one token a row: -> logits [B, V] and hidden states [L, B, D]."""
        module = self.module
        positions = self.positions[:, None]  # [B, 1]
        ropes = module.rope(positions + self.offsets[:, None])
        attention = attention_metadata(ropes, cache, positions, self.ends)
        h = module.embed(self.tokens[:, None])  # [B, 1, D]
        hidden = []
        for index in range(len(module.layers)):
            hidden.append(h[:, 0])
            h = self.run_layer(index, h, attention)
        logits = self.stages.head(module, h)[:, 0]
        self.positions.add_(1)
        return logits, torch.stack(hidden)
