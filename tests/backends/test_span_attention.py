"""Attention by spans over the slots of a cache, by its definition in float64: Triton's kernels, on the CPU.

Triton's interpreter runs the kernels with numpy. It needs its own process, in which this file is a script.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.compiler import requires_new_torch
from support.naive_method import attention

from pop.backends import cuda
from pop.backends import span_attention as backend
from pop.backends.span_attention import MOST_PARTS, attention_in_parts, blocks_of
from pop.engine.attention import AttentionMetadata, decode_attention

requires_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3}  # the interpreter's product of bfloat16 numbers is wrong
CASES = [  # H, K, E, S, window, the positions of each row's tokens, queries, block, parts
    (4, 2, 16, 70, None, [[0]], 16, 16, 3),  # most parts are empty
    (4, 4, 16, 70, None, [[69]], 16, 32, 1),
    (8, 1, 16, 150, None, [[149], [5], [64]], 16, 16, 4),
    (8, 2, 16, 2, None, [[1]], 16, 16, MOST_PARTS),
    (6, 3, 32, 40, None, [[39], [0]], 16, 16, 2),
    (4, 2, 64, 50, 20, [[19], [20], [49]], 16, 16, 2),
    (4, 1, 128, 40, 20, [[500], [45], [3]], 16, 16, 2),  # two rings that have wrapped
    (2, 1, 256, 35, 35, [[34], [35], [36]], 16, 16, 2),
    (8, 8, 16, 30, 100, [[100], [29], [31]], 16, 16, 2),  # a window larger than the ring
    (16, 1, 16, 30, 1, [[77]], 16, 16, 2),  # a token that attends itself only
    # Full-depth tokens, which are not consecutive
    (6, 2, 16, 90, None, [[0, 1, 40, 41, 70, 88, 89]], 16, 16, 2),
    (6, 3, 16, 90, None, [[3, 60, 61], [0, 5, 5]], 64, 32, 1),  # the last one is padding
    # Rings: of several tokens, the latest S positions hold all that any of them attends
    (4, 1, 32, 25, 12, [[*range(60, 74)], [*range(14)]], 32, 16, 1),
    (2, 2, 16, 40, 12, [[*range(50, 70)]], 16, 16, 3),
    (64, 2, 16, 20, None, [[4, 9]], 64, 16, 2),
]


def inputs(case, dtype):
    """q, keys, values and spans. The spare slot, and the slots of positions to come, hold NaN."""
    H, K, E, S, window, positions, *_ = case
    positions = torch.tensor(positions)
    B, T = positions.shape
    drawn = torch.Generator().manual_seed(1)
    q = torch.randn(B, T, H, E, generator=drawn).to(dtype)
    keys, values = (torch.randn(B, K, S + 1, E, generator=drawn).to(dtype).transpose(1, 2) for _ in range(2))
    for row, latest in enumerate(positions.amax(1).tolist()):
        keys[row, latest + 1 :] = values[row, latest + 1 :] = torch.nan
    keys[:, S] = values[:, S] = torch.nan
    first = (positions - (S if window is None else window) + 1).clamp(min=0)
    return q, keys, values, torch.stack((first, positions), dim=-1).to(torch.int32)


def by_definition(q, keys, values, spans, scale):
    (B, T, H, E), S = q.shape, keys.shape[1] - 1
    out = torch.zeros(B, T, H * E, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            first, last = spans[b, t].tolist()
            slots = [position % S for position in range(max(first, last - S + 1), last + 1)]
            k, v = (x[b : b + 1, slots] for x in (keys, values))
            out[b, t] = attention(q[b : b + 1, t : t + 1], k, v, torch.ones(1, 1, len(slots)).bool(), scale)
    return out


def error(found, expected):
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


def test_without_a_compiler_it_is_the_general_function(monkeypatch, caplog):
    """Triton needs one. Without, a model on a GPU must answer nevertheless, and say why it is slower."""
    tried = []

    def attention_in_parts(*arguments):
        tried.append(arguments)
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(backend, "_processors", lambda q: 132)
    monkeypatch.setattr(backend, "_failed", set())
    monkeypatch.setattr(backend, "attention_in_parts", attention_in_parts)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    q, keys, values = torch.randn(1, 1, 4, 16), torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 16)
    spans = torch.tensor([[[0, 5]]], dtype=torch.int32)
    metadata = AttentionMetadata((), None, spans)
    with pytest.raises(RuntimeError, match="compiler"):  # an error that ends a capture says nothing about Triton
        cuda.cache_attention(q, keys, values, metadata, 0.3)
    assert not backend._failed and tried.pop()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(2):
        found = cuda.cache_attention(q, keys, values, metadata, 0.3)
        assert torch.equal(found, decode_attention(q, keys, values, spans, 0.3))
    assert len(tried) == len(caplog.records) == 1 and "Failed to find C compiler" in caplog.text


@pytest.mark.parametrize(("E", "major", "expected"), [(128, 8, 132), (72, 8, 0), (8, 8, 0), (128, 7, 0)])
def test_the_kernels_take_heads_of_powers_of_two_on_recent_gpus(monkeypatch, E, major, expected):
    properties = SimpleNamespace(multi_processor_count=132, major=major)
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    q = SimpleNamespace(is_cuda=True, device=None, shape=(1, 1, 4, E))
    assert backend._processors(q) == expected


def test_it_is_an_operator_that_the_compiler_knows():
    *tensors, spans = inputs(CASES[0], torch.float32)
    for test in ("test_schema", "test_faketensor"):
        torch.library.opcheck(cuda.attend_cache, (*tensors, spans, None, None, None, 0.3), test_utils=test)


def test_there_are_enough_parts_to_fill_the_device_and_a_few_blocks_for_each():
    def of(B, S, K, E, dtype=torch.bfloat16, T=1, G=4):
        q = torch.empty(B, T, K * G, E, dtype=dtype, device="meta")
        return blocks_of(q, torch.empty(B, S + 1, K, E, dtype=dtype, device="meta"), processors=132)

    assert of(1, 8192, 8, 128) == (16, 32, 33)  # 8 heads: 264 programs on 132 processors
    assert of(64, 8192, 8, 128) == (16, 32, 1)
    assert of(1, 8192, 1, 256) == (16, 16, MOST_PARTS)
    assert of(1, 300, 8, 128) == (16, 32, 3)
    assert of(1, 1, 8, 64) == (16, 64, 1)
    assert of(1, 8192, 8, 128, torch.float32) == (16, 16, 33)
    assert of(1, 8192, 1, 128, G=20) == (32, 32, MOST_PARTS)
    assert of(1, 8192, 8, 128, T=96) == (64, 32, 6)  # 6 blocks of queries for each of the heads
    assert of(1, 8192, 8, 256, T=96) == (32, 16, 3)
    assert of(1, 8192, 8, 128, T=2) == (64, 32, 33)
    assert of(1, 8192, 8, 128, torch.float32, T=96) == (16, 16, 2)


@requires_new_torch  # an old Triton's interpreter fails with a new numpy
@requires_triton
def test_the_kernels_in_tritons_interpreter():
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    ran = subprocess.run([sys.executable, __file__], env=environment, cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.split() == ["ran"] * len(CASES) * len(DTYPES)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for dtype, bound in DTYPES.items():
        for case in CASES:
            q, keys, values, spans = inputs(case, dtype)
            if case == CASES[1]:  # other strides than a cache's
                q = q.transpose(1, 3).contiguous().transpose(1, 3)
                keys, values = (x.contiguous() for x in (keys, values))
            found = attention_in_parts(q, keys, values, spans, 0.3, *case[-3:])
            assert found.dtype == dtype, case
            assert error(found, by_definition(q, keys, values, spans, 0.3)) < bound, case
            print("ran")
