"""Faults that only TensorRT-LLM minds; the ids of its rules say in which version."""

from collections.abc import Callable

from catalogue import DOWN, GATE, O_PROJ, PB_WO, PC_PT, Fault, K, Q, V
from checkpoints import MIXED, Draft, f32
from mixed_faults import entries

from qschema.formats import find
from qvalidate.targets import ONE_GPU, Deployment

EXPERTS = "model.layers.0.block_sparse_moe.experts"
W1, W3 = f"{EXPERTS}.0.w1", f"{EXPERTS}.0.w3"
ALGO = "$.quantization.quant_algo"
# the first dense layer by name
FIRST = "model.layers.0.mlp.down_proj.weight"

TRTLLM_FAULTS: list[Fault] = []

Plant = Callable[[Draft], None]


def fault(
    *rules: str,
    where: str,
    model: str = "llama",
    algo: str = PB_WO,
    severity: str = "error",
    on: Deployment = ONE_GPU,
) -> Callable[[Plant], Plant]:
    """Put the decorated function into the list, once for each rule that has to find it."""

    def declare(plant: Plant) -> Plant:
        for rule in rules:
            TRTLLM_FAULTS.append(Fault(plant, rule, where, model, algo, severity, True, on))
        return plant

    return declare


@fault("trtllm-algo-newer", where=ALGO, algo="MXFP8")
@fault("trtllm-algo-unproven", where=ALGO, algo="NVFP4_AWQ")
@fault("trtllm-no-method", where=ALGO, algo="W8A8_SQ_PER_CHANNEL")
@fault("trtllm-mixed-file", where="$.quantization.quantized_layers", algo=MIXED)
@fault("trtllm-smoothing-missing", where=f"{O_PROJ}.pre_quant_scale", algo="W4A16_AWQ")
@fault("trtllm-experts-unsupported", where=f"{W1}.weight", model="mixtral", algo=PC_PT)
@fault(
    "trtllm-experts-block-scale",
    "trtllm-experts-block-scale-12",
    where=f"{W1}.weight_scale_inv",
    model="mixtral",
)
@fault("trtllm-gpu", where=FIRST, algo="NVFP4", on=Deployment(gpu=90))
@fault(
    "trtllm-gpu-undocumented",
    "trtllm-gpu-undocumented-12",
    where=FIRST,
    algo=PC_PT,
    on=Deployment(gpu=100),
)
@fault(
    "trtllm-experts-gpu",
    where=f"{W1}.weight",
    model="mixtral",
    algo="NVFP4",
    on=Deployment(gpu=90),
)
@fault("trtllm-tp-rows", where=f"{Q}.weight", on=Deployment(tp=3))
@fault(
    "trtllm-tp-columns",
    "trtllm-tp-columns-12",
    where=f"{O_PROJ}.weight",
    on=Deployment(tp=3),
)
@fault("trtllm-tp-group", where=f"{O_PROJ}.weight", algo="NVFP4", on=Deployment(tp=32))
@fault(
    "trtllm-blocks-misaligned",
    "trtllm-blocks-misaligned-12",
    where=f"{K}.weight",
    on=Deployment(tp=2),
)
@fault("trtllm-kv-heads", where=f"{K}.weight_scale", algo=PC_PT, on=Deployment(tp=4))
def as_it_is(draft: Draft) -> None:
    """Change nothing: the fault is the format, or where it is to be deployed."""
    assert draft.hf_quant_config


@fault("trtllm-no-file", where="")
def no_file(draft: Draft) -> None:
    draft.hf_quant_config = {}


@fault("trtllm-no-file-packed", where="", algo="NVFP4")
def no_file_beside_packed_codes(draft: Draft) -> None:
    draft.hf_quant_config = {}


@fault("trtllm-flat-file", where="$.quantization")
def flat_file(draft: Draft) -> None:
    draft.hf_quant_config = dict(draft.quantization)


