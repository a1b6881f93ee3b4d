"""Tiny chat models, with adapters for lm-evaluation-harness and contenders for tools/evaluate."""

import copy
import json

import pytest
from support.tiny_chat import write_chat_checkpoint

import pop
from tools.bench import shapes
from tools.evaluate.adapter import PopAdapter
from tools.evaluate.contender import Contender

PLAN = pop.PrunePlan((1, 3, 4))


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    return write_chat_checkpoint(tmp_path_factory.mktemp("models") / "chat", bos_id=1, eos_ids=(2,))


@pytest.fixture(scope="module")
def loaded(chat_folder):
    return pop.load(chat_folder, prune=PLAN, max_seq_len=96)


@pytest.fixture
def make(loaded):
    """An adapter on the tiny model: make(batch_size=..., max_seq_len=..., plan=...)."""

    def make(batch_size=1, max_seq_len=96, plan=PLAN):
        model = pop.Model(loaded.module, loaded.config, loaded.tokenizer, plan=plan, max_seq_len=max_seq_len)
        return PopAdapter(model, batch_size)

    return make


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny chat model with the defaults of support.tiny_chat."""
    return str(write_chat_checkpoint(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    return pop.load(tiny_folder)


@pytest.fixture(scope="session")
def contenders(tiny):
    plan = pop.PrunePlan((2, 3, 4), full_depth_last=2)
    return [Contender("full", tiny, pop.PrunePlan.none()), Contender("pruned", tiny, plan)]


@pytest.fixture
def given_rates(monkeypatch):
    """The rates of the machine in tools.bench and tools.gpu_report, given instead of measured."""
    for module in ("tools.bench.measure", "tools.gpu_report.parts"):
        monkeypatch.setattr(f"{module}.peak_turn", lambda *_: lambda: {"flops_per_s": 1e9})
        monkeypatch.setattr(f"{module}.bandwidth_turn", lambda *_: lambda: {"bytes_per_s": 1e9})


@pytest.fixture(scope="session")
def seeing(tmp_path_factory):
    """A folder with the shape of a tiny Qwen3-VL: an image of 256 x 256 pixels has 64 tokens."""
    folder = tmp_path_factory.mktemp("seeing")
    shape = copy.deepcopy(shapes.SHAPES["qwen3-vl-8b"])
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    shape["text_config"] |= text | {"num_key_value_heads": 1, "vocab_size": 151_700, "dtype": "float32"}
    vision = {"hidden_size": 24, "intermediate_size": 40, "depth": 3, "num_heads": 3, "out_hidden_size": 32}
    shape["vision_config"] |= vision | {"num_position_embeddings": 25, "deepstack_visual_indexes": [1]}
    (folder / "config.json").write_text(json.dumps(shape))
    return str(folder)
