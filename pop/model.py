"""`pop.Model`: a loaded model with its tokenizer and plan, and everything that a user calls.

This file checks what comes in and turns text into tensors. pop/engine computes, and pop/generation makes answers.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence

import torch

from pop import engine
from pop.backends import accelerate, chunk_size_of, stages_of
from pop.backends.cpu import keep_freed_memory
from pop.backends.cpu_graph import Graph
from pop.checkpoints.fingerprint import fingerprint
from pop.engine.cache import KVCache
from pop.engine.compile import SMALLEST, Compiled
from pop.errors import CacheMemoryError, ContextOverflow, InputError, PlanError, TokenizerError, check_count
from pop.generation.answers import Generation
from pop.generation.batch import Batch, Stream, as_prompts
from pop.generation.caches import Caches
from pop.generation.conversation import Conversation
from pop.generation.options import sampling_params, takes_options
from pop.generation.prefix import Prefix
from pop.generation.scoring import score
from pop.inputs.chat import ChatFormat, chat_format
from pop.inputs.processors import Prepared, Processor, processor_of
from pop.inputs.tokenizers import row_lengths, token_ids
from pop.models.images import TextOnly
from pop.pruning.plan import PrunePlan
from pop.system.memory import to_device

SPARE_CACHES = 2  # kept for later answers, with their captured decode steps


class Model:
    """A language model with prefill-only pruning.

    Calls change nothing in a model, so threads may share it, each with its own cache or conversation.

    Args:
        module: The torch module (pop/models). Its weights decide `device` and `dtype`.
        config: The frozen dataclass of its sizes.
        tokenizer: None if the checkpoint lacks one.
        plan: The plan of every prefill that is given no other; takes the values of `prune` in `load`.
        max_seq_len, compile, progress: As in `load`.
        chunk_size: How many tokens of a prompt prefill runs at once. None: what suits the device.
        vision: The processor of images and videos (pop/inputs/processors.py). None takes the family's.
        part: A pop.backends.tensor_parallel.Part if the module is one process's part of the model.
        chat_format: As in `load`.
        sampling: What generation_config.json states about sampling; see `generate`. None without that file.
        name: For repr.
    """

    def __init__(
        self,
        module,
        config,
        tokenizer=None,
        *,
        plan=None,
        max_seq_len=None,
        chunk_size: int | None = None,
        compile="auto",
        progress: bool = False,
        vision: Processor | None = None,
        part=None,
        chat_format=None,
        sampling: dict | None = None,
        name: str = "pop.Model",
    ):
        self.module, self.config, self.tokenizer, self.part = module, config, tokenizer, part
        self.vision = processor_of(config) if vision is None else vision
        self._chat_format, self._found_format = chat_format, None
        self.sampling, self.name = sampling, name
        if chat_format is not None and tokenizer is not None:
            self.chat_format()  # raises if it cannot be
        self.plan, self.max_seq_len = check_options(config, self.dtype, plan, max_seq_len, compile)
        self.resolve(self.plan)  # raises if it does not fit the weights
        self.chunk_size = self._chunk_size(chunk_size_of(module) if chunk_size is None else chunk_size)
        sizes = (weight.numel() for weight in module.parameters())
        self.num_parameters = sum(sizes) if part is None else part.num_parameters
        compiles = compile is True or (compile == "auto" and self.num_parameters >= SMALLEST)
        accelerate(module)
        options = {"required": compile is True, "progress": progress, "add_up": part and module.sum_over_processes}
        stages, device = stages_of(module), self.device.type
        options["replay"] = Graph if device == "cpu" else stages.replay
        self._compiled = Compiled(module, stages, **options) if compiles else None
        self.caches = Caches(SPARE_CACHES if device == "cuda" else 0)  # of its answers
        keep_freed_memory()

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def compiled(self) -> bool:
        """Whether prefill and decode run compiled, or will try to from the first use on."""
        return self._compiled is not None and self._compiled.works

    def __repr__(self) -> str:
        size, limit = self.num_parameters / 1e6, self.plan.speedup(self, min(2048, self.max_seq_len))
        plan = f"prefill skips {len(self.plan.layers)} of {self.config.num_layers} layers, at most {limit:.2f}x as fast"
        return f"<{self.name}: {size:,.0f} M parameters, {self.dtype} on {self.device}, {plan}>"

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of weights and sizes. It is computed once: after a change of the weights, make a new pop.Model."""
        return fingerprint(self.module, self.part)

    # Tensors in, tensors out

    def new_cache(self, batch_size: int = 1, max_seq_len: int | None = None) -> KVCache:
        """An empty KV cache, for which caches kept for answers give way. Raises CacheMemoryError if it does not fit.

        Args:
            batch_size: The number of rows.
            max_seq_len: Tokens a row; None takes the model's limit.
        """
        max_seq_len = self.max_seq_len if max_seq_len is None else check_count("max_seq_len", max_seq_len)
        self.check_fits(max_seq_len, "a row of the cache")
        options = {"dtype": self.dtype, "device": self.device, "chunk_size": self.chunk_size}
        try:
            return KVCache(self.module.config, batch_size, max_seq_len, **options)
        except CacheMemoryError:
            if not self.caches.clear():
                raise
        return KVCache(self.module.config, batch_size, max_seq_len, **options)

    def prefill(
        self, tokens, cache, *, lengths=None, images=None, videos=None, plan=None, chunk_size=None, boundary=True,
    ) -> torch.Tensor:  # fmt: skip
        """Append prompts to what the cache holds. Returns logits [B, V] float32 of each row's boundary token.

        Args:
            tokens: Ids [B, T], right-padded.
            cache: From `new_cache`, with B rows.
            lengths: The number of tokens in each row without padding, [B]. None: all T.
            images, videos: A list for each row, whose placeholders are among the tokens.
            plan: The PrunePlan of this call; None takes the model's.
            chunk_size: How many tokens run at once, at most the cache's chunk_size. None takes the model's.
            boundary: False if more of the same prompts follows: the logits are meaningless, and no token is selected.

        Raises:
            InputError, PlanError: An argument does not fit the model. ContextOverflow: The cache is too small.
        """
        tokens = token_ids(tokens, 2, self.config.vocab_size)
        lengths = row_lengths(lengths, tokens)
        media = self.vision.prepare_batch(images, videos, len(tokens))
        self._check_cache(cache, lengths, media)
        plan = self.resolve(plan)
        chunk_size = self.chunk_size if chunk_size is None else self._chunk_size(chunk_size)
        stages = self._stages(len(tokens), plan)
        module = self.module if self._compiled is None else self._compiled.vision_module
        options = stages, self._images(module, media, tokens, lengths), boundary
        return engine.prefill(self.module, tokens, cache, lengths, plan, chunk_size, *options)

    def decode(self, tokens, cache: KVCache) -> torch.Tensor:
        """Append one token a row, at full depth: tokens [B] -> logits [B, V] float32.

        Ids on a GPU are not checked here, since reading them would wait for it. The embedding's own assertion refuses
        an id outside the vocabulary, as a CUDA error, which ends all work of the process on the GPU.
        """
        tokens = token_ids(tokens, 1, self.config.vocab_size, wait=False).to(self.device, non_blocking=True)
        self._check_cache(cache, torch.ones(tokens.shape[0], dtype=torch.int64))
        return engine.decode(self.module, tokens, cache, self._stages(len(tokens), look=False))

    def extend(self, tokens, cache: KVCache) -> torch.Tensor:
        """Append tokens [B, T] at full depth, as `decode` would one by one. Returns their logits [B, T, V] float32."""
        tokens = token_ids(tokens, 2, self.config.vocab_size, wait=False).to(self.device, non_blocking=True)
        self._check_cache(cache, torch.full((len(tokens),), tokens.shape[1]))
        return engine.extend(self.module, tokens, cache, self._stages(len(tokens)))

    @torch.no_grad()
    def logits(self, tokens, images=None, videos=None) -> torch.Tensor:
        """The plain unpruned forward pass: tokens [B, T] without padding -> logits [B, T, V] float32.

        images, videos: As in `prefill`.
        """
        tokens = token_ids(tokens, 2, self.config.vocab_size)
        media = self.vision.prepare_batch(images, videos, len(tokens))
        self.check_fits(tokens.shape[1], media=[one for row in media for one in row])
        images = self._images(self.module, media, tokens, row_lengths(None, tokens))
        return self.module(*to_device([tokens], self.device), images)

    def warmup(self, batch_size: int = 1, plans: Sequence[PrunePlan] = ()) -> None:
        """Compile what prefill and decode need, unless the model runs eagerly.

        Nothing compiles again while torch.set_num_threads and the module stay the same.

        Args:
            batch_size: 1 for one prompt at a time. A larger number covers every batch size.
            plans: Calibrated plans besides the model's, one for each number of taps.
        """
        for rows in (1, 2)[: check_count("batch_size", batch_size)]:
            for plan in (self.plan, *plans):
                self._stages(rows, self.resolve(plan))

    # Text in, text out

    @takes_options
    def generate(
        self, prompt, *, images=None, videos=None, plan: PrunePlan | None = None, **options
    ) -> Generation | list[Generation]:
        """Continue a prompt, or a list of prompts as one batch, which returns a list.

        An answer ends at an end token, before a stop string, after max_new_tokens, or in a full context.

        Args:
            prompt: Text or token ids, or a list of either. Text marks the place of each image and video
                (model.vision.marks). Token ids have all of its placeholders.
            images, videos: A list for one prompt, a list of lists for a batch. An image is a path, bytes, a PIL image,
                a uint8 array [H, W, 3], or a pop.Image. A video is a path, a uint8 array [T, H, W, 3], a list of
                images, or a pop.Video. pop/inputs/README.md has all forms.
            plan: The PrunePlan of this call; None takes the model's.
            options: max_new_tokens=256, temperature=0.0 (greedy), top_k, top_p, seed, stop, and the other fields of
                SamplingParams in pop/generation/sampling.py. sampling="checkpoint" takes those that the checkpoint's
                generation_config.json states, in place of those that are not given.

        Raises:
            InputError: An argument cannot be used, or the logits overflow. ContextOverflow: A prompt is too long.
        """
        began = time.perf_counter()
        return self._batch(prompt, images, videos, options, plan).generate(began)

    @takes_options
    def stream(self, prompt, *, images=None, videos=None, plan: PrunePlan | None = None, **options) -> Stream:
        """Like `generate` for one prompt, but yields the answer in pieces of whole characters, as they come.

        From the last piece on, the stream's `generation` is the Generation.
        """
        began = time.perf_counter()
        return self._batch(prompt, images, videos, options, plan).stream(began)

    def _batch(self, prompt, images, videos, options: dict, plan) -> Batch:
        params = sampling_params(self, options)
        prompts, is_list = as_prompts(prompt)
        media = self.vision.prepare_batch(images, videos, len(prompts))
        prompts = [self.encode(prompt, media=row) for prompt, row in zip(prompts, media, strict=True)]
        return Batch(self, prompts, media, params, plan=plan, is_list=is_list)

    @takes_options
    def chat(self, messages, *, tools=None, enable_thinking: bool = True, plan=None, **options) -> Generation:
        """Answer a conversation in the checkpoint's chat format. No text of a message can become a control token.

        Args:
            messages: [{"role": "system" | "user" | "assistant", "content": text}, ...]. A user's content may also be a
                list of {"type": "text", "text": ...}, {"type": "image", "image": ...}, {"type": "video", "video": ...}.
                With tools: also {"role": "assistant", "content": text, "tool_calls": [...]} and {"role": "tool", ...}.
            tools: The functions that the model may call, as a list of JSON schemas. See `parse_tool_calls`.
            enable_thinking: False asks a model that may think to answer at once.
            plan, options: As in `generate`.
        """
        if options.keys() & {"images", "videos"}:
            raise InputError("chat takes images and videos in its messages, as {'type': 'image', 'image': ...}")
        tokens, media = self.chat_format().prompt(messages, tools=tools, enable_thinking=enable_thinking)
        return self.generate(tokens, images=media, plan=plan, **options)

    def chat_tokens(self, messages, *, tools=None, enable_thinking: bool = True) -> list[int]:
        """The token ids of a conversation, up to where the answer begins. Arguments as in `chat`."""
        return self.chat_format().encode(messages, tools=tools, enable_thinking=enable_thinking)

    def parse_tool_calls(self, text: str) -> list[dict]:
        """The tool calls in an answer, as a message takes them: {"role": "assistant", "tool_calls": [...]}."""
        return self.chat_format().parse_tool_calls(text)

    def chat_format(self) -> ChatFormat:
        """The checkpoint's chat format, with the images and videos that this model takes.

        Raises UnsupportedError if it has none, because it is a base model. `load(chat_format=)` helps.
        """
        self.need_tokenizer("chat")
        self._found_format = self._found_format or chat_format(self.tokenizer, self.vision, self._chat_format)
        return self._found_format

    def start_chat(
        self, system: str | None = None, *, enable_thinking: bool = True, plan: PrunePlan | None = None
    ) -> Conversation:
        """A conversation with this system message, whose turns prefill only what is new. Arguments as in `chat`."""
        return Conversation(self, system, enable_thinking=enable_thinking, plan=plan)

    def load_chat(self, path, *, plan: PrunePlan | None = None) -> Conversation:
        """A conversation that `Conversation.save` has written. `plan` is as in `generate`, errors as in its `load`."""
        return Conversation.load(self, path, plan=plan)

    def prefix(self, prompt, *, images=None, videos=None, plan: PrunePlan | None = None) -> Prefix:
        """Encode once what many prompts begin with; then call `prefix.generate(rest)`. Arguments as in `generate`."""
        return Prefix(self, prompt, images=images, videos=videos, plan=plan)

    def score(
        self, context, continuation, *, images=None, videos=None, plan: PrunePlan | None = None
    ) -> float | list[float]:
        """log p(continuation | context): the natural logarithm, summed over the continuation's tokens.

        The context is pruned. Its last token and the continuation run at full depth, as decode would run them.

        Args:
            context, continuation: Text or token ids, tokenized apart; only the context gets BOS. For a list of
                continuations, the result is a list, and the context is one for all or a list of one for each.
            images, videos, plan: As in `generate`, for the context.

        Raises:
            InputError: An argument cannot be used, or the logits overflow. ContextOverflow: A row is too long.
        """
        contexts, is_list = as_prompts(context, "context")
        media = self.vision.prepare_batch(images, videos, len(contexts))
        contexts = [self.encode(one, "context", media=row) for one, row in zip(contexts, media, strict=True)]
        return score(self, contexts, continuation, media, plan, is_list=is_list)

    # Checks

    def resolve(self, plan) -> PrunePlan:
        """The plan of a call, with its corrections on the model's device in its dtype. None stands for the model's."""
        plan = PrunePlan.of(self.plan if plan is None else plan, self.config.num_layers)
        corrections = plan.corrections
        if corrections is None or not plan.layers:
            return plan
        if corrections.fingerprint != self.fingerprint:
            raise PlanError("the plan's corrections were fitted to another model's weights; use pop.calibrate again")
        KE = self.config.num_kv_heads * self.config.head_dim
        rows, inputs = corrections.weight.shape[2], corrections.shared.shape[2]
        if corrections.rows is None and (rows, inputs) != (KE, 2 * self.config.hidden_size):
            found = f"correct {rows} numbers of K from {inputs} inputs"
            needed = f"this model needs {KE} and {2 * self.config.hidden_size}"
            raise PlanError(f"the plan's corrections {found}, but {needed}; calibrate again")
        rows = None if self.part is None else self.part.kv_rows
        return dataclasses.replace(plan, corrections=corrections.to(self.device, self.dtype, rows))

    def encode(self, prompt, what: str = "prompt", bos: bool = True, media: Sequence[Prepared] = ()) -> list[int]:
        """Text with its images and videos, or token ids in any form, as a list of ids. `what` names it in errors."""
        if isinstance(prompt, str):
            self.need_tokenizer("text")
            pieces = self.vision.replace_marks(prompt, media, what) if media else [prompt]
            tokens = self.tokenizer.encode_pieces(pieces, bos) if prompt else []
            if tokens and max(tokens) >= self.config.vocab_size:
                size = f"{self.config.vocab_size} embeddings; take the tokenizer of this model"
                raise InputError(f"the {what} has the token {max(tokens)}, but the model has {size}")
        else:
            prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt
            tokens = [] if prompt == [] else token_ids([prompt], 2, self.config.vocab_size)[0].tolist()
        if not tokens:
            raise InputError(f"the {what} is empty; give it at least one token")
        for kind, token in self.vision.placeholders.items():
            if not media and token in tokens:
                raise InputError(f"the {what} has tokens {token}, which stand for {kind}s, but no {kind} is given")
        return tokens

    def need_tokenizer(self, use: str) -> None:
        """Raise TokenizerError if the model lacks a tokenizer; `use` says what needs one."""
        if self.tokenizer is None:
            raise TokenizerError(f"{use} needs a tokenizer, and the checkpoint has none; add it, or give token ids")

    def check_fits(self, num_tokens: int, what: str = "the prompt", media: Sequence[Prepared] = ()) -> None:
        """Raise ContextOverflow if a sequence of `num_tokens`, with these images and videos, exceeds max_seq_len."""
        if num_tokens > self.max_seq_len:
            limit = f"the model takes {self.max_seq_len}; {self.vision.shorten(media)}"
            raise ContextOverflow(f"{what} has {num_tokens} tokens, but {limit}")

    def _check_cache(self, cache: KVCache, added: torch.Tensor, media: Sequence[Sequence[Prepared]] = ()) -> None:
        """Raise InputError unless `cache` is one of this model with room for `added` [B] tokens, `media` included."""
        if not isinstance(cache, KVCache):
            raise InputError(f"the cache is a {type(cache).__name__}; make one with model.new_cache()")
        advice = self.vision.shorten([one for row in media for one in row], "the prompt")
        cache.check(self.module.config, self.dtype, self.device, self._chunk_size(1), added, advice)

    def _chunk_size(self, chunk_size) -> int:
        return max(check_count("chunk_size", chunk_size), self.vision.min_chunk_size)

    @torch.inference_mode(False)  # as the engine
    @torch.no_grad()
    def _images(self, module, media, tokens: torch.Tensor, lengths: torch.Tensor) -> TextOnly:
        """What each row's images and videos bring to tokens [B, T] on the CPU, by the vision tower of a module."""
        return self.vision.images(module, media, tokens, lengths)

    def _stages(self, rows: int, plan=PrunePlan.none(), look: bool = True) -> engine.Stages:  # noqa: B008 (frozen)
        return self._compiled.stages(rows, plan, look) if self._compiled else stages_of(self.module)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_compiled": None}  # a copy runs eagerly


def check_options(config, dtype: torch.dtype, prune, max_seq_len, compile) -> tuple[PrunePlan, int]:
    """Raise a PopError for options that a model of `config` cannot take. Returns its plan and max_seq_len."""
    if not isinstance(compile, bool) and compile != "auto":
        raise InputError(f"compile is {compile!r}; it must be 'auto', True or False")
    if dtype == torch.float16 and config.overflows_float16:
        raise InputError(f"dtype is {dtype}, in which {config.family} overflows; take torch.bfloat16 or torch.float32")
    plan, limit = PrunePlan.of(prune, config.num_layers), config.max_positions
    max_seq_len = limit if max_seq_len is None else check_count("max_seq_len", max_seq_len)
    if max_seq_len > limit:
        raise ContextOverflow(f"max_seq_len is {max_seq_len}, but the model's context is {limit} tokens")
    return plan, max_seq_len
