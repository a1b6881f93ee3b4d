"""The names of tensors in Meta's consolidated.NN.pth."""

import re

NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip
INTERLEAVED = ("attention.wq.weight", "attention.wk.weight")  # RoPE rotates neighbouring rows of a head


def parameter_name(name: str) -> str:
    """Our name of one of Meta's tensors. An unknown name stays as it is, so that it is reported as surplus."""
    match = re.fullmatch(r"(layers\.\d+\.|)(.+)\.weight", name)
    if not match or match[2] not in NAMES:
        return name
    return ("model." if match[1] else "") + match[1] + NAMES[match[2]] + ".weight"
