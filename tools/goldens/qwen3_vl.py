"""Make the golden files of Qwen3-VL with the reference implementation, transformers.

    PYTHONPATH=tests python -m tools.goldens.qwen3_vl

Makes tests/goldens/qwen3_vl/: tiny random models with prompts that hold images and videos, prepared images and videos,
and conversations as token ids. Needs transformers and torchvision. Weights and pixels come from seeds, see
tests/support. README.md in this folder describes the files.
"""

import shutil
import sys

import numpy as np
import torch
from support.tiny import random_patches, random_weights
from support.tiny_images import image, levels, random_bytes

from tools.goldens import files
from tools.goldens.files import MISSING, folder_bytes, write_json

try:
    import transformers
    from transformers import (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
    )
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
    from transformers.video_utils import VideoMetadata
except ImportError:
    sys.exit(MISSING.format("transformers and torchvision"))

GOLDENS = files.GOLDENS / "qwen3_vl"

MADE_WITH = f"transformers {transformers.__version__} on torch {torch.__version__}, CPU, eager attention"
GREEDY_TOKENS, MIN_MARGIN = 8, 1e-3
TEXT_TOKENS, IMAGE, VIDEO, START, END = 60, 60, 61, 62, 63  # ids below the first are text

MODELS = {
    # The axes of the rotated pairs are t h w t h w t h w t. Two DeepStack layers.
    "untied": {
        "text_config": {
            "vocab_size": 67,
            "hidden_size": 30,
            "intermediate_size": 44,
            "num_hidden_layers": 5,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 20,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [4, 3, 3]},
        },
        "vision_config": {
            "depth": 4,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_heads": 3,
            "out_hidden_size": 30,
            "num_position_embeddings": 25,
            "patch_size": 4,
            "deepstack_visual_indexes": [1, 3],
        },
        "tie_word_embeddings": False,
    },
    # Sections with one pair for rows, as many DeepStack layers as tower layers, patches of three frames.
    "tied": {
        "text_config": {
            "vocab_size": 67,
            "hidden_size": 26,
            "intermediate_size": 36,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 12,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [3, 1, 2]},
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 24,
            "intermediate_size": 28,
            "num_heads": 2,
            "out_hidden_size": 26,
            "num_position_embeddings": 49,
            "patch_size": 2,
            "temporal_patch_size": 3,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        "tie_word_embeddings": True,
    },
    # Mixtures of experts.
    "experts": {
        "text_config": {
            "vocab_size": 67,
            "hidden_size": 30,
            "intermediate_size": 44,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 20,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 14,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [4, 3, 3]},
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_heads": 3,
            "out_hidden_size": 30,
            "num_position_embeddings": 25,
            "patch_size": 4,
            "deepstack_visual_indexes": [0, 1],
        },
        "tie_word_embeddings": False,
    },
}
# Prompts: a number stands for tokens of text, a pair for an image of rows and columns of patches, a triple for a video.
PROMPTS = {
    "text": [23],
    "image": [5, (4, 6), 7],
    "two-images": [3, (6, 2), 4, (4, 8), 5],
    "image-first": [(4, 4), 9],
    "image-last": [9, (2, 6)],
    "video": [4, (3, 4, 6), 6],
    "image-and-video": [2, (2, 4, 2), 3, (6, 4), 2],
    "same-sizes": [2, (4, 6), 1, (4, 6), 1, (4, 6), 3],
}
CASES = {
    "untied": tuple(PROMPTS),
    "tied": ("image", "video", "image-and-video"),
    "experts": ("text", "image", "image-and-video"),
}


