/* Rows that are sorted by the matrix they belong to, in chunks that each belong to one. */
#ifndef SEQRL_CHUNKS_H
#define SEQRL_CHUNKS_H

#include <stdint.h>
#include <stdlib.h>

typedef struct {
    long matrix, first, end; /* rows */
} Chunk;

/* Rows of a thread's own. */
typedef struct {
    long first, count;
} Share;

/* Matrix m has the rows up to ends[m], from where the one before it ends. NULL without memory. */
static inline Chunk *chunks(long matrices, const int64_t *ends, long size, long *count) {
    long total = 0, at = 0;
    for (long m = 0; m < matrices; m++) total += (ends[m] - (m ? ends[m - 1] : 0) + size - 1) / size;
    Chunk *result = malloc(sizeof(Chunk) * (total + 1));
    *count = total;
    if (!result) return NULL;
    for (long m = 0; m < matrices; m++)
        for (long r = m ? ends[m - 1] : 0; r < ends[m]; r += size)
            result[at++] = (Chunk){m, r, ends[m] - r < size ? ends[m] : r + size};
    return result;
}

#endif
