"""Weight-only int8: every product is that with the rounded matrix, in layers, models and files."""

import copy
import dataclasses
import importlib.util
import sys

import pytest
import torch
from support.compiler import requires_compiler
from support.tiny import (
    QWEN3_VL_SIZES,
    random_model,
    tiny_config,
    tiny_gemma3_vl_config,
    tiny_qwen3_moe_config,
    tiny_qwen3_vl_config,
    write_checkpoint,
)

import pop
from pop import engine
from pop.backends import int8
from pop.backends.int8 import Int8Linear, check_quantize, quantize_module
from pop.engine import compile

requires_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_heads": 4, "num_kv_heads": 2}
CONFIGS = {
    "llama": tiny_config(**WIDE, attention_bias=True, mlp_bias=True),
    "gemma3": tiny_gemma3_vl_config(**WIDE),
    "qwen3-vl": tiny_qwen3_vl_config(
        **WIDE,
        mrope_sections=(3, 3, 2),
        tie_embeddings=True,
        vision=dataclasses.replace(QWEN3_VL_SIZES["vision"], out_size=64),
    ),
}
TOKENS = [[5, 12, 44, 3, 50, 8, 33, 2, 19]]


@pytest.fixture(scope="module", params=CONFIGS)
def modules(request):
    """A module, the same one quantised, and one with the rounded matrices in plain linear layers."""
    whole = random_model(CONFIGS[request.param], seed=2)
    quantised, rounded = copy.deepcopy(whole), copy.deepcopy(whole)
    quantize_module(quantised)
    for name, part in quantised.named_modules():
        if isinstance(part, Int8Linear):
            rounded.get_submodule(name).weight.data = part.weight
    return whole, quantised, rounded


def models(modules, plan=None, **options):
    return [pop.Model(module, module.config, plan=plan, **options) for module in modules[1:]]


@requires_torchao
def test_the_decoders_matrices_are_rounded_and_nothing_else(modules):
    whole, quantised, _ = modules
    config = whole.config
    names = {name for name, part in quantised.named_modules() if isinstance(part, Int8Linear)}
    of_layer = {name for name, part in whole.layers[0].named_modules() if isinstance(part, torch.nn.Linear)}
    assert len(of_layer) == 7
    assert len(names) == 7 * config.num_layers + (not config.tie_embeddings)
    kept = dict(quantised.named_parameters())
    for name, weight in whole.named_parameters():
        owner = name.removesuffix(".weight")
        if owner not in names:
            assert torch.equal(kept[name], weight), name
            continue
        layer = quantised.get_submodule(owner)
        step = weight.abs().amax(1, keepdim=True) / 127.5
        torch.testing.assert_close(layer.scale[:, None], step)
        assert ((layer.weight - weight).abs() <= 0.5001 * step).all()
    size = [sum(weight.nbytes for weight in module.parameters()) for module in (whole, quantised)]
    integers = sum(part.integers.numel() for part in quantised.modules() if isinstance(part, Int8Linear))
    scales = sum(len(part.scale) for part in quantised.modules() if isinstance(part, Int8Linear))
    assert size[1] == size[0] - 3 * integers + 4 * scales


