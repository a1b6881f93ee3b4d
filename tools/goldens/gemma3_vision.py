"""Make the golden files of Gemma-3's vision with the reference implementation, transformers.

    PYTHONPATH=tests python -m tools.goldens.gemma3_vision

Makes tests/goldens/vision/: prepared images, texts with images, and the features of tiny random vision towers. Needs
transformers, torchvision and pillow. Images and weights come from seeds, see tests/support.
"""

import json
import sys

import numpy as np
import torch
from PIL import Image
from support.tiny import random_weights
from support.tiny_images import IMAGES, image, levels, random_bytes

from tools.goldens import files
from tools.goldens.files import MISSING

try:
    import tokenizers
    import torchvision
    import transformers
    from transformers.models.gemma3.image_processing_gemma3 import Gemma3ImageProcessor
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
    from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
    from transformers.models.siglip.modeling_siglip import SiglipVisionModel
except ImportError:
    sys.exit(MISSING.format("transformers and torchvision"))

GOLDENS = files.GOLDENS / "vision"

MADE_WITH = f"transformers {transformers.__version__}, torchvision {torchvision.__version__}, torch {torch.__version__}"

# ---------------------------------------------------------------------------------------- prepared images

TINY_SIZE, REAL_SIZE = 28, 896
SAMPLES = 2000  # values that are kept of an image of the real size, with the sum of each channel


def exact_levels(pixels: torch.Tensor) -> np.ndarray:
    """The bytes that prepared pixels come from, after a check that scaling them gives these pixels."""
    found = levels(pixels)
    assert torch.equal((torch.from_numpy(found).float() - 127.5) / 127.5, pixels), "the reference scales differently"
    return found


def prepare(picture: Image.Image, size: int) -> np.ndarray:
    processor = Gemma3ImageProcessor(
        size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2
    )
    return exact_levels(processor(picture, return_tensors="pt")["pixel_values"])


def make_images() -> None:
    arrays = {name: prepare(image(name), TINY_SIZE) for name in IMAGES}
    for name in ("wide", "tiny"):
        real = prepare(image(name), REAL_SIZE)
        where = np.random.RandomState(0).choice(real.size, SAMPLES, replace=False)
        arrays[f"{name}-real-samples"] = real.ravel()[where]
        arrays[f"{name}-real-sums"] = real.sum((0, 2, 3), dtype=np.int64)
    np.savez_compressed(GOLDENS / "images.npz", **arrays)


# ---------------------------------------------------------------------------------------- texts with images

LAYOUT = "Compare <start_of_image> to<start_of_image>and <start_of_image>. "
LAYOUT_SIZES = ((100, 20), (20, 20), (9, 30))  # width and height of its images


def processor_with_words(image_processor: Gemma3ImageProcessor, image_seq_length: int) -> Gemma3Processor:
    """A processor with a tokenizer of whole words, which knows the tokens of images only."""
    names = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    vocabulary = {name: index for index, name in enumerate([*names.values(), "<pad>", "?"])}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?")),
        pad_token="<pad>",
        extra_special_tokens=names,
    )
    return Gemma3Processor(image_processor, tokenizer, image_seq_length=image_seq_length)


def make_layouts() -> None:
    """LAYOUT with two tokens in place of each image."""
    image_processor = Gemma3ImageProcessor(size={"height": TINY_SIZE, "width": TINY_SIZE})
    processor = processor_with_words(image_processor, image_seq_length=2)
    pictures = [Image.fromarray(random_bytes(height, width, 3, seed=0)) for width, height in LAYOUT_SIZES]
    inputs = processor.image_processor(pictures)
    first, *others = LAYOUT.split(processor.boi_token)
    whole = first
    for n, other in enumerate(others):
        whole += processor.replace_image_token(inputs, n) + other
    result = {"made_with": MADE_WITH, "text": LAYOUT, "sizes": LAYOUT_SIZES, "whole": whole}
    (GOLDENS / "layouts.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------- tower and projector

# image_size, patch_size, tokens, layers, width, heads, MLP, norm eps, the language model's width
TOWERS = {
    "pooled": (28, 7, 4, 3, 24, 3, 40, 1e-6, 20),
    "odd-grid": (45, 5, 9, 2, 25, 5, 36, 1e-3, 14),  # eps is large enough to show where it is added
    "not-pooled": (42, 14, 9, 3, 32, 2, 52, 1e-6, 40),
}
IMAGES_A_TOWER = 2


def make_towers() -> None:
    cases, arrays = {}, {}
    for seed, (name, sizes) in enumerate(TOWERS.items()):
        image_size, patch, tokens, layers, width, heads, mlp, eps, text_width = sizes
        vision = {
            "model_type": "siglip_vision_model",
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": image_size,
            "patch_size": patch,
            "layer_norm_eps": eps,
            "vision_use_head": False,
        }
        text = {"hidden_size": text_width, "num_attention_heads": 1}
        config = transformers.Gemma3Config(vision_config=vision, text_config=text, mm_tokens_per_image=tokens)
        config.vision_config._attn_implementation = "eager"
        tower = SiglipVisionModel(config.vision_config).eval()
        projector = Gemma3MultiModalProjector(config).eval()
        # Under the published names, on which the random weights depend.
        parameters = {f"vision_tower.vision_model.{n}": p for n, p in tower.named_parameters()}
        parameters |= {f"multi_modal_projector.{n}": p for n, p in projector.named_parameters()}
        weights = random_weights({n: tuple(p.shape) for n, p in parameters.items()}, seed)
        pixels = random_bytes(image_size, image_size * IMAGES_A_TOWER, 3, seed)  # side by side
        pixels = torch.from_numpy(pixels).permute(2, 0, 1).float().sub(127.5).div(127.5)  # [3, S, N * S]
        with torch.no_grad():
            for parameter_name, parameter in parameters.items():
                parameter.copy_(weights[parameter_name])
            patches = tower(torch.stack(pixels.chunk(IMAGES_A_TOWER, dim=2))).last_hidden_state
            arrays[f"{name}-patches"] = patches.numpy()
            arrays[f"{name}-tokens"] = projector(patches).numpy()
        cases[name] = {
            "seed": seed,
            "vision_config": config.vision_config.to_dict() if name == "pooled" else vision,
            "mm_tokens_per_image": tokens,
            "hidden_size": text_width,
        }
        print(f"{name}: tokens' std {arrays[f'{name}-tokens'].std():.3f}")
    text = json.dumps({"made_with": MADE_WITH, "cases": cases}, indent=2)
    (GOLDENS / "towers.json").write_text(text + "\n", encoding="utf-8")
    np.savez_compressed(GOLDENS / "towers.npz", **arrays)


def main() -> None:
    GOLDENS.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    make_images()
    make_layouts()
    make_towers()
    for file in sorted(GOLDENS.iterdir()):
        print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
