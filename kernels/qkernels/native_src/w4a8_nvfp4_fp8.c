/* W4A8_NVFP4_FP8: e2m1, one e4m3 scale per 32 columns, one f32 scale for the weight. */
#include "qk_blocks.h"

QK_EXPORT_BLOCK_CODEC(w4a8_nvfp4_fp8, QK_NVFP4, 32)
