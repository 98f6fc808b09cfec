"""Faults of values: right names, dtypes and shapes, wrong numbers, in checkpoints of real ones.

Each is declared with the level that is the first to see it:

    rules     headers, JSON, scales and samples of codes: `qvalidate CKPT`
    weights   every tensor against the source's: `--reference`
    dry       the engine's own loader on headers
    compare   the engine's log-probabilities against the source's
    none      nothing does

and with the ids of the findings there and the tensor, file or key that one of them names. Here are
the scales; codes are in `value_codes_faults`, the other tensors and files in `value_file_faults`.
"""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from catalogue import DOWN, GATE, O_PROJ, PB_WO, PC_PT, K, Q, V
from checkpoints import FIXTURES, Draft, Tensor, draft, f32, write_safetensors
from encoded import encode, weight
from test_smoothing import smoothed

from qschema.checkpoint import open_checkpoint

Level: TypeAlias = Literal["rules", "weights", "dry", "compare", "none"]
# smoothed: by AWQ, in norms and beside o_proj and down_proj. biased: attention has biases
Base: TypeAlias = Literal["plain", "smoothed", "biased"]
Plant: TypeAlias = Callable[[Draft], None]
Spoil: TypeAlias = Callable[[Path], None]
Values: TypeAlias = npt.NDArray[Any]

EXPERTS = "model.layers.0.block_sparse_moe.experts"
QKV = (Q, K, V)
FIRST_DOWN = "model.layers.0.mlp.down_proj"
# what stands for a rule where the command stops before any: `can't read FILE`
EXIT = "exit status 2"
_ELEMENTS = {"F32": "<f4", "BF16": "<u2", "F16": "<u2", "I8": "i1"}


@dataclass(frozen=True)
class ValueFault:
    """One planted fault: `plant` works on the draft, `spoil` on the directory that it became."""

    plant: Plant | None
    spoil: Spoil | None
    level: Level
    rules: frozenset[str]
    where: str
    model: str
    algo: str
    base: Base

    @property
    def name(self) -> str:
        done = self.plant or self.spoil
        assert done is not None
        return done.__name__

    def write_source(self, path: Path) -> Path:
        """Return the directory of the source; `path` where it has to be made."""
        return biased_source(path) if self.base == "biased" else FIXTURES / self.model

    def write(self, path: Path) -> Path:
        """Write the checkpoint with its fault into the new directory `path`."""
        made = right(self.model, self.algo, self.base)
        if self.plant is not None:
            self.plant(made)
        made.write(path)
        if self.spoil is not None:
            self.spoil(path)
        return path


VALUE_FAULTS: list[ValueFault] = []


def values(
    level: Level,
    *rules: str,
    where: str = "",
    model: str = "llama",
    algo: str = PB_WO,
    base: Base = "plain",
) -> Callable[[Plant], Plant]:
    """Put the decorated function, which changes a draft, into the catalogue."""

    def declare(plant: Plant) -> Plant:
        VALUE_FAULTS.append(
            ValueFault(plant, None, level, frozenset(rules), where, model, algo, base)
        )
        return plant

    return declare


def right(model: str, algo: str, base: Base) -> Draft:
    """Return a draft of the right checkpoint, with the numbers of the fixture `model`."""
    return deepcopy(_right(model, algo, base))


@cache
def _right(model: str, algo: str, base: Base) -> Draft:
    if base == "smoothed":
        return smoothed(algo, in_linear=False)
    made = draft(model, algo, encode=encode)
    if base == "biased":
        made.config["attention_bias"] = True
        for name, tensor in biases().items():
            made.put(name, tensor, beside=f"{name.removesuffix('.bias')}.weight")
    return made


def biases() -> dict[str, Tensor]:
    """Return biases for the attention of llama."""
    modules = [f"model.layers.{at}.self_attn.{leaf}_proj" for at in (0, 1) for leaf in "qkvo"]
    sizes = [128 if module.endswith(("k_proj", "v_proj")) else 256 for module in modules]
    made: dict[str, Tensor] = {}
    for module, size in zip(modules, sizes, strict=True):
        made[f"{module}.bias"] = ("BF16", (size,), np.arange(size, dtype="<u2").tobytes())
    return made


