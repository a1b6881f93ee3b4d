"""The loss with virtual gates, by the plain pass in float64, and its slopes by finite differences."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F


@contextlib.contextmanager
def in_float64():
    """What a model computes in float32 is in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def gated_loss(module, prompt, response, gates, images):
    """The negative log-likelihood of a response. gates [2 (prefill, decode), L] scale the updates of each layer."""
    tokens = [*prompt, *response[:-1]]
    stage = (torch.arange(len(tokens)) >= len(prompt) - 1).long()
    with in_float64(), pytest.MonkeyPatch.context() as patch:
        for layer, gate in zip(module.layers, gates.T, strict=True):
            scale = gate[stage][:, None]  # [T, 1]
            for name in ("attention_update", "mlp_update"):
                update = getattr(layer, name)
                patch.setattr(layer, name, lambda x, scale=scale, update=update: scale * update(x))
        logits = module(torch.tensor([tokens]), images)[0, len(prompt) - 1 :]
    return F.cross_entropy(logits, torch.tensor(response), reduction="sum")


def slopes(model, prompt, response, media=(), step=1e-6):
    """Central differences of the gated loss by each gate: [2 (prefill, decode), L] float64."""
    module = copy.deepcopy(model.module).double()
    images = model.vision.images(module, [media], torch.tensor([prompt]), torch.tensor([len(prompt)]))
    images = images.at(torch.arange(len(prompt) + len(response) - 1)[None])
    result = torch.zeros(2, len(module.layers), dtype=torch.float64)
    for gate in range(result.numel()):
        change = torch.zeros_like(result)
        change.view(-1)[gate] = step
        high, low = (gated_loss(module, prompt, response, 1 + sign * change, images) for sign in (1, -1))
        result.view(-1)[gate] = (high - low) / (2 * step)
    return result


def assert_close(actual, expected, tolerance=1e-4):
    """To a share of the largest expected value."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
