/* cache.c in bfloat16 on tiles (tiles.h). Keys lie as there, which is in columns of tiles; so do values, 32 columns of a
   row at a time: [slots, kv_heads, steps, size / 16, 16 pairs of columns, 16, 2]. Rows of one prompt that lie side by
   side look at it together. Sums are added up in attention_tiles.c's order. */
#include "cache.h"
#include "tiles.h"

#ifndef __AMX_BF16__

void append_tiles(long tokens, long kv_heads, long size, long blocks, const bf16 *k, const bf16 *v, long v_stride,
                  uint32_t *keys, bf16 *values, const int64_t *slot, const int64_t *column) {}
void attend_cached_tiles(long rows, long heads, long kv_heads, long size, const bf16 *q, const uint32_t *prompt_keys,
                         const bf16 *prompt_values, long prompt_blocks, const int64_t *prompt,
                         const int64_t *prompt_columns, const uint32_t *own_keys, const bf16 *own_values,
                         long own_blocks, const int64_t *own, const int64_t *own_columns, bf16 *out) {}

#else

/* `blocks` of 16 columns are an even number. */
void append_tiles(long tokens, long kv_heads, long size, long blocks, const bf16 *k, const bf16 *v, long v_stride,
                  uint32_t *keys, bf16 *values, const int64_t *slot, const int64_t *column) {
#pragma omp parallel if (tokens * kv_heads * size > 16384)
    {
        /* What is not there yet weighs nothing, but is multiplied all the same: it has to be a number. */
#pragma omp for schedule(static)
        for (long t = 0; t < tokens; t++)
            for (long h = 0; h < kv_heads && column[t] % STEP_NUMBERS == 0; h++) {
                long at = (slot[t] * kv_heads + h) * blocks * LANES + column[t];
                memset(values + at * size, 0, STEP_NUMBERS * size * 2);
            }
#pragma omp for schedule(static)
        for (long t = 0; t < tokens; t++)
            for (long h = 0; h < kv_heads; h++) {
                long row = (slot[t] * kv_heads + h) * blocks, c = column[t], within = c % STEP_NUMBERS;
                const uint32_t *key = (const uint32_t *)(k + (t * kv_heads + h) * size);
                const bf16 *value = v + t * v_stride + h * size;
                bf16 *to = values + (row * LANES + c - within) * size + within / 2 * STEP_NUMBERS + within % 2;
                for (long d = 0; d < size / 2; d++) keys[((row + c / LANES) * (size / 2) + d) * LANES + c % LANES] = key[d];
                for (long d = 0; d < size; d++) to[d / LANES * 2 * TILE + d % LANES * 2] = value[d];
            }
    }
}

/* Up to 16 queries of one key head, of one row or of several that share a prompt. */
typedef struct {
    long size;
    float scale;
    bf16 *q; /* [16, size] */
    float most[LANES], total[LANES];
    float *out; /* [16, size] */
} Asking;

/* A stretch of cached columns, and which queries it is for: first .. + count, as many as tiles have rows. */
typedef struct {
    long first, count, columns;
    const uint32_t *keys;
    const bf16 *values;
} Stretch;

/* scores[first ..][] of `n` columns from `start` on. */
INLINE void ask(const Asking *a, const Stretch *s, long start, long n, float scores[LANES][KEYS]) {
    long steps = a->size / STEP_NUMBERS;
    const bf16 *q = a->q + s->first * a->size;
    for (long c = 0; c < n; c += 2 * LANES) {
        const uint32_t *one = s->keys + (start + c) / LANES * steps * TILE, *two = c + LANES < n ? one + steps * TILE : one;
        _tile_zero(0);
        _tile_zero(1);
        for (long i = 0; i < steps; i++) {
            _tile_loadd(4, q + i * STEP_NUMBERS, a->size * 2);
            _tile_loadd(6, one + i * TILE, 64);
            _tile_loadd(7, two + i * TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, scores[s->first] + c, KEYS * 4);
        _tile_stored(1, scores[s->first] + c + LANES, KEYS * 4);
    }
}

/* What `n` scores of query h weigh, as bfloat16; its sums so far shrink to the new largest score. */
INLINE void weigh(Asking *a, long h, long n, float *scores, bf16 *weights) {
    float *out = a->out + h * a->size;
    vf tops = splat(a->most[h]), totals = {0};
    for (long c = 0; c < n; c += LANES) {
        vf score = load_f32(scores + c) * a->scale;
        if (c + LANES > n) score = (vf)_mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), lanes(n - c), (__m512)score);
        store_f32(scores + c, score);
        tops = larger(score, tops);
    }
    float top = largest(tops), shrink = vexp(splat(a->most[h] - top))[0];
    for (long c = 0; c < n; c += LANES) {
        vf p = vexp(load_f32(scores + c) - top);
        totals += p;
        store_bf16(weights + c, p);
    }
    if (n % STEP_NUMBERS && n % STEP_NUMBERS <= LANES) memset(weights + pieces(n, LANES) * LANES, 0, 32);
    for (long d = 0; d < a->size && shrink != 1; d += LANES) store_f32(out + d, load_f32(out + d) * shrink);
    a->most[h] = top, a->total[h] = a->total[h] * shrink + sum(totals);
}

