"""What the messages that vLLM really gave are taken for."""

import pytest

from qvalidate.engines import sglang, tensorrt_llm
from qvalidate.engines.adapter import RunnerEngine
from qvalidate.engines.diagnosis import Diagnosis, diagnose
from qvalidate.engines.outcome import Level
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
    return diagnosed(run)


def diagnosed(run: Run, *, level: Level = "generate") -> Diagnosis | None:
    return diagnose(run, level=level, no_kernel=ENGINE.no_kernel, timeout_s=60)


def ended(reached: str, returncode: int) -> Run:
    state = RunnerState.model_validate({"reached": reached})
    return Run(state=state, returncode=returncode, timed_out=False, log="", wall_s=1.0)


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


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("RuntimeError", "No CUDA GPUs are available"),
        ("RuntimeError", "Failed to infer device type, please set VLLM_LOGGING_LEVEL=DEBUG"),
        ("OSError", "[Errno 28] No space left on device"),
        ("OSError", "[Errno 98] Address already in use"),
        ("RuntimeError", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1"),
        ("ModuleNotFoundError", "No module named 'flash_attn'"),
        ("ImportError", "libcudart.so.12: cannot open shared object file: No such file"),
    ],
)
def test_trouble_with_the_machine_is_no_refusal(kind: str, text: str) -> None:
    found = failed(text, kind=kind)

    assert found is not None
    assert found.rule == "engine-crashed"


def test_a_scheduler_that_died_without_a_word_is_a_crash() -> None:
    text = "Rank 0 scheduler died during initialization (exit code: -9). If exit code is -9 ..."

    found = failed(text, kind="RuntimeError", log="Loading weights\n")

    assert found is not None
    assert found.rule == "engine-crashed"
    assert found.message.startswith("RuntimeError: Rank 0 scheduler died during initialization")


def test_a_scheduler_that_died_after_a_word_is_quoted() -> None:
    text = "Rank 0 scheduler died during initialization (exit code: 0)."

    found = failed(text, kind="RuntimeError", log="  File x\nAssertionError: 3 != 4\ndone\n")

    assert found == Diagnosis("engine-refused", "AssertionError: 3 != 4")


@pytest.mark.parametrize(
    ("engine", "text"),
    [
        (sglang.ENGINE, "modelopt_fp4 is not supported for the current GPU. Minimum"),
        (sglang.ENGINE, "ModelOpt NVFP4 native dense GEMM backends require SM100+. Use"),
        (sglang.ENGINE, "No module named 'sgl_kernel'"),
        (tensorrt_llm.ENGINE, "FP8 block scaling is not supported on SM 80"),
        (tensorrt_llm.ENGINE, "TRTLLM-Gen SiTu requires SM100 or SM103, got SM90."),
    ],
)
def test_what_other_engines_say_of_a_machine_is_no_kernel(engine: RunnerEngine, text: str) -> None:
    error = RunnerError(type="ValueError", text=text, place="")
    state = RunnerState(reached="import", error=error)
    run = Run(state=state, returncode=1, timed_out=False, log="", wall_s=1.0)

    found = diagnose(run, level="load", no_kernel=engine.no_kernel, timeout_s=60)

    assert found is not None
    assert found.rule == "engine-no-kernel"


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

    found = diagnosed(run)

    assert found is not None
    assert found.rule == "engine-crashed"
    assert words in found.message
    assert found.message.endswith("Fatal Python error: Segmentation fault")


@pytest.mark.parametrize(
    ("level", "reached"),
    [("load", "load"), ("generate", "generate"), ("compare", "generate")],
)
def test_a_clean_end_that_reported_the_level_is_none(level: Level, reached: str) -> None:
    assert diagnosed(ended(reached, 0), level=level) is None


@pytest.mark.parametrize(
    ("level", "reached"),
    [
        ("load", "import"),
        ("generate", "import"),
        ("generate", "load"),
        ("compare", "import"),
        ("compare", "load"),
    ],
)
def test_exit_status_0_before_the_level_is_a_crash(level: Level, reached: str) -> None:
    found = diagnosed(ended(reached, 0), level=level)

    assert found is not None
    assert found.rule == "engine-crashed"
    assert found.message.startswith("ended with exit status 0 and no result; the checkpoint was")


@pytest.mark.parametrize("level", ["load", "generate", "compare"])
@pytest.mark.parametrize("returncode", [0, 1])
def test_an_interpreter_that_never_answered_has_no_engine(level: Level, returncode: int) -> None:
    found = diagnosed(ended("start", returncode), level=level)

    assert found is not None
    assert found.rule == "engine-missing"
    assert f"never answered: ended with exit status {returncode} and no result" in found.message


def test_a_signal_while_the_engine_is_imported_is_a_crash() -> None:
    found = diagnosed(ended("start", -9))

    assert found is not None
    assert found.rule == "engine-crashed"
