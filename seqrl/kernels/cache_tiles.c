/* cache.c in bfloat16 on tiles (tiles.h). Keys lie as there, which is in columns of tiles; so do values, 32 columns of a
   row at a time: [slots, kv_heads, steps, size / 16, 16 pairs of columns, 16, 2]. Rows of one prompt that lie side by
   side look at it together. Sums are added up in attention_tiles.c's order. */
#include "cache.h"
#include "tiles.h"

#define AHEAD 256 /* columns that are asked for before they are read */

#ifndef __AMX_BF16__

void append_tiles(long tokens, long kv_heads, long size, long blocks, const bf16 *k, const bf16 *v, long v_stride,
                  uint32_t *keys, bf16 *values, const int64_t *slot, const int64_t *column) {}
void attend_cached_tiles(long rows, const Asked *asked, const Cached *prompts, const Cached *own) {}

#else

/* What a row has of one head. */
typedef struct {
    uint32_t *keys;
    bf16 *values;
} Head;

INLINE Head head_at(uint32_t *keys, bf16 *values, long size, long blocks, long row) {
    return (Head){keys + row * blocks * LANES * size / 2, values + row * blocks * LANES * size};
}

/* Before the first column of a step: what is not there yet weighs nothing, but is multiplied all the same, so it has
   to be a number. */
INLINE void begin_step(Head of, long size, long c) {
    if (c % STEP_NUMBERS == 0) memset(of.values + c * size, 0, STEP_NUMBERS * size * 2);
}

/* A key and a value become column c. */
INLINE void put_column(Head of, long size, const bf16 *k, const bf16 *v, long c) {
    const uint32_t *key = (const uint32_t *)k;
    uint32_t *keys = of.keys + c / LANES * (size / 2) * LANES + c % LANES;
    long within = c % STEP_NUMBERS;
    bf16 *values = of.values + (c - within) * size + within / 2 * STEP_NUMBERS;
    __mmask32 mine = 0x55555555u << within % 2; /* every other number of a line */
    for (long d = 0; d < size / 2; d++) keys[d * LANES] = key[d];
    for (long d = 0; d < size; d += LANES, values += 2 * TILE) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(v + d)));
        _mm512_mask_storeu_epi16(values, mine, within % 2 ? _mm512_slli_epi32(wide, 16) : wide);
    }
}

