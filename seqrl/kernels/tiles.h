/* Sums of 16 x 16 at a time, by the processor's matrix unit (AMX), where there is one. It multiplies bfloat16 and
   adds up in float32, 32 numbers at a step: a tile of rows has 16 rows of 32 numbers, a tile of columns 16 pairs of
   16 columns. Which of two factors is called rows changes no bit of their sums, and neither does what else is
   multiplied with them. */
#ifndef SEQRL_TILES_H
#define SEQRL_TILES_H

#include "chunks.h"
#include "words.h"

#define STEP_NUMBERS 32 /* numbers that a step adds up */
#define TILE 256        /* words of a tile, sums of a square */
#define TASK_ROWS 256   /* rows of a chunk, at most */

/* Whether the processor has a matrix unit and the system lets this process have it. */
int tiles_here(void);

/* See tiles.c. */
void tile_pack(long matrices, long outs, long ins, const void *w, long is_f32, long first, long total,
               uint32_t *columns, uint32_t *transposed);
int tile_products(long matrices, long rows, long ins, long outs, const bf16 *x, const int64_t *token,
                  const uint32_t *w, const int64_t *ends, const float *bias, bf16 *y);
int tile_gradient(long matrices, long rows, long ins, long outs, const bf16 *dy, const bf16 *x, const int64_t *token,
                  const int64_t *ends, long is_f32, long add, const int64_t *part_ends, const int64_t *address);

/* Rows times matrices, as in `tile_products`. */
typedef struct {
    long ins, outs;
    const bf16 *x;
    const int64_t *token;
    const uint32_t *w;
    const float *bias;
    bf16 *y;
} Product;

/* Of `count` chunks of up to TASK_ROWS rows. All threads of a parallel region call it, and none is back before all is
   done. Returns nonzero without memory. */
int team_products(const Product *p, const Chunk *tasks, long count);

/* The same for all rows, of words that `expert_pack` has laid out (strips.c): where there are no tiles. And of some rows by
   one thread. */
void team_strips(int pairs, const Product *p, long stretch, long rows);
void rows_strips(int pairs, const Product *p, long stretch, Share rows);

/* Of up to TASK_ROWS rows of one matrix, by one thread, and the room that this takes, NULL without memory. */
float *rows_room(const Product *p);
void rows_product(const Product *p, long rows, float *room);

#ifdef __AMX_BF16__

INLINE long pieces(long count, long size) { return (count + size - 1) / size; }
INLINE long least(long a, long b) { return a < b ? a : b; }

/* The compiler does not know what tile instructions read: all that was written before is there now. */
INLINE void tiles_read_memory(void) { __asm__ volatile("" ::: "memory"); }

/* Each thread says what its tiles are before it uses them, and gives them back: `rows` of them in all but the last two,
   which are columns. */
INLINE void tiles_of(int rows) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = i < 6 ? rows : 16;
    tiles_read_memory();
    _tile_loadconfig(&shape);
}

INLINE void tiles_on(void) { tiles_of(16); }

INLINE void tiles_off(void) { _tile_release(); }

/* What is wanted next and comes nearer meanwhile, a little at each step lest loads have to wait for it: rows that will
   be written, some at each step, and rows that will be read, all of them a line further at each step. Strides in bytes. */
typedef struct {
    const char *write, *read;
    long write_stride, writes_a_step, read_stride, reads;
} Soon;

/* 32 rows times 32 columns, or 16 rows times 32 where `half`, in squares side by side: sums [2][2][TILE], added to
   what is there where `add`. Rows are `stride` bytes apart and go on `next` bytes after each of `steps`; a step of
   columns is one tile after the other. Columns pass the processor's first cache by, where rows stay. */
