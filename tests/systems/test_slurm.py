"""Batch jobs on a real SLURM of two nodes: what they compute, and how they survive what happens to them.

Where root or Debian's packages are missing the tests are skipped, and say so; with GFRNN_CI set that is a failure.
"""

from __future__ import annotations

import itertools
import json
import re
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from slurm_cluster import CLUSTER, Cluster, Job, lines, needs_root_and, wait

from launch import ROOT, SMALL, losses, metrics, summary, train, validations

TRAIN = ROOT / "slurm/train.sbatch"
UPDATES = 300
FLAGS = [*SMALL, *f"--max-updates {UPDATES} --checkpoint-every 20 --valid-every 100".split()]
# Layer norm amplifies rounding, which is another for each number of processes (docs/programs.md); a constant rate does
# not depend on where a training is to end.
FLAGS += ["--no-layer-norm", "--schedule", "constant"]
ENDLESS = [*FLAGS, "--max-updates", "1000000", "--checkpoint-every", "0"]  # until they are cancelled
CHAIN = {"train": "out", "evaluate": "out-gfrnn-evaluate", "export": "out-gfrnn-export"}


@pytest.fixture(scope="module", autouse=True)
def _needs() -> None:
    needs_root_and(*CLUSTER)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="gfrnn-") as folder, Cluster(Path(folder) / "c", "pid") as running:
        yield running


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that fails leaves no job to the next one, nor does a node that a job has just left."""
    yield
    if "cluster" in request.fixturenames:
        cluster = request.getfixturevalue("cluster")
        cluster.client("scancel", "--me")
        cluster.wait_for_nodes()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of one process that nothing happens to."""
    run = tmp_path_factory.mktemp("alone") / "run"
    status, _, err = train(run, FLAGS)
    assert status == 0, err
    return losses(run)


def check(run: Path, expected: dict[int, float]) -> None:
    """The run has finished, has each update once, and computed what one process does."""
    assert summary(run)["finished"]
    assert [line["step"] for line in metrics(run) if "train_bpc" in line] == list(range(1, UPDATES + 1))
    assert losses(run) == pytest.approx(expected, rel=1e-5)
    assert sorted(validations(run)) == [100, 200, 300]


def submit(cluster: Cluster, folder: Path, *flags: str, training: Sequence[str] = FLAGS, **extra: str) -> Job:
    """A training in FOLDER/run."""
    return cluster.sbatch(folder, *flags, TRAIN, *training, "--output-dir", folder / "run", **extra)


def under_way(job: Job, run: Path, updates: int = 60) -> None:
    """Until so many updates are done."""
    wait(lambda: lines(run) >= updates, 180, job.output)


def is_training(job: Job, run: Path, restart: int) -> bool:
    record = run / f".job-{job.number}/{restart}/rank-00000.json"
    return record.exists() and job.rank(run, 0, restart)["step"] > 0


