/* attention.c in bfloat16 on tiles (tiles.h). Scores have keys as rows and 16 queries as columns; what they weigh is
   added up with the numbers of a head as rows and the queries as columns. So a query's softmax lies within a lane.

   A task is some blocks of 16 queries of one key head, keys pass it by 64 at a time: what is laid out of them serves
   all its blocks. The gradient computes each score once: a task adds up those of its keys for itself. It writes them
   where it alone has its sequence's queries; others are summed over tasks at the end, always in the same order. */
#include "attention.h"
#include "tiles.h"

#define FORWARD_BLOCKS 16 /* of a task */
#define BACKWARD_BLOCKS 16
#define BACKWARD_TASKS 4 /* of a sequence and key head, at most: each has room for the gradients of all its keys */
#define QUERIES 64       /* whose weights are held at once for the gradients of keys */

#ifndef __AMX_BF16__

int attend_forward_tiles(long sequences, Attention a, const int64_t *shared, const int64_t *shared_columns,
                         const int64_t *own, const int64_t *own_columns, bf16 *o, float *lse) {
    return 1;
}
int attend_backward_tiles(long sequences, Attention a, const int64_t *shared, const int64_t *shared_columns,
                          const int64_t *own, const int64_t *own_columns, const bf16 *o, const float *lse,
                          const bf16 *dout, long tokens, float *dq, float *dk, float *dv) {
    return 1;
}

#else

typedef struct {
    long sequence, head, first, end; /* blocks */
} Task;

/* Tasks of at least `size` blocks, at most `most` of a sequence and head, later queries first: they see more. */
static Task *tasks_of(long sequences, const int64_t *columns, const Attention *a, long size, long most, long *count) {
    long total = 0, at = 0;
    for (int pass = 0; pass < 2; pass++) {
        Task *tasks = pass ? malloc(sizeof(Task) * (total + 1)) : NULL;
        if (pass && !tasks) return NULL;
        for (long s = 0; s < sequences; s++) {
            long blocks = pieces(columns[s] * a->group, LANES), each = most ? pieces(blocks, most) : size;
            if (each < size) each = size;
            for (long h = 0; h < a->kv_heads; h++)
                for (long first = (pieces(blocks, each) - 1) * each; first >= 0; first -= each, at += pass, total += !pass)
                    if (pass) tasks[at] = (Task){s, h, first, least(first + each, blocks)};
        }
        if (pass) {
            *count = total;
            return tasks;
        }
    }
    return NULL;
}

/* Rows of tiles in memory: 16 numbers further down the next tile begins. */
typedef struct {
    const char *start;
    long stride; /* bytes */
} Rows;

/* `count` of up to 64 rows, `stride` numbers apart: where they lie, or a copy with zeros behind it. */
static Rows rows_at(const bf16 *x, long count, long stride, long size, bf16 *copy) {
    if (count == KEYS) return (Rows){(const char *)x, stride * 2};
    for (long i = 0; i < count; i++) memcpy(copy + i * size, x + i * stride, size * 2);
    memset(copy + count * size, 0, (KEYS - count) * size * 2);
    return (Rows){(const char *)copy, size * 2};
}

/* Numbers of up to 64 rows, `stride` apart, as rows of tiles: out [size / 16, 2 steps, TILE]. */
static void numbers_as_rows(const bf16 *x, long count, long stride, long size, uint32_t *out) {
    for (long s = 0; s * STEP_NUMBERS < count; s++)
        for (long d = 0; d < size; d += 2 * LANES) {
            long rows[STEP_NUMBERS];
            __m512i tiles[2][LANES];
            for (long i = 0; i < STEP_NUMBERS; i++) rows[i] = (s * STEP_NUMBERS + i) * stride + d;
            pairs_of_rows(0, x, rows, count - s * STEP_NUMBERS, 2 * LANES, tiles);
            for (int half = 0; half < 2; half++) {
                uint32_t *to = out + ((d / LANES + half) * 2 + s) * TILE;
                transpose(tiles[half]);
                for (int i = 0; i < LANES; i++) _mm512_store_si512(to + i * LANES, tiles[half][i]);
            }
        }
}

