"""Which unit a worker takes next: its own shard's largest, so that writers keep out of each other.

A file system lets one thread at a time write into a file, so workers are spread over the shards; a
worker whose shard has nothing left joins the shard with the fewest workers, of those the one with
the most bytes left. Which worker handles what leaves no trace in the bytes.
"""

import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from qschema.plan import Unit


@dataclass(frozen=True)
class Job:
    """A unit, its place in the plan, and the source bytes that it reads."""

    place: int
    unit: Unit
    nbytes: int


class Schedule:
    """The units that nobody has taken yet. Thread safe."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._lock = threading.Lock()
        self._queues: dict[str, list[Job]] = defaultdict(list)
        for job in jobs:
            self._queues[job.unit.steps[0].source.file].append(job)
        self._left = {
            file: sum(job.nbytes for job in queue) for file, queue in self._queues.items()
        }
        for queue in self._queues.values():
            # the largest is taken first: none is left with a big one at the end
            queue.sort(key=lambda job: (job.nbytes, -job.place))
        self._workers = dict.fromkeys(self._queues, 0)
        self._at: dict[int, str] = {}

    def take(self, slot: int) -> Job | None:
        """Return the next job of worker `slot`, None if all are taken."""
        with self._lock:
            file = self._at.get(slot)
            if file is None or not self._queues[file]:
                if file is not None:
                    self._workers[file] -= 1
                    del self._at[slot]
                file = self._emptiest()
                if file is None:
                    return None
                self._at[slot] = file
                self._workers[file] += 1
            job = self._queues[file].pop()
            self._left[file] -= job.nbytes
            return job

    def _emptiest(self) -> str | None:
        waiting = [file for file, queue in self._queues.items() if queue]
        return min(waiting, key=lambda file: (self._workers[file], -self._left[file]), default=None)
