"""The Triton kernels of decode_attention.py, which imports this file, and with it Triton, on their first launch.

A row attends the positions of its span that are still in the cache, position p in slot p % S. `attention_of_part`
divides them among `parts` programs, so that even one row fills the device (flash-decoding: Dao et al. 2023). Each
program takes the G query heads of one key-value head together. It stores its average of the values, and the
logarithm of its softmax's sum. `combine_parts` weighs the averages by these sums.

In the names of strides, the first letter is the tensor, and the rest the axis: batch row, slot, head, or element.
Positions are int32, which saves registers. Addresses are int64.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["S"])  # compiled code is the same for all caches
def attention_of_part(
    Q, Keys, Values, Spans, Averages, LogSums, scale, S,
    q_row, q_head, q_e, k_row, k_slot, k_head, k_e, v_row, v_slot, v_head, v_e,
    G: tl.constexpr, E: tl.constexpr, G2: tl.constexpr, E2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of the keys of a row's key-value head. G2 and E2 are G and E, rounded up to what tl.dot takes."""
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    heads, parts = tl.num_programs(1), tl.num_programs(2)
    last = tl.load(Spans + 2 * row + 1)
    first = tl.maximum(tl.load(Spans + 2 * row), last + 1 - S)
    count = last + 1 - first  # attended positions
    size = tl.cdiv(tl.cdiv(count, parts), BLOCK) * BLOCK
    begin = part * size
    end = tl.minimum(begin + size, count)
    first_slot = first % S

    g, e = tl.arange(0, G2)[:, None], tl.arange(0, E2)[None, :]
    q = tl.load(Q + row * q_row + (head * G + g) * q_head + e * q_e, mask=(g < G) & (e < E), other=0.0)  # [G2, E2]
    k_base, v_base = Keys + row * k_row + head * k_head, Values + row * v_row + head * v_head
    top = tl.full([G2], -float("inf"), tl.float32)
    total = tl.zeros([G2], tl.float32)
    out = tl.zeros([G2, E2], tl.float32)
    for at in range(begin, end, BLOCK):
        number = at + tl.arange(0, BLOCK)
        exists = number < end
        slot = first_slot + number
        slot = tl.where(slot < S, slot, slot - S).to(tl.int64)[:, None]
        loaded = exists[:, None] & (e < E)
        k = tl.load(k_base + slot * k_slot + e * k_e, mask=loaded, other=0.0)  # [BLOCK, E2]
        v = tl.load(v_base + slot * v_slot + e * v_e, mask=loaded, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [G2, BLOCK]
        scores = tl.where(exists[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = new_top

    total = tl.where(begin < end, total, 1.0)  # an empty part has the average 0 and the sum exp(-inf)
    g_row = ((row * heads + head) * parts + part) * G + tl.arange(0, G2)
    tl.store(Averages + g_row[:, None] * E + e, out / total[:, None], mask=(g < G) & (e < E))
    tl.store(LogSums + g_row, top + tl.log(total), mask=tl.arange(0, G2) < G)


@triton.jit(do_not_specialize=["parts"])
def combine_parts(
    Averages, LogSums, Out, parts, G: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, MOST: tl.constexpr
):
    """The parts of one query head of a row, of which there are at most MOST."""
    kv_head, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, e = tl.arange(0, MOST), tl.arange(0, E2)
    rows = (kv_head * parts + n) * G + g
    log_sums = tl.load(LogSums + rows, mask=n < parts, other=-float("inf"))
    weights = tl.exp(log_sums - tl.max(log_sums, 0))
    loaded = (n < parts)[:, None] & (e < E)[None, :]
    averages = tl.load(Averages + rows[:, None] * E + e[None, :], mask=loaded, other=0.0)  # [MOST, E2]
    out = tl.sum(averages * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(Out + (kv_head * G + g) * E + e, out.to(Out.dtype.element_ty), mask=e < E)
