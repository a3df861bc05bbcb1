/* What treats each token by itself. Included once for each pair of types: S of the residual stream and
   of the norms' weights, C of what goes into and comes out of matrix products. Widths are multiples of 16.
   The sums over a row are those of 16 lanes: they do not depend on how many rows there are, so that decoding
   and training make the same numbers of the same token. */

/* x_out = x + delta, y = x_out / rms(x_out) * weight. delta may be NULL. `rstd` [rows], may be NULL. */
void NAME(add_norm)(long rows, long width, const S *x, const C *delta, const S *weight, float eps, S *x_out,
                    C *y, float *rstd) {
    int far = is_far(y, rows * width * sizeof(C));
#pragma omp parallel for schedule(static) if (rows * width > 16384)
    for (long r = 0; r < rows; r++) {
        const S *from = x + r * width;
        S *to = x_out + r * width;
        vf squares = {0};
        for (long i = 0; i < width; i += LANES) {
            vf value = LOAD_S(from + i);
            fetch_ahead(from + i);
            if (delta) {
                fetch_ahead(delta + r * width + i);
                STORE_S(to + i, value + LOAD_C(delta + r * width + i));
                value = LOAD_S(to + i);
            } else if (to != from)
                STORE_S(to + i, value);
            squares += value * value;
        }
        float scale = 1.0f / sqrtf(sum(squares) / width + eps);
        if (rstd) rstd[r] = scale;
        for (long i = 0; i < width; i += LANES)
            PLACE_C(far, y + r * width + i, LOAD_S(to + i) * scale * LOAD_S(weight + i));
    }
}

/* Gradient of add_norm: dx = carried (of x_out from elsewhere, may be NULL) + that through y, and the same as
   ddelta, which may be NULL. `dweight` [threads, width] float32, zeros, is added to, a row for each thread. */
void NAME(add_norm_backward)(long rows, long width, const S *x_out, const S *weight, const float *rstd,
                             const C *dy, const S *carried, S *dx, C *ddelta, float *dweight, long threads) {
    int far = is_far(dx, rows * width * sizeof(S)), ddelta_far = is_far(ddelta, rows * width * sizeof(C));
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (long t = 0; t < threads; t++) {
        float *dw = dweight + t * width;
        for (long r = rows * t / threads; r < rows * (t + 1) / threads; r++) {
            const S *xr = x_out + r * width;
            const C *dyr = dy + r * width;
            float scale = rstd[r];
            vf dots = {0};
            for (long i = 0; i < width; i += LANES) {
                fetch_ahead(dyr + i), fetch_ahead(xr + i);
                if (carried) fetch_ahead(carried + r * width + i);
                vf g = LOAD_C(dyr + i), normed = LOAD_S(xr + i) * scale;
                dots += g * LOAD_S(weight + i) * normed;
                store_f32(dw + i, load_f32(dw + i) + g * normed);
            }
            float mean = sum(dots) / width;
            for (long i = 0; i < width; i += LANES) {
                vf normed = LOAD_S(xr + i) * scale;
                vf d = (LOAD_C(dyr + i) * LOAD_S(weight + i) - normed * mean) * scale;
                if (carried) d += LOAD_S(carried + r * width + i);
                PLACE_S(far, dx + r * width + i, d);
                if (ddelta) PLACE_C(ddelta_far, ddelta + r * width + i, d);
            }
        }
    }
}

/* The queries and keys of a row of `qkv` [rows, (heads + 2 kv_heads) size]: normed head by head where
   weights are given, then turned by their position. cos, sin: [positions, size / 2]. */
