"""`pop.calibrate` as a whole: what it decides, what it says and checks before the work, and unfinished work."""

import copy
import dataclasses
import importlib.util
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.chat_models import CONFIGS, CONTROL, END, START
from support.letters import Letters
from support.plans import contents
from support.texts import random_texts
from support.tiny import random_model, tiny_config, tiny_model

import pop
from pop import PrunePlan, calibrate
from pop.calibration import calibrate as calibrate_file
from pop.calibration import search
from pop.calibration import texts as sources
from pop.calibration.calibrate import needed_bytes
from pop.inputs.chat_templates import TEMPLATES

TEXTS = random_texts(0, *[200] * 12)
DECIDE = {"speedup": 1.3, "steps": 3, "progress": False}


@pytest.fixture(scope="module")
def decided(model):
    """The plan of a run that decides everything."""
    return calibrate(model, TEXTS, **DECIDE)


def file_of(plan, folder) -> bytes:
    plan.save(folder / "plan")
    return (folder / "plan").read_bytes()


def test_layers_and_tokens_are_decided_and_two_runs_give_the_same_file(model, decided, tmp_path):
    assert file_of(calibrate(model, TEXTS, **DECIDE), tmp_path) == file_of(decided, tmp_path)
    assert decided.speedup(model, 512) >= 1.3 and decided.full_depth_first == 1 and decided.full_depth_last > 1
    assert decided.about["speedup_limit"]["512 tokens"] == round(decided.speedup(model, 512), 3)
    assert decided.about["longest"] == model.max_seq_len


def test_the_layers_are_those_that_are_given(model):
    plan = calibrate(model, TEXTS, "1,3", steps=0, progress=False)
    assert plan.layers == (1, 3) and plan.corrections is not None
    assert plan.selecting_layer in (0, 2) and plan.full_depth_last == round(search.FULL_DEPTH_SHARE * 512)
    assert plan.full_depth_below == search.SHORT
    given = calibrate(model, TEXTS, PrunePlan((1, 3), full_depth_last=7), steps=0, progress=False)
    assert (given.full_depth_last, given.full_depth_selected, given.selecting_layer) == (7, 0, None)


def test_short_prompts_are_pruned_while_a_plan_is_fitted_and_judged(model):
    asked = [PrunePlan((1, 3), full_depth_below=below) for below in (0, 1000)]
    pruning, short = (calibrate(model, TEXTS, plan, steps=2, progress=False) for plan in asked)
    assert contents(dataclasses.replace(short, full_depth_below=0)) == contents(pruning)
    assert short.about == pruning.about
    assert short.full_depth_below == 1000


@pytest.mark.parametrize("plan", ["none", PrunePlan.none(), "1,5", PrunePlan((7,)), (1, 3)])
def test_a_plan_without_layers_of_the_model_is_refused(model, plan):
    with pytest.raises(pop.PlanError):
        calibrate(model, TEXTS, plan, progress=False)


def test_the_texts_that_come_along():
    """They are the same in each run. A wide model takes more of Python's."""
    builtin = sources.builtin_texts()
    assert len(builtin) == 6, "pop/data/README.md says what follows from a further text"
    assert all(len(text) > 20_000 for text in builtin)
    texts = sources.python_texts()
    many = sources.python_texts(8)
    assert texts == sources.python_texts()
    most = sources.MODULES + sources.DOCUMENTS
    assert most - len(sources.LEFT_OUT) <= len(texts) <= most
    shortest, longest = sources.CHARACTERS
    assert all(shortest < len(text) <= longest for text in texts)
    tested = [Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8") for name in sources.LEFT_OUT]
    assert not any(text in whole for text in many for whole in tested)
    config = tiny_config(hidden_size=6000, num_layers=1)
    wide = pop.Model(random_model(tiny_config()), config)
    assert sources.tokens_needed(wide) == 720_000
    assert len(sources.default_texts(wide)) == 6 + len(many) > 6 + len(texts)


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (10, 1), (11, 2), (25, 3), (99, 4)])
def test_a_fit_takes_as_many_windows_as_hold_its_tokens(count, expected):
    windows = [([n] * 10, []) for n in range(4)]
    assert sources.first_tokens(windows, count) == windows[:expected]


