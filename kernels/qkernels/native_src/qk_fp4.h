/* e2m1 (S.EE.M, bias 1: 0, 0.5, 1, 1.5, 2, 3, 4, 6) and codes of four bits, two per byte. */
#ifndef QK_FP4_H
#define QK_FP4_H

#include "qk_codec.h"

/* numbers from here on would round above the largest code: 6 plus half a step, a tie */
#define QK_E2M1_LIMIT 7.0f
#define QK_E2M1_LARGEST 6.0f

/* Code of y = x / scale, nearest even, and *value the number that it stands for (a zero without
 * its sign). |y| < 7. As in qk_e4m3_encode: adding 2^(e+22) leaves steps of 2^(e-1), e held at 0
 * or above; two steps per exponent make the code, and the 2 in the low bits of the addend takes
 * 2 * 127 off modulo 8. The sign is that of a number below zero: -0.0 has none. */
QK_INLINE uint32_t qk_e2m1_encode(float x, float y, float *value) {
    uint32_t bits = qk_bits(y), exponent = bits & 0x7f800000u;
    exponent = exponent < 0x3f800000u ? 0x3f800000u : exponent;
    float addend = qk_float((exponent + (22u << 23) + 2u) | (bits & 0x80000000u));
    float rounded = y + addend;
    *value = rounded - addend;
    return ((qk_bits(rounded) + (exponent >> 22)) & 7u) | (x < 0.0f ? 8u : 0u);
}

/* code of an x that is not finite */
QK_INLINE uint8_t qk_e2m1_special(float x) {
    int is_nan = (qk_bits(x) & 0x7fffffffu) > QK_F32_INF;
    return is_nan ? 0 : x < 0.0f ? 15 : 7;
}

/* exact, and free of subnormal numbers, which some processors are slow on */
QK_INLINE float qk_e2m1_decode(uint32_t code) {
    uint32_t magnitude = code & 7u;
    uint32_t bits = (magnitude << 22) + 0x3f000000u;
    bits = magnitude < 2 ? (0u - magnitude) & 0x3f000000u : bits;
    return qk_float(bits | (code & 8u) << 28);
}

typedef union {
    uint8_t code[QK_SEGMENT];
    uint16_t pair[QK_SEGMENT / 2];
} qk_nibbles;

/* a byte per two codes, the first in the low nibble; m is even */
QK_INLINE void qk_pack(const qk_nibbles *nibbles, int64_t m, uint8_t *out) {
    uint8_t packed[QK_SEGMENT / 2];
    for (int i = 0; i < QK_SEGMENT / 2; i++)
        packed[i] = (uint8_t)(nibbles->pair[i] | nibbles->pair[i] >> 4);
    qk_copy(out, packed, m / 2, QK_SEGMENT / 2);
}

QK_INLINE void qk_unpack(const uint8_t *in, int64_t m, qk_nibbles *nibbles) {
    uint8_t packed[QK_SEGMENT / 2] = {0};
    qk_copy(packed, in, m / 2, QK_SEGMENT / 2);
    for (int i = 0; i < QK_SEGMENT / 2; i++)
        nibbles->pair[i] = (uint16_t)((packed[i] | packed[i] << 4) & 0x0f0f);
}

#endif
