"""`pop.load`: from a name or a directory to a `pop.Model`."""

import json
import os
import sys
from pathlib import Path

import torch

import pop.models as models
from pop.backends.cpu import make_cache_folder
from pop.backends.tensor_parallel import Part, join
from pop.checkpoints import registry
from pop.checkpoints.config_json import read_config, read_sampling
from pop.checkpoints.processor_json import read_limits
from pop.checkpoints.weights import load_weights
from pop.engine.cache import CHUNK_SIZE, KVCache
from pop.errors import CacheMemoryError, InputError, TokenizerError, printable, reason_of
from pop.inputs.processors import processor_of
from pop.inputs.tokenizers import Tokenizer, load_tokenizer
from pop.model import Model
from pop.models.config import DTYPES
from pop.pruning.plan import SHIPPED, PrunePlan
from pop.pruning.sketch import MOST_DISTANCE, distance
from pop.runner import check_options
from pop.system import files
from pop.system.memory import free_bytes


@torch.inference_mode(False)  # gradients need weights that are not made in the caller's inference mode
def load(
    name_or_path,
    *,
    device=None,
    dtype: torch.dtype | str | None = None,
    prune="default",
    max_seq_len: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    compile="auto",
    progress: bool = True,
    parallel: str | None = None,
    tokenizer="auto",
    chat_format=None,
) -> Model:
    """Load a model by its registry name, or from a directory in the Hugging Face layout.

    Args:
        name_or_path: A name that `list_models` gives, a repository that `pop download` has fetched or that is in the
            Hugging Face cache (OWNER/REPOSITORY), or a directory. A name comes first; ./NAME is a directory.
        device: None takes the GPU if there is one, otherwise the CPU.
        dtype: A torch.dtype or its name, such as "float32". None keeps the checkpoint's.
        prune: "default" takes default.plan in the model's folder, otherwise the best plan of the package for these
            weights, otherwise "third". stderr and repr(model) say which. None is full depth. Other values: "third", the
            deepest floor(L/3) layers; a fraction of the layers; layers as in "10,12,14,19-29"; the path or name of a
            saved plan; the path of importance scores, which stand for the third of the layers that prefill needs least;
            or a PrunePlan.
        max_seq_len: The most tokens that a cache may hold for each row. None takes the model's full context.
        min_pixels, max_pixels: To how many pixels an image is resized, if the family keeps its shape. None takes the
            checkpoint's limits. A pop.Image has its own.
        compile: True compiles prefill and decode with torch.compile, at their first use or in `model.warmup`.
            "auto" compiles where that works, unless the model is tiny.
        progress: Show on stderr the progress of loading and compiling, and what `prune="default"` has chosen.
        parallel: "auto" splits the model among the ranks of the process group, or of torchrun. All ranks must then make
            the same calls (pop/backends/tensor_parallel.py).
        tokenizer: "auto" reads the checkpoint's, if there is one. None loads the model without: prompts are token ids
            then. Otherwise a tokenizer of `load_tokenizer`, or its path.
        chat_format: None takes the checkpoint's chat_template. Otherwise "llama-3.1", "chatml" or "gemma", or another
            template in Jinja as text (pop/inputs/README.md).

    Raises a PopError of pop/errors.py, if possible before it reads the weights.
    """
    if parallel not in (None, "auto"):
        raise InputError(f"parallel is {parallel!r}; it must be 'auto' or None")
    rank, ranks, device = (0, 1, device) if parallel is None else join(device)
    device = usable_device(device)
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype, dtype)
    if dtype not in (None, *DTYPES.values()):
        raise InputError(f"dtype is {dtype!r}; give None, {', '.join(DTYPES)}, or one of these as a torch.dtype")
    if not isinstance(name_or_path, (str, os.PathLike)) or not os.fspath(name_or_path):
        raise InputError(f"name_or_path is {name_or_path!r}; give a name that pop.list_models() lists, or a directory")

    # Everything small first, so that errors come before the weights are read.
    folder = registry.find_folder(name_or_path)
    config = read_config(folder)
    dtype = dtype or config.dtype
    max_seq_len = check_options(config, dtype, max_seq_len, compile)
    is_default = isinstance(prune, str) and prune == "default"
    own_plan = folder / "default.plan"
    if is_default:
        prune = own_plan if own_plan.is_file() else "third"
    plan = PrunePlan.of(prune, config.num_layers)
    vision = processor_of(config, read_limits(folder, config), min_pixels, max_pixels)
    tokenizer = _tokenizer(tokenizer, folder)
    sampling = read_sampling(folder)

    part = Part(config, rank, ranks) if ranks > 1 else None
    progress = progress and rank == 0
    make_cache_folder()
    with torch.device("meta"):
        module = models.build(config) if part is None else part.build()
    _check_memory(module, dtype, device, min(max_seq_len, CHUNK_SIZE))
    load_weights(folder, module, dtype=dtype, device=device, progress=progress, shards=part and part.shards)
    model = Model(
        module.eval(),
        config,
        tokenizer,
        plan=plan,
        max_seq_len=max_seq_len,
        compile=compile,
        progress=progress,
        vision=vision,
        part=part,
        chat_format=chat_format,
        sampling=sampling,
        name=folder.name,
    )
    if is_default and prune != own_plan:
        model.plan = (shipped_plans(model) or [plan])[0]
        model.resolve(None)  # warns of weights that differ a little
    if is_default and progress:
        print(f"pop: {printable(repr(model))}", file=sys.stderr, flush=True)  # the folder may have any name
    return model


