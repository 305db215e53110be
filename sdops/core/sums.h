/* What exact.c and chain.c share: blocks of elements between their formats and double, and sums of two doubles without
 * loss. The error-free transformations depend on every single rounding.
 */

#ifndef SDOPS_SUMS_H
#define SDOPS_SUMS_H

#include "native.h"

static inline void widen_half_to_double(const uint16_t *raw, size_t count, double *out) {
    size_t i = 0;
#if defined(__x86_64__)
    for (; i + 8 <= count; i += 8) {
        __m256 values = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(raw + i)));
        _mm256_storeu_pd(out + i, _mm256_cvtps_pd(_mm256_castps256_ps128(values)));
        _mm256_storeu_pd(out + i + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(values, 1)));
    }
    for (; i < count; i++) out[i] = _cvtsh_ss(raw[i]);
#else
    for (; i < count; i++) {
        __fp16 value;
        memcpy(&value, raw + i, 2);
        out[i] = value;
    }
#endif
}

static inline void widen(const void *raw, int dtype, size_t start, size_t count, double *restrict out) {
    if (dtype == F16) {
        widen_half_to_double((const uint16_t *)raw + start, count, out);
    } else if (dtype == BF16) {
        const uint16_t *bits = (const uint16_t *)raw + start;
        for (size_t i = 0; i < count; i++) {
            uint32_t word = (uint32_t)bits[i] << 16;
            float value;
            memcpy(&value, &word, 4);
            out[i] = value;
        }
    } else {
        const float *values = (const float *)raw + start;
        for (size_t i = 0; i < count; i++) out[i] = values[i];
    }
}

/* Round to single toward zero, last bit set if anything was cut off: rounding that once more, to a format of at most
 * 22 bits, is correct. The double's 29 last bits decide. */
static inline void to_odd_singles(const double *restrict values, size_t count, float *restrict singles) {
    const uint64_t cut = (UINT64_C(1) << 29) - 1;
    for (size_t i = 0; i < count; i++) {
        uint64_t bits;
        double odd;
        memcpy(&bits, values + i, 8);
        bits = (bits | ((bits & cut) + cut)) & ~cut; /* the addition carries into bit 29 unless all are zero */
        memcpy(&odd, &bits, 8);
        singles[i] = (float)odd;
    }
}

/* The same below 2**-126, where singles have fewer bits. */
static inline float to_odd_single(double value) {
    float nearest = (float)value;
    double back = nearest;
    uint32_t bits;
    memcpy(&bits, &nearest, 4);
    bits = (bits - (fabs(back) > fabs(value))) | (back != value);
    memcpy(&nearest, &bits, 4);
    return nearest;
}

static inline size_t narrow_single(const double *restrict values, size_t count, float *restrict out) {
    size_t overflow = 0;
    for (size_t i = 0; i < count; i++) {
        out[i] = (float)values[i];
        overflow += fabsf(out[i]) > 0x1.fffffep127f;
    }
    if (overflow)
        for (size_t i = 0; i < count; i++)
            if (fabsf(out[i]) > 0x1.fffffep127f) out[i] = copysignf(0x1.fffffep127f, out[i]);
    return overflow;
}

static inline void narrow_bfloat(const double *restrict values, float *restrict singles, size_t count, uint16_t *out) {
    int tiny = 0;
    for (size_t i = 0; i < count; i++) tiny |= (fabs(values[i]) < 0x1p-126) & (values[i] != 0);
    if (tiny)
        for (size_t i = 0; i < count; i++) singles[i] = to_odd_single(values[i]);
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, singles + i, 4);
        out[i] = (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
}

static inline size_t narrow(const double *restrict values, size_t count, void *out, int dtype, size_t start) {
    float singles[BLOCK];
    uint16_t *halves = (uint16_t *)out + start;
    if (dtype == F32) return narrow_single(values, count, (float *)out + start);
    to_odd_singles(values, count, singles);
    if (dtype == F16)
        narrow_half(singles, count, halves);
    else
        narrow_bfloat(values, singles, count, halves);
    return clamp(halves, count, dtype == F16 ? 0x7C00 : 0x7F80);
}

/* a + b = sum + error exactly (Knuth). */
static inline double two_sum(double a, double b, double *error) {
    double sum = a + b, t = sum - a;
    *error = (a - (sum - t)) + (b - t);
    return sum;
}

/* The double nearest to hi + lo toward zero, last bit set if anything was cut off. */
static inline void to_odd_doubles(double *restrict hi, const double *restrict lo, size_t count) {
    for (size_t i = 0; i < count; i++) {
        double error, sum = two_sum(hi[i], lo[i], &error);
        uint64_t inexact = error != 0, bits;
        memcpy(&bits, &sum, 8);
        bits = (bits - (inexact & ((error < 0) != (sum < 0)))) | inexact;
        memcpy(&sum, &bits, 8);
        hi[i] = lo[i] == 0 ? hi[i] : sum; /* keeps the sign of zero */
    }
}

/* One block of products added to hi + lo + rest. */
static inline void add_exactly(double coefficient, const double *restrict values, size_t count, double *restrict hi,
                        double *restrict lo, double *restrict rest) {
    for (size_t i = 0; i < count; i++) {
        double error, lost;
        hi[i] = two_sum(hi[i], coefficient * values[i], &error);
        lo[i] = two_sum(lo[i], error, &lost);
        rest[i] += fabs(lost);
    }
}

/* Bit pattern of the largest magnitude, and of the smallest that is not zero (all ones if there is none). */
void sdops_bounds(const void *raw, int dtype, size_t count, uint32_t *largest, uint32_t *smallest);

#endif
