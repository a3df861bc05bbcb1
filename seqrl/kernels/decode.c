/* Layers of a token step, all of them in one call, in which nobody waits for Python. The operations are those of
   training, so that the numbers are.

   With many rows each thread goes through all layers with rows of its own and waits for nobody: that one is held up
   by the system, or far from the other's cache, costs little then. With few, and on tiles, threads share each
   operation, and wait for each other after it. */
#include <omp.h>

#include "cache.h"
#include "tiles.h"
#include "tokens.h"

/* A matrix laid out for tiles, or by `expert_pack` with a stretch (strips.c), and a bias or NULL. */
typedef struct {
    const uint32_t *columns;
    const float *bias;
    long stretch;
} Linear;

/* As rollout/layers.py fills it in. Weights of norms are in the stream's type; the two of heads may be NULL. */
typedef struct {
    const void *attention_norm, *q_norm, *k_norm, *mlp_norm;
    float attention_eps, mlp_eps;
    Linear qkv, out, gate_up, down;
    long width; /* of the gated layer; 0: what comes after its norm is left to the caller */
    uint32_t *prompt_keys, *own_keys;
    void *prompt_values, *own_values;
} Layer;

/* The rows of a step, and where each operation writes. */
typedef struct {
    long rows, hidden, heads, kv_heads, size, stream_is_f32;
    long pairs;    /* all but the stream is bfloat16; else float32 */
    long on_tiles; /* how matrices and cache are laid out */
    float head_eps;
    const float *cos, *sin;
    const int64_t *positions, *prompt, *prompt_columns, *slot, *own_columns;
    long prompt_blocks, own_blocks;
    void *stream;                                           /* [rows, hidden], added to in place */
    const void *delta;                                      /* to be added to it first, or NULL */
    void *normed, *qkv, *q, *k, *seen, *said, *gated, *inner; /* said: what a layer adds, [rows, hidden] */
} Step;

#define APART 64 /* rows for each thread, from which on they are its own, */
#define UNIT 8   /* so many at a time, as products take them */

static void *from(const Step *s, const void *x, long number) { return (void *)at(s->pairs, x, number); }

static void add_norm(Share p, const Step *s, const void *delta, const void *weight, float eps) {
    long first = p.first * s->hidden;
    void *x = (char *)s->stream + first * (s->stream_is_f32 ? sizeof(float) : sizeof(bf16));
    const void *of_part = delta ? from(s, delta, first) : NULL;
    void *y = from(s, s->normed, first);
    if (s->pairs) OF(add_norm, s->stream_is_f32, p.count, s->hidden, x, of_part, weight, eps, x, y, NULL);
    else add_norm_f32_f32(p.count, s->hidden, x, of_part, weight, eps, x, y, NULL);
}

static void turn(Share p, const Step *s, const Layer *l) {
    long q_width = s->heads * s->size, k_width = s->kv_heads * s->size;
    const void *qkv = from(s, s->qkv, p.first * (q_width + 2 * k_width));
    void *q = from(s, s->q, p.first * q_width), *k = from(s, s->k, p.first * k_width);
    const int64_t *positions = s->positions + p.first;
    if (s->pairs)
        OF(turn, s->stream_is_f32, p.count, s->heads, s->kv_heads, s->size, qkv, l->q_norm, l->k_norm, s->head_eps, s->cos,
           s->sin, positions, q, k);
    else
        turn_f32_f32(p.count, s->heads, s->kv_heads, s->size, qkv, l->q_norm, l->k_norm, s->head_eps, s->cos, s->sin,
                     positions, q, k);
}

static void gate(Share p, const Step *s, const Layer *l) {
    const void *gate_up = from(s, s->gated, p.first * 2 * l->width);
    void *inner = from(s, s->inner, p.first * l->width);
    if (s->pairs) gate_bf16(p.count, l->width, gate_up, inner);
    else gate_f32(p.count, l->width, gate_up, inner);
}

/* Of the rows of `apart`, or, where it is NULL, by all threads, which have waited for each other at the end. Returns
   nonzero without memory. */
