"""Random texts to calibrate on, as windows without images, and losses that are made up."""

import torch

from pop.calibration.held_out import Judge, Losses


def random_texts(seed: int, *lengths: int) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randint(67, (length,), generator=drawn).tolist() for length in lengths]


def windows_of(texts: list[list[int]]) -> list[tuple[list[int], list]]:
    return [(text, []) for text in texts]


def of_mean(loss: float) -> Losses:
    return Losses(loss, loss, 0.0, loss)


class MadeUp(Judge):
    """A judge with given losses, one for each plan that it sees. `seen` are these plans."""

    def __init__(self, *losses: float):
        self.made_up = iter(losses)
        self.seen = []

    def losses(self, plan) -> Losses:
        self.seen.append(plan)
        return of_mean(next(self.made_up))
