"""The sizes of a model: a frozen dataclass for each family. Contradictory sizes raise ConfigError.

pop/checkpoints reads them from a checkpoint's files.
"""

import math
from dataclasses import dataclass

import torch

from pop.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, with inverse frequencies base ** (-2i / head_dim), scaled as `kind` says.

    The kinds are "default", "linear" and "llama3": see `rope_frequencies` in layers.py.
    """

    base: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        _check(self.factor >= 1, f"the RoPE factor must be at least 1, not {self.factor}")
        _check(
            self.high_freq_factor > self.low_freq_factor,
            f"high_freq_factor ({self.high_freq_factor}) must exceed low_freq_factor ({self.low_freq_factor})",
        )


@dataclass(frozen=True)
class Config:
    """What the configs of all families have in common."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int

    # Here and in the classes below, attributes without a type are not fields. All configs of a class share them.
    overflows_float16 = False  # whether activations do
    attention_bias = False
    mlp_bias = False

    def __post_init__(self):
        _check(
            self.num_heads % self.num_kv_heads == 0,
            f"num_attention_heads ({self.num_heads}) is not a multiple of num_key_value_heads ({self.num_kv_heads})",
        )
        _check(self.head_dim % 2 == 0, f"head_dim ({self.head_dim}) is odd, but RoPE rotates pairs of values")
        ids = self.eos_ids if self.bos_id is None else (*self.eos_ids, self.bos_id)
        outside = [token for token in ids if not 0 <= token < self.vocab_size]
        _check(not outside, f"bos_ or eos_token_id {outside} is outside of vocab_size {self.vocab_size}")


@dataclass(frozen=True)
class FullAttentionConfig(Config):
    """What Llama, Qwen3 and OLMo-2 have in common: in every layer, a token attends to all tokens before it."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 2048  # the trained context, in tokens
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    dtype: torch.dtype = torch.float32  # of the checkpoint's files; the model may be loaded in another
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    @property
    def windows(self) -> tuple[None, ...]:
        return (None,) * self.num_layers


@dataclass(frozen=True)
class LlamaConfig(FullAttentionConfig):
    family = "llama"

    attention_bias: bool = False
    mlp_bias: bool = False


@dataclass(frozen=True)
class Olmo2Config(FullAttentionConfig):
    family = "olmo2"

    norm_eps: float = 1e-5
    attention_bias: bool = False


@dataclass(frozen=True)
class SiglipConfig:
    """Gemma-3's vision tower: images of image_size x image_size pixels, cut into square patches.

    Pooling leaves `tokens_per_image` tokens of an image. They form a square grid, which must divide the grid of patches
    evenly.
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
        _check(
            self.hidden_size % self.num_heads == 0,
            f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads ({self.num_heads})",
        )
        _check(
            self.image_size % self.patch_size == 0,
            f"image_size ({self.image_size}) is not a multiple of patch_size ({self.patch_size})",
        )
        _check(
            self.tokens_per_side**2 == self.tokens_per_image and self.patches_per_side % self.tokens_per_side == 0,
            f"mm_tokens_per_image ({self.tokens_per_image}) is not the square of a divisor of image_size / patch_size "
            f"({self.patches_per_side})",
        )

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_side(self) -> int:
        return math.isqrt(self.tokens_per_image)


