/* Scans of any tensor: its largest finite magnitude, and how many elements are NaN or Inf. */
#include "qk.h"

/* what is not finite makes a chunk be read again, from the cache */
enum { CHUNK = 64 * QK_SEGMENT };

QK_CLONES static uint32_t scan(const void *w, int dtype, int64_t n, int64_t *num_nonfinite) {
    uint32_t largest = 0;
    for (int64_t at = 0; at < n; at += CHUNK) {
        int64_t m = n - at < CHUNK ? n - at : CHUNK;
        uint32_t bits = qk_scan(qk_at(w, at, dtype), m, dtype, num_nonfinite);
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

QK_EXPORT int qk_count_nonfinite(const void *w, int dtype, int64_t n, int64_t *total) {
    if (!qk_is_dtype(dtype)) return QK_BAD_ARGUMENT;
    *total = 0;
    scan(w, dtype, n, total);
    return QK_OK;
}

/* *amax becomes the larger of itself and the largest finite magnitude, exactly; NaN and Inf are
 * added to *num_nonfinite. */
QK_EXPORT int qk_amax(const void *w, int dtype, int64_t n, float *amax, int64_t *num_nonfinite) {
    fenv_t saved;
    if (!qk_is_dtype(dtype)) return QK_BAD_ARGUMENT;
    qk_enter(&saved);
    float largest = qk_from_max_bits(scan(w, dtype, n, num_nonfinite), dtype);
    if (largest > *amax) *amax = largest;
    qk_leave(&saved);
    return QK_OK;
}