@fault("trtllm-unrecognised", where="$.quantization_config.quant_method")
def config_of_another_method(draft: Draft) -> None:
    draft.hf_quant_config = {}
    draft.quantization["quant_method"] = "of nobody"
    del draft.quantization["producer"]


@fault("trtllm-algo-unsupported", where=ALGO)
def blocks_in_upper_case(draft: Draft) -> None:
    for config in draft.each_config():
        config["quant_algo"] = PB_WO


@fault("trtllm-algo-unsupported", where=ALGO, algo="FP8")
def algorithm_in_lower_case(draft: Draft) -> None:
    for config in draft.each_config():
        config["quant_algo"] = "fp8"


@fault("trtllm-algo-missing", where=ALGO)
def cache_alone(draft: Draft) -> None:
    draft.dequantize_all()
    draft.quantize_cache("FP8")
    draft.nested["quant_algo"] = draft.quantization["quant_algo"] = None


@fault("trtllm-kv-algo", where="$.quantization.kv_cache_quant_algo", algo="NVFP4")
def cache_with_biases(draft: Draft) -> None:
    draft.quantize_cache("NVFP4_AFFINE")


@fault("trtllm-group-size", where="$.quantization.group_size", algo="W4A16_AWQ")
def no_group_size(draft: Draft) -> None:
    del draft.nested["group_size"]


@fault("trtllm-layer-algo", where=f"$.quantization.quantized_layers.{O_PROJ}", algo=MIXED)
def blocks_in_a_mixed_checkpoint(draft: Draft) -> None:
    for layers in entries(draft):
        layers[O_PROJ] = {"quant_algo": "fp8_pb_wo"}


@fault("trtllm-plain-layer", "trtllm-plain-layer-12", where=f"{K}.weight")
def one_part_listed(draft: Draft) -> None:
    draft.set_exclude([*draft.exclude, Q])


@fault("trtllm-plain-layer", where=f"{O_PROJ}.weight")
def layer_above_listed(draft: Draft) -> None:
    draft.set_exclude([*draft.exclude, "model.layers.0.self_attn"])


@fault("trtllm-plain-layer-12", where="lm_head.weight")
def quantized_head(draft: Draft) -> None:
    draft.quantize("lm_head", find(PB_WO))
    draft.set_exclude(["model.embed_tokens"])


@fault(
    "trtllm-plain-layer-packed",
    "trtllm-plain-layer-packed-12",
    where=f"{K}.weight",
    algo="NVFP4",
)
def one_packed_part_listed(draft: Draft) -> None:
    draft.set_exclude([*draft.exclude, Q])


@fault(
    "trtllm-plain-layer-packed",
    "trtllm-plain-layer-packed-12",
    where=f"{W1}.weight",
    model="mixtral",
    algo="FP8",
)
def experts_listed(draft: Draft) -> None:
    draft.set_exclude([*draft.exclude, f"{EXPERTS}*"])


@fault("trtllm-quantized-layer", "trtllm-quantized-layer-12", where=f"{O_PROJ}.weight")
def plain_linear_not_listed(draft: Draft) -> None:
    draft.dequantize(O_PROJ)


@fault("trtllm-quantized-layer-12", where=f"{O_PROJ}.weight")
def plain_linear_listed_by_an_expression(draft: Draft) -> None:
    draft.dequantize(O_PROJ)
    draft.set_exclude([*draft.exclude, r"re:.*layers\.0\.self_attn\.o_proj"])


@fault(
    "trtllm-quantized-layer-lookup",
    "trtllm-quantized-layer-lookup-12",
    where=f"{O_PROJ}.weight",
    algo="W8A16",
)
def plain_linear_where_scales_are_looked_up(draft: Draft) -> None:
    draft.dequantize(O_PROJ)


@fault("trtllm-mixed-fusion", where=f"{Q}.weight")
def one_part_plain(draft: Draft) -> None:
    draft.dequantize(Q)
    draft.set_exclude([*draft.exclude, Q])


@fault("trtllm-mixed-parts", where=f"{K}.weight", algo=MIXED)
def part_in_another_format(draft: Draft) -> None:
    for layers in entries(draft):
        layers[K] = {"quant_algo": PC_PT}


