"""`pop` as a model of lm-evaluation-harness: its command line, with one model more.

    pip install -e . lm_eval
    python -m tools.evaluate.lm_eval_pop --model pop --model_args name=llama3.1-8b,prune=default --tasks hellaswag,piqa

All options are the harness's own (`--help`, `ls tasks`, `--limit`, `--num_fewshot`, `--log_samples` ...). Tasks of
your own, such as a YAML file beside a local .jsonl, are found with `--include_path FOLDER`. In --model_args:

    name             a name that `pop models` lists, or a checkpoint directory
    prune            none, default (the deepest third), a fraction of the layers, or the path of a saved plan
    full_depth_last  tokens at the end of every context that run the whole model; default: the plan's, 1 in the paper
    dtype, device    float32, bfloat16 or float16; cpu, cuda ...; default: the checkpoint's; a GPU if there is one
    max_seq_len      the most tokens of a context and its continuation; default: the model's
    batch_size       contexts that run together; default: --batch_size, 1 in the harness

What is pruned: the context of a request, all but its last token, as in `model.score`. A continuation and a generated
answer run at full depth. In `loglikelihood_rolling` (wikitext and the like) nothing is pruned but one rare thing: see
`PopAdapter.loglikelihood_rolling`. Choices that share a context share its prefill.

`PopAdapter` holds all of the logic and needs no harness; `register` makes it one of the harness's models.
"""

import inspect
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import pop
from pop import engine
from pop.cli.commands import parse_prune
from pop.errors import InputError, MissingExtra, PopError, check_count
from pop.inputs.chat import chat_format
from pop.models.config import DTYPES

logger = logging.getLogger("lm_eval.pop")  # below the harness's own logger, whose handlers show it

LOGITS_AT_ONCE = 512  # rows of logits [V] that scoring keeps in memory together
MAX_GEN_TOKS = 256  # the harness's default

Request = tuple[list[int], list[int]]  # context, continuation
Group = tuple[list[int], list[tuple[int, list[int]]]]  # a context, and (number of the request, continuation) of each


class ChatPrompt(str):
    """A conversation in the model's chat format: a string to read and log, which knows its own token ids.

    The harness takes a prompt for a string and hands it back to the model as it is. Encoding that string would read
    the control tokens as text, or what a user wrote as control tokens. So the ids travel with the string: what is a
    control token was decided by pop/inputs/chat.py, and no text of a data set can be an object of this class.

    head: the ids up to the last control token. text: what follows it, to which a continuation may be joined.
    """

    def __new__(cls, shown: str, head: Iterable[int] = (), text: str = ""):
        prompt = super().__new__(cls, shown)
        prompt.head, prompt.text = list(head), text
        return prompt


