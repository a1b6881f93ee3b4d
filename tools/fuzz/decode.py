"""Decode: a compiled model against the same module run eagerly, while its weights, hooks and parts change.

The compiled model records its steps and repeats them, so each change tests whether a record notices it. Where the
eager model fails, the compiled one may fail, or go on without the change. Other threads decode meanwhile, and signals
interrupt steps.
"""

import signal
import tempfile
import threading
from collections import Counter
from pathlib import Path
from random import Random

import torch
from torch import nn

import pop
from tools.fuzz.cases import Counting, Wrong, check_close, random_config, random_model, random_prompt

TOLERANCE = 1e-4  # of the logits' standard deviation
ROUNDED = 0.05  # likewise, if a weight was rounded to bfloat16
ACTIONS = 40  # of a case
CONFIGS = 8  # few, since each is compiled anew
ROOM = 1024  # tokens of a cache


def replaced(owner, name: str, value):
    """Set an attribute. Returns a function that undoes it."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, old)


# What happens to `part`, a linear layer, which is the attribute `name` of `parent`.
CHANGES = {
    "other values": lambda part, *_: replaced(part.weight, "data", part.weight.data * 1.5),
    "other strides": lambda part, *_: replaced(part.weight, "data", part.weight.data.T.contiguous().T),
    "a hook": lambda part, *_: part.register_forward_hook(lambda part, args, out: out * 1.5).remove,
}
BETWEEN_STEPS = CHANGES | {
    "another dtype": lambda part, *_: replaced(part.weight, "data", part.weight.data.bfloat16()),
    "less memory": lambda part, *_: replaced(part.weight, "data", torch.zeros(1)),
}
BEFORE_PREFILL = CHANGES | {
    "a weight": lambda part, *_: replaced(part, "weight", nn.Parameter(part.weight * 1.5, requires_grad=False)),
    "an adapter": lambda part, parent, name: replaced(parent, name, with_adapter(part)),
}


def with_adapter(part: nn.Linear) -> nn.Module:
    """What a library of adapters puts in place of a linear layer."""
    return nn.Sequential(part, nn.LayerNorm(part.out_features))


class Pair:
    """A module in two models, compiled and eager, each with a cache of the same tokens."""

    def __init__(self, random: Random, model: pop.Model, counts: Counter[str]):
        self.random = random
        self.counts = counts
        self.decoder = model.module.model
        self.models = [pop.Model(model.module, model.config, compile=compile) for compile in (True, False)]
        self.changes = []  # pairs of a name and the function that undoes the change
        self.prefill()

    def both(self, what: str, tokens: list) -> None:
        """Do the same with both models, and compare.

        Where the latest change makes the eager one fail, the other may fail, or go on as before it: compiled code can
        multiply a weight of another dtype. Then all changes are undone.
        """
        places = [cache.snapshot() for cache in self.caches]
        results = []
        for model, cache in zip(self.models, self.caches, strict=True):
            try:
                results.append(getattr(model, what)(tokens, cache))
            except Exception as error:  # torch raises nearly anything for weights that do not fit
                results.append(error)
        compiled, eager = results
        if not isinstance(eager, Exception):
            self.compare(what, compiled, eager, TOLERANCE)
            return
        _, undo = self.changes.pop()  # the change that has failed
        undo()
        self.rewind(places)
        if not isinstance(compiled, Exception):
            self.compare(what, compiled, getattr(self.models[1], what)(tokens, self.caches[1]), ROUNDED)
            self.rewind(places)
        self.undo_all()

    def rewind(self, places: list) -> None:
        for cache, place in zip(self.caches, places, strict=True):
            cache.restore(place)

    def compare(self, what: str, compiled, eager: torch.Tensor, tolerance: float) -> None:
        try:
            if isinstance(compiled, Exception):
                raise Wrong(f"it raises {compiled!r:.200}, and the eager model does not")
            check_close(compiled, eager, tolerance)
        except Wrong as error:
            raise Wrong(f"{what}: {error}; changed: {[name for name, _ in self.changes]}") from None

    def change(self, choices: dict) -> None:
        linears = [name for name, part in self.decoder.named_modules() if isinstance(part, nn.Linear)]
        path = self.random.choice(linears)
        kind = self.random.choice([*choices])
        parent, _, name = path.rpartition(".")
        undo = choices[kind](self.decoder.get_submodule(path), self.decoder.get_submodule(parent), name)
        self.changes.append((f"{kind} of {path}", undo))
        self.counts[kind] += 1

    def undo_all(self) -> None:
        while self.changes:
            _, undo = self.changes.pop()
            undo()

    # Actions

    def step(self) -> None:
        self.counts["steps"] += 1
        self.both("decode", random_prompt(self.random, longest=1))

    def change_and_step(self) -> None:
        self.change(BETWEEN_STEPS)
        self.step()

    def undo_and_step(self) -> None:
        self.undo_all()
        self.prefill()
        self.step()

    def extend(self) -> None:
        self.both("extend", [random_prompt(self.random, longest=3)])

    def prefill(self) -> None:
        self.caches = [model.new_cache(1, ROOM) for model in self.models]
        self.both("prefill", [random_prompt(self.random)])

    def change_and_prefill(self) -> None:
        self.change(BEFORE_PREFILL)
        self.prefill()

    def interrupt(self) -> None:
        """Ctrl-C during steps of the compiled model. Then its cache is rewound, and both go on."""
        place = self.caches[0].snapshot()
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, self.random.uniform(1e-5, 3e-3))
            while True:
                self.models[0].decode([7], self.caches[0])
        except (KeyboardInterrupt, pop.PopError, RuntimeError):  # also of a full cache, or a change that fails
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.counts["interrupts"] += 1
        self.caches[0].restore(place)
        self.step()

    def use_threads(self) -> None:
        """Another thread decodes meanwhile, with a cache of its own."""
        self.undo_and_step()  # a change that fails would be undone during the thread's work
        caches = [model.new_cache(1, ROOM) for model in self.models]
        found = []

        def run(model: pop.Model, cache) -> torch.Tensor:
            model.prefill([[5, 6, 7]], cache)
            return torch.cat([model.decode([token], cache) for token in range(10)])

        thread = threading.Thread(target=lambda: found.append(run(self.models[0], caches[0])))
        thread.start()
        for _ in range(5):
            self.step()
        thread.join()
        self.compare("decode in a thread", *found, run(self.models[1], caches[1]), TOLERANCE)


class Loop(Counting):
    @torch.no_grad()
    def try_one(self, random: Random) -> None:
        config = random_config(Random(random.randrange(CONFIGS)))
        with tempfile.TemporaryDirectory() as folder:
            model = random_model(random, config, Path(folder))
        pair = Pair(random, model, self.counts)
        names = ("change_and_step", "undo_and_step", "extend", "change_and_prefill", "interrupt", "use_threads")
        for _ in range(ACTIONS):
            name = "step" if random.random() < 0.6 else random.choice(names)
            getattr(pair, name)()
