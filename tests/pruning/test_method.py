"""What must hold for prefill-only pruning, whatever the model, the plan, the batch and the chunks.

The engine is compared with pop/pruning/reference.py, with the plain forward pass, and with itself where the method says
that two ways to compute a thing are the same. All in float32 on tiny random models with awkward sizes.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from support.cases import (
    NONE,
    assert_close,
    batches,
    cases,
    experts,
    held,
    models,
    new_cache,
    plain,
    plans,
    prefill,
    qwen3_vl_config,
    seen,
    stacked,
)
from support.tiny import random_model, tiny_config, tiny_gemma3_config, tiny_qwen3_config
from support.tiny_images import both_ways

import pop
from pop import engine
from pop.engine import attention
from pop.engine.cache import KVCache
from pop.engine.layout import chunk_bounds
from pop.engine.stages import full_layer
from pop.models.images import TEXT, Images
from pop.models.layers import masked_attention
from pop.pruning import reference
from pop.pruning.plan import PrunePlan


@pytest.fixture(autouse=True, scope="module")
def blocks_of_a_few_tokens():
    """So that tiny prompts have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", 3)
        yield


def by_reference(module, row_tokens, plan):
    """Logits [V] and what the next token can attend, K, V [2, L, N, K, E], by the naive page."""
    n = len(row_tokens)
    logits, kv = reference.forward(module, row_tokens, reference.full_depth_tokens(n, n, plan), plan)
    return logits[-1], seen(module, stacked(kv))


# The reference itself


@torch.no_grad()
def token_by_token(module, tokens, plans):
    """Run tokens [T] one after the other, each through all layers but those of its own plan; NONE: through all.

    Returns logits [T, V] and K, V [2, L, T, K, E]. Refit projections see what entered the run of pruned layers at this
    token and, with two taps, at the one before, however that one was run.
    """
    kv = [[] for _ in module.layers]  # a list of (k, v), one a token, for each layer
    entered = [[] for _ in module.layers]  # a list of h, one a token, for each layer
    logits = []
    for position, plan in enumerate(plans):
        h = module.embed(tokens[None, position : position + 1])
        rope = module.rope(torch.tensor([[position]]))
        for index, layer in enumerate(module.layers):
            entered[index].append(h)
            q, k, v = layer.queries_keys_values(h, rope[layer.window])
            if index in plan.layers and plan.projections is not None:
                start = index
                while start - 1 in plan.layers and start > module.deepstack_layers:
                    start -= 1
                eps = module.config.norm_eps
                taps = [x / (x.square().mean(-1, keepdim=True) + eps).sqrt() for x in reversed(entered[start])]
                x = torch.cat(taps[: plan.projections.taps], dim=-1)  # position 0 is not pruned: there is one before
                number = plan.layers.index(index)
                weight, bias = plan.projections.weight[number], plan.projections.bias[number]
                k, v = layer.placed(*(F.linear(x, weight[i], bias[i]) for i in (0, 1)), rope[layer.window])
            kv[index].append((k, v))
            if index not in plan.layers:
                keys, values = (torch.cat(x, dim=1) for x in zip(*kv[index], strict=True))
                window = module.config.windows[index] or position + 1
                keys, values = keys[:, -window:], values[:, -window:]
                everything = torch.ones(1, 1, keys.shape[1], dtype=torch.bool)
                h = h + layer.attention_update(masked_attention(q, keys, values, everything, layer.scale))
                h = h + layer.mlp_update(h)
        logits.append(module.head(h[0, 0]))
    kept = [[torch.cat(x, dim=1)[0] for x in zip(*pairs, strict=True)] for pairs in kv]  # [L][2] of [T, K, E]
    return torch.stack(logits), torch.stack([torch.stack(pair) for pair in kept], dim=1)


@given(models(), st.data())
def test_the_reference_is_the_paper_read_literally(module, data):
    """Pass one encodes all but the last w tokens, pruned; pass two decodes these w one by one at full depth.

    Refit projections need the first tokens at full depth.
    """
    plan = data.draw(plans(module.config))
    tokens, _ = data.draw(batches(module.config.vocab_size, max_rows=1))
    n = tokens.shape[1]
    pruned = range(plan.full_depth_first, n - plan.full_depth_last)
    logits, _ = token_by_token(module, tokens[0], [plan if position in pruned else NONE for position in range(n)])
    assert_close(reference.prefill(module, tokens[0], plan), logits[-1])


