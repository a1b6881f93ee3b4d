"""Tokenizers against the ids of the originals (goldens), a naive BPE, their own contract, and broken files.

The goldens are made by tools/goldens/tokenizers.py: real tokenizers cut down to their first tokens.
"""

import base64
import json
import re
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.text import GOLDENS, TEXTS, USER_DEFINED, train

from pop.errors import InputError, PopError, TokenizerError
from pop.inputs.tokenizers import StreamDecoder, load_tokenizer

FAMILIES = ("llama-3.1", "qwen3", "smollm2")
TOKENIZERS = {family: load_tokenizer(GOLDENS / family) for family in FAMILIES}

ANY_TEXT = st.text(st.characters(codec="utf-8"))
# pieces on which tokenizers differ: runs of whitespace, digits, marks, contractions, control tokens, code
PIECES = st.sampled_from(
    [
        "  ",
        "\n",
        " \n",
        "\t",
        "\u3000",
        "'s",
        "'LL",
        "1",
        "٣",
        "½",
        "é",
        "e\u0301",
        "中",
        "👍🏽",
        "!",
        "the",
        "ing",
    ]
)
CONTROL = st.sampled_from(["<|eot_id|>", "<|im_start|>", "<|im_end|>", "<think>", "<repo_name>", "<|", "|>", "\x1c"])
TRICKY_TEXT = st.lists(PIECES | CONTROL | ANY_TEXT, max_size=12).map("".join)


def golden(family: str) -> dict:
    return json.loads((GOLDENS / family / "golden.json").read_bytes())


def spec_of(family: str) -> dict:
    return json.loads((GOLDENS / family / "tokenizer.json").read_bytes())


def load(spec: dict | str, folder: Path):
    (folder / "tokenizer.json").write_text(spec if isinstance(spec, str) else json.dumps(spec), encoding="utf-8")
    return load_tokenizer(folder)


# --- The ids of the originals ------------------------------------------------------------------------------


def assert_golden(tokenizer, ids: dict) -> None:
    for text, as_text, with_special in zip(TEXTS, ids["as_text"], ids["with_special"], strict=True):
        assert tokenizer.encode(text) == as_text, ascii(text)
        assert tokenizer.encode(text, allow_special=True) == with_special, ascii(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_originals(family):
    assert_golden(TOKENIZERS[family], golden(family))


def test_ids_of_the_real_smollm2_are_the_originals(smollm2):
    assert_golden(load_tokenizer(smollm2), json.loads((GOLDENS / "smollm2-135m.json").read_bytes()))


def test_ids_of_the_real_gemma3_are_the_originals(gemma3):
    """Its tokenizer.model is rebuilt from a GGUF file; the goldens are by the published tokenizer.json."""
    assert_golden(load_tokenizer(gemma3), json.loads((GOLDENS / "gemma3-270m.json").read_bytes()))


def test_metas_own_file_gives_the_same_ids(tmp_path):
    """tokenizer.model lists the same tokens in the same order; its special tokens follow by rule."""
    llama, spec = TOKENIZERS["llama-3.1"], spec_of("llama-3.1")
    size = len(spec["model"]["vocab"])
    lines = [b"%s %d" % (base64.b64encode(llama.token_bytes(id)), id) for id in range(size)]
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.special_tokens) == 256 and tokenizer.vocab_size == size + 256
    assert tokenizer.bos_id == size and tokenizer.special_tokens["<|reserved_special_token_247|>"] == size + 255
    assert llama.special_tokens.items() <= tokenizer.special_tokens.items()
    assert_golden(tokenizer, golden("llama-3.1"))


@st.composite
def vocabularies(draw):
    """Merges of letters that need not have been trained: some may never apply, some come too early."""
    tokens, merges = list("abc"), []
    for _ in range(draw(st.integers(1, 12))):
        merge = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if merge not in merges:
            merges.append(merge)
            tokens += ["".join(merge)] if "".join(merge) not in tokens else []
    return draw(st.permutations(tokens)), draw(st.permutations(merges))


