"""The recipe for int8 weights: torchao replaces the weights of a model's linear layers, and everything runs on.

Int8 rounds each number of a row to 1/127 of the row's largest. The logits of these models then change by 1 to 4 % of
their standard deviation.
"""

import copy
from functools import partial

import pytest
import torch
from support.compiler import requires_compiler, requires_new_torch
from support.nightly import NIGHTLY
from support.tiny import random_model, tiny_config, tiny_gemma3_config

import pop

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_heads": 4, "num_kv_heads": 2}
CONFIG = tiny_config(**WIDE, attention_bias=True, mlp_bias=True)
GEMMA = tiny_gemma3_config(**WIDE)
PLAN = pop.PrunePlan((3, 4))
TOKENS = [[5, 12, 44, 3, 50, 8, 33, 2, 19]]
TOLERANCE = 0.1  # of the logits' standard deviation, root mean square
pytestmark = requires_new_torch  # as torchao does


def quantized(module):
    torchao = pytest.importorskip("torchao.quantization")
    module = copy.deepcopy(module)
    torchao.quantize_(module.layers, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    return module


def run(model) -> torch.Tensor:
    """Logits of the plain pass, of a pruned prefill in chunks, and of five decode steps: [N, V]."""
    cache = model.new_cache(1, 30)
    logits = [model.logits(TOKENS)[0], model.prefill(TOKENS, cache)]
    logits += [model.decode([token], cache) for token in (7, 1, 9, 30, 2)]
    return torch.cat(logits)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).pow(2).mean().sqrt() / expected.std()).item()


@pytest.mark.parametrize(
    ("config", "dtype"), [(CONFIG, torch.bfloat16), (GEMMA, torch.float32)], ids=["llama", "gemma3"]
)
def test_logits_stay_close_and_memory_falls(config, dtype):
    module = random_model(config, seed=2).to(dtype)
    options = {"plan": PLAN, "compile": False, "chunk_size": 4}
    expected = run(pop.Model(copy.deepcopy(module), config, **options))
    small = quantized(module)
    found = run(pop.Model(small, config, **options))
    assert 0 < error(found, expected) < TOLERANCE
    weight = small.layers[0].mlp.up_proj.weight
    assert weight.qdata.dtype == torch.int8 and weight.dtype == dtype


@requires_compiler
def test_compiled_equals_eager(monkeypatch):
    """Only nightly generates code for the graphs."""
    if not NIGHTLY:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    config = tiny_config(**WIDE, num_layers=2)
    module = quantized(random_model(config, seed=2))
    plan = pop.PrunePlan((1,))
    eager, compiled = (pop.Model(module, config, plan=plan, compile=compile) for compile in (False, True))
    torch.testing.assert_close(run(compiled), run(eager), rtol=0, atol=1e-4)
    assert compiled.compiled


def test_corrections_can_be_fitted_to_it():
    model = pop.Model(quantized(random_model(CONFIG, seed=2)), CONFIG, compile=False)
    text = [(7 * n + n // 5) % 50 for n in range(600)]
    assert pop.calibrate(model, [text], PLAN, steps=0, rank=8, progress=False).corrections is not None
