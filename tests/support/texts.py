"""Random texts to calibrate on, as windows without images, and losses that are made up."""

import torch

from pop.calibration.held_out import Losses


def random_texts(seed: int, *lengths: int) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randint(67, (length,), generator=drawn).tolist() for length in lengths]


def windows_of(texts: list[list[int]]) -> list[tuple[list[int], list]]:
    return [(text, []) for text in texts]


def of_mean(loss: float) -> Losses:
    return Losses(loss, loss, 0.0, loss)
