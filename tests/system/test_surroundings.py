"""What surrounds a call and should not decide it: default devices, odd paths, torch's cache folder, Ctrl-C."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from support.compiler import IS_OLD
from support.plans import contents
from support.tiny import write_checkpoint
from support.tiny_chat import write_chat_checkpoint

import pop
from tools.convert import convert


def answers(model) -> list:
    cache = model.new_cache()
    options = {"max_new_tokens": 3, "temperature": 0.7, "seed": 1, "repetition_penalty": 1.2}
    logits = (model.prefill([[1, 2, 3]], cache), model.extend([[3, 4]], cache)[0], model.decode([1], cache))
    texts = [answer.text for answer in model.generate(["Hello", "a b c"], **options)]
    texts += [model.start_chat().send("Hi", **options).text, model.prefix("Once").generate(" upon", **options).text]
    return [*texts, model.score("a b", "c"), model.logits([[1, 2]]).tolist(), torch.cat(logits).tolist()]


def calibrated(model, path) -> list:
    """What calibration finds, and what files give back."""
    texts = [[*range(3, 250)] * 3] * 2
    scores = pop.importance(model, [text[:9] for text in texts], response_tokens=3, progress=False)
    scores.save(path)
    assert pop.Importance.load(path).plan(2) == scores.plan(2)
    plan = pop.calibrate(model, texts, "1,2", rank=4, longest=64, steps=1, progress=False)
    plan.save(path)
    assert contents(pop.PrunePlan.load(path)) == contents(plan)
    verdict = pop.check(model, plan, texts, lengths=[700], questions=1, progress=False)
    tensors = {name: tensor.tolist() for name, tensor in plan.corrections.tensors.items()}
    return [scores.prefill.tolist(), tensors, verdict.record(), model.prefill([[1, 2, 3]], model.new_cache()).tolist()]


def test_the_default_device_changes_nothing(tmp_path):
    """Tensors that must be on the CPU do not follow it. On the device "meta", they would have no numbers."""
    folder = write_chat_checkpoint(tmp_path / "chat")
    for found in (answers, lambda model: calibrated(model, tmp_path / "saved")):
        expected = found(pop.load(folder, prune=0.5))
        try:
            torch.set_default_device("meta")
            assert found(pop.load(folder, prune=0.5)) == expected
        finally:
            torch.set_default_device(None)


def test_a_model_runs_after_the_default_device_was_reset(tmp_path, monkeypatch):
    """torch 2.6 then cannot say what the default device is."""
    monkeypatch.delattr(torch, "get_default_device")
    assert pop.load(write_chat_checkpoint(tmp_path), prune=0.5).generate([[1, 2, 3]], max_new_tokens=1)


@pytest.mark.parametrize("path", ["~nosuchuser/x", "x" * 5000, "/" + "x" * 5000, "a/" + "x" * 4990], ids=len)
def test_paths_that_the_system_refuses(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = (
        pop.load,
        pop.load_tokenizer,
        pop.PrunePlan.load,
        pop.PrunePlan((10**5,)).save if "x" * 999 in path else pop.PrunePlan((1,)).save,
        lambda path: convert(path, tmp_path / "new"),
        lambda path: pop.load(tmp_path, tokenizer=path),
    )
    for call in calls:
        with pytest.raises(pop.PopError):
            call(path)
    for name in ("POP_WEIGHTS", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, path)
    with pytest.raises(pop.WeightsNotFound):
        pop.load("llama3.1-8b")


WITHOUT_FOLDER = """
import sys, tempfile
if sys.argv[2:]:
    tempfile.mkdtemp = lambda prefix: open("/dev/null/x")
import pop
pop.build(sys.argv[1])
print(pop.load(sys.argv[1], compile=False, tokenizer=None).generate([1], max_new_tokens=2).tokens)
"""


def test_a_model_runs_where_torch_cannot_make_its_cache_folder(tmp_path):
    """As in a read-only container: there, no temporary folder can be made either."""
    folder = write_checkpoint(tmp_path / "model")
    (tmp_path / "file").touch()
    expected = pop.load(folder, compile=False, tokenizer=None).generate([1], max_new_tokens=2).tokens
    for more in ((),) if IS_OLD else ((), ("no temporary folder",)):  # an old torch itself needs a temporary folder
        result = subprocess.run(
            [sys.executable, "-c", WITHOUT_FOLDER, str(folder), *more],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache")},
            capture_output=True,
            text=True,
        )
        assert result.stdout == f"{expected}\n", result.stderr
        assert result.stderr.count("TORCHINDUCTOR_CACHE_DIR") == 1


SLOW_IMPORT = """
import sys, time

class Finder:
    def find_spec(name, path, target=None):
        if name == "pop.engine":
            print("importing", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Finder)
"""


def test_ctrl_c_during_the_imports_of_the_command_shows_no_traceback(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SLOW_IMPORT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-m", "pop", "models"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may have it ignored
    )
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == -signal.SIGINT
