"""Every name of the public API. `pop` offers them, and imports this file when it is first asked for one."""

from pop import engine
from pop.backends import tensor_parallel as parallel
from pop.calibration.calibrate import calibrate
from pop.calibration.importance import Importance, importance
from pop.calibration.verdict import Verdict, check
from pop.checkpoints.registry import list_models
from pop.engine.cache import KVCache

from pop.errors import (  # isort: skip
    CacheMemoryError, CheckpointError, ConfigError, ContextOverflow, DownloadError, InputError, MissingExtra, PlanError,
    PopError, TokenizerError, UnknownModel, UnsupportedError, WeightsNotFound,
)  # fmt: skip
from pop.generation.answers import Generation
from pop.generation.batch import Stream
from pop.generation.conversation import Conversation
from pop.generation.prefix import Prefix
from pop.generation.sampling import SamplingParams
from pop.inputs.images import Image
from pop.inputs.tokenizers import load_tokenizer
from pop.inputs.video_files import Video
from pop.loading import build, load
from pop.model import Model
from pop.pruning import cost, reference, selection
from pop.pruning.corrections import Corrections
from pop.pruning.plan import PrunePlan

__all__ = [
    "CacheMemoryError", "CheckpointError", "ConfigError", "ContextOverflow", "Conversation", "Corrections",
    "DownloadError", "Generation", "Image", "Importance", "InputError", "KVCache", "MissingExtra", "Model",
    "PlanError", "PopError", "Prefix", "PrunePlan", "SamplingParams", "Stream", "TokenizerError", "UnknownModel",
    "UnsupportedError", "Verdict", "Video", "WeightsNotFound", "build", "calibrate", "check", "cost", "engine",
    "importance", "list_models", "load", "load_tokenizer", "parallel", "reference", "selection",
]  # fmt: skip
