/* Products of matrices on tiles (tiles.h): y = x w^T of one matrix or of rows sorted by theirs, and dw = dy^T x.
   No sum depends on how many rows there are, so that decoding and training get the same bits.

   Row r of x is x[token[r]], x[r] where token is NULL. Matrix m has the rows up to ends[m], from where the one before
   it ends; the only one has all `rows` where ends is NULL. A matrix [outs, ins] is laid out in columns of tiles, zeros
   up to whole ones: [outs / 16, ins / 32, 16 pairs, 16 outs, 2]. So is its transpose, for dx = dy w. */
#define _GNU_SOURCE
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tiles.h"

#define PANEL 32            /* rows, and columns, of a square of squares */
#define NEAR_STEPS 16       /* of a panel of rows that stay in the processor's first cache while columns pass */
#define NEAR (1 << 20)      /* bytes of columns that stay in its second cache while rows pass */
#define BROAD 512           /* columns that a task adds up over stretches of steps, at most; rows are a chunk */
#define TALL 512            /* rows and columns of a gradient that a task adds up, at most */
#define WIDE 512
#define TASKS_PER_THREAD 2L /* at least, where there is so much to share out */

#ifndef __AMX_BF16__

int tiles_here(void) { return 0; }
void tile_pack(long matrices, long outs, long ins, const void *w, long is_f32, long first, long total,
               uint32_t *columns, uint32_t *transposed) {}
int tile_products(long matrices, long rows, long ins, long outs, const bf16 *x, const int64_t *token,
                  const uint32_t *w, const int64_t *ends, const float *bias, bf16 *y) {
    return 1;
}
int tile_gradient(long matrices, long rows, long ins, long outs, const bf16 *dy, const bf16 *x, const int64_t *token,
                  const int64_t *ends, long is_f32, long add, const int64_t *part_ends, const int64_t *address) {
    return 1;
}

#else

int tiles_here(void) {
    static int known = -1;
    if (known < 0) known = syscall(SYS_arch_prctl, 0x1023, 18) == 0; /* ARCH_REQ_XCOMP_PERM, tile data */
    return known;
}

/* 32 outputs of one matrix, from `out` of its own and `place` of those it is joined with. */
INLINE void pack_outputs(int is_f32, long ins, const void *w, long count, long place, long total, uint32_t *columns,
                         uint32_t *transposed) {
    long in_steps = pieces(ins, STEP_NUMBERS), out_words = pieces(total, STEP_NUMBERS) * TILE;
    __m512i tiles[2][LANES];
    for (long half = 0; columns && half < count; half += LANES)
        for (long s = 0; s < in_steps; s++) {
            uint32_t *to = columns + ((place + half) / LANES * in_steps + s) * TILE;
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                long have = half + i < count ? ins - s * STEP_NUMBERS : 0;
                tiles[0][i] = words_of_row(is_f32, w, (half + i) * ins + s * STEP_NUMBERS, have);
            }
            transpose(tiles[0]);
            for (int i = 0; i < LANES; i++) _mm512_storeu_si512(to + i * LANES, tiles[0][i]);
        }
    long rows[STEP_NUMBERS], pairs = place + count == total ? (out_words / LANES) - place / 2 : count / 2;
    if (pairs > LANES) pairs = LANES;
    for (long i = 0; transposed && i < ins; i += STEP_NUMBERS) {
        for (long r = 0; r < STEP_NUMBERS; r++) rows[r] = r * ins + i;
        pairs_of_rows(is_f32, w, rows, count, ins - i, tiles);
        for (long half = 0; half < 2 && i + half * LANES < ins; half++) {
            uint32_t *to = transposed + (i / LANES + half) * out_words + place / 2 * LANES;
            for (long p = 0; p < pairs; p++) _mm512_storeu_si512(to + p * LANES, tiles[half][p]);
        }
    }
}