@fault("trtllm-weight-missing", where=f"{K}.weight")
def one_part_missing(draft: Draft) -> None:
    draft.pop_module(K)


@fault("trtllm-weight-missing", where=f"{O_PROJ}.weight")
def scale_without_its_weight(draft: Draft) -> None:
    draft.pop(f"{O_PROJ}.weight")


@fault("trtllm-scale-missing", where=f"{Q}.weight_scale", algo="NVFP4")
def fused_block_scales_missing(draft: Draft) -> None:
    draft.pop(f"{Q}.weight_scale")


@fault("trtllm-scale-missing", where=f"{O_PROJ}.weight_scale", algo="W8A16")
def row_scales_missing(draft: Draft) -> None:
    draft.pop(f"{O_PROJ}.weight_scale")


@fault("trtllm-scale-missing", where=f"{O_PROJ}.weight_scale_2", algo="NVFP4")
def global_scale_missing(draft: Draft) -> None:
    draft.pop(f"{O_PROJ}.weight_scale_2")


@fault("trtllm-scale-unloaded", "trtllm-scale-unloaded-12", where=f"{DOWN}.weight_scale")
def block_scales_missing(draft: Draft) -> None:
    draft.pop(f"{DOWN}.weight_scale")


@fault(
    "trtllm-scale-unloaded",
    "trtllm-scale-unloaded-12",
    where=f"{O_PROJ}.input_scale",
    algo="NVFP4",
)
def input_scale_of_nvfp4_missing(draft: Draft) -> None:
    draft.pop(f"{O_PROJ}.input_scale")


@fault("trtllm-scale-unloaded", where=f"{K}.input_scale", algo="FP8")
def input_scale_of_one_part_missing(draft: Draft) -> None:
    draft.pop(f"{K}.input_scale")


@fault("trtllm-scales-differ", where=f"{K}.weight_scale_2", algo="NVFP4")
def parts_with_different_scales(draft: Draft) -> None:
    draft.put(f"{K}.weight_scale_2", ("F32", (), f32(3e-4)))


@fault("trtllm-scales-differ", where=f"{K}.input_scale", algo="W4A8_AWQ", severity="warning")
def parts_with_nearly_equal_scales(draft: Draft) -> None:
    draft.put(f"{K}.input_scale", ("F32", (), f32(1.50001e-4)))


@fault("trtllm-scale-dtype", where=f"{O_PROJ}.weight_scale", algo="NVFP4")
def block_scales_of_another_dtype(draft: Draft) -> None:
    _, shape, data = draft.tensor(f"{O_PROJ}.weight_scale")
    draft.put(f"{O_PROJ}.weight_scale", ("U8", shape, data))


@fault("trtllm-scale-shape", where=f"{O_PROJ}.weight_scale", algo="FP8")
def scale_of_each_row(draft: Draft) -> None:
    draft.put(f"{O_PROJ}.weight_scale", ("F32", (256,), f32(*[1e-4] * 256)))


@fault("trtllm-scale-shape", where=f"{O_PROJ}.weight")
def weight_of_three_dimensions(draft: Draft) -> None:
    dtype, (rows, columns), data = draft.tensor(f"{O_PROJ}.weight")
    draft.put(f"{O_PROJ}.weight", (dtype, (1, rows, columns), data))


@fault("trtllm-scale-shape", where=f"{GATE}.weight_scale", algo="NVFP4")
def block_scales_in_one_dimension(draft: Draft) -> None:
    dtype, (rows, blocks), data = draft.tensor(f"{GATE}.weight_scale")
    draft.put(f"{GATE}.weight_scale", (dtype, (rows * blocks,), data))


@fault("trtllm-smoothing-ignored", where=f"{Q}.pre_quant_scale", algo="W4A16_AWQ")
def smoothing_beside_a_fused_part(draft: Draft) -> None:
    smooth(draft, Q, 256)


