"""`pop` as a model of lm-evaluation-harness: what --model_args become, with a stand-in for the harness."""

import json
from types import SimpleNamespace

import pytest
import torch
from support.harness import stand_in

import pop
from pop.errors import InputError
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


@pytest.mark.parametrize(
    ("options", "said"), [({"name": None}, "name=NAME_OR_DIR"), ({"dtype": "int3"}, "dtype is 'int3'")]
)
def test_model_args_that_are_wrong(options, said, chat_folder):
    with pytest.raises(InputError, match=said):
        tool.load_model(**{"name": chat_folder, **options})


@pytest.mark.parametrize("prune", [0.4, None])
def test_the_summary_says_what_was_pruned_and_how_much_faster_that_is(chat_folder, prune, monkeypatch, notes):
    """Each token is a byte. Three contexts, of which the last 4 tokens run at full depth."""
    adapter = PopAdapter(tool.load_model(chat_folder, prune=prune, full_depth_last=4))
    requests = [SimpleNamespace(args=("a" * 30, "b")), SimpleNamespace(args=("a" * 30, "c"))]
    adapter.loglikelihood([*requests, SimpleNamespace(args=("bc" * 15, "d"))], disable_tqdm=True)
    adapter.generate_until([SimpleNamespace(args=("abc", {"max_gen_toks": 2}))], disable_tqdm=True)
    assert adapter.context_tokens == 30 + 30 + 3
    assert adapter.pruned_tokens == (2 * (30 - 4) if prune else 0)
    if prune:
        ran = notes(pop.Model, "prefill", lambda *args, plan: plan.layers)
        assert adapter.speedup() > 0
        assert len(ran) == 5 * 4 * 2 and {*ran} == {(), adapter.model.plan.layers}
        monkeypatch.setattr(adapter, "speedup", lambda: 1.234)
        assert "1.23x as fast" in adapter.summary()
    assert adapter.summary().startswith(f"{adapter.pruned_tokens / adapter.context_tokens:.0%} of the ")


def test_the_class_takes_the_arguments_of_the_harness(monkeypatch, chat_folder):
    registered = stand_in(monkeypatch)
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
