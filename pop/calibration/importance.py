"""Importance scores: how much prefill and decode need each layer, by virtual gates.

A scalar gate g_l = 1 multiplies what layer l adds to the residual stream (He et al., Findings of ACL 2026):

    h = h + g_l * attention_update(attended)      attended: the output of attention over h
    h = h + g_l * mlp_update(h)

Each layer has two gates. Its prefill gate acts on the prompt without the last token. Its decode gate acts on that token
and on the response. The importance of layer l for a stage is E[(dL/dg_l)^2], where L is the negative log-likelihood of
a response. If the model sampled it itself, as it does for a prompt without one, this estimates the Fisher information.
Otherwise it says only how sensitive the response is to the layer. One forward and one backward pass gives all gates of
a sample. README.md in this folder derives the score.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pop.calibration.passes import Pass, checkpointed
from pop.calibration.texts import as_list
from pop.engine.modes import own_dtypes_and_devices
from pop.errors import InputError, PopError, UnsupportedError, check_count
from pop.generation.answers import end_ids
from pop.generation.batch import as_prompts
from pop.generation.sampling import SamplingParams, check_finite, read_tokens, sample_tokens
from pop.inputs.processors import Prepared
from pop.model import check_model
from pop.models.base import Attend
from pop.models.layers import Rope
from pop.pruning.plan import PrunePlan
from pop.runner import FULL_DEPTH, padded
from pop.system import files
from pop.system.progress import progress_bar

LOGITS_AT_ONCE = 256  # response tokens whose logits [N, V] are in memory together
SCORES = ("prefill", "decode", "prefill_error", "decode_error")


class Sample(NamedTuple):
    """A prompt, and the response whose likelihood counts."""

    prompt: list[int]
    response: list[int] | None  # None: the model samples one
    media: list[Prepared]  # the prompt's images and videos
    seed: tuple[int, int]  # of the random numbers by which a response is sampled


@own_dtypes_and_devices()
def importance(
    model,
    samples: Iterable,
    *,
    images=None,
    videos=None,
    response_tokens: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> "Importance":
    """Score how much each stage needs each layer.

    Args:
        model: A pop.Model. The full model is scored, whatever its plan is.
        samples: Prompts, as texts or token ids, or pairs (prompt, response). The model samples the missing responses,
            at full depth and temperature 1.
        images, videos: A list for each sample's prompt, as in `Model.generate`. All are in memory at the same time.
        response_tokens: The most tokens of a sampled response. An end token ends it earlier, and counts in the loss.
        batch_size: How many samples run at once. It changes speed, memory and rounding only.
        seed: Sample i has a random generator seeded with (seed, i).
        progress: Show a bar on stderr, if tqdm is installed.

    Raises:
        InputError, ContextOverflow, TokenizerError: A sample or an option cannot be used, or numbers overflow.
        UnsupportedError: Several processes share the model.
    """
    check_model(model)
    if model.part is not None:
        raise UnsupportedError("importance does not run in several processes; load the model in one process")
    response_tokens = check_count("response_tokens", response_tokens)
    batch_size = check_count("batch_size", batch_size)
    seed = check_count("seed", seed, least=0, most=2**63 - 1)
    samples = _parse(model, samples, images, videos, response_tokens, seed)

    squares = []  # [batch, 2 (prefill, decode), L] each
    with progress_bar("importance", len(samples), "samples", progress) as step:
        for begin in range(0, len(samples), batch_size):
            batch = samples[begin : begin + batch_size]
            missing = [sample for sample in batch if sample.response is None]
            sampled = iter(sample_responses(model, missing, response_tokens))
            batch = [sample._replace(response=sample.response or next(sampled)) for sample in batch]
            squares.append(gate_gradients(model, batch).square())
            step(len(batch))
    scores = torch.cat(squares)
    n = len(scores)
    mean = scores.mean(0)
    error = ((scores - mean).square().sum(0) / (n - 1) / n).sqrt()  # NaN for one sample
    return Importance(*mean, *error, num_samples=n)


def _parse(model, samples, images, videos, response_tokens: int, seed: int) -> list[Sample]:
    """Encode the samples, and check that each fits the model's context."""
    samples = as_list(samples, "samples", "prompts, or of (prompt, response)")
    rows = model.vision.prepare_batch(images, videos, len(samples))
    if not samples:
        raise InputError("samples is empty; give at least one prompt")
    parsed = []
    for number, (sample, media) in enumerate(zip(samples, rows, strict=True)):
        try:
            is_pair = isinstance(sample, (tuple, list)) and len(sample) == 2 and as_prompts(sample)[1]
            prompt, response = sample if is_pair else (sample, None)  # two token ids are a prompt
            prompt = model.encode(prompt, media=media)
            count = response_tokens
            if response is not None:
                response = model.encode(response, "response", bos=False)
                count = len(response)
            model.check_fits(len(prompt) + count - 1, "prompt plus response")
        except PopError as error:
            raise type(error)(f"sample {number} cannot be used: {error}") from None
        parsed.append(Sample(prompt, response, media, (seed, number)))
    return parsed


