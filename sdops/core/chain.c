/* Sums of sums, each rounded to its own format, as core/chain.py puts them together: a block of elements goes through all
 * of them while it stays in the first-level cache. The bits are those of sdops_sum, called for one sum after the other.
 */

#include "sums.h"

enum { REGISTERS = 32 }; /* as core/chain.py knows */

typedef struct {
    int32_t out;          /* the register that is written */
    int32_t input;        /* which input is loaded; -1 for a sum */
    int32_t dtype;        /* of the input, or that the sum is rounded to */
    int32_t first, terms; /* of a sum: its terms */
} chain_step;

typedef struct {
    double coefficient; /* its product with any value of the operand is exact in double */
    int32_t operand;    /* a register */
    int32_t bits;       /* the coefficient is a multiple of 2^-bits */
} chain_term;

typedef struct {
    double number[BLOCK];
    double largest; /* magnitude */
    int32_t lattice; /* all numbers are multiples of 2^lattice */
} block;

static const int MANTISSA[] = {10, 7, 23}, LAST[] = {-24, -133, -149}, INFINITE[] = {0x7C00, 0x7F80, 0x7F800000};

/* Elements of a format as double, and what is known of all of them; 0 if one is not finite. */
static int load(const void *raw, int dtype, size_t start, size_t size, block *out) {
    const char *at = (const char *)raw + start * (dtype == F32 ? 4 : 2);
    uint32_t largest, smallest;
    sdops_bounds(at, dtype, size, &largest, &smallest);
    if (largest >= (uint32_t)INFINITE[dtype]) return 0;
    uint16_t half = (uint16_t)largest;
    widen(dtype == F32 ? (const void *)&largest : &half, dtype, 0, 1, &out->largest);
    widen(at, dtype, 0, size, out->number);
    uint32_t lowest = smallest < largest ? smallest : largest, exponent = lowest >> MANTISSA[dtype];
    out->lattice = LAST[dtype] + (exponent > 1 ? (int32_t)exponent - 1 : 0);
    return 1;
}

static double power_of_two(int exponent) {
    uint64_t bits = (uint64_t)((exponent < -1022 ? -1022 : exponent > 1023 ? 1023 : exponent) + 1023) << 52;
    double power;
    memcpy(&power, &bits, 8);
    return power;
}

/* Whether plain addition in double is exact: all products are multiples of 2^lattice, and no sum reaches 2^53 of that. */
static int is_exact(const chain_term *terms, int count, const block *registers) {
    double reach = 0;
    int lattice = INT32_MAX;
    for (int i = 0; i < count; i++) {
        const block *operand = &registers[terms[i].operand];
        int own = operand->lattice - terms[i].bits;
        reach += fabs(terms[i].coefficient) * operand->largest;
        lattice = own < lattice ? own : lattice;
    }
    return lattice > -1000 && reach < power_of_two(lattice + 52);
}

/* The same sums in plain double, which is exact: up to three terms in one pass. */
static void add_plainly(const chain_term *terms, int count, const block *registers, size_t size, double *restrict sum) {
    const chain_term first = terms[0], second = terms[count > 1], third = terms[count > 2 ? 2 : 0];
    const double *restrict x = registers[first.operand].number, a = first.coefficient;
    const double *restrict y = registers[second.operand].number, b = second.coefficient;
    const double *restrict z = registers[third.operand].number, c = third.coefficient;
    if (count == 1)
        for (size_t i = 0; i < size; i++) sum[i] = a * x[i];
    else if (count == 2)
        for (size_t i = 0; i < size; i++) sum[i] = a * x[i] + b * y[i];
    else
        for (size_t i = 0; i < size; i++) sum[i] = a * x[i] + b * y[i] + c * z[i];
    for (int term = 3; term < count; term++) {
        const double *restrict values = registers[terms[term].operand].number, coefficient = terms[term].coefficient;
        for (size_t i = 0; i < size; i++) sum[i] += coefficient * values[i];
    }
}

