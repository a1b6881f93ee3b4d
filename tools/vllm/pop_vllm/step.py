"""One step of vLLM's engine: its tokens, those of them that run at full depth, and what the next step needs of it."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pop_vllm.attention import RowAttention, Rows
from pop_vllm.rows import Batch, runs_of


@dataclass
class Kept:
    """What a step keeps of a prompt that goes on in a later step."""

    end: int  # tokens of the prompt so far
    latest: list[Tensor]  # the last token's normalised state [D], as it entered each calibrated group
    selecting: list[Tensor] = field(default_factory=list)  # states [n, D] that entered the selecting layer, by chunk
    entering: list[Tensor] = field(default_factory=list)  # and the first pruned layer after it

    @property
    def size(self) -> int:
        """How many tokens have states here."""
        return 1 + sum(map(len, self.selecting))


class Step:
    """The tokens of a step.

    Args:
        plan: Says which tokens run at full depth by their position.
        batch: The requests.
        block_tables: For each group of the KV cache, the blocks of each request [requests, blocks].
        attention: How rows attend.
        kept: What earlier steps have kept of the requests, None where that is nothing.
        num_tokens: Tokens of the flat batch with padding.
    """

    def __init__(self, plan, batch: Batch, block_tables: list[Tensor], attention: RowAttention, kept, num_tokens: int):
        self.plan = plan
        self.batch = batch
        self.block_tables = block_tables
        self.attention = attention
        self.kept: list[Kept | None] = kept
        self.padding = num_tokens - int(batch.scheduled.sum())
        self.device = block_tables[0].device
        self.first = self.to_device(batch.first)
        self.last = self.to_device(batch.first + batch.scheduled - 1)
        self.latest: list[Tensor] = []  # of each calibrated group so far: each request's last state [requests, D]
        self.selecting: Tensor | None = None  # h [N, D] that enters the selecting layer
        self.entering: Tensor | None = None  # h [N, D] that enters the first pruned layer after it
        self.earlier: list[Tensor] = []  # what entered that layer, of tokens of earlier steps that may run again
        self.rows = self.rows_at([])
        self.num_pruned = int(batch.scheduled.sum()) - len(self.rows.index)
        self.rows_run: dict[int, int] = {}  # how many each pruned layer has run

    @property
    def continues(self) -> np.ndarray:
        """Which requests have a later step that may prune tokens of their prompts: [requests] bool."""
        batch = self.batch
        return (batch.ends < batch.prompt) & (batch.prompt >= self.plan.full_depth_below)

    def to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def rows_at(self, again: list[tuple[int, int]]) -> Rows:
        """The tokens at full depth by their position.

        Args:
            again: For each request whose earlier tokens may run again, its number and the position where these begin.
                They come after the step's tokens and its padding.
        """
        batch = self.batch
        request, position = batch.tokens()
        request = np.pad(request, (0, self.padding))
        position = np.pad(position, (0, self.padding))
        is_token = np.arange(len(request)) < len(request) - self.padding
        for number, begin in again:
            earlier = np.arange(begin, batch.computed[number])
            request = np.append(request, np.full_like(earlier, number))
            position = np.append(position, earlier)
            is_token = np.append(is_token, np.ones_like(earlier, dtype=bool))
        chosen = self.plan.at_full_depth(position, batch.prompt[request]) & is_token
        if self.plan.corrections is not None:
            chosen[batch.first[self._unknown()]] = True
        runs = runs_of(request, position, chosen)
        index, request, position = (self.to_device(x) for x in (runs.index, request[runs.index], position[runs.index]))
        return Rows(index, request, position, runs.lengths)

    def _unknown(self) -> np.ndarray:
        """The requests whose first token lacks the state of the token before, which a calibrated group needs.

        Such a prompt begins after a prefix from the cache. Its first token runs at full depth instead.
        """
        is_known = np.array([kept is not None for kept in self.kept])
        return (self.batch.computed > 0) & (self.batch.computed < self.batch.prompt) & ~is_known

    def before(self, x: Tensor) -> Tensor:
        """The state of each token's predecessor [N, D] as it entered a calibrated group, from the tokens' x [N, D]."""
        number = len(self.latest)
        self.latest.append(x[self.last])
        zeros = torch.zeros_like(x[0])
        states = [zeros if kept is None else kept.latest[number] for kept in self.kept]
        return torch.cat((x[:1], x[:-1])).index_copy(0, self.first, torch.stack(states))

    def attend(self, context) -> None:
        """From now on, the pruned layers take the rows."""
        if self.rows.lengths:
            self.attention.attend(context, self.rows, self.block_tables, int(self.batch.ends.max()))

    def keep(self, number: int) -> Kept:
        """What the next step needs of a request."""
        kept = self.kept[number] or Kept(0, [])
        first = self.batch.first[number]
        own = slice(first, first + self.batch.scheduled[number])
        latest = [states[number].clone() for states in self.latest]  # a view would keep the states of all requests
        kept = Kept(int(self.batch.ends[number]), latest, kept.selecting, kept.entering)
        if self.entering is not None:
            kept.selecting.append(self.selecting[own].clone())
            kept.entering.append(self.entering[own].clone())
        return kept


@contextmanager
def own_metadata(context):
    """Undo changes to the metadata and slots of layers in vLLM's ForwardContext. Yields the slots of all tokens."""
    metadata = context.attn_metadata
    slots = context.slot_mapping
    context.attn_metadata = dict(metadata)
    context.slot_mapping = dict(slots)
    try:
        yield slots
    finally:
        context.attn_metadata = metadata
        context.slot_mapping = slots
