/* The fast way through a chain (chain.c), for whole blocks: sums are rounded in the same pass, in the registers of AVX2
 * and FMA. The bits are the same; a block of which that is not certain is refused, and chain.c takes more care.
 */

#include "chain.h"

#if defined(__x86_64__)

enum { VECTORS = 8, WIDTH = 4 * VECTORS }; /* doubles that are worked on at once */

/* A format, to round to in double. With m = 1.5 * 2^(52 - mantissa) * 2^exponent(x), x + m has no room for more than
 * the format's bits behind x's first one. Below the smallest normal number the exponent is held. */
typedef struct {
    double smallest, largest; /* normal, finite */
    double to_m, to_half;     /* times 2^exponent: m, and half a unit in the last place */
} format;

static const format FORMATS[] = {{0x1p-14, 65504, 0x1.8p42, 0x1p-11},
                                 {0x1p-126, 0x1.FEp127, 0x1.8p45, 0x1p-8},
                                 {0x1p-126, 0x1.FFFFFEp127, 0x1.8p29, 0x1p-24}};

/* ---- loads ---- */

static void store_singles_as_doubles(__m256 singles, double *out) {
    _mm256_storeu_pd(out, _mm256_cvtps_pd(_mm256_castps256_ps128(singles)));
    _mm256_storeu_pd(out + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(singles, 1)));
}

static inline uint32_t smallest_short(__m256i shorts) {
    __m128i eight = _mm_min_epu16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1));
    return (uint16_t)_mm_cvtsi128_si32(_mm_minpos_epu16(eight));
}

/* A block of halves or bfloats as double, and sdops_bounds of it. Unsigned, zero less 1 is the largest number. */
static inline void widen_shorts(const uint16_t *raw, const int dtype, double *out, uint32_t *largest,
                                uint32_t *smallest) {
    const __m256i magnitude = _mm256_set1_epi16(0x7FFF), ones = _mm256_set1_epi16(-1);
    __m256i room = ones, least = ones; /* to the largest of all numbers; less 1 */
    for (size_t i = 0; i < BLOCK; i += 16) {
        __m256i bare = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(raw + i)), magnitude);
        room = _mm256_min_epu16(room, _mm256_xor_si256(bare, ones));
        least = _mm256_min_epu16(least, _mm256_add_epi16(bare, ones));
        for (size_t k = 0; k < 16; k += 8) {
            __m128i bits = _mm_loadu_si128((const __m128i *)(raw + i + k));
            __m256i words = _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
            store_singles_as_doubles(dtype == F16 ? _mm256_cvtph_ps(bits) : _mm256_castsi256_ps(words), out + i + k);
        }
    }
    *largest = 0xFFFF - smallest_short(room);
    *smallest = smallest_short(least) == 0xFFFF ? UINT32_MAX : smallest_short(least) + 1;
}

/* A block of singles as double, and sdops_bounds of it. */
static inline void widen_singles(const float *raw, double *out, uint32_t *largest, uint32_t *smallest) {
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF), ones = _mm256_set1_epi32(-1);
    __m256i most = _mm256_setzero_si256(), least = ones;
    for (size_t i = 0; i < BLOCK; i += 8) {
        __m256 singles = _mm256_loadu_ps(raw + i);
        __m256i bare = _mm256_and_si256(_mm256_castps_si256(singles), magnitude);
        most = _mm256_max_epu32(most, bare);
        least = _mm256_min_epu32(least, _mm256_add_epi32(bare, ones));
        store_singles_as_doubles(singles, out + i);
    }
    uint32_t all[2][8], below = UINT32_MAX;
    _mm256_storeu_si256((__m256i *)all[0], most);
    _mm256_storeu_si256((__m256i *)all[1], least);
    *largest = 0;
    for (int i = 0; i < 8; i++) {
        *largest = all[0][i] > *largest ? all[0][i] : *largest;
        below = all[1][i] < below ? all[1][i] : below;
    }
    *smallest = below == UINT32_MAX ? UINT32_MAX : below + 1;
}

/* Elements of a format as double, and what is known of all of them; 0 if one is not finite. */
static int load(const void *raw, int dtype, size_t start, block *out) {
    uint32_t largest, smallest;
    if (dtype == F32)
        widen_singles((const float *)raw + start, out->number, &largest, &smallest);
    else if (dtype == F16)
        widen_shorts((const uint16_t *)raw + start, F16, out->number, &largest, &smallest);
    else
        widen_shorts((const uint16_t *)raw + start, BF16, out->number, &largest, &smallest);
    return know(largest, smallest, dtype, out);
}

/* ---- sums ---- */

/* How sums are done. */
enum {
    CHECKED = 1,  /* plain addition is not known to be exact */
    SIGNS = 2,    /* zeros have their signs */
    LAST_ONE = 4, /* the result is written in its format */
    RANGED = 8    /* the smallest exponent is looked for */
};

