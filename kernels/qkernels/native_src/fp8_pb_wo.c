/* FP8_PB_WO: e4m3, one f32 scale per 128x128 block: outs {weight U8 [N, K], weight_scale F32
 * [ceil(N / 128), ceil(K / 128)]}. Layout: see ../fp8_pb_wo.py */
#include "qk_fp8.h"

/* BAND blocks side by side are read twice: 2 MiB of bf16, which stays in the last cache. Narrower
 * bands fit a core's own, but read rows in short pieces and are slower. */
enum { BLOCK = 128, BAND = 64 };

/* how up to BAND blocks are encoded: rows x cols elements at w */
QK_INLINE void find_rules(const void *w, int64_t rows, int64_t cols, int64_t stride, int dtype,
                          qk_e4m3_rule *rules, int64_t *counts) {
    qk_max max[BAND];
    memset(max, 0, sizeof max);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0, b = 0; c < cols; c += BLOCK, b++) {
            int64_t m = cols - c < BLOCK ? cols - c : BLOCK;
            qk_max_add(max + b, qk_at(w, r * stride + c, dtype), m, dtype);
        }
    for (int64_t c = 0, b = 0; c < cols; c += BLOCK, b++) {
        uint32_t max_bits = qk_max_bits(max + b, dtype);
        int finite = max_bits < qk_inf(dtype);
        if (!finite) {
            int64_t n = cols - c < BLOCK ? cols - c : BLOCK;
            max_bits = 0;
            for (int64_t r = 0; r < rows; r++) {
                const void *p = qk_at(w, r * stride + c, dtype);
                uint32_t m = qk_max_finite_bits(p, n, dtype, counts + QK_NUM_NONFINITE);
                max_bits = m > max_bits ? m : max_bits;
            }
        }
        float amax = qk_from_max_bits(max_bits, dtype);
        rules[b] = qk_e4m3_rule_of(amax, qk_scale(amax, QK_E4M3_LARGEST, dtype), finite);
    }
}

QK_CLONES static void quantize(const void *w, int dtype, int64_t rows, int64_t cols, float global,
                               void *const *outs, double *err2, double *ref2, int64_t *counts) {
    uint8_t *codes = outs[0];
    float *scales = outs[1];
    (void)global;
    for (int64_t r0 = 0; r0 < rows; r0 += BLOCK) {
        int64_t height = rows - r0 < BLOCK ? rows - r0 : BLOCK;
        qk_lanes lanes[BLOCK];
        memset(lanes, 0, sizeof lanes);
        for (int64_t c0 = 0; c0 < cols; c0 += BLOCK * BAND) {
            int64_t width = cols - c0 < BLOCK * BAND ? cols - c0 : BLOCK * BAND;
            int64_t ahead = c0 + width < cols ? BLOCK * BAND : BLOCK * cols - c0;
            qk_e4m3_rule rules[BAND];
            find_rules(qk_at(w, r0 * cols + c0, dtype), height, width, cols, dtype, rules, counts);
            for (int64_t c = 0, b = 0; c < width; c += BLOCK, b++) *scales++ = rules[b].scale;
            for (int64_t r = 0; r < height; r++)
                for (int64_t c = 0, b = 0; c < width; c += BLOCK, b++) {
                    int64_t at = (r0 + r) * cols + c0 + c;
                    int64_t m = width - c < BLOCK ? width - c : BLOCK;
                    qk_prefetch(qk_at(w, at + ahead, dtype), BLOCK, dtype);
                    qk_e4m3_segment(qk_at(w, at, dtype), m, dtype, rules[b], codes + at,
                                    err2 ? lanes + r : NULL, counts);
                }
        }
        for (int64_t r = 0; err2 && r < height; r++)
            qk_write_statistics(lanes + r, err2 + r0 + r, ref2 + r0 + r);
    }
}

QK_CLONES static void dequantize(const void *const *ins, float global, int dtype, int64_t rows,
                                 int64_t cols, void *out) {
    const uint8_t *codes = ins[0];
    const float *scales = ins[1];
    int64_t blocks = (cols + BLOCK - 1) / BLOCK;
    (void)global;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < cols; c += BLOCK) {
            int64_t at = r * cols + c, m = cols - c < BLOCK ? cols - c : BLOCK;
            qk_e4m3_dequantize_segment(codes + at, m, dtype, scales[r / BLOCK * blocks + c / BLOCK],
                                       qk_out_at(out, at, dtype));
        }
}

QK_EXPORT_CODEC(fp8_pb_wo, 1, 1)