@given(vocabularies(), st.lists(st.text("abc", min_size=1, max_size=30), min_size=1), st.booleans())
def test_merging_is_that_of_a_naive_bpe(tmp_path_factory, vocabulary, words, ignore_merges):
    tokens, merges = vocabulary
    spec = spec_of("qwen3")
    single = [token for token in spec["model"]["vocab"] if len(token) == 1 and token not in "abc"]
    vocab = {token: n for n, token in enumerate(single + tokens)}
    model = {"vocab": vocab, "merges": list(map(list, merges)), "ignore_merges": ignore_merges}
    spec |= {"model": {"type": "BPE"} | model, "added_tokens": []}

    def naive(word: str) -> list[int]:
        parts = list(word)
        while not (ignore_merges and word in vocab):
            pairs = [(merges.index(pair), n) for n, pair in enumerate(pairwise(parts)) if pair in merges]
            if not pairs:
                return [vocab[part] for part in parts]
            n = min(pairs)[1]
            parts[n : n + 2] = [parts[n] + parts[n + 1]]
        return [vocab[word]]

    try:
        tokenizer = load(spec, tmp_path_factory.mktemp("bpe"))
    except TokenizerError as error:
        assert ignore_merges and "no merge into the token" in str(error)
        return
    for word in words:
        assert tokenizer.encode(word) == naive(word)


def test_a_vocabulary_without_some_bytes(tmp_path):
    """The original leaves such bytes out and merges across them; an unk_token it puts in their place."""
    spec = spec_of("smollm2")
    assert "Ą" not in spec["model"]["vocab"]  # the byte 4
    spec["model"]["vocab"] |= {"!!": 5000, "Ġ!!": 5001}
    spec["model"]["merges"] += ["! !", "Ġ !!"]
    tokenizer = load(spec, tmp_path)
    assert tokenizer.encode("th\x04e") == tokenizer.encode("th") + tokenizer.encode("e")
    assert tokenizer.encode("!\x04!a \x04! !") == [5000, *tokenizer.encode("a"), *tokenizer.encode(" !") * 2]
    assert tokenizer.encode("  !\x04\x04!\x04") == [*tokenizer.encode(" "), 5001]
    assert tokenizer.encode("a \n \x04") == tokenizer.encode("a \n") + tokenizer.encode(" ")
    assert tokenizer.encode("a \n\x04") == [id for text in "a \n" for id in tokenizer.encode(text)]
    assert tokenizer.encode("'\x04s") == tokenizer.encode("'") + tokenizer.encode("s")
    spec["model"]["unk_token"] = "<|endoftext|>"
    assert load(spec, tmp_path).encode("a\x04")[1:] == [tokenizer.special_tokens["<|endoftext|>"]]
    spec["model"]["unk_token"] = None
    del spec["model"]["vocab"]["Ã"]
    spec["model"]["merges"] = [merge for merge in spec["model"]["merges"] if "Ã" not in merge]
    with pytest.raises(TokenizerError, match="single byte 195"):
        load(spec, tmp_path)


def test_ids_in_another_order_than_the_merges(tmp_path):
    spec = spec_of("smollm2")
    ids = spec["model"]["vocab"]
    spec["model"]["vocab"] = {token: len(ids) - 1 - id for token, id in ids.items()}
    for token in spec["added_tokens"]:
        token["id"] = len(ids) - 1 - token["id"]
    tokenizer = load(spec, tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == [len(ids) - 1 - id for id in TOKENIZERS["smollm2"].encode(text)]


def test_gpt2s_older_file(tmp_path):
    """Written before use_regex and ignore_merges were; splits numbers as one."""
    spec = spec_of("smollm2")
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    spec["model"] = {"type": "BPE"} | {key: spec["model"][key] for key in ("vocab", "merges")}
    spec["model"]["vocab"]["12"] = 5000
    spec["model"]["merges"].append("1 2")
    assert load(spec, tmp_path).encode("12") == [5000]
    assert TOKENIZERS["smollm2"].encode("12") == TOKENIZERS["smollm2"].encode("1") + TOKENIZERS["smollm2"].encode("2")


# --- Round trips, streams, special tokens ------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-3.1", "qwen3"])
@given(text=TRICKY_TEXT)
@example("a\u1dfa\u0323 \U00011935\U00011930")  # younger than the original's NFC
def test_decode_undoes_encode(family, text):
    decoded = TOKENIZERS[family].decode(TOKENIZERS[family].encode(text))
    if family == "qwen3":  # which normalises to NFC, though not across added tokens
        assert unicodedata.normalize("NFC", decoded) == unicodedata.normalize("NFC", text)
    else:
        assert decoded == text


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data(), special=st.booleans())
def test_streamed_pieces_join_to_the_decoded_text(family, data, special):
    tokenizer = TOKENIZERS[family]
    ids = data.draw(st.lists(st.sampled_from(sorted(tokenizer._bytes_of)), max_size=30))
    stream = StreamDecoder(tokenizer, special)
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, special)
    if not special:
        assert tokenizer.decode(ids) == b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")