static int product(const Step *s, const Share *apart, Product p, long stretch, const Chunk *tasks, long count) {
#ifdef __AMX_BF16__
    if (s->on_tiles) return team_products(&p, tasks, count);
#endif
    if (apart) rows_strips(s->pairs, &p, stretch, *apart);
    else team_strips(s->pairs, &p, stretch, s->rows);
    return 0;
}

static long runs(const Step *s, Run *found) {
#ifdef __AMX_BF16__
    if (s->on_tiles) return runs_of(s->rows, s->heads / s->kv_heads, s->prompt, found);
#endif
    return 0;
}

static void attend(const Step *s, const Share *apart, const Asked *asked, const Cached *prompts, const Cached *own,
                   const Run *found, long count, long *taken) {
#ifdef __AMX_BF16__
    if (s->on_tiles) {
        team_attend(asked, prompts, own, found, count, taken);
        return;
    }
#endif
    if (apart) attend_words(s->pairs, *apart, asked, prompts, own);
    else team_attend_words(s->pairs, s->rows, asked, prompts, own);
}

static void wait_for_others(const Share *apart) {
    if (!apart) {
#pragma omp barrier
    }
}

/* One token for each row through `count` layers. Returns nonzero without memory. */
int decode_layers(const Layer *layers, long count, const Step *s) {
    const int64_t all = s->rows;
    long q_width = s->heads * s->size, kv_width = s->kv_heads * s->size, chunk_count, taken[count];
    Run found[s->rows + 1];
    long found_count = runs(s, found);
    Chunk *tasks = chunks(1, &all, TASK_ROWS, &chunk_count);
    if (!tasks) return 1;
    memset(taken, 0, sizeof taken);
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        long me = omp_get_thread_num(), team = omp_get_num_threads();
        long unit = !s->on_tiles && s->rows >= APART * team ? UNIT : 1, units = (s->rows + unit - 1) / unit;
        Share mine = {units * me / team * unit}, *apart = unit > 1 ? &mine : NULL;
        mine.count = me + 1 < team ? units * (me + 1) / team * unit - mine.first : s->rows - mine.first;
        for (long i = 0; i < count; i++) {
            const Layer *l = layers + i;
            Product qkv = {s->hidden, q_width + 2 * kv_width, s->normed, NULL, l->qkv.columns, l->qkv.bias, s->qkv};
            Product out = {q_width, s->hidden, s->seen, NULL, l->out.columns, l->out.bias, s->said};
            Product gate_up = {s->hidden, 2 * l->width, s->normed, NULL, l->gate_up.columns, l->gate_up.bias, s->gated};
            Product down = {l->width, s->hidden, s->inner, NULL, l->down.columns, l->down.bias, s->said};
            Asked asked = {s->heads, s->q, s->k, from(s, s->qkv, q_width + kv_width), q_width + 2 * kv_width, s->seen};
            Cached prompts = {s->kv_heads, s->size, s->prompt_blocks, l->prompt_keys, l->prompt_values, s->prompt,
                              s->prompt_columns};
            Cached own = {s->kv_heads, s->size, s->own_blocks, l->own_keys, l->own_values, s->slot, s->own_columns};
            add_norm(mine, s, i ? s->said : s->delta, l->attention_norm, l->attention_eps);
            wait_for_others(apart);
            failed |= product(s, apart, qkv, l->qkv.stretch, tasks, chunk_count);
            turn(mine, s, l);
            wait_for_others(apart);
            attend(s, apart, &asked, &prompts, &own, found, found_count, taken + i);
            wait_for_others(apart);
            failed |= product(s, apart, out, l->out.stretch, tasks, chunk_count);
            add_norm(mine, s, s->said, l->mlp_norm, l->mlp_eps);
            wait_for_others(apart);
            if (!l->width) continue;
            failed |= product(s, apart, gate_up, l->gate_up.stretch, tasks, chunk_count);
            gate(mine, s, l);
            wait_for_others(apart);
            failed |= product(s, apart, down, l->down.stretch, tasks, chunk_count);
        }
    }
    free(tasks);
    return failed;
}
