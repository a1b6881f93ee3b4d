"""The subject of a run: a checkpoint or random weights of a shape, with its plans and prompts."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from pathlib import Path

import torch

import pop
from pop import models
from pop.checkpoints import registry
from pop.checkpoints.config_json import read_config
from pop.errors import InputError
from pop.loading import usable_device
from pop.models.config import DTYPES
from pop.pruning.corrections import Corrections
from pop.system.memory import free_bytes
from tools.bench.shapes import SHAPES, fitting_layers, shortened
from tools.common import plan_of


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model that is measured."""

    model: pop.Model
    fields: dict  # of its config.json, for rivals
    all_layers: int  # of the whole model, which --layers may shorten


def load_subject(args) -> Subject:
    """The model of --model, or random weights of --shape, made on the device."""
    compile = {"auto": "auto", "true": True, "false": False}[args.compile]
    dtype = DTYPES.get(args.dtype)
    if args.model:
        model = pop.load(args.model, device=args.device, dtype=dtype, compile=compile, progress=False)
        fields = json.loads((registry.find_folder(args.model) / "config.json").read_text())
        return Subject(model, fields, model.config.num_layers)
    config, fields = _read_shape(args.shape)
    device = usable_device(args.device)
    dtype = dtype or config.dtype
    layers = args.layers or _fitting(config, args, dtype, device)
    if layers > config.num_layers:
        raise InputError(f"--layers is {layers}, but {args.shape} has {config.num_layers}")
    shorter = shortened(config, layers)
    model = pop.Model(random_module(shorter, dtype, device), shorter, plan="third", compile=compile)
    return Subject(model, fields | {"num_hidden_layers": layers}, config.num_layers)


def _fitting(config, args, dtype: torch.dtype, device: torch.device) -> int:
    """The number of layers that fit into memory. All of them, if the free memory is not known."""
    free = free_bytes(device)
    if not free:
        return config.num_layers
    return fitting_layers(config, max(args.lengths), dtype, free)


def _read_shape(shape: str) -> tuple:
    """The config, and the fields of config.json, of a known shape or of a folder."""
    if shape in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
            return read_config(Path(folder)), copy.deepcopy(SHAPES[shape])
    path = Path(shape) / "config.json"
    if not path.is_file():
        raise InputError(f"--shape is {shape!r}; give one of {', '.join(SHAPES)}, or a folder with a config.json")
    return read_config(Path(shape)), json.loads(path.read_text())


def random_module(config, dtype: torch.dtype, device: torch.device):
    """A module with random weights, made on `device`. One block of random numbers, repeated, fills all matrices."""
    with torch.device("meta"):
        module = models.build(config)
    block = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).mul(0.02).to(device, dtype)
    weights = {}
    for name, parameter in module.named_parameters():
        weights[name] = torch.ones(parameter.shape, dtype=dtype, device=device)
        if parameter.dim() > 1:
            for piece in weights[name].view(-1).split(len(block)):
                piece.copy_(block[: len(piece)])
    module.load_state_dict(weights, assign=True)
    return module.requires_grad_(False).eval()


def parse_plan(text: str, model: pop.Model) -> pop.PrunePlan:
    """The plan of one --prune value, see the help text of tools.bench."""
    corrected, _, plan, _ = plan_of(text, model, "corrected")
    if not plan.layers:
        raise InputError(f"--prune {text} prunes none of the {model.config.num_layers} layers; give a larger fraction")
    if not corrected:
        return plan
    corrections = random_corrections(model, plan)
    first = max(1, plan.full_depth_first)
    return dataclasses.replace(plan, full_depth_first=first, corrections=corrections)


def random_corrections(model: pop.Model, plan: pop.PrunePlan) -> Corrections:
    """Random corrections for the layers of a plan, as fast as calibrated ones: codes of half the model's width."""
    config = model.config
    rank = config.hidden_size // 2
    groups = [group for group in plan.groups(config.num_layers) if group.is_pruned]
    updates = [group for group in groups if group.layers[-1] + 1 < config.num_layers]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul(0.02).to(model.device, model.dtype)

    return Corrections(
        plan.layers,
        weight=draw(len(plan.layers), 2, config.num_kv_heads * config.head_dim, rank),
        shared=draw(len(groups), rank, 2 * config.hidden_size),
        update=draw(len(updates), config.hidden_size, rank) if updates else None,
        sketch=model.sketch[list(plan.layers)],
    )


def random_image(model: pop.Model, size: tuple[int, int]):
    """An image of random pixels, prepared for the model, and the list of its number of patches.

    size: width and height in pixels. Raises InputError for a model that takes no images.
    """
    if "image" not in model.vision.marks:
        raise InputError(f"--image needs a model that takes images, and the {model.config.family} family does not")
    width, height = size
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = model.vision.prepare("image", pixels.numpy())
    per_image = model.config.vision.patches_per_side**2 if image.grid is None else image.grid.rows * image.grid.columns
    return image, [per_image]


def random_prompt(config, num_tokens: int, image=None) -> list[int]:
    """A prompt of `num_tokens` random token ids, of which those of `image`, if given, come first."""
    tokens = torch.randint(config.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    placeholders = {getattr(config, name, None) for name in ("image_id", "video_id")}
    tokens = [0 if token in placeholders else token for token in tokens]
    before = [token for piece in image.pieces if not isinstance(piece, str) for token in piece] if image else []
    if len(before) >= num_tokens:
        raise InputError(f"the image has {len(before)} tokens; make --lengths longer than that")
    return before + tokens[len(before) :]
