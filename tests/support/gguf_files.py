"""Small GGUF files, and their conversion."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file
from support.tiny_chat import BYTES

from tools.convert import convert

gguf = pytest.importorskip("gguf")

Q = gguf.GGMLQuantizationType


# Awkward on purpose: the head width is not width / heads. Letters as in pop/models/layers.py.
VOCAB, WIDTH, MLP, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 50, 64, 96, 4, 2, 24, 2


LLAMA_KEYS = {
    "llama.block_count": LAYERS,
    "llama.context_length": 512,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": MLP,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.key_length": HEAD_DIM,
    "llama.attention.value_length": HEAD_DIM,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500000.0,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.vocab_size": VOCAB,
}


def make_tensors(arch="llama", *, width=WIDTH, tied=True, biases=False, quantised=Q.F32):
    """A model's tensors under GGUF names, random; matrices whose rows allow it in the type `quantised`."""
    rng = np.random.default_rng(0)
    q, k = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"token_embd.weight": (VOCAB, width), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (VOCAB, width)
    matrices = {"attn_q": (q, width), "attn_k": (k, width), "attn_v": (k, width), "attn_output": (width, q)}
    matrices |= {"ffn_gate": (MLP, width), "ffn_up": (MLP, width), "ffn_down": (width, MLP)}
    norms = {"attn_norm": width, "ffn_norm": width}
    if arch == "gemma3":
        norms |= {"post_attention_norm": width, "post_ffw_norm": width}
        norms |= {"attn_q_norm": HEAD_DIM, "attn_k_norm": HEAD_DIM}
    for n in range(LAYERS):
        for name, shape in matrices.items():
            shapes[f"blk.{n}.{name}.weight"] = shape
            if biases:
                shapes[f"blk.{n}.{name}.bias"] = shape[:1]
        for name, size in norms.items():
            shapes[f"blk.{n}.{name}.weight"] = (size,)
    block = gguf.GGML_QUANT_SIZES[quantised][0]
    tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32)
        fits = len(shape) == 2 and shape[-1] % block == 0
        tensors[name] = (quantise(values, quantised), quantised) if fits else (values, Q.F32)
    return tensors


def quantise(values, kind):
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:  # random codes instead, with scales that are finite: 0 to 0.03 as float16
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        codes = np.random.default_rng(1).integers(0, 256, (len(values), values.shape[1] // block, nbytes), np.uint8)
        for high_byte in {Q.Q4_K: (1, 3), Q.Q6_K: (209,)}[kind]:
            codes[..., high_byte] = 0x27 & codes[..., high_byte]
        return codes.reshape(len(values), -1)


def write_gguf(path, tensors, keys, arch="llama", endianess=gguf.GGUFEndian.LITTLE):
    writer = gguf.GGUFWriter(path, arch, endianess=endianess)
    for key, value in keys.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add.get(type(value), writer.add_array)(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GEMMA3_KEYS = {key.replace("llama", "gemma3"): value for key, value in LLAMA_KEYS.items()}
GEMMA3_KEYS |= {"gemma3.rope.freq_base": 1e6, "gemma3.attention.sliding_window": 16}


def converted(tmp_path, tensors=None, keys=(), arch="llama"):
    """Convert a file of these tensors and (changed) keys; the folder's config and weights."""
    base = LLAMA_KEYS if arch == "llama" else GEMMA3_KEYS
    file = write_gguf(tmp_path / "m.gguf", tensors or make_tensors(arch), base | dict(keys), arch)
    folder = convert(file, tmp_path / "model", progress=False)
    weights = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
    return json.loads((folder / "config.json").read_text()), weights


WORDS = ["Ġt", "he", "Ġthe", "in"]


def bpe_keys(pre="smollm", bos_id=262):
    tokens = ["<|end|>", *BYTES, *WORDS, "<extra>", "<|start|>", "[PAD263]"]
    bos = {} if bos_id is None else {"tokenizer.ggml.bos_token_id": bos_id}
    return bos | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, *[1] * 260, 4, 3, 5],
        "tokenizer.ggml.merges": ["Ġ t", "h e", "Ġt he", "i n"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
    }


def many_tokens(arch="llama", count=300):
    """A model that embeds more tokens than the tokenizers of these tests have."""
    tensors = make_tensors(arch)
    tensors["token_embd.weight"] = (np.zeros((count, WIDTH), np.float32), Q.F32)
    return tensors


def sentencepiece_keys():
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *[f"<0x{b:02X}>" for b in range(256)]]
    pieces = ["\n\n", "<turn>", "▁", "a", "b", "c", "ab", "▁a", "bc"]
    types = [3, 3, 3, 2, *[6] * 256, 4, 3, *[1] * 7]
    scores = [0.0] * 262 + [-10.0, -11.0, -12.0, -30.0, -1.0, -2.5, -5.0]
    ids = {"bos": 2, "eos": 1, "unknown": 3}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + pieces,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": False,
    } | {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()}
