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

/* The sum of some terms, to be rounded to any format; 0 if an element needs more than twice double's precision. */
static int add(const chain_term *terms, int count, const block *registers, size_t size, double *restrict sum) {
    double lo[BLOCK], rest[BLOCK], lost = 0;
    int exact = is_exact(terms, count, registers);
    for (size_t i = 0; i < size; i++) sum[i] = terms->coefficient * registers[terms->operand].number[i];
    if (!exact)
        for (size_t i = 0; i < size; i++) lo[i] = 0, rest[i] = 0;
    for (const chain_term *term = terms + 1; term < terms + count; term++) {
        const double *restrict values = registers[term->operand].number;
        if (exact)
            for (size_t i = 0; i < size; i++) sum[i] += term->coefficient * values[i];
        else
            add_exactly(term->coefficient, values, size, sum, lo, rest);
    }
    if (exact) return 1;
    to_odd_doubles(sum, lo, size);
    for (size_t i = 0; i < size; i++) lost += rest[i];
    return lost == 0;
}

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
            if (narrow(sum, size, is_last ? out : rounded, step->dtype, is_last ? start : 0)) return 0;
            if (!is_last && !load(rounded, step->dtype, 0, size, &registers[step->out])) return 0;
        }
    }
    return 1;
}
