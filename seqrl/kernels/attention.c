/* Causal attention over flat tokens, in which several sequences may begin with the same, shared tokens;
   forward and backward, without ever holding a matrix of scores.

   Sequence s sees the tokens `shared[s]` .. + shared_columns[s] (computed elsewhere in the row, by the first of
   its group) and then its own, `own[s]` .. + own_columns[s], of which each sees those up to itself. Scores
   have 16 queries in the lanes of a vector and keys one by one; or, for the gradients of keys and values, 16
   keys in the lanes and queries one by one. What they weigh is added up with numbers of a head in the lanes.
   So nothing is ever added up across lanes.

   q, o, dout: [tokens, heads, size], k: [tokens, kv_heads, size]; v likewise, a token's starting every v_stride
   numbers. lse, delta: [tokens, heads] float32; dq, dk, dv: like q and k, float32. size is a multiple of 32.
   Products of bfloat16 are of pairs (words.h); the weights of values are rounded to it for them. */
#include "attention.h"
#include "tiles.h"

/* Sums that are held in registers: of a product, and of what rows weigh. */
#ifdef __AVX512F__
#define STEP 12
#define HELD 16
#else
#define STEP 8
#define HELD 8
#endif

typedef struct {
    long sequence, head, block;
} Task;

/* out[j] = scale times the sum over d of across[d] * rows[j][d] for `count` rows, each `stride` words after the
   one before. Each is added up in the order of d, however many rows there are. */
INLINE void products(int pairs, const word *across, const uint32_t *rows, long count, long stride, long words,
                     float scale, vf *out) {
    for (long j = 0; j < count; j += STEP) {
        const uint32_t *row[STEP];
        vf sums[STEP] = {{0}};
        for (int i = 0; i < STEP; i++) row[i] = rows + (j + i < count ? j + i : count - 1) * stride;
        for (long d = 0; d < words; d++)
            for (int i = 0; i < STEP; i++) sums[i] = multiply(pairs, across[d], splat_word(row[i][d]), sums[i]);
        for (int i = 0; i < STEP && j + i < count; i++) out[j + i] = sums[i] * scale;
    }
}

/* out[i] += sum over j of lane i of weights[j] times rows[j] [size], in the order of j; rows lie `stride` numbers
   apart. out: [16, size]. */
INLINE void accumulate(int pairs, const vf *weights, const void *rows, long count, long stride, long size, float *out) {
    word words[KEYS];
    for (long j = 0; j < count; j += 1 + pairs)
        words[j >> pairs] = of_vectors(pairs, weights[j], j + 1 < count ? weights[j + 1] : (vf){0});
    for (long d = 0; d < size; d += LANES)
        for (int half = 0; half < LANES; half += HELD) {
            float *sums = out + half * size + d;
            vf held[HELD];
            for (int i = 0; i < HELD; i++) held[i] = load_f32(sums + i * size);
            for (long j = 0; j < count; j += 1 + pairs) {
                const uint32_t *weight = (const uint32_t *)(words + (j >> pairs)) + half;
                word row = of_rows(pairs, at(pairs, rows, j * stride + d),
                                   j + 1 < count ? at(pairs, rows, (j + 1) * stride + d) : NULL);
                for (int i = 0; i < HELD; i++) held[i] = multiply(pairs, row, splat_word(weight[i]), held[i]);
            }
            for (int i = 0; i < HELD; i++) store_f32(sums + i * size, held[i]);
        }
}

/* Row i of x [16, size], times scale, to where rows[i] says, for the lanes that are mine. */
static void put(const float *x, const long *rows, const int *mine, long size, float scale, float *out) {
    for (int i = 0; i < LANES; i++)
        for (long d = 0; mine[i] && d < size; d++) out[rows[i] + d] = x[i * size + d] * scale;
}

/* The rows of 16 lanes, each `size` numbers, across them. */
INLINE void rows_across(int pairs, const void *x, const long *rows, long size, word *out) {
    long in_words[LANES];
    for (int i = 0; i < LANES; i++) in_words[i] = rows[i] >> pairs;
    across(x, in_words, size >> pairs, out);
}

