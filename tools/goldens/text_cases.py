"""The tiny models of text_models.py as data: shapes without two equal sizes, and old and new forms of config.json."""

from dataclasses import dataclass

GREEDY_TOKENS = 16


@dataclass
class Case:
    """A tiny random model and its prompts.

    Args:
        config: the fields of config.json. Weights are rounded to its dtype.
        prompt_lengths: tokens of each prompt, or a tuple of tokens and IMAGEs.
        verbatim: keep config.json as written here.
        shard_size: keep the weights, in files of this size at most.
        distinct: different tokens in each greedy answer, at least.
    """

    config: dict
    prompt_lengths: tuple
    verbatim: bool = False
    shard_size: str | None = None
    distinct: int = GREEDY_TOKENS // 2


def config(vocab, width, mlp, layers, heads, kv_heads, head_width, rope=None, **fields) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_width,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope or {"rope_type": "default", "rope_theta": 10_000.0},
        "bos_token_id": None,
        "eos_token_id": None,
        **fields,
    }


LOCAL, GLOBAL = "sliding_attention", "full_attention"
IMAGE = "image"
# One image and two images, at each place in a prompt.
LAYOUTS = (13, (7, IMAGE, 6), (4, IMAGE, 5, IMAGE, 3), (IMAGE, 9), (8, IMAGE), (IMAGE, 1, IMAGE))


def with_images(text: dict, image_size: int, patch: int, tokens: int, **fields) -> dict:
    """The config of a Gemma-3 with its vision tower. The last three tokens are those of images."""
    vocab = text["vocab_size"]
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {name: value for name, value in text.items() if name != "architectures"},
        "vision_config": {
            "hidden_size": 24,
            "image_size": image_size,
            "intermediate_size": 36,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "patch_size": patch,
            "vision_use_head": False,
        },
        "mm_tokens_per_image": tokens,
        "boi_token_index": vocab - 3,
        "eoi_token_index": vocab - 2,
        "image_token_index": vocab - 1,
        **fields,
    }


def gemma3_config(vocab, width, mlp, layers, heads, kv_heads, head_width, **fields) -> dict:
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_width,
        "max_position_embeddings": 512,
        "query_pre_attn_scalar": 14,
        **fields,
    }


def qwen3_config(*sizes, **fields) -> dict:
    return config(*sizes, architectures=["Qwen3ForCausalLM"], model_type="qwen3", **fields)


def qwen3_moe_config(*sizes, **options):
    """sizes: those of qwen3_config, then the experts of a token, the number of experts, and their width."""
    *sizes, per_token, count, width = sizes
    experts = {"num_experts_per_tok": per_token, "num_experts": count, "moe_intermediate_size": width}
    return qwen3_config(*sizes, **experts, **options) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
    }


def olmo2_config(*sizes, **fields) -> dict:
    return config(*sizes, architectures=["Olmo2ForCausalLM"], model_type="olmo2", **fields)


def gemma3_ropes(factor, base=1_000_000.0, local_base=10_000.0) -> dict:
    return {
        GLOBAL: {"rope_type": "linear", "factor": factor, "rope_theta": base},
        LOCAL: {"rope_type": "default", "rope_theta": local_base},
    }


