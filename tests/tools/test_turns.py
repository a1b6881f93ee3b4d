"""tools/serve/turns.py, on servers that are slow in known turns."""

import json
import time

import pytest
from support.chat_models import PLANS, make
from support.serving import fake, serving

from tools.serve import kept_logits, turns


def delayed(name, delays, seen, models=True):
    """A server with the model `name`. It waits delays[n] seconds before its answer in turn n.

    It notes the requests in `seen`.
    """

    def answer(body):
        seen.append((name, body))
        texts = [name, str(len(seen))]
        yield event({"choices": [{"delta": {"role": "assistant"}}]})
        time.sleep(delays[len(body["messages"]) // 2])
        yield from (event({"choices": [{"delta": {"content": text}}]}) for text in texts)
        yield event({"choices": [], "usage": {}}) + b"data: [DONE]\n\n"

    return fake({"data": [{"id": name}]} if models else None, answer)


def event(content):
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def test_each_server_has_its_own_conversation_and_its_own_times(tmp_path, capsys):
    seen = []
    path = tmp_path / "turns.json"
    with delayed("a", [0, 0.5, 0], seen) as first, delayed("b", [0.5, 0, 0], seen) as second:
        options = ["--turns", "3", "--new-tokens", "7", "--json", str(path)]
        assert turns.main([first, f"{second}#mine", *options]) == 0
    figures = json.loads(path.read_text())
    assert figures["servers"] == [{"url": first, "model": "a"}, {"url": second, "model": "mine"}]
    slow = [[seconds >= 0.5 for seconds in row] for row in figures["ttft_s"]]
    assert slow == [[False, True], [True, False], [False, False]]

    assert [name for name, _ in seen] == ["a", "b", "a", "b", "b", "a", "a", "b"]  # two of them warm up
    texts = kept_logits.conversation(3)
    last = dict(seen[2:])
    for name, number in (("a", (3, 6)), ("b", (4, 5))):
        said = [message["content"] for message in last[name]["messages"]]
        assert said == [texts[0], f"{name}{number[0]}", texts[1], f"{name}{number[1]}", texts[2]]
        assert last[name]["temperature"] == 0
        assert last[name]["max_tokens"] == 7

    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["turn", first, f"{second}#mine"]
    assert [line[0] for line in lines[1:5]] == ["1", "2", "3", "median"]
    assert int(lines[2][1]) == round(1e3 * figures["ttft_s"][1][0])


def test_the_server_of_this_folder_answers(monkeypatch, capsys):
    pytest.importorskip("uvicorn")
    pytest.importorskip("tools.serve.app")
    monkeypatch.setattr(kept_logits, "PASSAGE", 20)
    with serving(make("llama", PLANS["the paper's"])) as (_, url):
        assert turns.main([url, "--turns", "2", "--new-tokens", "8"]) == 0
    assert "median" in capsys.readouterr().out


@pytest.mark.parametrize("data", [b"no JSON", b'{"error": {"message": "no memory"}}', b'{"choices": [{}]}', b"[]"])
def test_an_event_that_is_no_part_of_an_answer_ends_the_run(data):
    with pytest.raises(turns.InputError, match="which is no part of an answer"):
        turns.piece_of(turns.Server("http://here/v1", "m"), data)


def test_a_server_that_lists_no_models_is_asked_for_the_one_that_is_named():
    """transformers' server fails to list its models without a cache of the hub."""
    seen = []
    with delayed("a", [0], seen, models=False) as url:
        assert turns.main([f"{url}#other", "--turns", "1"]) == 0
        assert turns.main([url, "--turns", "1"]) == 2
    assert {body["model"] for _, body in seen} == {"other"}
