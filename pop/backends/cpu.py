"""CPUs: faster matrix products, faster attention, and memory that is reused.

`accelerate` gives the linear layers of a finished module a faster `forward`. `cache_attention` replaces the function
of the same name in pop/engine/attention.py, `causal_attention` that of the plain pass, and `vision_attention` that
of vision towers. The results are those of PyTorch's own operators, up to rounding. README.md in this folder gives the
reasons.
"""

import ctypes
import functools
import inspect
import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pop.engine import attention as engine
from pop.engine.attention import AttentionMetadata
from pop.models import layers

_capability = torch.backends.cpu.get_cpu_capability()
# Dtypes without fast products: float16 on all CPUs, and bfloat16 on those that have no more than AVX2.
WIDENED = {torch.float16} | ({torch.bfloat16} if _capability == "AVX2" else set())
WIDENED_AT_ONCE = 2**26  # weights that are copied to float32 at a time
STREAMS = 2  # blocks of a matrix that compiled code reads at once; one or four are up to a tenth slower
# Dtypes in which kernels.cpp is faster than torch's attention. With several tokens, torch's uses AMX for bfloat16.
_bf16, _amx = (getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))
FUSED_TOKEN = {torch.float32, torch.bfloat16} if _capability in ("AVX2", "AVX512") else set()
FUSED = FUSED_TOKEN - ({torch.bfloat16} if _amx else set())
MOST_E, MOST_ROWS = 256, 16  # numbers of a head, and rows of a product, in kernels.cpp
ROWS_FIRST = {torch.bfloat16} if _bf16 and not _amx else set()  # dtypes in which torch's x W' is faster than (W x')'
TEMPORARY = 31 * 2**20  # bytes; glibc adapts to freed blocks of at most 32 MiB, headers included


class Linear(nn.Linear):
    """nn.Linear with the fastest product."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(layers.Embedding):
    """An embedding whose tied head uses the fastest product."""

    def unembed(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Like F.linear. x is [B, T, in], or [B, in] and [in] for one token a row."""
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    one_token = x.dim() < 3 or x.shape[-2] == 1
    if not one_token and x.dtype in WIDENED:
        blocks = weight.split(max(1, WIDENED_AT_ONCE // weight.shape[1]))  # an output head is too large to copy whole
        out = torch.cat([F.linear(x.float(), block.float()) for block in blocks], dim=-1)
        return (out if bias is None else out + bias.float()).to(x.dtype)
    needs_operators = torch.is_grad_enabled() or type(weight) not in (Tensor, nn.Parameter)
    if needs_operators or not one_token or x.dtype == torch.float16:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])  # [B, in]
    if rows.shape[0] == 1 and torch.compiler.is_compiling():
        out = torch.cat([_fused_product(w, rows[0]) for w in weight.chunk(STREAMS)]).to(x.dtype)
    else:
        out = multiply_rows(rows, weight)
    return (out if bias is None else out + bias).reshape(*x.shape[:-1], -1)


