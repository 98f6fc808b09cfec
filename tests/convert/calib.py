"""Reads a golden of fixtures/oracle/; writes what its calibration recorded as our own document.

`calib.json` lists ModelOpt's quantizers as calibration left them, before the export unified what
fused siblings share; arrays are in `calib.safetensors`. The document (`qschema.amax`) is

    {"document": "qconvert-amax", "version": 1,
     "inputs": {module: largest |input|},
     "kv_cache": {attention module: {"k": largest |key|, "v": largest |value|}},
     "vectors": "amax.safetensors"}

with modules named as in the checkpoint. `vectors` is absent where there are none; it holds

    MODULE.pre_quant_scale    F32 [K]  what ModelOpt multiplies the module's input with, unrounded
    ATTENTION.k_bias, .v_bias BF16 [1, kv heads, 1, head_dim]  what it subtracts from keys, values
"""

import fnmatch
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ORACLE = Path(__file__).parents[2] / "fixtures" / "oracle"
VECTORS = "amax.safetensors"
# ModelOpt holds Mixtral's experts as transformers 5 does: gate and up stacked, one quantizer each
MIXTRAL_EXPERTS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
# the linears that read one tensor
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def load(golden: Path) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    """Return the recorded quantizers and the recorded arrays, by ModelOpt's names."""
    quantizers = json.loads((golden / "calib.json").read_text())["quantizers"]
    path = golden / "calib.safetensors"
    return quantizers, load_file(path) if path.exists() else {}


