"""tools/examples/nano_gpt.py against its own decoder, which knows nothing of caches and of pruning."""

import runpy
from pathlib import Path

import pytest
import torch
from support.cases import assert_close

from pop import PlanError, PrunePlan
from pop.pruning import reference

SCRIPT = Path(__file__).parents[2] / "tools" / "examples" / "nano_gpt.py"
nano = runpy.run_path(str(SCRIPT))
PROMPTS = [[5, 9, 33], [17], list(range(20, 47))]
PLANS = [PrunePlan.none(), PrunePlan((4, 5)), PrunePlan((0, 2, 3), 3, 2)]


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(7)
    gpt = nano["GPT"](nano["GPTConfig"]()).eval().requires_grad_(False)
    for name, weight in gpt.named_parameters():  # louder than a fresh model, whose layers do little
        if weight.dim() == 2 and name.startswith("h."):
            weight.mul_(3)
    return gpt


def naive(gpt, ids, prompt_length, plan):
    """Logits [T, V] of ids [T] by the decoder's own blocks: where a token skips a layer, its h stays what it was."""
    position = torch.arange(len(ids))
    full_depth = (position < plan.full_depth_first) | (position >= prompt_length - plan.full_depth_last)
    h = gpt.wte(ids) + gpt.wpe(position)
    for index, block in enumerate(gpt.h):
        skips = ~full_depth if index in plan.layers else torch.zeros_like(full_depth)
        h = torch.where(skips[:, None], h, block(h[None])[0])
    return gpt.lm_head(gpt.ln_f(h))


def continued(gpt, prompt, plan, count):
    ids = torch.tensor(prompt)
    for _ in range(count):
        ids = torch.cat((ids, naive(gpt, ids, len(prompt), plan)[-1].argmax()[None]))
    return ids[len(prompt) :].tolist()


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_answers_are_those_of_the_decoder_itself(gpt, plan):
    expected = [continued(gpt, prompt, plan, 9) for prompt in PROMPTS]
    for chunk_size in (2048, 4):
        assert nano["generate"](gpt, PROMPTS, plan, 9, chunk_size).tolist() == expected
    if plan.layers:
        assert expected != [continued(gpt, prompt, PrunePlan.none(), 9) for prompt in PROMPTS]
    with pytest.raises(PlanError, match="layers are 0 to 5"):
        nano["generate"](gpt, PROMPTS, PrunePlan((6,)), 2)


def test_logits_of_a_lifted_model_are_those_of_the_decoder_itself(gpt):
    model, ids = nano["PrunableGPT"](gpt), torch.tensor(PROMPTS[2])
    assert_close(naive(gpt, ids, len(ids), PLANS[0]), gpt(ids[None])[0])
    tokens = model.tokens(ids, torch.arange(len(ids)))  # [T]
    full_depth = reference.full_depth_tokens(len(ids) - 1, len(ids), PLANS[2])
    found, _ = reference.forward(model, tokens, full_depth, PLANS[2])
    assert_close(found[-1], naive(gpt, ids, len(ids) - 1, PLANS[2])[-1])
