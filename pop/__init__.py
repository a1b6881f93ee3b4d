"""Prefill-only pruning for large language models, in plain PyTorch.

    import pop
    model = pop.load("smollm2-135m")
    print(model.generate("The capital of France is").text)

The method: pop/reference.py. What makes it fast: pop/engine.py. The models: pop/models.
"""

from pop.cache import KVCache
from pop.calibrate import calibrate
from pop.conversation import Conversation, Prefix
from pop.errors import (
    CacheMemoryError,
    CheckpointError,
    ConfigError,
    ContextOverflow,
    DownloadError,
    InputError,
    MissingExtra,
    PlanError,
    PopError,
    TokenizerError,
    UnknownModel,
    UnsupportedError,
    WeightsNotFound,
)
from pop.generate import Generation
from pop.images import PanAndScan, Video
from pop.importance import Importance, importance
from pop.loading import load
from pop.model import Model
from pop.plan import PrunePlan
from pop.registry import list_models
from pop.tokenizers import load_tokenizer

__version__ = "0.1.0"

__all__ = [
    "CacheMemoryError",
    "CheckpointError",
    "ConfigError",
    "ContextOverflow",
    "Conversation",
    "DownloadError",
    "Generation",
    "Importance",
    "InputError",
    "KVCache",
    "MissingExtra",
    "Model",
    "PanAndScan",
    "PlanError",
    "PopError",
    "Prefix",
    "PrunePlan",
    "TokenizerError",
    "UnknownModel",
    "UnsupportedError",
    "Video",
    "WeightsNotFound",
    "calibrate",
    "importance",
    "list_models",
    "load",
    "load_tokenizer",
]
