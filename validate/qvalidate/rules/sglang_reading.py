"""What SGLang makes of a checkpoint's config, and of each layer by it. No weights, no findings.

Source: SGLang 0.5.23 configs/model_config.py:1727-1897, model_loader/weight_utils.py:269-438,
layers/quantization/modelopt_quant.py:308-346, :466-522, :846-1118, :1595-1745; 0.5.17
configs/model_config.py:1145-1279, model_loader/weight_utils.py:238-371, modelopt_quant.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from qschema.architectures import keep_reason
from qschema.strict import Json
from qvalidate.context import LM_HEAD, Context
from qvalidate.documents import MIXED as MIXED_PRECISION
from qvalidate.documents import QuantConfig
from qvalidate.rules import sglang_support as support
from qvalidate.rules.sglang_matching import (
    Layer,
    Match,
    MixedAlgosError,
    listed_algo,
    match,
    match_plainly,
)
from qvalidate.rules.sglang_support import NEW, Version

_METHOD = "modelopt"
_KV_KEYS = ("kv_cache_quant_algo", "kv_cache_scheme")
_ROUTER = "router of a mixture of experts"


@dataclass(frozen=True)
class Reading:
    """What a version takes the checkpoint for: `method`, or nothing quantized, or a refusal.

    `algo` is that of every layer, "" where `listed` gives each its own. `is_known` is False where
    quant_method names a method that is not ModelOpt's, of which nothing is said here. `is_stored`
    is False where the method takes the weights for unquantized ones.
    """

    method: str | None = None
    algo: str = ""
    refusal: str = ""
    where: str = "quant_algo"
    exclude: tuple[str, ...] = ()
    listed: Mapping[str, str] | None = None
    is_known: bool = True
    is_stored: bool = True


@dataclass(frozen=True)
class Built:
    """A layer as SGLang builds it: with `algo`, without any (and `why`), or not at all."""

    algo: str | None
    why: str = ""
    refusal: str = ""


def read(context: Context, version: Version) -> Reading:
    """Return what `version` makes of the config that it obeys."""
    config = context.obeyed
    if config is None:
        return Reading()
    method = method_of(config.algo, config.layers, version)
    if config is not context.in_config:
        if method == support.MXFP8:
            return Reading(method=method, is_stored=False)
        return Reading() if method is None else _configured(context, config, method, version)
    is_named = "quant_method" in config.raw
    if is_named and config.raw["quant_method"] != _METHOD:
        return Reading(is_known=False)
    if config.is_nested and not version.is_unwrapped:
        # without a quant_method beside it, the object names no method at all
        method = support.FP8 if is_named and "FP8" in (config.algo or "") else None
    if method is None:
        refusal = version.fp8_refusal if is_named else "Unknown quantization method: "
        return Reading(refusal=f"{refusal} (quant_algo {config.algo!r})")
    return _configured(context, config, method, version)


def built(layer: Layer, reading: Reading, context: Context) -> Built:
    """Return how SGLang builds `layer` under `reading`; the newest version's rules for lists."""
    if reading.method is None:
        return Built(None, "SGLang finds no quantization in the config and loads a plain model")
    if not reading.is_stored:
        return Built(
            None, "SGLang does not read hf_quant_config.json for MXFP8, and quantizes anew"
        )
    reason = keep_reason(layer.parts[0], config=context.checkpoint.config)
    is_head = layer.leaf == LM_HEAD
    if reason in ("embedding", _ROUTER):
        return Built(None, f"SGLang never quantizes it ({reason})")
    if is_head and (
        context.model_type in support.PLAIN_HEADS
        or reading.method in (support.MXFP8, support.W4AFP8)
    ):
        return Built(None, "SGLang never quantizes this model's lm_head")
    found = _listed_as(layer, reading)
    if found.state == "refused":
        return Built(None, refusal=found.why)
    if found.state == "excluded":
        return Built(None, f"SGLang leaves its {layer.leaf} unquantized: {found.why}")
    if reading.listed is None:
        return Built(reading.algo)
    return _mixed(layer, reading.listed, context)


def has_mapping(context: Context) -> bool:
    """Return whether the model's class in SGLang declares its fused names."""
    return context.model_type not in support.WITHOUT_MAPPING


