"""python -m gfrnn.training.preflight --output-dir DIR: whether these nodes can train together, in a few seconds.

One process a node, started with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT (slurm/launch.sh does), or as many on
each, LOCAL_WORLD_SIZE, where each sees GPUs of its own: what each node has is gathered and compared, and the network
between them measured. What is wrong is a line with the node and the mend; what was found is in preflight.json of the
folder that GFRNN_CONTROL names.

Exit status: 0 all is well; 2 something for the user to mend; 3 a node is broken, and others may do.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gfrnn import cli
from gfrnn.config import EXIT_FAILED, EXIT_USER, RunFailed, UserError
from gfrnn.runs import code_hash, git_commit, versions, write_json
from gfrnn.training import heartbeat, network

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import ProcessGroup, Store

_LARGEST_CLOCK_DIFFERENCE = 2.0  # seconds
_LARGE = 16 << 20  # bytes of the all-reduce that bandwidth is measured with
_TRIES = 5
_MEND = "is it the right network interface? name another, GFRNN_INTERFACE"


@dataclass(frozen=True)
class PreflightSettings:
    """Check that the nodes of a job can train together."""

    output_dir: Path
    """Run folder of the training to come."""
    per_node: int = 1
    """Processes that it will have on each node."""
    timeout: float = 60.0
    """Seconds that nodes wait for one another."""


class Problem(NamedTuple):
    """What is wrong with a node."""

    node: str
    what: str
    mend: str
    broken: bool
    """Whether it is the node itself, and another one may do."""


@dataclass(frozen=True)
class Node:
    """What a node says of itself."""

    name: str
    where: str
    commit: str | None
    code: str
    """Hash of the source, which may have changed since the commit."""
    versions: dict[str, str]
    cores: int
    clock: float
    """time.time() right after all have met."""
    visible_devices: list[str] = field(default_factory=list)
    """CUDA_VISIBLE_DEVICES, which SLURM sets, of each process here."""
    gpus: list[str] = field(default_factory=list)
    driver: str | None = None
    problems: list[Problem] = field(default_factory=list)


def main() -> None:
    """Checks; the first process says what was found."""
    cli.run(_main)


def _main() -> None:
    settings = cli.parse(PreflightSettings, sys.argv[1:])
    started = time.monotonic()
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore

    network.choose_interface()
    # a collective that fails says so to this program, and does not end it
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    store = _meet(settings.timeout)
    cuda = os.environ.get("DS_ACCELERATOR", "cuda" if _device_count() else "cpu") == "cuda"
    timeout = timedelta(seconds=settings.timeout)
    with _naming_the_network():  # by gloo: NCCL comes after the GPUs have been looked at
        group = PrefixStore("group", store)
        dist.init_process_group("gloo", store=group, rank=cli.rank(), world_size=cli.world_size(), timeout=timeout)
    problems = list(_check_folder(settings.output_dir))
    nodes = by_node(_gather(_describe(settings, cuda, problems)))
    found = list(dict.fromkeys([*(problem for node in nodes for problem in node.problems), *compare(nodes)]))
    with _naming_the_network():
        latency, bandwidth = _measure("cuda" if cuda and not found else "cpu", timeout)
    if cli.rank() == 0:
        _report(nodes, found, latency, bandwidth, time.monotonic() - started)
    dist.barrier()
    if found:
        sys.stderr.flush()
        os._exit(EXIT_FAILED if any(problem.broken for problem in found) else EXIT_USER)


@contextlib.contextmanager
def _naming_the_network() -> Iterator[None]:
    """Raises RunFailed, with this node and its interface, for what collectives raise."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RunFailed(f"{network.here()}: no collective works between the nodes ({reason}); {_MEND}") from error