/* out [64, 16]: the first `count` rows times 16 columns; whole pairs of tiles are written. */
INLINE void scores_of(Rows rows, long count, const uint32_t *columns, long steps, float *out) {
    tiles_read_memory();
    for (long j = 0; j < count; j += 2 * LANES) {
        const char *one = rows.start + j * rows.stride, *two = one + LANES * rows.stride;
        _tile_zero(0);
        _tile_zero(1);
        for (long s = 0; s < steps; s++) {
            _tile_loadd(4, one + 64 * s, rows.stride);
            _tile_loadd(5, two + 64 * s, rows.stride);
            _tile_loadd(6, columns + s * TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
        }
        _tile_stored(0, out + j * LANES, 64);
        _tile_stored(1, out + (j + LANES) * LANES, 64);
    }
}

/* sums [size / 16, TILE] += numbers [size / 16, 2 steps, TILE] times columns [steps, TILE]. */
INLINE void add_weighted(const uint32_t *numbers, const uint32_t *columns, long steps, long size, float *sums) {
    tiles_read_memory();
    for (long d = 0; d < size / LANES; d += 2) {
        _tile_loadd(0, sums + d * TILE, 64);
        _tile_loadd(1, sums + (d + 1) * TILE, 64);
        for (long s = 0; s < steps; s++) {
            _tile_loadd(4, numbers + (d * 2 + s) * TILE, 64);
            _tile_loadd(5, numbers + (d * 2 + 2 + s) * TILE, 64);
            _tile_loadd(6, columns + s * TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 6);
        }
        _tile_stored(0, sums + d * TILE, 64);
        _tile_stored(1, sums + (d + 1) * TILE, 64);
    }
}

/* As pairs of bfloat16. */
INLINE __m512i pairs_of_keys(vf one, vf two) {
    const __m512i side_by_side = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                                  21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(side_by_side, (__m512i)_mm512_cvtne2ps_pbh((__m512)two, (__m512)one));
}

/* So many bytes from p on come nearer. */
INLINE void will_write(const void *p, long bytes) {
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)p + i, 1, 2);
}

/* The numbers of 16 rows, a row in each lane. */
static void rows_across(const void *x, const Queries *lanes, long size, uint32_t *out) {
    long rows[LANES];
    for (int i = 0; i < LANES; i++) rows[i] = lanes->row[i] / 2;
    across(x, rows, size / 2, (word *)out);
}

/* 16 queries and what they have seen so far. */
typedef struct {
    Queries lanes;
    vf most, total;
    uint32_t *q; /* [size / 32, TILE], columns */
    float *out;  /* [size / 16, TILE], numbers by queries */
} Block;

/* `count` keys from `start` on of a stretch; own: those after a lane's own position are hidden. */
static void see(const Attention *a, Block *b, Rows keys, const uint32_t *values, long start, long count, int own) {
    float scores[KEYS * LANES] __attribute__((aligned(64)));
    uint32_t weights[KEYS / 2 * LANES] __attribute__((aligned(64)));
    long steps = pieces(count, STEP_NUMBERS);
    scores_of(keys, count, b->q, a->size / STEP_NUMBERS, scores);
    int hides = own && start + count - 1 > b->lanes.position[0];
    __m512 most = _mm512_set1_ps(-INFINITY); /* a positive scale leaves the largest what it is */
    for (long j = 0; j < count; j++) {
        vf score = load_f32(scores + j * LANES);
        if (hides) {
            score = pick(b->lanes.position < (int32_t)(start + j), splat(-INFINITY), score);
            store_f32(scores + j * LANES, score);
        }
        most = _mm512_max_ps((__m512)score, most);
    }
    vf top = (vf)_mm512_max_ps((__m512)((vf)most * a->scale), (__m512)b->most);
    vf shrink = vexp(b->most - top), totals[LANES] = {{0}}; /* of keys that are 16 apart, as in cache_tiles.c */
    for (long j = 0; j < count; j += 2) {
        vf one = vexp(load_f32(scores + j * LANES) * a->scale - top), two = {0};
        if (j + 1 < count) two = vexp(load_f32(scores + (j + 1) * LANES) * a->scale - top);
        totals[j % LANES] += one, totals[j % LANES + 1] += two;
        _mm512_store_si512(weights + j / 2 * LANES, pairs_of_keys(one, two));
    }
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++) totals[i] += totals[i + step];
    memset(weights + (count + 1) / 2 * LANES, 0, (steps * LANES - (count + 1) / 2) * 64);
    if (_mm512_cmpneq_ps_mask((__m512)shrink, _mm512_set1_ps(1)))
        for (long d = 0; d < a->size; d++) store_f32(b->out + d * LANES, load_f32(b->out + d * LANES) * shrink);
    add_weighted(values, weights, steps, a->size, b->out);
    b->most = top, b->total = b->total * shrink + totals[0];
}

