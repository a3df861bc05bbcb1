/* The cache of decoding. Of a row, keys lie in blocks of 16 columns, [slots, kv_heads, blocks, words, 16], so
   that one vector holds a word of 16 keys; values [slots, kv_heads, 16 blocks, size]. Words are those of words.h,
   `words` for a key's `size` numbers.

   Sums are added up in attention.c's order, so that decoding says what training says. */
#include "cache.h"
#include "tiles.h"

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

/* Scores of 16 `blocks` keys for some heads of a group, [heads, KEYS]. Asks for what lies `ahead` words after them. */
INLINE void scores_of(int pairs, int heads, int blocks, Shape s, const uint32_t *q, const uint32_t *keys, long ahead,
                      float *scores) {
    vf sums[2][2] = {{{0}}};
    for (long d = 0; d < s.words; d++)
        for (int b = 0; b < blocks; b++) {
            word key = words_at(keys + (b * s.words + d) * LANES);
            __builtin_prefetch(keys + (b * s.words + d) * LANES + ahead, 0, 2);
            for (int h = 0; h < heads; h++) sums[h][b] = multiply(pairs, splat_word(q[h * s.words + d]), key, sums[h][b]);
        }
    for (int h = 0; h < heads; h++)
        for (int b = 0; b < blocks; b++) store_f32(scores + h * KEYS + b * LANES, sums[h][b] * s.scale);
}

/* Adds to `heads` rows of out [heads, size] what `count` columns say in 16 `vectors` of their numbers; weights
   [heads, KEYS] as words. */
INLINE void add_values(int pairs, int heads, int vectors, Shape s, const uint32_t *weights, const void *values,
                       long count, long ahead, float *out) {
    vf sums[2][4];
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < vectors; i++) sums[h][i] = load_f32(out + h * s.size + i * LANES);
    for (long c = 0; c < count; c += 1 + pairs)
        for (int i = 0; i < vectors; i++) {
            const void *value = at(pairs, values, c * s.size + i * LANES);
            if (!pairs || i % 2 == 0) {
                __builtin_prefetch((const uint32_t *)value + ahead, 0, 2);
                if (pairs) __builtin_prefetch((const uint32_t *)at(pairs, value, s.size) + ahead, 0, 2);
            }
            word w = of_rows(pairs, value, c + 1 < count ? at(pairs, value, s.size) : NULL);
            for (int h = 0; h < heads; h++)
                sums[h][i] = multiply(pairs, splat_at(weights + ((h * KEYS + c) >> pairs)), w, sums[h][i]);
        }
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < vectors; i++) store_f32(out + h * s.size + i * LANES, sums[h][i]);
}

/* A stretch of cached columns for some heads of a group, q [heads, words]. As much is asked for `ahead` words after. */
INLINE void stretch(int pairs, int heads, Shape s, const uint32_t *q, const uint32_t *keys, const void *values,
                    long columns, long ahead, float *most, float *total, float *out) {
    float scores[2 * KEYS];
    uint32_t weights[2 * KEYS];
    for (long start = 0; start < columns; start += KEYS) {
        long n = columns - start < KEYS ? columns - start : KEYS, padded = (n + LANES - 1) / LANES * LANES, c = 0;
        const uint32_t *block = keys + start * s.words;
        const void *value = at(pairs, values, start * s.size);
        for (; c + 2 * LANES <= padded; c += 2 * LANES) scores_of(pairs, heads, 2, s, q, block + c * s.words, ahead, scores + c);
        if (c < padded) scores_of(pairs, heads, 1, s, q, block + c * s.words, ahead, scores + c);
        for (int h = 0; h < heads; h++) {
            float *of_h = scores + h * KEYS;
            for (c = n; c < padded; c++) of_h[c] = -INFINITY;
            vf tops = splat(most[h]);
            for (c = 0; c < padded; c += LANES) tops = larger(load_f32(of_h + c), tops);
            float top = largest(tops), shrink = vexp(splat(most[h] - top))[0], sum = total[h] * shrink;
            for (c = 0; c < padded; c += LANES) {
                vf p = vexp(load_f32(of_h + c) - top);
                store_f32(of_h + c, p);
                store(pairs, weights, h * KEYS + c, p);
            }
            for (c = 0; c < n; c++) sum += of_h[c];
            for (long d = 0; d < s.size; d += LANES)
                store_f32(out + h * s.size + d, load_f32(out + h * s.size + d) * shrink);
            most[h] = top, total[h] = sum;
        }
        long d = 0;
        for (; d + 4 * LANES <= s.size; d += 4 * LANES) add_values(pairs, heads, 4, s, weights, at(pairs, value, d), n, ahead, out + d);
        for (; d < s.size; d += LANES) add_values(pairs, heads, 1, s, weights, at(pairs, value, d), n, ahead, out + d);
    }
}

