"""Starting the disk early: written pages go out while the next slice is encoded.

An fsync at the end then finds little left to do. A hint only: where the system has no such call,
nothing happens.
"""

import ctypes
import os
from functools import cache

# <linux/fs.h>: start write-out of the dirty pages in the range, wait for nothing
_SYNC_FILE_RANGE_WRITE = 2
# smaller writes are left to the kernel
_MIN_NBYTES = 1 << 20


def start_writeback(descriptor: int, *, offset: int, nbytes: int) -> None:
    """Ask the kernel to begin writing the range of the file to disk; returns at once."""
    sync_file_range = _sync_file_range()
    if sync_file_range is not None and nbytes >= _MIN_NBYTES:
        # a failure is that of a hint; a broken disk shows in fsync
        sync_file_range(descriptor, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> "ctypes._NamedFuncPointer | None":
    if os.uname().sysname != "Linux":
        return None
    function: ctypes._NamedFuncPointer | None
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function
