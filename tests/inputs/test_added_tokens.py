"""Tokens added to a tokenizer: the ids of the originals, the files that may hold them, and those that are refused."""

import json
import random
from itertools import pairwise

import pytest
from support.goldens import REFUSED
from support.text import GOLDENS, load, spec_of, train

from pop.errors import TokenizerError
from pop.inputs.tokenizers import load_tokenizer

ADDED = json.loads((GOLDENS / "added.json").read_bytes())


def with_added(family: str) -> dict:
    """The family's tokenizer.json with the tokens that the golden adds."""
    spec, added = spec_of(family), ADDED[family]["added"]
    names = {token["content"] for token in added}
    kept = [token for token in spec["added_tokens"] if token["content"] not in names]
    return spec | {"added_tokens": kept + added}


def beside_a_model(*added: dict) -> dict:
    """What is read of a tokenizer.json that lies beside a tokenizer.model."""
    return {"normalizer": {"type": "Replace"}, "added_tokens": added}


@pytest.mark.parametrize("family", ["llama-3.1", "qwen3", "gemma3"])
def test_ids_are_the_originals(family, tmp_path):
    """Gemma's come from a tokenizer.json without a tokenizer.model."""
    tokenizer, golden = load(with_added(family), tmp_path), ADDED[family]
    for text, as_text, with_special in zip(ADDED["texts"], golden["as_text"], golden["with_special"], strict=True):
        assert tokenizer.encode(text) == as_text, ascii(text)
        assert tokenizer.encode(text, allow_special=True) == with_special, ascii(text)
    for token in golden["added"]:
        assert tokenizer.token_bytes(token["id"]) == (b"" if token["special"] else token["content"].encode())
        assert (token["content"] in tokenizer.special_tokens) == token["special"]


def test_gemmas_come_from_either_file(tmp_path):
    """A tokenizer.model, which lies beside it, lacks them."""
    model = train()
    tool = {"content": "<tool>", "special": False}
    new = {"content": "<|new|>", "special": True}
    sources = {
        "tokenizer.json": beside_a_model({"id": 500} | tool, {"id": 501} | new),
        "tokenizer_config.json": {"added_tokens_decoder": {"500": tool, "501": new}},
    }
    for source, content in sources.items():
        folder = tmp_path / source
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(model)
        (folder / source).write_text(json.dumps(content))
        tokenizer = load_tokenizer(folder)
        a, b = (tokenizer.encode(text, bos=False) for text in ("a", "b"))
        assert tokenizer.encode("a<tool>b", bos=False) == [*a, 500, *b]
        assert tokenizer.special_tokens["<|new|>"] == 501 and 501 not in tokenizer.encode("<|new|>")
        assert tokenizer.encode("<|new|>", bos=False, allow_special=True) == [501]
        assert tokenizer.decode([*a, 500, 501]) == "a<tool>" and tokenizer.vocab_size == 502
        assert tokenizer.unused_ids == []


def test_those_of_the_configuration_count_more(tmp_path):
    spec = spec_of("smollm2")
    free = len(spec["model"]["vocab"])
    spec["added_tokens"].append({"id": free, "content": "<x>", "special": True})
    listed = {str(free + n): {"content": name, "special": name == "<y>"} for n, name in enumerate(("<x>", "<y>"))}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed, "pad_token": "<z>"}))
    tokenizer = load(spec, tmp_path)
    assert tokenizer.added_tokens["<x>"] == free and tokenizer.special_tokens["<y>"] == free + 1
    assert tokenizer.vocab_size == free + 2  # <z> gets no id
    assert tokenizer.template_variables == {"pad_token": "<z>"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"added_tokens_decoder": [{"lstrip": True}]}, "lstrip"),
        ({"add_prefix_space": True}, "add_prefix_space"),
        ({"split_special_tokens": True}, "split_special_tokens"),
    ],
)
def test_settings_that_change_ids_in_transformers_are_refused(config, message, tmp_path):
    spec = spec_of("smollm2")
    if config.get("added_tokens_decoder"):
        listed = {token["id"]: token | config["added_tokens_decoder"][0] for token in spec["added_tokens"]}
        config = {"added_tokens_decoder": listed}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match=message):
        load(spec, tmp_path)


def test_a_gap_before_the_added_tokens_is_refused(tmp_path):
    """transformers numbers such tokens anew, so all control tokens would differ."""
    spec = spec_of("qwen3")
    spec["model"]["vocab"].popitem()
    with pytest.raises(TokenizerError, match=r"'<\|endoftext\|>' has the id (\d+).*gap"):
        load(spec | {"model": spec["model"] | {"merges": []}}, tmp_path)