typedef struct {
    const chain_term *terms; /* two or more */
    int count, dtype;        /* dtype: that sums are rounded to */
    double error;            /* twice what plain addition may be off by */
    void *out;               /* doubles, or the result */
    double exponent;         /* the smallest power of two that a sum has as exponent: with RANGED, found */
} sum;

/* Eight doubles that their format holds, in that format. */
static inline void store(__m256d low, __m256d high, int dtype, size_t i, void *out) {
    __m256 singles = _mm256_set_m128(_mm256_cvtpd_ps(high), _mm256_cvtpd_ps(low));
    if (dtype == F32) {
        _mm256_storeu_ps((float *)out + i, singles);
    } else if (dtype == F16) {
        _mm_storeu_si128((__m128i *)((uint16_t *)out + i), _mm256_cvtps_ph(singles, _MM_FROUND_TO_NEAREST_INT));
    } else {
        __m256i bits = _mm256_srli_epi32(_mm256_castps_si256(singles), 16);
        __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
        _mm_storeu_si128((__m128i *)((uint16_t *)out + i), packed);
    }
}

/* Of four sums, which have a term that is not zero. */
static inline __m256d are_not_zero(const sum *of, const block *registers, size_t i) {
    __m256d found = _mm256_setzero_pd();
    for (const chain_term *term = of->terms; term < of->terms + of->count; term++) {
        __m256d values = _mm256_loadu_pd(registers[term->operand].number + i);
        found = _mm256_or_pd(found, _mm256_cmp_pd(values, _mm256_setzero_pd(), _CMP_NEQ_UQ));
    }
    return found;
}

/* A block of sums, each rounded to nearest, ties to even; 0 if one of them is in doubt.
 *
 * Plain addition gives x, within error / 2 of the true sum s. Say r is x rounded, and h half a unit in the last place
 * at x. Without doubt is |x - r| < h - error. Then error < h, and s is less than h from r, which is the right result
 * unless s has another exponent than x. If s < 2^k <= x, units are half as large there, and s > 2^k - h / 2 rounds to
 * 2^k; r is 2^k as well, as x < 2^k + h / 2. If x < 2^k <= s, both are less than h / 2 from 2^k and rounded to it.
 *
 * x + m - m is +0 where -0 is due. Without SIGNS that is left as it is: in the sums that follow, it changes nothing but
 * signs of other zeros, and a last one that is zero is in doubt. With SIGNS and CHECKED a sum is in doubt if s may be
 * on the other side of zero: not if all terms are zero.
 */
static inline __attribute__((always_inline)) int sum_block(sum *of, const block *registers, const int mode) {
    const format *to = &FORMATS[of->dtype];
    const __m256d exponents = _mm256_castsi256_pd(_mm256_set1_epi64x(0x7FF0000000000000)), sign = _mm256_set1_pd(-0.0);
    const __m256d smallest = _mm256_set1_pd(to->smallest), to_m = _mm256_set1_pd(to->to_m);
    const __m256d to_half = _mm256_set1_pd(to->to_half), error = _mm256_set1_pd(of->error);
    const chain_term *terms = of->terms, *end = terms + of->count;
    double *out = of->out; const int dtype = of->dtype;
    __m256d doubts = _mm256_setzero_pd(), least = _mm256_set1_pd(INFINITY);
    for (size_t i = 0; i < BLOCK; i += WIDTH) {
        const double *first = registers[terms[0].operand].number + i, *second = registers[terms[1].operand].number + i;
        const __m256d a = _mm256_set1_pd(terms[0].coefficient), b = _mm256_set1_pd(terms[1].coefficient);
        __m256d x[VECTORS];
        for (int k = 0; k < VECTORS; k++) x[k] = _mm256_mul_pd(a, _mm256_loadu_pd(first + 4 * k));
        for (int k = 0; k < VECTORS; k++) x[k] = _mm256_fmadd_pd(b, _mm256_loadu_pd(second + 4 * k), x[k]);
#pragma GCC unroll 1
        for (const chain_term *term = terms + 2; term < end; term++) {
            const double *values = registers[term->operand].number + i;
            const __m256d c = _mm256_set1_pd(term->coefficient);
            for (int k = 0; k < VECTORS; k++) x[k] = _mm256_fmadd_pd(c, _mm256_loadu_pd(values + 4 * k), x[k]);
        }
        for (int k = 0; k < VECTORS; k++) {
            __m256d power = _mm256_max_pd(_mm256_and_pd(x[k], exponents), smallest);
            __m256d r = _mm256_fnmadd_pd(power, to_m, _mm256_fmadd_pd(power, to_m, x[k]));
            if (mode & RANGED) least = _mm256_min_pd(least, power);
            if (mode & CHECKED) {
                __m256d off = _mm256_andnot_pd(sign, _mm256_sub_pd(x[k], r));
                __m256d bound = _mm256_fmsub_pd(power, to_half, error);
                doubts = _mm256_or_pd(doubts, _mm256_cmp_pd(off, bound, _CMP_GE_OQ));
                if (mode & SIGNS) {
                    __m256d small = _mm256_cmp_pd(_mm256_andnot_pd(sign, x[k]), error, _CMP_LE_OQ);
                    doubts = _mm256_or_pd(doubts, _mm256_and_pd(small, are_not_zero(of, registers, i + 4 * (size_t)k)));
                }
            }
            if (mode & SIGNS)
                r = _mm256_or_pd(r, _mm256_and_pd(x[k], sign));
            else if (mode & LAST_ONE)
                doubts = _mm256_or_pd(doubts, _mm256_cmp_pd(r, _mm256_setzero_pd(), _CMP_EQ_OQ));
            x[k] = r;
            if (!(mode & LAST_ONE)) _mm256_storeu_pd(out + i + 4 * k, r);
        }
        if (mode & LAST_ONE)
            for (size_t k = 0; k < VECTORS; k += 2) store(x[k], x[k + 1], dtype, i + 4 * k, out);
    }
    if (mode & RANGED) {
        double lanes[4];
        _mm256_storeu_pd(lanes, least);
        of->exponent = fmin(fmin(lanes[0], lanes[1]), fmin(lanes[2], lanes[3]));
    }
    return _mm256_movemask_pd(doubts) == 0;
}