@given(st.lists(st.one_of(st.text("ab", max_size=50), st.lists(st.integers(0, 9), max_size=50)), max_size=5))
def test_texts_are_parted_and_nothing_is_lost(texts):
    fitted, rest = sources.parted(texts)
    assert [one + other for one, other in zip(fitted, rest, strict=True)] == texts
    assert all(len(one) == int(0.8 * len(text)) for one, text in zip(fitted, texts, strict=True))


def test_without_texts_the_last_fifth_of_the_built_in_ones_is_left_out(model, monkeypatch):
    texts = random_texts(1, *[500] * 8)
    monkeypatch.setattr(sources, "default_texts", lambda given: texts if given is model else None)
    found = calibrate(model, plan=PrunePlan((3,)), steps=0, progress=False)
    expected = calibrate(model, sources.parted(texts)[0], PrunePlan((3,)), steps=0, progress=False)
    assert contents(found) == contents(expected)


@given(st.integers(0, 99), st.integers(1, 40_000))
def test_the_messages_of_a_conversation_hold_its_text(seed, length):
    rng = random.Random(seed)
    text = "".join(rng.choices("ab c\n", weights=[9, 9, 9, 3, 1], k=length))
    messages = sources.conversation(text, rng)
    said = [message["content"] for message in messages]
    assert "".join("".join(said).split()) == "".join(text.split()) and all(map(str.strip, said))
    roles = [message["role"] for message in messages]
    assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
    shortest, longest = (2**power for power in sources.MESSAGE)
    assert all(shortest <= len(content) <= longest for content in said[:-1])


def test_half_of_what_is_fitted_is_in_conversations_if_the_model_chats(monkeypatch):
    texts = ["To be or not. " * 200, "That is it. " * 3000]
    monkeypatch.setattr(sources, "default_texts", lambda model: texts)
    fitted, _ = sources.parted(texts)
    base, chats = (tiny_model(CONFIGS["llama"], tokenizer=Letters(marks)) for marks in (None, CONTROL))
    assert sources.texts_to_fit(base) == fitted
    found = sources.texts_to_fit(chats)
    assert found[-1].count(START) > 2
    assert found == sources.texts_to_fit(chats)
    for whole, text, ids in zip(fitted, found[::2], found[1::2], strict=True):
        assert whole.startswith(text) and len(text) == len(whole) // 2
        assert ids[0] == START and ids[-2] == END
        told = chats.tokenizer.decode(ids)
        assert whole[len(text) :][:40].strip() in told and whole[-20:].strip() in told


def test_conversations_have_a_fixed_date_and_a_format_that_refuses_them_leaves_texts(monkeypatch):
    monkeypatch.setattr(sources, "default_texts", lambda model: ["To be or not. " * 200])
    template = "{{ strftime_now('%d %b %Y') }}" + TEMPLATES["chatml"]
    _, ids = sources.texts_to_fit(tiny_model(CONFIGS["llama"], tokenizer=Letters(CONTROL), chat_format=template))
    assert bytes(ids[:11]) == b"01 Jan 2026"
    template = "{% if messages[0].content | length > 60 %}{{ raise_exception('no') }}{% endif %}" + TEMPLATES["chatml"]
    refusing = tiny_model(CONFIGS["llama"], tokenizer=Letters(CONTROL), chat_format=template)
    assert sources.texts_to_fit(refusing) == ["To be or not. " * 160]


def test_memory_that_is_short_is_refused_with_the_numbers(model, monkeypatch):
    needed = needed_bytes(model, 15, 2, 512)
    assert needed_bytes(model, 3000, 2, 512) > needed_bytes(model, 15, 2, 512)
    monkeypatch.setattr(calibrate_file, "free_bytes", lambda device: needed - 1)
    monkeypatch.setattr(calibrate_file, "Judge", None)
    numbers = f"about {needed / 1e9:.1f} GB beside the weights, but {(needed - 1) / 1e9:.1f} GB are free"
    with pytest.raises(pop.CacheMemoryError, match=numbers):
        calibrate(model, TEXTS, PrunePlan((3,)), steps=2, progress=False)
    for free in (needed, None):
        monkeypatch.setattr(calibrate_file, "free_bytes", lambda device, free=free: free)
        calibrate_file.check_memory(model.device, needed)


