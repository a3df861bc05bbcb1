/* Causal attention over flat tokens, in which several sequences may begin with the same, shared tokens;
   forward and backward, without ever holding a matrix of scores.

   Sequence s sees the tokens `shared[s]` .. + shared_columns[s] (computed elsewhere in the row, by the first of
   its group) and then its own, `own[s]` .. + own_columns[s], of which each sees those up to itself. The two
   run through their blocks one way: 16 queries in the lanes of a vector, keys one by one; or, for the gradients
   of keys and values, 16 keys in the lanes, queries one by one. So nothing is ever added up across lanes, and
   every product is a number of one side times a vector of the other.

   q, o: [tokens, heads, size]; k, v: [tokens, kv_heads, size]; lse, delta: [tokens, heads]; all float32. */
#include "products.h"

#define KEYS 64 /* columns whose scores are held at once */

typedef struct {
    long heads, kv_heads, group, size;
    float scale;
    const float *q, *k, *v;
} Attention;

typedef struct {
    long sequence, head, block;
} Task;

static void scatter(const vf *x, const long *rows, const int *mine, long size, float scale, float *out) {
    for (int i = 0; i < LANES; i++)
        if (mine[i])
            for (long d = 0; d < size; d++) out[rows[i] + d] = x[d][i] * scale;
}

/* 16 queries of one key head: position by position, the heads of the group side by side. */
typedef struct {
    long row[LANES], statistic[LANES]; /* where a lane's numbers start in q, and in lse */
    vi position;                       /* in the sequence's own tokens */
    int mine[LANES];                   /* 0: a copy of another lane, to fill up */
    long last;
} Queries;