static Task *blocks_of(long sequences, const int64_t *columns, long per_column, long kv_heads, long *count) {
    long total = 0, at = 0;
    for (long s = 0; s < sequences; s++) total += (columns[s] * per_column + LANES - 1) / LANES * kv_heads;
    Task *tasks = malloc(sizeof(Task) * (total + 1));
    *count = total;
    if (!tasks) return NULL;
    for (long s = 0; s < sequences; s++)
        for (long h = 0; h < kv_heads; h++)
            for (long b = (columns[s] * per_column + LANES - 1) / LANES; b-- > 0;) tasks[at++] = (Task){s, h, b};
    return tasks;
}

/* A stretch of keys for 16 queries; own: those after a lane's own position are hidden. */
INLINE void forward_stretch(int pairs, const Attention *a, const Queries *lanes, const word *q, long first, long count,
                            long head, int own, vf *most, vf *total, float *out) {
    long stride = a->kv_heads * a->size;
    vf scores[KEYS];
    for (long start = 0; start < count; start += KEYS) {
        long n = count - start < KEYS ? count - start : KEYS;
        const void *k = at(pairs, a->k, (first + start) * stride + head * a->size);
        products(pairs, q, k, n, stride >> pairs, a->size >> pairs, a->scale, scores);
        vf top = *most;
        for (long j = 0; j < n; j++) {
            if (own) scores[j] = pick(lanes->position < (int32_t)(start + j), splat(-INFINITY), scores[j]);
            top = larger(scores[j], top);
        }
        vf shrink = vexp(*most - top);
        vf sums = *total * shrink;
        for (long j = 0; j < n; j++) sums += scores[j] = vexp(scores[j] - top);
        for (int i = 0; i < LANES; i++)
            for (long d = 0; d < a->size; d++) out[i * a->size + d] *= shrink[i];
        accumulate(pairs, scores, at(pairs, a->v, (first + start) * a->v_stride + head * a->size), n, a->v_stride,
                   a->size, out);
        *most = top, *total = sums;
    }
}

/* Returns nonzero without memory. */
INLINE int forward(int pairs, long sequences, Attention a, const int64_t *shared, const int64_t *shared_columns,
                   const int64_t *own, const int64_t *own_columns, void *o, float *lse) {
    long count, size = a.size;
    Task *tasks = blocks_of(sequences, own_columns, a.group, a.kv_heads, &count);
    int failed = !tasks;
#pragma omp parallel if (tasks != NULL)
    {
        word *qs = aligned_alloc(64, 2 * size * sizeof(vf));
        float *out = (float *)(qs + size);
        if (!qs) failed = 1;
#pragma omp for schedule(dynamic, 4)
        for (long t = 0; t < count; t++) {
            if (!qs || !tasks) continue;
            long s = tasks[t].sequence, head = tasks[t].head;
            Queries lanes = queries(&a, own[s], own_columns[s], head, tasks[t].block);
            rows_across(pairs, a.q, lanes.row, size, qs);
            vf most = splat(-3e38f), total = {0};
            memset(out, 0, size * sizeof(vf));
            forward_stretch(pairs, &a, &lanes, qs, shared[s], shared_columns[s], head, 0, &most, &total, out);
            forward_stretch(pairs, &a, &lanes, qs, own[s], lanes.last + 1, head, 1, &most, &total, out);
            for (int i = 0; i < LANES; i++) {
                if (!lanes.mine[i]) continue;
                for (long d = 0; d < size; d += LANES)
                    store(pairs, o, lanes.row[i] + d, load_f32(out + i * size + d) / total[i]);
                lse[lanes.statistic[i]] = most[i] + logf(total[i]);
            }
        }
        free(qs);
    }
    free(tasks);
    return failed;
}

INLINE void backward_stretch(int pairs, const Attention *a, const Queries *lanes, const word *q, const word *dout,
                             vf lse, vf delta, long first, long count, long head, int own, float *dq) {
    long stride = a->kv_heads * a->size;
    vf scores[KEYS], wanted[KEYS];
    for (long start = 0; start < count; start += KEYS) {
        long n = count - start < KEYS ? count - start : KEYS;
        const void *k = at(pairs, a->k, (first + start) * stride + head * a->size);
        const void *v = at(pairs, a->v, (first + start) * a->v_stride + head * a->size);
        products(pairs, q, k, n, stride >> pairs, a->size >> pairs, a->scale, scores);
        products(pairs, dout, v, n, a->v_stride >> pairs, a->size >> pairs, 1, wanted);
        for (long j = 0; j < n; j++) {
            vf p = vexp(scores[j] - lse);
            if (own) p = pick(lanes->position < (int32_t)(start + j), splat(0), p);
            scores[j] = p * (wanted[j] - delta);
        }
        accumulate(pairs, scores, k, n, stride, a->size, dq);
    }
}

