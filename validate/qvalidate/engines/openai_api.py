"""What an OpenAI-compatible server answers, and what is wrong with it. HTTP on 127.0.0.1 only.

The shapes are those of OpenAI's API reference for models, completions and chat completions.
"""

import http.client
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

from qschema.strict import Json

PROMPT = "The capital of France is"
NUM_TOKENS = 8
# of an answer that is quoted
_LONGEST = 200


class ApiError(Exception):
    """The server's answer is not what it should be; the text is for the user."""


@dataclass(frozen=True)
class Server:
    """A server on a port of this machine."""

    port: int

    def is_ready(self, *, timeout_s: float) -> bool:
        """Return whether GET /health is answered with 200."""
        try:
            status, _ = self._ask("GET", "/health", None, timeout_s=timeout_s)
        except ApiError:
            return False
        return status == 200

    def model(self, *, timeout_s: float) -> str:
        """Return the id of the one model of /v1/models. Raises ApiError."""
        answer = self._json("GET", "/v1/models", None, timeout_s=timeout_s)
        models = answer.get("data")
        first = models[0] if isinstance(models, list) and models else None
        name = first.get("id") if isinstance(first, dict) else None
        if not isinstance(name, str) or not name:
            raise ApiError(f"expected a model with an id, got {_short(answer)}")
        return name

    def complete(self, model: str, *, timeout_s: float) -> str:
        """Return the text that /v1/completions continues a sentence with. Raises ApiError."""
        question: dict[str, Json] = {**_common(model), "prompt": PROMPT, "logprobs": 1}
        answer = self._json("POST", "/v1/completions", question, timeout_s=timeout_s)
        choice = _choice(answer)
        logprobs = choice.get("logprobs")
        _check_logprobs(logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None)
        _check_usage(answer.get("usage"))
        return _text(choice.get("text"))

    def chat(self, model: str, *, timeout_s: float) -> str:
        """Return what /v1/chat/completions answers to a question. Raises ApiError."""
        question: dict[str, Json] = {
            **_common(model),
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "logprobs": True,
            "top_logprobs": 1,
        }
        answer = self._json("POST", "/v1/chat/completions", question, timeout_s=timeout_s)
        choice = _choice(answer)
        message, logprobs = choice.get("message"), choice.get("logprobs")
        content = logprobs.get("content") if isinstance(logprobs, dict) else None
        entries = content if isinstance(content, list) else []
        _check_logprobs([e.get("logprob") if isinstance(e, dict) else None for e in entries])
        _check_usage(answer.get("usage"))
        return _text(message.get("content") if isinstance(message, dict) else None)

    def _json(
        self, method: str, path: str, body: dict[str, Json] | None, *, timeout_s: float
    ) -> dict[str, Json]:
        status, data = self._ask(method, path, body, timeout_s=timeout_s)
        try:
            # NaN in an answer is found later, by name
            answer: Json = json.loads(data)
        except ValueError:
            answer = None
        if status != 200 or not isinstance(answer, dict):
            raise ApiError(f"status {status}: {_short(data.decode(errors='replace'))}")
        return answer

    def _ask(
        self, method: str, path: str, body: dict[str, Json] | None, *, timeout_s: float
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(
                method,
                path,
                body=None if body is None else json.dumps(body),
                headers={"Content-Type": "application/json"},
            )
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(f"no answer: {type(error).__name__}: {error}".rstrip(": ")) from None
        finally:
            connection.close()


def _common(model: str) -> dict[str, Json]:
    # vLLM, SGLang and TensorRT-LLM know ignore_eos: no answer ends before its first word
    return {"model": model, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}


def _choice(answer: dict[str, Json]) -> dict[str, Json]:
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(first, dict):
        raise ApiError(f"expected one choice, got {_short(answer)}")
    return first


def _check_logprobs(found: Json) -> None:
    values = list(_numbers(found))
    if not values:
        raise ApiError("no log-probabilities, though they were asked for")
    num_bad = sum(not math.isfinite(value) for value in values)
    if num_bad:
        raise ApiError(f"NaN or Inf in the log-probabilities of {num_bad} of {len(values)} tokens")


def _numbers(found: Json) -> Iterator[float]:
    """Yield the log-probabilities; null, which is how JSON writes NaN, counts as NaN."""
    for value in found if isinstance(found, list) else []:
        yield float(value) if isinstance(value, int | float) else math.nan


def _check_usage(usage: Json) -> None:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in names]
    prompt, completion, total = (count if isinstance(count, int) else 0 for count in counts)
    if prompt < 1 or completion != NUM_TOKENS or total != prompt + completion:
        raise ApiError(
            f"expected usage with prompt_tokens, {NUM_TOKENS} completion_tokens and their sum as "
            f"total_tokens, got {_short(usage)}"
        )


def _text(found: Json) -> str:
    if not isinstance(found, str) or not found:
        raise ApiError(f"expected text, got {_short(found)}")
    return found


def _short(found: Json) -> str:
    text = found if isinstance(found, str) else json.dumps(found)
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
