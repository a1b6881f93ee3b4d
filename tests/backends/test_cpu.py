"""The CPU's products and attention against float64."""

import copy
import functools
import math
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.cases import assert_close, new_cache, randn, random_corrections
from support.compiler import requires_compiler
from support.naive_method import attention
from support.nightly import NIGHTLY
from support.tiny import random_model, tiny_config, tiny_gemma3_config
from torch._inductor.codecache import CppCodeCache

import pop
from pop import engine
from pop.backends import cpu
from pop.engine.attention import decode_attention
from pop.models import layers


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5), (2, 20), (1, 70), (4,), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_product_is_the_same_product(monkeypatch, shape, dtype):
    """`linear` picks between products by shape, dtype and processor; float64 says what they all are."""
    rounding = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]  # its largest error, as a share
    kernels = (cpu._kernel, lambda: None)
    # kernels.cpp takes widths that are multiples of 32, or of 16 in float32.
    for width, biased, widened, kernel in product((24, 64), (True, False), ({dtype}, set()), kernels):
        drawn = torch.Generator().manual_seed(1)
        x, weight, bias = (torch.randn(size, generator=drawn) for size in ((*shape, width), (10, width), (10,)))
        x, weight, bias = (x * 24 / width).to(dtype), weight.to(dtype), bias.to(dtype)
        exact = x.double() @ weight.double().T
        wanted = exact + (bias.double() if biased else 0)
        rounded = wanted.abs() + (exact.abs() if biased else 0)  # before the bias is added, and after
        monkeypatch.setattr(cpu, "WIDENED", widened)
        monkeypatch.setattr(cpu, "_kernel", kernel)
        with torch.no_grad():
            out = cpu.linear(x, weight, bias if biased else None)
        assert out.dtype == dtype and out.shape == wanted.shape
        assert ((out.double() - wanted).abs() < 1e-5 + rounding * rounded).all()


# Rows are read in two places of the matrix, also of an odd number of rows. Long sums are other code of the compiler.
COMPILED = list(product([(8, 24), (7, 24), (8, 12_290), (8, 4099)], [torch.float32, torch.bfloat16]))


@requires_compiler
@pytest.mark.parametrize(("size", "dtype"), COMPILED if NIGHTLY else COMPILED[1:6:2])
def test_a_compiled_product_with_one_token_is_the_product(size, dtype):
    height, width = size
    x, weight = randn(1, 1, width).to(dtype), randn(height, width, seed=1).to(dtype)
    with torch.no_grad():
        out = torch.compile(cpu.linear, fullgraph=True)(x, weight)
    wanted = x.double() @ weight.double().T
    assert out.dtype == dtype and out.shape == wanted.shape
    assert (out.double() - wanted).abs().max() < {torch.float32: 1e-5, torch.bfloat16: 0.005}[dtype] * width**0.5


def test_all_matrices_of_a_calibrated_plan_use_the_backends_product(monkeypatch):
    """Two groups: each has a code, the corrections of its layer, and an update of h."""
    module, multiplied = random_model(tiny_config()), []

    def linear(x, weight):
        multiplied.append(tuple(weight.shape))
        return F.linear(x, weight)

    D = module.config.hidden_size
    KE = module.config.num_kv_heads * module.config.head_dim
    plan = pop.PrunePlan((1, 3), 1, 1, random_corrections(module.config, (1, 3), 0, rank=7))
    monkeypatch.setattr(cpu, "linear", linear)
    pop.backends.accelerate(module)
    monkeypatch.undo()  # the other layers' products are not counted
    cache, tokens = new_cache(module, 1, 9), torch.ones(1, 9, dtype=torch.int64)
    engine.prefill(module, tokens, cache, torch.tensor([9]), plan, 9)
    assert multiplied == [(7, 2 * D), (D, 7), (2 * KE, 7)] * 2


