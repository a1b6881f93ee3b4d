"""The runner: it checks tensors, and runs a module with a plan, compiled stages and caches. It knows no text.

`pop.Model` is a runner with a tokenizer. pop/engine computes.
"""

import functools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import pop.engine as engine
from pop.backends import accelerate, chunk_size_of, chunk_size_of_rows, replay_of, replayed_tokens_of
from pop.engine.cache import KVCache
from pop.engine.compile import SMALLEST_COMPILED, ReadyStages
from pop.engine.modes import engine_modes
from pop.engine.spare_caches import SpareCaches
from pop.errors import CacheMemoryError, ContextOverflow, InputError, check_count
from pop.inputs.processors import Prepared, Processor, processor_of
from pop.pruning.plan import PrunePlan, version_of
from pop.pruning.sketch import check_distance, distance, probe_states, sketch_of
from pop.system.memory import to_device

KEPT_CACHES = 2  # spare caches on a GPU, where a new cache needs a new captured decode step
# Several processes keep none. One of them might lack the memory for a spare cache, but all must replay the same graphs.
FULL_DEPTH = PrunePlan.none()


class Runner:
    """Prefill, decode and the plain forward pass of one module.

    Calls change nothing in a runner, so threads may share it, each with its own cache.

    Args:
        module: A PrunableModel (pop/models). Its weights decide `device` and `dtype`.
        config: The frozen dataclass of its sizes.
        plan: The plan of every prefill that is given no other. Takes the values of `prune` in `pop.load`.
        max_seq_len, compile, progress: As in `pop.load`.
        chunk_size: How many tokens of a prompt prefill runs at once. On a GPU, the rows of a batch share them. None
            takes what suits the device.
        vision: The processor of images and videos (pop/inputs/processors.py). None takes the family's.
        part: A pop.backends.tensor_parallel.Part if the module is one process's part of the model.
    """

    def __init__(
        self,
        module,
        config,
        *,
        plan=None,
        max_seq_len: int | None = None,
        chunk_size: int | None = None,
        compile="auto",
        progress: bool = False,
        vision: Processor | None = None,
        part=None,
    ):
        self.module = module
        self.config = config
        self.part = part
        self.vision = processor_of(config) if vision is None else vision
        self.max_seq_len = check_options(config, self.dtype, max_seq_len, compile)
        self._notes: set[str] = set()  # what stderr has been told
        self._saved_plans: dict[str, tuple] = {}  # by name or path: the version of its file, and the plan
        self.plan = PrunePlan.of(plan, config.num_layers)
        self.resolve(self.plan)  # raises if it does not fit the weights
        chunk_size = chunk_size_of(module) if chunk_size is None else check_count("chunk_size", chunk_size)
        self.chunk_size = max(chunk_size, self.vision.min_chunk_size)
        self.num_parameters = part.num_parameters if part else sum(map(Tensor.numel, module.parameters()))
        keeps_caches = self.device.type == "cuda" and part is None
        self.caches = SpareCaches(KEPT_CACHES if keeps_caches else 0)
        accelerate(module)
        compiles = compile is True or (compile == "auto" and self.num_parameters >= SMALLEST_COMPILED)
        self._stages = ReadyStages(
            module,
            replay_of(module, compiles),
            replayed_tokens_of(module),
            compile=compiles,
            required=compile is True,
            progress=progress,
            is_shared=part is not None,
        )

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def compiled(self) -> bool:
        """Whether prefill and decode run compiled, or will try to from the first use on."""
        return self._stages.works

    @functools.cached_property
    @engine_modes()
    def sketch(self) -> Tensor:
        """Numbers that tell the weights of the L layers from others: [L, 2, J] float32 (pop/pruning/sketch.py).

        They are computed once: after a change of the weights, make a new model.
        """
        h = probe_states(self.config.hidden_size).to(self.device, self.dtype)[None]  # [1, J, D]
        projected = [torch.cat(layer.projected(h)) for layer in self.module.layers]  # [2, J, K * E] each
        projected = torch.stack(projected).transpose(2, 3).float()  # [L, 2, K * E, J]
        if self.part is not None:  # each process has those of its heads
            projected = self.part.gather_heads(projected)
        return sketch_of(projected)

    # Calls

    def new_cache(self, batch_size: int = 1, max_seq_len: int | None = None) -> KVCache:
        """An empty KV cache. Spare caches are freed if it needs their memory.

        Args:
            batch_size: The number of rows.
            max_seq_len: Tokens a row; None takes the model's limit.

        Raises:
            CacheMemoryError: It does not fit into the device's memory.
            ContextOverflow: max_seq_len exceeds the model's.
        """
        max_seq_len = self.max_seq_len if max_seq_len is None else check_count("max_seq_len", max_seq_len)
        self.check_fits(max_seq_len, "a row of the cache")
        return self.unlimited_cache(batch_size, max_seq_len)

    def unlimited_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        """Like `new_cache`, but it may be longer than the model's context, for the padding of a batch."""
        allocate = functools.partial(
            KVCache,
            self.module.config,  # in one process of several, that of its part
            batch_size,
            max_seq_len,
            dtype=self.dtype,
            device=self.device,
            chunk_size=self.chunk_size,
        )
        return self._allocated(allocate)

    def _allocated(self, allocate: Callable):
        """What `allocate` returns. If it lacks memory, spare caches give way, and it is called once more."""
        try:
            return allocate()
        except CacheMemoryError:
            if not self.caches.clear():
                raise
        return allocate()

    def prefill(self, tokens, cache: KVCache, *, lengths=None, images=None, videos=None, plan=None) -> Tensor:
        """Append prompts to what the cache holds. Returns logits [B, V] float32 of each row's boundary token.

        Args:
            tokens: Ids [B, T], right-padded.
            cache: From `new_cache`, with B rows.
            lengths: The number of tokens in each row without padding, [B]. None: all T.
            images, videos: A list for each row, whose placeholders are among the tokens.
            plan: The plan of this call, as `Model.generate` takes it.

        Raises:
            InputError, PlanError: An argument does not fit the model. ContextOverflow: The cache is too small.
        """
        tokens = token_ids(tokens, 2, self.config.vocab_size)
        lengths = row_lengths(lengths, tokens)
        media = self.vision.prepare_batch(images, videos, len(tokens))
        return self.prefill_prepared(tokens, cache, lengths, media, self.resolve(plan))

    @engine_modes()
    def prefill_prepared(
        self,
        tokens: Tensor,
        cache: KVCache,
        lengths: Tensor,
        media: Sequence[Sequence[Prepared]],
        plan: PrunePlan,
        is_last_part: bool = True,
    ) -> Tensor:
        """Like `prefill`, for what has been checked and prepared before.

        Args:
            tokens: Ids [B, T] int64 on the CPU, right-padded. `padded` makes them and their lengths from lists.
            cache: As in `prefill`. Its room is checked here.
            lengths: [B] int64 on the CPU.
            media: The images and videos of each row.
            plan: From `resolve`.
            is_last_part: False if more of the same prompts follows in a later call. Then the logits are meaningless,
                and the plan selects no tokens.
        """
        self._check_cache(cache, lengths)
        if plan.selects:  # here, where spare caches can give way, and before any layer runs
            self._allocated(cache.hold_states)
        stages = self._stages(len(tokens), plan)
        images = self.vision.images(self._stages.vision_module, media, tokens, lengths)
        chunk_size = self.chunk_size
        if self.device.type == "cuda":
            chunk_size = max(chunk_size_of_rows(chunk_size, len(tokens)), self.vision.min_chunk_size)
        return engine.prefill(self.module, tokens, cache, lengths, plan, chunk_size, stages, images, is_last_part)

    def decode(self, tokens, cache: KVCache) -> Tensor:
        """Append one token a row, at full depth: tokens [B] -> logits [B, V] float32.

        Ids on a GPU are not checked here, since reading them would wait for it. The embedding's own assertion refuses
        an id outside the vocabulary, as a CUDA error, which ends all work of the process on the GPU.
        """
        tokens = token_ids(tokens, 1, self.config.vocab_size, wait=False).to(self.device, non_blocking=True)
        self._check_cache(cache, torch.ones(len(tokens), dtype=torch.int64, device="cpu"))
        return self.decode_prepared(tokens, cache)

    def decode_prepared(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Like `decode`, for tokens on the device and a cache with room for them."""
        return engine.decode(self.module, tokens, cache, self._stages(len(tokens), compare=False))

    def extend(self, tokens, cache: KVCache) -> Tensor:
        """Append tokens [B, T] at full depth, as `decode` would one by one. Returns their logits [B, T, V] float32."""
        tokens = token_ids(tokens, 2, self.config.vocab_size, wait=False).to(self.device, non_blocking=True)
        self._check_cache(cache, row_lengths(None, tokens))
        return engine.extend(self.module, tokens, cache, self._stages(len(tokens)))

    @engine_modes()
    def logits(self, tokens, images=None, videos=None) -> Tensor:
        """The plain unpruned forward pass: tokens [B, T] without padding -> logits [B, T, V] float32.

        images, videos: As in `prefill`.
        """
        tokens = token_ids(tokens, 2, self.config.vocab_size)
        media = self.vision.prepare_batch(images, videos, len(tokens))
        self.check_fits(tokens.shape[1])
        images = self.vision.images(self.module, media, tokens, row_lengths(None, tokens))
        (tokens,) = to_device([tokens], self.device)
        return self.module(tokens, images)

    # Compilation

    def warmup(self, batch_size: int = 1, plans: Sequence[PrunePlan | str] = ()) -> None:
        """Compile what prefill and decode need, unless the model runs eagerly.

        Nothing compiles again while torch.set_num_threads and the module stay the same.

        Args:
            batch_size: 1 for one prompt at a time. A larger number covers every batch size.
            plans: Other plans than the model's that calls will use.
        """
        batch_size = check_count("batch_size", batch_size)
        if not isinstance(plans, list | tuple):
            raise InputError(f"plans is {plans!r:.80}; give a list of plans")
        for rows in (1, 2)[:batch_size]:
            for plan in (self.plan, *plans):
                self._stages(rows, self.resolve(plan))

    def recompile(self) -> None:
        """Make compiled code and captured decode steps look at the module anew.

        Call it after you change an attribute of a layer. New weights, hooks and classes are noticed without it.
        """
        self._stages.forget()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_stages": None}

    def __setstate__(self, state: dict) -> None:
        """A copy is not compiled. On a GPU, it still records its decode steps and repeats them."""
        self.__dict__ |= state
        self._stages = ReadyStages(self.module, replay_of(self.module))

    # Checks

    def resolve(self, plan) -> PrunePlan:
        """The plan of a call, with its corrections on the model's device in its dtype.

        plan: Anything that `PrunePlan.of` takes. None and "default" stand for the model's own.
        """
        is_own = plan is None or (isinstance(plan, str) and plan == "default")
        plan = self.plan if is_own else self._plan_of(plan)
        if plan.corrections is None:
            return plan
        note = check_distance(self._distance(plan), plan.name)
        is_first = self.part is None or self.part.rank == 0
        if is_first and note and note not in self._notes:
            print(f"pop: {note}", file=sys.stderr, flush=True)
        self._notes.add(note)
        return plan.to(self.device, self.dtype, self.part and self.part.kv_rows)

    def _plan_of(self, plan) -> PrunePlan:
        """`PrunePlan.of`, but a file is read again only after a change. Its corrections compare by identity."""
        num_layers = self.config.num_layers
        version = version_of(plan)
        if version is None:
            return PrunePlan.of(plan, num_layers)
        known_version, known = self._saved_plans.get(str(plan), (None, None))
        if known_version != version:
            known = PrunePlan.of(plan, num_layers)
            self._saved_plans[str(plan)] = version, known
        return known

    def _distance(self, plan: PrunePlan) -> float:
        """How far the model's weights are from those that a calibrated plan was fitted to."""
        return distance(self.sketch[list(plan.layers)], plan.corrections.sketch)

    def check_fits(self, num_tokens: int, what: str = "the prompt") -> None:
        """Raise ContextOverflow if a sequence of `num_tokens` exceeds max_seq_len."""
        if num_tokens > self.max_seq_len:
            raise ContextOverflow(
                f"{what} has {num_tokens} tokens, but the model takes {self.max_seq_len}; {self.vision.how_to_shorten}"
            )

    def _check_cache(self, cache: KVCache, added: Tensor) -> None:
        """Raise InputError unless `cache` is intact, and one of this model with B rows.

        It must have room for `added` [B] more tokens, otherwise this raises ContextOverflow, and take an image at once.
        """
        if not isinstance(cache, KVCache):
            raise InputError(f"the cache is a {type(cache).__name__}; make one with model.new_cache()")
        config = self.module.config
        shapes = [
            (cache.batch_size, cache.slots(window) + 1, config.num_kv_heads, config.head_dim)
            for window in config.windows
        ]
        found = [keys.shape for keys in cache.keys], cache.previous_hidden.shape[2], cache.keys[0].dtype, cache.device
        if found != (shapes, config.hidden_size, self.dtype, self.device):
            raise InputError("the cache was made for another model, dtype or device; make one with model.new_cache()")
        if not cache.intact:
            raise InputError("a prefill that failed has overwritten tokens of the cache; empty it with cache.reset()")
        if cache.batch_size != len(added):
            raise InputError(f"tokens has {len(added)} rows, but the cache has {cache.batch_size}")
        if cache.chunk_size < self.vision.min_chunk_size:
            raise InputError(
                f"the cache takes {cache.chunk_size} tokens at once, but an image has {self.vision.min_chunk_size}; "
                "enlarge it"
            )
        total = cache.lengths + added
        row = int(total.argmax())
        if total[row] > cache.max_seq_len:
            raise ContextOverflow(
                f"row {row} of the cache would hold {total[row]} tokens, {added[row]} of them new, "
                f"but its max_seq_len is {cache.max_seq_len}; make it larger, or {self.vision.how_to_shorten}"
            )


def check_options(config, dtype: torch.dtype, max_seq_len: int | None, compile) -> int:
    """Raise a PopError for options that a model of `config` cannot take. Returns its max_seq_len."""
    if not isinstance(compile, bool) and compile != "auto":
        raise InputError(f"compile is {compile!r}; it must be 'auto', True or False")
    if dtype == torch.float16 and config.overflows_float16:
        raise InputError(f"dtype is {dtype}, in which {config.family} overflows; take torch.bfloat16 or torch.float32")
    limit = config.max_positions
    if max_seq_len is None:
        return limit
    max_seq_len = check_count("max_seq_len", max_seq_len)
    if max_seq_len > limit:
        raise ContextOverflow(f"max_seq_len is {max_seq_len}, but the model's context is {limit} tokens")
    return max_seq_len


def token_ids(tokens, dims: int, vocab_size: int, wait: bool = True) -> Tensor:
    """Return token ids as an int64 tensor on the CPU, [B] or [B, T] by `dims`.

    Ids on another device are read back, which waits for the device. With `wait=False` they stay there, unchecked.
    """
    ids = _integers(tokens)
    if ids is None or ids.dim() != dims or not ids.numel():
        shape = "[batch]" if dims == 1 else "[batch, tokens]"
        raise InputError(f"tokens must be integers of shape {shape}, none of them empty, not {tokens!r:.80}")
    if not wait and ids.device.type != "cpu":
        return ids
    ids = ids.cpu()
    low, high = ids.aminmax()
    if low < 0 or high >= vocab_size:
        raise InputError(f"token id {low if low < 0 else high} is not in the vocabulary of {vocab_size} tokens")
    return ids


def row_lengths(lengths, tokens: Tensor) -> Tensor:
    """Return the lengths of right-padded tokens [B, T] as int64 [B] on the CPU. None: no row is padded."""
    B, T = tokens.shape
    if lengths is None:
        return torch.full((B,), T, device="cpu")
    found = _integers(lengths)
    if found is None or found.shape != (B,) or found.min() < 1 or found.max() > T:
        raise InputError(f"lengths is {lengths!r:.80}; it must hold {B} integers from 1 to {T}, one for each row")
    return found.cpu()


def _integers(values) -> Tensor | None:
    """Return an int64 tensor, or None for anything that is not integers in the form of a tensor."""
    try:
        if not isinstance(values, Tensor):
            values = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return None
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        return None
    return values.to(torch.int64)


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return lists of ids as tokens [B, T], padded with zeros on the right, and lengths [B], both int64 on the CPU."""
    lengths = torch.tensor([len(row) for row in rows], device="cpu")
    tokens = pad_sequence([torch.tensor(row, dtype=torch.int64, device="cpu") for row in rows], batch_first=True)
    return tokens, lengths
