"""tools/evaluate/lookup.py: how many of an answer's tokens each layer would select."""

import pytest
import torch

import pop
from pop.calibration.lookup import found_by_layer
from pop.pruning.reference import attention_scores
from tools.evaluate.lookup import report


@pytest.mark.parametrize("begin", [1, 20, 46])
def test_each_layer_finds_what_the_reference_selects(loaded, begin):
    """A quarter of the tokens between the first and the last four."""
    prompt = torch.randint(60, (60,), generator=torch.Generator().manual_seed(begin)).tolist()
    prompt[begin : begin + 10] = answer = list(range(60, 70))
    found = found_by_layer(loaded, prompt, answer, 0.25, 4)
    for layer, share in enumerate(found):
        plan = pop.PrunePlan((layer + 1,), full_depth_selected=1.0)  # the layer before it selects
        scores = attention_scores(loaded.module, torch.tensor(prompt), plan)
        best = 1 + scores[1:-4].topk(13).indices  # of 55
        assert share == pytest.approx(sum(begin <= at < begin + 10 for at in best.tolist()) / 10)
    prompt = [*range(20)]
    assert found_by_layer(loaded, prompt, [12, 13], 0.5, 6) is not None
    assert found_by_layer(loaded, prompt, [12, 13], 0.5, 7) is None  # an answer in the prompt's end does not count


FOUND = {"codes": torch.tensor([0.5, 0.2, 0.9, 0.3, 0.8]), "quotes": torch.tensor([0.1, 0.4, 0.3, 0.6, 0.8])}


@pytest.mark.parametrize(
    ("layers", "marked", "fields"),
    [
        ((2, 4), "3*", "full_depth_selected=0.03, selecting_layer=3"),
        ((1, 3), "2*", "selecting_layer=2"),
        ((2, 3), "0*", "selecting_layer=0"),  # the layers 1 and 0 find as much
        ((0, 1), None, "No layer may select"),
        ((), None, "No layer may select"),
    ],
)
def test_the_best_layer_that_a_plan_may_take_is_marked(layers, marked, fields):
    text = report(pop.PrunePlan(layers), FOUND, 0.03)
    lines = [line.split() for line in text.splitlines() if line]
    assert lines[0] == ["layer", "codes", "quotes", "mean"]
    assert [line[0] for line in lines[1:6] if line[0].endswith("*")] == ([marked] if marked else [])
    assert lines[5][-3:] == ["80%", "80%", "80%"]
    assert fields in text.splitlines()[-1]
