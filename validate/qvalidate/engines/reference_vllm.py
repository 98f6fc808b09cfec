"""Runs inside vLLM's interpreter: plain arithmetic where vLLM's CPU build has no kernel.

vLLM keeps its own config detection, modules, weight loading and post-processing. Replaced is what
comes after them: where no kernel of its own can take a layer, the stored codes and scales are
decoded, mostly once and for good, and multiplied with torch: a quantized model then takes the
memory of its source. Nothing here may touch a layer that vLLM can do by itself.

Activations are rounded as the format prescribes: FP8 by its static scale, FP8_PB_WO per token and
128 columns (by vLLM's own QuantFP8), NVFP4 to E2M1 in blocks of 16. W4A16_NVFP4 and MXFP8 leave
them alone, as vLLM's Marlin kernels do on Hopper. There NVFP4 runs weight-only too; here it does
not, as on Blackwell.

The standard library, torch, vLLM (Python 3.10+) and the module of formulas that is copied beside
this one. Everything of vLLM is looked up by name in `install`, and a name that is gone is an error.
"""

# mypy: disable-error-code="import-not-found,import-untyped"
import os
from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from qvalidate.engines import reference_vllm_math as arithmetic
else:
    import reference_vllm_math as arithmetic

_LINEAR = "vllm.model_executor.kernels.linear"
_LAYERS = "vllm.model_executor.layers"
_MODELOPT = f"{_LAYERS}.quantization.modelopt"
_MOE = f"{_LAYERS}.fused_moe"

# in order of their first use
_used: dict[str, None] = {}


class ReferenceKernelError(RuntimeError):
    """This vLLM, or this layer, is not what the reference kernels were written for."""


def install() -> None:
    """Give vLLM on a CPU a kernel for every ModelOpt format; call it once, before `vllm.LLM`.

    Raises ReferenceKernelError on another platform, for an engine in a process of its own (it
    would not have the kernels), and for a vLLM that lacks a name which this module replaces.
    """
    platform = _find("vllm.platforms", "current_platform")
    if not platform.is_cpu():
        raise ReferenceKernelError("reference kernels are for vLLM on a CPU; this one has a device")
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
        raise ReferenceKernelError("reference kernels need VLLM_ENABLE_V1_MULTIPROCESSING=0")
    cpu = _find("vllm.platforms", "PlatformEnum").CPU
    _install_fp8_quantization()
    _install_linear(cpu)
    _install_experts()


def used() -> list[str]:
    """Return what was replaced and really used so far, in order of its first use.

    Kernels of layers count from loading on, `fp8-silu-and-mul` from the first forward pass on.
    """
    return list(_used)


def _find(module: str, name: str) -> Any:
    """Return `name` of vLLM's `module`. Raises ReferenceKernelError if either is not there."""
    try:
        return attrgetter(name)(import_module(module))
    except (ImportError, AttributeError) as error:
        raise _unknown(f"{module}.{name}") from error


def _unknown(what: str) -> ReferenceKernelError:
    import vllm

    return ReferenceKernelError(f"reference kernels do not know vLLM {vllm.__version__}: no {what}")


def _replace(module: str, name: str, new: Any) -> None:
    """Put `new` in the place of what vLLM's `module` calls `name`, which must be there."""
    _find(module, name)
    setattr(import_module(module), name, new)


def _has_operator(name: str) -> bool:
    """Return whether vLLM's build can run its operator here; it declares more than it has."""
    declared = hasattr(torch.ops._C, name)
    return declared and torch._C._dispatch_has_kernel_for_dispatch_key(f"_C::{name}", "CPU")


def _in_dtype(decoded: torch.Tensor) -> torch.Tensor:
    """Return a weight in the dtype of the model, which is the default while vLLM loads it."""
    return decoded.to(torch.get_default_dtype())


# FP8 quantization: vLLM's custom operators that its CPU build lacks