def _fused_product(weight: Tensor, x: Tensor) -> Tensor:
    """weight [out, in] times x [in] -> [out] float32, which the compiler fuses. Sums over 4096 numbers are in parts."""
    length = len(x)
    parts = ([parts for parts in range(1, 33) if length % parts == 0 and length // parts <= 4096] or [1])[0]
    if parts == 1:  # a second sum, even of one number, would need a buffer
        return (weight * x).sum(-1, dtype=torch.float32)
    return (weight * x).unflatten(-1, (parts, -1)).sum(-1, dtype=torch.float32).sum(-1)


@torch.library.custom_op("pop::multiply_rows", mutates_args=())
def multiply_rows(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear of x [B, in], without gradients. For a few rows, kernels.cpp takes little longer than to read W."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    if call := multiply_rows_call(out, x, weight):
        call()
        return out
    return F.linear(x, weight) if x.dtype in ROWS_FIRST else (weight @ x.T).T.contiguous()


multiply_rows.register_fake(lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]))


def multiply_rows_call(out: Tensor, x: Tensor, weight: Tensor) -> Callable | None:
    """A call of kernels.cpp for multiply_rows, which writes to `out`. None if it cannot take these tensors."""
    (rows, width), alike = x.shape, x.dtype == weight.dtype and x.shape[1] == weight.shape[1]
    whole_vectors = width % (64 // x.itemsize) == 0 and x.is_contiguous() and weight.is_contiguous()
    if not (alike and 0 < rows <= MOST_ROWS and whole_vectors and x.dtype in FUSED_TOKEN and _has_kernel()):
        return None
    return _call("multiply_rows", (x, weight, out), (rows, width, len(weight)))


def cache_attention(q: Tensor, keys: Tensor, values: Tensor, at: AttentionMetadata, scale: float) -> Tensor:
    """Like pop.engine.attention.cache_attention."""
    if at.held is None and q.device.type == "cpu":
        return decode_attention(q, keys, values, at.spans, scale)
    if not _is_fused(q):
        return engine.cache_attention(q, keys, values, at, scale)
    return fused_attention(q, *engine.read(keys, values, at), at.held, at.spans, scale)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, last_attended: Tensor | None = None
) -> Tensor:
    """Like pop.models.layers.causal_attention."""
    if not _is_fused(q, k, v):
        return layers.causal_attention(q, k, v, scale, window, last_attended)
    own = torch.arange(q.shape[1], device="cpu").expand(q.shape[:2])
    first = torch.zeros_like(own) if window is None else (own - window + 1).clamp(min=0)
    last = own if last_attended is None else last_attended
    return fused_attention(q, k, v, own, torch.stack((first, last), dim=-1), scale)


def vision_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Like F.scaled_dot_product_attention(q, k, v) in a vision tower: each [N, H, P, E]."""
    if not _is_fused(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)
    (N, H, P, E), (q, k, v) = q.shape, (x.transpose(1, 2) for x in (q, k, v))
    every = torch.arange(P, device="cpu").expand(N, P)
    spans = torch.tensor((0, P - 1), device="cpu").expand(N, P, 2)
    return fused_attention(q, k, v, every, spans, E**-0.5).view(N, P, H, E).transpose(1, 2)


def _is_fused(*inputs: Tensor) -> bool:
    """Whether fused_attention takes q, and k and v if they may want gradients, which it lacks."""
    return _fits(inputs[0], FUSED) and not any(x.requires_grad for x in inputs)


def _fits(q: Tensor, dtypes: set[torch.dtype]) -> bool:
    E = q.shape[-1]
    return q.device.type == "cpu" and q.dtype in dtypes and E % 2 == 0 and E <= MOST_E and _has_kernel()


@torch.library.custom_op("pop::fused_attention", mutates_args=())
def fused_attention(q: Tensor, k: Tensor, v: Tensor, held: Tensor, spans: Tensor, scale: float) -> Tensor:
    """masked_attention by kernels.cpp: q [B, T, H, E] attends k and v [B, N, K, E] -> [B, T, H * E].

    held [B, N] are the keys' positions, and spans [B, T, 2] the first and the last position that each query attends.
    Only the keys that a block of queries needs are read, and no mask is in memory.
    """
    (B, T, H, E), (N, K) = q.shape, k.shape[1:3]
    shapes_differ = (k.shape, v.shape, held.shape, spans.shape) != ((B, N, K, E), (B, N, K, E), (B, N), (B, T, 2))
    if shapes_differ or H % K or not q.dtype == k.dtype == v.dtype:  # the kernel would read other memory
        raise ValueError(", ".join(f"{x.dtype} {tuple(x.shape)}" for x in (q, k, v, held, spans)))
    # It reads two bfloat16 at once.
    q, k, v = (x if x.stride(-1) == 1 and not any(s % 2 for s in x.stride()[:3]) else x.contiguous() for x in (q, k, v))
    held, spans, out = held.int().contiguous(), spans.int().contiguous(), q.new_empty(B, T, H * E)
    _attention_call("attend", out, q, k, v, (held, spans), N, scale)()
    return out


fused_attention.register_fake(lambda q, *_: q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3]))


@torch.library.custom_op("pop::cpu_decode_attention", mutates_args=())
def decode_attention(q: Tensor, keys: Tensor, values: Tensor, spans: Tensor, scale: float) -> Tensor:
    """engine.decode_attention for q [B, 1, H, E] -> [B, 1, H * E], which reads no slots but the spans'."""
    out = q.new_empty(q.shape[0], 1, q.shape[2] * q.shape[3])
    if call := decode_attention_call(out, q, keys, values, spans, scale):
        call()
        return out
    filled = min(int(spans.max()) + 1, keys.shape[1] - 1)
    return engine.decode_attention(q, keys[:, : filled + 1], values[:, : filled + 1], spans, scale)


decode_attention.register_fake(lambda q, *_: q.new_empty(q.shape[0], 1, q.shape[2] * q.shape[3]))


def decode_attention_call(out: Tensor, q, keys, values, spans, scale: float) -> Callable | None:
    """A call of kernels.cpp for decode_attention, which writes to `out`. None if it cannot take these tensors."""
    (B, T, H, E), K = q.shape, keys.shape[2]
    shapes = (T, keys.shape, keys.shape[::3], H % K, spans.shape) == (1, values.shape, (B, E), 0, (B, 1, 2))
    alike = q.dtype == keys.dtype == values.dtype and spans.dtype == torch.int32 and spans.is_contiguous()
    if not (shapes and alike and _fits(q, FUSED_TOKEN) and all(x.stride(-1) == 1 for x in (q, keys, values))):
        return None
    return _attention_call("attend_token", out, q, keys, values, (spans,), keys.shape[1] - 1, scale)


def _attention_call(name: str, out: Tensor, q, k, v, others, N: int, scale: float) -> Callable:
    strides = (size for x in (q, k, v) for size in x.stride()[:3])
    return _call(name, (q, k, v, *others, out), (*q.shape, N, k.shape[2], *strides), ctypes.c_float(scale))


def _call(name: str, tensors: tuple[Tensor, ...], sizes: tuple[int, ...], *numbers) -> Callable:
    """A call of a function of kernels.cpp."""
    function = getattr(_kernel(), f"{name}_{str(tensors[0].dtype).removeprefix('torch.')}")

    def run(*others):  # on the memory that the tensors have now: assigning a weight's `data` frees the old one
        function(*(ctypes.c_void_p(x.data_ptr()) for x in tensors), *others)

    return functools.partial(run, (ctypes.c_int64 * len(sizes))(*sizes), *numbers, torch.get_num_threads())


def _has_kernel() -> bool:
    return _kernel() is not None


# What torch.compiler.assume_constant_result does, but without importing the compiler with pop.
_has_kernel._dynamo_marked_constant = True


@functools.cache
def _kernel() -> ctypes.CDLL | None:
    """kernels.cpp, compiled for this processor and kept with the other files of torch.compile. None if that fails."""
    try:
        from torch._inductor.codecache import CppCodeCache  # takes a second to import

        source = Path(__file__).with_name("kernels.cpp").read_text(encoding="utf-8")
        processor = f"\n// {_capability} {_bf16}"  # a cache of files may be shared with other processors
        flags = ["-ffp-contract=fast", "-fno-unsafe-math-optimizations", "-fno-finite-math-only"]
        unneeded = {"needs_vec_isa"} & inspect.signature(CppCodeCache.load_async).parameters.keys()  # takes a second
        return CppCodeCache.load_async(source + processor, extra_flags=flags, **dict.fromkeys(unneeded, False))()
    except Exception as error:  # no compiler, no headers, no place to write to ...
        logging.getLogger(__name__).info("torch's kernels run, as pop's cannot be compiled: %s", error)
        return None


def keep_freed_memory() -> None:
    """Raise glibc's mmap threshold, so that activation buffers are reused.

    By default they are unmapped after every layer, and zeroed by the system for the next one. That took a quarter of
    SmolLM2's prefill. glibc raises the threshold (mallopt(3), M_MMAP_THRESHOLD) to the largest block that it has seen
    freed. So this allocates one block and frees it untouched. Other allocators are not affected.
    """
    torch.empty(TEMPORARY, dtype=torch.uint8, device="cpu")  # whatever the default device is
