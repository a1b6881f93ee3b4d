"""Configs and tokenizers: edited files mean to `pop` what they mean to transformers, or `pop` refuses them.

The logits of a model with random weights are compared, and the ids of some texts. data/edits.json lists the edits.
"""

import json
from contextlib import suppress
from pathlib import Path
from random import Random

import torch
from hypothesis import note

import pop
from tools.fuzz.cases import DATA, Counting, check_close, random_model
from tools.fuzz.files import TEXTS, edit

EDITS = json.loads((DATA / "edits.json").read_text(encoding="utf-8"))
TOKENS = torch.arange(3, 15)[None]  # [1, T]
TOLERANCE = 1e-3  # of the logits' standard deviation; angles of rotary positions are rounded differently


class Loop(Counting):
    def try_one(self, random: Random, folder: Path) -> None:
        random_model(random, folder)
        kind = random.choice([*EDITS])
        for name, place, values in random.sample(EDITS[kind], random.randint(1, 3)):
            file = folder / name
            content = json.loads(file.read_bytes()) if file.exists() else {}
            place = ["text_config", *place] if "text_config" in content else place
            value = random.choice(values)
            with suppress(LookupError, TypeError):  # there is nothing around the place
                edit(content, place, value)
            file.write_text(json.dumps(content))
            note(f"{name}: {place} = {value}, in {content}")
        self.counts[f"{kind} {compared(folder)}"] += 1


def compared(folder: Path) -> str:
    """What has come of the files in a folder. Raises AssertionError if transformers gives other logits or ids."""
    try:
        model = pop.load(folder, prune=None, dtype=torch.float32, compile=False, progress=False)
        ids = [model.tokenizer.encode(text, allow_special=True) for text in TEXTS["tokenized"]]
        logits = model.logits(TOKENS)
    except pop.PopError:
        return "refused"
    try:
        their_ids, their_logits = by_transformers(folder)
    except ModuleNotFoundError:
        return "not compared, since transformers is not installed"
    except Exception:  # transformers checks some values, and fails in many ways at others
        return "that transformers refuses"
    assert ids == their_ids
    check_close(logits, their_logits, TOLERANCE)
    return "equal"


@torch.no_grad()
def by_transformers(folder: Path) -> tuple[list[list[int]], torch.Tensor]:
    """The ids of TEXTS, and the logits of TOKENS."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sees = "vision_config" in (folder / "config.json").read_text()
    kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    return [tokenizer(text).input_ids for text in TEXTS["tokenized"]], model(TOKENS).logits
