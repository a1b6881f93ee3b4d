"""tools/convert: tokenizers from GGUF metadata. What the files say, and that sentencepiece and pop read them."""

import json

import pytest
import sentencepiece
import torch
from support.gguf_files import BYTES, WORDS, bpe_keys, converted, many_tokens, sentencepiece_keys
from support.text import GOLDENS, assert_golden, spec_of

import pop


@pytest.mark.parametrize(("family", "pre"), [("smollm2", "smollm"), ("llama-3.1", "llama-bpe"), ("qwen3", "qwen2")])
def test_byte_level_bpe_gives_the_ids_of_the_original(tmp_path, family, pre):
    spec = spec_of(family)
    tokens = {id: (token, 1) for token, id in spec["model"]["vocab"].items()}  # with their type
    tokens |= {token["id"]: (token["content"], 3 if token["special"] else 4) for token in spec["added_tokens"]}
    texts, types = zip(*(tokens[id] for id in range(len(tokens))), strict=True)
    keys = {
        "tokenizer.ggml.tokens": [*texts],
        "tokenizer.ggml.token_type": [*types],
        "tokenizer.ggml.merges": spec["model"]["merges"],
        "tokenizer.ggml.eos_token_id": spec["added_tokens"][0]["id"],
    }
    bos_id = texts.index("<|begin_of_text|>") if family == "llama-3.1" else None
    converted(tmp_path, many_tokens(count=len(tokens)), bpe_keys(pre, bos_id) | keys)
    golden = json.loads((GOLDENS / family / "golden.json").read_bytes())
    assert_golden(pop.load_tokenizer(tmp_path / "model"), golden)


@pytest.mark.parametrize(("pre", "bos_id"), [("smollm", None), ("llama-bpe", 262)])
def test_added_tokens_keep_their_roles(tmp_path, pre, bos_id):
    """BPE's vocabulary ends with its last token, "in". The padding at the end of the file's list is left out."""
    converted(tmp_path, many_tokens(), bpe_keys(pre))
    tokenizer = json.loads((tmp_path / "model/tokenizer.json").read_text(encoding="utf-8"))
    assert tokenizer["model"]["vocab"] == {token: id for id, token in enumerate(["<|end|>", *BYTES, *WORDS])}
    added = [(token["id"], token["content"], token["special"]) for token in tokenizer["added_tokens"]]
    assert added == [(0, "<|end|>", True), (261, "<extra>", False), (262, "<|start|>", True)]
    read = pop.load_tokenizer(tmp_path / "model")
    assert (read.vocab_size, read.bos_id) == (263, bos_id)
    assert read.template_variables == {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    settings = json.loads((tmp_path / "model/tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ messages }}" and settings["add_bos_token"] == bool(bos_id)


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
    converted(tmp_path, many_tokens("gemma3"), keys, "gemma3")
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
    keys = sentencepiece_keys()
    keys["tokenizer.ggml.tokens"] += ["   ", "x y"]
    keys["tokenizer.ggml.token_type"] += [4, 1]
    keys["tokenizer.ggml.scores"] += [0.0, 0.0]
    converted(tmp_path, many_tokens("gemma3"), keys, "gemma3")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "model/tokenizer.model"))
    assert processor.encode("a   b", out_type=str) == ["a", "▁▁▁", "b"]
    assert processor.id_to_piece(processor.get_piece_size() - 1) == "x y"  # a normal piece is left as it is
