"""vLLM's Llama, Qwen3, Qwen3-MoE and Gemma3 with pruned prefill.

A step without a pruned token runs as always: compiled, and captured in CUDA graphs. Another step runs here:

    h [N, D], all tokens of the step ──kept layers──┬── K and V of every pruned layer ──► paged cache
                                                    │
    f [W, D], its full-depth tokens                 └── the pruned layers, whole ──► their logits

vLLM's layers share a contract: layer(positions, hidden, residual) -> (hidden, residual), with h = hidden + residual.
Shape letters: pop/models/layers.py; N is the number of tokens in the step's flat batch.
"""

import dataclasses
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.config import CompilationMode
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from pop.pruning.plan import Group, PrunePlan
from pop_vllm import runner_v1
from pop_vllm.attention import RowAttention
from pop_vllm.checks import check_backend, check_config, check_equal
from pop_vllm.layers import cached, normalised
from pop_vllm.metrics import Counts, logger
from pop_vllm.plan import longest
from pop_vllm.rows import Batch
from pop_vllm.selection import select
from pop_vllm.step import Kept, Step, own_metadata
from pop_vllm.weights import check_weights

MOST_KEPT = 2**17  # tokens whose states are kept; later prompts displace those that were aborted or preempted
MOST_REQUESTS = 1024  # whose states are kept at once


