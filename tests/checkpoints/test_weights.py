"""Loading weights: exact, strict about names and shapes, sparing with memory, and safe with broken files."""

import contextlib
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.goldens import REFUSED
from support.tiny import shard, tiny_config, write_checkpoint, write_index

import pop
from pop.backends.tensor_parallel import Part
from pop.checkpoints import weights as checkpoint
from pop.checkpoints.config_json import read_config
from pop.checkpoints.weights import load_weights
from pop.errors import CheckpointError, ConfigError, PopError
from pop.models import build
from pop.models.config import LlamaConfig

INDEX = "model.safetensors.index.json"


def shell(config: LlamaConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return build(config)


def load(folder: Path, dtype=torch.float32, config=None, **options) -> dict[str, torch.Tensor]:
    """Read the config, build the module, load, and return its parameters by name."""
    module = shell(config or read_config(folder))
    try:
        load_weights(folder, module, dtype=dtype, device="cpu", progress=False, **options)
    except PopError:
        assert all(p.is_meta for p in module.parameters()), "a failed load must leave the module as it was"
        raise
    return dict(module.named_parameters())


def refused(folder: Path, pattern: str, **options) -> str:
    """Check that loading raises a short CheckpointError, and return its message."""
    with pytest.raises(CheckpointError, match=pattern) as caught:
        load(folder, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    return message


def assert_same(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert loaded.keys() == expected.keys()
    for name, parameter in loaded.items():
        assert torch.equal(parameter, expected[name].to(parameter.dtype)), name


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def store(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# ---- what is loaded ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored_dtype", [torch.float32, torch.bfloat16])
def test_weights_arrive_exactly_in_any_dtype(tmp_path, stored_dtype, dtype):
    """They own their memory, so a file may change after it was loaded."""
    write_checkpoint(tmp_path, dtype=stored_dtype, attention_bias=True, mlp_bias=True)
    expected = {name: weight.clone() for name, weight in stored(tmp_path).items()}
    loaded = load(tmp_path, dtype)
    with open(tmp_path / "model.safetensors", "r+b") as file:  # the same inode, as a careless copy would
        file.write(b"\0" * (tmp_path / "model.safetensors").stat().st_size)
    assert_same(loaded, expected)
    for parameter in loaded.values():
        assert parameter.dtype == dtype and parameter.device.type == "cpu"
        assert parameter.is_contiguous() and not parameter.requires_grad


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_shards_are_the_same_model(tmp_path, options):
    """They may be symlinks, as in a download cache. Files need no metadata, and tables of old files are ignored."""
    folder = write_checkpoint(tmp_path / "snapshot", **options)
    expected = stored(folder)
    save_file(expected, folder / "model.safetensors")
    assert_same(load(folder), expected)
    store(folder, expected | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)})
    assert_same(load(folder), expected)
    for number, file in enumerate(sorted(set(shard(folder).values()))):
        (folder / file).rename(tmp_path / f"blob{number}")
        (folder / file).symlink_to(f"../blob{number}")
    assert_same(load(folder), expected)


def test_a_head_beside_a_tied_embedding_must_repeat_it(tmp_path, monkeypatch):
    """It is compared before weights are allocated."""
    write_checkpoint(tmp_path, tie_embeddings=True)
    weights = stored(tmp_path)
    head = weights["model.embed_tokens.weight"].clone()
    store(tmp_path, {**weights, "lm_head.weight": head})
    assert_same(load(tmp_path), weights)
    assert_same(load(tmp_path, torch.bfloat16), weights)
    head[-1, -1] += 1
    store(tmp_path, {**weights, "lm_head.weight": head})
    module = shell(read_config(tmp_path))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*model\.embed_tokens\.weight"):
        load_weights(tmp_path, module, dtype=torch.float32, device="cpu", progress=False)


@pytest.mark.parametrize(("rank", "processes"), [(0, 1), (0, 2), (1, 2)])
def test_large_tensors_are_copied_in_slices(rank, processes, tmp_path, monkeypatch):
    """6 MB of embedding, or 3 MB for each of two processes, and steps of 1 MiB, which do not divide them."""
    write_checkpoint(tmp_path, vocab_size=24_002, num_layers=1, hidden_size=64, tie_embeddings=True)
    part = Part(read_config(tmp_path), rank, processes)
    module = part.build()
    copied = []
    monkeypatch.setattr(checkpoint, "progress_bar", lambda *_: contextlib.nullcontext(copied.append))
    shards = part.shards if processes > 1 else None
    load_weights(tmp_path, module, dtype=torch.float32, device="cpu", progress=False, shards=shards)
    embedding = stored(tmp_path)["model.embed_tokens.weight"].chunk(processes)[rank]
    assert torch.equal(module.state_dict()["model.embed_tokens.weight"], embedding)
    assert max(copied) <= 2**20 and sum(copied) == sum(weight.nbytes for weight in module.parameters())


def test_progress_bar(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    write_checkpoint(tmp_path)
    options = {"dtype": torch.float32, "device": "cpu"}
    load_weights(tmp_path, shell(tiny_config()), progress=True, **options)  # too small for a bar
    monkeypatch.setattr(checkpoint, "BAR_FROM", 0)
    load_weights(tmp_path, shell(tiny_config()), progress=False, **options)
    assert capsys.readouterr() == ("", "")
    load_weights(tmp_path, shell(tiny_config()), progress=True, **options)
    output = capsys.readouterr()
    assert output.out == "" and "loading weights: 100%" in output.err


# ---- what is refused: names, shapes, dtypes ----


def test_all_differences_are_named_in_one_error(tmp_path):
    write_checkpoint(tmp_path)
    weights = stored(tmp_path)
    del weights["model.layers.2.mlp.up_proj.weight"]
    weights["model.layers.1.self_attn.q_proj.qweight"] = torch.ones(10)
    weights["model.norm.weight"] = torch.ones(31)
    weights["model.layers.0.mlp.gate_proj.weight"] = torch.ones(44, 30, dtype=torch.int8)
    weights["model.layers.0.mlp.down_proj.weight"] = torch.ones(30, 44, dtype=torch.float8_e4m3fn)
    store(tmp_path, weights)
    message = refused(tmp_path, re.escape(str(tmp_path)))
    assert "missing: model.layers.2.mlp.up_proj.weight;" in message
    assert "surplus: model.layers.1.self_attn.q_proj.qweight;" in message
    assert "model.layers.0.mlp.gate_proj.weight (torch.int8)" in message
    assert "model.layers.0.mlp.down_proj.weight (torch.float8_e4m3fn)" in message
    assert "model.norm.weight is [31], not [30]" in message


def test_many_differences_are_counted_and_hostile_names_are_shown_harmlessly(tmp_path):
    write_checkpoint(tmp_path)
    store(tmp_path, {"model.norm.weight": torch.ones(30), "\x1b[2J\n": torch.ones(1), "x" * 9999: torch.ones(1)})
    # 5 layers of 9, embedding, norm and head are 48; 1 is there and 5 are named
    message = refused(tmp_path, r"missing: .* and 42 more")
    assert message.count("model.") + message.count("lm_head") == 5
    assert r"surplus: \x1b[2J\n, xxx" in message


@pytest.mark.parametrize(("change", "pattern"), REFUSED["sizes that contradict the weights"])
def test_a_config_that_contradicts_the_weights(tmp_path, change, pattern):
    write_checkpoint(tmp_path, tie_embeddings=change.get("tie_embeddings") is False)
    refused(tmp_path, pattern, config=tiny_config(**change))


def test_norms_must_be_finite_in_the_models_dtype(tmp_path):
    name = "model.layers.3.post_attention_layernorm.weight"
    write_checkpoint(tmp_path, dtype=torch.bfloat16)
    weights = stored(tmp_path)
    for bad, dtype in ((math.nan, torch.bfloat16), (-math.inf, torch.float32), (1e5, torch.float16)):
        weights[name][7] = bad
        store(tmp_path, weights)
        refused(tmp_path, f"{re.escape(name)}.*NaN.*{dtype}", dtype=dtype)
    load(tmp_path, torch.bfloat16)


# ---- what is refused: files ----


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model.bin", "'pytorch_model.bin', a pickle, which can run code"),
        ("x.Q8_0.gguf", "python -m tools.convert FILE"),
        ("params.json", "python -m tools.convert FOLDER"),
    ],
)
def test_what_is_there_instead_of_weights_is_named(tmp_path, name, said):
    folder = write_checkpoint(tmp_path / "tiny")
    (folder / "model.safetensors").rename(folder / name)
    for _ in range(2):  # without weights, and without a config
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            pop.load(folder)
        assert said in str(caught.value)
        (folder / "config.json").unlink(missing_ok=True)


def test_weights_that_this_user_may_not_read_are_named(tmp_path, monkeypatch):
    """safetensors calls such a file missing. (Root may read all files.)"""
    folder = write_checkpoint(tmp_path / "tiny")

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pop.system.files.open", refuse, raising=False)
    with pytest.raises(CheckpointError, match="may not be read by this user"):
        pop.load(folder)


def test_a_path_that_is_no_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(ConfigError, match="is not a folder that can be read"):
            pop.build(path)


def test_pointers_of_files_that_nobody_reads_do_not_matter(tmp_path):
    folder = write_checkpoint(tmp_path / "tiny")
    (folder / "banner.png").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert pop.load(folder).config.num_layers


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    folder = write_checkpoint(tmp_path / "tiny")
    (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")
    with pytest.raises(CheckpointError, match=f"{name} is a pointer of Git LFS .*git lfs pull"):
        pop.load(folder)


@pytest.mark.parametrize(
    "name",
    [
        *("../outside.safetensors", "/outside.safetensors", "sub/outside.safetensors", "..\\outside.safetensors"),
        *("C:outside.safetensors", "\x00.safetensors", "\ud800.safetensors", "x" * 5000 + ".safetensors"),
        *("/etc/passwd", "..", ".", "", "config.json"),
        *(None, 3, ["model.safetensors"], {"a": "model.safetensors"}),
    ],
)
def test_an_index_cannot_reach_outside_its_folder(tmp_path, name):
    folder = write_checkpoint(tmp_path / "model")
    write_checkpoint(tmp_path / "other")
    weight_map = dict.fromkeys(stored(folder), name)
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "sub").symlink_to(tmp_path)
    write_index(folder, weight_map)
    refused(folder, "plain|lacks|no weight_map")


def test_broken_indexes(tmp_path):
    write_checkpoint(tmp_path)
    shard(tmp_path)
    deep = "[" * 900 + "]" * 900
    maps = ("[]", "{}", '{"a": ' + deep + "}")
    for text in ("", "[]", "{}", "\x00", "NaN", *(f'{{"weight_map": {weight_map}}}' for weight_map in maps)):
        (tmp_path / INDEX).write_text(text)
        refused(tmp_path, re.escape(INDEX))


def test_an_index_that_contradicts_its_shards(tmp_path):
    write_checkpoint(tmp_path)
    weight_map = shard(tmp_path)
    name, file = next(iter(weight_map.items()))
    other = next(shard for shard in weight_map.values() if shard != file)
    whole = load_file(tmp_path / other)
    save_file({**whole, name: load_file(tmp_path / file)[name]}, tmp_path / other)
    refused(tmp_path, f"{re.escape(name)} is stored twice")
    save_file({**whole, "ghost": torch.ones(1)}, tmp_path / other)
    refused(tmp_path, "surplus: ghost")
    write_index(tmp_path, {k: v for k, v in weight_map.items() if v != file})
    refused(tmp_path, "missing")
    write_index(tmp_path, weight_map)
    (tmp_path / file).unlink()
    refused(tmp_path, f"lacks.*{re.escape(file)}")


def test_files_that_are_cut_or_something_else(tmp_path):
    write_checkpoint(tmp_path, num_layers=1)
    whole = (tmp_path / "model.safetensors").read_bytes()
    cuts = [*range(40), *range(40, len(whole), 500), len(whole) - 1]
    others = [b"\0" * 8, b"\xff" * 64, b"PK\x03\x04", b"<html>no</html>" * 40, whole + b"\0"]
    for content in [*(whole[:cut] for cut in cuts), *others]:
        (tmp_path / "model.safetensors").write_bytes(content)
        refused(tmp_path, r"model\.safetensors.*corrupt")


MEASURE = """
import sys
from pathlib import Path
import torch
from pop.checkpoints.weights import load_weights
from pop.models.config import LlamaConfig
from pop.models import build

def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

with torch.device("meta"):
    module = build(LlamaConfig(*{sizes}))
torch.ones(10).to(torch.bfloat16).float()
before = kilobytes("VmRSS")
load_weights(Path("{folder}"), module, dtype=torch.float32, device="cpu", progress=False)
size = sum(p.nbytes for p in module.parameters())
print((kilobytes("VmHWM") - before) * 1024 / size, size)
"""
SIZES = (8_000, 1024, 2816, 4, 16, 4, 64)  # 61 million weights


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_loading_needs_little_more_than_the_weights(tmp_path):
    """244 MB in float32, from bfloat16 in shards."""
    parameters = shell(LlamaConfig(*SIZES)).named_parameters()
    store(tmp_path, {name: torch.ones(parameter.shape, dtype=torch.bfloat16) for name, parameter in parameters})
    shard(tmp_path)
    script = MEASURE.format(sizes=SIZES, folder=tmp_path)
    root = Path(pop.__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    shutil.rmtree(tmp_path)
    assert run.returncode == 0, run.stderr
    ratio, size = map(float, run.stdout.split())
    assert size > 200e6 and ratio < 1.15


def test_too_little_memory_for_a_file_is_not_a_corrupt_file(tmp_path, monkeypatch):
    def no_memory(path):
        raise MemoryError("Cannot allocate memory (os error 12)")

    folder = write_checkpoint(tmp_path / "tiny")
    monkeypatch.setattr(checkpoint, "read_tensors", no_memory)
    with pytest.raises(pop.CacheMemoryError, match=r"model\.safetensors cannot be mapped.*ulimit"):
        load(folder)
