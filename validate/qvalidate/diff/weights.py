"""The weights of both sides as numbers, each decoded by its own declaration, streamed by rows.

What is equal in bytes and stored in one way is not decoded. The rest is compared slice by slice, so
that memory does not grow with a weight; of a stack of experts one expert is held at a time. Norms,
biases and scales of inputs that changed are numbers like any other. Needs numpy where anything
has to be decoded.

A pre_quant_scale is multiplied back into its weight. Smoothing that the layer before took in is
not undone: it can't be told from a change.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from qschema.dtypes import HIGH_PRECISION
from qschema.formats import Format
from qschema.formats.declare import Role
from qschema.safetensors import Stored
from qvalidate.context import Context, Module
from qvalidate.diff.matrices import Encoded, Errors, Matrix, Plain, add_errors
from qvalidate.diff.names import kind_of, layer_of, natural
from qvalidate.diff.result import ErrorSum, NotCompared, WeightDiff, WeightError
from qvalidate.diff.tensors import TensorPair
from qvalidate.layout import expected, sizes
from qvalidate.sources import stacked_pairs

# what makes up the numbers of a weight
_WEIGHT_ROLES: tuple[Role, ...] = ("codes", "scale", "global", "smoothing")


@dataclass(frozen=True)
class _Coded:
    """A quantized weight whose tensors are as its format declares them, as far as it takes."""

    module: Module
    outputs: Mapping[str, Stored]


@dataclass(frozen=True)
class _Side:
    """One checkpoint: its coded weights by the name of their codes.

    `owners` are the tensors that make up such a weight, each with the name of the codes; `broken`
    says why a quantized weight can't be decoded.
    """

    tensors: Mapping[str, Stored]
    coded: Mapping[str, _Coded]
    owners: Mapping[str, str]
    broken: Mapping[str, str]

    def owner(self, stored: Stored) -> str | None:
        """Return the name of the codes that `stored` belongs to, None without any."""
        is_whole = self.tensors.get(stored.name) is stored
        return self.owners.get(stored.name) if is_whole else None


@dataclass
class _Found:
    errors: list[tuple[WeightError, Errors]] = field(default_factory=list)
    not_compared: list[NotCompared] = field(default_factory=list)
    decoded: set[str] = field(default_factory=set)
    num_equal: int = 0


def weight_diff(
    a: Context, b: Context, pairs: Iterable[TensorPair]
) -> tuple[WeightDiff, frozenset[str]]:
    """Return how far the weights are apart, and the names of the pairs that this speaks for.

    Raises ModuleNotFoundError for numpy, or torch where no C compiler was at hand, if something
    has to be decoded; OSError for a shard that can't be read.
    """
    ordered = sorted(pairs, key=lambda pair: (pair.b.file, pair.b.offset))
    sides = _side(a), _side(b)
    found, spoken = _Found(), (set[str](), set[str]())
    by_name = {pair.b.name: pair for pair in ordered}
    rest = []
    for pair in ordered:
        owners = [side.owner(stored) for side, stored in zip(sides, (pair.a, pair.b), strict=True)]
        if pair.a.name == owners[0] or pair.b.name == owners[1]:
            if _add_coded(found, sides, pair, by_name):
                spoken[0].add(pair.a.name)
                spoken[1].add(pair.b.name)
        else:
            rest.append((pair, owners))
    for pair, owners in rest:
        if owners[0] in spoken[0] or owners[1] in spoken[1]:
            found.decoded.add(pair.name)
        else:
            _add_plain(found, sides, pair)
    return _document(found), frozenset(found.decoded)


def smoothing_note(a: Context, b: Context, pairs: Iterable[TensorPair]) -> Iterator[str]:
    """Yield a note if norms changed where a format lets them take in smoothing."""
    has_folded = any(
        spec.suffix not in module.tensors
        for side in (a, b)
        for module, declared in side.encoded
        for spec in declared.specs("smoothing")
    )
    if has_folded and any(_is_changed_norm(pair) for pair in pairs):
        yield "norms differ: smoothing that they took in counts as a difference of the weights"


def _is_changed_norm(pair: TensorPair) -> bool:
    return "norm" in pair.name and len(pair.b.shape) == 1 and not pair.has_equal_bytes


def _side(context: Context) -> _Side:
    coded: dict[str, _Coded] = {}
    owners: dict[str, str] = {}
    broken: dict[str, str] = {}
    for module in context.quantized.values():
        name, declared = module.weight_name, module.declared
        owners[name] = name
        outputs = _outputs(module, declared) if declared else "its format is not declared"
        if isinstance(outputs, str):
            broken[name] = outputs
        elif declared is not None:
            coded[name] = _Coded(module, outputs)
            owners |= {
                outputs[spec.suffix].name: name
                for spec in declared.specs(*_WEIGHT_ROLES)
                if spec.suffix in outputs and spec.scales_codes
            }
    return _Side(context.checkpoint.tensors, coded, owners, broken)


def _outputs(module: Module, declared: Format) -> Mapping[str, Stored] | str:
    """Return the tensors that make up the weight by suffix, or what is wrong with them.

    More or fewer dimensions of one element do not matter: the numbers lie in the same order.
    """
    shapes = expected(module, declared)
    if shapes is None:
        return f"{module.weight_name} has no size that {declared.name} can have"
    found: dict[str, Stored] = {}
    for spec in declared.specs(*_WEIGHT_ROLES):
        stored, (dtype, shape) = module.tensors.get(spec.suffix), shapes[spec.suffix]
        if stored is None and not (spec.required and spec.scales_codes):
            continue
        if stored is None:
            return f"it has no {spec.suffix}"
        if stored.dtype != dtype or not _is_shape(stored.shape, shape, module):
            wanted = f"{declared.name} has {dtype} {list(shape)}"
            return f"its {spec.suffix} is {_words(stored)}, {wanted}"
        found[spec.suffix] = stored
    return found


def _is_shape(found: tuple[int, ...], wanted: tuple[int, ...], module: Module) -> bool:
    if found == wanted or module.is_stack:
        return found == wanted
    return [size for size in found if size != 1] == [size for size in wanted if size != 1]


def _add_coded(
    found: _Found,
    sides: tuple[_Side, _Side],
    pair: TensorPair,
    by_name: Mapping[str, TensorPair],
) -> bool:
    """Compare a weight that is quantized on one side or both; False if that can't be done."""
    here, there = (
        side.coded.get(stored.name) if side.owner(stored) else None
        for side, stored in zip(sides, (pair.a, pair.b), strict=True)
    )
    if here and there and _is_stored_alike(here, there, by_name):
        found.num_equal += 1
        found.decoded.add(pair.name)
        return True
    reason = _broken(sides[0], pair.a, "A") or _broken(sides[1], pair.b, "B")
    if reason is None:
        is_stack = any(coded is not None and coded.module.is_stack for coded in (here, there))
        shapes = _shape(here, pair.a, is_stack), _shape(there, pair.b, is_stack)
        if shapes[0] != shapes[1]:
            reason = f"is {list(shapes[0])} in A, {list(shapes[1])} in B"
    if here is None and there is None and pair.has_equal_bytes:
        found.num_equal += 1
        return False
    if reason is not None:
        found.not_compared.append(NotCompared(name=_module_name(pair.name), reason=reason))
        return False
    errors = Errors()
    matrices = zip(
        _matrices(here, pair.a, is_stack), _matrices(there, pair.b, is_stack), strict=True
    )
    for one, other in matrices:
        add_errors(errors, one, other)
    _keep(found, pair, errors, (_label(here, pair.a), _label(there, pair.b)))
    return True


