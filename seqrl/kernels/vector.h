/* Sixteen numbers at a time, by the compiler's own vectors: whatever the processor has, they become its
   instructions. Half-size storage is bfloat16, held as its upper 16 bits; all arithmetic is float32. */
#ifndef SEQRL_VECTOR_H
#define SEQRL_VECTOR_H

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if defined(__x86_64__) && !defined(__FMA__)
#error "this processor has no fused multiply-add, without which torch's own operations are faster"
#endif
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16

typedef float vf __attribute__((vector_size(64), aligned(4)));
typedef int32_t vi __attribute__((vector_size(64), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(64), aligned(4)));
typedef uint16_t vh __attribute__((vector_size(32), aligned(2)));
typedef uint16_t bf16;

static inline vf splat(float x) { return x - (vf){0}; }

/* a b + c, rounded once. Only where it is written: the compiler is told to fuse nothing by itself, so that
   two functions that add up the same things in the same order get the same bits. */
static inline vf fused(vf a, vf b, vf c) {
#ifdef __AVX512F__
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    vf result;
    for (int i = 0; i < LANES; i++) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return result;
#endif
}

static inline vf load_f32(const float *p) { return *(const vf *)p; }
static inline void store_f32(float *p, vf x) { *(vf *)p = x; }

static inline vf load_bf16(const bf16 *p) {
    return (vf)(__builtin_convertvector(*(const vh *)p, vu) << 16);
}

/* Rounds to the nearest, ties to even; a NaN stays one. The processor's own way takes what is below 2^-126
   for 0. */
static inline void store_bf16(bf16 *p, vf x) {
#ifdef __AVX512BF16__
    *(vh *)p = (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    vu bits = (vu)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)(x != x);
    *(vh *)p = __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), vh);
#endif
}

/* Pairs of bfloat16, 16 in each: the products of the low halves and of the high ones, both added to c. */
static inline vf fused_pairs(vu a, vu b, vf c) {
#ifdef __AVX512BF16__
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
    c = fused((vf)(a << 16), (vf)(b << 16), c);
    return fused((vf)(a & 0xffff0000u), (vf)(b & 0xffff0000u), c);
#endif
}

/* What lies a page further on comes nearer: of several arrays at once the processor by itself asks too late. */
#define BYTES_AHEAD 4096
static inline void fetch_ahead(const void *p) { __builtin_prefetch((const char *)p + BYTES_AHEAD, 0, 2); }

/* Whether `p`, of so many bytes, is written around the caches: they do not hold it until it is read, and would only
   have it read before it is written. */
#define FAR_BYTES (4 << 20)
static inline int is_far(const void *p, long bytes) { return bytes >= FAR_BYTES && (uintptr_t)p % 64 == 0; }

static inline void place_f32(int far, float *p, vf x) {
#ifdef __AVX512F__
    if (far) {
        _mm512_stream_ps(p, (__m512)x);
        return;
    }
#endif
    store_f32(p, x);
}

/* Never: 16 numbers are half of what goes around at once. */
static inline void place_bf16(int far, bf16 *p, vf x) { store_bf16(p, x); }

static inline float get_f32(const float *p) { return *p; }
static inline void put_f32(float *p, float x) { *p = x; }

static inline float get_bf16(const bf16 *p) {
    uint32_t bits = (uint32_t)*p << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline void put_bf16(bf16 *p, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *p = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/* Lanes that are 8, 4, 2 and 1 apart, in this order. */
static inline float sum(vf x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#else
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) x[i] += x[i + step];
    return x[0];
#endif
}

static inline float largest(vf x) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)x);
#else
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
#endif
}

static inline vf pick(vi where, vf yes, vf no) { return (vf)(((vi)yes & where) | ((vi)no & ~where)); }
static inline vf larger(vf a, vf b) { return pick(a > b, a, b); }

/* exp(x) = 2^n exp(r), |r| <= ln 2 / 2, by a polynomial of degree 6: within 2 units in the last place. Below -87
   it is 0, above 89 infinite; a NaN stays one. */
static inline vf vexp(vf x) {
#ifdef __AVX512F__
    vf bounded = (vf)_mm512_min_ps(_mm512_set1_ps(100.0f), (__m512)x); /* far below, the mask has it */
#else
    vf bounded = pick(x > 88.0f, splat(88.0f), pick(x < -87.0f, splat(-87.0f), x));
#endif
    vf shifted = fused(bounded, splat(1.44269504f), splat(12582912.0f)); /* rounds to an integer, in the low bits */
    vf n = shifted - 12582912.0f;
    vf r = fused(n, splat(-0.693359375f), bounded);
    r = fused(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fused(p, r, splat(1.3981999507e-3f));
    p = fused(p, r, splat(8.3334519073e-3f));
    p = fused(p, r, splat(4.1665795894e-2f));
    p = fused(p, r, splat(1.6666665459e-1f));
    p = fused(p, r, splat(5.0000001201e-1f));
    p = fused(p, r * r, r) + 1.0f;
#ifdef __AVX512F__
    __mmask16 there = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
    return (vf)_mm512_maskz_scalef_ps(there, (__m512)p, (__m512)n);
#else
    vi power = ((vi)shifted - 0x4b400000) << 23;
    vf result = (vf)((vi)p + power);
    result = pick(x < -87.0f, splat(0.0f), pick(x > 88.0f, splat(INFINITY), result));
    return pick(x == x, result, x);
#endif
}

#endif
