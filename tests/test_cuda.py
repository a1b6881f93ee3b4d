"""What must hold on a GPU: the naive reference on the CPU in float32, at any chunk, row, step and image.

    pytest -m cuda        the tests on a GPU, which are skipped without one

Most tests also run on the CPU, so that they can fail on any machine. The models are tiny, and their sizes are multiples
of 16, as fast kernels require.
"""

import contextlib
import copy
import dataclasses
import gc
import re
import warnings
from collections.abc import Iterator

import pytest
import torch
from support.cases import assert_close, random_corrections, recorded_choices, turns_by_reference
from support.replay import Replay
from support.tiny import (
    patch_values,
    random_model,
    random_patches,
    tiny_config,
    tiny_gemma3_config,
    tiny_gemma3_vl_config,
    tiny_qwen3_config,
    tiny_qwen3_vl_config,
)
from support.tiny_chat import write_chat_checkpoint
from support.tiny_images import picture

import pop
from pop import engine
from pop.backends import cpu, cuda
from pop.backends.cuda_graph import Graph
from pop.calibration.distill import distillation_loss
from pop.calibration.exercises import Exercise
from pop.engine.attention import UNBOUNDED, AttentionMetadata
from pop.engine.attention import cache_attention as general_attention
from pop.engine.decode_step import DecodeStep
from pop.engine.layer_pass import ReplayedPasses
from pop.generation.sampling import SamplingParams, sample_tokens
from pop.inputs.processors import Prepared
from pop.models.config import ExpertsConfig
from pop.models.images import TEXT
from pop.models.vision.qwen3_vl import Grid
from pop.pruning import reference

CHUNK = 7  # tokens that run at once; with windows of 5 tokens, a ring has 11 slots
SIZES = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
TOWER = dataclasses.replace(tiny_qwen3_vl_config().vision, out_size=32)
CONFIGS = {
    "llama": tiny_config(**SIZES),
    "gemma3": tiny_gemma3_config(**SIZES),
    "qwen3": tiny_qwen3_config(**SIZES),
    # Every token takes all experts. Otherwise rounding to bfloat16 could choose others.
    "experts": tiny_qwen3_config(**SIZES, experts=ExpertsConfig(3, 3, 16)),
    "gemma3 with images": tiny_gemma3_vl_config(**SIZES),
    "qwen3_vl": tiny_qwen3_vl_config(**SIZES, mrope_sections=(3, 3, 2), vision=TOWER),
}
TEXT_FAMILIES = ("llama", "gemma3", "qwen3", "experts")
LAYERS = (1, 3, 4)  # of five
RANK = 16  # of the codes
SLOW = re.compile("sgemm|cudnn|f32f32|gemmSN|gemv2T")  # names of kernels that multiply in float32, and of cuDNN's
PLANS = {"none": (), "plain": (3, 0), "calibrated": (2, 1)}  # tokens at full depth: the last ones and the first ones


def make(family: str, dtype: torch.dtype, device: torch.device) -> tuple[pop.Model, torch.nn.Module]:
    """A model, and a module with the same weights in float32 on the CPU."""
    naive = random_model(CONFIGS[family], seed=3).to(dtype).float()
    module = copy.deepcopy(naive).to(device, dtype)
    return pop.Model(module, naive.config, compile=False, chunk_size=CHUNK), naive


def plan_of(model: pop.Model, name: str) -> pop.PrunePlan:
    """One of PLANS. Its corrections are random numbers that the model's dtype can hold."""
    if name == "none":
        return pop.PrunePlan.none()
    last, first = PLANS[name]
    if name == "plain":
        return pop.PrunePlan(LAYERS, last, first)
    corrections = random_corrections(model.config, LAYERS, 0, RANK, model)
    rounded = {key: tensor.to(model.dtype).float() for key, tensor in corrections.tensors.items()}
    return pop.PrunePlan(LAYERS, last, first, corrections.replaced(rounded))


