"""How rows attend: the metadata that vLLM's kernels take, for full-depth tokens alone."""

import copy
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata


class Rows(NamedTuple):
    """Full-depth tokens on the device, run by run (rows.py)."""

    index: Tensor  # [W], of each token in the step's tokens
    request: Tensor  # [W], the number of its request
    position: Tensor  # [W], its position there
    lengths: list[int]  # of the R runs

    def after(self, index: Tensor, request: int, position: Tensor) -> "Rows":
        """These rows after further tokens [n] of one request, each of which is a run by itself."""
        return Rows(
            torch.cat((index, self.index)),
            torch.cat((torch.full_like(position, request), self.request)),
            torch.cat((position, self.position)),
            [1] * len(index) + self.lengths,
        )


class RowAttention:
    """Makes the metadata of rows for the pruned layers.

    Args:
        attention_groups: vLLM's AttentionGroups, a list for each group of its KV cache.
        names: Of the pruned layers' attention.
    """

    def __init__(self, attention_groups, names: set[str]):
        self.builders = []
        for number, groups in enumerate(attention_groups):
            for group in groups:
                own = [name for name in group.layer_names if name in names]
                if own:
                    # Builders own buffers, which the metadata of the whole step uses. So these are other ones.
                    given = group.get_metadata_builder()
                    config = without_graphs(given.vllm_config)
                    builder = type(given)(given.kv_cache_spec, own, config, given.device)
                    self.builders.append((number, builder, own))

    def attend(self, context, rows: Rows, block_tables: list[Tensor], max_length: int) -> None:
        """From now on, the pruned layers take the rows: their attention and their slots in the cache.

        Args:
            context: vLLM's ForwardContext.
            rows: At least one.
            block_tables: For each group of the KV cache, the blocks of each request [requests, blocks].
            max_length: Of the requests' sequences after the step.
        """
        device = rows.index.device
        starts = torch.from_numpy(np.cumsum([0, *rows.lengths], dtype=np.int32))  # [R + 1]
        last = (starts[1:] - 1).to(device, torch.int64)  # [R]
        request = rows.request[last]
        ends = (rows.position[last] + 1).int()
        for number, builder, names in self.builders:
            table = block_tables[number]
            size = builder.kv_cache_spec.block_size
            block = table[rows.request, rows.position // size]  # [W]
            slots = block.to(torch.int64) * size + rows.position % size  # [W]
            common = CommonAttentionMetadata(
                query_start_loc=starts.to(device, non_blocking=True),
                query_start_loc_cpu=starts,
                seq_lens=ends,
                seq_lens_cpu_upper_bound=torch.full((len(ends),), max_length, dtype=torch.int32),
                num_reqs=len(ends),
                num_actual_tokens=len(slots),
                max_query_len=max(rows.lengths),
                max_seq_len=max_length,
                block_table_tensor=table[request],
                slot_mapping=slots,
            )
            metadata = builder.build(0, common)
            for name in names:
                context.attn_metadata[name] = metadata
                context.slot_mapping[name] = slots


def without_graphs(config):
    """A VllmConfig as if nothing were captured.

    For CUDA graphs, builders have buffers with room for max_num_seqs sequences. A step has more runs than that.
    """
    copied = copy.copy(config)
    copied.compilation_config = copy.copy(config.compilation_config)
    copied.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    return copied
