"""What the sizes of a model are: a frozen dataclass a family, checked where sizes could contradict each other.

They come from a checkpoint's files: pop/checkpoints/config_json.py.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from pop.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: inverse frequencies base ** (-2i / head_dim), scaled as `kind` says.

    "linear" divides them all by `factor`. "llama3" divides those whose wavelength in tokens is above
    original_max_positions / low_freq_factor, keeps those below original_max_positions / high_freq_factor, and
    blends in between.
    """

    base: float = 10_000.0
    kind: str = "default"  # or "linear", "llama3"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        if self.factor < 1:
            raise ConfigError(f"the RoPE factor must be at least 1, not {self.factor}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(f"high_freq_factor ({self.high_freq_factor}) must exceed low_freq_factor "
                              f"({self.low_freq_factor})")  # fmt: skip


@dataclass(frozen=True)
class LlamaConfig:
    """A decoder of the Llama architecture; `max_positions` is its trained context in tokens."""

    family: ClassVar[str] = "llama"
    overflows_float16: ClassVar[bool] = False

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 2048
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: torch.dtype = torch.float32  # of the checkpoint's files; the model may be loaded in another
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        _check(self)

    @property
    def windows(self) -> tuple[None, ...]:
        """What a token of each layer attends, as in Gemma3Config: here everything before it."""
        return (None,) * self.num_layers


@dataclass(frozen=True)
class SiglipConfig:
    """Gemma-3's vision tower (SigLIP): images of image_size x image_size pixels, cut into square patches.

    Pooling leaves `tokens_per_image` tokens of an image, on a square grid that divides the patches' grid evenly.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    norm_eps: float = 1e-6
    tokens_per_image: int = 256

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                              f"({self.num_heads})")  # fmt: skip
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size ({self.image_size}) is not a multiple of patch_size ({self.patch_size})")
        if self.tokens_per_side**2 != self.tokens_per_image or self.patches_per_side % self.tokens_per_side:
            raise ConfigError(f"mm_tokens_per_image ({self.tokens_per_image}) is not the square of a divisor of "
                              f"image_size / patch_size ({self.patches_per_side})")  # fmt: skip

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_side(self) -> int:
        return math.isqrt(self.tokens_per_image)


@dataclass(frozen=True)
class Gemma3Config:
    """Gemma-3: its language model, a layer for each of `windows`, and its vision tower where it has one.

    windows: how many tokens a token of the layer attends, itself included; None: all before it. Layers with a window
    are the local ones, and have a RoPE of their own. `max_positions` is the trained context in tokens.
    vision: None for a model that reads text only. image_id: the token that an image's tokens have in a prompt; boi_id,
    eoi_id: those around them.
    """

    family: ClassVar[str] = "gemma3"
    overflows_float16: ClassVar[bool] = True  # by its activations
    tie_embeddings: ClassVar[bool] = True
    attention_bias: ClassVar[bool] = False
    mlp_bias: ClassVar[bool] = False

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    windows: tuple[int | None, ...]
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 256
    query_pre_attn_scalar: float = 256.0
    max_positions: int = 131_072
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig(1_000_000.0)  # of the global layers
    local_rope: RopeConfig = RopeConfig(10_000.0)
    dtype: torch.dtype = torch.float32  # of the checkpoint's files; the model may be loaded in another
    bos_id: int | None = 2
    eos_ids: tuple[int, ...] = (1,)
    vision: SiglipConfig | None = None
    image_id: int = 262_144
    boi_id: int = 255_999
    eoi_id: int = 256_000

    def __post_init__(self):
        _check(self)
        for name in ("image_id", "boi_id", "eoi_id") if self.vision else ():
            if getattr(self, name) >= self.vocab_size:
                raise ConfigError(f"{name} ({getattr(self, name)}) is outside of vocab_size {self.vocab_size}")

    @property
    def num_layers(self) -> int:
        return len(self.windows)


@dataclass(frozen=True)
class ExpertsConfig:
    """Mixtures of `count` experts, in place of the MLPs of `layers`. Each token takes `per_token` of them.

    width: inside of an expert. normalised: whether the shares of a token's experts are made to add up to one.
    """

    count: int
    per_token: int
    width: int
    layers: tuple[int, ...]
    normalised: bool = True

    def __post_init__(self):
        if self.per_token > self.count:
            raise ConfigError(f"num_experts_per_tok ({self.per_token}) exceeds num_experts ({self.count})")


@dataclass(frozen=True)
class Qwen3Config:
    """A decoder of the Qwen3 architecture; `max_positions` is its trained context in tokens.

    experts: None for a dense model.
    """

    family: ClassVar[str] = "qwen3"
    overflows_float16: ClassVar[bool] = False
    attention_bias: ClassVar[bool] = False
    mlp_bias: ClassVar[bool] = False

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    max_positions: int = 32_768
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    dtype: torch.dtype = torch.float32  # of the checkpoint's files; the model may be loaded in another
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    experts: ExpertsConfig | None = None

    def __post_init__(self):
        _check(self)

    @property
    def windows(self) -> tuple[None, ...]:
        """What a token of each layer attends, as in Gemma3Config: here everything before it."""
        return (None,) * self.num_layers


@dataclass(frozen=True)
class Qwen3VisionConfig:
    """Qwen3-VL's vision tower: images of any size, cut into square patches, each of two frames.

    deepstack: after which layers the features are taken that the language model adds behind its first layers, in that
    order. position_side: of the square grid of learned position embeddings. merge_size: a square of so many patches a
    side makes one token of the language model, whose width is `out_size`.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    out_size: int
    deepstack: tuple[int, ...]
    position_side: int = 48
    patch_size: int = 16
    merge_size: int = 2
    frames: int = 2
    rope_base: float = 10_000.0

    def __post_init__(self):
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ConfigError(f"hidden_size ({self.hidden_size}) over num_heads ({self.num_heads}) is no multiple of "
                              "4, but RoPE rotates pairs of values by rows and by columns")  # fmt: skip
        if list(self.deepstack) != sorted({*self.deepstack} & {*range(self.num_layers)}):
            raise ConfigError(f"deepstack_visual_indexes must be layers from 0 to {self.num_layers - 1}, each later "
                              f"than the one before, not {list(self.deepstack)}")  # fmt: skip

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Of one patch: its pixels' three channels, in all its frames."""
        return 3 * self.frames * self.patch_size**2


