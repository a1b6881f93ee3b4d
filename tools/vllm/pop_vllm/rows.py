"""Which tokens of a step run the pruned layers. Plain numpy, without vLLM.

vLLM runs the tokens of all scheduled requests as one flat batch of N tokens: whole prompts, chunks of prompts, and one
token of each request that decodes. Its attention kernels take each request's tokens as the last ones of a sequence. But
full-depth tokens may lie anywhere in a prompt. So the kernels take each run of consecutive full-depth tokens for a
request of its own: it has the blocks of the request that it belongs to, and its sequence ends with the run.
"""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """The requests of a step, in the order of their tokens in the flat batch. Counts are [requests] int64."""

    ids: list[str]
    computed: np.ndarray  # tokens in the cache before the step
    scheduled: np.ndarray  # tokens of the step
    prompt: np.ndarray  # tokens of the prompt; 0 for a request that must not be pruned

    @property
    def first(self) -> np.ndarray:
        """The index of each request's first token in the flat batch."""
        return np.cumsum(self.scheduled) - self.scheduled

    @property
    def ends(self) -> np.ndarray:
        """The tokens in the cache after the step."""
        return self.computed + self.scheduled

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """The number of its request, and its position there, for each token of the flat batch: [N] each."""
        request = np.repeat(np.arange(len(self.ids)), self.scheduled)
        position = np.arange(len(request)) - self.first[request] + self.computed[request]
        return request, position


class Runs(NamedTuple):
    """Full-depth tokens, run by run. Runs of one token come first: backends expect decoding requests there."""

    index: np.ndarray  # [W], of each token among those given
    lengths: list[int]  # of the R runs


def runs_of(request: np.ndarray, position: np.ndarray, chosen: np.ndarray) -> Runs:
    """Split the `chosen` tokens [N] bool into runs of consecutive tokens of one request."""
    order = np.lexsort((position, request))
    index = order[chosen[order]]
    is_next = (np.diff(request[index]) == 0) & (np.diff(position[index]) == 1)
    runs = np.split(index, np.flatnonzero(~is_next) + 1)
    runs = sorted((run for run in runs if len(run)), key=len)
    return Runs(np.concatenate([index[:0], *runs]), [len(run) for run in runs])
