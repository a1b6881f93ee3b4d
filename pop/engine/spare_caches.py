"""Spare caches: those of finished answers, kept on a GPU for later ones together with their captured decode steps."""

import threading

from pop.engine.cache import KVCache
from pop.errors import CacheMemoryError
from pop.system.memory import free_bytes, stepped

SHARE = 1 / 4  # of the memory that is free without them, which spare caches may take at most
FEWEST_TOKENS = 256  # tokens. All sizes are multiples of it, so that a spare cache fits many short answers.


class SpareCaches:
    """Makes caches for a model's answers, and keeps up to `most` of them when the answers have ended.

    Without any to keep, as on a CPU, every cache is new. Otherwise `free_bytes` must know the device's memory.
    """

    def __init__(self, most: int):
        self.most = most
        self._spare: list[KVCache] = []  # the latest first
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return SpareCaches, (self.most,)  # a copy of the model makes caches of its own

    def take(self, model, batch_size: int, max_seq_len: int) -> KVCache:
        """An empty cache, as from `model.new_cache`. It may have room for more than max_seq_len tokens a row."""
        if not self.most:
            return model.new_cache(batch_size, max_seq_len)
        size = min(size_of_cache(max_seq_len), model.max_seq_len)
        wanted = (batch_size, size, model.chunk_size, model.dtype, model.device)
        with self._lock:
            for cache in self._spare:
                dtype = cache.previous_hidden.dtype
                found = (cache.batch_size, cache.max_seq_len, cache.chunk_size, dtype, cache.device)
                if found == wanted:
                    self._spare.remove(cache)
                    cache.reset()
                    return cache
        try:
            return model.new_cache(batch_size, size)
        except CacheMemoryError:
            pass  # and forget the error, which holds what it could allocate
        return model.new_cache(batch_size, max_seq_len)

    def give(self, cache: KVCache) -> None:
        """Take back a cache that nobody uses any more, in a state that `reset` empties. The oldest ones are freed."""
        if not self.most:
            return
        with self._lock:
            self._spare.insert(0, cache)
            del self._spare[self.most :]
            held = sum(spare.nbytes for spare in self._spare)
            most_bytes = SHARE * (free_bytes(cache.device) + held)
            while held > most_bytes:
                held -= self._spare.pop().nbytes

    def clear(self) -> bool:
        """Free the memory of all spare caches. Returns whether there were any."""
        with self._lock:
            had_any = bool(self._spare)
            self._spare.clear()
        return had_any


def size_of_cache(max_seq_len: int) -> int:
    """How many tokens a cache takes that is to fit many answers as long as this one."""
    return FEWEST_TOKENS * stepped(-(-max_seq_len // FEWEST_TOKENS))