/* 16 keys in the lanes, for the queries of tokens first .. + count and the heads of the group. */
INLINE void keys_stretch(int pairs, const Attention *a, const word *k, const word *v, vi position, const void *dout,
                         const float *lse, const float *delta, long first, long count, long head, float *dk,
                         float *dv) {
    long stride = a->heads * a->size;
    vf scores[KEYS], wanted[KEYS];
    for (long h = head * a->group; h < (head + 1) * a->group; h++)
        for (long start = 0; start < count; start += KEYS) {
            long n = count - start < KEYS ? count - start : KEYS, from = (first + start) * stride + h * a->size;
            const void *q = at(pairs, a->q, from), *d = at(pairs, dout, from);
            products(pairs, k, q, n, stride >> pairs, a->size >> pairs, a->scale, scores);
            products(pairs, v, d, n, stride >> pairs, a->size >> pairs, 1, wanted);
            for (long j = 0; j < n; j++) {
                long statistic = (first + start + j) * a->heads + h;
                vf p = pick(position > (int32_t)(start + j), splat(0), vexp(scores[j] - lse[statistic]));
                scores[j] = p;
                wanted[j] = p * (wanted[j] - delta[statistic]);
            }
            accumulate(pairs, scores, d, n, stride, a->size, dv);
            accumulate(pairs, wanted, q, n, stride, a->size, dk);
        }
}

/* Returns nonzero without memory. */
INLINE int backward(int pairs, long sequences, Attention a, const int64_t *shared, const int64_t *shared_columns,
                    const int64_t *own, const int64_t *own_columns, const void *o, const float *lse, const void *dout,
                    float *delta, long tokens, float *dq, float *dk, float *dv) {
    long query_tasks, key_tasks, size = a.size;
    Task *of_queries = blocks_of(sequences, own_columns, a.group, a.kv_heads, &query_tasks);
    Task *of_keys = blocks_of(sequences, own_columns, 1, a.kv_heads, &key_tasks);
    long *owner = malloc(sizeof(long) * (tokens + 1)), *next = malloc(sizeof(long) * (sequences + 1));
    long *guests = malloc(sizeof(long) * (sequences + 1));
    int failed = !of_queries || !of_keys || !owner || !next || !guests;
    if (!failed) guests_of(sequences, shared, shared_columns, own, own_columns, tokens, owner, guests, next);
    for (long t = 0; t < tokens && !failed; t++)
        if (owner[t] < 0) no_gradient(&a, t, dq, dk, dv);
#pragma omp parallel if (!failed)
    {
        word *one = failed ? NULL : aligned_alloc(64, 4 * size * sizeof(vf)), *other = one + size;
        float *first_sums = (float *)(other + size), *second_sums = first_sums + LANES * size;
        if (!one) failed = 1;
#pragma omp for schedule(static)
        for (long i = 0; i < tokens * a.heads; i++) {
            vf dots = {0};
            for (long d = 0; d < size; d += LANES) dots += load(pairs, o, i * size + d) * load(pairs, dout, i * size + d);
            delta[i] = sum(dots);
        }
#pragma omp for schedule(dynamic, 4) nowait
        for (long t = 0; t < query_tasks; t++) {
            if (!one) continue;
            long s = of_queries[t].sequence, head = of_queries[t].head;
            Queries lanes = queries(&a, own[s], own_columns[s], head, of_queries[t].block);
            rows_across(pairs, a.q, lanes.row, size, one);
            rows_across(pairs, dout, lanes.row, size, other);
            memset(first_sums, 0, size * sizeof(vf));
            vf l, d;
            for (int i = 0; i < LANES; i++) l[i] = lse[lanes.statistic[i]], d[i] = delta[lanes.statistic[i]];
            backward_stretch(pairs, &a, &lanes, one, other, l, d, shared[s], shared_columns[s], head, 0, first_sums);
            backward_stretch(pairs, &a, &lanes, one, other, l, d, own[s], lanes.last + 1, head, 1, first_sums);
            put(first_sums, lanes.row, lanes.mine, size, a.scale, dq);
        }
#pragma omp for schedule(dynamic, 4)
        for (long t = 0; t < key_tasks; t++) {
            if (!one) continue;
            long s = of_keys[t].sequence, head = of_keys[t].head, first = of_keys[t].block * LANES;
            long row[LANES], v_row[LANES];
            int mine[LANES];
            vi position;
            for (int i = 0; i < LANES; i++) {
                long column = first + i < own_columns[s] ? first + i : own_columns[s] - 1;
                row[i] = ((own[s] + column) * a.kv_heads + head) * size;
                v_row[i] = (own[s] + column) * a.v_stride + head * size;
                position[i] = (int32_t)(column - first); /* counted from the first key of the block */
                mine[i] = first + i < own_columns[s];
            }
            rows_across(pairs, a.k, row, size, one);
            rows_across(pairs, a.v, v_row, size, other);
            memset(first_sums, 0, 2 * size * sizeof(vf));
            keys_stretch(pairs, &a, one, other, position, dout, lse, delta, own[s] + first, own_columns[s] - first,
                         head, first_sums, second_sums);
            for (long guest = guests[s]; guest >= 0; guest = next[guest]) {
                /* Shared tokens end somewhere in this sequence; keys after that are not seen. */
                vi seen;
                long begin = shared[guest] - own[s], end = begin + shared_columns[guest];
                for (int i = 0; i < LANES; i++) seen[i] = first + i >= begin && first + i < end ? 0 : INT32_MAX;
                if (first < end && first + LANES > begin)
                    keys_stretch(pairs, &a, one, other, seen, dout, lse, delta, own[guest], own_columns[guest], head,
                                 first_sums, second_sums);
            }
            put(first_sums, row, mine, size, a.scale, dk);
            put(second_sums, row, mine, size, 1, dv);
        }
        free(one);
    }
    free(of_queries), free(of_keys), free(owner), free(next), free(guests);
    return failed;
}

