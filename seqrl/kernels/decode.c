/* Layers of a token step on tiles, all of them in one call: between two operations threads wait for each other, and
   nobody for Python. The operations are those of training, so that the numbers are. */
#include <omp.h>

#include "cache.h"
#include "tiles.h"
#include "tokens.h"

/* A matrix laid out for tiles, and a bias or NULL. */
typedef struct {
    const uint32_t *columns;
    const float *bias;
} Linear;

/* As rollout/layers.py fills it in. Weights of norms are in the stream's type; the two of heads may be NULL. */
typedef struct {
    const void *attention_norm, *q_norm, *k_norm, *mlp_norm;
    float attention_eps, mlp_eps;
    Linear qkv, out, gate_up, down;
    long width; /* of the gated layer; 0: what comes after its norm is left to the caller */
    uint32_t *prompt_keys, *own_keys;
    bf16 *prompt_values, *own_values;
} Layer;

/* The rows of a step, and where each operation writes. */
typedef struct {
    long rows, hidden, heads, kv_heads, size, stream_is_f32;
    float head_eps;
    const float *cos, *sin;
    const int64_t *positions, *prompt, *prompt_columns, *slot, *own_columns;
    long prompt_blocks, own_blocks;
    void *stream;                                           /* [rows, hidden], added to in place */
    const bf16 *delta;                                      /* to be added to it first, or NULL */
    bf16 *normed, *qkv, *q, *k, *seen, *said, *gated, *inner; /* said: what a layer adds, [rows, hidden] */
} Step;

#ifndef __AMX_BF16__

int decode_layers(const Layer *layers, long count, const Step *s) { return 1; }

#else

/* Rows of a thread's own. */
typedef struct {
    long first, count;
} Part;

static void add_norm(Part p, const Step *s, const bf16 *delta, const void *weight, float eps) {
    long at = p.first * s->hidden;
    void *x = (char *)s->stream + at * (s->stream_is_f32 ? sizeof(float) : sizeof(bf16));
    const bf16 *of_part = delta ? delta + at : NULL;
    OF(add_norm, s->stream_is_f32, p.count, s->hidden, x, of_part, weight, eps, x, s->normed + at, NULL);
}

static void turn(Part p, const Step *s, const Layer *l) {
    long q_width = s->heads * s->size, k_width = s->kv_heads * s->size;
    const bf16 *qkv = s->qkv + p.first * (q_width + 2 * k_width);
    bf16 *q = s->q + p.first * q_width, *k = s->k + p.first * k_width;
    OF(turn, s->stream_is_f32, p.count, s->heads, s->kv_heads, s->size, qkv, l->q_norm, l->k_norm, s->head_eps, s->cos,
       s->sin, s->positions + p.first, q, k);
}

/* One token for each row through `count` layers. Returns nonzero without memory. */
int decode_layers(const Layer *layers, long count, const Step *s) {
    const int64_t all = s->rows;
    long q_width = s->heads * s->size, kv_width = s->kv_heads * s->size, chunk_count, taken[count];
    Run runs[s->rows + 1];
    long run_count = runs_of(s->rows, s->heads / s->kv_heads, s->prompt, runs);
    Chunk *tasks = chunks(1, &all, TASK_ROWS, &chunk_count);
    if (!tasks) return 1;
    memset(taken, 0, sizeof taken);
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        long me = omp_get_thread_num(), team = omp_get_num_threads();
        Part mine = {.first = s->rows * me / team};
        mine.count = s->rows * (me + 1) / team - mine.first;
        for (long i = 0; i < count; i++) {
            const Layer *l = layers + i;
            Product qkv = {s->hidden, q_width + 2 * kv_width, s->normed, NULL, l->qkv.columns, l->qkv.bias, s->qkv};
            Product out = {q_width, s->hidden, s->seen, NULL, l->out.columns, l->out.bias, s->said};
            Product gate_up = {s->hidden, 2 * l->width, s->normed, NULL, l->gate_up.columns, l->gate_up.bias, s->gated};
            Product down = {l->width, s->hidden, s->inner, NULL, l->down.columns, l->down.bias, s->said};
            Asked asked = {s->heads, s->q, s->k, s->qkv + q_width + kv_width, q_width + 2 * kv_width, s->seen};
            Cached prompts = {s->kv_heads, s->size, s->prompt_blocks, l->prompt_keys, l->prompt_values, s->prompt,
                              s->prompt_columns};
            Cached own = {s->kv_heads, s->size, s->own_blocks, l->own_keys, l->own_values, s->slot, s->own_columns};
            add_norm(mine, s, i ? s->said : s->delta, l->attention_norm, l->attention_eps);
#pragma omp barrier
            failed |= team_products(&qkv, tasks, chunk_count);
            turn(mine, s, l);
#pragma omp barrier
            team_attend(&asked, &prompts, &own, runs, run_count, taken + i);
#pragma omp barrier
            failed |= team_products(&out, tasks, chunk_count);
            add_norm(mine, s, s->said, l->mlp_norm, l->mlp_eps);
#pragma omp barrier
            if (!l->width) continue;
            failed |= team_products(&gate_up, tasks, chunk_count);
            gate_bf16(mine.count, l->width, s->gated + mine.first * 2 * l->width, s->inner + mine.first * l->width);
#pragma omp barrier
            failed |= team_products(&down, tasks, chunk_count);
        }
    }
    free(tasks);
    return failed;
}

#endif
