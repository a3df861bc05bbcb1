/* Mixture-of-experts layers: products of rows that are sorted by expert with the matrix of their expert, all
   experts in one call. Expert e has the rows up to ends[e], from where the expert before it ends.

   y [rows, outs], w [experts, outs, ins]; row r of x is x[token[r]] [ins], x[r] where token is NULL. Products
   run over words of 32 bits: a float32, or a pair of bfloat16 that lie side by side in the direction in which
   is added up. Sums are float32, and no sum depends on how many rows there are. ins and outs are multiples
   of 32. */
#include "strips.h"

/* STRIP columns of `count` rows of m [.., width], taken from `first` on in the order of token where that is
   given: out [count, STRIP], or [half of it, STRIP] pairs of rows, of which the last may lack its second. */
INLINE void panel(int pairs, const void *m, const int64_t *token, long first, long count, long width, long column,
                  uint32_t *out) {
    for (long r = first; r < first + count; r += 1 + pairs, out += STRIP) {
        const void *one = at(pairs, m, (token ? token[r] : r) * width + column), *two = NULL;
        if (r + 1 < first + count) two = at(pairs, m, (token ? token[r + 1] : r + 1) * width + column);
        for (long v = 0; v < STRIP; v += LANES)
            *(word *)(out + v) = of_rows(pairs, at(pairs, one, v), two ? at(pairs, two, v) : NULL);
    }
}

/* y = x w^T, of w as `expert_pack` lays it out. Returns nonzero without memory. */
INLINE int products(int pairs, long experts, long ins, long outs, const void *x, const int64_t *token, const void *w,
                    const int64_t *ends, void *y) {
    long count, strips = outs / STRIP, steps = ins / (1 + pairs), next = steps * LANES;
    Chunk *tasks = chunks(experts, ends, CHUNK, &count);
    if (!tasks) return 1;
#pragma omp parallel for schedule(dynamic, 2)
    for (long t = 0; t < count * strips; t++) {
        Chunk c = tasks[t / strips];
        const uint32_t *matrix = (const uint32_t *)w + (c.matrix * strips + t % strips) * 2 * next;
        strip_of_rows(pairs, c, steps, steps, x, token, matrix, LANES, next, NULL, y, outs, t % strips * STRIP, matrix + 2 * next);
    }
    free(tasks);
    return 0;
}

/* dx = dy w. Returns nonzero without memory. */
INLINE int products_backward_x(int pairs, long experts, long ins, long outs, const void *dy, const void *w,
                               const int64_t *ends, void *dx) {
    long count, strips = ins / STRIP, steps = outs / (1 + pairs);
    Chunk *tasks = chunks(experts, ends, CHUNK, &count);
    int failed = !tasks;
#pragma omp parallel if (!failed)
    {
        uint32_t *columns = failed ? NULL : aligned_alloc(64, sizeof(uint32_t) * steps * STRIP);
        if (!columns) failed = 1;
#pragma omp for schedule(dynamic, 2)
        for (long t = 0; t < count * strips; t++) {
            if (!columns) continue;
            Chunk c = tasks[t / strips];
            long column = t % strips * STRIP;
            panel(pairs, w, NULL, c.matrix * outs, outs, ins, column, columns);
            strip_of_rows(pairs, c, steps, steps, dy, NULL, columns, STRIP, LANES, NULL, dx, ins, column, NULL);
        }
        free(columns);
    }
    free(tasks);
    return failed;
}

/* dw = dy^T x, STRIP outputs at a time. Returns nonzero without memory. */
INLINE int products_backward_w(int pairs, long experts, long ins, long outs, const void *dy, const void *x,
                               const int64_t *token, const int64_t *ends, void *dw) {
    long strips = outs / STRIP;
    int failed = 0;
#pragma omp parallel
    {
        uint32_t of_y[CHUNK * STRIP], of_x[CHUNK * STRIP];
        vf(*sums)[STRIP][2] = aligned_alloc(64, sizeof(vf) * 2 * ins); /* [ins / STRIP][STRIP] */
        if (!sums) failed = 1;
#pragma omp for schedule(dynamic, 1)
        for (long t = 0; t < experts * strips; t++) {
            if (!sums) continue;
            long e = t / strips, output = t % strips * STRIP, first = e ? ends[e - 1] : 0;
            memset(sums, 0, sizeof(vf) * 2 * ins);
            for (long r = first; r < ends[e]; r += CHUNK) {
                long count = ends[e] - r < CHUNK ? ends[e] - r : CHUNK;
                panel(pairs, dy, NULL, r, count, outs, output, of_y);
                for (long i = 0; i < ins; i += STRIP) {
                    panel(pairs, x, token, r, count, ins, i, of_x);
                    for (long o = 0; o < STRIP; o += ROWS) {
                        const uint32_t *row[ROWS];
                        for (long s = 0; s < ROWS; s++) row[s] = of_y + o + s;
                        tile(pairs, ROWS, (count + pairs) / (1 + pairs), row, STRIP, of_x, STRIP, LANES,
                             sums[i / STRIP] + o, NULL);
                    }
                }
            }
            for (long i = 0; i < ins; i += LANES)
                for (long o = 0; o < STRIP; o++)
                    store(pairs, dw, (e * outs + output + o) * ins + i, sums[i / STRIP][o][i / LANES % 2]);
        }
        free(sums);
    }
    return failed;
}

/* Sorts pairs of tokens with their experts, chosen [tokens, k], by expert: pair p comes to place[p], where `token` has the
   token of p. Those of an expert stay in their order and end at ends[expert]. */
void sort_pairs(long tokens, long k, long experts, const int64_t *chosen, int64_t *ends, int64_t *place, int64_t *token) {
    long start = 0;
    memset(ends, 0, sizeof(int64_t) * experts);
    for (long p = 0; p < tokens * k; p++) ends[chosen[p]]++;
    for (long e = 0; e < experts; e++) start += ends[e], ends[e] = start - ends[e];
    for (long p = 0; p < tokens * k; p++) token[place[p] = ends[chosen[p]]++] = p / k;
}

/* w [matrices, outs, words] -> [matrices, outs / 16, words, 16], so that a vector has a word of 16 outputs. */
void expert_pack(long matrices, long outs, long words, const uint32_t *w, uint32_t *packed) {
#pragma omp parallel for schedule(static)
    for (long block = 0; block < matrices * outs / LANES; block++) {
        long rows[LANES];
        for (int i = 0; i < LANES; i++) rows[i] = (block * LANES + i) * words;
        across(w, rows, words, (word *)packed + block * words);
    }
}

#define OF_TYPE(type, pairs)                                                                                    \
    int expert_products_##type(long experts, long ins, long outs, const void *x, const int64_t *token,          \
                               const void *w, const int64_t *ends, void *y) {                                   \
        return products(pairs, experts, ins, outs, x, token, w, ends, y);                                       \
    }                                                                                                           \
    int expert_backward_x_##type(long experts, long ins, long outs, const void *dy, const void *w,              \
                                 const int64_t *ends, void *dx) {                                               \
        return products_backward_x(pairs, experts, ins, outs, dy, w, ends, dx);                                 \
    }                                                                                                           \
    void expert_backward_w_##type(long experts, long ins, long outs, const void *dy, const void *x,             \
                                  const int64_t *token, const int64_t *ends, void *dw) {                        \
        products_backward_w(pairs, experts, ins, outs, dy, x, token, ends, dw);                                 \
    }

OF_TYPE(f32, 0)
OF_TYPE(bf16, 1)
