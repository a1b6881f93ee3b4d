"""`pop` as a model of lm-evaluation-harness: what --model_args become, with a stand-in for the harness."""

import json
import sys
from types import ModuleType

import pytest
import torch

import pop
from pop.errors import InputError, PlanError
from tools.evaluate import lm_eval_pop as tool
from tools.evaluate.adapter import PopAdapter


def test_model_args(chat_folder, tmp_path):
    saved = tmp_path / "plan.json"
    pop.PrunePlan((2,)).save(saved)
    plans = {None: (), "default": (4,), 0.4: (3, 4), 1.0: tuple(range(5)), str(saved): (2,)}
    for prune, layers in plans.items():
        assert tool.load_model(chat_folder, prune=prune).plan == pop.PrunePlan(layers)
    model = tool.load_model(chat_folder, full_depth_last=3, dtype="bfloat16", device="cpu", max_seq_len=50)
    assert model.plan == pop.PrunePlan((4,), full_depth_last=3)
    assert (model.dtype, model.max_seq_len) == (torch.bfloat16, 50)
    info = json.loads(json.dumps(PopAdapter(model).get_model_info()))
    assert (info["pop_version"], info["model_dtype"]) == (pop.__version__, "torch.bfloat16")
    assert (info["pruned_layers"], info["full_depth_last"], info["calibrated"]) == ([4], 3, False)


def test_model_args_that_are_wrong(chat_folder):
    for options, error, message in (
        ({"name": None}, InputError, "name=NAME_OR_DIR"),
        ({"prune": "some"}, PlanError, "'some'"),
        ({"dtype": "int3"}, InputError, "dtype is 'int3'"),
    ):
        with pytest.raises(error, match=message):
            tool.load_model(**{"name": chat_folder, **options})


def test_the_class_takes_the_arguments_of_the_harness(monkeypatch, chat_folder):
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lm_eval.api.model"].LM = object
    registered = {}
    sys.modules["lm_eval.api.registry"].register_model = lambda name: lambda model: registered.setdefault(name, model)
    made = tool.register()
    assert registered == {"pop": made}
    asked = {"name": str(chat_folder), "prune": 0.4, "batch_size": "3"}
    model = made.create_from_arg_obj(asked, {"batch_size": 1, "device": "cpu", "max_batch_size": None})
    assert (model.batch_size, model.model.plan.layers) == (3, (3, 4))
    with pytest.raises(InputError, match="--model_args has no pretrained; it takes name, prune, full_depth_last"):
        made.create_from_arg_obj({"pretrained": "gpt2"})
    for batch_size in ("auto", 0, 1.5, "2:4"):
        with pytest.raises(InputError, match="batch_size is"):
            made(batch_size=batch_size, name=chat_folder)
