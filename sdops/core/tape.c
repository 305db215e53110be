/* Plays the tape of an elementwise merge method (core/tape.py): one operation after the other on a block of elements that
 * stays in the first-level cache, from the inputs' formats to the output's. Every operation rounds to single as torch's
 * do; tests/core/test_tape.py compares the bits. Loops are written so that compilers vectorize them, and always go over
 * a whole block: what lies behind the last element is worked on and thrown away.
 */

#include "native.h"

enum { REGISTERS = 64 }; /* as core/tape.py knows */

enum op { /* the order of core/tape.py */
    CONSTANT, LOAD, UNIFORM, NORMAL, ADD, SUBTRACT, MULTIPLY, DIVIDE, SQRT, ABSOLUTE, NEGATE, COPYSIGN, MAXIMUM, MINIMUM,
    LESS, LESS_EQUAL, EQUAL, AND, OR, NOT, CHOOSE, POWER, GEOMETRIC_MEAN
};

typedef union {
    float number[BLOCK];
    uint32_t bits[BLOCK];
} block;

typedef struct {
    int32_t op, out, x, y, z;
} instruction;

/* 1 / 10!, 1 / 9! ... 1 */
static const double EXP[11] = {1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120,
                               1.0 / 24,      1.0 / 6,      1.0 / 2,     1,          1};

static const uint32_t SIGN = 0x80000000, INFINITE = 0x7F800000;

/* Whether all numbers are finite. */
static int finite(const block *x, size_t count) {
    uint32_t most = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t magnitude = x->bits[i] & ~SIGN;
        most = magnitude > most ? magnitude : most;
    }
    return most < INFINITE;
}

static void load(const void *raw, int dtype, size_t start, size_t count, block *restrict out) {
    const uint16_t *halves = (const uint16_t *)raw + start;
    if (dtype == F32) {
        memcpy(out, (const float *)raw + start, count * 4);
    } else if (dtype == BF16) {
        for (size_t i = 0; i < count; i++) out->bits[i] = (uint32_t)halves[i] << 16;
    } else {
        widen_half(halves, count, out->number);
    }
}

/* Round to the output's format; the number of overflows, which are clamped. */
static size_t store(const block *x, size_t count, void *out, int dtype, size_t start) {
    uint16_t *halves = (uint16_t *)out + start;
    if (dtype == F32) {
        memcpy((float *)out + start, x, count * 4);
        return 0;
    }
    if (dtype == F16)
        narrow_half(x->number, count, halves);
    else
        narrow_bits(x->bits, count, halves);
    return clamp(halves, count, dtype == F16 ? 0x7C00 : 0x7F80);
}

/* Uniform numbers in [0, 1) for `count` elements from `first` on: the upper 24 bits of each one's random word. */
static void uniform(const uint32_t *key, uint64_t first, size_t count, block *out) {
    uint32_t words[BLOCK + 8];
    size_t lead = first % 4;
    sdops_philox(key[0], key[1], first / 4, (lead + count + 3) / 4, words);
    for (size_t i = 0; i < count; i++) out->number[i] = (float)(int32_t)(words[lead + i] >> 8) * 0x1p-24f;
}

static void normal(const uint32_t *key, uint64_t first, size_t count, block *out) {
    float numbers[BLOCK + 8];
    size_t lead = first % 4;
    sdops_normal(key[0], key[1], first / 4, (lead + count + 3) / 4, numbers);
    memcpy(out, numbers + lead, count * 4);
}

/* log2 x for x > 0 in double, operation by operation as core/elementwise.py does it. */
static void logarithm(const block *restrict x, double *restrict log2) {
    double whole[BLOCK];
    float mantissa[BLOCK];
    for (size_t i = 0; i < BLOCK; i++) { /* x = 2^whole mantissa, 1/2 <= mantissa^2 < 2 */
        int tiny = x->number[i] < 0x1p-126f;
        float scaled = tiny ? x->number[i] * 0x1p24f : x->number[i];
        int32_t bits, shift;
        memcpy(&bits, &scaled, 4);
        shift = (bits - 0x3F3504F3) >> 23;
        bits -= shift * (1 << 23);
        memcpy(mantissa + i, &bits, 4);
        whole[i] = shift - (tiny ? 24 : 0);
    }
    for (size_t i = 0; i < BLOCK; i++) { /* 2 / ln 2 artanh t */
        double m = mantissa[i], t = (m - 1) / (m + 1), square = t * t, series = 1.0 / 13;
        for (int k = 11; k > 0; k -= 2) series = series * square + 1.0 / k;
        log2[i] = whole[i] + 0x1.71547652b82fep1 * t * series;
    }
}

/* 2^exponent, likewise. */
static void exponential(const double *restrict exponents, block *restrict out) {
    const double magic = 0x1.8p52; /* added to a double it leaves the nearest integer in the last bits */
    for (size_t i = 0; i < BLOCK; i++) {
        double exponent = exponents[i] < -200 ? -200 : exponents[i];
        exponent = exponent > 200 ? 200 : exponent;
        double sum = exponent + magic, z = (exponent - (sum - magic)) * 0x1.62e42fefa39efp-1;
        double series = EXP[0], result;
        uint64_t shift, bits;
        for (int k = 1; k <= 10; k++) series = series * z + EXP[k];
        memcpy(&shift, &sum, 8);
        memcpy(&bits, &series, 8);
        bits += shift << 52;
        memcpy(&result, &bits, 8);
        out->number[i] = (float)result;
    }
}

