"""tools/convert: tokenizers from GGUF metadata. What the files say, and that sentencepiece and pop read them."""

import json

import pytest
import sentencepiece
import torch
from support.gguf_files import BYTES, WORDS, bpe_keys, converted, many_tokens, sentencepiece_keys

import pop


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
def test_byte_level_bpe(tmp_path, pre):
    converted(tmp_path, many_tokens(), bpe_keys(pre))
    tokenizer = json.loads((tmp_path / "model/tokenizer.json").read_text(encoding="utf-8"))
    model = tokenizer["model"]
    # In the vocabulary: BPE's tokens and what stands before them. The added tokens at the end are only added.
    assert model["vocab"] == {token: id for id, token in enumerate(["<|end|>", *BYTES, *WORDS])}
    assert model["merges"] == ["Ġ t", "h e", "Ġt he", "i n"]
    assert (model["type"], model["ignore_merges"]) == ("BPE", pre == "llama-bpe")
    added = [(token["id"], token["content"], token["special"]) for token in tokenizer["added_tokens"]]
    assert added == [(0, "<|end|>", True), (261, "<extra>", False), (262, "<|start|>", True)]
    assert (tokenizer["decoder"]["type"], tokenizer["normalizer"]) == ("ByteLevel", None)
    settings = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<|start|>", "<|end|>")
    assert settings["chat_template"] == "{{ messages }}" and "pad_token" not in settings
    splits, template = tokenizer["pre_tokenizer"]["pretokenizers"], tokenizer["post_processor"]
    if pre == "smollm":
        assert splits[0] == {"type": "Digits", "individual_digits": True}
        assert {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}.items() <= splits[1].items()
        assert (template, settings["add_bos_token"]) == (None, False)
    else:
        assert r"\p{N}{1,3}|" in splits[0]["pattern"]["Regex"]
        assert template["single"][0] == {"SpecialToken": {"id": "<|start|>", "type_id": 0}}
        assert template["special_tokens"]["<|start|>"]["ids"] == [262]


def test_the_library_reads_what_it_writes(tmp_path):
    """From the file to text: the strict loader and the tokenizer take the folder."""
    converted(tmp_path, many_tokens(), bpe_keys())
    model = pop.load(tmp_path / "model", device="cpu", compile=False, progress=False)
    text = "the inn 123 é\n"
    ids = model.tokenizer.encode(text)
    assert model.tokenizer.decode(ids) == text and 260 in ids
    assert model.logits(torch.tensor([ids])).shape == (1, len(ids), 300)


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_sentencepiece(tmp_path, dummy_prefix):
    keys = sentencepiece_keys() | {"tokenizer.ggml.add_space_prefix": dummy_prefix}
    gemma3 = {key: value for key, value in keys.items() if key.startswith("tokenizer")}
    converted(tmp_path, many_tokens("gemma3"), gemma3, "gemma3")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "model/tokenizer.model"))
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    ids = range(len(tokens))
    assert [processor.id_to_piece(i) for i in ids] == tokens
    assert [processor.get_score(i) for i in ids] == keys["tokenizer.ggml.scores"]
    assert [i for i in ids if processor.is_control(i)] == [i for i in ids if types[i] == 3]
    assert [i for i in ids if processor.is_byte(i)] == [i for i in ids if types[i] == 6]
    assert (processor.eos_id(), processor.bos_id(), processor.unk_id()) == (1, 2, 3)
    # BPE takes the best-scored merge first, "ab" (-1), where a unigram model would take "a" and "bc", the
    # best sum. Letters without a piece become bytes.
    prefix = ["▁"] if dummy_prefix else []
    assert processor.encode("abc  a\n\nx", out_type=str) == [*prefix, "ab", "c", "▁", "▁a", "\n\n", "<0x78>"]
    if not dummy_prefix:  # which our reader refuses, since it changes text
        assert pop.load_tokenizer(tmp_path / "model").encode("abcx", bos=False) == processor.encode("abcx")
    settings = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["add_bos_token"]) == ("<bos>", True)


def test_runs_of_blanks_are_pieces_again(tmp_path):
    """llama.cpp's converter writes a user-defined piece with blanks, where sentencepiece has a mark for each."""
    keys = {key: value for key, value in sentencepiece_keys().items() if key.startswith("tokenizer")}
    keys["tokenizer.ggml.tokens"] = [*keys["tokenizer.ggml.tokens"], "   ", "x y"]
    keys["tokenizer.ggml.token_type"] = [*keys["tokenizer.ggml.token_type"], 4, 1]
    keys["tokenizer.ggml.scores"] = [*keys["tokenizer.ggml.scores"], 0.0, 0.0]
    converted(tmp_path, many_tokens("gemma3"), keys, "gemma3")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "model/tokenizer.model"))
    assert processor.encode("a   b", out_type=str) == ["a", "▁▁▁", "b"]
    assert processor.id_to_piece(processor.get_piece_size() - 1) == "x y"  # a normal piece is left as it is
