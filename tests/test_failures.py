"""Failures at any line that writes files, loads or generates: nothing is half-written, and no later answer is wrong.

Each test makes a call and counts the lines of `pop` that run. Then it repeats the call with an exception at one of
these lines after the other, checks what is left, and makes the call once more.
"""

import contextlib
import errno
import itertools
import os
import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from support import gguf_files
from support.cases import random_corrections
from support.disk import full_disk
from support.hub_server import REPOSITORY, HubServer
from support.nightly import NIGHTLY
from support.tiny import hf_config, random_model, tiny_config, tiny_gemma3_config, tiny_model, write_checkpoint
from support.tiny_chat import write_chat_checkpoint

import pop
from pop import PrunePlan
from pop.checkpoints import registry
from pop.checkpoints.download import download
from tools.checkpoints import make_random as make_random_checkpoint
from tools.convert import convert

PACKAGE = str(Path(pop.__file__).parent)
POINTS = int(os.environ.get("POP_FAILURES", 48 if NIGHTLY else 8))  # lines that fail in each test, over the whole run


class Injected(Exception):
    """The failure. No code expects it."""


EXPECTED = (Injected, KeyboardInterrupt, OSError, pop.PopError)


@contextlib.contextmanager
def failing_at(line: int | None, error=Injected):
    """Raise `error()` after so many lines of the package, in this thread or in one that it starts. None: never.

    Yields the list of (file, line number) of the lines that have run.
    """
    places: list[tuple[str, int]] = []
    numbers = itertools.count()

    def trace(frame, event, _):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            places.append((frame.f_code.co_filename, frame.f_lineno))
            if next(numbers) == line:
                raise error()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    threading.settrace(trace)
    try:
        yield places
    finally:
        sys.settrace(before)
        threading.settrace(None)


