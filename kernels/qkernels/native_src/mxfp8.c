/* MXFP8: e4m3, one e8m0 scale per 32 columns. */
#include "qk_blocks.h"

QK_EXPORT_BLOCK_CODEC(mxfp8, QK_MXFP8, 32)
