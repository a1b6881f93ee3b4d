"""Fingerprints, to tell models' weights apart: calibrated plans and saved conversations belong to one model."""

import dataclasses
import hashlib
import math

import torch

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
    digest = hashlib.sha256()
    for field in dataclasses.fields(config):
        if field.name not in UNREAD:
            digest.update(f"{field.name} {getattr(config, field.name)}\n".encode())
    shapes = []
    sums = []
    for name, parameter in sorted(module.named_parameters()):
        shape = parameter.shape if part is None else part.whole_shape(name, parameter)
        step = -(-math.prod(shape) // SAMPLES)
        if part is None:
            values = parameter.flatten()[::step]
            numbers = torch.arange(len(values), device=values.device)
        else:
            values, numbers = part.samples(name, parameter, step)
        values = values.to(torch.bfloat16)
        values = values.where(values.abs() >= torch.finfo(torch.float16).tiny, 0)
        bits = values.view(torch.int16).to(torch.int64)
        sums.append((bits * (numbers % 65521 + 1)).sum())  # stays below 2**52
        shapes.append(f"{name} {list(shape)}")
    total = module.sum_over_processes(torch.stack(sums))
    for shape, value in zip(shapes, total.tolist(), strict=True):
        digest.update(f"{shape} {value}\n".encode())
    return digest.hexdigest()
