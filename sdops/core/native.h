/* What the .c files share: float formats, and the ways out of them. */

#ifndef SDOPS_NATIVE_H
#define SDOPS_NATIVE_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif !defined(__aarch64__)
#error "half precision conversions are written for x86-64 and aarch64"
#endif

enum dtype { F16, BF16, F32 }; /* the order of core/native.py */
enum { BLOCK = 512 };          /* elements worked on at once: all buffers fit the first-level cache */

/* Replace infinities by the largest finite number; how many there were. */
static inline size_t clamp(uint16_t *out, size_t count, uint16_t infinity) {
    uint16_t most = 0;
    for (size_t i = 0; i < count; i++) {
        uint16_t magnitude = out[i] & 0x7FFF;
        most = magnitude > most ? magnitude : most;
    }
    if (most < infinity) return 0;
    size_t overflow = 0;
    for (size_t i = 0; i < count; i++) {
        if ((out[i] & 0x7FFF) != infinity) continue;
        out[i] = (uint16_t)((out[i] & 0x8000) | (infinity - 1));
        overflow++;
    }
    return overflow;
}

static inline void widen_half(const uint16_t *raw, size_t count, float *out) {
    size_t i = 0;
#if defined(__x86_64__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(raw + i))));
    for (; i < count; i++) out[i] = _cvtsh_ss(raw[i]);
#else
    for (; i < count; i++) {
        __fp16 value;
        memcpy(&value, raw + i, 2);
        out[i] = value;
    }
#endif
}

/* Singles to the nearest halves, ties to even. */
static inline void narrow_half(const float *singles, size_t count, uint16_t *out) {
    size_t i = 0;
#if defined(__x86_64__)
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(singles + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < count; i++) out[i] = _cvtss_sh(singles[i], _MM_FROUND_TO_NEAREST_INT);
#else
    for (; i < count; i++) {
        __fp16 half = (__fp16)singles[i];
        memcpy(out + i, &half, 2);
    }
#endif
}

/* Bit patterns of finite singles to those of the nearest bfloats, ties to even. */
static inline void narrow_bits(const uint32_t *restrict bits, size_t count, uint16_t *restrict out) {
    for (size_t i = 0; i < count; i++) out[i] = (uint16_t)((bits[i] + 0x7FFF + (bits[i] >> 16 & 1)) >> 16);
}

/* Philox4x32-10 of the counters first, first + 1, ...: four words each; see core/noise.py. */
void sdops_philox(uint32_t key0, uint32_t key1, uint64_t first, size_t counters, uint32_t *words);

/* Four normal numbers for each of the counters first, first + 1, ...; see core/noise.py. */
void sdops_normal(uint32_t key0, uint32_t key1, uint64_t first, size_t counters, float *out);

#endif
