"""Sketches of weights: how far a model is from the one that a plan was calibrated for.

Let W [K * E, D] be a layer's projection of K or of V, with the weight of the norm before it. For J fixed pairs of
vectors u_j and e_j of random signs, the sketch holds

    s_j = u_j' W e_j                     E[s_j^2] = |W|^2, the sum of the squares of W's values

The sketch of W' - W is s' - s, since s is linear in W. So, over the K and V of n layers,

    distance = |s' - s| / |s|            estimates |W' - W| / |W|

from 2 n J numbers, with a relative standard error of about 1 / sqrt(2 n J): 4 % for ten layers. Rounding a model to
bfloat16 gives 0.002, to four bits 0.1, and two models that were trained apart are 1.4 apart.
"""

import numpy as np
import torch
from torch import Tensor

from pop.errors import PlanError

SKETCH_SIZE = 32  # J
EQUAL = 0.005  # the most that another dtype or device changes
MOST_DISTANCE = 0.25  # the most at which a plan is used. README.md in this folder has measurements


def signs(width: int, seed: int) -> Tensor:
    """[J, width] float32 of +1 and -1, the same on every machine: numpy never changes the numbers of RandomState."""
    draws = np.random.RandomState(seed).random_sample((SKETCH_SIZE, width))
    return torch.from_numpy(np.where(draws < 0.5, -1.0, 1.0)).float()


def probe_states(width: int) -> Tensor:
    """The h [J, D] float32 whose K and V `sketch_of` takes."""
    return signs(width, 0)


def sketch_of(keys_values: Tensor) -> Tensor:
    """The sketch [n, 2, J] float32 on the CPU, from the K and V [n, 2, K * E, J] float32 of n layers.

    These are projected from `probe_states`, before K's norm and rotary positions: see `DecoderLayer.projected`.
    """
    u = signs(keys_values.shape[2], 1).T  # [K * E, J]
    return (keys_values.cpu() * u).sum(2)


def distance(found: Tensor, fitted: Tensor) -> float:
    """How far the weights of a sketch are from those of the sketch `fitted`. NaN if numbers are not finite."""
    return ((found - fitted).norm() / fitted.norm()).item()


def check_distance(apart: float, name: str) -> str:
    """What to tell of a plan at this distance: nothing if the weights are its own. Raises PlanError if they are far.

    name: of the plan's file. Empty if there is none.
    """
    plan = name or "the plan"
    if not apart <= MOST_DISTANCE:
        raise PlanError(
            f"{plan} was calibrated for other weights ({apart:.0%} apart); "
            "run `pop calibrate` for these, or give another plan"
        )
    if apart <= EQUAL:
        return ""
    return f"{plan} was calibrated for weights {apart:.1%} from these; `pop check` measures what it keeps"