class PopAdapter:
    """What the harness asks of a model. Requests have `.args`, as its `Instance`; results come in their order.

    model: a pop.Model with a tokenizer, whose plan prunes the contexts. batch_size: contexts that run together.
    """

    cache_hook = SimpleNamespace(add_partial=lambda attr, args, result: None)  # the harness puts its own here

    def __init__(self, model: pop.Model, batch_size: int | str = 1, name: str = "model"):
        model.need_tokenizer("evaluation")
        text = str(batch_size)
        self.batch_size = check_count("batch_size", int(text) if text.isdecimal() else batch_size)
        self.model, self.name = model, name
        self._chat = None  # the chat format, once the harness has asked for it
        self._warned: set[str] = set()

    # The three kinds of request

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p(continuation | context), and whether greedy decoding writes it.

        The sum is that of `model.score`: the context is pruned, its last token and the continuation are not. Too
        long a context loses tokens on the left; InputError for a continuation that is empty or longer than the model.
        """
        requests = [request.args for request in requests]
        pairs = [self.encode_pair(context, continuation) for context, continuation in requests]

        def remember(index: int, result: tuple[float, bool]) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[index], result)

        return self._score(pairs, disable_tqdm, remember)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """For each (text,): log p(text), in windows of max_seq_len tokens, each token predicted once.

        A window's context is one token: the one before it, or BOS (EOS without one) at the beginning. The boundary
        token runs at full depth, so nothing is pruned and the figure is the full model's, whatever the plan. The one
        exception is the last window of a text longer than max_seq_len: it is filled up on the left with what came
        before, and that is pruned.
        """
        if self.model.plan.layers:
            self._warn_once("loglikelihood_rolling prunes (almost) nothing: its contexts are single tokens")
        requests = [request.args for request in requests]
        owners, windows = [], []
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

        Contexts of similar length run together. A context loses tokens on the left to leave room for max_gen_toks.
        Samples are drawn with seeds from torch's generator, which the harness seeds (--seed); a context that is asked
        for several times gets several samples.
        """
        requests = [request.args for request in requests]
        groups: dict[tuple, list[tuple[int, list[int]]]] = {}  # what may run together: (request, prompt) of each
        asked: Counter[str] = Counter()
        for index, (context, gen_kwargs) in enumerate(requests):
            options = generation_options(gen_kwargs)
            prompt = self._fit_prompt(self.encode(context), options["max_new_tokens"])
            # In one batch, one seed would give equal prompts equal answers: the n-th time belongs to the n-th group.
            asked[context] += options["temperature"] > 0
            group = (json.dumps(options, sort_keys=True), asked[context])
            groups.setdefault(group, []).append((index, prompt))

        results = [""] * len(requests)
        with _progress(len(requests), "generate_until", disable_tqdm) as bar:
            for (options, _), members in groups.items():
                options = json.loads(options)
                members.sort(key=lambda member: -len(member[1]))  # the longest first: out of memory now or never
                for begin in range(0, len(members), self.batch_size):
                    indices, prompts = zip(*members[begin : begin + self.batch_size], strict=True)
                    if options["temperature"] > 0:
                        options["seed"] = int(torch.randint(2**62, ()))
                    answers = self.model.generate(list(prompts), **options)
                    for index, answer in zip(indices, answers, strict=True):
                        results[index] = answer.text
                        self.cache_hook.add_partial("generate_until", requests[index], answer.text)
                    bar.update(len(prompts))
        return results

    # Conversations

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> ChatPrompt:
        """A conversation as a prompt. Without add_generation_prompt its last turn stays open, to be continued."""
        tokenizer = self.model.tokenizer
        self._chat = chat_format(tokenizer)
        try:
            ids = self._chat.encode(chat_history, add_generation_prompt)
        except InputError as error:
            raise InputError(
                f"a task's prompt is no conversation ({error}); run this task without --apply_chat_template"
            ) from None
        special = set(tokenizer.special_tokens.values())
        controls = [place for place, token in enumerate(ids) if token in special]
        if not add_generation_prompt:
            ids = ids[: controls.pop()]  # the last one closed the turn
        cut = controls[-1] + 1
        return ChatPrompt(tokenizer.decode(ids, special=True), ids[:cut], tokenizer.decode(ids[cut:]))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What the harness writes into its results. There is one format a model, laid out by pop/inputs/chat.py."""
        if isinstance(chat_template, str):
            raise InputError(f"there is no chat template {chat_template!r} to choose; use a bare --apply_chat_template")
        return f"{chat_format(self.model.tokenizer).family}, as in pop/inputs/chat.py" if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Under which the harness keeps formatted prompts (--cache_requests)."""
        return "pop__" + self.name.replace("/", "__")

    def get_model_info(self) -> dict:
        """For the results file: what was measured."""
        plan = self.model.plan
        return {
            "pop_version": pop.__version__,
            "model_dtype": str(self.model.dtype),
            "pruned_layers": list(plan.layers),
            "full_depth_last": plan.full_depth_last,
            "full_depth_first": plan.full_depth_first,
            "calibrated": plan.projections is not None,
        }

    # Text to token ids

    @property
    def prefix_id(self) -> int:
        """What stands for an empty context: BOS, also where texts go without it, else EOS."""
        config = self.model.config
        for token in (self.model.tokenizer.bos_id, config.bos_id, *config.eos_ids):
            if token is not None:
                return token
        raise InputError("an empty context needs BOS or EOS, and the model has neither; give every request a context")

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt, behind BOS where the family has one; never empty."""
        head, text = self._head_and_text(prompt)
        return head + self.model.tokenizer.encode(text, bos=False) or [self.prefix_id]

    def encode_pair(self, context: str, continuation: str) -> Request:
        """Encode the two together and split behind the context's own ids, as the harness does.

        Spaces at the end of the context move to the continuation, where most vocabularies have them.
        """
        head, text = self._head_and_text(context)
        kept = text.rstrip()
        encode = self.model.tokenizer.encode
        context_ids = head + encode(kept, bos=False)
        continuation_ids = (head + encode(text + continuation, bos=False))[len(context_ids) :]
        return context_ids or [self.prefix_id], continuation_ids

    def _head_and_text(self, prompt: str) -> tuple[list[int], str]:
        """A prompt as ids that no longer change, and the text behind them."""
        if isinstance(prompt, ChatPrompt):
            return prompt.head, prompt.text
        if self._chat is not None and self._chat.mark in prompt:
            raise InputError(
                f"a task has made a plain string with {self._chat.mark} in it, perhaps from a chat-formatted prompt, "
                "whose control tokens are lost that way; run this task without --apply_chat_template"
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
            self._warn_once("a prompt of %d tokens is cut on the left to %d: room for the answer", len(prompt), room)
        return prompt[-room:]

    def _fit_pair(self, index: int, context: list[int], continuation: list[int]) -> Request:
        limit = self.model.max_seq_len  # the last token of a continuation is only predicted: it needs no place
        if not 1 <= len(continuation) <= limit:
            raise InputError(
                f"the continuation of request {index} has {len(continuation)} tokens, and 1 to {limit} can be scored; "
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
        """Score all pairs, each distinct context prefilled once; remember(index, result) as they come."""
        groups: dict[object, Group] = {}
        for index, pair in enumerate(pairs):
            context, continuation = self._fit_pair(index, *pair)
            # A lone token is not worth sharing: its continuations, such as windows of texts, do better as a batch.
            key = tuple(context) if len(context) > 1 else index
            groups.setdefault(key, (context, []))[1].append((index, continuation))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        with _progress(len(pairs), "loglikelihood", disable_tqdm) as bar:
            for batch in self._batches(groups.values()):
                contexts = [context for context, _ in batch]
                continuations = [[continuation for _, continuation in members] for _, members in batch]
                for (_, members), scores in zip(batch, score(self.model, contexts, continuations), strict=True):
                    for (index, _), result in zip(members, scores, strict=True):
                        results[index] = result
                        if remember is not None:
                            remember(index, result)
                    bar.update(len(members))
        return results

    def _batches(self, groups: Iterable[Group]) -> Iterator[list[Group]]:
        """Up to batch_size groups at once, those with the longest contexts first.

        A batch is a rectangle: its longest continuation must fit behind its longest context.
        """
        sized = [(len(context), max(len(c) for _, c in members), (context, members)) for context, members in groups]
        batch: list[Group] = []
        room = 0  # for continuations behind the batch's longest context, which is its first
        for length, longest, group in sorted(sized, key=lambda entry: entry[:2], reverse=True):
            if len(batch) == self.batch_size or longest > room:
                if batch:
                    yield batch
                batch, room = [], self.model.max_seq_len + 1 - length
            batch.append(group)
        if batch:
            yield batch


def score(
    model: pop.Model, contexts: list[list[int]], continuations: list[list[list[int]]]
) -> list[list[tuple[float, bool]]]:
    """Log-likelihood of every continuation of each context, and whether it is the greedy one.

    contexts: B lists of ids, prefilled once, as one batch, with the model's plan. continuations: for each context a
    list of lists of ids. Its n-th continuation is appended together with those of the other contexts at full depth;
    then `cache.lengths` goes back to the contexts, and the next continuation overwrites it.
    """
    lengths = [len(context) for context in contexts]
    longest = max(len(continuation) for group in continuations for continuation in group)
    cache = model.new_cache(len(contexts), max(lengths) + longest - 1)
    padded = [context + [0] * (max(lengths) - len(context)) for context in contexts]
    boundary = None  # logits [B, V] behind the contexts
    # Behind a continuation longer than a chunk, layers with windows no longer hold what it began from.
    forgets = longest - 1 > cache.chunk_size and any(model.config.windows)
    results: list[list[tuple[float, bool]]] = [[] for _ in contexts]
    for turn in zip_longest(*continuations, fillvalue=[]):  # one continuation a context
        if boundary is None or forgets:
            cache.reset()
            boundary = model.prefill(padded, cache, lengths=lengths)
            prefilled = cache.lengths
        scores = _score_turn(model, boundary, cache, turn)
        for row, continuation in enumerate(turn):
            if continuation:
                results[row].append(scores[row])
        cache.lengths = prefilled
    return results


def _score_turn(model, boundary: torch.Tensor, cache, continuations) -> list[tuple[float, bool]]:
    """Append one continuation a row (none: an empty list) to the cache; boundary [B, V] predicts the first tokens."""
    B, T = len(continuations), max(len(continuation) for continuation in continuations)
    device = boundary.device
    # Rows are padded on the right: under a causal mask, what comes later changes nothing before it.
    targets = [tokens + [0] * (T - len(tokens)) for tokens in continuations]
    targets = torch.tensor(targets, device=device)  # [B, T]
    lengths = torch.tensor([len(tokens) for tokens in continuations], device=device)
    real = torch.arange(T, device=device) < lengths[:, None]  # [B, T]
    log_probs = torch.zeros(B, dtype=torch.float64, device=device)
    greedy = torch.ones(B, dtype=torch.bool, device=device)
    logits = boundary[:, None]  # [B, C, V], of the C targets from `begin` on
    begin, step = 0, max(1, LOGITS_AT_ONCE // B)
    while True:
        end = begin + logits.shape[1]
        target, counts = targets[:, begin:end], real[:, begin:end]  # [B, C]
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target).double()
        log_probs -= losses.where(counts, 0).sum(1)
        greedy &= ((logits.argmax(-1) == target) | ~counts).all(1)
        if end == T:
            return list(zip(log_probs.tolist(), greedy.tolist(), strict=True))
        begin = end
        logits = engine.extend(model.module, targets[:, begin - 1 : T - 1][:, :step], cache)


def rolling_windows(tokens: list[int], prefix: int, length: int) -> Iterator[Request]:
    """Cut a text into windows of `length` tokens: (context, continuation) pairs that predict each token once.

    The context is the token before the continuation; in the last of several windows as much more as fits.
    """
    inputs = [prefix, *tokens]  # inputs[n] is followed by tokens[n]
    for begin in range(0, len(tokens), length):
        end = min(begin + length, len(tokens))
        yield inputs[max(0, end - length) : begin + 1], tokens[begin:end]


def generation_options(gen_kwargs: dict) -> dict:
    """The harness's gen_kwargs as options of `model.generate`; InputError for one that would change the answer."""
    given = dict(gen_kwargs)
    until = given.pop("until", None) or []
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one given counts
    lengths = [value for name in names if (value := given.pop(name, None)) is not None]
    temperature, do_sample = given.pop("temperature", None), given.pop("do_sample", None)
    if do_sample is None:
        do_sample = bool(temperature)
    top_k, top_p = given.pop("top_k", None), given.pop("top_p", None)
    for name, neutral in (("num_beams", 1), ("repetition_penalty", 1), ("min_p", 0)):
        if given.get(name) == neutral:
            del given[name]
    if given:
        raise InputError(f"pop has no generation options {given}; leave them out of the task or of --gen_kwargs")
    options = {
        "max_new_tokens": int(lengths[0]) if lengths else MAX_GEN_TOKS,
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
        "temperature": 0.0,
    }
    if do_sample:
        options["temperature"] = 1.0 if temperature is None else float(temperature)
        options["top_k"] = top_k if top_k and top_k > 0 else None  # 0 and -1 are ways to say: all
        options["top_p"] = top_p
    return options


