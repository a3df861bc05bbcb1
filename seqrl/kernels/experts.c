/* Mixture-of-experts layers: products of rows that are sorted by expert with the matrix of their expert, all
   experts in one call. Expert e has the rows up to ends[e], from where the expert before it ends.

   y [rows, outs], w [experts, outs, ins], all float32; row r of x is x[token[r]] [ins], x[r] where token is NULL. */
#include "products.h"

typedef struct {
    long expert, first, count;
} Block;

/* Every expert's rows in blocks of at most 16. */
static Block *blocks(long experts, const int64_t *ends, long *count) {
    long total = 0, at = 0;
    for (long e = 0; e < experts; e++) total += (ends[e] - (e ? ends[e - 1] : 0) + LANES - 1) / LANES;
    Block *result = malloc(sizeof(Block) * (total + 1));
    *count = total;
    if (!result) return NULL;
    for (long e = 0; e < experts; e++)
        for (long r = e ? ends[e - 1] : 0; r < ends[e]; r += LANES)
            result[at++] = (Block){e, r, ends[e] - r < LANES ? ends[e] - r : LANES};
    return result;
}

/* y = x w^T: 16 rows in the lanes. Returns nonzero without memory. */
int expert_forward(long experts, long ins, long outs, const float *x, const int64_t *token,
                   const float *w, const int64_t *ends, float *y) {
    long count;
    Block *tasks = blocks(experts, ends, &count);
    int failed = !tasks;
#pragma omp parallel if (!failed)
    {
        vf *rows = failed ? NULL : aligned_alloc(64, (ins + outs) * sizeof(vf)), *out = rows + ins;
        if (!rows) failed = 1;
#pragma omp for schedule(dynamic, 1)
        for (long t = 0; t < count; t++) {
            if (!rows) continue;
            long start[LANES];
            for (long i = 0; i < LANES; i++) {
                long row = tasks[t].first + (i < tasks[t].count ? i : tasks[t].count - 1);
                start[i] = (token ? token[row] : row) * ins;
            }
            across(x, start, ins, 1, rows);
            products(rows, w + tasks[t].expert * outs * ins, outs, ins, ins, out);
            for (long i = 0; i < tasks[t].count; i++)
                for (long o = 0; o < outs; o++) y[(tasks[t].first + i) * outs + o] = out[o][i];
        }
        free(rows);
    }
    free(tasks);
    return failed;
}

/* dx = dy w: 16 inputs in the lanes. Returns nonzero without memory. */
int expert_backward_x(long experts, long ins, long outs, const float *dy, const float *w, const int64_t *ends,
                      float *dx) {
    long count;
    Block *tasks = blocks(experts, ends, &count);
    if (!tasks) return 1;
#pragma omp parallel for schedule(dynamic, 1)
    for (long t = 0; t < count; t++) {
        const float *we = w + tasks[t].expert * outs * ins;
        long end = tasks[t].first + tasks[t].count;
        for (long i = 0; i < ins; i += LANES) {
            long r = tasks[t].first;
            for (; r + STEP <= end; r += STEP) {
                vf sums[STEP] = {{0}};
                for (long o = 0; o < outs; o++) {
                    vf column = load_f32(we + o * ins + i);
                    for (int s = 0; s < STEP; s++) sums[s] = fused(column, splat(dy[(r + s) * outs + o]), sums[s]);
                }
                for (int s = 0; s < STEP; s++) store_f32(dx + (r + s) * ins + i, sums[s]);
            }
            for (; r < end; r++) {
                vf sum = {0};
                for (long o = 0; o < outs; o++) sum = fused(load_f32(we + o * ins + i), splat(dy[r * outs + o]), sum);
                store_f32(dx + r * ins + i, sum);
            }
        }
    }
    free(tasks);
    return 0;
}

/* sums[s] += over the rows from first to end: 32 inputs of x times output s of dy. */
static inline void outer(long first, long end, const float *x, const int64_t *token, long ins, const float *dy,
                         long outs, vf *sums, vf *more) {
    vf a[STEP] = {{0}}, b[STEP] = {{0}};
    for (long r = first; r < end; r++) {
        const float *row = x + (token ? token[r] : r) * ins, *d = dy + r * outs;
        vf one = load_f32(row), two = load_f32(row + LANES);
        for (int s = 0; s < STEP; s++) a[s] = fused(one, splat(d[s]), a[s]), b[s] = fused(two, splat(d[s]), b[s]);
    }
    for (int s = 0; s < STEP; s++) sums[s] = a[s], more[s] = b[s];
}

/* dw = dy^T x: 32 inputs in the lanes of two vectors. ins is a multiple of 32, outs of 8. */
void expert_backward_w(long experts, long ins, long outs, const float *dy, const float *x, const int64_t *token,
                       const int64_t *ends, float *dw) {
    long strips = outs / STEP;
#pragma omp parallel for schedule(dynamic, 4)
    for (long t = 0; t < experts * strips; t++) {
        long e = t / strips, o = t % strips * STEP, first = e ? ends[e - 1] : 0;
        for (long i = 0; i < ins; i += 2 * LANES) {
            vf sums[STEP], more[STEP];
            outer(first, ends[e], x + i, token, ins, dy + o, outs, sums, more);
            for (int s = 0; s < STEP; s++) {
                store_f32(dw + (e * outs + o + s) * ins + i, sums[s]);
                store_f32(dw + (e * outs + o + s) * ins + i + LANES, more[s]);
            }
        }
    }
}
