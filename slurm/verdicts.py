"""What the ranks of a start say of themselves, and what that makes of it: who has failed, and whether to start again.

Pure: no SLURM. Like supervise.py it needs Python 3.9 and nothing else. Heartbeats: gfrnn/training/heartbeat.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FINISHED, USER, FAILED, STOPPED = 0, 2, 3, 75
IN_AN_UPDATE = ("fetch", "forward", "backward", "optimizer", "agree")
ORDER = ("starting", "meeting", "loading", *IN_AN_UPDATE, "validation", "checkpoint", "test")
LATE = 5.0
"""Seconds between two looks, above which it is the looking that has stood still."""

Record = dict[str, Any]


class Verdict(NamedTuple):
    """What comes after a start."""

    cause: str
    """finished, stopped, taken over, failed (a requeue may help), or given up (none would)."""
    why: str
    status: int
    rank: int | None = None
    nodes: tuple[str, ...] = ()
    """That are to blame."""


class Limits(NamedTuple):
    """Seconds."""

    start: float
    silent: float
    stalled: float
    stop: float


class Ranks:
    """What the ranks of a start say of themselves, and when that last changed, by this process' clock."""

    def __init__(self, control: Path, nodes: Sequence[str], per_node: int, clock: Callable[[], float] = time.monotonic):
        self._control, self._clock = control, clock
        self._planned = {n * per_node + k: node for n, node in enumerate(nodes) for k in range(per_node)}
        self.records: dict[int, Record] = {}
        self._beat: dict[int, float] = {}
        self._moved: dict[int, float] = {}
        self._ended: dict[int, float] = {}
        self._begin = self._looked = clock()

    def node_of(self, rank: int) -> str:
        """Where it is; before it has said so, where it was to be."""
        return str(self.records[rank]["node"]) if rank in self.records else self._planned[rank]

    def look(self) -> None:
        """Reads the heartbeats."""
        now = self._clock()
        self._forgive(max(0.0, now - self._looked - LATE))
        self._looked = now
        for rank in self._planned:
            try:
                record = json.loads((self._control / f"rank-{rank:05d}.json").read_text())
            except (OSError, ValueError):
                continue
            before = self.records.get(rank, {})
            if record["beats"] != before.get("beats"):
                self._beat[rank] = now
            if (record["step"], record["phase"]) != (before.get("step"), before.get("phase")):
                self._moved[rank] = now
            if record["ended"] is not None:
                self._ended.setdefault(rank, now)
            self.records[rank] = record

    def _forgive(self, pause: float) -> None:
        """Nobody is blamed for time in which this process stood still: a file system that did not answer, say."""
        for times in (self._beat, self._moved, self._ended):
            times.update({rank: then + pause for rank, then in times.items()})
        self._begin += pause

    # -- while it runs

    def trouble(self, limits: Limits) -> Verdict | None:
        """Why to wait no longer, if so."""
        now = self._clock()
        living = [rank for rank, record in self.records.items() if record["ended"] is None]
        badly = [self._ended[rank] for rank in self._ended if self._kind(rank) in ("error", "user", "failed", "lost")]
        waited = now - min(badly, default=now)
        if waited > limits.silent and (own := self.own_fault()) is not None:
            return own
        absent = [rank for rank in self._planned if rank not in self.records]
        if absent and now - self._begin > limits.start:
            return self.failed(absent, f"did not start within {limits.start:g} s")
        silent = [rank for rank in living if now - self._beat[rank] > limits.silent]
        if silent and not (self._all_at_once(silent, living) and now - self._beat[silent[0]] <= limits.stalled):
            if self._all_at_once(silent, living):
                why = f"no rank has given a sign for {limits.stalled:g} s: is the run folder's file system stuck?"
                return Verdict("failed", why, FAILED)
            first = min(self._beat[rank] for rank in silent)
            together = [rank for rank in silent if self._beat[rank] < first + limits.silent / 4]
            return self.failed(together, f"gave no sign for {limits.silent:g} s: dead, stopped or cut off")
        if waited > 1.25 * limits.silent:  # whom the first that noticed has lost was heard of after that, and lives
            return Verdict("failed", "the ranks have lost one another", FAILED)
        stalled = [rank for rank in living if now - self._moved[rank] > self._allowed(rank, limits)]
        if living and len(stalled) == len(living):
            return self._stalled(living, limits)
        if len(self._ended) == len(self._planned) and now - max(self._ended.values()) > limits.start:
            return Verdict("failed", f"all ranks have ended, and srun has not in {limits.start:g} s", FAILED)
        return None

    def _all_at_once(self, silent: Sequence[int], living: Sequence[int]) -> bool:
        """Silence of all ranks of several nodes together is of what they write to, or of this node's link to it."""
        return len(silent) == len(living) and len({self.node_of(rank) for rank in silent}) > 1

    def _allowed(self, rank: int, limits: Limits) -> float:
        return limits.stalled * (1 if self.records[rank]["phase"] in IN_AN_UPDATE else 4)

    def _stalled(self, ranks: list[int], limits: Limits) -> Verdict:
        where = {rank: (self.records[rank]["step"], ORDER.index(self.records[rank]["phase"])) for rank in ranks}
        behind = [rank for rank in ranks if where[rank] == min(where.values())]
        if len(behind) < len(ranks):
            return self.failed(behind, f"hangs while the others wait for it ({limits.stalled:g} s)")
        nodes = sorted({self.node_of(rank) for rank in ranks})
        cut = f", or a cut network between {' and '.join(nodes)}" if len(nodes) > 1 else f" on {nodes[0]}"
        return Verdict("failed", f"all ranks wait for one another: a GPU that hangs{cut}", FAILED)

    # -- after the end

    def _kind(self, rank: int) -> str | None:
        """How a rank says that it ended."""
        return (self.records[rank]["ended"] or {}).get("kind")

    def of_kind(self, *kinds: str) -> int | None:
        """The first rank that ended so."""
        ended = sorted(self._ended, key=lambda rank: (self._ended[rank], rank))
        return next((rank for rank in ended if self._kind(rank) in kinds), None)

    def reason(self, rank: int) -> str:
        return str(self.records[rank]["ended"]["reason"])

    def own_fault(self) -> Verdict | None:
        """Of the first rank that said what went wrong with itself."""
        rank = self.of_kind("user", "failed")
        if rank is not None and self.records[rank]["phase"] != "meeting":
            status = USER if self._kind(rank) == "user" else FAILED
            return Verdict("given up", self.reason(rank), status, rank, (self.node_of(rank),))
        rank = self.of_kind("user", "failed", "error")
        return None if rank is None else self.failed([rank], self.reason(rank) or "failed")

    def first_gone(self) -> Verdict | None:
        """Of ranks that ended without a word, the guilty one: killed before crashed, crashed before aborted.

        The last are ended by NCCL when it misses another. Of several alike, the one heard of least.
        """
        unsaid = [rank for rank in self._planned if rank not in self._ended]
        if not unsaid:
            return None
        crashes = {rank: self._crash(rank) for rank in unsaid}
        order = {None: 1, "Aborted": 2}
        rank = min(unsaid, key=lambda rank: (order.get(crashes[rank], 0), self._beat.get(rank, 0.0)))
        crash = crashes[rank]
        what = "ended without a word: killed, or its node died" if crash is None else f"crashed ({crash})"
        return self.failed([rank], what)

    def _crash(self, rank: int) -> str | None:
        """What faulthandler wrote: Segmentation fault, Aborted ..."""
        try:
            first = (self._control / f"rank-{rank:05d}.crash").read_text(errors="replace").partition("\n")[0]
        except OSError:
            return None
        return first.replace("Fatal Python error: ", "").strip() or None

    def failed(self, ranks: Sequence[int], why: str) -> Verdict:
        rank, record = ranks[0], self.records.get(ranks[0])
        where = "" if record is None else f", at update {record['step']} ({record['phase']}, process {record['pid']})"
        more = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
        nodes = tuple(dict.fromkeys(self.node_of(each) for each in ranks))
        return Verdict("failed", f"rank {rank} on {nodes[0]}{more} {why}{where}", FAILED, rank, nodes)


