"""Fingerprints, to tell models' weights apart: calibrated plans and saved conversations belong to one model."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

SAMPLES = 2**20  # at most this number of values of each parameter is read
# Fields of the config that change no hidden state, or that describe the vision tower or its tokens.
UNREAD = {"dtype", "max_positions", "bos_id", "eos_ids", "vision", "image_id", "boi_id", "eoi_id"}


@torch.no_grad()
def fingerprint(module, part=None) -> str:
    """A hash of a model: the same in float32 and bfloat16, and for a 16-bit checkpoint also in float16.

    Each parameter is rounded to bfloat16, and values too small for float16 to zero. Its bit patterns are added up,
    weighted by their index. A sum of integers is the same on every device and in any order. A float32 checkpoint that
    is cut to float16 is rounded twice, and counts as another model.

    With a `part` (pop.backends.tensor_parallel.Part), all ranks call this together and get the hash of the whole model.
    """
    config = module.config if part is None else part.whole
    shapes = {}
    sums = []
    for name, parameter in module.named_parameters():
        if part is None:
            shapes[name] = parameter.shape
            sums.append(parameter_sum(parameter))
        else:
            shapes[name] = part.whole_shape(name, parameter)
            sums.append(_weighted_sum(*part.samples(name, parameter, _step(shapes[name]))))
    totals = module.sum_over_processes(torch.stack(sums)).tolist()
    return combined(config, {name: (shapes[name], total) for name, total in zip(shapes, totals, strict=True)})


@torch.no_grad()
def parameter_sum(parameter: Tensor) -> Tensor:
    """What a fingerprint takes of a whole parameter: an integer, as a tensor without axes on its device."""
    values = parameter.flatten()[:: _step(parameter.shape)]
    return _weighted_sum(values, torch.arange(len(values), device=values.device))


def combined(config, parameters: dict[str, tuple[Sequence[int], int]]) -> str:
    """The fingerprint of a model with this config, from the shape and the `parameter_sum` of each of its parameters."""
    digest = hashlib.sha256()
    for field in dataclasses.fields(config):
        if field.name not in UNREAD:
            digest.update(f"{field.name} {getattr(config, field.name)}\n".encode())
    for name, (shape, total) in sorted(parameters.items()):
        digest.update(f"{name} {list(shape)} {total}\n".encode())
    return digest.hexdigest()


def _step(shape: Sequence[int]) -> int:
    return -(-math.prod(shape) // SAMPLES)


def _weighted_sum(values: Tensor, numbers: Tensor) -> Tensor:
    """The sum of the values' bit patterns, weighted by their numbers among the parameter's samples."""
    values = values.to(torch.bfloat16)
    values = values.where(values.abs() >= torch.finfo(torch.float16).tiny, 0)
    bits = values.view(torch.int16).to(torch.int64)
    return (bits * (numbers % 65521 + 1)).sum()  # stays below 2**52
