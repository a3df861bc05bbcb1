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

/* out[j] = sum over d of across[d] * rows[j][d] for `count` rows, each `stride` numbers after the one before. */
static void products(const vf *across, const float *rows, long count, long stride, long size, vf *out) {
    long j = 0;
    for (; j + STEP <= count; j += STEP) {
        vf sums[STEP] = {{0}};
        for (long d = 0; d < size; d++)
            for (int i = 0; i < STEP; i++) sums[i] += across[d] * rows[(j + i) * stride + d];
        for (int i = 0; i < STEP; i++) out[j + i] = sums[i];
    }
    for (; j < count; j++) {
        vf even = {0}, odd = {0};
        for (long d = 0; d < size; d += 2)
            even += across[d] * rows[j * stride + d], odd += across[d + 1] * rows[j * stride + d + 1];
        out[j] = even + odd;
    }
}

/* out[d] += sum over j of weights[j] * rows[j][d]. */
static void accumulate(const vf *weights, const float *rows, long count, long stride, long size, vf *out) {
    for (long d = 0; d < size; d += STEP) {
        vf sums[STEP];
        for (int i = 0; i < STEP; i++) sums[i] = out[d + i];
        for (long j = 0; j < count; j++)
            for (int i = 0; i < STEP; i++) sums[i] += weights[j] * rows[j * stride + d + i];
        for (int i = 0; i < STEP; i++) out[d + i] = sums[i];
    }
}

#endif
