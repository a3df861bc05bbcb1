/* The cache of decoding. Of a row, keys lie in blocks of 16 columns, [slots, kv_heads, blocks, words, 16], so
   that one vector holds a word of 16 keys; values [slots, kv_heads, 16 blocks, size]. Words are those of words.h,
   `words` for a key's `size` numbers.

   Sums are added up in attention.c's order, so that decoding says what training says. */
#include "cache.h"
#include "tiles.h"

#define NEAR_NUMBERS (1 << 15) /* of a task's keys, of which the processor's cache has room for a few times as many */

typedef struct {
    long group, size, words;
    float scale;
} Shape;

/* A key and a value become column c of row `row`, of `blocks` of 16. */
INLINE void put_column(int pairs, long size, long blocks, long row, long c, const uint32_t *key, const void *value,
                       uint32_t *keys, void *values) {
    long words = size >> pairs;
    uint32_t *to = keys + (row * blocks + c / LANES) * words * LANES + c % LANES;
    for (long d = 0; d < words; d++) to[d * LANES] = key[d];
    memcpy((void *)at(pairs, values, (row * blocks * LANES + c) * size), value, 4 * words);
}

/* Puts the key and value of each token into column `column` of row `slot`. k [tokens, kv_heads, size]; a token's
   v starts every v_stride numbers. */
INLINE void append(int pairs, long tokens, long kv_heads, long size, long blocks, const void *k, const void *v,
                   long v_stride, uint32_t *keys, void *values, const int64_t *slot, const int64_t *column) {
#pragma omp parallel for schedule(static) if (tokens * kv_heads * size > 16384)
    for (long t = 0; t < tokens; t++)
        for (long h = 0; h < kv_heads; h++)
            put_column(pairs, size, blocks, slot[t] * kv_heads + h, column[t], at(pairs, k, (t * kv_heads + h) * size),
                       at(pairs, v, t * v_stride + h * size), keys, values);
}

/* Queries of some heads of a group, q [heads, words], and what they have seen so far: the largest score, the sum of
   weights, and what they weigh, out [heads, size]. Of the stretch that they are at: weights [heads, KEYS], as numbers
   and as words, and by how much what was seen before it shrinks. */
typedef struct {
    const uint32_t *q;
    float *out, most[2], total[2], shrink[2], weights[2 * KEYS];
    uint32_t words[2 * KEYS];
} Seeing;

/* What `n` keys, in up to 16 `blocks` of columns, weigh. Asks for what lies `ahead` words after them. */
INLINE void weigh(int pairs, int heads, int blocks, Shape s, Seeing *of, const uint32_t *keys, long n, long ahead) {
    vf sums[2][4] = {{{0}}}, before = {0};
    for (long d = 0; d < s.words; d++)
        for (int b = 0; b < blocks; b++) {
            word key = words_at(keys + (b * s.words + d) * LANES);
            __builtin_prefetch(keys + (b * s.words + d) * LANES + ahead, 0, 2);
            for (int h = 0; h < heads; h++) sums[h][b] = multiply(pairs, splat_word(of->q[h * s.words + d]), key, sums[h][b]);
        }
    const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vi there = lane < (int32_t)(n - (blocks - 1) * LANES); /* of the last block */
    for (int h = 0; h < heads; h++) {
        vf tops = splat(of->most[h]);
        for (int b = 0; b < blocks; b++) sums[h][b] *= s.scale;
        sums[h][blocks - 1] = pick(there, sums[h][blocks - 1], splat(-INFINITY));
        for (int b = 0; b < blocks; b++) tops = larger(sums[h][b], tops);
        float top = largest(tops);
        before[h] = of->most[h] - top, of->most[h] = top;
    }
    before = vexp(before);
    for (int h = 0; h < heads; h++) {
        of->shrink[h] = before[h];
        for (int b = 0; b < blocks; b++) {
            vf p = vexp(sums[h][b] - of->most[h]);
            store_f32(of->weights + h * KEYS + b * LANES, p);
            store(pairs, of->words, h * KEYS + b * LANES, p);
        }
    }
}

/* Adds what `n` columns say in 16 `vectors` of their numbers, from number `first` on. Who begins adds up the weights,
   too, meanwhile. */
