"""The server's engine: one thread, which gives all answers of a batch their next token, again and again.

    waiting ──prefill──► row ──joins──► batch ──decode──► a token for each row ──► events
                 ▲                                                │
                 └──────────────── kept caches ◄──────── an answer has ended

Rows join and leave the batch between two tokens, and each has its own options of sampling. A prompt is prefilled from
where its longest common prefix with a filled cache ends: one that is kept, or one of a row.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from itertools import pairwise

import torch

import pop
from pop.engine.cache import KVCache
from pop.engine.spare_caches import size_of_cache
from pop.errors import CacheMemoryError, InputError
from pop.runner import padded
from tools.serve.kept import Filled, Kept, keys_of, rerun, row_of
from tools.serve.rows import Busy, Job, Row

WORTH_KEEPING = 64  # tokens that two prompts must share for a separate cache, see `_admit`


class Engine:
    """Answers jobs. Other threads may call `submit` and `cancel`.

    Args:
        model: A model with a tokenizer.
        most_rows: The most answers in a batch.
        most_waiting: The most jobs in the queue.
        kept_bytes: The most memory that kept caches take.
    """

    def __init__(self, model: pop.Model, most_rows: int, most_waiting: int, kept_bytes: int):
        self.model, self.most_rows, self.most_waiting = model, most_rows, most_waiting
        self.waiting: deque[Job] = deque()
        self.wake = threading.Condition()  # guards `waiting`
        # Only the engine's thread changes the rest.
        self.kept = Kept(model, kept_bytes)
        self.admitting: Job | None = None  # whose prompt is being prefilled
        self.rows: list[Row] = []
        self.cache: KVCache | None = None  # of the batch
        self.is_current = True  # whether the batch has all rows and no others
        # On a GPU, the cache of the batch has 1, 2, 4, 8 ... rows, some of them empty. So rows come and go without a
        # new cache, for which the decode step would have to be captured again.
        self.has_empty_rows = model.device.type == "cuda"

    def submit(self, jobs: list[Job]) -> None:
        """Put jobs into the queue, all or none. Raises Busy if they do not fit."""
        with self.wake:
            if len(self.waiting) + len(jobs) > self.most_waiting:
                raise Busy
            self.waiting.extend(jobs)
            self.wake.notify()

    def cancel(self, jobs: list[Job]) -> None:
        """End jobs, unless they have ended. They leave the queue at once, and the batch before its next token."""
        with self.wake:
            for job in jobs:
                job.cancelled = True
                with suppress(ValueError):
                    self.waiting.remove(job)

    def counts(self) -> dict[str, int]:
        """How many answers are running, their prefill included, and how many wait."""
        with self.wake:
            # In this order, an answer that moves from one place to the next counts in at least one.
            return {"waiting": len(self.waiting), "running": (self.admitting is not None) + len(self.rows)}

    def run(self) -> None:
        """Work for ever. Raises what torch raises once the device is lost."""
        while True:
            self.turn()

    def turn(self) -> None:
        """Wait for work. Then admit a job, if there is one and a place for it, and give each row its next token."""
        with self.wake:
            self.wake.wait_for(lambda: self.rows or self.waiting)
            job = self.waiting.popleft() if self.waiting and len(self.rows) < self.most_rows else None
            self.admitting = job
        if job is not None and not job.cancelled:
            try:
                self._admit(job)
            except Exception as error:  # torch may raise nearly anything, and the other rows must continue
                job.fail(error)
                self._use_device()
        self.admitting = None
        self._step()

    def _admit(self, job: Job) -> None:
        """Prefill a job's prompt. It becomes a row, whose first token is drawn with the other rows' next one."""
        model = self.model
        tokens = job.tokens
        end = len(tokens)
        images = model.vision.locate(tokens, job.media)
        keys = keys_of(tokens, job.media, images)
        row = Row(model, job, keys, images, self._new_cache(1, end))
        plan = row.plan
        last = max(0, end - plan.full_depth_last)
        shared_rows = [row for row in self.rows if row.job.uses_kept]
        filled = [*self.kept.caches, *map(self._filled, shared_rows)] if job.uses_kept else []
        sources = [one for one in filled if one.plan is job.plan]
        again = rerun(plan)
        usable = [(one.usable(keys, last, again), one) for one in sources]
        n, source = max(usable, key=lambda pair: pair[0], default=(0, None))
        if n:
            source.copy_to(row.cache, model, n)
            self.kept.touch(source)
        job.cached_tokens = n
        job.pruned_tokens = plan.num_pruned(end, n)
        row.floor = source.floor if n else 0
        row.whole = source.whole[:n] if n else []
        row.whole += plan.at_full_depth(torch.arange(n, end), end).tolist()
        # A cache with windows may share more tokens and not be usable. A separate cache keeps these for later prompts.
        shared = max((one.common(keys) for one in sources if one.floor), default=0)
        shared = shared if shared >= n + WORTH_KEEPING else 0
        del filled, sources, source, usable  # so that caches can give way
        cuts = sorted({*range(n + model.chunk_size, last + 1, model.chunk_size), shared})
        if plan.full_depth_selected or end < plan.full_depth_below:  # what runs is decided for all tokens of a call
            cuts = []
        cuts = [cut for cut in cuts if n < cut <= last and not any(one.start < cut < one.stop for one in images)]
        for begin, cut in pairwise([n, *cuts, end]):
            fresh = [one for one, at in zip(job.media, images, strict=True) if begin <= at.start < cut]
            part, lengths = padded([tokens[begin:cut]])
            row.logits = model.prefill_prepared(part, row.cache, lengths, [fresh], plan, is_last_part=cut == end)
            if cut == shared:
                self.kept.add(Filled.of(keys[:cut], row.cache, images, cut, row.whole, job.plan))
            if cut < end:
                self._step()  # the others do not wait for all of a long prompt
            if job.cancelled:
                return
        self.rows.append(row)
        self.is_current = False

    def _step(self) -> None:
        """Give each row its next token."""
        try:
            for row in [row for row in self.rows if row.job.cancelled]:
                self._leave(row)
            if self.rows:
                self._next_tokens()
            elif self.cache is not None:
                self._regroup()  # which frees it
        except Exception as error:  # as above
            for row in self.rows:
                row.job.fail(error)
            self.rows, self.cache = [], None
            self._use_device()

    def _use_device(self) -> None:
        """Raise an error if the device can no longer be used, as a GPU cannot after a write to a wrong address."""
        with suppress(torch.OutOfMemoryError):
            torch.ones(1, device=self.model.device).tolist()

    def _next_tokens(self) -> None:
        drawn = {}
        for row in list(self.rows):
            try:
                drawn[row] = row.draw()
            except Exception as error:  # as a processor of logits may raise
                self._drop(row, error)
        tokens = torch.cat([*drawn.values()]).tolist() if drawn else []  # the only wait for the device
        for row, token in zip(drawn, tokens, strict=True):
            if token < 0:
                self._drop(row, InputError("the logits are not finite; load the model in another dtype"))
                continue
            row.push(token)
            if row.answer.finish_reason:
                self._leave(row)
        is_full = self.cache is not None and int(self.cache.lengths.max()) >= self.cache.max_seq_len
        if is_full or not self.is_current:
            self._regroup()
        if self.rows:
            latest = torch.zeros(self.cache.batch_size, dtype=torch.int64)
            for row in self.rows:
                latest[row.place] = row.answer.tokens[-1]
            logits = self.model.decode(latest, self.cache).split(1)
            for row in self.rows:
                row.logits = logits[row.place]

    def _drop(self, row: Row, error: Exception) -> None:
        """End a row whose answer has failed."""
        row.job.fail(error)
        self.rows.remove(row)
        self.is_current = False

    def _leave(self, row: Row) -> None:
        """End a row, and keep its cache if its request shares it."""
        if row.job.uses_kept:
            self.kept.add(self._filled(row))
        self.rows.remove(row)
        self.is_current = False

    def _filled(self, row: Row) -> Filled:
        """A row's cache, and what its tokens are."""
        cache = row.cache or row_of(self.cache, row.place)
        held = int(cache.lengths[0])
        floor = 0
        if cache.has_windows:  # whose rings lack older tokens
            # `Filled.copy_to` goes back by as many more as run again.
            floor = max(row.floor, held - self.model.chunk_size + rerun(row.plan))
        keys = (row.keys + row.answer.tokens)[:held]
        whole = row.whole + [True] * len(row.answer.tokens)
        return Filled.of(keys, cache, row.images, floor, whole, row.job.plan)

    def _regroup(self) -> None:
        """Give each row a place in the batch, with room for its next token. Without room, the cache is made anew."""
        old, caches = self.cache, [row.cache or row_of(self.cache, row.place) for row in self.rows]
        if not self._has_room(caches):
            self.cache = None
            while caches and self.cache is None:
                count = len(caches)
                if self.has_empty_rows:
                    count = 1 << (count - 1).bit_length()
                try:
                    self.cache = self._new_cache(count, 1 + longest(caches))
                except CacheMemoryError as error:
                    caches.pop()
                    self.rows.pop().job.fail(error)
            for row in self.rows:
                row.place = None
        if caches:
            self._fill(caches)
        if old is not None and old is not self.cache:
            self.model.caches.give(old)
        self.is_current = True

    def _has_room(self, caches: list[KVCache]) -> bool:
        """Whether the cache of the batch takes these rows. With few rows, one of fewer rows is faster."""
        if not (self.has_empty_rows and caches and self.cache is not None):
            return False
        count = self.cache.batch_size
        return len(caches) <= count < 4 * len(caches) and longest(caches) < self.cache.max_seq_len

    def _fill(self, caches: list[KVCache]) -> None:
        """Copy the rows that have no place into the batch, whose other places are now empty."""
        lengths, hidden, offsets = map(torch.zeros_like, self.cache.snapshot())
        free = sorted(set(range(len(lengths))) - {row.place for row in self.rows}, reverse=True)
        for row, cache in zip(self.rows, caches, strict=True):
            if row.place is None:
                row.place = free.pop()
                row_of(self.cache, row.place).copy_from(cache)
            lengths[row.place] = cache.lengths[0]
            hidden[:, row.place] = cache.previous_hidden[:, 0]
            offsets[row.place] = cache.rope_offsets[0]
            row.cache = None
        self.cache.move_to(lengths, hidden, offsets)

    def _new_cache(self, rows: int, tokens: int) -> KVCache:
        """An empty cache, for which kept ones give way. It has room for more tokens, so that it is not soon full.

        It holds states for later prompts, whatever its first prompt's plan, so that rows of all plans fit into it.
        """
        size = min(size_of_cache(tokens), self.model.max_seq_len)
        while True:
            try:
                cache = self.model.caches.take(self.model, rows, size)
                cache.hold_states()
                return cache
            except CacheMemoryError:
                if not self.kept.caches:
                    raise
            cache = None  # its memory, if it was the states that did not fit
            self.kept.caches.pop()


def longest(caches: list[KVCache]) -> int:
    """The most tokens in one of these caches of one row."""
    return max(int(cache.lengths[0]) for cache in caches)