void NAME(turn)(long rows, long heads, long kv_heads, long size, const C *qkv, const S *q_weight,
                const S *k_weight, float eps, const float *cos, const float *sin, const int64_t *positions, C *q,
                C *k) {
    long half = size / 2, width = (heads + 2 * kv_heads) * size;
    int q_far = is_far(q, rows * heads * size * sizeof(C)), k_far = is_far(k, rows * kv_heads * size * sizeof(C));
#pragma omp parallel for schedule(static) if (rows * width > 16384)
    for (long r = 0; r < rows; r++) {
        const float *c = cos + positions[r] * half, *s = sin + positions[r] * half;
        for (long h = 0; h < heads + kv_heads; h++) {
            const C *from = qkv + r * width + h * size;
            const S *weight = h < heads ? q_weight : k_weight;
            long at = h < heads ? (r * heads + h) * size : (r * kv_heads + h - heads) * size;
            C *to = h < heads ? q : k;
            int far = h < heads ? q_far : k_far;
            float scale = 1;
            for (long i = 0; i < size; i += LANES) fetch_ahead(from + i);
            if (weight) {
                vf squares = {0};
                for (long i = 0; i < size; i += LANES) squares += LOAD_C(from + i) * LOAD_C(from + i);
                scale = 1.0f / sqrtf(sum(squares) / size + eps);
            }
            for (long i = 0; i < half; i += LANES) {
                vf a = LOAD_C(from + i) * scale, b = LOAD_C(from + half + i) * scale;
                if (weight) a *= LOAD_S(weight + i), b *= LOAD_S(weight + half + i);
                vf ci = load_f32(c + i), si = load_f32(s + i);
                PLACE_C(far, to + at + i, a * ci - b * si);
                PLACE_C(far, to + at + half + i, b * ci + a * si);
            }
        }
    }
}

/* Gradient of turn, and dv put into its place: dqkv as qkv. dq_weight, dk_weight: [threads, size]. */
void NAME(turn_backward)(long rows, long heads, long kv_heads, long size, const C *qkv, const S *q_weight,
                         const S *k_weight, float eps, const float *cos, const float *sin,
                         const int64_t *positions, const float *dq, const float *dk, const float *dv, C *dqkv,
                         float *dq_weight, float *dk_weight, long threads) {
    long half = size / 2, width = (heads + 2 * kv_heads) * size;
    int far = is_far(dqkv, rows * width * sizeof(C));
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (long t = 0; t < threads; t++)
        for (long r = rows * t / threads; r < rows * (t + 1) / threads; r++) {
            const float *c = cos + positions[r] * half, *s = sin + positions[r] * half;
            for (long i = 0; i < kv_heads * size; i += LANES)
                PLACE_C(far, dqkv + r * width + (heads + kv_heads) * size + i, load_f32(dv + r * kv_heads * size + i));
            for (long h = 0; h < heads + kv_heads; h++) {
                const C *from = qkv + r * width + h * size;
                C *to = dqkv + r * width + h * size;
                const float *d = h < heads ? dq + (r * heads + h) * size : dk + (r * kv_heads + h - heads) * size;
                const S *weight = h < heads ? q_weight : k_weight;
                float *dw = (h < heads ? dq_weight : dk_weight) + t * size, scale = 1, mean = 0;
                for (long i = 0; i < size; i += LANES) fetch_ahead(from + i), fetch_ahead(d + i);
                if (weight) {
                    vf squares = {0}, dots = {0};
                    for (long i = 0; i < size; i += LANES) squares += LOAD_C(from + i) * LOAD_C(from + i);
                    scale = 1.0f / sqrtf(sum(squares) / size + eps);
                    for (long i = 0; i < half; i += LANES) {
                        vf ci = load_f32(c + i), si = load_f32(s + i);
                        vf da = load_f32(d + i) * ci + load_f32(d + half + i) * si;
                        vf db = load_f32(d + half + i) * ci - load_f32(d + i) * si;
                        vf a = LOAD_C(from + i) * scale, b = LOAD_C(from + half + i) * scale;
                        dots += da * a * LOAD_S(weight + i) + db * b * LOAD_S(weight + half + i);
                        store_f32(dw + i, load_f32(dw + i) + da * a);
                        store_f32(dw + half + i, load_f32(dw + half + i) + db * b);
                    }
                    mean = sum(dots) / size;
                }
                for (long i = 0; i < half; i += LANES) {
                    vf ci = load_f32(c + i), si = load_f32(s + i);
                    vf da = load_f32(d + i) * ci + load_f32(d + half + i) * si;
                    vf db = load_f32(d + half + i) * ci - load_f32(d + i) * si;
                    if (weight) {
                        vf a = LOAD_C(from + i) * scale, b = LOAD_C(from + half + i) * scale;
                        da = (da * LOAD_S(weight + i) - a * mean) * scale;
                        db = (db * LOAD_S(weight + half + i) - b * mean) * scale;
                    }
                    PLACE_C(far, to + i, da);
                    PLACE_C(far, to + half + i, db);
                }
            }
        }
}