INLINE void add_values(int pairs, int heads, int vectors, long first, Shape s, Seeing *of, const void *values, long n,
                       long ahead) {
    vf sums[2][4];
    float total[2], *out = of->out + first;
    for (int h = 0; h < heads; h++) {
        total[h] = of->total[h] * of->shrink[h];
        for (int i = 0; i < vectors; i++) sums[h][i] = load_f32(out + h * s.size + i * LANES) * of->shrink[h];
    }
    for (long c = 0; c < n; c += 1 + pairs) {
        const void *one = at(pairs, values, c * s.size + first), *two = c + 1 < n ? at(pairs, one, s.size) : NULL;
        for (int i = 0; i < vectors; i += 1 + pairs) {
            __builtin_prefetch((const uint32_t *)at(pairs, one, i * LANES) + ahead, 0, 2);
            if (pairs) __builtin_prefetch((const uint32_t *)at(pairs, one, s.size + i * LANES) + ahead, 0, 2);
        }
        for (int i = 0; i < vectors; i++) {
            word w = of_rows(pairs, at(pairs, one, i * LANES), two ? at(pairs, two, i * LANES) : NULL);
            for (int h = 0; h < heads; h++)
                sums[h][i] = multiply(pairs, splat_at(of->words + ((h * KEYS + c) >> pairs)), w, sums[h][i]);
        }
        for (int h = 0; h < heads && !first; h++) {
            total[h] += of->weights[h * KEYS + c];
            if (pairs) total[h] += of->weights[h * KEYS + c + 1]; /* 0 after the last */
        }
    }
    for (int h = 0; h < heads; h++) {
        if (!first) of->total[h] = total[h];
        for (int i = 0; i < vectors; i++) store_f32(out + h * s.size + i * LANES, sums[h][i]);
    }
}

/* A stretch of cached columns. As much is asked for `ahead` words after. */
INLINE void see(int pairs, int heads, Shape s, Seeing *of, const uint32_t *keys, const void *values, long columns, long ahead) {
    for (long start = 0; start < columns; start += KEYS) {
        long n = columns - start < KEYS ? columns - start : KEYS, d = 0;
        const uint32_t *key = keys + start * s.words;
        const void *value = at(pairs, values, start * s.size);
        if (n <= LANES) weigh(pairs, heads, 1, s, of, key, n, ahead);
        else if (n <= 2 * LANES) weigh(pairs, heads, 2, s, of, key, n, ahead);
        else if (n <= 3 * LANES) weigh(pairs, heads, 3, s, of, key, n, ahead);
        else weigh(pairs, heads, 4, s, of, key, n, ahead);
        for (; d + 4 * LANES <= s.size; d += 4 * LANES) add_values(pairs, heads, 4, d, s, of, value, n, ahead);
        for (; d < s.size; d += LANES) add_values(pairs, heads, 1, d, s, of, value, n, ahead);
    }
}

/* The query of a row for a key head, task `task` of those before `end`, over the columns of its prompt and then its own.
   q, out: [rows, heads, size]; prompt p has prompt_columns[p] columns in the prompts' cache, row r has own_columns[r] in
   slot own[r] of the other. k and v, as in `append`, are first put into the last of these, whose neighbours are read
   then anyway. Rows of one prompt side by side find it in the processor's cache. */
