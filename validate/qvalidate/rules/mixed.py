"""The list of quantized layers of a mixed checkpoint names what is quantized, and how."""

from collections.abc import Iterator

from qschema.formats import formats
from qvalidate.assignment import declared_as
from qvalidate.context import Context
from qvalidate.documents import QuantConfig
from qvalidate.rules.registry import Spot, rule, some

_KEY = "quantized_layers"


@rule(
    "unlisted-but-quantized",
    severity="error",
    summary="a module is stored quantized, but quantized_layers does not name it",
    text="""In a mixed checkpoint what the list does not name is unquantized. The engine builds a
    plain layer and meets codes and scales: most models of vLLM stop at the scale's name, some
    ignore it and read the codes as weights without a scale.""",
    effects={"vllm": "refuses"},
    evidence=(
        "vLLM 0.33.0 modelopt.py:1748-1825; vLLM 0.32.0, _resolve_quant_algo",
        "run with vLLM 0.32.0 on CPU: 'no module or parameter named o_proj.weight_scale'",
    ),
)
def unlisted_but_quantized(context: Context) -> Iterator[Spot]:
    if not context.assignment.is_mixed:
        return
    for module in context.quantized.values():
        if context.assignment.key(module.name) is None:
            dtype = module.tensors["weight"].dtype
            message = f"stored as {dtype}, but {_KEY} does not name it"
            yield Spot(module.file, module.weight_name, message)


@rule(
    "listed-but-unquantized",
    severity="error",
    summary="quantized_layers names a module that is not stored quantized",
    text="""The engine builds a quantized layer for each name in the list. vLLM casts a 16-bit
    weight to the codes' dtype by value and multiplies with a scale that was never loaded, without
    a message.""",
    effects={"vllm": "wrong"},
    evidence=(
        "vLLM 0.33.0 modelopt.py:1748-1825; vLLM 0.32.0, _resolve_quant_algo",
        "run with vLLM 0.32.0 on CPU: a bf16 down_proj in the list loads",
    ),
)
def listed_but_unquantized(context: Context) -> Iterator[Spot]:
    for module, weight in context.unquantized.items():
        key = context.assignment.key(module)
        if key is not None:
            message = f"{weight.dtype} {list(weight.shape)}, but {_KEY} has {key!r}"
            yield Spot(str(weight.file), weight.name, message)


@rule(
    "listed-but-missing",
    severity="warning",
    summary="quantized_layers names what the checkpoint does not have",
    text="""A name that no module has changes nothing, or stands for one that was meant and is
    spelt otherwise. A name that ends in `.experts` stands for all experts below it.""",
)
def listed_but_missing(context: Context) -> Iterator[Spot]:
    obeyed = context.obeyed
    names = [*context.quantized, *context.unquantized]
    used = {context.assignment.key(name) for name in names}
    for key in context.assignment.layers:
        if obeyed is not None and key not in used and key not in context.modules:
            yield Spot(obeyed.file, f"{obeyed.where(_KEY)}.{key}", "no module has this name")


@rule(
    "unknown-layer-algo",
    severity="error",
    summary="quantized_layers gives a module a format that is not declared here",
    text="""The module's tensors are checked against the declaration of its format. Without one
    nothing can be said about them, and silence would look like approval.""",
    effects={"vllm": "unknown"},
)
def unknown_layer_algo(context: Context) -> Iterator[Spot]:
    obeyed = context.obeyed
    unknown = [name for name, found in context.assignment.layers.items() if found is None]
    if obeyed is not None and unknown:
        message = f"{len(unknown)} entries name no declared format: {some(unknown)}; "
        message += f"declared: {', '.join(formats())}"
        yield Spot(obeyed.file, f"{obeyed.where(_KEY)}.{unknown[0]}", message)


@rule(
    "config-layers-disagree",
    severity="error",
    summary="config.json and hf_quant_config.json give modules different formats",
    text="""quantized_layers stands in both files and is the same list. Where they differ, one of
    the engines that read them builds the wrong layers.""",
    evidence=("ModelOpt 0.47.0 export/convert_hf_config.py:188-282 writes one from the other",),
)
def config_layers_disagree(context: Context) -> Iterator[Spot]:
    config, file = context.in_config, context.in_file
    # a config.json without the list defers to the other file
    if not config or not file or not config.layers or config.layers == file.layers:
        return
    names = sorted(config.layers.keys() | file.layers.keys())
    differing = [name for name in names if _differs(config, file, name)]
    if differing:
        message = f"{len(differing)} entries are not those of config.json: {some(differing)}"
        yield Spot(file.file, file.where(_KEY), message)


def _differs(config: QuantConfig, file: QuantConfig, name: str) -> bool:
    return config.layers.get(name, "").upper() != file.layers.get(name, "").upper()


@rule(
    "group-size-disagrees",
    severity="error",
    summary="a config's group_size, or another field, is not that of the format it names",
    text="""The group size is part of the format: NVFP4 has 16 columns to a scale, AWQ 128. A config
    that says otherwise describes another file. vLLM makes its parameters by the number in the
    config and then computes with 16.""",
    effects={"vllm": "refuses"},
    evidence=("vLLM 0.33.0 modelopt.py:1691-1703",),
)
def group_size_disagrees(context: Context) -> Iterator[Spot]:
    for config in (context.in_config, context.in_file):
        for where, algo, entry in config.entries if config else ():
            declared = declared_as(algo)
            for key, value in declared.hf_quant_fields.items() if declared else ():
                if key in entry and entry[key] != value and config is not None:
                    message = f"says {entry[key]!r}, {algo} has {value!r}"
                    yield Spot(config.file, f"{where}.{key}", message)
