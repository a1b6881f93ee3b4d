"""Answers as they grow: text in whole characters, up to an end token or a stop string."""

from hypothesis import given
from hypothesis import strategies as st
from support.letters import Letters

from pop.generation.answers import Answer


@given(st.text(min_size=1, max_size=20), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_any_text_streams_in_whole_characters_and_stops_where_it_should(text, stop):
    answer = Answer(Letters(), frozenset({255}), stop, max_new_tokens=len(text.encode()), seed=0)
    pieces = [answer.push(byte) for byte in text.encode()]
    # The stop string whose end comes first ends the answer; of several that end there, the longest.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    expected = text[: min(ends)[1]] if ends else text
    assert "".join(pieces) == answer.text == expected
    assert answer.finish_reason == ("stop" if ends else "length")
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_a_character_cut_by_the_end_is_shown_as_such():
    first, second = "é".encode()
    assert Answer(Letters(), frozenset(), [], max_new_tokens=1, seed=0).push(first) == "\ufffd"
    answer = Answer(Letters(), frozenset({255}), [], max_new_tokens=5, seed=0)
    assert [answer.push(byte) for byte in (first, second, first, 255, 65)] == ["", "é", "", "\ufffd", ""]
    assert (answer.text, answer.finish_reason, answer.tokens) == ("é\ufffd", "stop", [first, second, first])
