/* What every format's C file shares: the ABI, element access, the scale rule and the lane sums.
 *
 * Plain C. The compiler vectorises it; no sum is left for it to reorder: statistics go to 16
 * explicit lanes that are added in a fixed order, so the doubles are the same on every
 * instruction set. Build with -ffp-contract=off and without -ffast-math: a fused or approximate
 * operation changes bytes.
 */
#ifndef QK_H
#define QK_H

#include <fenv.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define QK_EXPORT __attribute__((visibility("default")))
#define QK_INLINE static inline __attribute__((always_inline))

/* one copy of the function per instruction set, chosen when the library is loaded */
#if defined(__x86_64__) && !defined(QK_NO_CLONES)
#define QK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define QK_CLONES
#endif

enum { QK_BF16 = 0, QK_F16 = 1, QK_F32 = 2 };
enum { QK_OK = 0, QK_BAD_ARGUMENT = 1 };
enum { QK_LANES = 16, QK_SEGMENT = 128 };
enum { QK_NUM_NONFINITE = 0, QK_NUM_SATURATED = 1 };

#define QK_F32_INF 0x7f800000u

QK_INLINE uint32_t qk_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

QK_INLINE float qk_float(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

QK_INLINE size_t qk_itemsize(int dtype) { return dtype == QK_F32 ? 4 : 2; }

/* bit pattern of infinity: a magnitude below it is finite */
QK_INLINE uint32_t qk_inf(int dtype) {
    return dtype == QK_BF16 ? 0x7f80u : dtype == QK_F16 ? 0x7c00u : QK_F32_INF;
}

/* smallest normal number of the source dtype */
QK_INLINE float qk_tiny(int dtype) { return dtype == QK_F16 ? 0x1p-14f : 0x1p-126f; }

/* exact; a NaN stays a NaN with its sign */
QK_INLINE float qk_f16_to_f32(uint16_t h) {
    uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13;
    uint32_t finite = qk_bits(qk_float(magnitude) * 0x1p112f);
    uint32_t bits = magnitude >= 0x0f800000u ? magnitude | QK_F32_INF : finite;
    return qk_float(bits | (uint32_t)(h & 0x8000) << 16);
}

QK_INLINE float qk_load(const void *w, int64_t i, int dtype) {
    if (dtype == QK_BF16) return qk_float((uint32_t)((const uint16_t *)w)[i] << 16);
    if (dtype == QK_F16) return qk_f16_to_f32(((const uint16_t *)w)[i]);
    return ((const float *)w)[i];
}

QK_INLINE const void *qk_at(const void *w, int64_t i, int dtype) {
    return (const char *)w + (size_t)i * qk_itemsize(dtype);
}

/* Largest magnitude as its bit pattern in the source dtype. Patterns order like the numbers, so
 * anything not finite shows as a pattern >= qk_inf. One lane per column of a segment: no
 * reduction per row. */
typedef union {
    uint16_t half[QK_SEGMENT];
    uint32_t single[QK_SEGMENT];
} qk_max;

QK_INLINE void qk_max_add(qk_max *max, const void *w, int64_t n, int dtype) {
    if (dtype == QK_F32) {
        const uint32_t *p = w;
        for (int64_t i = 0; i < n; i++) {
            uint32_t a = p[i] & 0x7fffffffu;
            max->single[i] = a > max->single[i] ? a : max->single[i];
        }
    } else {
        const uint16_t *p = w;
        for (int64_t i = 0; i < n; i++) {
            uint16_t a = p[i] & 0x7fff;
            max->half[i] = a > max->half[i] ? a : max->half[i];
        }
    }
}

QK_INLINE uint32_t qk_max_bits(const qk_max *max, int dtype) {
    uint32_t m = 0;
    for (int i = 0; i < QK_SEGMENT; i++) {
        uint32_t a = dtype == QK_F32 ? max->single[i] : max->half[i];
        m = a > m ? a : m;
    }
    return m;
}

/* asks for n elements that a later pass reads, while this one computes */
QK_INLINE void qk_prefetch(const void *w, int64_t n, int dtype) {
    const char *p = w;
    for (int64_t at = 0; at < n * (int64_t)qk_itemsize(dtype); at += 64)
        __builtin_prefetch(p + at, 0, 2);
}

/* the same over finite elements only; adds the others to *num_nonfinite */
QK_INLINE uint32_t qk_max_finite_bits(const void *w, int64_t n, int dtype, int64_t *num_nonfinite) {
    uint32_t m = 0, inf = qk_inf(dtype);
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t a = dtype == QK_F32 ? ((const uint32_t *)w)[i] & 0x7fffffffu
                                     : (uint32_t)(((const uint16_t *)w)[i] & 0x7fff);
        count += a >= inf;
        m = a < inf && a > m ? a : m;
    }
    *num_nonfinite += count;
    return m;
}

QK_INLINE float qk_from_max_bits(uint32_t bits, int dtype) {
    uint16_t half = (uint16_t)bits;
    return dtype == QK_F32 ? qk_float(bits) : qk_load(&half, 0, dtype);
}

/* lanes 0..15 added as a tree, always in this order */
QK_INLINE double qk_sum_lanes(const double *lane) {
    double sum[QK_LANES];
    memcpy(sum, lane, sizeof sum);
    for (int half = QK_LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) sum[i] += sum[i + half];
    return sum[0];
}

/* A process may have set flush-to-zero or another rounding mode (torch.set_flush_denormal does):
 * the exported functions compute under the IEEE default and give the caller's setting back. */
QK_INLINE void qk_enter(fenv_t *saved) {
    fegetenv(saved);
    fesetenv(FE_DFL_ENV);
}

QK_INLINE void qk_leave(const fenv_t *saved) { fesetenv(saved); }

#endif