/* Lays out w [matrices, outs, ins], rows `first` .. + outs of matrices that have `total`: in columns of tiles, for
   x w^T, and its transpose, for dy w; either may be NULL. first is a multiple of 16, so is outs where more rows follow. */
void tile_pack(long matrices, long outs, long ins, const void *w, long is_f32, long first, long total,
               uint32_t *columns, uint32_t *transposed) {
    long columns_words = pieces(total, LANES) * pieces(ins, STEP_NUMBERS) * TILE;
    long transposed_words = pieces(ins, LANES) * pieces(total, STEP_NUMBERS) * TILE;
#pragma omp parallel for schedule(static) collapse(2)
    for (long m = 0; m < matrices; m++)
        for (long out = 0; out < outs; out += STEP_NUMBERS) {
            uint32_t *c = columns ? columns + m * columns_words : NULL;
            uint32_t *t = transposed ? transposed + m * transposed_words : NULL;
            long count = least(outs - out, STEP_NUMBERS), at = (m * outs + out) * ins;
            if (is_f32) pack_outputs(1, ins, (const float *)w + at, count, first + out, total, c, t);
            else pack_outputs(0, ins, (const bf16 *)w + at, count, first + out, total, c, t);
        }
}

/* `count` rows of two squares side by side, as bfloat16, into y from `column` of `width` on. */
INLINE void put_rows(const float *sums, long count, const float *bias, long column, long width, bf16 *y) {
    __mmask16 one = lanes(width - column), two = lanes(width - column - LANES);
    __m512 of_one = bias ? _mm512_maskz_loadu_ps(one, bias + column) : _mm512_setzero_ps();
    __m512 of_two = bias ? _mm512_maskz_loadu_ps(two, bias + column + LANES) : _mm512_setzero_ps();
    for (long i = 0; i < count; i++) {
        __m512 left = _mm512_load_ps(sums + i * LANES), right = _mm512_load_ps(sums + TILE + i * LANES);
        if (bias) left = _mm512_add_ps(left, of_one), right = _mm512_add_ps(right, of_two);
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(right, left);
        _mm512_mask_storeu_epi16(y + i * width + column, one | (__mmask32)two << LANES, both);
    }
}

/* Some steps of a panel of 32 rows, `stride` bytes apart, of which `count` from r on are there; the others are zeros. */
typedef struct {
    long r, count, step, steps, stride;
    const bf16 *rows;
} Part;

/* The i-th part of a chunk: all its panels for one stretch of steps after the other. `copy` takes rows that do not lie
   as they are wanted. */
static Part part(const Product *p, Chunk c, long i, bf16 *copy) {
    long panels = pieces(c.end - c.first, PANEL), steps = pieces(p->ins, STEP_NUMBERS);
    long r = c.first + i % panels * PANEL, step = i / panels * NEAR_STEPS, number = step * STEP_NUMBERS;
    Part a = {r, least(c.end - r, PANEL), step, least(steps - step, NEAR_STEPS), p->ins * 2, p->x + r * p->ins + number};
    if (!p->token && a.count == PANEL && p->ins % STEP_NUMBERS == 0) return a;
    for (long j = 0; j < PANEL; j++)
        for (long s = 0; s < a.steps; s++) {
            long row = p->token && j < a.count ? p->token[r + j] : r + j, at = number + s * STEP_NUMBERS;
            __m512i numbers = words_of_row(0, p->x, row * p->ins + at, j < a.count ? p->ins - at : 0);
            _mm512_storeu_si512(copy + (j * a.steps + s) * STEP_NUMBERS, numbers);
        }
    a.rows = copy, a.stride = a.steps * 64;
    return a;
}

/* How a product is cut: into strips of columns, and its sums into stretches of steps. */
typedef struct {
    long steps, stretches, strip;
} Cut;

