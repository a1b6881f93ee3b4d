"""Save one file of each kind that `pop` writes, so that later versions can be tested against them.

    PYTHONPATH=tests python -m tools.goldens.saved "NAME OF THIS VERSION"      -> tests/goldens/saved/

facts.json names the version that made them. They stand for files that users have: do not make them anew because a test
fails. Run this script only after a format has changed on purpose.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from support import tiny
from support.tiny_chat import write_chat_checkpoint

import pop
from pop.generation.sampling import Sampler, SamplingParams

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "goldens" / "saved"
PLAN = pop.PrunePlan((1, 3, 4), full_depth_last=8, full_depth_first=2)
SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.4, "top_k": 5},
    {"temperature": 1.7, "top_p": 0.6},
    {"temperature": 1.2, "top_k": 9, "top_p": 0.8},
]
CONFIGS = {
    "llama": tiny.tiny_config,
    "gemma3": tiny.tiny_gemma3_config,
    "gemma3 with images": tiny.tiny_gemma3_vl_config,
    "qwen3": tiny.tiny_qwen3_config,
    "qwen3 with experts": tiny.tiny_qwen3_moe_config,
    "qwen3_vl": tiny.tiny_qwen3_vl_config,
}


def make(made_with: str) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    PLAN.save(FOLDER / "plan.json")
    with tempfile.TemporaryDirectory() as folder:
        model = chat_model(Path(folder, "chat"))  # the name of the folder is in the plan's record
    texts = torch.randint(0, model.config.vocab_size, (60, 60), generator=torch.Generator().manual_seed(0)).tolist()
    plan = pop.PrunePlan((1,), full_depth_last=4)
    plan = pop.calibrate(model, texts, plan, window=60, progress=False)
    plan.save(FOLDER / "calibrated.plan")
    scores = pop.importance(model, [text[:20] for text in texts[:4]], response_tokens=4, progress=False)
    scores.save(FOLDER / "importance.json")
    facts = {
        "made_with": made_with,
        "fingerprints": {name: fingerprint(name) for name in CONFIGS},
        "calibrated_sums": sums(plan.corrections),
        "picks": [picks(settings) for settings in SETTINGS],
    }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(fact)}" for name, fact in facts.items())
    (FOLDER / "facts.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def chat_model(folder: Path) -> pop.Model:
    """The model of all files here, in float32, from a checkpoint that is made in `folder`."""
    write_chat_checkpoint(folder, seed=4, attention_bias=True)
    return pop.load(folder, prune=None)


def fingerprint(name: str) -> str:
    config = CONFIGS[name]()
    return pop.Model(tiny.random_model(config, seed=7), config).fingerprint


def sums(corrections) -> list[float]:
    """A sum of all weights and one of all biases, each weighted by its index."""
    values = (corrections.weight.flatten().double(), corrections.bias.flatten().double())
    return [(x * torch.arange(len(x))).sum().item() for x in values]


def picks(settings: dict) -> list[list[int]]:
    """Ten steps of three batch rows, from logits that numpy's fixed random stream decides."""
    random = np.random.RandomState(np.random.PCG64(11))
    sampler = Sampler(SamplingParams(**settings), [5] * 3)
    return [sampler(torch.from_numpy(random.standard_normal((3, 40)).astype(np.float32))).tolist() for _ in range(10)]


if __name__ == "__main__":
    make(sys.argv[1])
