"""Attention on CUDA, on a CPU: stand-ins of the three kernels compute by their definition.

The stand-ins check what the real kernels demand of their arguments. On the device "meta", whose tensors lack memory,
the real operators check the arguments themselves.
"""

import types

import pytest
import torch
import torch.nn.functional as F
from support.cases import assert_close, new_cache, randn
from support.tiny import random_model, tiny_gemma3_config
from torch.nn import attention as implementations

from pop import engine
from pop.backends import cuda
from pop.engine import attention
from pop.engine.attention import UNBOUNDED, AttentionMetadata
from pop.models import layers
from pop.pruning.plan import PrunePlan

_registry = getattr(implementations, "_registry", None)
requires_registry = pytest.mark.skipif(_registry is None, reason="this torch has one implementation of flash attention")


def by_definition(q, k, v, scale, seen, bias=None):
    """q [B, T, H, E] attends k and v [B, N, K, E] where seen [T, N] is true."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthe,bnhe->bhtn", q, k) * scale
    scores = (scores if bias is None else scores + bias).masked_fill(~seen, -torch.inf)
    return torch.einsum("bhtn,bnhe->bthe", scores.softmax(-1), v)


def distances(q, k):
    """How many keys after each token's own a key is, [T, N], if the last key is the last token's own."""
    T, N = q.shape[1], k.shape[1]
    return torch.arange(N) - torch.arange(T)[:, None] - (N - T)


def flash(
    q, k, v, seqs_q, seqs_k, T, N, dropout, causal, debug, *, scale, window_size_left=None, window_size_right=None
):
    assert seqs_q is seqs_k is None and dropout == 0 and not debug
    assert q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and q.stride(-1) == k.stride(-1) == 1
    assert q.shape[1] == T and k.shape[1] == N and q.shape[2] % k.shape[2] == 0
    distance, right = distances(q, k), 0 if causal else window_size_right
    seen = distance >= -(UNBOUNDED if window_size_left is None else window_size_left)
    seen &= distance <= (UNBOUNDED if right is None else right)
    CALLS.append("flash")
    return by_definition(q.float(), k.float(), v.float(), scale, seen).to(q.dtype), None


def efficient(q, k, v, bias, seqs_q, seqs_k, max_q, max_k, dropout, kind, log_sums, *, scale, window_size=None):
    assert seqs_q is seqs_k is max_q is max_k is None and dropout == 0 and kind in (0, 2)
    assert q.shape[2:] == k.shape[2:] and all(x.stride(-1) == 1 and x.shape[-1] % 8 == 0 for x in (q, k, v))
    assert log_sums == torch.is_grad_enabled()
    if bias is not None:
        assert bias.dtype == q.dtype and bias.shape == (len(q), k.shape[2], q.shape[1], k.shape[1])
        assert all(stride % 8 == 0 for stride in bias.stride()[:3]) and bias.stride(3) == 1
    assert window_size is None or (kind == 2 and not torch.is_grad_enabled())  # no gradient formula has the window
    distance = distances(q, k)
    seen = (distance <= (0 if kind else UNBOUNDED)) & (distance > -(window_size or UNBOUNDED))
    CALLS.append("efficient")
    x = (x.float() for x in (q, k, v))
    return by_definition(*x, scale, seen, bias).to(q.dtype), None


def span_attention(q, keys, values, spans, scale):
    """Position p is in slot p % S, if it is one of the latest S."""
    S = keys.shape[1] - 1
    first, last = spans[..., None].unbind(2)  # [B, T, 1] each
    held = last - (last - torch.arange(S)) % S  # [B, T, S]
    CALLS.append("spans")
    return layers.masked_attention(q, keys[:, :S], values[:, :S], held >= first, scale)


CALLS = []
KERNELS = types.SimpleNamespace(_flash_attention_forward=flash, _efficient_attention_forward=efficient)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The stand-ins, on a recent GPU. Returns the names of those that were called."""
    monkeypatch.setattr(cuda, "is_supported", lambda q: True)
    monkeypatch.setattr(cuda, "_is_recent", lambda q: True)
    monkeypatch.setattr(cuda, "aten", KERNELS)
    monkeypatch.setattr(cuda, "span_attention", span_attention)
    CALLS.clear()
    return CALLS


def slots(K, E, dtype=torch.float32, B=2, S=40):
    """Keys and values as a cache has them, [B, S + 1, K, E]."""
    return [randn(B, K, S + 1, E, seed=seed).to(dtype).transpose(1, 2) for seed in (1, 2)]


