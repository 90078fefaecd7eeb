"""What becomes of what the ranks said last. What happens on a cluster: tests/systems/test_slurm.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gfrnn.training import heartbeat
from verdicts import FAILED, ORDER, STOPPED, USER, Limits, Ranks, Verdict, judge

LIMITS = Limits(start=60, silent=20, stalled=40, stop=100)
NODES = ["a", "b"]


class Fleet:
    """Heartbeats of two ranks on each of nodes a and b, and the clock of who looks at them."""

    def __init__(self, control: Path):
        self.control = control
        self.now = 1000.0
        self.ranks = Ranks(control, NODES, per_node=2, clock=lambda: self.now)
        self._beats = dict.fromkeys(range(4), 0)
        self.said: dict[int, dict[str, Any]] = {}

    def say(self, rank: int, step: int = 7, phase: str = "forward", ended: tuple[str, str] | None = None) -> None:
        self._beats[rank] += 1
        self.said[rank] = {
            "rank": rank,
            "node": NODES[rank // 2],
            "pid": 100 + rank,
            "beats": self._beats[rank],
            "step": step,
            "phase": phase,
            "ended": None if ended is None else {"kind": ended[0], "reason": ended[1]},
        }
        (self.control / f"rank-{rank:05d}.json").write_text(json.dumps(self.said[rank]))
        self.ranks.look()

    def wait(self, seconds: int, beating: Sequence[int] = (), *, moving: bool = False) -> None:
        """So long, in which some ranks say again where they are, or that they are further."""
        for _ in range(seconds):
            self.now += 1
            self.ranks.look()
            for rank in beating:
                self.say(rank, self.said[rank]["step"] + moving, self.said[rank]["phase"])

    @property
    def trouble(self) -> Verdict | None:
        return self.ranks.trouble(LIMITS)

    def end(self, status: int, *, finished: bool = False, stopping: bool = False) -> Verdict:
        return judge(self.ranks, status, finished=finished, trouble=self.trouble, stopping=stopping)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    found = Fleet(tmp_path)
    for rank in range(4):
        found.say(rank)
    return found


# While it runs ------------------------------------------------------------------------------------------------------


def test_all_is_well(fleet: Fleet) -> None:
    fleet.wait(300, range(4), moving=True)
    assert fleet.trouble is None


def test_a_rank_that_does_not_start(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    for rank in (0, 1, 2):
        fleet.say(rank)
    fleet.wait(60, (0, 1, 2), moving=True)
    assert fleet.trouble is None
    fleet.wait(1, (0, 1, 2), moving=True)
    assert fleet.trouble == Verdict("failed", "rank 3 on b did not start within 60 s", FAILED, 3, ("b",))


def test_a_silent_rank_is_the_one_that_fell_silent_first(fleet: Fleet) -> None:
    fleet.wait(14, (0, 1, 3))
    fleet.wait(7, (0,))  # by now the others wait for it
    found = fleet.trouble
    assert found is not None
    assert (found.rank, found.nodes) == (2, ("b",))
    assert found.why.endswith("gave no sign for 20 s: dead, stopped or cut off, at update 7 (forward, process 102)")


def test_a_node_that_falls_silent_is_said_once(fleet: Fleet) -> None:
    fleet.wait(21, (0, 1))
    found = fleet.trouble
    assert found is not None
    assert found.why.startswith("rank 2 on b and 1 more gave no sign")
    assert found.nodes == ("b",)


def test_all_nodes_silent_together_are_a_file_system(fleet: Fleet) -> None:
    """It may come back; and no node is to blame."""
    fleet.wait(40)
    assert fleet.trouble is None
    fleet.wait(1)
    found = fleet.trouble
    assert found is not None
    assert (found.nodes, found.rank) == ((), None)
    assert "is the run folder's file system stuck?" in found.why


def test_who_looks_may_itself_stand_still(fleet: Fleet) -> None:
    fleet.now += 1000  # a stat() that did not come back, say
    fleet.ranks.look()
    assert fleet.trouble is None
    fleet.wait(16, (0, 1, 2))
    found = fleet.trouble
    assert found is not None
    assert found.rank == 3


@pytest.mark.parametrize("where", [(7, "forward"), (6, "agree")], ids=["in-the-update", "an-update-behind"])
def test_who_hangs_is_who_is_behind(where: tuple[int, str], fleet: Fleet) -> None:
    for other in (0, 2, 3):
        fleet.say(other, 7, "backward")
    fleet.say(1, *where)
    fleet.wait(41, range(4))  # all live, none moves
    found = fleet.trouble
    assert found is not None
    assert (found.rank, found.nodes) == (1, ("a",))
    assert "rank 1 on a hangs while the others wait for it (40 s)" in found.why


def test_all_at_the_same_place_are_cut_off_from_one_another(fleet: Fleet) -> None:
    fleet.wait(41, range(4))
    found = fleet.trouble
    assert found is not None
    assert found.why == "all ranks wait for one another: a GPU that hangs, or a cut network between a and b"
    assert found.nodes == ()


def test_a_validation_may_take_longer(fleet: Fleet) -> None:
    for rank in range(4):
        fleet.say(rank, 7, "validation")
    fleet.wait(160, range(4))
    assert fleet.trouble is None
    fleet.wait(1, range(4))
    assert fleet.trouble is not None


def test_who_ended_badly_is_the_cause_also_where_the_rest_waits_for_ever(fleet: Fleet) -> None:
    """NCCL need not notice."""
    fleet.say(2, ended=("error", "CUDA error: uncorrectable ECC error"))
    fleet.wait(20, (0, 1, 3))
    assert fleet.trouble is None
    fleet.wait(1, (0, 1, 3))
    found = fleet.trouble
    assert found is not None
    assert (found.cause, found.rank, found.nodes) == ("failed", 2, ("b",))
    assert "uncorrectable ECC error" in found.why


@pytest.mark.parametrize("later", [0, 1])
def test_a_node_that_died_is_named_though_another_rank_noticed_first(later: int, fleet: Fleet) -> None:
    """Who has lost it says so at once; its last heartbeats may be read with that, or after it."""
    fleet.say(0, ended=("lost", "connection reset by peer"))
    fleet.wait(later, (1, 2, 3))
    fleet.wait(20, (1,))
    assert fleet.trouble is None
    fleet.wait(1, (1,))
    found = fleet.trouble
    assert found is not None
    assert (found.rank, found.nodes) == (2, ("b",))
    assert "gave no sign for 20 s" in found.why


def test_ranks_that_live_have_lost_one_another(fleet: Fleet) -> None:
    fleet.say(0, ended=("lost", "connection reset by peer"))
    fleet.wait(25, (1, 2, 3))
    assert fleet.trouble is None
    fleet.wait(1, (1, 2, 3))
    assert fleet.trouble == Verdict("failed", "the ranks have lost one another", FAILED)


def test_a_user_error_of_one_rank_ends_the_rest(fleet: Fleet) -> None:
    fleet.say(2, ended=("user", "no space left on device"))
    fleet.wait(21, (0, 1, 3))
    assert fleet.trouble == Verdict("given up", "no space left on device", USER, 2, ("b",))


def test_a_long_goodbye_is_no_trouble(fleet: Fleet) -> None:
    """The first process has MLflow to wait for."""
    for rank in (1, 2, 3):
        fleet.say(rank, 9, "test", ended=("finished", ""))
    fleet.say(0, 9, "test")
    fleet.wait(100, (0,))
    assert fleet.trouble is None


def test_srun_that_does_not_see_the_end(fleet: Fleet) -> None:
    for rank in range(4):
        fleet.say(rank, ended=("finished", ""))
    fleet.wait(60)
    assert fleet.trouble is None
    fleet.wait(1)
    assert fleet.trouble == Verdict("failed", "all ranks have ended, and srun has not in 60 s", FAILED)
    assert fleet.end(FAILED, finished=True).cause == "finished"


def test_a_record_being_damaged_is_not_an_end(fleet: Fleet) -> None:
    (fleet.control / "rank-00001.json").write_text('{"rank": 1, "be')
    fleet.ranks.look()
    assert fleet.trouble is None
    assert fleet.ranks.records[1]["step"] == 7


def test_the_supervisor_knows_every_phase() -> None:
    """It has its own list, as it runs where gfrnn is not installed."""
    assert ORDER == heartbeat.PHASES


# After the end ------------------------------------------------------------------------------------------------------


def test_finished_is_what_the_summary_says(fleet: Fleet) -> None:
    assert fleet.end(1, finished=True).cause == "finished"


def test_status_0_alone_is_not_finished(fleet: Fleet) -> None:
    """DeepSpeed's launcher ends with 0 when a rank was killed, now and then."""
    for rank in (0, 1, 2):
        fleet.say(rank, ended=("lost", "Connection closed by peer"))
    found = fleet.end(0)
    assert (found.cause, found.rank, found.nodes) == ("failed", 3, ("b",))
    assert "rank 3 on b ended without a word: killed, or its node died" in found.why


