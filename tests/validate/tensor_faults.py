"""Faults in the tensors: missing, misshapen, left over, or with scales that can't be."""

from math import prod

from catalogue import DOWN, GATE, O_PROJ, PC_PT, K, Q, fault
from checkpoints import Draft, f32


def reshape(draft: Draft, name: str, shape: tuple[int, ...]) -> None:
    dtype, old, data = draft.tensor(name)
    assert prod(old) == prod(shape)
    draft.put(name, (dtype, shape, data))


def set_scale(draft: Draft, name: str, value: float) -> None:
    """Set the last scale of the tensor `name`."""
    dtype, shape, data = draft.tensor(name)
    draft.put(name, (dtype, shape, data[:-4] + f32(value)))


@fault("missing-tensor", f"{DOWN}.weight_scale")
def missing_scale(draft: Draft) -> None:
    draft.pop(f"{DOWN}.weight_scale")


@fault("missing-tensor", f"{DOWN}.weight_scale", algo=PC_PT)
def scale_named_scale_inv(draft: Draft) -> None:
    draft.put(
        f"{DOWN}.weight_scale_inv", draft.pop(f"{DOWN}.weight_scale"), beside=f"{DOWN}.weight"
    )


@fault("orphan-tensor", f"model.layers.{'9' * 5000}.mlp.up_proj.weight")
def layer_of_five_thousand_digits(draft: Draft) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    draft.put(f"model.layers.{'9' * 5000}.mlp.up_proj.weight", draft.tensor(name), beside=name)


@fault("wrong-shape", f"{Q}.weight_scale", algo=PC_PT)
def channel_scale_as_column(draft: Draft) -> None:
    reshape(draft, f"{Q}.weight_scale", (256, 1))


@fault("wrong-shape", f"{Q}.weight_scale")
def block_scale_squeezed_to_two_dimensions(draft: Draft) -> None:
    reshape(draft, f"{Q}.weight_scale", (2, 2))


@fault("wrong-shape", f"{K}.weight_scale")
def one_block_scale_squeezed_to_a_scalar(draft: Draft) -> None:
    draft.put(f"{K}.weight", ("F8_E4M3", (128, 128), bytes(128 * 128)))
    draft.put(f"{K}.weight_scale", ("F32", (), f32(1e-4)))


@fault("wrong-shape", f"{Q}.weight_scale", algo=PC_PT)
def channel_scale_of_too_few_rows(draft: Draft) -> None:
    dtype, _, data = draft.tensor(f"{Q}.weight_scale")
    draft.put(f"{Q}.weight_scale", (dtype, (128,), data[: 4 * 128]))


@fault("wrong-shape", f"{Q}.weight")
def weight_of_three_dimensions(draft: Draft) -> None:
    reshape(draft, f"{Q}.weight", (1, 256, 256))


@fault("shape-disagrees-with-config", f"{DOWN}.weight")
def transposed_weight(draft: Draft) -> None:
    assert draft.tensor(f"{DOWN}.weight")[1] == (256, 384)
    reshape(draft, f"{DOWN}.weight", (384, 256))
    reshape(draft, f"{DOWN}.weight_scale", (3, 1, 2, 1))


@fault("shape-disagrees-with-config", f"{K}.weight", algo=PC_PT)
def as_many_keys_as_queries(draft: Draft) -> None:
    for suffix in ("weight", "weight_scale"):
        draft.put(f"{K}.{suffix}", draft.tensor(f"{Q}.{suffix}"))


@fault("shape-disagrees-with-config", "model.embed_tokens.weight", model="qwen3")
def vocabulary_of_another_model(draft: Draft) -> None:
    draft.config["vocab_size"] = 400


@fault(
    "shape-disagrees-with-config",
    "model.layers.1.block_sparse_moe.experts.0.w2.weight",
    model="mixtral",
)
def experts_of_another_width(draft: Draft) -> None:
    draft.config["intermediate_size"] = 256


@fault("wrong-dtype", f"{Q}.weight_scale")
def scale_in_bf16(draft: Draft) -> None:
    _, shape, data = draft.tensor(f"{Q}.weight_scale")
    draft.put(f"{Q}.weight_scale", ("BF16", shape, data[: len(data) // 2]))


@fault("wrong-dtype", f"{Q}.weight")
def codes_as_bytes(draft: Draft) -> None:
    _, shape, data = draft.tensor(f"{Q}.weight")
    draft.put(f"{Q}.weight", ("U8", shape, data))


@fault("nonfinite-scale", f"{GATE}.weight_scale")
def nan_scale(draft: Draft) -> None:
    set_scale(draft, f"{GATE}.weight_scale", float("nan"))


@fault("nonfinite-scale", f"{GATE}.weight_scale", algo=PC_PT)
def infinite_scale(draft: Draft) -> None:
    set_scale(draft, f"{GATE}.weight_scale", float("inf"))


@fault("nonpositive-scale", f"{GATE}.weight_scale")
def zero_scale(draft: Draft) -> None:
    set_scale(draft, f"{GATE}.weight_scale", 0.0)


@fault("nonpositive-scale", f"{GATE}.weight_scale", algo=PC_PT)
def negative_scale(draft: Draft) -> None:
    set_scale(draft, f"{GATE}.weight_scale", -1e-4)


@fault("denormal-scale", f"{GATE}.weight_scale", severity="note")
def denormal_scale(draft: Draft) -> None:
    set_scale(draft, f"{GATE}.weight_scale", 1e-40)


@fault("constant-scale", f"{GATE}.weight_scale", algo=PC_PT, severity="note")
def scales_never_computed(draft: Draft) -> None:
    draft.put(f"{GATE}.weight_scale", ("F32", (384,), f32(*[1.0] * 384)))


@fault("orphan-tensor", f"{Q}.weight_scale")
def scale_of_an_unquantized_weight(draft: Draft) -> None:
    kept = draft.tensor(f"{Q}.weight_scale")
    draft.dequantize(Q)
    draft.put(f"{Q}.weight_scale", kept, beside=f"{Q}.weight")
    draft.set_exclude([*draft.exclude, Q])


@fault("orphan-tensor", "model.layers.0.self_attn.s_proj.weight_scale")
def scale_without_a_weight(draft: Draft) -> None:
    tensor = draft.tensor(f"{O_PROJ}.weight_scale")
    draft.put(
        "model.layers.0.self_attn.s_proj.weight_scale", tensor, beside=f"{O_PROJ}.weight_scale"
    )


@fault("orphan-tensor", f"{Q}.input_scale")
def scale_of_another_format(draft: Draft) -> None:
    draft.put(f"{Q}.input_scale", ("F32", (), f32(1.0)), beside=f"{Q}.weight")


@fault("orphan-tensor", "model.layers.2.mlp.up_proj.weight")
def layer_past_the_end(draft: Draft) -> None:
    name = "model.layers.1.mlp.up_proj"
    for suffix in ("weight", "weight_scale"):
        tensor = draft.tensor(f"{name}.{suffix}")
        target = f"model.layers.2.mlp.up_proj.{suffix}"
        draft.put(target, tensor, beside=f"{name}.{suffix}")


@fault("orphan-tensor", f"{K}.k_scale")
def kv_scale_without_a_quantized_cache(draft: Draft) -> None:
    draft.put(f"{K}.k_scale", ("F32", (), f32(1.0)), beside=f"{K}.weight")
