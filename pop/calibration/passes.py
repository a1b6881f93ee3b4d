"""The differentiable pass over hidden states, which importance, refit, held-out loss and distillation share.

A pass takes h [B, T, D] from one layer to another, without a cache. Autograd can record it. At a group of pruned layers
h splits. All tokens give K and V. Only the full-depth rows f run the layers, and return into h at the end:

    h, all tokens    ────┬── own projections, and code z ──┬── + A z ──────────┬──► h after the group
                         │                 K, V of each layer                  │
    full-depth rows      └── f ── layer ── layer ── ... ───────────────────────┘

A pass in which no layer is pruned is the full model. In distillation it is the teacher, and the pruned pass is the
student. The h that enters the first pruned layer is the same in both, so both can start from it.
"""

import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pop.backends.cpu import WIDENED
from pop.engine.selection import select
from pop.models.base import PrunableLayer
from pop.models.images import TEXT, Images
from pop.models.layers import causal_mask
from pop.pruning.corrections import code, corrected_keys_values
from pop.pruning.plan import Group, PrunePlan
from pop.pruning.reference import full_depth_tokens

# The backward pass recomputes the activations inside a checkpointed function, so they need not be kept.
checkpointed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class Pass:
    """Passes over the layers of a model, for one batch of sequences.

    Args:
        module: A PrunableModel.
        tokens: [B, T] ids, padded on the right.
        images: What images bring to the tokens.
    """

    def __init__(self, module, tokens: Tensor, images: Images = TEXT):
        tokens = tokens.to(next(module.parameters()).device)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)  # [B, T]
        self.module = module
        self.tokens = tokens
        self.images = images
        self.last_attended = images.last_attended(positions)  # [B, T] or None
        self.ropes = module.rope(images.rotary(positions))

    def embed(self) -> Tensor:
        """The h [B, T, D] that enters layer 0."""
        return self.images.place(self.module.embed(self.tokens))

    def run_layer(self, index: int, h: Tensor, run: Callable = PrunableLayer.__call__) -> Tensor:
        """Run all tokens through a layer: h [B, T, D] -> h [B, T, D]. `run(layer, h, rope, attend)` computes it."""
        layer = self.module.layers[index]
        h = checkpointed(run, layer, h, self.ropes[layer.window], self._attend)
        return self.images.add_deepstack(h, index)

    def run_layers(self, h: Tensor, begin: int, end: int | None = None) -> Tensor:
        """Run all tokens through layers `begin` to `end` - 1, by default the last: h [B, T, D] -> h [B, T, D]."""
        for index in range(len(self.module.layers))[begin:end]:
            h = self.run_layer(index, h)
        return h

    def run_pruned(self, plan: PrunePlan, h: Tensor, prompt_length: int, end: int | None = None) -> Tensor:
        """Run prompts by a plan, and their continuations at full depth, as in pop/pruning/reference.py.

        Args:
            plan: With at least one layer. Its corrections may have any dtype. Gradients reach them.
            h: [B, T, D], enters layer `first_layer(plan)`.
            prompt_length: Of all rows. The tokens after it are continuations.
            end: The first layer that does not run, where a group begins. None: all run.

        Returns:
            The h [B, T, D] after the last layer that runs, in the dtype of h. After the model's last layer, it is
            meaningless at pruned tokens.
        """
        full_depth = full_depth_tokens(prompt_length, self.tokens.shape[1], plan)  # [T]
        running = range(len(self.module.layers))[first_layer(plan) : end]
        whole = full_depth.expand_as(self.tokens).to(h.device)  # [B, T]
        for group in plan.to(h.device, h.dtype).groups(len(self.module.layers), self.module.deepstack_layers):
            inside = [index for index in group.layers if index in running]
            if inside and group.is_pruned:
                h = self._pruned_group(group, h, whole)
                continue
            for index in inside:
                if plan.selects and index == plan.selects_at:
                    whole = whole | self.selected(plan, h, prompt_length)
                h = self.run_layer(index, h)
        return h

    @torch.no_grad()
    def selected(self, plan: PrunePlan, h: Tensor, prompt_length: int) -> Tensor:
        """The tokens [B, T] bool that a plan selects from prompts, all of `prompt_length` tokens.

        h [B, T, D] enters its selecting layer.
        """
        B, T, _ = h.shape
        rotary = self.images.rotary(torch.arange(prompt_length).expand(B, -1))
        others = ~full_depth_tokens(prompt_length, prompt_length, plan)
        lengths = torch.full((B,), prompt_length)
        counts = torch.full((B,), plan.num_selected(int(others.sum())))
        selected = select(self.module, plan, h[:, :prompt_length], rotary, lengths, others.expand(B, -1), counts)
        return F.pad(selected, (0, T - prompt_length))

    def _attend(self, layer, q, k, v):
        return self.module.causal_attention(q, k, v, layer.scale, layer.window, self.last_attended)

    def _pruned_group(self, group: Group, h: Tensor, full_depth: Tensor) -> Tensor:
        """Run a group of pruned layers: h [B, T, D] -> h [B, T, D]. Only full_depth [B, T] tokens run its layers."""
        B, T, _ = h.shape
        # The batch row and the position of each full-depth token, [B, W] each: every batch row has as many.
        rows = full_depth.nonzero().view(B, -1, 2).unbind(-1)
        corrections = group.corrections
        z = None
        if corrections is not None:
            first = self.module.layers[group.layers.start]
            z = code(first, h, torch.zeros_like(h[:, 0]), corrections.shared)  # [B, T, rank]
        masks = {
            window: causal_mask(T, window, self.last_attended, h.device).expand(B, -1, -1)[rows]  # [B, W, T]
            for window in self.ropes
        }
        f = h[rows]  # [B, W, D]
        for number, index in enumerate(group.layers):
            layer = self.module.layers[index]
            rope = self.ropes[layer.window]
            if corrections is None:
                k, v = layer.keys_values(h, rope)
            else:
                k, v = corrected_keys_values(layer, h, z, corrections.weight[number], rope)
            attend = functools.partial(self._attend_prompt, prompt_k=k, prompt_v=v, rows=rows, mask=masks[layer.window])
            f = layer(f, tuple(table[rows] for table in rope), attend)
        if corrections is not None:
            h = corrections.with_update(h, z, first.multiply)
        return self.images.add_deepstack(h.index_put(rows, f), group.layers[-1])

    def _attend_prompt(self, layer, q, k, v, *, prompt_k, prompt_v, rows, mask):
        """Full-depth q, k, v [B, W, heads, E] attend to K and V [B, T, K, E] of all tokens, with their own k and v."""
        k = prompt_k.index_put(rows, k)
        v = prompt_v.index_put(rows, v)
        return self.module.masked_attention(q, k, v, mask, layer.scale)


def first_layer(plan: PrunePlan) -> int:
    """Where the pass of a plan leaves the full one: at the first pruned layer, or before it where it selects tokens."""
    if plan.selects:
        return min(plan.layers[0], plan.selects_at)
    return plan.layers[0]


def working_dtype(model) -> torch.dtype:
    """bfloat16, or float32 on a CPU without fast products in bfloat16."""
    is_slow = model.device.type == "cpu" and torch.bfloat16 in WIDENED
    return torch.float32 if is_slow else torch.bfloat16


def working_copy(model) -> torch.nn.Module:
    """The module in its working dtype."""
    dtype = working_dtype(model)
    return model.module if model.dtype == dtype else copy.deepcopy(model.module).to(dtype)
