"""What tools/bench compares `pop` with: other libraries, with the same weights.

RIVALS maps a name of --against to a function. The function takes the model, the fields of its config.json and a GGUF
file. It returns configurations with a `name` and a method `turn(prompt, steps)`, which makes a turn (rounds.py).

transformers            The weights are the tensors of pop's model, the cache is a DynamicCache, and attention is
                        "sdpa" and "eager".
transformers-compiled   The same through torch.compile. Decode has a StaticCache, as its documentation advises.
                        A configuration that does not compile is left out with a note.
llama.cpp               llama-cpp-python with a GGUF file and as many threads as torch.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from importlib.metadata import version
from itertools import chain
from statistics import median

import torch

from pop.errors import InputError, MissingExtra
from tools.bench.rounds import Turn
from tools.common import progress, timed


def _turn(first: Callable[[], int], step: Callable[[int], int], steps: int) -> dict[str, float]:
    ttft, steps_s = timed(first, step, steps)
    return {"ttft_s": ttft, "step_s": median(steps_s)}


def _import(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        advice = "install it next to pop, or leave out --against"
        raise MissingExtra(f"--against needs the package {package}; {advice}") from None


class Transformers:
    """A model of transformers with the weights of `model`, a pop.Model of the architecture that `fields` describe."""

    def __init__(self, library, model, fields: dict, attention: str, compiled: bool):
        self.name = f"transformers {attention} compiled" if compiled else f"transformers {attention}"
        self.library = library
        self.device = model.device
        self.compiled = compiled
        kept = {name: value for name, value in fields.items() if name not in ("dtype", "torch_dtype")}
        config = library.AutoConfig.for_model(**kept)
        with torch.device("meta"):
            module = library.AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=model.dtype)
        module.load_state_dict(model.module.state_dict(), strict=False, assign=True)
        module.tie_weights()
        # The rotary tables are not weights: build them again on the weights' device.
        module.model.rotary_emb = type(module.model.rotary_emb)(config=config).to(model.device)
        if any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers())):
            raise InputError(f"transformers' {type(module).__name__} has weights that pop's model lacks")
        self.module = module.requires_grad_(False).eval()
        self.cache_argument = "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"
        self.prefill = self.module.forward
        self.decode = self.module.forward
        if compiled:  # each by itself: a shared one would be compiled again for decode's length of 1
            self.prefill = torch.compile(_copy(self.module.forward))
            self.decode = torch.compile(_copy(self.module.forward))

    def turn(self, prompt: list[int], steps: int) -> Turn:
        tokens = torch.tensor([prompt], device=self.device)
        static = self._filled(tokens, len(prompt) + steps) if self.compiled else None

        @torch.no_grad()
        def turn():
            cache = self.library.DynamicCache(config=self.module.config)
            if static is not None:
                for layer in static.layers:
                    layer.cumulative_length.fill_(len(prompt))  # rewinds to the end of the prompt

            def first() -> int:
                return self._call(self.prefill, tokens, cache)

            def step(token: int) -> int:
                return self._call(self.decode, tokens.new_tensor([[token]]), static or cache)

            return _turn(first, step, steps)

        return turn

    @torch.no_grad()
    def _filled(self, tokens: torch.Tensor, size: int):
        """A StaticCache of `size` slots that holds the prompt."""
        cache = self.library.StaticCache(config=self.module.config, max_cache_len=size)
        self._call(self.module.forward, tokens, cache)
        return cache

    def _call(self, forward: Callable, tokens: torch.Tensor, cache) -> int:
        out = forward(input_ids=tokens, use_cache=True, logits_to_keep=1, **{self.cache_argument: cache})
        return int(out.logits[0, -1].argmax())


def _copy(forward: Callable) -> Callable:
    """A new function, so that torch.compile keeps its versions apart from those of another copy."""
    return lambda **arguments: forward(**arguments)


def transformers(model, fields: dict, gguf: str | None, compiled: bool = False) -> list[Transformers]:
    """Both kinds of attention. Raises MissingExtra without the library, InputError for an old version of it."""
    library = _import("transformers", "transformers")
    if int(library.__version__.split(".")[0]) < 5:
        raise InputError(f"transformers is {library.__version__}; --against transformers needs version 5 or newer")
    rivals = []
    for attention in ("sdpa", "eager"):
        rival = Transformers(library, model, fields, attention, compiled)
        try:
            if compiled:
                rival.turn([1, 2, 3], 2)()
        except Exception as error:  # torch.compile raises many kinds of errors
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            progress(f"{rival.name} does not run here and is left out: {reason}")
            continue
        rivals.append(rival)
    return rivals


def transformers_compiled(model, fields: dict, gguf: str | None) -> list[Transformers]:
    return transformers(model, fields, gguf, compiled=True)


class LlamaCpp:
    """A GGUF file, run by llama-cpp-python on the CPU."""

    name = "llama.cpp"

    def __init__(self, library, gguf: str):
        self.library = library
        self.gguf = gguf

    def turn(self, prompt: list[int], steps: int) -> Turn:
        threads = torch.get_num_threads()
        context = self.library.Llama(
            self.gguf,
            n_ctx=len(prompt) + steps + 1,
            n_batch=2048,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

        def feed(tokens: list[int]) -> int:
            context.eval(tokens)
            return int(context.sample(temp=0.0))

        def turn():
            context.reset()
            return _turn(lambda: feed(prompt), lambda token: feed([token]), steps)

        return turn


def llama_cpp(model, fields: dict, gguf: str | None) -> list[LlamaCpp]:
    library = _import("llama_cpp", "llama-cpp-python")
    if gguf is None or not os.path.isfile(gguf):
        raise InputError(f"--against llama.cpp needs --gguf with a GGUF file of the same weights, not {gguf}")
    if model.device.type != "cpu":
        raise InputError("--against llama.cpp compares on the CPU; add --device cpu")
    return [LlamaCpp(library, gguf)]


RIVALS = {"transformers": transformers, "transformers-compiled": transformers_compiled, "llama.cpp": llama_cpp}


def versions(rivals: list) -> dict[str, str]:
    """The version of each package that `rivals` use."""
    packages = {Transformers: "transformers", LlamaCpp: "llama-cpp-python"}
    return {packages[type(rival)]: version(packages[type(rival)]) for rival in rivals}
