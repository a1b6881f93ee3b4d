"""Tokens added to a tokenizer: the ids of the originals, the files that may hold them, and those that are refused."""

import json
import random

import pytest
from support.text import GOLDENS, assert_golden, load, naive_bpe, spec_of, train

from pop.errors import TokenizerError
from pop.inputs.tokenizers import load_tokenizer

ADDED = json.loads((GOLDENS / "added.json").read_bytes())


def with_added(family: str) -> dict:
    """The family's tokenizer.json with the tokens that the golden adds."""
    spec, added = spec_of(family), ADDED[family]["added"]
    names = {token["content"] for token in added}
    kept = [token for token in spec["added_tokens"] if token["content"] not in names]
    return spec | {"added_tokens": kept + added}


@pytest.mark.parametrize("family", ["llama-3.1", "qwen3", "gemma3"])
def test_ids_are_the_originals(family, tmp_path):
    """Gemma's come from a tokenizer.json without a tokenizer.model."""
    tokenizer = load(with_added(family), tmp_path)
    assert_golden(tokenizer, ADDED[family], ADDED["texts"])
    for token in ADDED[family]["added"]:
        assert tokenizer.token_bytes(token["id"]) == (b"" if token["special"] else token["content"].encode())
        assert (token["content"] in tokenizer.special_tokens) == token["special"]


def test_gemmas_come_from_any_file(tmp_path):
    """A tokenizer.model, which lies beside it, lacks them."""
    model = train()
    tool = {"content": "<tool>", "special": False}
    new = {"content": "<|new|>", "special": True}
    sources = {
        "tokenizer.json": {"added_tokens": [{"id": 500} | tool, {"id": 501} | new], "model": {}},
        "tokenizer_config.json": {"added_tokens_decoder": {"500": tool, "501": new}},
        "added_tokens.json": {"<tool>": 500, "<|new|>": 501},
    }
    for source, content in sources.items():
        folder = tmp_path / source
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(model)
        (folder / source).write_text(json.dumps(content))
        (folder / "special_tokens_map.json").write_text('{"other_token": {"content": "<|new|>"}}')
        tokenizer = load_tokenizer(folder)
        a, b = (tokenizer.encode(text, bos=False) for text in ("a", "b"))
        assert tokenizer.encode("a<tool>b", bos=False) == [*a, 500, *b]
        assert tokenizer.special_tokens["<|new|>"] == 501 and 501 not in tokenizer.encode("<|new|>")
        assert tokenizer.encode("<|new|>", bos=False, allow_special=True) == [501]
        assert tokenizer.decode([*a, 500, 501]) == "a<tool>" and tokenizer.vocab_size == 502
        assert tokenizer.unused_ids == []


# The added tokens of SmolLM2, as a tokenizer_config.json lists them.
LISTED = {token["id"]: token for token in spec_of("smollm2")["added_tokens"]}
X, Y = ({"content": content, "special": True} for content in ("<x>", "<y>"))
SEVERAL = {"additional_special_tokens": ["<|im_end|>", "<x>", {"content": "<y>"}], "add_bos_token": True}
SEVERAL |= {"eos_token": {"content": "</s>", "special": True}, "unk_token": None}


