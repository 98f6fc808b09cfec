"""How much memory this process took."""

from pathlib import Path
from resource import RUSAGE_SELF, getrusage


def peak_rss_nbytes() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10
    except (OSError, ValueError, IndexError):
        return getrusage(RUSAGE_SELF).ru_maxrss
