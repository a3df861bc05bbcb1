/* What is known of the cache of decoding (cache.c), whatever computes with it. */
#ifndef SEQRL_CACHE_H
#define SEQRL_CACHE_H

#include "words.h"

#define KEYS 64 /* columns whose scores are held at once, as in attention.h */

/* The same in bfloat16 on tiles, for processors that have them (tiles.h): cache_tiles.c. */
void append_tiles(long tokens, long kv_heads, long size, long blocks, const bf16 *k, const bf16 *v, long v_stride,
                  uint32_t *keys, bf16 *values, const int64_t *slot, const int64_t *column);
void attend_cached_tiles(long rows, long heads, long kv_heads, long size, const bf16 *q, const bf16 *k, const bf16 *v,
                         long v_stride, const uint32_t *prompt_keys, const bf16 *prompt_values, long prompt_blocks,
                         const int64_t *prompt, const int64_t *prompt_columns, uint32_t *own_keys, bf16 *own_values,
                         long own_blocks, const int64_t *own, const int64_t *own_columns, bf16 *out);

#endif