def _add_plain(found: _Found, sides: tuple[_Side, _Side], pair: TensorPair) -> None:
    """Compare a tensor that is quantized on neither side, or no part of a weight."""
    is_weight = _is_weight(pair)
    if pair.has_equal_bytes:
        found.num_equal += is_weight
        return
    dtypes = {pair.a.dtype, pair.b.dtype}
    if not dtypes <= HIGH_PRECISION or pair.a.shape != pair.b.shape:
        if is_weight:
            message = f"is {_words(pair.a)} in A, {_words(pair.b)} in B"
            found.not_compared.append(NotCompared(name=_module_name(pair.name), reason=message))
        return
    errors = Errors()
    add_errors(errors, Plain(pair.a), Plain(pair.b))
    _keep(found, pair, errors, (pair.a.dtype, pair.b.dtype))


def _keep(found: _Found, pair: TensorPair, errors: Errors, labels: tuple[str, str]) -> None:
    found.decoded.add(pair.name)
    is_weight = _is_weight(pair)
    if errors.error == 0 and errors.num_nonfinite == 0:
        found.num_equal += is_weight
        return
    error = WeightError(
        name=_module_name(pair.name) if is_weight else pair.name,
        what="weight" if is_weight else "tensor",
        a=labels[0],
        b=labels[1],
        relative_error=errors.relative,
        max_abs=errors.max_abs,
        num_nonfinite=errors.num_nonfinite,
    )
    found.errors.append((error, errors))


