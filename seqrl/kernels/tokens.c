/* Norms, rotary positions and gated layers in each type they are needed in, and the draw of a token. */
#include "tokens.h"
#include "vector.h"

#define S float
#define LOAD_S load_f32
#define STORE_S store_f32
#define PLACE_S place_f32
#define C float
#define LOAD_C load_f32
#define STORE_C store_f32
#define PLACE_C place_f32
#define GET_C get_f32
#define NAME(x) x##_f32_f32
#include "rows.h"
#undef NAME
#define NAME(x) x##_f32
#include "gate.h"
#undef NAME
#undef C
#undef LOAD_C
#undef STORE_C
#undef PLACE_C
#undef GET_C

#define C bf16
#define LOAD_C load_bf16
#define STORE_C store_bf16
#define PLACE_C place_bf16
#define GET_C get_bf16
#define NAME(x) x##_f32_bf16
#include "rows.h"
#undef NAME
#define NAME(x) x##_bf16
#include "gate.h"
#undef NAME
#undef S
#undef LOAD_S
#undef STORE_S
#undef PLACE_S

#define S bf16
#define LOAD_S load_bf16
#define STORE_S store_bf16
#define PLACE_S place_bf16
#define NAME(x) x##_bf16_bf16
#include "rows.h"

/* One token a row by inverting the cumulative distribution in vocabulary order, on integers (so that a token
   of probability 0 can never be picked). logits [rows, vocabulary]. */
int draw(long rows, long vocabulary, const float *logits, float inverse_temperature, const double *uniforms,
         int64_t *tokens) {
    const float one = 1099511627776.0f; /* 2^40: its share of the largest, as an integer weight */
    int failed = 0;
#pragma omp parallel
    {
        float *shares = aligned_alloc(64, sizeof(float) * (vocabulary + 2 * LANES) / 64 * 64);
        if (!shares) failed = 1;
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            if (!shares) continue;
            const float *row = logits + r * vocabulary;
            long whole = vocabulary / LANES * LANES;
            vf most = splat(-INFINITY);
            for (long i = 0; i < whole; i += LANES) most = larger(load_f32(row + i), most);
            float top = largest(most), rest[LANES] = {0};
            for (long i = whole; i < vocabulary; i++) top = row[i] > top ? row[i] : top;
            for (long i = 0; i < whole; i += LANES) {
                store_f32(shares + i, vexp((load_f32(row + i) - top) * inverse_temperature));
            }
            if (whole < vocabulary) {
                for (long i = 0; i < LANES; i++) rest[i] = whole + i < vocabulary ? row[whole + i] : -INFINITY;
                store_f32(shares + whole, vexp((load_f32(rest) - top) * inverse_temperature));
            }
            int64_t weight = 0, reached = 0;
            for (long i = 0; i < vocabulary; i++) weight += (int64_t)(shares[i] * one);
            int64_t target = (int64_t)(uniforms[r] * (double)weight);
            long token = 0;
            for (;; token++) {
                reached += (int64_t)(shares[token] * one);
                if (reached > target || token + 1 == vocabulary) break;
            }
            tokens[r] = token;
        }
        free(shares);
    }
    return failed;
}
