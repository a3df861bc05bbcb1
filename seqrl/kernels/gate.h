/* Gated feed-forward layers and the cache of decoding, for one storage type C. */

/* silu(gate) * up, of gate_up [rows, 2 width] -> out [rows, width]. */
void NAME(gate)(long rows, long width, const C *gate_up, C *out) {
#pragma omp parallel for schedule(static) if (rows * width > 8192)
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < width; i += LANES) {
            vf gate = LOAD_C(gate_up + 2 * r * width + i), up = LOAD_C(gate_up + (2 * r + 1) * width + i);
            STORE_C(out + r * width + i, gate / (1.0f + vexp(-gate)) * up);
        }
}

void NAME(gate_backward)(long rows, long width, const C *gate_up, const C *dout, C *dgate_up) {
#pragma omp parallel for schedule(static) if (rows * width > 8192)
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < width; i += LANES) {
            long at = 2 * r * width + i;
            vf gate = LOAD_C(gate_up + at), up = LOAD_C(gate_up + at + width), d = LOAD_C(dout + r * width + i);
            vf sigmoid = 1.0f / (1.0f + vexp(-gate)), silu = gate * sigmoid;
            STORE_C(dgate_up + at, d * up * (sigmoid + silu * (1.0f - sigmoid)));
            STORE_C(dgate_up + at + width, d * silu);
        }
}

/* What the k experts of each token said, weighed and added up: y[t] = sum over j of weights[t, j] *
   x[place[t, j]]. x [pairs, width], y [tokens, width]; weights [tokens, k] float32, NULL for ones. */
void NAME(combine)(long tokens, long k, long width, const C *x, const int64_t *place, const float *weights, C *y) {
#pragma omp parallel for schedule(static) if (tokens * k * width > 16384)
    for (long t = 0; t < tokens; t++)
        for (long i = 0; i < width; i += LANES) {
            vf total = {0};
            for (long j = 0; j < k; j++)
                total += LOAD_C(x + place[t * k + j] * width + i) * (weights ? weights[t * k + j] : 1.0f);
            STORE_C(y + t * width + i, total);
        }
}

void NAME(combine_backward)(long tokens, long k, long width, const C *x, const int64_t *place, const float *weights,
                            const C *dy, C *dx, float *dweights) {
#pragma omp parallel for schedule(static) if (tokens * k * width > 16384)
    for (long t = 0; t < tokens; t++)
        for (long j = 0; j < k; j++) {
            long at = place[t * k + j] * width;
            vf dots = {0};
            for (long i = 0; i < width; i += LANES) {
                vf d = LOAD_C(dy + t * width + i);
                dots += d * LOAD_C(x + at + i);
                STORE_C(dx + at + i, d * weights[t * k + j]);
            }
            dweights[t * k + j] = sum(dots);
        }
}

/* The cache of a row: keys in blocks of 16 columns, [slots, kv_heads, blocks, size, 16], so that one vector
   holds a number of 16 keys; values [slots, kv_heads, 16 blocks, size]. Puts the key and value of each token
   into column `at` of row `slot`. k [tokens, kv_heads, size]; a token's v starts every v_stride numbers. */
void NAME(append)(long tokens, long kv_heads, long size, long blocks, const C *k, const C *v, long v_stride,
                  C *keys, C *values, const int64_t *slot, const int64_t *at) {
#pragma omp parallel for schedule(static) if (tokens * kv_heads * size > 16384)
    for (long t = 0; t < tokens; t++)
        for (long h = 0; h < kv_heads; h++) {
            long row = slot[t] * kv_heads + h;
            C *column = keys + (row * blocks + at[t] / LANES) * size * LANES + at[t] % LANES;
            for (long d = 0; d < size; d++) column[d * LANES] = k[(t * kv_heads + h) * size + d];
            memcpy(values + (row * blocks * LANES + at[t]) * size, v + t * v_stride + h * size, size * sizeof(C));
        }
}

/* A stretch of cached columns for the queries of one key head, [group, size], scaled: attention.c's
   `forward_stretch` for one query, with columns in the lanes, adding up in the same order. */