class Pruned:
    """Mixed into a model of vLLM. `begin` announces a step, and `forward` runs it."""

    def __init__(self, *, vllm_config, prefix="", **kwargs):
        check_config(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        check_backend(self.model.layers)
        self.is_compiled = vllm_config.compilation_config.mode not in (None, CompilationMode.NONE)
        self.dtype = vllm_config.model_config.dtype
        self.device = torch.device(vllm_config.device_config.device)
        self.key_value_weights: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.compiled: dict[range, object] = {}
        self.counts = Counts()
        self.use(os.environ["POP_PLAN"])
        self.is_tested = False
        runner_v1.install()
        if get_tensor_model_parallel_rank() == 0:
            self.announce(os.environ["POP_PLAN"])

    def announce(self, name: str) -> None:
        """Log what the plan with this name does."""
        counts = len(self.plan.layers), len(self.model.layers), self.plan.full_depth_below
        what = "pop: POP_PLAN is %s: %d of %d layers, for prompts of %d tokens or more%s"
        logger.info(what, name, *counts, self.plan.judgement)
        most = longest()
        if most is not None:
            logger.info("pop: prompts of more than %d tokens run at full depth, by POP_LONGEST", most)
        if "verdict" in self.plan.about and not self.plan.holds:
            logger.warning("pop: by the verdict in its record, this plan does not hold; `pop plans` prints why")
        if self.plan.layers and self.plan.corrections is None:
            logger.warning("pop: this plan is not calibrated, so it may lose answers about the prompt")
        if self.selects_at is not None and self.reruns_at is None:
            logger.warning("pop: with this plan, a prompt in chunks selects among the tokens of its last chunk only")

    def get_model_state_cls(self):
        """The ModelState that runner V2 asks for. Where V1 runs, its module need not load."""
        from pop_vllm.runner_v2 import PrunedState

        return PrunedState

    def use(self, plan) -> None:
        """Prune by a plan from the next step on. Takes the values of POP_PLAN, or a pop.PrunePlan."""
        layers = self.model.layers
        plan = PrunePlan.of(plan, len(layers)).to(self.device, self.dtype, self._own_rows())
        self.plan = plan
        self.groups = plan.groups(len(layers))
        self.selects_at = plan.selects_at if plan.full_depth_selected else None
        if self.selects_at is not None:
            self.groups = [part for group in self.groups for part in split(group, self.selects_at)]
        self.reruns_at = self._reruns_at()
        self.attention: RowAttention | None = None
        self.announced = None
        self.kept: dict[str, Kept] = {}

    def _reruns_at(self) -> int | None:
        """The first pruned layer after the selecting one, if tokens of earlier steps can run again from there.

        They cannot if kept layers follow, which other tokens of these steps have run. Nor if a layer has a window: its
        cache has given some of their blocks away.
        """
        if self.selects_at is None:
            return None
        num_layers = len(self.model.layers)
        first = min(index for index in self.plan.layers if index > self.selects_at)
        later = range(first, num_layers)
        has_window = any(self.model.layers[index].self_attn.attn.sliding_window for index in later)
        is_deepest = set(later) <= set(self.plan.layers)
        return first if is_deepest and not has_window else None

    @property
    def keeps_states(self) -> bool:
        """Whether a later step of a prompt may need states of this one."""
        return self.plan.corrections is not None or self.selects_at is not None

    def _own_rows(self) -> list[int] | None:
        """Which of the K * E rows of the corrections belong to this rank's K/V heads. None: all."""
        ranks = get_tensor_model_parallel_world_size()
        if ranks == 1:
            return None
        attention = self.model.layers[0].self_attn
        first_head = get_tensor_model_parallel_rank() * attention.total_num_kv_heads // ranks
        begin = first_head * attention.head_dim
        return list(range(begin, begin + attention.kv_size))

    def load_weights(self, weights):
        """As vLLM's own. The rows of K and V in each fused projection are kept, since a pruned layer needs no Q.

        Quantised weights are not cut. A pruned layer then computes Q for nothing.
        """
        loaded = super().load_weights(weights)
        for index, layer in enumerate(self.model.layers):
            attention = layer.self_attn
            projection = attention.qkv_proj
            if isinstance(projection.quant_method, UnquantizedLinearMethod):
                weight = projection.weight
                bias = None if projection.bias is None else projection.bias[attention.q_size :]
                self.key_value_weights[index] = weight[attention.q_size :], bias
        if self.plan.corrections is not None:
            check_weights(self, self.plan)
        return loaded

    def begin(self, attention_groups, batch: Batch, block_tables: list[Tensor]) -> None:
        """Announce a step whose prompts may be pruned.

        Args:
            attention_groups: vLLM's AttentionGroups, a list for each group of its KV cache.
            batch: The requests.
            block_tables: For each group of the KV cache, the blocks of each request [requests, blocks].
        """
        if self.attention is None:
            names = {self.model.layers[index].self_attn.attn.layer_name for index in self.plan.layers}
            self.attention = RowAttention(attention_groups, names)
        has_prompts = (batch.computed < batch.prompt).any()
        self.announced = (batch, block_tables) if has_prompts else None

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        announced = self.announced
        self.announced = None
        context = get_forward_context()
        if announced is None or not self.plan.layers or not context.attn_metadata:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        batch, block_tables = announced
        kept = [self._kept(name, end) for name, end in zip(batch.ids, batch.computed, strict=True)]
        step = Step(self.plan, batch, block_tables, self.attention, kept, len(positions))
        if self._is_plain(step):
            self._count(step)
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        h = self.model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        if not self.is_tested:
            own = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
            self._test(own, announced, h, positions, context)
        h = self.run(step, h, positions, context)
        self._keep_states(step)
        self._count(step)
        return h

    def _is_plain(self, step: Step) -> bool:
        """Whether vLLM's own pass does: the step prunes nothing, and shares no states with other steps."""
        shares_states = step.continues.any() or any(kept is not None for kept in step.kept)
        return step.num_pruned == 0 and not (self.keeps_states and shares_states)

    def _count(self, step: Step) -> None:
        if get_tensor_model_parallel_rank() == 0:  # the other ranks run the same tokens
            self.counts.add(int(step.batch.scheduled.sum()), step.num_pruned, step.rows_run)

    def _test(self, own: Tensor, announced, h: Tensor, positions: Tensor, context) -> None:
        """Compare vLLM's own pass with the pruned one where every token is at full depth, on the first pruned step."""
        batch, block_tables = announced
        plan = dataclasses.replace(self.plan, full_depth_last=2**31 - 1)
        step = Step(plan, batch, block_tables, self.attention, [None] * len(batch.ids), len(positions))
        tokens = slice(int(batch.scheduled.sum()))
        check_equal(self.run(step, h, positions, context)[tokens], own[tokens])
        counts = len(plan.layers), len(self.model.layers)
        logger.info("pop: without pruning, a first step equals vLLM's own pass; now pruning %d of %d layers", *counts)
        self.is_tested = True

    def run(self, step: Step, h: Tensor, positions: Tensor, context) -> Tensor:
        """Run the layers on the tokens of a step: h [N, D] -> h [N, D] after the last norm."""
        with own_metadata(context) as slots:
            step.attend(context)
            for group in self.groups:
                if group.layers[0] == self.selects_at:
                    select(step, self.model.layers[self.selects_at], h)
                    step.attend(context)
                if group.is_pruned:
                    h = self.run_pruned(step, group, h, positions, slots)
                else:
                    h = self.run_layers(group.layers, h, positions)
        return self.model.norm(h)

    def run_layers(self, indices: range, h: Tensor, positions: Tensor) -> Tensor:
        """Run whole layers: h [N, D] -> [N, D]. Compiled if vLLM compiles."""
        if indices not in self.compiled:
            layers = [self.model.layers[index] for index in indices]

            def through(h: Tensor, positions: Tensor) -> Tensor:
                residual = None
                for layer in layers:
                    h, residual = layer(positions, h, residual)
                return h + residual

            self.compiled[indices] = torch.compile(through, dynamic=True) if self.is_compiled else through
        return self.compiled[indices](h, positions)

    def run_pruned(self, step: Step, group: Group, h: Tensor, positions: Tensor, slots) -> Tensor:
        """Write K and V of all tokens, and run the group's layers on the rows: h [N, D] -> h [N, D] after the group."""
        passed = self.write_keys_values(step, group, h, positions, slots)
        if group.layers[0] == self.reruns_at:
            step.entering = h
        rows = step.rows
        step.rows_run |= dict.fromkeys(group.layers, len(rows.index))
        if not rows.lengths:
            return passed
        tokens = torch.cat((h, *step.earlier))
        f = self.run_layers(group.layers, tokens[rows.index], rows.position)
        if step.earlier:
            passed = torch.cat((passed, *step.earlier))
        return passed.index_copy(0, rows.index, f)[: len(h)]

    def write_keys_values(self, step: Step, group: Group, h: Tensor, positions: Tensor, slots) -> Tensor:
        """Write K and V of a pruned group, all from the h [N, D] that enters. Returns the h that leaves the group."""
        corrections = group.corrections
        z = None
        passed = h
        if corrections is not None:
            x = normalised(h, self.model.layers[group.layers[0]])
            z = F.linear(torch.cat((x, step.before(x)), dim=-1), corrections.shared)  # [N, R]
            passed = corrections.with_update(h, z)
        for number, index in enumerate(group.layers):
            k, v = self.projected(index, h)
            if z is not None:
                correction = F.linear(z, corrections.weight[number])  # [N, 2 * K * E]
                correction_k, correction_v = correction.chunk(2, dim=-1)
                k = k + correction_k
                v = v + correction_v
            attention = self.model.layers[index].self_attn
            k, v = cached(attention, k, v, positions)  # [N, K, E] each
            cache = attention.attn
            cache.impl.do_kv_cache_update(cache, k, v, cache.kv_cache, slots[cache.layer_name])
        return passed

    def projected(self, index: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's own K and V [N, K * E] of h [N, D], before K's norm and rotary positions."""
        layer = self.model.layers[index]
        attention = layer.self_attn
        x = layer.input_layernorm(h)
        if index in self.key_value_weights:
            keys_values = F.linear(x, *self.key_value_weights[index])
        else:
            keys_values = attention.qkv_proj(x)[0][:, attention.q_size :]
        return keys_values.chunk(2, dim=-1)

    def _kept(self, name: str, computed: int) -> Kept | None:
        """What was kept of a request if that ends where this step begins. A preempted request begins anew."""
        kept = self.kept.pop(name, None)
        return kept if kept is not None and kept.end == computed else None

    def _keep_states(self, step: Step) -> None:
        if not self.keeps_states:
            return
        for number in np.flatnonzero(step.continues):
            self.kept[step.batch.ids[number]] = step.keep(number)
        while len(self.kept) > 1 and self._keeps_too_much():
            self.kept.pop(next(iter(self.kept)))  # the oldest, perhaps of a request that was aborted

    def _keeps_too_much(self) -> bool:
        return len(self.kept) > MOST_REQUESTS or sum(kept.size for kept in self.kept.values()) > MOST_KEPT


def split(group: Group, layer: int) -> list[Group]:
    """A group in two parts, of which the second begins with `layer`. The group itself if it doesn't have the layer."""
    if layer not in group.layers[1:]:
        return [group]
    before = range(group.layers[0], layer)
    after = range(layer, group.layers[-1] + 1)
    return [group._replace(layers=before), group._replace(layers=after)]


class PrunedLlamaForCausalLM(Pruned, LlamaForCausalLM):
    pass


class PrunedQwen3ForCausalLM(Pruned, Qwen3ForCausalLM):
    pass


class PrunedQwen3MoeForCausalLM(Pruned, Qwen3MoeForCausalLM):
    pass


class PrunedGemma3ForCausalLM(Pruned, Gemma3ForCausalLM):
    pass