def metadata(own, T, before, *, is_exact, after=0, key_slots=None):
    """Two rows whose first tokens are at position `own`, or, if the band is not exact, one of them at 0.

    Then the keys are in the order of the slots, or those of a window, from the ring of 40 slots.
    """
    begin = torch.tensor([own, own if is_exact else 0])[:, None]
    positions = begin + torch.arange(T)  # [B, T]
    spans = torch.stack(((positions - before).clamp(min=0), positions + after), dim=-1).to(torch.int32)
    held = begin - own + torch.arange(own + T + after)  # negative: no key
    if not is_exact and before < UNBOUNDED:
        key_slots = held % 40
    elif not is_exact:
        held = torch.arange(own + T + after).expand(2, -1)
    band = torch.tensor((own, before, after, is_exact))
    return AttentionMetadata((), None, spans, held.to(torch.int32), key_slots, band)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_a_chunk_attends_what_the_general_function_attends(kernels, dtype):
    q, (keys, values) = randn(2, 7, 6, 8).to(dtype), slots(3, 8, dtype)
    anywhere = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(row)) for row in (1, 2)])
    cases = []
    for own, before in ((0, UNBOUNDED), (9, UNBOUNDED), (9, 4), (4, 4), (9, 20)):
        cases.append(metadata(own, 7, before, is_exact=True))
        cases.append(metadata(own, 7, before, is_exact=True, key_slots=anywhere[:, : own + 7]))
        cases.append(metadata(own, 7, before, is_exact=False))
        cases.append(metadata(own, 7, before, is_exact=False, after=2))
    for at in cases:
        kernels.clear()
        found = cuda.cache_attention(q, keys, values, at, 0.3)
        wanted = attention.cache_attention(q, keys, values, at, 0.3)
        assert found.dtype == dtype and found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-3)
        of_a_band = "flash" if dtype == torch.float16 else "efficient"
        assert set(kernels) == {of_a_band if at.band[3] else "spans"}


@pytest.mark.parametrize(("first", "lengths"), [((3, 3), (13, 13)), ((3, 3), (13, 2)), ((3, 1), (13, 13))])
@torch.no_grad()
def test_a_prefill_in_chunks_is_that_of_the_general_function(kernels, first, lengths):
    """A ring that is reused, prompts that go on, full-depth rows at both ends, and a row that ends before the other."""
    module = random_model(tiny_gemma3_config(windows=(3, None, 3), head_dim=8), seed=4)
    plan = PrunePlan((1, 2), full_depth_last=2, full_depth_first=1)
    tokens, logits = torch.arange(26).view(2, 13), {}
    for function in (cuda.cache_attention, attention.cache_attention):
        for layer in module.layers:
            layer.cache_attention = function
        cache = new_cache(module, 2, chunk=5)
        calls = [tokens[:, :3], torch.tensor(first)], [tokens, torch.tensor(lengths)]
        logits[function] = [engine.prefill(module, t, cache, n, plan, 5) for t, n in calls]
    for found, wanted in zip(*logits.values(), strict=True):
        assert_close(found, wanted)
    assert set(kernels) == {"efficient", "spans"}


def test_one_token_without_positions_of_keys_attends_slots(monkeypatch, kernels):
    q, (keys, values) = randn(2, 1, 6, 8), slots(3, 8)
    at = AttentionMetadata((), None, torch.tensor([[[0, 3]], [[50, 60]]], dtype=torch.int32))
    wanted = attention.decode_attention(q, keys, values, at.spans, 0.3)
    torch.testing.assert_close(cuda.cache_attention(q, keys, values, at, 0.3), wanted)
    assert kernels == ["spans"]


@pytest.mark.parametrize("window", [None, 1, 3, 7, 9])
@pytest.mark.parametrize("look_ahead", [False, True])
def test_the_plain_pass_and_its_gradients(kernels, window, look_ahead):
    T, last_attended = 7, torch.tensor([[2, 2, 2, 3, 4, 5, 6], [0, 1, 4, 4, 4, 6, 6]]) if look_ahead else None
    for grown in (False, True):
        wanted = [randn(2, T, heads, 8, seed=heads).requires_grad_(grown) for heads in (6, 3, 3)]
        found = [x.detach().clone().requires_grad_(grown) for x in wanted]
        with torch.set_grad_enabled(grown):
            results = [
                function(*x, 0.3, window, last_attended)
                for function, x in ((cuda.causal_attention, found), (layers.causal_attention, wanted))
            ]
        torch.testing.assert_close(*results)
        if grown:
            gradients = [torch.autograd.grad(results[i].square().sum(), x) for i, x in enumerate((found, wanted))]
            torch.testing.assert_close(*gradients)
    assert set(kernels) == {"efficient"}
    kernels.clear()
    half = cuda.causal_attention(*(x.detach().half() for x in wanted), 0.3, window, last_attended)
    torch.testing.assert_close(half.float(), results[1].detach(), rtol=0, atol=2e-3)
    assert set(kernels) == {"efficient" if look_ahead else "flash"}


