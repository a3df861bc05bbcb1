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

/* Of some rows, by one thread. */
static void product_of_rows(Product of, const bf16 *x, bf16 *y, long rows, float *room) {
    of.x = x, of.y = y;
    rows_product(&of, rows, room);
}

/* Each chunk of rows goes through several operations while it is near. */
#define FOR_EACH_CHUNK(rows, first, count)                                                                             \
    _Pragma("omp for schedule(dynamic, 1)") for (long first = 0; first < (rows); first += TASK_ROWS)                   \
        for (long count = least((rows) - first, TASK_ROWS), once = 1; once; once = 0)

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

/* Up to the queries and keys. */
static int projected(const AttentionBlock *b, bf16 *q, bf16 *k) {
    long q_width = b->heads * b->size, kv_width = b->kv_heads * b->size, width = q_width + 2 * kv_width;
    Ready qkv = ready(&b->qkv, 0);
    int failed = !qkv.of.w;
#pragma omp parallel if (!failed) reduction(| : failed)
    {
        float *room = failed ? NULL : rows_room(&qkv.of);
        failed |= !room;
        FOR_EACH_CHUNK(b->rows, first, count) {
            if (!room) continue;
            long at = first * b->hidden;
            bf16 *rows = b->projected + first * width;
            OF(add_norm, b->stream_is_f32, count, b->hidden, stream_at(b, b->x, first), b->delta ? b->delta + at : NULL,
               b->norm, b->eps, stream_at(b, b->stream, first), b->normed + at, b->rstd + first);
            product_of_rows(qkv.of, b->normed + at, rows, count, room);
            OF(turn, b->stream_is_f32, count, b->heads, b->kv_heads, b->size, rows, b->q_norm, b->k_norm, b->head_eps,
               b->cos, b->sin, b->positions + first, q + first * q_width, k + first * kv_width);
        }
        free(room);
    }
    free(qkv.room);
    return failed;
}

/* From what attention has seen to the next norm. */
static int added(const AttentionBlock *b) {
    Ready out = ready(&b->out, 0);
    int failed = !out.of.w;
#pragma omp parallel if (!failed) reduction(| : failed)
    {
        float *room = failed ? NULL : rows_room(&out.of);
        bf16 *said = room ? aligned_alloc(64, TASK_ROWS * b->hidden * sizeof(bf16)) : NULL;
        failed |= !said;
        FOR_EACH_CHUNK(b->rows, first, count) {
            if (!said) continue;
            long at = first * b->hidden;
            product_of_rows(out.of, b->seen + first * out.of.ins, said, count, room);
            OF(add_norm, b->stream_is_f32, count, b->hidden, stream_at(b, b->stream, first), said, b->next_norm, b->next_eps,
               stream_at(b, b->next_stream, first), b->next_normed + at, b->next_rstd + first);
        }
        free(room), free(said);
    }
    free(out.room);
    return failed;
}

int attention_block(const AttentionBlock *b) {
    long q_width = b->heads * b->size, kv_width = b->kv_heads * b->size;
    bf16 *q = aligned_alloc(64, b->rows * (q_width + kv_width) * sizeof(bf16) + 64), *k = q + b->rows * q_width;
    int failed = !q || projected(b, q, k);
    failed = failed || attend_forward_bf16(b->sequences, b->heads, b->kv_heads, b->size, q, k,
                                           b->projected + q_width + kv_width, q_width + 2 * kv_width, b->shared,
                                           b->shared_columns, b->own, b->own_columns, b->rows, b->seen, b->lse);
    free(q);
    return failed || added(b);
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

int gated_block(const GatedBlock *b) {
    Ready down = ready(&b->down, 0);
    int failed = !down.of.w || product(&b->gate_up, 0, b->rows, b->y, b->projected);
#pragma omp parallel if (!failed) reduction(| : failed)
    {
        float *room = failed ? NULL : rows_room(&down.of);
        failed |= !room;
        FOR_EACH_CHUNK(b->rows, first, count) {
            if (!room) continue;
            bf16 *rows = b->activation + first * b->width;
            gate_bf16(count, b->width, b->projected + first * 2 * b->width, rows);
            product_of_rows(down.of, rows, b->said + first * down.of.outs, count, room);
        }
        free(room);
    }
    free(down.room);
    return failed;
}

int gated_block_backward(const GatedBlock *b) {
    bf16 *of_activation = aligned_alloc(64, b->rows * b->width * sizeof(bf16) + 64);
    Ready gate_up = ready(&b->gate_up, 1);
    int failed = !of_activation || !gate_up.of.w || gradient(&b->down, b->rows, b->of_said, b->activation) ||
                 product(&b->down, 1, b->rows, b->of_said, of_activation);
#pragma omp parallel if (!failed) reduction(| : failed)
    {
        float *room = failed ? NULL : rows_room(&gate_up.of);
        failed |= !room;
        FOR_EACH_CHUNK(b->rows, first, count) {
            if (!room) continue;
            bf16 *rows = b->of_projected + first * 2 * b->width;
            gate_backward_bf16(count, b->width, b->projected + first * 2 * b->width, of_activation + first * b->width, rows);
            product_of_rows(gate_up.of, rows, b->of_y + first * gate_up.of.outs, count, room);
        }
        free(room);
    }
    free(of_activation), free(gate_up.room);
    return failed || gradient(&b->gate_up, b->rows, b->of_projected, b->y);
}

#endif
