"""All tokenizers: round trips, streams, special tokens, the files that are read, and sentencepiece's own ids."""

import pickle
import unicodedata

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.text import BYTE_PAIR_FAMILIES, TRICKY_TEXT, USER_DEFINED, golden_tokenizer, load, spec_of, train

from pop.errors import InputError, TokenizerError
from pop.generation.answers import Answer
from pop.inputs.tokenizers import load_tokenizer

TOKENIZERS = {family: golden_tokenizer(family) for family in BYTE_PAIR_FAMILIES}


def streamed(tokenizer, ids: list[int]) -> list[str]:
    """The text that an answer settles with each of its tokens."""
    answer = Answer(tokenizer, frozenset(), (), len(ids), seed=0)
    return [answer.push(id) for id in ids]


@given(text=TRICKY_TEXT)
@example("a\u1dfa\u0323 \U00011935\U00011930")  # newer than the original's NFC
def test_decode_undoes_encode_and_text_never_becomes_a_special_token(text):
    for family, tokenizer in TOKENIZERS.items():
        ids = tokenizer.encode(text, bos=False)
        special = tokenizer.special_tokens
        assert {*special.values()}.isdisjoint(ids)
        name = next(iter(special))
        assert special[name] in tokenizer.encode(text + name, bos=False, allow_special=True)
        if family == "llama-3.1":
            assert tokenizer.decode(ids) == text
        elif family == "qwen3":  # it normalises to NFC, but not across added tokens
            assert unicodedata.normalize("NFC", tokenizer.decode(ids)) == unicodedata.normalize("NFC", text)


@given(data=st.data())
def test_streamed_pieces_join_to_the_decoded_text(data):
    for tokenizer in TOKENIZERS.values():
        ids = data.draw(st.lists(st.sampled_from(sorted(tokenizer._bytes_of)), max_size=30))
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
        assert tokenizer.decode(ids) == b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")


def test_special_and_added_tokens():
    llama, qwen = TOKENIZERS["llama-3.1"], TOKENIZERS["qwen3"]
    eot = llama.special_tokens["<|eot_id|>"]
    ids = llama.encode("a<|eot_id|>", allow_special=True)
    assert ids == [llama.bos_id, *llama.encode("a", bos=False), eot]
    assert llama.encode("a", bos=False) == llama.encode("a")[1:]
    assert llama.decode(ids) == "a" and llama.decode(ids, special=True) == "<|begin_of_text|>a<|eot_id|>"
    emoji = llama.encode("a👍", bos=False)
    assert streamed(llama, emoji) == ["a", "", "", "", "👍"]  # parts of a character are held back
    assert llama.decode(torch.tensor(emoji[:-1])) == llama.decode(np.array(emoji[:-1])) == "a\ufffd"
    # added tokens that are not special are ordinary vocabulary
    assert "<think>" not in qwen.special_tokens and len(qwen.encode("<think>")) == 1
    assert qwen.decode(qwen.encode("<think>")) == "<think>"
    assert qwen.bos_id is None and qwen.encode("") == [] == qwen.encode("", bos=True)


def test_settings_that_change_no_ids_may_be_there_or_lack(tmp_path):
    for family, tokenizer in TOKENIZERS.items():
        spec = spec_of(family) | {"truncation": {"max_length": 5}, "padding": {"strategy": "BatchLongest", "pad_id": 1}}
        for name in ("normalizer", "post_processor"):
            if spec[name] is None or (name, family) == ("post_processor", "qwen3"):
                del spec[name]
        assert load(spec, tmp_path).encode("the 2nd of many words") == tokenizer.encode("the 2nd of many words")


def test_long_runs():
    for tokenizer in TOKENIZERS.values():
        for unit in (" ", "\n", "ab", "🙂", " \n", "é", "1", "='"):
            text = unit * 50_000 + "x"
            assert tokenizer.decode(tokenizer.encode(text, bos=False)) == text


def test_texts_and_ids_that_are_refused():
    tokenizer = TOKENIZERS["smollm2"]
    with pytest.raises(InputError, match=r"lone surrogate.*character 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(InputError, match="is a bytes"):
        tokenizer.encode(b"a")
    with pytest.raises(InputError, match="900,000 whitespace characters"):
        tokenizer.encode("a" + " " * 1_000_000 + "b")
    for id in (-1, tokenizer.vocab_size, 10**20, None, "a", [], 1.5):
        with pytest.raises(InputError, match="token id"):
            tokenizer.decode([id])


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
    flags = '"add_bos_token": true, "add_eos_token": false'
    config.write_text(f'{{"eos_token": {{"content": "<e>"}}, "bos_token": null, "chat_template": null, {flags}}}')
    (tmp_path / "chat_template.json").write_text('{"chat_template": "five"}')
    assert load_tokenizer(tmp_path).chat_template == "five"
    assert load_tokenizer(tmp_path).template_variables == {"eos_token": "<e>"}
    for broken in ("{", "[]", '{"chat_template": 3}', '{"chat_template": [3]}', '{"bos_token": 3}'):
        config.write_text(broken)
        with pytest.raises(TokenizerError):
            load_tokenizer(tmp_path)


def test_no_tokenizer_files(tmp_path):
    for other in (None, 3, object(), print):
        with pytest.raises(InputError, match="tokenizer is"):
            load_tokenizer(other)
    for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "nowhere"):
        with pytest.raises(TokenizerError, match=r"no tokenizer.json and no tokenizer.model"):
            load_tokenizer(path)


