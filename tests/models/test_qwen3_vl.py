"""Qwen3-VL's positions on three axes, by the rule. test_families.py compares logits, to which they lead."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.goldens import TOLERANCE, Golden, Qwen3VLCase, error
from support.tiny import tiny_qwen3_vl_config

import pop
from pop.models.qwen3_vl import image_positions
from pop.models.vision.qwen3_vl import Grid

CONFIG = tiny_qwen3_vl_config()


def test_rows_that_stay_keep_their_positions(tmp_path):
    """Another row leaves the batch after the prompt."""
    golden = Golden("qwen3_vl/untied")
    model = pop.load(golden.checkpoint(tmp_path), prune=None, progress=False)
    prompts = [Qwen3VLCase("qwen3_vl/untied", case).prompt for case in ("text", "image", "image-last")]
    lengths = [len(prompt.tokens) for prompt in prompts]
    padded = [prompt.tokens + [0] * (max(lengths) - len(prompt.tokens)) for prompt in prompts]
    cache = model.new_cache(3, max(lengths) + 1)
    model.prefill(padded, cache, lengths=lengths, images=[prompt.seen["images"] for prompt in prompts])
    cache.keep_rows(torch.tensor([2, 1]))
    kept = (prompts[2], prompts[1])
    logits = model.decode([prompt.greedy[0] for prompt in kept], cache)
    for ours, prompt in zip(logits, kept, strict=True):
        assert error(ours, prompt.logits[len(prompt.tokens)]) < TOLERANCE


@given(
    st.lists(st.integers(1, 3) | st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)), min_size=1),
)
def test_positions_by_the_rule(parts):
    """Text advances by one. An image spreads from where it begins, and takes as many steps as its longer side."""
    frames, expected, at = [], [], 0
    for part in parts:
        if isinstance(part, int):
            expected += [(at + n,) * 3 for n in range(part)]
            at += part
            continue
        pairs, rows, columns = part
        for _ in range(pairs):
            begin = len(expected)
            frames.append((range(begin, begin + rows * columns), Grid(1, 2 * rows, 2 * columns)))
            expected += [(at, at + y, at + x) for y in range(rows) for x in range(columns)]
            at += max(rows, columns)
    expected.append((at,) * 3)
    positions = image_positions(len(expected), frames, 2)
    assert positions.T.tolist() == [list(position) for position in expected]
