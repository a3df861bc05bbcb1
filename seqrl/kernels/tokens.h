/* Operations of tokens.c that others in C use: see rows.h and gate.h. Within a parallel region a call works on its
   own. */
#ifndef SEQRL_TOKENS_H
#define SEQRL_TOKENS_H

#include "vector.h"

void add_norm_f32_bf16(long rows, long width, const float *x, const bf16 *delta, const float *weight, float eps,
                       float *x_out, bf16 *y, float *rstd);
void add_norm_bf16_bf16(long rows, long width, const bf16 *x, const bf16 *delta, const bf16 *weight, float eps,
                        bf16 *x_out, bf16 *y, float *rstd);
void turn_f32_bf16(long rows, long heads, long kv_heads, long size, const bf16 *qkv, const float *q_weight,
                   const float *k_weight, float eps, const float *cos, const float *sin, const int64_t *positions,
                   bf16 *q, bf16 *k);
void turn_bf16_bf16(long rows, long heads, long kv_heads, long size, const bf16 *qkv, const bf16 *q_weight,
                    const bf16 *k_weight, float eps, const float *cos, const float *sin, const int64_t *positions,
                    bf16 *q, bf16 *k);
void gate_bf16(long rows, long width, const bf16 *gate_up, bf16 *out);

#endif
