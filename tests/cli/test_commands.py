"""The `pop` command: what it prints where, what it refuses, and how it ends."""

import inspect
import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import warnings
from unittest.mock import MagicMock

import pytest
import torch
from support.plans import contents
from support.tiny import write_checkpoint
from support.tiny_chat import write_chat_checkpoint

import pop
from pop.checkpoints import registry
from pop.cli import commands, main
from pop.cli.commands import excerpts
from pop.cli.parser import parse
from pop.cli.terminal import exit_status

# ---- What it prints ----


def printed_before_the_end(capsys, *words):
    with pytest.raises(SystemExit) as exit:
        main([*words])
    assert exit.value.code == 0
    return capsys.readouterr().out


def test_the_help_and_the_version(capsys):
    help = printed_before_the_end(capsys)
    assert help == printed_before_the_end(capsys, "--help")
    assert all(f"\n    {name}" in help for name in commands.COMMANDS)
    assert printed_before_the_end(capsys, "--version") == f"pop {pop.__version__}\n"


@pytest.mark.parametrize("command", ["", *commands.COMMANDS])
def test_the_help_ends_with_two_examples(command, capsys):
    *_, head, first, second = printed_before_the_end(capsys, *command.split(), "--help").splitlines()
    assert head == "examples:" and first != second
    for line in (first, second):
        assert line.startswith(f"  pop {command}")
        name, *words = shlex.split(line.partition(" |")[0])[1:]
        assert parse([name, *words]).command == name


@pytest.mark.parametrize("words", [["--version"], ["calibrate", "--help"]])
def test_the_help_does_without_torch(words):
    program = "import sys; sys.modules['torch'] = None; import pop.cli; pop.cli.main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "pop " in done.stdout


def test_models_are_listed_with_where_they_are(run, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "places", lambda: [tmp_path])
    monkeypatch.setattr(commands, "free_bytes", lambda device: 16_060_522_496)
    here = write_checkpoint(tmp_path / "llama3.2-1b")
    with open(here / "more", "wb") as file:
        file.truncate(5_000_000_000)  # a hole, which takes no room
    (here / "broken link").symlink_to("nowhere")
    out, _ = run("models")
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert set(pop.list_models()) < lines.keys()
    cells = {name: " ".join(line.split()) for name, line in lines.items()}
    assert cells["llama3.2-1b"] == f"llama3.2-1b llama 1,235,814,400 5.0 GB 2.5 GB yes {here}"
    assert cells["llama3.1-8b"] == "llama3.1-8b llama 8,030,261,248 - 16.1 GB no not here"
    assert "pop download NAME" in out
    families = {name: registry.lookup(name).family for name in pop.list_models()}
    assert len({lines[name].index(f" {family} ") for name, family in families.items()}) == 1
    monkeypatch.setattr(commands, "free_bytes", lambda device: None)
    assert "16.1 GB  ?     not here" in run("models").out


