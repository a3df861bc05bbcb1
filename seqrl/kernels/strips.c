/* Products of decoding where there is no matrix unit: y = x w^T plus bias, of w as `expert_pack` lays it out.

   They are to be oneDNN's, with which training multiplies, to the last bit. It adds up a stretch of numbers one after
   the other, and then these sums; how long a stretch is it is asked before (products.py). ins and outs are multiples of
   32. */
#include <omp.h>

#include "strips.h"
#include "tiles.h"

/* Of a chunk, while the matrix' next strip comes nearer. */
INLINE void strip_of(int pairs, const Product *p, long stretch, Chunk c, long strip) {
    long strips = p->outs / STRIP, steps = p->ins >> pairs, next = steps * LANES;
    const uint32_t *w = p->w + strip * 2 * next, *after = p->w + (strip + 1) % strips * 2 * next;
    strip_of_rows(pairs, c, steps, stretch >> pairs, p->x, NULL, w, LANES, next, p->bias, p->y, p->outs, strip * STRIP, after);
}

INLINE void products(int pairs, const Product *p, long stretch, long rows) {
    long strips = p->outs / STRIP, chunk = CHUNK;
    while (chunk > ROWS && (rows + chunk - 1) / chunk * strips < 4 * omp_get_num_threads()) chunk /= 2;
    long tasks = (rows + chunk - 1) / chunk * strips;
#pragma omp for schedule(guided, 2)
    for (long t = 0; t < tasks; t++) {
        long first = t / strips * chunk;
        strip_of(pairs, p, stretch, (Chunk){0, first, rows - first < chunk ? rows : first + chunk}, t % strips);
    }
}

void team_strips(int pairs, const Product *p, long stretch, long rows) {
    if (pairs) products(1, p, stretch, rows);
    else products(0, p, stretch, rows);
}

void rows_strips(int pairs, const Product *p, long stretch, Share rows) {
    long end = rows.first + rows.count;
    for (long first = rows.first; first < end; first += CHUNK) {
        Chunk c = {0, first, end - first < CHUNK ? end : first + CHUNK};
        for (long strip = 0; strip < p->outs / STRIP; strip++)
            if (pairs) strip_of(1, p, stretch, c, strip);
            else strip_of(0, p, stretch, c, strip);
    }
}

void strip_products(long pairs, long stretch, long rows, long ins, long outs, const void *x, const uint32_t *w,
                    const float *bias, void *y) {
    Product p = {ins, outs, x, NULL, w, bias, y};
#pragma omp parallel
    team_strips(pairs, &p, stretch, rows);
}
