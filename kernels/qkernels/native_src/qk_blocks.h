/* Codecs with a byte of scale per group of columns in a row: outs {weight, weight_scale U8
 * [N, K / group]}, weight U8 [N, K / 2] for e2m1 and [N, K] for e4m3.
 *
 * QK_NVFP4: e2m1; the byte is an e4m3 number, times `global`. QK_MXFP4, QK_MXFP8: e2m1 or e4m3;
 * the byte is an exponent of two, biased by 127, 255 for NaN.
 */
#ifndef QK_BLOCKS_H
#define QK_BLOCKS_H

#include "qk_fp4.h"
#include "qk_fp8.h"

typedef enum { QK_NVFP4, QK_MXFP4, QK_MXFP8 } qk_kind;

/* scales are found for a band of segments at a time, which makes loops of 64 or 32 groups */
enum { QK_BAND = 8 * QK_SEGMENT, QK_MAX_GROUPS = QK_BAND / 16 };

typedef struct {
    float scale[QK_MAX_GROUPS];
    float inverse[QK_MAX_GROUPS]; /* of a power of two */
    uint8_t byte[QK_MAX_GROUPS];
    float unit[QK_BAND / QK_SEGMENT]; /* of each segment's largest scale */
    int finite;                       /* no element is NaN or Inf */
    int in_range;                     /* no finite number saturates */
} qk_band;

/* Largest magnitude of each group of a band of m elements, as f32 patterns; returns whether all
 * were finite. With `skip`, of the finite ones, and the others are added to *num_nonfinite. Pairs
 * are halved over the whole band: patterns of the source dtype order like the numbers. */
#define QK_DEFINE_GROUP_MAX(type)                                                                  \
    QK_INLINE void qk_pair_max_##type(const type *in, int n, type *out) {                          \
        for (int i = 0; i < n; i++)                                                                \
            out[i] = in[2 * i] > in[2 * i + 1] ? in[2 * i] : in[2 * i + 1];                        \
    }                                                                                              \
    QK_INLINE int qk_group_max_##type(const type *w, int64_t m, int dtype, int group, int skip,    \
                                      uint32_t *max, int64_t *num_nonfinite) {                     \
        type a[QK_BAND], b[QK_BAND / 2], inf = (type)qk_inf(dtype), largest = 0;                   \
        if (m == QK_BAND) {                                                                        \
            for (int i = 0; i < QK_BAND; i++) a[i] = w[i] & (type)~qk_sign(dtype);                 \
        } else {                                                                                   \
            memset(a, 0, sizeof a);                                                                \
            for (int64_t i = 0; i < m; i++) a[i] = w[i] & (type)~qk_sign(dtype);                   \
        }                                                                                          \
        for (int i = 0; skip && i < QK_BAND; i++) {                                                \
            *num_nonfinite += a[i] >= inf;                                                         \
            a[i] = a[i] < inf ? a[i] : 0;                                                          \
        }                                                                                          \
        qk_pair_max_##type(a, QK_BAND / 2, b);                                                     \
        qk_pair_max_##type(b, QK_BAND / 4, a);                                                     \
        qk_pair_max_##type(a, QK_BAND / 8, b);                                                     \
        qk_pair_max_##type(b, QK_BAND / 16, a);                                                    \
        if (group == 32) {                                                                         \
            qk_pair_max_##type(a, QK_BAND / 32, b);                                                \
            memcpy(a, b, sizeof(type) * QK_BAND / 32);                                             \
        }                                                                                          \
        for (int g = 0; g < QK_BAND / group; g++) largest = a[g] > largest ? a[g] : largest;       \
        for (int g = 0; g < QK_BAND / group; g++) max[g] = qk_bits(qk_from_max_bits(a[g], dtype)); \
        return largest < inf;                                                                      \
    }

QK_DEFINE_GROUP_MAX(uint16_t)
QK_DEFINE_GROUP_MAX(uint32_t)

QK_INLINE int qk_group_max(const void *w, int64_t m, int dtype, int group, int skip, uint32_t *max,
                           int64_t *num_nonfinite) {
    if (dtype == QK_BF16)
        return qk_group_max_uint16_t(w, m, QK_BF16, group, skip, max, num_nonfinite);
    if (dtype == QK_F16)
        return qk_group_max_uint16_t(w, m, QK_F16, group, skip, max, num_nonfinite);
    return qk_group_max_uint32_t(w, m, QK_F32, group, skip, max, num_nonfinite);
}

