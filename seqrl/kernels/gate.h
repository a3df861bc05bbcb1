/* Gated feed-forward layers and the sum over experts, for one storage type C. */

/* silu(gate) * up, of gate_up [rows, 2 width] -> out [rows, width]. */
void NAME(gate)(long rows, long width, const C *gate_up, C *out) {
    int far = is_far(out, rows * width * sizeof(C));
#pragma omp parallel for schedule(static) if (rows * width > 8192)
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < width; i += LANES) {
            fetch_ahead(gate_up + 2 * r * width + i), fetch_ahead(gate_up + (2 * r + 1) * width + i);
            vf gate = LOAD_C(gate_up + 2 * r * width + i), up = LOAD_C(gate_up + (2 * r + 1) * width + i);
            PLACE_C(far, out + r * width + i, gate / (1.0f + vexp(-gate)) * up);
        }
}

void NAME(gate_backward)(long rows, long width, const C *gate_up, const C *dout, C *dgate_up) {
    int far = is_far(dgate_up, 2 * rows * width * sizeof(C));
#pragma omp parallel for schedule(static) if (rows * width > 8192)
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < width; i += LANES) {
            long at = 2 * r * width + i;
            fetch_ahead(gate_up + at), fetch_ahead(gate_up + at + width), fetch_ahead(dout + r * width + i);
            vf gate = LOAD_C(gate_up + at), up = LOAD_C(gate_up + at + width), d = LOAD_C(dout + r * width + i);
            vf sigmoid = 1.0f / (1.0f + vexp(-gate)), silu = gate * sigmoid;
            PLACE_C(far, dgate_up + at, d * up * (sigmoid + silu * (1.0f - sigmoid)));
            PLACE_C(far, dgate_up + at + width, d * silu);
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
