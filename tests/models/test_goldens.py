"""Parity with the reference implementation on tiny random models (made by tools/goldens/text_models.py).

Each case is a checkpoint folder with awkward sizes; see the tool for what is in it. Everything goes through
the public API, so config reading, weight loading, the forward pass, the cache and generation are all held to
the reference's numbers.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import write_weights
from support.tiny_images import picture

import pop
from pop.checkpoints.config_json import read_config

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = (
    "llama/wide-heads",
    "llama/mqa-tied",
    "llama/llama3-rope",
    "llama/linear-rope",
    "llama/biases",
    "llama/sharded",
    "llama/bfloat16",
    "llama/old-llama3",
    "llama/old-linear",
    "gemma3/window",
    "gemma3/odd-pattern",
    "gemma3/mqa",
    "gemma3/long",
    "gemma3/bfloat16",
    "gemma3/old",
    "gemma3/old-omissions",
    "gemma3/images",
    "gemma3/images-beyond-the-window",
    "gemma3/old-images",
    "gemma3/images-saved",
    "qwen3/wide-heads",
    "qwen3/mqa-tied",
    "qwen3/bfloat16",
    "qwen3/old",
    "qwen3/experts",
    "qwen3/experts-saved",
)
TOLERANCE = 1e-4  # of the standard deviation of the reference's logits


class Golden:
    """A case: its checkpoint folder, and per prompt the tokens, the greedy ones, logits [T + 15, V], the images."""

    def __init__(self, name: str, scratch: Path):
        self.folder = GOLDENS / name
        golden = json.loads((self.folder / "golden.json").read_text(encoding="utf-8"))
        self.arrays = np.load(self.folder / "logits.npz")
        vision = getattr(read_config(self.folder), "vision", None)
        self.prompts = [
            (
                prompt["tokens"],
                prompt["greedy"],
                self.arrays[f"logits_{i}"],
                [picture(vision.image_size, number) for number in range(prompt.get("images", 0))],
            )
            for i, prompt in enumerate(golden["prompts"])
        ]
        if not list(self.folder.glob("*.safetensors")):
            shutil.copy(self.folder / "config.json", scratch)
            write_weights(scratch, read_config(scratch), golden["seed"])
            self.folder = scratch


@pytest.fixture(scope="module", params=CASES)
def golden(request, tmp_path_factory):
    return Golden(request.param, tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def model(golden):
    return pop.load(golden.folder, dtype=torch.float32, prune=None)


def error(logits: torch.Tensor, expected: np.ndarray) -> float:
    """Largest deviation from `expected`, in standard deviations of it."""
    assert logits.shape == expected.shape
    return float(np.abs(logits.float().numpy() - expected).max() / expected.std())


def test_logits_at_every_position(golden, model):
    for tokens, greedy, expected, images in golden.prompts:
        logits = model.logits(torch.tensor([tokens + greedy[:-1]]), images=images)
        assert error(logits[0], expected) < TOLERANCE


def test_greedy_tokens(golden, model):
    for tokens, greedy, _, images in golden.prompts:
        assert list(model.generate(tokens, images=images, max_new_tokens=len(greedy)).tokens) == greedy


def test_greedy_tokens_of_a_batch(golden, model):
    """Prompts of different lengths, with and without images."""
    prompts, greedy, _, images = zip(*golden.prompts, strict=True)
    batch = model.generate(list(prompts), images=list(images), max_new_tokens=len(greedy[0]))
    assert [generation.tokens for generation in batch] == list(greedy)


def test_prefill_then_decode(golden, model):
    for tokens, greedy, expected, images in golden.prompts:
        cache = model.new_cache()
        steps = [model.prefill(torch.tensor([tokens]), cache, images=images)]
        steps += [model.decode(torch.tensor([token]), cache) for token in greedy[:-1]]
        assert error(torch.cat(steps), expected[len(tokens) - 1 :]) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_bfloat16_run(family, tmp_path):
    """Two bfloat16 runs round in different places, so each is judged by its distance from the float32 logits:
    ours, as a root mean square over all positions, may exceed the reference's own by a quarter."""
    golden = Golden(f"{family}/bfloat16", tmp_path)
    model = pop.load(golden.folder, prune=None)
    assert model.dtype == torch.bfloat16  # the checkpoint's own
    ours, reference = [], []
    for i, (tokens, greedy, expected, _) in enumerate(golden.prompts):
        logits = model.logits(torch.tensor([tokens + greedy[:-1]]))[0]
        ours.append(logits.numpy() - expected)
        reference.append(golden.arrays[f"stored_dtype_logits_{i}"] - expected)
    assert rms(ours) < 1.25 * rms(reference)


def rms(errors: list[np.ndarray]) -> float:
    return float(np.sqrt(np.square(np.concatenate(errors)).mean()))