/* e4m3 of amax / (6 * global), 1 where that is 0, and its product with global */
QK_INLINE void qk_nvfp4_scales(const uint32_t *max, int num, float global, qk_band *band) {
    float largest = QK_E2M1_LARGEST * global;
    uint32_t byte[QK_MAX_GROUPS], outside = 0;
    for (int g = 0; g < num; g++) {
        float value, ratio = qk_float(max[g]) / largest;
        ratio = ratio == 0.0f ? 1.0f : ratio;
        ratio = ratio > 0x1p-9f ? ratio : 0x1p-9f;
        ratio = ratio < QK_E4M3_LARGEST ? ratio : QK_E4M3_LARGEST;
        byte[g] = qk_e4m3_encode(ratio, &value);
        band->scale[g] = value * global;
    }
    /* division is monotonic; 0 / 0 counts as outside */
    for (int g = 0; g < num; g++)
        outside |= qk_float(max[g]) / band->scale[g] < QK_E2M1_LIMIT ? 0u : 1u;
    for (int g = 0; g < num; g++) band->byte[g] = (uint8_t)byte[g];
    band->in_range = !outside;
}

QK_INLINE float qk_e8m0_decode(uint32_t byte) {
    uint32_t bits = byte == 255 ? 0x7fc00000u : byte << 23;
    return qk_float(byte == 0 ? 0x00400000u : bits);
}

/* The smallest power of two that brings amax to 6 = 1.5 * 2^2 or 448 = 1.75 * 2^8 or below, from
 * 2^-127 on: what is added carries into the exponent where the mantissa is above 1.5 or 1.75. */
QK_INLINE void qk_mx_scales(const uint32_t *max, int num, qk_kind kind, qk_band *band) {
    uint32_t carry = kind == QK_MXFP4 ? 0x3fffffu : 0x1fffffu, emax = kind == QK_MXFP4 ? 2 : 8;
    uint32_t byte[QK_MAX_GROUPS];
    for (int g = 0; g < num; g++) {
        uint32_t exponent = (max[g] + carry) >> 23;
        byte[g] = exponent > emax ? exponent - emax : 0;
        band->scale[g] = qk_e8m0_decode(byte[g]);
        band->inverse[g] = qk_float((254 - byte[g]) << 23);
    }
    for (int g = 0; g < num; g++) band->byte[g] = (uint8_t)byte[g];
    band->in_range = 1;
}

/* qk_unit of the largest of each segment's scales, of the first `used` */
QK_INLINE void qk_find_units(int64_t used, int group, qk_band *band) {
    uint32_t a[QK_MAX_GROUPS], b[QK_MAX_GROUPS];
    for (int g = 0; g < QK_BAND / group; g++) a[g] = g < used ? qk_bits(band->scale[g]) : 0;
    qk_pair_max_uint32_t(a, QK_BAND / group / 2, b);
    qk_pair_max_uint32_t(b, QK_BAND / group / 4, a);
    if (group == 16) qk_pair_max_uint32_t(a, QK_BAND / group / 8, b);
    for (int i = 0; i < QK_BAND / QK_SEGMENT; i++)
        band->unit[i] = qk_unit(qk_float(group == 16 ? b[i] : a[i]));
}

/* how the m elements of a band are scaled */
QK_INLINE void qk_find_band(const void *w, int64_t m, int dtype, qk_kind kind, int group,
                            float global, qk_band *band, int64_t *counts) {
    uint32_t max[QK_MAX_GROUPS];
    int64_t *num_nonfinite = counts + QK_NUM_NONFINITE;
    int num = QK_BAND / group;
    band->finite = qk_group_max(w, m, dtype, group, 0, max, num_nonfinite);
    if (!band->finite) qk_group_max(w, m, dtype, group, 1, max, num_nonfinite);
    if (kind == QK_NVFP4)
        qk_nvfp4_scales(max, num, global, band);
    else
        qk_mx_scales(max, num, kind, band);
    qk_find_units(m / group, group, band);
}

/* m elements of a segment, the first of whose groups is g0 of the band; lanes may be NULL */
QK_INLINE void qk_block_segment(const void *w, int64_t m, int dtype, qk_kind kind, int group,
                                const qk_band *band, int64_t g0, uint8_t *out, qk_lanes *lanes,
                                int64_t *counts) {
    float x[QK_SEGMENT], y[QK_SEGMENT], value[QK_SEGMENT];
    uint32_t wide[QK_SEGMENT];
    qk_nibbles codes;
    const float *factor = (kind == QK_NVFP4 ? band->scale : band->inverse) + g0;
    qk_load_segment(w, m, dtype, x);
    if (!band->finite) qk_clean(x);
    for (int g = 0; g < QK_SEGMENT / group; g++)
        for (int i = g * group; i < (g + 1) * group; i++)
            y[i] = kind == QK_NVFP4 ? x[i] / factor[g] : x[i] * factor[g];
    if (!band->in_range)
        counts[QK_NUM_SATURATED] += qk_clamp(y, QK_E2M1_LARGEST, QK_E2M1_LIMIT);
    for (int i = 0; i < QK_SEGMENT; i++)
        wide[i] = kind == QK_MXFP8 ? qk_e4m3_encode(y[i], value + i)
                                   : qk_e2m1_encode(x[i], y[i], value + i);
    for (int i = 0; i < QK_SEGMENT; i++) codes.code[i] = (uint8_t)wide[i];
    if (!band->finite)
        qk_set_special(w, m, dtype, kind == QK_MXFP8 ? qk_e4m3_special : qk_e2m1_special,
                       codes.code);
    if (kind == QK_MXFP8)
        qk_copy(out, codes.code, m, QK_SEGMENT);
    else
        qk_pack(&codes, m, out);
    if (lanes)
        qk_add_statistics(x, value, band->scale + g0, group, band->unit[g0 * group / QK_SEGMENT],
                          lanes);
}