def judge(ranks: Ranks, status: int, *, finished: bool, trouble: Verdict | None, stopping: bool) -> Verdict:
    """How a start ended, from what the ranks said last, srun's status, summary.json, and what was seen before.

    What a rank says of itself comes before what its silence, or another's, was taken for.
    """
    if finished:
        return Verdict("finished", "", FINISHED)
    taken = ranks.of_kind("taken over")
    if taken is not None:
        return Verdict("taken over", ranks.reason(taken), STOPPED)
    own = ranks.own_fault()
    if own is not None and own.cause == "given up":
        return own
    if status in (USER, FAILED) and not ranks.records and trouble is None:
        return Verdict("given up", "the programs did not start", status)
    if ranks.of_kind("stopped") is not None or (status == STOPPED and own is None and ranks.of_kind("lost") is None):
        return Verdict("stopped", "with a checkpoint", STOPPED)
    if own is None and trouble is not None:
        return trouble
    if not ranks.records:  # nothing says that it was a node's fault
        what = f"no rank has started (srun's status {status})"
        return Verdict("stopped", what, STOPPED) if stopping else Verdict("failed", what, FAILED)
    gone = own or ranks.first_gone()
    if stopping and gone is not None:
        return Verdict("stopped", f"did not end by itself; {gone.why}", STOPPED)
    return gone or Verdict("failed", f"the ranks have lost one another (srun's status {status})", FAILED)