def sample_responses(model, samples: list[Sample], count: int) -> list[list[int]]:
    """Sample a response of at most `count` tokens to each prompt, at full depth and temperature 1.

    Returns token ids, including the end token. Each row's random generator has its own seed. So a response does not
    depend on the other rows of the batch, up to rounding in the logits.
    """
    if not samples:
        return []
    ends = end_ids(model)
    seeds = [np.random.SeedSequence(sample.seed).generate_state(1).item() for sample in samples]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    params = SamplingParams(temperature=1.0)
    tokens, lengths = padded([sample.prompt for sample in samples])
    media = [sample.media for sample in samples]
    cache = model.new_cache(len(samples), tokens.shape[1] + count - 1)
    logits = model.prefill_prepared(tokens, cache, lengths, media, FULL_DEPTH)
    responses = [[] for _ in samples]
    while True:
        tokens = sample_tokens(logits, params, generators)
        for response, token in zip(responses, read_tokens(tokens), strict=True):
            if not response or response[-1] not in ends:
                response.append(token)
        have_ended = all(response[-1] in ends for response in responses)
        if have_ended or max(map(len, responses)) == count:
            return responses
        logits = model.decode(tokens, cache)


@torch.inference_mode(False)  # whatever the caller's mode is
@torch.enable_grad()
def gate_gradients(model, samples: list[Sample]) -> Tensor:
    """dL/dg of every gate for each sample: [B, 2 (prefill, decode), L] float64 on the CPU.

    Each batch row has its own gates, so one backward pass keeps the samples apart. Autograd keeps h between the layers
    only; it recomputes the activations inside a layer.
    """
    module = model.module
    tokens, lengths = padded([sample.prompt + sample.response[:-1] for sample in samples])  # [B, T] and [B]
    boundary = torch.tensor([[len(sample.prompt) - 1] for sample in samples])  # [B, 1]
    position = torch.arange(tokens.shape[1])
    with torch.no_grad():
        shown = tokens.where(position <= boundary, -1)  # a placeholder in a response is not an image
        images = model.vision.images(module, [sample.media for sample in samples], shown, lengths)
    decode = (position >= boundary).to(model.device)  # [B, T], padding included: no gradient reaches it
    gates = torch.ones(
        len(module.layers), len(samples), 2, dtype=torch.float32, device=model.device, requires_grad=True
    )

    model_pass = Pass(module, tokens, images)
    h = model_pass.embed()
    for index, gate in enumerate(gates):
        h = model_pass.run_layer(index, h, partial(_gated_layer, gates=gate, decode=decode))

    def piece_loss(h, targets):
        return F.cross_entropy(module.head(h), targets, reduction="sum")

    loss = 0.0
    for row, sample in zip(h, samples, strict=True):
        predicting = row[len(sample.prompt) - 1 :][: len(sample.response)]  # [N, D]
        targets = torch.tensor(sample.response, device=model.device)
        for piece in zip(predicting.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=True):
            loss = loss + checkpointed(piece_loss, *piece)
    (gradients,) = torch.autograd.grad(loss, gates)  # [L, B, 2]
    check_finite(gradients, "gradients of the gates")
    return gradients.permute(1, 2, 0).double().cpu()


def _gated_layer(layer, h: Tensor, rope: Rope, attend: Attend, gates: Tensor, decode: Tensor):
    """Run one layer at full depth: h [B, T, D] -> [B, T, D]. A gate of 1 changes no bit of h, even in bfloat16.

    gates [B, 2 (prefill, decode)] are float32, and so are the sums of their derivatives. decode [B, T] says which
    tokens belong to decode.
    """
    gate = torch.where(decode, gates[:, 1:], gates[:, :1])[..., None]  # [B, T, 1]
    attended = attend(layer, *layer.queries_keys_values(h, rope))
    h = h + (gate * layer.attention_update(attended)).to(h.dtype)
    return h + (gate * layer.mlp_update(h)).to(h.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Importance:
    """Importance scores of all layers for both stages, made by `pop.importance`."""

    prefill: Tensor  # [L] float64 on the CPU, in nats squared
    decode: Tensor
    prefill_error: Tensor  # standard errors [L] float64; all NaN for a single sample
    decode_error: Tensor
    num_samples: int  # the scores are means over these

    def __post_init__(self):
        for name in SCORES:
            scores = [math.nan if score is None else score for score in getattr(self, name)]  # as `save` writes NaN
            object.__setattr__(self, name, torch.tensor(scores, dtype=torch.float64, device="cpu"))

    def plan(self, count: int, **options) -> PrunePlan:
        """Prune the `count` layers that prefill needs least. Of equal layers, prune the deeper one first.

        `options` are the other fields of PrunePlan. Raises PlanError if a value is out of range.
        """
        return PrunePlan.least_important(self.prefill.tolist(), count, **options)

    def save(self, path: str | os.PathLike) -> None:
        """Write the scores as JSON, whole or not at all. Raises InputError if that fails."""

        def listed(scores: Tensor) -> list:
            return [None] * len(scores) if scores.isnan().any() else scores.tolist()

        content = json.dumps(dataclasses.asdict(self), indent=1, default=listed) + "\n"
        files.write_whole(path, content.encode(), "the importance scores", InputError)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Importance":
        """Read scores that `save` has written. Raises InputError for any other file."""
        try:
            return cls(**files.read_json(path, InputError))
        except (TypeError, ValueError, OverflowError) as error:  # an InputError is a ValueError
            raise InputError(f"{path} does not hold importance scores ({error}); write them with .save(path)") from None
