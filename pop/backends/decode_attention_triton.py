"""The Triton kernels of decode_attention.py, which imports this file, and with it Triton, on their first launch.

A row attends the positions of its span that are still in the cache. Position p is in slot p % S. `attention_of_part`
divides the positions among `parts` programs, so that even one row fills the device (flash-decoding: Dao et al. 2023).
Each program takes the G query heads of one key-value head together. It stores its average of the values, and the
logarithm of its softmax's sum. `combine_parts` weighs the averages by these sums.

G2 is G, rounded up to what tl.dot takes. Positions are int32, which saves registers. Addresses are int64.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["S"])  # compiled code is the same for all caches
def attention_of_part(
    Q, Keys, Values, Spans, Averages, LogSums, scale, S, row_stride, slot_stride, head_stride,
    G: tl.constexpr, E: tl.constexpr, G2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of the keys of a row's key-value head. The strides are those of Keys and of Values."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    parts = tl.num_programs(2)
    number = row * tl.num_programs(1) + head  # of the key-value head among those of all rows
    head_begin = row * row_stride + head * head_stride

    last = tl.load(Spans + 2 * row + 1)
    first = tl.maximum(tl.load(Spans + 2 * row), last + 1 - S)
    first_slot = first % S
    count = last + 1 - first  # attended positions
    size = tl.cdiv(tl.cdiv(count, parts), BLOCK) * BLOCK
    begin = part * size
    end = tl.minimum(begin + size, count)

    g = tl.arange(0, G2)
    e = tl.arange(0, E)[None, :]
    exists = (g < G)[:, None]
    q = tl.load(Q + (number * G + g)[:, None] * E + e, mask=exists, other=0.0)  # [G2, E]
    top = tl.full([G2], -float("inf"), tl.float32)
    total = tl.zeros([G2], tl.float32)
    out = tl.zeros([G2, E], tl.float32)
    for at in range(begin, end, BLOCK):
        n = at + tl.arange(0, BLOCK)
        attended = n < end
        slot = first_slot + n
        slot = tl.where(slot < S, slot, slot - S).to(tl.int64)
        numbers = slot[:, None] * slot_stride + e
        k = tl.load(Keys + head_begin + numbers, mask=attended[:, None], other=0.0)  # [BLOCK, E]
        v = tl.load(Values + head_begin + numbers, mask=attended[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [G2, BLOCK]
        scores = tl.where(attended[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = new_top

    total = tl.where(begin < end, total, 1.0)  # an empty part has the average 0 and the sum exp(-inf)
    stored = (number * parts + part) * G + g
    tl.store(Averages + stored[:, None] * E + e, out / total[:, None], mask=exists)
    tl.store(LogSums + stored, top + tl.log(total), mask=g < G)


@triton.jit(do_not_specialize=["parts"])
def combine_parts(Averages, LogSums, Out, parts, G: tl.constexpr, E: tl.constexpr, MOST: tl.constexpr):
    """The parts of one query head of a row, of which there are at most MOST."""
    number = tl.program_id(0).to(tl.int64)  # as above
    g = tl.program_id(1)
    part = tl.arange(0, MOST)
    e = tl.arange(0, E)
    stored = (number * parts + part) * G + g
    log_sums = tl.load(LogSums + stored, mask=part < parts, other=-float("inf"))
    weights = tl.exp(log_sums - tl.max(log_sums, 0))
    numbers = stored[:, None] * E + e[None, :]
    averages = tl.load(Averages + numbers, mask=(part < parts)[:, None], other=0.0)  # [MOST, E]
    out = tl.sum(averages * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(Out + (number * G + g) * E + e, out.to(Out.dtype.element_ty))
