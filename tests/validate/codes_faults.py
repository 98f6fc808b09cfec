"""Faults in the codes of a weight that a sample of them shows."""

import random
from collections.abc import Callable

from catalogue import DOWN, GATE, O_PROJ, PC_PT, K, Q, V, fault
from checkpoints import Draft


def recode(draft: Draft, module: str, code: Callable[[random.Random], int]) -> None:
    """Replace every byte of the weight of `module`."""
    dtype, shape, data = draft.tensor(f"{module}.weight")
    generator = random.Random(module)
    made = bytes(code(generator) for _ in range(len(data)))
    draft.put(f"{module}.weight", (dtype, shape, made))


@fault("codes-nan", f"{Q}.weight")
def nan_among_codes(draft: Draft) -> None:
    dtype, shape, data = draft.tensor(f"{Q}.weight")
    draft.put(f"{Q}.weight", (dtype, shape, b"\x7f" + data[1:]))


@fault("codes-nan", f"{GATE}.weight", algo=PC_PT)
def negative_nan_in_the_last_row(draft: Draft) -> None:
    dtype, shape, data = draft.tensor(f"{GATE}.weight")
    draft.put(f"{GATE}.weight", (dtype, shape, data[:-1] + b"\xff"))


@fault("codes-constant", f"{DOWN}.weight", severity="warning")
def codes_never_written(draft: Draft) -> None:
    recode(draft, DOWN, lambda _: 0)


@fault("codes-constant", f"{O_PROJ}.weight", algo="NVFP4", severity="warning")
def codes_filled_with_ones(draft: Draft) -> None:
    recode(draft, O_PROJ, lambda _: 0x22)


@fault("codes-saturated", f"{V}.weight", algo="W8A16", severity="warning")
def codes_of_too_small_a_scale(draft: Draft) -> None:
    recode(draft, V, lambda random: random.choice((127, 129, 128, random.randrange(256))))


@fault("codes-saturated", f"{V}.weight", algo="NVFP4", severity="warning")
def blocks_of_the_largest_code(draft: Draft) -> None:
    recode(draft, V, lambda random: random.choice((0x77, 0xFF, 0x7F, 0xF7, 0x12)))


@fault("codes-unsigned", f"{K}.weight", severity="warning")
def codes_without_their_signs(draft: Draft) -> None:
    recode(draft, K, lambda random: random.randrange(0x7F))


@fault("codes-unsigned", f"{K}.weight", algo="W4A16_AWQ", severity="warning")
def codes_with_eight_added(draft: Draft) -> None:
    """As AutoAWQ and GPTQ keep them: 8 is zero."""

    def near_eight(generator: random.Random) -> int:
        low, high = (min(15, max(1, round(generator.gauss(8, 2.5)))) for _ in range(2))
        return low | high << 4

    recode(draft, K, near_eight)


@fault("codes-unsigned", f"{K}.weight", algo="W8A16", severity="warning")
def codes_with_128_added(draft: Draft) -> None:
    recode(draft, K, lambda generator: min(255, max(1, round(generator.gauss(128, 20)))))