#define OF_TYPE(type, pairs)                                                                                        \
    int attend_forward_##type(long sequences, long heads, long kv_heads, long size, const void *q, const void *k,   \
                              const void *v, long v_stride, const int64_t *shared, const int64_t *shared_columns,   \
                              const int64_t *own, const int64_t *own_columns, long tokens, void *o, float *lse) {   \
        Attention a = {heads, kv_heads, heads / kv_heads, size, v_stride, 1.0f / sqrtf((float)size), q, k, v};      \
        long row_bytes = heads * size * (pairs ? 2 : 4);                                                            \
        if (nothing_for_others(sequences, own, own_columns, tokens, row_bytes, heads, o, lse)) return 1;            \
        if (pairs && tiles_here())                                                                                  \
            return attend_forward_tiles(sequences, a, shared, shared_columns, own, own_columns, o, lse);            \
        return forward(pairs, sequences, a, shared, shared_columns, own, own_columns, o, lse);                      \
    }                                                                                                               \
    int attend_backward_##type(long sequences, long heads, long kv_heads, long size, const void *q, const void *k,  \
                               const void *v, long v_stride, const int64_t *shared, const int64_t *shared_columns,  \
                               const int64_t *own, const int64_t *own_columns, const void *o, const float *lse,     \
                               const void *dout, float *delta, long tokens, float *dq, float *dk, float *dv) {      \
        Attention a = {heads, kv_heads, heads / kv_heads, size, v_stride, 1.0f / sqrtf((float)size), q, k, v};      \
        if (pairs && tiles_here())                                                                                  \
            return attend_backward_tiles(sequences, a, shared, shared_columns, own, own_columns, o, lse, dout,      \
                                         tokens, dq, dk, dv);                                                       \
        return backward(pairs, sequences, a, shared, shared_columns, own, own_columns, o, lse, dout, delta, tokens, \
                        dq, dk, dv);                                                                                \
    }

OF_TYPE(f32, 0)
OF_TYPE(bf16, 1)
