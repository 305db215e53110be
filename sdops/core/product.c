/* Sums of products up @ down (core/product.py). Every element is added up in double in the order of the terms and of the
 * rank, and rounded to single once: products of singles are exact in double, so that nothing depends on the processor, on
 * whether it multiplies and adds in one instruction, or on how many elements are made at once.
 */

#include "product.h"
#include "native.h"

enum {
    ROWS = 4, COLUMNS = 8, /* whose sums stay in registers */
    RANKS = 2048           /* of all terms together, whose numbers are made double once for all columns */
};

typedef double quad __attribute__((vector_size(32)));
typedef float quad_of_singles __attribute__((vector_size(16)));

static inline quad load(const float *at) {
#if defined(__x86_64__)
    return (quad)_mm256_cvtps_pd(_mm_loadu_ps(at)); /* compilers make two instructions of the conversion below */
#else
    quad_of_singles singles;
    memcpy(&singles, at, sizeof singles);
    return __builtin_convertvector(singles, quad);
#endif
}

static inline void store(quad values, float *at) {
    quad_of_singles singles = __builtin_convertvector(values, quad_of_singles);
    memcpy(at, &singles, sizeof singles);
}

static inline quad add_product(double a, quad b, quad sum) {
#if defined(__x86_64__)
    return (quad)_mm256_fmadd_pd(_mm256_set1_pd(a), (__m256d)b, (__m256d)sum);
#else
    return sum + a * b;
#endif
}

static inline int has_row(const product_term *term, int64_t row) {
    return row >= term->first && row < term->first + term->rows;
}

/* What rows multiply, of all terms one after the other, ROWS numbers for each of their ranks; 0 if there is no room. */
static int widen_ups(int rows, const product_term *terms, int count, int64_t row, double *ups) {
    int64_t ranks = 0;
    for (const product_term *term = terms; term < terms + count; term++) {
        if (!has_row(term, row)) continue;
        if (term->rank > RANKS - ranks) return 0;
        const float *up = term->up + (row - term->first) * term->rank;
        for (int64_t k = 0; k < term->rank; k++, ranks++)
            for (int r = 0; r < rows; r++) ups[ranks * ROWS + r] = up[r * term->rank + k];
    }
    return 1;
}

/* COLUMNS columns of some rows, all of which have the same terms; `ups` as `widen_ups` makes them, if `is_wide`. */
static inline __attribute__((always_inline)) void tile(const int rows, const int is_wide, const double *ups,
                                                       const product_term *terms, int count, size_t columns,
                                                       int64_t row, size_t column, float *out) {
    quad low[ROWS] = {0}, high[ROWS] = {0};
    for (const product_term *term = terms; term < terms + count; term++) {
        if (!has_row(term, row)) continue;
        const float *up = term->up + (row - term->first) * term->rank;
        const float *down = term->down + column;
        for (int64_t k = 0; k < term->rank; k++, down += columns) {
            quad first = load(down), second = load(down + 4);
            for (int r = 0; r < rows; r++) {
                double a = is_wide ? ups[r] : up[r * term->rank + k];
                low[r] = add_product(a, first, low[r]);
                high[r] = add_product(a, second, high[r]);
            }
            if (is_wide) ups += ROWS;
        }
    }
    for (int r = 0; r < rows; r++) {
        store(low[r], out + (size_t)r * columns);
        store(high[r], out + (size_t)r * columns + 4);
    }
}

static float element(const product_term *terms, int count, size_t columns, int64_t row, size_t column) {
    double sum = 0;
    for (const product_term *term = terms; term < terms + count; term++) {
        if (!has_row(term, row)) continue;
        const float *up = term->up + (row - term->first) * term->rank;
        for (int64_t k = 0; k < term->rank; k++) sum += (double)up[k] * term->down[(size_t)k * columns + column];
    }
    return (float)sum;
}

/* Some columns of some rows, all of which have the same terms; `out` is the first element. */
static void strip(int rows, const product_term *terms, int count, size_t columns, int64_t row, size_t column,
                  size_t size, float *out) {
    double ups[RANKS * ROWS];
    int is_wide = widen_ups(rows, terms, count, row, ups);
    size_t done = 0;
    for (; done + COLUMNS <= size; done += COLUMNS) switch (is_wide ? rows : 0) {
#define TILE(number) \
    case number: tile(number, 1, ups, terms, count, columns, row, column + done, out + done); break
            TILE(1); TILE(2); TILE(3); TILE(4);
#undef TILE
            default:
                for (int r = 0; r < rows; r++)
                    tile(1, 0, ups, terms, count, columns, row + r, column + done, out + (size_t)r * columns + done);
        }
    for (; done < size; done++)
        for (int r = 0; r < rows; r++)
            out[(size_t)r * columns + done] = element(terms, count, columns, row + r, column + done);
}

/* Rows from this one on, at most ROWS, that have the same terms. */
static int alike(const product_term *terms, int count, int64_t row, size_t most) {
    int64_t end = row + (most < ROWS ? (int64_t)most : ROWS);
    for (const product_term *term = terms; term < terms + count; term++) {
        if (term->first > row && term->first < end) end = term->first;
        if (term->first + term->rows > row && term->first + term->rows < end) end = term->first + term->rows;
    }
    return (int)(end - row);
}

void sdops_product(const product_term *terms, int count, size_t columns, size_t first, size_t size, float *out) {
    for (size_t end = first + size; first < end;) {
        size_t row = first / columns, column = first % columns, part = end - first;
        int rows = 1;
        if (column || part < columns)
            part = part < columns - column ? part : columns - column;
        else
            rows = alike(terms, count, (int64_t)row, part / columns), part = columns;
        strip(rows, terms, count, columns, (int64_t)row, column, part, out);
        out += (size_t)rows * part, first += (size_t)rows * part;
    }
}
