"""The FLOPs of a vision tower, counted from shapes. No plan makes it cheaper, so it caps what pruning gains.

A tower of width C with L' layers turns the P patches of each image, or of each frame pair of a video, into M tokens.
All patches attend to all patches. In multiply-adds, of which each is two FLOPs:

    blocks                                  L' · (P · (4·C² + 2·C·I') + 2 · P²·C)
    patches to vectors                      P · C · values of a patch
    vectors to tokens                       M tokens through a matrix or a small network

pop/pruning/cost.py counts the rest of a prefill, and explains the letters.
"""

from collections.abc import Sequence

from pop.models.config import Qwen3VisionConfig
from pop.pruning.cost import prefill_flops
from pop.pruning.plan import PrunePlan


def speedup_limit(config, num_tokens: int, plan: PrunePlan, patches: Sequence[int]) -> float:
    """The speedup over a full prefill that the FLOPs allow, those of the tower included."""
    tower = vision_flops(config, patches)
    full = prefill_flops(config, num_tokens, PrunePlan.none())
    return (full + tower) / (prefill_flops(config, num_tokens, plan) + tower)


def vision_flops(config, patches: Sequence[int]) -> int:
    """FLOPs of the vision tower and the projector after it, for images of `patches` patches each. 0 for no image."""
    if not patches:
        return 0
    vision = config.vision
    C = vision.hidden_size
    P = sum(patches)
    blocks = P * (4 * C**2 + 2 * C * vision.intermediate_size) + sum(2 * C * count**2 for count in patches)
    if isinstance(vision, Qwen3VisionConfig):
        values = 3 * vision.frames * vision.patch_size**2  # three channels of a patch's pixels, in all its frames
        square = vision.merge_size**2  # patches of a token
        num_tokens = P // square
        # Two matrices turn a square of patches into a token, and two more for each DeepStack layer.
        merging = (1 + len(vision.deepstack)) * square * C * (square * C + vision.out_size)
    else:
        values = 3 * vision.patch_size**2
        num_tokens = len(patches) * vision.tokens_per_image
        merging = C * config.hidden_size
    return 2 * (vision.num_layers * blocks + P * C * values + num_tokens * merging)
