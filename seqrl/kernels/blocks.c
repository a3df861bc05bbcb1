/* The two blocks of a layer on tiles, in training: attention from its norm to the next, and the gated feed-forward
   layer. Each is one call, and one for its gradient, of the operations that there are by themselves, so that the
   numbers are theirs. */
#include <omp.h>

#include "attention.h"
#include "tiles.h"
#include "tokens.h"

#define PARTS 3
#define CHUNKS_PER_THREAD 2L /* at least, for rows to go through several operations chunk by chunk */

/* A matrix [outs, ins], its rows in parts one below the other: where each ends, where it lies and where its gradient
   goes; no gradients are asked for where the first is 0. */
typedef struct {
    long outs, ins, is_f32, parts;
    int64_t ends[PARTS], sources[PARTS], gradients[PARTS];
    const uint32_t *columns; /* laid out already, or NULL */
    const bf16 *bias;        /* or NULL */
} Matrix;

/* As native/blocks.py fills them in. Norms and their gradients are in the stream's type; those of heads may be NULL. */
typedef struct {
    long rows, hidden, heads, kv_heads, size, stream_is_f32, threads, sequences;
    const float *cos, *sin;
    const int64_t *positions, *shared, *shared_columns, *own, *own_columns;
    const void *norm, *q_norm, *k_norm, *next_norm;
    float eps, head_eps, next_eps;
    Matrix qkv, out;
    const void *x;
    const bf16 *delta; /* to be added to x, or NULL */
    /* made forward, read backward */
    void *stream, *next_stream;
    bf16 *normed, *projected, *seen, *next_normed;
    float *rstd, *lse, *next_rstd;
    /* gradients: those of next_stream and next_normed are given; that of delta may be NULL */
    const void *of_next_stream;
    const bf16 *of_next_normed;
    void *of_x, *of_norm, *of_q_norm, *of_k_norm, *of_next_norm;
    bf16 *of_delta, *of_said, *of_projected;
} AttentionBlock;

typedef struct {
    long rows, width;
    Matrix gate_up, down;
    const bf16 *y;
    bf16 *projected, *activation, *said; /* made forward; the first two are read backward */
    const bf16 *of_said;
    bf16 *of_activation, *of_projected, *of_y;
} GatedBlock;

#ifndef __AMX_BF16__

int attention_block(const AttentionBlock *b) { return 1; }
int attention_block_backward(const AttentionBlock *b) { return 1; }
int gated_block(const GatedBlock *b) { return 1; }
int gated_block_backward(const GatedBlock *b) { return 1; }

#else

static void lay_out(const Matrix *m, uint32_t *columns, uint32_t *transposed) {
    for (long p = 0; p < m->parts; p++) {
        long first = p ? m->ends[p - 1] : 0;
        tile_pack(1, m->ends[p] - first, m->ins, (const void *)m->sources[p], m->is_f32, first, m->outs, columns, transposed);
    }
}

/* The matrix as products want it, x m^T + bias or, where `back`, x m; `room` is to be freed. w is NULL without
   memory. */
typedef struct {
    Product of;
    uint32_t *room;
} Ready;

static Ready ready(const Matrix *m, int back) {
    long ins = back ? m->outs : m->ins, outs = back ? m->ins : m->outs, biases = pieces(outs, LANES) * LANES;
    long words = m->columns && !back ? 0 : pieces(outs, LANES) * pieces(ins, STEP_NUMBERS) * TILE;
    Ready r = {{.ins = ins, .outs = outs}, aligned_alloc(64, (words + biases) * sizeof(uint32_t))};
    if (!r.room) return r;
    float *bias = (float *)(r.room + words);
    for (long i = 0; m->bias && !back && i < outs; i++) bias[i] = get_bf16(m->bias + i);
    if (words) lay_out(m, back ? NULL : r.room, back ? r.room : NULL);
    r.of.w = words ? r.room : m->columns;
    if (m->bias && !back) r.of.bias = bias;
    return r;
}

/* y [rows, outs] of x [rows, ins]. Returns nonzero without memory. */
static int product(const Matrix *m, int back, long rows, const bf16 *x, bf16 *y) {
    Ready r = ready(m, back);
    int failed = !r.of.w || tile_products(1, rows, r.of.ins, r.of.outs, x, NULL, r.of.w, NULL, r.of.bias, y);
    free(r.room);
    return failed;
}

/* A product of some rows: by one thread in its `room`, or by all where that is NULL. */
static int product_of_rows(Product of, const bf16 *x, bf16 *y, long rows, float *room) {
    if (!room) return tile_products(1, rows, of.ins, of.outs, x, NULL, of.w, NULL, of.bias, y);
    of.x = x, of.y = y;
    rows_product(&of, rows, room);
    return 0;
}