def test_stopped(fleet: Fleet) -> None:
    for rank in range(4):
        fleet.say(rank, ended=("stopped", "SIGUSR1 at update 7"))
    assert fleet.end(75) == Verdict("stopped", "with a checkpoint", STOPPED)


def test_a_rank_killed_while_stopping_is_still_a_stop(fleet: Fleet) -> None:
    """SLURM kills what is left at the end of its grace: no node is to blame."""
    for rank in (0, 1, 2):
        fleet.say(rank, ended=("lost", "Connection closed by peer"))
    found = fleet.end(1, stopping=True)
    assert (found.cause, found.nodes) == ("stopped", ())


@pytest.mark.parametrize(("kind", "status"), [("user", USER), ("failed", FAILED)])
def test_what_another_start_would_meet_again(kind: str, status: int, fleet: Fleet) -> None:
    fleet.say(0, ended=(kind, "the reason"))
    found = fleet.end(status)
    assert (found.cause, found.why, found.status) == ("given up", "the reason", status)


def test_a_failure_to_meet_may_pass(fleet: Fleet) -> None:
    fleet.say(2, 0, "meeting", ended=("user", "port 20001 is taken"))
    found = fleet.end(USER)
    assert (found.cause, found.nodes) == ("failed", ("b",))


def test_a_fault_has_its_rank_and_reason(fleet: Fleet) -> None:
    fleet.say(1, ended=("error", "CUDA error: uncorrectable ECC error"))
    for rank in (0, 2, 3):
        fleet.say(rank, ended=("lost", "reset by peer"))
    found = fleet.end(1)
    assert (found.cause, found.rank, found.nodes) == ("failed", 1, ("a",))
    assert "uncorrectable ECC error" in found.why


