"""Make the golden files of text models with the reference implementation, transformers.

    PYTHONPATH=tests python -m tools.goldens.text_models
    PYTHONPATH=tests python -m tools.goldens.text_models --only FAMILY/CASE
    PYTHONPATH=tests python -m tools.goldens.text_models --real FOLDER

The first line makes tests/goldens/FAMILY/ from tiny random models, the cases of text_cases.py. The second makes one of
them. The third makes tests/goldens/NAME.json and NAME.npz from a real model in the folder NAME: smollm2-135m or
gemma3-270m.

Everything runs on the CPU with eager attention, in float32 unless the golden says otherwise. README.md in this folder
describes the files.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from support.tiny import random_weights
from support.tiny_images import picture, pixels_of

from pop.checkpoints.weights import published_name
from tools.common import ROOT
from tools.goldens.files import GOLDENS, MISSING, folder_bytes, write_json
from tools.goldens.text_cases import CASES, GREEDY_TOKENS, IMAGE, Case

try:
    import transformers
except ImportError:
    sys.exit(MISSING.format("transformers"))

MADE_WITH = f"transformers {transformers.__version__} on torch {torch.__version__}, CPU, eager attention"
MIN_MARGIN = 1e-3  # of a greedy token over the second likeliest, in standard deviations of the logits


def make_tiny(name: str, case: Case) -> None:
    """Make one folder, with the first seed whose greedy tokens vary and are clear of ties."""
    for seed in range(100):
        model = random_reference(case, seed)
        golden, arrays = run_prompts(model, case, seed)
        ends = end_tokens(model.config)
        has_ended = any(ends.intersection(prompt["greedy"]) for prompt in golden["prompts"])
        is_varied = golden["fewest_distinct"] >= case.distinct
        if golden["smallest_margin"] >= MIN_MARGIN and is_varied and not has_ended:
            break
    else:
        sys.exit(
            f"{name}: no seed below 100 gives varied greedy tokens without ties; change its sizes, or untie its head"
        )

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
    size = folder_bytes(folder)
    print(f"{name}: seed {seed}, smallest margin {golden['smallest_margin']} std, {size / 1000:.0f} kB")


def end_tokens(config) -> set[int | None]:
    """The tokens at which the reference ends an answer, and the token inside images."""
    ends = getattr(config, "eos_token_id", None) or config.get_text_config().eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {*ends, *image_ids(config)[-1:]}


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
    """The tokens before, after and inside an image, in this order. Empty for a model without images."""
    if not hasattr(config, "vision_config"):
        return []
    return [config.boi_token_index, config.eoi_token_index, config.image_token_index]


def random_prompt(config, layout, random) -> tuple[list[int], int]:
    """Random tokens in a layout of Case.prompt_lengths, and the number of images among them."""
    vocab = config.get_text_config().vocab_size - len(image_ids(config))
    tokens = []
    images = 0
    for part in layout if isinstance(layout, tuple) else (layout,):
        if part == IMAGE:
            boi, eoi, image = image_ids(config)
            tokens += [boi, *[image] * config.mm_tokens_per_image, eoi]
            images += 1
        else:
            tokens += random.randint(0, vocab, part).tolist()
    return tokens, images


def image_inputs(config, tokens: list[int], images: int) -> dict:
    """The further inputs of the reference for a prompt with images."""
    if not images:
        return {}
    size = config.vision_config.image_size
    pixels = torch.stack([pixels_of(picture(size, number)) for number in range(images)])
    return {"pixel_values": pixels, "token_type_ids": (torch.tensor([tokens]) == config.image_token_index).long()}


def run_prompts(model: torch.nn.Module, case: Case, seed: int) -> tuple[dict, dict]:
    random = np.random.RandomState(seed)
    prompts = []
    arrays = {}
    margins = []
    for i, layout in enumerate(case.prompt_lengths):
        tokens, images = random_prompt(model.config, layout, random)
        greedy, logits, lead = greedy_run(model, tokens, GREEDY_TOKENS, images=images)
        arrays[f"logits_{i}"] = logits
        prompt = {"tokens": tokens, "greedy": greedy}
        if images:
            prompt["images"] = images
        prompts.append(prompt)
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
    model, tokens: list[int], count: int, *, answer_only: bool = False, images: int = 0
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Generate greedily with the reference's own `generate`.

    Returns:
        `count` greedy tokens, the logits, and each token's lead over the second likeliest in standard deviations. The
        logits [T + count - 1, V] are those of the prompt and of all greedy tokens but the last. With answer_only, they
        are the logits [count, V] that predict the greedy tokens.
    """
    output = model.generate(
        torch.tensor([tokens]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
        suppress_tokens=image_ids(model.config)[-1:] or None,  # the reference would then expect an image
        **image_inputs(model.config, tokens, images),
    )
    greedy = output[0, len(tokens) :].tolist()
    logits = all_logits(model, tokens + greedy[:-1], count if answer_only else 0, images)
    chosen = logits[-count:]
    top = np.sort(chosen, axis=-1)
    lead = (top[:, -1] - top[:, -2]) / logits.std()
    if chosen.argmax(-1).tolist() != greedy:  # cached and uncached run disagree: a tie
        lead[:] = 0
    return greedy, logits, lead


@torch.no_grad()
def all_logits(model, tokens: list[int], last: int = 0, images: int = 0) -> np.ndarray:
    """Logits at the `last` last tokens, or at all tokens for 0."""
    options = image_inputs(model.config, tokens, images)
    return model(torch.tensor([tokens]), use_cache=False, logits_to_keep=last, **options).logits[0].float().numpy()


# ---------------------------------------------------------------------------------------- the real model

QUESTION = "What is photosynthesis?"
PLAIN = "The old lighthouse stood at the end of the pier, and every evening"
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# For each model: the text before a prompt, the question as a chat, the long text, and its length in tokens.
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
SAMPLED_IDS = 512  # token ids whose logits are kept


def make_real(folder: Path) -> None:
    """Greedy tokens and sampled boundary logits of a chat, a plain continuation and a long text."""
    bos, chat, long_text, long_tokens = REAL[folder.name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = load_reference(folder, torch.float32)
    texts = {"chat": chat, "plain": PLAIN, "long": long_text.read_text(encoding="utf-8")}
    ids = np.sort(np.random.RandomState(0).choice(model.config.vocab_size, SAMPLED_IDS, replace=False))
    prompts = {}
    arrays = {"ids": ids.astype(np.int32)}
    for name, text in texts.items():
        tokens = tokenizer(bos + text, add_special_tokens=False)["input_ids"][:long_tokens]
        greedy, logits, lead = greedy_run(model, tokens, REAL_GREEDY_TOKENS, answer_only=True)
        if lead.min() < MIN_MARGIN:
            sys.exit(f"{name}: {tokenizer.decode(greedy)!r} has a near tie; change the text")
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the golden files of the test suite with transformers.")
    parser.add_argument("--real", type=Path, metavar="FOLDER", help=f"HF layout; named {' or '.join(REAL)}")
    parser.add_argument("--only", choices=CASES, help="make this tiny case only")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.real and options.real.name not in REAL:
        parser.error(f"{options.real} is not named {' or '.join(REAL)}")
    if options.real:
        make_real(options.real)
        return
    for name in [options.only] if options.only else CASES:
        make_tiny(name, CASES[name])


if __name__ == "__main__":
    main()
