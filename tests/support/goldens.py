"""Golden cases: tiny checkpoint folders, prompts, and what the reference implementation made of them.

Made by tools/goldens/text_models.py and tools/goldens/qwen3_vl.py. Most cases keep a seed in place of weights.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from support.tiny import patch_values, random_patches, write_weights
from support.tiny_images import picture

from pop.checkpoints.config_json import read_config
from pop.inputs.processors import Prepared
from pop.models.vision.qwen3_vl import Grid

GOLDENS = Path(__file__).parents[1] / "goldens"
# Inputs that are refused, with what the error says, by the test that reads them.
REFUSED = json.loads((GOLDENS / "refused.json").read_bytes())
TOLERANCE = 1e-4  # of the standard deviation of the reference's values


def error(found: torch.Tensor, expected: np.ndarray) -> float:
    """The largest deviation from `expected`, in standard deviations of it."""
    assert found.shape == expected.shape
    return float(np.abs(found.float().numpy() - expected).max() / expected.std())


@dataclass
class Prompt:
    """A prompt and the reference's greedy answer.

    Args:
        tokens, greedy: ids of the prompt [T] and of the answer [N].
        logits: [T + N - 1, V], at every position but the answer's last.
        seen: images and videos, as pop.Model takes them.
        next_position: the rotary position after the last of these logits, if it is not the number of tokens.
        stored_dtype_logits: the same logits if the reference runs in the dtype of the files, where that is not float32.
    """

    tokens: list[int]
    greedy: list[int]
    logits: np.ndarray
    seen: dict[str, list] = field(default_factory=dict)
    next_position: int | None = None
    stored_dtype_logits: np.ndarray | None = None

    @property
    def inputs(self) -> list[int]:
        """The tokens at the logits' positions."""
        return self.tokens + self.greedy[:-1]


class Golden:
    """A case by its name: its folder with config.json, its config, the weights' seed, and its prompts."""

    def __init__(self, name: str):
        self.folder = GOLDENS / name
        self.config = read_config(self.folder)
        golden = json.loads((self.folder / "golden.json").read_bytes())
        self.seed = golden["seed"] if "seed" in golden else golden["weights"]
        if "prompts" in golden:
            arrays = np.load(self.folder / "logits.npz")
            self.prompts = [self._prompt(number, one, arrays) for number, one in enumerate(golden["prompts"])]
        else:
            self.prompts = [Qwen3VLCase(name, case).prompt for case in golden["cases"]]

    def _prompt(self, number: int, golden: dict, arrays) -> Prompt:
        images = [picture(self.config.vision.image_size, seed) for seed in range(golden.get("images", 0))]
        stored = f"stored_dtype_logits_{number}"
        return Prompt(
            golden["tokens"],
            golden["greedy"],
            arrays[f"logits_{number}"],
            {"images": images},
            stored_dtype_logits=arrays.get(stored),
        )

    def checkpoint(self, scratch: Path) -> Path:
        """The folder with weights. If the case has a seed only, they are written to `scratch`."""
        if list(self.folder.glob("*.safetensors")):
            return self.folder
        shutil.copy(self.folder / "config.json", scratch)
        write_weights(scratch, self.config, self.seed)
        return scratch


class Qwen3VLCase:
    """One prompt of a Qwen3-VL golden, with its grids, patches and features.

    Dictionaries have the keys "image" and "video", if the prompt has any.
    """

    def __init__(self, name: str, case: str):
        folder = GOLDENS / name
        golden, config = json.loads((folder / "golden.json").read_bytes())["cases"][case], read_config(folder)
        arrays = np.load(folder / "arrays.npz")
        self.grids = {kind: [Grid(*grid) for grid in golden[f"{kind}s"]] for kind in ("image", "video")}
        self.patches, self.features, self.deepstack = {}, {}, {}
        seen = {"images": [], "videos": []}
        for kind, grids in self.grids.items():
            if not grids:
                continue
            counts = [int(np.prod(grid)) for grid in grids]
            seed = golden["seed"] + len(kind) + (kind == "video")
            self.patches[kind] = random_patches(sum(counts), patch_values(config.vision), seed)
            self.features[kind] = arrays[f"{case}_{kind}_features"]
            self.deepstack[kind] = arrays[f"{case}_{kind}_deepstack"]
            placeholder = getattr(config, f"{kind}_id")
            for pixels, grid in zip(self.patches[kind].split(counts), grids, strict=True):
                frame = [placeholder] * (grid.rows * grid.columns // config.vision.merge_size**2)
                seen[f"{kind}s"].append(Prepared(kind, pixels, (frame,) * grid.frames, grid))
        logits = arrays[f"{case}_logits"]
        self.prompt = Prompt(golden["tokens"], golden["greedy"], logits, seen, golden["next"])


def qwen3_vl_cases() -> list[tuple[str, str]]:
    """The names of all Qwen3-VL goldens and of their prompts."""
    folders = sorted((GOLDENS / "qwen3_vl").glob("*/golden.json"))
    names = {f"qwen3_vl/{path.parent.name}": json.loads(path.read_bytes())["cases"] for path in folders}
    return [(name, case) for name, cases in names.items() for case in cases]
