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

/* Row r of x [rows, in] times the transpose of its expert's matrix [out, in], which lies as [out / 16, in, 16].
   Expert e has the rows up to ends[e], from where the expert before it ends. y [rows, out]. */
void NAME(expert_products)(long experts, long in, long outs, const float *x, const C *weight, const int64_t *ends,
                           C *y) {
#pragma omp parallel for schedule(dynamic, 4)
    for (long task = 0; task < experts * (outs / LANES); task++) {
        long e = task / (outs / LANES), b = task % (outs / LANES);
        const C *w = weight + task * in * LANES;
        long r = e ? ends[e - 1] : 0;
        for (; r + 8 <= ends[e]; r += 8) {
            vf sums[8] = {{0}};
            for (long d = 0; d < in; d++) {
                vf column = LOAD_C(w + d * LANES);
                for (int i = 0; i < 8; i++) sums[i] += column * x[(r + i) * in + d];
            }
            for (int i = 0; i < 8; i++) STORE_C(y + (r + i) * outs + b * LANES, sums[i]);
        }
        for (; r < ends[e]; r++) {
            vf one = {0}, two = {0}, three = {0}, four = {0};
            for (long d = 0; d < in; d += 4) {
                one += LOAD_C(w + d * LANES) * x[r * in + d];
                two += LOAD_C(w + (d + 1) * LANES) * x[r * in + d + 1];
                three += LOAD_C(w + (d + 2) * LANES) * x[r * in + d + 2];
                four += LOAD_C(w + (d + 3) * LANES) * x[r * in + d + 3];
            }
            STORE_C(y + r * outs + b * LANES, one + two + (three + four));
        }
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

/* scores[h][c] of `columns` columns of one cached row and head, for `group` queries [group, size], scaled. */
static void NAME(score)(long group, long size, long columns, const float *q, const C *keys, float *scores,
                        long stride) {
    for (long b = 0; b * LANES < columns; b++, keys += size * LANES) {
        long h = 0;
        for (; h + 2 <= group; h += 2) {
            vf one = {0}, two = {0}, three = {0}, four = {0};
            for (long d = 0; d < size; d += 2) {
                vf even = LOAD_C(keys + d * LANES), odd = LOAD_C(keys + (d + 1) * LANES);
                one += even * q[h * size + d], two += even * q[(h + 1) * size + d];
                three += odd * q[h * size + d + 1], four += odd * q[(h + 1) * size + d + 1];
            }
            store_f32(scores + h * stride + b * LANES, one + three);
            store_f32(scores + (h + 1) * stride + b * LANES, two + four);
        }
        for (; h < group; h++) {
            vf one = {0}, two = {0};
            for (long d = 0; d < size; d += 2) {
                one += LOAD_C(keys + d * LANES) * q[h * size + d];
                two += LOAD_C(keys + (d + 1) * LANES) * q[h * size + d + 1];
            }
            store_f32(scores + h * stride + b * LANES, one + two);
        }
    }
}

/* Adds the values of `columns` columns, weighed, to out [size]. */
static void NAME(weigh)(long size, long columns, const float *probs, const C *values, float *out) {
    for (long d = 0; d < size; d += 2 * LANES) {
        long wide = d + LANES < size;
        vf a = load_f32(out + d), b = wide ? load_f32(out + d + LANES) : (vf){0}, a2 = {0}, b2 = {0};
        long c = 0;
        for (; c + 2 <= columns; c += 2) {
            const C *v = values + c * size + d;
            a += LOAD_C(v) * probs[c], a2 += LOAD_C(v + size) * probs[c + 1];
            if (wide) b += LOAD_C(v + LANES) * probs[c], b2 += LOAD_C(v + size + LANES) * probs[c + 1];
        }
        if (c < columns) {
            a += LOAD_C(values + c * size + d) * probs[c];
            if (wide) b += LOAD_C(values + c * size + d + LANES) * probs[c];
        }
        store_f32(out + d, a + a2);
        if (wide) store_f32(out + d + LANES, b + b2);
    }
}

/* One query a row, over the columns of its prompt and then its own. q [rows, heads, size]; prompt p has
   prompt_columns[p] columns in the prompts' cache, row r has own_columns[r] in slot own[r] of the other.
   Rows of one prompt side by side find it in the processor's cache. Returns nonzero without memory. */
int NAME(attend_cached)(long rows, long heads, long kv_heads, long size, const C *q, const C *prompt_keys,
                        const C *prompt_values, long prompt_blocks, const int64_t *prompt,
                        const int64_t *prompt_columns, const C *own_keys, const C *own_values, long own_blocks,
                        const int64_t *own, const int64_t *own_columns, C *out) {
    long group = heads / kv_heads, stride = (prompt_blocks + own_blocks) * LANES;
    float scale = 1.0f / sqrtf((float)size);
    int failed = 0;
#pragma omp parallel
    {
        float *scores = aligned_alloc(64, sizeof(float) * (group * stride + 2 * group * size + LANES));
        if (!scores) failed = 1;
#pragma omp for schedule(dynamic, 4)
        for (long task = 0; task < rows * kv_heads; task++) {
            if (!scores) continue;
            long r = task / kv_heads, h = task % kv_heads;
            float *scaled = scores + group * stride, *sums = scaled + group * size;
            for (long i = 0; i < group * size; i++)
                scaled[i] = GET_C(q + (r * heads + h * group) * size + i) * scale, sums[i] = 0;
            long before = prompt_columns[prompt[r]], after = own_columns[r];
            long prompt_row = prompt[r] * kv_heads + h, own_row = own[r] * kv_heads + h;
            long own_at = (before + LANES - 1) / LANES * LANES;
            NAME(score)(group, size, before, scaled, prompt_keys + prompt_row * prompt_blocks * size * LANES,
                        scores, stride);
            NAME(score)(group, size, after, scaled, own_keys + own_row * own_blocks * size * LANES,
                        scores + own_at, stride);
            for (long g = 0; g < group; g++) {
                float *s = scores + g * stride;
                for (long c = before; c < own_at; c++) s[c] = -INFINITY;
                long end = own_at + after, padded = (end + LANES - 1) / LANES * LANES;
                for (long c = end; c < padded; c++) s[c] = -INFINITY;
                vf most = splat(-INFINITY), total = {0};
                for (long c = 0; c < padded; c += LANES) most = larger(load_f32(s + c), most);
                float top = largest(most);
                for (long c = 0; c < padded; c += LANES) {
                    vf p = vexp(load_f32(s + c) - top);
                    total += p;
                    store_f32(s + c, p);
                }
                float *o = sums + g * size, share = 1.0f / sum(total);
                NAME(weigh)(size, before, s, prompt_values + prompt_row * prompt_blocks * LANES * size, o);
                NAME(weigh)(size, after, s + own_at, own_values + own_row * own_blocks * LANES * size, o);
                for (long d = 0; d < size; d += LANES)
                    STORE_C(out + (r * heads + h * group + g) * size + d, load_f32(o + d) * share);
            }
        }
        free(scores);
    }
    return failed;
}
