"""Virtual gates: how much each stage needs each layer, from one forward and one backward pass a sample.

Let a scalar gate g_l = 1 multiply what layer l adds to the residual stream (He et al., Findings of ACL 2026):

    h = h + g_l * attention_update(h)
    h = h + g_l * mlp_update(h)

Taking the layer out is g_l -> 0. To second order the loss L then changes by -dL/dg_l + (d2L/dg_l2) / 2. Let L be the
summed negative log-likelihood of a response that the model itself has sampled: then the first-order term is zero in
expectation, and the expected second derivative is the Fisher information, so that what remains is I_l / 2 with

    I_l = E[(dL/dg_l)^2]        the importance of layer l, in nats squared

Each layer has two gates, since a token belongs to one of two stages: the *prefill* gate acts on the prompt without
its last token, the *decode* gate on that token (the boundary token, which predicts the response) and the response.
All gates of all layers come from one forward and one backward pass a sample. Shape letters: see models/layers.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from pop.generation.answers import end_ids
from pop.generation.sampling import Sampler, SamplingParams, check_finite
from pop.inputs.processors import Prepared
from pop.models.base import Attend
from pop.models.images import TEXT
from pop.models.layers import Rope
from pop.pruning.plan import PrunePlan

LOGITS_AT_ONCE = 256  # tokens of the responses, whose logits [N, V] are in memory together


def sample_responses(
    model, prompts: list[list[int]], seeds: list[Sequence[int]], count: int, seen: list[list[Prepared]] | None = None
) -> list[list[int]]:
    """Responses of up to `count` tokens to prompts, at full depth and temperature 1, with their end tokens.

    seeds: for each prompt what its random numbers are made of. Its place in the batch plays no part, so that, as far
    as rounding lets the logits be the same, neither do the other prompts. seen: each prompt's images and videos; None:
    there are none.
    """
    if not prompts:
        return []
    ends = end_ids(model)
    sampler = Sampler(len(prompts), SamplingParams(temperature=1.0))
    states = [np.random.SeedSequence(seed).generate_state(1) for seed in seeds]
    sampler.generators = [torch.Generator().manual_seed(int(state[0])) for state in states]
    lengths = [len(prompt) for prompt in prompts]
    padded = [prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts]
    cache = model.new_cache(len(prompts), max(lengths) + count - 1)
    logits = model.prefill(padded, cache, lengths=lengths, images=seen, plan=PrunePlan.none())
    responses = [[] for _ in prompts]
    while True:
        tokens = sampler(logits)
        for response, token in zip(responses, tokens.tolist(), strict=True):
            if not response or response[-1] not in ends:
                response.append(token)
        if len(max(responses, key=len)) == count or all(response[-1] in ends for response in responses):
            return responses
        logits = model.decode(tokens, cache)


@torch.inference_mode(False)  # whatever the caller is in
@torch.enable_grad()
def gate_gradients(
    module, prompts: list[list[int]], responses: list[list[int]], images_of: Callable | None = None
) -> torch.Tensor:
    """dL/dg of every gate, sample by sample: [B, 2 (attention, MLP), 2 (prefill, decode), L] float64 on the CPU.

    prompts, responses: token ids, none of them empty; L is the response's negative log-likelihood. images_of: from
    tokens [B, T] and lengths [B] on the CPU to the Images of these rows; responses have -1 for tokens there, since
    what a model says is no image.

    The rows of the batch are padded on the right, where causal attention cannot see, and each row has gates of its own,
    so that one backward pass keeps the samples apart. Only the states between the layers are kept for it; what is
    inside a layer is computed again. Raises InputError where numbers overflow.
    """
    device = next(module.parameters()).device
    rows = [prompt + response[:-1] for prompt, response in zip(prompts, responses, strict=True)]
    T = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)  # [B, T]
    index = torch.arange(T, device=device)
    boundary = torch.tensor([[len(prompt) - 1] for prompt in prompts], device=device)  # [B, 1]
    lengths = torch.tensor([[len(row)] for row in rows], device=device)
    decode = index >= boundary  # [B, T]; padding, too: nothing flows back to it
    predicts = decode & (index < lengths)  # the tokens whose logits are scored
    targets = torch.tensor([token for response in responses for token in response], device=device)  # [N]

    images = TEXT
    if images_of is not None:
        with torch.no_grad():
            images = images_of(tokens.where(index <= boundary, -1).cpu(), lengths[:, 0].cpu())

    with _frozen(module):
        gates = torch.ones(len(module.layers), len(rows), 2, 2, device=device, requires_grad=True)

        def gated(index, layer, h, rope, attend):
            return _checkpoint(_gated_layer, layer, h, rope, attend, gates[index], decode)

        h = module.through_layers(tokens, images, gated)[predicts]  # [N, D]: row by row, as the targets are
        pieces = zip(h.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=True)
        loss = sum(_checkpoint(_negative_log_likelihood, module, *piece) for piece in pieces)
        (gradients,) = torch.autograd.grad(loss, gates)  # [L, B, 2, 2]
    check_finite(gradients, "gradients of the gates")
    return gradients.permute(1, 2, 3, 0).double().cpu()


def _gated_layer(layer, h: torch.Tensor, rope: Rope, attend: Attend, gates: torch.Tensor, decode: torch.Tensor):
    """One layer at full depth: h [B, T, D] -> [B, T, D]; gates [B, 2 (attention, MLP), 2 (prefill, decode)] float32.

    decode: [B, T] bool, the stage of each token. A gate of one changes no bit of h, in bfloat16 either, and its
    derivative is a sum in float32.
    """
    gates = torch.where(decode[:, None], gates[:, :, 1:], gates[:, :, :1])[..., None]  # [B, 2, T, 1]
    attended = attend(layer, *layer.queries_keys_values(h, rope))
    h = h + (gates[:, 0] * layer.attention_update(attended)).to(h.dtype)
    return h + (gates[:, 1] * layer.mlp_update(h)).to(h.dtype)


def _negative_log_likelihood(module, h: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(module.head(h), targets, reduction="sum")


def _checkpoint(function, *args):
    """function(*args), whose inner activations are not kept for the backward pass but computed again."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


@contextlib.contextmanager
def _frozen(module) -> Iterator[None]:
    """No parameter wants a gradient: then autograd keeps nothing for the weights' sake."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