CASES = {
    "llama/wide-heads": Case(config(67, 30, 44, 5, 6, 2, 10), (21, 1)),
    "llama/mqa-tied": Case(
        config(
            *(61, 32, 52, 2, 4, 1, 8),
            rope={"rope_type": "default", "rope_theta": 500_000.0},
            tie_word_embeddings=True,
            rms_norm_eps=1e-3,  # large enough to show where it is added
        ),
        (19, 6),
    ),
    # The eight wavelengths are 6, 20, 63 ... tokens, and the bounds are 32 / 4 and 32 / 1. So each of the three
    # branches is taken: kept, blended and divided. The prompt is nine times as long as the original context.
    "llama/llama3-rope": Case(
        config(
            *(37, 24, 36, 3, 4, 2, 16),
            rope={
                "rope_type": "llama3",
                "rope_theta": 10_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
        (300,),
    ),
    "llama/linear-rope": Case(
        config(
            *(61, 24, 40, 3, 3, 1, 12),
            rope={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        ),
        (70,),
    ),
    "llama/biases": Case(config(61, 28, 36, 3, 4, 2, 6, attention_bias=True, mlp_bias=True), (23, 5)),
    "llama/sharded": Case(config(61, 16, 24, 3, 4, 2, 6), (17, 9), shard_size="9KB"),
    # Long enough for positions beyond 256, which bfloat16 cannot tell apart.
    "llama/bfloat16": Case(config(37, 16, 24, 3, 4, 2, 8, dtype="bfloat16"), (280, 7), shard_size="1GB"),
    # The fields of transformers 4, as Llama-3.1 was published ...
    "llama/old-llama3": Case(
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
            "hidden_act": "silu",
            "hidden_size": 30,
            "initializer_range": 0.02,
            "intermediate_size": 38,
            "max_position_embeddings": 1024,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 5,
            "num_hidden_layers": 3,
            "num_key_value_heads": 5,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 4.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 24,
                "rope_type": "llama3",
            },
            "rope_theta": 500.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "transformers_version": "4.43.0.dev0",
            "use_cache": True,
            "vocab_size": 61,
        },
        (90,),
        verbatim=True,
    ),
    # ... and the oldest ones: no num_key_value_heads, head_dim, eps or rope_theta, and "type" for "rope_type".
    "llama/old-linear": Case(
        {
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": None,
            "eos_token_id": None,
            "hidden_act": "silu",
            "hidden_size": 24,
            "intermediate_size": 44,
            "max_position_embeddings": 256,
            "model_type": "llama",
            "num_attention_heads": 3,
            "num_hidden_layers": 2,
            "rope_scaling": {"factor": 2.5, "type": "linear"},
            "torch_dtype": "float32",
            "vocab_size": 97,
        },
        (33,),
        verbatim=True,
    ),
    # Gemma-3. The window is a ninth of the prompt; the sixth layer is global, the seventh local again.
    "gemma3/window": Case(
        gemma3_config(61, 24, 40, 7, 4, 2, 10, sliding_window=8, rope_parameters=gemma3_ropes(factor=8.0)), (75, 5)
    ),
    "gemma3/odd-pattern": Case(
        gemma3_config(
            *(61, 32, 36, 5, 4, 4, 6),
            sliding_window=5,
            layer_types=[GLOBAL, LOCAL, LOCAL, GLOBAL, LOCAL],
            query_pre_attn_scalar=10,
            rms_norm_eps=1e-3,
        ),
        (37, 1),
    ),
    "gemma3/mqa": Case(
        gemma3_config(67, 30, 52, 4, 3, 1, 8, sliding_window=16, layer_types=[LOCAL, GLOBAL, LOCAL, GLOBAL]), (41, 18)
    ),
    # Positions beyond the original context of 40 tokens. The bases are small, so that the factor matters.
    "gemma3/long": Case(
        gemma3_config(
            *(37, 24, 36, 3, 4, 2, 16),
            sliding_window=32,
            layer_types=[LOCAL, GLOBAL, LOCAL],
            max_position_embeddings=320,
            rope_parameters=gemma3_ropes(factor=8.0, base=1000.0, local_base=100.0),
        ),
        (300,),
    ),
    "gemma3/bfloat16": Case(
        gemma3_config(37, 20, 24, 4, 4, 2, 8, sliding_window=30, layer_types=[LOCAL, LOCAL, GLOBAL, LOCAL])
        | {"dtype": "bfloat16"},
        (280, 7),
        shard_size="1GB",
    ),
    # The fields of transformers 4, as Gemma-3-1B was published ...
    "gemma3/old": Case(
        {
            "architectures": ["Gemma3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "eos_token_id": 1,
            "final_logit_softcapping": None,
            "head_dim": 10,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 28,
            "initializer_range": 0.02,
            "intermediate_size": 40,
            "max_position_embeddings": 512,
            "model_type": "gemma3_text",
            "num_attention_heads": 4,
            "num_hidden_layers": 5,
            "num_key_value_heads": 1,
            "pad_token_id": 0,
            "query_pre_attn_scalar": 12,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 100,
            "rope_scaling": None,
            "rope_theta": 5000,
            "sliding_window": 12,
            "sliding_window_pattern": 3,
            "torch_dtype": "float32",
            "transformers_version": "4.50.0.dev0",
            "use_cache": True,
            "vocab_size": 61,
        },
        (50,),
        verbatim=True,
    ),
    # ... and as the text part of Gemma-3-4B was, which leaves out most of them.
    "gemma3/old-omissions": Case(
        {
            "hidden_size": 24,
            "intermediate_size": 36,
            "model_type": "gemma3_text",
            "num_hidden_layers": 7,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 10,
            "vocab_size": 61,
        },
        (45,),
        verbatim=True,
    ),
    # With a vision tower. The window is longer than an image ...
    "gemma3/images": Case(
        with_images(
            gemma3_config(
                *(67, 30, 44, 4, 6, 2, 10),
                sliding_window=11,
                layer_types=[LOCAL, LOCAL, GLOBAL, LOCAL],
                rope_parameters=gemma3_ropes(factor=8.0),
            ),
            *(28, 7, 4),
        ),
        LAYOUTS,
        distinct=4,
    ),
    # ... or shorter ...
    "gemma3/images-beyond-the-window": Case(
        with_images(
            gemma3_config(67, 24, 40, 3, 4, 1, 8, sliding_window=3, layer_types=[LOCAL, GLOBAL, LOCAL]), *(24, 4, 9)
        ),
        LAYOUTS,
        distinct=4,
    ),
    # ... with the fields that Gemma-3-4B was published with ...
    "gemma3/old-images": Case(
        with_images(
            {
                "hidden_size": 24,
                "intermediate_size": 36,
                "model_type": "gemma3_text",
                "num_hidden_layers": 7,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 6,
                "vocab_size": 61,
            },
            *(28, 7, 4),
            eos_token_id=[1, 50],
            initializer_range=0.02,
            torch_dtype="float32",
            transformers_version="4.50.0.dev0",
        ),
        ((5, IMAGE, 4, IMAGE, 6),),
        verbatim=True,
    ),
    # ... and as the reference saves it.
    "gemma3/images-saved": Case(
        with_images(gemma3_config(41, 16, 24, 2, 2, 1, 6, sliding_window=5, layer_types=[LOCAL, GLOBAL]), *(12, 4, 1)),
        ((3, IMAGE, 2), (2, IMAGE)),
        shard_size="1GB",
    ),
    # Qwen3, text only. eps is large enough to show where the norms are.
    "qwen3/wide-heads": Case(qwen3_config(67, 30, 44, 5, 6, 2, 10, rms_norm_eps=1e-2), (21, 1)),
    "qwen3/mqa-tied": Case(qwen3_config(61, 32, 52, 3, 4, 1, 8, tie_word_embeddings=True), (35, 6)),
    "qwen3/bfloat16": Case(qwen3_config(37, 16, 24, 3, 4, 2, 8, dtype="bfloat16"), (280, 7), shard_size="1GB"),
    # Mixtures of experts. The files of the second store each expert separately.
    "qwen3/experts": Case(qwen3_moe_config(67, 30, 44, 3, 6, 2, 10, 3, 8, 14, norm_topk_prob=True), (21, 1)),
    "qwen3/experts-saved": Case(
        qwen3_moe_config(37, 16, 24, 4, 4, 2, 8, 2, 5, 6, norm_topk_prob=True),
        (19, 7),
        shard_size="20KB",
    ),
    # The fields of transformers 4, as Qwen3-8B was published.
    "qwen3/old": Case(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
            "head_dim": 12,
            "hidden_act": "silu",
            "hidden_size": 26,
            "initializer_range": 0.02,
            "intermediate_size": 40,
            "max_position_embeddings": 512,
            "max_window_layers": 3,
            "model_type": "qwen3",
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 3000,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "transformers_version": "4.51.0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 61,
        },
        (50,),
        verbatim=True,
    ),
    # OLMo-2. eps is large enough to show where the norms are.
    "olmo2/wide-heads": Case(olmo2_config(67, 30, 44, 5, 6, 2, 10, rms_norm_eps=1e-2), (21, 1)),
    "olmo2/bfloat16": Case(olmo2_config(37, 16, 24, 3, 4, 2, 8, dtype="bfloat16"), (280, 7), shard_size="1GB"),
    # The fields of transformers 4, as OLMo-2-1124-7B was published.
    "olmo2/old": Case(
        {
            "architectures": ["Olmo2ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
            "hidden_act": "silu",
            "hidden_size": 24,
            "initializer_range": 0.02,
            "intermediate_size": 36,
            "max_position_embeddings": 512,
            "model_type": "olmo2",
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 5000,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "transformers_version": "4.47.0",
            "use_cache": True,
            "vocab_size": 61,
        },
        (50,),
        verbatim=True,
    ),
}
