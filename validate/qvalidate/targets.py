"""Which engines and versions a checkpoint is meant for, and on how many GPUs of which kind.

Values that are parsed from the command line. Nothing here starts an engine or looks for one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

# ranks, of which a dry load builds every one
MOST_GPUS = 1024
# the versions whose reading of a checkpoint was studied (docs/rules.md cites them), oldest first
KNOWN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "vllm": ("0.32.0", "0.33.0"),
        "sglang": ("0.5.17", "0.5.23"),
        "tensorrt-llm": ("1.2.1", "1.3.0rc27"),
    }
)

_TARGET = re.compile(r"\s*(?P<engine>[A-Za-z][A-Za-z-]*)\s*(?P<versions>.*?)\s*", re.S)
_GPU = re.compile(r"sm_?(\d{2,3})", re.IGNORECASE)


class TargetError(ValueError):
    """What names no engine, no known version of it, or no GPU; the text is for the user."""


@dataclass(frozen=True)
class Target:
    """An engine in one or more of its known versions. `text` is what the user wrote."""

    engine: str
    versions: tuple[str, ...]
    text: str

    def meets(self, specifier: str | None) -> bool:
        """Return whether any of the versions is in `specifier`; None is all versions."""
        return specifier is None or any(
            SpecifierSet(specifier).contains(version, prereleases=True) for version in self.versions
        )

    def wants(self, version: str) -> bool:
        """Return whether an engine of `version` is one that the user meant.

        What PEP 440 knows no order of (a build from source) may be any.
        """
        try:
            found = Version(version)
        except InvalidVersion:
            return True
        return SpecifierSet(self.text.removeprefix(self.engine)).contains(found, prereleases=True)

    def only(self, version: str) -> "Target | None":
        """Return the target of that known version alone, None if it is none of `versions`.

        `0.33.0+cpu` is 0.33.0.
        """
        known = version.partition("+")[0]
        return replace(self, versions=(known,)) if known in self.versions else None


@dataclass(frozen=True)
class Deployment:
    """How the weights are divided. `gpu` is a compute capability times ten, None if not said.

    tp: every layer over so many GPUs; ep: experts over so many; pp: layers over so many. With
    `on_cpu` there is no GPU, so that rules about their kernels say nothing.
    """

    tp: int = 1
    ep: int = 1
    pp: int = 1
    gpu: int | None = None
    on_cpu: bool = False

    @classmethod
    def on(cls, device: str | None, *, tp: int = 1, ep: int = 1, pp: int = 1) -> "Deployment":
        """Return the deployment on `device`: sm_NN, cpu, or None. Raises TargetError."""
        if device is not None and device.lower() == "cpu":
            return cls(tp=tp, ep=ep, pp=pp, on_cpu=True)
        return cls(tp=tp, ep=ep, pp=pp, gpu=None if device is None else parse_gpu(device))


ONE_GPU = Deployment()


def every_target() -> tuple[Target, ...]:
    """Return each known version of each engine as a target of its own."""
    return tuple(
        Target(engine, (version,), f"{engine}=={version}")
        for engine, versions in KNOWN.items()
        for version in versions
    )


def parse_targets(text: str) -> tuple[Target, ...]:
    """Return the engines in a list like `vllm>=0.33,sglang==0.5.17`; versions are PEP 440's.

    An engine without a version stands for all that are known. Raises TargetError.
    """
    found: dict[str, Target] = {}
    for part in _parts(text):
        match = _TARGET.fullmatch(part)
        name = match["engine"].lower() if match else part
        if match is None or name not in KNOWN:
            raise TargetError(f"unknown engine {name!r}; there is {', '.join(KNOWN)}")
        if name in found:
            raise TargetError(f"{name} is named twice; join the versions: {name}>=A,<B")
        found[name] = _target(name, match["versions"])
    if not found:
        raise TargetError("no engine is named; there is " + ", ".join(KNOWN))
    return tuple(found.values())


def parse_gpu(text: str) -> int:
    """Return 90 for `sm_90`. Raises TargetError."""
    match = _GPU.fullmatch(text)
    if match is None:
        raise TargetError(
            f"{text!r} is no compute capability; expected sm_80, sm_89, sm_90, ... or cpu"
        )
    return int(match[1])


def _parts(text: str) -> list[str]:
    """Split at commas, but not before what goes on with the versions of one engine."""
    parts: list[str] = []
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        if parts and piece[0] in "<>=!~":
            parts[-1] += f",{piece}"
        else:
            parts.append(piece)
    return parts


def _target(name: str, specifier: str) -> Target:
    try:
        wanted = SpecifierSet(specifier)
    except InvalidSpecifier:
        raise TargetError(
            f"{name}{specifier}: {specifier!r} names no versions; expected e.g. "
            f"{name}=={KNOWN[name][-1]} or {name}>={KNOWN[name][0]}"
        ) from None
    versions = tuple(
        version for version in KNOWN[name] if wanted.contains(Version(version), prereleases=True)
    )
    if not versions:
        raise TargetError(
            f"{name}{specifier}: no rules are known for it, but for {', '.join(KNOWN[name])}"
        )
    return Target(name, versions, f"{name}{specifier}")
