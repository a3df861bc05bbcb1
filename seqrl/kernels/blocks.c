/* The two blocks of a layer on tiles, in training: attention from its norm to the next, and the gated feed-forward
   layer. Each is one call, and one for its gradient, of the operations that there are by themselves, so that the
   numbers are theirs. */
#include "attention.h"
#include "tiles.h"
#include "tokens.h"

#define PARTS 3

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
    bf16 *of_projected, *of_y;
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

/* y [rows, outs] = x m^T + bias. This and the next two return nonzero without memory. */
static int product(const Matrix *m, long rows, const bf16 *x, bf16 *y) {
    long words = m->columns ? 0 : pieces(m->outs, LANES) * pieces(m->ins, STEP_NUMBERS) * TILE;
    uint32_t *room = aligned_alloc(64, (words + pieces(m->outs, LANES) * LANES) * sizeof *room);
    if (!room) return 1;
    float *bias = m->bias ? (float *)(room + words) : NULL;
    for (long i = 0; bias && i < m->outs; i++) bias[i] = get_bf16(m->bias + i);
    if (!m->columns) lay_out(m, room, NULL);
    int failed = tile_products(1, rows, m->ins, m->outs, x, NULL, m->columns ? m->columns : room, NULL, bias, y);
    free(room);
    return failed;
}

/* dx [rows, ins] = dy m. */
static int product_backward(const Matrix *m, long rows, const bf16 *dy, bf16 *dx) {
    uint32_t *columns = aligned_alloc(64, pieces(m->ins, LANES) * pieces(m->outs, STEP_NUMBERS) * TILE * sizeof *columns);
    if (!columns) return 1;
    lay_out(m, NULL, columns);
    int failed = tile_products(1, rows, m->outs, m->ins, dy, NULL, columns, NULL, NULL, dx);
    free(columns);
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

int attention_block(const AttentionBlock *b) {
    long q_width = b->heads * b->size, kv_width = b->kv_heads * b->size;
    bf16 *q = aligned_alloc(64, b->rows * (q_width + kv_width + b->hidden) * sizeof(bf16) + 64);
    if (!q) return 1;
    bf16 *k = q + b->rows * q_width, *said = k + b->rows * kv_width;
    OF(add_norm, b->stream_is_f32, b->rows, b->hidden, b->x, b->delta, b->norm, b->eps, b->stream, b->normed, b->rstd);
    int failed = product(&b->qkv, b->rows, b->normed, b->projected);
    OF(turn, b->stream_is_f32, b->rows, b->heads, b->kv_heads, b->size, b->projected, b->q_norm, b->k_norm, b->head_eps,
       b->cos, b->sin, b->positions, q, k);
    failed |= attend_forward_bf16(b->sequences, b->heads, b->kv_heads, b->size, q, k, b->projected + q_width + kv_width,
                                  q_width + 2 * kv_width, b->shared, b->shared_columns, b->own, b->own_columns, b->rows,
                                  b->seen, b->lse);
    failed |= product(&b->out, b->rows, b->seen, said);
    OF(add_norm, b->stream_is_f32, b->rows, b->hidden, b->stream, said, b->next_norm, b->next_eps, b->next_stream,
       b->next_normed, b->next_rstd);
    free(q);
    return failed;
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
    failed |= product_backward(&b->out, rows, b->of_said, of_seen);
    OF(turn, b->stream_is_f32, rows, b->heads, b->kv_heads, b->size, b->projected, b->q_norm, b->k_norm, b->head_eps,
       b->cos, b->sin, b->positions, q, k);
    failed |= attend_backward_bf16(b->sequences, b->heads, b->kv_heads, b->size, q, k, b->projected + q_width + kv_width,
                                   q_width + 2 * kv_width, b->shared, b->shared_columns, b->own, b->own_columns, b->seen,
                                   b->lse, of_seen, NULL, rows, dq, dk, dv);
    OF(turn_backward, b->stream_is_f32, rows, b->heads, b->kv_heads, b->size, b->projected, b->q_norm, b->k_norm,
       b->head_eps, b->cos, b->sin, b->positions, dq, dk, dv, b->of_projected, of_q_norm, of_k_norm, b->threads);
    failed |= gradient(&b->qkv, rows, b->of_projected, b->normed);
    failed |= product_backward(&b->qkv, rows, b->of_projected, of_normed);
    OF(add_norm_backward, b->stream_is_f32, rows, b->hidden, b->stream, b->norm, b->rstd, of_normed, b->of_x, b->of_x,
       b->of_delta, of_norm, b->threads);

    of_all(of_norm, b->threads, b->hidden, b->stream_is_f32, b->of_norm);
    of_all(of_next_norm, b->threads, b->hidden, b->stream_is_f32, b->of_next_norm);
    if (b->q_norm) of_all(of_q_norm, b->threads, b->size, b->stream_is_f32, b->of_q_norm);
    if (b->k_norm) of_all(of_k_norm, b->threads, b->size, b->stream_is_f32, b->of_k_norm);
    free(room);
    return failed;
}

int gated_block(const GatedBlock *b) {
    int failed = product(&b->gate_up, b->rows, b->y, b->projected);
    gate_bf16(b->rows, b->width, b->projected, b->activation);
    return failed | product(&b->down, b->rows, b->activation, b->said);
}

int gated_block_backward(const GatedBlock *b) {
    bf16 *of_activation = aligned_alloc(64, b->rows * b->width * sizeof(bf16) + 64);
    if (!of_activation) return 1;
    int failed = gradient(&b->down, b->rows, b->of_said, b->activation);
    failed |= product_backward(&b->down, b->rows, b->of_said, of_activation);
    gate_backward_bf16(b->rows, b->width, b->projected, of_activation, b->of_projected);
    failed |= gradient(&b->gate_up, b->rows, b->of_projected, b->y);
    failed |= product_backward(&b->gate_up, b->rows, b->of_projected, b->of_y);
    free(of_activation);
    return failed;
}

#endif
