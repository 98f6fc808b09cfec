/* e4m3 (S.EEEE.MMM, bias 7, no infinity, NaN 0x7f/0xff, largest 448) under f32 scales. */
#ifndef QK_FP8_H
#define QK_FP8_H

#include "qk.h"

/* numbers beyond this round above the largest code: 448 plus half a step */
#define QK_E4M3_LIMIT 464.0f

/* amax is 0 or positive and finite */
QK_INLINE float qk_e4m3_scale(float amax, int dtype) {
    float tiny = qk_tiny(dtype);
    return amax == 0.0f ? 1.0f : (amax < tiny ? tiny : amax) / 448.0f;
}

/* Code of y in the low byte, nearest even, and *value the number that it stands for (a zero
 * without its sign). |y| <= 464. Adding 2^(e+20) leaves steps of 2^(e-3) in f32: the addition
 * itself rounds to e4m3's three mantissa bits and, with e held at -6 or above, to its subnormal
 * step 2^-9. The low bits of the sum then count steps; eight of them per exponent make the code.
 * The 0x38 in the low bits of the addend takes 8 * (127 - 6) off modulo 128, and being even
 * leaves ties alone. */
QK_INLINE uint32_t qk_e4m3_encode(float y, float *value) {
    uint32_t bits = qk_bits(y), exponent = bits & 0x7f800000u;
    exponent = exponent < 0x3c800000u ? 0x3c800000u : exponent;
    float addend = qk_float((exponent + (20u << 23) + 0x38u) | (bits & 0x80000000u));
    float rounded = y + addend;
    *value = rounded - addend;
    return ((qk_bits(rounded) + (exponent >> 20)) & 0x7fu) | (bits >> 24 & 0x80u);
}

/* the same for any x / scale: clamps to +-448; a NaN x becomes 0x7f with its sign */
QK_INLINE uint32_t qk_e4m3_encode_any(float x, float scale, float *value) {
    uint32_t y = qk_bits(x / scale), magnitude = y & 0x7fffffffu;
    uint32_t clamped = magnitude > 0x43e00000u ? 0x43e00000u : magnitude;
    uint32_t code = qk_e4m3_encode(qk_float(clamped | (y & 0x80000000u)), value);
    int is_nan = (qk_bits(x) & 0x7fffffffu) > QK_F32_INF;
    return is_nan ? 0x7fu | (qk_bits(x) >> 24 & 0x80u) : code;
}

/* exact; a NaN code becomes a NaN */
QK_INLINE float qk_e4m3_decode(uint8_t code) {
    uint32_t magnitude = qk_bits(qk_float((uint32_t)(code & 0x7f) << 20) * 0x1p120f);
    magnitude = (code & 0x7f) == 0x7f ? 0x7fc00000u : magnitude;
    return qk_float(magnitude | (uint32_t)(code & 0x80) << 24);
}

typedef struct {
    double err2[QK_LANES];
    double ref2[QK_LANES];
} qk_lanes;

/* A power of two near 1 / scale: squares of numbers times this stay inside f32's range. */
QK_INLINE float qk_unit(float scale) {
    uint32_t exponent = qk_bits(scale) >> 23;
    exponent = exponent < 27 ? 27 : exponent > 227 ? 227 : exponent;
    return qk_float((254 - exponent) << 23);
}

/* Sums of eight squares per lane in f32, then in f64: column i of the segment adds to lane i %
 * 16. */
QK_INLINE void qk_add_squares(const float *x, float unit, double *lane) {
    float sum[QK_LANES];
    double back = 1.0 / ((double)unit * unit);
    for (int l = 0; l < QK_LANES; l++) sum[l] = x[l] * x[l];
    for (int i = QK_LANES; i < QK_SEGMENT; i += QK_LANES)
        for (int l = 0; l < QK_LANES; l++) sum[l] += x[i + l] * x[i + l];
    for (int l = 0; l < QK_LANES; l++) lane[l] += (double)sum[l] * back;
}

