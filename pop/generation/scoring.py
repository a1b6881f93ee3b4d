"""Log-likelihoods of given continuations."""

import torch
import torch.nn.functional as F

from pop.engine.cache import KVCache
from pop.errors import InputError
from pop.generation.batch import as_prompts, padded
from pop.generation.sampling import check_finite
from pop.inputs.processors import Prepared
from pop.pruning.plan import PrunePlan
from pop.system.memory import to_device

SCORED_AT_ONCE = 256  # rows of logits [V] that are in memory together


def score(
    model,
    contexts: list[list[int]],
    continuation,
    media: list[list[Prepared]],
    plan: PrunePlan | None,
    *,
    is_list: bool = False,
    earlier: KVCache | None = None,
) -> float | list[float]:
    """Return log p(continuation | context), or a list of them. The rows of a batch run together.

    Args:
        contexts: Token ids, one list for each continuation. A single context serves all continuations.
        continuation: As in `Model.score`.
        media: The images and videos of each context.
        plan: The PrunePlan of the contexts.
        is_list: Whether the caller has given a list of contexts.
        earlier: A cache of one row, which all contexts continue and none changes.
    """
    given, are_several = as_prompts(continuation, "continuation")
    continuations = [model.encode(one, "continuation", bos=False) for one in given]
    B, lengths = len(continuations), [len(context) for context in contexts]
    if is_list and (not are_several or len(contexts) != B):
        raise InputError(f"there are {len(contexts)} contexts, but {B} continuations; give a list of one for each")
    held = 0 if earlier is None else int(earlier.lengths[0])
    for number, tokens in enumerate(continuations):
        row = number if is_list else 0
        model.check_fits(held + lengths[row] + len(tokens) - 1, "context plus continuation", media[row])
    longest = max(map(len, continuations))

    def new_cache(rows: int) -> KVCache:  # the padding of the longest row may exceed the model's context
        options = {"dtype": model.dtype, "device": model.device, "chunk_size": model.chunk_size}
        return KVCache(model.module.config, rows, held + max(lengths) + longest - 1, **options)

    cache = new_cache(len(contexts))
    if earlier is not None:
        cache.copy_from(earlier)
    logits = model.prefill(padded(contexts), cache, lengths=lengths, images=media, plan=plan)  # [B, V] or [1, V]
    if len(contexts) < B:
        context, cache = cache, new_cache(B)
        cache.copy_from(context)
    ends = torch.tensor([len(tokens) for tokens in continuations])
    inside = torch.arange(longest) < ends[:, None]  # [B, T], not padding
    targets, inside = to_device([torch.tensor(padded(continuations)), inside], model.device)
    scores = -F.cross_entropy(logits.expand(B, -1), targets[:, 0], reduction="none").double()  # [B]
    step = max(1, SCORED_AT_ONCE // B)
    for begin in range(0, longest - 1, step):
        part = targets[:, begin : begin + step + 1]  # each token predicts the next one
        logits = model.extend(part[:, :-1], cache)  # [B, C, V]
        losses = F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").double()  # [B, C]
        scores -= losses.where(inside[:, begin + 1 :][:, :step], 0).sum(1)
    check_finite(scores, "logits")
    return scores.tolist() if are_several else scores.item()