def _local_size() -> int:
    """Processes of this program a node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _device_count() -> int:
    import torch

    return torch.cuda.device_count()


# ------------------------------------------------------------------------------------------------------- meeting


def _meet(seconds: float) -> Store:
    """The store at MASTER_ADDR, once every node has come to it.

    Raises RunFailed at the first node, naming those that have not come; UserError at one that cannot.
    """
    import torch.distributed as dist
    from torch._C._distributed_c10d import TCPStore

    address, port, first = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), cli.rank() == 0
    timeout = timedelta(seconds=seconds)
    try:
        store = TCPStore(address, port, is_master=first, timeout=timeout, wait_for_workers=False)
        store.set(f"here-{cli.rank()}", heartbeat.node_name())
        if not first:
            store.wait(["all here"])
            return store
        deadline, missing = time.monotonic() + seconds, set(range(cli.world_size()))
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if not store.check([f"here-{rank}"])}
            time.sleep(0.05)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{network.here()} cannot meet the others at {address}:{port} ({reason}); {_MEND}") from error
    if missing:
        count = cli.world_size() // _local_size()
        names = os.environ.get("GFRNN_NODES", "").split() or [f"node {number}" for number in range(count)]
        gone = [names[number] for number in sorted({rank // _local_size() for rank in missing})]
        what = f"did not come to {network.here()}, port {port}, within {seconds:g} s"
        found = [Problem(name, what, _MEND, True) for name in gone]
        if len(gone) == count - 1 > 1:  # not all of them are broken
            found = [
                Problem(
                    names[0], f"no other node came to {network.here()}, port {port}, within {seconds:g} s", _MEND, True
                )
            ]
        _keep(problems=[problem._asdict() for problem in found])
        raise RunFailed("; ".join(f"{problem.node}: {problem.what}" for problem in found) + f"; {_MEND}")
    store.set("all here", "")
    return store


def _gather(own: Node) -> list[Node]:
    """Every process', by rank."""
    import torch.distributed as dist

    everyone: list[Any] = [None] * cli.world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def by_node(processes: Sequence[Node]) -> list[Node]:
    """What the processes of a node have seen, together."""
    found: dict[str, Node] = {}
    for node in processes:
        first = found.get(node.name)
        if first is not None:
            node = replace(
                first,
                gpus=[*first.gpus, *node.gpus],
                visible_devices=[*first.visible_devices, *node.visible_devices],
                problems=[*first.problems, *node.problems],
            )
        found[node.name] = node
    return list(found.values())


# ------------------------------------------------------------------------------------------------ what is looked at


def _describe(settings: PreflightSettings, cuda: bool, problems: list[Problem]) -> Node:
    import torch.distributed as dist

    gpus: list[str] = []
    driver = None
    own = settings.per_node // _local_size()  # processes that are to have what this one can see
    if cuda:
        gpus, driver = _gpus(own, problems)
    cores, here = cli.cores(), heartbeat.node_name()
    if cores < own:
        mend = "ask for as many a node, --cpus-per-task (or --exclusive)"
        problems.append(Problem(here, f"{own} processes have {cores} cores", mend, False))
    visible = [os.environ[name] for name in ("CUDA_VISIBLE_DEVICES",) if name in os.environ]
    commit, code, found = git_commit(), code_hash(), versions()
    dist.barrier()  # the last before the clock is looked at
    return Node(here, network.here(), commit, code, found, cores, time.time(), visible, gpus, driver, problems)


def _gpus(wanted: int, problems: list[Problem]) -> tuple[list[str], str | None]:
    """Names of the GPUs that work here, and the driver's version."""
    import torch

    here, names, driver = heartbeat.node_name(), [], None
    if torch.version.cuda is None:
        mend = "install its CUDA build, or ask for no GPUs"
        problems.append(Problem(here, f"torch {torch.__version__} is built without CUDA", mend, False))
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        driver = found.stdout.split("\n")[0].strip()
    for index in range(torch.cuda.device_count()):
        try:
            torch.ones(1000, 1000, device=f"cuda:{index}").sum().item()
            names.append(torch.cuda.get_device_name(index))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            problems.append(Problem(here, f"GPU {index} does not work ({reason})", "have it drained", True))
    if len(names) < wanted and not problems:
        what = f"processes are to have {wanted} GPUs, one each, and {len(names)} can be seen"
        lent = os.environ.get("SLURM_GPUS_ON_NODE", "")
        lost = lent.isdecimal() and len(names) < min(wanted, int(lent))  # else too few were asked for
        mend = "have its driver looked at (nvidia-smi)" if lost else f"ask for them, --gpus-per-node={wanted}"
        problems.append(Problem(here, what, mend, lost))
    return names, driver


def _check_folder(output_dir: Path) -> Iterator[Problem]:
    """Whether every node writes to one and the same folder; collective."""
    import torch.distributed as dist

    here, control = heartbeat.node_name(), heartbeat.folder() or output_dir
    mend = "give an --output-dir on a file system that all nodes share"
    own = control / f"preflight-{cli.rank():05d}"
    try:
        control.mkdir(parents=True, exist_ok=True)
        own.write_text(here)
    except OSError as error:
        yield Problem(here, f"{output_dir} cannot be written to ({error.strerror})", mend, False)
    dist.barrier()
    seen = _all_seen(control) or _all_seen(control, after=1.0)  # file systems of networks take a moment
    dist.barrier()
    with contextlib.suppress(OSError):  # of what could not be written
        own.unlink()
    if not seen:
        yield Problem(here, f"{output_dir} is not the folder that the other nodes see there", mend, False)


