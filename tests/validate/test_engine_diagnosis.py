"""What the messages that vLLM really gave are taken for."""

import pytest

from qvalidate.engines.diagnosis import Diagnosis, diagnose
from qvalidate.engines.process import Run, RunnerError, RunnerState
from qvalidate.engines.vllm import ENGINE

UNKNOWN_ALGO = """1 validation error for ModelConfig
  Value error, Unknown ModelOpt quant algo: W4A16_NVFP4 [type=value_error, \
input_value=ArgsKwargs((), {'model': '/x', 'hf_config_path': None}), input_type=ArgsKwargs]
    For further information visit https://errors.pydantic.dev/2.12/v/value_error"""


def failed(
    text: str, *, kind: str = "ValueError", reached: str = "import", log: str = ""
) -> Diagnosis | None:
    error = RunnerError(type=kind, text=text, place="parameter.py:92 in load: assert a == b")
    state = RunnerState.model_validate({"reached": reached, "error": error})
    run = Run(state=state, returncode=1, timed_out=False, log=log, wall_s=1.0)
    return diagnose(run, no_kernel=ENGINE.no_kernel, timeout_s=60)


@pytest.mark.parametrize(
    "text",
    [
        "Failed to find a kernel that can implement the NVFP4 linear layer. Reasons: \n",
        "Forced NVFP4 kernel MarlinNvFp4LinearKernel is not supported: Marlin FP4 not available",
        "'_OpNamespace' '_C' object has no attribute 'silu_and_mul_quant'",
        "_C::static_scaled_fp8_quant() expected at most 0 argument(s) but received 4 argument(s).",
        "The quantization method modelopt is not supported for the current GPU. Minimum: 89.",
        "No valid attention backend found for cuda with ...",
        "CUDA error: no kernel image is available for execution on the device",
    ],
)
@pytest.mark.parametrize("reached", ["import", "load"])
def test_what_the_machine_lacks_is_no_kernel(text: str, reached: str) -> None:
    found = failed(text, reached=reached)

    assert found is not None
    assert found.rule == "engine-no-kernel"


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("ValidationError", UNKNOWN_ALGO, "Unknown ModelOpt quant algo: W4A16_NVFP4"),
        (
            "RuntimeError",
            "shape '[]' is invalid for input of size 128",
            "RuntimeError: shape '[]' is invalid for input of size 128",
        ),
        (
            "ValueError",
            "FP8_PB_WO requires in divisible by 128, got 192",
            "ValueError: FP8_PB_WO requires in divisible by 128, got 192",
        ),
        ("AssertionError", "", "AssertionError at parameter.py:92 in load: assert a == b"),
    ],
)
def test_refusal_keeps_the_words_that_tell_why(kind: str, text: str, message: str) -> None:
    assert failed(text, kind=kind) == Diagnosis("engine-refused", message)


def test_message_of_a_child_process_comes_from_the_log() -> None:
    log = (
        "(EngineCore pid=7) ERROR 11-21 11:03:12 [core.py:133] Traceback (most recent call last):\n"
        "(EngineCore pid=7) ERROR 11-21 11:03:12 [core.py:133] KeyError: 'w2_weight_input_scale'\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
        "[rank0] destroyed\n"
    )

    found = failed("Engine core initialization failed. See root cause above.", log=log)

    assert found == Diagnosis("engine-refused", "KeyError: 'w2_weight_input_scale'")


def test_long_messages_are_cut() -> None:
    found = failed("There is no module or parameter named 'foo'. Available: " + "x, " * 500)

    assert found is not None
    assert len(found.message) == 320
    assert found.message.endswith("...")


@pytest.mark.parametrize(
    ("returncode", "words"),
    [(-9, "killed by SIGKILL (the system"), (-11, "killed by SIGSEGV;"), (7, "exit status 7")],
)
def test_an_end_without_a_word_is_a_crash(returncode: int, words: str) -> None:
    run = Run(
        state=RunnerState(reached="load"),
        returncode=returncode,
        timed_out=False,
        log="one\nFatal Python error: Segmentation fault\n",
        wall_s=1.0,
    )

    found = diagnose(run, no_kernel=ENGINE.no_kernel, timeout_s=60)

    assert found is not None
    assert found.rule == "engine-crashed"
    assert words in found.message
    assert found.message.endswith("Fatal Python error: Segmentation fault")


def test_a_clean_end_is_none() -> None:
    run = Run(state=RunnerState(), returncode=0, timed_out=False, log="", wall_s=1.0)

    assert diagnose(run, no_kernel=ENGINE.no_kernel, timeout_s=60) is None