def random_tokens(*shape: int) -> torch.Tensor:
    """Ids below those of images."""
    return torch.randint(60, shape, generator=torch.Generator().manual_seed(sum(shape)))


@contextlib.contextmanager
def debugged_waits(mode: str) -> Iterator[None]:
    """What waits for the GPU raises an error ("error") or warns ("warn")."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_equal(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """To 1e-4 of the scale in float32, and to 4e-2 of the norm in bfloat16, where a CPU comes to 2.4e-2."""
    found = found.cpu()
    if dtype == torch.float32:
        assert_close(found, expected)
    else:
        assert (found - expected).norm() <= 4e-2 * expected.norm()


def assert_answers_are_the_references(model, naive, plan, prompts, num_tokens: int, images=None) -> None:
    """Prompts [B, T] of equal lengths, and as many tokens of an answer."""
    B, T = prompts.shape
    answers = random_tokens(B, num_tokens)
    cache = model.new_cache(B, 48)
    found = [model.prefill(prompts, cache, images=images, plan=plan)]
    found = torch.stack(found + [model.decode(token, cache) for token in answers.T], dim=1)  # [B, 1 + N, V]
    shown = TEXT if images is None else model.vision.images(naive, images, prompts, torch.full((B,), T))
    for row in range(B):
        logits, _ = turns_by_reference(naive, plan, [(prompts[row], answers[row])], shown)
        assert_equal(found[row], logits[T - 1 :], model.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[(23,), (8,)], [(23, 9, 1), (2, 8, 5)]], ids=["one row", "ragged"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_two_prompts_and_an_answer_are_the_references(family, plan, lengths, dtype, device):
    """In chunks, with rows of different lengths, and further than a window or its ring reaches."""
    model, naive = make(family, dtype, device)
    plan, B = plan_of(model, plan), len(lengths[0])
    prompts, answer = [random_tokens(B, max(row)) for row in lengths], random_tokens(B, 4)
    cache = model.new_cache(B, 48)
    found = [model.prefill(tokens, cache, lengths=row, plan=plan) for tokens, row in zip(prompts, lengths, strict=True)]
    found = torch.stack(found + [model.decode(token, cache) for token in answer.T], dim=1)  # [B, 2 + 4, V]
    for row in range(B):
        first, second = (tokens[row, : one[row]] for tokens, one in zip(prompts, lengths, strict=True))
        logits, _ = turns_by_reference(naive, plan, [(first, []), (second, answer[row])])
        assert_equal(found[row], logits[[len(first) - 1, *range(-5, 0)]], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_tokens_that_the_device_selects_are_at_full_depth(family, dtype, device):
    """In one chunk, which waits for nothing, and in several."""
    model, naive = make(family, dtype, device)
    plan, tokens, lengths = pop.PrunePlan(LAYERS, 2, 1, full_depth_selected=0.3), random_tokens(2, 43), [43, 12]
    plan = dataclasses.replace(plan, selecting_layer=2)
    for model.chunk_size in (64, CHUNK):
        cache = model.new_cache(2, 48)
        waits_for_nothing = device.type == "cuda" and model.chunk_size == 64
        with recorded_choices() as found, debugged_waits("error") if waits_for_nothing else contextlib.nullcontext():
            logits = model.prefill(tokens, cache, lengths=lengths, plan=plan)
        for row, n in enumerate(lengths):
            selected = found[0][row, :n].cpu()
            by_position = reference.full_depth_tokens(n, n, plan)
            assert (by_position | selected).sum() == 3 + int(0.3 * (n - 3))
            expected, _ = reference.forward(naive, tokens[row, :n], by_position, plan, selected=selected)
            assert_equal(logits[row], expected[-1], dtype)


# Calibration


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradients_of_distillation_are_those_of_float32_on_the_cpu(dtype, device):
    model, naive = make("llama", dtype, device)
    plan = plan_of(model, "calibrated")
    losses, gradients = [], []
    for module, where in ((model.module, device), (naive, torch.device("cpu"))):
        leaves = {
            name: tensor.to(where, torch.float32, copy=True).requires_grad_()
            for name, tensor in plan.corrections.tensors.items()
        }
        trained = dataclasses.replace(plan, corrections=plan.corrections.replaced(leaves))
        exercise = Exercise(random_tokens(2, 40), 28, [[], []])
        loss = distillation_loss(module, model.vision, trained, exercise)
        loss.backward(inputs=[*leaves.values()])
        losses.append(loss.item())
        gradients.append(torch.cat([leaf.grad.flatten().cpu() for leaf in leaves.values()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if dtype == torch.float32 else 4e-2)
    assert_equal(*gradients, dtype)


def test_a_model_is_calibrated_and_its_plan_judged(device, tmp_path):
    """The corrections serve the model on the CPU too, where the verdict has the same loss."""
    folder = write_chat_checkpoint(tmp_path / "chat", **SIZES)
    text = " ".join(f"word{n} of line{n * n}" for n in range(400))
    model, other = (pop.load(folder, prune=None, device=where, progress=False) for where in (device, "cpu"))
    plan = pop.calibrate(model, [text], "1,3,4", steps=2, progress=False)
    asked = {"texts": [text], "lengths": (600,), "questions": 1, "progress": False}
    found, expected = (pop.check(one, plan, **asked).loss[600]["kl"] for one in (model, other))
    without = pop.check(model, dataclasses.replace(plan, corrections=None), **asked).loss[600]["kl"]
    assert found == pytest.approx(expected, rel=1e-3)
    assert found < without


# Replayed steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_replayed_steps_are_the_references(family, dtype, device):
    """50 steps of three rows, of which one fills up; a rewind, rows that leave, and a prompt that reads the states.

    On the CPU, a stand-in for a CUDA graph overwrites its outputs. All logits are compared in the end.
    """
    model, naive = make(family, dtype, device)
    plan, lengths, answer = plan_of(model, "calibrated"), (50, 9, 1), random_tokens(3, 50)
    stages, cache, prompts = model._stages(3), model.new_cache(3, 66), random_tokens(3, 50)
    stages = stages if device.type == "cuda" else stages._replace(replay=Replay)
    model.prefill(prompts, cache, lengths=lengths, plan=plan)

    def decode(tokens):
        return engine.decode(model.module, tokens.to(device), cache, stages)

    found = [decode(token) for token in answer.T[:20]]  # the first row is full after 16
    snapshot = cache.snapshot()
    for token in answer.T[:6]:
        decode(token)
    cache.move_to(*snapshot)
    found += [decode(token) for token in answer.T[20:30]]
    cache.keep_rows(torch.tensor([2, 1]))
    found += [decode(token) for token in answer.T[30:, [2, 1]]]
    turn = random_tokens(2, 6)
    after = model.prefill(turn, cache, plan=plan)

    for row, steps in enumerate((16, 50, 50)):
        prompt = prompts[row, : lengths[row]]
        logits, _ = turns_by_reference(naive, plan, [(prompt, answer[row, :steps]), (turn[2 - row] if row else [], [])])
        rows = [found[step][row if step < 30 else 2 - row] for step in range(steps)]
        assert_equal(torch.stack(rows), logits[lengths[row] : lengths[row] + steps], dtype)
        if row:
            assert_equal(after[2 - row], logits[-1], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_replayed_prompts_are_the_references(family, plan, dtype, device):
    """Prompts of several lengths, of which a GPU captures two sizes, and a step after each.

    On the CPU, a stand-in for a CUDA graph overwrites its outputs. All logits are compared in the end.
    """
    model, naive = make(family, dtype, device)
    model.chunk_size = 64
    model._stages.replayed_tokens = 100
    model._stages.replay = Graph if device.type == "cuda" else Replay
    model._stages.forget()
    cache = model.new_cache(2, 48)
    plan = plan_of(model, plan)
    found = []
    for number in range(20 if device.type == "cuda" else 6):  # a GPU captures at the eighth call
        prompts = random_tokens(2, 23 + number % 4).roll(number, 1)  # 23 and 24 tokens run as 24, 25 and 26 as 28
        cache.reset()
        prefilled = model.prefill(prompts, cache, lengths=[prompts.shape[1], 7], plan=plan)
        found.append((prompts, prefilled, model.decode([5, 6], cache)))
    kept = cache.passes[ReplayedPasses].kept
    assert len(kept) == 2
    if device.type == "cuda":
        assert all(replay.graph is not None for _, replay in kept.values())
    for prompts, prefilled, decoded in found[::3] + found[-2:]:
        for row, (n, token) in enumerate(((prompts.shape[1], 5), (7, 6))):
            logits, _ = turns_by_reference(naive, plan, [(prompts[row, :n], torch.tensor([token]))])
            assert_equal(torch.stack((prefilled[row], decoded[row])), logits[-2:], dtype)


# Images


def image_of(model: pop.Model) -> Prepared:
    if model.config.family == "gemma3":
        return model.vision.prepare("image", picture(28, seed=1))
    pixels = random_patches(16, patch_values(model.config.vision), seed=1)
    return Prepared("image", pixels, ([62, *[60] * 4, 63],), Grid(1, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", ["gemma3 with images", "qwen3_vl"])
def test_images_are_the_references(family, plan, dtype, device):
    """Gemma-3's image tokens attend those after them. Qwen3-VL has positions on three axes, and DeepStack."""
    model, naive = make(family, dtype, device)
    image = image_of(model)
    (ids,) = (piece for piece in image.pieces if not isinstance(piece, str))
    prompt = torch.tensor([[2, 5, *ids, 7, 8, *ids, 9, *range(20, 34)]])
    assert_answers_are_the_references(model, naive, plan_of(model, plan), prompt, 3, images=[[image, image]])


