/* Two's complement codes of 8 or 4 bits: round(x / scale), scale = amax / largest code. */
#ifndef QK_INT_H
#define QK_INT_H

#include "qk_codec.h"

/* Nearest even, two's complement in the low byte, and *value the number. Adding 1.5 * 2^23 leaves
 * steps of 1. No clamp: amax / (amax / 127) is within a part in 2^16 of 127 even where the scale
 * is subnormal. */
QK_INLINE uint32_t qk_int_encode(float y, float *value) {
    float rounded = y + 0x1.8p23f;
    *value = rounded - 0x1.8p23f;
    return qk_bits(rounded);
}

/* code of an x that is not finite */
QK_INLINE uint8_t qk_int8_special(float x) { return x > 0.0f ? 127 : x < 0.0f ? 0x80 : 0; }

QK_INLINE uint8_t qk_int4_special(float x) { return x > 0.0f ? 7 : x < 0.0f ? 0xf8 : 0; }

/* a byte of code per element of a segment, under one scale; lanes may be NULL */
QK_INLINE void qk_int_segment(const void *w, int64_t m, int dtype, float scale, int finite,
                              uint8_t (*special)(float), uint8_t *codes, qk_lanes *lanes) {
    float x[QK_SEGMENT], value[QK_SEGMENT];
    uint32_t wide[QK_SEGMENT];
    qk_load_segment(w, m, dtype, x);
    if (!finite) qk_clean(x);
    for (int i = 0; i < QK_SEGMENT; i++) wide[i] = qk_int_encode(x[i] / scale, value + i);
    for (int i = 0; i < QK_SEGMENT; i++) codes[i] = (uint8_t)wide[i];
    if (!finite) qk_set_special(w, m, dtype, special, codes);
    if (lanes) qk_add_statistics(x, value, &scale, QK_SEGMENT, qk_unit(scale), lanes);
}

#endif