def test_models_go_on_after_one_that_cannot_be_used(run, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "places", lambda: [tmp_path])
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub/models--meta-llama--Llama-3.2-1B/snapshots" / ("a" * 40)
    write_checkpoint(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("a" * 40)
    (snapshot / "tokenizer.json").symlink_to("/etc/passwd")
    lines = {line.split()[0]: line for line in run("models").out.splitlines() if line}
    assert "tokenizer.json leads out of" in lines["llama3.2-1b"]
    assert set(pop.list_models()) < lines.keys()


PLAN = pop.PrunePlan
SEEDED = {"temperature": 2.0, "seed": 3}
STATED = {"temperature": 5.0, "top_k": 9}  # by the generation_config.json of the models


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ("", {}),
        ("--prune none", {"plan": PLAN.none()}),
        ("--prune 0.8", {"plan": PLAN((2, 3, 4, 5))}),
        ("--temperature 2 --seed 3", SEEDED),
        ("--temperature 2 --seed 3 --top-k 5", SEEDED | {"top_k": 5}),
        ("--temperature 2 --seed 3 --top-p .2", SEEDED | {"top_p": 0.2}),
        ("--temperature 2 --seed 3 --min-p .9", SEEDED | {"min_p": 0.9}),
        ("--repetition-penalty 2", {"repetition_penalty": 2.0}),
        ("--stop nowhere --stop STOP", {"stop": ["nowhere", "STOP"]}),
        ("--sampling checkpoint --seed 3", STATED | {"seed": 3}),
        ("--sampling checkpoint --seed 3 --top-k 2", STATED | {"seed": 3, "top_k": 2}),
    ],
)
def test_generate_prints_what_the_model_generates(arguments, options, folder, model, run):
    plain = model.generate("Hello", max_new_tokens=12).text
    stop = plain[8:10]  # it occurs
    arguments = [stop if word == "STOP" else word for word in arguments.split()]
    if "stop" in options:
        options = {"stop": ["nowhere", stop]}
    expected = model.generate("Hello", max_new_tokens=12, **options).text
    assert run("generate", folder, "Hello", "--max-new-tokens", "12", *arguments).out == expected + "\n"
    assert (expected != plain) == bool(options)


@pytest.mark.parametrize(
    ("prune", "said"), [("default", "skips 2 of 6 layers"), ("0.5", "skips 3 of 6 layers"), ("none", "")]
)
def test_a_line_says_which_plan_runs(prune, said, folder, run):
    err = run("generate", folder, "Hello", "--max-new-tokens", "3", "--prune", prune).err
    assert said in err and err.count("pop: <") == bool(said)


@pytest.mark.parametrize("rest", [["--max-tokens", "3"], ["Hello", "--nonsense"], ["--seed", "1", "two", "prompts"]])
def test_unknown_arguments_are_refused(rest, folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", folder, *rest])
    assert stopped.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


IMPORTANCE = ("--samples", "5", "--prompt-tokens", "20", "--response-tokens", "3", "--batch-size", "2", "--seed", "7")


def test_importance_prints_and_saves_the_scores(folder, model, run, notes, tmp_path):
    files = [tmp_path / name for name in ("long.txt", "short.txt")]
    texts = ["".join(map(chr, range(33, 33 + 60))), "Hello"]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    out = tmp_path / "scores.json"
    asked = notes(pop, "importance", lambda *_, batch_size, **__: batch_size)
    printed = run("importance", folder, files[0], *IMPORTANCE, "--out", out, files[1]).out.splitlines()
    prompts = excerpts(model, texts, 5, 20, 7)
    cut = [model.tokenizer.decode(prompt) for prompt in prompts]
    assert [len(text) for text in cut] == [20, 5, 20, 5, 20]
    assert all(text in texts[number % 2] for number, text in enumerate(cut))
    assert len(set(cut)) == 4
    assert asked == [2]
    expected = pop.importance(model, prompts, response_tokens=3, batch_size=2, seed=7, progress=False)
    saved = pop.Importance.load(out)
    assert torch.equal(saved.prefill, expected.prefill)
    assert torch.equal(saved.decode_error, expected.decode_error)
    for layer, line in enumerate(printed[1:7]):
        words = line.split()
        assert words[0] == str(layer)
        assert float(words[1]) == pytest.approx(expected.prefill[layer].item(), rel=1e-3)
        assert float(words[6]) == pytest.approx(expected.decode_error[layer].item(), rel=1e-1)
    assert printed[-1].endswith(f"layers {', '.join(map(str, expected.plan(2).layers))}.")


RECORD = {"holds": False, "sentence": "It does not hold."}


@pytest.fixture
def calibration(tmp_path, monkeypatch):
    """(a copy of the checkpoint, the arguments of pop calibrate, its texts). The verdict is made up."""
    monkeypatch.setattr("pop.calibration.texts.PER_INPUT", 20)
    folder = write_chat_checkpoint(tmp_path / "model", num_layers=6)
    texts = ["".join(map(chr, range(33, 123))) * 30, "Hello, world. " * 100]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)

    def check(model, plan, rest, lengths):
        assert plan.corrections is not None and lengths == [600]
        shown = f"{[len(text) for text in rest]} characters judge it"
        return MagicMock(holds=False, **{"record.return_value": RECORD, "__str__.return_value": shown})

    monkeypatch.setattr(pop, "check", check)
    monkeypatch.setattr(commands, "LENGTHS", (1000,))
    return folder, ["calibrate", str(folder), "0.txt", "1.txt", "--longest", "600", "--rank", "5"], texts


