/* FP8_PER_CHANNEL_PER_TOKEN: e4m3, one f32 scale per row. Layout: see
 * ../fp8_per_channel_per_token.py */
#include "qk_fp8.h"

/* largest finite magnitude of a row, as its pattern; *finite says whether all elements are */
QK_INLINE uint32_t row_max_bits(const void *w, int64_t cols, int dtype, int *finite,
                                int64_t *counts) {
    qk_max max;
    memset(&max, 0, sizeof max);
    for (int64_t c = 0; c < cols; c += QK_SEGMENT) {
        if (cols - c >= QK_SEGMENT)
            qk_max_add(&max, qk_at(w, c, dtype), QK_SEGMENT, dtype);
        else
            qk_max_add(&max, qk_at(w, c, dtype), cols - c, dtype);
    }
    uint32_t bits = qk_max_bits(&max, dtype);
    *finite = bits < qk_inf(dtype);
    return *finite ? bits : qk_max_finite_bits(w, cols, dtype, counts + QK_NUM_NONFINITE);
}

QK_INLINE void quantize(const void *w, int dtype, int64_t rows, int64_t cols, uint8_t *codes,
                        float *scales, double *err2, double *ref2, int64_t *counts) {
    for (int64_t r = 0; r < rows; r++) {
        const void *row = qk_at(w, r * cols, dtype);
        qk_lanes lanes = {{0}, {0}};
        int finite;
        float amax = qk_from_max_bits(row_max_bits(row, cols, dtype, &finite, counts), dtype);
        float scale = qk_e4m3_scale(amax, dtype);
        /* division is monotonic: when amax does not saturate, nothing does */
        int plain = finite && amax / scale <= QK_E4M3_LIMIT;
        scales[r] = scale;
        for (int64_t c = 0; c < cols; c += QK_SEGMENT) {
            int64_t n = cols - c < QK_SEGMENT ? cols - c : QK_SEGMENT;
            qk_prefetch(qk_at(row, cols + c, dtype), QK_SEGMENT, dtype);
            qk_e4m3_span(qk_at(row, c, dtype), n, dtype, scale, plain, codes + r * cols + c,
                         err2 ? &lanes : NULL, counts + QK_NUM_SATURATED);
        }
        if (err2) {
            err2[r] = qk_sum_lanes(lanes.err2);
            ref2[r] = qk_sum_lanes(lanes.ref2);
        }
    }
}

QK_INLINE void dequantize(const uint8_t *codes, const float *scales, int dtype, int64_t rows,
                          int64_t cols, void *out) {
    for (int64_t r = 0; r < rows; r++)
        qk_e4m3_dequantize_span(codes, r * cols, cols, dtype, scales[r], out);
}

QK_FP8_EXPORT(fp8_per_channel_per_token)
