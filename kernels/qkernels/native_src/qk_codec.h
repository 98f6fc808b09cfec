/* What every codec shares: the exported functions, what is not finite, saturation, statistics.
 *
 * A codec's C file defines quantize() and dequantize() with the arguments of the exported
 * functions and names its divisors in QK_EXPORT_CODEC. outs and ins hold the tensors in the order
 * in which the format declares them, codes first; `global` is the scale of the whole weight where
 * the format has one, positive. A dtype is a branch per segment, not a copy of the loop.
 *
 * No sum is left for the compiler to reorder: statistics go to 16 explicit lanes that are added
 * in a fixed order, so the doubles are the same on every instruction set.
 */
#ifndef QK_CODEC_H
#define QK_CODEC_H

#include "qk.h"

enum { QK_LANES = 16 };
enum { QK_NUM_NONFINITE = 0, QK_NUM_SATURATED = 1 };

/* f32 scale of a row or block: amax is 0 or positive and finite; largest: that of the codes */
QK_INLINE float qk_scale(float amax, float largest, int dtype) {
    float tiny = qk_tiny(dtype);
    return amax == 0.0f ? 1.0f : (amax < tiny ? tiny : amax) / largest;
}

/* Replaces what is not finite by 0, which adds nothing to the sums, and returns how many. The
 * codes of those elements are set afterwards. */
QK_INLINE int64_t qk_clean(float *x) {
    uint32_t count = 0;
    for (int i = 0; i < QK_SEGMENT; i++) {
        int finite = (qk_bits(x[i]) & 0x7fffffffu) < QK_F32_INF;
        count += !finite;
        x[i] = finite ? x[i] : 0.0f;
    }
    return count;
}

/* sets the codes of those of m elements that are not finite to special(x) */
QK_INLINE void qk_set_special(const void *w, int64_t m, int dtype, uint8_t (*special)(float),
                              uint8_t *codes) {
    for (int64_t i = 0; i < m; i++) {
        float x = qk_load(w, i, dtype);
        if ((qk_bits(x) & 0x7fffffffu) >= QK_F32_INF) codes[i] = special(x);
    }
}

/* Clamps y to +-largest and returns how many were beyond +-limit; a NaN, which is 0 / 0 here,
 * becomes a zero. */
QK_INLINE int64_t qk_clamp(float *y, float largest, float limit) {
    uint32_t count = 0;
    for (int i = 0; i < QK_SEGMENT; i++) {
        uint32_t bits = qk_bits(y[i]), magnitude = bits & 0x7fffffffu;
        magnitude = magnitude > QK_F32_INF ? 0 : magnitude;
        count += magnitude > qk_bits(limit);
        magnitude = magnitude > qk_bits(largest) ? qk_bits(largest) : magnitude;
        y[i] = qk_float(magnitude | (bits & 0x80000000u));
    }
    return count;
}

/* sums of a row */
typedef struct {
    double err2[QK_LANES];
    double ref2[QK_LANES];
} qk_lanes;

/* A power of two near 1 / scale: squares of numbers times this stay inside f32's range. Where
 * groups of a segment differ, of the largest scale. */
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

/* lanes 0..15 added as a tree, always in this order */
QK_INLINE double qk_sum_lanes(const double *lane) {
    double sum[QK_LANES];
    memcpy(sum, lane, sizeof sum);
    for (int half = QK_LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) sum[i] += sum[i + half];
    return sum[0];
}

/* Adds the squares of x - value * scale and of x. scale: one per group of columns. */
QK_INLINE void qk_add_statistics(const float *x, const float *value, const float *scale, int group,
                                 float unit, qk_lanes *lanes) {
    float diff[QK_SEGMENT], ref[QK_SEGMENT];
    for (int g = 0; g < QK_SEGMENT / group; g++) {
        float scale_unit = scale[g] * unit;
        for (int i = g * group; i < (g + 1) * group; i++) {
            ref[i] = x[i] * unit;
            diff[i] = ref[i] - value[i] * scale_unit;
        }
    }
    qk_add_squares(diff, unit, lanes->err2);
    qk_add_squares(ref, unit, lanes->ref2);
}

QK_INLINE void qk_write_statistics(const qk_lanes *lanes, double *err2, double *ref2) {
    *err2 = qk_sum_lanes(lanes->err2);
    *ref2 = qk_sum_lanes(lanes->ref2);
}

/* The exported functions of a codec whose weights are multiples of row_step x col_step. err2 and
 * ref2 are both NULL for no statistics; counts is {nonfinite, saturated}, added to. */
#define QK_EXPORT_CODEC(codec, row_step, col_step)                                                 \
    QK_EXPORT int qk_##codec##_quantize(const void *w, int dtype, int64_t rows, int64_t cols,      \
                                        float global, void *const *outs, double *err2,             \
                                        double *ref2, int64_t *counts) {                           \
        fenv_t saved;                                                                              \
        if (!qk_is_dtype(dtype) || !err2 != !ref2 || rows % row_step || cols % col_step)           \
            return QK_BAD_ARGUMENT;                                                                \
        qk_enter(&saved);                                                                          \
        quantize(w, dtype, rows, cols, global, outs, err2, ref2, counts);                          \
        qk_leave(&saved);                                                                          \
        return QK_OK;                                                                              \
    }                                                                                              \
    QK_EXPORT int qk_##codec##_dequantize(const void *const *ins, float global, int dtype,         \
                                          int64_t rows, int64_t cols, void *out) {                 \
        fenv_t saved;                                                                              \
        if (!qk_is_dtype(dtype) || rows % row_step || cols % col_step) return QK_BAD_ARGUMENT;     \
        qk_enter(&saved);                                                                          \
        dequantize(ins, global, dtype, rows, cols, out);                                           \
        qk_leave(&saved);                                                                          \
        return QK_OK;                                                                              \
    }

#endif
