/* dst[c][r] = src[r][c] for elements of 1, 2 or 4 bytes. */
#include "qk.h"

/* A square tile has a cache line per row: 64, 32 or 16 elements, so lines are read and written
 * whole. The flat index of a tile is its row's bits, then its column's. out[2i] = in[i], out[2i +
 * 1] = in[i + half] rotates those bits by one; log2(side) times, it swaps row and column.
 *
 * STRIP tiles side by side, then those below, which are asked for early: a strip's rows of dst
 * are few enough pages to stay in the processor's table of them. */
enum { LINE = 64, STRIP = 8 };

#define DEFINE_TILE(type, side)                                                                    \
    QK_INLINE void shuffle_##type(const type *in, type *out) {                                     \
        for (int i = 0; i < side * side / 2; i++) {                                                \
            out[2 * i] = in[i];                                                                    \
            out[2 * i + 1] = in[i + side * side / 2];                                              \
        }                                                                                          \
    }                                                                                              \
    QK_INLINE void tile_##type(const type *src, int64_t cols, type *dst, int64_t rows) {           \
        type a[side * side], b[side * side];                                                       \
        for (int r = 0; r < side; r++) {                                                           \
            memcpy(a + r * side, src + r * cols, LINE);                                            \
            __builtin_prefetch(src + (r + side) * cols, 0, 2);                                     \
        }                                                                                          \
        for (int n = side; n > 1; n /= 4) {                                                        \
            shuffle_##type(a, b);                                                                  \
            if (n > 2)                                                                             \
                shuffle_##type(b, a);                                                              \
            else                                                                                   \
                memcpy(a, b, sizeof a);                                                            \
        }                                                                                          \
        for (int c = 0; c < side; c++) memcpy(dst + c * rows, a + c * side, LINE);                 \
    }                                                                                              \
    QK_INLINE void edge_##type(const type *src, type *dst, int64_t rows, int64_t cols, int64_t r0, \
                               int64_t r1, int64_t c0, int64_t c1) {                               \
        for (int64_t r = r0; r < r1; r++)                                                          \
            for (int64_t c = c0; c < c1; c++) dst[c * rows + r] = src[r * cols + c];               \
    }                                                                                              \
    QK_CLONES static void transpose_##type(const type *src, type *dst, int64_t rows,               \
                                           int64_t cols) {                                         \
        int64_t full_rows = rows / side * side, full_cols = cols / side * side;                    \
        for (int64_t c0 = 0; c0 < full_cols; c0 += STRIP * side) {                                 \
            int64_t c1 = c0 + STRIP * side < full_cols ? c0 + STRIP * side : full_cols;            \
            for (int64_t r = 0; r < full_rows; r += side)                                          \
                for (int64_t c = c0; c < c1; c += side)                                            \
                    tile_##type(src + r * cols + c, cols, dst + c * rows + r, rows);               \
        }                                                                                          \
        edge_##type(src, dst, rows, cols, full_rows, rows, 0, cols);                               \
        edge_##type(src, dst, rows, cols, 0, full_rows, full_cols, cols);                          \
    }

DEFINE_TILE(uint8_t, 64)
DEFINE_TILE(uint16_t, 32)
DEFINE_TILE(uint32_t, 16)

QK_EXPORT int qk_transpose(const void *src, void *dst, int64_t itemsize, int64_t rows,
                           int64_t cols) {
    if (itemsize == 1)
        transpose_uint8_t(src, dst, rows, cols);
    else if (itemsize == 2)
        transpose_uint16_t(src, dst, rows, cols);
    else if (itemsize == 4)
        transpose_uint32_t(src, dst, rows, cols);
    else
        return QK_BAD_ARGUMENT;
    return QK_OK;
}
