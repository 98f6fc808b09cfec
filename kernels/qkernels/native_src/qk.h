/* What every C file shares: bits, element access, largest magnitudes, the floating-point setting.
 *
 * Plain C for little-endian machines. The compiler vectorises it: loops run over segments of 128
 * columns. Build with -ffp-contract=off and without -ffast-math: a fused or approximate operation
 * changes bytes.
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
enum { QK_SEGMENT = 128 };

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

QK_INLINE int qk_is_dtype(int dtype) { return dtype >= QK_BF16 && dtype <= QK_F32; }

QK_INLINE size_t qk_itemsize(int dtype) { return dtype == QK_F32 ? 4 : 2; }

/* bit pattern of infinity: a magnitude below it is finite */
QK_INLINE uint32_t qk_inf(int dtype) {
    return dtype == QK_BF16 ? 0x7f80u : dtype == QK_F16 ? 0x7c00u : QK_F32_INF;
}

QK_INLINE uint32_t qk_sign(int dtype) { return dtype == QK_F32 ? 0x80000000u : 0x8000u; }

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

QK_INLINE const void *qk_at(const void *w, int64_t i, int dtype) {
    return (const char *)w + (size_t)i * qk_itemsize(dtype);
}

QK_INLINE void *qk_out_at(void *w, int64_t i, int dtype) {
    return (char *)w + (size_t)i * qk_itemsize(dtype);
}

/* m <= full bytes; a copy of a fixed size where it can be */
QK_INLINE void qk_copy(uint8_t *out, const uint8_t *in, int64_t m, int64_t full) {
    if (m == full)
        memcpy(out, in, (size_t)full);
    else
        memcpy(out, in, (size_t)m);
}

/* m of a segment's elements, zeros after them */
QK_INLINE void qk_load_segment(const void *w, int64_t m, int dtype, float *x) {
    if (m < QK_SEGMENT) {
        memset(x, 0, sizeof(float) * QK_SEGMENT);
        for (int64_t i = 0; i < m; i++) x[i] = qk_load(w, i, dtype);
    } else if (dtype == QK_BF16) {
        for (int i = 0; i < QK_SEGMENT; i++) x[i] = qk_load(w, i, QK_BF16);
    } else if (dtype == QK_F16) {
        for (int i = 0; i < QK_SEGMENT; i++) x[i] = qk_load(w, i, QK_F16);
    } else {
        for (int i = 0; i < QK_SEGMENT; i++) x[i] = qk_load(w, i, QK_F32);
    }
}

QK_INLINE void qk_store_segment(void *out, int64_t m, int dtype, const float *x) {
    if (m < QK_SEGMENT) {
        for (int64_t i = 0; i < m; i++) qk_store(out, i, dtype, x[i]);
    } else if (dtype == QK_BF16) {
        for (int i = 0; i < QK_SEGMENT; i++) qk_store(out, i, QK_BF16, x[i]);
    } else if (dtype == QK_F16) {
        for (int i = 0; i < QK_SEGMENT; i++) qk_store(out, i, QK_F16, x[i]);
    } else {
        for (int i = 0; i < QK_SEGMENT; i++) qk_store(out, i, QK_F32, x[i]);
    }
}

/* Largest magnitude as its bit pattern in the source dtype. Patterns order like the numbers, so
 * anything not finite shows as a pattern >= qk_inf. One lane per column of a segment: no
 * reduction per row. */
typedef union {
    uint16_t half[QK_SEGMENT];
    uint32_t single[QK_SEGMENT];
} qk_max;

QK_INLINE void qk_max_add_n(qk_max *max, const void *w, int64_t n, int dtype) {
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

/* n <= QK_SEGMENT; a full segment is a loop of fixed length */
QK_INLINE void qk_max_add(qk_max *max, const void *w, int64_t n, int dtype) {
    if (n == QK_SEGMENT)
        qk_max_add_n(max, w, QK_SEGMENT, dtype);
    else
        qk_max_add_n(max, w, n, dtype);
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

/* Largest finite magnitude of n elements, as its pattern; adds the others to *num_nonfinite. */
QK_INLINE uint32_t qk_scan(const void *w, int64_t n, int dtype, int64_t *num_nonfinite) {
    qk_max max;
    memset(&max, 0, sizeof max);
    for (int64_t i = 0; i < n; i += QK_SEGMENT) {
        int64_t m = n - i < QK_SEGMENT ? n - i : QK_SEGMENT;
        qk_max_add(&max, qk_at(w, i, dtype), m, dtype);
    }
    uint32_t bits = qk_max_bits(&max, dtype);
    return bits < qk_inf(dtype) ? bits : qk_max_finite_bits(w, n, dtype, num_nonfinite);
}

QK_INLINE float qk_from_max_bits(uint32_t bits, int dtype) {
    if (dtype == QK_BF16) return qk_float(bits << 16);
    return dtype == QK_F16 ? qk_f16_to_f32((uint16_t)bits) : qk_float(bits);
}

/* A process may have set flush-to-zero or another rounding mode (torch.set_flush_denormal does):
 * the exported functions compute under the IEEE default and give the caller's setting back. */
QK_INLINE void qk_enter(fenv_t *saved) {
    fegetenv(saved);
    fesetenv(FE_DFL_ENV);
}

QK_INLINE void qk_leave(const fenv_t *saved) { fesetenv(saved); }

#endif
