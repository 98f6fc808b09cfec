/* e4m3 (S.EEEE.MMM, bias 7, no infinity, NaN 0x7f/0xff, largest 448). */
#ifndef QK_FP8_H
#define QK_FP8_H

#include "qk_codec.h"

/* numbers beyond this round above the largest code: 448 plus half a step */
#define QK_E4M3_LIMIT 464.0f
#define QK_E4M3_LARGEST 448.0f

/* Code of y in the low byte, nearest even, and *value the number that it stands for (a zero
 * without its sign). |y| <= 464. Adding 2^(e+20) leaves steps of 2^(e-3) in f32: the addition
 * itself rounds to e4m3's three mantissa bits and, with e held at -6 or above, to its subnormal
 * step 2^-9. The low bits of the sum then count steps; eight of them per exponent make the code.
 * The 0x38 in the low bits of the addend takes 8 * (127 - 6) off modulo 256, and being even
 * leaves ties alone. */
QK_INLINE uint32_t qk_e4m3_encode(float y, float *value) {
    uint32_t bits = qk_bits(y), exponent = bits & 0x7f800000u;
    exponent = exponent < 0x3c800000u ? 0x3c800000u : exponent;
    float addend = qk_float((exponent + (20u << 23) + 0x38u) | (bits & 0x80000000u));
    float rounded = y + addend;
    *value = rounded - addend;
    return (qk_bits(rounded) + (exponent >> 20)) | (bits >> 24 & 0x80u);
}

/* code of an x that is not finite: a NaN keeps its sign, an Inf becomes the largest number */
QK_INLINE uint8_t qk_e4m3_special(float x) {
    uint32_t bits = qk_bits(x), is_nan = (bits & 0x7fffffffu) > QK_F32_INF;
    return (uint8_t)(0x7eu | is_nan | (bits >> 24 & 0x80u));
}

/* exact; a NaN code becomes a NaN */
QK_INLINE float qk_e4m3_decode(uint8_t code) {
    uint32_t magnitude = qk_bits(qk_float((uint32_t)(code & 0x7f) << 20) * 0x1p120f);
    magnitude = (code & 0x7f) == 0x7f ? 0x7fc00000u : magnitude;
    return qk_float(magnitude | (uint32_t)(code & 0x80) << 24);
}

/* how the elements under one f32 scale are encoded */
typedef struct {
    float scale;
    uint8_t finite;   /* no element is NaN or Inf */
    uint8_t in_range; /* no finite |w / scale| is beyond the limit */
} qk_e4m3_rule;

QK_INLINE qk_e4m3_rule qk_e4m3_rule_of(float amax, float scale, int finite) {
    /* division is monotonic: when amax does not saturate, nothing does */
    int in_range = amax / scale <= QK_E4M3_LIMIT;
    return (qk_e4m3_rule){scale, (uint8_t)finite, (uint8_t)in_range};
}

/* codes of m elements of a segment; lanes may be NULL */
QK_INLINE void qk_e4m3_segment(const void *w, int64_t m, int dtype, qk_e4m3_rule rule,
                               uint8_t *codes, qk_lanes *lanes, int64_t *counts) {
    float x[QK_SEGMENT], y[QK_SEGMENT], value[QK_SEGMENT];
    uint32_t wide[QK_SEGMENT];
    qk_load_segment(w, m, dtype, x);
    if (!rule.finite) qk_clean(x);
    if (rule.in_range) {
        for (int i = 0; i < QK_SEGMENT; i++) wide[i] = qk_e4m3_encode(x[i] / rule.scale, value + i);
    } else {
        for (int i = 0; i < QK_SEGMENT; i++) y[i] = x[i] / rule.scale;
        counts[QK_NUM_SATURATED] += qk_clamp(y, QK_E4M3_LARGEST, QK_E4M3_LIMIT);
        for (int i = 0; i < QK_SEGMENT; i++) wide[i] = qk_e4m3_encode(y[i], value + i);
    }
    if (m == QK_SEGMENT)
        for (int i = 0; i < QK_SEGMENT; i++) codes[i] = (uint8_t)wide[i];
    else
        for (int64_t i = 0; i < m; i++) codes[i] = (uint8_t)wide[i];
    if (!rule.finite) qk_set_special(w, m, dtype, qk_e4m3_special, codes);
    if (lanes) qk_add_statistics(x, value, &rule.scale, QK_SEGMENT, qk_unit(rule.scale), lanes);
}

/* One row under one scale: the row's own (amax / 448, written to *scale) or the given one. */
QK_INLINE void qk_e4m3_row(const void *row, int64_t cols, int dtype, int own, float *scale,
                           uint8_t *codes, double *err2, double *ref2, int64_t *counts) {
    qk_lanes lanes = {{0}, {0}};
    int64_t num_nonfinite = 0;
    float amax = qk_from_max_bits(qk_scan(row, cols, dtype, &num_nonfinite), dtype);
    if (own) *scale = qk_scale(amax, QK_E4M3_LARGEST, dtype);
    qk_e4m3_rule rule = qk_e4m3_rule_of(amax, *scale, num_nonfinite == 0);
    counts[QK_NUM_NONFINITE] += num_nonfinite;
    for (int64_t c = 0; c < cols; c += QK_SEGMENT) {
        int64_t m = cols - c < QK_SEGMENT ? cols - c : QK_SEGMENT;
        qk_prefetch(qk_at(row, cols + c, dtype), QK_SEGMENT, dtype);
        qk_e4m3_segment(qk_at(row, c, dtype), m, dtype, rule, codes + c, err2 ? &lanes : NULL,
                        counts);
    }
    if (err2) qk_write_statistics(&lanes, err2, ref2);
}

/* m <= QK_SEGMENT elements */
QK_INLINE void qk_e4m3_dequantize_segment(const uint8_t *codes, int64_t m, int dtype, float scale,
                                          void *out) {
    float x[QK_SEGMENT];
    if (m == QK_SEGMENT)
        for (int i = 0; i < QK_SEGMENT; i++) x[i] = qk_e4m3_decode(codes[i]) * scale;
    else
        for (int64_t i = 0; i < m; i++) x[i] = qk_e4m3_decode(codes[i]) * scale;
    qk_store_segment(out, m, dtype, x);
}

/* n elements under one scale */
QK_INLINE void qk_e4m3_dequantize_row(const uint8_t *codes, int64_t n, int dtype, float scale,
                                      void *out) {
    for (int64_t i = 0; i < n; i += QK_SEGMENT) {
        int64_t m = n - i < QK_SEGMENT ? n - i : QK_SEGMENT;
        qk_e4m3_dequantize_segment(codes + i, m, dtype, scale, qk_out_at(out, i, dtype));
    }
}

#endif