def _all_seen(folder: Path, after: float = 0.0) -> bool:
    time.sleep(after)
    with contextlib.suppress(OSError):
        return len(list(folder.glob("preflight-[0-9]*"))) >= cli.world_size()
    return False


def compare(nodes: Sequence[Node]) -> list[Problem]:
    """What of each node is not as it is at the first."""
    first, found = nodes[0], []
    for node in nodes[1:]:
        if node.code != first.code:
            what = f"its code is not that of {first.name} (commits {node.commit} and {first.commit})"
            found.append(Problem(node.name, what, "have all nodes see one checkout", False))
        for name, version in first.versions.items():
            other = node.versions.get(name)
            if other != version:
                what = f"it has {name} {other}, {first.name} {version}"
                found.append(Problem(node.name, what, "have all nodes use one environment, GFRNN_PYTHON", False))
        if (node.gpus, node.driver) != (first.gpus, first.driver):
            what = f"its GPUs are {_described(node)}, those of {first.name} {_described(first)}"
            found.append(Problem(node.name, what, "ask for nodes of one kind, --constraint", False))
    return found


def clocks_apart(nodes: Sequence[Node]) -> list[str]:
    """What is said of clocks that differ, which no training depends on: timestamps in logs and MLflow do."""
    apart = [(node.name, node.clock - nodes[0].clock) for node in nodes]
    return [
        f"{name}: its clock is {off:+.1f} s off that of {nodes[0].name}; have it synchronized (chrony, NTP)"
        for name, off in apart
        if abs(off) > _LARGEST_CLOCK_DIFFERENCE
    ]


def _described(node: Node) -> str:
    return f"{', '.join(node.gpus) or 'none'} (driver {node.driver or 'none'})"


# ------------------------------------------------------------------------------------------------------ the network


def _measure(device: str, timeout: timedelta) -> tuple[float, float]:
    """Seconds of a small all-reduce over all nodes, and bytes a second of a large one: what a link carries each way.

    A process a node takes part. Of one node, which has no links, the second is 0.
    """
    import torch
    import torch.distributed as dist

    small, large = torch.zeros(2, device=device), torch.zeros(_LARGE // 4, device=device)
    firsts = range(0, cli.world_size(), _local_size())
    group = dist.new_group(firsts, backend="nccl" if device == "cuda" else "gloo", timeout=timeout)
    if cli.rank() not in firsts:
        return 0.0, 0.0
    latency = _time(small, group)
    carried = 2 * (len(firsts) - 1) / len(firsts) * _LARGE  # of a ring
    return latency, carried / _time(large, group)


def _time(tensor: torch.Tensor, group: ProcessGroup) -> float:
    import torch.distributed as dist

    seconds = []
    for _ in range(_TRIES):
        dist.barrier(group)
        begin = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        tensor[:1].cpu()  # waits for a GPU
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def _report(nodes: Sequence[Node], found: Sequence[Problem], latency: float, bandwidth: float, seconds: float) -> None:
    for node in nodes:
        what = _described(node) if node.gpus else f"{node.cores} cores, no GPU"
        commit = (node.commit or "none")[:9]
        cli.say(f"preflight: {node.where}: {what}; torch {node.versions['torch']}, commit {commit}")
    if len(nodes) > 1:
        clocks = [node.clock for node in nodes]
        speed = f"{latency * 1e3:.2f} ms, {8 * bandwidth / 1e9:.2f} Gbit/s a link"
        apart = max(clocks) - min(clocks)
        cli.say(f"preflight: all-reduce over {len(nodes)} nodes: {speed}; clocks within {apart:.3f} s")
    for note in clocks_apart(nodes):
        cli.say(f"preflight: note: {note}")
    for problem in found:
        cli.say(f"preflight: error: {problem.node}: {problem.what}; {problem.mend}")
    cli.say(f"preflight: {'not passed' if found else 'passed'} in {seconds:.1f} s")
    figures = {"latency_s": latency, "bytes_per_second": bandwidth} if len(nodes) > 1 else {}
    problems = [problem._asdict() for problem in found]
    _keep(network=figures, seconds=seconds, nodes=[asdict(node) for node in nodes], problems=problems)


def _keep(**found: Any) -> None:
    control = heartbeat.folder()
    if control is not None:
        control.mkdir(parents=True, exist_ok=True)
        write_json(control / heartbeat.PREFLIGHT, found)


if __name__ == "__main__":
    main()