def _install_fp8_quantization() -> None:
    quant = _find("vllm._custom_ops", "scaled_fp8_quant")
    _replace("vllm._custom_ops", "scaled_fp8_quant", _scaled_fp8_quant(quant))
    fused = f"{_LAYERS}.fusion.fused_act_quant"
    key = _find(f"{_LAYERS}.quantization.utils.quant_utils", "kFp8StaticTensorSym")
    row = (_find(f"{_LAYERS}.activation", "SiluAndMul"), key)
    producers = _find(fused, "_FUSED_ACT_QUANT")
    if row not in producers:
        raise _unknown(f"{fused}._FUSED_ACT_QUANT row for SiluAndMul with FP8")
    producers[row] = _silu_and_mul(producers[row])


def _scaled_fp8_quant(native: Any) -> Any:
    """Return `native`, but for one scale that is given: with it vLLM merges fused FP8 weights."""

    def scaled_fp8_quant(
        input: torch.Tensor, scale: torch.Tensor | None = None, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        has_native = _has_operator("static_scaled_fp8_quant")
        if has_native or scale is None or scale.numel() != 1 or args or options:
            result: tuple[torch.Tensor, torch.Tensor] = native(input, scale, *args, **options)
            return result
        _used["fp8-quant"] = None
        return arithmetic.fp8_codes(input, scale), scale

    return scaled_fp8_quant


def _silu_and_mul(native: Any) -> Any:
    """Return `native`, else the plain activation, which the next layer then quantizes itself."""

    def silu_and_mul(values: torch.Tensor, linear: Any) -> Any:
        if _has_operator("silu_and_mul_quant"):
            return native(values, linear)
        _used["fp8-silu-and-mul"] = None
        return arithmetic.activated(values, "silu", is_gated=True)

    return silu_and_mul


# dense layers


class _Linear:
    """A layer whose weight is decoded once, after loading; then it takes what the source takes."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return True, None

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        decoded = _in_dtype(self.decoded(layer))
        layer.weight = torch.nn.Parameter(decoded, requires_grad=False)

    def decoded(self, layer: Any) -> torch.Tensor:
        """Return the weight (N, K) as float32."""
        raise NotImplementedError


class _Fp8BlockLinear(_Linear):
    """FP8_PB_WO: vLLM's base class rounds the input and adds the bias."""

    def decoded(self, layer: Any) -> torch.Tensor:
        _used["fp8-block-linear"] = None
        return arithmetic.dequantized_blocks(layer.weight, layer.weight_scale, 128)

    def apply_block_scaled_mm(
        self, A: torch.Tensor, B: torch.Tensor, As: torch.Tensor, Bs: torch.Tensor
    ) -> torch.Tensor:
        values = A.float() * As.repeat_interleave(128, dim=-1)[..., : A.shape[-1]]
        return functional.linear(values.to(B.dtype), B)


class _Nvfp4Linear(_Linear):
    """NVFP4 and, where no input scale was loaded, W4A16_NVFP4."""

    def decoded(self, layer: Any) -> torch.Tensor:
        is_a16 = not hasattr(layer, "input_global_scale_inv")
        _used["w4a16-nvfp4-linear" if is_a16 else "nvfp4-linear"] = None
        return arithmetic.dequantized_nvfp4(
            layer.weight, layer.weight_scale, layer.weight_global_scale
        )

    def apply_weights(
        self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        inverse_scale = getattr(layer, "input_global_scale_inv", None)
        values = x if inverse_scale is None else arithmetic.rounded_nvfp4(x, inverse_scale)
        return functional.linear(values.to(x.dtype), layer.weight, bias)


class _Mxfp8Linear(_Linear):
    """MXFP8, weights only."""

    def decoded(self, layer: Any) -> torch.Tensor:
        _used["mxfp8-linear"] = None
        return arithmetic.dequantized_mxfp8(layer.weight, layer.weight_scale)

    def apply_weights(
        self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return functional.linear(x, layer.weight, bias)


def _install_linear(cpu: Any) -> None:
    """Put a kernel behind vLLM's own in each of its tables; it takes the first that can."""
    for table, base, kernel in (
        ("_POSSIBLE_FP8_BLOCK_KERNELS", "Fp8BlockScaledMMLinearKernel", _Fp8BlockLinear),
        ("_POSSIBLE_NVFP4_KERNELS", "NvFp4LinearKernel", _Nvfp4Linear),
        ("_POSSIBLE_MXFP8_KERNELS", "Mxfp8LinearKernel", _Mxfp8Linear),
    ):
        made = type(f"Reference{base}", (kernel, _find(_LINEAR, base)), {})
        kernels = _find(_LINEAR, table)
        kernels[cpu] = [*kernels.get(cpu, []), made]
    config = _find(_LINEAR, "NvFp4LinearLayerConfig")
    nvfp4 = _find(_LINEAR, "_POSSIBLE_NVFP4_KERNELS")[cpu][-1]
    native = _find(_LINEAR, "init_nvfp4_linear_kernel")

    def init_nvfp4(use_a16: bool = False) -> Any:
        # for W4A16 vLLM insists on Marlin and never looks into its table
        return nvfp4(config()) if use_a16 else native()

    for module in (_LINEAR, _MODELOPT):
        _replace(module, "init_nvfp4_linear_kernel", init_nvfp4)


# experts


class _Experts:
    """One expert after the other, its tokens at once; a subclass decodes and rounds.

    The base class is vLLM's FusedMoEExpertsModular, which holds the scales as w1_scale, a1_scale.
    """

    name: str
    # else vLLM would quantize, with an operator that it lacks
    expects_unquantized_inputs = True

    def __init__(self, moe_config: Any, quant_config: Any, **options: Any) -> None:
        super().__init__(moe_config, quant_config, **options)  # type: ignore[call-arg]
        activation = moe_config.activation.value.removesuffix("_no_mul")
        is_known = activation in arithmetic.ACTIVATIONS and not moe_config.has_bias
        if not is_known or getattr(moe_config, "swiglu_limit", None) is not None:
            raise ReferenceKernelError(
                "reference kernels know experts without bias and limit, with the activations "
                f"{', '.join(arithmetic.ACTIVATIONS)}; these have {activation}"
            )
        _used[self.name] = None

    def apply(
        self,
        *,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        **unused: Any,
    ) -> None:
        local = topk_ids if expert_map is None else expert_map[topk_ids.long()]
        function = activation.value.removesuffix("_no_mul")
        total = torch.zeros(output.shape, dtype=torch.float32)
        for expert in range(w1.shape[0]):
            tokens, choices = torch.where(local == expert)
            if not len(tokens):
                continue
            inner = self.product(hidden_states[tokens], w1, 1, expert)
            inner = arithmetic.activated(inner, function, is_gated=activation.is_gated)
            outer = self.product(inner, w2, 2, expert).float()
            if not apply_router_weight_on_input:
                outer *= topk_weights[tokens, choices, None]
            total.index_add_(0, tokens, outer)
        output.copy_(total)

    def product(
        self, values: torch.Tensor, stored: torch.Tensor, which: int, expert: int
    ) -> torch.Tensor:
        """Return the first or second product of an expert."""
        weight_NK = self.weight(stored[expert], which, expert)
        values_MK = self.rounded(values, which)
        return functional.linear(values_MK.to(values.dtype), weight_NK.to(values.dtype))

    def rounded(self, values: torch.Tensor, which: int) -> torch.Tensor:
        """Return the input of the first or second product as the format stores it."""
        return values

    def weight(self, stored: torch.Tensor, which: int, expert: int) -> torch.Tensor:
        """Return the weight (N, K) of an expert's first or second product."""
        return stored

    def workspace_shapes(self, M: int, N: int, K: int, *unused: Any) -> Any:
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> Any:
        return _find(f"{_MOE}.topk_weight_and_reduce", "TopKWeightAndReduceNoOP")()

    @staticmethod
    def activation_format() -> Any:
        return _find(f"{_MOE}.modular_kernel", "FusedMoEActivationFormat.Standard")


class _Fp8Experts(_Experts):
    name = "fp8-experts"

    def rounded(self, values: torch.Tensor, which: int) -> torch.Tensor:
        return arithmetic.rounded_fp8(values, getattr(self, f"a{which}_scale"))

    def weight(self, stored: torch.Tensor, which: int, expert: int) -> torch.Tensor:
        scale: torch.Tensor = getattr(self, f"w{which}_scale")[expert]
        return stored.float() * scale


class _W4a16Nvfp4Experts(_Experts):
    name = "w4a16-nvfp4-experts"

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        layer.w13_weight = self.decoded(layer.w13_weight, self.w1_scale, self.g1_alphas)
        layer.w2_weight = self.decoded(layer.w2_weight, self.w2_scale, self.g2_alphas)

    def decoded(self, *stored: torch.Tensor) -> torch.nn.Parameter:
        # one at a time: the float32 of all experts is large
        experts = zip(*stored, strict=True)
        weights = [_in_dtype(arithmetic.dequantized_nvfp4(*expert)) for expert in experts]
        return torch.nn.Parameter(torch.stack(weights), requires_grad=False)


class _Nvfp4Experts(_W4a16Nvfp4Experts):
    name = "nvfp4-experts"

    def rounded(self, values: torch.Tensor, which: int) -> torch.Tensor:
        # vLLM's emulation takes one scale for all experts of a layer
        return arithmetic.rounded_nvfp4(values, getattr(self, f"a{which}_gscale"))


class _Mxfp8Experts(_Experts):
    """vLLM's emulation has decoded the weights while loading, unless told not to."""

    name = "mxfp8-experts"

    def weight(self, stored: torch.Tensor, which: int, expert: int) -> torch.Tensor:
        if stored.element_size() > 1:
            return stored
        return arithmetic.dequantized_mxfp8(stored, getattr(self, f"w{which}_scale")[expert])


def _select(native: Any, backend: Any, kernels: Callable[..., Any]) -> Any:
    """Return `native`, ending at `kernels` where vLLM has none that was written for a CPU."""

    def select(config: Any, *args: Any, **options: Any) -> tuple[Any, Any]:
        try:
            chosen, kernel = native(config, *args, **options)
        except (NotImplementedError, ValueError):
            chosen, kernel = None, None
        # its emulations need Triton, which has no CPU
        if kernel is not None and kernel.__module__.endswith(".cpu_moe"):
            return chosen, kernel
        return backend, kernels(**options)

    return select


def _install_experts() -> None:
    """Let vLLM's choice of a backend for experts end here instead of with an error.

    The backend is named EMULATION, for which vLLM leaves the weights in the layout they came in.
    """
    base = _find(f"{_MOE}.modular_kernel", "FusedMoEExpertsModular")
    # whether it supports a device, an activation, ...: what it does not, __init__ refuses
    questions = [name for name in base.__abstractmethods__ if name.startswith("_supports")]
    answers = {name: staticmethod(lambda *unused: True) for name in questions}
    fp8, nvfp4, a16_nvfp4, mxfp8 = (
        type(f"Reference{kernel.__name__}", (kernel, base), answers)
        for kernel in (_Fp8Experts, _Nvfp4Experts, _W4a16Nvfp4Experts, _Mxfp8Experts)
    )
    fp8_backend = _find(f"{_MOE}.oracle.fp8", "Fp8MoeBackend.EMULATION")
    nvfp4_backend = _find(f"{_MOE}.oracle.nvfp4", "NvFp4MoeBackend.EMULATION")

    def for_nvfp4(activation_key: Any, **unused: Any) -> Any:
        return a16_nvfp4 if activation_key is None else nvfp4

    for name, backend, kernels in (
        ("select_fp8_moe_backend", fp8_backend, lambda **unused: fp8),
        ("select_mxfp8_moe_backend", fp8_backend, lambda **unused: mxfp8),
        ("select_nvfp4_moe_backend", nvfp4_backend, for_nvfp4),
    ):
        _replace(_MODELOPT, name, _select(_find(_MODELOPT, name), backend, kernels))
