"""The engine of tools/serve: what its caches hold, who is in its batch, and what it does about errors."""

import random
from itertools import pairwise, product
from unittest.mock import Mock

import pytest
import torch
from support.cases import assert_close, random_corrections
from support.chat_models import CONFIGS, PLANS, make
from support.nightly import NIGHTLY
from support.tiny import random_model, tiny_gemma3_vl_config, tiny_qwen3_vl_config
from support.tiny_images import random_bytes

import pop
from pop.engine.cache import KVCache
from pop.engine.spare_caches import size_of_cache
from pop.generation.sampling import SamplingParams
from pop.inputs.processors import Prepared
from pop.models.vision.qwen3_vl import Grid
from pop.pruning import reference
from tools.serve import engine as engines
from tools.serve import kept
from tools.serve.engine import Engine
from tools.serve.rows import Busy, Job, Row


@pytest.fixture
def logits(monkeypatch):
    """The logits from which each job has drawn its tokens, by job."""
    seen, draw = {}, Row.draw
    monkeypatch.setattr(Row, "draw", lambda row: seen.setdefault(row.job, []).append(row.logits[0]) or draw(row))
    return seen


def new_job(tokens, media=(), **options):
    """A greedy job, whose events are in job.events."""
    events = []
    params = SamplingParams(**{"max_new_tokens": 6, **options})
    job = Job(0, list(tokens), list(media), params, 0, events.append)
    job.events = events
    return job


def jobs_of(lengths, **options):
    """Jobs whose prompts have these lengths, and nothing in common."""
    return [new_job(prompt(length, n + 2), **options) for n, length in enumerate(lengths)]


def assert_as_alone(model, *jobs):
    """Each job's answer is the model's own to its prompt. Returns that of the last one."""
    for job in jobs:
        alone = model.generate(job.tokens, **vars(job.params))
        found = "".join(event.text for event in job.events), job.events[-1].finish_reason, job.answer_tokens
        assert found == (alone.text, alone.finish_reason, len(alone.tokens))
    return alone


def new_engine(model, most_rows=3, most_waiting=9, kept_bytes=2**22):
    return Engine(model, most_rows, most_waiting, kept_bytes)


def work(engine, jobs=()):
    """Submit the jobs, and go on until there is nothing left to do."""
    engine.submit(list(jobs))
    while engine.waiting or engine.rows:
        engine.turn()


def answer(engine, job):
    """The tokens of a job's answer, with byte tokens."""
    work(engine, [job])
    assert job.events[-1].finish_reason, job.events[-1]
    return engine.kept.caches[0].keys[len(job.tokens) :]


@pytest.fixture
def paper():
    return make("llama", PLANS["the paper's"])


def prompt(length, seed, below=250):
    return [(7 * n * seed + 3 * seed) % below for n in range(length)]


def depths(plan, length, start=0):
    """Whether each token of a prompt, of which the first `start` are cached, runs at full depth."""
    return [n < plan.full_depth_first or n >= length - plan.full_depth_last for n in range(start, length)]


@pytest.mark.parametrize(("family", "name"), [*product(CONFIGS, PLANS)])
def test_a_prompt_is_prefilled_after_what_a_cache_holds(family, name, logits, monkeypatch, notes):
    monkeypatch.setattr(engines, "WORTH_KEEPING", 4)
    model = make(family, PLANS[name])
    engine, plan = new_engine(model), model.plan
    ran = notes(pop.Model, "prefill_prepared", lambda model, tokens, *_, **__: len(tokens[0]))
    windows = any(model.config.windows)
    first = prompt(30, 1)

    job = new_job(first)
    answered = answer(engine, job)
    assert job.cached_tokens == 0
    assert_close(logits[job][0], reference.prefill(model.module, torch.tensor(first), plan))

    turn = new_job([*first, *answered, *prompt(9, 2)])  # the next turn of a conversation
    answer(engine, turn)
    held = turn.cached_tokens
    assert held == 30 + len(answered)
    depth = depths(plan, 30) + [True] * len(answered) + depths(plan, len(turn.tokens), held)
    after_all, _ = reference.forward(model.module, torch.tensor(turn.tokens), torch.tensor(depth), plan)
    assert_close(logits[turn][0], after_all[-1])

    job = new_job(first)  # once more
    assert answer(engine, job)[: len(answered)] == answered
    assert job.cached_tokens == (0 if windows and plan.corrections else 29)
    assert_close(logits[job][0], reference.prefill(model.module, torch.tensor(first), plan))

    other = [*first[:29], *prompt(4, 6)]  # another question about the same text
    job = new_job(other)
    answer(engine, job)
    if not windows:
        assert job.cached_tokens == 29  # the last ones of `first` are at full depth
        depth = torch.tensor(depths(plan, 30)[:29] + depths(plan, 33, 29))
        after_all, _ = reference.forward(model.module, torch.tensor(other), depth, plan)
        assert_close(logits[job][0], after_all[-1])

    for number in range(2):  # other prompts that begin in the same way
        ran.clear()
        job = new_job([*first[:20], *prompt(11, 3 + number)])
        answer(engine, job)
        cached = job.cached_tokens
        assert cached == (20 if number or not windows else 0)
        again = 2 if plan.corrections and cached and not windows else 0  # one more for each update of h
        assert sum(ran) == len(job.tokens) - cached + again
        assert_close(logits[job][0], reference.prefill(model.module, torch.tensor(job.tokens), plan))

    for length in (25, 2):  # beginnings of `first`, whose last tokens are pruned there
        job = new_job(first[:length])
        answer(engine, job)
        if plan.layers and length == 25:
            assert job.cached_tokens <= 25 - plan.full_depth_last
        assert_close(logits[job][0], reference.prefill(model.module, torch.tensor(job.tokens), plan))


