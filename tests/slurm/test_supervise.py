"""What the supervisor makes of what the ranks said last. What it sees on a cluster: tests/systems/test_slurm.py."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from gfrnn.training import heartbeat
from supervise import FAILED, STOPPED, USER, Limits, Ranks, Verdict, judge, split

LIMITS = Limits(start=0.3, silent=0.3, stalled=0.3, stop=1.0)
NEVER = Limits(start=1e9, silent=1e9, stalled=1e9, stop=1e9)
NODES = ["a", "b"]


class Fleet:
    """Heartbeats of two ranks on each of nodes a and b."""

    def __init__(self, control: Path):
        self.control = control
        self.ranks = Ranks(control, NODES, per_node=2)
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

    def end(self, status: int, *, finished: bool = False, stopping: bool = False) -> Verdict:
        return judge(self.ranks, status, finished=finished, trouble=None, stopping=stopping)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    found = Fleet(tmp_path)
    for rank in range(4):
        found.say(rank)
    return found


# While it runs ------------------------------------------------------------------------------------------------------


def test_all_is_well(fleet: Fleet) -> None:
    assert fleet.ranks.trouble(LIMITS) is None


def test_a_rank_that_does_not_start(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    for rank in (0, 1, 2):
        fleet.say(rank)
    time.sleep(0.4)
    for rank in (0, 1, 2):
        fleet.say(rank, step=8)
    found = fleet.ranks.trouble(LIMITS)
    assert found == Verdict("failed", "rank 3 on b did not start within 0.3 s", FAILED, 3, "b")


def test_a_silent_rank_is_the_one_that_fell_silent_first(fleet: Fleet) -> None:
    time.sleep(0.2)
    for rank in (0, 1, 3):
        fleet.say(rank)
    time.sleep(0.2)  # by now the others wait for it
    found = fleet.ranks.trouble(LIMITS)
    assert found is not None
    assert (found.rank, found.node) == (2, "b")
    assert found.why.endswith("gave no sign for 0.3 s: dead, stopped or cut off, at update 7 (forward, process 102)")


def test_a_node_that_falls_silent_is_said_once(fleet: Fleet) -> None:
    time.sleep(0.2)
    for rank in (0, 1):
        fleet.say(rank)
    time.sleep(0.2)
    found = fleet.ranks.trouble(LIMITS)
    assert found is not None
    assert found.why.startswith("rank 2 on b and 1 more gave no sign")


@pytest.mark.parametrize("where", [(7, "forward"), (6, "agree")], ids=["in-the-update", "an-update-behind"])
def test_who_hangs_is_who_is_behind(where: tuple[int, str], fleet: Fleet) -> None:
    for other in (0, 2, 3):
        fleet.say(other, 7, "backward")
    fleet.say(1, *where)
    time.sleep(0.4)
    for each in range(4):
        fleet.say(each, fleet.said[each]["step"], fleet.said[each]["phase"])  # all live, none moves
    found = fleet.ranks.trouble(LIMITS)
    assert found is not None
    assert (found.rank, found.node) == (1, "a")
    assert "rank 1 on a hangs while the others wait for it (0.3 s)" in found.why


def test_all_at_the_same_place_are_cut_off_from_one_another(fleet: Fleet) -> None:
    time.sleep(0.4)
    for rank in range(4):
        fleet.say(rank)
    found = fleet.ranks.trouble(LIMITS)
    assert found is not None
    assert found.why == "all ranks wait for one another: is the network between a and b cut?"
    assert found.node is None


def test_a_validation_may_take_longer(fleet: Fleet) -> None:
    for rank in range(4):
        fleet.say(rank, 7, "validation")
    time.sleep(0.4)
    for rank in range(4):
        fleet.say(rank, 7, "validation")
    assert fleet.ranks.trouble(LIMITS) is None


def test_a_record_being_damaged_is_not_an_end(fleet: Fleet) -> None:
    (fleet.control / "rank-00001.json").write_text('{"rank": 1, "be')
    fleet.ranks.look()
    assert fleet.ranks.trouble(NEVER) is None


def test_the_supervisor_knows_every_phase() -> None:
    """It has its own list, as it runs where gfrnn is not installed."""
    from supervise import ORDER

    assert ORDER == heartbeat.PHASES


# After the end ------------------------------------------------------------------------------------------------------


def test_finished_is_what_the_summary_says(fleet: Fleet) -> None:
    assert fleet.end(1, finished=True).cause == "finished"


def test_status_0_alone_is_not_finished(fleet: Fleet) -> None:
    """DeepSpeed's launcher ends with 0 when a rank was killed, now and then."""
    for rank in (0, 1, 2):
        fleet.say(rank, ended=("lost", "Connection closed by peer"))
    found = fleet.end(0)
    assert (found.cause, found.rank, found.node) == ("failed", 3, "b")
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
    assert (found.cause, found.node) == ("stopped", None)


@pytest.mark.parametrize(("kind", "status"), [("user", USER), ("failed", FAILED)])
def test_what_another_start_would_meet_again(kind: str, status: int, fleet: Fleet) -> None:
    fleet.say(0, ended=(kind, "the reason"))
    found = fleet.end(status)
    assert (found.cause, found.why, found.status) == ("given up", "the reason", status)


def test_a_failure_to_meet_may_pass(fleet: Fleet) -> None:
    fleet.say(2, 0, "meeting", ended=("user", "port 20001 is taken"))
    found = fleet.end(USER)
    assert (found.cause, found.node) == ("failed", "b")


def test_a_fault_has_its_rank_and_reason(fleet: Fleet) -> None:
    fleet.say(1, ended=("error", "CUDA error: uncorrectable ECC error"))
    for rank in (0, 2, 3):
        fleet.say(rank, ended=("lost", "reset by peer"))
    found = fleet.end(1)
    assert (found.cause, found.rank, found.node) == ("failed", 1, "a")
    assert "uncorrectable ECC error" in found.why


def test_taken_over(fleet: Fleet) -> None:
    fleet.say(0, ended=("taken over", "restart 2 of job 9 trains in runs/x now"))
    assert fleet.end(75) == Verdict("taken over", "restart 2 of job 9 trains in runs/x now", STOPPED)


@pytest.mark.parametrize(("status", "cause"), [(USER, "given up"), (1, "failed")])
def test_programs_that_said_nothing(status: int, cause: str, tmp_path: Path) -> None:
    assert Fleet(tmp_path).end(status).cause == cause


# The command line ---------------------------------------------------------------------------------------------------


def test_commands_keep_flags_of_their_own() -> None:
    parts = [["--output-dir", "r"], ["srun", "--output-dir", "r", "x"], ["srun", "y", "--training", "z"]]
    assert split([*parts[0], "--preflight", *parts[1], "--training", *parts[2]]) == parts