/* The sum of some terms, to be rounded to any format; 0 if an element needs more than twice double's precision. */
static int add(const chain_term *terms, int count, const block *registers, size_t size, double *restrict sum) {
    double lo[BLOCK], rest[BLOCK], lost = 0;
    if (is_exact(terms, count, registers)) {
        add_plainly(terms, count, registers, size, sum);
        return 1;
    }
    for (size_t i = 0; i < size; i++) sum[i] = terms->coefficient * registers[terms->operand].number[i];
    for (size_t i = 0; i < size; i++) lo[i] = 0, rest[i] = 0;
    for (const chain_term *term = terms + 1; term < terms + count; term++)
        add_exactly(term->coefficient, registers[term->operand].number, size, sum, lo, rest);
    to_odd_doubles(sum, lo, size);
    for (size_t i = 0; i < size; i++) lost += rest[i];
    return lost == 0;
}

#if defined(__x86_64__)

/* A block of doubles to the nearest halves, ties to even, still as doubles; 0 if one overflows.
 *
 * With m = 1.5 * 2^(52 - 10) * 2^exponent(x), x + m has no room for more than the 10 bits behind x's first one. Below the
 * smallest normal half the exponent is held.
 */
static int round_to_halves(const double *restrict sum, block *restrict out) {
    const __m256d exponent = _mm256_castsi256_pd(_mm256_set1_epi64x(0x7FF0000000000000)), sign = _mm256_set1_pd(-0.0);
    const __m256d smallest = _mm256_set1_pd(0x1p-14), to_m = _mm256_set1_pd(0x1.8p42);
    __m256d most[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    for (size_t i = 0; i < BLOCK; i += 8) {
        for (size_t k = 0; k < 2; k++) {
            __m256d x = _mm256_loadu_pd(sum + i + 4 * k);
            __m256d m = _mm256_mul_pd(_mm256_max_pd(_mm256_and_pd(x, exponent), smallest), to_m);
            __m256d rounded = _mm256_sub_pd(_mm256_add_pd(x, m), m);
            most[k] = _mm256_max_pd(most[k], _mm256_andnot_pd(sign, rounded));
            _mm256_storeu_pd(out->number + i + 4 * k, _mm256_or_pd(rounded, _mm256_and_pd(x, sign))); /* -0 */
        }
    }
    double lanes[4];
    _mm256_storeu_pd(lanes, _mm256_max_pd(most[0], most[1]));
    out->largest = fmax(fmax(lanes[0], lanes[1]), fmax(lanes[2], lanes[3]));
    out->lattice = LAST[F16];
    return out->largest <= 65504;
}

#else

static int round_to_halves(const double *sum, block *out) {
    uint16_t halves[BLOCK];
    return !narrow(sum, BLOCK, halves, F16, 0) && load(halves, F16, 0, BLOCK, out);
}

#endif

/* The last step's sum for every element, rounded once to nearest, ties to even, as is every sum before it.
 *
 * steps, length  what is done to each block
 * terms          of all sums
 * inputs         where the elements lie that are loaded
 *
 * Returns 1, or 0 if the caller must do it sum by sum: an input is not finite, something overflows, or an element needs
 * more than twice double's precision.
 */
int sdops_chain(const chain_step *steps, int length, const chain_term *terms, const void *const *inputs, size_t count,
                void *out) {
    block registers[REGISTERS];
    double sum[BLOCK];
    float rounded[BLOCK]; /* room for a block of any format */
    for (size_t start = 0; start < count; start += BLOCK) {
        size_t size = count - start < BLOCK ? count - start : BLOCK;
        for (const chain_step *step = steps; step < steps + length; step++) {
            int is_last = step == steps + length - 1;
            if (step->input >= 0) {
                if (!load(inputs[step->input], step->dtype, start, size, &registers[step->out])) return 0;
                continue;
            }
            if (!add(terms + step->first, step->terms, registers, size, sum)) return 0;
            if (!is_last && step->dtype == F16 && size == BLOCK) {
                if (!round_to_halves(sum, &registers[step->out])) return 0;
                continue;
            }
            if (narrow(sum, size, is_last ? out : rounded, step->dtype, is_last ? start : 0)) return 0;
            if (!is_last && !load(rounded, step->dtype, 0, size, &registers[step->out])) return 0;
        }
    }
    return 1;
}
