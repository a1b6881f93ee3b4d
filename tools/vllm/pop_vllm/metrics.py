"""What is pruned: two counters beside vLLM's own metrics, and a line in its log, at most once a minute.

Counters are of the process that runs the model. The server's /metrics shows them if PROMETHEUS_MULTIPROC_DIR is set.
"""

import logging
import time
from functools import cache

from prometheus_client import Counter

logger = logging.getLogger("vllm.pop")
INTERVAL = 60.0  # seconds between two lines


@cache
def counters() -> tuple[Counter, Counter]:
    """Registered once a process."""
    pruned = Counter("pop:pruned_tokens", "Prompt tokens not at full depth by position; selected ones are among them.")
    rows = Counter("pop:full_depth_rows", "Tokens that ran a pruned layer, in steps that pruned others.", ["layer"])
    return pruned, rows


class Counts:
    """Of one model."""

    def __init__(self):
        self.begin_interval()

    def begin_interval(self) -> None:
        self.since = time.monotonic()
        self.tokens = 0
        self.pruned = 0

    def add(self, tokens: int, pruned: int, rows: dict[int, int]) -> None:
        """Count a step.

        Args:
            tokens: How many it has.
            pruned: How many of them are not at full depth by their position.
            rows: How many tokens each pruned layer has run. If a plan selects, some are of earlier steps.
        """
        pruned_counter, rows_counter = counters()
        pruned_counter.inc(pruned)
        for layer, count in rows.items():
            rows_counter.labels(layer).inc(count)
        self.tokens += tokens
        self.pruned += pruned
        seconds = time.monotonic() - self.since
        if seconds >= INTERVAL:
            percent = 100 * self.pruned / self.tokens
            line = "pop: in %.0f s, steps with prompts had %d tokens, of which %.0f %% were pruned"
            logger.info(line, seconds, self.tokens, percent)
            self.begin_interval()
