/* FP8: e4m3, one f32 scale for the whole weight, given by the caller: outs {weight U8 [N, K]}. */
#include "qk_fp8.h"

QK_CLONES static void quantize(const void *w, int dtype, int64_t rows, int64_t cols, float global,
                               void *const *outs, double *err2, double *ref2, int64_t *counts) {
    for (int64_t r = 0; r < rows; r++)
        qk_e4m3_row(qk_at(w, r * cols, dtype), cols, dtype, 0, &global,
                    (uint8_t *)outs[0] + r * cols, err2 ? err2 + r : NULL, ref2 ? ref2 + r : NULL,
                    counts);
}

QK_CLONES static void dequantize(const void *const *ins, float global, int dtype, int64_t rows,
                                 int64_t cols, void *out) {
    qk_e4m3_dequantize_row(ins[0], rows * cols, dtype, global, out);
}

QK_EXPORT_CODEC(fp8, 1, 1)
