"""The Triton kernels of span_attention.py, which imports this file, and with it Triton, on their first launch.

A token attends to the positions of its span. Position p is in slot p % S. `attention_of_part` takes M queries of one
key-value head: consecutive tokens, each with the G query heads of the group. It divides the positions that any of them
attends among `parts` programs, so that even one token fills the device (flash-decoding: Dao et al. 2023). Each program
stores its average of the values, and the logarithm of its softmax's sum. `combine_parts` weighs the averages by these
sums.

Positions are int32, which saves registers. Addresses are int64.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "S", "total_queries"])  # compiled code is the same for all lengths
def attention_of_part(
    Q, Keys, Values, Spans, Averages, LogSums, scale, T, S, total_queries, row_stride, slot_stride, head_stride,
    G: tl.constexpr, E: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of the keys that M queries attend to, of all rows' queries. The strides are those of Keys and Values."""
    blocks = tl.cdiv(T * G, M)  # of queries of a row's key-value head
    row = (tl.program_id(0) // blocks).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    parts = tl.num_programs(2)
    K = tl.num_programs(1)
    head_begin = row * row_stride + head * head_stride

    query = tl.program_id(0) % blocks * M + tl.arange(0, M)
    exists = query < T * G
    token = row * T + query // G  # among those of all rows
    first = tl.load(Spans + 2 * token, mask=exists, other=2**31 - 1)
    last = tl.load(Spans + 2 * token + 1, mask=exists, other=-1)
    stop = tl.max(last, 0) + 1
    start = tl.maximum(tl.min(first, 0), stop - S)
    first_slot = start % S
    count = stop - start  # positions that any of the queries attends to
    size = tl.cdiv(tl.cdiv(count, parts), BLOCK) * BLOCK
    begin = part * size
    end = tl.minimum(begin + size, count)

    e = tl.arange(0, E)[None, :]
    number = (token * K + head) * G + query % G  # of the query head among those of all tokens
    q = tl.load(Q + number[:, None] * E + e, mask=exists[:, None], other=0.0)  # [M, E]
    top = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, E], tl.float32)
    for at in range(begin, end, BLOCK):
        n = at + tl.arange(0, BLOCK)
        is_filled = n < end
        slot = first_slot + n
        slot = tl.where(slot < S, slot, slot - S).to(tl.int64)
        numbers = slot[:, None] * slot_stride + e
        k = tl.load(Keys + head_begin + numbers, mask=is_filled[:, None], other=0.0)  # [BLOCK, E]
        v = tl.load(Values + head_begin + numbers, mask=is_filled[:, None], other=0.0)
        position = tl.where(is_filled, start + n, -1)[None, :]
        attended = (first[:, None] <= position) & (position <= last[:, None])  # [M, BLOCK]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(attended, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        finite_top = tl.where(new_top == -float("inf"), 0.0, new_top)  # of a query that has attended to no key yet
        weights = tl.exp(scores - finite_top[:, None])
        shrink = tl.exp(top - finite_top)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = new_top

    total = tl.where(total > 0, total, 1.0)  # an empty part has the average 0 and the sum exp(-inf)
    stored = part.to(tl.int64) * total_queries + number
    averages = (out / total[:, None]).to(Averages.dtype.element_ty)
    tl.store(Averages + stored[:, None] * E + e, averages, mask=exists[:, None])
    tl.store(LogSums + stored, top + tl.log(total), mask=exists)


@triton.jit(do_not_specialize=["parts"])
def combine_parts(Averages, LogSums, Out, parts, E: tl.constexpr, MOST: tl.constexpr):
    """The parts of one query head of a token, of which there are at most MOST."""
    number = tl.program_id(0).to(tl.int64)  # as above
    part = tl.arange(0, MOST)
    e = tl.arange(0, E)
    stored = part * tl.num_programs(0).to(tl.int64) + number
    log_sums = tl.load(LogSums + stored, mask=part < parts, other=-float("inf"))
    weights = tl.exp(log_sums - tl.max(log_sums, 0))
    numbers = stored[:, None] * E + e[None, :]
    averages = tl.load(Averages + numbers, mask=(part < parts)[:, None], other=0.0)  # [MOST, E]
    out = tl.sum(averages * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(Out + number * E + e, out.to(Out.dtype.element_ty))
