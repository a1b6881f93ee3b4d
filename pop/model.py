"""`pop.Model`: a loaded model with its tokenizer and plan, and everything a user calls.

This file checks what comes in and turns text into tensors; the numbers are made in pop/engine/forward.py.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from operator import index as as_index

import torch
import torch.nn.functional as F

from pop import engine
from pop.arguments import check_compile, check_dtype, checked_max_seq_len, checked_plan
from pop.backends import STAGES, accelerate
from pop.backends.cpu import keep_freed_memory
from pop.checkpoints.fingerprint import fingerprint
from pop.engine.cache import CHUNK_SIZE, KVCache
from pop.engine.compile import SMALLEST, Compiled
from pop.errors import ContextOverflow, InputError, PlanError, TokenizerError, check_count
from pop.generation.conversation import Conversation, Prefix
from pop.generation.generate import Generation, Run, is_batch
from pop.inputs.chat import ChatFormat, chat_format
from pop.inputs.processors import Prepared, processor_of
from pop.models.images import TextOnly
from pop.pruning.plan import PrunePlan

SCORED_AT_ONCE = 256  # tokens of a continuation, whose logits [T, V] are in memory together


class Model:
    """A language model with prefill-only pruning.

    module: the torch module (pop/models), whose weights decide `device` and `dtype`.
    config: the frozen dataclass of its sizes. tokenizer: None if the checkpoint had none.
    plan: the PrunePlan of every prefill that is not given another. vision: what images and videos are to it.
    max_seq_len: the most tokens that a cache may hold a row. chunk_size: tokens of a prompt that prefill runs at once;
    of a model that takes images, no fewer than an image has.
    compile, progress: as in `load`.
    part: a pop.backends.tensor_parallel.Part if the module is one rank's part of the model of `config`; None: it is whole.

    Calls change nothing in a model, and the package keeps no state of its own: any number of threads may call one
    model, each with a cache or a conversation of its own.
    """

    def __init__(
        self,
        module,
        config,
        tokenizer=None,
        *,
        plan=None,
        max_seq_len=None,
        chunk_size: int = CHUNK_SIZE,
        compile="auto",
        progress: bool = False,
        part=None,
    ):
        check_compile(compile)
        self.module, self.config, self.tokenizer, self.part = module, config, tokenizer, part
        self.vision = processor_of(config)
        check_dtype(self.dtype, config)
        self.plan = checked_plan(plan, config.num_layers)
        self.resolve(self.plan)  # does it fit the weights?
        self.max_seq_len = checked_max_seq_len(max_seq_len, config)
        self.chunk_size = self._chunk_size(chunk_size)
        size = sum(weight.numel() for weight in module.parameters()) if part is None else part.num_parameters
        compiles = compile is True or (compile == "auto" and size >= SMALLEST)
        accelerate(module)
        required = compile is True
        self._compiled = Compiled(module, STAGES, required=required, progress=progress) if compiles else None
        keep_freed_memory()

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def compiled(self) -> bool:
        """Whether prefill and decode run compiled, as far as is known: before `warmup` or the first use, whether that
        will be tried."""
        return self._compiled is not None and self._compiled.works

    # Tensors in, tensors out

    def new_cache(self, batch_size: int = 1, max_seq_len: int | None = None) -> KVCache:
        """An empty KV cache, of KVCache.size_in_bytes(module.config, batch_size, max_seq_len, dtype, chunk_size):

            batch_size * (2 * (sum over layers of S + 1) * K * E + L * D) * bytes of a number,

        with S = max_seq_len slots in a layer that attends everything, and min(max_seq_len, window - 1 + chunk_size) in
        one with a window. So windows save 76 % of gemma3-12b's cache at 32,768 tokens: 3.2 GB instead of 12.9.

        max_seq_len: tokens a row; None takes the model's. Raises CacheMemoryError where it does not fit.
        """
        max_seq_len = self.max_seq_len if max_seq_len is None else check_count("max_seq_len", max_seq_len)
        if max_seq_len > self.max_seq_len:
            raise ContextOverflow(
                f"a cache of {max_seq_len} tokens a row is longer than the model's limit of {self.max_seq_len}"
            )
        options = {"dtype": self.dtype, "device": self.device, "chunk_size": self.chunk_size}
        return KVCache(self.module.config, batch_size, max_seq_len, **options)

    def prefill(
        self,
        tokens,
        cache: KVCache,
        *,
        lengths=None,
        images=None,
        videos=None,
        plan=None,
        chunk_size=None,
        boundary: bool = True,
    ) -> torch.Tensor:
        """Append prompts to what the cache holds. Returns logits [B, V] float32 of each row's boundary token.

        tokens: [B, T] ids, right-padded. lengths: [B], tokens of each row that are not padding; None: all T.
        plan: a PrunePlan for this call; None takes the model's. chunk_size: tokens that run at once; None takes the
            model's, and what the cache was made for is the most.
        images, videos: a list for each row; the prompts have their tokens, as the family's processor lays them out.
        boundary: False if more of the same prompt follows: its last tokens are then yet to come, and the logits mean
            nothing.
        """
        tokens = self._tokens(tokens, dims=2)
        lengths = self._lengths(lengths, tokens)
        self._check_cache(cache, lengths)
        plan = self.resolve(plan)
        chunk_size = self.chunk_size if chunk_size is None else self._chunk_size(chunk_size)
        stages = self._stages(len(tokens), plan)
        images = self._images(images, videos, tokens, lengths)
        return engine.prefill(self.module, tokens, cache, lengths, plan, chunk_size, stages, images, boundary)

    def decode(self, tokens, cache: KVCache) -> torch.Tensor:
        """Append one token a row, at full depth: tokens [B] -> logits [B, V] float32."""
        tokens = self._tokens(tokens, dims=1)
        self._check_cache(cache, torch.ones(tokens.shape[0], dtype=torch.int64))
        return engine.decode(self.module, tokens, cache, self._stages(len(tokens)))

    def warmup(self, batch_size: int = 1, plans: Sequence[PrunePlan] = ()) -> None:
        """Compile what prefill and decode need, so that nothing compiles later; a model that runs eagerly stays so.

        batch_size: 1 for one prompt at a time; any larger number for one prompt and every size of a batch.
        plans: calibrated plans that will be used beside the model's, one for each number of taps. Which layers a plan
        prunes makes no difference. torch compiles anew when its number of threads changes (torch.set_num_threads), and
        under torch.inference_mode.
        """
        for rows in (1, 2)[: check_count("batch_size", batch_size)]:
            for plan in (self.plan, *plans):
                self._stages(rows, self.resolve(plan))

    def _stages(self, rows: int, plan: PrunePlan = PrunePlan.none()) -> engine.Stages:  # noqa: B008 (it is frozen)
        return self._compiled.stages(rows, plan) if self._compiled else STAGES

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_compiled": None}  # a copy runs eagerly

    @torch.no_grad()
    def logits(self, tokens, images=None, videos=None) -> torch.Tensor:
        """The plain unpruned forward pass, without a cache: tokens [B, T] -> logits [B, T, V] float32.

        images, videos: as in `prefill`.
        """
        tokens = self._tokens(tokens, dims=2)
        self.check_fits(tokens.shape[1])
        images = self._images(images, videos, tokens, self._lengths(None, tokens))
        return self.module(tokens, images)

    # Text in, text out

    def generate(
        self,
        prompt,
        *,
        images=None,
        videos=None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        plan: PrunePlan | None = None,
    ) -> Generation | list[Generation]:
        """Continue a prompt (text or token ids), or a list of prompts as one batch; then a list comes back.

        An answer ends at an end token, at a stop string (which is not part of it), after max_new_tokens, or when
        prompt and answer fill max_seq_len. temperature 0 is greedy; a seed makes sampling repeatable, row by row:
        equal prompts of a batch get equal answers. plan: None takes the model's.

        images, videos: a list for one prompt, a list of lists for a batch. An image is a path, a PIL image or an HxWx3
        uint8 array; a video is a path, a TxHxWx3 uint8 array, a list of images, or a pop.Video of any. A text
        says where each is by the family's mark (model.vision.marks); token ids have all of its tokens.

        Raises InputError for an empty prompt, for images that do not match the prompt or cannot be read, for a setting
        out of range, and where numbers overflow; ContextOverflow for a prompt longer than max_seq_len.
        """
        began = time.perf_counter()
        batch = is_batch(prompt)
        prompts = prompt if batch else [prompt]
        seen = self.vision.prepare_batch(images, videos, len(prompts))
        prompts = [self.encode(one, seen=row) for one, row in zip(prompts, seen, strict=True)]
        run = Run(
            self,
            prompts,
            images=seen,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            plan=plan,
        )
        seconds = [time.perf_counter() - began for _ in run.steps()]  # when the batch had its n-th token
        generations = run.generations(seconds)
        return generations if batch else generations[0]

    def stream(self, prompt, *, images=None, videos=None, **options) -> Iterator[str]:
        """The answer to one prompt in pieces of whole characters, as they come. Options as in `generate`."""
        self.need_tokenizer("stream")
        if is_batch(prompt):
            raise InputError("stream takes one prompt; for a batch use generate, or one stream a prompt")
        (seen,) = self.vision.prepare_batch(images, videos, 1)
        run = Run(self, [self.encode(prompt, seen=seen)], images=[seen], **options)
        return (piece for (piece,) in run.steps() if piece)

    def chat(self, messages, **options) -> Generation:
        """Answer a conversation: [{"role": "system" | "user" | "assistant", "content": text}, ...].

        Where a model takes images or videos, a user's content may be a list of {"type": "text", "text": ...},
        {"type": "image", "image": ...} and {"type": "video", "video": ...}, as `generate` takes them. The conversation
        is laid out in the family's own chat format; nothing that a message contains can become a control token. Options
        as in `generate`.
        """
        if options.keys() & {"images", "videos"}:
            raise InputError("chat takes images and videos in its messages, as {'type': 'image', 'image': ...}")
        seen = self.seen_in(messages)
        tokens = self.chat_format().encode(messages, media=[one.pieces for one in seen])
        return self.generate(tokens, images=seen, **options)

    def chat_tokens(self, messages) -> list[int]:
        """The token ids of a conversation in the family's chat format, up to where the answer begins."""
        return self.chat_format().encode(messages, media=[one.pieces for one in self.seen_in(messages)])

    def chat_format(self) -> ChatFormat:
        """The family's chat format, with the images and videos that this model takes."""
        self.need_tokenizer("chat")
        return chat_format(self.tokenizer, tuple(self.vision.marks))

    def seen_in(self, messages) -> list[Prepared]:
        """The images and videos of a conversation, in their order."""
        return [self.vision.prepare(kind, given) for kind, given in self.chat_format().media(messages)]

    def start_chat(self, system: str | None = None, *, plan: PrunePlan | None = None) -> Conversation:
        """A conversation whose turns prefill only what is new: pop/generation/conversation.py. plan: None takes the model's."""
        return Conversation(self, system, plan=plan)

    def load_chat(self, path, *, plan: PrunePlan | None = None) -> Conversation:
        """A conversation that `Conversation.save` has kept; it was held with this model and this plan."""
        return Conversation.load(self, path, plan=plan)

    def prefix(self, prompt, *, images=None, videos=None, plan: PrunePlan | None = None) -> Prefix:
        """Encode once what many prompts begin with, text or token ids: then `prefix.generate(rest)`."""
        return Prefix(self, prompt, images=images, videos=videos, plan=plan)

    def score(self, context, continuation, *, images=None, videos=None, plan: PrunePlan | None = None) -> float:
        """log p(continuation | context), natural logarithm, summed over the continuation's tokens.

        The context is prefilled with `plan` (None: the model's), its last token and the continuation run at full
        depth: what decode would have assigned to the continuation. Text is tokenized apart: context with the
        beginning-of-text token where the family has one, continuation without. images, videos: the context's.
        """
        (seen,) = self.vision.prepare_batch(images, videos, 1)
        prompt = self.encode(context, "context", seen=seen)
        answer = self.encode(continuation, "continuation", bos=False)
        self.check_fits(len(prompt) + len(answer) - 1, "context plus continuation")
        cache = self.new_cache(1, len(prompt) + len(answer) - 1)
        logits = self.prefill([prompt], cache, images=[seen], plan=plan)  # [1, V]
        targets = torch.tensor(answer, device=self.device)
        total = _log_prob(logits, targets[:1])
        for begin in range(0, len(answer) - 1, SCORED_AT_ONCE):
            fed = targets[:-1][begin : begin + SCORED_AT_ONCE]
            logits = engine.extend(self.module, fed[None], cache, self._stages(1))[0]  # [T, V]
            total += _log_prob(logits, targets[1:][begin : begin + SCORED_AT_ONCE])
        return total

    # Checks

    def resolve(self, plan) -> PrunePlan:
        """The plan that a call asks for, None being the model's, its projections on the model's device in its dtype.

        Raises PlanError if it does not fit the model.
        """
        plan = checked_plan(self.plan if plan is None else plan, self.config.num_layers)
        refit = plan.projections
        if refit is None or not plan.layers:
            return plan
        if refit.fingerprint != self.fingerprint:
            raise PlanError(
                "the plan's projections were fitted to another model's weights; calibrate it with this one: "
                "pop.calibrate(model, texts, plan)"
            )
        D, KE = self.config.hidden_size, self.config.num_kv_heads * self.config.head_dim
        if refit.rows is None and refit.weight.shape[1:] != (2, KE, refit.taps * D):
            raise PlanError(
                f"the plan's projections have the shape {list(refit.weight.shape)}, but this model needs "
                f"[layers, 2, {KE}, {refit.taps * D}]; calibrate it again"
            )
        rows = None if self.part is None else self.part.kv_rows
        return dataclasses.replace(plan, projections=refit.to(self.device, self.dtype, rows))

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells this model from others (pop/pruning/projections.py). Taken once: weights changed in place after that make
        a new pop.Model of the module necessary."""
        return fingerprint(self.module, self.part)

    def encode(self, prompt, what: str = "prompt", bos: bool = True, seen: Sequence[Prepared] = ()) -> list[int]:
        """Text, or token ids of any kind, as a list of token ids; `what` names it in the error for an empty one.

        seen: images and videos, each with its place in the prompt.
        """
        if isinstance(prompt, str):
            self.need_tokenizer("text")
            pieces = self.vision.replace_marks(prompt, seen, what) if seen else [prompt]
            tokens = self.tokenizer.encode_pieces(pieces, bos) if prompt else []
        else:
            prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
            tokens = [] if prompt == [] else self._tokens([prompt], dims=2)[0].tolist()
        if not tokens:
            raise InputError(f"the {what} is empty; give it at least one token")
        if not seen:
            self.vision.check_text(tokens, what)
        return tokens

    def need_tokenizer(self, use: str) -> None:
        if self.tokenizer is None:
            raise TokenizerError(
                f"{use} needs a tokenizer, and the checkpoint has none; add its files, or give generate token ids alone"
            )

    @torch.no_grad()
    def _images(self, images, videos, tokens: torch.Tensor, lengths: torch.Tensor) -> TextOnly:
        """What images and videos bring to tokens [B, T]."""
        rows = self.vision.prepare_batch(images, videos, len(tokens))
        module = self.module if self._compiled is None else self._compiled.vision_module
        return self.vision.images(module, rows, tokens, lengths)

    def _chunk_size(self, chunk_size) -> int:
        return max(check_count("chunk_size", chunk_size), self.vision.min_chunk_size)

    def _tokens(self, tokens, dims: int) -> torch.Tensor:
        """Token ids as an int64 tensor of `dims` dimensions on the model's device, every id in the vocabulary."""
        shape = "[batch, tokens]" if dims == 2 else "[batch]"
        try:
            tokens = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"tokens must be integers of shape {shape}: {error}") from None
        if 0 in tokens.shape:
            raise InputError("tokens is empty; give at least one")
        if tokens.dim() != dims or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise InputError(
                f"tokens must be integers of shape {shape}, not {tokens.dtype} of shape {list(tokens.shape)}"
            )
        tokens = tokens.to(self.device, torch.int64)
        low, high = torch.stack(tokens.aminmax()).tolist()
        if low < 0 or high >= self.config.vocab_size:
            raise InputError(
                f"token id {low if low < 0 else high} is not in the vocabulary of {self.config.vocab_size} tokens"
            )
        return tokens

    def _lengths(self, lengths, tokens: torch.Tensor) -> torch.Tensor:
        B, T = tokens.shape
        if lengths is None:
            return torch.full((B,), T)
        try:
            values = [as_index(length) for length in (lengths.tolist() if hasattr(lengths, "tolist") else lengths)]
        except TypeError:
            raise InputError(f"lengths must be integers, one for each row of tokens, not {lengths!r}") from None
        if len(values) != B or not all(1 <= value <= T for value in values):
            raise InputError(f"lengths is {values}; it needs {B} numbers from 1 to {T}, one for each row of tokens")
        return torch.tensor(values)

    def _check_cache(self, cache: KVCache, added: torch.Tensor) -> None:
        """Raise InputError unless `cache` is one of this model's and has room for `added` [B] tokens more."""
        if not isinstance(cache, KVCache):
            raise InputError(f"the cache is a {type(cache).__name__}; make one with model.new_cache()")
        K, E = self.module.config.num_kv_heads, self.config.head_dim
        shapes = [(cache.batch_size, cache.slots(window) + 1, K, E) for window in self.config.windows]
        like = ([keys.shape for keys in cache.keys], cache.keys[0].dtype, cache.keys[0].device)
        if like != (shapes, self.dtype, self.device):
            raise InputError("the cache was made for another model, dtype or device; make one with model.new_cache()")
        if not cache.intact:
            raise InputError(
                "a prefill that failed on the way has overwritten tokens of the cache; empty it with cache.reset()"
            )
        if cache.batch_size != len(added):
            raise InputError(f"tokens has {len(added)} rows, but the cache has {cache.batch_size}")
        if cache.chunk_size < (least := self._chunk_size(1)):
            raise InputError(
                f"the cache takes {cache.chunk_size} tokens at once, fewer than the {least} of an image; make one with "
                "model.new_cache()"
            )
        total = cache.lengths + added
        row = int(total.argmax())
        if total[row] > cache.max_seq_len:
            raise ContextOverflow(
                f"row {row} would hold {total[row]} tokens ({cache.lengths[row]} in the cache and {added[row]} new), "
                f"but the cache ends at {cache.max_seq_len}; make it larger or the prompt shorter"
            )

    def check_fits(self, num_tokens: int, what: str = "the prompt") -> None:
        """Raise ContextOverflow if a sequence of `num_tokens` exceeds max_seq_len."""
        if num_tokens > self.max_seq_len:
            raise ContextOverflow(
                f"{what} has {num_tokens} tokens, but the model takes {self.max_seq_len}; shorten it"
                + (" or load with a larger max_seq_len" if self.max_seq_len < self.config.max_positions else "")
            )


def _log_prob(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Summed log-probability of targets [T] by logits [T, V]."""
    return -F.cross_entropy(logits, targets, reduction="none").double().sum().item()
