/* What merges spend their time on, as machine code: correctly rounded linear combinations of half, bfloat16 and single
 * tensors (core/exact.py), their inner products (core/gram.py), random numbers (core/noise.py). Sums and numbers must
 * have the same bits as those of the Python files; tests/core/test_native.py compares them.
 *
 * Optional: compiled when the package is installed on a machine with a C compiler (hatch_build.py), loaded by
 * core/native.py, and replaced by numpy where it is missing. Without -ffast-math and with -ffp-contract=off: the
 * error-free transformations below depend on every single rounding. Loops are written so that compilers vectorize them.
 */

#include "sums.h"

enum { VERSION = 8 }; /* of all functions, as core/native.py expects them */

/* VERSION, or 0 if this processor lacks instructions that the file was compiled for. */
int sdops_version(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("f16c") || !__builtin_cpu_supports("fma")) return 0;
#endif
    return VERSION;
}

/* ---- sums ---- */

static size_t indices_of_nonzero(const double *values, size_t count, size_t start, uint32_t *indices) {
    size_t found = 0;
    uint64_t any = 0;
    for (size_t i = 0; i < count; i++) any |= values[i] != 0;
    if (any)
        for (size_t i = 0; i < count; i++)
            if (values[i] != 0) indices[found++] = (uint32_t)(start + i);
    return found;
}

/* out = round(sum over terms of coefficient * input), rounded once to nearest, ties to even, overflow clamped.
 *
 * inputs, dtypes      where each input's elements lie, and what they are
 * coefficients        of each term; `term_inputs` says which input it multiplies; terms of one input are neighbours.
 *                     Every product must be exact in double.
 * exact               the caller knows that plain addition in double is exact
 * uncertain           receives the indices of elements that need more than twice double's precision; the caller must
 *                     do those again. Room for `count` of them. Not used if `exact`.
 *
 * Returns the number of overflows.
 */
size_t sdops_sum(const void *const *inputs, const int *dtypes, const double *coefficients, const int *term_inputs,
                 int terms, size_t count, void *out, int out_dtype, int exact, uint32_t *uncertain,
                 size_t *uncertain_count) {
    double values[BLOCK], hi[BLOCK], lo[BLOCK], rest[BLOCK];
    size_t overflow = 0;
    *uncertain_count = 0;
    for (size_t start = 0; start < count; start += BLOCK) {
        size_t size = count - start < BLOCK ? count - start : BLOCK;
        for (int term = 0; term < terms; term++) {
            double coefficient = coefficients[term];
            if (term == 0 || term_inputs[term] != term_inputs[term - 1])
                widen(inputs[term_inputs[term]], dtypes[term_inputs[term]], start, size, values);
            if (term == 0) {
                for (size_t i = 0; i < size; i++) hi[i] = coefficient * values[i];
                if (!exact)
                    for (size_t i = 0; i < size; i++) lo[i] = 0, rest[i] = 0;
            } else if (exact) {
                for (size_t i = 0; i < size; i++) hi[i] += coefficient * values[i];
            } else {
                add_exactly(coefficient, values, size, hi, lo, rest);
            }
        }
        if (!exact) {
            to_odd_doubles(hi, lo, size);
            *uncertain_count += indices_of_nonzero(rest, size, start, uncertain + *uncertain_count);
        }
        overflow += narrow(hi, size, out, out_dtype, start);
    }
    return overflow;
}

/* Bit pattern of the largest magnitude, and of the smallest that is not zero (all ones if there is none). */
void sdops_bounds(const void *raw, int dtype, size_t count, uint32_t *largest, uint32_t *smallest) {
    if (dtype == F32) {
        const uint32_t *bits = raw;
        uint32_t most = 0, least = UINT32_MAX;
        for (size_t i = 0; i < count; i++) {
            uint32_t magnitude = bits[i] & 0x7FFFFFFF, below = magnitude - 1; /* zero wraps to the top */
            most = magnitude > most ? magnitude : most;
            least = below < least ? below : least;
        }
        *largest = most, *smallest = least + 1 ? least + 1 : UINT32_MAX;
    } else {
        const uint16_t *bits = raw;
        uint16_t most = 0, least = UINT16_MAX;
        for (size_t i = 0; i < count; i++) {
            uint16_t magnitude = bits[i] & 0x7FFF, below = (uint16_t)(magnitude - 1);
            most = magnitude > most ? magnitude : most;
            least = below < least ? below : least;
        }
        *largest = most, *smallest = least == UINT16_MAX ? UINT32_MAX : (uint32_t)least + 1;
    }
}

