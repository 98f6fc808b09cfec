/* Counts NaN and Inf of any tensor, for tensors that are copied as they are. */
#include "qk.h"

enum { CHUNK = 64 * QK_SEGMENT };

QK_INLINE int64_t count(const void *w, int dtype, int64_t n) {
    int64_t total = 0;
    for (int64_t at = 0; at < n; at += CHUNK) {
        const void *p = qk_at(w, at, dtype);
        int64_t m = n - at < CHUNK ? n - at : CHUNK;
        qk_max max;
        memset(&max, 0, sizeof max);
        for (int64_t i = 0; i < m; i += QK_SEGMENT) {
            if (m - i >= QK_SEGMENT)
                qk_max_add(&max, qk_at(p, i, dtype), QK_SEGMENT, dtype);
            else
                qk_max_add(&max, qk_at(p, i, dtype), m - i, dtype);
        }
        if (qk_max_bits(&max, dtype) >= qk_inf(dtype)) qk_max_finite_bits(p, m, dtype, &total);
    }
    return total;
}

QK_CLONES static int64_t count_isa(const void *w, int dtype, int64_t n) {
    if (dtype == QK_BF16) return count(w, QK_BF16, n);
    if (dtype == QK_F16) return count(w, QK_F16, n);
    return count(w, QK_F32, n);
}

QK_EXPORT int qk_count_nonfinite(const void *w, int dtype, int64_t n, int64_t *total) {
    if (dtype < QK_BF16 || dtype > QK_F32) return QK_BAD_ARGUMENT;
    *total = count_isa(w, dtype, n);
    return QK_OK;
}