static Queries queries(const Attention *a, long own, long columns, long head, long block) {
    Queries result;
    long total = columns * a->group;
    for (int i = 0; i < LANES; i++) {
        long index = block * LANES + i, real = index < total ? index : total - 1;
        long token = own + real / a->group, h = head * a->group + real % a->group;
        result.row[i] = (token * a->heads + h) * a->size;
        result.statistic[i] = token * a->heads + h;
        result.position[i] = (int32_t)(real / a->group);
        result.mine[i] = index < total;
        result.last = real / a->group;
    }
    return result;
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
static void forward_stretch(const Attention *a, const Queries *lanes, const vf *q, long first, long count,
                            long head, int own, vf *most, vf *total, vf *out) {
    long stride = a->kv_heads * a->size;
    vf scores[KEYS];
    for (long start = 0; start < count; start += KEYS) {
        long n = count - start < KEYS ? count - start : KEYS;
        const float *k = a->k + (first + start) * stride + head * a->size;
        products(q, k, n, stride, a->size, scores);
        vf top = *most;
        for (long j = 0; j < n; j++) {
            if (own) scores[j] = pick(lanes->position < (int32_t)(start + j), splat(-INFINITY), scores[j]);
            top = larger(scores[j], top);
        }
        vf shrink = vexp(*most - top);
        vf sums = *total * shrink;
        for (long j = 0; j < n; j++) sums += scores[j] = vexp(scores[j] - top);
        for (long d = 0; d < a->size; d++) out[d] *= shrink;
        accumulate(scores, a->v + (first + start) * stride + head * a->size, n, stride, a->size, out);
        *most = top, *total = sums;
    }
}

/* Returns nonzero without memory. */
int attend_forward(long sequences, long heads, long kv_heads, long size, const float *q, const float *k,
                   const float *v, const int64_t *shared, const int64_t *shared_columns, const int64_t *own,
                   const int64_t *own_columns, float *o, float *lse) {
    Attention a = {heads, kv_heads, heads / kv_heads, size, 1.0f / sqrtf((float)size), q, k, v};
    long count;
    Task *tasks = blocks_of(sequences, own_columns, a.group, kv_heads, &count);
    int failed = !tasks;
#pragma omp parallel if (tasks != NULL)
    {
        vf *qs = aligned_alloc(64, 2 * size * sizeof(vf)), *out = qs + size;
        if (!qs) failed = 1;
#pragma omp for schedule(dynamic, 4)
        for (long t = 0; t < count; t++) {
            if (!qs || !tasks) continue;
            long s = tasks[t].sequence, head = tasks[t].head;
            Queries lanes = queries(&a, own[s], own_columns[s], head, tasks[t].block);
            across(q, lanes.row, size, a.scale, qs);
            vf most = splat(-3e38f), total = {0};
            memset(out, 0, size * sizeof(vf));
            forward_stretch(&a, &lanes, qs, shared[s], shared_columns[s], head, 0, &most, &total, out);
            forward_stretch(&a, &lanes, qs, own[s], lanes.last + 1, head, 1, &most, &total, out);
            for (long d = 0; d < size; d++) out[d] /= total;
            scatter(out, lanes.row, lanes.mine, size, 1, o);
            for (int i = 0; i < LANES; i++)
                if (lanes.mine[i]) lse[lanes.statistic[i]] = most[i] + logf(total[i]);
        }
        free(qs);
    }
    free(tasks);
    return failed;
}

static void backward_stretch(const Attention *a, const Queries *lanes, const vf *q, const vf *dout, vf lse,
                             vf delta, long first, long count, long head, int own, vf *dq) {
    long stride = a->kv_heads * a->size;
    vf scores[KEYS], wanted[KEYS];
    for (long start = 0; start < count; start += KEYS) {
        long n = count - start < KEYS ? count - start : KEYS, at = (first + start) * stride + head * a->size;
        products(q, a->k + at, n, stride, a->size, scores);
        products(dout, a->v + at, n, stride, a->size, wanted);
        for (long j = 0; j < n; j++) {
            vf p = vexp(scores[j] - lse);
            if (own) p = pick(lanes->position < (int32_t)(start + j), splat(0), p);
            scores[j] = p * (wanted[j] - delta);
        }
        accumulate(scores, a->k + at, n, stride, a->size, dq);
    }
}

/* 16 keys in the lanes, for the queries of tokens first .. + count and the heads of the group. */
static void keys_stretch(const Attention *a, const vf *k, const vf *v, vi position, const float *dout,
                         const float *lse, const float *delta, long first, long count, long head, int own, vf *dk,
                         vf *dv) {
    long stride = a->heads * a->size;
    vf scores[KEYS], wanted[KEYS];
    for (long h = head * a->group; h < (head + 1) * a->group; h++)
        for (long start = 0; start < count; start += KEYS) {
            long n = count - start < KEYS ? count - start : KEYS, at = (first + start) * stride + h * a->size;
            products(k, a->q + at, n, stride, a->size, scores);
            products(v, dout + at, n, stride, a->size, wanted);
            for (long j = 0; j < n; j++) {
                long statistic = (first + start + j) * a->heads + h;
                vf p = vexp(scores[j] - lse[statistic]);
                if (own) p = pick(position > (int32_t)(start + j), splat(0), p);
                scores[j] = p;
                wanted[j] = p * (wanted[j] - delta[statistic]);
            }
            accumulate(scores, dout + at, n, stride, a->size, dv);
            accumulate(wanted, a->q + at, n, stride, a->size, dk);
        }
}

/* dk and dv of the tokens that nobody owns stay as they are. Returns nonzero without memory. */
int attend_backward(long sequences, long heads, long kv_heads, long size, const float *q, const float *k,
                    const float *v, const int64_t *shared, const int64_t *shared_columns, const int64_t *own,
                    const int64_t *own_columns, const float *o, const float *lse, const float *dout, float *delta,
                    long tokens, float *dq, float *dk, float *dv) {
    Attention a = {heads, kv_heads, heads / kv_heads, size, 1.0f / sqrtf((float)size), q, k, v};
    long query_tasks, key_tasks;
    Task *of_queries = blocks_of(sequences, own_columns, a.group, kv_heads, &query_tasks);
    Task *of_keys = blocks_of(sequences, own_columns, 1, kv_heads, &key_tasks);
    /* The sequences that see others' tokens, by where these start: a list for each owner. */
    long *owner = malloc(sizeof(long) * (tokens + 1)), *next = malloc(sizeof(long) * (sequences + 1));
    long *guests = malloc(sizeof(long) * (sequences + 1));
    int failed = !of_queries || !of_keys || !owner || !next || !guests;
    if (!failed) {
        for (long s = 0; s < sequences; s++) {
            guests[s] = -1;
            for (long t = own[s]; t < own[s] + own_columns[s]; t++) owner[t] = s;
        }
        for (long s = sequences; s-- > 0;)
            if (shared_columns[s] > 0) {
                long host = owner[shared[s]];
                next[s] = guests[host], guests[host] = s;
            }
    }
#pragma omp parallel if (!failed)
    {
        vf *a1 = failed ? NULL : aligned_alloc(64, 4 * size * sizeof(vf));
        vf *a2 = a1 + size, *a3 = a2 + size, *a4 = a3 + size;
        if (!a1) failed = 1;
#pragma omp for schedule(static)
        for (long i = 0; i < tokens * heads; i++) {
            vf dots = {0};
            for (long d = 0; d < size; d += LANES) dots += load_f32(o + i * size + d) * load_f32(dout + i * size + d);
            delta[i] = sum(dots);
        }
#pragma omp for schedule(dynamic, 4) nowait
        for (long t = 0; t < query_tasks; t++) {
            if (!a1) continue;
            long s = of_queries[t].sequence, head = of_queries[t].head;
            Queries lanes = queries(&a, own[s], own_columns[s], head, of_queries[t].block);
            across(q, lanes.row, size, a.scale, a1);
            across(dout, lanes.row, size, 1, a2);
            memset(a3, 0, size * sizeof(vf));
            vf l, d;
            for (int i = 0; i < LANES; i++) l[i] = lse[lanes.statistic[i]], d[i] = delta[lanes.statistic[i]];
            backward_stretch(&a, &lanes, a1, a2, l, d, shared[s], shared_columns[s], head, 0, a3);
            backward_stretch(&a, &lanes, a1, a2, l, d, own[s], lanes.last + 1, head, 1, a3);
            scatter(a3, lanes.row, lanes.mine, size, a.scale, dq);
        }
#pragma omp for schedule(dynamic, 4)
        for (long t = 0; t < key_tasks; t++) {
            if (!a1) continue;
            long s = of_keys[t].sequence, head = of_keys[t].head, first = of_keys[t].block * LANES;
            long row[LANES];
            int mine[LANES];
            vi position;
            for (int i = 0; i < LANES; i++) {
                long column = first + i < own_columns[s] ? first + i : own_columns[s] - 1;
                row[i] = ((own[s] + column) * kv_heads + head) * size;
                position[i] = (int32_t)(column - first); /* counted from the first key of the block */
                mine[i] = first + i < own_columns[s];
            }
            across(k, row, size, a.scale, a1);
            across(v, row, size, 1, a2);
            memset(a3, 0, 2 * size * sizeof(vf));
            keys_stretch(&a, a1, a2, position, dout, lse, delta, own[s] + first, own_columns[s] - first, head, 1,
                         a3, a4);
            for (long guest = guests[s]; guest >= 0; guest = next[guest]) {
                /* Shared tokens end somewhere in this sequence; keys after that are not seen. */
                vi seen;
                long begin = shared[guest] - own[s], end = begin + shared_columns[guest];
                for (int i = 0; i < LANES; i++) seen[i] = first + i >= begin && first + i < end ? 0 : INT32_MAX;
                if (first < end && first + LANES > begin)
                    keys_stretch(&a, a1, a2, seen, dout, lse, delta, own[guest], own_columns[guest], head, 1, a3,
                                 a4);
            }
            scatter(a3, row, mine, size, a.scale, dk);
            scatter(a4, row, mine, size, 1, dv);
        }
        free(a1);
    }
    free(of_queries), free(of_keys), free(owner), free(next), free(guests);
    return failed;
}