INLINE void square(int half, const void *upper, const void *lower, long stride, long next, const uint32_t *left,
                   const uint32_t *right, long steps, int add, float *sums, Soon soon) {
    const char *one = upper, *two = lower;
    tiles_read_memory();
    if (add) {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + TILE, 64);
        if (!half) _tile_loadd(2, sums + 2 * TILE, 64);
        if (!half) _tile_loadd(3, sums + 3 * TILE, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if (!half) _tile_zero(2);
        if (!half) _tile_zero(3);
    }
    for (long s = 0; s < steps; s++, one += next, two += next, left += TILE, right += TILE) {
        _tile_loadd(4, one, stride);
        if (!half) _tile_loadd(5, two, stride);
        _tile_stream_loadd(6, left, 64);
        _tile_stream_loadd(7, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (!half) _tile_dpbf16ps(2, 5, 6);
        if (!half) _tile_dpbf16ps(3, 5, 7);
        for (long i = 0; i < soon.writes_a_step; i++, soon.write += soon.write_stride) __builtin_prefetch(soon.write, 1, 3);
        for (long i = 0; i < soon.reads; i++) __builtin_prefetch(soon.read + i * soon.read_stride + s * 64, 0, 2);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + TILE, 64);
    if (!half) _tile_stored(2, sums + 2 * TILE, 64);
    if (!half) _tile_stored(3, sums + 3 * TILE, 64);
}

/* Rows of a 16 x 16 square of words become its columns. */
INLINE void transpose(__m512i *rows) { exchange(rows, 8), exchange(rows, 4), exchange(rows, 2), exchange(rows, 1); }

/* 16 numbers as bfloat16. */
INLINE __m256i halves(vf x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }

/* The first `count` of 16 lanes. */
INLINE __mmask16 lanes(long count) { return count >= LANES ? 0xffff : (1 << (count < 0 ? 0 : count)) - 1; }

INLINE __m256i rounded(const float *x, long count) {
    if (count >= LANES) return (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x));
    return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes(count), x));
}

/* The first `count` of 32 numbers from x[at] on as 16 words. */
INLINE __m512i words_of_row(int is_f32, const void *x, long at, long count) {
    if (!is_f32 && count >= STEP_NUMBERS) return _mm512_loadu_si512((const bf16 *)x + at);
    if (!is_f32) {
        __mmask32 mask = lanes(count) | (__mmask32)lanes(count - LANES) << LANES;
        return _mm512_maskz_loadu_epi16(mask, (const bf16 *)x + at);
    }
    const float *from = (const float *)x + at;
    return _mm512_inserti64x4(_mm512_castsi256_si512(rounded(from, count)), rounded(from + LANES, count - LANES), 1);
}

INLINE void pairs_of(int is_f32, const void *x, const long *rows, long count, long width, __m512i tiles[2][LANES]) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
#pragma GCC unroll 16
    for (int p = 0; p < LANES; p++) {
        __m512i one = words_of_row(is_f32, x, rows[2 * p], 2 * p < count ? width : 0);
        __m512i two = words_of_row(is_f32, x, rows[2 * p + 1], 2 * p + 1 < count ? width : 0);
        __m512i low = _mm512_unpacklo_epi16(one, two), high = _mm512_unpackhi_epi16(one, two);
        tiles[0][p] = _mm512_permutex2var_epi64(low, first, high);
        tiles[1][p] = _mm512_permutex2var_epi64(low, second, high);
    }
}

/* 32 rows by 32 columns as 16 pairs of rows, in two tiles side by side: of rows, of which rows[r] says where r starts
   in x, the first `count`; of columns the first `width`. Zeros beyond. */
INLINE void pairs_of_rows(int is_f32, const void *x, const long *rows, long count, long width, __m512i tiles[2][LANES]) {
    if (count < STEP_NUMBERS || width < STEP_NUMBERS) pairs_of(is_f32, x, rows, count, width, tiles);
    else pairs_of(is_f32, x, rows, STEP_NUMBERS, STEP_NUMBERS, tiles);
}

#endif
#endif