# Where pruning changes nothing


@given(cases())
def test_the_empty_plan_is_the_plain_forward_pass(case):
    module, plan, tokens, lengths, chunk = case
    logits, _ = prefill(module, tokens, lengths, plain(plan, layers=()), chunk)
    assert_close(logits, module(tokens)[torch.arange(len(tokens)), lengths - 1].detach())


@given(cases())
def test_a_prompt_of_one_token_is_never_pruned(case):
    module, plan, tokens, lengths, chunk = case
    logits, _ = prefill(module, tokens, torch.ones_like(lengths), plan, chunk)
    assert_close(logits, module(tokens)[:, 0].detach())


@given(cases())
def test_full_depth_for_all_tokens_prunes_nothing(case):
    module, plan, tokens, lengths, chunk = case
    plan = dataclasses.replace(plan, full_depth_last=tokens.shape[1])
    logits, _ = prefill(module, tokens, lengths, plan, chunk)
    assert_close(logits, module(tokens)[torch.arange(len(tokens)), lengths - 1].detach())


@given(cases())
def test_pruning_only_the_last_layer_changes_nothing(case):
    """Its K and V are projected from the very state that the full model has there."""
    module, plan, tokens, lengths, chunk = case
    plan = plain(plan, layers=(module.config.num_layers - 1,))
    logits, cache = prefill(module, tokens, lengths, plan, chunk)
    full_logits, full_cache = prefill(module, tokens, lengths, NONE, chunk)
    assert_close(logits, full_logits)
    for row in range(len(tokens)):
        assert_close(held(module, cache, row), held(module, full_cache, row))


@given(cases())
def test_pruning_layers_that_write_nothing_changes_nothing(case):
    module, plan, tokens, lengths, chunk = case
    for index in plan.layers:
        for name, parameter in module.layers[index].named_parameters():
            if "o_proj" in name or "down_proj" in name:  # an MLP's, or all experts'
                parameter.data.zero_()
    logits, _ = prefill(module, tokens, lengths, plain(plan), chunk)
    assert_close(logits, module(tokens)[torch.arange(len(tokens)), lengths - 1].detach())


# Where pruning changes things, exactly as defined


@given(cases())
def test_prefill_is_the_reference(case):
    """Logits and cache, for any plan, window, batch, padding and chunking."""
    module, plan, tokens, lengths, chunk = case
    logits, cache = prefill(module, tokens, lengths, plan, chunk)
    assert cache.lengths.tolist() == lengths.tolist()
    for row, n in enumerate(lengths):
        expected_logits, expected_kv = by_reference(module, tokens[row, :n], plan)
        assert_close(logits[row], expected_logits)
        assert_close(held(module, cache, row), expected_kv)


