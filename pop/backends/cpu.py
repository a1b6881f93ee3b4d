"""CPUs: faster matrix products, faster attention, and memory that is reused.

Products: `accelerate` gives the linear layers of a finished module the `forward` of `Linear`.
Attention: functions replace those of the same name in pop/engine/attention.py and pop/models/layers.py.
Both use kernels.cpp where it fits, and otherwise torch's operators. The results are equal up to rounding. README.md in
this folder gives the reasons. Shape letters: pop/models/layers.py; N is the number of keys.
"""

import contextlib
import ctypes
import functools
import inspect
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pop.engine import attention as engine
from pop.models import layers

logger = logging.getLogger(__name__)


def _supports(feature: str) -> bool:
    """Whether the processor has a feature. A version of torch that does not know the feature does not use it either."""
    return getattr(torch.cpu, f"_is_{feature}_supported", bool)()


CAPABILITY = torch.backends.cpu.get_cpu_capability()
HAS_AVX2 = CAPABILITY in ("AVX2", "AVX512")  # which kernels.cpp needs
HAS_BF16 = _supports("avx512_bf16")
HAS_AMX = _supports("amx_tile")

# Dtypes without fast products: float16, and bfloat16 on x86 processors without instructions for it.
WIDENED = {torch.float16, torch.bfloat16} if HAS_AVX2 and not HAS_BF16 else {torch.float16}
WIDENED_AT_ONCE = 2**26  # weights that are copied to float32 at a time

# Dtypes in which kernels.cpp is faster than torch: for one token a row, and for attention of several tokens. With
# several tokens, torch uses AMX for bfloat16.
FUSED_TOKEN = {torch.float32, torch.bfloat16} if HAS_AVX2 else set()
FUSED = FUSED_TOKEN - {torch.bfloat16} if HAS_AMX else FUSED_TOKEN
MOST_E = 256  # the widest head that kernels.cpp takes
MOST_ROWS = 64  # the most rows of a product that kernels.cpp takes
FEW_ROWS = 16  # the most rows of a product for which kernels.cpp is faster than torch's fast products

STREAMS = 2  # blocks of a matrix that compiled code reads at once; one or four are up to a tenth slower
# Dtypes in which torch's x W' is faster than (W x')'
ROWS_FIRST = {torch.float16, torch.bfloat16} if HAS_BF16 and not HAS_AMX else {torch.float16}
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
    """Like F.linear. x is [B, T, in], or [B, in] and [in] for one token a row.

    | x | product |
    |---|---|
    | several tokens, in WIDENED | in float32, some weights at a time; without gradients, few rows in kernels.cpp |
    | several tokens, otherwise | torch's |
    | one token a row, with gradients | torch's |
    | one token, one row, compiled | a multiply-and-sum, which the compiler fuses with what is around it |
    | one token a row, otherwise | `multiply_rows`: kernels.cpp, or the fastest of torch's |
    """
    one_token = x.dim() < 3 or x.shape[-2] == 1
    has_gradients = torch.is_grad_enabled()
    is_torchs = has_gradients if one_token else x.dtype not in WIDENED
    if is_torchs or x.device.type != "cpu" or type(weight) not in (Tensor, nn.Parameter):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])  # [rows, in]
    if not one_token:
        product = _product_in_float32 if has_gradients else multiply_rows
        out = product(rows.float(), weight)
    elif rows.shape[0] == 1 and torch.compiler.is_compiling():
        products = [(block * rows[0]).sum(-1, dtype=torch.float32) for block in weight.chunk(STREAMS)]
        out = torch.cat(products).to(x.dtype)
    else:
        out = multiply_rows(rows, weight)
    if bias is not None:
        out = out + bias
    return out.to(x.dtype).reshape(*x.shape[:-1], len(weight))


