"""The last parts of tensors' names: what quantization stores, in any dialect, and what else."""

import re

# last parts of the names that quantizers give what they store beside a weight, in any dialect
QUANT_SUFFIX = re.compile(
    r"weight_scale(_\d|_inv)?|input_scale|output_scale|scales?|scale_inv|pre_quant_scale"
    r"|weight_packed|weight_shape|weight_zero_point|input_global_scale|weight_global_scale"
    r"|[kv]_(scale|bias)|kv_scale|q_scale|prob_scale|qweight|qzeros|zeros|g_idx|weight_g_idx"
    r"|_amax|_pre_quant_scale|_svdquant_lora_[ab]|svdquant_lora_[ab]|weight_blocks|\w+_blocks"
    r"|\w+_proj_(weight|input)_scale(_2)?"
)
KV_SUFFIX = re.compile(r"[kv]_scale|[kv]_bias|kv_scale")
# what modules of the known model types own beside the format's tensors
PLAIN_SUFFIX = frozenset({"weight", "bias", "e_score_correction_bias", "inv_freq"})
# what holds a weight's codes
CODES = re.compile(r"weight|qweight|weight_packed|weight_blocks")