def test_a_longest_window_that_is_longer_than_a_batch_needs_its_states(model):
    """It passes at once: the inputs, and what the MLP holds, in the dtype of the passes."""
    few, many, more = (needed_bytes(model, 15, 2, longest) for longest in (512, 4096, 4096 + 1000))
    least = 1000 * 2 * 2 * model.config.intermediate_size
    assert few == many and more - many > least


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 8), (torch.bfloat16, 4)])
def test_the_bytes_are_those_of_the_sums_and_the_states(dtype, size):
    """By hand, for a width that makes everything else small: X'X and its factor, the eigenvectors, and X'Y."""
    config = tiny_config(hidden_size=2000, num_layers=8, num_heads=10, num_kv_heads=5, head_dim=100)
    model = pop.Model(random_model(tiny_config()).to(dtype), config)
    columns = 4 * 1000 + 2000  # K and V of half of the layers, and an update of h
    least = 8 * 2 * 4000**2 + size * (4 * 4000**2 + 4000 * columns)
    assert least < needed_bytes(model, 1, 0, 512) < least + 200e6


def test_a_model_that_does_not_run_in_its_own_dtype_needs_a_copy(model, monkeypatch):
    """On CPUs without fast products in bfloat16, that is a bfloat16 model; elsewhere a float32 model."""
    half = pop.Model(copy.deepcopy(model.module).bfloat16(), model.config)
    count = model.num_parameters
    needed = {}
    for slow in (set(), {torch.bfloat16}):
        monkeypatch.setattr("pop.calibration.passes.WIDENED", slow)
        for one in (model, half):
            needed[one, bool(slow)] = needed_bytes(one, 5, 0, 512)
    wider = needed[model, True] - needed[model, False] + 2 * count  # what states and logits take in float32
    assert needed[half, True] - needed[half, False] == wider + 4 * count
    assert wider > 0


def test_what_the_work_takes_is_said_before_it(model, monkeypatch, capsys):
    monkeypatch.setattr(calibrate_file, "Judge", lambda *_: pytest.fail("began"))
    with pytest.raises(pytest.fail.Exception, match="began"):
        calibrate(model, TEXTS, steps=300)
    lacks, line = capsys.readouterr().err.splitlines()
    assert f"{sources.tokens_needed(model):,} tokens" in lacks
    for words in ("calibrating on 2,0", "300 steps", " min on cpu,", "0.0 GB beside the weights", "a plan of 0 MB"):
        assert words in line


@pytest.mark.parametrize("done", [0, 1])
def test_an_interrupted_run_continues_from_the_plan_that_it_kept(model, decided, tmp_path, done, notes, monkeypatch):
    """After the closed form the file is the same in the end. After a check, the plan is no worse than the kept one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    keep = calibrate_file._keep

    def interrupted(path, run, plan, now):
        keep(path, run, plan, now)
        if now == done:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(calibrate_file, "_keep", interrupted)
        calibrate(model, TEXTS, resume="~/progress", **DECIDE)
    kept = PrunePlan.load(tmp_path / "progress")
    assert kept.about["steps"] == done
    monkeypatch.setattr(search, "search", None)  # what was decided and fitted is not computed again
    monkeypatch.setattr(calibrate_file, "fitted", None)
    begun = notes(calibrate_file, "distill", lambda *args, begin, **_: (args[1], args[1].name, args[3], begin))
    found = calibrate(model, TEXTS, resume="~/progress", **DECIDE)
    ((plan, name, judge, begin),) = begun
    assert contents(plan) == contents(kept) and (name, begin) == ("", done)
    assert judge.losses(found).mean <= judge.losses(kept).mean
    fields = {"corrections": None, "about": decided.about | {"loss": None}}
    same, whole = (dataclasses.replace(one, **fields) for one in (found, decided))
    assert same == whole and found.about | {"loss": None} == whole.about
    if not done:
        assert file_of(found, tmp_path) == file_of(decided, tmp_path)


def test_a_fit_takes_windows_of_all_lengths(model, monkeypatch):
    """hold_out sorts them, and the closed form takes the first ones that suffice."""
    taken = []

    def noted(model, windows, *_):
        taken.extend(len(tokens) for tokens, _ in windows)
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate_file, "fitted", noted)
    monkeypatch.setattr("pop.calibration.texts.PER_INPUT", 20)  # a quarter of the tokens
    texts = random_texts(3, *range(20, 180))
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, texts, PrunePlan((1, 3)), steps=0, progress=False)
    assert sum(taken) < sum(map(len, texts)) / 2
    assert min(taken) < 60 and max(taken) > 140
