"""Runs inside vLLM's interpreter: its model classes and its weight loader, without one weight.

The model is built on the `meta` device and fed with empty tensors that have the names, dtypes and
shapes of the checkpoint's headers. What is copied is noted (`dry_record.py`), not judged. No tensor
data is read, and no kernel runs.

The standard library, vLLM and what vLLM brings, and the helpers that are copied beside it. The job:

    checkpoint, tp         what to load, and for how many ranks; each is built in turn
    report                 file to write what was found to
    state                  file to report to, replaced as a whole after each stage
"""

# mypy: disable-error-code="import-not-found,import-untyped"
import contextlib
import faulthandler
import gc
import json
import os
import re
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvalidate.engines import dry_record as record
    from qvalidate.engines import runner_base as base
else:
    import dry_record as record
    import runner_base as base

# more entries of a kind are only counted
MOST = 20_000
# functions that choose a kernel or backend by what the machine has; all of them are replaced
SELECTOR = re.compile(r"(select|init|choose)_\w*(kernel|backend)")
HOMES = (
    "vllm.model_executor.kernels.linear",
    "vllm.model_executor.layers.fused_moe.oracle",
    "vllm.model_executor.layers.quantization",
)
CACHE_SCALES = {"q_scale", "k_scale", "v_scale", "prob_scale"}
# what models call the number of their layers for speculative decoding
SPECULATIVE = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
# stands for an attribute that is not there, where None means something
ABSENT = object()


class Nothing:
    """Stands for a kernel, a backend or a pair: nothing of them is used before a forward."""

    def __getattr__(self, name: str) -> "Nothing":
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()

    def __call__(self, *args: object, **kwargs: object) -> None:
        return None

    def __iter__(self) -> Iterator["Nothing"]:
        return iter((Nothing(), Nothing()))

    def __bool__(self) -> bool:
        return False


def replace_selectors() -> set[str]:
    """Replace what chooses kernels wherever vLLM has imported it; return the names."""
    found: set[str] = set()
    for module in list(sys.modules.values()):
        if not getattr(module, "__name__", "").startswith("vllm."):
            continue
        for name, value in list(vars(module).items()):
            home = getattr(value, "__module__", None) or ""
            if SELECTOR.fullmatch(name) and callable(value) and home.startswith(HOMES):
                setattr(module, name, lambda *args, **kwargs: Nothing())
                found.add(name)
    return found


def attention_of_any_cache(platform: Any) -> None:
    """Let a platform that can't serve a quantized KV cache choose attention as for a plain one."""
    choose = platform.get_attn_backend_cls

    def plain_cache(value: Any) -> Any:
        is_config = hasattr(value, "_replace") and hasattr(value, "kv_cache_dtype")
        return value._replace(kv_cache_dtype=None) if is_config else value

    def chosen(*args: Any, **kwargs: Any) -> Any:
        try:
            return choose(*args, **kwargs)
        except (ValueError, NotImplementedError):
            plain = {name: plain_cache(value) for name, value in kwargs.items()}
            return choose(*map(plain_cache, args), **plain)

    platform.get_attn_backend_cls = chosen


