"""Byte-level BPE: the ids of the originals, merges against a naive BPE, and files that are broken or not supported."""

import json
import re
import unicodedata
from itertools import pairwise
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.goldens import REFUSED
from support.text import BYTE_PAIR_FAMILIES, GOLDENS, TEXTS, assert_golden, golden_tokenizer, load, naive_bpe, spec_of

from pop.errors import TokenizerError
from pop.inputs import byte_pair
from pop.inputs.tokenizers import load_tokenizer


@pytest.mark.parametrize("family", BYTE_PAIR_FAMILIES)
def test_ids_are_the_originals(family):
    assert_golden(golden_tokenizer(family), json.loads((GOLDENS / family / "golden.json").read_bytes()))


@st.composite
def vocabularies(draw):
    """Merges of letters as no training would give them: some never apply, and some come too early."""
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
    try:
        tokenizer = load(spec, tmp_path_factory.mktemp("bpe"))
    except TokenizerError as error:
        assert ignore_merges and "ignore_merges" in str(error)
        return
    for word in words:
        parts = [word] if ignore_merges and word in vocab else naive_bpe([*word], merges)
        assert tokenizer.encode(word) == [vocab[part] for part in parts]


def test_a_vocabulary_without_some_bytes(tmp_path):
    """The original leaves such bytes out and merges across them. It would put an unk_token in their place."""
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
    with pytest.raises(TokenizerError, match="single byte 4"):
        load(spec, tmp_path)
    spec["model"]["unk_token"] = None
    del spec["model"]["vocab"]["Ã"]
    spec["model"]["merges"] = [merge for merge in spec["model"]["merges"] if "Ã" not in merge]
    with pytest.raises(TokenizerError, match="single byte 195"):
        load(spec, tmp_path)


def test_other_ways_of_writing_the_same_file(tmp_path):
    """OLMo-2 removes what Llama-3's pattern does not match, that is, nothing. GPT-2's file lacks use_regex."""
    spec = spec_of("llama-3.1")
    split, _ = spec["pre_tokenizer"]["pretokenizers"]
    split |= {"behavior": "Removed", "invert": True}
    tokenizer = load(spec, tmp_path)
    original = golden_tokenizer("llama-3.1")
    assert all(tokenizer.encode(text) == original.encode(text) for text in TEXTS)
    spec = spec_of("smollm2")
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    spec["model"] = {"type": "BPE"} | {key: spec["model"][key] for key in ("vocab", "merges")}
    spec["model"]["vocab"]["12"] = 5000
    spec["model"]["merges"].append("1 2")
    assert load(spec, tmp_path).encode("12") == [5000]
    original = golden_tokenizer("smollm2")
    assert original.encode("12") == original.encode("1") + original.encode("2")


# By family: what the error names, where the file is changed, and the value there.
UNSUPPORTED = [(family, *case) for family, cases in REFUSED["tokenizer.json"].items() for case in cases]


@pytest.mark.parametrize(("family", "named", "path", "value"), UNSUPPORTED)
def test_unsupported_features_are_refused_by_name(family, named, path, value, tmp_path):
    *parents, key = [int(key) if key.isdigit() else key for key in path.split("/")]
    spec = part = spec_of(family)
    for parent in parents:
        part = part[parent]
    part[key] = value
    with pytest.raises(TokenizerError, match=named):
        load(spec, tmp_path)


def test_broken_files(tmp_path):
    for name, texts in {
        "tokenizer.json": ["", "null", "[]", '{"model": {}}', "[" * 100_000, '{"model": {"type": []}}'],
        "tokenizer.model": ["", "\n", "\n\x05abc", "IQ== 0\n", "\xff\xfe 1"],
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        for text in texts:
            (folder / name).write_bytes(text.encode("latin-1"))
            with pytest.raises(TokenizerError, match=re.escape(str(folder))):
                load_tokenizer(folder)


@given(st.text("a é\u0301\u0316\u0327\u05b0\u0f71\u200d\uac00", min_size=64, max_size=200))
def test_long_runs_of_marks_are_in_order_before_they_are_normalised(text):
    """The result is that of Unicode. Python's time for a run of marks in disorder grows with its square."""
    normalize = unicodedata.normalize

    def checked(form: str, part: str) -> str:
        for marks in re.findall(r"[^\w\s!-~]{64,}", part) if form == "NFC" else ():
            classes = [unicodedata.combining(char) for char in marks]
            assert all(first <= second or not second for first, second in pairwise(classes))
        return normalize(form, part)

    with patch.object(byte_pair.unicodedata, "normalize", checked):
        found = byte_pair._nfc(text + "\u0301\u0316" * 40)
    assert found == normalize("NFC", text + "\u0301\u0316" * 40)