# The first token's own key, how many keys there are, and how many of them each token may attend before and after its
# own. False: it attends some of these, and its own.
KINDS = {
    "causal": (0, 300, 999, 0, True),
    "all": (0, 300, 999, 999, True),
    "filled cache": (77, 377, 999, 0, True),
    "window": (150, 460, 139, 0, True),
    "narrow window": (0, 300, 4, 0, True),
    "both ways": (20, 320, 15, 30, True),
    "ragged": (90, 390, 999, 0, False),
    "ragged window": (90, 391, 80, 0, False),
    "look-ahead": (20, 330, 999, 40, False),
    "scattered": (0, 501, 999, 999, False),
}


@functools.cache
def portable_kernel():
    flags = ["-ffp-contract=fast", "-U__AVX512F__", "-U__AVX512BF16__"]
    return CppCodeCache.load_async(Path(cpu.__file__).with_name("kernels.cpp").read_text(), extra_flags=flags)()


@pytest.fixture(params=["this processor", "any processor"])
def kernel(request, monkeypatch):
    """The kernel as it runs here, and as it runs on processors without AVX-512."""
    if request.param == "any processor":
        monkeypatch.setattr(cpu, "_kernel", portable_kernel)


TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.02}


def on_both_kernels(test):
    test = pytest.mark.parametrize("dtype", TOLERANCES)(test)
    return requires_compiler(pytest.mark.usefixtures("kernel")(test))


@pytest.fixture
def slow_products(monkeypatch):
    """A processor without fast products, where kernels.cpp takes more rows."""
    monkeypatch.setattr(cpu, "WIDENED", {torch.float32, torch.bfloat16})


@on_both_kernels
@pytest.mark.usefixtures("slow_products")
@given(rows=st.integers(1, cpu.MOST_ROWS), height=st.integers(1, 200), data=st.data())
def test_a_few_rows_are_multiplied_as_in_float64(dtype, rows, height, data):
    """Where a matrix ends within a tile, and a row within a part of it. Nothing around the output is written."""
    width = data.draw(st.sampled_from([32, 96, 1024, 1056, 2592]))
    x, weight, memory = randn(rows, width), randn(height, width, seed=1), torch.full((rows + 2, height), torch.nan)
    x, weight, memory = (tensor.to(dtype) for tensor in (x, weight, memory))
    cpu.multiply_rows_call(memory[1:-1], x, weight)()
    assert memory[[0, -1]].isnan().all()
    error = (memory[1:-1].double() - x.double() @ weight.double().T).abs().max()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 0.02}[dtype] * width**0.5


def test_weights_that_want_gradients_or_are_of_another_class_get_torchs_product():
    class Weight(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, *args, **options):
            called.append(function)
            return super().__torch_function__(function, *args, **options)

    x, weight = randn(2, 1, 64), randn(5, 64)
    trained = weight.clone().requires_grad_()
    cpu.linear(x, trained).sum().backward()
    assert_close(trained.grad, x.sum((0, 1)).expand(5, -1))
    seen = x.clone().requires_grad_()
    cpu.linear(seen, weight).sum().backward()
    assert_close(seen.grad, weight.sum(0).expand(2, 1, -1))
    _, forward = torch.func.jvp(partial(cpu.linear, weight=weight), (x,), (torch.ones_like(x),))
    assert_close(forward, weight.sum(1).expand(2, 1, -1))
    called = []
    with torch.no_grad():
        found = cpu.linear(x, weight.as_subclass(Weight)).as_subclass(torch.Tensor)
        assert torch.nn.functional.linear in called
        assert_close(found, cpu.linear(x, weight))


HEADS = [(2, 2, 10), (6, 2, 64), (7, 1, 256)]
PAIRS = [(kind, HEADS[number % 3]) for number, kind in enumerate(KINDS)]


