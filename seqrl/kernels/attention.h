/* What is known of attention over flat tokens (attention.c), whatever computes it. */
#ifndef SEQRL_ATTENTION_H
#define SEQRL_ATTENTION_H

#include "words.h"

#define KEYS 64 /* columns whose scores are held at once */

typedef struct {
    long heads, kv_heads, group, size, v_stride;
    float scale;
    const void *q, *k, *v;
} Attention;

/* 16 queries of one key head: position by position, the heads of the group side by side. */
typedef struct {
    long row[LANES], statistic[LANES]; /* where a lane's numbers start in q, and in lse */
    vi position;                       /* in the sequence's own tokens */
    int mine[LANES];                   /* 0: a copy of another lane, to fill up */
    long last;
} Queries;

static inline Queries queries(const Attention *a, long own, long columns, long head, long block) {
    Queries result;
    long total = columns * a->group;
    long position = block * LANES / a->group, h = block * LANES % a->group;
    for (int i = 0; i < LANES; i++) {
        result.mine[i] = block * LANES + i < total;
        result.statistic[i] = (own + position) * a->heads + head * a->group + h;
        result.row[i] = result.statistic[i] * a->size;
        result.position[i] = (int32_t)position;
        result.last = position;
        if (block * LANES + i + 1 < total && ++h == a->group) position++, h = 0;
    }
    return result;
}

/* The sequences that see another's tokens, a list for each owner: first[s], then next[..], -1 behind the last. And the
   sequence that each token belongs to, -1 where there is none. */
static inline void guests_of(long sequences, const int64_t *shared, const int64_t *shared_columns, const int64_t *own,
                             const int64_t *own_columns, long tokens, long *owner, long *first, long *next) {
    for (long t = 0; t < tokens; t++) owner[t] = -1;
    for (long s = 0; s < sequences; s++) {
        first[s] = -1;
        for (long t = own[s]; t < own[s] + own_columns[s]; t++) owner[t] = s;
    }
    for (long s = sequences; s-- > 0;)
        if (shared_columns[s] > 0) {
            long host = owner[shared[s]];
            next[s] = first[host], first[host] = s;
        }
}

/* Of a token that belongs to nobody: rows of zeros. */
static inline void no_gradient(const Attention *a, long token, float *dq, float *dk, float *dv) {
    long of_keys = a->kv_heads * a->size, of_queries = a->heads * a->size;
    memset(dq + token * of_queries, 0, of_queries * 4);
    memset(dk + token * of_keys, 0, of_keys * 4), memset(dv + token * of_keys, 0, of_keys * 4);
}

/* Zeros for tokens that belong to nobody: rows of o, of so many bytes, and of lse. Returns nonzero without memory. */
static inline int nothing_for_others(long sequences, const int64_t *own, const int64_t *own_columns, long tokens, long row_bytes,
                                     long heads, void *o, float *lse) {
    char *owned = calloc(tokens + 1, 1);
    if (!owned) return 1;
    for (long s = 0; s < sequences; s++) memset(owned + own[s], 1, own_columns[s]);
    for (long t = 0; t < tokens; t++)
        if (!owned[t]) memset((char *)o + t * row_bytes, 0, row_bytes), memset(lse + t * heads, 0, heads * 4);
    free(owned);
    return 0;
}

/* See attention.c. */
int attend_forward_bf16(long sequences, long heads, long kv_heads, long size, const void *q, const void *k, const void *v,
                        long v_stride, const int64_t *shared, const int64_t *shared_columns, const int64_t *own,
                        const int64_t *own_columns, long tokens, void *o, float *lse);
int attend_backward_bf16(long sequences, long heads, long kv_heads, long size, const void *q, const void *k, const void *v,
                         long v_stride, const int64_t *shared, const int64_t *shared_columns, const int64_t *own,
                         const int64_t *own_columns, const void *o, const float *lse, const void *dout, float *delta,
                         long tokens, float *dq, float *dk, float *dv);

/* The same in bfloat16 on tiles, for processors that have them (tiles.h): attention_tiles.c. */
int attend_forward_tiles(long sequences, Attention a, const int64_t *shared, const int64_t *shared_columns,
                         const int64_t *own, const int64_t *own_columns, bf16 *o, float *lse);
int attend_backward_tiles(long sequences, Attention a, const int64_t *shared, const int64_t *shared_columns,
                          const int64_t *own, const int64_t *own_columns, const bf16 *o, const float *lse,
                          const bf16 *dout, long tokens, float *dq, float *dk, float *dv);

#endif
