/* Sums of 16 x 16 at a time, by the processor's matrix unit (AMX), where there is one. It multiplies bfloat16 and
   adds up in float32, 32 numbers at a step: a tile of rows has 16 rows of 32 numbers, a tile of columns 16 pairs of
   16 columns. Which of two factors is called rows changes no bit of their sums, and neither does what else is
   multiplied with them. */
#ifndef SEQRL_TILES_H
#define SEQRL_TILES_H

#include "words.h"

#define STEP_NUMBERS 32 /* numbers that a step adds up */
#define TILE 256        /* words of a tile, sums of a square */

/* Whether the processor has a matrix unit and the system lets this process have it. */
int tiles_here(void);

#ifdef __AMX_BF16__

/* The compiler does not know what tile instructions read: all that was written before is there now. */
INLINE void tiles_read_memory(void) { __asm__ volatile("" ::: "memory"); }

/* Each thread says what its tiles are before it uses them, and gives them back. */
INLINE void tiles_on(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    tiles_read_memory();
    _tile_loadconfig(&shape);
}

INLINE void tiles_off(void) { _tile_release(); }

/* 32 rows times 32 columns, or 16 rows times 32 where `half`, in squares side by side: sums [2][2][TILE], added to
   what is there where `add`. Rows are `stride` bytes apart and go on `next` bytes after each of `steps`; a step of
   columns is one tile after the other. */
INLINE void square(int half, const void *upper, const void *lower, long stride, long next, const uint32_t *left,
                   const uint32_t *right, long steps, int add, float *sums) {
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
        _tile_loadd(6, left, 64);
        _tile_loadd(7, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (!half) _tile_dpbf16ps(2, 5, 6);
        if (!half) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + TILE, 64);
    if (!half) _tile_stored(2, sums + 2 * TILE, 64);
    if (!half) _tile_stored(3, sums + 3 * TILE, 64);
}

/* Rows of a 16 x 16 square of words become its columns. */
INLINE void transpose(__m512i *rows) { exchange(rows, 8), exchange(rows, 4), exchange(rows, 2), exchange(rows, 1); }

#endif
#endif
