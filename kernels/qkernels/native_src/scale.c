/* Multiplies a weight in place by one f32 factor per column or per row, and divides it by another
 * where there is one: each an f32 operation, then one rounding to the dtype, ties to even; a NaN
 * becomes the positive quiet NaN. */
#include "qk.h"

QK_INLINE void scale_segment(float *x, int64_t m, const float *factor, const float *divisor,
                             int step) {
    for (int64_t i = 0; i < m; i++) x[i] *= factor[i * step];
    if (divisor)
        for (int64_t i = 0; i < m; i++) x[i] /= divisor[i * step];
}

QK_INLINE void scale_row(void *row, int dtype, int64_t cols, const float *factor,
                         const float *divisor, int step) {
    for (int64_t c = 0; c < cols; c += QK_SEGMENT) {
        int64_t m = cols - c < QK_SEGMENT ? cols - c : QK_SEGMENT;
        void *p = qk_out_at(row, c, dtype);
        const float *over = divisor ? divisor + c * step : NULL;
        float x[QK_SEGMENT];
        qk_load_segment(p, m, dtype, x);
        if (m == QK_SEGMENT)
            scale_segment(x, QK_SEGMENT, factor + c * step, over, step);
        else
            scale_segment(x, m, factor + c * step, over, step);
        qk_store_segment(p, m, dtype, x);
    }
}

QK_CLONES static void scale_columns(void *w, int dtype, int64_t rows, int64_t cols,
                                    const float *factor, const float *divisor) {
    for (int64_t r = 0; r < rows; r++)
        scale_row(qk_out_at(w, r * cols, dtype), dtype, cols, factor, divisor, 1);
}

QK_CLONES static void scale_rows(void *w, int dtype, int64_t rows, int64_t cols,
                                 const float *factor, const float *divisor) {
    for (int64_t r = 0; r < rows; r++)
        scale_row(qk_out_at(w, r * cols, dtype), dtype, cols, factor + r,
                  divisor ? divisor + r : NULL, 0);
}

QK_EXPORT int qk_scale_columns(void *w, int dtype, int64_t rows, int64_t cols, const float *factor,
                               const float *divisor) {
    fenv_t saved;
    if (!qk_is_dtype(dtype)) return QK_BAD_ARGUMENT;
    qk_enter(&saved);
    scale_columns(w, dtype, rows, cols, factor, divisor);
    qk_leave(&saved);
    return QK_OK;
}

QK_EXPORT int qk_scale_rows(void *w, int dtype, int64_t rows, int64_t cols, const float *factor,
                            const float *divisor) {
    fenv_t saved;
    if (!qk_is_dtype(dtype)) return QK_BAD_ARGUMENT;
    qk_enter(&saved);
    scale_rows(w, dtype, rows, cols, factor, divisor);
    qk_leave(&saved);
    return QK_OK;
}
