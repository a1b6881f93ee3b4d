"""One-token attention over slots, by its definition in float64: the engine's function, and the kernels on the CPU.

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

from pop.backends import decode_attention as backend
from pop.backends.decode_attention import MOST_PARTS, attention_in_parts, decode_attention, parts_and_block
from pop.engine import attention

requires_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
DTYPES = {torch.float32: 1e-5, torch.float16: 2e-3}  # the interpreter's product of bfloat16 numbers is wrong
CASES = [  # H, K, E, S, window, the rows' own positions, parts, block
    (4, 2, 16, 70, None, (0,), 3, 16),  # most parts are empty
    (4, 4, 16, 70, None, (69,), 1, 32),
    (8, 1, 16, 150, None, (149, 5, 64), 4, 16),
    (8, 2, 16, 2, None, (1,), MOST_PARTS, 16),
    (6, 3, 32, 40, None, (39, 0), 2, 16),
    (4, 2, 64, 50, 20, (19, 20, 49), 2, 16),
    (4, 1, 128, 40, 20, (500, 45, 3), 3, 16),  # two rings that have wrapped
    (2, 1, 256, 35, 35, (34, 35, 36), 2, 16),
    (8, 8, 16, 30, 100, (100, 29, 31), 2, 16),  # a window larger than the ring
    (16, 1, 16, 30, 1, (77,), 2, 16),  # a token that attends itself only
]


def inputs(case, dtype):
    """q, keys, values and spans. The spare slot, and the slots of positions to come, hold NaN."""
    H, K, E, S, window, last, *_ = case
    drawn, B = torch.Generator().manual_seed(1), len(last)
    q = torch.randn(B, 1, H, E, generator=drawn).to(dtype)
    keys, values = (torch.randn(B, K, S + 1, E, generator=drawn).to(dtype).transpose(1, 2) for _ in range(2))
    for row, position in enumerate(last):
        keys[row, position + 1 :] = values[row, position + 1 :] = torch.nan
    keys[:, S] = values[:, S] = torch.nan
    last = torch.tensor(last)
    first = (last - (S if window is None else window) + 1).clamp(min=0)
    return q, keys, values, torch.stack((first, last), dim=-1)[:, None].to(torch.int32)


def by_definition(q, keys, values, spans, scale):
    (B, _, H, E), S, G = q.shape, keys.shape[1] - 1, q.shape[2] // keys.shape[2]
    out = torch.zeros(B, H, E, dtype=torch.float64)
    for b in range(B):
        first, last = spans[b, 0].tolist()
        slots = [position % S for position in range(max(first, last - S + 1), last + 1)]
        for h in range(H):
            k, v = (x[b, slots, h // G].double() for x in (keys, values))
            out[b, h] = (k @ q[b, 0, h].double() * scale).softmax(0) @ v
    return out.view(B, 1, H * E)


def error(found, expected):
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_cpu_it_is_the_general_function(case, dtype):
    q, keys, values, spans = inputs(case, dtype)
    keys, values = keys.nan_to_num(0), values.nan_to_num(0)  # as a cache: its free slots are finite
    found = decode_attention(q, keys, values, spans, 0.3)
    assert found.dtype == dtype
    assert error(found, by_definition(q, keys, values, spans, 0.3)) < DTYPES[dtype]


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
    with pytest.raises(RuntimeError, match="compiler"):  # an error that ends a capture says nothing about Triton
        decode_attention(q, keys, values, spans, 0.3)
    assert not backend._failed and tried.pop()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(2):
        assert torch.equal(
            decode_attention(q, keys, values, spans, 0.3), attention.decode_attention(q, keys, values, spans, 0.3)
        )
    assert len(tried) == len(caplog.records) == 1 and "Failed to find C compiler" in caplog.text


@pytest.mark.parametrize(("E", "major", "expected"), [(128, 8, 132), (72, 8, 0), (8, 8, 0), (128, 7, 0)])
def test_the_kernels_take_heads_of_powers_of_two_on_recent_gpus(monkeypatch, E, major, expected):
    properties = SimpleNamespace(multi_processor_count=132, major=major)
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    q = SimpleNamespace(is_cuda=True, device=None, shape=(1, 1, 4, E))
    assert backend._processors(q) == expected


def test_it_is_an_operator_that_the_compiler_knows():
    torch.library.opcheck(decode_attention, (*inputs(CASES[0], torch.float32), 0.3), test_utils="test_schema")
    torch.library.opcheck(decode_attention, (*inputs(CASES[0], torch.float32), 0.3), test_utils="test_faketensor")


def test_there_are_enough_parts_to_fill_the_device_and_a_few_blocks_for_each():
    def of(B, S, K, E, dtype=torch.bfloat16, processors=132):
        return parts_and_block(torch.empty(B, S + 1, K, E, dtype=dtype, device="meta"), processors)

    assert of(1, 8192, 8, 128) == (33, 32)  # 8 heads: 264 programs on 132 processors
    assert of(4, 8192, 8, 128) == (9, 32)
    assert of(64, 8192, 8, 128) == (1, 32)
    assert of(1, 8192, 1, 256) == (MOST_PARTS, 16)
    assert of(1, 300, 8, 128) == (3, 32)
    assert of(1, 1, 8, 64) == (1, 64)
    assert of(1, 8192, 8, 128, torch.float32) == (33, 16)


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
            found = attention_in_parts(q, keys, values, spans, 0.3, *case[-2:])
            assert found.dtype == dtype, case
            assert error(found, by_definition(q, keys, values, spans, 0.3)) < bound, case
            print("ran")
