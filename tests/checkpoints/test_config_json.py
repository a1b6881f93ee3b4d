"""Reading config.json: the published files, both dialects of transformers, every field, every refusal.

goldens/config_edits.json lists files, what is read from them, and edits by the configs that they apply to.
"""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file
from support.goldens import GOLDENS
from support.published import GEMMA3_TEXTS, PUBLISHED, gemma3_with_images

from pop.checkpoints.config_json import read_config
from pop.errors import ConfigError

TABLE = json.loads((GOLDENS / "config_edits.json").read_bytes())


def changed(config: dict, change: dict) -> dict:
    """The config with some fields replaced, those of its parts by their path: {"text_config.hidden_size": 1}."""
    config = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
    for path, value in change.items():
        part, _, name = path.rpartition(".")
        if part in config:
            config[part][name] = value
        else:
            config[path] = value
    return config


def without(config: dict, *names: str) -> dict:
    return {name: value for name, value in config.items() if name not in names}


# Files by name. Those in "tiny" have only the fields without a default in the reference.
CONFIGS = PUBLISHED | TABLE["tiny"]
CONFIGS["gemma3-4b, text"] = GEMMA3_TEXTS["4b"]
CONFIGS |= {f"gemma3-{size}": gemma3_with_images(text) for size, text in GEMMA3_TEXTS.items()}
CONFIGS["qwen3-vl-30b-a3b"] = changed(CONFIGS["qwen3-vl-8b"], TABLE["qwen3-vl-30b-a3b, where it differs from 8b"])
MINIMAL, TINY_GEMMA3, TINY_QWEN3 = (CONFIGS[name] for name in ("minimal", "tiny gemma3", "tiny qwen3"))


def named(name: str) -> list[dict]:
    """The configs of a group, or one of them."""
    return [CONFIGS[one] for one in TABLE["groups"].get(name, [name])]


@pytest.fixture
def read(tmp_path):
    """read(config, name="config.json") writes the object or text into a folder and reads it."""

    def write_and_read(config, name="config.json"):
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return read_config(tmp_path)

    return write_and_read


def stated(value):
    """A config as an object of JSON, with the names of its classes."""
    if isinstance(value, torch.dtype):
        return str(value)
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: stated(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"class": type(value).__name__, **fields}


@pytest.mark.parametrize("name", TABLE["read as"])
def test_published_configs(read, name):
    """They leave out the reference's defaults. Types are compared as well: 1 is not 1.0, lists are tuples."""
    config = read(CONFIGS[name])
    assert json.dumps(stated(config)) == json.dumps(TABLE["read as"][name])
    assert hash(config)


@pytest.mark.parametrize("words", TABLE["the same in other words"])
def test_the_same_in_other_words(read, words):
    """As transformers 5 writes it, with nulls, or with fields stated twice."""
    name, new = TABLE["the same in other words"][words]
    assert read(changed(CONFIGS[name], new)) == read(CONFIGS[name])


@pytest.mark.parametrize("name", TABLE["every field"])
def test_every_field_reaches_the_config(read, name):
    base, change, expected = TABLE["every field"][name]
    assert json.dumps(stated(read(CONFIGS[base] | change))) == json.dumps(expected)


def test_end_tokens_of_generation_config_go_first(read):
    read({**MINIMAL, "eos_token_id": 2})
    assert read({"eos_token_id": [3, 4], "temperature": 0.6}, "generation_config.json").eos_ids == (3, 4)
    assert read({"eos_token_id": 5}, "generation_config.json").eos_ids == (5,)
    assert read({"eos_token_id": None}, "generation_config.json").eos_ids == (2,)
    for wrong in ({"eos_token_id": "3"}, {"eos_token_id": [100]}, {"eos_token_id": [True]}, "[]", "{"):
        with pytest.raises(ConfigError, match=r"generation_config\.json"):
            read(wrong, "generation_config.json")


# ---- edits, as fine-tuning leaves them ----
# Each kind of edit was compared with the logits of transformers 5.24, on tiny checkpoints of seven model types.
# Where it ignores a field that steers another architecture, pop refuses it nevertheless.


def edited(config: dict, edit: dict) -> dict:
    """The config with fields of its language model replaced, which may be a part of the whole."""
    prefix = "text_config." if "text_config" in config else ""
    return changed(config, {prefix + name: value for name, value in edit.items()})


@pytest.mark.parametrize(("name", "edit"), TABLE["harmless"], ids=lambda value: str([*value])[:60] if value else "")
def test_a_harmless_edit_changes_nothing(read, name, edit):
    for base in named(name):
        expected = read(base)
        assert read(edited(base, edit)) == expected


@pytest.mark.parametrize("base", named("all"), ids=lambda base: base["model_type"])
@pytest.mark.parametrize("stated", [None, "auto"])
def test_without_a_dtype_it_is_that_of_the_weights(tmp_path, read, base, stated):
    config = edited(base, {"torch_dtype": None, "dtype": None}) | {"torch_dtype": stated, "dtype": None}
    assert read(config).dtype == torch.float32  # there are no weights
    weights = {"a.norm": torch.zeros(9), "a.matrix": torch.zeros(9, 9, dtype=torch.bfloat16)}
    save_file(weights, tmp_path / "model.safetensors")
    assert read(config).dtype == torch.bfloat16


# ---- refusals ----


def refused_files():
    """Each file that is refused, and what the error must name: of one changed value, the field and the value."""
    for table, change in (("refused in the language model", edited), ("refused in the whole", changed)):
        for name, path, values in TABLE[table]:
            for base in named(name):
                for value in values:
                    yield change(base, {path: value}), [path.rpartition(".")[2], repr(value)]
    for name, change, parts in TABLE["contradictions"]:
        for base in named(name):
            yield changed(base, change), parts
    yield MINIMAL | {"rms_norm_eps": float("nan")}, ["NaN"]
    yield MINIMAL | {"rope_theta": float("inf")}, ["Infinity"]


FILES = [*refused_files()]


@pytest.mark.parametrize(("file", "parts"), FILES, ids=[f"{file['model_type']}, {parts[0]}" for file, parts in FILES])
def test_refusals_name_file_field_and_value(read, file, parts):
    with pytest.raises(ConfigError) as caught:
        read(file)
    for part in ("config.json", *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize("base", [MINIMAL, without(TINY_GEMMA3, "vocab_size", "layer_types"), TINY_QWEN3])
def test_missing_fields_are_named(read, base):
    read(base)
    for field in base:
        with pytest.raises(ConfigError, match=rf"config\.json: {field} is missing"):
            read(without(base, field))


@pytest.mark.parametrize("names", [["sliding_window"], ["dtype", "torch_dtype"], ["rope_scaling"]])
def test_deep_nesting_is_refused_whether_or_not_it_can_be_parsed(read, names):
    for depth in range(900, 1000, 9):
        fields = "".join(f', "{name}": ' + "[" * depth + "]" * depth for name in names)
        with pytest.raises(ConfigError):
            read(json.dumps(MINIMAL)[:-1] + fields + "}")