@pytest.mark.parametrize("name", ["none", "the paper's", "calibrated"])
def test_what_continues_a_rewound_window_is_not_rewound_further(name, logits):
    """The ring of a kept cache lacks old tokens, and so does the ring of a prompt that continues it."""
    model = make("gemma3", PLANS[name])
    engine = new_engine(model)
    text = prompt(60, 5)
    for tokens in (text[:30], [*text[:23], 1, 2, 3], [*text[:21], 9, 8, 7, 6, 5]):
        job = new_job(tokens, max_new_tokens=1)
        answer(engine, job)
        assert_close(logits[job][0], reference.prefill(model.module, torch.tensor(tokens), model.plan))


@pytest.mark.parametrize("config", [tiny_gemma3_vl_config(), tiny_qwen3_vl_config()], ids=lambda config: config.family)
def test_images_are_told_apart_by_what_they_show(config, logits, monkeypatch):
    monkeypatch.setattr(engines, "WORTH_KEEPING", 4)
    model = pop.Model(random_model(config, seed=3), config, plan=None)
    limits = {"max_pixels": 1024} if config.family == "qwen3_vl" else {}
    A, B, C = (model.vision.prepare("image", pop.Image(random_bytes(40, 40, 3, n), **limits)) for n in range(3))
    image = [token for piece in A.pieces if not isinstance(piece, str) for token in piece]
    engine = new_engine(model)
    before, between = prompt(9, 1, below=50), prompt(12, 2, below=50)
    begins = len(before) + 1  # after the token that opens an image

    def check(tokens, media, cached):
        job = new_job(tokens, media)
        answered = answer(engine, job)
        assert job.cached_tokens in cached
        assert_close(logits[job][0], model.logits([job.tokens], images=[media])[0, -1])
        assert_close(logits[job][2], model.logits([[*job.tokens, *answered[:2]]], images=[media])[0, -1])
        return [*tokens, *answered]

    first = check([*before, *image, *between], [A], [0])
    second = check([*first, *between, *image, 7], [A, B], [len(first)])
    check([*second, 9, 9], [A, B], [len(second)])
    check([*first, *between, *image, 7], [C, B], [begins])  # another first image
    check([*first, 8, 8, 8], [A], [len(first)])
    check([*before, *image, 5, 5, 5], [A], [begins + len(image) - 1])
    check([*before, 5, 5, 5], [], [0, len(before)])
    check([*before, *image, *between, *image, 4, 4], [C, A], [begins])


def test_a_second_question_about_an_image():
    """Updates of h need tokens of the cache to run again. Those of an image cannot, so then its cache is not used."""
    config = tiny_qwen3_vl_config()
    model = pop.Model(random_model(config, seed=3), config)
    layers = (1, 3, 4)  # with one update, for which the last two tokens run again
    model.plan = pop.PrunePlan(layers, 1, 1, random_corrections(config, layers, 1, model=model))
    shown = model.vision.prepare("image", pop.Image(random_bytes(40, 40, 3, 1), max_pixels=1024))
    image = [token for piece in shown.pieces if not isinstance(piece, str) for token in piece]
    begin = [*prompt(9, 1, below=50), *image]  # the last of these closes the image
    engine, reused = new_engine(model), []
    for question in ([5, 6, 7], [8, 6, 7], [8, 9, 9]):
        job = new_job([*begin, *question], [shown])
        answered = answer(engine, job)
        reused.append(job.cached_tokens)
        expected = model.generate([job.tokens], images=[[shown]], max_new_tokens=6)[0]
        assert answered == expected.tokens[: len(answered)]
    assert reused == [0, 10, len(begin) + 1]


