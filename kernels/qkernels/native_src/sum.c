/* Exact sums of doubles: a few that don't overlap, whose sum is that of all numbers so far. */
#include <math.h>

#include "qk.h"

/* Adds the n finite doubles at x to *num parts, in order of their size and without zeros. There are
 * as many as finite doubles have bits, 2098, at most: two that don't overlap may be one bit each.
 * Returns QK_BAD_ARGUMENT, with the parts as they were, for a number that is not finite. Source: Shewchuk 1997, Adaptive precision floating-point
 * arithmetic, Grow-Expansion with zero elimination. */
QK_EXPORT int qk_exact_sum(const double *x, int64_t n, double *parts, int64_t *num) {
    fenv_t saved;
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) return QK_BAD_ARGUMENT;
    }
    qk_enter(&saved);
    int64_t m = *num;
    for (int64_t i = 0; i < n; i++) {
        double sum = x[i];
        int64_t kept = 0;
        for (int64_t j = 0; j < m; j++) {
            double a = sum, b = parts[j];
            sum = a + b;
            double of_b = sum - a;
            double rest = (a - (sum - of_b)) + (b - of_b);
            if (rest != 0.0) parts[kept++] = rest;
        }
        if (sum != 0.0) parts[kept++] = sum;
        m = kept;
    }
    *num = m;
    qk_leave(&saved);
    return QK_OK;
}
