/* FP8_PER_CHANNEL_PER_TOKEN: e4m3, one f32 scale per row: outs {weight U8 [N, K], weight_scale
 * F32 [N]}. Layout: see ../fp8_per_channel_per_token.py */
#include "qk_fp8.h"

QK_CLONES static void quantize(const void *w, int dtype, int64_t rows, int64_t cols, float global,
                               void *const *outs, double *err2, double *ref2, int64_t *counts) {
    float *scales = outs[1];
    (void)global;
    for (int64_t r = 0; r < rows; r++)
        qk_e4m3_row(qk_at(w, r * cols, dtype), cols, dtype, 1, scales + r,
                    (uint8_t *)outs[0] + r * cols, err2 ? err2 + r : NULL, ref2 ? ref2 + r : NULL,
                    counts);
}

QK_CLONES static void dequantize(const void *const *ins, float global, int dtype, int64_t rows,
                                 int64_t cols, void *out) {
    const uint8_t *codes = ins[0];
    const float *scales = ins[1];
    (void)global;
    for (int64_t r = 0; r < rows; r++)
        qk_e4m3_dequantize_row(codes + r * cols, cols, dtype, scales[r],
                               qk_out_at(out, r * cols, dtype));
}

QK_EXPORT_CODEC(fp8_per_channel_per_token, 1, 1)