/* `blocks` of 16 columns are an even number. */
void append_tiles(long tokens, long kv_heads, long size, long blocks, const bf16 *k, const bf16 *v, long v_stride,
                  uint32_t *keys, bf16 *values, const int64_t *slot, const int64_t *column) {
#pragma omp parallel if (tokens * kv_heads * size > 16384)
    {
#pragma omp for schedule(static)
        for (long t = 0; t < tokens; t++)
            for (long h = 0; h < kv_heads; h++)
                begin_step(head_at(keys, values, size, blocks, slot[t] * kv_heads + h), size, column[t]);
#pragma omp for schedule(static)
        for (long t = 0; t < tokens; t++)
            for (long h = 0; h < kv_heads; h++)
                put_column(head_at(keys, values, size, blocks, slot[t] * kv_heads + h), size,
                           k + (t * kv_heads + h) * size, v + t * v_stride + h * size, column[t]);
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

/* What is about to be read comes nearer, as far as there is room for it. */
INLINE void ask_for_keys(const Stretch *s, long size) {
    for (long i = 0; i < least(s->columns, AHEAD) * size / 2; i += LANES) __builtin_prefetch(s->keys + i, 0, 2);
}

INLINE void ask_for_values(const Stretch *s, long size) {
    for (long i = 0; i < least(s->columns, AHEAD) * size; i += 2 * LANES) __builtin_prefetch(s->values + i, 0, 2);
}

/* Stretches side by side: what waits for one goes on with another meanwhile, and `ahead`, as many as come next,
   are asked for. */
static void see(Asking *a, const Stretch *stretches, long count, const Stretch *ahead, long next) {
    float scores[LANES][KEYS] __attribute__((aligned(64)));
    bf16 weights[LANES][KEYS] __attribute__((aligned(64)));
    long longest = 0;
    for (const Stretch *s = stretches; s < stretches + count; s++)
        if (s->columns > longest) longest = s->columns;
    for (long start = 0; start < longest; start += KEYS) {
        tiles_read_memory();
        for (long i = 0; i < count; i++) {
            const Stretch *s = stretches + i;
            if (s->columns > start) ask(a, s, start, least(s->columns - start, KEYS), scores);
            if (!start && i < next) ask_for_keys(ahead + i, a->size);
        }
        for (const Stretch *s = stretches; s < stretches + count; s++)
            for (long h = s->first; h < s->first + s->count && s->columns > start; h++)
                weigh(a, h, least(s->columns - start, KEYS), scores[h], weights[h]);
        tiles_read_memory();
        for (long i = 0; i < count; i++) {
            const Stretch *s = stretches + i;
            if (s->columns > start) add_values(a, s, start, least(s->columns - start, KEYS), weights);
            if (!start && i < next) ask_for_values(ahead + i, a->size);
        }
    }
}

/* What key head `head` of a run's rows has in their own cache. */
INLINE void own_stretches(Run run, long head, const Cached *own, Stretch *to) {
    for (long i = 0; i < run.count; i++) {
        long row = own->slot[run.first + i] * own->kv_heads + head;
        Head of = head_at(own->keys, own->values, own->size, own->blocks, row);
        to[i] = (Stretch){.columns = own->columns[run.first + i], .keys = of.keys, .values = of.values};
    }
}

long runs_of(long rows, long group, const int64_t *prompt, Run *runs) {
    long count = 0, most = LANES / least(group, LANES);
    for (long r = 0; r < rows; r++) {
        Run *last = runs + count - 1;
        if (count && last->count < most && prompt[last->first] == prompt[r]) last->count++;
        else runs[count++] = (Run){r, 1};
    }
    return count;
}

void team_attend(const Asked *asked, const Cached *prompts, const Cached *own, const Run *run, long runs, long *taken) {
    long kv_heads = own->kv_heads, size = own->size, group = asked->heads / kv_heads;
    bf16 queries[LANES * size] __attribute__((aligned(64)));
    float sums[LANES * size] __attribute__((aligned(64)));
    Stretch stretches[2][LANES], *mine = stretches[0], *ahead = stretches[1]; /* of this task and the next */
    long shape = 0, t, next;
#pragma omp atomic capture
    t = (*taken)++;
    if (t < runs * kv_heads) own_stretches(run[t / kv_heads], t % kv_heads, own, mine);
    for (; t < runs * kv_heads; t = next) {
        Run now = run[t / kv_heads], then = {0};
        long head = t % kv_heads, p = prompts->slot[now.first];
#pragma omp atomic capture
        next = (*taken)++;
        if (next < runs * kv_heads) then = run[next / kv_heads];
        own_stretches(then, next % kv_heads, own, ahead);
        for (long r = now.first; r < now.first + now.count; r++) {
            Head of = head_at(own->keys, own->values, size, own->blocks, own->slot[r] * kv_heads + head);
            const bf16 *k = asked->k + (r * kv_heads + head) * size, *v = asked->v + r * asked->v_stride + head * size;
            begin_step(of, size, own->columns[r] - 1);
            put_column(of, size, k, v, own->columns[r] - 1);
        }
        for (long first = head * group; first < (head + 1) * group; first += LANES) {
            long these = least((head + 1) * group - first, LANES), all = now.count * these;
            Head of = head_at(prompts->keys, prompts->values, size, prompts->blocks, p * kv_heads + head);
            Stretch shared = {0, all, prompts->columns[p], of.keys, of.values};
            Asking a = {size, 1.0f / sqrtf((float)size), queries, .out = sums};
            memset(sums, 0, all * size * 4);
            for (long i = 0; i < all; i++) {
                long query = (now.first + i / these) * asked->heads + first + i % these;
                memcpy(queries + i * size, asked->q + query * size, size * 2);
                a.most[i] = -3e38f, a.total[i] = 0;
            }
            for (long i = 0; i < now.count; i++) mine[i].first = i * these, mine[i].count = these;
            if (shape != all) tiles_of(shape = all);
            see(&a, &shared, 1, NULL, 0);
            if (shape != these) tiles_of(shape = these);
            see(&a, mine, now.count, ahead, first == head * group ? then.count : 0);
            for (long i = 0; i < all; i++) {
                long query = (now.first + i / these) * asked->heads + first + i % these;
                for (long d = 0; d < size; d += LANES)
                    store_bf16(asked->out + query * size + d, load_f32(sums + i * size + d) / a.total[i]);
            }
        }
        Stretch *last = mine;
        mine = ahead, ahead = last;
    }
    tiles_off();
}

void attend_cached_tiles(long rows, const Asked *asked, const Cached *prompts, const Cached *own) {
    Run run[rows + 1];
    long runs = runs_of(rows, asked->heads / own->kv_heads, prompts->slot, run), taken = 0;
#pragma omp parallel
    team_attend(asked, prompts, own, run, runs, &taken);
}

#endif
