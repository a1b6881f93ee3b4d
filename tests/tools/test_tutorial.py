"""tools/examples/tutorial.ipynb: its code runs, computes what the library computes, and shows what its text says.

By default it runs on a tiny random model and little text. HYPOTHESIS_PROFILE=nightly runs it on SmolLM2, as it is.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.nightly import NIGHTLY
from support.tiny_chat import write_chat_checkpoint

import pop
from pop.pruning import reference

NOTEBOOK = Path(__file__).parents[2] / "tools" / "examples" / "tutorial.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def execute() -> dict:
    """Run the code cells in one namespace, which is returned. Figures are drawn, but not shown."""
    matplotlib = pytest.importorskip("matplotlib")
    before = matplotlib.get_backend()
    matplotlib.use("agg")
    names = {}
    try:
        for number, cell in enumerate(CODE, start=1):
            exec(compile("".join(cell["source"]), f"tutorial.ipynb, code cell {number}", "exec"), names)
    finally:
        matplotlib.pyplot.close("all")
        matplotlib.use(before)
    return names


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The notebook's names after it has run on a tiny model that stands for SmolLM2."""
    folder = write_chat_checkpoint(tmp_path_factory.mktemp("models") / "tiny", num_layers=6)
    load = pop.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POP_TUTORIAL", "short")
        patch.setattr(pop, "load", lambda name, **options: load(folder, **options))
        return execute()


@pytest.mark.parametrize("pruned", [(), (5,), (1, 4), (0, 1, 2, 3, 4, 5)])
def test_the_method_in_ten_lines_is_the_references(short, pruned):
    tokens, full_depth = short["test"][0], torch.arange(short["WINDOW"]) % 7 == 3
    expected, _ = reference.forward(short["module"], tokens, full_depth, pop.PrunePlan(pruned))
    torch.testing.assert_close(short["pruned_pass"](tokens, full_depth, pruned), expected)


@pytest.mark.parametrize("previous", [False, True])
def test_the_fit_by_hand_is_ridge_regression(short, previous):
    """By lstsq, with the pull toward zero as further rows."""
    h = short["entering"][short["half"][0]]
    X = short["inputs"](h, previous)[:, 1:].flatten(0, 1).double().numpy()
    pull = np.sqrt(0.1 * len(X)) * np.eye(X.shape[1])
    for found, index in zip(short["fit"](short["half"], previous), short["half"], strict=True):
        own = torch.cat(short["module"].layers[index].projected(h), dim=-1)
        R = (short["targets"][index] - own)[:, 1:].flatten(0, 1).double().numpy()
        rows = np.concatenate([R, np.zeros((X.shape[1], R.shape[1]))])
        expected = np.linalg.lstsq(np.concatenate([X, pull]), rows, rcond=None)[0].T
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_each_point_of_the_frontier_is_of_its_own_plan(short):
    assert list(short["depths"]) == [1, 2, 3, 4]
    for name, plans in short["frontier"].items():
        assert [plan.layers for plan in plans] == list(short["depths"].values())
        assert {plan.corrections is None for plan in plans} == {name == "plain"}
        assert short["limits"][name] == sorted(short["limits"][name])
        assert short["lost"][name][2] == short["losses"](plans[2])


def test_the_outputs_are_those_of_one_run_and_small():
    assert NOTEBOOK.stat().st_size < 300_000
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}  # no warnings
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 5
    for cell in CODE:  # a line that is new has been run
        shown = "".join(line for output in cell["outputs"] for line in output.get("text", ()))
        labels = re.findall(r'print\(f?"(?:\\n)?([^"{\\]+)', "".join(cell["source"]))
        assert all(label in shown for label in labels), labels


@pytest.mark.skipif(not NIGHTLY, reason="takes minutes; nightly")
def test_on_the_real_model_the_numbers_are_as_the_text_says(smollm2):
    names = execute()
    assert names["decode_token"] > 2 * names["prefill_token"]
    continuing, copying, looking_up = names["scores"].values()
    assert continuing.prefill[-1] == 0
    assert continuing.prefill[-10:].sum() / continuing.prefill.sum() < 0.1
    assert continuing.decode[-10:].sum() / continuing.decode.sum() > 0.2
    for found, peak in ((copying, 17), (looking_up, 16)):
        assert found.prefill[8:].argmax() == peak - 8
        assert found.prefill[peak] - found.prefill_error[peak] > found.prefill[18:].max()

    at_full_depth, eight, no_boundary, dropped = names["first_kl"].values()
    assert eight < at_full_depth < 1 and no_boundary > 10 * at_full_depth and dropped > 10 * at_full_depth
    at_full_depth, _, no_boundary, dropped = names["later_kl"].values()
    assert max(at_full_depth, no_boundary) < 0.3 and dropped > 10 * at_full_depth

    (own_k, own_v), (one_k, one_v), (two_k, two_v) = (curve.mean(-1) for curve in names["curves"].values())
    assert own_v < own_k < one_k < two_k and own_v + 0.1 < min(one_v, two_v)
    kl = names["half_kl"]
    assert max(kl["with the previous token"], kl["corrected"]) < kl["plain"] / 5

    third, half = 1, 2  # of the depths
    lost = names["lost"]
    _, one_copied = lost["corrected"][half]
    two_kl, two_copied = lost["with the previous token"][half]
    third_kl, third_copied = lost["plain"][third]
    assert two_kl < third_kl
    assert one_copied + 0.1 < two_copied < third_copied - 0.1

    assert not names["verdict"].holds
