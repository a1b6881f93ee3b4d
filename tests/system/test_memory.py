"""Free memory, and copies of indices to a device. On `meta`, one sees how a copy is made where there is no GPU."""

import pytest
import torch

from pop.system import memory
from pop.system.memory import free_bytes, to_device

NUMBERS = [torch.arange(6).view(2, 3), torch.tensor([True, False, True]), torch.tensor([[7]], dtype=torch.int32)]


def test_indices_arrive_as_they_are(device):
    for found, expected in zip(to_device(NUMBERS, device), NUMBERS, strict=True):
        assert found.device.type == device.type and torch.equal(found.cpu(), expected)
        assert found.dtype == expected.dtype


@pytest.mark.parametrize("place", ["meta", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_no_copy_is_a_view(place):
    """Code that is compiled for a view compiles again when the size of its base changes, or its offset in memory."""
    for found, expected in zip(to_device(NUMBERS, torch.device(place)), NUMBERS, strict=True):
        assert not found._is_view() and found.is_contiguous() and found.storage_offset() == 0
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


def test_a_container_may_have_less_free_memory_than_the_machine(tmp_path, monkeypatch):
    """What files take of its memory is free, because they give way, but not if they are in memory only."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "CGROUP", str(tmp_path))
    machine = free_bytes(cpu)
    assert machine > 10**6
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 600\nfile 300\nfile_mapped 10\nshmem 100\n")
    assert free_bytes(cpu) == 300
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(cpu) > 10**6
