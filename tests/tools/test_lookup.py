"""tools/evaluate/lookup.py: how many of an answer's tokens each layer would select."""

import pytest
import torch

import pop
from pop.pruning.reference import attention_scores
from tools.evaluate import lookup
from tools.evaluate.questions import Question

OPTIONS = ["--text", "a=TEXT", "--lengths", "700", "--questions", "2", "--last", "8"]


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TEXT").write_text("".join(f"Sentence {n} is about the number {n * n}. " for n in range(60)))


@pytest.mark.parametrize("begin", [1, 20, 46])
def test_each_layer_finds_what_the_reference_selects(loaded, begin):
    """A quarter of the tokens between the first and the last four."""
    prompt = torch.randint(60, (60,), generator=torch.Generator().manual_seed(begin)).tolist()
    prompt[begin : begin + 10] = answer = list(range(60, 70))
    found = lookup.found_by_layer(loaded, Question("made up", prompt, answer), 0.25, 4)
    for layer, share in enumerate(found):
        plan = pop.PrunePlan((layer + 1,), full_depth_selected=1.0)  # the layer before it selects
        scores = attention_scores(loaded.module, torch.tensor(prompt), plan)
        best = 1 + scores[1:-4].topk(13).indices  # of 55
        assert share == pytest.approx(sum(begin <= at < begin + 10 for at in best.tolist()) / 10)
    question = Question("made up", [*range(20)], [12, 13])
    assert lookup.found_by_layer(loaded, question, 0.5, 6) is not None
    assert lookup.found_by_layer(loaded, question, 0.5, 7) is None  # an answer in the prompt's end does not count


def test_the_table_has_a_row_for_each_layer(chat_folder, in_folder, capsys):
    assert lookup.main(["--model", str(chat_folder), *OPTIONS, "--share", "0.5"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["layer", "codes", "documents", "quotes-a", "mean"]
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3", "4"]
    for row in rows:
        *kinds, mean = (int(share.rstrip("%")) for share in row.split()[1:])
        assert all(0 <= share <= 100 for share in kinds) and abs(mean - sum(kinds) / 3) < 1.5