INLINE void attend_task(int pairs, long task, long end, const Asked *asked, const Cached *prompts,
                        const Cached *of_rows) {
    long kv_heads = of_rows->kv_heads, size = of_rows->size, own_blocks = of_rows->blocks;
    Shape s = {asked->heads / kv_heads, size, size >> pairs, 1.0f / sqrtf((float)size)};
    const uint32_t *q = (const uint32_t *)asked->q;
    const int64_t *own = of_rows->slot, *own_columns = of_rows->columns, *prompt = prompts->slot;
    float mine[2 * size];
    long r = task / kv_heads, first = task * s.group;
    long prompt_column = (prompt[r] * kv_heads + task % kv_heads) * prompts->blocks * LANES;
    long own_column = (own[r] * kv_heads + task % kv_heads) * own_blocks * LANES;
    const uint32_t *pk = prompts->keys + prompt_column * s.words, *ok = of_rows->keys + own_column * s.words;
    const void *pv = at(pairs, prompts->values, prompt_column * s.size);
    const void *ov = at(pairs, of_rows->values, own_column * s.size);
    /* Other rows have just seen the prompt; the own columns of a later task are far away. They are asked for while
       this one's are read, and here those that it has more of: two tasks ahead, as far as there is room. */
    long later = task + (own_columns[r] * size <= NEAR_NUMBERS ? 2 : 1), next = later < end ? later : task;
    long of_next = own_columns[next / kv_heads];
    long ahead = ((own[next / kv_heads] * kv_heads + next % kv_heads) * own_blocks * LANES - own_column) * s.words;
    for (long i = own_columns[r] * s.words; i < of_next * s.words; i += LANES) {
        __builtin_prefetch(ok + ahead + i, 0, 2);
        __builtin_prefetch((const uint32_t *)ov + ahead + i, 0, 2);
    }
    put_column(pairs, s.size, own_blocks, own[r] * kv_heads + task % kv_heads, own_columns[r] - 1,
               at(pairs, asked->k, task * s.size), at(pairs, asked->v, r * asked->v_stride + task % kv_heads * s.size),
               of_rows->keys, of_rows->values);
    long prompt_columns = prompts->columns[prompt[r]];
    Seeing of;
    of.out = mine;
    for (long h = 0; h < s.group; h += 2) {
        of.q = q + (first + h) * s.words, of.total[0] = of.total[1] = 0, of.most[0] = of.most[1] = -3e38f;
        long further = h ? 0 : ahead;
        memset(mine, 0, sizeof mine);
        if (h + 1 < s.group) {
            see(pairs, 2, s, &of, pk, pv, prompt_columns, 0);
            see(pairs, 2, s, &of, ok, ov, own_columns[r], further);
        } else {
            see(pairs, 1, s, &of, pk, pv, prompt_columns, 0);
            see(pairs, 1, s, &of, ok, ov, own_columns[r], further);
        }
        for (int i = 0; i < 2 && h + i < s.group; i++)
            for (long d = 0; d < size; d += LANES)
                store(pairs, asked->out, (first + h + i) * size + d, load_f32(mine + i * size + d) / of.total[i]);
    }
}

INLINE void attend(int pairs, long rows, const Asked *asked, const Cached *prompts, const Cached *of_rows) {
    long tasks = rows * of_rows->kv_heads;
#pragma omp for schedule(guided)
    for (long task = 0; task < tasks; task++) attend_task(pairs, task, tasks, asked, prompts, of_rows);
}

#define OF_TYPE(type, pairs)                                                                                       \
    void append_##type(long tokens, long kv_heads, long size, long blocks, const void *k, const void *v,           \
                       long v_stride, uint32_t *keys, void *values, const int64_t *slot,                           \
                       const int64_t *column) {                                                                    \
        if (pairs && tiles_here())                                                                                 \
            append_tiles(tokens, kv_heads, size, blocks, k, v, v_stride, keys, values, slot, column);              \
        else                                                                                                       \
            append(pairs, tokens, kv_heads, size, blocks, k, v, v_stride, keys, values, slot, column);                 \
    }                                                                                                              \
    void attend_cached_##type(long rows, long heads, long kv_heads, long size, const void *q, const void *k,           \
                              const void *v, long v_stride, const uint32_t *prompt_keys, const void *prompt_values,    \
                              long prompt_blocks, const int64_t *prompt, const int64_t *prompt_columns,                \
                              uint32_t *own_keys, void *own_values, long own_blocks, const int64_t *own,               \
                              const int64_t *own_columns, void *out) {                                                 \
        Asked asked = {heads, q, k, v, v_stride, out};                                                                 \
        Cached prompts = {kv_heads, size, prompt_blocks, (uint32_t *)prompt_keys, (void *)prompt_values, prompt,       \
                          prompt_columns};                                                                             \
        Cached of_rows = {kv_heads, size, own_blocks, own_keys, own_values, own, own_columns};                         \
        if (pairs && tiles_here()) {                                                                                   \
            attend_cached_tiles(rows, &asked, &prompts, &of_rows);                                                     \
            return;                                                                                                    \
        }                                                                                                              \
        _Pragma("omp parallel") attend(pairs, rows, &asked, &prompts, &of_rows);                                       \
    }

OF_TYPE(f32, 0)
OF_TYPE(bf16, 1)

void team_attend_words(int pairs, long rows, const Asked *asked, const Cached *prompts, const Cached *own) {
    if (pairs) attend(1, rows, asked, prompts, own);
    else attend(0, rows, asked, prompts, own);
}

void attend_words(int pairs, Share rows, const Asked *asked, const Cached *prompts, const Cached *own) {
    long first = rows.first * own->kv_heads, end = first + rows.count * own->kv_heads;
    for (long task = first; task < end; task++)
        if (pairs) attend_task(1, task, end, asked, prompts, own);
        else attend_task(0, task, end, asked, prompts, own);
}