SELECTING = pop.PrunePlan((2, 3), full_depth_selected=0.3)  # among all tokens of a prompt
LONG = pop.PrunePlan((2, 3), full_depth_below=100)
OPTIONS = [
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.7, "top_k": 9, "seed": 6, "repetition_penalty": 1.3},
    {"min_p": 0.1, "logprobs": True},
]


@pytest.mark.parametrize("has_empty_rows", [False, True])
@pytest.mark.parametrize("plan", [*PLANS.values(), SELECTING, LONG], ids=str)
@pytest.mark.parametrize("seed", range(20 if NIGHTLY else 1))
def test_jobs_in_any_order_get_the_answers_that_they_get_alone(plan, seed, has_empty_rows):
    """Rows join and leave a batch whose cache grows, and some answers end with the context."""
    chance = random.Random(seed + has_empty_rows)
    model = make(chance.choice([*CONFIGS]), plan, max_seq_len=280)
    engine, jobs, sizes = new_engine(model), [], set()
    engine.has_empty_rows = has_empty_rows
    for number, length in enumerate(chance.sample([8, 9, 30, 31, 100, 278], 6)):
        options = OPTIONS[number % 3] | {"max_new_tokens": chance.randrange(4, 25)}
        jobs.append(new_job(prompt(length, number + 2), **options))
        engine.submit(jobs[-1:])
        for _ in range(chance.randrange(4)):
            engine.turn()
            sizes.add(len(engine.rows))
    work(engine)
    assert len(sizes) > 1
    for job in jobs:
        alone = assert_as_alone(model, job)
        if job.params.logprobs:
            logprobs = [event.logprobs[0] for event in job.events if event.logprobs]
            assert [token for token, *_ in logprobs] == alone.tokens
            assert [value for _, value, *_ in logprobs] == pytest.approx(alone.logprobs, abs=1e-4)


def test_jobs_of_several_plans_share_a_batch_and_no_cache():
    model = make("llama", PLANS["first 2, last 3"])
    none, half = pop.PrunePlan.none(), pop.PrunePlan((2, 3))
    plans = [none, half, None]
    engine = new_engine(model)
    for turn in range(2):
        jobs = [new_job(prompt(30, 1)) for _ in plans]
        for job, plan in zip(jobs, plans, strict=True):
            job.plan = plan
        work(engine, jobs)
        for job in jobs:
            alone = model.generate(job.tokens, plan=job.plan, max_new_tokens=6)
            assert "".join(event.text for event in job.events) == alone.text
            assert (job.cached_tokens > 0) == (turn > 0)
    texts = {"".join(event.text for event in job.events) for job in jobs}
    assert len(texts) > 1


def test_a_job_that_uses_no_kept_cache_gets_the_logits_of_an_empty_one_and_leaves_none(paper, logits):
    """In the next turn of a conversation, a kept cache holds an answer at full depth."""
    engine = new_engine(paper)
    first = prompt(30, 1)
    answered = answer(engine, new_job(first))
    turn = new_job([*first, *answered, *prompt(9, 2)])
    turn.uses_kept = False
    answer(engine, turn)
    assert turn.cached_tokens == 0
    assert_close(logits[turn][0], reference.prefill(paper.module, torch.tensor(turn.tokens), paper.plan))

    again = new_job(turn.tokens)
    answer(engine, again)
    assert again.cached_tokens <= len(first) + len(answered)  # nothing of the turn's own tokens


def test_a_job_in_progress_that_uses_no_kept_cache_is_no_source(paper):
    engine = new_engine(paper)
    private, other = jobs_of((30, 30))
    other.tokens = private.tokens
    private.uses_kept = False
    work(engine, [private, other])
    assert other.cached_tokens == 0


def test_a_processor_that_fails_ends_its_own_answer(paper):
    def fail(tokens, logits):
        if len(tokens) == 2:
            raise ZeroDivisionError
        return logits

    failing, other = jobs_of((9, 9))
    failing.params = SamplingParams(max_new_tokens=6, logits_processor=fail)
    work(new_engine(paper), [failing, other])
    assert isinstance(failing.events[-1].error, ZeroDivisionError) and failing.answer_tokens == 2
    assert_as_alone(paper, other)


