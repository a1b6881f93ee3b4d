"""Filled caches that are kept for later prompts, which begin with the same tokens."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch

import pop
from pop.engine.cache import KVCache
from pop.errors import CacheMemoryError
from pop.inputs.processors import Prepared
from pop.runner import FULL_DEPTH, padded

MOST = 256  # caches, since each answer is compared with all of them


@dataclasses.dataclass(eq=False)
class Filled:
    """A cache of one row, and what its tokens are.

    With full attention, a prompt can continue from any of its tokens. A layer with a sliding window lacks what was
    outside of the window, so such a cache serves only prompts that share the tokens up to its `floor`.
    """

    keys: list[int | str]  # its token ids, with a hash of the image in place of each of its placeholders
    cache: KVCache
    media: range  # from its first image's first placeholder to its last image's last one
    floor: int  # the fewest tokens to which it can be rewound
    whole: list[bool]  # whether each token ran at full depth by its position
    plan: pop.PrunePlan | None  # of the job that has filled it. It serves only jobs with the same one

    @classmethod
    def of(
        cls, keys: list[int | str], cache: KVCache, images: Sequence[range], floor: int, whole: list[bool], plan
    ) -> Filled:
        """images: where the prompt's images are, of which some may be after these keys. The same holds for `whole`."""
        held = [one for one in images if one.stop <= len(keys)]
        media = range(held[0].start, held[-1].stop) if held else range(0)
        return cls(keys, cache, media, floor, whole[: len(keys)], plan)

    def common(self, keys: list[int | str]) -> int:
        """How many first tokens a prompt has in common with it."""
        pairs = enumerate(zip(self.keys, keys, strict=False))
        return next((n for n, (mine, other) in pairs if mine != other), min(len(self.keys), len(keys)))

    def usable(self, keys: list[int | str], last: int, again: int) -> int:
        """How many first tokens of a prompt it can replace, but not all. Its images count together or not at all.

        Those from `last` on have to be at full depth. The last `again` of the tokens run again, unless these are all of
        its tokens. Those of an image cannot.
        """
        n = min(self.common(keys), len(keys) - 1)
        n = next((token for token in range(last, n) if not self.whole[token]), n)
        first = self.media.stop + 1  # the fewest tokens with all images
        if n < len(self.keys):
            first = self.media.stop + max(1, again)
        if n < first:
            n = min(n, self.media.start)
        return n if n >= self.floor else 0

    def covers(self, other: Filled) -> bool:
        """Whether it serves every prompt that the other serves."""
        is_as_good = self.plan is other.plan and self.floor <= other.floor and self.media == other.media
        return is_as_good and self.keys[: len(other.keys)] == other.keys

    def copy_to(self, cache: KVCache, model: pop.Model, n: int) -> None:
        """Copy the first n tokens into an empty cache of one row."""
        view = row_of(self.cache, 0)
        if n < len(self.keys):
            if n <= self.media.start:
                view.rope_offsets = torch.zeros_like(view.rope_offsets)
            plan = model.resolve(self.plan)
            # The next token may read the hidden states of token n - 1, which runs again for them. They are right up to
            # the first update of h, which needs those of token n - 2, and so on. Keys and values need no second run.
            for token in range(max(0, n - rerun(plan)), n):
                view.lengths = torch.tensor([token])
                cache.copy_from(view)
                tokens, lengths = padded([[self.keys[token]]])
                depth = FULL_DEPTH if self.whole[token] else plan
                model.prefill_prepared(tokens, cache, lengths, [()], depth, is_last_part=False)
                view.previous_hidden = cache.previous_hidden
            view.lengths = torch.tensor([n])
        cache.copy_from(view)


def rerun(plan: pop.PrunePlan) -> int:
    """How many tokens run again for the hidden states that a rewound cache needs."""
    if plan.corrections is None:
        return 0
    updates = plan.corrections.update
    return 1 if updates is None else 1 + len(updates)


class Kept:
    """At most MOST filled caches of at most `most_bytes` in all, the latest used first. The others give way."""

    def __init__(self, model: pop.Model, most_bytes: int):
        self.model, self.most_bytes = model, most_bytes
        self.caches: list[Filled] = []

    def touch(self, filled: Filled) -> None:
        """Note that it was used."""
        if filled in self.caches:
            self.caches.remove(filled)
            self.caches.insert(0, filled)

    def add(self, filled: Filled) -> None:
        """Keep a copy, which takes no more memory than its tokens need, unless another cache covers it."""
        model = self.model
        for one in self.caches:
            if one.covers(filled):
                return self.touch(one)
        self.caches = [one for one in self.caches if not filled.covers(one)]
        tokens = len(filled.keys)
        size = KVCache.size_in_bytes(model.config, 1, tokens, model.dtype, model.chunk_size, states=True)
        if size > self.most_bytes:
            return
        del self.caches[MOST - 1 :]
        while sum(one.cache.nbytes for one in self.caches) + size > self.most_bytes:
            self.caches.pop()
        try:
            cache = model.new_cache(1, tokens)
            cache.copy_from(filled.cache)
        except CacheMemoryError:
            return
        self.caches.insert(0, dataclasses.replace(filled, cache=cache))


def keys_of(tokens: list[int], media: Sequence[Prepared], images: Sequence[range]) -> list[int | str]:
    """The keys of a prompt whose images are at these tokens."""
    keys = list(tokens)
    for one, at in zip(media, images, strict=True):
        keys[at.start : at.stop] = [f"{one.kind} {one.grid} {one.sha256}"] * len(at)
    return keys


def row_of(cache: KVCache, row: int) -> KVCache:
    """One row of a cache, as a cache of one row with the same memory."""
    view = copy.copy(cache)
    rows = slice(row, row + 1)
    view.keys, view.values = [keys[rows] for keys in cache.keys], [values[rows] for values in cache.values]
    view.entered, view.skipped = cache.entered[rows], cache.skipped[rows]
    view.lengths = cache.lengths[rows]
    view.move_to(cache.lengths[rows], cache.previous_hidden[:, rows], cache.rope_offsets[rows])
    return view
