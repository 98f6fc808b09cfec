"""From a context to all repairs of the checkpoint. Nothing is written."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

from qschema.checkpoint import Checkpoint
from qschema.safetensors import Entry, Stored
from qschema.strict import Json
from qvalidate.assignment import Assignment, assign
from qvalidate.context import KV_SCALES, Context, Module
from qvalidate.documents import HF_QUANT_CONFIG, QuantConfig
from qvalidate.fix.document import Document, opened
from qvalidate.fix.documents import METHOD, PRODUCER, Facts, correct, made
from qvalidate.fix.exclusions import corrected, reaching
from qvalidate.fix.hub_names import hub_named
from qvalidate.fix.index import index_repairs, stray_repairs
from qvalidate.fix.recognise import Decision, decide
from qvalidate.fix.repair import Left, Repair, Repairs
from qvalidate.fix.tensors import headers_of, mended, repairs_of, with_cache_scales

CONFIG = "config.json"
_ROOT = "$.quantization_config"


def plan_repairs(context: Context) -> Repairs:
    """Return what can be repaired of the checkpoint, and what it is afterwards.

    Documents of another dialect than ModelOpt's stay as they are. So does a checkpoint without a
    quantized module, but for its index, its stray files and the scales of its cache.
    """
    left: list[Left] = []
    notes: list[str] = []
    documents: list[Document] = []
    method = (context.obeyed.method if context.obeyed else None) or METHOD
    is_ours = method.lower().startswith(METHOD)
    named, origin = hub_named(context) if is_ours else (context, {})
    if context.quantized and is_ours:
        documents = _documents(context, named, left)
    elif context.quantized:
        notes.append(f"documents of the dialect {method!r} are left as they are")
    configs = _configs(context, documents)
    assignment = assign(configs[CONFIG] or configs[HF_QUANT_CONFIG], configs[HF_QUANT_CONFIG])
    modules = {name: _mended(module, assignment) for name, module in named.modules.items()}
    headers = headers_of(context.checkpoint, modules.values(), origin)
    checkpoint = _renamed(context.checkpoint, headers)
    index, of_index = index_repairs(context.checkpoint, checkpoint)
    of_strays = stray_repairs(context.checkpoint)
    left_out = tuple(repair.file for repair in of_strays)
    written = _written(context, documents)
    if index is not None and checkpoint.index is not None:
        written[checkpoint.index] = index
    of_documents = [repair for document in documents for repair in document.repairs]
    return Repairs(
        context=context,
        repaired=replace(
            context,
            checkpoint=_as_written(checkpoint, written, left_out),
            in_config=configs[CONFIG],
            in_file=configs[HF_QUANT_CONFIG],
            assignment=assignment,
            modules=_placed(modules, checkpoint, assignment),
        ),
        repairs=(*of_index, *of_strays, *_of_tensors(context, headers), *of_documents),
        left=tuple(left),
        documents=written,
        headers=headers,
        left_out=left_out,
        notes=tuple(notes),
    )


def _documents(context: Context, named: Context, left: list[Left]) -> list[Document]:
    """Return both documents as they are to be; those that can't be made are `left`.

    `named` is `context` with the names that the tensors will have.
    """
    decision = decide(named)
    facts = _facts(named, decision, left)
    old = frozenset(context.assignment.layers.keys() - named.assignment.layers.keys())
    facts = replace(facts, unused=facts.unused | old)
    found = []
    for file, config in ((CONFIG, context.in_config), (HF_QUANT_CONFIG, context.in_file)):
        if config is not None:
            document = opened(config, file=file)
            found.append(correct(document, facts, is_in_config=file == CONFIG))
        elif facts.algo is not None:
            nested = file != CONFIG
            root = "$" if nested else _ROOT
            reason = f"{'TensorRT-LLM looks' if nested else 'vLLM and Transformers look'} there"
            found.append(made(facts, file=file, root=root, nested=nested, reason=reason))
        elif context.obeyed is not None:
            reason = decision.undecided
            left.append(Left(rule="config-incomplete", file=file, where="", reason=reason))
    return found


def _facts(context: Context, decision: Decision, left: list[Left]) -> Facts:
    configs = [config for config in (context.in_config, context.in_file) if config is not None]
    if decision.undecided:
        differ = len({(config.algo or "").upper() for config in configs}) > 1
        rule = "config-algo-disagrees" if differ else "unknown-algo"
        where = context.obeyed.where("quant_algo") if context.obeyed else _ROOT
        rule = rule if context.obeyed else "no-quantization-config"
        left.append(Left(rule=rule, file=CONFIG, where=where, reason=decision.undecided))
    patterns = [pattern for config in configs for pattern in config.exclude]
    exclude = corrected(context, patterns, decision.assignment)
    for pattern in sorted(reaching(context, exclude)):
        where = context.obeyed.where(context.obeyed.exclude_key) if context.obeyed else _ROOT
        reason = f"{pattern!r} is not quantized, but vLLM finds the name in that of a quantized one"
        rule = "vllm-exclusion-overreach"
        left.append(Left(rule=rule, file=CONFIG, where=where, reason=reason))
    unused = _unused(context)
    return Facts(
        whole=decision.whole,
        is_mixed=decision.is_mixed,
        layers=decision.layers,
        unused=unused,
        untold={
            name: entry
            for name, entry in _entries(configs).items()
            if name not in decision.layers and name not in unused
        },
        exclude=tuple(exclude),
        kv_algo=_kv_algo(context, configs, left),
        producer=_producer(configs),
    )


def _entries(configs: Sequence[QuantConfig]) -> dict[str, Json]:
    """Return quantized_layers of all documents, as the first one has each entry."""
    found: dict[str, Json] = {}
    for config in reversed(configs):
        layers = config.body.get("quantized_layers")
        found |= layers if isinstance(layers, dict) else {}
    return found


def _unused(context: Context) -> frozenset[str]:
    """Return the entries of quantized_layers that stand for no quantized module."""
    used = {context.assignment.key(name) for name in context.quantized}
    plain = {context.assignment.key(name) for name in context.unquantized}
    return frozenset(
        name
        for name in context.assignment.layers
        if name not in used and (name in plain or name not in context.modules)
    )


def _kv_algo(context: Context, configs: Sequence[QuantConfig], left: list[Left]) -> str | None:
    """Return how the cache is quantized, None also where the documents leave that open."""
    algos = [config.kv_algo for config in configs]
    named = [algo for algo in algos if algo is not None]
    has_scales = any(KV_SCALES & module.tensors.keys() for module in context.modules.values())
    if len(named) == len(algos) or (named and has_scales):
        return next(iter(named), None)
    if named:
        reason = "no scale of the cache is stored, so nothing tells which of the two is right"
        where = "$.quantization.kv_cache_quant_algo"
        left.append(
            Left(rule="config-kv-disagrees", file=HF_QUANT_CONFIG, where=where, reason=reason)
        )
    return None


def _producer(configs: Sequence[QuantConfig]) -> Mapping[str, Json]:
    """Return the producer that one of the documents names, else the layout's."""
    for config in configs:
        found = config.raw.get("producer")
        if isinstance(found, dict) and isinstance(found.get("name"), str):
            return found
    return PRODUCER