@dataclass(frozen=True)
class Gemma3Config(Config):
    """Local layers have a window and a RoPE of their own. Global layers have no window.

    In a prompt, an image is one `boi_id`, then its tokens, which are all `image_id`, and then one `eoi_id`.
    """

    family = "gemma3"
    overflows_float16 = True
    tie_embeddings = True

    windows: tuple[int | None, ...]  # for each layer, how many tokens a token attends to, itself included; None: all
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 256
    query_pre_attn_scalar: float = 256.0
    max_positions: int = 131_072  # the trained context, in tokens
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig(1_000_000.0)  # of the global layers
    local_rope: RopeConfig = RopeConfig(10_000.0)
    dtype: torch.dtype = torch.float32  # of the checkpoint's files; the model may be loaded in another
    bos_id: int | None = 2
    eos_ids: tuple[int, ...] = (1,)
    vision: SiglipConfig | None = None  # None: text only
    image_id: int = 262_144
    boi_id: int = 255_999
    eoi_id: int = 256_000

    def __post_init__(self):
        super().__post_init__()
        if self.vision is None:
            return
        for name in ("image_id", "boi_id", "eoi_id"):
            value = getattr(self, name)
            _check(value < self.vocab_size, f"{name} ({value}) is outside of vocab_size {self.vocab_size}")

    @property
    def num_layers(self) -> int:
        return len(self.windows)


@dataclass(frozen=True)
class ExpertsConfig:
    """Mixtures of `count` experts in place of all MLPs. Each token takes `per_token` of them."""

    count: int
    per_token: int
    width: int  # inside an expert

    def __post_init__(self):
        _check(
            self.per_token <= self.count,
            f"num_experts_per_tok ({self.per_token}) exceeds num_experts ({self.count})",
        )


@dataclass(frozen=True)
class Qwen3Config(FullAttentionConfig):
    family = "qwen3"

    head_dim: int = 128
    max_positions: int = 32_768
    experts: ExpertsConfig | None = None  # None: a dense model


@dataclass(frozen=True)
class Qwen3VisionConfig:
    """Qwen3-VL's vision tower: images of any size, cut into square patches of two frames each.

    A square of merge_size x merge_size patches becomes one token of the language model, `out_size` wide.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    out_size: int
    deepstack: tuple[int, ...]  # the layers after which features are taken for the first language layers, in order
    position_side: int = 48  # of the square grid of learned positions
    patch_size: int = 16
    merge_size: int = 2
    frames: int = 2

    def __post_init__(self):
        _check(
            self.hidden_size % (4 * self.num_heads) == 0,
            f"hidden_size ({self.hidden_size}) over num_heads ({self.num_heads}) is not a multiple of 4, as its RoPE "
            "needs",
        )
        layers = list(self.deepstack)
        _check(
            layers == sorted({*layers} & {*range(self.num_layers)}),
            f"deepstack_visual_indexes must be ascending layers from 0 to {self.num_layers - 1}, not {layers}",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, kw_only=True)
class Qwen3VLConfig(Qwen3Config):
    """The language model, with positions on three axes, and the vision tower.

    In a prompt, an image is one `start_id`, then its tokens, which are all `image_id`, and then one `end_id`. A pair of
    video frames looks the same, with `video_id`.
    """

    family = "qwen3_vl"

    mrope_sections: tuple[int, int, int]  # how many rotated pairs turn by time, row and column
    vision: Qwen3VisionConfig
    image_id: int = 151_655
    video_id: int = 151_656
    start_id: int = 151_652
    end_id: int = 151_653

    def __post_init__(self):
        super().__post_init__()
        sections = list(self.mrope_sections)
        _check(
            len(sections) == 3 and sum(sections) == self.head_dim // 2,
            f"mrope_section {sections} is not three numbers that add up to half of head_dim ({self.head_dim})",
        )
        out = self.vision.out_size
        _check(
            out == self.hidden_size,
            f"out_hidden_size ({out}) of vision_config is not the hidden_size ({self.hidden_size}) of text_config",
        )
        deepstack = len(self.vision.deepstack)
        _check(
            deepstack <= self.num_layers,
            f"deepstack_visual_indexes names {deepstack} layers, but the language model has {self.num_layers}",
        )
        ids = [self.image_id, self.video_id, self.start_id, self.end_id]
        _check(
            max(ids) < self.vocab_size and len({*ids}) == 4,
            f"image_, video_, vision_start_ and vision_end_token_id {ids} must be four tokens below vocab_size "
            f"{self.vocab_size}",
        )