/* sums [size / 16, TILE], numbers by 16 rows, as those rows: `put` says what becomes of 16 numbers of lane i. */
#define FOR_EACH_ROW(sums, size, row, put)                                                                    \
    for (long d = 0; d < (size); d += LANES) {                                                                \
        __m512i square[LANES];                                                                                \
        for (int i = 0; i < LANES; i++) square[i] = _mm512_loadu_si512((sums) + (d + i) * LANES);             \
        transpose(square);                                                                                    \
        for (int i = 0; i < LANES; i++) {                                                                     \
            vf row = (vf)square[i];                                                                           \
            put;                                                                                              \
        }                                                                                                     \
    }

static void finish(const Attention *a, const Block *b, bf16 *o, float *lse) {
    for (int i = 0; i < LANES; i++)
        if (b->lanes.mine[i]) lse[b->lanes.statistic[i]] = b->most[i] + logf(b->total[i]);
    vf inverse = 1.0f / b->total;
    for (long d = 0; d < a->size; d++) { /* x / total, to the bit, without a division (Markstein, 1990) */
        vf x = load_f32(b->out + d * LANES), y = x * inverse;
        store_f32(b->out + d * LANES, fused(fused(-y, b->total, x), inverse, y));
    }
    FOR_EACH_ROW(b->out, a->size, row, if (b->lanes.mine[i]) store_bf16(o + b->lanes.row[i] + d, row))
}

int attend_forward_tiles(long sequences, Attention a, const int64_t *shared, const int64_t *shared_columns,
                         const int64_t *own, const int64_t *own_columns, bf16 *o, float *lse) {
    long count, size = a.size, stride = a.kv_heads * size;
    Task *tasks = tasks_of(sequences, own_columns, &a, FORWARD_BLOCKS, 0, &count);
    int failed = !tasks;
#pragma omp parallel if (!failed)
    {
        float *room = failed ? NULL : aligned_alloc(64, size * (FORWARD_BLOCKS * (32 + 64) + 128 + 128));
        uint32_t *values = (uint32_t *)room + FORWARD_BLOCKS * size * 24;
        bf16 *copy = (bf16 *)(values + size * 32);
        if (!room) failed = 1;
        tiles_on();
#pragma omp for schedule(dynamic, 1)
        for (long t = 0; t < count; t++) {
            if (!room) continue;
            Task task = tasks[t];
            Block blocks[FORWARD_BLOCKS];
            long s = task.sequence, n = task.end - task.first;
            for (long i = 0; i < n; i++) {
                Block *b = blocks + i;
                *b = (Block){queries(&a, own[s], own_columns[s], task.head, task.first + i), splat(-3e38f), splat(0)};
                b->q = (uint32_t *)room + i * size * 24, b->out = (float *)b->q + size * 8;
                for (int l = 0; l < LANES; l++) will_write(o + b->lanes.row[l], size * 2);
                rows_across(a.q, &b->lanes, size, b->q);
                memset(b->out, 0, size * 64);
            }
            for (int is_own = 0; is_own < 2; is_own++) {
                long first = is_own ? own[s] : shared[s], columns = is_own ? blocks[n - 1].lanes.last + 1 : shared_columns[s];
                for (long start = 0; start < columns; start += KEYS) {
                    long have = least(columns - start, KEYS);
                    const bf16 *k = (const bf16 *)a.k + (first + start) * stride + task.head * size;
                    const bf16 *v = (const bf16 *)a.v + (first + start) * a.v_stride + task.head * size;
                    Rows keys = rows_at(k, have, stride, size, copy);
                    numbers_as_rows(v, have, a.v_stride, size, values);
                    for (long i = 0; i < n; i++) {
                        long seen = is_own ? least(have, blocks[i].lanes.last + 1 - start) : have;
                        if (seen > 0) see(&a, blocks + i, keys, values, start, seen, is_own);
                    }
                }
            }
            for (long i = 0; i < n; i++) finish(&a, blocks + i, o, lse);
        }
        tiles_off();
        free(room);
    }
    free(tasks);
    return failed;
}