/* out += weights times the values of `n` columns from `start` on. */
INLINE void add_values(const Asking *a, const Stretch *s, long start, long n, bf16 weights[LANES][KEYS]) {
    for (long d = 0; d < a->size; d += 2 * LANES) {
        float *out = a->out + s->first * a->size + d;
        _tile_loadd(0, out, a->size * 4);
        _tile_loadd(1, out + LANES, a->size * 4);
        for (long i = 0; i * STEP_NUMBERS < n; i++) {
            const bf16 *value = s->values + (start + i * STEP_NUMBERS) * a->size + d * STEP_NUMBERS;
            _tile_loadd(4, weights[s->first] + i * STEP_NUMBERS, KEYS * 2);
            _tile_loadd(6, value, 64);
            _tile_loadd(7, value + 2 * TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, out, a->size * 4);
        _tile_stored(1, out + LANES, a->size * 4);
    }
}

/* Stretches side by side: what waits for one goes on with another meanwhile. */
static void see(Asking *a, const Stretch *stretches, long count) {
    float scores[LANES][KEYS] __attribute__((aligned(64)));
    bf16 weights[LANES][KEYS] __attribute__((aligned(64)));
    long longest = 0;
    for (const Stretch *s = stretches; s < stretches + count; s++)
        if (s->columns > longest) longest = s->columns;
    for (long start = 0; start < longest; start += KEYS) {
        tiles_read_memory();
        for (const Stretch *s = stretches; s < stretches + count; s++)
            if (s->columns > start) ask(a, s, start, least(s->columns - start, KEYS), scores);
        for (const Stretch *s = stretches; s < stretches + count; s++)
            for (long h = s->first; h < s->first + s->count && s->columns > start; h++)
                weigh(a, h, least(s->columns - start, KEYS), scores[h], weights[h]);
        tiles_read_memory();
        for (const Stretch *s = stretches; s < stretches + count; s++)
            if (s->columns > start) add_values(a, s, start, least(s->columns - start, KEYS), weights);
    }
}

/* Rows first .. + count, which share a prompt. */
typedef struct {
    long first, count;
} Run;

/* What is about to be read comes nearer. */
INLINE void ask_for(const Stretch *s, long size) {
    for (long i = 0; i < s->columns * size / 2; i += LANES) {
        __builtin_prefetch(s->keys + i, 0, 2);
        __builtin_prefetch((const uint32_t *)s->values + i, 0, 2);
    }
}

void attend_cached_tiles(long rows, long heads, long kv_heads, long size, const bf16 *q, const uint32_t *prompt_keys,
                         const bf16 *prompt_values, long prompt_blocks, const int64_t *prompt,
                         const int64_t *prompt_columns, const uint32_t *own_keys, const bf16 *own_values,
                         long own_blocks, const int64_t *own, const int64_t *own_columns, bf16 *out) {
    long group = heads / kv_heads, chunks = pieces(group, LANES), most = LANES / least(group, LANES), runs = 0;
    Run run[rows + 1];
    for (long r = 0; r < rows; r++) {
        Run *last = run + runs - 1;
        if (runs && last->count < most && prompt[last->first] == prompt[r]) last->count++;
        else run[runs++] = (Run){r, 1};
    }
#pragma omp parallel
    {
        bf16 queries[LANES * size] __attribute__((aligned(64)));
        float sums[LANES * size] __attribute__((aligned(64)));
        long shape = 0;
#pragma omp for schedule(dynamic, 1)
        for (long t = 0; t < runs * kv_heads * chunks; t++) {
            Run now = run[t / chunks / kv_heads];
            long head = t / chunks % kv_heads, first = head * group + t % chunks * LANES;
            long these = least((head + 1) * group - first, LANES), all = now.count * these;
            Asking a = {size, 1.0f / sqrtf((float)size), queries, .out = sums};
            Stretch own_stretch[LANES];
            memset(sums, 0, all * size * 4);
            for (long i = 0; i < all; i++) {
                memcpy(queries + i * size, q + ((now.first + i / these) * heads + first + i % these) * size, size * 2);
                a.most[i] = -3e38f, a.total[i] = 0;
            }
            for (long i = 0; i < now.count; i++) {
                long r = now.first + i, at = (own[r] * kv_heads + head) * own_blocks * LANES;
                own_stretch[i] = (Stretch){i * these, these, own_columns[r], own_keys + at * size / 2, own_values + at * size};
                ask_for(own_stretch + i, size);
            }
            long p = prompt[now.first], at = (p * kv_heads + head) * prompt_blocks * LANES;
            if (shape != all) tiles_of(shape = all);
            see(&a, &(Stretch){0, all, prompt_columns[p], prompt_keys + at * size / 2, prompt_values + at * size}, 1);
            if (shape != these) tiles_of(shape = these);
            see(&a, own_stretch, now.count);
            for (long i = 0; i < all; i++)
                for (long d = 0; d < size; d += LANES)
                    store_bf16(out + ((now.first + i / these) * heads + first + i % these) * size + d,
                               load_f32(sums + i * size + d) / a.total[i]);
        }
        tiles_off();
    }
}

#endif