def _configs(context: Context, documents: Sequence[Document]) -> dict[str, QuantConfig | None]:
    """Return both configs as they will be, by their files."""
    found = {CONFIG: context.in_config, HF_QUANT_CONFIG: context.in_file}
    for document in documents:
        found[document.file] = replace(document.config, file=str(context.path / document.file))
    return found


def _mended(module: Module, assignment: Assignment) -> Module:
    declared = assignment.format_of(module.name)
    if declared is not None and module.is_quantized:
        module = mended(module, declared, is_mixed=assignment.is_mixed)
    return with_cache_scales(module)


def _of_tensors(context: Context, headers: Mapping[str, Mapping[str, Entry]]) -> list[Repair]:
    """Return the repairs of all tensors that have another header."""
    return [
        repair
        for shard in headers.values()
        for name, entry in shard.items()
        for repair in repairs_of(context.checkpoint.tensors[name], entry)
    ]


def _renamed(checkpoint: Checkpoint, headers: Mapping[str, Mapping[str, Entry]]) -> Checkpoint:
    """Return `checkpoint` with what `headers` change; its tensors lie where they did."""
    changes = {name: entry for shard in headers.values() for name, entry in shard.items()}
    tensors: dict[str, Stored] = {}
    for name, stored in checkpoint.tensors.items():
        entry = changes.get(name)
        if entry is not None:
            stored = replace(stored, name=entry.name, dtype=entry.dtype, shape=entry.shape)
        tensors[stored.name] = stored
    return replace(checkpoint, tensors=tensors)


def _placed(
    modules: Mapping[str, Module], checkpoint: Checkpoint, assignment: Assignment
) -> dict[str, Module]:
    """Return `modules` with the tensors of `checkpoint` and the formats of `assignment`."""
    return {
        name: replace(
            module,
            declared=assignment.format_of(name),
            tensors={
                suffix: checkpoint.tensors[module.tensor_name(suffix)] for suffix in module.tensors
            },
        )
        for name, module in modules.items()
    }


def _written(context: Context, documents: Sequence[Document]) -> dict[str, Json]:
    """Return the JSON files to write, by name."""
    found: dict[str, Json] = {}
    for document in documents:
        if not document.repairs:
            continue
        if document.file != CONFIG:
            found[document.file] = document.raw
            continue
        config = deepcopy(dict(context.checkpoint.config))
        owner = config
        if document.root != _ROOT:
            text = config["text_config"]
            assert isinstance(text, dict)
            owner = text
        owner["quantization_config"] = document.raw
        found[CONFIG] = config
    return found


def _as_written(
    checkpoint: Checkpoint, written: Mapping[str, Json], left_out: Sequence[str]
) -> Checkpoint:
    """Return `checkpoint` with the files that are written, and without those left out."""
    config, metadata = checkpoint.config, checkpoint.index_metadata
    for name, document in written.items():
        assert isinstance(document, dict)
        if name == CONFIG:
            config = document
        elif name == checkpoint.index and isinstance(document["metadata"], dict):
            metadata = document["metadata"]
    others = {name: 0 for name in written if name != checkpoint.index}
    return replace(
        checkpoint,
        config=config,
        index_metadata=metadata,
        unindexed_tensors=(),
        stray_shards=tuple(name for name in checkpoint.stray_shards if name not in left_out),
        files={**checkpoint.files, **others},
    )
