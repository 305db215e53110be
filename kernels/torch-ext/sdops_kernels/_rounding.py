"""Device functions that all kernels share: floats from bits and back, error-free sums, one rounding at the end.

bfloat16 and fp8 go through integers on purpose. Triton's interpreter truncates where the hardware rounds, sm_80 has no
fp8, and `cvt` instructions differ between generations; integer arithmetic gives the same bits everywhere, and costs a
few instructions in kernels that wait for memory anyway.

Compile callers with `enable_fp_fusion=False`: a fused multiply-add inside `two_sum` would make its error wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What tensors hold, as the kernels call it (`_tables.CODES`).
F16 = tl.constexpr(0)
BF16 = tl.constexpr(1)
F32 = tl.constexpr(2)
E4M3 = tl.constexpr(3)
E5M2 = tl.constexpr(4)


@triton.jit
def load_raw(address, offsets, mask, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements of a tensor that begins at an address (int64), as they are stored: bf16 and fp8 as integers.

    ALIGNED promises that the address is divisible by 16.
    """
    pointer = address.to(
        tl.pointer_type(
            tl.float16 if CODE == F16 else tl.int16 if CODE == BF16 else tl.float32 if CODE == F32 else tl.uint8
        )
    )
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return tl.load(pointer + offsets, mask=mask, other=0 if (CODE == BF16) | (CODE > F32) else 0.0)


@triton.jit
def as_floats(raw, CODE: tl.constexpr):
    """What `load_raw` gives, as float32.

    fp8 codes are moved to the places of float32's fields, then scaled by the difference of the biases; NaN, and the
    infinities of e5m2, come out as numbers beyond the largest: quantised weights hold none of them.
    """
    if CODE == BF16:
        values = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif CODE > F32:
        mantissa: tl.constexpr = 3 if CODE == E4M3 else 2
        bias: tl.constexpr = 1.329227995784916e36 if CODE == E4M3 else 5.192296858534828e33  # 2^(127 - 7), 2^(127 - 15)
        code = raw.to(tl.int32)
        magnitude = ((code & 0x7F) << (23 - mantissa)).to(tl.float32, bitcast=True) * bias
        values = tl.where(code >= 128, -magnitude, magnitude)
    else:
        values = raw.to(tl.float32)
    return values


@triton.jit
def load_floats(address, offsets, mask, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements of a tensor that begins at an address, as float32."""
    return as_floats(load_raw(address, offsets, mask, CODE, ALIGNED), CODE)


@triton.jit
def store_floats(address, offsets, values, mask, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    """float32 rounded to the tensor's dtype, to nearest, ties to even, and stored; what is too large is clamped."""
    if CODE == F16:
        pointer = address.to(tl.pointer_type(tl.float16))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        limited = tl.minimum(tl.maximum(values, -65504.0), 65504.0)
        tl.store(pointer + offsets, limited.to(tl.float16), mask=mask)
    elif CODE == BF16:
        pointer = address.to(tl.pointer_type(tl.int16))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        tl.store(pointer + offsets, bf16_bits(values).to(tl.int16), mask=mask)
    elif CODE == F32:
        pointer = address.to(tl.pointer_type(tl.float32))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        tl.store(pointer + offsets, values, mask=mask)
    else:
        pointer = address.to(tl.pointer_type(tl.uint8))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        codes = fp8_codes(values, 3, -6, 448.0) if CODE == E4M3 else fp8_codes(values, 2, -14, 57344.0)
        tl.store(pointer + offsets, codes.to(tl.uint8), mask=mask)


@triton.jit
def bf16_bits(values):
    """Bit patterns (in int32) of the nearest bfloat16; beyond the largest finite one, that one."""
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    rounded = (magnitude + 0x7FFF + ((magnitude >> 16) & 1)) >> 16
    return tl.minimum(rounded, 0x7F7F) | ((bits >> 16) & 0x8000)


@triton.jit
def fp8_codes(values, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, LARGEST: tl.constexpr):
    """Codes (in int32) of the nearest fp8 number; saturates.

    Adding 1.5 * 2^(23 - mantissa) times the power of two of the value rounds it to so many mantissa bits; below the
    smallest normal number the power is held, which is the spacing of the subnormal ones.
    """
    bits = values.to(tl.int32, bitcast=True)
    magnitude = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), LARGEST)
    power = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, (127 + MIN_EXPONENT) << 23)
    magic = (power + ((23 - MANTISSA) << 23) + (1 << 22)).to(tl.float32, bitcast=True)
    rounded = (magnitude + magic) - magic
    bias: tl.constexpr = 7.52316384526264e-37 if MANTISSA == 3 else 1.925929944387236e-34  # 2^-120, 2^-112
    fields = (rounded * bias).to(tl.int32, bitcast=True)
    return (fields >> (23 - MANTISSA)) | ((bits >> 24) & 0x80)


