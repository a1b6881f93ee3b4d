"""tools/checkpoints: random checkpoints in the layout of the published files, and what is measured with them."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from support import gguf_files
from support.tiny import hf_config, tiny_config

import pop
from pop.checkpoints import registry
from tools.checkpoints import make_random as tool
from tools.checkpoints.widen_gguf import widen
from tools.convert import convert


def layout(name: str, tmp_path: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    (tmp_path / "config.json").write_text(json.dumps(tool.config_of(name)))
    return tool.plan(tool.tensors_of(tmp_path), 2)


def test_llama31_8b_has_the_published_files_to_the_byte(tmp_path):
    """The sizes are those that the hub lists, so the cuts and the headers are the same."""
    sizes = []
    for number, (file, tensors) in enumerate(layout("llama3.1-8b", tmp_path).items(), start=1):
        assert file == f"model-0000{number}-of-00004.safetensors"
        sizes.append(len(tool.header(tensors, torch.bfloat16)) + 2 * sum(map(math.prod, tensors.values())))
    assert sizes == [4_976_698_672, 4_999_802_720, 4_915_916_176, 1_168_138_808]


@pytest.mark.parametrize("name", tool.LLAMAS)
def test_every_model_has_the_parameters_of_the_registry(name, tmp_path):
    shapes = [shape for tensors in layout(name, tmp_path).values() for shape in tensors.values()]
    assert sum(map(math.prod, shapes)) == registry.lookup(name).parameters


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(hf_config(tiny_config(dtype=torch.bfloat16, max_positions=64))))
    return str(path)


def test_what_is_written_loads_and_runs(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(tool, "PIECE", 100)
    folder = tmp_path / "tiny"
    assert tool.main([config, str(folder), "--layers", "3", "--seed", "4"]) == 0
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert f"{sum(shard.stat().st_size for shard in shards):,} bytes" in capsys.readouterr().out
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weights = {}
    for shard in shards:
        found = load_file(shard)
        assert {name for name, file in index["weight_map"].items() if file == shard.name} == set(found)
        assert shard.read_bytes() == save(found, {"format": "pt"})  # as safetensors itself writes it
        weights |= found
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all((weight == 1).all() for weight in weights.values() if weight.dim() == 1)
    matrices = {name: weight.float() for name, weight in weights.items() if weight.dim() == 2}
    assert all(0.7 < weight.var() * weight.shape[1] < 1.4 for weight in matrices.values())
    assert len({weight[0, 0].item() for weight in matrices.values()}) == len(matrices)
    model = pop.load(folder, dtype=torch.float32)
    assert model.config.num_layers == 3
    assert 0.3 < model.logits([[1, 2, 3]]).std() < 3


def test_the_seed_decides(config, tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        tool.write_checkpoint(tool.config_of(config), folder, seed)
    a, b, c = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert a == b != c


def test_a_disk_that_is_too_small_is_said_before(config, tmp_path, monkeypatch):
    usage = tool.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tool.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(pop.CheckpointError, match=" 1,000 "):
        tool.write_checkpoint(tool.config_of(config), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_widened_file_converts_to_the_same_weights(tmp_path):
    source = tmp_path / "small.gguf"
    gguf_files.write_gguf(source, gguf_files.make_tensors(), gguf_files.LLAMA_KEYS)
    widen(source, tmp_path / "wide.gguf", "float32")
    folders = [convert(path, path.with_suffix(""), progress=False) for path in (source, tmp_path / "wide.gguf")]
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[:700])
    for wrong, target in (("cut.gguf", "x.gguf"), ("none.gguf", "x.gguf"), ("small.gguf", "none/x.gguf")):
        with pytest.raises((pop.CheckpointError, pop.InputError)):
            widen(tmp_path / wrong, tmp_path / target, "bfloat16")
    assert not (tmp_path / "x.gguf").exists()
