"""`pop.Model`: a runner with a tokenizer. It turns text, messages and images into tensors, and makes answers.

Prefill, decode and caches are in runner.py. The loop that answers is in pop/generation.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import overload

from typing_extensions import Unpack  # torch needs this package

from pop.errors import InputError, TokenizerError
from pop.generation.answers import Generation
from pop.generation.batch import Batch, Stream, as_prompts
from pop.generation.conversation import Conversation
from pop.generation.prefix import Prefix
from pop.generation.sampling import Options, sampling_params
from pop.generation.scoring import score
from pop.inputs.chat import ChatFormat, chat_format
from pop.inputs.processors import Prepared
from pop.pruning.sketch import EQUAL
from pop.runner import Runner, token_ids

REPORTED_TOKENS = 2048  # tokens of the prompt whose speedup repr(model) states


class Model(Runner):
    """A language model with prefill-only pruning: text in, text out.

    As a Runner, it also has tensors in, tensors out: `new_cache`, `prefill`, `decode`, `extend` and `logits`.

    Args:
        module, config: As in Runner.
        tokenizer: None if the checkpoint lacks one.
        chat_format: As in `load`.
        sampling: What generation_config.json states about sampling; see `generate`. None without that file.
        name: For repr.
        options: plan, max_seq_len, chunk_size, compile, progress, vision and part, as in Runner.
    """

    def __init__(
        self,
        module,
        config,
        tokenizer=None,
        *,
        chat_format=None,
        sampling: dict | None = None,
        name: str = "pop.Model",
        **options,
    ):
        super().__init__(module, config, **options)
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.name = name
        self._chat_format = chat_format
        if chat_format is not None and tokenizer is not None:
            self.chat_format()  # raises if it cannot be

    def __repr__(self) -> str:
        plan = self.plan
        tokens = min(REPORTED_TOKENS, self.max_seq_len)
        prompts = f" of {plan.full_depth_below} tokens or more" if plan.full_depth_below else ""
        text = f"prefill{prompts} skips {len(plan.layers)} of {self.config.num_layers} layers"
        if plan.name:
            text += f" by {plan.name}"
        text += f", at most {plan.speedup(self, tokens):.2f}x as fast at {tokens:,} tokens"
        if self.device.type == "cuda":
            text += " by arithmetic (launches bound short prompts)"
        if plan.layers and plan.corrections is None:
            text += ", without corrections, so it loses answers about the prompt"
        elif plan.corrections is not None and self._distance(plan) <= EQUAL:  # the verdict was on these weights
            text += plan.judgement
        return f"<{self.name}: {self.num_parameters / 1e6:,.0f} M parameters, {self.dtype} on {self.device}, {text}>"

    @overload
    def generate(
        self, prompt: str | list[int], *, images=None, videos=None, plan=None, **options: Unpack[Options]
    ) -> Generation: ...

    @overload
    def generate(
        self, prompt: list[str] | list[list[int]], *, images=None, videos=None, plan=None, **options: Unpack[Options]
    ) -> list[Generation]: ...

    @overload
    def generate(
        self, prompt, *, images=None, videos=None, plan=None, **options: Unpack[Options]
    ) -> Generation | list[Generation]: ...

    def generate(self, prompt, *, images=None, videos=None, plan=None, **options: Unpack[Options]):
        """Continue a prompt, or a list of prompts as one batch, which returns a list.

        An answer ends at an end token, before a stop string, after max_new_tokens, or in a full context.

        Args:
            prompt: Text or token ids, or a list of either. Text marks the place of each image and video
                (model.vision.marks). Token ids have all of its placeholders.
            images, videos: A list for one prompt, a list of lists for a batch. An image is a path, bytes, a PIL image,
                a uint8 array [H, W, 3], or a pop.Image. A video is a path, a uint8 array [T, H, W, 3], a list of
                images, or a pop.Video. pop/inputs/README.md has all forms.
            plan: The plan of this call, as `load` takes it for `prune`. But None and "default" take the model's, and
                "none" is full depth.
            options: max_new_tokens=256 (fewer if the context is full), temperature=0.0 (greedy), top_k, top_p, seed,
                stop, and the other fields of SamplingParams in pop/generation/sampling.py. sampling="checkpoint" takes
                those that the checkpoint's generation_config.json states, in place of those that are not given.

        Raises:
            InputError: An argument cannot be used, or the logits overflow. ContextOverflow: A prompt is too long.
        """
        return self._batch(prompt, images, videos, plan, options, began=time.perf_counter()).generate()

    def stream(self, prompt, *, images=None, videos=None, plan=None, **options: Unpack[Options]) -> Stream:
        """Like `generate` for one prompt, but yields the answer in pieces of whole characters, as they come.

        From the last piece on, the stream's `generation` is the Generation.
        """
        return self._batch(prompt, images, videos, plan, options, began=time.perf_counter()).stream()

    def _batch(self, prompt, images, videos, plan, options: dict, *, began: float) -> Batch:
        params = sampling_params(options, self.sampling)
        prompts, media, is_list = self.encode_batch(prompt, images, videos)
        return Batch(self, prompts, media, params, self.resolve(plan), began, is_list=is_list)

    def chat(
        self, messages, *, tools=None, enable_thinking: bool = True, plan=None, **options: Unpack[Options]
    ) -> Generation:
        """Answer a conversation in the checkpoint's chat format. No text of a message can become a control token.

        `start_chat` gives an object whose `stream` yields an answer in pieces.

        Args:
            messages: [{"role": "system" | "user" | "assistant", "content": text}, ...]. A user's content may also be a
                list of {"type": "text", "text": ...}, {"type": "image", "image": ...}, {"type": "video", "video": ...}.
                With tools: also {"role": "assistant", "content": text, "tool_calls": [...]} and {"role": "tool", ...}.
            tools: The functions that the model may call, as a list of JSON schemas. See `parse_tool_calls`.
            enable_thinking: False asks a model that may think to answer at once.
            plan, options: As in `generate`.
        """
        began = time.perf_counter()
        tokens, media = self.chat_format().prompt(messages, tools=tools, enable_thinking=enable_thinking)
        return self._batch(tokens, media, None, plan, options, began=began).generate()

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
        return self._found_format

    @functools.cached_property
    def _found_format(self) -> ChatFormat:
        return chat_format(self.tokenizer, self.vision, self._chat_format)

    def start_chat(
        self,
        system: str | None = None,
        *,
        messages: Sequence[dict] | None = None,
        enable_thinking: bool = True,
        plan=None,
    ) -> Conversation:
        """A conversation, whose turns prefill only what is new. Its `send` and `stream` take the options of `generate`.

        Args:
            system: The system message.
            messages: Earlier messages to continue from, as `Conversation.messages` has them. The first turn prefills
                them. A system message may be the first of them, in place of `system`.
            enable_thinking, plan: As in `chat`.
        """
        if not isinstance(messages, list | tuple | None):
            raise InputError(f"messages is a {type(messages).__name__}; give a list of them, as `chat` takes it")
        if not isinstance(system, str | None):
            raise InputError(
                f"system is {system!r:.80}, and must be text; give earlier messages as start_chat(messages=...)"
            )
        earlier = list(messages or ())
        if system is not None:
            earlier.insert(0, {"role": "system", "content": system})
        return Conversation(self, earlier, enable_thinking=enable_thinking, plan=plan)

    def prefix(
        self, prompt, *, images=None, videos=None, tools=None, enable_thinking: bool = True, plan=None
    ) -> Prefix:
        """Encode once what many prompts begin with; then call `prefix.generate(rest)`. Arguments as in `generate`.

        The prompt may also be messages, and then tools and enable_thinking are as in `chat`. A rest is then the user's
        next message.
        """
        in_chat = {"tools": tools, "enable_thinking": enable_thinking}
        return Prefix(self, prompt, in_chat, images=images, videos=videos, plan=plan)

    @overload
    def score(self, context, continuation: str | list[int], *, images=None, videos=None, plan=None) -> float: ...

    @overload
    def score(
        self, context, continuation: list[str] | list[list[int]], *, images=None, videos=None, plan=None
    ) -> list[float]: ...

    @overload
    def score(self, context, continuation, *, images=None, videos=None, plan=None) -> float | list[float]: ...

    def score(self, context, continuation, *, images=None, videos=None, plan=None):
        """log p(continuation | context): the natural logarithm, summed over the continuation's tokens.

        The context is pruned. Its last token and the continuation run at full depth, as decode would run them.

        Args:
            context, continuation: Text or token ids, tokenized apart; only the context gets BOS. For a list of
                continuations, the result is a list, and the context is one for all or a list of one for each.
            images, videos, plan: As in `generate`, for the context.

        Raises:
            InputError: An argument cannot be used, or the logits overflow. ContextOverflow: A row is too long.
        """
        contexts, media, has_several_contexts = self.encode_batch(context, images, videos, "context")
        continuations, _, is_list = self.encode_batch(continuation, what="continuation", bos=False)
        if has_several_contexts and not (is_list and len(contexts) == len(continuations)):
            raise InputError(
                f"there are {len(contexts)} contexts, but {len(continuations)} continuations; "
                "give a list of one for each"
            )
        scores = score(self, contexts, continuations, media, self.resolve(plan))
        return scores if is_list else scores[0]

    # From text to token ids

    def encode(self, prompt, what: str = "prompt", bos: bool = True, media: Sequence[Prepared] = ()) -> list[int]:
        """Text with its images and videos, or token ids in any form, as a list of ids. `what` names it in errors."""
        if isinstance(prompt, str):
            self.need_tokenizer("text")
            pieces = self.vision.replace_marks(prompt, media, self.vision.marks, what)
            prompt = self.tokenizer.encode_pieces(pieces, bos) if prompt else []
        elif hasattr(prompt, "tolist"):
            prompt = prompt.tolist()
        if prompt == []:
            raise InputError(f"the {what} is empty; give it at least one token")
        tokens = token_ids([prompt], 2, self.config.vocab_size)[0]
        if not media:
            self.vision.runs(tokens, media, f"the {what}")
        return tokens.tolist()

    def encode_batch(
        self, prompt, images=None, videos=None, what: str = "prompt", bos: bool = True
    ) -> tuple[list[list[int]], list[list[Prepared]], bool]:
        """The ids of each given prompt, the images and videos of each, and whether a list of prompts was given.

        prompt, images and videos are as in `generate`, what and bos as in `encode`.
        """
        prompts, is_list = as_prompts(prompt, what)
        media = self.vision.prepare_batch(images, videos, len(prompts))
        tokens = [self.encode(one, what, bos, row) for one, row in zip(prompts, media, strict=True)]
        return tokens, media, is_list

    def need_tokenizer(self, use: str) -> None:
        """Raise TokenizerError if the model lacks a tokenizer; `use` says what needs one."""
        if self.tokenizer is None:
            raise TokenizerError(f"{use} needs a tokenizer, and the checkpoint has none; add it, or give token ids")


def check_model(model) -> None:
    """Raise InputError unless a model is a Model."""
    if not isinstance(model, Model):
        raise InputError(f"the model is a {type(model).__name__}; load one with pop.load")