def _is_stored_alike(here: _Coded, there: _Coded, by_name: Mapping[str, TensorPair]) -> bool:
    """Whether the same bytes stand for both weights. Reads them."""
    ours, theirs = here.module.declared, there.module.declared
    if ours is None or theirs is None or ours.codec != theirs.codec:
        return False
    suffixes = {spec.suffix for spec in ours.specs(*_WEIGHT_ROLES) if spec.scales_codes}
    suffixes |= {spec.suffix for spec in theirs.specs(*_WEIGHT_ROLES) if spec.scales_codes}
    for suffix in suffixes:
        one, other = here.outputs.get(suffix), there.outputs.get(suffix)
        if one is None and other is None:
            continue
        pair = by_name.get(other.name) if other is not None else None
        if one is None or pair is None or pair.a is not one or not pair.has_equal_bytes:
            return False
    return True


def _matrices(coded: _Coded | None, stored: Stored, is_stack: bool) -> Iterator[Matrix]:
    """Yield the weight, or the weights of all experts of a stack."""
    if coded is None:
        if is_stack:
            yield from (Plain(held) for held, _ in stacked_pairs(stored, {}))
        else:
            yield Plain(stored)
        return
    declared, size = coded.module.declared, _shape(coded, stored, is_stack)[-2:]
    assert declared is not None
    if not is_stack:
        yield Encoded(declared, coded.outputs, (size[0], size[1]))
        return
    others = {suffix: part for suffix, part in coded.outputs.items() if part is not stored}
    for codes, parts in stacked_pairs(stored, others):
        yield Encoded(declared, {**parts, "weight": codes}, (size[0], size[1]))


def _shape(coded: _Coded | None, stored: Stored, is_stack: bool) -> tuple[int, ...]:
    """Return the shape of the Linear, with the experts before it in a stack."""
    if coded is not None and coded.module.declared is not None:
        experts = stored.shape[:1] if coded.module.is_stack else ()
        return (*experts, *(sizes(coded.module, coded.module.declared) or ()))
    return (*stored.shape[:-2], *reversed(stored.shape[-2:])) if is_stack else stored.shape


def _broken(side: _Side, stored: Stored, label: str) -> str | None:
    """Return why the tensor can't be decoded on its side, None if it can."""
    reason = side.broken.get(stored.name) if side.owner(stored) else None
    if reason is not None:
        return f"{reason}, in {label}"
    is_coded = side.owner(stored) == stored.name
    if not is_coded and stored.dtype not in HIGH_PRECISION:
        return f"is {_words(stored)} in {label}"
    return None


def _label(coded: _Coded | None, stored: Stored) -> str:
    declared = coded.module.declared if coded else None
    return declared.name if declared else stored.dtype


def _is_weight(pair: TensorPair) -> bool:
    is_stack = ".experts." in pair.name and len(pair.b.shape) == 3
    return pair.name.endswith(".weight") or (is_stack and "_scale" not in pair.name)


def _module_name(name: str) -> str:
    return name.removesuffix(".weight")


def _words(stored: Stored) -> str:
    return f"{stored.dtype} {list(stored.shape)}"


def _document(found: _Found) -> WeightDiff:
    errors = sorted(found.errors, key=lambda item: (_rank(item[0]), natural(item[0].name)))
    weights = [(error, sums) for error, sums in errors if error.what == "weight"]
    totals = _sums(("", error, sums) for error, sums in weights)
    return WeightDiff(
        differing=[error for error, _ in errors],
        num_equal=found.num_equal,
        not_compared=sorted(found.not_compared, key=lambda item: natural(item.name)),
        total=totals[0] if totals else None,
        kinds=_sums((kind_of(error.name), error, sums) for error, sums in weights),
        layers=_sums((layer_of(error.name), error, sums) for error, sums in weights),
    )


def _rank(error: WeightError) -> float:
    if error.num_nonfinite or error.relative_error is None:
        return -math.inf
    return -error.relative_error


def _sums(items: Iterable[tuple[str, WeightError, Errors]]) -> list[ErrorSum]:
    """Return the sums by name. The items come with the worst first."""
    worst: dict[str, WeightError] = {}
    counts = Counter[str]()
    totals: dict[str, Errors] = {}
    for name, error, sums in items:
        worst.setdefault(name, error)
        counts[name] += 1
        totals.setdefault(name, Errors()).add(sums)
    return [
        ErrorSum(
            name=name,
            count=counts[name],
            relative_error=totals[name].relative,
            worst=worst[name].name,
            worst_error=worst[name].relative_error,
            max_abs=totals[name].max_abs,
        )
        for name in sorted(totals, key=natural)
    ]
