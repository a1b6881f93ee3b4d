"""Which tokens a plan selects is what pop/pruning/reference.py selects.

That the selected tokens run at full depth, exactly, is in test_forward.py and test_forward_images.py.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from support.cases import (
    NONE,
    batches,
    cases,
    new_cache,
    plain,
    prefill,
    prefill_with_choice,
    recorded_choices,
)
from support.meta_device import META
from support.naive_method import scores_at_selecting_layer
from support.tiny import random_model, tiny_config, tiny_gemma3_config, tiny_qwen3_vl_config

from pop import engine
from pop.models import build
from pop.models.images import Images
from pop.pruning import reference
from pop.pruning.plan import PrunePlan

pytestmark = pytest.mark.usefixtures("small_query_blocks", "short_averages")


def assert_chosen(chosen, scores, others, plan):
    """`chosen` [T] are those of the `others` [T] with the largest scores [T]. Scores equal to 1e-5 are in any order."""
    count = plan.num_selected(int(others.sum()))
    assert chosen.sum() == count and not (chosen & ~others).any()
    if 0 < count < others.sum():
        least = scores[chosen].min()
        assert least >= scores[others & ~chosen].max() - 1e-5 * scores.max(), "a token with a higher score is left out"


def selecting(plan, last_layer):
    """The plan, which now selects tokens."""
    if not plan.layers or plan.layers[0] == 0:
        plan = dataclasses.replace(plain(plan), layers=(last_layer,))
    share, last = plan.full_depth_selected or 0.3, plan.full_depth_last % 40  # 40 is more than a prompt has
    return dataclasses.replace(plan, full_depth_selected=share, full_depth_last=max(1, last))


@given(cases(), batches(6, max_rows=1))
def test_the_choice_is_the_references(case, later):
    """For any plan, batch, padding and chunks, in a first prompt and in a later one.

    The last tokens of the later one choose among its own, and among those of the first one that are not at full depth.
    """
    module, plan, tokens, lengths, chunk = case
    assume(module.config.num_layers > 1)
    plan = selecting(plan, module.config.num_layers - 1)
    _, cache, before = prefill_with_choice(module, tokens, lengths, plan, chunk)
    for row, n in enumerate(lengths.tolist()):
        assert (cache.skipped[row, n:-1] == -1).all()
    (turn,), (m,) = later
    m = int(m)
    turn = turn.expand(len(tokens), -1)
    added = torch.full_like(lengths, m)
    _, _, chosen = prefill_with_choice(module, turn, added, plan, chunk, cache)
    chosen = F.pad(chosen, (int(lengths.max()), 0))  # it may have no columns of earlier tokens
    for row, n in enumerate(lengths.tolist()):
        full_depth = reference.full_depth_tokens(n, n, plan)
        scores = reference.attention_scores(module, tokens[row, :n], plan)
        assert_chosen(before[row, :n], scores, ~full_depth, plan)
        assert not before[row, n:].any()
        whole = torch.cat((tokens[row, :n], turn[row, :m]))
        of_turn = reference.full_depth_tokens(n + m, n + m, plan)[n:]
        others = torch.cat((~full_depth & ~before[row, :n], ~of_turn))
        is_kept = not cache.has_windows and plan.selects_at >= module.deepstack_layers
        N = n if is_kept and others[:n].any() else 0  # earlier tokens
        assert not chosen[row, : -m - N].any()
        full_depth = torch.cat((full_depth, of_turn))
        earlier = F.pad(before[row, :n], (0, m))
        scores = scores_at_selecting_layer(module, whole, full_depth, plan, earlier, begin=n - N, asking=m)
        of_row = chosen[row, -m - N :]
        assert_chosen(of_row, scores, others[n - N :], plan)


def test_a_question_at_full_depth_selects_as_well():
    """Of a text that was there before, but not of one that the cache has left by a rewind.

    Another plan's tokens lack states of its selecting layer.
    """
    module = random_model(tiny_config(), seed=3)
    plan = PrunePlan((3, 4), 9, full_depth_selected=0.5, selecting_layer=1)
    text, question = torch.arange(30)[None], torch.arange(40, 45)[None]
    for asked, expected in ((plan, 5), (dataclasses.replace(plan, selecting_layer=2), 0), (plain(plan), 0)):
        _, cache = prefill(module, text.repeat(1, 2), torch.tensor([60]), plan)
        cache.move_to(torch.tensor([0]), *cache.snapshot()[1:])
        prefill(module, text, torch.tensor([30]), plan, cache=cache)
        assert (cache.skipped >= 0).sum() == 11  # 21 tokens before the last 9, of which 10 are selected
        prefill(module, question, torch.tensor([5]), asked, cache=cache)
        assert (cache.skipped >= 0).sum() == 11 - expected


def test_rotary_positions_of_images_count():
    """Qwen3-VL: the scores take the positions of patches, and the states with their features."""
    module, plan = random_model(tiny_qwen3_vl_config(), seed=2), PrunePlan((3, 4), full_depth_selected=0.25)
    drawn = torch.Generator().manual_seed(1)
    tokens, numbers = torch.randint(60, (1, 40), generator=drawn), torch.full((1, 40), -1)
    numbers[0, 5:25] = torch.arange(20)
    features, *deepstack = torch.randn(3, 20, 30, generator=drawn)
    positions = torch.randint(40, (3, 1, 40), generator=drawn)
    images = Images(features, numbers, rope_positions=positions, deepstack=tuple(deepstack))
    for chunk in (7, 100):
        with recorded_choices() as found:
            cache = new_cache(module, 1)
            engine.prefill(module, tokens, cache, torch.tensor([40]), plan, chunk, images=images)
        scores = reference.attention_scores(module, tokens[0], plan, images)
        assert_chosen(found[0][0], scores, torch.arange(40) < 39, plan)


@pytest.mark.parametrize("config", [tiny_config(), tiny_gemma3_config()])
def test_nothing_waits_for_the_device(config):
    """Reading a tensor on the meta device would raise, because it has no values."""
    with META:
        module = build(config)
    tokens, lengths = torch.zeros(2, 30, dtype=torch.int64), torch.tensor([30, 12])
    late = PrunePlan((2, 4), 2, 1, full_depth_selected=0.2, selecting_layer=3)
    for plan in (late, dataclasses.replace(late, selecting_layer=None), PrunePlan((1,), full_depth_selected=1.0), NONE):
        cache = engine.cache.KVCache(config, 2, 40, dtype=torch.float32, device=META)
        logits = engine.prefill(module, tokens, cache, lengths, plan, 64)
        assert logits.shape == (2, config.vocab_size)


def test_a_row_that_overflows_leaves_the_other_rows_choice_alone():
    module, plan = random_model(tiny_config(), seed=3), PrunePlan((1, 3), full_depth_selected=0.4)
    module.model.embed_tokens.weight.data[7] = torch.nan
    tokens, lengths = torch.arange(10, 50).view(2, 20), torch.tensor([20, 15])
    _, _, expected = prefill_with_choice(module, tokens, lengths, plan)
    tokens[0, 11], tokens[1, 15:] = 7, 7  # a token of the first row, and padding of the second
    logits, _, chosen = prefill_with_choice(module, tokens, lengths, plan)
    assert torch.equal(chosen[1], expected[1]) and chosen.sum(1).tolist() == expected.sum(1).tolist()
    assert logits.isfinite().all(1).tolist() == [False, True]