def lay_out(prompt, merge: int, random) -> tuple[list[int], list, list]:
    """Token ids, and the grids of images and of videos. Text that gives their times separates the frames of a video."""
    tokens = []
    images = []
    videos = []

    def text(count):
        tokens.extend(random.randint(0, TEXT_TOKENS, count).tolist())

    for part in prompt:
        if isinstance(part, int):
            text(part)
            continue
        is_video = len(part) == 3
        frames, rows, columns = part if is_video else (1, *part)
        grids = videos if is_video else images
        grids.append([frames, rows, columns])
        placeholder = VIDEO if is_video else IMAGE
        for frame in range(frames):
            if is_video:
                text(2 + frame % 2)
            run = [placeholder] * (rows * columns // merge**2)
            # An image at either end of a prompt lacks marks, so it includes the very first or last token.
            is_at_an_end = part in (prompt[0], prompt[-1])
            tokens.extend(run if is_at_an_end else [START, *run, END])
    return tokens, images, videos


def run(model, prompt, seed: int) -> tuple[dict, dict, float]:
    """The golden and the arrays of one prompt, and the smallest lead of a greedy token; 0 for a tie."""
    vision = model.config.vision_config
    tokens, images, videos = lay_out(prompt, vision.spatial_merge_size, np.random.RandomState(seed))
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    inputs = {}
    arrays = {}
    of_kind = {"image": ("pixel_values", images, seed + 5), "video": ("pixel_values_videos", videos, seed + 6)}
    for kind, (argument, grids, seed_of_patches) in of_kind.items():
        if not grids:
            continue
        count = sum(frames * rows * columns for frames, rows, columns in grids)
        patches = random_patches(count, values, seed_of_patches)
        inputs[argument] = patches
        inputs[f"{kind}_grid_thw"] = torch.tensor(grids)
        output = model.model.get_image_features(patches, torch.tensor(grids), return_dict=True)
        arrays[f"{kind}_features"] = torch.cat(list(output.pooler_output)).numpy()
        deepstack = [torch.cat(list(features)) for features in output.deepstack_features]
        arrays[f"{kind}_deepstack"] = torch.stack(deepstack).numpy()

    def full(ids):
        ids = torch.tensor([ids])
        kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        model.model.rope_deltas = None
        return {"input_ids": ids, "mm_token_type_ids": kinds, "attention_mask": torch.ones_like(ids), **inputs}

    out = model.generate(
        **full(tokens), do_sample=False, max_new_tokens=GREEDY_TOKENS, eos_token_id=None, pad_token_id=0
    )
    greedy = out[0, len(tokens) :].tolist()
    if {IMAGE, VIDEO} & set(greedy):
        return {}, {}, 0.0
    whole = full(tokens + greedy[:-1])
    logits = model(**whole, use_cache=False).logits[0].numpy()
    arrays["logits"] = logits
    chosen = np.sort(logits[-GREEDY_TOKENS:], axis=-1)
    margin = float((chosen[:, -1] - chosen[:, -2]).min() / logits.std())
    if logits[-GREEDY_TOKENS:].argmax(-1).tolist() != greedy:  # cached and uncached run disagree: a tie
        margin = 0.0
    grids = {"image_grid_thw": inputs.get("image_grid_thw"), "video_grid_thw": inputs.get("video_grid_thw")}
    _, delta = model.model.get_rope_index(whole["input_ids"], whole["mm_token_type_ids"], **grids)
    golden = {
        "seed": seed,
        "tokens": tokens,
        "images": images,
        "videos": videos,
        "greedy": greedy,
        "next": len(tokens) + len(greedy) - 1 + int(delta),
        "margin": margin,
    }
    return golden, arrays, margin


@torch.no_grad()
def make(name: str, fields: dict) -> None:
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    has_experts = "num_experts" in fields["text_config"]
    config_class = Qwen3VLMoeConfig if has_experts else Qwen3VLConfig
    model_class = Qwen3VLMoeForConditionalGeneration if has_experts else Qwen3VLForConditionalGeneration
    config = config_class(**fields, **ids)
    config._attn_implementation = "eager"
    model = model_class(config).float().eval()
    model.set_attn_implementation("eager")
    if has_experts:
        model.set_experts_implementation("eager")
    shapes = {parameter: tuple(values.shape) for parameter, values in model.named_parameters()}
    weights = random_weights(shapes, seed=7, family="qwen3_vl")
    for parameter, values in model.named_parameters():
        values.copy_(weights[parameter])
    folder = GOLDENS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.config.architectures = [model_class.__name__]
    model.config.save_pretrained(folder)
    goldens = {}
    arrays = {}
    for case in CASES[name]:
        for seed in range(100):
            golden, of_case, margin = run(model, PROMPTS[case], seed)
            if margin >= MIN_MARGIN:
                break
        else:
            sys.exit(f"{name}, {case}: every seed below 100 has near ties")
        goldens[case] = golden
        arrays |= {f"{case}_{key}": values for key, values in of_case.items()}
        print(f"{name}, {case}: seed {seed}, margin {margin:.2g}, {len(golden['tokens'])} tokens")
    write_json(folder / "golden.json", {"made_with": MADE_WITH, "weights": 7, "cases": goldens}, indent=1)
    np.savez_compressed(folder / "arrays.npz", **arrays)
    print(f"{name}: {folder_bytes(folder) / 1000:.0f} kB")


# ---------------------------------------------------------------------------------------- images and videos

# Images of tests/support/tiny_images.py in a small size. One is also prepared in the published size, and sampled.
IMAGES = ("tall", "wide", "tiny", "dot", "line", "large", "alpha", "grey")
SMALL = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IMAGE_PIXELS = (300, 1500)
VIDEO_PIXELS = (800, 4000)
PUBLISHED_PIXELS = (65536, 16777216)
PUBLISHED_VIDEO_PIXELS = (4096, 25165824)
SAMPLES = 2000  # values that are kept of the image in the published size
# Frames, height, width, and frames per second, of which two are kept. None keeps all frames.
VIDEOS = {
    "odd": (5, 20, 31, None),
    "even": (4, 40, 22, None),
    "narrow": (4, 6, 40, None),  # lower than a merged square, which changes the width
    "long": (13, 25, 25, None),
    "sampled": (40, 16, 24, 8.0),
    "few": (7, 16, 24, 30.0),  # a quarter of a second: at least four frames
    "fewer": (3, 16, 24, 30.0),
}


def exact_levels(pixels: torch.Tensor) -> np.ndarray:
    """The bytes that prepared pixels come from, after a check that scaling them gives these pixels."""
    found = levels(pixels)
    assert torch.equal((torch.from_numpy(found).float() - 127.5) / 127.5, pixels), "the reference scales differently"
    return found


def make_images() -> None:
    def size(pixels):
        return {"shortest_edge": pixels[0], "longest_edge": pixels[1]}

    arrays = {}
    small = Qwen2VLImageProcessor(**SMALL, size=size(IMAGE_PIXELS))
    real = Qwen2VLImageProcessor(**SMALL | {"patch_size": 16}, size=size(PUBLISHED_PIXELS))
    for name in IMAGES:
        out = small(image(name), return_tensors="pt")
        arrays[name] = exact_levels(out["pixel_values"])
        arrays[f"{name}-grid"] = out["image_grid_thw"][0].numpy()
    out = real(image("large"), return_tensors="pt")
    pixels = exact_levels(out["pixel_values"])
    where = np.random.RandomState(0).choice(pixels.size, SAMPLES, replace=False)
    arrays |= {"real-samples": pixels.ravel()[where], "real-grid": out["image_grid_thw"][0].numpy()}
    arrays["real-sums"] = pixels.sum(1, dtype=np.int64)
    for seed, (name, (frames, height, width, fps)) in enumerate(VIDEOS.items()):
        video = random_bytes(frames * height, width, 3, seed).reshape(frames, height, width, 3)
        processor = Qwen3VLVideoProcessor(**SMALL, size=size(VIDEO_PIXELS))
        metadata = VideoMetadata(total_num_frames=frames, fps=fps, frames_indices=list(range(frames)))
        options = {"do_sample_frames": fps is not None, "return_metadata": True, "cap_pixels_per_frame": False}
        out = processor(video, video_metadata=metadata, return_tensors="pt", **options)
        arrays[f"video-{name}"] = exact_levels(out["pixel_values_videos"])
        arrays[f"video-{name}-grid"] = out["video_grid_thw"][0].numpy()
        indices = out["video_metadata"][0].frames_indices
        times = Qwen3VLProcessor._calculate_timestamps(None, list(map(int, indices)), fps or 24, 2)
        arrays[f"video-{name}-times"] = np.array(times)
        print(f"video {name}: grid {arrays[f'video-{name}-grid']}, times {times}")
    np.savez_compressed(GOLDENS / "images.npz", **arrays)
    print(f"images: {(GOLDENS / 'images.npz').stat().st_size / 1000:.0f} kB")


# -------------------------------------------------------------------------------------------------- layouts

# Messages. An image is its height, width and seed; a video its frames, height, width, seed and frames per second.
CONVERSATIONS = {
    "image": [["user", "What is ", {"image": [256, 264, 1]}, " this?"]],
    "images-and-turns": [
        ["system", "Be brief."],
        ["user", {"image": [400, 200, 2]}, "Look:\n", {"image": [300, 310, 3]}],
        ["assistant", "A cat."],
        ["user", "And ", {"image": [256, 264, 4]}],
    ],
    "video": [["user", {"video": [5, 24, 16, 5, None]}, "What happens?"]],
    "video-with-a-rate": [["user", "Look: ", {"video": [16, 64, 96, 6, 8.0]}, "\n\n", {"image": [256, 264, 1]}, "?"]],
    "two-videos": [["user", {"video": [4, 32, 32, 7, None]}, {"video": [3, 64, 32, 8, None]}, " Which?"]],
}


def make_layouts() -> None:
    def size(pixels):
        return {"shortest_edge": pixels[0], "longest_edge": pixels[1]}

    real = SMALL | {"patch_size": 16}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(files.GOLDENS / "tokenizers" / "qwen3" / "tokenizer.json")
    )
    layouts = {}
    for name, messages in CONVERSATIONS.items():
        text, images, videos = "", [], []
        for role, *parts in messages:  # as the published chat template writes them
            text += f"<|im_start|>{role}\n"
            for part in parts:
                (kind, given), *_ = part.items() if isinstance(part, dict) else [(None, part)]
                text += f"<|vision_start|><|{kind}_pad|><|vision_end|>" if kind else part
                if kind == "image":
                    images.append(random_bytes(*given[:2], 3, given[2]))
                if kind == "video":
                    frames, height, width, seed, fps = given
                    video = random_bytes(frames * height, width, 3, seed).reshape(frames, height, width, 3)
                    videos.append((video, fps))
            text += "<|im_end|>\n"
        processor = Qwen3VLProcessor(
            Qwen2VLImageProcessor(**real, size=size(PUBLISHED_PIXELS)),
            tokenizer,
            Qwen3VLVideoProcessor(**real, size=size(PUBLISHED_VIDEO_PIXELS)),
        )
        seen = {"images": images} if images else {}
        if videos:
            metadata = [
                VideoMetadata(total_num_frames=len(video), fps=fps, frames_indices=list(range(len(video))))
                for video, fps in videos
            ]
            sampled = any(fps for _, fps in videos)
            seen |= {"videos": [video for video, _ in videos], "video_metadata": metadata}
            seen |= {"do_sample_frames": sampled, "cap_pixels_per_frame": False}
        ids = processor(text=[text + "<|im_start|>assistant\n"], **seen)["input_ids"][0]
        layouts[name] = {"messages": messages, "tokens": list(map(int, ids))}
        print(f"layout {name}: {len(ids)} tokens")
    write_json(GOLDENS / "layouts.json", {"made_with": MADE_WITH, "cases": layouts}, indent=1)


def main() -> None:
    transformers.logging.set_verbosity_error()
    GOLDENS.mkdir(parents=True, exist_ok=True)
    make_images()
    make_layouts()
    for name, fields in MODELS.items():
        make(name, fields)


if __name__ == "__main__":
    main()
