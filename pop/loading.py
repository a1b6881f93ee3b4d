"""`pop.load`: from a name or a directory to a `pop.Model`."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pop import models
from pop.arguments import check_compile, check_dtype, checked_max_seq_len, checked_plan
from pop.backends.int8 import check_quantize, quantize_module
from pop.backends.tensor_parallel import Part, join
from pop.checkpoints import registry
from pop.checkpoints.config_json import read_config
from pop.checkpoints.weights import load_weights
from pop.errors import InputError
from pop.inputs.tokenizers import load_tokenizer
from pop.model import Model
from pop.models.config import DTYPES


def load(
    name_or_path,
    *,
    device=None,
    dtype: torch.dtype | None = None,
    prune="default",
    max_seq_len: int | None = None,
    compile="auto",
    progress: bool = True,
    parallel: str | None = None,
    quantize: str | None = None,
) -> Model:
    """Load a model by its registry name, or from a directory in the Hugging Face or in Meta's layout.

    name_or_path: a known name wins over a directory of that name; write ./NAME for the directory.
    device: None takes the GPU if there is one, else the CPU.
    dtype: None keeps the checkpoint's own.
    prune: "default" (the deepest floor(L/3) layers), None (full depth), a fraction of the layers, or a PrunePlan.
    max_seq_len: the most tokens that a cache may hold a row (the last token of an answer needs no slot); None takes
        the model's full context.
    compile: True compiles prefill and decode by torch.compile, when they are first used or by `model.warmup`; False
        does not; "auto" does where it works, unless the model is tiny.
    progress: show a bar on stderr while large weights load, and a note while prefill and decode compile.
    parallel: None loads the whole model in this process. "auto" cuts it among the ranks of the process group, or of
        those that torchrun has started, if there are several (pop/backends/tensor_parallel.py): all of them make the same calls.
    quantize: "int8" rounds the decoder's matrices to 8 bits by torchao (pop/backends/int8.py), on CPUs and in one process:
        half the memory of bfloat16 once the model is loaded. None leaves them as they are.

    Raises UnknownModel, WeightsNotFound, ConfigError, CheckpointError, TokenizerError, PlanError, InputError,
    UnsupportedError or MissingExtra.
    """
    check_compile(compile)
    if parallel not in (None, "auto"):
        raise InputError(f"parallel is {parallel!r}; it is 'auto' or None")
    rank, ranks, device = (0, 1, device) if parallel is None else join(device)
    device = usable_device(device)
    if dtype not in (None, *DTYPES.values()):
        raise InputError(f"dtype is {dtype!r}; give torch.float32, torch.bfloat16, torch.float16, or None")
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise InputError(f"name_or_path is {name_or_path!r}; give a name that pop.list_models() lists, or a directory")
    is_name = name_or_path in registry.list_models() or not os.path.isdir(name_or_path)
    folder = registry.find_weights(str(name_or_path)) if is_name else Path(name_or_path)
    config = read_config(folder)
    dtype = dtype or config.dtype
    check_dtype(dtype, config)
    plan = checked_plan(prune, config.num_layers)
    max_seq_len = checked_max_seq_len(max_seq_len, config)
    tokenizer = _tokenizer(folder)
    part = Part(config, rank, ranks) if ranks > 1 else None
    with torch.device("meta"):
        module = models.build(config) if part is None else part.build()
    check_quantize(quantize, module, device, ranks)
    progress = progress and rank == 0
    shards = {} if part is None else part.shards
    load_weights(folder, module, dtype=dtype, device=device, progress=progress, shards=shards)
    if quantize is not None:
        quantize_module(module)
    options = {"plan": plan, "max_seq_len": max_seq_len, "compile": compile, "progress": progress, "part": part}
    return Model(module.eval(), config, tokenizer, **options)


def usable_device(device) -> torch.device:
    """The device that a caller names, tried out; None: the GPU if there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Used once, not only named: torch knows devices that this build or machine lacks.
        probe = torch.zeros(1, device=device)
        probe.item()
        return probe.device
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device is {device!r}, which cannot be used here ({reason}); try 'cpu'") from None


def _tokenizer(folder: Path):
    names = ("tokenizer.json", "tokenizer.model")
    return load_tokenizer(folder) if any((folder / name).exists() for name in names) else None
