"""The method on real models: SmolLM2-135M-Instruct and Gemma-3-270M in float32, where their weights are present.

Greedy text is held to the reference implementation's (goldens: `tools/make_goldens.py --real`). Then what
pruning costs on real English: a third of the layers left out of prefill alone is cheap, out of both stages
ruinous, and the boundary token needs its full depth.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pop
from pop import reference

GOLDENS = Path(__file__).parent / "goldens"
GOLDEN = {
    name: json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8")) for name in ("smollm2-135m", "gemma3-270m")
}
LOGITS = {name: np.load(GOLDENS / f"{name}.npz") for name in GOLDEN}
PROMPTS = ("chat", "plain", "long")
TEXT = Path(pop.__file__).parent / "data" / "alice.txt"
PROMPT, CONTINUATION = 256, 128  # tokens of a passage


@pytest.fixture(scope="module")
def model(smollm2):
    return pop.load("smollm2-135m", dtype=torch.float32, progress=False)


@pytest.fixture(scope="module")
def gemma(gemma3):
    return pop.load("gemma3-270m", dtype=torch.float32, progress=False)


@pytest.mark.parametrize("name", PROMPTS)
def test_matches_the_reference(model, name):
    matches_the_reference(model, GOLDEN["smollm2-135m"]["prompts"][name], LOGITS["smollm2-135m"], name)


@pytest.mark.parametrize("name", PROMPTS)
def test_gemma_matches_the_reference(gemma, name):
    golden = GOLDEN["gemma3-270m"]["prompts"][name]
    assert name != "long" or len(golden["tokens"]) > 3 * 512  # its window
    matches_the_reference(gemma, golden, LOGITS["gemma3-270m"], name)


def matches_the_reference(model, golden, logits, name):
    cache = model.new_cache(1, len(golden["tokens"]))
    boundary = model.prefill([golden["tokens"]], cache, plan=pop.PrunePlan.none())[0].numpy()
    error = np.abs(boundary[logits["ids"]] - logits[name]).max() / golden["logits_std"]
    print(f"{name}: logits within {error:.1e} standard deviations")
    assert error < 1e-4

    answer = model.generate(golden["tokens"], max_new_tokens=len(golden["greedy"]), plan=pop.PrunePlan.none())
    assert answer.tokens == golden["greedy"]
    assert answer.text == golden["greedy_text"]


def test_prompts_are_tokenized_as_by_the_reference(model):
    tokenized_as_by_the_reference(model, GOLDEN["smollm2-135m"])


def test_gemmas_prompts_are_tokenized_as_by_the_reference(gemma):
    tokenized_as_by_the_reference(gemma, GOLDEN["gemma3-270m"])
    long = (Path(__file__).parent.parent / "tools" / "texts" / "prose.txt").read_text(encoding="utf-8")
    tokens = GOLDEN["gemma3-270m"]["prompts"]["long"]["tokens"]
    assert gemma.tokenizer.encode(long)[: len(tokens)] == tokens


def tokenized_as_by_the_reference(model, golden):
    assert model.tokenizer.encode(golden["plain"]) == golden["prompts"]["plain"]["tokens"]
    messages = [{"role": "user", "content": golden["question"]}]
    assert model.chat_tokens(messages) == golden["prompts"]["chat"]["tokens"]


def test_cost_of_pruning_a_third(model):
    plan = pop.PrunePlan.deepest(model.config.num_layers, 1 / 3)
    tokens = torch.tensor(model.tokenizer.encode(TEXT.read_text(encoding="utf-8")))
    passages = tokens.unfold(0, PROMPT + CONTINUATION, PROMPT)  # each begins where the last one's answer did
    assert len(passages) >= 4

    loss = {"full": 0.0, "pruned prefill": 0.0, "dropped in both stages": 0.0}  # nats, all continuations
    kl = {"boundary at full depth": 0.0, "boundary pruned too": 0.0}  # to the full model, at the first token
    for passage in passages:
        prompt, continuation = passage[:PROMPT], passage[PROMPT:]
        full = model.logits(passage[None])[0]
        first = full[PROMPT - 1].log_softmax(-1)
        loss["full"] += F.cross_entropy(full[PROMPT - 1 : -1], continuation, reduction="sum").item()

        loss["pruned prefill"] -= model.score(prompt, continuation, plan=plan)
        logits = model.prefill(prompt[None], model.new_cache(1, PROMPT), plan=plan)[0]
        kl["boundary at full depth"] += divergence(first, logits)

        # With no token at full depth the layers are gone for good, from the prompt's last token on.
        nowhere = torch.zeros(len(passage), dtype=torch.bool)
        dropped, _ = reference.forward(model.module, passage, nowhere, plan)
        kl["boundary pruned too"] += divergence(first, dropped[PROMPT - 1])
        loss["dropped in both stages"] += F.cross_entropy(
            dropped[PROMPT - 1 : -1], continuation, reduction="sum"
        ).item()

    count = len(passages) * CONTINUATION
    perplexity = {name: math.exp(total / count) for name, total in loss.items()}
    print({name: round(value, 2) for name, value in perplexity.items()})
    print({name: round(value / len(passages), 3) for name, value in kl.items()})
    assert perplexity["pruned prefill"] < 1.40 * perplexity["full"]
    assert perplexity["dropped in both stages"] > 11 * perplexity["full"]
    assert kl["boundary pruned too"] > 10 * kl["boundary at full depth"]


def divergence(full: torch.Tensor, logits: torch.Tensor) -> float:
    """KL(p || softmax(logits)) in nats, where `full` [V] holds the logarithms of p."""
    return F.kl_div(logits.log_softmax(-1), full, reduction="sum", log_target=True).item()