def method_of(algo: str | None, layers: Mapping[str, str], version: Version) -> str | None:
    """Return the method of `algo`, as ModelConfig._parse_modelopt_quant_config finds it.

    `layers` is what a mixed config lists, module -> algorithm. None stands for no ModelOpt method.
    """
    if not algo:
        return None
    if algo == MIXED_PRECISION:
        has_nvfp4 = any(own.upper() in ("NVFP4", "W4A16_NVFP4") for own in layers.values())
        return support.MIXED if has_nvfp4 else support.W4AFP8
    if "FP4" in algo:
        return support.FP4
    if algo == "MXFP8" and version.has_mxfp8:
        return support.MXFP8
    is_fp8 = "FP8" in algo if version.is_substring else algo == "FP8"
    return support.FP8 if is_fp8 else None


def _configured(context: Context, config: QuantConfig, method: str, version: Version) -> Reading:
    algo = config.algo or ""
    if method == support.FP8 and algo != "FP8":
        message = f"{algo} is taken for static FP8, and its weight_scale fits no single number"
        return Reading(refusal=f"AssertionError in layers/parameter.py: {message}")
    if method == support.FP4:
        if algo not in version.fp4:
            return Reading(refusal=f"{version.fp4_refusal} (quant_algo {algo!r})")
        if problem := _group_size(config):
            return Reading(refusal=problem, where="group_size")
        if config.exclude_key in config.body and config.body[config.exclude_key] is None:
            refusal = "NVFP4 quantization requires group_size and exclude_modules: the list is null"
            return Reading(refusal=refusal, where=config.exclude_key)
    if method == support.MIXED:
        return _mixed_reading(context, config)
    if method == support.W4AFP8:
        return Reading(method=method, algo="W4AFP8")
    return Reading(method=method, algo=algo, exclude=_exclude(context, config, method, version))


def _mixed_reading(context: Context, config: QuantConfig) -> Reading:
    source = config
    is_complete = "quantized_layers" in config.raw and any(key in config.raw for key in _KV_KEYS)
    if config is context.in_config and not is_complete:
        if context.in_file is None:
            message = "Cannot find the config file for modelopt_mixed"
            lacking = "quantized_layers or a kv_cache key"
            return Reading(refusal=f"{message}: config.json lacks {lacking}, and there is no other")
        source = context.in_file
    return Reading(method=support.MIXED, exclude=source.exclude, listed=source.layers)


def _exclude(
    context: Context, config: QuantConfig, method: str, version: Version
) -> tuple[str, ...]:
    """Return the list of exclusions under the key that the method looks for."""
    if config.is_nested:
        # unwrapped inside config.json, NVFP4's list stays behind; so does FP8's, which is
        # the business of a rule of its own
        is_lost = method == support.FP4 and config is context.in_config
        return () if is_lost else config.exclude
    keys = {support.FP8: ("ignore",), support.FP4: version.fp4_lists}
    return _strings(config.raw, keys.get(method, ("exclude_modules", "ignore")))


def _strings(body: Mapping[str, Json], keys: tuple[str, ...]) -> tuple[str, ...]:
    found = next((body[key] for key in keys if key in body), None)
    return tuple(text for text in found if isinstance(text, str)) if isinstance(found, list) else ()


def _group_size(config: QuantConfig) -> str:
    """Return why NVFP4's group_size is refused, "" if it is not."""
    found = config.body.get("group_size")
    if found is None and config.is_nested:
        return "the nested form needs group_size; SGLang says \"Cannot find 'quant_algo'\""
    if found is not None and found != 16:
        return f"group_size is {found!r}; SGLang makes its scales by it, and NVFP4's are of 16"
    return ""


def _listed_as(layer: Layer, reading: Reading) -> Match:
    if reading.method == support.MXFP8:
        return match_plainly(layer.name, reading.exclude)
    return match(layer.name, reading.exclude, is_experts=layer.is_experts)


def _mixed(layer: Layer, listed: Mapping[str, str], context: Context) -> Built:
    is_mapped = has_mapping(context)
    try:
        algo = listed_algo(layer.name, listed, is_mapped=is_mapped)
    except MixedAlgosError as error:
        return Built(None, refusal=str(error))
    if algo in NEW.in_mixed:
        return Built(algo)
    if algo is not None:
        return Built(None, f"SGLang has no method for {algo} in a mixed checkpoint")
    if not is_mapped and len(layer.parts) > 1 and not layer.is_experts:
        why = f"SGLang's {context.model_type} does not map its {layer.leaf} to the parts of it"
        return Built(None, f"{why}, so that quantized_layers does not name it")
    return Built(None, f"quantized_layers does not name SGLang's {layer.leaf}")