def biased_source(path: Path) -> Path:
    """Write llama with `biases` into the new directory `path`; return `path`."""
    shutil.copytree(FIXTURES / "llama", path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    write_safetensors(path / "biases.safetensors", biases())
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(biases(), "biases.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def numbers(draft: Draft, name: str) -> Values:
    """Return the elements of a tensor; codes, E4M3 and bf16 as the integers of their bits."""
    dtype, shape, data = draft.tensor(name)
    return np.frombuffer(data, _ELEMENTS.get(dtype, "u1")).reshape(shape)


def edit(draft: Draft, name: str, change: Callable[[Values], Values]) -> None:
    """Replace the elements of a tensor; its dtype and shape stay."""
    dtype, shape, data = draft.tensor(name)
    made = np.ascontiguousarray(change(numbers(draft, name)).astype(_ELEMENTS.get(dtype, "u1")))
    assert made.nbytes == len(data)
    assert made.tobytes() != data
    draft.put(name, (dtype, shape, made.tobytes()))


def swap(draft: Draft, one: str, other: str) -> None:
    """Give two modules of the same shapes each other's tensors."""
    for tensors in list(draft.shards.values()):
        for name in [name for name in tensors if name.startswith(f"{one}.")]:
            twin = f"{other}.{name.removeprefix(f'{one}.')}"
            mine, theirs = draft.tensor(name), draft.tensor(twin)
            assert mine[:2] == theirs[:2]
            draft.put(name, theirs)
            draft.put(twin, mine)


@values("weights", "weight-error", where=f"{Q}.weight")
def scale_times_eight(draft: Draft) -> None:
    edit(draft, f"{Q}.weight_scale", lambda scale: scale * 8)


@values("weights", "weight-error", where=f"{Q}.weight", algo=PC_PT)
def scale_is_its_reciprocal(draft: Draft) -> None:
    edit(draft, f"{Q}.weight_scale", lambda scale: 1 / scale)


@values("weights", "weight-error", where=f"{Q}.weight")
def scale_of_one_block_halved(draft: Draft) -> None:
    edit(draft, f"{Q}.weight_scale", lambda scale: np.where(scale == scale.max(), scale / 2, scale))


@values("none", algo=PC_PT)
def scales_two_percent_too_large(draft: Draft) -> None:
    """Less than the rounding of E4M3 may be off."""
    edit(draft, f"{Q}.weight_scale", lambda scale: scale * 1.02)


@values("weights", "weight-error", where=f"{FIRST_DOWN}.weight", model="llama_odd")
def scales_of_the_neighbour_row_block(draft: Draft) -> None:
    edit(draft, f"{FIRST_DOWN}.weight_scale", lambda scale: scale[::-1])


@values("weights", "weight-error", where=f"{GATE}.weight", algo=PC_PT)
def scales_of_rows_reversed(draft: Draft) -> None:
    edit(draft, f"{GATE}.weight_scale", lambda scale: scale[::-1])


@values("weights", "weight-error", where=f"{GATE}.weight", algo="W8A16")
def scales_of_rows_rolled_by_one(draft: Draft) -> None:
    edit(draft, f"{GATE}.weight_scale", lambda scale: np.roll(scale, 1))


@values("weights", "weight-error", where=f"{GATE}.weight", algo="W4A16_AWQ")
def scales_of_groups_transposed(draft: Draft) -> None:
    edit(draft, f"{GATE}.weight_scale", lambda scale: scale.T.reshape(scale.shape))


@values("rules", "wrong-shape", where=f"{Q}.weight_scale", algo=PC_PT)
def scale_of_wrong_rank_at_equal_bytes(draft: Draft) -> None:
    dtype, shape, data = draft.tensor(f"{Q}.weight_scale")
    draft.put(f"{Q}.weight_scale", (dtype, (*shape, 1), data))


@values("weights", "weight-error", where=f"{Q}.weight", algo=PC_PT)
def channel_scale_along_the_wrong_axis(draft: Draft) -> None:
    """The weight is square, and its codes fit the scales if those are taken for the columns'."""
    w_NK = weight(open_checkpoint(FIXTURES / "llama").tensors[f"{Q}.weight"]).float()
    scale_K = w_NK.abs().amax(0) / 448
    codes_NK = (w_NK / scale_K).to(torch.float8_e4m3fn).view(torch.uint8)
    edit(draft, f"{Q}.weight", lambda _: codes_NK.numpy())
    edit(draft, f"{Q}.weight_scale", lambda _: scale_K.numpy())


@values("weights", "weight-error", where=f"{Q}.weight", algo="NVFP4")
def block_scales_swizzled_for_the_kernel(draft: Draft) -> None:
    """In the order of tiles of 128 rows and 4 scales that GPUs read, where rows are expected."""

    def swizzle(scale: Values) -> Values:
        rows, columns = scale.shape
        tiles = scale.reshape(rows // 128, 4, 32, columns // 4, 4).transpose(0, 3, 2, 1, 4)
        return tiles.reshape(rows, columns)

    edit(draft, f"{Q}.weight_scale", swizzle)


@values("weights", "weight-error", where=f"{Q}.weight", algo="MXFP8")
def exponents_off_by_one(draft: Draft) -> None:
    edit(draft, f"{Q}.weight_scale", lambda exponent: exponent + 1)


@values("weights", "weight-error", where=f"{Q}.weight", algo="MXFP4")
def exponents_without_their_bias(draft: Draft) -> None:
    edit(draft, f"{Q}.weight_scale", lambda exponent: exponent - 127)


@values("weights", "weight-error", where=f"{Q}.weight", algo="NVFP4")
def global_scale_is_its_reciprocal(draft: Draft) -> None:
    """Of all three siblings, as compressed-tensors' weight_global_scale is."""
    for module in QKV:
        edit(draft, f"{module}.weight_scale_2", lambda scale: 1 / scale)


@values("weights", "weight-error", where=f"{O_PROJ}.weight", algo="NVFP4")
def global_scale_by_448_alone(draft: Draft) -> None:
    edit(draft, f"{O_PROJ}.weight_scale_2", lambda scale: scale * 6)


@values("rules", "fused-scale-differs", where=f"{K}.weight_scale_2", algo="NVFP4")
def global_scales_of_siblings_differ(draft: Draft) -> None:
    edit(draft, f"{K}.weight_scale_2", lambda scale: scale * 1.25)


@values("weights", "weight-error", where=f"{Q}.weight", algo="NVFP4")
def block_scales_without_their_global_scale(draft: Draft) -> None:
    """1.0 everywhere, as if block scales were the whole truth."""
    for module in QKV:
        edit(draft, f"{module}.weight_scale_2", lambda scale: scale * 0 + 1)


@values("rules", "nonpositive-scale", where=f"{Q}.weight_scale")
def scale_with_its_sign_flipped(draft: Draft) -> None:
    edit(draft, f"{Q}.weight_scale", lambda scale: -scale)


@values("none", algo="FP8")
def input_scale_times_eight(draft: Draft) -> None:
    """E4M3 is as precise for small numbers as for large ones: the logits hardly move."""
    edit(draft, f"{O_PROJ}.input_scale", lambda scale: scale * 8)


@values("compare", algo="FP8")
def input_scale_that_clips(draft: Draft) -> None:
    edit(draft, f"{DOWN}.input_scale", lambda scale: scale * 1e-4)


@values("compare", algo="NVFP4")
def input_scales_that_clip(draft: Draft) -> None:
    """Of both down_proj: with one, four-bit inputs look worse than usual, but may."""
    for module in (FIRST_DOWN, DOWN):
        edit(draft, f"{module}.input_scale", lambda scale: scale * 1e-4)


@values("rules", "nonpositive-scale", where=f"{DOWN}.input_scale", algo="FP8")
def input_scale_of_zero(draft: Draft) -> None:
    edit(draft, f"{DOWN}.input_scale", lambda scale: scale * 0)


@values(
    "rules",
    "expert-input-scales-differ",
    where=f"{EXPERTS}.2.w2.input_scale",
    model="mixtral",
    algo="FP8",
)
def input_scale_of_one_expert_times_eight(draft: Draft) -> None:
    edit(draft, f"{EXPERTS}.2.w2.input_scale", lambda scale: scale * 8)


@values("compare", algo="FP8")
def scales_of_the_cache_that_clip(draft: Draft) -> None:
    draft.quantize_cache("FP8")
    for name in (f"{K}.k_scale", f"{V}.v_scale"):
        edit(draft, name, lambda scale: scale * 1e-4)


@values("none", algo="FP8")
def scales_of_the_cache_times_a_hundred(draft: Draft) -> None:
    """E4M3 is as precise for small numbers as for large ones: the logits hardly move."""
    draft.quantize_cache("FP8")
    for name in (f"{K}.k_scale", f"{V}.v_scale"):
        edit(draft, name, lambda scale: scale * 100)


@values("rules", "nonpositive-scale", where=f"{V}.v_scale", algo="FP8")
def scale_of_the_cache_below_zero(draft: Draft) -> None:
    draft.quantize_cache("FP8")
    draft.put(f"{V}.v_scale", ("F32", (), f32(-0.25)))


@values(
    "weights",
    "weight-error",
    where=f"{O_PROJ}.weight",
    algo="W4A16_AWQ",
    base="smoothed",
)
def smoothing_of_ones(draft: Draft) -> None:
    edit(draft, f"{O_PROJ}.pre_quant_scale", lambda scale: scale * 0 + 0x3F80)


@values("weights", "weight-error", where=f"{O_PROJ}.weight", algo="W4A16_AWQ", base="smoothed")
def smoothing_is_missing(draft: Draft) -> None:
    draft.pop(f"{O_PROJ}.pre_quant_scale")


@values("weights", "weight-error", where=f"{Q}.weight", algo="NVFP4_AWQ", base="smoothed")
def smoothing_is_not_folded(draft: Draft) -> None:
    """Weights are smoothed, the norm before them is still the source's."""
    plain = right("llama", "NVFP4_AWQ", "plain")
    name = "model.layers.0.input_layernorm.weight"
    draft.put(name, plain.tensor(name))
