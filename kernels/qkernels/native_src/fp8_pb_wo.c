/* FP8_PB_WO: e4m3, one f32 scale per 128x128 block. Layout: see ../fp8_pb_wo.py */
#include "qk_fp8.h"

/* BAND blocks side by side are read twice: 512 KiB of bf16, which stays in a core's cache */
enum { BLOCK = 128, BAND = 16 };

typedef struct {
    float scale[BAND];
    uint8_t plain[BAND];
} band_scales;

/* the scales of up to BAND blocks: rows x cols elements at w */
QK_INLINE void find_scales(const void *w, int64_t rows, int64_t cols, int64_t stride, int dtype,
                           band_scales *band, int64_t *counts) {
    qk_max max[BAND];
    memset(max, 0, sizeof max);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0, b = 0; c < cols; c += BLOCK, b++) {
            const void *p = qk_at(w, r * stride + c, dtype);
            if (cols - c >= BLOCK)
                qk_max_add(max + b, p, BLOCK, dtype);
            else
                qk_max_add(max + b, p, cols - c, dtype);
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
        band->scale[b] = qk_e4m3_scale(amax, dtype);
        /* division is monotonic: when amax does not saturate, nothing does */
        band->plain[b] = (uint8_t)(finite && amax / band->scale[b] <= QK_E4M3_LIMIT);
    }
}

QK_INLINE void quantize(const void *w, int dtype, int64_t rows, int64_t cols, uint8_t *codes,
                        float *scales, double *err2, double *ref2, int64_t *counts) {
    int64_t blocks = (cols + BLOCK - 1) / BLOCK;
    for (int64_t r0 = 0; r0 < rows; r0 += BLOCK) {
        int64_t height = rows - r0 < BLOCK ? rows - r0 : BLOCK;
        qk_lanes lanes[BLOCK];
        if (err2) memset(lanes, 0, sizeof lanes);
        for (int64_t c0 = 0; c0 < cols; c0 += BLOCK * BAND) {
            int64_t width = cols - c0 < BLOCK * BAND ? cols - c0 : BLOCK * BAND;
            int64_t ahead = c0 + width < cols ? BLOCK * BAND : BLOCK * cols - c0;
            band_scales band;
            find_scales(qk_at(w, r0 * cols + c0, dtype), height, width, cols, dtype, &band, counts);
            memcpy(scales + r0 / BLOCK * blocks + c0 / BLOCK, band.scale,
                   sizeof(float) * (size_t)((width + BLOCK - 1) / BLOCK));
            for (int64_t r = 0; r < height; r++)
                for (int64_t c = 0, b = 0; c < width; c += BLOCK, b++) {
                    int64_t at = (r0 + r) * cols + c0 + c;
                    int64_t n = width - c < BLOCK ? width - c : BLOCK;
                    qk_prefetch(qk_at(w, at + ahead, dtype), BLOCK, dtype);
                    qk_e4m3_span(qk_at(w, at, dtype), n, dtype, band.scale[b], band.plain[b],
                                 codes + at, err2 ? lanes + r : NULL, counts + QK_NUM_SATURATED);
                }
        }
        for (int64_t r = 0; err2 && r < height; r++) {
            err2[r0 + r] = qk_sum_lanes(lanes[r].err2);
            ref2[r0 + r] = qk_sum_lanes(lanes[r].ref2);
        }
    }
}

QK_INLINE void dequantize(const uint8_t *codes, const float *scales, int dtype, int64_t rows,
                          int64_t cols, void *out) {
    int64_t blocks = (cols + BLOCK - 1) / BLOCK;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0, b = 0; c < cols; c += BLOCK, b++) {
            int64_t n = cols - c < BLOCK ? cols - c : BLOCK;
            float scale = scales[r / BLOCK * blocks + b];
            qk_e4m3_dequantize_span(codes, r * cols + c, n, dtype, scale, out);
        }
}

QK_FP8_EXPORT(fp8_pb_wo)
