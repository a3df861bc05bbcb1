/* Products over words of 32 bits: a float32, or a pair of bfloat16 whose two products are added up together.
   What is `pairs` says which, and is a constant wherever these are used. */
#ifndef SEQRL_WORDS_H
#define SEQRL_WORDS_H

#include "vector.h"

#define INLINE static inline __attribute__((always_inline))

typedef vu word;

INLINE vf multiply(int pairs, word a, word b, vf sum) {
    return pairs ? fused_pairs(a, b, sum) : fused((vf)a, (vf)b, sum);
}

INLINE word splat_word(uint32_t x) { return x - (word){0}; }
/* Of numbers that were written as others than words. */
INLINE word splat_at(const void *p) {
    uint32_t x;
    memcpy(&x, p, 4);
    return splat_word(x);
}

INLINE word words_at(const uint32_t *p) { return *(const word *)p; }

/* A number of a tensor, `i` numbers after p. */
INLINE const void *at(int pairs, const void *p, long i) { return (const char *)p + (pairs ? 2 : 4) * i; }

INLINE vf load(int pairs, const void *p, long i) {
    return pairs ? load_bf16((const bf16 *)p + i) : load_f32((const float *)p + i);
}

INLINE void store(int pairs, void *p, long i, vf x) {
    if (pairs) store_bf16((bf16 *)p + i, x);
    else store_f32((float *)p + i, x);
}

/* 16 numbers of one row as words; with those of a second row, or zeros where it is NULL, as pairs. */
INLINE word of_rows(int pairs, const void *one, const void *two) {
    if (!pairs) return words_at(one);
    word w = __builtin_convertvector(*(const vh *)one, vu);
    return two ? w | __builtin_convertvector(*(const vh *)two, vu) << 16 : w;
}

#ifdef __AVX512F__
/* Of a 16 x 16 square, rows i and i + step exchange what lies across its diagonal. `step` is a constant. */
INLINE void exchange(__m512i *rows, int step) {
    vi upper, lower;
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) {
        upper[j] = j & step ? LANES + j - step : j;
        lower[j] = j & step ? LANES + j : j + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        if (i & step) continue;
        __m512i one = rows[i], other = rows[i + step];
        rows[i] = _mm512_permutex2var_epi32(one, (__m512i)upper, other);
        rows[i + step] = _mm512_permutex2var_epi32(one, (__m512i)lower, other);
    }
}
#endif

/* Lays 16 rows of `words` words, a multiple of 16, across lanes: out[d] has word d of each. rows[i] says where row i
   starts in x. */
static inline void across(const uint32_t *x, const long *rows, long words, word *out) {
#ifdef __AVX512F__
    for (long d = 0; d < words; d += LANES) {
        __m512i square[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) square[i] = (__m512i)words_at(x + rows[i] + d);
        exchange(square, 8), exchange(square, 4), exchange(square, 2), exchange(square, 1);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) out[d + i] = (word)square[i];
    }
#else
    for (long d = 0; d < words; d++)
        for (int i = 0; i < LANES; i++) out[d][i] = x[rows[i] + d];
#endif
}

/* What `of_rows` makes, of numbers that are rounded for it. */
INLINE word of_vectors(int pairs, vf one, vf two) {
    if (!pairs) return (word)one;
    bf16 rounded[2 * LANES];
    store_bf16(rounded, one), store_bf16(rounded + LANES, two);
    return of_rows(pairs, rounded, rounded + LANES);
}

#endif