@fault("trtllm-smoothing-dtype", where=f"{O_PROJ}.pre_quant_scale", algo="W4A8_AWQ")
def smoothing_of_another_dtype(draft: Draft) -> None:
    smooth(draft, O_PROJ, 256, dtype="F16")


@fault("trtllm-experts-weight-missing", where=f"{W3}.weight", model="mixtral", algo="NVFP4")
def weight_of_one_expert_missing(draft: Draft) -> None:
    draft.pop_module(W3)


@fault("trtllm-experts-weight-missing", where=f"{W3}.weight", model="mixtral", algo="NVFP4")
def weight_of_all_experts_missing(draft: Draft) -> None:
    for expert in range(4):
        draft.pop_module(f"{EXPERTS}.{expert}.w3")


@fault("trtllm-experts-scale-missing", where=f"{W3}.input_scale", model="mixtral", algo="NVFP4")
def expert_that_calibration_never_saw(draft: Draft) -> None:
    draft.pop(f"{W3}.input_scale")


@fault(
    "trtllm-experts-scale-unloaded",
    "trtllm-experts-scale-unloaded-12",
    where=f"{W3}.input_scale",
    model="mixtral",
    algo="FP8",
)
def expert_in_fp8_that_calibration_never_saw(draft: Draft) -> None:
    draft.pop(f"{W3}.input_scale")


@fault("trtllm-experts-input-scales", where=f"{W3}.input_scale", model="mixtral", algo="NVFP4")
def up_with_another_input_scale(draft: Draft) -> None:
    draft.put(f"{W3}.input_scale", ("F32", (), f32(3e-4)))


@fault("trtllm-experts-weight-scales", where=f"{W3}.weight_scale_2", model="mixtral", algo="NVFP4")
def up_with_another_scale(draft: Draft) -> None:
    draft.put(f"{W3}.weight_scale_2", ("F32", (), f32(3e-4)))


@fault("trtllm-stacked-experts", where=f"{EXPERTS}.gate_up_proj", model="mixtral", algo="NVFP4")
def stacked_experts(draft: Draft) -> None:
    draft.stack_experts(find("NVFP4"))


@fault("trtllm-architecture", where="$.architectures")
def no_architecture(draft: Draft) -> None:
    del draft.config["architectures"]


@fault("trtllm-block-dtype", where="$.dtype")
def blocks_of_a_float16_model(draft: Draft) -> None:
    draft.config["dtype"] = "float16"


@fault("trtllm-tp-rows", where=f"{Q}.weight", algo="W4A16_AWQ", on=Deployment(tp=256))
def bytes_of_two_rows_divided(draft: Draft) -> None:
    assert draft.tensor(f"{Q}.weight")[1] == (128, 256)


@fault("trtllm-blocks-misaligned", where=f"{Q}.weight", model="llama_odd")
def part_ends_inside_a_block(draft: Draft) -> None:
    assert draft.tensor(f"{Q}.weight")[1][0] == 192


@fault("trtllm-kv-unpaired", where=f"{V}.v_scale", algo="FP8")
def scale_of_the_keys_alone(draft: Draft) -> None:
    draft.quantize_cache("FP8")
    draft.pop(f"{V}.v_scale")


@fault("trtllm-kv-unscaled", where=f"{K}.k_scale", algo="NVFP4", severity="warning")
def four_bit_cache_without_scales(draft: Draft) -> None:
    draft.quantization["kv_cache_scheme"] = draft.nested["kv_cache_quant_algo"] = "NVFP4"


@fault("trtllm-kv-ignored", where=f"{K}.k_scale", algo="FP8", severity="note")
def scales_of_an_eight_bit_cache(draft: Draft) -> None:
    draft.quantize_cache("FP8")


def smooth(draft: Draft, module: str, columns: int, *, dtype: str = "BF16") -> None:
    """Give `module` a pre_quant_scale of ones (in bf16)."""
    scale = (dtype, (columns,), bytes.fromhex("803f") * columns)
    draft.put(f"{module}.pre_quant_scale", scale, beside=f"{module}.weight")
