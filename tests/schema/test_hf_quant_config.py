"""The names in hf_quant_config.json against ModelOpt 0.47.0's own."""

from typing import get_args

import pytest

from qschema.formats import formats
from qschema.hf_quant_config import EmittedAlgo, LayerAlgo, QuantAlgo, forbid_overlap
from qschema.strict import PydanticCustomError

# the keys of process_layer_quant_config, ModelOpt 0.47.0 torch/export/quant_utils.py:695-772, with
# what it writes for them; fp8_pb_wo, fp8_pb_real and mxfp4 take its last branch, unchanged
WRITTEN = {
    "fp8": "FP8",
    "fp8_pc_pt": "FP8_PER_CHANNEL_PER_TOKEN",
    "int4_awq": "W4A16_AWQ",
    "w4a8_awq": "W4A8_AWQ",
    "int8_wo": "W8A16",
    "int8_sq": "W8A8_SQ_PER_CHANNEL",
    "nvfp4": "NVFP4",
    "w4a16_nvfp4": "W4A16_NVFP4",
    "nvfp4_awq": "NVFP4_AWQ",
    "w4a8_nvfp4_fp8": "W4A8_NVFP4_FP8",
    "w4a8_mxfp4_fp8": "W4A8_MXFP4_FP8",
    "nvfp4_svdquant": "NVFP4_SVD",
    "mxfp8": "MXFP8",
    "fp8_pb_wo": "fp8_pb_wo",
    "fp8_pb_real": "fp8_pb_real",
    "mxfp4": "mxfp4",
}


def test_every_name_that_modelopt_writes_is_known():
    assert sorted(get_args(EmittedAlgo)) == sorted(WRITTEN.values())


def test_every_format_of_ours_can_be_written_down():
    for declared in formats().values():
        assert declared.spelling in get_args(EmittedAlgo)
        assert {declared.name, declared.spelling} <= set(get_args(QuantAlgo))
        assert declared.spelling in get_args(LayerAlgo)


def test_only_a_whole_checkpoint_can_be_mixed():
    assert "MIXED_PRECISION" in get_args(QuantAlgo)
    assert "MIXED_PRECISION" not in get_args(LayerAlgo)


@pytest.mark.parametrize(
    ("excluded", "quantized"),
    [
        (["model.layers.0*"], ["model.layers.0.mlp.up_proj"]),
        (["lm_head"], ["lm_head"]),
        (["*.gate"], ["model.layers.3.mlp.gate"]),
    ],
)
def test_excluded_module_that_is_quantized_is_named(excluded, quantized):
    with pytest.raises(PydanticCustomError, match=f"1 modules .*{quantized[0]}"):
        forbid_overlap(excluded, quantized)


@pytest.mark.parametrize(
    ("excluded", "quantized"),
    [
        (["model.layers.1"], ["model.layers.1.mlp.up_proj"]),
        (["lm_head"], ["model.lm_head"]),
        (["model.layers.0*"], ["model.layers.10.mlp.up_proj"]),
        ([], ["lm_head"]),
    ],
)
def test_name_without_a_wildcard_excludes_itself_only(excluded, quantized):
    forbid_overlap(excluded, quantized)
