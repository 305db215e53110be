/* Sums of sums, each rounded to its own format, as core/chain.py puts them together: a block of elements goes through
 * all of them while it stays in the first-level cache. The bits are those of sdops_sum, called for one sum after the
 * other.
 */

#include "chain.h"

/* Elements of a format as double, and what is known of all of them; 0 if one is not finite. */
static int load(const void *raw, int dtype, size_t start, size_t size, block *out) {
    const char *at = (const char *)raw + start * (dtype == F32 ? 4 : 2);
    uint32_t largest, smallest;
    sdops_bounds(at, dtype, size, &largest, &smallest);
    widen(at, dtype, 0, size, out->number);
    return know(largest, smallest, dtype, out);
}

/* The sum of some terms, to be rounded to any format; 0 if an element needs more than twice double's precision. */
static int add(const chain_term *terms, int count, const block *registers, size_t size, double *restrict sum) {
    double lo[BLOCK], rest[BLOCK], lost = 0;
    int exact = is_exact(extent_of(terms, count, registers));
    for (size_t i = 0; i < size; i++) sum[i] = terms->coefficient * registers[terms->operand].number[i];
    for (size_t i = 0; i < size; i++) lo[i] = 0, rest[i] = 0;
    for (const chain_term *term = terms + 1; term < terms + count; term++) {
        const double *restrict values = registers[term->operand].number, coefficient = term->coefficient;
        if (exact)
            for (size_t i = 0; i < size; i++) sum[i] += coefficient * values[i];
        else
            add_exactly(coefficient, values, size, sum, lo, rest);
    }
    if (exact) return 1;
    to_odd_doubles(sum, lo, size);
    for (size_t i = 0; i < size; i++) lost += rest[i];
    return lost == 0;
}

/* One block of elements through the whole chain, sum by sum; 0 if that cannot be, as sdops_chain says. */
static int play(const chain_step *steps, int length, const chain_term *terms, const void *const *inputs, size_t start,
                size_t size, block *registers, void *out) {
    double sum[BLOCK];
    float rounded[BLOCK]; /* room for a block of any format */
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
    return 1;
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
    size_t zeros = 0; /* up to here they are expected, whose signs take the fast way longer */
    for (size_t start = 0; start < count; start += BLOCK) {
        size_t size = count - start < BLOCK ? count - start : BLOCK;
        int done = 0;
        if (size == BLOCK) {
            int signs = start < zeros;
            done = sdops_chain_fused(steps, length, terms, inputs, start, registers, out, signs);
            if (!done && !signs) {
                zeros = start + 16 * BLOCK;
                done = sdops_chain_fused(steps, length, terms, inputs, start, registers, out, 1);
            }
        }
        if (!done && !play(steps, length, terms, inputs, start, size, registers, out)) return 0;
    }
    return 1;
}
