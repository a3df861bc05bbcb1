/* Products of a few rows with 16 columns that lie in the lanes of a vector. */
#ifndef SEQRL_PRODUCTS_H
#define SEQRL_PRODUCTS_H

#include "vector.h"

#define STEP 8 /* accumulators of an inner product */

/* Lays 16 rows of x, `size` numbers each, across lanes: out [size] vectors. Row i of them starts at rows[i]. */
static void across(const float *x, const long *rows, long size, float scale, vf *out) {
    for (long d = 0; d < size; d++)
        for (int i = 0; i < LANES; i++) out[d][i] = x[rows[i] + d] * scale;
}

/* out[j] = sum over d of across[d] * rows[j][d] for `count` rows, each `stride` numbers after the one before.
   Each is added up in the order of d, however many rows there are. */
static void products(const vf *across, const float *rows, long count, long stride, long size, vf *out) {
    long j = 0;
    for (; j + STEP <= count; j += STEP) {
        vf sums[STEP] = {{0}};
        for (long d = 0; d < size; d++)
            for (int i = 0; i < STEP; i++) sums[i] = fused(across[d], splat(rows[(j + i) * stride + d]), sums[i]);
        for (int i = 0; i < STEP; i++) out[j + i] = sums[i];
    }
    for (; j + 2 <= count; j += 2) {
        vf one = {0}, two = {0};
        for (long d = 0; d < size; d++) {
            one = fused(across[d], splat(rows[j * stride + d]), one);
            two = fused(across[d], splat(rows[(j + 1) * stride + d]), two);
        }
        out[j] = one, out[j + 1] = two;
    }
    if (j < count) {
        vf sum = {0};
        for (long d = 0; d < size; d++) sum = fused(across[d], splat(rows[j * stride + d]), sum);
        out[j] = sum;
    }
}

/* out[d] += sum over j of weights[j] * rows[j][d], in the order of j. */
static void accumulate(const vf *weights, const float *rows, long count, long stride, long size, vf *out) {
    for (long d = 0; d < size; d += STEP) {
        vf sums[STEP];
        for (int i = 0; i < STEP; i++) sums[i] = out[d + i];
        for (long j = 0; j < count; j++)
            for (int i = 0; i < STEP; i++) sums[i] = fused(weights[j], splat(rows[j * stride + d + i]), sums[i]);
        for (int i = 0; i < STEP; i++) out[d + i] = sums[i];
    }
}

#endif