/* Codes of QK_SEGMENT finite elements. */
QK_INLINE void qk_e4m3_segment(const float *x, float scale, uint8_t *codes, qk_lanes *lanes) {
    float unit = qk_unit(scale), scale_unit = scale * unit;
    float value[QK_SEGMENT], diff[QK_SEGMENT], ref[QK_SEGMENT];
    uint32_t wide[QK_SEGMENT];
    for (int i = 0; i < QK_SEGMENT; i++) wide[i] = qk_e4m3_encode(x[i] / scale, value + i);
    for (int i = 0; i < QK_SEGMENT; i++) codes[i] = (uint8_t)wide[i];
    if (!lanes) return;
    for (int i = 0; i < QK_SEGMENT; i++) {
        ref[i] = x[i] * unit;
        diff[i] = ref[i] - value[i] * scale_unit;
    }
    qk_add_squares(diff, unit, lanes->err2);
    qk_add_squares(ref, unit, lanes->ref2);
}

/* The same where NaN, Inf or |x / scale| > 464 occur; those not finite add nothing to the sums.
 * Rare, so one plain copy of it is enough. */
static __attribute__((noinline)) void qk_e4m3_segment_any(const float *x, float scale,
                                                          uint8_t *codes, qk_lanes *lanes,
                                                          int64_t *num_saturated) {
    float unit = qk_unit(scale), scale_unit = scale * unit;
    float diff[QK_SEGMENT], ref[QK_SEGMENT];
    for (int i = 0; i < QK_SEGMENT; i++) {
        float value, y = x[i] / scale;
        int is_finite = (qk_bits(x[i]) & 0x7fffffffu) < QK_F32_INF;
        codes[i] = (uint8_t)qk_e4m3_encode_any(x[i], scale, &value);
        ref[i] = is_finite ? x[i] * unit : 0.0f;
        diff[i] = is_finite ? ref[i] - value * scale_unit : 0.0f;
        *num_saturated += is_finite && (y > QK_E4M3_LIMIT || y < -QK_E4M3_LIMIT);
    }
    if (!lanes) return;
    qk_add_squares(diff, unit, lanes->err2);
    qk_add_squares(ref, unit, lanes->ref2);
}

/* n elements under one scale; plain: all are finite and |w / scale| <= 464 */
QK_INLINE void qk_e4m3_span(const void *w, int64_t n, int dtype, float scale, int plain,
                            uint8_t *codes, qk_lanes *lanes, int64_t *num_saturated) {
    for (int64_t i = 0; i < n; i += QK_SEGMENT) {
        float x[QK_SEGMENT];
        uint8_t tail[QK_SEGMENT];
        int64_t m = n - i < QK_SEGMENT ? n - i : QK_SEGMENT;
        uint8_t *out = m == QK_SEGMENT ? codes + i : tail;
        if (m == QK_SEGMENT) {
            for (int j = 0; j < QK_SEGMENT; j++) x[j] = qk_load(w, i + j, dtype);
        } else {
            memset(x, 0, sizeof x);
            for (int64_t j = 0; j < m; j++) x[j] = qk_load(w, i + j, dtype);
        }
        if (plain)
            qk_e4m3_segment(x, scale, out, lanes);
        else
            qk_e4m3_segment_any(x, scale, out, lanes, num_saturated);
        if (m < QK_SEGMENT) memcpy(codes + i, tail, (size_t)m);
    }
}

/* f32 to bf16, f16 or f32, nearest even; every NaN becomes the positive quiet NaN */
QK_INLINE void qk_store(void *out, int64_t i, int dtype, float x) {
    uint32_t u = qk_bits(x);
    int is_nan = (u & 0x7fffffffu) > QK_F32_INF;
    if (dtype == QK_F32) {
        ((uint32_t *)out)[i] = is_nan ? 0x7fc00000u : u;
    } else if (dtype == QK_BF16) {
        uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
        ((uint16_t *)out)[i] = (uint16_t)(is_nan ? 0x7fc0u : rounded);
    } else {
        uint32_t a = u & 0x7fffffffu;
        uint32_t normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1)) >> 13;
        uint32_t subnormal = qk_bits(qk_float(a) + 0.5f) - 0x3f000000u;
        uint32_t half = a < 0x38800000u ? subnormal : a >= 0x477ff000u ? 0x7c00u : normal;
        ((uint16_t *)out)[i] = (uint16_t)(is_nan ? 0x7e00u : half | (u >> 16 & 0x8000u));
    }
}

