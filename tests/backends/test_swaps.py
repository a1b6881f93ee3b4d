"""What the swaps of a device decide before anything runs: chunks, and what is said where they are slow."""

import dataclasses
import types

import pytest
import torch
from support.tiny import random_model, tiny_config

from pop import backends
from pop.backends import cuda, span_attention

WIDEST = 65_535  # more than the MLP of any model that is supported


@pytest.mark.parametrize(
    ("rows", "expected"), [(1, 8192), (8, 1024), (32, 256), (64, 256), (128, 256), (129, 254), (586, 55), (600, 54)]
)
def test_the_rows_of_a_batch_share_a_chunk(rows, expected):
    """8,192 tokens in all, but 256 of each row, as long as compiled code counts the MLP's numbers with 32 bits."""
    found = backends.chunk_size_of_rows(8192, rows)
    assert found == expected
    assert found * rows * WIDEST < 2**31
    assert backends.chunk_size_of_rows(7, rows) == 7  # a chunk that the caller has chosen is not enlarged


def test_more_tokens_are_replayed_on_larger_gpus_and_with_smaller_layers(monkeypatch):
    """On a CPU, none are. Processes that share a model replay alike, although their shares of an MLP may differ."""
    config = tiny_config(num_layers=2)
    module = random_model(config)
    assert backends.replayed_tokens_of(module) == 0
    monkeypatch.setattr(backends, "_is_on_gpu", lambda module: True)
    found = {}
    for processors in (10, 100):
        properties = types.SimpleNamespace(multi_processor_count=processors)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        found[processors] = backends.replayed_tokens_of(module)
    weights = sum(weight.numel() for weight in module.layers[0].parameters() if weight.dim() == 2)
    assert found[10] == backends.WHILE_LAUNCHING * 10 // weights
    assert found[100] == backends.WHILE_LAUNCHING * 100 // weights
    assert backends.replayed_tokens_of(random_model(dataclasses.replace(config, num_layers=5))) == found[100]
    module.largest_of_processes = lambda numbers: numbers + 3  # as of another process
    assert backends.replayed_tokens_of(module) == found[100] + 3


@pytest.mark.parametrize(
    ("triton", "kernels", "capability", "said"),
    [
        (True, True, 9, []),
        (False, True, 9, ["Triton"]),
        (True, False, 8, ["torch 2.6 to 2.15"]),
        (True, True, 7, ["compute capability 8.0"]),
        (False, False, 7, ["Triton", "torch 2.6 to 2.15", "compute capability 8.0"]),
    ],
)
def test_what_makes_attention_slow_on_a_gpu_is_said_by_name(triton, kernels, capability, said, monkeypatch, caplog):
    monkeypatch.setattr(backends, "_is_on_gpu", lambda module: True)
    properties = types.SimpleNamespace(major=capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(span_attention, "HAS_TRITON", triton)
    monkeypatch.setattr(cuda, "HAS_KERNELS", kernels)
    monkeypatch.setattr(cuda, "use_flash_3", lambda capability: None)
    module = random_model(tiny_config(), seed=1)
    backends.accelerate(module)
    assert module.masked_attention is cuda.masked_attention
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(said)
    assert all(what in message for what, message in zip(said, messages, strict=True))