/* Into at least so many strips, where they are wide enough. */
static Cut cut(const Product *p, long wanted) {
    long steps = pieces(p->ins, STEP_NUMBERS), stretches = pieces(steps, NEAR_STEPS);
    long most = stretches > 1 ? BROAD / PANEL : NEAR / (steps * 64 * PANEL) + 1;
    return (Cut){steps, stretches, PANEL * least(pieces(pieces(p->outs, wanted), PANEL), most)};
}

/* Squares whose sums are added to later. */
static long held(Cut cut) { return cut.stretches > 1 ? TASK_ROWS / PANEL * (cut.strip / PANEL) : 1; }

static float *room_for(Cut cut) { return aligned_alloc(64, (held(cut) * 4 + NEAR_STEPS * 2) * TILE * 4); }

/* Columns `from` .. `to` of a chunk; sums: as room_for makes it. */
static void product_task(const Product *p, Cut cut, Chunk c, long from, long to, float *sums) {
    long steps = cut.steps, out_blocks = pieces(p->outs, LANES), squares = pieces(to - from, PANEL);
    long panels = pieces(c.end - c.first, PANEL), rows_a_square = pieces(PANEL, squares);
    const uint32_t *matrix = p->w + c.matrix * out_blocks * steps * TILE;
    bf16 *copy = (bf16 *)(sums + held(cut) * 4 * TILE);
    for (long i = 0; i < panels * cut.stretches; i++) {
        Part a = part(p, c, i, copy);
        const bf16 *upper = a.rows, *lower = upper + LANES * a.stride / 2;
        bf16 *y = p->y + a.r * p->outs;
        int last = a.step + a.steps == steps;
        Soon soon = {.write_stride = p->outs * 2, .read_stride = p->ins * 2};
        if (last) soon.writes_a_step = pieces(a.count, a.steps);
        if (!p->token && i + 1 < panels * cut.stretches) soon.reads = rows_a_square;
        long next = (i + 1) / panels * NEAR_STEPS * STEP_NUMBERS;
        soon.read = (const char *)(p->x + (c.first + (i + 1) % panels * PANEL) * p->ins + next);
        for (long j = 0; j < squares; j++, soon.read += rows_a_square * soon.read_stride) {
            long column = from + j * PANEL;
            const uint32_t *left = matrix + (column / LANES * steps + a.step) * TILE;
            const uint32_t *right = column / LANES + 1 < out_blocks ? left + steps * TILE : left;
            float *square_sums = cut.stretches > 1 ? sums + (i % panels * squares + j) * 4 * TILE : sums;
            soon.write = (const char *)(y + column);
            if (a.count > LANES) square(0, upper, lower, a.stride, 64, left, right, a.steps, a.step > 0, square_sums, soon);
            else square(1, upper, lower, a.stride, 64, left, right, a.steps, a.step > 0, square_sums, soon);
            if (!last) continue;
            put_rows(square_sums, least(a.count, LANES), p->bias, column, p->outs, y);
            put_rows(square_sums + 2 * TILE, a.count - LANES, p->bias, column, p->outs, y + LANES * p->outs);
        }
    }
}

int team_products(const Product *p, const Chunk *tasks, long count) {
    Cut shared = cut(p, pieces(TASKS_PER_THREAD * omp_get_num_threads(), count ? count : 1));
    float *sums = room_for(shared);
    tiles_on();
#pragma omp for schedule(dynamic, 1)
    for (long t = 0; t < count * pieces(p->outs, shared.strip); t++) {
        if (!sums) continue;
        long from = t / count * shared.strip, to = least(p->outs, from + shared.strip);
        product_task(p, shared, tasks[t % count], from, to, sums); /* one after the other, so that columns stay near */
    }
    tiles_off();
    free(sums);
    return !sums;
}

float *rows_room(const Product *p) { return room_for(cut(p, 1)); }

void rows_product(const Product *p, long rows, float *room) {
    Cut alone = cut(p, 1);
    tiles_on();
    for (long from = 0; from < p->outs; from += alone.strip)
        product_task(p, alone, (Chunk){0, 0, rows}, from, least(p->outs, from + alone.strip), room);
    tiles_off();
}

