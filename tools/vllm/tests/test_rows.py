"""Which tokens of a step run the pruned layers. These tests need no vLLM."""

import numpy as np
import pytest
from pop_vllm.rows import Batch, runs_of

from pop import PrunePlan, reference

PLANS = [PrunePlan((1,)), PrunePlan((1,), full_depth_last=7, full_depth_first=3), PrunePlan((1,), 100)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("plan", PLANS)
def test_chunks_run_the_full_depth_tokens_of_the_whole_prompts(plan, seed):
    """However steps cut prompts, each full-depth token and each generated token runs once, in a run of neighbours."""
    draw = np.random.default_rng(seed)
    prompt = draw.integers(1, 60, size=4)
    total = prompt + draw.integers(0, 4, size=4)  # with generated tokens
    computed = np.zeros(4, dtype=np.int64)
    found = [[] for _ in prompt]
    while (computed < total).any():
        scheduled = np.minimum(draw.integers(0, 20, size=4), total - computed)
        ids = np.flatnonzero(scheduled)
        batch = Batch([str(i) for i in ids], computed[ids], scheduled[ids], prompt[ids])
        request, position = batch.tokens()
        runs = runs_of(request, position, plan.at_full_depth(position, batch.prompt[request]))
        assert runs.lengths == sorted(runs.lengths) and sum(runs.lengths) == len(runs.index)
        for run in np.split(runs.index, np.cumsum(runs.lengths)[:-1]):
            assert len(set(request[run])) <= 1
            assert (np.diff(position[run]) == 1).all()
        for index in runs.index:
            found[ids[request[index]]].append(int(position[index]))
        computed += scheduled
    for row, positions in enumerate(found):
        expected = reference.full_depth_tokens(int(prompt[row]), int(total[row]), plan)
        assert sorted(positions) == expected.nonzero()[:, 0].tolist()


def test_runs_end_between_requests_and_at_gaps():
    request = np.array([0, 0, 0, 1, 1, 2])
    position = np.array([4, 5, 6, 7, 8, 9])
    runs = runs_of(request, position, np.array([True, False, True, True, True, True]))
    assert runs.index.tolist() == [0, 2, 5, 3, 4]
    assert runs.lengths == [1, 1, 1, 2]
    nothing = runs_of(request, position, np.zeros(6, dtype=bool))
    assert nothing.index.tolist() == [] and nothing.lengths == []


def test_tokens_in_any_order_form_runs():
    """Tokens of earlier steps, which run again, come last."""
    runs = runs_of(np.array([0, 1, 1, 0]), np.array([3, 0, 1, 2]), np.ones(4, dtype=bool))
    assert runs.index.tolist() in ([3, 0, 1, 2], [1, 2, 3, 0]) and runs.lengths == [2, 2]
