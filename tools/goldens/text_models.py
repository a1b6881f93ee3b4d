"""Make the golden files of the test suite with the reference implementation, transformers.

    python -m tools.goldens.text_models                  tiny random models -> tests/goldens/FAMILY/
    python -m tools.goldens.text_models --real FOLDER    SmolLM2-135M-Instruct or Gemma-3-270M in FOLDER/smollm2-135m or
                                                  FOLDER/gemma3-270m (HF checkpoint layout)
                                                  -> tests/goldens/smollm2-135m.json and .npz, or gemma3-270m

Run it in an environment that holds transformers beside what `pop` needs: nothing in pop/ or tests/ imports
transformers. Everything runs on the CPU with eager attention, in float32 where nothing else is said, and
each golden says what made it.

A tiny case is a folder: config.json as the reference saved it (older dialects: as written here), golden.json
with the prompts and their greedy tokens, and logits.npz with the logits at every position of a prompt and its
greedy continuation. Most cases keep a seed instead of weights: tests/support/tiny.py makes the same weights for both
sides. Two hold the very files that `save_pretrained` wrote.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

try:
    import transformers
except ImportError:
    sys.exit(
        "make_goldens.py needs the package transformers: install it (pip install transformers), best in a "
        "virtual environment of its own, and run the script there"
    )

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"

from support.tiny import random_weights  # noqa: E402
from support.tiny_images import picture, pixels_of  # noqa: E402

from pop.checkpoints.weights import published_name  # noqa: E402

MADE_WITH = f"transformers {transformers.__version__} on torch {torch.__version__}, CPU, eager attention"
GREEDY_TOKENS = 16
MIN_MARGIN = 1e-3  # of a greedy token over the runner-up, in standard deviations of the logits


# ---------------------------------------------------------------------------------------- the tiny cases


@dataclass
class Case:
    config: dict  # config.json; the weights are random in float32, then rounded to its dtype
    prompt_lengths: tuple  # of texts; or, of texts with IMAGEs among them, a tuple
    verbatim: bool = False  # config.json is kept as it stands here, not as the reference saves it again
    shard_size: str | None = None  # keep the weights too, in files of at most this size
    distinct: int = GREEDY_TOKENS // 2  # so many different greedy tokens has each prompt, at least


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
# Images at each place that they can have in a prompt, alone and two of them.
LAYOUTS = (13, (7, IMAGE, 6), (4, IMAGE, 5, IMAGE, 3), (IMAGE, 9), (8, IMAGE), (IMAGE, 1, IMAGE))


def with_images(text: dict, image_size: int, patch: int, tokens: int, **fields) -> dict:
    """The config of a whole Gemma-3. Its last three tokens are those of images."""
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
    """Sizes: those of qwen3_config, then how many experts, of a token and of all, and their width."""
    *sizes, per_token, count, width = sizes
    experts = {"num_experts_per_tok": per_token, "num_experts": count, "moe_intermediate_size": width}
    return qwen3_config(*sizes, **experts, **options) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
    }


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
            rms_norm_eps=1e-3,  # large enough for its place in the formula to show
        ),
        (19, 6),
    ),
    # The eight frequencies have wavelengths of 6, 20, 63 ... tokens, the bounds are 32 / 4 and 32 / 1: each
    # of the three branches (kept, blended, divided) is taken. The prompt is nine times the original length.
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
    # Long enough for positions that bfloat16 cannot tell apart (beyond 256).
    "llama/bfloat16": Case(config(37, 16, 24, 3, 4, 2, 8, dtype="bfloat16"), (280, 7), shard_size="1GB"),
    # The dialect of transformers 4, in the form that Llama-3.1 was published in ...
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
    # ... and in its oldest: no num_key_value_heads, head_dim, eps or rope_theta, "type" for "rope_type".
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
    # Trained on 40 tokens, said to reach 320: the prompt is far beyond the original range. Bases so small that the
    # factor shows.
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
    # The dialect of transformers 4, in the form that Gemma-3-1B was published in ...
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
    # ... and as the text part of Gemma-3-4B was, which leaves out most of it.
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
    # With a vision tower. The window holds an image and more ...
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
    # ... or is shorter than one ...
    "gemma3/images-beyond-the-window": Case(
        with_images(
            gemma3_config(67, 24, 40, 3, 4, 1, 8, sliding_window=3, layer_types=[LOCAL, GLOBAL, LOCAL]), *(24, 4, 9)
        ),
        LAYOUTS,
        distinct=4,
    ),
    # ... in the form that Gemma-3-4B was published in ...
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
    # Qwen3, text only. eps so large that the places of the norms show.
    "qwen3/wide-heads": Case(qwen3_config(67, 30, 44, 5, 6, 2, 10, rms_norm_eps=1e-2), (21, 1)),
    "qwen3/mqa-tied": Case(qwen3_config(61, 32, 52, 3, 4, 1, 8, tie_word_embeddings=True), (35, 6)),
    "qwen3/bfloat16": Case(qwen3_config(37, 16, 24, 3, 4, 2, 8, dtype="bfloat16"), (280, 7), shard_size="1GB"),
    # Mixtures of experts; with dense layers between, and saved, which is expert by expert.
    "qwen3/experts": Case(qwen3_moe_config(67, 30, 44, 3, 6, 2, 10, 3, 8, 14, norm_topk_prob=True), (21, 1)),
    "qwen3/experts-saved": Case(
        qwen3_moe_config(37, 16, 24, 4, 4, 2, 8, 2, 5, 6, mlp_only_layers=[0], decoder_sparse_step=2),
        (19, 7),
        shard_size="20KB",
    ),
    # The dialect of transformers 4, in the form that Qwen3-8B was published in.
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
}


def make_tiny(name: str, case: Case) -> None:
    for seed in range(100):
        model = random_reference(case, seed)
        golden, arrays = run_prompts(model, case, seed)
        ends = getattr(model.config, "eos_token_id", None) or model.config.get_text_config().eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), *image_ids(model.config)[-1:]}
        ended = any(ends.intersection(prompt["greedy"]) for prompt in golden["prompts"])
        varied = golden["fewest_distinct"] >= case.distinct
        if golden["smallest_margin"] >= MIN_MARGIN and varied and not ended:
            break
    else:
        sys.exit(f"{name}: no seed below 100 gives varied greedy tokens clear of ties; change its sizes")

    folder = GOLDENS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if case.shard_size:
        model.to(stored_dtype(case)).save_pretrained(folder, max_shard_size=case.shard_size)
        (folder / "generation_config.json").unlink(missing_ok=True)
    elif case.verbatim:
        write_json(folder / "config.json", case.config)
    else:
        model.config.save_pretrained(folder)
    if stored_dtype(case) != torch.float32:  # a second run, in the stored dtype, as a user would load it
        model = load_reference(folder, stored_dtype(case))
        for i, prompt in enumerate(golden["prompts"]):
            arrays[f"stored_dtype_logits_{i}"] = all_logits(model, prompt["tokens"] + prompt["greedy"][:-1])
    write_json(folder / "golden.json", golden)
    np.savez_compressed(folder / "logits.npz", **arrays)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: seed {seed}, smallest margin {golden['smallest_margin']} std, {size / 1000:.0f} kB")


def stored_dtype(case: Case) -> torch.dtype:
    return getattr(torch, case.config.get("dtype", "float32"))


def random_reference(case: Case, seed: int) -> torch.nn.Module:
    """The reference's model for the case, in float32, with weights that the case's dtype holds exactly."""
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", case.config)
        parsed = transformers.AutoConfig.from_pretrained(folder)
    auto = transformers.AutoModelForImageTextToText if image_ids(parsed) else transformers.AutoModelForCausalLM
    model = auto.from_config(parsed, dtype=torch.float32, attn_implementation="eager").eval()
    if hasattr(parsed, "num_experts"):
        model.set_experts_implementation("eager")
    shapes = {published_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    weights = random_weights(shapes, seed, case.config["model_type"].removesuffix("_text"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[published_name(name)].to(stored_dtype(case)))
    return model


def load_reference(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(folder, dtype=dtype, attn_implementation="eager").eval()


def image_ids(config) -> list[int]:
    """The tokens of an image, in front of it and behind it, if the model takes images; the last is its own."""
    if not hasattr(config, "vision_config"):
        return []
    return [config.boi_token_index, config.eoi_token_index, config.image_token_index]


def random_prompt(config, layout, random) -> tuple[list[int], int]:
    """Its tokens, and how many images it has."""
    vocab = config.get_text_config().vocab_size - len(image_ids(config))
    tokens, images = [], 0
    for part in layout if isinstance(layout, tuple) else (layout,):
        if part == IMAGE:
            boi, eoi, image = image_ids(config)
            tokens += [boi, *[image] * config.mm_tokens_per_image, eoi]
            images += 1
        else:
            tokens += random.randint(0, vocab, part).tolist()
    return tokens, images


def image_inputs(config, tokens: list[int], images: int) -> dict:
    """What the reference takes beside the tokens of a prompt with images."""
    if not images:
        return {}
    size = config.vision_config.image_size
    pixels = torch.stack([pixels_of(picture(size, number)) for number in range(images)])
    return {"pixel_values": pixels, "token_type_ids": (torch.tensor([tokens]) == config.image_token_index).long()}


def run_prompts(model: torch.nn.Module, case: Case, seed: int) -> tuple[dict, dict]:
    random = np.random.RandomState(seed)
    prompts, arrays, margins = [], {}, []
    for i, layout in enumerate(case.prompt_lengths):
        tokens, images = random_prompt(model.config, layout, random)
        greedy, arrays[f"logits_{i}"], lead = greedy_run(model, tokens, GREEDY_TOKENS, images=images)
        prompts.append({"tokens": tokens, "greedy": greedy} | ({"images": images} if images else {}))
        margins.append(lead.min())
    golden = {
        "made_with": MADE_WITH,
        "seed": seed,
        "smallest_margin": rounded(min(margins)),
        "fewest_distinct": min(len(set(prompt["greedy"])) for prompt in prompts),
        "prompts": prompts,
    }
    return golden, arrays


@torch.no_grad()
def greedy_run(
    model, tokens: list[int], count: int, *, answer_alone: bool = False, images: int = 0
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """`count` greedy tokens by the reference's own generate, the logits [T + count - 1, V] of the prompt and
    of all but the last of them, and each one's lead over the runner-up, in standard deviations.

    answer_alone: only the logits [count, V] that the greedy tokens were chosen by.
    """
    output = model.generate(
        torch.tensor([tokens]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
        suppress_tokens=image_ids(model.config)[-1:] or None,  # it would want an image: a seed to leave
        **image_inputs(model.config, tokens, images),
    )
    greedy = output[0, len(tokens) :].tolist()
    logits = all_logits(model, tokens + greedy[:-1], count if answer_alone else 0, images)
    chosen = logits[-count:]
    top = np.sort(chosen, axis=-1)
    lead = (top[:, -1] - top[:, -2]) / logits.std()
    if chosen.argmax(-1).tolist() != greedy:  # cached and uncached run disagree: a tie
        lead[:] = 0
    return greedy, logits, lead


@torch.no_grad()
def all_logits(model, tokens: list[int], last: int = 0, images: int = 0) -> np.ndarray:
    """Logits at the last so many tokens, or at all of them."""
    options = image_inputs(model.config, tokens, images)
    return model(torch.tensor([tokens]), use_cache=False, logits_to_keep=last, **options).logits[0].float().numpy()


# ---------------------------------------------------------------------------------------- the real model

QUESTION = "What is photosynthesis?"
PLAIN = "The old lighthouse stood at the end of the pier, and every evening"
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# What goes before the texts, the question laid out as a chat, the long text and its length in tokens.
REAL = {
    "smollm2-135m": (
        "",
        f"<|im_start|>system\n{SMOLLM2_SYSTEM}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n"
        "<|im_start|>assistant\n",
        ROOT / "pop" / "data" / "alice.txt",
        1100,
    ),
    "gemma3-270m": (
        "<bos>",
        f"<start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
        ROOT / "tools" / "evaluate" / "texts" / "prose.txt",
        1700,  # more than three windows
    ),
}
REAL_GREEDY_TOKENS = 40
SAMPLED_IDS = 512  # of the vocabulary, whose logits are kept


def make_real(folder: Path) -> None:
    """Greedy tokens and sampled boundary logits for a question, a plain continuation and a long text."""
    bos, chat, long_text, long_tokens = REAL[folder.name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = load_reference(folder, torch.float32)
    texts = {"chat": chat, "plain": PLAIN, "long": long_text.read_text(encoding="utf-8")}
    ids = np.sort(np.random.RandomState(0).choice(model.config.vocab_size, SAMPLED_IDS, replace=False))
    prompts, arrays = {}, {"ids": ids.astype(np.int32)}
    for name, text in texts.items():
        tokens = tokenizer(bos + text, add_special_tokens=False)["input_ids"][:long_tokens]
        greedy, logits, lead = greedy_run(model, tokens, REAL_GREEDY_TOKENS, answer_alone=True)
        if lead.min() < MIN_MARGIN:
            sys.exit(f"{name}: {tokenizer.decode(greedy)!r} holds a near tie; change the text")
        prompts[name] = {
            "tokens": tokens,
            "greedy": greedy,
            "greedy_text": tokenizer.decode(greedy),
            "smallest_margin": rounded(lead.min()),
            "logits_std": rounded(logits[0].std()),
        }
        arrays[name] = logits[0, ids]
        print(f"{name}: {len(tokens)} tokens, smallest margin {rounded(lead.min())} std")
        print(f"    {prompts[name]['greedy_text']!r}")
    golden = {"made_with": MADE_WITH, "question": QUESTION, "plain": PLAIN, "prompts": prompts}
    write_json(GOLDENS / f"{folder.name}.json", golden)
    np.savez_compressed(GOLDENS / f"{folder.name}.npz", **arrays)


# ---------------------------------------------------------------------------------------- the command


def rounded(value) -> float:
    return float(f"{value:.3g}")


def write_json(file: Path, content: dict) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    text = re.sub(r"\[[\d\s,]+\]", lambda ids: " ".join(ids[0].split()), text)  # a list of ids is one line
    file.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the golden files of the test suite with transformers.")
    parser.add_argument("--real", type=Path, metavar="FOLDER", help=f"HF layout; named {' or '.join(REAL)}")
    parser.add_argument("--only", choices=CASES, help="make this tiny case alone")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.real and options.real.name not in REAL:
        parser.error(f"{options.real} is not named {' or '.join(REAL)}")
    if options.real:
        make_real(options.real)
    else:
        for name in [options.only] if options.only else CASES:
            make_tiny(name, CASES[name])


if __name__ == "__main__":
    main()
