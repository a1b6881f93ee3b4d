"""tools/check_chats.py: answers to logged requests, with a server's plan and without."""

import json
from types import SimpleNamespace

import pytest
from support.serving import serving
from support.tiny_chat import begin_with_bos, write_chat_checkpoint

import pop
from pop.errors import InputError
from tools import check_chats
from tools.check_server import said
from tools.vllm import prompts

pytest.importorskip("uvicorn")

QUESTIONS = [[{"role": "user", "content": f"What is {number} times {number}?"}] for number in range(6)]


@pytest.fixture
def requests(tmp_path):
    """A file of requests, of which every other has its answer."""
    answer = {"role": "assistant", "content": "A number.", "refusal": None}
    lines = [{"messages": [*messages, answer][: 1 + n % 2]} for n, messages in enumerate(QUESTIONS)]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(path)


def test_each_request_is_answered_with_the_plan_and_twice_at_full_depth(requests, tiny_folder, tmp_path, capsys):
    model = pop.load(tiny_folder, prune="0-4", compile=False)
    out = tmp_path / "answers.jsonl"
    with serving(model) as (_, url):
        words = [requests, "--out", str(out), "--url", url, "--max-tokens", "8"]
        assert check_chats.main(words) == 0
    table = capsys.readouterr().out
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["messages"] for answer in answers] == QUESTIONS
    for way, plan in (("plan", None), ("full depth", "none"), ("full depth again", "none")):
        texts = [model.chat(messages, max_new_tokens=8, temperature=0, plan=plan).text for messages in QUESTIONS]
        assert [answer[way] for answer in answers] == texts
    equal = sum(answer["plan"] == answer["full depth"] for answer in answers)
    assert equal < 6
    plan, again = table.splitlines()[1:3]
    assert f"{equal} of 6" in plan and "6 of 6" in again and "100%" in again


def test_a_plan_that_prunes_nothing_is_said_after_the_answers_are_written(requests, tiny_folder, tmp_path, capsys):
    model = pop.load(tiny_folder, prune=pop.PrunePlan((3, 4), full_depth_below=999), compile=False)
    out = tmp_path / "answers.jsonl"
    with serving(model) as (_, url):
        words = [requests, "--out", str(out), "--url", url, "--max-tokens", "2"]
        assert check_chats.main(words) == 2
    assert "pruned no token" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 6


def test_the_table_counts_equal_answers_and_equal_beginnings():
    rows = [("abcd", "abcd", "abcd"), ("abx", "abcd", "ab"), ("", "ab", "ab"), ("", "", "")]
    table = check_chats.report([dict(zip(check_chats.WAYS, row, strict=True)) for row in rows])
    plan, again = (line.split() for line in table.splitlines()[1:])
    assert (plan[-4:], again[-4:]) == (["2", "of", "4", "60%"], ["3", "of", "4", "80%"])


def test_a_refused_request_does_not_lose_the_others():
    def chat(request):
        if request["messages"] == QUESTIONS[1]:
            raise InputError("too long")
        return "Hi"

    requests = [{"messages": messages} for messages in QUESTIONS[:3]]
    answers = check_chats.ask(SimpleNamespace(chat=chat), requests, {}, 5)
    assert [[*one] for one in answers] == [[*check_chats.WAYS], ["error"], [*check_chats.WAYS]]
    table = check_chats.report(answers)
    assert "2 of 2" in table and "Requests that were refused: 1. The first: too long" in table


@pytest.mark.parametrize(
    ("answers", "says"),
    [([dict.fromkeys(check_chats.WAYS, "")], "no answer has text$"), ([{"error": "too long"}], "says: too long")],
)
def test_without_a_text_nothing_is_compared(answers, says):
    with pytest.raises(InputError, match=says):
        check_chats.report(answers)


def test_an_answer_may_call_tools():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert said({"choices": [{"message": {"content": None, "tool_calls": [call]}}]}) == 'f({"a": 1})'
    assert said({"choices": [{"message": {"content": "Hi", "reasoning": "Hm."}}]}) == "Hm.Hi"


def test_a_request_without_a_question_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"messages": [{"role": "assistant", "content": "Hi"}]}')
    with pytest.raises(InputError, match="log.jsonl, line 1 holds no question"):
        check_chats.questions_in(str(path))


def test_requests_become_prompts_for_a_benchmark(requests, tmp_path, capsys):
    """As the server gets them: without the answers, and without BOS."""
    folder = begin_with_bos(write_chat_checkpoint(tmp_path / "tiny"))
    out = tmp_path / "prompts.jsonl"
    assert prompts.main([str(folder), requests, str(out)]) == 0
    lines = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    assert lines == [f"<|im_start|>What is {number} times {number}?<|im_end|>" for number in range(6)]
    parts = [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]
    (tmp_path / "parts.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    assert prompts.prompts_of(str(folder), str(tmp_path / "parts.jsonl")) == ["<|im_start|>One.\nTwo.<|im_end|>"]
    (tmp_path / "odd.jsonl").write_text(json.dumps({"messages": [{"role": "user", "name": "A"}]}))
    assert prompts.main([str(folder), str(tmp_path / "odd.jsonl"), str(tmp_path / "none")]) == 2
    assert "request 1: message 0" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_what_decides_the_form_of_an_answer_is_sent(tmp_path):
    sent = {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"}
    sent |= {"response_format": {"type": "json_object"}, "chat_template_kwargs": {"enable_thinking": False}}
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"messages": QUESTIONS[1], "temperature": 1, "stop": None} | sent))
    assert check_chats.questions_in(str(path)) == [{"messages": QUESTIONS[1]} | sent]
    folder = begin_with_bos(write_chat_checkpoint(tmp_path / "tiny"))
    path.write_text(json.dumps({"messages": QUESTIONS[1]} | sent | {"tools": None}))
    assert prompts.prompts_of(str(folder), str(path)) == ["<|im_start|>What is 1 times 1?<|im_end|>"]
    assert [prompts.as_text(one) for one in check_chats.questions_in(str(path))] == [
        {"messages": QUESTIONS[1], "tools": None, "enable_thinking": False}
    ]
