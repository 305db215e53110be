/* What chain*.c share: the parts of a chain, as core/chain.py puts them together, and what is known of
 * a block of elements before it is looked at.
 */

#ifndef SDOPS_CHAIN_H
#define SDOPS_CHAIN_H

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
    double largest;  /* no magnitude is above */
    int32_t lattice; /* all numbers are multiples of 2^lattice */
} block;

static const int MANTISSA[] = {10, 7, 23}, LAST[] = {-24, -133, -149}, INFINITE[] = {0x7C00, 0x7F80, 0x7F800000};

/* What is known of elements, from the bit patterns of the largest magnitude and of the smallest that is not zero, as
 * sdops_bounds gives them; 0 if one is not finite. */
static inline int know(uint32_t largest, uint32_t smallest, int dtype, block *out) {
    if (largest >= (uint32_t)INFINITE[dtype]) return 0;
    uint16_t half = (uint16_t)largest;
    widen(dtype == F32 ? (const void *)&largest : &half, dtype, 0, 1, &out->largest);
    uint32_t lowest = smallest < largest ? smallest : largest, exponent = lowest >> MANTISSA[dtype];
    out->lattice = LAST[dtype] + (exponent > 1 ? (int32_t)exponent - 1 : 0);
    return 1;
}

static inline double power_of_two(int exponent) {
    uint64_t bits = (uint64_t)((exponent < -1022 ? -1022 : exponent > 1023 ? 1023 : exponent) + 1023) << 52;
    double power;
    memcpy(&power, &bits, 8);
    return power;
}

/* What all sums stay below, and the lattice that all products are on: they are multiples of 2^lattice. */
typedef struct {
    double reach;
    int lattice;
} extent;

static inline extent extent_of(const chain_term *terms, int count, const block *registers) {
    extent all = {0, INT32_MAX};
    for (const chain_term *term = terms; term < terms + count; term++) {
        const block *operand = &registers[term->operand];
        int own = operand->lattice - term->bits;
        all.reach += fabs(term->coefficient) * operand->largest;
        all.lattice = own < all.lattice ? own : all.lattice;
    }
    return all;
}

/* Whether plain addition in double is exact: no sum reaches 2^53 steps of the lattice. */
static inline int is_exact(extent all) { return all.lattice > -1000 && all.reach < power_of_two(all.lattice + 52); }

/* All elements through the whole chain, see chain.c. */
int sdops_chain(const chain_step *steps, int length, const chain_term *terms, const void *const *inputs, size_t count,
                void *out);

/* One block through the whole chain, fast; 0 if that cannot be, or not be known to be right. See chain_fused.c. */
int sdops_chain_fused(const chain_step *steps, int length, const chain_term *terms, const void *const *inputs,
                      size_t start, block *registers, void *out, int signs);

#endif