/* The same, compiled for each mode. */
static int sum_in_mode(sum *of, const block *registers, int mode) {
    switch (mode) {
#define MODE(number) \
    case number: return sum_block(of, registers, number)
        MODE(0); MODE(1); MODE(2); MODE(3);   /* to halves that are read by others */
        MODE(4); MODE(5); MODE(6); MODE(7);   /* to a result */
        MODE(8); MODE(9); MODE(10); MODE(11); /* to other formats */
#undef MODE
    }
    return 0;
}

/* One sum of a chain, for a block; 0 if it is in doubt or may overflow.
 *
 * out  where the last one is written, else null
 */
static int add(const chain_step *step, const chain_term *terms, block *registers, void *out, int signs) {
    sum of = {terms + step->first, step->terms, step->dtype, 0, out, 0};
    chain_term pair[2];
    if (of.count == 1) { /* and a zero of the same sign */
        pair[0] = pair[1] = *of.terms;
        pair[1].coefficient = copysign(0, pair[0].coefficient);
        of.terms = pair, of.count = 2;
    }
    const format *to = &FORMATS[step->dtype];
    const extent all = extent_of(of.terms, of.count, registers);
    const double largest = all.reach * (1 + 2 * to->to_half) + power_of_two(LAST[step->dtype]); /* of what is rounded */
    if (all.lattice <= -1000 || largest > to->largest) return 0;
    /* n - 1 additions, each off by at most 2^-53 of the reach, which is itself computed */
    of.error = 2 * (of.count + 1) * 0x1p-53 * all.reach;
    int mode = (is_exact(all) ? 0 : CHECKED) | (signs ? SIGNS : 0);
    if (out) return sum_in_mode(&of, registers, mode | LAST_ONE);
    block *made = &registers[step->out];
    of.out = made->number;
    if (!sum_in_mode(&of, registers, mode | (step->dtype == F16 ? 0 : RANGED))) return 0;
    made->largest = largest;
    made->lattice = LAST[step->dtype];
    if (step->dtype != F16) made->lattice += ilogb(of.exponent) - ilogb(to->smallest);
    return 1;
}

/* One block through the whole chain, as sdops_chain; 0 if there is a doubt about it. */
int sdops_chain_fused(const chain_step *steps, int length, const chain_term *terms, const void *const *inputs,
                      size_t start, block *registers, void *out, int signs) {
    for (const chain_step *step = steps; step < steps + length; step++) {
        char *last = step == steps + length - 1 ? (char *)out + start * (step->dtype == F32 ? 4 : 2) : NULL;
        if (step->input >= 0) {
            if (!load(inputs[step->input], step->dtype, start, &registers[step->out])) return 0;
        } else if (!add(step, terms, registers, last, signs)) {
            return 0;
        }
    }
    return 1;
}

#else

int sdops_chain_fused(const chain_step *steps, int length, const chain_term *terms, const void *const *inputs,
                      size_t start, block *registers, void *out, int signs) {
    (void)steps, (void)length, (void)terms, (void)inputs, (void)start, (void)registers, (void)out, (void)signs;
    return 0;
}

#endif