static void NAME(cached_stretch)(long group, long size, const float *q, const C *keys, const C *values, long columns,
                                 float *scores, float *most, float *total, float *out) {
    for (long start = 0; start < columns; start += KEYS, keys += KEYS * size, values += KEYS * size) {
        long n = columns - start < KEYS ? columns - start : KEYS, padded = (n + LANES - 1) / LANES * LANES;
        for (long c = 0; c < padded; c += LANES) {
            const C *block = keys + c * size;
            long h = 0;
            for (; h + 2 <= group; h += 2) {
                vf one = {0}, two = {0};
                for (long d = 0; d < size; d++) {
                    vf key = LOAD_C(block + d * LANES);
                    one = fused(splat(q[h * size + d]), key, one);
                    two = fused(splat(q[(h + 1) * size + d]), key, two);
                }
                store_f32(scores + h * KEYS + c, one), store_f32(scores + (h + 1) * KEYS + c, two);
            }
            if (h < group) {
                vf sum = {0};
                for (long d = 0; d < size; d++) sum = fused(splat(q[h * size + d]), LOAD_C(block + d * LANES), sum);
                store_f32(scores + h * KEYS + c, sum);
            }
        }
        for (long h = 0; h < group; h++) {
            float *s = scores + h * KEYS;
            for (long c = n; c < padded; c++) s[c] = -INFINITY;
            vf tops = splat(most[h]);
            for (long c = 0; c < padded; c += LANES) tops = larger(load_f32(s + c), tops);
            float top = largest(tops), shrink = vexp(splat(most[h] - top))[0], sum = total[h] * shrink;
            for (long c = 0; c < padded; c += LANES) store_f32(s + c, vexp(load_f32(s + c) - top));
            for (long c = 0; c < n; c++) sum += s[c];
            for (long d = 0; d < size; d += 4 * LANES) {
                float *o = out + h * size + d;
                long vectors = size - d < 4 * LANES ? (size - d) / LANES : 4;
                vf sums[4];
                for (long i = 0; i < vectors; i++) sums[i] = load_f32(o + i * LANES) * shrink;
                if (vectors == 4)
                    for (long c = 0; c < n; c++)
                        for (int i = 0; i < 4; i++)
                            sums[i] = fused(splat(s[c]), LOAD_C(values + c * size + d + i * LANES), sums[i]);
                else
                    for (long c = 0; c < n; c++)
                        for (long i = 0; i < vectors; i++)
                            sums[i] = fused(splat(s[c]), LOAD_C(values + c * size + d + i * LANES), sums[i]);
                for (long i = 0; i < vectors; i++) store_f32(o + i * LANES, sums[i]);
            }
            most[h] = top, total[h] = sum;
        }
    }
}

/* One query a row, over the columns of its prompt and then its own. q [rows, heads, size]; prompt p has
   prompt_columns[p] columns in the prompts' cache, row r has own_columns[r] in slot own[r] of the other.
   Rows of one prompt side by side find it in the processor's cache. Returns nonzero without memory. */
int NAME(attend_cached)(long rows, long heads, long kv_heads, long size, const C *q, const C *prompt_keys,
                        const C *prompt_values, long prompt_blocks, const int64_t *prompt,
                        const int64_t *prompt_columns, const C *own_keys, const C *own_values, long own_blocks,
                        const int64_t *own, const int64_t *own_columns, C *out) {
    long group = heads / kv_heads;
    float scale = 1.0f / sqrtf((float)size);
    int failed = 0;
#pragma omp parallel
    {
        float *scores = aligned_alloc(64, sizeof(float) * ((2 * size + KEYS) * group + 2 * group + LANES) / 64 * 64);
        if (!scores) failed = 1;
#pragma omp for schedule(dynamic, 4)
        for (long task = 0; task < rows * kv_heads; task++) {
            if (!scores) continue;
            long r = task / kv_heads, h = task % kv_heads;
            float *scaled = scores + group * KEYS, *sums = scaled + group * size, *most = sums + group * size;
            float *total = most + group;
            for (long i = 0; i < group * size; i++)
                scaled[i] = GET_C(q + (r * heads + h * group) * size + i) * scale, sums[i] = 0;
            for (long g = 0; g < group; g++) most[g] = -3e38f, total[g] = 0;
            long prompt_at = (prompt[r] * kv_heads + h) * prompt_blocks * LANES * size;
            long own_at = (own[r] * kv_heads + h) * own_blocks * LANES * size;
            /* Other rows have just seen the prompt; the row's own columns are far away. */
            for (long i = 0; i < own_columns[r] * size; i += 64 / sizeof(C)) {
                __builtin_prefetch(own_keys + own_at + i);
                __builtin_prefetch(own_values + own_at + i);
            }
            NAME(cached_stretch)(group, size, scaled, prompt_keys + prompt_at, prompt_values + prompt_at,
                                 prompt_columns[prompt[r]], scores, most, total, sums);
            NAME(cached_stretch)(group, size, scaled, own_keys + own_at, own_values + own_at, own_columns[r], scores,
                                 most, total, sums);
            for (long g = 0; g < group; g++)
                for (long d = 0; d < size; d += LANES)
                    STORE_C(out + (r * heads + h * group + g) * size + d, load_f32(sums + g * size + d) / total[g]);
        }
        free(scores);
    }
    return failed;
}
