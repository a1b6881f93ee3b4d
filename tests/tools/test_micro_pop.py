"""tools/examples/micro_pop.py: its cache against a pass without one, and what its table shows."""

import runpy
from pathlib import Path

import pytest
import torch
from support.nightly import NIGHTLY

SCRIPT = Path(__file__).parents[2] / "tools" / "examples" / "micro_pop.py"
micro = runpy.run_path(str(SCRIPT))
LAYERS = micro["LAYERS"]


@pytest.mark.parametrize("skipped", [(), (LAYERS - 1,)])
def test_the_boundary_token_equals_that_of_the_full_model(skipped):
    """So it does if prefill skips the last layer only, because no later layer reads what that layer adds."""
    torch.manual_seed(0)
    model = micro["Decoder"]()
    prompts, _ = micro["examples"](3)
    cache = micro["new_cache"](3)
    model(prompts[:, :-1], cache, skipped)
    boundary = model(prompts[:, -1:], cache)[:, 0]
    full = model(prompts, micro["new_cache"](3))[:, -1]
    torch.testing.assert_close(boundary, full)


@pytest.mark.parametrize("dropped", [0, 3])
def test_positions_go_on_if_the_keys_of_a_layer_are_dropped(dropped):
    """Without its output, a layer's keys and values do not matter, but the position of the next token does."""
    torch.manual_seed(0)
    model = micro["Decoder"]()
    torch.nn.init.zeros_(model.layers[dropped].output.weight)
    prompts, _ = micro["examples"](3)
    logits = []
    for drops in (False, True):
        cache = micro["new_cache"](3)
        model(prompts[:, :-1], cache)
        if drops:
            cache[dropped] = cache[dropped][:, :0]
        logits.append(model(prompts[:, -1:], cache))
    torch.testing.assert_close(*logits)


def test_it_fits_a_page():
    assert len(SCRIPT.read_text().splitlines()) <= 150


@pytest.mark.skipif(not NIGHTLY, reason="trains for half a minute")
def test_its_table_shows_what_it_claims(capsys):
    micro["main"]()
    lines = capsys.readouterr().out.splitlines()
    prefill = [float(line.split()[1]) for line in lines[3 : 3 + LAYERS]]
    assert max(prefill[LAYERS // 2 :]) < min(prefill[: LAYERS // 2])
    rows = [line.split()[-2:] for line in lines[-6:]]
    full, pruned, without_boundary, without_kv, nowhere, too_many = ([int(x.rstrip("%")) for x in row] for row in rows)
    assert full == pruned == [100, 100]
    assert max(without_boundary[1], without_kv[1], nowhere[1]) < 30
    assert without_kv[0] < 90
    assert max(too_many) < 60
