"""Plans: the engine against the naive reference, for random models, plans, batches and chunks.

Each row of a batch is prefilled, decoded and extended. All logits are compared with those of pop/pruning/reference.py.
"""

from pathlib import Path
from random import Random

import torch
from hypothesis import note

import pop
from pop import reference
from pop.runner import padded
from tools.fuzz.cases import TEXT_IDS, Counting, check_close, random_model, random_plan

TOLERANCE = 1e-4  # of the logits' standard deviation


class Loop(Counting):
    worst = 0.0

    def try_one(self, random: Random, folder: Path) -> None:
        loaded = random_model(random, folder)
        chunk_size = random.choice([1000, 1, 2, 5, 11])
        model = pop.Model(loaded.module, loaded.config, chunk_size=chunk_size, compile=False)
        plan = random_plan(random, model)
        prompts = [random.choices(TEXT_IDS, k=random.randint(1, 40)) for _ in range(random.randint(1, 3))]
        later = torch.tensor([random.choices(TEXT_IDS, k=4) for _ in prompts])  # [B, N]
        note(f"{model.config}\n{plan}\nprompts {prompts}, then {later.tolist()}, chunk_size={chunk_size}")
        logits = engine_logits(model, prompts, later, plan)
        for row, prompt in enumerate(prompts):
            expected = reference_logits(model, torch.tensor(prompt), later[row], plan)
            self.worst = max(self.worst, check_close(logits[row], expected, TOLERANCE))
            self.counts["rows"] += 1

    def summary(self) -> str:
        return f"{super().summary()}; worst difference {self.worst:.1e} of the standard deviation"


def engine_logits(model: pop.Model, prompts: list, later: torch.Tensor, plan: pop.PrunePlan) -> torch.Tensor:
    """Logits [B, 1 + N, V] of each row's boundary token and of later tokens [B, N]."""
    tokens, lengths = padded(prompts)
    cache = model.new_cache(len(prompts), 64)
    first = model.prefill(tokens, cache, lengths=lengths, plan=plan)  # [B, V]
    second = model.decode(later[:, 0], cache)
    return torch.cat([first[:, None], second[:, None], model.extend(later[:, 1:], cache)], dim=1)


def reference_logits(model: pop.Model, prompt: torch.Tensor, later: torch.Tensor, plan: pop.PrunePlan) -> torch.Tensor:
    """Likewise of one row, [1 + N, V], by the reference."""
    tokens = torch.cat((prompt, later))
    full_depth = reference.full_depth_tokens(len(prompt), len(tokens), plan)
    selected = reference.selected_tokens(model.module, prompt, plan)
    logits, _ = reference.forward(model.module, tokens, full_depth, plan, selected=selected)
    return logits[len(prompt) - 1 :]