/* 16 queries and what they send back. */
typedef struct {
    Queries lanes;
    vf lse, delta;
    uint32_t *q, *dout; /* [size / 32, TILE], columns */
    float *dq;          /* [size / 16, TILE], numbers by queries */
} Source;

static float product_of_rows(const bf16 *x, const bf16 *y, long size) {
    vf dots = {0};
    for (long d = 0; d < size; d += LANES) dots += load_bf16(x + d) * load_bf16(y + d);
    return sum(dots);
}

/* Up to 64 keys as they are needed, and where their gradients are added up. */
typedef struct {
    Rows keys, values;
    const uint32_t *numbers; /* of the keys, [size / 16, 2, TILE] */
    long start, count;
    int own;
    float *dk, *dv; /* [4, size / 16, TILE], keys by numbers */
} Seen;

/* The weights of a block's keys and the gradients of their scores, [64, QUERIES] each, and what follows for the
   queries. */
static void weigh(const Attention *a, Source *b, const Seen *c, bf16 *weights, bf16 *of_scores) {
    float scores[KEYS * LANES] __attribute__((aligned(64))), wanted[KEYS * LANES] __attribute__((aligned(64)));
    uint32_t pairs[KEYS / 2 * LANES] __attribute__((aligned(64)));
    long count = b && c->own ? least(c->count, b->lanes.last + 1 - c->start) : b ? c->count : 0;
    if (count < 0) count = 0;
    for (long j = count; j < KEYS; j++)
        memset(weights + j * QUERIES, 0, 32), memset(of_scores + j * QUERIES, 0, 32);
    if (!count) return;
    long size = a->size, steps = pieces(count, STEP_NUMBERS);
    scores_of(c->keys, count, b->q, size / STEP_NUMBERS, scores);
    scores_of(c->values, count, b->dout, size / STEP_NUMBERS, wanted);
    int hides = c->own && c->start + count - 1 > b->lanes.position[0];
    for (long j = 0; j < count; j += 2) {
        vf p[2] = {{0}}, d[2] = {{0}};
        for (int i = 0; i < 2 && j + i < count; i++) {
            p[i] = vexp(load_f32(scores + (j + i) * LANES) * a->scale - b->lse);
            if (hides) p[i] = pick(b->lanes.position < (int32_t)(c->start + j + i), splat(0), p[i]);
            d[i] = p[i] * (load_f32(wanted + (j + i) * LANES) - b->delta);
            _mm256_storeu_si256((__m256i *)(weights + (j + i) * QUERIES), halves(p[i]));
            _mm256_storeu_si256((__m256i *)(of_scores + (j + i) * QUERIES), halves(d[i]));
        }
        _mm512_store_si512(pairs + j / 2 * LANES, pairs_of_keys(d[0], d[1]));
    }
    memset(pairs + (count + 1) / 2 * LANES, 0, (steps * LANES - (count + 1) / 2) * 64);
    add_weighted(c->numbers, pairs, steps, size, b->dq);
}

