/* Sums of products up @ down, see product.c. */

#ifndef SDOPS_PRODUCT_H
#define SDOPS_PRODUCT_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    const float *up;     /* [rows, rank] */
    const float *down;   /* [rank, columns] */
    int64_t first, rows; /* rows of the matrix to which it is added */
    int64_t rank;
} product_term;

/* Elements of the sum of all terms; those from `first` on, counted through the rows of the matrix. */
void sdops_product(const product_term *terms, int count, size_t columns, size_t first, size_t size, float *out);

#endif