def test_full_depth_rows_of_a_prompt_and_their_gradients(kernels):
    """As in distillation: any tokens of a prompt attend to all before them, so each row of the mask is another one."""
    mask = (torch.arange(9) <= torch.tensor([[0, 3, 4, 8], [0, 1, 7, 8]])[..., None]).contiguous()  # [B, W, T]
    wanted = [randn(2, *shape, 8, seed=shape[1]).requires_grad_() for shape in ((4, 6), (9, 3), (9, 3))]
    found = [x.detach().clone().requires_grad_() for x in wanted]
    results = cuda.masked_attention(*found, mask, 0.3), layers.masked_attention(*wanted, mask, 0.3)
    torch.testing.assert_close(*results)
    gradients = [
        torch.autograd.grad(result.square().sum(), x) for result, x in zip(results, (found, wanted), strict=True)
    ]
    torch.testing.assert_close(*gradients)
    assert set(kernels) == {"efficient"}


def test_a_vision_tower(kernels):
    for dtype, name in ((torch.float32, "efficient"), (torch.float16, "flash")):
        kernels.clear()
        q, k, v = (randn(2, 5, 3, 24, seed=seed).transpose(1, 2).to(dtype) for seed in range(3))  # [N, H, P, E]
        found = cuda.vision_attention(q, k, v)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=2e-3)
        assert kernels == [name]


@pytest.mark.parametrize(
    ("dtype", "E", "recent", "supported", "flash", "flash_with_gradients"),
    [
        (torch.bfloat16, 128, True, True, True, True),
        (torch.bfloat16, 60, True, False, True, True),
        (torch.bfloat16, 64, False, False, False, False),
        (torch.float16, 192, True, True, True, True),
        (torch.float16, 256, True, True, True, False),
        (torch.float16, 288, True, True, False, False),
        (torch.float16, 128, False, True, False, False),
        (torch.float32, 128, True, True, False, False),
        (torch.float32, 64, False, True, False, False),
        (torch.float64, 64, True, False, False, False),
    ],
)
def test_which_heads_the_kernels_take(monkeypatch, dtype, E, recent, supported, flash, flash_with_gradients):
    monkeypatch.undo()
    monkeypatch.setattr(cuda, "HAS_KERNELS", True)
    monkeypatch.setattr(cuda, "_is_recent", lambda q: recent)
    q = types.SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 1, 1, E))
    assert cuda.is_supported(q) is supported
    for training, expected in ((False, flash), (True, flash_with_gradients)):
        with torch.set_grad_enabled(training):
            assert cuda.has_flash(q) is expected
    assert not cuda.is_supported(types.SimpleNamespace(is_cuda=False, dtype=dtype))
    monkeypatch.setattr(cuda, "HAS_KERNELS", False)
    assert not cuda.is_supported(q)


def test_tensors_that_no_kernel_takes_go_the_general_way(monkeypatch, kernels):
    monkeypatch.setattr(cuda, "is_supported", lambda q: False)
    monkeypatch.setattr(cuda, "span_attention", lambda *_: None)
    q, (keys, values) = randn(2, 5, 6, 8), slots(3, 8)
    at = metadata(9, 5, 4, is_exact=False)
    wanted = attention.cache_attention(q, keys, values, at, 0.3)
    torch.testing.assert_close(cuda.cache_attention(q, keys, values, at, 0.3), wanted)
    k, v = keys[:, :5], values[:, :5]
    torch.testing.assert_close(cuda.causal_attention(q, k, v, 0.3, 2), layers.causal_attention(q, k, v, 0.3, 2))
    torch.testing.assert_close(cuda.vision_attention(q, q, q), F.scaled_dot_product_attention(q, q, q))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None]
    torch.testing.assert_close(cuda.masked_attention(q, k, v, mask, 0.3), layers.masked_attention(q, k, v, mask, 0.3))
    assert not kernels


