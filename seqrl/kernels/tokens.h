/* Operations of tokens.c that others in C use: see rows.h and gate.h. Within a parallel region a call works on its
   own. */
#ifndef SEQRL_TOKENS_H
#define SEQRL_TOKENS_H

#include "vector.h"

#define OF_STREAM(S, C, types)                                                                                         \
    void add_norm_##types(long rows, long width, const S *x, const C *delta, const S *weight, float eps, S *x_out,     \
                          C *y, float *rstd);                                                                          \
    void add_norm_backward_##types(long rows, long width, const S *x_out, const S *weight, const float *rstd,          \
                                   const C *dy, const S *carried, S *dx, C *ddelta, float *dweight,                    \
                                   long threads);                                                                      \
    void turn_##types(long rows, long heads, long kv_heads, long size, const C *qkv, const S *q_weight,                \
                      const S *k_weight, float eps, const float *cos, const float *sin, const int64_t *positions,      \
                      C *q, C *k);                                                                                     \
    void turn_backward_##types(long rows, long heads, long kv_heads, long size, const C *qkv, const S *q_weight,       \
                               const S *k_weight, float eps, const float *cos, const float *sin,                       \
                               const int64_t *positions, const float *dq, const float *dk, const float *dv,            \
                               C *dqkv, float *dq_weight, float *dk_weight, long threads);

OF_STREAM(float, float, f32_f32)
OF_STREAM(float, bf16, f32_bf16)
OF_STREAM(bf16, bf16, bf16_bf16)
void gate_f32(long rows, long width, const float *gate_up, float *out);
void gate_bf16(long rows, long width, const bf16 *gate_up, bf16 *out);
void gate_backward_bf16(long rows, long width, const bf16 *gate_up, const bf16 *dout, bf16 *dgate_up);

/* One of them, by the type of the residual stream. */
#define OF(name, stream_is_f32, ...) \
    ((stream_is_f32) ? name##_f32_bf16(__VA_ARGS__) : name##_bf16_bf16(__VA_ARGS__))

#endif