class Rank:
    """One rank: the model is built, fed, and what became of its parameters is kept as plain values.

    Raises whatever the engine raises.
    """

    def __init__(self, torch: Any, job: dict[str, Any], rank: int, feed: record.Feed) -> None:
        self.torch, self.job, self.rank, self.feed = torch, job, rank, feed
        self.selectors: set[str] = set()
        self.facts: dict[str, Any] = {}
        self.missing: list[dict[str, Any]] = []
        self.casts: set[tuple[str, str, str, str]] = set()
        self.num_irregular = 0
        self.num_parameters = 0
        self.num_elements = 0

    def load(self, configure: Callable[[], Any]) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import default_loader
        from vllm.model_executor.model_loader.utils import initialize_model

        config = configure()
        self.selectors = replace_selectors()
        dtype = self.torch.get_default_dtype()
        with set_current_vllm_config(config), groups(self.job["tp"], self.rank):
            self.torch.set_default_dtype(config.model_config.dtype)
            try:
                with self.torch.device("meta"):
                    model = initialize_model(vllm_config=config)
                # imported by the model's own modules only now
                self.selectors |= replace_selectors()
                loader = default_loader.DefaultModelLoader(config.load_config)
                default_loader.safetensors_weights_iterator = self.feed
                targets = {
                    record.key(p): record.Target(name, p) for name, p in model.named_parameters()
                }
                mode = record.recorder(self.torch, self.feed, targets)
                with mode:
                    loader.load_weights(model, config.model_config)
            finally:
                self.torch.set_default_dtype(dtype)
        self.judge(model, mode, targets)
        text = config.model_config.hf_text_config
        self.facts = {
            "cache_dtype": str(config.cache_config.cache_dtype),
            "is_tied": bool(getattr(text, "tie_word_embeddings", False)),
            "num_layers": getattr(text, "num_hidden_layers", None),
            "is_speculative": any(getattr(text, name, None) for name in SPECULATIVE),
            "quantization": config.model_config.quantization,
        }

    def judge(self, model: Any, mode: Any, targets: dict[int, record.Target]) -> None:
        modules = dict(model.named_modules())
        packed = getattr(model, "packed_modules_mapping", {})
        self.casts, self.num_irregular = mode.casts, mode.num_irregular
        for name, parameter in model.named_parameters():
            target = targets.get(record.key(parameter))
            if target is None:
                # the loader has put another tensor in its place
                self.num_irregular += 1
                continue
            if parameter.numel() == 0:
                continue
            self.num_parameters += 1
            self.num_elements += parameter.numel()
            count, boxes = record.gaps(target.sizes, frozenset(target.written))
            owner, _, leaf = name.rpartition(".")
            if count == 0 or is_optional(modules[owner], leaf):
                continue
            parts = [part for box in boxes for part in belonging(box, target, modules, packed)]
            self.missing.append(
                {
                    "parameter": name,
                    "missing": count,
                    "of": parameter.numel(),
                    "parts": list(dict.fromkeys(parts)),
                }
            )


def is_optional(module: Any, leaf: str) -> bool:
    """Whether the engine does without this parameter: it has a default, or is dropped unread.

    The scales of the KV cache are 1 where a checkpoint has none. A weight-only layer registers an
    input scale only so that an old checkpoint's has a place to go.
    """
    if leaf in CACHE_SCALES or leaf == "input_scale_ub":
        return True
    method = getattr(module, "quant_method", None)
    spec = getattr(method, "spec", None)
    is_weight_only = getattr(method, "use_a16", False) is True or (
        spec is not None and getattr(spec, "activation", ABSENT) is None
    )
    return leaf.endswith("input_scale") and is_weight_only


def belonging(
    box: record.Box, target: record.Target, modules: dict[str, Any], packed: dict[str, list[str]]
) -> list[str]:
    """Return the tensors of the checkpoint that belong into `box` of a parameter, by their names.

    Where the model does not say what a fused layer is made of, that is the parameter's own name.
    """
    owner, _, leaf = target.name.rpartition(".")
    module, sizes = modules[owner], target.sizes
    stem, _, suffix = leaf.partition("_")
    if stem in ("w13", "w2") and sizes and hasattr(module, "local_num_experts"):
        return in_experts(box, target, module, stem, suffix)
    above, _, last = owner.rpartition(".")
    widths = getattr(module, "output_partition_sizes", None) or []
    names = packed.get(last, [])
    if len(names) < 2 or len(names) != len(widths) or not box:
        return [target.name]
    # weights, block scales and one scale per part all have their parts along the first dimension
    if sizes[0] == len(widths):
        widths = [1] * len(widths)
    (start, stop), total, at, found = box[0], sum(widths), 0, []
    for name, width in zip(names, widths, strict=True):
        if start * total < (at + width) * sizes[0] and stop * total > at * sizes[0]:
            found.append(f"{above}.{name}.{leaf}")
        at += width
    return found


def in_experts(
    box: record.Box, target: record.Target, module: Any, stem: str, suffix: str
) -> list[str]:
    gate, up, down = (
        getattr(module, f"ckpt_{kind}_proj_name", None) or f"{kind}_proj"
        for kind in ("gate", "up", "down")
    )
    owner = target.name.rpartition(".")[0].removesuffix(".routed_experts")
    sizes = target.sizes
    # a dimension of one expert is none
    if module.local_num_experts == 1:
        box, sizes = ((0, 1), *box), (1, *sizes)
    leaves = [down]
    if stem == "w13":
        start, stop = box[1] if len(box) > 1 else (0, 2)
        half = (sizes[1] if len(sizes) > 1 else 2) / 2
        leaves = [name for name, is_in in ((gate, start < half), (up, stop > half)) if is_in]
    return [f"{owner}.{expert}.{leaf}.{suffix}" for expert in range(*box[0]) for leaf in leaves]