/* y [rows, outs] = x w^T + bias, rounded once. Returns nonzero without memory. */
int tile_products(long matrices, long rows, long ins, long outs, const bf16 *x, const int64_t *token,
                  const uint32_t *w, const int64_t *ends, const float *bias, bf16 *y) {
    const int64_t all = rows;
    long count;
    Chunk *tasks = chunks(matrices, ends ? ends : &all, TASK_ROWS, &count);
    Product product = {ins, outs, x, token, w, bias, y};
    int failed = !tasks;
#pragma omp parallel if (!failed) reduction(| : failed)
    if (tasks) failed |= team_products(&product, tasks, count);
    free(tasks);
    return failed;
}

/* One factor of a gradient: some columns of rows that are summed over. */
typedef struct {
    const bf16 *x;
    const int64_t *token;
    long stride, width;
} Factor;

/* Columns `column` .. `end` of `count` rows from r on, as a step of tiles: [columns / 16, steps, TILE], of rows where
   `across`. */
INLINE void pack_step(int across, Factor f, long r, long count, long column, long end, long steps, uint32_t *out) {
    long rows[STEP_NUMBERS];
    for (long i = 0; i < STEP_NUMBERS; i++) rows[i] = (f.token && i < count ? f.token[r + i] : r + i) * f.stride + column;
    for (; column < end; column += STEP_NUMBERS, out += 2 * steps * TILE) {
        __m512i tiles[2][LANES];
        pairs_of_rows(0, f.x, rows, count, end - column, tiles);
        for (int half = 0; half < 2; half++) {
            if (across) transpose(tiles[half]);
            for (int i = 0; i < LANES; i++) _mm512_storeu_si512(out + half * steps * TILE + i * LANES, tiles[half][i]);
        }
        for (long i = 0; i < STEP_NUMBERS; i++) rows[i] += STEP_NUMBERS;
    }
}

/* Where gradients go: matrices [matrices, outs_i, ins], joined along the outputs, of which the i-th end at ends[i]. */
typedef struct {
    long ins, is_f32, add;
    const int64_t *ends, *address;
} Gradients;

/* A square of sums of matrix m into its place, from `row` and `column` on. */
INLINE void put_square(const float *sums, int turn, const Gradients *g, long m, long row, long column) {
    __m512i tile[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) tile[i] = _mm512_load_si512(sums + i * LANES);
    if (turn) transpose(tile);
    __mmask16 mask = lanes(g->ins - column);
    long p = 0;
    while (row >= g->ends[p]) p++;
    long start = p ? g->ends[p - 1] : 0, outs = g->ends[p] - start;
    void *dw = (void *)g->address[p];
    for (long i = 0; i < LANES && row + i < start + outs; i++) {
        long at = (m * outs + row + i - start) * g->ins + column;
        __m512 value = (__m512)tile[i];
        if (g->is_f32) {
            float *to = (float *)dw + at;
            if (g->add) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, to));
            /* Around the caches, where a line is written whole: what it holds is not read first. */
            if (!g->add && mask == 0xffff && (uintptr_t)to % 64 == 0) _mm512_stream_ps(to, value);
            else _mm512_mask_storeu_ps(to, mask, value);
        } else
            _mm256_mask_storeu_epi16((bf16 *)dw + at, mask, (__m256i)_mm512_cvtneps_pbh(value));
    }
}

/* dw [matrices, outs, ins] = dy^T x, or added to it where `add`, which goes with float32; for parts of its outputs,
   which end at part_ends [.., multiples of 16, outs], at an address each. Returns nonzero without memory. */
