/* W8A16: int8, one f32 scale per row: outs {weight I8 [N, K], weight_scale F32 [N]}. */
#include "qk_int.h"

QK_CLONES static void quantize(const void *w, int dtype, int64_t rows, int64_t cols, float global,
                               void *const *outs, double *err2, double *ref2, int64_t *counts) {
    uint8_t *out = outs[0];
    float *scales = outs[1];
    (void)global;
    for (int64_t r = 0; r < rows; r++) {
        const void *row = qk_at(w, r * cols, dtype);
        qk_lanes lanes = {{0}, {0}};
        int64_t num_nonfinite = 0;
        float amax = qk_from_max_bits(qk_scan(row, cols, dtype, &num_nonfinite), dtype);
        scales[r] = qk_scale(amax, 127.0f, dtype);
        counts[QK_NUM_NONFINITE] += num_nonfinite;
        for (int64_t c = 0; c < cols; c += QK_SEGMENT) {
            int64_t m = cols - c < QK_SEGMENT ? cols - c : QK_SEGMENT;
            uint8_t codes[QK_SEGMENT];
            qk_prefetch(qk_at(row, cols + c, dtype), QK_SEGMENT, dtype);
            qk_int_segment(qk_at(row, c, dtype), m, dtype, scales[r], num_nonfinite == 0,
                           qk_int8_special, codes, err2 ? &lanes : NULL);
            qk_copy(out + r * cols + c, codes, m, QK_SEGMENT);
        }
        if (err2) qk_write_statistics(&lanes, err2 + r, ref2 + r);
    }
}

QK_CLONES static void dequantize(const void *const *ins, float global, int dtype, int64_t rows,
                                 int64_t cols, void *out) {
    const int8_t *codes = ins[0];
    const float *scales = ins[1];
    (void)global;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c += QK_SEGMENT) {
            int64_t at = r * cols + c, m = cols - c < QK_SEGMENT ? cols - c : QK_SEGMENT;
            float x[QK_SEGMENT];
            if (m == QK_SEGMENT)
                for (int i = 0; i < QK_SEGMENT; i++) x[i] = (float)codes[at + i] * scales[r];
            else
                for (int64_t i = 0; i < m; i++) x[i] = (float)codes[at + i] * scales[r];
            qk_store_segment(qk_out_at(out, at, dtype), m, dtype, x);
        }
}

QK_EXPORT_CODEC(w8a16, 1, 1)
