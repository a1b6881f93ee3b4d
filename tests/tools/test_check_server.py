"""tools/check_server.py: a served plan against full depth, on questions that the tiny model can answer."""

import json
import re
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from support.serving import fake, serving
from support.tiny_chat import begin_with_bos, write_chat_checkpoint

import pop
from pop.calibration.questions import KINDS, Question
from pop.calibration.verdict import Verdict
from pop.errors import InputError
from tools import check_server

pytest.importorskip("uvicorn")


@pytest.fixture
def no_questions(monkeypatch):
    """Making them takes longer than all else, and none is asked."""
    monkeypatch.setattr(check_server, "questions_of", lambda *_: ({}, None))


def answerable(model, plan, lengths=(40, 90), count=4):
    """Questions whose right answers are the full model's own, and how many of them a plan gets right."""
    questions = {}
    kept = {}
    for length in lengths:
        prompts = [[5 + (n * seed + seed) % 200 for n in range(length)] for seed in range(2, 2 + count)]
        full = model.generate(prompts, max_new_tokens=3, plan="none")
        pruned = model.generate(prompts, max_new_tokens=3, plan=plan)
        questions[length] = [Question("own", p, a.tokens) for p, a in zip(prompts, full, strict=True)]
        kept[length] = sum(a.text.strip() == b.text.strip() for a, b in zip(full, pruned, strict=True))
    return questions, kept


def test_the_plan_of_a_server_is_compared_with_its_full_depth(tmp_path, monkeypatch, capsys):
    folder = write_chat_checkpoint(tmp_path / "tiny", num_layers=6)
    model = pop.load(folder, prune="0-5", compile=False)
    questions, kept = answerable(model, "0-5")
    assert 0 < sum(kept.values()) < 8
    make_questions = Mock(side_effect=lambda writer, kinds, length, per_kind: questions[length])
    monkeypatch.setattr(check_server, "make_questions", make_questions)
    with serving(model, key="secret") as (_, url):
        words = [str(folder), "--url", url, "--lengths", "40,90", "--questions", "4"]
        assert check_server.main([*words, "--key", "secret"]) == 1  # the plan does not hold
        out = capsys.readouterr().out
        assert check_server.main(words) == 2
        err = capsys.readouterr().err
        assert "answers 401" in err and "asking" not in err  # known before the questions
    assert make_questions.call_args.args[2:] == (90, 4)
    cells = [f"{kept[length]} / 4 of 4" for length in (40, 90)]
    line = next(line for line in out.splitlines() if line.startswith("own"))
    assert line.split("  ")[0] == "own" and all(cell in line for cell in cells)
    assert f"it keeps {sum(kept.values()) / 8:.0%}" in out


@pytest.mark.parametrize(("owner", "said"), [("pop", {"plan": "none"}), ("vllm", {"vllm_xargs": {"pop_plan": "none"}})])
def test_a_plan_is_asked_for_in_the_words_of_the_server(owner, said):
    models = {"data": [{"id": "m", "owned_by": owner}]}
    with fake(models, lambda _: []) as url:
        assert check_server.Client(url).plan("none") == said


def test_a_server_may_tell_what_it_took_from_its_cache():
    answer = {"choices": [{"text": "a"}]}
    for usage in ({}, {"prompt_tokens_details": None}, None):
        assert check_server.text_and_details(answer | {"usage": usage}) == ("a", {})
    told = {"prompt_tokens_details": {"cached_tokens": 64}}
    assert check_server.text_and_details(answer | {"usage": told}) == ("a", {"cached_tokens": 64})
    assert not check_server.is_never([{}, {"cached_tokens": None}], "cached_tokens")


@pytest.mark.parametrize(("cached", "expected"), [(False, [(200, 3)]), (True, [(136, 1), (200, 3)])])
def test_a_cached_text_is_sent_before_its_question(cached, expected, tiny_folder):
    """With the plan and at full depth, since these share no cache."""
    tokenizer = pop.load_tokenizer(tiny_folder)
    sent = []
    client = SimpleNamespace(answer=lambda prompt, *asked: sent.append((len(prompt), *asked)) or "abc")
    questions = {200: [Question("own", [5] * 200, tokenizer.encode("abc", bos=False))]}
    verdict = check_server.compare(client, questions, tokenizer, {"plan": "none"}, cached)
    assert verdict.exact["own", 200].tolist() == [[True, True]]
    assert sent == [(*what, options) for options in ({}, {"plan": "none"}) for what in expected]


def test_questions_come_from_the_tokenizer_alone(tiny_folder):
    """Each kind at each length, in prompts of exactly that length."""
    questions, tokenizer = check_server.questions_of(tiny_folder, [900, 1200], 1, seed=3, texts=[])
    lengths = [[len(question.prompt) for question in group] for group in questions.values()]
    assert lengths == [[900] * len(KINDS), [1200] * len(KINDS)]
    assert {question.kind for question in questions[900]} >= {"codes", "brackets", "tool calls"}
    assert "\ufffd" not in tokenizer.decode(questions[900][0].answer)