def _product_in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """x is float32. It copies some rows of the matrix at a time, since an output head is too large to copy."""
    blocks = weight.split(max(1, WIDENED_AT_ONCE // weight.shape[1]))
    products = [F.linear(x, block.float()) for block in blocks]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


# One operator for all sizes, so that compiled code is not specialised to some. `custom_op` would add 60 us to a call.
torch.library.define("pop::multiply_rows", "(Tensor x, Tensor weight) -> Tensor")


@torch.library.impl("pop::multiply_rows", "CPU")
def _multiply_rows(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear of x [rows, in], without gradients. For a few rows, kernels.cpp takes little longer than to read W.

    x has weight's dtype, or is float32 with values that weight's dtype can hold. The result has x's dtype.
    """
    if weight.dtype in WIDENED and len(x) > MOST_ROWS:
        return _product_in_float32(x.float(), weight).to(x.dtype)
    rows = x.to(weight.dtype)
    out = rows.new_empty(len(rows), len(weight))
    call = multiply_rows_call(out, rows, weight)
    if call is not None:
        call()
    elif weight.dtype in WIDENED and len(rows) > FEW_ROWS:
        out = _product_in_float32(rows.float(), weight)
    elif weight.dtype in ROWS_FIRST:
        out = F.linear(rows, weight)
    else:
        out = (weight @ rows.T).T.contiguous()
    return out.to(x.dtype)


torch.library.register_fake("pop::multiply_rows", lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]))
multiply_rows = torch.ops.pop.multiply_rows.default


def multiply_rows_call(out: Tensor, x: Tensor, weight: Tensor) -> Callable | None:
    """The call of kernels.cpp that writes multiply_rows(x, weight) to `out`, or None if it cannot take these tensors.

    The kernel reads whole vectors of 64 bytes.
    """
    rows, width = x.shape
    is_few = 0 < rows <= (MOST_ROWS if x.dtype in WIDENED else FEW_ROWS)
    same = x.dtype == weight.dtype and width == weight.shape[1]
    whole_vectors = width * x.itemsize % 64 == 0 and x.is_contiguous() and weight.is_contiguous()
    if not (is_few and same and whole_vectors and x.dtype in FUSED_TOKEN and _has_kernel()):
        return None
    return _call("multiply_rows", (x, weight, out), (rows, width, len(weight)))


def cache_attention(q: Tensor, keys: Tensor, values: Tensor, metadata, scale: float) -> Tensor:
    """Like pop.engine.attention.cache_attention."""
    if metadata.held is None:
        return decode_attention(q, keys, values, metadata.spans, scale)
    if not _fits(q, FUSED):
        return engine.cache_attention(q, keys, values, metadata, scale)
    k, v = engine.read(keys, values, metadata)
    return fused_attention(q, k, v, metadata.held, metadata.spans, scale)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, last_attended: Tensor | None = None
) -> Tensor:
    """Like pop.models.layers.causal_attention."""
    if not _fits(q, FUSED) or any(x.requires_grad for x in (q, k, v)):  # fused_attention has no gradients
        return layers.causal_attention(q, k, v, scale, window, last_attended)
    own = torch.arange(q.shape[1], device="cpu").expand(q.shape[:2])
    first = torch.zeros_like(own) if window is None else own - window + 1
    last = own if last_attended is None else last_attended
    return fused_attention(q, k, v, own, torch.stack((first, last), dim=-1), scale)


def _fits(q: Tensor, dtypes: set[torch.dtype]) -> bool:
    """Whether kernels.cpp takes q, in these dtypes."""
    E = q.shape[-1]
    return q.device.type == "cpu" and q.dtype in dtypes and E % 2 == 0 and E <= MOST_E and _has_kernel()


@torch.library.custom_op("pop::fused_attention", mutates_args=())
def fused_attention(q: Tensor, k: Tensor, v: Tensor, held: Tensor, spans: Tensor, scale: float) -> Tensor:
    """masked_attention by kernels.cpp, which reads only the keys that a block of queries needs, and no mask.

    Args:
        q: [B, T, H, E].
        k, v: [B, N, K, E].
        held: [B, N], the positions of the keys.
        spans: [B, T, 2], the first and the last position that each query attends to. The first may be below 0.
        scale: The factor on q . k.

    Returns: [B, T, H * E].
    Raises: ValueError if the shapes or the dtypes do not agree. The kernel would read other memory.
    """
    if not _agree(q, k, v, spans) or held.shape != k.shape[:2]:
        shapes = [x.shape for x in (q, k, v, held, spans)]
        raise ValueError(f"q, k, v, held and spans do not agree: {shapes}, {q.dtype}, {k.dtype} and {v.dtype}")
    q, k, v = (_with_even_strides(x) for x in (q, k, v))
    held = held.int().contiguous()
    spans = spans.int().contiguous()
    out = engine.empty_output(q)
    _call("attend", (q, k, v, out, held, spans), _attention_sizes(q, k, v), ctypes.c_float(scale))()
    return out


fused_attention.register_fake(engine.empty_output)


def _agree(q: Tensor, k: Tensor, v: Tensor, spans: Tensor) -> bool:
    """Whether the shapes and the dtypes are those of one attention, as in `fused_attention`."""
    B, T, H, E = q.shape
    N, K = k.shape[1:3]
    are_shapes_right = k.shape == v.shape == (B, N, K, E) and spans.shape == (B, T, 2) and H % K == 0
    return are_shapes_right and q.dtype == k.dtype == v.dtype


def _with_even_strides(x: Tensor) -> Tensor:
    """x, or a copy: kernels.cpp reads two neighbouring bfloat16 numbers of a head at once."""
    *strides, along_head = x.stride()
    if along_head == 1 and not any(stride % 2 for stride in strides):
        return x
    return x.contiguous()


@torch.library.custom_op("pop::cpu_decode_attention", mutates_args=())
def decode_attention(q: Tensor, keys: Tensor, values: Tensor, spans: Tensor, scale: float) -> Tensor:
    """Like pop.engine.attention.decode_attention, but it reads no slots after those that are filled."""
    out = engine.empty_output(q)
    call = decode_attention_call(out, q, keys, values, spans, scale)
    if call is not None:
        call()
        return out
    filled = slice(int(spans.max()) + 2)  # the slots up to the last position, and one in place of the spare slot
    return engine.decode_attention(q, keys[:, filled], values[:, filled], spans, scale)


decode_attention.register_fake(engine.empty_output)


def decode_attention_call(
    out: Tensor, q: Tensor, keys: Tensor, values: Tensor, spans: Tensor, scale: float
) -> Callable | None:
    """The call of kernels.cpp that writes decode_attention(...) to `out`, or None if it cannot take these tensors."""
    if not (_fits(q, FUSED_TOKEN) and _agree(q, keys, values, spans) and q.shape[1] == 1):
        return None
    dense_heads = q.stride(3) == keys.stride(3) == values.stride(3) == 1
    if not (dense_heads and spans.is_contiguous() and spans.dtype == torch.int32):
        return None
    sizes = _attention_sizes(q, keys[:, :-1], values)  # without the spare slot
    return _call("attend_token", (q, keys, values, out, spans), sizes, ctypes.c_float(scale))


def _attention_sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """The struct Sizes of kernels.cpp: B, T, H, E, N, K, and three strides each of q, k and v."""
    return *q.shape, *k.shape[1:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]


def _call(name: str, tensors: tuple[Tensor, ...], sizes: tuple[int, ...], *numbers) -> Callable[[], None]:
    """A call of a function of kernels.cpp.

    It reads the memory that the tensors have when it is made, because assigning a weight's `data` frees the old memory.
    Raises RuntimeError if that is less than the sizes say.
    """
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    function = getattr(_kernel(), f"{name}_{dtype}")
    sizes = (ctypes.c_int64 * len(sizes))(*sizes)
    threads = torch.get_num_threads()
    bytes_of = (ctypes.c_int64 * len(tensors))()

    def call():
        addresses = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
        bytes_of[:] = [x.untyped_storage().nbytes() - x.storage_offset() * x.itemsize for x in tensors]
        if function(*addresses, bytes_of, sizes, *numbers, threads):
            shapes = [list(x.shape) for x in tensors]
            raise RuntimeError(f"{name}: a tensor of {shapes} has become smaller than the call was made for")

    return call


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
        processor = f"\n// {CAPABILITY} {HAS_BF16}"  # several processors may share a cache of files
        options = {"extra_flags": ["-ffp-contract=fast", "-fno-unsafe-math-optimizations", "-fno-finite-math-only"]}
        if "needs_vec_isa" in inspect.signature(CppCodeCache.load_async).parameters:
            options["needs_vec_isa"] = False  # finding it takes a second
        return CppCodeCache.load_async(source + processor, **options)()
    except Exception as error:  # no compiler, no headers, no place to write to ...
        logger.warning("torch's kernels run, as pop's cannot be compiled: %s", error)
        return None


def make_cache_folder() -> None:
    """Give torch's cache of compiled code another folder if its own cannot be made.

    Without a folder, parts of torch cannot be imported. They serve custom operators and modules on the meta device as
    well. If the other folder cannot be written to, compiling fails, and plain functions run.
    """
    try:
        folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()  # in which torch makes its own
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        logger.warning("torch's cache folder cannot be made (%s); set TORCHINDUCTOR_CACHE_DIR to another one", error)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.sep  # it exists
        with contextlib.suppress(OSError):  # a temporary folder may be as impossible
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="pop-")


def keep_freed_memory() -> None:
    """Raise glibc's mmap threshold, so that activation buffers are reused.

    By default they are unmapped after every layer, and zeroed by the system for the next one. That took a quarter of
    SmolLM2's prefill. glibc raises the threshold (mallopt(3), M_MMAP_THRESHOLD) to the largest block that it has seen
    freed. So this allocates one block and frees it untouched. Other allocators are not affected.
    """
    torch.empty(TEMPORARY, dtype=torch.uint8, device="cpu")  # whatever the default device is