@triton.jit
def two_sum(a, b):
    """a + b = s + e exactly (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@triton.jit
def to_odd(high, low):
    """float32 nearest to high + low toward zero, last bit set if anything was cut off.

    high must be the float32 nearest to the sum. Rounding the result once more, to at most 22 bits, is correct
    (Boldo, Melquiond: Emulation of FMA and correctly rounded sums, 2008).
    """
    bits = high.to(tl.int32, bitcast=True)
    against = ((low.to(tl.int32, bitcast=True) ^ bits) < 0).to(tl.int32)
    odd = (bits - against) | 1
    return tl.where(low == 0.0, bits, odd).to(tl.float32, bitcast=True)


@triton.jit
def to_odd_single(values):
    """float64 -> float32 toward zero, last bit set if anything was cut off."""
    nearest = values.to(tl.float32)
    back = nearest.to(tl.float64)
    bits = nearest.to(tl.int32, bitcast=True)
    beyond = (tl.abs(back) > tl.abs(values)).to(tl.int32)
    odd = (bits - beyond) | 1
    return tl.where(back == values, bits, odd).to(tl.float32, bitcast=True)


@triton.jit
def to_odd_double(high, low):
    """float64 nearest to high + low toward zero, last bit set if anything was cut off; high is nearest to the sum."""
    bits = high.to(tl.int64, bitcast=True)
    against = ((low.to(tl.int64, bitcast=True) ^ bits) < 0).to(tl.int64)
    odd = (bits - against) | 1
    return tl.where(low == 0.0, bits, odd).to(tl.float64, bitcast=True)


@triton.jit
def find(first, count, item):
    """The problem that holds an item (chunk or tile): first[problem] <= item < first[problem + 1]."""
    low = 0
    high = count - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(first + middle) <= item:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def share_of(first, problems, items, share):
    """A program's items (chunks or tiles), and the problem that holds the first of them."""
    begin = tl.program_id(0) * share
    return begin, tl.minimum(begin + share, items), find(first, problems, begin)


@triton.jit
def following(first, problem, item):
    """The problem that holds an item, if `problem` held the one before it."""
    return problem + (tl.load(first + problem + 1) <= item).to(tl.int32)


@triton.jit
def chunk_of(first, problem, chunk, numel, lane, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """The first element of a chunk in its tensor (int64), and which lanes hold elements.

    ALIGNED promises that sizes are divisible by 16.
    """
    start = (chunk - tl.load(first + problem)).to(tl.int64) * BLOCK
    left = tl.minimum(numel - start, BLOCK).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    return start, lane < left


@triton.jit
def random_words(key_low, key_high, group):
    """Four words (uint32) for each group of four elements: Philox4x32-10 with the group's number as the counter."""
    key = (key_high.to(tl.uint64) << 32) | (key_low.to(tl.uint64) & 0xFFFFFFFF)
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(key, low, high, zero, zero)


@triton.jit
def interleaved(w0, w1, w2, w3, SIZE: tl.constexpr):
    """w0[0], w1[0], w2[0], w3[0], w0[1] ...: (SIZE,) from four of (SIZE / 4,)."""
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (SIZE,))


@triton.jit
def load_operand(address, offsets, mask, CODE: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr):
    """An operand of a matrix product in its own dtype, or WIDE as float32: the interpreter multiplies bf16's bits."""
    if WIDE or CODE == F32:
        values = load_floats(address, offsets, mask, CODE, ALIGNED)
    else:
        pointer = address.to(tl.pointer_type(tl.float16 if CODE == F16 else tl.bfloat16))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
        values = tl.load(pointer + offsets, mask=mask, other=0.0)
    return values


@triton.jit
def size_of(CODE: tl.constexpr):
    """Bytes of an element."""
    size: tl.constexpr = 4 if CODE == F32 else 2 if CODE <= BF16 else 1
    return size


@triton.jit
def rounded_once(high, low, OUT: tl.constexpr):
    """high + low (high nearest to it) as float32 that `store_floats` rounds correctly."""
    return high if OUT == F32 else to_odd(high, low)


@triton.jit
def rounded_at_random(high, low, words, OUT: tl.constexpr):
    """high + low on the grid of the output dtype, by chance above or below, so that its mean is high + low.

    With x = (n + f) spacing, 0 <= f < 1, and u = (word >> 8) / 2^24 the result is (n + 1) spacing where f + u >= 1.
    """
    if OUT == F32:
        result = high
    else:
        mantissa: tl.constexpr = 10 if OUT == F16 else 7 if OUT == BF16 else 3 if OUT == E4M3 else 2
        # spacings of bfloat16 below 2^-119 are no normal numbers of float32; so small a weight gets a coarser grid
        lowest: tl.constexpr = -14 if OUT == F16 else -119 if OUT == BF16 else -6 if OUT == E4M3 else -14
        truncated = to_odd(high, low).to(tl.int32, bitcast=True) & 0x7F800000
        exponent = tl.maximum(truncated, (127 + lowest) << 23) - (mantissa << 23)
        spacing = exponent.to(tl.float32, bitcast=True)
        inverse = ((254 << 23) - exponent).to(tl.float32, bitcast=True)  # division itself is not exact everywhere
        steps = high * inverse
        rest = low * inverse
        nearest = (steps + 12582912.0) - 12582912.0  # 1.5 * 2^23: an integer, if below 2^22
        whole = nearest - (nearest > steps).to(tl.float32)
        part = steps - whole
        chance = (words >> 8).to(tl.float32) * 5.960464477539063e-08  # 2^-24
        up = (chance - (1.0 - part) >= -rest).to(tl.float32)
        down = (chance + part < -rest).to(tl.float32)
        result = (whole + up - down) * spacing
        result = tl.where(result == 0.0, high * 0.0, result)  # keeps the sign
    return result