@dataclass(frozen=True)
class Qwen3VLConfig(Qwen3Config):
    """Qwen3-VL: the language model, with positions on three axes, and the vision tower.

    mrope_sections: how many of the E / 2 rotated pairs turn by each axis of a position: time, row, column.
    image_id, video_id: the tokens that stand for images' and for video frames' features; start_id, end_id: those around
        an image or a frame pair.
    """

    family: ClassVar[str] = "qwen3_vl"

    mrope_sections: tuple[int, int, int] = field(kw_only=True)
    vision: Qwen3VisionConfig = field(kw_only=True)
    image_id: int = field(kw_only=True, default=151_655)
    video_id: int = field(kw_only=True, default=151_656)
    start_id: int = field(kw_only=True, default=151_652)
    end_id: int = field(kw_only=True, default=151_653)

    def __post_init__(self):
        super().__post_init__()
        if sum(self.mrope_sections) != self.head_dim // 2:
            raise ConfigError(f"mrope_section {list(self.mrope_sections)} does not add up to half of head_dim "
                              f"({self.head_dim})")  # fmt: skip
        if self.vision.out_size != self.hidden_size:
            raise ConfigError(f"out_hidden_size ({self.vision.out_size}) of vision_config is not the hidden_size "
                              f"({self.hidden_size}) of text_config")  # fmt: skip
        if len(self.vision.deepstack) > self.num_layers:
            raise ConfigError(f"deepstack_visual_indexes names {len(self.vision.deepstack)} layers, but the language "
                              f"model has {self.num_layers}")  # fmt: skip
        ids = (self.image_id, self.video_id, self.start_id, self.end_id)
        if max(ids) >= self.vocab_size or len({*ids}) < 4:
            raise ConfigError(f"image_, video_, vision_start_ and vision_end_token_id {list(ids)} must be four tokens "
                              f"below vocab_size {self.vocab_size}")  # fmt: skip


Config = LlamaConfig | Gemma3Config | Qwen3Config | Qwen3VLConfig


def _check(config: Config) -> None:
    """Raise ConfigError where the sizes of a decoder contradict each other."""
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(f"num_attention_heads ({config.num_heads}) is not a multiple of "
                          f"num_key_value_heads ({config.num_kv_heads})")  # fmt: skip
    if config.head_dim % 2:
        raise ConfigError(f"head_dim ({config.head_dim}) is odd, but RoPE rotates pairs of values")
    ids = config.eos_ids if config.bos_id is None else (config.bos_id, *config.eos_ids)
    if outside := [i for i in ids if not 0 <= i < config.vocab_size]:
        raise ConfigError(f"bos_ or eos_token_id {outside} is outside of vocab_size {config.vocab_size}")