@on_both_kernels
@pytest.mark.parametrize(("kind", "heads"), product(KINDS, HEADS) if NIGHTLY else PAIRS)
def test_fused_attention_is_attention(kind, heads, dtype):
    """Of keys in order, and of keys that lie anywhere, of which some are empty slots."""
    H, K, E = heads
    (own, N, before, after, is_exact), B, T, scale = KINDS[kind], 2, 300, 2 * E**-0.5
    q, k, v = randn(B, T, H, E), randn(B, N, K, E, seed=1), randn(B, N + 1, K, E, seed=2)[:, 1:]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    drawn, key, mine = torch.Generator().manual_seed(3), torch.arange(N), own + torch.arange(T)
    first, last = (mine - before).expand(B, -1), (mine + after).expand(B, -1)
    if not is_exact:
        first = mine - torch.randint(0, min(before, N) + 1, (B, T), generator=drawn)
        last = mine + torch.randint(0, min(after, N) + 1, (B, T), generator=drawn)
    held, spans = key.repeat(B, 1), torch.stack((first, last), dim=-1)
    mask = (first[..., None] <= key) & (key <= last[..., None])
    found = cpu.fused_attention(q, k, v, held, spans, scale)
    assert found.dtype == dtype
    assert (found.double() - attention(q, k, v, mask, scale)).abs().max() < TOLERANCES[dtype]

    order = torch.randperm(N, generator=drawn)
    empty = (torch.rand(B, N, generator=drawn) < 0.1) & (order < own)
    held, mask = order.where(~empty, -1).to(torch.int32), mask[..., order] & ~empty[:, None]
    spans = spans.clamp(min=0).to(torch.int32)
    found = cpu.fused_attention(q, k[:, order], v[:, order], held, spans, scale)
    assert (found.double() - attention(q, k[:, order], v[:, order], mask, scale)).abs().max() < TOLERANCES[dtype]


@on_both_kernels
@given(st.integers(1, 3), st.integers(1, 150), st.integers(0, 150), st.integers(1, 3), st.integers(1, 9), st.data())
def test_any_sizes_and_strides_are_attended(dtype, B, T, filled, K, G, data):
    """Views whose numbers or rows lie apart, or begin at an odd place."""
    E, N, seed = data.draw(st.sampled_from([2, 8, 72])), T + filled, data.draw(st.integers(0, 9))
    wide = data.draw(st.integers(0, 3))
    q, k, v = (randn(B, n, h, E + wide, seed=seed).to(dtype)[..., wide:] for n, h in ((T, K * G), (N, K), (N, K)))
    if data.draw(st.booleans()):
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    mine = filled + torch.arange(T).expand(B, T)
    window = data.draw(st.integers(1, N))
    spans = torch.stack((mine - window + 1, mine), dim=-1)
    found = cpu.fused_attention(q, k, v, torch.arange(N).expand(B, N), spans, 0.3)
    key = torch.arange(N)
    mask = (key <= mine[..., None]) & (key > mine[..., None] - window)
    assert (found.double() - attention(q, k, v, mask, 0.3)).abs().max() < TOLERANCES[dtype]


@on_both_kernels
def test_any_scores_are_attended_as_in_torch(dtype):
    """Scores of +-10,000, of +-1e10, only large negative ones, and infinite ones, whose result is NaN."""
    q, k, v = (randn(1, 60, 2, 64, seed=seed).to(dtype) for seed in range(3))
    own = torch.arange(60)[None]
    spans, mask = torch.stack((0 * own, own), dim=-1), torch.ones(1, 60, 60).tril().bool()
    for x, y, scale in ((q, k, 500.0), (q, k, 5e8), (-1e18 * q.abs(), 1e18 * k.abs(), 1.0)):
        found = cpu.fused_attention(x, y, v, own, spans, scale)
        assert (found.double() - attention(x, y, v, mask, scale)).abs().max() < 2 * TOLERANCES[dtype]
    for number in (math.inf, math.nan):
        k[0, 30] = number
        found = cpu.fused_attention(q, k, v, own, spans, 1.0)
        assert found[0, :30].isfinite().all() and found[0, 30:].isnan().all()