def test_a_stream_holds_back_parts_of_characters():
    tokenizer = TOKENIZERS["llama-3.1"]
    ids = tokenizer.encode("a👍", bos=False)
    assert len(ids) == 5
    stream = StreamDecoder(tokenizer)
    assert [stream.push(id) for id in ids] == ["a", "", "", "", "👍"] and stream.flush() == ""
    assert tokenizer.decode(ids[:-1]) == "a\ufffd"


@pytest.mark.parametrize("family", FAMILIES)
@given(text=TRICKY_TEXT)
def test_text_never_becomes_a_special_token(family, text):
    tokenizer = TOKENIZERS[family]
    special = set(tokenizer.special_tokens.values())
    assert special.isdisjoint(tokenizer.encode(text, bos=False))
    name, id = next(iter(tokenizer.special_tokens.items()))
    assert id in tokenizer.encode(text + name, bos=False, allow_special=True)


def test_special_and_added_tokens():
    llama, qwen = TOKENIZERS["llama-3.1"], TOKENIZERS["qwen3"]
    eot = llama.special_tokens["<|eot_id|>"]
    ids = llama.encode("a<|eot_id|>", allow_special=True)
    assert ids == [llama.bos_id, *llama.encode("a", bos=False), eot]
    assert llama.encode("a", bos=False) == llama.encode("a")[1:]
    assert llama.decode(ids) == "a" and llama.decode(ids, special=True) == "<|begin_of_text|>a<|eot_id|>"
    assert llama.token_bytes(eot) == b""
    # added tokens that are not special are vocabulary like any other
    assert "<think>" not in qwen.special_tokens and len(qwen.encode("<think>")) == 1
    assert qwen.decode(qwen.encode("<think>")) == "<think>"
    assert qwen.bos_id is None and qwen.encode("") == [] == qwen.encode("", bos=True)


def test_of_two_added_tokens_at_one_place_the_longest_is_meant(tmp_path):
    spec = spec_of("qwen3")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    spec["added_tokens"] += [
        {"id": 7000, "content": "<thi"} | flags,
        {"id": 7001, "content": "<think>>"} | flags,
    ]
    think = TOKENIZERS["qwen3"].encode("<think>")
    assert load(spec, tmp_path).encode("<thi<think><think>>") == [7000, *think, 7001]


@pytest.mark.parametrize("unit", [" ", "\n", "ab", "🙂", " \n", "é", "1", "='"])
@pytest.mark.parametrize("family", FAMILIES)
def test_long_runs(family, unit):
    text = unit * 100_000
    ids = TOKENIZERS[family].encode(text + "x", bos=False)
    assert TOKENIZERS[family].decode(ids) == text + "x"


def test_ids_of_a_tensor_or_an_array_are_decoded():
    tokenizer = TOKENIZERS["smollm2"]
    ids = tokenizer.encode("a tensor's")
    assert tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(np.array(ids)) == "a tensor's"