def hub_names(module: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the checkpoint's modules behind one input quantizer of ModelOpt."""
    parent, _, projection = module.rpartition(".experts.")
    if config["model_type"] == "mixtral" and projection in MIXTRAL_EXPERTS:
        experts = f"{parent.removesuffix('.mlp')}.block_sparse_moe.experts"
        for expert in range(config["num_local_experts"]):
            for name in MIXTRAL_EXPERTS[projection]:
                yield f"{experts}.{expert}.{name}"
    else:
        # a Linear, or a stack of experts that is one tensor of the checkpoint (Llama 4)
        yield module


def inputs(golden: Path) -> dict[str, float]:
    """Return module -> largest |input|, a bf16 value, where ModelOpt quantizes the input.

    It is each module's own number, before fused siblings take the largest of theirs. With AWQ or
    SmoothQuant it is that of the smoothed input, bf16(max over channels c of fl32(bf16 amax of c *
    unrounded pre_quant_scale of c)), or what awq_full measured anew after smoothing. The export
    makes input_scale from it as it stands: averaging pre_quant_scale over siblings changes nothing.
    """
    config = json.loads((golden / "config.json").read_text())
    found: dict[str, float] = {}
    for name, entry in load(golden)[0].items():
        # "X.input_quantizer._amax" of a Linear, "X_input_quantizer._amax" of stacked experts
        module = name.removesuffix("input_quantizer._amax")
        if module != name and entry["enabled"]:
            for hub_name in hub_names(module[:-1], config):
                found[hub_name] = float.fromhex(entry["hex"])
    return found


def kv_cache(golden: Path) -> dict[str, dict[str, float]]:
    """Return attention module -> largest |key| after RoPE and |value|, less the bias if affine."""
    found: dict[str, dict[str, float]] = {}
    for name, entry in load(golden)[0].items():
        for side in ("k", "v"):
            attention = name.removesuffix(f".{side}_bmm_quantizer._amax")
            if attention != name:
                found.setdefault(attention, {})[side] = float.fromhex(entry["hex"])
    return found


def vectors(golden: Path) -> dict[str, torch.Tensor]:
    """Return the arrays of the document.

    Raises: ValueError for SVDQuant, whose pre_quant_scale was recorded only after rounding.
    """
    _, arrays = load(golden)
    found: dict[str, torch.Tensor] = {}
    for name, array in arrays.items():
        module, _, field = name.partition(".awq_lite.")
        if field == "best_scale":
            found[f"{module}.pre_quant_scale"] = 1.0 / array
        elif name.endswith("._bias_value"):
            found[name.replace("_bmm_quantizer._bias_value", "_bias")] = array
        elif name.endswith("._pre_quant_scale"):
            module = name.removesuffix(".input_quantizer._pre_quant_scale")
            if f"{module}.awq_lite.best_scale" not in arrays:
                found[f"{module}.pre_quant_scale"] = smoothquant(arrays, module)
    return dict(sorted(found.items()))


def smoothquant(arrays: Mapping[str, torch.Tensor], module: str) -> torch.Tensor:
    """Return [K] F32, clamp(1 / largest |input| of the channel, 1e-4, 1e4): alpha is 1."""
    amax = arrays[f"{module}.input_quantizer._amax_for_smoothing"]
    if amax.dtype != torch.float32:
        raise ValueError(f"{module}: pre_quant_scale was recorded only after rounding to bf16")
    return (1.0 / amax.flatten()).clamp(1e-4, 1e4)


def write(golden: Path, out_dir: Path) -> Path:
    """Return the path of the document of one golden, written into `out_dir` with its arrays."""
    document: dict[str, object] = {
        "document": "qconvert-amax",
        "version": 1,
        "inputs": inputs(golden),
        "kv_cache": kv_cache(golden),
    }
    arrays = vectors(golden)
    if arrays:
        document["vectors"] = VECTORS
        save_file(arrays, out_dir / VECTORS)
    path = out_dir / "amax.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def in_memory_name(name: str) -> str:
    """Return ModelOpt's name of a Mixtral tensor where it gives up renaming (fp8_pb_wo)."""
    for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name.replace(".block_sparse_moe.", ".mlp.")


def is_inside(module: str, name: str) -> bool:
    """Return whether a module is the named one or lies below it."""
    return module == name or module.startswith(f"{name}.")


def module_of(name: str) -> str:
    """Return the module of a weight; stacked experts are their own."""
    return name.removesuffix(".weight")


class Golden:
    """One export: its source, its documents and what calibration recorded."""

    def __init__(self, name: str) -> None:
        self.path = ORACLE / name
        model, _, self.cfg = name.partition("-")
        self.sources = load_file(ORACLE / "bf16" / model / "model.safetensors")
        self.config = json.loads((self.path / "config.json").read_text())
        found = json.loads((self.path / "hf_quant_config.json").read_text())
        self.quantization: dict[str, Any] = found["quantization"]
        self.expected = json.loads((self.path / "tensors.json").read_text())
        self.quantizers, self.arrays = load(self.path)
        self.inputs = inputs(self.path)
        self.vectors = vectors(self.path)

    def algo(self, module: str) -> str | None:
        """Return the format of a module, None where it is not quantized."""
        if "quantized_layers" in self.quantization:
            layers = self.quantization["quantized_layers"]
            found = [layers[name]["quant_algo"] for name in layers if is_inside(module, name)]
            return found[0] if found else None
        if any(fnmatch.fnmatchcase(module, name) for name in self.quantization["exclude_modules"]):
            return None
        # as ModelOpt names Mixtral's router where it gives up renaming
        return None if module.endswith("_moe.gate") else self.quantization["quant_algo"]

    @functools.cached_property
    def linears(self) -> dict[str, str]:
        """Return tensor name -> format of every weight that is quantized."""
        found = {}
        for name, tensor in self.sources.items():
            algo = self.algo(name.removesuffix(".weight")) if tensor.dim() > 1 else None
            if algo is not None:
                found[name] = algo
        return found

    def group(self, name: str) -> list[str]:
        """Return the weights that read the same input as this one, itself too."""
        for siblings in SIBLINGS:
            for sibling in siblings:
                if name.endswith(f".{sibling}.weight"):
                    stem = name.removesuffix(f"{sibling}.weight")
                    return [f"{stem}{other}.weight" for other in siblings]
        return [name]