@pytest.mark.parametrize("shape", [(64,), (3, 64), (3, 1, 64), (1, 1, 64), (2, 5, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_every_product_is_that_with_the_rounded_matrix(shape, dtype, bias, monkeypatch):
    monkeypatch.setattr(int8, "COPIED_AT_ONCE", 64 * 7)  # five blocks of the 33 rows
    drawn = torch.Generator().manual_seed(0)
    integers = torch.randint(-128, 128, (33, 64), generator=drawn).to(torch.int8)
    scale, added = (torch.rand(33, generator=drawn).to(dtype) for _ in range(2))
    layer = Int8Linear(integers, scale, torch.nn.Parameter(added, requires_grad=False) if bias else None)
    x = torch.randn((*shape[:-1], 80), generator=drawn).to(dtype)[..., :64]  # not contiguous
    expected = x.double() @ (integers.double() * scale.double()[:, None]).T + (added.double() if bias else 0)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            found = layer(x)
        assert (found.shape, found.dtype) == (expected.shape, dtype)
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error < {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_product_that_float16_holds_does_not_overflow_on_the_way(tokens):
    """The integers are 127 and the scale is 1/127, so each result is the sum of the inputs: 64 * 100."""
    layer = Int8Linear(torch.full((33, 64), 127, dtype=torch.int8), torch.full((33,), 1 / 127).half(), None)
    with torch.no_grad():
        out = layer(torch.full((2, tokens, 64), 100.0).half())
    torch.testing.assert_close(out, torch.full((2, tokens, 33), 6400.0).half(), rtol=2e-3, atol=0)


@requires_torchao
def test_prefill_decode_and_calibration_are_those_of_the_rounded_model(modules):
    texts = torch.randint(55, (4, 40), generator=torch.Generator().manual_seed(0)).tolist()
    plain, found = pop.PrunePlan((1, 3, 4)), []
    for model in models(modules):
        calibrated = pop.calibrate(model, texts, plain, progress=False)
        found.append([model.logits(TOKENS), calibrated.projections.weight])
        for plan in (plain, calibrated):
            cache = model.new_cache(1, 20)
            found[-1] += [model.prefill(TOKENS, cache, plan=plan, chunk_size=4), model.decode([7], cache)]
        scores = pop.importance(model, TOKENS, response_tokens=3, progress=False)
        found[-1] += [torch.as_tensor(scores.prefill), torch.as_tensor(scores.decode)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@requires_torchao
def test_a_calibrated_plan_is_for_the_quantised_model_or_the_other(modules):
    whole, quantised, _ = modules
    texts = torch.randint(55, (4, 40), generator=torch.Generator().manual_seed(0)).tolist()
    for fitted, other in ((whole, quantised), (quantised, whole)):
        plan = pop.calibrate(pop.Model(fitted, whole.config), texts, pop.PrunePlan((3, 4)), progress=False)
        with pytest.raises(pop.PlanError, match="another model's weights"):
            pop.Model(other, whole.config, plan=plan)


@requires_torchao
def test_load_rounds_alike_in_every_dtype(tmp_path):
    folder = write_checkpoint(tmp_path / "tiny", **WIDE, dtype=torch.bfloat16)
    loaded = {dtype: pop.load(folder, dtype=dtype, quantize="int8") for dtype in (torch.float32, torch.bfloat16)}
    assert {model.dtype for model in loaded.values()} == loaded.keys()
    assert len({model.fingerprint for model in loaded.values()}) == 1
    assert loaded[torch.float32].fingerprint != pop.load(folder).fingerprint
    one, two = (model.module.layers[2].mlp.down_proj.integers for model in loaded.values())
    assert torch.equal(one, two)


@requires_compiler
@requires_torchao
def test_compiled_equals_eager_and_compiles_nothing_again():
    module = random_model(CONFIGS["llama"], seed=2)
    quantize_module(module)
    model, plan = pop.Model(module, module.config, compile=False), pop.PrunePlan((2, 3))
    stages = compile.Compiled(module, engine.EAGER, required=True, progress=False)._compiled

    def run(stages, tokens):
        cache = model.new_cache(1, 40)
        logits = engine.prefill(module, torch.tensor([tokens]), cache, torch.tensor([len(tokens)]), plan, 64, stages)
        return torch.stack([logits, *(engine.decode(module, torch.tensor([token]), cache, stages) for token in (7, 9))])

    run(stages, TOKENS[0][:7])
    torch.compiler.set_stance("fail_on_recompile")
    try:
        for tokens in (TOKENS[0], TOKENS[0] * 3):
            torch.testing.assert_close(run(stages, tokens), run(engine.EAGER, tokens), rtol=0, atol=1e-4)
    finally:
        torch.compiler.set_stance("default")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quantize": "int4"}, pop.UnsupportedError, "'int4'"),
        ({"quantize": "int3"}, pop.InputError, "quantize is 'int3'"),
        ({"quantize": "int8"}, pop.UnsupportedError, "a width of 30"),
    ],
)
def test_what_is_not_served_is_refused_before_weights_are_read(options, error, message, tmp_path, monkeypatch):
    monkeypatch.setattr("pop.loading.load_weights", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises(error, match=message):
        pop.load(write_checkpoint(tmp_path / "tiny"), **options)


def test_without_torchao_on_a_gpu_or_in_several_processes_it_is_refused(monkeypatch):
    module = random_model(CONFIGS["llama"])
    with pytest.raises(pop.UnsupportedError, match="not in 2"):
        check_quantize("int8", module, torch.device("cpu"), 2)
    with pytest.raises(pop.UnsupportedError, match="cuda"):
        check_quantize("int8", module, torch.device("cuda"))
    with pytest.raises(pop.UnsupportedError, match="mixtures of experts"):
        check_quantize("int8", random_model(tiny_qwen3_moe_config(**WIDE)), torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(pop.MissingExtra, match=r"pip install 'pop-prefill\[quantize\]'"):
        check_quantize("int8", module, torch.device("cpu"))
    check_quantize(None, module, torch.device("cuda"), 2)
