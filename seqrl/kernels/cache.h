/* What is known of the cache of decoding (cache.c), whatever computes with it. */
#ifndef SEQRL_CACHE_H
#define SEQRL_CACHE_H

#include "chunks.h"
#include "words.h"

#define KEYS 64 /* columns whose scores are held at once, as in attention.h */

/* The same in bfloat16 on tiles, for processors that have them (tiles.h): cache_tiles.c. */
void append_tiles(long tokens, long kv_heads, long size, long blocks, const bf16 *k, const bf16 *v, long v_stride,
                  uint32_t *keys, bf16 *values, const int64_t *slot, const int64_t *column);

/* The keys and values of slots, `blocks` of 16 columns each; which slot a row has, [rows], and how many columns are
   filled: of each slot in the prompts' cache, of each row in the rows' own. */
typedef struct {
    long kv_heads, size, blocks;
    uint32_t *keys;
    bf16 *values;
    const int64_t *slot, *columns;
} Cached;

/* A query for each row and head, [rows, heads, size], and the newest key and value, which are put into the rows' own cache
   first, [rows, kv_heads, size]: v starts every v_stride numbers. */
typedef struct {
    long heads;
    const bf16 *q, *k, *v;
    long v_stride;
    bf16 *out;
} Asked;

void attend_cached_tiles(long rows, const Asked *asked, const Cached *prompts, const Cached *own);

/* Rows first .. + count, which share a prompt. */
typedef struct {
    long first, count;
} Run;

/* Finds the runs of rows, [rows] at most, in which `group` queries for each key head are no more than tiles have rows. */
long runs_of(long rows, long group, const int64_t *prompt, Run *runs);

/* The same as above by all threads of a parallel region, who take tasks from `taken`, 0 at first. */
void team_attend(const Asked *asked, const Cached *prompts, const Cached *own, const Run *run, long runs, long *taken);

/* The same without tiles, of float32 or pairs of bfloat16 (cache.c), by all threads of a parallel region; and of some
   rows by one of them. */
void team_attend_words(int pairs, long rows, const Asked *asked, const Cached *prompts, const Cached *own);
void attend_words(int pairs, Share rows, const Asked *asked, const Cached *prompts, const Cached *own);

#endif