/* ---- inner products ---- */

/* The double dot product of two blocks whose sizes are multiples of 8, in eight partial sums. */
static double dot(const double *restrict x, const double *restrict y, size_t count) {
    double lanes[8] = {0};
    for (size_t i = 0; i < count; i += 8)
        for (size_t lane = 0; lane < 8; lane++) lanes[lane] += x[i + lane] * y[i + lane];
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

/* gram[i][j] += <x_i, x_j> for j <= i; at most MOST inputs. */
void sdops_inner(const void *const *inputs, const int *dtypes, int n, size_t count, double *gram) {
    enum { MOST = 16 }; /* as core/native.py knows */
    double values[MOST][BLOCK];
    for (size_t start = 0; start < count; start += BLOCK) {
        size_t size = count - start < BLOCK ? count - start : BLOCK, padded = (size + 7) / 8 * 8;
        for (int i = 0; i < n; i++) {
            widen(inputs[i], dtypes[i], start, size, values[i]);
            for (size_t k = size; k < padded; k++) values[i][k] = 0;
            for (int j = 0; j <= i; j++) gram[i * n + j] += dot(values[i], values[j], padded);
        }
    }
}

/* ---- random words ---- */

static const uint32_t PHILOX[2] = {0xD2511F53, 0xCD9E8D57}, KEY_STEP[2] = {0x9E3779B9, 0xBB67AE85};

enum { COUNTERS = 8 }; /* worked on at once, to keep the multipliers busy */

#if defined(__x86_64__)

/* Philox4x32-10 of COUNTERS counters, in the lower halves of 64-bit lanes: the multiplication looks at nothing else. */
static void philox_some(uint32_t key0, uint32_t key1, uint64_t counter, uint32_t *words) {
    enum { VECTORS = COUNTERS / 4 };
    const __m256i low = _mm256_set1_epi64x(0xFFFFFFFF);
    const __m256i by0 = _mm256_set1_epi64x(PHILOX[0]), by1 = _mm256_set1_epi64x(PHILOX[1]);
    __m256i c0[VECTORS], c1[VECTORS], c2[VECTORS], c3[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        c0[v] = _mm256_add_epi64(_mm256_set1_epi64x((long long)counter + 4 * v), _mm256_set_epi64x(3, 2, 1, 0));
        c1[v] = _mm256_srli_epi64(c0[v], 32), c2[v] = c3[v] = _mm256_setzero_si256();
    }
    for (int round = 0; round < 10; round++) {
        const __m256i k0 = _mm256_set1_epi32((int)key0), k1 = _mm256_set1_epi32((int)key1);
        for (int v = 0; v < VECTORS; v++) {
            __m256i product0 = _mm256_mul_epu32(c0[v], by0), product1 = _mm256_mul_epu32(c2[v], by1);
            c0[v] = _mm256_xor_si256(_mm256_srli_epi64(product1, 32), _mm256_xor_si256(c1[v], k0));
            c2[v] = _mm256_xor_si256(_mm256_srli_epi64(product0, 32), _mm256_xor_si256(c3[v], k1));
            c1[v] = product1, c3[v] = product0;
        }
        key0 += KEY_STEP[0], key1 += KEY_STEP[1];
    }
    for (int v = 0; v < VECTORS; v++) {
        __m256i first = _mm256_or_si256(_mm256_and_si256(c0[v], low), _mm256_slli_epi64(c1[v], 32));
        __m256i second = _mm256_or_si256(_mm256_and_si256(c2[v], low), _mm256_slli_epi64(c3[v], 32));
        __m256i even = _mm256_unpacklo_epi64(first, second), odd = _mm256_unpackhi_epi64(first, second);
        _mm256_storeu_si256((__m256i *)(words + 16 * v), _mm256_permute2x128_si256(even, odd, 0x20));
        _mm256_storeu_si256((__m256i *)(words + 16 * v + 8), _mm256_permute2x128_si256(even, odd, 0x31));
    }
}

#else

static void philox_some(uint32_t key0, uint32_t key1, uint64_t counter, uint32_t *words) {
    for (int i = 0; i < COUNTERS; i++, counter++) {
        uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = 0, c3 = 0;
        for (uint32_t round = 0; round < 10; round++) {
            uint64_t product0 = (uint64_t)c0 * PHILOX[0], product1 = (uint64_t)c2 * PHILOX[1];
            c0 = (uint32_t)(product1 >> 32) ^ c1 ^ (key0 + round * KEY_STEP[0]);
            c2 = (uint32_t)(product0 >> 32) ^ c3 ^ (key1 + round * KEY_STEP[1]);
            c1 = (uint32_t)product1, c3 = (uint32_t)product0;
        }
        words[4 * i] = c0, words[4 * i + 1] = c1, words[4 * i + 2] = c2, words[4 * i + 3] = c3;
    }
}

#endif

/* Philox4x32-10 of the counters first, first + 1, ...: four words each; see core/noise.py. */
void sdops_philox(uint32_t key0, uint32_t key1, uint64_t first, size_t counters, uint32_t *words) {
    size_t done = 0;
    for (; done + COUNTERS <= counters; done += COUNTERS) philox_some(key0, key1, first + done, words + 4 * done);
    if (done < counters) {
        uint32_t rest[4 * COUNTERS];
        philox_some(key0, key1, first + done, rest);
        memcpy(words + 4 * done, rest, (counters - done) * 16);
    }
}

/* ---- normal numbers ---- */

/* 1, -1 / 3!, 1 / 5! ... and 1, -1 / 2!, 1 / 4! ... */
static const double SIN[7] = {1,           -1.0 / 6,         1.0 / 120,       -1.0 / 5040,
                              1.0 / 362880, -1.0 / 39916800, 1.0 / 6227020800};
static const double COS[8] = {1,             -1.0 / 2,       1.0 / 24,          -1.0 / 720,
                              1.0 / 40320, -1.0 / 3628800, 1.0 / 479001600, -1.0 / 87178291200};

/* Box and Muller's two normal numbers from each of PAIRS pairs of words, operation by operation as core/noise.py. */
enum { PAIRS = 128 };
static void box_muller(const uint32_t *restrict words, float *restrict out) {
    const uint64_t one = UINT64_C(1023) << 52, root_half = UINT64_C(0x3FE6A09E667F3BCD);
    double radius[PAIRS];
    for (size_t j = 0; j < PAIRS; j++) { /* as double: the word and 1, as a share of 2^32 */
        double share = ((int32_t)(words[2 * j] ^ 0x80000000) + 2147483649.0) * 0x1p-32, m, whole;
        uint64_t bits, exponent, number;
        memcpy(&bits, &share, 8);
        exponent = (bits + (one - root_half)) >> 52; /* share = 2^(exponent - 1023) m, 1/2 <= m^2 < 2 */
        bits = bits - (exponent << 52) + one;
        memcpy(&m, &bits, 8);
        number = exponent | UINT64_C(0x4330000000000000); /* 2^52 and the exponent */
        memcpy(&whole, &number, 8);
        double t = (m - 1) / (m + 1), square = t * t, series = 1.0 / 13;
        for (int k = 11; k > 0; k -= 2) series = series * square + 1.0 / k;
        radius[j] = sqrt(-0x1.62e42fefa39efp+0 * (whole - 0x1.00000000003ffp52 + 0x1.71547652b82fep1 * t * series));
    }
    for (size_t j = 0; j < PAIRS; j++) { /* a quarter of the circle, and what remains, from -pi / 4 to pi / 4 */
        uint32_t word = words[2 * j + 1], quarter = (word + (UINT32_C(1) << 29)) >> 30;
        double z = (int32_t)(word - (quarter << 30)) * 0x1.921fb54442d18p-30, square = z * z;
        double sine = SIN[6], cosine = COS[7];
        for (int k = 5; k >= 0; k--) sine = sine * square + SIN[k];
        for (int k = 6; k >= 0; k--) cosine = cosine * square + COS[k];
        sine *= z;
        double x = quarter & 1 ? sine : cosine, y = quarter & 1 ? cosine : sine;
        out[2 * j] = (float)(radius[j] * ((quarter + 1) & 2 ? -x : x));
        out[2 * j + 1] = (float)(radius[j] * (quarter & 2 ? -y : y));
    }
}

/* Four normal numbers for each of the counters first, first + 1, ...; see core/noise.py. */
void sdops_normal(uint32_t key0, uint32_t key1, uint64_t first, size_t counters, float *out) {
    uint32_t words[2 * PAIRS];
    float numbers[2 * PAIRS];
    for (size_t start = 0; start < counters; start += PAIRS / 2) {
        size_t size = counters - start < PAIRS / 2 ? counters - start : PAIRS / 2;
        sdops_philox(key0, key1, first + start, PAIRS / 2, words);
        box_muller(words, numbers);
        memcpy(out + 4 * start, numbers, size * 16);
    }
}
