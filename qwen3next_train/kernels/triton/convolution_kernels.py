"""Device code of the convolution before the delta rule, forward and backward.

A program works on a stretch of tokens of one head, whose channels lie side by side; "row" is what a token has of that
head. Its number along the first axis is the head's, of q and k in turn (``NORMED``) or of v.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(
    NORMED: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    FIRST_COLUMN: tl.constexpr,
    FIRST_CHANNEL: tl.constexpr,
    SIZE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """This program's head: q (0) or k (1), first column of the projection, first filter, first column of the output."""
    head = tl.program_id(0)
    group, part = head // PARTS, head % PARTS
    column = group * GROUP_COLUMNS + FIRST_COLUMN + part * SIZE
    if NORMED:
        output_column = group * SIZE
        channel = part * (NUM_GROUPS * SIZE) + output_column
    else:
        output_column = head * SIZE
        channel = FIRST_CHANNEL + output_column
    return part, tl.multiple_of(column, ALIGNMENT), channel, tl.multiple_of(output_column, ALIGNMENT)


@triton.jit
def _filter_column(weight, channel, c, DELAY: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Filter values that meet the row ``DELAY`` tokens back."""
    if DELAY < WIDTH:
        return tl.load(weight + (channel + c) * WIDTH + (WIDTH - 1 - DELAY), mask=c < SIZE, other=0.0).to(tl.float32)
    return tl.zeros_like(c).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens"])
def convolve_kernel(
    qkvz,
    weight,
    starts,
    first_output,
    second_output,
    num_tokens,
    NORMED: tl.constexpr,
    EPS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    FIRST_COLUMN: tl.constexpr,
    FIRST_CHANNEL: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """q and k (``NORMED``), or v."""
    part, column, channel, output_column = _place(
        NORMED, NUM_GROUPS, PARTS, GROUP_COLUMNS, FIRST_COLUMN, FIRST_CHANNEL, SIZE, ALIGNMENT
    )
    tokens = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    inside = (tokens < num_tokens)[:, None] & (c < SIZE)[None, :]
    start = tl.load(starts + tokens, mask=tokens < num_tokens, other=0)
    rows = qkvz + tokens.to(tl.int64)[:, None] * (NUM_GROUPS * GROUP_COLUMNS) + (column + c)[None, :]
    y = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for delay in tl.static_range(WIDTH):
        seen = inside & (tokens - delay >= start)[:, None]
        x = tl.load(rows - delay * (NUM_GROUPS * GROUP_COLUMNS), mask=seen, other=0.0).to(tl.float32)
        y += x * _filter_column(weight, channel, c, delay, SIZE, WIDTH)[None, :]
    y = y * tl.sigmoid(y)
    heads_per_row: tl.constexpr = NUM_GROUPS if NORMED else NUM_GROUPS * PARTS
    place = tokens.to(tl.int64)[:, None] * (heads_per_row * SIZE) + (output_column + c)[None, :]
    if NORMED:
        y = y * tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None]
        if part == 1:
            tl.store(second_output + place, y, mask=inside)
        else:
            tl.store(first_output + place, y, mask=inside)
    else:
        tl.store(first_output + place, y, mask=inside)


@triton.jit
def _load_row(base, row, num_tokens, stride: tl.constexpr, c, SIZE: tl.constexpr):
    """A token's row; zeros for a token that does not exist."""
    end = tl.where((row >= 0) & (row < num_tokens), SIZE, 0)
    return tl.load(base + row.to(tl.int64) * stride + c, mask=c < end, other=0.0)


@triton.jit
def _load_four(base, row, num_tokens, stride: tl.constexpr, c, SIZE: tl.constexpr):
    """The rows of a token and of the three after it."""
    return (
        _load_row(base, row, num_tokens, stride, c, SIZE),
        _load_row(base, row + 1, num_tokens, stride, c, SIZE),
        _load_row(base, row + 2, num_tokens, stride, c, SIZE),
        _load_row(base, row + 3, num_tokens, stride, c, SIZE),
    )


@triton.jit
def _store_row(base, row, end, stride: tl.constexpr, c, value, SIZE: tl.constexpr):
    """Write a token's row, if the token comes before ``end``."""
    tl.store(base + row.to(tl.int64) * stride + c, value, mask=c < tl.where(row < end, SIZE, 0))


@triton.jit
def _load_start(starts, row, num_tokens):
    """Where a token's document starts; anything for a token that does not exist, whose rows are zeros."""
    return tl.load(starts + tl.minimum(tl.maximum(row, 0), num_tokens - 1))


@triton.jit
def _load_four_starts(starts, row, num_tokens):
    """Those of a token and of the three after it."""
    return (
        _load_start(starts, row, num_tokens),
        _load_start(starts, row + 1, num_tokens),
        _load_start(starts, row + 2, num_tokens),
        _load_start(starts, row + 3, num_tokens),
    )


@triton.jit
def _backward_token(
    x0, x1, x2, x3, upstream, token, start, own, w0, w1, w2, w3, a0, a1, a2, s0, s1, s2, s3,
    INSIDE: tl.constexpr, NORMED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """One token on the way from the last to the first.

    Args:
        x0, x1, x2, x3: its input row and those before it.
        upstream: gradient of its output row.
        token, start: its index, and that of its document's first token.
        own: whether it is one of the program's own, and not one behind them that only passes gradients back.
        w0, w1, w2, w3: filter columns by delay.
        a0, a1, a2: what later tokens of its document have passed back to its input row and to the two before it.
        s0, s1, s2, s3: gradients of the filter columns so far.
        INSIDE: it is known not to lie behind the program's own, and three rows before it to be its document's; a third
            less work.

    Returns:
        gradient of its input row; then a0, a1, a2 for the token before it, and s0, s1, s2, s3.
    """
    x0, x1, x2, x3 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
    if not INSIDE:
        x1 = tl.where(token - 1 >= start, x1, 0.0)
        x2 = tl.where(token - 2 >= start, x2, 0.0)
        x3 = tl.where(token - 3 >= start, x3, 0.0)
    pre = x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3
    gate = tl.sigmoid(pre)
    y = pre * gate
    grad = upstream.to(tl.float32)
    if NORMED:
        scale = tl.rsqrt(tl.sum(y * y, 0) + EPS)
        grad = scale * grad - y * (scale * scale * scale * tl.sum(grad * y, 0))
    grad = grad * (gate + y * (1.0 - gate))
    dx, b0, b1, b2 = a0 + grad * w0, a1 + grad * w1, a2 + grad * w2, grad * w3
    if not INSIDE:
        # The token before it is another document's.
        b0 = tl.where(token > start, b0, 0.0)
        b1 = tl.where(token > start, b1, 0.0)
        b2 = tl.where(token > start, b2, 0.0)
        grad = tl.where(own, grad, 0.0)
    return dx, b0, b1, b2, s0 + grad * x0, s1 + grad * x1, s2 + grad * x2, s3 + grad * x3


@triton.jit
def _backward_four(
    x0, x1, x2, x3, e1, e2, e3, u0, u1, u2, u3, row, t0, t1, t2, t3, own, w0, w1, w2, w3, a0, a1, a2, s0, s1, s2, s3,
    INSIDE: tl.constexpr, NORMED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """A token and the three after it, the last first.

    Args:
        x0, x1, x2, x3: their input rows.
        e1, e2, e3: rows of the three tokens before them, the earliest first.
        u0, u1, u2, u3: gradients of their output rows.
        row: index of the first.
        t0, t1, t2, t3: their documents' first tokens.
        own, w0, w1, w2, w3, a0, a1, a2, s0, s1, s2, s3: as for one token.

    Returns:
        gradients of their input rows; then a0, a1, a2 for the token before them, and s0, s1, s2, s3.
    """
    d3, a0, a1, a2, s0, s1, s2, s3 = _backward_token(
        x3, x2, x1, x0, u3, row + 3, t3, own, w0, w1, w2, w3, a0, a1, a2, s0, s1, s2, s3, INSIDE, NORMED, EPS
    )
    d2, a0, a1, a2, s0, s1, s2, s3 = _backward_token(
        x2, x1, x0, e3, u2, row + 2, t2, own, w0, w1, w2, w3, a0, a1, a2, s0, s1, s2, s3, INSIDE, NORMED, EPS
    )
    d1, a0, a1, a2, s0, s1, s2, s3 = _backward_token(
        x1, x0, e3, e2, u1, row + 1, t1, own, w0, w1, w2, w3, a0, a1, a2, s0, s1, s2, s3, INSIDE, NORMED, EPS
    )
    d0, a0, a1, a2, s0, s1, s2, s3 = _backward_token(
        x0, e3, e2, e1, u0, row, t0, own, w0, w1, w2, w3, a0, a1, a2, s0, s1, s2, s3, INSIDE, NORMED, EPS
    )
    return d0, d1, d2, d3, a0, a1, a2, s0, s1, s2, s3


@triton.jit(do_not_specialize=["num_tokens", "block"])
def convolve_backward_kernel(
    qkvz,
    weight,
    starts,
    first_upstream,
    second_upstream,
    dqkvz,
    partial,
    num_tokens,
    block,
    NORMED: tl.constexpr,
    EPS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    FIRST_COLUMN: tl.constexpr,
    FIRST_CHANNEL: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    NUM_CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """From the last token to the first, four at a time, with the rows of the next four already on their way.

    One token's gradient reaches the rows of up to three tokens before it, so a program begins with the four tokens
    behind its own, and what it has not finished yet it carries in registers: no atomics, and every output row's
    gradient is computed once.
    """
    part, column, channel, output_column = _place(
        NORMED, NUM_GROUPS, PARTS, GROUP_COLUMNS, FIRST_COLUMN, FIRST_CHANNEL, SIZE, ALIGNMENT
    )
    stride: tl.constexpr = NUM_GROUPS * GROUP_COLUMNS
    upstream_stride: tl.constexpr = (NUM_GROUPS if NORMED else NUM_GROUPS * PARTS) * SIZE
    c = tl.arange(0, BLOCK_C)
    w0 = _filter_column(weight, channel, c, 0, SIZE, WIDTH)
    w1 = _filter_column(weight, channel, c, 1, SIZE, WIDTH)
    w2 = _filter_column(weight, channel, c, 2, SIZE, WIDTH)
    w3 = _filter_column(weight, channel, c, 3, SIZE, WIDTH)
    a0, a1, a2 = tl.zeros_like(w0), tl.zeros_like(w0), tl.zeros_like(w0)
    s0, s1, s2, s3 = tl.zeros_like(w0), tl.zeros_like(w0), tl.zeros_like(w0), tl.zeros_like(w0)
    x, dx = qkvz + column, dqkvz + column
    # q or k; for v both are the same.
    up = first_upstream + output_column
    if part == 1:
        up = second_upstream + output_column
    row = (tl.program_id(1) + 1) * block
    end = tl.minimum(row, num_tokens)
    h0, h1, h2, h3 = _load_four(x, row, num_tokens, stride, c, SIZE)
    l0, l1, l2, l3 = _load_four(x, row - 4, num_tokens, stride, c, SIZE)
    u0, u1, u2, u3 = _load_four(up, row, num_tokens, upstream_stride, c, SIZE)
    t0, t1, t2, t3 = _load_four_starts(starts, row, num_tokens)
    for _ in range(block // 4 + 1):
        n0, n1, n2, n3 = _load_four(x, row - 8, num_tokens, stride, c, SIZE)
        v0, v1, v2, v3 = _load_four(up, row - 4, num_tokens, upstream_stride, c, SIZE)
        r0, r1, r2, r3 = _load_four_starts(starts, row - 4, num_tokens)
        # Starts only grow, so that of the last token holds for the tokens before it as well.
        own = row < end
        if own & (t3 <= row - 3):
            d0, d1, d2, d3, a0, a1, a2, s0, s1, s2, s3 = _backward_four(
                h0, h1, h2, h3, l1, l2, l3, u0, u1, u2, u3, row, t0, t1, t2, t3, own,
                w0, w1, w2, w3, a0, a1, a2, s0, s1, s2, s3, True, NORMED, EPS,
            )  # fmt: skip
        else:
            d0, d1, d2, d3, a0, a1, a2, s0, s1, s2, s3 = _backward_four(
                h0, h1, h2, h3, l1, l2, l3, u0, u1, u2, u3, row, t0, t1, t2, t3, own,
                w0, w1, w2, w3, a0, a1, a2, s0, s1, s2, s3, False, NORMED, EPS,
            )  # fmt: skip
        _store_row(dx, row, end, stride, c, d0, SIZE)
        _store_row(dx, row + 1, end, stride, c, d1, SIZE)
        _store_row(dx, row + 2, end, stride, c, d2, SIZE)
        _store_row(dx, row + 3, end, stride, c, d3, SIZE)
        h0, h1, h2, h3 = l0, l1, l2, l3
        l0, l1, l2, l3 = n0, n1, n2, n3
        u0, u1, u2, u3 = v0, v1, v2, v3
        t0, t1, t2, t3 = r0, r1, r2, r3
        row -= 4
    sums = partial + tl.program_id(1).to(tl.int64) * (4 * NUM_CHANNELS) + channel + c
    tl.store(sums, s0, mask=c < SIZE)
    tl.store(sums + NUM_CHANNELS, s1, mask=c < SIZE)
    tl.store(sums + 2 * NUM_CHANNELS, s2, mask=c < SIZE)
    tl.store(sums + 3 * NUM_CHANNELS, s3, mask=c < SIZE)