int tile_gradient(long matrices, long rows, long ins, long outs, const bf16 *dy, const bf16 *x, const int64_t *token,
                  const int64_t *ends, long is_f32, long add, const int64_t *part_ends, const int64_t *address) {
    const int64_t all = rows;
    long count;
    Chunk *steps = chunks(matrices, ends ? ends : &all, STEP_NUMBERS, &count);
    long *first = malloc(sizeof(long) * (matrices + 1)); /* step of each matrix */
    /* The narrower factor is turned into rows, once; the wider one lies in columns, which each task makes for itself. */
    int turn = outs >= ins;
    Factor of_x = {x, token, ins, ins}, of_y = {dy, NULL, outs, outs};
    Gradients g = {ins, is_f32, add, part_ends, address};
    Factor upper = turn ? of_x : of_y, left = turn ? of_y : of_x;
    uint32_t *turned = aligned_alloc(64, (pieces(upper.width, PANEL) * count * 2 + 1) * TILE * 4);
    long tall = least(pieces(upper.width, PANEL) * PANEL, TALL), wide = WIDE;
    while (wide > PANEL && matrices * pieces(left.width, wide) < TASKS_PER_THREAD * omp_get_max_threads()) wide /= 2;
    long across = pieces(left.width, wide), tasks = pieces(upper.width, tall) * across;
    int failed = !steps || !first || !turned;
    for (long m = 0; m <= matrices && !failed; m++) first[m] = 0;
    for (long s = 0; s < count && !failed; s++) first[steps[s].matrix + 1]++;
    for (long m = 0; m < matrices && !failed; m++) first[m + 1] += first[m];
#pragma omp parallel if (!failed)
    {
        float *sums = failed ? NULL : aligned_alloc(64, tall * wide * sizeof(float));
        uint32_t *columns = failed ? NULL : aligned_alloc(64, wide / LANES * NEAR_STEPS * TILE * 4);
        if (!sums || !columns) failed = 1;
        int able = sums && columns;
#pragma omp for schedule(static)
        for (long s = 0; s < count; s++)
            if (able) pack_step(1, upper, steps[s].first, steps[s].end - steps[s].first, 0, upper.width, count, turned + s * TILE);
        tiles_on();
#pragma omp for schedule(dynamic, 1)
        for (long t = 0; t < matrices * tasks; t++) {
            if (!able) continue;
            long m = t / tasks, row = t % tasks / across * tall, column = t % tasks % across * wide;
            long row_end = least(upper.width, row + tall), column_end = least(left.width, column + wide);
            for (long s = first[m]; s < first[m + 1] || s == first[m]; s += NEAR_STEPS) {
                long near = least(first[m + 1] - s, NEAR_STEPS);
                for (long i = 0; i < near; i++) {
                    Chunk c = steps[s + i];
                    pack_step(0, left, c.first, c.end - c.first, column, column_end, NEAR_STEPS, columns + i * TILE);
                }
                float *at = sums;
                for (long r = row; r < row_end; r += PANEL)
                    for (long c = column; c < column_end; c += PANEL, at += 4 * TILE) {
                        const uint32_t *u = turned + (r / LANES * count + s) * TILE;
                        const uint32_t *l = columns + (c - column) / LANES * NEAR_STEPS * TILE;
                        square(0, u, u + count * TILE, 64, TILE * 4, l, l + NEAR_STEPS * TILE, near, s > first[m], at, (Soon){0});
                    }
            }
            float *at = sums;
            for (long r = row; r < row_end; r += PANEL)
                for (long c = column; c < column_end; c += PANEL, at += 4 * TILE)
                    for (int q = 0; q < 4; q++) {
                        long i = r + q / 2 * LANES, j = c + q % 2 * LANES;
                        if (i >= row_end || j >= column_end) continue;
                        if (turn) put_square(at + q * TILE, 1, &g, m, j, i);
                        else put_square(at + q * TILE, 0, &g, m, i, j);
                    }
        }
        tiles_off();
        free(sums), free(columns);
    }
    free(steps), free(first), free(turned);
    return failed;
}

#endif