def load_model(
    name=None, prune="default", full_depth_last=None, dtype=None, device=None, max_seq_len=None
) -> pop.Model:
    """The model that --model_args describe; the harness has made numbers, booleans and None of their values."""
    if name is None:
        raise InputError("--model_args names no model; write name=NAME_OR_DIR, with a name that `pop models` lists")
    model = pop.load(
        str(name),
        prune=parse_prune("none" if prune is None else str(prune)),
        dtype=DTYPES.get(dtype, dtype),
        device=device,
        max_seq_len=max_seq_len,
    )
    if full_depth_last is not None:
        model.plan = replace(model.plan, full_depth_last=full_depth_last)
    return model


def register() -> type:
    """Make `pop` one of the harness's models, and return its class. Raises MissingExtra without the harness."""
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise MissingExtra(
            f"lm_eval_pop.py needs lm-evaluation-harness ({error}); install it with `pip install lm_eval`, best in a "
            "virtual environment of its own, beside pop"
        ) from None

    @register_model("pop")
    class PopLM(PopAdapter, LM):
        def __init__(self, *, batch_size=1, **model_args):
            known = inspect.signature(load_model).parameters
            if unknown := [key for key in model_args if key not in known]:
                raise InputError(f"--model_args has no {unknown[0]}; it takes {', '.join(known)} and batch_size")
            LM.__init__(self)
            PopAdapter.__init__(self, load_model(**model_args), batch_size, str(model_args["name"]))

        @classmethod
        def create_from_arg_obj(cls, arg_dict, additional_config=None):
            """As the harness's own, but what --model_args say wins over --batch_size and --device."""
            options = {key: value for key, value in (additional_config or {}).items() if value is not None}
            if options.get("device") == "cuda:0" and not torch.cuda.is_available():
                del options["device"]  # the default of --device, whatever the machine has
            return cls(**{**options, **arg_dict})

    return PopLM


def _progress(total: int, what: str, disable: bool):
    from tqdm import tqdm  # which the harness needs too

    return tqdm(total=total, desc=f"Running {what} requests", disable=disable)


def main() -> int:
    """Run the harness's command line on sys.argv. Returns the exit status: 2 for a mistake, told in one sentence."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except PopError as error:
        print(f"lm_eval_pop: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    from tools.evaluate.lm_eval_pop import (
        main,  # not from __main__: the harness pickles prompts under the name of their module
    )

    # Python has put this folder first on its path: a task's `import evaluate` is not to find what is beside this file.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    sys.exit(main())
