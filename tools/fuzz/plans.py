"""Plans: the engine against the naive reference, for random models, plans, batches and chunks.

Each row of a batch is prefilled, decoded and extended. All logits are compared with those of pop/pruning/reference.py.
Tokens that a plan selects are compared by their scores, since equal scores may be ranked either way.
"""

import dataclasses
import tempfile
from pathlib import Path
from random import Random
from unittest.mock import patch

import torch
import torch.nn.functional as F

import pop
from pop import reference
from pop.engine import forward
from pop.runner import padded
from tools.fuzz.cases import Wrong, check_close, random_config, random_model, random_plan, random_prompt

TOLERANCE = 1e-4  # of the logits' standard deviation
TIE = 1e-5  # a difference of attention scores that may be rounding


class Loop:
    def __init__(self, model: str | None = None):
        self.worst = 0.0
        self.rows = 0

    def try_one(self, random: Random) -> None:
        with tempfile.TemporaryDirectory() as folder:
            loaded = random_model(random, random_config(random), Path(folder))
        chunk_size = random.choice([1, 2, 5, 11, 1000])
        model = pop.Model(loaded.module, loaded.config, chunk_size=chunk_size, compile=False)
        plan = random_plan(random, model)
        prompts = [random_prompt(random) for _ in range(random.randint(1, 3))]
        later = torch.randint(60, (len(prompts), random.randint(1, 4)))
        logits, chosen = run_engine(model, prompts, later, plan)
        for row, prompt in enumerate(prompts):
            selected = check_selected(model, prompt, plan, chosen[row, : len(prompt)])
            expected = by_reference(model, prompt, later[row], plan, selected)
            self.worst = max(self.worst, check_close(logits[row], expected, TOLERANCE))
        check_scores(model, prompts[0], later[0], dataclasses.replace(plan, full_depth_selected=0.0))
        self.rows += len(prompts)

    def summary(self) -> str:
        return f"{self.rows} rows against the reference, worst difference {self.worst:.1e} of the standard deviation"


def run_engine(model: pop.Model, prompts, later: torch.Tensor, plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, 1 + N, V] of the boundary token and of later tokens [B, N], and which tokens were selected, [B, T]."""
    tokens, lengths = padded(prompts)
    cache = model.new_cache(len(prompts), 64)
    chosen = [torch.zeros(tokens.shape, dtype=torch.bool)]
    select = forward.select
    with patch.object(forward, "select", lambda *args: chosen.append(select(*args)) or chosen[-1]):
        logits = [model.prefill(tokens, cache, lengths=lengths, plan=plan)[:, None]]  # [B, 1, V]
    logits.append(model.decode(later[:, 0], cache)[:, None])
    if later.shape[1] > 1:
        logits.append(model.extend(later[:, 1:], cache))
    return torch.cat(logits, dim=1), chosen[-1]


def check_selected(model: pop.Model, prompt: list[int], plan, chosen: torch.Tensor) -> torch.Tensor | None:
    """The selected tokens [T], or None. Raises Wrong unless they are those with the largest scores."""
    others = ~reference.full_depth_tokens(len(prompt), len(prompt), plan)
    count = plan.num_selected(int(others.sum()))
    if int(chosen.sum()) != count or (chosen & ~others).any():
        raise Wrong(f"{int(chosen.sum())} tokens are selected, not {count}")
    if not count:
        return None
    scores = reference.attention_scores(model.module, torch.tensor(prompt), plan)
    left = scores[others & ~chosen]
    if len(left) and scores[chosen].min() < left.max() - TIE:
        raise Wrong("a token with a smaller score is selected")
    return chosen


def by_reference(model: pop.Model, prompt: list[int], later: torch.Tensor, plan, selected=None) -> torch.Tensor:
    """The reference's logits [1 + N, V] of the boundary token and of later tokens [N]."""
    tokens = torch.cat((torch.tensor(prompt), later))
    full_depth = reference.full_depth_tokens(len(prompt), len(tokens), plan)
    if selected is not None:
        selected = F.pad(selected, (0, len(later)))
    logits, _ = reference.forward(model.module, tokens, full_depth, plan, selected=selected)
    return logits[len(prompt) - 1 :]


def check_scores(model: pop.Model, context: list[int], continuation: torch.Tensor, plan) -> None:
    """Compare log p of a continuation, after a context and after a prefix."""
    logits = by_reference(model, context, continuation, plan)[:-1]
    expected = logits.log_softmax(-1).gather(1, continuation[:, None]).sum().item()
    after_context = model.score(context, continuation, plan=plan)
    after_prefix = model.prefix(context, plan=plan).score(continuation)
    if max(abs(after_context - expected), abs(after_prefix - expected)) > 1e-3 * len(continuation):
        raise Wrong(f"score is {after_context}, prefix.score {after_prefix}, and the reference's {expected}")