def test_calibrate_puts_a_plan_beside_the_weights(calibration, run):
    """It is that of the library, fitted to the first four fifths of each text, with the verdict in its record."""
    folder, words, texts = calibration
    out, err = run(*words, "--steps", "2", "--seed", "3", "--layers", "2,4-5")
    assert "[540, 280] characters judge it" in out and f"Saved to {folder / 'default.plan'}" in out
    assert re.search(r"It encodes [\d,]+ tokens \d+\.\d\dx as fast as at full depth, as measured", out)
    assert "about 1 min" in err
    model = pop.load(folder, prune=None)
    fitted = [text[: len(text) * 4 // 5] for text in texts]
    expected = pop.calibrate(model, fitted, "2,4-5", longest=600, rank=5, steps=2, seed=3, progress=False)
    plan = pop.PrunePlan.load(folder / "default.plan")
    assert contents(plan) == contents(expected)
    assert plan.about == expected.about | {"verdict": RECORD}
    assert "The plan is saved. Before you use it" in out
    assert not list(folder.glob("*.progress"))
    run("generate", folder, "Hello", "--prune", folder / "default.plan", "--max-new-tokens", "3")


def test_what_the_verdict_would_refuse_is_refused_before_the_work(calibration, run, monkeypatch):
    _, words, _ = calibration
    monkeypatch.setattr(pop, "calibrate", lambda *_, **__: pytest.fail("calibrated"))
    assert "--longest is 100; it must be an integer of at least 512" in run(*words, "--longest", "100", status=2).err
    assert "leave out --speedup" in run(*words, "--layers", "1", "--speedup", "1.2", status=2).err


def test_a_plan_that_cannot_be_written_is_not_lost(calibration, run, monkeypatch):
    """The same command continues after the work. Here a folder takes the plan's place while the verdict is made.

    The tilde of a user that does not exist is part of a name.
    """
    _, words, _ = calibration
    words = [*words, "--steps", "2", "--layers", "2,4-5", "--out"]
    run(*words, "whole")
    check = pop.check
    with monkeypatch.context() as patch:
        patch.setattr(pop, "check", lambda *args, **options: os.mkdir("~nosuchuser") or check(*args, **options))
        error = run(*words, "~nosuchuser", status=2).err.splitlines()[-1]
    assert re.search(r"written to ~nosuchuser .* the same command continues from ~nosuchuser\.progress$", error)
    os.rmdir("~nosuchuser")
    monkeypatch.setattr("pop.calibration.calibrate.fitted", None)
    monkeypatch.setattr("pop.calibration.distill.distillation_loss", None)
    run(*words, "~nosuchuser")
    assert pathlib.Path("~nosuchuser").read_bytes() == pathlib.Path("whole").read_bytes()
    assert not os.path.exists("~nosuchuser.progress")


def test_a_disk_that_is_full_from_the_start_promises_nothing(calibration, run, monkeypatch):
    _, words, _ = calibration
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    _, err = run(*words, "--steps", "0", "--layers", "2,4-5", "--out", "my.plan", status=2)
    assert err.endswith("written to my.plan (No space left on device); choose another path\n")
    assert not list(pathlib.Path().glob("my.plan*"))


@pytest.mark.parametrize(
    ("words", "prompt"),
    [
        ("MODEL --max-new-tokens 3 Hello", "Hello"),
        ("MODEL Hello", "Hello"),
        ("MODEL -- -5", "-5"),
        ("MODEL -", "Grüße\n"),
        ("MODEL --prompt-file prompt.txt", "Grüße\n"),
        ("MODEL --prompt-file=~/prompt.txt", "Grüße\n"),
    ],
)
def test_where_the_prompt_is(words, prompt, folder, model, tmp_path, monkeypatch, run):
    """Before or after options, in a file or on stdin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompt.txt").write_text("Grüße\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffGrüße\n"))
    words = words.replace("MODEL", folder).split()
    assert run("generate", "--max-new-tokens", "3", *words).out == model.generate(prompt, max_new_tokens=3).text + "\n"


MODEL = ["--dtype", "bfloat16", "--device", "cpu", "--no-compile"]
LOADED = {"dtype": "bfloat16", "device": "cpu", "compile": False}
PROMPT = ["--prune", "0.5", "--max-seq-len", "99", "--min-pixels", "8", "--max-pixels", "9"]
SHOWN = {"prune": "0.5", "max_seq_len": 99, "min_pixels": 8, "max_pixels": 9}


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["generate", "m", "x", *MODEL, *PROMPT], {**LOADED, **SHOWN}),
        (["chat", "m", *MODEL, *PROMPT, "--chat-format", "gemma"], {**LOADED, **SHOWN, "chat_format": "gemma"}),
        (["calibrate", "m", "--out", "plan", *MODEL], {**LOADED, "prune": "none"}),
        (["importance", "m", *MODEL], {**LOADED, "prune": "none"}),
        (["check", "m", "0.5", *MODEL], {**LOADED, "prune": "0.5"}),
    ],
)
def test_options_reach_the_model(arguments, options, monkeypatch, run):
    signature, calls = inspect.signature(pop.load), []

    def load(*args, **given):
        calls.append(signature.bind(*args, **given))
        raise pop.CheckpointError("enough")

    monkeypatch.setattr(pop, "load", load)
    assert run(*arguments, status=2).err == "pop: enough\n"
    expected = signature.bind("m", parallel="auto", **options)
    for bound in (expected, *calls):
        bound.apply_defaults()
    assert calls == [expected]


@pytest.mark.parametrize(("plan", "status"), [("none", 0), ("1.0", 1)])
def test_check_prints_the_verdict_and_its_status_says_whether_the_plan_holds(
    plan, status, folder, model, tmp_path, monkeypatch, notes, run
):
    monkeypatch.setattr(commands, "LENGTHS", (1000,))
    text = tmp_path / "text.txt"
    text.write_text("".join(map(chr, range(33, 33 + 60))) * 3)
    options = ("--longest", "600", "--questions", "1", "--seed", "5")
    seeds = notes(pop, "check", lambda *_, seed=0, **__: seed)
    out, err = run("check", folder, plan, text, *options, status=status)
    assert seeds == [5]
    assert f"the texts have {len(model.encode(text.read_text()))} tokens; longer prompts repeat" in err
    expected = pop.check(model, plan, [text.read_text()], lengths=[600], questions=1, seed=5, progress=False)
    assert out.startswith(f"{expected}\nIt encodes ")


@pytest.mark.parametrize("path", ["", ".", "x" * 300, "missing/plan", "/dev/null"])
@pytest.mark.parametrize("command", ["calibrate M --out", "importance M --out"])
def test_a_path_that_cannot_be_written_is_refused_before_the_work(command, path, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pop, "load", lambda *_, **__: pytest.fail("loaded"))
    assert f"cannot be written to {path} (" in run(*command.split(), path, status=2).err
    assert not list(tmp_path.iterdir())


OUTPUTS = """
import os, sys
from pop.cli import commands, main
closed, pipe = os.pipe()
os.close(closed)
for output in (pipe, os.open("/dev/full", os.O_WRONLY)):
    if os.fork() == 0:
        os.dup2(output, 1)
        sys.exit(main(["models"]))
    print("status", os.waitstatus_to_exitcode(os.wait()[1]), file=sys.stderr, flush=True)
"""


def test_a_closed_pipe_ends_the_program_quietly_and_a_full_output_is_said():
    done = subprocess.run([sys.executable, "-c", OUTPUTS], capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "No CUDA runtime is found" not in line]  # by torch
    assert (lines[0], lines[2:]) == ("status 141", ["status 2"])
    assert lines[1].startswith("pop: the output cannot be written")


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_standard_input_that_cannot_be_read(command, folder, run, monkeypatch):
    """Closed, or no UTF-8. In some locales, Python would let wrong bytes pass as surrogates."""
    monkeypatch.setattr(sys, "stdin", None)
    assert "there is no standard input" in run(command, folder, "-", status=2).err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), "utf-8", errors="surrogateescape"))
    assert "the standard input is not text in UTF-8" in run(command, folder, "-", status=2).err


def test_a_closed_standard_output_is_no_error():
    assert subprocess.run(["sh", "-c", f"exec {sys.executable} -m pop models >&-"]).returncode == 0


class FakeTerminal(io.StringIO):
    def isatty(self):
        return True


def test_only_the_warning_that_torch_cannot_use_a_gpu_is_shown(monkeypatch):
    """Its words are those of torch. A model then runs on the CPU, which nothing else explains."""

    def work():
        for message in ("CUDA initialization: The NVIDIA driver on your system is too old", "of no use"):
            warnings.warn(message, stacklevel=1)

    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings(record=True) as shown:
        assert exit_status("pop", work) == 0
    assert ["driver" in str(one.message) for one in shown] == [True]


def test_an_answer_cannot_drive_the_terminal(folder, monkeypatch):
    pieces = ["a\x1b[2Jb\x9b1m", "\x07c\r\n\td", "é漢👩\u200d🚀\x7f\0"]
    monkeypatch.setattr(pop.Model, "stream", lambda self, *args, **options: iter(pieces))
    for stream, expected in ((FakeTerminal(), "a[2Jb1mc\n\tdé漢👩\u200d🚀\n"), (io.StringIO(), "".join(pieces) + "\n")):
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["generate", folder, "Hello"]) == 0
        assert stream.getvalue() == expected


def test_a_hostile_name_in_a_config_cannot_drive_the_terminal(tmp_path, run):
    (tmp_path / "hostile").mkdir()
    (tmp_path / "hostile/config.json").write_text(json.dumps({"model_type": "\x1b[2J", "dtype\x1b]0;x\x07": 1}))
    for name in ("hostile", "\x1b[2J"):
        err = run("generate", tmp_path / name, "Hello", status=2).err
        assert "\x1b" not in err and "\\x1b[2J" in err


# ---- Chat ----


@pytest.fixture
def talk(folder, monkeypatch, capsys):
    """talk(lines, *arguments) -> (status, stdout, stderr without the plan, the messages of each conversation)."""

    def run(lines, *arguments, terminal=io.StringIO, thinking=True):
        chats = []
        start_chat = pop.Model.start_chat

        def kept(self, *args, **options):
            assert options.get("enable_thinking") is thinking
            chats.append(start_chat(self, *args, **options))
            return chats[-1]

        with monkeypatch.context() as patch:
            patch.setattr(pop.Model, "start_chat", kept)
            patch.setattr(sys, "stdin", terminal("".join(f"{line}\n" for line in lines)))
            status = main(["chat", folder, "--max-new-tokens", "6", *arguments])
        out, err = capsys.readouterr()
        said = [line for line in err.splitlines(keepends=True) if not line.startswith("pop: <")]
        return status, out, "".join(said), [chat.messages for chat in chats]

    return run


def turn(user, assistant):
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def answers(model, *texts, system=None):
    chat = model.start_chat(system)
    return [chat.send(text, max_new_tokens=6).text for text in texts]


def test_a_conversation_remembers(talk, model):
    first, second = answers(model, "Hi", "And?", system="Be short.")
    (fresh,) = answers(model, "And?", system="Be short.")
    assert len({first, second, fresh}) == 3
    status, out, _, held = talk(["Hi", "", " And? ", "/new", "And?", "/quit", "Hi"], "--system", "Be short.")
    assert (status, out) == (0, f"{first}\n{second}\n{fresh}\n")
    opening = {"role": "system", "content": "Be short."}
    assert held == [[opening, *turn("Hi", first), *turn("And?", second)], [opening, *turn("And?", fresh)]]


def test_commands_are_no_messages(talk, model):
    """Other lines that begin with a slash are."""
    expected = answers(model, "/etc/passwd?", "Hi")
    status, out, err, held = talk(["/help", "/etc/passwd?", "Hi", "/quit"])
    assert (status, out) == (0, "".join(f"{text}\n" for text in expected))
    assert [turn["content"] for turn in held[0][::2]] == ["/etc/passwd?", "Hi"]
    assert len(err.splitlines()) == 1
    assert all(f"{command} " in err for command in ("/new", "/quit", "/help"))


@pytest.mark.parametrize(
    ("arguments", "typed", "message"),
    [
        (["--seed", "1", "Hi"], ["And?"], "Hi"),
        (["--no-thinking", "Hi"], [], "Hi"),
        (["/help"], [], "/help"),
        (["-"], ["Hi", "", "/quit"], "Hi\n\n/quit\n"),
    ],
)
def test_one_message_gets_one_answer(arguments, typed, message, talk, model):
    (answer,) = answers(model, message, system="Be short.")
    status, out, err, held = talk(typed, "--system", "Be short.", *arguments, thinking="--no-thinking" not in arguments)
    assert (status, out, err) == (0, f"{answer}\n", "")
    assert held == [[{"role": "system", "content": "Be short."}, *turn(message, answer)]]


def test_an_empty_input_is_no_message(talk):
    assert talk([])[:3] == (0, "", "")
    assert talk(["/quit"])[1:3] == ("", "")
    assert "/quit ends" in talk(["/quit"], terminal=FakeTerminal)[2]


@pytest.mark.parametrize(("line", "said"), [("a" * 2000, ("1024",)), ("\udcff", ("surrogate",))])
def test_a_message_that_is_refused_does_not_end_the_session(talk, model, line, said):
    (answer,) = answers(model, "Hi")
    status, out, err, held = talk([line, "Hi"])
    assert (status, out) == (0, f"{answer}\n")
    assert all(word in err for word in said)
    assert held == [turn("Hi", answer)]  # the refused message is forgotten


def test_ctrl_c_stops_an_answer_and_not_the_session(talk, model, monkeypatch):
    (answer,) = answers(model, "And?")
    stream = pop.Conversation.stream
    interrupted = []

    def stream_until_ctrl_c(self, text, **options):
        pieces = stream(self, text, **options)
        if interrupted:
            return pieces

        def begin():
            yield interrupted.append(next(pieces)) or interrupted[0]
            raise KeyboardInterrupt

        return begin()

    monkeypatch.setattr(pop.Conversation, "stream", stream_until_ctrl_c)
    status, out, _, held = talk(["Hi", "And?"])
    assert (status, out) == (0, f"{interrupted[0]}\n(stopped, and forgotten)\n{answer}\n")
    assert held == [turn("And?", answer)]


def test_ctrl_c_at_the_prompt_ends_with_130_and_a_line(talk, monkeypatch):
    def interrupted(sign):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    status, out, err, _ = talk([])
    assert (status, out, err) == (130, "", "\npop: interrupted\n")