@on_both_kernels
def test_keys_that_are_not_attended_count_for_nothing(dtype):
    """A later token's V may be huge. A query that attends no key gets zeros."""
    q, k, v = (randn(1, 60, 2, 64, seed=seed).to(dtype) for seed in range(3))
    v[0, 31] = 1e38
    own = torch.arange(60)[None]
    spans = torch.stack((0 * own, own), dim=-1)
    spans[0, [3, 50]] = torch.tensor([0, -1])
    found = cpu.fused_attention(q, k, v, own, spans, 0.3)
    assert found[0, :31].abs().max() < 9 and found[0, 31:50].abs().max() > 1e30
    assert not found[0, [3, 50]].any()
    for wrong in ((q, k, v, own[:, 1:], spans), (q, k.double(), v, own, spans), (q, k[:, 1:], v, own, spans)):
        with pytest.raises(ValueError, match="1, 60, 2, 64"):
            cpu.fused_attention(*wrong, 0.3)


@on_both_kernels
@given(
    B=st.integers(1, 3), S=st.sampled_from([1, 5, 40, 700]), K=st.integers(1, 3), G=st.integers(1, 9), data=st.data()
)
def test_one_token_attends_the_slots_of_its_span(dtype, B, S, K, G, data):
    """Of a ring that was filled any number of times. Other slots may hold anything."""
    E = data.draw(st.sampled_from([2, 10, 32, 64, 96, 256]))
    last = torch.tensor(data.draw(st.lists(st.integers(0, 2 * S), min_size=B, max_size=B)))
    first = last - torch.tensor(data.draw(st.lists(st.integers(0, S - 1), min_size=B, max_size=B)))
    spans = torch.stack((first.clamp(min=0), last), dim=-1)[:, None].int()
    q, (keys, values) = randn(B, 1, K * G, E), (randn(B, K, S + 1, E, seed=seed).transpose(1, 2) for seed in (1, 2))
    q, keys, values = (x.to(dtype) for x in (q, keys, values))
    wanted = decode_attention(q.double(), keys.double(), values.double(), spans, 2 * E**-0.5)
    for b in range(B):
        attended = torch.arange(int(spans[b, 0, 0]), int(last[b]) + 1) % S
        others = torch.ones(S + 1, dtype=torch.bool).index_fill(0, attended, False)
        keys[b, others] = values[b, others] = torch.nan
    found = cpu.decode_attention(q, keys, values, spans, 2 * E**-0.5)
    assert (found.shape, found.dtype) == ((B, 1, K * G * E), dtype)
    assert (found.double() - wanted).abs().max() < (1e-5 if dtype == torch.float32 else 0.04)


@pytest.mark.parametrize(("dtype", "E"), [(torch.float16, 8), (torch.float32, 7), (torch.float32, 8)])
@pytest.mark.parametrize("last", [3, 11, 30])
def test_what_the_kernel_does_not_take_attends_as_well(monkeypatch, dtype, E, last):
    """Other dtypes, odd heads, and anything where nothing compiles. Rings may be filled once, twice or never."""
    monkeypatch.setattr(cpu, "_kernel", lambda: None)
    spans = torch.tensor([[[0, 2]], [[max(0, last - 6), last]]], dtype=torch.int32)
    q, (keys, values) = randn(2, 1, 4, E).to(dtype), (randn(2, 13, 2, E, seed=seed).to(dtype) for seed in (1, 2))
    wanted = decode_attention(q.double(), keys.double(), values.double(), spans, 0.4)
    assert (cpu.decode_attention(q, keys, values, spans, 0.4).double() - wanted).abs().max() < 3e-3