def test_what_cannot_be_encoded_or_decoded():
    tokenizer = TOKENIZERS["smollm2"]
    with pytest.raises(InputError, match=r"lone surrogate.*character 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(InputError, match="is a bytes"):
        tokenizer.encode(b"a")
    with pytest.raises(InputError, match="1000000 whitespace characters"):
        tokenizer.encode("a" + " " * 1_000_000 + "b")
    for id in (-1, tokenizer.vocab_size, 10**20, None, "a", []):
        with pytest.raises(InputError, match="token id"):
            tokenizer.decode([id])


# --- Files -------------------------------------------------------------------------------------------------


def changed(family: str, *path, to) -> dict:
    """The family's tokenizer.json with the value at `path` replaced."""
    spec = spec_of(family)
    part = spec
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = to
    return spec


HE = spec_of("smollm2")["model"]["vocab"]["he"]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
REFUSED = {
    "byte_fallback": changed("qwen3", "model", "byte_fallback", to=True),
    "dropout": changed("qwen3", "model", "dropout", to=0.1),
    "continuing_subword_prefix": changed("qwen3", "model", "continuing_subword_prefix", to="##"),
    "some_new_thing": changed("qwen3", "some_new_thing", to={"a": 1}),
    "truncation": changed("qwen3", "truncation", to={"max_length": 5}),
    "WordPiece": changed("qwen3", "model", "type", to="WordPiece"),
    "NFKC": changed("qwen3", "normalizer", to={"type": "NFKC"}),
    "Metaspace": changed("qwen3", "decoder", to={"type": "Metaspace"}),
    "Whitespace": changed("qwen3", "pre_tokenizer", to={"type": "Whitespace"}),
    "add_prefix_space": changed("smollm2", "pre_tokenizer", to=BYTE_LEVEL),
    "individual_digits': False": changed("smollm2", "pre_tokenizer", "pretokenizers", 0, "individual_digits", to=False),
    "Removed": changed("qwen3", "pre_tokenizer", "pretokenizers", 0, "behavior", to="Removed"),
    r"\\w\+": changed("qwen3", "pre_tokenizer", "pretokenizers", 0, "pattern", to={"Regex": r"\w+"}),
    "lstrip": changed("qwen3", "added_tokens", 0, "lstrip", to=True),
    "single_word": changed("qwen3", "added_tokens", 0, "single_word", to=True),
    "normalized": changed("qwen3", "added_tokens", 0, "normalized", to=True),
    "BertProcessing": changed("qwen3", "post_processor", to={"type": "BertProcessing"}),
    "more than putting one token first": changed(
        "llama-3.1", "post_processor", "processors", 1, "single", to=[{"Sequence": {"id": "A"}}] * 2
    ),
    "two ids": changed("smollm2", "added_tokens", 0, "id", to=7777),
    "no text": changed("qwen3", "added_tokens", 0, "content", to=""),
    "an id comes twice": changed("qwen3", "model", "vocab", "!", to=1),
    "not a non-negative integer": changed("qwen3", "model", "vocab", "!", to=-1),
    "twice, or is not of tokens": changed("qwen3", "model", "merges", 0, to="ab c"),
    "special token 'he'": changed(
        "smollm2", "added_tokens", 0, to=spec_of("smollm2")["added_tokens"][0] | {"content": "he", "id": HE}
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_reproduced_is_refused_by_name(tmp_path, name):
    with pytest.raises(TokenizerError, match=name):
        load(REFUSED[name], tmp_path)


BROKEN_JSON = [
    "",
    "{",
    "null",
    "[]",
    "7",
    "{}",
    '{"model": 1}',
    '"model"',
    "[" * 100_000,
    '{"model": {"type": []}}',
]
BROKEN_MODEL = [
    b"",
    b"\n",
    b"\n\x05abc",
    b"AAAA 0",
    b"IQ== 0\nIQ== 1\n",
    b"IQ== x",
    b"!!!! 0",
    b"IQ==",
    b"\xff\xfe 1",
]


@pytest.mark.parametrize("content", BROKEN_JSON)
def test_broken_tokenizer_json(tmp_path, content):
    with pytest.raises(TokenizerError, match=re.escape(str(tmp_path))):
        load(content, tmp_path)


@pytest.mark.parametrize("content", BROKEN_MODEL)
def test_broken_tokenizer_model(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerError, match=re.escape(str(tmp_path))):
        load_tokenizer(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.sampled_from(["", "a", "Ġ", "he", "\ud800", "<|im_end|>"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "type", "a"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@given(data=st.data(), family=st.sampled_from(FAMILIES))
def test_a_damaged_tokenizer_json_never_ends_in_another_error(tmp_path_factory, data, family):
    """One value anywhere is replaced or removed, or the text is cut or has a wrong byte."""
    spec = spec_of(family)
    if data.draw(st.booleans()):
        part, key = {"": spec}, ""
        while isinstance(part[key], dict | list) and len(part[key]) and data.draw(st.integers(0, 4)):
            part = part[key]
            key = data.draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
        if key != "" and data.draw(st.booleans()):
            del part[key]
        else:
            part[key] = data.draw(JSON)
        spec = part[""] if key == "" and "" in part else spec
        content = json.dumps(spec).encode()
    else:
        content = bytearray(json.dumps(spec, separators=(",", ":")).encode())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : data.draw(st.sampled_from([place + 1, None]))] = data.draw(st.binary(max_size=2))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "tokenizer.json").write_bytes(content)
    try:
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode("The end, the 2nd\x04 <|im_end|>", allow_special=True), special=True)
    except PopError:
        pass


def test_the_chat_template_comes_with_the_tokenizer(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    assert load(spec_of("qwen3"), tmp_path).chat_template is None
    config.write_text('{"chat_template": "one"}')
    assert load_tokenizer(tmp_path).chat_template == load_tokenizer(tmp_path / "tokenizer.json").chat_template == "one"
    config.write_text('{"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "two"}]}')
    assert load_tokenizer(tmp_path).chat_template == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert load_tokenizer(tmp_path).chat_template == "three"
    (tmp_path / "chat_template.jinja").unlink()
    for broken in ("{", "[]", '{"chat_template": 3}', '{"chat_template": [3]}'):
        config.write_text(broken)
        with pytest.raises(TokenizerError):
            load_tokenizer(tmp_path)


def test_no_tokenizer_files(tmp_path):
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "nowhere"):
        with pytest.raises(TokenizerError, match=r"no tokenizer.json and no tokenizer.model"):
            load_tokenizer(path)


# --- Sentencepiece -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A tokenizer like Gemma's, and the same model as sentencepiece itself reads it."""
    folder = tmp_path_factory.mktemp("gemma")
    (folder / "tokenizer.model").write_bytes(train())
    (folder / "tokenizer.json").write_text("not for byte-level BPE")
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return load_tokenizer(folder), original


@given(text=TRICKY_TEXT | st.lists(st.sampled_from([*USER_DEFINED, " ", "\n", "a", "<bos>", "<unk>"])).map("".join))
@example("a  b\n\n\n\n c<table>\x00")
def test_sentencepiece_ids_are_the_originals(gemma, text):
    tokenizer, original = gemma
    text = text.replace("_of_turn>", "_of_turn")
    assert tokenizer.encode(text) == [2, *original.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, tokenizer.encode(text))) + stream.flush() == text.replace("▁", " ")


def test_sentencepiece_control_symbols_in_text_stay_text(gemma):
    tokenizer, original = gemma
    turn = original.piece_to_id("<start_of_turn>")
    assert turn in original.encode("<start_of_turn>user")  # what must not happen with users' text
    text = "<bos><start_of_turn>user\n\n<end_of_turn><table>"
    ids = tokenizer.encode(text, bos=False)
    assert {tokenizer.special_tokens[name] for name in ("<bos>", "<start_of_turn>", "<end_of_turn>")}.isdisjoint(ids)
    assert tokenizer.decode(ids) == text and ids[-1] == original.piece_to_id("<table>")
    assert original.piece_to_id("\n\n") in ids
    allowed = tokenizer.encode(text, bos=False, allow_special=True)
    assert allowed[:2] == [2, turn] and tokenizer.decode(allowed, special=True) == text
    assert tokenizer.token_bytes(turn) == b"" and tokenizer.token_bytes(original.piece_to_id("<0xC3>")) == b"\xc3"
    assert tokenizer.bos_id == 2 and tokenizer.vocab_size == 500
    for id in (-1, 500, None, 1.5):
        with pytest.raises(InputError, match="token id"):
            tokenizer.decode([id])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"add_dummy_prefix": True}, "changes text"),
        ({"normalization_rule_name": "nfkc"}, "changes text"),
        ({"remove_extra_whitespaces": True}, "changes text"),
        ({"byte_fallback": False, "vocab_size": 400}, "byte fallback"),
    ],
)
def test_other_sentencepiece_models_are_refused(tmp_path, settings, message):
    (tmp_path / "tokenizer.model").write_bytes(train(**settings))
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_sentencepiece_model(gemma, tmp_path_factory, cut):
    model = gemma[1].serialized_model_proto()
    folder = tmp_path_factory.mktemp("cut")
    (folder / "tokenizer.model").write_bytes(model[: int(cut * len(model))])
    with pytest.raises(TokenizerError):
        load_tokenizer(folder)