def test_rows_come_and_go_without_a_new_cache(paper, monkeypatch):
    """With empty rows, as on a GPU, whose captured decode steps belong to a cache."""
    monkeypatch.setattr("tools.serve.rows.end_ids", lambda model: frozenset())  # so that the lengths are as given
    engine = new_engine(paper, most_rows=5)
    engine.has_empty_rows = True
    jobs = [new_job(prompt(9, n + 2), max_new_tokens=n) for n in (40, 30, 9, 7, 8, 9)]
    caches, counts = [], []
    engine.submit(jobs)
    while engine.waiting or engine.rows:
        engine.turn()
        if engine.rows:
            counts.append(len(engine.rows))
            if not caches or caches[-1] is not engine.cache:
                caches.append(engine.cache)
    assert [cache.batch_size for cache in caches] == [1, 2, 4, 8, 2]
    assert sum(one != other for one, other in pairwise(counts)) > len(caches)


def test_a_row_is_a_source_for_others():
    model = make("llama", PLANS["first 2, last 3"])
    jobs = [new_job([*prompt(20, 1), n, n, n]) for n in (9, 8)]
    work(new_engine(model), jobs)
    assert [job.cached_tokens for job in jobs] == [0, 20]
    assert_as_alone(model, *jobs)


def test_rows_of_a_batch_select_among_a_kept_document(logits):
    """What the document's tokens are remembered by goes into the batch, into kept caches, and out of them again."""
    model = make("llama", pop.PrunePlan((3, 4), 2, full_depth_selected=0.3, selecting_layer=1))
    engine = new_engine(model)
    document = prompt(40, 1)
    first = new_job([*document, *prompt(6, 2)])
    answer(engine, first)
    questions = [new_job([*document, *prompt(6, seed)]) for seed in (3, 4, 5)]
    work(engine, questions)
    for job in questions:
        assert job.cached_tokens == 40
        cache = model.new_cache(1, 64)
        model.prefill([first.tokens], cache)
        cache.move_to(torch.tensor([40]), *cache.snapshot()[1:])
        others = int((cache.skipped >= 0).sum())
        assert_close(logits[job][0], model.prefill([job.tokens[40:]], cache)[0])
        assert int((cache.skipped >= 0).sum()) < others + 4  # so some of the document's were selected
        for before, found in pairwise(logits[job]):
            assert_close(found, model.decode([int(before.argmax())], cache)[0])


def test_kept_caches_are_bounded_in_memory_and_number(paper, monkeypatch):
    larger, smaller = (KVCache.size_in_bytes(paper.config, 1, n, paper.dtype, states=True) for n in (101, 100))
    per_token = larger - smaller
    engine = new_engine(paper, kept_bytes=100 * per_token)
    for seed in range(4, 9):
        answer(engine, new_job(prompt(30, seed)))
        assert sum(one.cache.nbytes for one in engine.kept.caches) <= 100 * per_token
    assert [len(one.keys) for one in engine.kept.caches] == [35, 35]
    job = new_job([*prompt(30, 8), 1, 2])
    answer(engine, job)
    assert job.cached_tokens == 30
    work(engine, [new_job(prompt(150, 1))])  # is not kept, and drives out no other
    assert len(engine.kept.caches) == 2

    monkeypatch.setattr(kept, "MOST", 2)
    engine = new_engine(paper)
    for seed in (1, 2, 3):
        answer(engine, new_job(prompt(30, seed)))
    assert [one.keys[:30] for one in engine.kept.caches] == [prompt(30, 3), prompt(30, 2)]
    answer(engine, new_job([*prompt(30, 2), 1]))  # uses the older one, so that the other gives way
    assert [one.keys[:30] for one in engine.kept.caches] == [prompt(30, 2)] * 2


def test_images_of_other_sizes_are_not_the_same_image():
    """Even if their pixels are the same bytes, as those of blank pages are."""
    one, other = (Prepared("image", torch.ones(6, 4), (), Grid(1, *size)) for size in ((2, 3), (3, 2)))
    assert one.sha256 == other.sha256
    assert kept.keys_of([5, 6], [one], [range(1, 2)]) != kept.keys_of([5, 6], [other], [range(1, 2)])


def test_a_cache_that_cannot_be_kept_is_left_out(monkeypatch):
    """Although there is memory for its keys and values, there is none for its states."""
    model = make("llama", pop.PrunePlan((3, 4), 2, full_depth_selected=0.3, selecting_layer=1))
    engine, hold_states = new_engine(model), KVCache.hold_states

    def scarce(cache):
        if cache.max_seq_len < size_of_cache(1):  # kept ones take no more than they need
            raise pop.CacheMemoryError("no memory")
        hold_states(cache)

    monkeypatch.setattr(KVCache, "hold_states", scarce)
    jobs = jobs_of((30, 20))
    work(engine, jobs)
    assert all(job.events[-1].finish_reason for job in jobs)
    assert not engine.kept.caches


