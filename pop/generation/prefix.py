"""Prefixes: what many prompts begin with, encoded once."""

from __future__ import annotations

import copy
import time
from typing import overload

from typing_extensions import Unpack

from pop.errors import InputError
from pop.generation.answers import Generation
from pop.generation.batch import Batch, Stream, as_prompts
from pop.generation.sampling import Options, sampling_params
from pop.inputs.processors import Prepared
from pop.runner import padded


class Prefix:
    """The beginning of many prompts, made by `model.prefix`. No call changes it, so threads may share it.

    The answers are those of `model.generate(prefix.tokens + rest, plan=prefix.plan)`, with the images and videos of
    both. If the prefix is messages, a rest is the user's next message, and the answers are those of `model.chat`.

    If the plan selects tokens, the answers can differ slightly. They are equal if there are no sliding windows and no
    images, if no kept layer follows a pruned one after the selecting layer, and if full_depth_last is at least 16.

    The last full_depth_last tokens of a prefix may be at full depth, so they are encoded with each prompt. So is all of
    a prefix of fewer than full_depth_below tokens. If an image or a video would be cut, all of it is encoded with each
    prompt.
    """

    def __init__(self, model, prompt, in_chat: dict, *, images=None, videos=None, plan=None):
        self.model = model
        self._in_chat = in_chat  # tools and enable_thinking of messages
        self.plan = model.resolve(plan)
        self.messages = None
        if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], dict):
            self.messages = list(prompt)
            one, media = self._chat("A", images, videos)  # raises if they are wrong
            # Copies, since the caller may change messages and tools, or remove files, before the next question.
            self._in_chat, self.messages = copy.deepcopy((in_chat, self.messages))
            shown = [
                part
                for message in self.messages
                if isinstance(message.get("content"), list)
                for part in message["content"]
                if part["type"] != "text"
            ]
            for part, seen in zip(shown, media, strict=True):
                part.clear()
                part.update({"type": seen.kind, seen.kind: seen})
            # What two conversations share whose next messages differ from the first character on.
            other, _ = self._chat("1", images, videos)
            is_shared = [token == another for token, another in zip(one, other, strict=False)]
            self.tokens = one[: [*is_shared, False].index(False)]
        else:
            if in_chat["tools"] or in_chat["enable_thinking"] is not True:
                raise InputError("tools and enable_thinking need a prefix of messages, and not of a plain prompt")
            (media,) = model.vision.prepare_batch(images, videos, 1)
            self.tokens = model.encode(prompt, "prefix", media=media)
        model.check_fits(len(self.tokens), "the prefix")

        ranges = model.vision.locate(self.tokens, media)  # where each image or video is in the tokens
        cut = max(0, len(self.tokens) - self.plan.full_depth_last)
        if len(self.tokens) < self.plan.full_depth_below:
            cut = 0
        if self.plan.selects and cut <= self.plan.full_depth_first:
            cut = 0  # a rest competes with earlier tokens only if some of these may be selected
        for tokens in ranges:
            if cut in tokens:
                cut = tokens[0]
        self._encoded = self.tokens[:cut]
        self._left_tokens = self.tokens[cut:]  # encoded with each prompt
        self._left_media = []
        encoded = []  # images and videos that no prompt encodes again
        for one, tokens in zip(media, ranges, strict=True):
            part = encoded if tokens[0] < cut else self._left_media
            part.append(one)
        self._cache = None
        if cut:
            tokens, lengths = padded([self._encoded])
            self._cache = model.new_cache(1, cut)
            model.prefill_prepared(tokens, self._cache, lengths, [encoded], self.plan, is_last_part=False)

    def __repr__(self) -> str:
        return f"<Prefix: {len(self.tokens):,} tokens, {len(self._left_tokens):,} of them encoded with each prompt>"

    @overload
    def generate(
        self, rest: str | list[int], *, images=None, videos=None, **options: Unpack[Options]
    ) -> Generation: ...

    @overload
    def generate(
        self, rest: list[str] | list[list[int]], *, images=None, videos=None, **options: Unpack[Options]
    ) -> list[Generation]: ...

    @overload
    def generate(
        self, rest, *, images=None, videos=None, **options: Unpack[Options]
    ) -> Generation | list[Generation]: ...

    def generate(self, rest, *, images=None, videos=None, **options: Unpack[Options]):
        """Continue the prefix and a rest, or a list of rests as one batch, which returns a list.

        Args:
            rest: Text or token ids, or a list of either. Text is tokenized apart from the prefix, without BOS. After
                messages: the text of the user's next message, or a list of such texts.
            images, videos, options: As in `Model.generate`, for the rest. The plan is the prefix's.
        """
        return self._batch(rest, images, videos, options).generate()

    def stream(self, rest, *, images=None, videos=None, **options: Unpack[Options]) -> Stream:
        """Like `generate` for one rest, but yields the answer in pieces, as `Model.stream` does."""
        return self._batch(rest, images, videos, options).stream()

    def _batch(self, rest, images, videos, options: dict) -> Batch:
        began = time.perf_counter()
        params = sampling_params(options, self.model.sampling)
        if self.messages is None:
            rests, media, is_list = self.model.encode_batch(rest, images, videos, bos=False)
            prompts = [self._left_tokens + rest for rest in rests]
            media = [self._left_media + row for row in media]
        else:
            texts, is_list = as_prompts(rest)
            prompts = [self._after_messages(self._chat(text, images, videos)[0]) for text in texts]
            media = [self._left_media] * len(prompts)
        return Batch(
            self.model,
            prompts,
            media,
            params,
            self.plan,
            began,
            is_list=is_list,
            earlier=self._cache,
            earlier_tokens=self._encoded,
        )

    def _chat(self, text, images, videos) -> tuple[list[int], list[Prepared]]:
        """The conversation with one more message of the user: its token ids, and its images and videos."""
        if not isinstance(text, str) or images is not None or videos is not None:
            raise InputError(
                "after messages, a rest is the text of the user's next message; images are in the messages"
            )
        messages = [*self.messages, {"role": "user", "content": text}]
        return self.model.chat_format().prompt(messages, **self._in_chat)

    def _after_messages(self, tokens: list[int]) -> list[int]:
        """What follows the encoded tokens in the token ids of a conversation."""
        count = len(self._encoded)
        if tokens[:count] != self._encoded:
            raise InputError(
                "the chat_template now writes the messages before this one in another way; "
                "make the prefix anew if the template writes the time, and otherwise call chat"
            )
        return tokens[count:]