/* Operations of `count` rows from `first` on, one of them a product. Returns nonzero without memory. */
typedef int (*Chain)(const void *block, Product of, long first, long count, float *room);

/* Chunk by chunk, each by one thread while it is near; all rows at once where they are too few for that. */
static int by_chunks(Chain chain, const void *block, const Matrix *m, int back, long rows) {
    Ready r = ready(m, back);
    if (!r.of.w) return 1;
    int failed = 0;
    if (rows < CHUNKS_PER_THREAD * TASK_ROWS * omp_get_max_threads())
        failed = chain(block, r.of, 0, rows, NULL);
    else
#pragma omp parallel reduction(| : failed)
    {
        float *room = rows_room(&r.of);
        failed |= !room;
#pragma omp for schedule(dynamic, 1)
        for (long first = 0; first < rows; first += TASK_ROWS)
            if (room) failed |= chain(block, r.of, first, least(rows - first, TASK_ROWS), room);
        free(room);
    }
    free(r.room);
    return failed;
}

static int gradient(const Matrix *m, long rows, const bf16 *dy, const bf16 *x) {
    if (!m->gradients[0]) return 0;
    return tile_gradient(1, rows, m->ins, m->outs, dy, x, NULL, NULL, m->is_f32, 0, m->ends, m->gradients);
}

/* What each thread has of a norm's gradient, added up. */
static void of_all(const float *parts, long threads, long width, long is_f32, void *sum) {
    for (long i = 0; i < width; i += LANES) {
        vf total = load_f32(parts + i);
        for (long t = 1; t < threads; t++) total += load_f32(parts + t * width + i);
        if (is_f32) store_f32((float *)sum + i, total);
        else store_bf16((bf16 *)sum + i, total);
    }
}

/* `x` [.., hidden] from row `first` on, in the stream's type. */
static void *stream_at(const AttentionBlock *b, const void *x, long first) {
    return (char *)x + first * b->hidden * (b->stream_is_f32 ? sizeof(float) : sizeof(bf16));
}

/* Where the turned heads of a block go on their way to attention. */
typedef struct {
    const AttentionBlock *block;
    bf16 *q, *k;
} Heads;

/* Up to the queries and keys. */
static int to_heads(const void *heads, Product qkv, long first, long count, float *room) {
    const Heads *h = heads;
    const AttentionBlock *b = h->block;
    bf16 *normed = b->normed + first * b->hidden, *projected = b->projected + first * qkv.outs;
    OF(add_norm, b->stream_is_f32, count, b->hidden, stream_at(b, b->x, first), b->delta ? b->delta + first * b->hidden : NULL,
       b->norm, b->eps, stream_at(b, b->stream, first), normed, b->rstd + first);
    int failed = product_of_rows(qkv, normed, projected, count, room);
    OF(turn, b->stream_is_f32, count, b->heads, b->kv_heads, b->size, projected, b->q_norm, b->k_norm, b->head_eps, b->cos,
       b->sin, b->positions + first, h->q + first * b->heads * b->size, h->k + first * b->kv_heads * b->size);
    return failed;
}

/* From what attention has seen to the next norm. */
static int from_heads(const void *block, Product out, long first, long count, float *room) {
    const AttentionBlock *b = block;
    bf16 *said = aligned_alloc(64, pieces(count * b->hidden, STEP_NUMBERS) * STEP_NUMBERS * sizeof(bf16));
    if (!said) return 1;
    int failed = product_of_rows(out, b->seen + first * out.ins, said, count, room);
    OF(add_norm, b->stream_is_f32, count, b->hidden, stream_at(b, b->stream, first), said, b->next_norm, b->next_eps,
       stream_at(b, b->next_stream, first), b->next_normed + first * b->hidden, b->next_rstd + first);
    free(said);
    return failed;
}

int attention_block(const AttentionBlock *b) {
    long q_width = b->heads * b->size, kv_width = b->kv_heads * b->size;
    bf16 *q = aligned_alloc(64, b->rows * (q_width + kv_width) * sizeof(bf16) + 64);
    if (!q) return 1;
    Heads heads = {b, q, q + b->rows * q_width};
    int failed = by_chunks(to_heads, &heads, &b->qkv, 0, b->rows);
    failed = failed || attend_forward_bf16(b->sequences, b->heads, b->kv_heads, b->size, q, heads.k,
                                           b->projected + q_width + kv_width, q_width + 2 * kv_width, b->shared,
                                           b->shared_columns, b->own, b->own_columns, b->rows, b->seen, b->lse);
    free(q);
    return failed || by_chunks(from_heads, b, &b->out, 0, b->rows);
}