# Sampling


@pytest.mark.cuda
@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.9}])
def test_draws_do_not_depend_on_the_device(settings):
    logits = 3 * torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=0.8, **settings)
    here, there = ([torch.Generator().manual_seed(seed) for seed in (5, 6, 7)] for _ in range(2))
    for _ in range(20):
        found = sample_tokens(logits.cuda(), params, there).tolist()
        assert found == sample_tokens(logits, params, here).tolist()


# The kernels at the sizes of real models

KEYS = [  # of tokens, keys and the window
    (1, 5000, None),
    (1, 1100, 512),
    (7, 300, 64),
    (96, 5000, None),
    (96, 2048, 1024),
    (700, 700, None),
    (700, 2500, 512),
]


def slots(S: int, K: int, E: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Keys and values as a cache of two rows has them, [2, S + 1, K, E]."""
    random = torch.Generator().manual_seed(S)
    return [torch.randn(2, K, S + 1, E, generator=random).to(device, dtype).transpose(1, 2) for _ in range(2)]


def prompt_metadata(layout: str, T: int, N: int, window: int | None, device: torch.device) -> AttentionMetadata:
    """Two rows of T tokens, the last of N. In a ragged batch, the second row has no tokens before them.

    Its keys are in the order of the slots, or those of a window, from a ring.
    """
    before = UNBOUNDED if window is None else window - 1
    own = min(N - T, before)  # keys before the first token
    begin = torch.tensor([own, 0 if layout == "ragged" else own])[:, None]
    positions = begin + torch.arange(T)  # [2, T]
    spans = torch.stack(((positions - before).clamp(min=0), positions), dim=-1)
    held = begin - own + torch.arange(own + T)  # negative: no key
    key_slots = None
    if layout == "ring":
        random = torch.Generator().manual_seed(0)
        key_slots = torch.stack([torch.randperm(N, generator=random)[: own + T] for _ in range(2)]).to(device)
    elif layout == "ragged" and window is None:
        held = torch.arange(own + T).expand(2, -1)
    elif layout == "ragged":
        key_slots = (held % N).to(device)
    band = torch.tensor((own, before, 0, layout != "ragged"))
    return AttentionMetadata((), None, spans.to(device, torch.int32), held.to(device, torch.int32), key_slots, band)


def assert_exact(attend, q: torch.Tensor, *arguments) -> None:
    """To 1e-4 of the norm in float32, and to 1e-2 in bfloat16, of the general form in float64."""
    found = attend(q, *arguments).double()
    keys, values, *rest = arguments
    exact = general_attention(q.double(), keys.double(), values.double(), *rest)
    assert found.isfinite().all()
    assert (found - exact).norm() <= (1e-4 if q.dtype == torch.float32 else 1e-2) * exact.norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["in order", "ring", "ragged"])
@pytest.mark.parametrize("G", [1, 4, 8])
@pytest.mark.parametrize("E", [64, 128, 256])
def test_attention_of_prompts_at_real_sizes(E, G, layout, dtype, device):
    attention = cuda.cache_attention if device.type == "cuda" else cpu.cache_attention
    for T, N, window in KEYS if device.type == "cuda" else KEYS[2:3]:
        metadata = prompt_metadata(layout, T, N, window, device)
        q = torch.randn(2, T, 2 * G, E, generator=torch.Generator().manual_seed(T)).to(device, dtype)
        assert_exact(attention, q, *slots(N, 2, E, dtype, device), metadata, E**-0.5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("G", [1, 4, 8])
@pytest.mark.parametrize("E", [64, 128, 256])
def test_attention_of_one_token_at_real_sizes(E, G, dtype, device):
    """Over a cache, a ring that has wrapped, and rows of different lengths, whose free slots are zero."""
    attention = cuda.cache_attention if device.type == "cuda" else cpu.cache_attention
    q = torch.randn(2, 1, 2 * G, E, generator=torch.Generator().manual_seed(G)).to(device, dtype)
    for S, last, window in ((5000, (4999, 4999), None), (700, (9000, 1234), 512), (300, (299, 5), None)):
        last = torch.tensor(last, device=device)
        first = (last - (window or S) + 1).clamp(min=0)
        metadata = AttentionMetadata((), None, torch.stack((first, last), dim=-1)[:, None].to(torch.int32))
        assert_exact(attention, q, *slots(S, 2, E, dtype, device), metadata, E**-0.5)


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_the_rows_of_a_batch_share_a_chunk_on_a_gpu(rows, device, notes):
    """So that the memory for activations does not grow with the batch. A CPU runs a whole chunk of each row."""
    model, _ = make("llama", torch.bfloat16, device)
    model.chunk_size = 8192
    sizes = notes(engine, "prefill", lambda module, tokens, cache, lengths, plan, chunk_size, *_: chunk_size)
    model.prefill(random_tokens(rows, 5), model.new_cache(rows, 9))
    assert sizes == [8192 // rows if device.type == "cuda" else 8192]


def test_rows_with_more_experts_than_copies_of_weights_serve(device):
    """22 rows with three experts each: 66 pairs, which one grouped product takes where a GPU has it."""
    model, naive = make("experts", torch.bfloat16, device)
    assert_answers_are_the_references(model, naive, model.resolve(None), random_tokens(22, 8), 12)


# Only on a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_a_graph_reads_no_memory_that_was_freed(family, monkeypatch):
    """torch checks at each replay that the tensors which were read during the capture are alive."""
    begin = torch.cuda.graphs.graph.__init__

    def checking(self, *args, **options):
        begin(self, *args, **options)
        if not hasattr(self, "check_input_liveness"):
            pytest.skip("this version of torch has no such check")
        self.check_input_liveness = True

    monkeypatch.setattr(torch.cuda.graphs.graph, "__init__", checking)
    model, _ = make(family, torch.bfloat16, torch.device("cuda"))
    cache, tokens = model.new_cache(2, 64), torch.tensor([1, 2], device="cuda")
    model.prefill(random_tokens(2, 20), cache)
    for _ in range(12):
        model.decode(tokens, cache)
    snapshot = cache.snapshot()
    model.prefill(random_tokens(2, 5), cache)
    model.generate([1, 2, 3], max_new_tokens=30)
    cache.move_to(*snapshot)
    weight = model.module.layers[1].mlp.up_proj.weight
    for _ in range(3):
        weight.data = weight.data.clone()  # the step keeps the memory of the old one until it looks
        gc.collect()
        torch.cuda.empty_cache()
        model.decode(tokens, cache)
    assert cache.passes[DecodeStep].replay is not None


@pytest.mark.cuda
def test_a_capture_that_fails_leaves_the_stream_as_it_was():
    model, _ = make("llama", torch.bfloat16, torch.device("cuda"))
    number = torch.ones((), device="cuda")
    stream = torch.cuda.current_stream()
    for _ in range(2):
        graph = Graph(model.module, "a sum")
        found = [int(graph(lambda: (number + float(number),))[0]) for _ in range(12)]  # float() waits for the device
        assert graph.graph is None
        assert torch.cuda.current_stream() == stream
        assert found == [2] * 12


@pytest.mark.cuda
def test_a_model_on_the_second_of_two_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    model, naive = make("llama", torch.bfloat16, torch.device("cuda:1"))
    assert_answers_are_the_references(model, naive, pop.PrunePlan(LAYERS), random_tokens(1, 23), 12)
    assert torch.cuda.current_device() == 0


@pytest.mark.cuda
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_a_decode_step_waits_for_nothing(family):
    """Once captured, it reads nothing back and copies nothing from memory that is not pinned."""
    model, _ = make(family, torch.bfloat16, torch.device("cuda"))
    cache, tokens = model.new_cache(2, 64), torch.tensor([1, 2], device="cuda")
    model.prefill(random_tokens(2, 20), cache)
    for _ in range(20):
        model.decode(tokens, cache)
    with debugged_waits("error"):
        for _ in range(5):
            tokens = model.decode(tokens, cache).argmax(-1)


@pytest.mark.cuda
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generate_waits_once_a_token(temperature):
    model, _ = make("llama", torch.bfloat16, torch.device("cuda"))
    waits = {}
    for count in (20, 20, 40):  # the first warms up
        with debugged_waits("warn"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.generate([3, 5, 7], max_new_tokens=count, temperature=temperature, seed=0)
        waits[count] = sum("synchroniz" in str(warning.message) for warning in caught)
    assert waits[40] - waits[20] == 20


@pytest.mark.cuda
@pytest.mark.parametrize("family", CONFIGS)
def test_no_kernel_multiplies_in_float32_and_none_is_cudnns(family):
    """cuDNN plans anew for each length, and products in float32 do not use tensor cores."""
    model, _ = make(family, torch.bfloat16, torch.device("cuda"))
    images = [[image_of(model)]] if model.vision.marks else [[]]
    ids = [token for one in images[0] for piece in one.pieces if not isinstance(piece, str) for token in piece]
    prompt, cache = [[2, 5, *ids, *range(20, 40)]], model.new_cache(1, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for plan in (pop.PrunePlan.none(), pop.PrunePlan(LAYERS)):
            cache.reset()
            token = model.prefill(prompt, cache, images=images, plan=plan).argmax(-1)
        for _ in range(20):
            token = model.decode(token, cache).argmax(-1)
    kernels = {event.key for event in profile.key_averages()}
    assert kernels
    assert [name for name in kernels if SLOW.search(name)] == []


@pytest.mark.cuda
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_compiled_stages_are_the_references(family):
    """After the warm-up, no length compiles again."""
    model, naive = make(family, torch.bfloat16, torch.device("cuda"))
    model = pop.Model(model.module, model.config, compile=True, chunk_size=CHUNK)
    model.warmup()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_answers_are_the_references(model, naive, pop.PrunePlan(LAYERS), random_tokens(1, 23), 12)
