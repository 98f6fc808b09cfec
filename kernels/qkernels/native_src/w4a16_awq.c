/* W4A16_AWQ: int4, one f32 scale per 128 columns of a row: outs {weight U8 [N / 2, K],
 * weight_scale F32 [N, K / 128]}. A byte holds rows 2r (low nibble) and 2r + 1 of one column. */
#include "qk_int.h"

/* one segment of a row: writes its scale */
QK_INLINE void quantize_group(const void *w, int dtype, float *scale, uint8_t *codes,
                              qk_lanes *lanes, int64_t *counts) {
    int64_t num_nonfinite = 0;
    uint32_t bits = qk_scan(w, QK_SEGMENT, dtype, &num_nonfinite);
    *scale = qk_scale(qk_from_max_bits(bits, dtype), 7.0f, dtype);
    counts[QK_NUM_NONFINITE] += num_nonfinite;
    qk_int_segment(w, QK_SEGMENT, dtype, *scale, num_nonfinite == 0, qk_int4_special, codes,
                   lanes);
}

QK_CLONES static void quantize(const void *w, int dtype, int64_t rows, int64_t cols, float global,
                               void *const *outs, double *err2, double *ref2, int64_t *counts) {
    uint8_t *out = outs[0];
    float *scales = outs[1];
    (void)global;
    for (int64_t r = 0; r < rows; r += 2) {
        qk_lanes lanes[2];
        memset(lanes, 0, sizeof lanes);
        for (int64_t c = 0; c < cols; c += QK_SEGMENT) {
            uint8_t codes[2][QK_SEGMENT];
            for (int i = 0; i < 2; i++) {
                int64_t at = (r + i) * cols + c;
                quantize_group(qk_at(w, at, dtype), dtype, scales + at / QK_SEGMENT, codes[i],
                               err2 ? lanes + i : NULL, counts);
            }
            for (int i = 0; i < QK_SEGMENT; i++)
                out[r / 2 * cols + c + i] = (uint8_t)((codes[0][i] & 15) | codes[1][i] << 4);
        }
        for (int i = 0; err2 && i < 2; i++)
            qk_write_statistics(lanes + i, err2 + r + i, ref2 + r + i);
    }
}

QK_CLONES static void dequantize(const void *const *ins, float global, int dtype, int64_t rows,
                                 int64_t cols, void *out) {
    const uint8_t *codes = ins[0];
    const float *scales = ins[1];
    (void)global;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c += QK_SEGMENT) {
            int64_t at = r * cols + c;
            const uint8_t *in = codes + r / 2 * cols + c;
            float x[QK_SEGMENT], scale = scales[at / QK_SEGMENT];
            /* the nibble moves to the top of 32 bits, then down again with its sign */
            uint32_t up = r % 2 ? 24 : 28;
            for (int i = 0; i < QK_SEGMENT; i++)
                x[i] = (float)((int32_t)((uint32_t)in[i] << up) >> 28) * scale;
            qk_store_segment(qk_out_at(out, at, dtype), QK_SEGMENT, dtype, x);
        }
}

QK_EXPORT_CODEC(w4a16_awq, 2, 128)
