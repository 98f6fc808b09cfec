"""A stand-in for vLLM's OpenAI server: a small HTTP server that behaves as config.json says."""

from pathlib import Path

import fake_vllm

API_SERVER = r"""
import json, math, os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

def argument(name):
    (found,) = (word.split("=", 1)[1] for word in sys.argv if word.startswith(f"--{name}="))
    return found

FOLDER = Path(argument("model"))
KIND = json.loads((FOLDER / "config.json").read_text())["kind"]
assert argument("host") == "127.0.0.1"

def answer(path, body):
    if path == "/v1/models":
        models = [{"id": argument("served-model-name"), "object": "model"}]
        return {"data": [] if KIND == "no-model" else models}
    assert body["model"] == "checkpoint" and body["ignore_eos"]
    count = 7 if KIND == "usage" else body["max_tokens"]
    usage = {"prompt_tokens": 5, "completion_tokens": count, "total_tokens": 5 + count}
    logprob = math.nan if KIND == "nan" else -1.5
    if path == "/v1/completions":
        text = "" if KIND == "empty" else " Paris"
        logprobs = None if KIND == "no-logprobs" else {"token_logprobs": [logprob] * count}
        choice = {"text": text, "logprobs": logprobs}
    else:
        entries = [{"token": "x", "logprob": -1.5}] * count
        message = {"role": "assistant", "content": None if KIND == "no-chat" else "Paris."}
        choice = {"message": message, "logprobs": {"content": entries}}
    return {"choices": [choice], "usage": usage}

class Handler(BaseHTTPRequestHandler):
    def reply(self, status, document):
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/health":
            self.reply(503 if KIND == "never-ready" else 200, {})
        else:
            self.reply(200, answer(self.path, None))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if KIND == "status":
            self.reply(500, {"error": {"message": "EngineDeadError: the engine is gone"}})
        elif KIND == "dies":
            print("RuntimeError: last words", flush=True)
            os._exit(1)
        else:
            self.reply(200, answer(self.path, body))

if KIND == "refused":
    raise ValueError("Unknown ModelOpt quant algo: W4A16")
if KIND == "no-kernel":
    print("ValueError: Failed to find a kernel that can implement the layer.")
    raise RuntimeError("Engine core initialization failed. See root cause above.")
if KIND == "leaves":
    sys.exit(0)
if KIND in ("child", "never-ready"):
    sleeper = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", sleeper])
    (FOLDER / "pid").write_text(str(child.pid))
HTTPServer(("127.0.0.1", int(argument("port"))), Handler).serve_forever()
"""


def install(folder: Path) -> None:
    """Write the packages of fake_vllm, and the server, below `folder`."""
    fake_vllm.install(folder)
    openai = folder / "vllm" / "entrypoints" / "openai"
    openai.mkdir(parents=True)
    (openai / "api_server.py").write_text(API_SERVER)