int attention_block_backward(const AttentionBlock *b) {
    long rows = b->rows, q_width = b->heads * b->size, kv_width = b->kv_heads * b->size;
    long of_weights = b->threads * 2 * (b->hidden + b->size);
    float *room = aligned_alloc(64, (rows * (q_width + 2 * kv_width) + of_weights) * sizeof(float) +
                                        rows * (2 * q_width + kv_width + b->hidden) * sizeof(bf16) + 64);
    if (!room) return 1;
    float *dq = room, *dk = dq + rows * q_width, *dv = dk + rows * kv_width;
    float *of_next_norm = dv + rows * kv_width, *of_norm = of_next_norm + b->threads * b->hidden;
    float *of_q_norm = of_norm + b->threads * b->hidden, *of_k_norm = of_q_norm + b->threads * b->size;
    bf16 *q = (bf16 *)(of_next_norm + of_weights), *k = q + rows * q_width;
    bf16 *of_seen = k + rows * kv_width, *of_normed = of_seen + rows * q_width;
    memset(of_next_norm, 0, of_weights * sizeof(float));

    OF(add_norm_backward, b->stream_is_f32, rows, b->hidden, b->next_stream, b->next_norm, b->next_rstd,
       b->of_next_normed, b->of_next_stream, b->of_x, b->of_said, of_next_norm, b->threads);
    int failed = gradient(&b->out, rows, b->of_said, b->seen);
    failed |= product(&b->out, 1, rows, b->of_said, of_seen);
    OF(turn, b->stream_is_f32, rows, b->heads, b->kv_heads, b->size, b->projected, b->q_norm, b->k_norm, b->head_eps,
       b->cos, b->sin, b->positions, q, k);
    failed |= attend_backward_bf16(b->sequences, b->heads, b->kv_heads, b->size, q, k, b->projected + q_width + kv_width,
                                   q_width + 2 * kv_width, b->shared, b->shared_columns, b->own, b->own_columns, b->seen,
                                   b->lse, of_seen, NULL, rows, dq, dk, dv);
    OF(turn_backward, b->stream_is_f32, rows, b->heads, b->kv_heads, b->size, b->projected, b->q_norm, b->k_norm,
       b->head_eps, b->cos, b->sin, b->positions, dq, dk, dv, b->of_projected, of_q_norm, of_k_norm, b->threads);
    failed |= gradient(&b->qkv, rows, b->of_projected, b->normed);
    failed |= product(&b->qkv, 1, rows, b->of_projected, of_normed);
    OF(add_norm_backward, b->stream_is_f32, rows, b->hidden, b->stream, b->norm, b->rstd, of_normed, b->of_x, b->of_x,
       b->of_delta, of_norm, b->threads);

    of_all(of_norm, b->threads, b->hidden, b->stream_is_f32, b->of_norm);
    of_all(of_next_norm, b->threads, b->hidden, b->stream_is_f32, b->of_next_norm);
    if (b->q_norm) of_all(of_q_norm, b->threads, b->size, b->stream_is_f32, b->of_q_norm);
    if (b->k_norm) of_all(of_k_norm, b->threads, b->size, b->stream_is_f32, b->of_k_norm);
    free(room);
    return failed;
}

static int gated(const void *block, Product down, long first, long count, float *room) {
    const GatedBlock *b = block;
    bf16 *activation = b->activation + first * b->width;
    gate_bf16(count, b->width, b->projected + first * 2 * b->width, activation);
    return product_of_rows(down, activation, b->said + first * down.outs, count, room);
}

int gated_block(const GatedBlock *b) {
    return product(&b->gate_up, 0, b->rows, b->y, b->projected) || by_chunks(gated, b, &b->down, 0, b->rows);
}

static int gated_backward(const void *block, Product gate_up, long first, long count, float *room) {
    const GatedBlock *b = block;
    bf16 *of_projected = b->of_projected + first * 2 * b->width;
    gate_backward_bf16(count, b->width, b->projected + first * 2 * b->width, b->of_activation + first * b->width, of_projected);
    return product_of_rows(gate_up, of_projected, b->of_y + first * gate_up.outs, count, room);
}

int gated_block_backward(const GatedBlock *b) {
    return gradient(&b->down, b->rows, b->of_said, b->activation) ||
           product(&b->down, 1, b->rows, b->of_said, b->of_activation) ||
           by_chunks(gated_backward, b, &b->gate_up, 1, b->rows) ||
           gradient(&b->gate_up, b->rows, b->of_projected, b->y);
}

#endif