@contextlib.contextmanager
def groups(tp: int, rank: int) -> Iterator[None]:
    """Set up vLLM's process groups as rank `rank` of `tp` has them, with one process in each."""
    from vllm.distributed import parallel_state

    store = Path(f"rank{rank}.store").absolute()
    parallel_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
    parallel_state.initialize_model_parallel(1, 1)
    for name in ("_TP", "_EP"):
        group = getattr(parallel_state, name, None)
        if group is not None:
            group.world_size, group.rank_in_group = tp, rank
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


def in_hand(error: BaseException, feeds: list[record.Feed]) -> dict[str, str]:
    """Return the tensor that was being loaded, and its shape and the parameter's."""
    source = feeds[0].current if feeds else None
    if source is None:
        return {}
    into = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for name in ("param_data", "param", "expert_data"):
            shape = getattr(frame.f_locals.get(name), "shape", None)
            into = into if shape is None else f" into {list(shape)}"
    rank = f" on rank {feeds[0].rank}" if feeds[0].rank else ""
    return {"tensor": source.name, "shapes": f"{list(source.tensor.shape)}{into}{rank}"}


def report(job: dict[str, Any], feed: record.Feed, ranks: list[Rank], seconds: list[float]) -> None:
    unread, partly = [], []
    for source in feed.sources.values():
        if not source.tensor.numel():
            continue
        if not source.read:
            unread.append(source.name)
            continue
        left, _ = record.gaps(source.sizes, source.read)
        if left:
            partly.append({"tensor": source.name, "unread": left, "of": source.tensor.numel()})
    missing: dict[str, dict[str, Any]] = {}
    for rank in ranks:
        for entry in rank.missing:
            first = missing.setdefault(entry["parameter"], {**entry, "ranks": []})
            first["ranks"].append(rank.rank)
    casts = sorted(set().union(*(rank.casts for rank in ranks)))
    selectors = set().union(*(rank.selectors for rank in ranks))
    base.write_whole(
        Path(job["report"]),
        {
            "ranks_checked": len(ranks),
            "seconds": seconds,
            "num_tensors": len(feed.sources),
            "num_parameters": ranks[0].num_parameters if ranks else 0,
            "num_elements": ranks[0].num_elements if ranks else 0,
            "num_irregular": sum(rank.num_irregular for rank in ranks),
            "missing": list(missing.values())[:MOST],
            "unread": unread[:MOST],
            "partly": partly[:MOST],
            "casts": casts[:MOST],
            "num_left_out": sum(
                max(0, len(found) - MOST) for found in (missing, unread, partly, casts)
            ),
            "selectors": sorted(selectors),
            "peak_rss_nbytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            **(ranks[0].facts if ranks else {}),
        },
    )


def run(job: dict[str, Any], state: base.State, feeds: list[record.Feed]) -> None:
    import vllm

    # a folder called vllm on the path also imports
    if not hasattr(vllm, "LLM"):
        raise ImportError("the module vllm found here is not the engine")
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    version, kind = vllm.__version__, current_platform.device_type
    state.update(reached="import", version=version, torch=torch.__version__, device=kind)
    attention_of_any_cache(current_platform)

    def configure() -> Any:
        return EngineArgs(
            model=job["checkpoint"],
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=128,
            tensor_parallel_size=job["tp"],
        ).create_engine_config()

    feed = record.Feed(torch)
    feeds.append(feed)
    ranks: list[Rank] = []
    seconds: list[float] = []
    for number in range(job["tp"]):
        started = time.monotonic()
        rank = Rank(torch, job, number, feed)
        feed.rank = number
        rank.load(configure)
        ranks.append(rank)
        seconds.append(round(time.monotonic() - started, 2))
        gc.collect()
    report(job, feed, ranks, seconds)
    state.update(reached="load")


def main() -> None:
    faulthandler.enable()
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=base.die_with_parent, daemon=True).start()
    state = base.State(job["state"])
    feeds: list[record.Feed] = []
    try:
        run(job, state, feeds)
    # SystemExit too: an engine that leaves by itself has failed
    except BaseException as error:
        traceback.print_exc()
        state.update(error={**base.describe(error), **in_hand(error, feeds)})
    # past the destructors: some engines hang or crash there, after all is said
    os._exit(1 if "error" in state.values else 0)


if __name__ == "__main__":
    main()
