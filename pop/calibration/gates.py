"""Virtual gates: how much each stage needs each layer, from one forward and one backward pass a sample.

A scalar gate g_l = 1 multiplies what layer l adds to the residual stream (He et al., Findings of ACL 2026):

    h = h + g_l * attention_update(h)
    h = h + g_l * mlp_update(h)

A layer's prefill gate acts on the prompt without its last token. Its decode gate acts on that token and on the sampled
response. The importance of layer l for a stage is E[(dL/dg_l)^2] (README.md in this folder).
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from pop.calibration.student import checkpointed
from pop.generation.answers import end_ids
from pop.generation.batch import padded
from pop.generation.sampling import Sampler, SamplingParams, check_finite, read_tokens
from pop.inputs.processors import Prepared
from pop.models.base import Attend
from pop.models.layers import Rope
from pop.pruning.plan import PrunePlan

LOGITS_AT_ONCE = 256  # response tokens whose logits [N, V] are in memory together


def sample_responses(
    model, prompts: list[list[int]], media: list[list[Prepared]], seeds: list[Sequence[int]], count: int
) -> list[list[int]]:
    """Sample a response of at most `count` tokens to each prompt, at full depth and temperature 1.

    Returns token ids, including the end token. Each row's random generator has its own seed. So a response does not
    depend on the other rows of the batch, up to rounding in the logits.
    """
    if not prompts:
        return []
    ends = end_ids(model)
    states = [np.random.SeedSequence(seed).generate_state(1) for seed in seeds]
    sampler = Sampler(SamplingParams(temperature=1.0), [int(state[0]) for state in states])
    lengths = [len(prompt) for prompt in prompts]
    cache = model.new_cache(len(prompts), max(lengths) + count - 1)
    logits = model.prefill(padded(prompts), cache, lengths=lengths, images=media, plan=PrunePlan.none())
    responses = [[] for _ in prompts]
    while True:
        tokens = sampler(logits)
        for response, token in zip(responses, read_tokens(tokens), strict=True):
            if not response or response[-1] not in ends:
                response.append(token)
        if len(max(responses, key=len)) == count or all(response[-1] in ends for response in responses):
            return responses
        logits = model.decode(tokens, cache)


@torch.inference_mode(False)  # whatever the caller's mode is
@torch.enable_grad()
def gate_gradients(
    model, prompts: list[list[int]], responses: list[list[int]], media: list[list[Prepared]]
) -> torch.Tensor:
    """dL/dg of every gate for each sample: [B, 2 (attention, MLP), 2 (prefill, decode), L] float64 on the CPU.

    L is the negative log-likelihood of the response. Each batch row has its own gates, so one backward pass keeps the
    samples apart. Autograd keeps h between the layers only; it recomputes the activations inside a layer.
    """
    module, device = model.module, model.device
    rows = [prompt + response[:-1] for prompt, response in zip(prompts, responses, strict=True)]
    tokens = torch.tensor(padded(rows), device=device)  # [B, T], padded on the right
    index = torch.arange(tokens.shape[1], device=device)
    boundary = torch.tensor([[len(prompt) - 1] for prompt in prompts], device=device)  # [B, 1]
    lengths = torch.tensor([[len(row)] for row in rows], device=device)
    decode = index >= boundary  # [B, T], padding included: no gradient reaches it
    predicts = decode & (index < lengths)  # the tokens whose logits are scored
    targets = torch.tensor([token for response in responses for token in response], device=device)  # [N]
    with torch.no_grad():
        shown = tokens.where(index <= boundary, -1)  # a placeholder in a response is not an image
        images = model.vision.images(module, media, shown.cpu(), lengths[:, 0].cpu())

    gates = torch.ones(len(module.layers), len(rows), 2, 2, device=device, requires_grad=True)

    def gated(index, layer, h, rope, attend):
        return checkpointed(_gated_layer, layer, h, rope, attend, gates[index], decode)

    h = module.through_layers(tokens, images, gated)[predicts]  # [N, D], in the order of the targets
    pieces = zip(h.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=True)
    loss = sum(checkpointed(lambda h, to: F.cross_entropy(module.head(h), to, reduction="sum"), *one) for one in pieces)
    (gradients,) = torch.autograd.grad(loss, gates)  # [L, B, 2, 2]
    check_finite(gradients, "gradients of the gates")
    return gradients.permute(1, 2, 3, 0).double().cpu()


def _gated_layer(layer, h: torch.Tensor, rope: Rope, attend: Attend, gates: torch.Tensor, decode: torch.Tensor):
    """Run one layer at full depth: h [B, T, D] -> [B, T, D]. A gate of 1 changes no bit of h, even in bfloat16.

    gates [B, 2 (attention, MLP), 2 (prefill, decode)] are float32, and so are the sums of their derivatives. decode
    [B, T] says which tokens belong to decode.
    """
    gates = torch.where(decode[:, None], gates[:, :, 1:], gates[:, :, :1])[..., None]  # [B, 2, T, 1]
    attended = attend(layer, *layer.queries_keys_values(h, rope))
    h = h + (gates[:, 0] * layer.attention_update(attended)).to(h.dtype)
    return h + (gates[:, 1] * layer.mlp_update(h)).to(h.dtype)
