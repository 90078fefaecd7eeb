"""Two hosts, a cable, and no cluster's software: what becomes of a training when the cable is pulled.

They are network namespaces, which need root: without it the tests are skipped, and fail with GFRNN_CI set.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import lines, needs_root_and, wait

from hosts import Host, two_hosts
from launch import ROOT, SMALL, losses, metrics, start_ranks, summary, train

UPDATES = 300
FLAGS = [*SMALL, *f"--max-updates {UPDATES} --checkpoint-every 20 --valid-every 100".split()]
FLAGS += ["--no-layer-norm"]  # for losses that are the same: see test_slurm.py


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """That a name stands for neither is part of it."""
    needs_root_and("ip")
    with two_hosts(network="10.78.0") as found:
        yield found


def start(hosts: list[Host], run: Path, *flags: str) -> list[subprocess.Popen[str]]:
    """A rank a host."""
    return start_ranks(
        [ROOT / "src/train.py", *FLAGS, "--output-dir", run, *flags],
        2,
        extra=lambda rank: {"MASTER_ADDR": hosts[0].address, "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"},
        where=lambda rank: hosts[rank].prefix,
    )


def test_a_cable_is_pulled_and_put_back(hosts: list[Host], tmp_path: Path) -> None:
    """For a moment: nothing is lost. For longer than a collective may take: both ends say so, and then it goes on."""
    alone, run = tmp_path / "alone", tmp_path / "run"
    status, _, err = train(alone, FLAGS)
    assert status == 0, err

    ranks = start(hosts, run, "--collective-timeout", "0.2")
    wait(lambda: lines(run) >= 30, 120)
    hosts[0].ip("link", "set", "eth0", "down")
    before = lines(run)
    time.sleep(3)
    assert lines(run) <= before + 2
    hosts[0].ip("link", "set", "eth0", "up")
    wait(lambda: lines(run) > before + 10, 60)

    hosts[0].ip("link", "set", "eth0", "down")
    began = time.monotonic()
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert time.monotonic() - began < 60
    assert [rank.returncode for rank in ranks] == [3, 3], said
    for words in said:
        assert "failed: another process gives no sign" in words
        assert "Traceback" not in words
    hosts[0].ip("link", "set", "eth0", "up")

    said = [rank.communicate(timeout=120)[1] for rank in start(hosts, run)]
    assert "resumed at update " in said[0]
    assert summary(run)["finished"]
    assert [line["step"] for line in metrics(run) if "train_bpc" in line] == list(range(1, UPDATES + 1))
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("10.9.8.7", "10.9.8.7"),
        ("fd00::7", "fd00::7"),
        ("known", "10.78.0.1"),
        ("loopback", "10.78.0.1"),  # as Debian has it
        ("nowhere", "10.78.0.1"),
    ],
)
def test_a_node_is_known_by_a_number(name: str, number: str, hosts: list[Host], tmp_path: Path) -> None:
    """slurm/address.sh on the first host, where the second's name is known."""
    names = tmp_path / "hosts"
    names.write_text("127.0.0.1 localhost\n10.78.0.1 known\n127.0.1.1 loopback\n10.78.0.2 second\n")
    script = 'mount --bind "$1" /etc/hosts && . slurm/address.sh && number_of "$2" second'
    command = [*hosts[0].prefix, "bash", "-euo", "pipefail", "-c", script, "bash", names, name]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == f"{number}\n"
