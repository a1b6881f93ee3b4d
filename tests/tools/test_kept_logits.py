"""tools/serve/kept_logits.py: the logits of a conversation, against the one-page reference."""

import pytest
import torch
import torch.nn.functional as F

import pop
from pop.pruning import reference
from tools.serve import kept_logits
from tools.serve.engine import Engine

PLAN = pop.PrunePlan((1, 3, 4), full_depth_last=3)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(kept_logits, "PASSAGE", 30)


def test_the_figures_are_those_of_the_reference(tiny_folder, monkeypatch):
    calls = []
    answer = kept_logits.answer

    def watched(engine, prompt, *args, **options):
        calls.append((prompt, answer(engine, prompt, *args, **options)))
        return calls[-1][1]

    monkeypatch.setattr(kept_logits, "answer", watched)
    model = pop.load(tiny_folder, dtype=torch.float32, prune=PLAN, compile=False)
    found = kept_logits.compare(model, 2, 4)
    (begin, first), (prompt, kept), (_, empty) = calls
    assert empty.tokens == kept.tokens
    assert found["is_first"].tolist() == [True] + [False] * len(kept.tokens)

    cached = int(found["cached"])
    answered = torch.ones(len(first.tokens), dtype=torch.bool)
    held = torch.cat([PLAN.at_full_depth(torch.arange(len(begin)), len(begin)), answered])
    fresh = PLAN.at_full_depth(torch.arange(len(prompt)), len(prompt))
    later = torch.ones(len(kept.tokens), dtype=torch.bool)
    assert len(begin) <= cached <= len(held)
    tokens = torch.tensor([*prompt, *kept.tokens])

    def logits(full_depth):
        return reference.forward(model.module, tokens, full_depth, PLAN)[0][len(prompt) - 1 :]

    on_kept = logits(torch.cat([held[:cached], fresh[cached:], later]))
    on_empty = logits(torch.cat([fresh, later]))
    spread = on_empty.std(-1)
    expected = {
        "difference": (on_kept - on_empty).abs().amax(-1) / spread,
        "kl": F.kl_div(on_kept.log_softmax(-1), on_empty.log_softmax(-1), log_target=True, reduction="none").sum(-1),
        "margin": (on_empty.amax(-1) - on_empty[range(len(spread)), on_kept.argmax(-1)]) / spread,
    }
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-5)
    assert expected["difference"].min() > 0.01


def test_the_table_has_a_line_for_first_and_for_later_tokens(tiny_folder, capsys):
    assert kept_logits.main([tiny_folder, "--prune", "none", "--turns", "3", "--new-tokens", "4", "--no-compile"]) == 0
    _, *lines, _, about, _ = capsys.readouterr().out.splitlines()
    cells = [line.split() for line in lines]
    assert [row[:4] for row in cells[:2]] == [["none", "bfloat16", "first", "2"], ["none", "bfloat16", "later", "6"]]
    assert [row[1] for row in cells] == ["bfloat16"] * 2 + ["float32"] * 2
    for _, _, _, _, median, largest, kl, other, *_ in cells[2:]:
        assert 0 <= float(median) <= float(largest) < 1e-4
        assert abs(float(kl)) < 1e-6
        assert other == "0"
    cached, prompts = (int(word.replace(",", "")) for word in about.split()[:3:2])
    assert 0 < cached < prompts


def test_an_answer_takes_the_tokens_that_it_is_given(tiny_folder):
    model = pop.load(tiny_folder, dtype=torch.float32, prune=None, compile=False)
    forced = kept_logits.answer(Engine(model, 1, 1, 0), [5, 6, 7], 4, forced=[70, 71, 72])
    assert forced.tokens == [70, 71, 72]
    tokens = torch.tensor([5, 6, 7, 70, 71, 72])
    torch.testing.assert_close(forced.logits, model.logits(tokens[None])[0, 2:], rtol=1e-4, atol=1e-4)
