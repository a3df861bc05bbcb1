/* Statistics of logits and their gradient, for one storage type C. A tile holds `rows` tokens by `columns`
   entries of the vocabulary, of which `first` is the first; its rows lie `stride` numbers apart. `scale` is
   the inverse temperature. Logarithms of probabilities below -88 count as -88, where exp is 0: a logit of
   minus infinity adds 0. */

#define BLOCK 1024 /* columns that stay in the nearest cache between their two passes */

static inline vf NAME(scaled)(const C *row, long at, long columns, float scale) {
    if (at + LANES <= columns) return LOAD_C(row + at) * scale;
    C rest[LANES];
    memcpy(rest, row + at, (columns - at) * sizeof(C));
    vf x = splat(-INFINITY);
    for (long i = 0; i < columns - at; i++) x[i] = GET_C(rest + i) * scale;
    return x;
}

/* Takes a tile into what is known of each row: the largest logit m, the sums of exp(x - m), of
   exp(x - m) (x - m) and of exp(x - m)^2, and the logit of its token where the tile has it. */
void NAME(head_fold)(long rows, long columns, long stride, long first, float scale, const C *tile,
                     const int64_t *tokens, float *most_yet, float *total, float *moment, float *squares,
                     float *chosen) {
#pragma omp parallel for schedule(static) if (rows * columns > 8192)
    for (long r = 0; r < rows; r++) {
        const C *row = tile + r * stride;
        for (long from = 0; from < columns; from += BLOCK) {
            long end = from + BLOCK < columns ? from + BLOCK : columns;
            vf most = splat(most_yet[r]), t = {0}, d = {0}, s = {0};
            for (long i = from; i < end; i += LANES) most = larger(NAME(scaled)(row, i, columns, scale), most);
            float top = largest(most), step = most_yet[r] - top, keep = expf(step);
            for (long i = from; i < end; i += LANES) {
                vf z = NAME(scaled)(row, i, columns, scale) - top;
                z = pick(z < -88.0f, splat(-88.0f), z);
                vf e = vexp(z);
                t += e, d += e * z, s += e * e;
            }
            moment[r] = (moment[r] + total[r] * step) * keep + sum(d);
            total[r] = total[r] * keep + sum(t);
            squares[r] = squares[r] * keep * keep + sum(s);
            most_yet[r] = top;
        }
        long at = tokens[r] - first;
        if (at >= 0 && at < columns) chosen[r] = GET_C(row + at) * scale;
    }
}

/* out = p (a + b log p + c p), and for the row's token d more; log p = x - log_total. `out` may be the tile. */
void NAME(head_gradient)(long rows, long columns, long stride, long first, float scale, const C *tile,
                         const int64_t *tokens, const float *log_total, const float *a, const float *b,
                         const float *c, const float *d, C *out, long out_stride) {
#pragma omp parallel for schedule(static) if (rows * columns > 8192)
    for (long r = 0; r < rows; r++) {
        const C *row = tile + r * stride;
        C *to = out + r * out_stride;
        long at = tokens[r] - first, here = at >= 0 && at < columns;
        float z_token = here ? GET_C(row + at) * scale - log_total[r] : 0;
        for (long i = 0; i < columns; i += LANES) {
            vf z = NAME(scaled)(row, i, columns, scale) - log_total[r];
            z = pick(z < -88.0f, splat(-88.0f), z);
            vf p = vexp(z), g = p * (a[r] + b[r] * z + c[r] * p);
            if (i + LANES <= columns)
                STORE_C(to + i, g);
            else
                for (long j = i; j < columns; j++) PUT_C(to + j, g[j - i]);
        }
        if (here) {
            float p = expf(z_token);
            PUT_C(to + at, p * (a[r] + b[r] * z_token + c[r] * p) + d[r]);
        }
    }
}

#undef BLOCK
