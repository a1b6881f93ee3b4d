"""Configs and tokenizers: edited files mean to `pop` what they mean to transformers, or `pop` refuses them.

Of a config, the logits of its model are compared, with the same random weights. Of a tokenizer, the ids of some texts
are compared. data/edits.json lists the edits.
"""

import json
import tempfile
from pathlib import Path
from random import Random

import torch

import pop
from tools.fuzz.cases import DATA, TEXT_IDS, Counting, Wrong, check_close, random_config, random_model
from tools.fuzz.files import TEXTS

TOLERANCE = 1e-3  # of the logits' standard deviation; angles of rotary positions are rounded differently
MISSING = "MISSING"  # the field is left out


class Loop(Counting):
    def __init__(self, model: str | None = None):
        super().__init__()
        self.edits = json.loads((DATA / "edits.json").read_text(encoding="utf-8"))
        try:
            import transformers
        except ImportError:
            print("configs: nothing is compared, since transformers is not installed", flush=True)
            self.transformers = None
            return
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.transformers = transformers

    def try_one(self, random: Random) -> None:
        kind, results = random.choice([("configs", self.logits), ("tokenizers", self.ids)])
        with tempfile.TemporaryDirectory() as folder:
            try:
                edited, found, theirs = results(random, Path(folder))
            except pop.PopError:
                self.counts[f"{kind} refused"] += 1
                return
            if self.transformers is None:
                self.counts[f"{kind} loaded"] += 1
                return
            try:
                expected = theirs()
            except Exception:  # transformers checks some values, and fails in many ways at others
                self.counts[f"{kind} that transformers refuses"] += 1
                return
        try:
            compare(found, expected)
        except Wrong as error:
            raise Wrong(f"{error}; edited: {edited}") from None
        self.counts[f"{kind} equal"] += 1

    def logits(self, random: Random, folder: Path):
        """The edits of a config, our logits, and a function that gives those of transformers."""
        config = random_config(random)
        text = config.get("text_config", config)
        edits = self.edits["config.json"]
        names = [name for name in edits if name in text or random.random() < 0.2]
        edited = {name: random.choice(edits[name]) for name in random.sample(names, random.randint(1, 3))}
        for name, value in edited.items():
            edit(text, [name], value)
        model = random_model(random, config, folder)
        tokens = torch.tensor([random.choices(TEXT_IDS, k=12)])

        def theirs():
            sees = "vision_config" in config
            kind = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
            other = getattr(self.transformers, kind).from_pretrained(folder, dtype=torch.float32)
            with torch.no_grad():
                return other.eval()(tokens).logits

        return config | {"edited": edited}, model.logits(tokens), theirs

    def ids(self, random: Random, folder: Path):
        """The edits of a tokenizer, the ids of our texts, and a function that gives those of transformers."""
        files = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in DATA.glob("tokenizer*.json")}
        chosen = random.sample(self.edits["tokenizers"], random.randint(1, 3))
        edited = [(name, place, random.choice(values)) for name, place, values in chosen]
        for name, place, value in edited:
            edit(files.setdefault(name, {}), place, value)
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
        tokenizer = pop.load_tokenizer(folder)
        found = {text: tokenizer.encode(text, allow_special=True) for text in TEXTS}

        def theirs():
            other = self.transformers.AutoTokenizer.from_pretrained(folder)
            return {text: other(text).input_ids for text in TEXTS}

        return edited, found, theirs


def compare(found, expected) -> None:
    """Compare logits, or ids by text."""
    if isinstance(found, torch.Tensor):
        check_close(found, expected, TOLERANCE)
        return
    for text, ids in found.items():
        if ids != expected[text]:
            raise Wrong(f"the ids of {text!r} are {ids}, and those of transformers {expected[text]}")


def edit(content, place: list, value) -> None:
    """Set or leave out the value at a place in a JSON value, if the place exists."""
    *above, last = place
    for step in above:
        content = content[step] if isinstance(content, list) else content.get(step)
        if not content:
            return
    if value != MISSING:
        content[last] = json.loads(json.dumps(value))  # a copy, which a later edit may change
    elif last in content:
        del content[last]