@given(cases())
def test_the_boundary_token_enters_the_first_pruned_layer_as_in_the_full_model(case):
    """Bit for bit: below that layer nothing has been skipped."""
    module, plan, tokens, lengths, chunk = case
    if not plan.layers:
        plan = plain(plan, layers=(module.config.num_layers // 2,))
    _, pruned = prefill(module, tokens, lengths, plan, chunk)
    _, full = prefill(module, tokens, lengths, NONE, chunk)
    first = plan.layers[0]
    assert torch.equal(pruned.previous_hidden[first], full.previous_hidden[first])  # [B, D]


@given(cases())
def test_pruning_shows_in_the_cache(case):
    """Guards the tests above: pruning a layer that matters changes the K and V above it."""
    module, plan, tokens, lengths, chunk = case
    if not plan.layers or plan.layers[0] == module.config.num_layers - 1:
        return
    if int(lengths[0]) <= plan.full_depth_first + plan.full_depth_last or any(module.config.windows):
        return  # a window may see full-depth tokens alone
    _, cache = prefill(module, tokens, lengths, plan, chunk)
    _, full = prefill(module, tokens, lengths, NONE, chunk)
    above = plan.layers[0] + 1
    assert not torch.allclose(held(module, cache, 0)[:, above:], held(module, full, 0)[:, above:], atol=1e-4)


@given(cases(), st.integers(1, 5))
def test_decode_is_teacher_forcing_by_the_reference(case, steps):
    module, plan, tokens, lengths, chunk = case
    _, cache = prefill(module, tokens, lengths, plan, chunk)
    answer = torch.randint(module.config.vocab_size, (len(tokens), steps), generator=torch.Generator().manual_seed(1))
    stepwise = torch.stack([engine.decode(module, answer[:, step], cache) for step in range(steps)], dim=1)
    for row, n in enumerate(lengths.tolist()):
        whole = torch.cat((tokens[row, :n], answer[row]))
        full_depth = reference.full_depth_tokens(n, len(whole), plan)
        logits, kv = reference.forward(module, whole, full_depth, plan)
        assert_close(stepwise[row], logits[n:])
        assert_close(held(module, cache, row), seen(module, stacked(kv)))


@given(cases(), st.data())
def test_a_second_turn_appends_to_the_first(case, data):
    """Prompt, answer, prompt: what is new is pruned, but for its own boundary; what was there stays as it was."""
    module, plan, tokens, lengths, chunk = case
    _, cache = prefill(module, tokens, lengths, plan, chunk)
    answer = torch.zeros(len(tokens), dtype=torch.int64)
    engine.decode(module, answer, cache)
    turn, _ = data.draw(batches(module.config.vocab_size, max_rows=1))
    turn = turn.expand(len(tokens), -1)
    added = torch.tensor(data.draw(st.lists(st.integers(1, turn.shape[1]), min_size=len(tokens), max_size=len(tokens))))
    logits, _ = prefill(module, turn, added, plan, chunk, cache)
    for row, (n, m) in enumerate(zip(lengths.tolist(), added.tolist(), strict=True)):
        whole = torch.cat((tokens[row, :n], answer[:1], turn[row, :m]))
        position = torch.arange(len(whole))
        full_depth = reference.full_depth_tokens(n, n + 1, plan)
        later = (position[n + 1 :] >= len(whole) - plan.full_depth_last) | (position[n + 1 :] < plan.full_depth_first)
        expected, kv = reference.forward(module, whole, torch.cat((full_depth, later)), plan)
        assert_close(logits[row], expected[-1])
        assert_close(held(module, cache, row), seen(module, stacked(kv)))


@given(models(), st.data())
def test_a_conversation_may_change_its_plan_with_every_turn(module, data):
    """Prompt, answer, prompt, answer ...: each prompt by a plan of its own, behind what the others left in the cache.

    Plain plans, calibrated ones of one or two taps, and none: each token's logits, K and V are those of running the
    tokens one by one, where a token knows only the plan of its own turn.
    """
    rows = data.draw(st.integers(1, 2))
    cache = new_cache(module, rows)
    said = [torch.zeros(0, dtype=torch.int64) for _ in range(rows)]  # each row's tokens, [N]
    applied = [[] for _ in range(rows)]  # each token's plan: its turn's, or NONE at full depth
    predicted = [{} for _ in range(rows)]  # logits [V] by position

    def append(row, tokens, plans, logits):
        """Note a row's new tokens [M] and their plans; logits [R, V] are those at the last R of them."""
        said[row] = torch.cat((said[row], tokens))
        applied[row] += plans
        predicted[row] |= zip(range(len(said[row]) - len(logits), len(said[row])), logits, strict=True)

    for _ in range(data.draw(st.integers(2, 4))):
        plan = data.draw(st.one_of(st.just(NONE), plans(module.config)))
        width, random = data.draw(st.integers(1, 8)), torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
        lengths = torch.tensor(data.draw(st.lists(st.integers(1, width), min_size=rows, max_size=rows)))
        turn = torch.randint(module.config.vocab_size, (rows, width), generator=random)
        logits, _ = prefill(module, turn, lengths, plan, data.draw(st.sampled_from([1, 3, 1000])), cache)
        for row, m in enumerate(lengths.tolist()):
            held_before = len(said[row])
            full_depth = [held_before + i < plan.full_depth_first or i >= m - plan.full_depth_last for i in range(m)]
            append(row, turn[row, :m], [NONE if full else plan for full in full_depth], logits[row : row + 1])
        answer = torch.randint(module.config.vocab_size, (rows, data.draw(st.integers(0, 3))), generator=random)
        for step in answer.T:
            logits = engine.decode(module, step, cache)
            for row in range(rows):
                append(row, step[row : row + 1], [NONE], logits[row : row + 1])

    for row in range(rows):
        assert cache.lengths[row] == len(said[row])
        logits, kv = token_by_token(module, said[row], applied[row])
        assert_close(torch.stack(list(predicted[row].values())), logits[list(predicted[row])])
        assert_close(held(module, cache, row), seen(module, kv))


@given(cases())
def test_extend_is_decode_in_one_go(case):
    module, plan, tokens, lengths, chunk = case
    answer = torch.randint(module.config.vocab_size, (len(tokens), 4), generator=torch.Generator().manual_seed(2))
    _, cache = prefill(module, tokens, lengths, plan)
    stepwise = torch.stack([engine.decode(module, answer[:, step], cache) for step in range(4)], dim=1)
    _, other = prefill(module, tokens, lengths, plan)
    cut = min(chunk, 4)
    at_once = [engine.extend(module, part, other) for part in answer.split(cut, dim=1)]
    assert_close(torch.cat(at_once, dim=1), stepwise)
    assert_close(other.previous_hidden, cache.previous_hidden)
    for row in range(len(tokens)):
        assert_close(held(module, other, row), held(module, cache, row))


# What must not matter


@given(cases())
def test_a_ragged_batch_is_its_rows_alone(case):
    module, plan, tokens, lengths, chunk = case
    logits, cache = prefill(module, tokens, lengths, plan, chunk)
    for row, n in enumerate(lengths.tolist()):
        alone, alone_cache = prefill(module, tokens[row : row + 1, :n], lengths[row : row + 1], plan)
        assert_close(logits[row], alone[0])
        assert_close(held(module, cache, row), held(module, alone_cache, 0))


@given(cases(), st.sampled_from([1e4, -1e4, 1e-30]))
def test_padding_and_stale_slots_do_not_matter(case, garbage):
    module, plan, tokens, lengths, chunk = case
    expected, clean = prefill(module, tokens, lengths, plan, chunk)
    padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
    dirty = new_cache(module, len(tokens))
    for x in (*dirty.keys, *dirty.values):
        x.fill_(garbage)
    logits, _ = prefill(module, torch.where(padding, (tokens + 1) % 7, tokens), lengths, plan, chunk, dirty)
    assert_close(logits, expected)
    next_token = tokens[:, 0]
    for row, n in enumerate(lengths.tolist()):
        for x in (*dirty.keys, *dirty.values):
            x[row, n:] = garbage
    assert_close(engine.decode(module, next_token, dirty), engine.decode(module, next_token, clean))


def test_a_token_that_overflows_harms_no_other_row_and_no_later_use_of_the_cache():
    """Masked slots have attention weight 0, but 0 * NaN is NaN: NaN must not reach a slot that others read."""
    module = random_model(tiny_config(), seed=3)
    module.model.embed_tokens.weight.data[7] = torch.nan
    tokens, lengths = torch.tensor([[1, 2, 3, 4, 5], [7, 7, 7, 7, 7], [6, 7, 7, 7, 7]]), torch.tensor([5, 5, 1])
    plan = PrunePlan(layers=(1, 3))
    logits, cache = prefill(module, tokens, lengths, plan)
    assert logits.isfinite().all(1).tolist() == [True, False, True]
    logits = engine.decode(module, torch.tensor([1, 1, 1]), cache)
    assert logits.isfinite().all(1).tolist() == [True, False, True]
    cache.reset()
    lengths = torch.tensor([5, 1, 2])
    logits, _ = prefill(module, tokens.clamp(max=6), lengths, plan, cache=cache)
    assert logits.isfinite().all()
    assert engine.decode(module, torch.tensor([1, 1, 1]), cache).isfinite().all()


def test_a_failed_call_adds_no_tokens():
    module = random_model(tiny_config(), seed=3)
    _, cache = prefill(module, torch.tensor([[1, 2, 3]]), torch.tensor([3]), NONE)
    head, module.head = module.head, lambda h: 1 / 0
    for call in (
        lambda: prefill(module, torch.tensor([[4]]), torch.tensor([1]), NONE, cache=cache),
        lambda: engine.decode(module, torch.tensor([4]), cache),
        lambda: engine.extend(module, torch.tensor([[4]]), cache),
    ):
        with pytest.raises(ZeroDivisionError):
            call()
    module.head = head
    assert cache.lengths.tolist() == [3]
    expected, _ = prefill(module, torch.tensor([[1, 2, 3, 4]]), torch.tensor([4]), NONE)
    assert_close(engine.decode(module, torch.tensor([4]), cache), expected)


# Images


@st.composite
def prompts_with_images(draw, vocab_size, sizes, max_rows=3):
    """A ragged batch with images of so many tokens anywhere: tokens [B, T], lengths [B], numbers [B, T]."""
    rows = []
    for _ in range(draw(st.integers(1, max_rows))):
        row = [-1] * draw(st.integers(0, 6))
        for _ in range(draw(st.integers(0, 3))):
            row += [0] * draw(sizes) + [-1] * draw(st.integers(1, 6))
        rows.append(row + ([0] * draw(sizes) if draw(st.booleans()) else [-1]))
    lengths = torch.tensor([len(row) for row in rows])
    is_image = torch.tensor([row + [-1] * (int(lengths.max()) + 1 - len(row)) for row in rows]) == 0
    assume(is_image.any())
    numbers = (is_image.flatten().cumsum(0) - 1).view_as(is_image).where(is_image, -1)
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return torch.randint(vocab_size, is_image.shape, generator=random), lengths, numbers


@st.composite
def image_cases(draw):
    """(module, plan, tokens, lengths, chunk size, images): any family that sees.

    Gemma-3, whose chunks hold an image, just or easily. Qwen3-VL, whose images may be cut, in any places: more than
    its own rule has, so that the engine is held to the positions that it is given.
    """
    if draw(st.booleans()):
        side = draw(st.sampled_from([1, 2, 3]))
        windows = st.sampled_from([draw(st.sampled_from([1, 2, 5, 9, 100])), None])
        config = tiny_gemma3_config(windows=tuple(draw(st.lists(windows, min_size=1, max_size=5))))
        tokens, lengths, numbers = draw(prompts_with_images(config.vocab_size, st.just(side * side)))
        chunk = side * side + draw(st.sampled_from([0, 1, 4, 1000]))
    else:
        num_layers = draw(st.integers(1, 5))
        config = qwen3_vl_config(draw, num_layers=num_layers, experts=draw(experts(num_layers)))
        tokens, lengths, numbers = draw(prompts_with_images(config.vocab_size, st.integers(1, 7)))
        chunk = draw(st.sampled_from([1, 2, 5, 11, 1000]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    features = torch.randn(
        1 + len(getattr(config.vision, "deepstack", ())), int(numbers.max()) + 1, 30, generator=random
    )
    if config.family == "gemma3":
        images = both_ways(features[0].view(-1, side * side, 30), numbers)
    else:
        positions = torch.randint(40, (3, *tokens.shape), generator=random)
        images = Images(features[0], numbers, rope_positions=positions, deepstack=tuple(features[1:]))
    return random_model(config, seed=draw(st.integers(0, 9))), draw(plans(config)), tokens, lengths, chunk, images


def of_row(images, row, length, before=0):
    """The images of one row's prompt, behind so many tokens of text."""
    numbers, ahead, positions = images.feature_index[row : row + 1, :length], None, None
    if images.look_ahead is not None:
        ahead = F.pad(images.look_ahead[row : row + 1, :length], (before, 0))
    if images.rope_positions is not None:
        text = torch.arange(before).expand(3, 1, -1)
        positions = torch.cat((text, before + images.rope_positions[:, row : row + 1, :length]), dim=2)
    return dataclasses.replace(
        images, feature_index=F.pad(numbers, (before, 0), value=-1), look_ahead=ahead, rope_positions=positions
    )


@given(image_cases(), st.integers(0, 3))
def test_images_are_the_references(case, steps):
    """Prefill, cache and decode, for any plan, window, batch and chunking."""
    module, plan, tokens, lengths, chunk, images = case
    cache = new_cache(module, len(tokens), slots=128, chunk=chunk)
    logits = [engine.prefill(module, tokens, cache, lengths, plan, chunk, images=images)]
    answer = torch.randint(module.config.vocab_size, (len(tokens), steps), generator=torch.Generator().manual_seed(1))
    logits = torch.stack(logits + [engine.decode(module, token, cache) for token in answer.T], dim=1)
    for row, n in enumerate(lengths.tolist()):
        whole = torch.cat((tokens[row, :n], answer[row]))
        full_depth = reference.full_depth_tokens(n, len(whole), plan)
        expected, kv = reference.forward(module, whole, full_depth, plan, of_row(images, row, n))
        assert_close(logits[row], expected[n - 1 :])
        assert_close(held(module, cache, row), seen(module, stacked(kv)))


@given(image_cases())
def test_images_by_the_empty_plan_are_the_plain_forward_pass(case):
    module, _, tokens, lengths, chunk, images = case
    cache = new_cache(module, len(tokens), slots=128, chunk=chunk)
    logits = engine.prefill(module, tokens, cache, lengths, NONE, chunk, images=images)
    assert_close(logits, module(tokens, images)[torch.arange(len(tokens)), lengths - 1].detach())


@given(image_cases(), st.data())
def test_a_second_turn_may_have_images(case, data):
    """A text, and then the prompt: behind what is held, images see each other as they do in one prompt."""
    module, plan, tokens, lengths, chunk, images = case
    plan = dataclasses.replace(plan, full_depth_first=1)
    first = torch.randint(module.config.vocab_size, (len(tokens), 9), generator=torch.Generator().manual_seed(3))
    held_before = torch.tensor(data.draw(st.lists(st.integers(1, 9), min_size=len(tokens), max_size=len(tokens))))
    cache = new_cache(module, len(tokens), slots=128, chunk=chunk)
    engine.prefill(module, first, cache, held_before, NONE, chunk)
    logits = engine.prefill(module, tokens, cache, lengths, plan, chunk, images=images)
    for row, (n, m) in enumerate(zip(held_before.tolist(), lengths.tolist(), strict=True)):
        whole = torch.cat((first[row, :n], tokens[row, :m]))
        position = torch.arange(n + m)
        full_depth = (position < n) | (position >= n + m - plan.full_depth_last)
        expected, kv = reference.forward(module, whole, full_depth, plan, of_row(images, row, m, before=n))
        assert_close(logits[row], expected[-1])
        assert_close(held(module, cache, row), seen(module, stacked(kv)))


def test_a_first_full_depth_token_sees_the_rest_of_its_image():
    """The window is long past it at the prompt's end, so without it nobody would need the image's pruned K and V."""
    module = random_model(tiny_gemma3_config(), seed=6)
    tokens, lengths = torch.arange(30)[None], torch.tensor([30])
    numbers = torch.full((1, 30), -1)
    numbers[0, 1:5] = torch.arange(4)
    images = both_ways(torch.randn(1, 4, 30, generator=torch.Generator().manual_seed(1)), numbers)
    plan = PrunePlan(layers=(1,), full_depth_first=2)
    logits = engine.prefill(module, tokens, new_cache(module, 1), lengths, plan, 1000, images=images)
    expected, _ = reference.forward(module, tokens[0], reference.full_depth_tokens(30, 30, plan), plan, images)
    assert_close(logits[0], expected[-1])


def test_an_image_is_never_cut():
    """In each row for itself: no common border would do here."""
    numbers = torch.tensor([[-1, 0, 1, 2, 3, -1, -1, -1, -1], [-1, -1, -1, 4, 5, 6, 7, -1, -1]])
    lengths, images = torch.tensor([9, 8]), both_ways(torch.zeros(2, 4, 5), numbers)
    chunks = [(begin.tolist(), end.tolist()) for begin, end in chunk_bounds(lengths, 4, images)]
    assert chunks == [([0, 0], [1, 3]), ([1, 3], [5, 7]), ([5, 7], [9, 8])]
    text = [(begin.tolist(), end.tolist()) for begin, end in chunk_bounds(lengths, 4, TEXT)]
    assert text == [([0, 0], [4, 4]), ([4, 4], [8, 8]), ([8, 8], [9, 8])]


def test_text_prompts_keep_to_causal_attention_without_a_mask(monkeypatch):
    """And so do the chunks before an image: the fast path is only left where it must be."""
    module, masked = random_model(tiny_gemma3_config(windows=(None,)), seed=3), []

    def watched(layer, h, keys, values, at):
        masked.append(at.mask is not None)
        return full_layer(layer, h, keys, values, at)

    stages = engine.Stages(full_layer=watched)
    tokens, lengths = torch.arange(8)[None], torch.tensor([8])
    for numbers, expected in (([-1] * 8, [False]), ([-1, -1, 0, 1, 2, 3, -1, -1], [True])):
        images = both_ways(torch.zeros(1, 4, 30), torch.tensor([numbers]))
        engine.prefill(module, tokens, new_cache(module, 1), lengths, NONE, 1000, stages, images)
        assert masked == expected
        masked.clear()


@given(cases())
def test_a_reset_cache_is_a_new_cache(case):
    module, plan, tokens, lengths, chunk = case
    expected, _ = prefill(module, tokens, lengths, plan, chunk)
    cache = new_cache(module, len(tokens), chunk=chunk)
    empty = cache.lengths
    prefill(module, tokens.flip(1), torch.full_like(lengths, tokens.shape[1]), plan, chunk, cache)
    cache.reset()
    assert cache.lengths.tolist() == empty.tolist() == [0] * len(tokens)
    assert not cache.previous_hidden.any()
    logits, _ = prefill(module, tokens, lengths, plan, chunk, cache)
    assert torch.equal(logits, expected)


@given(cases(), st.data())
def test_nothing_changes_before_a_changed_token(case, data):
    module, plan, tokens, lengths, chunk = case
    row = data.draw(st.integers(0, len(tokens) - 1))
    changed = data.draw(st.integers(0, int(lengths[row]) - 1))
    _, before = prefill(module, tokens, lengths, plan, chunk)
    other = tokens.clone()
    other[row, changed] = (other[row, changed] + 1) % module.config.vocab_size
    _, after = prefill(module, other, lengths, plan, chunk)
    assert torch.equal(held(module, before, row)[:, :, :changed], held(module, after, row)[:, :, :changed])


def test_a_row_may_fill_its_cache_to_the_last_slot():
    """Padding of a shorter turn must not spill over a full row's last slot; it goes to the spare one."""
    module = random_model(tiny_config(), seed=3)
    plan = PrunePlan(layers=(2, 4))
    first, turn = torch.arange(10)[None].repeat(2, 1), torch.arange(20, 26)[None].repeat(2, 1)
    cache = new_cache(module, 2, slots=8)
    prefill(module, first, torch.tensor([7, 2]), plan, cache=cache)
    logits, _ = prefill(module, turn, torch.tensor([1, 6]), plan, cache=cache)
    assert cache.lengths.tolist() == [8, 8]
    for row, (n, m) in enumerate([(7, 1), (2, 6)]):
        alone = new_cache(module, 1, slots=8)
        prefill(module, first[row : row + 1], torch.tensor([n]), plan, cache=alone)
        expected, _ = prefill(module, turn[row : row + 1], torch.tensor([m]), plan, cache=alone)
        assert_close(logits[row], expected[0])
        assert_close(held(module, cache, row), held(module, alone, 0))


@pytest.mark.parametrize("config", [tiny_config(), tiny_gemma3_config(), tiny_qwen3_config()])
def test_stepping_a_full_row_leaves_its_tokens_alone(config):
    module = random_model(config, seed=3)
    cache = new_cache(module, 2, slots=8)
    prefill(module, torch.arange(8)[None].repeat(2, 1), torch.tensor([8, 3]), NONE, cache=cache)
    kept, cache.lengths = cache.lengths, cache.lengths.clone()
    before = [x[0, :8].clone() for x in (*cache.keys, *cache.values)]
    stepped = engine.decode(module, torch.tensor([1, 1]), cache)[1]
    assert all(torch.equal(x[0, :8], y) for x, y in zip((*cache.keys, *cache.values), before, strict=True))
    alone = new_cache(module, 1, slots=8)
    prefill(module, torch.arange(3)[None], kept[1:], NONE, cache=alone)
    assert_close(stepped, engine.decode(module, torch.tensor([1]), alone)[0])


def test_a_row_stepped_far_beyond_its_cache_attends_something(monkeypatch):
    """Its logits mean nothing, but they are sampled from: they are not to be those of an empty softmax."""
    attend = attention.masked_attention

    def checked(q, k, v, mask, scale):
        assert q.shape[1] > 1 or mask.any(-1).all()
        return attend(q, k, v, mask, scale)

    monkeypatch.setattr(attention, "masked_attention", checked)
    module = random_model(tiny_gemma3_config(windows=(2, None, 2)), seed=3)
    cache = new_cache(module, 2, slots=8)
    prefill(module, torch.arange(8)[None].repeat(2, 1), torch.tensor([8, 1]), NONE, cache=cache)
    for _ in range(7):
        assert engine.decode(module, torch.tensor([1, 1]), cache).isfinite().all()


def test_a_windowed_cache_takes_no_more_at_once_than_it_was_made_for():
    """A larger chunk, or a long continuation, runs in pieces: nothing that is still seen is overwritten."""
    module = random_model(tiny_gemma3_config(), seed=4)
    tokens = torch.arange(30)[None] % 61
    cache = new_cache(module, 1, chunk=3)
    assert cache.slots(None) == 64 and cache.slots(5) == 7
    plan = PrunePlan(layers=(1, 3))
    logits, _ = prefill(module, tokens[:, :18], torch.tensor([18]), plan, 1000, cache)
    rest = engine.extend(module, tokens[:, 18:], cache)
    expected, kv = reference.forward(module, tokens[0], reference.full_depth_tokens(18, 30, plan), plan)
    assert_close(logits[0], expected[17])
    assert_close(rest[0], expected[18:])
    assert_close(held(module, cache, 0), seen(module, stacked(kv)))


@pytest.mark.parametrize("held", [0, 30])
def test_a_windows_prefill_attends_a_band(monkeypatch, held):
    """Blocks of three tokens each attend what their windows show, in a fresh chunk and behind 30 tokens in a ring."""
    module = random_model(tiny_gemma3_config(windows=(5, None)), seed=4)
    cache = new_cache(module, 1, chunk=24)
    if held:
        prefill(module, torch.arange(held)[None], torch.tensor([held]), NONE, 24, cache)
    attend, seen = attention.masked_attention, []

    def watched(q, k, v, mask, scale):
        seen.append((q.shape[1], k.shape[1]))
        return attend(q, k, v, mask, scale)

    monkeypatch.setattr(attention, "masked_attention", watched)
    prefill(module, torch.arange(24)[None], torch.tensor([24]), NONE, 24, cache)
    local = [(3, 3), (3, 6)] if not held else [(3, 7), (3, 7)]
    local += [(3, 7)] * 6
    assert seen == local + ([(3, held + n) for n in range(3, 27, 3)] if held else [])


def test_what_windows_save():
    """gemma3-12b at 32k: eight of 48 layers hold everything, the others 1,023 + 2,048 tokens."""
    windows = tuple(1024 if layer % 6 else None for layer in range(1, 49))
    config = tiny_gemma3_config(windows=windows, hidden_size=3840, num_heads=16, num_kv_heads=8, head_dim=256)
    size = KVCache.size_in_bytes(config, 1, 32_768, torch.bfloat16)
    everything = 2 * 48 * 32_769 * 8 * 256 * 2 + 48 * 3840 * 2
    assert size == 2 * (8 * 32_769 + 40 * 3_072) * 8 * 256 * 2 + 48 * 3840 * 2
    assert size < 0.3 * everything
    assert [round(size / 1e9, 1), round(everything / 1e9, 1), round(1 - size / everything, 2)] == [3.2, 12.9, 0.76]


@pytest.mark.parametrize(("max_seq_len", "local"), [(6, 6), (40, 5 - 1 + 8)])
def test_a_new_cache_has_the_size_that_it_says(max_seq_len, local):
    config = tiny_gemma3_config(windows=(5, None, 5))
    model = pop.Model(random_model(config), config, chunk_size=8)
    slots = 2 * (local + 1) + max_seq_len + 1
    assert model.new_cache(3, max_seq_len).nbytes == 3 * (2 * slots * 2 * 10 + 3 * 30) * 4