@requires_compiler
def test_the_kernels_refuse_what_would_lead_them_to_other_memory():
    x, weight = randn(3, 64), randn(5, 64)
    assert cpu.multiply_rows_call(torch.empty(3, 5), x, weight)
    others = [(randn(cpu.FEW_ROWS + 1, 64), weight), (x[:0], weight), (x, randn(5, 96)), (x.bfloat16(), weight)]
    others += [(randn(64, 3).T, weight), (x, randn(64, 5).T), (randn(3, 24), randn(5, 24))]
    others += [(x.half(), weight.half())]
    for tensors in others:
        assert cpu.multiply_rows_call(torch.empty(len(tensors[0]), 5), *tensors) is None
    q, keys, spans = randn(2, 1, 4, 8), randn(2, 13, 2, 8, seed=1), torch.zeros(2, 1, 2, dtype=torch.int32)
    good = torch.empty(2, 1, 32), q, keys, keys, spans, 0.4
    assert cpu.decode_attention_call(*good)
    others = {1: (q[:1], q.repeat(1, 2, 1, 1), q[:, :, :3], q[..., :6], q.double()), 2: (keys[:, 1:], keys[..., ::2])}
    others |= {3: (keys[:, 1:], keys.bfloat16()), 4: (spans[:1], spans.long(), spans.expand(2, 3, 2))}
    for place, tensors in others.items():
        for tensor in tensors:
            assert cpu.decode_attention_call(*good[:place], tensor, *good[place + 1 :]) is None


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the processor's flags are read from /proc")
def test_fused_attention_is_chosen_by_the_processor():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert (torch.float32 in cpu.FUSED) == ("avx2" in flags)
    assert (torch.bfloat16 in cpu.FUSED) == ("avx2" in flags and "amx_tile" not in flags)
    assert ({torch.float32, torch.bfloat16} if "avx2" in flags else set()) == cpu.FUSED_TOKEN
    assert torch.float16 not in cpu.FUSED


def test_without_a_compiler_torchs_attention_runs(monkeypatch):
    def fail(*args, **options):
        raise OSError("no compiler")

    monkeypatch.setattr(CppCodeCache, "load_async", fail)
    assert cpu._kernel.__wrapped__() is None
    monkeypatch.setattr(cpu, "_kernel", lambda: None)
    q, k, v = (randn(2, 7, 2, 8, seed=seed) for seed in range(3))
    looked_at = torch.tensor([0, 3, 3, 3, 4, 5, 6]).expand(2, -1)
    for options in ((3,), (None,), (5, looked_at)):
        assert_close(cpu.causal_attention(q, k, v, 0.3, *options), layers.causal_attention(q, k, v, 0.3, *options))


@requires_compiler
@pytest.mark.parametrize("config", [tiny_config(), tiny_gemma3_config()], ids=["causal", "windows"])
def test_the_plain_pass_has_fused_attention(monkeypatch, config):
    """As before `accelerate`, also where images set what is attended. For gradients, torch's attention runs."""
    module, calls, attend = random_model(config, seed=3), [], cpu.fused_attention
    tokens = torch.arange(2 * 23).view(2, 23) % config.vocab_size
    wanted = module(tokens)
    pop.backends.accelerate(module)
    monkeypatch.setattr(cpu, "fused_attention", lambda *args: calls.append(args) or attend(*args))
    with torch.no_grad():
        assert_close(copy.deepcopy(module)(tokens), wanted)
    assert len(calls) == config.num_layers
    q, k, v = randn(1, 7, 2, 8).requires_grad_(), randn(1, 7, 2, 8, seed=1), randn(1, 7, 2, 8, seed=2)
    wanted = layers.causal_attention(q, k, v, 0.3, 3)
    assert_close(cpu.causal_attention(q, k, v, 0.3, 3), wanted)
    last_attended = torch.tensor([[0, 3, 3, 3, 4, 5, 6]])
    wanted = layers.causal_attention(q, k, v, 0.3, 5, last_attended)
    assert len(calls) == config.num_layers
    assert_close(cpu.causal_attention(q.detach(), k, v, 0.3, 5, last_attended), wanted)
    assert len(calls) == config.num_layers + 1
