"""`pop` as a model of lm-evaluation-harness: --model_args, and, where it is installed, the harness itself.

The tests with the harness compare with its own functions, and run a local task end to end.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.harness import close, ids, naive

import pop
from pop.errors import InputError, MissingExtra, PlanError
from pop.inputs.tokenizers import load_tokenizer
from tools.evaluate import lm_eval_pop as tool
from tools.evaluate.adapter import PopAdapter
from tools.evaluate.scoring import rolling_windows

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "tests" / "goldens" / "tokenizers" / "smollm2"


# ---- Loading ----


def test_model_args(chat_folder, tmp_path):
    saved = tmp_path / "plan.json"
    pop.PrunePlan((2,)).save(saved)
    plans = {None: (), "default": (4,), 0.4: (3, 4), 1.0: tuple(range(5)), str(saved): (2,)}
    for prune, layers in plans.items():
        assert tool.load_model(chat_folder, prune=prune).plan == pop.PrunePlan(layers)
    model = tool.load_model(chat_folder, full_depth_last=3, dtype="bfloat16", device="cpu", max_seq_len=50)
    assert model.plan == pop.PrunePlan((4,), full_depth_last=3)
    assert (model.dtype, model.max_seq_len) == (torch.bfloat16, 50)
    info = PopAdapter(model).get_model_info()
    assert json.loads(json.dumps(info)) == {
        "pop_version": pop.__version__,
        "model_dtype": "torch.bfloat16",
        "pruned_layers": [4],
        "full_depth_last": 3,
        "full_depth_first": 0,
        "full_depth_selected": 0.0,
        "selecting_layer": None,
        "calibrated": False,
    }


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"name": None}, InputError, "name=NAME_OR_DIR"),
        ({"prune": "some"}, PlanError, "'some'"),
        ({"prune": True}, PlanError, "True"),
        ({"full_depth_last": 0}, PlanError, "full_depth_last is 0"),
        ({"dtype": "int3"}, InputError, "dtype is 'int3'"),
        ({"max_seq_len": 0}, InputError, "max_seq_len is 0"),
    ],
)
def test_model_args_that_are_wrong(chat_folder, options, error, message):
    with pytest.raises(error, match=message):
        tool.load_model(**{"name": chat_folder, **options})


@pytest.mark.parametrize("batch_size", ["auto", 0, 1.5, "2:4"])
def test_batch_sizes_that_are_none(loaded, batch_size):
    assert PopAdapter(loaded, "4").batch_size == 4
    with pytest.raises(InputError, match="batch_size is"):
        PopAdapter(loaded, batch_size)


def test_without_the_harness_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtra, match="lm_eval"):
        tool.register()
    assert tool.main() == 2
    assert "pip install" in capsys.readouterr().err


# ---- With the harness ----


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip("lm_eval.api.model", reason="lm-evaluation-harness is not installed")


@pytest.fixture(scope="module")
def harness_class(harness):
    return tool.register()


def test_the_class_is_one_of_the_harness_models(harness, harness_class, chat_folder):
    from lm_eval.api.registry import get_model

    assert get_model("pop") is harness_class
    assert issubclass(harness_class, harness.LM) and not harness_class.__abstractmethods__
    model = harness_class.create_from_arg_obj(
        {"name": str(chat_folder), "prune": 0.4, "batch_size": 3},
        {"batch_size": 1, "device": "cpu", "max_batch_size": None},
    )
    assert (model.batch_size, model.model.plan.layers, model.rank, model.world_size) == (3, (3, 4), 0, 1)
    assert harness_class.create_from_arg_string(f"name={chat_folder},prune=none").model.plan == pop.PrunePlan.none()
    with pytest.raises(InputError, match="--model_args has no pretrained; it takes name, prune, full_depth_last"):
        harness_class.create_from_arg_obj({"pretrained": "gpt2"})


def test_tokens_are_split_as_the_harness_does(harness, make, loaded):
    from lm_eval.api.instance import Instance
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    adapter = make()
    tokenizer = adapter.model.tokenizer = load_tokenizer(SMOLLM2)
    theirs = SimpleNamespace(backend="causal", tok_encode=tokenizer.encode)
    for context in ("It is in", "Hello, the  \n", "a\n\n", "Question: 1\nAnswer:", "x "):
        for continuation in ("ter", " the", "\n", "  two  ", "12"):
            expected = harness.TemplateLM._encode_pair(theirs, context, continuation)
            assert adapter.encode_pair(context, continuation) == expected
    for count in range(25):
        windows = get_rolling_token_windows([*range(count)], prefix_token=99, max_seq_len=7, context_len=1)
        assert list(rolling_windows([*range(count)], 99, 7)) == list(map(make_disjoint_window, windows))
    adapter.model.tokenizer = loaded.tokenizer
    (result,) = adapter.loglikelihood([Instance("loglikelihood", {}, ("ab", " c"), 0)])
    assert close([result], [naive(adapter, ids("ab"), ids(" c"))])


TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "answer": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
    "text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
""",
}


@pytest.mark.parametrize("chat", [False, True])
def test_a_local_task_end_to_end(harness, chat_folder, tmp_path, chat):
    docs = [{"question": f"{a} + {b} =", "choices": [str(a + b), "11", "x"], "answer": 0} for a, b in ((1, 2), (3, 4))]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    for name, text in TASKS.items():
        data = f"{{data_files: {{test: {json.dumps(str(tmp_path / 'docs.jsonl'))}}}}}"
        text = f"task: tiny_{name}\ndataset_path: json\ntest_split: test\ndataset_kwargs: {data}\n{text}"
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "tools.evaluate.lm_eval_pop", "--model", "pop"]
    command += ["--model_args", f"name={chat_folder},prune=0.4,batch_size=2"]
    tasks = ["tiny_choice", "tiny_answer", *([] if chat else ["tiny_text"])]  # whose prompt is empty: no conversation
    command += ["--tasks", ",".join(tasks), "--include_path", str(tmp_path), "--log_samples"]
    command += ["--output_path", str(tmp_path / "out"), *(["--apply_chat_template"] if chat else [])]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["results"].keys() == {*tasks}
    assert results["config"]["pruned_layers"] == [3, 4]
    assert results["chat_template"] == ("the checkpoint's own chat format" if chat else None)

    adapter = PopAdapter(tool.load_model(chat_folder, prune=0.4), 2)
    (file,) = (tmp_path / "out").rglob("samples_tiny_choice_*.jsonl")
    for line in file.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        question = sample["doc"]["question"]
        prompt = adapter.apply_chat_template([{"role": "user", "content": question}]) if chat else question
        expected = [
            naive(adapter, *adapter.encode_pair(prompt, ("" if chat else " ") + c)) for c in sample["doc"]["choices"]
        ]
        logged = [(float(value), flag in (True, "True")) for ((value, flag),) in sample["resps"]]
        assert close(logged, expected)
