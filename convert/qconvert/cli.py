"""The command `qconvert`. Data goes to stdout, words to stderr.

Exit codes: 0 done, 1 the conversion failed, 2 the command makes no sense, 130 interrupted.

Imports nothing but the standard library until `main` runs, so that Ctrl-C is one line from then on.
"""

import os
import signal
import sys


def main() -> None:
    """Run the command that the process was started with."""
    # a scheduler's polite end stops as Ctrl-C does
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    words = sys.argv[1:]
    begun = False
    try:
        from qconvert.cli_commands import run

        begun = True
        run(words)
    except KeyboardInterrupt:
        print(f"qconvert: interrupted; {_further(words, begun=begun)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # all is cleaned up; torch, cut off in its work, may abort in the interpreter's own teardown
        os._exit(130)


def _further(words: list[str], *, begun: bool) -> str:
    if words[:1] == ["plan"] or not begun:
        return "nothing was written"
    if "--fresh" in words:
        return "run the same command again without --fresh to go on"
    return "run the same command again to go on, or with --fresh to start over"
