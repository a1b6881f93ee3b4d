"""A pass of a chunk through layers: what the device computes, on a static KV cache.

    h, all prompt tokens     ──layer 0──layer 1── ... ──┬── K, V only of every pruned layer ──► cache
                                                        │
    full-depth tokens f                                 └──layer l──layer l+1── ... ──► logits

Read literally, the method runs the prompt without the pruned layers, and then the boundary token as a decode step that
reads all weights again. Here both happen in one pass (the "fused boundary"). At a group of pruned layers, all tokens
write their K and V, computed from the h that enters the group. Then only the full-depth tokens f go through the group's
layers. They overwrite their K and V, and attend to the cache. After the group, a calibrated plan may update the h of
the other tokens for the kept layers that follow.

The tensors of a chunk are laid out before (chunks.py). For text, nothing here takes a number from the device, or copies
one to it. So a GPU can capture a pass of text, and replay it for other tokens with the same sizes. Shape letters:
pop/models/layers.py. C is the number of columns of a chunk, and W that of its full-depth tokens.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from pop.engine.attention import ByWindow
from pop.engine.cache import KVCache
from pop.engine.chunks import Chunk, FullDepth
from pop.engine.stages import Stages
from pop.pruning.plan import Group

MOST_REPLAYED = 24  # passes that one cache keeps. If lengths are evenly spread over 1 to 900, 84 % of prompts meet one.


class LayerPass:
    """The layers of a module, on the slots of a cache."""

    def __init__(self, module, cache: KVCache, stages: Stages):
        self.module = module
        self.stages = stages
        # The tensors and not the cache, which may hold this object: a cycle would delay freeing them.
        self.keys_values = list(zip(cache.keys, cache.values, strict=True))  # of each layer, [B, S + 1, K, E] each

    @classmethod
    def of(cls, module, cache: KVCache, stages: Stages):
        """The one that a cache keeps, or a new one for another module or other stages.

        After each change of the module, the stages are a new object, so nothing that was recorded before is found.
        """
        kept = cache.passes.get(cls)
        if kept is None or kept.module is not module or kept.stages is not stages:
            cache.passes[cls] = kept = cls(module, cache, stages)
        return kept

    def run(self, layers: range, chunk: Chunk, full: FullDepth, h: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """Run a chunk through some layers: h [B, C, D] -> h [B, C, D], and the states of its rows' latest tokens.

        Args:
            layers: Of each pruned group, they have all layers or none. Inside the model, a pass may only begin with
                the selecting layer, or end before it.
            chunk: The tokens.
            full: Which of them run the pruned layers.
            h: Enters the first of the layers.
            previous: The state of the token before each row's first one as it entered each layer, [L, B, D]. A
                calibrated plan reads it for the code of the row's first token. The second result is of the same form.
                It has all layers, since the groups of the next call's plan may begin elsewhere.
        """
        hidden = list(previous)
        for group in full.plan.groups(len(self.module.layers), self.module.deepstack_layers):
            inside = [index for index in group.layers if index in layers]
            if not inside:
                continue
            if group.is_pruned:
                h = self.run_pruned(chunk, full, h, group, previous, hidden)
            else:
                # If this loop were a method, this frame would keep the h that it passed while the method runs.
                for index in inside:
                    hidden[index] = chunk.latest(h)
                    h = self.run_layer(index, h, chunk.attention)
            h = chunk.images.add_deepstack(h, inside[-1])
        return h, torch.stack(hidden).where(chunk.has_tokens[:, None], previous)

    def run_layer(self, index: int, h: Tensor, attention: ByWindow) -> Tensor:
        """One layer at full depth: h [B, T, D] -> [B, T, D]. Its K and V go to the cache."""
        layer = self.module.layers[index]
        return self.stages.full_layer(layer, h, *self.keys_values[index], attention[layer.window])

    def run_pruned(
        self, chunk: Chunk, full: FullDepth, h: Tensor, group: Group, previous: Tensor, hidden: list[Tensor]
    ) -> Tensor:
        """All tokens write K and V of a group, and the full-depth tokens run its layers: h [B, C, D] -> [B, C, D].

        Each row's latest state, as it enters a layer, goes into `hidden`.
        """
        corrections = group.corrections
        z = None
        passed = h
        if corrections is not None:
            first = group.layers[0]
            layer = self.module.layers[first]
            z = self.stages.code(layer, h, previous[first], corrections.shared)  # [B, C, R]
            passed = corrections.with_update(h, z, layer.multiply)
        self.write_keys_values(chunk, h, z, group)
        latest = chunk.latest(h)
        if full.columns.shape[1] == 0:
            for index in group.layers:
                hidden[index] = latest
            return passed
        columns = full.columns[..., None].expand(-1, -1, h.shape[2])  # [B, W, D]
        f = h.gather(1, columns)
        for index in group.layers:
            # A full-depth token enters each layer with a state of its own, and a pruned one all of them with the same.
            hidden[index] = f[:, -1].where(full.last_is_full, latest)
            f = self.run_layer(index, f, full.attention)
        # Batch rows differ in how many full-depth tokens they have. The columns of padding keep their pruned h.
        f = f.where(full.valid[..., None], passed.gather(1, columns))
        return passed.scatter(1, columns, f)

    def write_keys_values(self, chunk: Chunk, h: Tensor, z: Tensor | None, group: Group) -> None:
        """Write K and V of pruned layers, all from the h [B, C, D] that enters and its code z [B, C, R], if any."""
        for number, index in enumerate(group.layers):
            layer = self.module.layers[index]
            at = chunk.attention[layer.window]
            arguments = at.rope, at.slots, *self.keys_values[index]
            if z is None:
                self.stages.pruned_layer(layer, h, *arguments)
            else:
                self.stages.corrected_layer(layer, h, z, group.corrections.weight[number], *arguments)


class ReplayedPasses(LayerPass):
    """Passes on fixed memory, which `stages.replay` can repeat: one for each plan and each set of sizes.

    They are for prompts of text that begin a sequence (`Prompts.has_stepped_sizes`). Of these, plan and sizes are all
    that a pass knows on the host, since bands follow from them: each row begins at position 0.
    """

    def __init__(self, module, cache: KVCache, stages: Stages):
        super().__init__(module, cache, stages)
        # By plan and sizes: the memory of a pass's inputs, and what repeats it. The latest is the last.
        self.kept = {}

    def run(self, layers, chunk, full, h, previous):
        inputs = chunk, full, h, previous
        tensors = _tensors(inputs)
        sizes = tuple(tensor.shape for tensor in tensors)
        key = layers, full.plan.layers, full.plan.corrections, sizes  # corrections are equal only to themselves
        fixed, replay = self.kept.pop(key, None) or self._new(inputs)
        self.kept[key] = fixed, replay
        for memory, tensor in zip(_tensors(fixed), tensors, strict=True):
            memory.copy_(tensor, non_blocking=True)
        return replay(partial(super().run, layers, *fixed))

    def _new(self, inputs: tuple) -> tuple:
        """Memory for such inputs, and a runner that uses the others' memory. If there are many, the oldest leaves."""
        # Any of the others will do, because they all use the same memory.
        _, other = next(iter(self.kept.values()), (None, None))
        if len(self.kept) == MOST_REPLAYED:
            del self.kept[next(iter(self.kept))]
        fixed = tree_map_only(Tensor, torch.empty_like, inputs)
        return fixed, self.stages.replay(self.module, "prefill", other)


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
