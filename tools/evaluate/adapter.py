"""What lm-evaluation-harness asks of a model, answered by a pop.Model. It needs no harness.

In log-likelihoods and free generation, the context is pruned, except for its last token. Continuations and answers run
at full depth. tools/evaluate/lm_eval_pop.py registers the adapter with the harness.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import product
from statistics import median
from types import SimpleNamespace

import torch

import pop
from pop.errors import InputError, check_count
from tools.evaluate.scoring import Request, rolling_windows, score

logger = logging.getLogger("lm_eval.pop")  # below the harness's own logger, whose handlers show it

MOST_KEPT = 200  # contexts
MAX_GEN_TOKS = 256  # the harness's default
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one given counts

Group = tuple[list[int], list[tuple[int, list[int]]]]  # a context, and (number of the request, continuation) of each


class ChatPrompt(str):
    """A conversation in the model's chat format: a string that also carries its token ids.

    The harness treats a prompt as a string and returns it to the model unchanged. Encoding this string again would
    read control tokens as text, or a user's text as control tokens. So the ids travel with the string.
    pop/inputs/chat.py has decided which of them are control tokens. Text of a data set is never of this class.

    Args:
        shown: the conversation as text, for logs.
        head: the token ids up to and with the last control token.
        text: the text after it, which a continuation may extend.
    """

    def __new__(cls, shown: str, head: Iterable[int] = (), text: str = ""):
        prompt = super().__new__(cls, shown)
        prompt.head = list(head)
        prompt.text = text
        return prompt


class PopAdapter:
    """The methods that the harness calls on a model.

    Requests have an attribute `args`, as the harness's `Instance` has. Results come in the order of the requests.

    Args:
        model: a pop.Model with a tokenizer. Its plan prunes the contexts.
        batch_size: how many contexts run together.
        name: the model's name, for caches of formatted prompts.
    """

    cache_hook = SimpleNamespace(add_partial=lambda attr, args, result: None)  # the harness replaces it

    def __init__(self, model: pop.Model, batch_size: int | str = 1, name: str = "model"):
        model.need_tokenizer("evaluation")
        is_text = isinstance(batch_size, str) and batch_size.isdecimal()  # as --model_args give it
        self.batch_size = check_count("batch_size", int(batch_size) if is_text else batch_size)
        self.model = model
        self.name = name
        self._mark = None  # the control token that ends a message, once the harness has asked for a conversation
        self._warned: set[str] = set()
        self.context_tokens = 0
        self.pruned_tokens = 0
        self._contexts: list[list[int]] = []  # some of those that ran, to time

    # The three kinds of request

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p(continuation | context), and whether it is the greedy continuation.

        The value is that of `model.score`: the context is pruned, its last token and the continuation are not. A
        context that is too long loses tokens on the left. Raises InputError for a continuation that is empty or
        longer than the model's context.
        """
        requests = [request.args for request in requests]
        pairs = [self.encode_pair(context, continuation) for context, continuation in requests]
        plan = self.model.plan
        whole = sum(plan.num_pruned(len(context)) == 0 for context, _ in pairs)
        if plan.layers and whole:
            self._warn_once("the plan prunes nothing in %d of %d contexts: they are too short", whole, len(pairs))

        def remember(index: int, result: tuple[float, bool]) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[index], result)

        return self._score(pairs, disable_tqdm, remember)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """For each (text,): log p(text), in windows of max_seq_len tokens. Each token is predicted once.

        The context of a window is a single token: the one before the window. At the beginning it is BOS, or EOS in
        a model without BOS. This boundary token runs at full depth, so nothing is pruned: the result is that of the
        full model. The one exception is the last window of a text longer than max_seq_len. It takes as many earlier
        tokens as fit for its context, and these are pruned.
        """
        if self.model.plan.layers:
            self._warn_once("loglikelihood_rolling prunes (almost) nothing: its contexts are single tokens")
        requests = [request.args for request in requests]
        owners = []  # the number of the request, for each window
        windows = []
        for index, (text,) in enumerate(requests):
            tokens = self.model.tokenizer.encode(text, bos=False)
            for window in rolling_windows(tokens, self.prefix_id, self.model.max_seq_len):
                owners.append(index)
                windows.append(window)
        totals = [0.0] * len(requests)
        for index, (log_prob, _) in zip(owners, self._score(windows, disable_tqdm), strict=True):
            totals[index] += log_prob
        for args, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """For each (context, gen_kwargs): the answer, cut before the first of the strings in `until`.

        Contexts of similar length run together. A long context loses tokens on the left to leave room for
        max_gen_toks. Samples take their seeds from torch's generator, which the harness seeds with --seed. A context
        that is requested several times gets different samples.
        """
        requests = [request.args for request in requests]
        groups: dict[tuple, list[tuple[int, list[int]]]] = {}  # (request, prompt) pairs that may run together
        asked: Counter[str] = Counter()
        for index, (context, gen_kwargs) in enumerate(requests):
            options = generation_options(gen_kwargs)
            prompt = self._fit_prompt(self.encode(context), options["max_new_tokens"])
            # Within a batch, one seed gives equal prompts equal answers. So the n-th copy goes to the n-th group.
            asked[context] += options["temperature"] > 0
            group = (json.dumps(options, sort_keys=True), asked[context])
            groups.setdefault(group, []).append((index, prompt))

        results = [""] * len(requests)
        with _progress(len(requests), "generate_until", disable_tqdm) as bar:
            for (options, _), members in groups.items():
                options = json.loads(options)
                # The longest first, so that memory runs out early or never.
                members.sort(key=lambda member: len(member[1]), reverse=True)
                for begin in range(0, len(members), self.batch_size):
                    batch = members[begin : begin + self.batch_size]
                    self._count([prompt for _, prompt in batch])
                    if options["temperature"] > 0:
                        options["seed"] = int(torch.randint(2**62, ()))
                    answers = self.model.generate([prompt for _, prompt in batch], **options)
                    for (index, _), answer in zip(batch, answers, strict=True):
                        results[index] = answer.text
                        self.cache_hook.add_partial("generate_until", requests[index], answer.text)
                    bar.update(len(batch))
        return results

    # Conversations

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> ChatPrompt:
        """A conversation as a prompt. Without add_generation_prompt, its last turn stays open for a continuation."""
        chat = self.model.chat_format()
        tokenizer = chat.tokenizer
        self._mark = chat.ends[0] or None
        try:
            ids = chat.encode(chat_history, add_generation_prompt)
        except InputError as error:
            reason = str(error).rstrip(".")
            raise InputError(
                f"a task's prompt is not a conversation ({reason}); run this task without --apply_chat_template"
            ) from None
        special = set(tokenizer.special_tokens.values())
        controls = [place for place, token in enumerate(ids) if token in special]
        if not add_generation_prompt:
            ids = ids[: controls.pop()]  # the last control token closes the turn
        cut = controls[-1] + 1
        return ChatPrompt(tokenizer.decode(ids, special=True), ids[:cut], tokenizer.decode(ids[cut:]))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What the harness writes into its results. Each model has one format, see pop/inputs/chat.py."""
        if isinstance(chat_template, str):
            raise InputError(
                f"--apply_chat_template is {chat_template!r}, but there is one template only; give no name"
            )
        return "the checkpoint's own chat format" if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness keeps formatted prompts (--cache_requests)."""
        return "pop__" + self.name.replace("/", "__")

    def get_model_info(self) -> dict:
        """A description of the model and its plan for the results file."""
        plan = self.model.plan
        return {
            "pop_version": pop.__version__,
            "model_dtype": str(self.model.dtype),
            "pruned_layers": list(plan.layers),
            "full_depth_last": plan.full_depth_last,
            "full_depth_first": plan.full_depth_first,
            "full_depth_selected": plan.full_depth_selected,
            "selecting_layer": plan.selecting_layer,
            "calibrated": plan.corrections is not None,
        }

    # What pruning has done

    def _count(self, contexts: list[list[int]]) -> None:
        for context in contexts:
            self.context_tokens += len(context)
            self.pruned_tokens += self.model.plan.num_pruned(len(context))
        self._contexts = (self._contexts + contexts)[:MOST_KEPT]

    def speedup(self) -> float:
        """How much faster the plan prefills some of the contexts that ran than full depth does, measured now.

        Each of five contexts, of short and long ones, is prefilled three times in both ways, in turn.
        """
        contexts = sorted(self._contexts, key=len)
        contexts = [contexts[round(n * (len(contexts) - 1) / 4)] for n in range(5)]
        seconds = {"plan": 0.0, "full": 0.0}
        plans = {"plan": self.model.plan, "full": pop.PrunePlan.none()}
        for context in contexts:
            runs = {name: [] for name in plans}
            for _, (name, plan) in product(range(4), plans.items()):
                cache = self.model.new_cache(1, len(context))
                begun = time.perf_counter()
                self.model.prefill([context], cache, plan=plan).argmax().item()  # which waits for the device
                runs[name].append(time.perf_counter() - begun)
            for name, times in runs.items():
                seconds[name] += median(times[1:])  # the first one warms up
        return seconds["full"] / seconds["plan"]

    def summary(self) -> str:
        """A sentence on what the plan has pruned, and on how much faster that is. It takes a few prefills."""
        share = self.pruned_tokens / max(1, self.context_tokens)
        text = f"{share:.0%} of the {self.context_tokens:,} context tokens were pruned"
        if not self.pruned_tokens:
            return text
        return f"{text}; their prefill is {self.speedup():.2f}x as fast as at full depth, measured on five contexts"

    # Text to token ids

    @property
    def prefix_id(self) -> int:
        """The token in place of an empty context: BOS, even if the family's texts go without it, or EOS."""
        config = self.model.config
        for token in (self.model.tokenizer.bos_id, config.bos_id, *config.eos_ids):
            if token is not None:
                return token
        raise InputError("an empty context needs BOS or EOS, but the model has neither; give every request a context")

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt, after BOS if the family has one. Never empty."""
        head, text = self._head_and_text(prompt)
        return head + self.model.tokenizer.encode(text, bos=False) or [self.prefix_id]

    def encode_pair(self, context: str, continuation: str) -> Request:
        """Encode context and continuation together, and split after the ids of the context, as the harness does.

        Spaces at the end of the context move to the continuation, since most vocabularies have them there.
        """
        head, text = self._head_and_text(context)
        kept = text.rstrip()
        encode = self.model.tokenizer.encode
        context_ids = head + encode(kept, bos=False)
        continuation_ids = (head + encode(text + continuation, bos=False))[len(context_ids) :]
        return context_ids or [self.prefix_id], continuation_ids

    def _head_and_text(self, prompt: str) -> tuple[list[int], str]:
        """The first ids of a prompt, which are fixed, and the text after them."""
        if isinstance(prompt, ChatPrompt):
            return prompt.head, prompt.text
        if self._mark is not None and self._mark in prompt:
            raise InputError(
                f"a task has made a plain string that contains {self._mark}, perhaps from a chat prompt, "
                "so its control tokens are lost; run this task without --apply_chat_template"
            )
        bos_id = self.model.tokenizer.bos_id
        return [] if bos_id is None else [bos_id], prompt

    def _fit_prompt(self, prompt: list[int], max_new_tokens: int) -> list[int]:
        room = self.model.max_seq_len - max_new_tokens
        if room < 1:
            raise InputError(
                f"{max_new_tokens} new tokens leave no room for a prompt in max_seq_len={self.model.max_seq_len}; "
                "ask for fewer with --gen_kwargs max_gen_toks=N"
            )
        if len(prompt) > room:
            self._warn_once("a prompt of %d tokens is cut on the left to %d, to fit the answer", len(prompt), room)
        return prompt[-room:]

    def _fit_pair(self, index: int, context: list[int], continuation: list[int]) -> Request:
        limit = self.model.max_seq_len  # the last token of a continuation is only predicted, so it needs no slot
        if not 1 <= len(continuation) <= limit:
            raise InputError(
                f"the continuation of request {index} has {len(continuation)} tokens, but 1 to {limit} can be scored; "
                "change the task, or load with another max_seq_len"
            )
        room = limit + 1 - len(continuation)
        if len(context) > room:
            self._warn_once("a context of %d tokens is cut on the left to %d, to fit max_seq_len", len(context), room)
        return context[-room:], continuation

    def _warn_once(self, message: str, *numbers: int) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(f"{message}; this is said once", *numbers)

    # Scoring

    def _score(self, pairs: list[Request], disable_tqdm: bool, remember=None) -> list[tuple[float, bool]]:
        """Score all pairs, prefilling each distinct context once. Calls remember(index, result) for each result."""
        groups: dict[object, Group] = {}
        for index, pair in enumerate(pairs):
            context, continuation = self._fit_pair(index, *pair)
            # A context of one token is not worth sharing: its continuations, such as windows of text, run as a batch.
            key = tuple(context) if len(context) > 1 else index
            groups.setdefault(key, (context, []))[1].append((index, continuation))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        with _progress(len(pairs), "loglikelihood", disable_tqdm) as bar:
            for batch in self._batches(groups.values()):
                contexts = [context for context, _ in batch]
                self._count(contexts)
                continuations = [[continuation for _, continuation in members] for _, members in batch]
                for (_, members), scores in zip(batch, score(self.model, contexts, continuations), strict=True):
                    for (index, _), result in zip(members, scores, strict=True):
                        results[index] = result
                        if remember is not None:
                            remember(index, result)
                    bar.update(len(members))
        return results

    def _batches(self, groups: Iterable[Group]) -> Iterator[list[Group]]:
        """Batches of up to batch_size groups, those with the longest contexts first.

        A batch is a rectangle, so its longest continuation must fit after its longest context.
        """

        def sizes(group: Group) -> tuple[int, int]:
            context, members = group
            return len(context), max(len(continuation) for _, continuation in members)

        batch: list[Group] = []
        room = 0  # tokens of a continuation that fit after the batch's longest context, which is its first
        for group in sorted(groups, key=sizes, reverse=True):
            length, longest = sizes(group)
            if len(batch) == self.batch_size or longest > room:
                if batch:
                    yield batch
                batch = []
                room = self.model.max_seq_len + 1 - length
            batch.append(group)
        if batch:
            yield batch


def generation_options(gen_kwargs: dict) -> dict:
    """The harness's gen_kwargs as options of `model.generate`. Raises InputError for an option that `pop` lacks."""
    given = dict(gen_kwargs)
    until = given.pop("until", None) or []
    lengths = [given.pop(name, None) for name in LENGTHS]
    lengths = [length for length in lengths if length is not None]
    temperature = given.pop("temperature", None)
    do_sample = given.pop("do_sample", None)
    if do_sample is None:
        do_sample = bool(temperature)
    top_k = given.pop("top_k", None)
    top_p = given.pop("top_p", None)
    min_p = given.pop("min_p", None)
    penalty = given.pop("repetition_penalty", None)
    if given.get("num_beams") == 1:
        del given["num_beams"]
    if given:
        raise InputError(f"pop does not have the generation options {given}; remove them from the task or --gen_kwargs")
    if isinstance(until, str):
        until = [until]
    options = {
        "max_new_tokens": int(lengths[0]) if lengths else MAX_GEN_TOKS,
        "stop": [text for text in until if text],
        "temperature": 0.0,
        "repetition_penalty": 1.0 if penalty is None else penalty,
    }
    if do_sample:
        options["temperature"] = 1.0 if temperature is None else float(temperature)
        options["top_k"] = top_k if top_k and top_k > 0 else None  # 0 and -1 mean all tokens
        options |= {"top_p": top_p, "min_p": min_p}
    return options


def _progress(total: int, what: str, disable: bool):
    from tqdm import tqdm  # the harness depends on it

    return tqdm(total=total, desc=f"Running {what} requests", disable=disable)
