/* A matrix unit's instructions by vectors of pairs, so that what uses them runs on a processor without one. Put before
   every source; only bits that one instruction rounds otherwise can differ from the unit's. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps

/* Of a thread, whichever source asks. */
__attribute__((weak)) __thread uint8_t tile_numbers[8][16][64], tile_rows[8];

static inline void tile_load(int t, const void *p, long stride) {
    memset(tile_numbers[t], 0, sizeof tile_numbers[t]);
    for (int r = 0; r < tile_rows[t]; r++) memcpy(tile_numbers[t][r], (const char *)p + r * stride, 64);
}

static inline void tile_store(int t, void *p, long stride) {
    for (int r = 0; r < tile_rows[t]; r++) memcpy((char *)p + r * stride, tile_numbers[t][r], 64);
}

static inline void tile_multiply(int sums, int rows, int columns) {
    for (int r = 0; r < tile_rows[sums]; r++) {
        __m512 sum = _mm512_loadu_ps(tile_numbers[sums][r]);
        for (int k = 0; k < 16; k++) {
            uint32_t pair;
            memcpy(&pair, tile_numbers[rows][r] + 4 * k, 4);
            __m512i column = _mm512_loadu_si512(tile_numbers[columns][k]);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)column);
        }
        _mm512_storeu_ps(tile_numbers[sums][r], sum);
    }
}

/* The rows of each tile stand 48 bytes into what says how they are. */
#define _tile_loadconfig(shape) memcpy(tile_rows, (const char *)(shape) + 48, sizeof tile_rows)
#define _tile_release() ((void)0)
#define _tile_zero(t) memset(tile_numbers[t], 0, sizeof tile_numbers[t])
#define _tile_loadd(t, p, stride) tile_load(t, p, stride)
#define _tile_stream_loadd(t, p, stride) tile_load(t, p, stride)
#define _tile_stored(t, p, stride) tile_store(t, p, stride)
#define _tile_dpbf16ps(sums, rows, columns) tile_multiply(sums, rows, columns)
#define syscall(...) 0 /* the system lets the process have it */