def test_a_prompt_about_conversations_has_one_bos(tmp_path):
    folder = begin_with_bos(write_chat_checkpoint(tmp_path / "tiny"))
    said = [{"messages": [{"role": "user", "content": "Sphinx of black quartz. " * 5}]} for _ in range(9)]
    questions, tokenizer = check_server.questions_of(folder, [900], 1, 3, [[("line 1", chat) for chat in said]])
    assert {question.prompt.count(tokenizer.bos_id) for question in questions[900]} == {1}
    assert all("quartz" in tokenizer.decode(question.prompt) for question in questions[900])


def test_questions_can_be_about_a_text_of_ones_own(tiny_folder, tmp_path, monkeypatch, capsys):
    text = "Sphinx of black quartz, judge my vow. " * 200
    questions, tokenizer = check_server.questions_of(tiny_folder, [900], 1, 3, [text])
    assert all("quartz" in tokenizer.decode(question.prompt) for question in questions[900])
    (tmp_path / "mine.txt").write_text(text)
    made = Mock(return_value=(questions, tokenizer))
    monkeypatch.setattr(check_server, "questions_of", made)
    words = [tiny_folder, "--url", "http://127.0.0.1:1/v1", "--lengths", "900", "--questions", "1", "--text"]
    assert check_server.main([*words, str(tmp_path / "mine.txt")]) == 2
    assert made.call_args.args[-1] == [text]
    err = capsys.readouterr().err
    assert "does not answer" in err and err.count("\n") == 1  # there is no server
    assert check_server.main([*words, str(tmp_path / "missing.txt")]) == 2
    assert "missing.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("models", "completions", "says"),
    [
        ({}, {}, "other JSON"),
        ({"data": []}, {}, "other JSON"),
        ({"data": [{"id": "m"}]}, {}, "ignores the plan|other JSON"),
        ({"data": [{"id": "m"}]}, {"choices": [{"text": None}]}, "other JSON"),
        ({"data": [{"id": "m"}]}, ["x"], "other JSON"),
        ({"data": [{"id": "m"}]}, {"choices": [{"text": "x"}]}, "ignores the plan"),
        ({"data": [{"id": "m", "max_model_len": 930}]}, {"choices": [{"text": "x"}]}, "exceed the server's 930"),
        (b"no JSON", {}, "does not answer"),
    ],
)
@pytest.mark.usefixtures("no_questions")
def test_a_server_that_answers_otherwise_is_an_error_of_one_line(tiny_folder, models, completions, says, capsys):
    with fake(models, lambda _: [json.dumps(completions).encode()]) as url:
        status = check_server.main([tiny_folder, "--url", url, "--lengths", "900"])
    err = capsys.readouterr().err
    assert status == 2 and re.search(says, err) and err.count("\n") == 1


def test_a_plan_that_changes_no_answer_may_prune_nothing():
    alike = np.array([[True, True], [False, False]])
    other = np.array([[True, True], [True, False]])
    assert check_server.ALIKE in check_server.report(Verdict({}, {("codes", 900): alike}))
    assert check_server.ALIKE not in check_server.report(Verdict({}, {("codes", 900): alike, ("sums", 900): other}))


def test_a_server_without_a_right_answer_does_not_pass():
    exact = {("codes", 900): np.array([[True, False], [False, False]])}
    with pytest.raises(InputError, match="tokenizer"):
        check_server.report(Verdict({}, exact))


@pytest.mark.parametrize(
    ("right", "details", "status", "says"),
    [
        (2, [], 2, "give more --questions"),  # too few, even if the plan loses all of them
        (3, [], 1, "does not hold"),
        (3, [{"cached_tokens": 0}], 2, "has taken no token from its cache"),
        (3, [{"cached_tokens": 0}, {"cached_tokens": 64}], 1, "does not hold"),
        (3, [{"pruned_tokens": 0}], 2, "has pruned no token"),
        (3, [{"pruned_tokens": 0}, {"pruned_tokens": 64}], 1, "does not hold"),
    ],
)
@pytest.mark.usefixtures("no_questions")
def test_answers_that_judge_nothing_do_not_pass(right, details, status, says, tiny_folder, monkeypatch, capsys):
    """A plan that loses all right answers, of a server that tells how many tokens were pruned, or in its cache."""
    exact = {("codes", 900): np.array([[False, number < right] for number in range(3)])}
    monkeypatch.setattr(check_server, "Client", Mock(return_value=Mock(details=details)))
    monkeypatch.setattr(check_server, "compare", lambda *args: Verdict({}, exact))
    assert check_server.main([tiny_folder, "--cached"]) == status
    out, err = capsys.readouterr()
    assert f"0 / {right} of 3" in out and ("Nothing was judged" in out) == ("give more" in says)
    assert says in (out + err).replace("\n", " ")
