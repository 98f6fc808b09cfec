/* NVFP4: e2m1, one e4m3 scale per 16 columns, one f32 scale for the weight. */
#include "qk_blocks.h"

QK_EXPORT_BLOCK_CODEC(nvfp4, QK_NVFP4, 16)