def test_a_fault_that_is_said_comes_before_silence(fleet: Fleet) -> None:
    """A launcher ends the other ranks of its node, and NCCL's watchdog the rest: they say nothing."""
    fleet.say(1, ended=("error", "CUDA error: an illegal memory access"))
    found = fleet.end(1)
    assert (found.rank, found.nodes) == (1, ("a",))


@pytest.mark.parametrize(("crash", "guilty"), [(None, 3), ("Segmentation fault", 1)])
def test_whoever_is_aborted_is_not_to_blame(crash: str | None, guilty: int, fleet: Fleet) -> None:
    for rank in (0, 1, 2):
        word = crash if rank == guilty else "Aborted"
        (fleet.control / f"rank-{rank:05d}.crash").write_text(f"Fatal Python error: {word}\n\nThread 0x1 ...\n")
    if crash is not None:
        fleet.say(3, ended=("lost", "remote process exited"))
    fleet.wait(3, (3,) if crash is None else ())  # and was heard of last
    found = fleet.end(1)
    assert (found.cause, found.rank) == ("failed", guilty)
    assert ("crashed (Segmentation fault)" if crash else "ended without a word") in found.why


def test_a_failure_while_stopping_is_still_a_stop(fleet: Fleet) -> None:
    fleet.say(1, ended=("error", "some library's way of being ended"))
    found = fleet.end(1, stopping=True)
    assert (found.cause, found.nodes) == ("stopped", ())


def test_taken_over(fleet: Fleet) -> None:
    fleet.say(0, ended=("taken over", "restart 2 of job 9 trains in runs/x now"))
    assert fleet.end(75) == Verdict("taken over", "restart 2 of job 9 trains in runs/x now", STOPPED)


@pytest.mark.parametrize(("status", "cause"), [(USER, "given up"), (1, "failed")])
def test_programs_that_said_nothing(status: int, cause: str, tmp_path: Path) -> None:
    verdict = Fleet(tmp_path).end(status)
    assert (verdict.cause, verdict.nodes) == (cause, ())  # no node's fault, as far as one can tell