def build(folder: str | os.PathLike):
    """The module of a checkpoint's config.json, on the meta device: without weights.

    For code that has the weights: after `module.load_state_dict(weights, assign=True)`, the memory is shared, and
    pop.Model(module, module.config) runs it.
    """
    make_cache_folder()  # torch needs it for modules on the meta device
    with torch.device("meta"):
        return models.build(read_config(folder)).eval()


def shipped_plans(model: Model) -> list[PrunePlan]:
    """The plans of the package that were calibrated for weights near a model's, the best first.

    Best is what holds by its verdict, and of several what prunes the fewest layers.
    """
    found = []
    for path in SHIPPED.glob("*.plan"):
        tensors, metadata = files.read_tensors(path)  # of which only the sketch is touched
        layers = json.loads(metadata["pop_plan"])["layers"]
        if layers[-1] < len(model.sketch) and distance(model.sketch[layers], tensors["sketch"]) <= MOST_DISTANCE:
            found.append(PrunePlan.load(path))

    return sorted(found, key=lambda plan: (not plan.holds, len(plan.layers)))


def _check_memory(module, dtype: torch.dtype, device: torch.device, num_tokens: int) -> None:
    """Raise CacheMemoryError if the device lacks the memory for the weights and a prompt of `num_tokens`.

    A chunk of a longer prompt takes no more for activations, unless the plan selects tokens (`pop.engine.prefill`).
    """
    weights = sum(map(torch.Tensor.numel, module.parameters())) * dtype.itemsize
    cache = KVCache.size_in_bytes(module.config, 1, num_tokens, dtype)
    activations = 5 * module.config.intermediate_size * num_tokens * dtype.itemsize  # about
    free = free_bytes(device)
    if free is not None and weights + cache + activations > free:
        raise CacheMemoryError(
            f"the weights take {weights:,} bytes and a prompt of {num_tokens} tokens takes {cache:,} for its cache and "
            f"{activations:,} for activations, but {device} has {free:,} free; take a 16-bit dtype, a smaller model, "
            "or parallel='auto' on several devices"
        )


def _tokenizer(given, folder: Path) -> Tokenizer | None:
    if given is None or isinstance(given, Tokenizer):
        return given
    if given != "auto":
        return load_tokenizer(given)
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    try:
        return load_tokenizer(folder)
    except TokenizerError as error:
        raise TokenizerError(
            f"{str(error).rstrip('.')}; pass tokenizer=None to load the model without it, or the path of another"
        ) from error


def usable_device(device) -> torch.device:
    """The device that `device` names. None: the GPU if there is one, otherwise the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # torch accepts the names of devices that this build or machine lacks, so use the device once.
        probe = torch.zeros(1, device=device)
        probe.item()
        return probe.device
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise InputError(f"device is {device!r}, which cannot be used here ({reason_of(error)}); try 'cpu'") from None
