"""Caches for answers, which may be used again: their captured decode steps are worth keeping on a GPU."""

import threading

from pop.engine.cache import KVCache
from pop.errors import CacheMemoryError
from pop.system.memory import free_bytes

SHARE = 1 / 4  # of the memory that is free without them, which kept caches may take at most
SMALLEST, GROWTH = 256, 1.25  # tokens; sizes go up in steps, so that a kept cache fits many answers


class Caches:
    """Makes the caches of a model's answers, and keeps up to `kept` of those that answers are finished with."""

    def __init__(self, kept: int):
        self.kept, self._spare, self._lock = kept, [], threading.Lock()

    def __reduce__(self) -> tuple:
        return Caches, (self.kept,)  # a copy of the model makes caches of its own

    def take(self, model, batch_size: int, max_seq_len: int) -> KVCache:
        """An empty cache, as from `model.new_cache`. It may have room for more than max_seq_len tokens a row."""
        if not self.kept:
            return model.new_cache(batch_size, max_seq_len)
        size = min(stepped(max_seq_len), model.max_seq_len)
        wanted = batch_size, size, model.chunk_size, model.dtype, model.device
        with self._lock:
            for cache in self._spare:
                hidden = cache.previous_hidden
                if (cache.batch_size, cache.max_seq_len, cache.chunk_size, hidden.dtype, hidden.device) == wanted:
                    self._spare.remove(cache)
                    cache.reset()
                    return cache
        try:
            return model.new_cache(batch_size, size)
        except CacheMemoryError:
            pass  # and forget the error, which holds what it could allocate
        return model.new_cache(batch_size, max_seq_len)

    def give(self, cache: KVCache) -> None:
        """Take back a cache that nobody uses any more, in a state that `reset` empties. The oldest give way."""
        if not self.kept:
            return
        with self._lock:
            self._spare = [cache, *self._spare][: self.kept]
            free = free_bytes(cache.device)
            while free is not None and (held := sum(spare.nbytes for spare in self._spare)) > SHARE * (free + held):
                free += self._spare.pop().nbytes

    def clear(self) -> bool:
        """Free the memory of the kept caches. Returns whether there were any."""
        with self._lock:
            had_any, self._spare = bool(self._spare), []
        return had_any


def stepped(max_seq_len: int) -> int:
    """The next size from max_seq_len on: a multiple of 256 tokens, each about a quarter larger than the one before."""
    size = SMALLEST
    while size < max_seq_len:
        size = -(-int(size * GROWTH) // SMALLEST) * SMALLEST
    return size