def test_some_are_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train())
    (the,) = load_tokenizer(tmp_path).encode("the", bos=False)
    for token, message in (
        ({"id": 500, "content": "<x>", "lstrip": True}, "lstrip"),
        ({"id": 5, "content": "<x>"}, "the id 500"),
        ({"id": 10**12, "content": "<x>"}, "the id 500"),
        ({"id": 502, "content": "<x>"}, "the id 500"),
        ({"id": 500, "content": ""}, "a text"),
        ({"id": 0, "content": "<table>"}, "the id 6"),
        ({"id": the, "content": "the", "special": True}, "merges into the special token .the"),  # ordinary text would
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(beside_a_model({"special": False} | token)))
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(tmp_path)


def test_other_sentencepiece_in_a_tokenizer_json_is_refused(tmp_path):
    for *path, key, value, message in REFUSED["tokenizer.json of sentencepiece"]:
        spec = part = spec_of("gemma3")
        for parent in path:
            part = part[parent]
        part[key] = value
        with pytest.raises(TokenizerError, match=message):
            load(spec, tmp_path)


def test_of_overlapping_tokens_the_first_and_longest_counts(tmp_path):
    """In a tokenizer.model, runs of newlines are symbols that are sought together with added tokens."""
    (tmp_path / "tokenizer.model").write_bytes(train())
    plain = load_tokenizer(tmp_path)
    x, y, newlines = (plain.encode(text, bos=False) for text in ("x", "y", "\n\n\nHuman:"))
    names = ["\n\nHuman:", "a\n\nb", "the ing"]
    added = [{"id": 500 + n, "content": name, "special": False} for n, name in enumerate(names)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(beside_a_model(*added)))
    tokenizer = load_tokenizer(tmp_path)
    for id, name in enumerate(names, 500):
        assert tokenizer.encode(f"x{name}y", bos=False) == [*x, id, *y]
        assert tokenizer.decode([id]) == name
    assert tokenizer.encode("\n\n\nHuman:", bos=False) == newlines
    spec = spec_of("qwen3")
    free = max(token["id"] for token in spec["added_tokens"]) + 1
    spec["added_tokens"] += [
        {"id": free + n, "content": c, "special": False} for n, c in enumerate(("<thi", "<think>>"))
    ]
    (tmp_path / "qwen3").mkdir()
    tokenizer = load(spec, tmp_path / "qwen3")
    think = tokenizer.encode("<think>")
    assert tokenizer.encode("<thi<think><think>>") == [free, *think, free + 1] and len(think) == 1


def merged_one_by_one(spec: dict, text: str) -> list[int]:
    """The ids of a text without added tokens: all neighbours are compared again after each merge."""
    vocab, merges = spec["model"]["vocab"], {tuple(pair): n for n, pair in enumerate(spec["model"]["merges"])}
    parts = []
    for char in text.replace(" ", "\u2581"):
        parts += [char] if char in vocab else [f"<0x{byte:02X}>" for byte in char.encode()]
    while pairs := [(merges[pair], n) for n, pair in enumerate(pairwise(parts)) if pair in merges]:
        _, n = min(pairs)
        parts[n : n + 2] = ["".join(parts[n : n + 2])]
    return [vocab[part] for part in parts]


@pytest.mark.parametrize("seed", range(4))
def test_merges_are_followed_as_listed(tmp_path, seed):
    """In any order, and if some of the pairs that make a token are not listed."""
    spec, draw = spec_of("gemma3"), random.Random(seed)
    merges = spec["model"]["merges"]
    spec["model"]["merges"] = merges if seed == 0 else draw.sample(merges, len(merges) * 3 // 4)
    tokenizer = load(spec, tmp_path)
    pool = [name for name in spec["model"]["vocab"] if name.isalpha()] + [*" \u4e2d\u00e9\u00bd~", "\U0001f44d"]
    for _ in range(100):
        text = "".join(draw.choices(pool, k=12))
        assert tokenizer.encode(text, bos=False) == merged_one_by_one(spec, text), ascii(text)


def test_a_token_can_be_reserved(tmp_path):
    """A chat format may use a token that is not special."""
    tokenizer = load(with_added("qwen3"), tmp_path)
    (id,) = tokenizer.encode("<tool>")
    reserved = tokenizer.reserving(["<tool>", "<|im_end|>", "nowhere"])
    assert id not in reserved.encode("a<tool>b") and reserved.encode("<tool>", allow_special=True) == [id]
    assert reserved.special_tokens["<tool>"] == id and "<tool>" not in tokenizer.special_tokens
    assert tokenizer.encode("<tool>") == [id] and tokenizer.reserving([]) is tokenizer
