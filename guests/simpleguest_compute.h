/* Work of a chosen length and nothing else, for benchmarks: tests/bench/floor.c runs the same functions natively.
 *
 * The includer has declared malloc and free.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef SIMPLEGUEST_COMPUTE_H
#define SIMPLEGUEST_COMPUTE_H

#include <stddef.h>
#include <stdint.h>

/* Turns an empty loop. */
static __attribute__((noinline, unused)) void turn(uint64_t turns) {
    while (turns-- > 0)
        __asm__ volatile("");
}

static __attribute__((noinline, unused)) void multiply(size_t n, const double *restrict left, const double *restrict right,
                                               double *restrict product) {
    for (size_t row = 0; row < n; row++)
        for (size_t k = 0; k < n; k++)
            for (size_t column = 0; column < n; column++)
                product[row * n + column] += left[row * n + k] * right[k * n + column];
}

/* Multiplies two n by n matrices with small whole elements and returns the trace of the product. */
static inline double matrix_product(size_t n) {
    size_t count = n * n;
    double *left = malloc(count * sizeof *left), *right = malloc(count * sizeof *right);
    double *product = malloc(count * sizeof *product), trace = 0;
    for (size_t i = 0; i < count; i++) {
        left[i] = (double)(i % 7);
        right[i] = (double)(i % 5);
        product[i] = 0;
    }
    multiply(n, left, right, product);
    for (size_t i = 0; i < n; i++)
        trace += product[i * n + i];
    free(product);
    free(right);
    free(left);
    return trace;
}

#endif