def test_a_cache_that_lacks_memory_takes_that_of_kept_ones(paper, monkeypatch):
    engine, new_cache = new_engine(paper), paper.new_cache
    for seed in (1, 2, 3):
        answer(engine, new_job(prompt(30, seed)))

    def scarce(rows, size):
        if size > 200 and (engine.kept.caches or rows > 1):
            raise pop.CacheMemoryError("no memory")
        return new_cache(rows, size)

    monkeypatch.setattr(paper, "new_cache", scarce)
    assert answer(engine, new_job(prompt(30, 4)))
    assert len(engine.kept.caches) == 1
    first, second = jobs_of((30, 30), max_new_tokens=30)
    work(engine, [first, second])  # two rows are too many: the newer one fails
    assert first.events[-1].finish_reason
    assert isinstance(second.events[-1].error, pop.CacheMemoryError)


def test_the_jobs_of_a_request_enter_the_queue_all_or_none(paper):
    engine = new_engine(paper, most_waiting=3)
    jobs = jobs_of((9, 9, 9, 9))
    engine.submit(jobs[:2])
    with pytest.raises(Busy):
        engine.submit(jobs[2:])
    assert list(engine.waiting) == jobs[:2]


def test_a_batch_without_rows_frees_its_memory(paper):
    engine = new_engine(paper)
    jobs = jobs_of((9,))
    engine.submit(jobs)
    engine.turn()
    assert engine.cache is not None
    engine.cancel(jobs)
    engine.turn()
    assert engine.cache is None


def test_a_cancelled_prompt_is_not_prefilled_to_its_end(paper, notes):
    engine = new_engine(paper)
    long = new_job(prompt(100, 1))
    engine.submit([new_job(prompt(5, 2), max_new_tokens=100)])
    engine.turn()
    ran = notes(pop.Model, "prefill_prepared", lambda model, tokens, *_, **__: engine.cancel([long]) or len(tokens[0]))
    engine.submit([long])
    engine.turn()
    assert ran == [7]
    assert len(engine.rows) == 1 and not long.events


def test_others_get_tokens_during_a_long_prefill():
    model = make("gemma3", PLANS["calibrated"])
    engine = new_engine(model)
    other = new_job(prompt(5, 2), max_new_tokens=30)
    engine.submit([other])
    engine.turn()
    before = other.answer_tokens
    engine.submit([new_job(prompt(50, 1))])
    engine.turn()
    assert other.answer_tokens - before == (50 - 2) // 7 + 1


@pytest.mark.parametrize("step", ["prefill_prepared", "decode"])
def test_an_error_that_takes_the_device_with_it_ends_the_engine(step, paper, monkeypatch):
    """Those who wait get the error. A lack of memory is no such error, also if the device has none left to be tried."""
    engine, jobs = new_engine(paper), jobs_of((9, 9))
    engine.submit(jobs)
    monkeypatch.setattr(pop.Model, step, Mock(side_effect=RuntimeError("illegal address")))
    monkeypatch.setattr(torch, "ones", Mock(side_effect=torch.OutOfMemoryError))
    engine.turn()
    monkeypatch.setattr(torch, "ones", Mock(side_effect=RuntimeError("lost")))
    with pytest.raises(RuntimeError, match="lost"):
        engine.turn()
    assert [str(job.events[-1].error) for job in jobs] == ["illegal address"] * 2


def test_errors_reach_those_whom_they_concern(paper, monkeypatch, caplog, notes):
    engine, decode = new_engine(paper), pop.Model.decode
    jobs = jobs_of((9, 9, 9))

    def fail(model, tokens, *_, **__):
        if tokens[0][0] == jobs[1].tokens[0]:
            raise RuntimeError("prefill")

    notes(pop.Model, "prefill_prepared", fail)
    work(engine, jobs)
    assert [str(job.events[-1].error) for job in jobs] == ["None", "prefill", "None"]
    monkeypatch.undo()
    broken = {
        ZeroDivisionError: lambda *_: 1 / 0,
        pop.InputError: lambda self, tokens, cache: decode(self, tokens, cache) * torch.nan,
    }
    for error, decoding in broken.items():
        monkeypatch.setattr(pop.Model, "decode", decoding)
        jobs = jobs_of((8, 8))
        work(engine, jobs)
        assert all(isinstance(job.events[-1].error, error) for job in jobs)
    monkeypatch.undo()
    assert answer(engine, new_job(prompt(9, 9)))
    assert "ZeroDivisionError" in caplog.text