QK_INLINE void qk_e4m3_dequantize_span(const uint8_t *codes, int64_t at, int64_t n, int dtype,
                                       float scale, void *out) {
    for (int64_t i = at; i < at + n; i++)
        qk_store(out, i, dtype, qk_e4m3_decode(codes[i]) * scale);
}

/* The exported functions of a format whose file defines quantize() and dequantize() for any dtype:
 * outs and ins are {weight, weight_scale}; counts is {nonfinite, saturated}, added to. Each
 * dtype, with and without statistics (err2 and ref2, or both NULL), becomes a loop of its own. */
#define QK_FP8_EXPORT(format)                                                                      \
    QK_CLONES static void quantize_isa(const void *w, int dtype, int64_t rows, int64_t cols,       \
                                       uint8_t *q, float *s, double *err2, double *ref2,           \
                                       int64_t *counts) {                                          \
        if (dtype == QK_BF16 && err2)                                                              \
            quantize(w, QK_BF16, rows, cols, q, s, err2, ref2, counts);                            \
        else if (dtype == QK_BF16)                                                                 \
            quantize(w, QK_BF16, rows, cols, q, s, NULL, NULL, counts);                            \
        else if (dtype == QK_F16 && err2)                                                          \
            quantize(w, QK_F16, rows, cols, q, s, err2, ref2, counts);                             \
        else if (dtype == QK_F16)                                                                  \
            quantize(w, QK_F16, rows, cols, q, s, NULL, NULL, counts);                             \
        else if (err2)                                                                             \
            quantize(w, QK_F32, rows, cols, q, s, err2, ref2, counts);                             \
        else                                                                                       \
            quantize(w, QK_F32, rows, cols, q, s, NULL, NULL, counts);                             \
    }                                                                                              \
    QK_CLONES static void dequantize_isa(const uint8_t *q, const float *s, int dtype,              \
                                         int64_t rows, int64_t cols, void *out) {                  \
        if (dtype == QK_BF16)                                                                      \
            dequantize(q, s, QK_BF16, rows, cols, out);                                            \
        else if (dtype == QK_F16)                                                                  \
            dequantize(q, s, QK_F16, rows, cols, out);                                             \
        else                                                                                       \
            dequantize(q, s, QK_F32, rows, cols, out);                                             \
    }                                                                                              \
    QK_EXPORT int qk_##format##_quantize(const void *w, int dtype, int64_t rows, int64_t cols,     \
                                         void *const *outs, double *err2, double *ref2,            \
                                         int64_t *counts) {                                        \
        fenv_t saved;                                                                              \
        if (dtype < QK_BF16 || dtype > QK_F32 || !err2 != !ref2) return QK_BAD_ARGUMENT;           \
        qk_enter(&saved);                                                                          \
        quantize_isa(w, dtype, rows, cols, outs[0], outs[1], err2, ref2, counts);                  \
        qk_leave(&saved);                                                                          \
        return QK_OK;                                                                              \
    }                                                                                              \
    QK_EXPORT int qk_##format##_dequantize(const void *const *ins, int dtype, int64_t rows,        \
                                           int64_t cols, void *out) {                              \
        fenv_t saved;                                                                              \
        if (dtype < QK_BF16 || dtype > QK_F32) return QK_BAD_ARGUMENT;                             \
        qk_enter(&saved);                                                                          \
        dequantize_isa(ins[0], ins[1], dtype, rows, cols, out);                                    \
        qk_leave(&saved);                                                                          \
        return QK_OK;                                                                              \
    }

#endif