@pytest.mark.parametrize(
    ("config", "special_map", "expected"),
    [  # as transformers 5.19 reads them: first bos_token, eos_token and the like, then those of lists
        (SEVERAL, {"pad_token": "[PAD]"}, ["</s>", "[PAD]", "<x>", "<y>"]),
        ({"extra_special_tokens": {"image": "<y>"}, "additional_special_tokens": ["<x>"]}, {}, ["<y>", "<x>"]),
        ({"extra_special_tokens": ["<y>"], "additional_special_tokens": ["<x>"]}, {}, ["<y>"]),
        ({"eos_token": "<x>"}, {"eos_token": Y}, ["<y>"]),
        ({"b_token": "<y>"}, {"a_token": "<x>"}, ["<x>", "<y>"]),
        ({"added_tokens_decoder": [X]}, {"eos_token": "<y>"}, ["<x>"]),
        ({"added_tokens_decoder": [X, Y | {"special": False}], "eos_token": "<z>"}, {}, ["<x>", "<y>", "<z>"]),
    ],
)
def test_tokens_that_other_files_name_get_the_ids_of_transformers(config, special_map, expected, tmp_path):
    """The next free ones. The older files do not count beside added_tokens_decoder."""
    spec = spec_of("smollm2")
    free = len(spec["model"]["vocab"])
    if "added_tokens_decoder" in config:
        listed = LISTED | dict(enumerate(config["added_tokens_decoder"], free))
        config = config | {"added_tokens_decoder": listed}
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<older>": free}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special_map))
    tokenizer = load(spec, tmp_path)
    found = tokenizer.added_tokens | tokenizer.special_tokens
    new = {name: id for name, id in found.items() if id >= free}
    assert new == {name: free + n for n, name in enumerate(expected)}
    assert tokenizer.encode("".join(expected), allow_special=True) == [*range(free, free + len(expected))]
    assert {*tokenizer.special_tokens.values()}.isdisjoint(tokenizer.encode("".join(expected)))


@pytest.mark.parametrize(
    ("config", "special_map", "message"),
    [
        ({"added_tokens_decoder": {}}, {}, "added_tokens_decoder .* '<empty_output>'"),
        ({"added_tokens_decoder": LISTED | {0: LISTED[0] | {"lstrip": True}}}, {}, "lstrip"),
        ({"add_prefix_space": True}, {}, "add_prefix_space"),
        ({"split_special_tokens": True}, {}, "split_special_tokens"),
        ({"extra_special_tokens": ["<x>"]}, {"extra_special_tokens": ["<y>"]}, "special_tokens_map.json has other"),
    ],
)
def test_settings_that_change_ids_in_transformers_are_refused(config, special_map, message, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special_map))
    with pytest.raises(TokenizerError, match=message):
        load(spec_of("smollm2"), tmp_path)


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
        content = {"added_tokens": [{"special": False} | token], "model": {}}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(tmp_path)


def test_of_overlapping_tokens_the_first_and_longest_counts(tmp_path):
    """In a tokenizer.model, runs of newlines are symbols that are sought together with added tokens."""
    (tmp_path / "tokenizer.model").write_bytes(train())
    plain = load_tokenizer(tmp_path)
    x, y, newlines = (plain.encode(text, bos=False) for text in ("x", "y", "\n\n\nHuman:"))
    names = ["\n\nHuman:", "a\n\nb", "the ing"]
    added = [{"id": 500 + n, "content": name, "special": False} for n, name in enumerate(names)]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {}}))
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


@pytest.mark.parametrize("seed", range(4))
def test_merges_are_followed_as_listed(tmp_path, seed):
    """In any order, and if some of the pairs that make a token are not listed."""
    spec, draw = spec_of("gemma3"), random.Random(seed)
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    merges = merges if seed == 0 else draw.sample(merges, len(merges) * 3 // 4)
    spec["model"]["merges"] = merges
    tokenizer = load(spec, tmp_path)
    pool = [name for name in vocab if name.isalpha()] + [*" \u4e2d\u00e9\u00bd~", "\U0001f44d"]
    for _ in range(100):
        text = "".join(draw.choices(pool, k=12))
        parts = []
        for char in text.replace(" ", "\u2581"):
            parts += [char] if char in vocab else [f"<0x{byte:02X}>" for byte in char.encode()]
        assert tokenizer.encode(text, bos=False) == [vocab[part] for part in naive_bpe(parts, merges)], ascii(text)


def test_a_token_can_be_reserved(tmp_path):
    """A chat format may use a token that is not special."""
    tokenizer = load(with_added("qwen3"), tmp_path)
    (id,) = tokenizer.encode("<tool>")
    reserved = tokenizer.reserving(["<tool>", "<|im_end|>", "nowhere"])
    assert id not in reserved.encode("a<tool>b") and reserved.encode("<tool>", allow_special=True) == [id]
    assert reserved.special_tokens["<tool>"] == id and "<tool>" not in tokenizer.special_tokens
    assert tokenizer.encode("<tool>") == [id] and tokenizer.reserving([]) is tokenizer