def failures(call):
    """Run `call` to its end. Then let it fail at one line after the other, and yield that line."""
    errors = (Injected, KeyboardInterrupt, partial(OSError, errno.ENOSPC, "No space left on device"))
    with failing_at(None) as places:
        call()
    lines = range(0, len(places), max(1, len(places) // POINTS))
    for number, line in enumerate(lines):
        with failing_at(line, errors[number % len(errors)]) as run, contextlib.suppress(*EXPECTED):
            call()
        yield run[line] if line < len(run) else places[line]  # threads run in any order


def saved_plan(tmp_path):
    corrections = random_corrections(tiny_config(), (3, 4), seed=-1)
    return PrunePlan((3, 4), 1, 1, corrections).save, PrunePlan((1,)).save


def saved_scores(tmp_path):
    model = tiny_model(tiny_config())
    one, two = (pop.importance(model, [[1, 2, 3]], response_tokens=n, progress=False) for n in (2, 3))
    return one.save, two.save


def imported(tmp_path):
    file = gguf_files.write_gguf(tmp_path / "m.gguf", gguf_files.make_tensors(), gguf_files.LLAMA_KEYS)
    return lambda folder: convert(file, folder, progress=False), None


def written_at_random(tmp_path):
    fields = hf_config(tiny_config())
    return lambda folder: make_random_checkpoint.write_checkpoint(fields, folder), None


class Written:
    """A file or a folder that `write` makes. It is `before` and `after` that, as names and bytes."""

    def __init__(self, make, tmp_path):
        self.write, write_old = make(tmp_path)
        self.path = tmp_path / "out" / "it"
        self.path.parent.mkdir()
        if write_old:
            write_old(self.path)
        self.before = self.found()
        self.call()
        self.after = self.found()
        assert self.before != self.after

    def call(self):
        self.put_back()
        self.write(self.path)

    def put_back(self):
        """Make it what it was before."""
        if self.path.is_dir():
            shutil.rmtree(self.path)
        for data in self.before.values():
            self.path.write_bytes(data)

    def found(self):
        """A lock may be left: it is the last thing to go."""
        files = self.path.iterdir() if self.path.is_dir() else self.path.parent.glob("it")
        return {file.name: file.read_bytes() for file in files if file.name != ".lock"}

    def others(self):
        return [path for path in self.path.parent.iterdir() if path != self.path]


@pytest.mark.parametrize("make", [saved_plan, saved_scores, imported, written_at_random])
def test_what_is_written_is_the_old_or_the_new(make, tmp_path):
    """No other file is left there, except a hidden one whose removal has failed. Of a full disk, an error tells."""
    written = Written(make, tmp_path)
    for place in failures(written.call):
        assert written.found() in (written.before, written.after), place
        for path in written.others():
            assert path.name.startswith(".") and place[0].endswith("pop/system/files.py"), (path, place)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    written.put_back()
    for room in (0, max(map(len, written.after.values())) // 2):
        with full_disk(room), pytest.raises(pop.PopError, match="(cannot|could not) be (saved|written)"):
            written.write(written.path)
        assert written.found() == written.before
        assert not written.others()


def kills(call):
    """Run `call` to its end. Then run it again and again in other processes, each killed at another line."""
    with failing_at(None) as places:
        call()
    for line in sorted({*range(0, len(places), max(1, len(places) // (2 * POINTS))), len(places) - 1}):
        child = os.fork()
        if child == 0:
            with failing_at(line, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                call()
            os._exit(0)
        os.waitpid(child, 0)
        yield places[line]


@pytest.mark.parametrize("make", [saved_scores, written_at_random])
def test_what_is_written_is_the_old_or_the_new_after_a_kill(make, tmp_path):
    """Of a folder, the next run clears up what the killed one has left."""
    written = Written(make, tmp_path)
    found = []
    was_left = False
    for place in kills(written.call):
        found.append(written.found())
        assert found[-1] in (written.before, written.after), place
        was_left = was_left or bool(written.others())
        written.call()
        assert written.found() == written.after, place
        assert written.path.is_file() or not written.others(), place
    assert written.before in found and written.after in found and was_left


def test_a_download_is_whole_or_not_there_and_the_next_one_goes_on(tmp_path, monkeypatch):
    files = {path.name: path.read_bytes() for path in write_chat_checkpoint(tmp_path / "published").iterdir()}
    server = HubServer(files)
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name == "HF_TOKEN"]:
        monkeypatch.delenv(name)
    monkeypatch.setitem(registry.MODELS, "tiny", registry.Entry("tiny", "llama", 1, REPOSITORY))
    monkeypatch.setenv("POP_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("POP_ENDPOINT", server.url)
    monkeypatch.setattr("pop.checkpoints.download.PAUSES", (0.01,) * 5)
    folder = tmp_path / "weights" / "tiny"

    def call():
        shutil.rmtree(folder, ignore_errors=True)
        download("tiny", progress=False)

    try:
        for place in failures(call):
            if folder.exists():
                assert {name: contents(folder)[name] for name in files} == files, place
            download("tiny", progress=False)  # continues what the failed one has left
            assert {name: contents(folder)[name] for name in files} == files, place
            assert [path.name for path in folder.parent.iterdir()] == ["tiny"], place
    finally:
        server.stop()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_loading_leaves_the_files_alone_and_works_the_next_time(tmp_path):
    folder = write_checkpoint(tmp_path / "tiny")
    expected, files = pop.load(folder).logits([[1, 2, 3]]), contents(folder)
    for place in failures(lambda: pop.load(folder)):
        assert contents(folder) == files, place
        assert torch.equal(pop.load(folder).logits([[1, 2, 3]]), expected), place


# Prompts whose beginning is cached, and decode steps. Layers with a sliding window reuse their slots.
CALLS = [[5, 12, 44, 3, 60, 8], [33, 2, 19, 7, 1, 50, 21, 4, 9, 30, 11], 9, [40, 2], 17]


@pytest.mark.parametrize("config", [tiny_config(), tiny_gemma3_config()], ids=["llama", "gemma3"])
@pytest.mark.parametrize("selects", [False, True])
def test_after_a_failure_a_cache_works_or_is_refused(config, selects):
    """Slots of windows may be overwritten, and selected tokens of earlier prompts."""
    fields = {"full_depth_selected": 0.4, "selecting_layer": 2} if selects else {}
    model = tiny_model(config, chunk_size=4, plan=PrunePlan((1, 3, 4), **fields))
    done, refused = {}, 0

    def step(cache, tokens):
        return model.prefill([tokens], cache) if isinstance(tokens, list) else model.decode([tokens], cache)

    def call():
        done.update(cache=model.new_cache(1, 40), number=0)
        for number, arguments in enumerate(CALLS):
            step(done["cache"], arguments)
            done["number"] = number + 1

    cache, expected, lengths = model.new_cache(1, 40), [], [0]
    for arguments in CALLS:
        expected.append(step(cache, arguments))
        lengths.append(int(cache.lengths[0]))

    def assert_goes_on(cache, begin, place):
        for number in range(begin, len(CALLS)):
            torch.testing.assert_close(step(cache, CALLS[number]), expected[number], msg=str(place))

    for place in failures(call):
        if "cache" not in done:
            continue
        cache, held = done["cache"], int(done["cache"].lengths[0])
        assert held in lengths[done["number"] :][:2], place  # before the call or after it
        try:
            assert_goes_on(cache, lengths.index(held), place)
        except pop.InputError as error:
            assert "reset" in str(error)
            refused += 1
            cache.reset()
            assert_goes_on(cache, 0, place)
        done.clear()
    overwrites = selects or config.windows.count(None) < len(config.windows)
    assert refused < POINTS // 2 if overwrites else not refused


@pytest.mark.parametrize("place", ["two_phases.attention_metadata", "forward.KVCache.move_to"])
def test_a_cache_is_refused_if_earlier_tokens_may_be_half_done(place, monkeypatch):
    """While they run once more, and between the two steps that make the new tokens count."""
    model = tiny_model(tiny_config(), plan=PrunePlan((3, 4), full_depth_selected=0.5, selecting_layer=1))
    cache = model.new_cache(1, 60)
    model.prefill([list(range(40))], cache)
    with monkeypatch.context() as patch:
        patch.setattr(f"pop.engine.{place}", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.prefill([[1, 2]], cache)
    for plan in (None, "none"):
        with pytest.raises(pop.InputError, match="reset"):
            model.prefill([[3]], cache, plan=plan)
    cache.reset()
    assert torch.equal(model.prefill([[3]], cache), model.prefill([[3]], model.new_cache(1, 60)))


def test_after_a_failure_a_conversation_has_the_turn_or_not(tmp_path):
    model = pop.load(write_chat_checkpoint(tmp_path / "chat"))
    options = {"max_new_tokens": 4}

    def begin():
        chat = model.start_chat("Be brief.")
        chat.send("Hello", **options)
        return chat

    chat = begin()
    told = [chat.messages]
    for text in ("And then?", "Thanks."):
        chat.send(text, **options)
        told.append(chat.messages)
    chats = []

    def call():
        chats.append(begin())
        chats[-1].send("And then?", **options)

    for place in failures(call):
        if not chats:
            continue
        chat = chats.pop()
        chats.clear()
        assert chat.messages in told[:2], place
        for text in ("And then?", "Thanks.")[told.index(chat.messages) :]:
            chat.send(text, **options)
        assert chat.messages == told[2], place


@pytest.mark.parametrize("compile", ["auto", True])
def test_what_fails_while_compiling_leaves_a_model_that_answers(compile, monkeypatch):
    """Another thread gets an answer, so no lock stays held. `torch.compile` is replaced by the identity."""
    monkeypatch.setattr(torch, "compile", lambda stage, **_: stage)
    monkeypatch.setattr("pop.runner.SMALLEST_COMPILED", 0)
    config, made = tiny_config(num_layers=2), []
    module = random_model(config)
    expected = pop.Model(module, config, compile=False).generate([5, 12, 44], max_new_tokens=3).tokens

    def call():
        made.append(pop.Model(module, config, compile=compile))
        made[-1].generate([5, 12, 44], max_new_tokens=3)

    for place in failures(call):
        if not made:
            continue
        model, answers = made.pop(), []
        made.clear()
        other = threading.Thread(
            target=lambda model=model, answers=answers: answers.append(model.generate([5, 12, 44], max_new_tokens=3)),
            daemon=True,
        )
        other.start()
        other.join(timeout=60)
        assert [answer.tokens for answer in answers] == [expected], place


def test_ctrl_c_at_any_moment_of_a_stream_and_the_next_call_is_clean(tmp_path):
    """A signal may arrive inside any library. Then the same model, conversation and prefix are used again."""
    model = pop.load(write_chat_checkpoint(tmp_path / "chat"))
    chat, options = model.start_chat(), {"max_new_tokens": 6}
    began = time.perf_counter()
    expected = chat.send("Hello", **options).text
    seconds, messages = time.perf_counter() - began, chat.messages
    chat, prefix = model.start_chat(), model.prefix("Once upon a time")
    continued = prefix.generate(" there", **options).text
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupted = 0
    try:
        for number in range(POINTS):
            stream = (prefix.stream(" there", **options), chat.stream("Hello", **options))[number % 2]
            try:
                signal.setitimer(signal.ITIMER_REAL, seconds * (number + 1) / POINTS)
                list(stream)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            assert prefix.generate(" there", **options).text == continued
            if chat.messages:
                assert chat.messages == messages
                chat = model.start_chat()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted
    assert chat.send("Hello", **options).text == expected
