"""The method on real models: SmolLM2-135M-Instruct and Gemma-3-270M in float32, where their weights are present.

Greedy text is the reference implementation's (goldens: `tools/goldens/text_models.py --real`). Then the tests measure
the loss on real English. Leaving a third of the layers out of prefill costs little, and out of both stages ruins the
model. The boundary token needs its full depth. Calibrated plans cost far less than plain ones.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import naive_fit
from support.chat_templates import assert_chats
from support.goldens import GOLDENS, TOLERANCE
from support.nightly import NIGHTLY
from support.text import assert_golden

import pop
from pop.calibration.questions import codes, make_questions
from pop.pruning import reference
from tools.evaluate.contender import Contender
from tools.evaluate.questions import Writer, documents, quotes
from tools.evaluate.retrieval import evaluate_retrieval
from tools.evaluate.text import evaluate_text, read_domains, read_text, spread_windows

ROOT = Path(__file__).parent.parent
PROMPT, CONTINUATION = 256, 128  # tokens of a passage


@pytest.fixture(scope="module")
def model(smollm2):
    return pop.load("smollm2-135m", dtype=torch.float32, progress=False)


@pytest.fixture(scope="module")
def gemma(gemma3):
    return pop.load("gemma3-270m", dtype=torch.float32, progress=False, chat_format="gemma")


@pytest.fixture(scope="module", params=[("model", "smollm2-135m"), ("gemma", "gemma3-270m")], ids=lambda pair: pair[1])
def pair(request):
    """A real model, and its golden files."""
    fixture, name = request.param
    golden = json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))
    return request.getfixturevalue(fixture), golden, np.load(GOLDENS / f"{name}.npz")


@pytest.mark.parametrize("prompt", ["chat", "plain", "long"])
def test_logits_and_text_are_the_references(pair, prompt):
    model, golden, logits = pair
    golden = golden["prompts"][prompt]
    window = max((size for size in model.config.windows if size), default=0)
    assert prompt != "long" or len(golden["tokens"]) > 3 * window
    boundary = model.prefill([golden["tokens"]], model.new_cache(1, len(golden["tokens"])), plan=pop.PrunePlan.none())
    error = np.abs(boundary[0].numpy()[logits["ids"]] - logits[prompt]).max() / golden["logits_std"]
    print(f"{prompt}: logits within {error:.1e} standard deviations")
    assert error < TOLERANCE

    answer = model.generate(golden["tokens"], max_new_tokens=len(golden["greedy"]), plan=pop.PrunePlan.none())
    assert answer.tokens == golden["greedy"]
    assert answer.text == golden["greedy_text"]


def test_tokens_and_conversations_are_the_references(pair):
    """Gemma's tokenizer.model is rebuilt from a GGUF file. Its golden is that of the published tokenizer.json."""
    model = pair[0]
    golden = json.loads((GOLDENS / "tokenizers" / f"{model.name}.json").read_bytes())
    assert_golden(model.tokenizer, golden)
    assert_chats(model.chat_format(), golden)


def test_cost_of_pruning_a_third(model):
    plan = pop.PrunePlan.deepest(model.config.num_layers, 1 / 3)
    tokens = torch.tensor(model.tokenizer.encode((ROOT / "pop" / "data" / "alice.txt").read_text(encoding="utf-8")))
    passages = tokens.unfold(0, PROMPT + CONTINUATION, PROMPT)[:3]  # each begins where the last one's answer did

    loss = {"full": 0.0, "pruned prefill": 0.0, "dropped in both stages": 0.0}  # nats, all continuations
    kl = {"boundary at full depth": 0.0, "boundary pruned too": 0.0}  # to the full model, at the first token
    for passage in passages:
        prompt, continuation = passage[:PROMPT], passage[PROMPT:]
        full = model.logits(passage[None])[0]
        first = full[PROMPT - 1]
        loss["full"] += F.cross_entropy(full[PROMPT - 1 : -1], continuation, reduction="sum").item()

        loss["pruned prefill"] -= model.score(prompt, continuation, plan=plan)
        logits = model.prefill(prompt[None], model.new_cache(1, PROMPT), plan=plan)[0]
        kl["boundary at full depth"] += naive_fit.kl(first, logits).item()

        # With no token at full depth the layers are gone for good, from the prompt's last token on.
        nowhere = torch.zeros(len(passage), dtype=torch.bool)
        dropped, _ = reference.forward(model.module, passage, nowhere, plan)
        kl["boundary pruned too"] += naive_fit.kl(first, dropped[PROMPT - 1]).item()
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


