/* Products of rows with a matrix whose outputs lie across lanes, two vectors of them at a time (words.h). */
#ifndef SEQRL_STRIPS_H
#define SEQRL_STRIPS_H

#include <limits.h>

#include "chunks.h"
#include "words.h"

#ifdef __AVX512F__
#define ROWS 8 /* of a tile, whose sums are held in registers; a tile has two vectors of columns */
#else
#define ROWS 4
#endif
#define STRIP (2 * LANES)
#define CHUNK 256 /* rows that stay in the processor's cache while strips pass over them, at most */

/* What comes nearer meanwhile: a line of it at every so many steps, a power of two. */
typedef struct {
    const char *line, *end;
    long every;
} Ahead;

/* Adds to `rows` times two vectors of sums, over `steps` words: number d of x[i] lies d * x_stride words after
   its first, the vectors of w d * w_stride words after the first two, which are `next` words apart. */
INLINE void tile(int pairs, int rows, long steps, const uint32_t *const *x, long x_stride, const uint32_t *w,
                 long w_stride, long next, vf sums[][2], Ahead *ahead) {
    vf held[ROWS][2];
    Ahead soon = {0};
    if (ahead) soon = *ahead;
    long others = soon.line < soon.end ? soon.every - 1 : LONG_MAX;
    for (int i = 0; i < rows; i++) held[i][0] = sums[i][0], held[i][1] = sums[i][1];
    for (long d = 0; d < steps; d++) {
        if (ahead && !(d & others)) __builtin_prefetch(soon.line, 0, 3), soon.line += 64;
        word one = words_at(w + d * w_stride), two = words_at(w + d * w_stride + next);
        for (int i = 0; i < rows; i++) {
            word number = splat_word(x[i][d * x_stride]);
            held[i][0] = multiply(pairs, one, number, held[i][0]);
            held[i][1] = multiply(pairs, two, number, held[i][1]);
        }
    }
    for (int i = 0; i < rows; i++) sums[i][0] = held[i][0], sums[i][1] = held[i][1];
    if (ahead) *ahead = soon;
}

/* STRIP columns of y [.., width] for the rows of a chunk: x times w, whose lanes are those columns, plus bias, which may
   be NULL. Words are added up stretch by stretch, and those sums one after the other. The columns `after`, of a strip
   like it, come nearer meanwhile, if there are any. */
INLINE void strip_of_rows(int pairs, Chunk c, long steps, long stretch, const void *x, const int64_t *token,
                          const uint32_t *w, long w_stride, long next, const float *bias, void *y, long width,
                          long column, const uint32_t *after) {
    long tiles = (c.end - c.first + ROWS - 1) / ROWS;
    Ahead ahead = {(const char *)after, (const char *)(after + 2 * LANES * steps), 1};
    while (4 * ahead.every <= tiles) ahead.every *= 2; /* a step has two lines */
    for (long r = c.first; r < c.end; r += ROWS) {
        const uint32_t *row[ROWS];
        vf sums[ROWS][2];
        long count = c.end - r < ROWS ? c.end - r : ROWS;
        for (long i = 0; i < ROWS; i++) { /* beyond the last of them it again */
            long one = r + (i < count ? i : count - 1);
            row[i] = (const uint32_t *)x + (token ? token[one] : one) * steps;
        }
        for (long from = 0; from < steps; from += stretch) {
            long some = steps - from < stretch ? steps - from : stretch;
            vf part[ROWS][2] = {{{0}}};
            if (count > ROWS / 2) tile(pairs, ROWS, some, row, 1, w + from * w_stride, w_stride, next, part, after ? &ahead : NULL);
            else if (count > 1) tile(pairs, ROWS / 2, some, row, 1, w + from * w_stride, w_stride, next, part, after ? &ahead : NULL);
            else tile(pairs, 1, some, row, 1, w + from * w_stride, w_stride, next, part, after ? &ahead : NULL);
            for (long i = 0; i < ROWS; i++) {
                for (int v = 0; v < 2; v++) sums[i][v] = from ? sums[i][v] + part[i][v] : part[i][v];
                row[i] += some;
            }
        }
        for (long i = 0; i < count; i++)
            for (int v = 0; v < 2; v++) {
                if (bias) sums[i][v] += load_f32(bias + column + v * LANES);
                store(pairs, y, (r + i) * width + column + v * LANES, sums[i][v]);
            }
    }
}

#endif