/* One query a row, over the columns of its prompt and then its own. q, out: [rows, heads, size]; prompt p has
   prompt_columns[p] columns in the prompts' cache, row r has own_columns[r] in slot own[r] of the other. k and v, as
   in `append`, are first put into the last of these, whose neighbours are read then anyway.
   Rows of one prompt side by side find it in the processor's cache. By all threads of a parallel region. */
INLINE void attend(int pairs, long rows, const Asked *asked, const Cached *prompts, const Cached *of_rows, float *sums) {
    long kv_heads = of_rows->kv_heads, size = of_rows->size, own_blocks = of_rows->blocks;
    Shape s = {asked->heads / kv_heads, size, size >> pairs, 1.0f / sqrtf((float)size)};
    const uint32_t *q = (const uint32_t *)asked->q;
    const int64_t *own = of_rows->slot, *own_columns = of_rows->columns, *prompt = prompts->slot;
    long tasks = rows * kv_heads, chunk = tasks < 256 ? 1 : 16;
#pragma omp for schedule(dynamic, chunk)
    for (long task = 0; task < tasks; task++) {
        long r = task / kv_heads, first = task * s.group;
        long prompt_column = (prompt[r] * kv_heads + task % kv_heads) * prompts->blocks * LANES;
        long own_column = (own[r] * kv_heads + task % kv_heads) * own_blocks * LANES;
        const uint32_t *pk = prompts->keys + prompt_column * s.words, *ok = of_rows->keys + own_column * s.words;
        const void *pv = at(pairs, prompts->values, prompt_column * s.size);
        const void *ov = at(pairs, of_rows->values, own_column * s.size);
        /* Other rows have just seen the prompt; the own columns of the next task are far away. They are asked for
           while this one's are read, and here those that it has more of. */
        long next = task + 1 < tasks ? task + 1 : task, of_next = own_columns[next / kv_heads];
        long ahead = ((own[next / kv_heads] * kv_heads + next % kv_heads) * own_blocks * LANES - own_column) * s.words;
        for (long i = own_columns[r] * s.words; i < of_next * s.words; i += LANES) {
            __builtin_prefetch(ok + ahead + i, 0, 2);
            __builtin_prefetch((const uint32_t *)ov + ahead + i, 0, 2);
        }
        put_column(pairs, s.size, own_blocks, own[r] * kv_heads + task % kv_heads, own_columns[r] - 1,
                   at(pairs, asked->k, task * s.size), at(pairs, asked->v, r * asked->v_stride + task % kv_heads * s.size),
                   of_rows->keys, of_rows->values);
        long prompt_columns = prompts->columns[prompt[r]];
        for (long h = 0; h < s.group; h += 2) {
            float most[2] = {-3e38f, -3e38f}, total[2] = {0};
            float *mine = sums + (first + h) * s.size;
            const uint32_t *queries = q + (first + h) * s.words;
            memset(mine, 0, sizeof(float) * s.size * (h + 1 < s.group ? 2 : 1));
            if (h + 1 < s.group) {
                stretch(pairs, 2, s, queries, pk, pv, prompt_columns, 0, most, total, mine);
                stretch(pairs, 2, s, queries, ok, ov, own_columns[r], h ? 0 : ahead, most, total, mine);
            } else {
                stretch(pairs, 1, s, queries, pk, pv, prompt_columns, 0, most, total, mine);
                stretch(pairs, 1, s, queries, ok, ov, own_columns[r], h ? 0 : ahead, most, total, mine);
            }
            for (int i = 0; i < 2 && h + i < s.group; i++)
                for (long d = 0; d < s.size; d += LANES)
                    store(pairs, asked->out, (first + h + i) * s.size + d, load_f32(mine + i * s.size + d) / total[i]);
        }
    }
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
                              const int64_t *own_columns, float *sums, void *out) {                                    \
        Asked asked = {heads, q, k, v, v_stride, out};                                                                 \
        Cached prompts = {kv_heads, size, prompt_blocks, (uint32_t *)prompt_keys, (void *)prompt_values, prompt,       \
                          prompt_columns};                                                                             \
        Cached of_rows = {kv_heads, size, own_blocks, own_keys, own_values, own, own_columns};                         \
        if (pairs && tiles_here()) {                                                                                   \
            attend_cached_tiles(rows, &asked, &prompts, &of_rows);                                                     \
            return;                                                                                                    \
        }                                                                                                              \
        _Pragma("omp parallel") attend(pairs, rows, &asked, &prompts, &of_rows, sums);                                 \
    }

OF_TYPE(f32, 0)
OF_TYPE(bf16, 1)

void team_attend_words(int pairs, long rows, const Asked *asked, const Cached *prompts, const Cached *own, float *sums) {
    if (pairs) attend(1, rows, asked, prompts, own, sums);
    else attend(0, rows, asked, prompts, own, sums);
}