/* dv = weights^T dout, dk = of_scores^T q, or added to what is there where `add`: of `steps` times 32 queries, whose pairs
   lie in [steps, size / 16, TILE]. */
static void add_to_keys(const Seen *c, const bf16 *weights, const bf16 *of_scores, const uint32_t *q, const uint32_t *dout,
                        long steps, int add, long size) {
    tiles_read_memory();
    for (long j = 0; j < c->count; j += LANES)
        for (long d = 0; d < size; d += 2 * LANES) {
            float *dk = c->dk + j * size + d * LANES, *dv = c->dv + j * size + d * LANES;
            if (add) {
                _tile_loadd(0, dv, 64);
                _tile_loadd(1, dv + TILE, 64);
                _tile_loadd(2, dk, 64);
                _tile_loadd(3, dk + TILE, 64);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (long s = 0; s < steps; s++) {
                long of_queries = (s * size + d) / LANES * TILE;
                _tile_loadd(4, weights + j * QUERIES + s * STEP_NUMBERS, QUERIES * 2);
                _tile_loadd(6, dout + of_queries, 64);
                _tile_loadd(7, dout + of_queries + TILE, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, of_scores + j * QUERIES + s * STEP_NUMBERS, QUERIES * 2);
                _tile_loadd(6, q + of_queries, 64);
                _tile_loadd(7, q + of_queries + TILE, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, dv, 64);
            _tile_stored(1, dv + TILE, 64);
            _tile_stored(2, dk, 64);
            _tile_stored(3, dk + TILE, 64);
        }
}

/* Pairs of the rows of two blocks, or of one: out [size / 16, TILE]. */
static void pairs_of_blocks(const bf16 *x, const Source *one, const Source *two, long size, uint32_t *out) {
    long rows[STEP_NUMBERS];
    for (long d = 0; d < size; d += 2 * LANES, out += 2 * TILE) {
        __m512i tiles[2][LANES];
        for (int i = 0; i < LANES; i++) {
            rows[i] = one->lanes.row[i] + d;
            rows[LANES + i] = (two ? two : one)->lanes.row[i] + d;
        }
        pairs_of_rows(0, x, rows, two ? STEP_NUMBERS : LANES, 2 * LANES, tiles);
        for (int i = 0; i < 2 * LANES; i++) _mm512_store_si512(out + i * LANES, tiles[i / LANES][i % LANES]);
    }
}

/* Sums of gradients, keys by numbers, of the first `count` keys of a part: into rows `stride` apart, or added to them. */
static void put_part(const float *part, long count, long size, long stride, float scale, int add, float *out) {
    for (long j = 0; j < count; j++, out += stride)
        for (long d = 0; d < size; d += LANES) {
            vf value = load_f32(part + j / LANES * LANES * size + d * LANES + j % LANES * LANES) * scale;
            store_f32(out + d, add ? load_f32(out + d) + value : value);
        }
}

static long keys_of(const Task *t, const Attention *a, const int64_t *own_columns) {
    return least(own_columns[t->sequence], (t->end * LANES - 1) / a->group + 1);
}

/* Whether a task has all queries of its sequence and head. */
static int is_whole(const Task *t, const Attention *a, const int64_t *own_columns) {
    return t->first == 0 && t->end * LANES >= own_columns[t->sequence] * a->group;
}

/* Numbers of dk, or of dv, for so many keys. */
static long room_of(long keys, long size) { return pieces(keys, LANES) * LANES * size; }

int attend_backward_tiles(long sequences, Attention a, const int64_t *shared, const int64_t *shared_columns,
                          const int64_t *own, const int64_t *own_columns, const bf16 *o, const float *lse,
                          const bf16 *dout, long tokens, float *dq, float *dk, float *dv) {
    long count, most = 0, numbers = 0, room_of_whole = 0, size = a.size, stride = a.kv_heads * size;
    Task *tasks = tasks_of(sequences, own_columns, &a, BACKWARD_BLOCKS, BACKWARD_TASKS, &count);
    long *owner = malloc(sizeof(long) * (tokens + 1)), *next = malloc(sizeof(long) * (sequences + 1));
    long *guests = malloc(sizeof(long) * (sequences + 1)), *first_task = malloc(sizeof(long) * (sequences * a.kv_heads + 1));
    long *place = tasks ? malloc(sizeof(long) * (count + 1)) : NULL; /* of each task's part that is summed up at the end */
    int failed = !tasks || !owner || !next || !guests || !first_task || !place;
    if (!failed) {
        guests_of(sequences, shared, shared_columns, own, own_columns, tokens, owner, guests, next);
        for (long i = 0; i <= sequences * a.kv_heads; i++) first_task[i] = -1;
        for (long t = count; t-- > 0;) first_task[tasks[t].sequence * a.kv_heads + tasks[t].head] = t;
        for (long t = 0; t < count; t++) {
            long keys = keys_of(tasks + t, &a, own_columns), whole = is_whole(tasks + t, &a, own_columns);
            place[t] = numbers;
            numbers += 2 * room_of(shared_columns[tasks[t].sequence], size) + (whole ? 0 : 2 * room_of(keys, size));
            if (whole && room_of(keys, size) > room_of_whole) room_of_whole = room_of(keys, size);
            if (tasks[t].end - tasks[t].first > most) most = tasks[t].end - tasks[t].first;
        }
    }
    float *parts = failed ? NULL : aligned_alloc(64, numbers * 4 + 64);
    if (!parts) failed = 1;
#pragma omp parallel if (!failed)
    {
        /* A block has q, dout and their pairs in two bytes a number, dq in four. */
        float *room = failed ? NULL : aligned_alloc(64, size * ((most + 1) * (32 * 4 + 64) + 128 + 2 * 128) + room_of_whole * 8);
        uint32_t *of_keys = (uint32_t *)room + (most + 1) * size * 48;
        bf16 *copies = (bf16 *)(of_keys + size * 32);
        float *of_whole = (float *)(copies + 2 * KEYS * size);
        bf16 weights[KEYS * QUERIES] __attribute__((aligned(64))), of_scores[KEYS * QUERIES] __attribute__((aligned(64)));
        Source *sources = failed ? NULL : aligned_alloc(64, sizeof(Source) * (most + 1));
        int able = room && sources;
        if (!able) failed = 1;
#pragma omp for schedule(static)
        for (long t = 0; t < tokens; t++)
            if (owner[t] < 0) no_gradient(&a, t, dq, dk, dv);
        tiles_on();
#pragma omp for schedule(dynamic, 1)
        for (long t = 0; t < count; t++) {
            if (!able) continue;
            Task task = tasks[t];
            long s = task.sequence, n = task.end - task.first, keys = keys_of(&task, &a, own_columns);
            uint32_t *q_pairs = (uint32_t *)room + (most + 1) * size * 32, *dout_pairs = q_pairs + (most + 1) * size * 8;
            for (long i = 0; i < n; i++) {
                Source *b = sources + i;
                b->lanes = queries(&a, own[s], own_columns[s], task.head, task.first + i);
                b->q = (uint32_t *)room + i * size * 32, b->dout = b->q + size * 8, b->dq = (float *)(b->dout + size * 8);
                rows_across(a.q, &b->lanes, size, b->q), rows_across(dout, &b->lanes, size, b->dout);
                for (int l = 0; l < LANES; l++) will_write(dq + b->lanes.row[l], size * 4);
                memset(b->dq, 0, size * 64);
                for (int l = 0; l < LANES; l++) { /* a lane that fills up weighs nothing */
                    b->lse[l] = b->lanes.mine[l] ? lse[b->lanes.statistic[l]] : INFINITY;
                    b->delta[l] = product_of_rows(o + b->lanes.row[l], dout + b->lanes.row[l], size);
                }
            }
            for (long i = 0; i < n; i += 2) {
                const Source *two = i + 1 < n ? sources + i + 1 : NULL;
                pairs_of_blocks(a.q, sources + i, two, size, q_pairs + i * size * 8);
                pairs_of_blocks(dout, sources + i, two, size, dout_pairs + i * size * 8);
            }
            int whole = is_whole(&task, &a, own_columns);
            for (long j = 0, at = own[s] * stride + task.head * size; whole && j < keys; j++, at += stride)
                will_write(dk + at, size * 4), will_write(dv + at, size * 4);
            for (int is_own = 0; is_own < 2; is_own++) {
                long first = is_own ? own[s] : shared[s], columns = is_own ? keys : shared_columns[s];
                float *part = parts + place[t] + (is_own ? 2 * room_of(shared_columns[s], size) : 0);
                if (is_own && whole) part = of_whole;
                Seen c = {.own = is_own, .numbers = of_keys, .dk = part, .dv = part + room_of(columns, size)};
                for (; c.start < columns; c.start += KEYS, c.dk += KEYS * size, c.dv += KEYS * size) {
                    const bf16 *k = (const bf16 *)a.k + (first + c.start) * stride + task.head * size;
                    const bf16 *v = (const bf16 *)a.v + (first + c.start) * a.v_stride + task.head * size;
                    c.count = least(columns - c.start, KEYS);
                    c.keys = rows_at(k, c.count, stride, size, copies);
                    c.values = rows_at(v, c.count, a.v_stride, size, copies + KEYS * size);
                    numbers_as_rows(k, c.count, stride, size, of_keys);
                    for (long i = 0, add = 0; i < n; i += QUERIES / LANES) {
                        long these = least(n - i, QUERIES / LANES), filled = pieces(these, 2) * 2;
                        if (is_own && sources[i + these - 1].lanes.last < c.start) continue;
                        for (long j = 0; j < filled; j++)
                            weigh(&a, j < these ? sources + i + j : NULL, &c, weights + j * LANES, of_scores + j * LANES);
                        add_to_keys(&c, weights, of_scores, q_pairs + i * size * 8, dout_pairs + i * size * 8, filled / 2, add, size);
                        add = 1;
                    }
                }
            }
            if (whole) {
                long at = own[s] * stride + task.head * size;
                put_part(of_whole, keys, size, stride, a.scale, 0, dk + at);
                put_part(of_whole + room_of(keys, size), keys, size, stride, 1, 0, dv + at);
            }
            for (long i = 0; i < n; i++) {
                const Source *b = sources + i;
                FOR_EACH_ROW(b->dq, size, row, if (b->lanes.mine[i]) store_f32(dq + b->lanes.row[i] + d, row * a.scale))
            }
        }
        tiles_off();
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < sequences * a.kv_heads; i++) {
            if (!able) continue;
            long s = i / a.kv_heads, head = i % a.kv_heads, at = own[s] * stride + head * size;
            for (long guest = s; guest >= 0; guest = guest == s ? guests[s] : next[guest])
                for (long t = first_task[guest * a.kv_heads + head]; t >= 0 && t < count; t++) {
                    if (tasks[t].sequence != guest || tasks[t].head != head) break;
                    long seen = room_of(shared_columns[guest], size), keys = keys_of(tasks + t, &a, own_columns);
                    const float *part = parts + place[t], *mine = part + 2 * seen;
                    if (guest != s) {
                        long from = at + (shared[guest] - own[s]) * stride;
                        put_part(part, shared_columns[guest], size, stride, a.scale, 1, dk + from);
                        put_part(part + seen, shared_columns[guest], size, stride, 1, 1, dv + from);
                    } else if (!is_whole(tasks + t, &a, own_columns)) {
                        /* The first of a sequence's tasks has seen all its keys. */
                        int add = t != first_task[i];
                        put_part(mine, keys, size, stride, a.scale, add, dk + at);
                        put_part(mine + room_of(keys, size), keys, size, stride, 1, add, dv + at);
                    }
                }
        }
        free(room), free(sources);
    }
    free(tasks), free(owner), free(next), free(guests), free(first_task), free(place), free(parts);
    return failed;
}

#endif
