/* MXFP4: e2m1, one e8m0 scale per 32 columns. */
#include "qk_blocks.h"

QK_EXPORT_BLOCK_CODEC(mxfp4, QK_MXFP4, 32)