/* x^p for x >= 0. */
static void power(const block *restrict x, float p, block *restrict out) {
    double exponents[BLOCK];
    logarithm(x, exponents);
    for (size_t i = 0; i < BLOCK; i++) exponents[i] *= p;
    exponential(exponents, out);
    const float at_zero = p < 0 ? INFINITY : 0, at_infinity = p < 0 ? 0 : INFINITY;
    for (size_t i = 0; i < BLOCK; i++) {
        float base = x->number[i], result = out->number[i];
        result = base == 0 ? at_zero : result;
        result = base == INFINITY ? at_infinity : result;
        out->number[i] = base != base ? base : result;
    }
}

/* x^(1 - p) y^p for x, y >= 0 and 0 < p < 1. */
static void geometric_mean(const block *restrict x, const block *restrict y, float p, block *restrict out) {
    double exponents[BLOCK], others[BLOCK];
    logarithm(x, exponents);
    logarithm(y, others);
    for (size_t i = 0; i < BLOCK; i++) exponents[i] = (1.0 - p) * exponents[i] + (double)p * others[i];
    exponential(exponents, out);
    for (size_t i = 0; i < BLOCK; i++) {
        float a = x->number[i], b = y->number[i];
        int plain = (a > 0) & (b > 0) & (a < INFINITY) & (b < INFINITY);
        out->number[i] = plain ? out->number[i] : a * b;
    }
}

#define EACH(statement) for (size_t i = 0; i < BLOCK; i++) statement

/* An operation whose operands are registers, the result in another one. */
static void operate(int op, block *restrict out, const block *restrict x, const block *restrict y,
                    const block *restrict z) {
    float *restrict number = out->number;
    uint32_t *restrict bits = out->bits;
    const float *a = x->number, *b = y->number;
    const uint32_t *p = x->bits, *q = y->bits, *mask = z->bits;
    switch (op) {
    case ADD: EACH(number[i] = a[i] + b[i]); break;
    case SUBTRACT: EACH(number[i] = a[i] - b[i]); break;
    case MULTIPLY: EACH(number[i] = a[i] * b[i]); break;
    case DIVIDE: EACH(number[i] = a[i] / b[i]); break;
    case SQRT: EACH(number[i] = sqrtf(a[i])); break;
    case ABSOLUTE: EACH(bits[i] = p[i] & ~SIGN); break;
    case NEGATE: EACH(bits[i] = p[i] ^ SIGN); break;
    case COPYSIGN: EACH(bits[i] = (p[i] & ~SIGN) | (q[i] & SIGN)); break;
    case MAXIMUM: EACH(number[i] = (b[i] > a[i]) | (b[i] != b[i]) ? b[i] : a[i]); break;
    case MINIMUM: EACH(number[i] = (b[i] < a[i]) | (b[i] != b[i]) ? b[i] : a[i]); break;
    case LESS: EACH(bits[i] = a[i] < b[i] ? UINT32_MAX : 0); break;
    case LESS_EQUAL: EACH(bits[i] = a[i] <= b[i] ? UINT32_MAX : 0); break;
    case EQUAL: EACH(bits[i] = a[i] == b[i] ? UINT32_MAX : 0); break;
    case AND: EACH(bits[i] = p[i] & q[i]); break;
    case OR: EACH(bits[i] = p[i] | q[i]); break;
    case NOT: EACH(bits[i] = ~p[i]); break;
    case POWER: power(x, b[0], out); break;
    case GEOMETRIC_MEAN: geometric_mean(x, y, z->number[0], out); break;
    case CHOOSE: EACH(bits[i] = (p[i] & mask[i]) | (q[i] & ~mask[i])); break;
    }
}

/* The value in register `result` for every element, rounded to nearest, ties to even, overflow clamped.
 *
 * code, length    instructions
 * constants       of the first registers
 * inputs, dtypes  where each input's elements lie, and what they are
 * keys            two words for each draw of random numbers
 * first           place of the first element in its tensor, for the random numbers
 *
 * Returns the number of overflows, or -1 if an input or a result is NaN or infinite.
 */
int64_t sdops_tape(const instruction *code, int length, const float *constants, int constant_count, int result,
                   const void *const *inputs, const int *dtypes, const uint32_t *keys, uint64_t first, size_t count,
                   void *out, int out_dtype) {
    block registers[REGISTERS];
    size_t overflow = 0;
    for (int number = 0; number < constant_count; number++)
        EACH(registers[number].number[i] = constants[number]);
    for (size_t start = 0; start < count; start += BLOCK) {
        size_t size = count - start < BLOCK ? count - start : BLOCK;
        for (const instruction *at = code; at < code + length; at++) {
            block *target = &registers[at->out];
            if (size < BLOCK && at->op <= NORMAL) memset(target, 0, sizeof *target);
            if (at->op == LOAD) {
                load(inputs[at->x], dtypes[at->x], start, size, target);
                if (!finite(target, size)) return -1;
            } else if (at->op == UNIFORM) {
                uniform(keys + 2 * at->x, first + start, size, target);
            } else if (at->op == NORMAL) {
                normal(keys + 2 * at->x, first + start, size, target);
            } else {
                operate(at->op, target, &registers[at->x], &registers[at->y], &registers[at->z]);
            }
        }
        if (!finite(&registers[result], size)) return -1;
        overflow += store(&registers[result], size, out, out_dtype, start);
    }
    return (int64_t)overflow;
}