QK_INLINE void qk_quantize_blocks(const void *w, int dtype, int64_t rows, int64_t cols,
                                  qk_kind kind, int group, float global, void *const *outs,
                                  double *err2, double *ref2, int64_t *counts) {
    uint8_t *out = outs[0], *scales = outs[1];
    int64_t per_byte = kind == QK_MXFP8 ? 1 : 2;
    for (int64_t r = 0; r < rows; r++) {
        qk_lanes lanes = {{0}, {0}};
        for (int64_t c0 = 0; c0 < cols; c0 += QK_BAND) {
            int64_t width = cols - c0 < QK_BAND ? cols - c0 : QK_BAND;
            int64_t at = r * cols + c0;
            qk_band band;
            qk_find_band(qk_at(w, at, dtype), width, dtype, kind, group, global, &band, counts);
            qk_copy(scales + at / group, band.byte, width / group, QK_BAND / group);
            for (int64_t c = 0; c < width; c += QK_SEGMENT) {
                int64_t m = width - c < QK_SEGMENT ? width - c : QK_SEGMENT;
                qk_prefetch(qk_at(w, at + c + QK_BAND, dtype), QK_SEGMENT, dtype);
                qk_block_segment(qk_at(w, at + c, dtype), m, dtype, kind, group, &band, c / group,
                                 out + (at + c) / per_byte, err2 ? &lanes : NULL, counts);
            }
        }
        if (err2) qk_write_statistics(&lanes, err2 + r, ref2 + r);
    }
}

/* m elements of a segment under the scales of its groups */
QK_INLINE void qk_dequantize_block_segment(const uint8_t *in, int64_t m, int dtype, qk_kind kind,
                                           int group, const float *scale, void *out) {
    float value[QK_SEGMENT], x[QK_SEGMENT];
    qk_nibbles codes = {{0}};
    if (kind == QK_MXFP8)
        qk_copy(codes.code, in, m, QK_SEGMENT);
    else
        qk_unpack(in, m, &codes);
    for (int i = 0; i < QK_SEGMENT; i++)
        value[i] = kind == QK_MXFP8 ? qk_e4m3_decode(codes.code[i])
                                    : qk_e2m1_decode(codes.code[i]);
    for (int g = 0; g < QK_SEGMENT / group; g++)
        for (int i = g * group; i < (g + 1) * group; i++) x[i] = value[i] * scale[g];
    qk_store_segment(out, m, dtype, x);
}

/* the weight as one row: groups fill rows, so bands may go across their ends */
QK_INLINE void qk_dequantize_blocks(const void *const *ins, int dtype, int64_t n, qk_kind kind,
                                    int group, float global, void *out) {
    const uint8_t *in = ins[0], *scales = ins[1];
    int64_t per_byte = kind == QK_MXFP8 ? 1 : 2;
    for (int64_t at = 0; at < n; at += QK_BAND) {
        int64_t width = n - at < QK_BAND ? n - at : QK_BAND;
        uint8_t byte[QK_MAX_GROUPS] = {0};
        float scale[QK_MAX_GROUPS];
        qk_copy(byte, scales + at / group, width / group, QK_BAND / group);
        for (int g = 0; g < QK_BAND / group; g++)
            scale[g] = kind == QK_NVFP4 ? qk_e4m3_decode(byte[g]) * global
                                        : qk_e8m0_decode(byte[g]);
        for (int64_t c = at; c < at + width; c += QK_SEGMENT) {
            int64_t m = n - c < QK_SEGMENT ? n - c : QK_SEGMENT;
            qk_dequantize_block_segment(in + c / per_byte, m, dtype, kind, group,
                                        scale + (c - at) / group, qk_out_at(out, c, dtype));
        }
    }
}

/* the functions of a codec of this family */
#define QK_EXPORT_BLOCK_CODEC(codec, kind, group)                                                  \
    QK_CLONES static void quantize(const void *w, int dtype, int64_t rows, int64_t cols,           \
                                   float global, void *const *outs, double *err2, double *ref2,    \
                                   int64_t *counts) {                                              \
        qk_quantize_blocks(w, dtype, rows, cols, kind, group, global, outs, err2, ref2, counts);   \
    }                                                                                              \
    QK_CLONES static void dequantize(const void *const *ins, float global, int dtype,              \
                                     int64_t rows, int64_t cols, void *out) {                      \
        qk_dequantize_blocks(ins, dtype, rows * cols, kind, group, global, out);                   \
    }                                                                                              \
    QK_EXPORT_CODEC(codec, 1, group)

#endif