@pytest.fixture
def flash_3(monkeypatch):
    """A stand-in for FlashAttention-3, which torch's own registry activates. Returns what the stand-in was asked."""
    calls = []
    handle = types.SimpleNamespace(remove=lambda: calls.append("removed"))
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", lambda: calls.append("activated") or handle)
    monkeypatch.setattr(cuda, "find_spec", lambda name: name == "flash_attn_interface")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cuda.use_flash_3.cache_clear()
    yield calls
    cuda.use_flash_3.cache_clear()
    if cuda.chosen_flash():
        implementations.restore_flash_attention_impl()


@requires_registry
def test_flash_attention_3_is_activated_once_on_sm_90_if_it_is_installed(flash_3, monkeypatch):
    for capability in (8, 10):
        cuda.use_flash_3(capability)
    assert flash_3 == []
    for _ in range(2):
        cuda.use_flash_3(9)
    assert flash_3 == ["activated"] and cuda.chosen_flash() == "FA3"
    implementations.restore_flash_attention_impl()
    cuda.use_flash_3.cache_clear()
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    cuda.use_flash_3(9)
    assert cuda.chosen_flash() is None


@requires_registry
def test_an_implementation_that_the_user_has_chosen_stays(flash_3, monkeypatch):
    handle = types.SimpleNamespace(remove=lambda: None)
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA4", lambda: handle)
    implementations.activate_flash_attention_impl("FA4")
    cuda.use_flash_3(9)
    assert cuda.chosen_flash() == "FA4"


@requires_registry
@torch.no_grad()
def test_a_call_that_flash_attention_3_refuses_falls_back_once(flash_3, kernels, monkeypatch, caplog):
    """Too little memory says nothing about it."""
    error = torch.OutOfMemoryError("16 GiB")

    def refuses(*arguments, **options):
        if cuda.chosen_flash():
            raise error
        return flash(*arguments, **options)

    monkeypatch.setattr(KERNELS, "_flash_attention_forward", refuses)
    cuda.use_flash_3(9)
    q, k, v = (randn(2, 5, heads, 8, seed=heads).half() for heads in (6, 3, 3))
    with pytest.raises(torch.OutOfMemoryError):
        cuda.fused_attention(q, k, v, 0.3, 2)
    assert cuda.chosen_flash() == "FA3"
    error = RuntimeError("windows are not supported")
    for _ in range(2):
        found = cuda.fused_attention(q, k, v, 0.3, 2)
        torch.testing.assert_close(found.flatten(2), layers.causal_attention(q, k, v, 0.3, 3), rtol=0, atol=2e-3)
        cuda.use_flash_3(9)
    assert flash_3 == ["activated", "removed"]
    assert [record.getMessage() for record in caplog.records] == [
        "attention runs without FlashAttention-3, which fails here: RuntimeError: windows are not supported"
    ]


@requires_registry
def test_flash_attention_3_that_cannot_be_imported_is_named_once(flash_3, monkeypatch, caplog):
    def register():
        raise ImportError("undefined symbol")

    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", register)
    for _ in range(2):
        cuda.use_flash_3(9)
    assert cuda.chosen_flash() is None
    assert len(caplog.records) == 1 and "undefined symbol" in caplog.text


def test_torchs_own_operators_take_these_arguments_and_have_gradients(monkeypatch):
    monkeypatch.setattr(cuda, "aten", torch.ops.aten)
    assert all(cuda.has_arguments(*item) for item in cuda.ARGUMENTS.items())
    assert not cuda.has_arguments("_flash_attention_forward", "query value key")
    assert not cuda.has_arguments("_of_another_version", "query key value")
    for dtype, name in ((torch.bfloat16, "Flash"), (torch.float32, "Efficient")):
        q, k, v = (torch.empty(2, 7, heads, 16, dtype=dtype, device="meta", requires_grad=True) for heads in (6, 3, 3))
        out = cuda.causal_attention(q, k, v, 0.3, 3)
        assert out.shape == (2, 7, 96) and out.dtype == dtype
        assert f"{name}AttentionBackward0" in gradient_formulas(out)
        with torch.no_grad():
            assert cuda.fused_attention(q, k, v, 0.3, before=3).shape == q.shape


def gradient_formulas(out):
    names, nodes = set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [following for following, _ in node.next_functions if following is not None]
    return names
