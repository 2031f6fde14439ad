"""Triton kernels: decode baseline JPEG tiles to the very pixels of libjpeg-turbo.

A tile's entropy-coded data can only be read from one end to the other. So each lane reads a tile of its own,
many at once; all later steps work on every sample in parallel. A block is 8 x 8 samples of one component; an
MCU holds the blocks of one area, those of luma first, then one of Cb and one of Cr.
"""

from __future__ import annotations

import triton
import triton.language as tl


# what changes from batch to batch must not make Triton compile anew
@triton.jit(do_not_specialize_on_alignment=["raw", "places"])
def unstuff(raw, places, packed, bits, odd, CHUNK: tl.constexpr):
    """Drop the 00 that follows each FF in a tile's data, and pack the bytes as big-endian words.

    ``places`` int32 [T, 3]: the first byte in ``raw``, the number of bytes, the first word in ``packed``.
    A tile with a marker in its data becomes odd.
    """
    tile = tl.program_id(0)
    first = tl.load(places + 3 * tile)
    count = tl.load(places + 3 * tile + 1)
    to = packed + tl.load(places + 3 * tile + 2).to(tl.int64) * 4
    kept = tl.zeros((), tl.int32)
    strays = tl.zeros((), tl.int32)
    for start in range(0, count, CHUNK):
        at = start + tl.arange(0, CHUNK)
        inside = at < count
        byte = tl.load(raw + first + at, mask=inside, other=0)
        before = tl.load(raw + first + at - 1, mask=inside & (at > 0), other=0)
        after = tl.load(raw + first + at + 1, mask=inside & (at + 1 < count), other=1)
        strays += tl.sum(((byte == 255) & (after != 0) & inside).to(tl.int32), 0)
        keep = (inside & ((byte != 0) | (before != 255))).to(tl.int32)
        place = kept + tl.cumsum(keep, 0) - 1
        tl.store(to + (place ^ 3), byte, mask=keep > 0)  # memory is little-endian
        kept += tl.sum(keep, 0)
    tl.store(bits + tile, kept * 8)
    tl.store(odd + tile, 1, mask=strays > 0)


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=["places"])
def read_coefficients(
    packed, places, bits, short, full, natural, coefficients, odd, tiles, blocks,
    LUMA: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Decode the Huffman codes of a tile per lane: int16 [T * blocks, 64], zero before.

    A table maps the next bits to (length << 8 | zeros to skip << 4 | bits of the value), or to 0 if no code
    begins so: ``short`` int16 [6, 512] for codes of up to 9 bits, ``full`` int16 [6, 65536] for all; for each
    component the table of DC, then that of AC. A tile becomes odd where libjpeg would warn of damage.
    """
    tile = tl.program_id(0) * LANES + tl.arange(0, LANES)
    exists = tile < tiles
    words = packed + tl.load(places + 3 * tile + 2, mask=exists, other=0)
    end = tl.load(bits + tile, mask=exists, other=0)
    sound = exists & (tl.load(odd + tile, mask=exists, other=1) == 0)
    active = sound
    block = tl.zeros((LANES,), tl.int32)
    in_mcu = tl.zeros((LANES,), tl.int32)
    at = tl.zeros((LANES,), tl.int32)  # in bits
    k = tl.zeros((LANES,), tl.int32)  # coefficient, in zigzag order
    y_dc = tl.zeros((LANES,), tl.int32)
    cb_dc = tl.zeros((LANES,), tl.int32)
    cr_dc = tl.zeros((LANES,), tl.int32)
    while tl.max(active.to(tl.int32), 0) > 0:
        for _ in range(STEPS):
            word = words + (at >> 5)
            this = tl.load(word, mask=active, other=0).to(tl.uint32, bitcast=True)
            following = tl.load(word + 1, mask=active, other=0).to(tl.uint32, bitcast=True)
            shift = (at & 31).to(tl.uint32)
            ahead = (this << shift) | ((following >> 1) >> (31 - shift))
            component = tl.maximum(in_mcu - (LUMA - 1), 0)
            is_dc = k == 0
            table = 2 * component + (k > 0).to(tl.int32)
            code = tl.load(short + table * 512 + (ahead >> 23).to(tl.int32), mask=active, other=0)
            is_long = active & (code == 0)
            longer = tl.load(full + table * 65536 + (ahead >> 16).to(tl.int32), mask=is_long, other=0)
            code = tl.where(is_long, longer, code).to(tl.int32)
            length, skip, size = code >> 8, (code >> 4) & 15, code & 15
            value = (((ahead << length.to(tl.uint32)) >> 1) >> (31 - size).to(tl.uint32)).to(tl.int32)
            value += tl.where(value < ((1 << size) >> 1), 1 - (1 << size), 0)
            at += length + size
            change = tl.where(is_dc & active, value, 0)
            y_dc += tl.where(component == 0, change, 0)
            cb_dc += tl.where(component == 1, change, 0)
            cr_dc += tl.where(component == 2, change, 0)
            dc = tl.where(component == 0, y_dc, tl.where(component == 1, cb_dc, cr_dc))
            k += tl.where(is_dc, 0, skip)
            active = active & (length > 0) & (k < 64) & (at <= end)
            place = block.to(tl.int64) * 64 + tl.load(natural + k, mask=active, other=0)
            to = coefficients + tile.to(tl.int64) * blocks * 64 + place
            tl.store(to, tl.where(is_dc, dc, value).to(tl.int16), mask=active & (is_dc | (size > 0)))
            is_last = (k == 63) | ((k > 0) & (size == 0) & (skip < 15))
            block += (is_last & active).to(tl.int32)
            in_mcu = tl.where(is_last, tl.where(in_mcu == LUMA + 1, 0, in_mcu + 1), in_mcu)
            k = tl.where(is_last, 0, k + 1)
            active = active & (block < blocks)
    # a code that does not exist, a coefficient beyond the last, too little data or a byte too many
    tl.store(odd + tile, 1, mask=sound & ((block < blocks) | (at > end) | (end - at > 7)))


@triton.jit
def _inverse_dct(c0, c1, c2, c3, c4, c5, c6, c7, SHIFT: tl.constexpr):
    """Eight samples of eight coefficients in 13-bit integers (Loeffler, Ligtenberg and Moschytz 1989)."""
    z1 = (c2 + c6) * 4433
    t2, t3 = z1 - c6 * 15137, z1 + c2 * 6270
    t0, t1 = (c0 + c4) << 13, (c0 - c4) << 13
    e0, e1, e2, e3 = t0 + t3, t1 + t2, t1 - t2, t0 - t3
    z5 = (c7 + c3 + c5 + c1) * 9633
    z1, z2 = (c7 + c1) * -7373, (c5 + c3) * -20995
    z3, z4 = (c7 + c3) * -16069 + z5, (c5 + c1) * -3196 + z5
    o3, o2 = c7 * 2446 + z1 + z3, c5 * 16819 + z2 + z4
    o1, o0 = c3 * 25172 + z2 + z3, c1 * 12299 + z1 + z4
    half: tl.constexpr = 1 << (SHIFT - 1)
    e0, e1, e2, e3 = e0 + half, e1 + half, e2 + half, e3 + half
    return (
        (e0 + o0) >> SHIFT, (e1 + o1) >> SHIFT, (e2 + o2) >> SHIFT, (e3 + o3) >> SHIFT,
        (e3 - o3) >> SHIFT, (e2 - o2) >> SHIFT, (e1 - o1) >> SHIFT, (e0 - o0) >> SHIFT,
    )  # fmt: skip


@triton.jit
def _largest(c0, c1, c2, c3, c4, c5, c6, c7):
    """The largest of eight numbers without their signs."""
    a, b = tl.maximum(tl.abs(c0), tl.abs(c1)), tl.maximum(tl.abs(c2), tl.abs(c3))
    c, d = tl.maximum(tl.abs(c4), tl.abs(c5)), tl.maximum(tl.abs(c6), tl.abs(c7))
    return tl.maximum(tl.maximum(a, b), tl.maximum(c, d))


@triton.jit
def _eight(first, stride, mask):
    """Eight numbers a lane, ``stride`` apart, as int32."""
    return (
        tl.load(first, mask=mask, other=0).to(tl.int32),
        tl.load(first + stride, mask=mask, other=0).to(tl.int32),
        tl.load(first + 2 * stride, mask=mask, other=0).to(tl.int32),
        tl.load(first + 3 * stride, mask=mask, other=0).to(tl.int32),
        tl.load(first + 4 * stride, mask=mask, other=0).to(tl.int32),
        tl.load(first + 5 * stride, mask=mask, other=0).to(tl.int32),
        tl.load(first + 6 * stride, mask=mask, other=0).to(tl.int32),
        tl.load(first + 7 * stride, mask=mask, other=0).to(tl.int32),
    )


@triton.jit(do_not_specialize=["lanes"])
def columns(coefficients, quantisation, odd, lanes, blocks, PER_MCU: tl.constexpr, LANES: tl.constexpr):
    """Multiply by the quantisation, int32 [3, 64], and transform each column in its place.

    Samples of 8 bits have coefficients below 2^11. Damaged data may have larger ones, at which 16-bit sums of
    libjpeg-turbo overflow in their own way: such a tile becomes odd.
    """
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = lane < lanes
    component = tl.maximum((lane >> 3) % PER_MCU - (PER_MCU - 3), 0)
    c0, c1, c2, c3, c4, c5, c6, c7 = _eight(coefficients + (lane >> 3) * 64 + (lane & 7), 8, mask)
    q0, q1, q2, q3, q4, q5, q6, q7 = _eight(quantisation + component * 64 + (lane & 7), 8, mask)
    c0, c1, c2, c3, c4, c5, c6, c7 = c0 * q0, c1 * q1, c2 * q2, c3 * q3, c4 * q4, c5 * q5, c6 * q6, c7 * q7
    wild = _largest(c0, c1, c2, c3, c4, c5, c6, c7) >= 4096
    c0, c1, c2, c3, c4, c5, c6, c7 = _inverse_dct(c0, c1, c2, c3, c4, c5, c6, c7, 11)
    wild = wild | (_largest(c0, c1, c2, c3, c4, c5, c6, c7) >= 16384)
    tl.store(odd + (lane >> 3) // blocks, 1, mask=mask & wild)
    to = coefficients + (lane >> 3) * 64 + (lane & 7)
    tl.store(to, c0.to(tl.int16), mask=mask)
    tl.store(to + 8, c1.to(tl.int16), mask=mask)
    tl.store(to + 16, c2.to(tl.int16), mask=mask)
    tl.store(to + 24, c3.to(tl.int16), mask=mask)
    tl.store(to + 32, c4.to(tl.int16), mask=mask)
    tl.store(to + 40, c5.to(tl.int16), mask=mask)
    tl.store(to + 48, c6.to(tl.int16), mask=mask)
    tl.store(to + 56, c7.to(tl.int16), mask=mask)


@triton.jit(do_not_specialize=["lanes"])
def rows(coefficients, samples, lanes, LANES: tl.constexpr):
    """Transform each row to samples, uint8 [T * blocks, 64]."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = lane < lanes
    c0, c1, c2, c3, c4, c5, c6, c7 = _eight(coefficients + lane * 8, 1, mask)
    c0, c1, c2, c3, c4, c5, c6, c7 = _inverse_dct(c0, c1, c2, c3, c4, c5, c6, c7, 18)
    to = samples + lane * 8
    tl.store(to, _byte(c0 + 128), mask=mask)
    tl.store(to + 1, _byte(c1 + 128), mask=mask)
    tl.store(to + 2, _byte(c2 + 128), mask=mask)
    tl.store(to + 3, _byte(c3 + 128), mask=mask)
    tl.store(to + 4, _byte(c4 + 128), mask=mask)
    tl.store(to + 5, _byte(c5 + 128), mask=mask)
    tl.store(to + 6, _byte(c6 + 128), mask=mask)
    tl.store(to + 7, _byte(c7 + 128), mask=mask)


@triton.jit
def _byte(value):
    return tl.minimum(tl.maximum(value, 0), 255).to(tl.uint8)


@triton.jit
def _sample(samples, x, y, mask, first, mcus_x, H: tl.constexpr, V: tl.constexpr, PER_MCU: tl.constexpr):
    """Sample (x, y) of a component that has H x V blocks in each MCU, from number ``first`` on."""
    x_block, y_block = x >> 3, y >> 3
    mcu = (y_block // V) * mcus_x + x_block // H
    block = mcu * PER_MCU + first + (y_block % V) * H + x_block % H
    return tl.load(samples + block * 64 + (y & 7) * 8 + (x & 7), mask=mask, other=0).to(tl.int32)


@triton.jit
def _chroma(samples, x, y, mask, first, mcus_x, width, height, H: tl.constexpr, V: tl.constexpr):
    """Chroma at a pixel: three quarters of the nearest sample, one of the next, along each halved axis."""
    if H == 1:
        value = _sample(samples, x, y, mask, first, mcus_x, 1, 1, 3)
    else:
        near = x >> 1
        far = tl.minimum(tl.maximum(near + 2 * (x & 1) - 1, 0), (width + 1) // 2 - 1)
        if V == 1:
            a = _sample(samples, near, y, mask, first, mcus_x, 1, 1, 4)
            b = _sample(samples, far, y, mask, first, mcus_x, 1, 1, 4)
            value = (3 * a + b + 1 + (x & 1)) >> 2
        else:
            line = y >> 1
            other = tl.minimum(tl.maximum(line + 2 * (y & 1) - 1, 0), (height + 1) // 2 - 1)
            a = 3 * _sample(samples, near, line, mask, first, mcus_x, 1, 1, 6)
            a += _sample(samples, near, other, mask, first, mcus_x, 1, 1, 6)
            b = 3 * _sample(samples, far, line, mask, first, mcus_x, 1, 1, 6)
            b += _sample(samples, far, other, mask, first, mcus_x, 1, 1, 6)
            value = (3 * a + b + 8 - (x & 1)) >> 4
    return value


@triton.jit
def colours(
    samples, pixels, width, height, mcus_x, blocks,
    H: tl.constexpr, V: tl.constexpr, YCBCR: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Join the components of each tile to RGB, uint8 [T, height, width, 3]."""
    tile = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * LANES + tl.arange(0, LANES)
    mask = at < width * height
    x, y = at % width, at // width
    samples += tile * blocks * 64
    red = _sample(samples, x, y, mask, 0, mcus_x, H, V, H * V + 2)
    green = _chroma(samples, x, y, mask, H * V, mcus_x, width, height, H, V)
    blue = _chroma(samples, x, y, mask, H * V + 1, mcus_x, width, height, H, V)
    if YCBCR:
        luma, cb, cr = red, green - 128, blue - 128
        red = luma + ((91881 * cr + 32768) >> 16)
        green = luma + ((-22554 * cb - 46802 * cr + 32768) >> 16)
        blue = luma + ((116130 * cb + 32768) >> 16)
    to = pixels + (tile * width * height + at) * 3
    tl.store(to, _byte(red), mask=mask)
    tl.store(to + 1, _byte(green), mask=mask)
    tl.store(to + 2, _byte(blue), mask=mask)