# What a job computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tasks", "ranks"), [("1", 2), ("2", 4)], ids=["launcher-a-node", "task-a-rank"])
def test_two_nodes_compute_what_one_process_does(
    tasks: str, ranks: int, cluster: Cluster, expected: dict[int, float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, "--nodes=2", f"--ntasks-per-node={tasks}")
    assert job.wait() == "COMPLETED", job.output()
    check(run, expected)
    assert summary(run)["world_size"] == ranks
    assert [job.rank(run, rank)["node"] for rank in range(ranks)] == ["node1"] * (ranks // 2) + ["node2"] * (ranks // 2)
    assert [end["cause"] for end in job.ends(run)] == ["finished"]
    assert job.shown()["Restarts"] == "0"
    assert "preflight: all-reduce over 2 nodes: " in job.output()


def test_two_jobs_on_one_node_in_containers(cluster: Cluster, expected: dict[int, float], tmp_path: Path) -> None:
    flags = ["--nodes=1", "--nodelist=node1", "--cpus-per-task=2"]
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    inside = {"GFRNN_PROCESSES_PER_NODE": "2", "GFRNN_CONTAINER": "unshare --mount"}  # of a container the part at hand
    jobs = [submit(cluster, folder, *flags, training=ENDLESS, **inside) for folder in folders]
    for folder, job in zip(folders, jobs, strict=True):
        under_way(job, folder / "run", UPDATES + 3)  # with lines of validations
        mounts = [f"/proc/{of}/ns/mnt" for of in ("self", job.rank(folder / "run", 0)["pid"])]
        assert len(set(cluster("in", "node1", "readlink", *mounts).split())) == 2
        assert job.rank(folder / "run", 1)["node"] == "node1"
    assert [job.state for job in jobs] == ["RUNNING", "RUNNING"]
    for folder in folders:
        found = losses(folder / "run")
        assert {step: found[step] for step in expected} == pytest.approx(expected, rel=1e-5)


def test_each_job_has_its_own_gpus(cluster: Cluster, tmp_path: Path) -> None:
    """Device files stand for GPUs here; the launcher is told which are the job's."""
    flags = ["--nodes=1", "--nodelist=node1", "--gpus-per-node=1"]
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    jobs = [submit(cluster, folder, *flags, training=ENDLESS) for folder in folders]
    for folder, job in zip(folders, jobs, strict=True):
        under_way(job, folder / "run", 5)
    seen = [
        job.environment_of(folder / "run", 0)["CUDA_VISIBLE_DEVICES"] for job, folder in zip(jobs, folders, strict=True)
    ]
    assert seen == ["0", "1"]


def test_a_gpu_for_each_task(cluster: Cluster, tmp_path: Path) -> None:
    """Each rank sees its own alone, and is looked at by a process of the preflight that sees what it will."""
    run = tmp_path / "run"
    flags = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1"]
    job = submit(cluster, tmp_path, *flags, training=ENDLESS)
    under_way(job, run, 5)
    found = json.loads((run / f".job-{job.number}/0/preflight.json").read_text())
    assert [(node["name"], node["visible_devices"]) for node in found["nodes"]] == [
        ("node1", ["0", "1"]),
        ("node2", ["0", "1"]),
    ]
    assert found["network"]["bytes_per_second"] > 1e6
    environments = [job.environment_of(run, rank) for rank in range(4)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments] == ["0", "1", "0", "1"]
    assert [each["LOCAL_RANK"] for each in environments] == ["0", "0", "0", "0"]


def test_tasks_that_are_not_as_many_on_each_node(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "--nodes=2", "--ntasks=3")
    assert job.wait() == "FAILED"
    assert "error: 3 tasks are not as many on each of 2 nodes: give --ntasks-per-node" in job.output()


def test_gpus_are_asked_for_and_torch_has_none(cluster: Cluster, tmp_path: Path) -> None:
    """Training on the cores instead would be slow, and nobody would know why."""
    site = tmp_path / "site.sh"
    site.write_text("unset DS_ACCELERATOR\n")
    job = submit(cluster, tmp_path, "--nodes=1", "--gpus-per-node=2", GFRNN_SITE=str(site))
    assert job.wait() == "FAILED", job.output()
    has = "0 can be seen" if torch.version.cuda else "is built without CUDA; install its CUDA build"
    assert has in job.output()


def test_a_study_is_an_array(cluster: Cluster, tmp_path: Path) -> None:
    points = tmp_path / "points.txt"
    points.write_text(
        f"# rows\n--rows 5 --output-dir '{tmp_path}/a point'\n\n--rows 3 --output-dir {tmp_path}/b  # three\n"
    )
    study = ROOT / "slurm/study.sbatch"
    flags = [*SMALL, "--max-updates", "10"]
    job = cluster.sbatch(tmp_path, "--array=1-3%1", study, points, *[f for f in flags if f not in ("--rows", "5")])
    wait(lambda: not cluster.client("squeue", "-h").strip(), 120, lambda: cluster.client("squeue"))
    said = {number: (tmp_path / f"out-{number}").read_text() for number in (1, 2)}
    for number, (name, rows) in enumerate({"a point": 5, "b": 3}.items(), 1):
        assert summary(tmp_path / name)["finished"], said[number]
        assert summary(tmp_path / name)["characters"] == 10 * rows * 12
    shown = cluster.client("scontrol", "show", "job", "-o", job.number)
    tasks = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in shown.splitlines()]
    tasks.sort(key=lambda task: task["ArrayTaskId"])
    assert [task["JobState"] for task in tasks] == ["COMPLETED", "COMPLETED", "FAILED"]
    for before, after in itertools.pairwise(tasks):
        assert before["EndTime"] <= after["StartTime"]  # one at a time
    assert "points.txt has no point 3: sbatch --array=1-2" in (tmp_path / "out-3").read_text()


def test_a_point_goes_on_by_itself(cluster: Cluster, expected: dict[int, float], tmp_path: Path) -> None:
    """Also the one whose number is the array's: a requeue by that number would be of all points."""
    points = tmp_path / "points.txt"
    points.write_text(f"--output-dir {tmp_path}/1\n--output-dir {tmp_path}/2\n")
    job = cluster.sbatch(tmp_path, "--array=1-2", ROOT / "slurm/study.sbatch", points, *FLAGS)
    for number in (1, 2):
        under_way(job, tmp_path / str(number))
    (run,) = (folder for folder in (tmp_path / "1", tmp_path / "2") if (folder / f".job-{job.number}").exists())
    job.signal_rank(run, 0, signal.SIGKILL)
    for number in (1, 2):
        wait((tmp_path / str(number) / "summary.json").exists, 120, (tmp_path / f"out-{number}").read_text)
    wait(lambda: not cluster.client("squeue", "-h").strip(), 60, lambda: cluster.client("squeue"))
    causes = {folder.name: [end["cause"] for end in job.ends(folder)] for folder in (tmp_path / "1", tmp_path / "2")}
    assert sorted(causes.values()) == [["failed", "finished"], ["finished"]]
    for number in (1, 2):
        check(tmp_path / str(number), expected)


def test_a_chain_is_trained_scored_exported_and_served(
    cluster: Cluster, expected: dict[int, float], tmp_path: Path
) -> None:
    run, submit_py = tmp_path / "run", ROOT / "slurm/submit.py"
    flags = [*FLAGS, "--output-dir", run]
    after = f"--output={tmp_path}/out-%x"
    head = ["chain", "--nodes=2", f"--output={tmp_path}/out", f"--after={after}"]
    said = cluster.client(sys.executable, submit_py, *head, "--", *flags)
    kinds = dict(line.split() for line in said.splitlines())
    jobs = [Job(cluster, kinds[kind], tmp_path / out) for kind, out in CHAIN.items()]
    assert [job.state for job in jobs[1:]] == ["PENDING", "PENDING"]
    assert [job.wait() for job in jobs] == ["COMPLETED"] * 3, [job.output() for job in jobs]
    check(run, expected)
    scored = json.loads((tmp_path / "run.json").read_text())
    assert scored["test_bpc"] == pytest.approx(summary(run)["test_bpc"], abs=1e-3)

    serving = cluster.sbatch(tmp_path, ROOT / "slurm/serve.sbatch", tmp_path / "run.onnx")
    wait(lambda: "serving run (2 x 16, fp32)" in serving.output(), 60, serving.output)
    found = re.search(r"the key is in (\S+): curl .* (http://\S+)/v1/models", serving.output())
    assert found is not None
    key_file, address = Path(found[1]), found[2]
    try:
        assert key_file.stat().st_mode & 0o777 == 0o600
        ask = urllib.request.Request(
            f"{address}/v1/completions",
            json.dumps({"model": "run", "prompt": "The ", "max_tokens": 5, "seed": 1}).encode(),
            {"Authorization": f"Bearer {key_file.read_text()}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(ask, timeout=30) as answer:
            assert len(json.load(answer)["choices"][0]["text"]) >= 1
        del ask.headers["Authorization"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(ask, timeout=30)
    finally:
        key_file.unlink()
    cluster.client("scancel", serving.number)
    assert serving.wait() == "CANCELLED"


def test_a_chain_ends_where_its_training_fails(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"All work and no play. " * 50)  # what submit.py does not look at
    short = ["--corpus-file", tmp_path / "text", "--steps", "900"]
    flags = [*FLAGS, *short, "--output-dir", tmp_path / "run"]
    head = ["chain", "--nodes=2", f"--output={tmp_path}/out", f"--after=--output={tmp_path}/out-%x"]
    said = cluster.client(sys.executable, ROOT / "slurm/submit.py", *head, "--", *flags)
    kinds = dict(line.split() for line in said.splitlines())
    train, evaluate, export = (Job(cluster, kinds[kind], tmp_path / out) for kind, out in CHAIN.items())
    assert train.wait() == "FAILED"
    assert "is too short for 5 rows x 900 steps" in train.output()
    assert (train.shown()["ExitCode"], train.shown()["Restarts"]) == ("2:0", "0")  # a user's error, so not tried again
    assert [job.wait() for job in (evaluate, export)] == ["CANCELLED", "CANCELLED"]


# Warnings -----------------------------------------------------------------------------------------------------------


def test_a_warning_ends_with_a_checkpoint_and_the_job_goes_on(
    cluster: Cluster, expected: dict[int, float], tmp_path: Path
) -> None:
    """With MLflow: one run, every update once."""
    run = tmp_path / "run"
    flags = [flag for flag in FLAGS if flag != "--no-mlflow"]
    job = cluster.sbatch(tmp_path, "--nodes=2", TRAIN, *flags, "--output-dir", run)
    under_way(job, run)
    cluster.client("scancel", "--batch", "--signal=USR1", job.number)
    wait(lambda: job.shown()["Restarts"] == "1", 60, job.output)
    stopped = job.ends(run)[0]
    assert (stopped["cause"], stopped["step"]) == ("stopped", max(losses(run)))
    assert job.wait() == "COMPLETED", job.output()
    check(run, expected)
    assert f"SIGUSR1 from SLURM at update {stopped['step']} of {UPDATES}; the same command goes on" in job.output()
    assert f"resumed at update {stopped['step']}" in job.output()
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = (each for each in client.search_experiments() if each.name == "gfrnn")
    (found,) = client.search_runs([experiment.experiment_id])
    steps = [point.step for point in client.get_metric_history(found.info.run_id, "train_bpc")]
    assert sorted(steps) == list(range(1, UPDATES + 1))
    measured = client.get_metric_history(found.info.run_id, "network_bytes_per_second")
    assert [point.step for point in measured] == [0, stopped["step"]]  # by the preflight of each start


def test_a_job_of_a_higher_partition_comes_between(
    cluster: Cluster, expected: dict[int, float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, "--nodes=2", "--exclusive")
    under_way(job, run)
    (tmp_path / "other").mkdir()
    other = cluster.sbatch(tmp_path / "other", "--partition=high", "--nodes=2", "--exclusive", "--wrap", "sleep 3")
    assert other.wait() == "COMPLETED"
    assert job.ends(run)[0]["cause"] == "stopped", job.output()
    assert job.wait() == "COMPLETED", job.output()
    check(run, expected)


def test_a_time_limit_is_one_of_many(cluster: Cluster, tmp_path: Path) -> None:
    """SLURM's own warning, some time before the end, so that longer trainings go on job after job."""
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, "--nodes=1", "--time=1", "--signal=B:USR1@20", training=ENDLESS)
    wait(lambda: job.shown()["Restarts"] == "1", 120, job.output)
    stopped = job.ends(run)[0]
    assert (stopped["cause"], stopped["why"]) == ("stopped", "with a checkpoint")
    assert "SIGUSR1 from SLURM: a checkpoint, and then a requeue" in job.output()
    wait(lambda: f"resumed at update {stopped['step']}" in job.output(), 60, job.output)
    assert "DUE TO TIME LIMIT" not in job.output()


def test_a_job_that_is_cancelled_saves_and_stays_so(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, "--nodes=1", training=ENDLESS)
    under_way(job, run)
    cluster.client("scancel", job.number)
    assert job.wait() == "CANCELLED"
    time.sleep(3)
    assert (job.state, job.shown()["Restarts"]) == ("CANCELLED", "0")
    assert "the job was cancelled (COMPLETING): not requeued" in job.output()
    assert (run / "checkpoints/latest").exists()


# What breaks --------------------------------------------------------------------------------------------------------


def test_a_killed_rank_is_named_and_its_node_left_out(
    cluster: Cluster, expected: dict[int, float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, "--nodes=1-2")
    under_way(job, run)
    rank = job.signal_rank(run, 1, signal.SIGKILL)
    wait(lambda: "requeued: " in job.output(), 60, job.output)
    assert "failed: rank 1 on node2 ended without a word: killed, or its node died, at update " in job.output()
    assert f"process {rank['pid']})" in job.output()
    assert "node2: excluded" in job.output()
    assert job.wait() == "COMPLETED", job.output()
    check(run, expected)
    assert summary(run)["world_size"] == 1  # on what is left
    assert job.rank(run, 0, restart=1)["node"] == "node1"


def test_a_stopped_rank_is_noticed(cluster: Cluster, expected: dict[int, float], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, "--nodes=2")
    under_way(job, run)
    job.signal_rank(run, 1, signal.SIGSTOP)
    wait(lambda: "requeued: " in job.output(), 60, job.output)
    assert "failed: rank 1 on node2 gave no sign for 6 s" in job.output()
    assert "node2: not excluded, as the job needs 2 nodes, and of others like it there are: node1" in job.output()
    assert job.wait() == "COMPLETED", job.output()
    check(run, expected)
    assert summary(run)["world_size"] == 2


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ("node2", "failed: rank 1 on node2 gave no sign for 6 s"),
        # with the batch script: SLURM requeues the job, and its next start says whom it heard of least
        ("node1", "SLURM ended restart 0 by itself: a node was lost; rank 0 on node1 fell silent first"),
    ],
    ids=["the-second", "the-first"],
)
def test_a_node_that_dies(node: str, said: str, cluster: Cluster, expected: dict[int, float], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = submit(cluster, tmp_path, "--nodes=1-2")
    under_way(job, run, 25)  # with a checkpoint, and far from the end
    cluster("kill-node", node)
    assert "finished" not in job.output()
    try:
        assert job.wait() == "COMPLETED", job.output()
    finally:
        cluster("start-node", node)
    assert said in job.output()
    check(run, expected)
    assert summary(run)["world_size"] == 1


def test_only_the_newest_restart_writes(cluster: Cluster, tmp_path: Path) -> None:
    """A node whose slurmd dies is lost to SLURM, and its processes train on beside the job's next start."""
    run, updates = tmp_path / "run", 20_000
    flags = [*SMALL, "--max-updates", str(updates), "--checkpoint-every", "500", "--valid-every", "0"]
    job = submit(cluster, tmp_path, "--nodes=1", training=flags)
    under_way(job, run)
    first = job.rank(run, 0)
    cluster("kill-slurmd", first["node"])
    alive = ["in", first["node"], "sh", "-c", f"kill -0 {first['pid']} 2>/dev/null && echo alive || echo gone"]
    wait(lambda: job.shown()["Restarts"] == "1", 60, job.output)
    assert "alive" in cluster(*alive)  # a node that SLURM has lost, and that lives
    wait(lambda: "resumed at update" in job.output(), 60, job.output)
    wait(lambda: "gone" in cluster(*alive), 60, job.output)
    cluster("start-node", first["node"])
    assert job.rank(run, 0, restart=1)["node"] != first["node"]
    ended = {"kind": "taken over", "reason": f"restart 1 of job {job.number} trains in {run} now"}
    assert job.rank(run, 0)["ended"] == ended  # what it prints has no way out any more
    cluster.client("scancel", "--batch", "--signal=USR1", job.number)
    wait(lambda: job.shown()["Restarts"] == "2", 60, job.output)
    cluster.client("scancel", job.number)
    job.wait()
    steps = [line["step"] for line in metrics(run) if "train_bpc" in line]
    assert steps == list(range(1, len(steps) + 1))  # none twice, none torn


def test_three_failures_without_a_checkpoint_are_enough(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*SMALL, "--max-updates", "20000", "--checkpoint-every", "0", "--valid-every", "0"]
    job = submit(cluster, tmp_path, "--nodes=1", training=flags)
    for restart in range(3):
        wait(partial(is_training, job, run, restart), 90, job.output)
        job.signal_rank(run, 0, signal.SIGKILL, restart)
    assert job.wait() == "FAILED", job.output()
    assert job.shown()["Restarts"] == "2"
    last = job.output().splitlines()[-1]
    assert "given up: failed 3 times before the first checkpoint; the last time: rank 0 on node" in last


# A cut link ---------------------------------------------------------------------------------------------------------


def test_a_link_is_cut_and_mended(expected: dict[int, float], tmp_path: Path) -> None:
    """Briefly: nothing is lost. For long: the job says so, and goes on when the nodes are back."""
    with tempfile.TemporaryDirectory(prefix="gfrnn-") as folder, Cluster(Path(folder) / "c", "net") as cluster:
        run = tmp_path / "run"
        job = submit(cluster, tmp_path, "--nodes=2")
        under_way(job, run, 30)
        assert "node2 (10.86.0.12 on eth0)" in job.output()
        cluster("cut", "node2")
        before = lines(run)
        time.sleep(3)
        assert lines(run) <= before + 2
        cluster("mend", "node2")
        wait(lambda: lines(run) > before + 10, 60, job.output)
        assert job.shown()["Restarts"] == "0"
        cluster("cut", "node2")
        wait(lambda: "a GPU that hangs, or a cut network between node1 and node2" in job.output(), 120)
        cluster("mend", "node2")
        assert job.wait() == "COMPLETED", job.output()
        check(run, expected)
