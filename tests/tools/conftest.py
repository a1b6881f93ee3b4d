"""Tiny chat models, with adapters for lm-evaluation-harness and contenders for tools/evaluate."""

import pytest
from support.tiny_chat import write_chat_checkpoint

import pop
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