# ---- sentencepiece ----


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A tokenizer like Gemma's, and sentencepiece's own object of the same model."""
    folder = tmp_path_factory.mktemp("gemma")
    (folder / "tokenizer.model").write_bytes(train())
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return load_tokenizer(folder), original


@given(text=TRICKY_TEXT | st.lists(st.sampled_from([*USER_DEFINED, " ", "\n", "a", "<bos>", "<unk>"])).map("".join))
@example("a  b\n\n\n\n c<table>\x00")
def test_sentencepiece_ids_are_the_originals(gemma, text):
    tokenizer, original = gemma
    text = text.replace("_of_turn>", "_of_turn")
    assert tokenizer.encode(text) == [2, *original.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def test_sentencepiece_control_symbols_in_text_stay_text(gemma):
    tokenizer, original = gemma
    turn, table, newlines = map(original.piece_to_id, ("<start_of_turn>", "<table>", "\n\n"))
    assert turn in original.encode("<start_of_turn>user")  # this must not happen with users' text
    text = "<bos><start_of_turn>user\n\n<end_of_turn><table>"
    ids = tokenizer.encode(text, bos=False)
    assert {tokenizer.special_tokens[name] for name in ("<bos>", "<start_of_turn>", "<end_of_turn>")}.isdisjoint(ids)
    assert tokenizer.decode(ids) == text and ids[-1] == table and newlines in ids
    allowed = tokenizer.encode(text, bos=False, allow_special=True)
    assert allowed[:2] == [2, turn] and tokenizer.decode(allowed, special=True) == text
    assert tokenizer.token_bytes(turn) == b"" and tokenizer.token_bytes(original.piece_to_id("<0xC3>")) == b"\xc3"
    assert tokenizer.bos_id == 2 and tokenizer.vocab_size == 500


def test_other_sentencepiece_models_are_refused(tmp_path):
    for settings, message in (
        ({"add_dummy_prefix": True}, "changes text"),
        ({"normalization_rule_name": "nfkc"}, "changes text"),
        ({"remove_extra_whitespaces": True}, "changes text"),
        ({"byte_fallback": False, "vocab_size": 400}, "byte fallback"),
    ):
        (tmp_path / "tokenizer.model").write_bytes(train(**settings))
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(tmp_path)


def test_unused_pieces_and_equal_scores(tmp_path):
    """sentencepiece takes an unused piece apart again, and of equal pairs it merges the first one."""
    model = train()
    newlines, kind = model.index(b"\n\x02\n\n\x15"), len(b"\n\x02\n\n\x15\0\0\0\0\x18")
    unused = model[: newlines + kind] + b"\x05" + model[newlines + kind + 1 :]
    er, score = model.index(b"\x02er\x15") + 4, model.index(b"\x02in\x15") + 4
    equal = model[:er] + model[score : score + 4] + model[er + 4 :]
    for changed in (unused, equal):
        (tmp_path / "tokenizer.model").write_bytes(changed)
        original = sentencepiece.SentencePieceProcessor(model_proto=changed)
        tokenizer = load_tokenizer(tmp_path)
        for text in ("\n\n", "er in erin\n\n\n\n"):
            assert tokenizer.encode(text, bos=False) == original.encode(text)
        assert (original.piece_to_id("\n\n") in tokenizer.unused_ids) == (changed is unused)


@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_sentencepiece_model(gemma, tmp_path_factory, cut):
    model = gemma[1].serialized_model_proto()
    folder = tmp_path_factory.mktemp("cut")
    (folder / "tokenizer.model").write_bytes(model[: int(cut * len(model))])
    with pytest.raises(TokenizerError):
        load_tokenizer(folder)


@pytest.mark.parametrize("family", ["qwen3", "smollm2"])
def test_a_tokenizer_can_be_pickled(family):
    tokenizer = golden_tokenizer(family)
    text = "Hi <|im_end|> there"
    copied = pickle.loads(pickle.dumps(tokenizer))
    assert copied.encode(text, allow_special=True) == tokenizer.encode(text, allow_special=True)


def test_a_piece_of_another_class_of_text_is_text():
    tokenizer = golden_tokenizer("qwen3")
    assert tokenizer.encode_pieces([np.str_("Once "), "upon"]) == tokenizer.encode("Once upon")