# The largest change of perplexity, the largest KL in nats, and the least share of equal likeliest tokens, by plan:
# as it ships, and with nothing but the first and the last token at full depth.
BOUNDS = {
    ("smollm2-135m-third", "as it ships"): (0.005, 0.004, 0.98),
    ("smollm2-135m-third", "bare"): (0.01, 0.022, 0.92),
    ("smollm2-135m-14", "as it ships"): (0.005, 0.007, 0.96),
    ("smollm2-135m-14", "bare"): (0.025, 0.052, 0.85),
}
BOUNDED = {name for name, _ in BOUNDS}
WINDOWS = 2  # of each domain
if not NIGHTLY:
    BOUNDS = {key: BOUNDS[key] for key in (("smollm2-135m-third", "as it ships"), ("smollm2-135m-14", "bare"))}


def test_cost_of_the_plans_that_ship(model):
    """The bounds hold over all windows of prose, speech and code that calibration never saw.

    In the order of all BOUNDS, perplexity changes by -0.1, 0.2, -0.2 and 1.3 %, and the KLs are 0.002, 0.018, 0.004
    and 0.044. Of these prompts, the plan of 14 layers prunes a quarter. Without corrections, a third has a KL of 0.126.
    """
    contenders = [Contender("full", model, pop.PrunePlan.none())]
    paths = Path(pop.__file__).parent.glob("data/plans/smollm2-135m-*.plan")
    assert {path.stem for path in paths} == BOUNDED, "give a further plan that ships its bounds"
    for name, form in BOUNDS:
        plan = dataclasses.replace(pop.PrunePlan.load(name), full_depth_below=0)  # so that it prunes these prompts
        assert plan.corrections.rank and plan.full_depth_selected
        if form == "bare":
            plan = dataclasses.replace(plan, full_depth_last=1, full_depth_selected=0.0)
        contenders.append(Contender(f"{name} {form}", model, plan))
    windows = {}
    for name, files in read_domains([]).items():
        tokens = model.tokenizer.encode(read_text(files), bos=False)
        windows[name] = spread_windows(tokens, PROMPT + CONTINUATION, WINDOWS, model.tokenizer.bos_id)
        assert len(windows[name]) == WINDOWS
    result = evaluate_text(contenders, windows, PROMPT)
    rows = result["all"]["rows"]
    for name, row in rows.items():
        print(name, *(f"{key} {row[key]['value']:.3f}" for key in ("perplexity_change", "kl", "same")))
    for contender, (change, kl, same) in zip(contenders[1:], BOUNDS.values(), strict=True):
        row = rows[contender.name]
        assert row["perplexity_change"]["value"] <= change
        assert row["kl"]["value"] <= kl
        assert row["same"]["value"] >= same


def test_selected_tokens_bring_answers_back(model):
    """Codes, facts and quotations of speech on prompts of 512 tokens, read by the plan of 14 layers that ships.

    By the right answers' log-probability, beside the full model's: -0.81 nats, and -1.41 if no tokens are selected.
    """
    plan = pop.PrunePlan.load("smollm2-135m-14")
    alone = dataclasses.replace(plan, full_depth_selected=0.0)
    plans = {"full": pop.PrunePlan.none(), "selected": plan, "alone": alone}
    contenders = [Contender(name, model, plan) for name, plan in plans.items()]
    texts = {name: model.tokenizer.encode(read_text(files), bos=False) for name, files in read_domains([]).items()}
    writer = Writer(model, texts, seed=3)
    questions = {512: make_questions(writer, [codes, documents, quotes("speech")], 512, 2)}
    rows = evaluate_retrieval(contenders, questions)["rows"]
    nats = {name: row["difference"]["value"] for name, row in rows.items()}
    print(nats)
    assert nats["selected"] > max(nats["alone"] + 0.3, -1.1)
