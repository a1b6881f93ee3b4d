"""tools/examples/json_schema.py: answers parse, and have the schema's keys, types and values."""

import json

import pytest
from support.tiny_chat import write_chat_checkpoint

import pop
from tools.examples.json_schema import JsonSchema

pytest.importorskip("llguidance", reason="llguidance is not installed (pip install llguidance)")

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["é", "cat"]}, "young": {"type": "boolean"}, "legs": {"enum": [2, 4]}},
    "required": ["kind", "young", "legs"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pop.load(write_chat_checkpoint(tmp_path_factory.mktemp("model"), vocab_size=270, eos_ids=(0,)))


def test_answers_follow_the_schema_alone_and_in_a_batch(model):
    schema = JsonSchema(model, SCHEMA)
    as_text = JsonSchema(model, json.dumps(SCHEMA))
    found = set()
    for seed in range(8):
        options = {"temperature": 3.0, "seed": seed, "max_new_tokens": 60, "logits_processor": schema}
        answers = model.generate(["A cat: ", "A bird, which has wings: "], **options)
        options["logits_processor"] = as_text
        assert [answer.tokens for answer in answers[:1]] == [model.generate("A cat: ", **options).tokens]
        for answer in answers:
            assert answer.finish_reason == "stop"
            value = json.loads(answer.text)
            assert answer.text == json.dumps(value, ensure_ascii=False)  # no white space but this
            assert list(value) == ["kind", "young", "legs"]
            assert value["kind"] in ("é", "cat") and value["young"] in (True, False) and value["legs"] in (2, 4)
            found.add(answer.text)
    assert len(found) > 2


def test_what_is_no_schema_is_refused(model):
    wrong = [({"type": "nothing"}, "cannot be used"), ("x", "schema is not JSON"), (int, "a dict"), (None, "a dict")]
    for schema, says in wrong:
        with pytest.raises(pop.InputError, match=says):
            JsonSchema(model, schema)


def test_a_schema_that_llguidance_gives_up_on_is_an_error_and_no_broken_json(model):
    pattern = {"type": "string", "pattern": "^(a?){300}a{300}$"}
    schema = JsonSchema(model, {"type": "object", "properties": {"a": pattern}, "required": ["a"]})
    with pytest.raises(pop.InputError, match="JSON schema cannot be followed"):
        model.generate("A: ", max_new_tokens=40, logits_processor=schema)
