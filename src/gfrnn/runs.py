"""What a run leaves on disk, and how it is found and loaded again. Knows no launcher and no training.

    DIR/config.json      settings, DeepSpeed config, git commit, versions
    DIR/metrics.jsonl    one JSON object a logged update or validation
    DIR/summary.json     how it ended
    DIR/checkpoints/step-00001000/   weights.safetensors averages.safetensors optimizer.safetensors state.safetensors
                                     trainer.json
    DIR/checkpoints/latest, best     the name of a checkpoint folder
    DIR/.lock, .owner.json           who trains in it now

A checkpoint is the same whatever the number of processes and the ZeRO stage: full fp32 tensors by parameter name, the
carried state by global row. It is written beside its place, synced and renamed, and only then named in `latest`, so a
kill at any instant leaves a usable one.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfrnn import __version__, shipped
from gfrnn.config import Settings, Stopped, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from gfrnn.nn import Model

TensorsByName = dict[str, "Tensor"]

_STEP = re.compile(r"step-\d{8,}")
_HAS_AVERAGES = "has_averages"  # in trainer.json: whether there must be averages.safetensors beside it
_RESULTS = ("test_bpc", "valid_bpc", "best_step", "sample")  # in summary.json of a run that finished
_SECONDS_FOR_ANOTHER_TO_END = 10.0  # a killed launcher's ranks save a last checkpoint

# What may differ when a run is started again in its folder: how the work is spread, and how long it goes on.
_FREE = {
    "": {"output_dir", "start_from", "deepspeed", "dry_run", "prepare", "preset"},
    "data": {"data_dir", "corpus_file"},
    "batch": {"accumulation", "recompute"},
    "communication": None,
    "run": None,  # all of it
}


@dataclass
class Checkpoint:
    """Everything that must survive a restart."""

    weights: TensorsByName
    """fp32, by parameter name."""
    optimizer: dict[str, TensorsByName] = field(default_factory=dict)
    """State of the optimizer: e.g. exp_avg -> parameter name -> fp32 tensor."""
    averages: TensorsByName | None = None
    """Averaged weights, fp32."""
    state: TensorsByName = field(default_factory=dict)
    """Carried state by global row: h, c [L, R, H]."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Position, schedule, best result, ... plain JSON values."""
    is_shipped: bool = False
    """A model that ships: rounded weights, and second moments alone of the optimizer. No run goes on from it."""

    @property
    def best_weights(self) -> TensorsByName:
        """What validation, sampling and export use: the averages where there are any."""
        return self.averages if self.averages is not None else self.weights


class TakenOver(Stopped):
    """A newer restart of the same job writes to the run folder now: this process must not, and ends."""


class RunFolder:
    """One run's folder. After `lock`, what writes raises TakenOver once a newer restart has taken the folder."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._owner_path = self.path / ".owner.json"
        self._claim: dict[str, Any] | None = None  # in .owner.json while this process owns the folder
        self.config_path = self.path / "config.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.summary_path = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"

    # -- settings

    def read_settings(self) -> Settings:
        """The settings the run was started with; raises UserError if there is no run here."""
        return Settings.from_json(_read_json(self.config_path, "settings")["settings"])

    def check(self, settings: Settings, corpus_md5: str | None = None) -> bool:
        """Whether a run is here already; raises UserError if it is one of other settings or another text.

        What a start that failed before it learned has left is no run: other settings may have the folder.
        """
        if not self.config_path.exists():
            # a kill in create() leaves a hidden file, which does not make it somebody else's folder
            if self.path.is_dir() and any(not entry.name.startswith(".") for entry in self.path.iterdir()):
                raise UserError(
                    f"--output-dir {self.path} has files in it but no config.json of a run; give an empty or new folder"
                )
            return False
        config = _read_json(self.config_path, "settings", "corpus_md5")
        differences = _differences(config, settings)
        if not self._has_learned():
            return False
        if differences:
            name, was, now = differences[0]
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            raise UserError(
                f"--output-dir {self.path} holds a run with {name} = {was}, not {now}{more}; "
                "give another folder, or the same settings to resume"
            )
        if corpus_md5 is not None and config["corpus_md5"] not in (None, corpus_md5):
            raise UserError(
                f"--output-dir {self.path} holds a run on another text (MD5 {config['corpus_md5'][:8]}..., "
                f"now {corpus_md5[:8]}...); give another folder, or the same text to resume"
            )
        return True

    def _has_learned(self) -> bool:
        """Whether an update is on record here."""
        if self.named_checkpoint("latest") is not None or (self.read_summary() or {}).get("finished"):
            return True
        return any(line["step"] > 0 for line in self.read_metrics())

    def check_writable(self) -> None:
        """Raises UserError if a run could not be kept here; makes nothing."""
        mend = "give another --output-dir"
        for wanted in (self.path.absolute(), self.checkpoints.absolute()):
            there = next(path for path in (wanted, *wanted.parents) if os.path.lexists(path))
            if not there.is_dir():
                raise UserError(f"--output-dir {self.path}: {there} is not a folder; {mend}")
            if not os.access(there, os.W_OK | os.X_OK):
                raise UserError(f"--output-dir {self.path}: {there} may not be written to; {mend}")
        try:
            str(self.path.absolute()).encode()  # safetensors would write there, but not read
        except UnicodeEncodeError as error:
            raise UserError(f"--output-dir {self.path}: its name is not UTF-8; {mend}") from error

    def lock(self) -> None:
        """Keeps other trainings out of this folder until this process ends, however it does; makes the folder.

        One that is about to end is waited for; raises UserError for one that goes on. A later restart of the same job
        (the environment's GFRNN_RESTART is JOB.N) takes the folder from an earlier one, whose processes may live on at
        a node that the cluster has lost, and even if they stand still; raises TakenOver in the earlier one.

        On a file system without flock (Lustre's noflock) others are not kept out, and a later one takes the folder
        too: says so on stderr.
        """
        from filelock import FileLock, Timeout

        job, _, number = os.environ.get("GFRNN_RESTART", "").partition(".")
        claim: dict[str, Any] = {"token": uuid.uuid4().hex, "job": job, "restart": int(number or 0)}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # the kernel's, freed when its holder dies, or none: a file instead of it would be left behind
            self._lock = FileLock(self.path / ".lock", fallback_to_soft=False)
            same_job = self._is_same_job(claim)
            if same_job:  # at once, for the earlier one to find
                write_json(self._owner_path, claim)
            try:
                self._lock.acquire(timeout=_SECONDS_FOR_ANOTHER_TO_END)
            except Timeout:
                if not same_job:
                    raise
            except OSError as error:
                if error.errno != errno.ENOSYS:
                    raise
                where = f"note: --output-dir {self.path} is on a file system without locks"
                print(f"{where}: a training that is started there later takes it from this one", file=sys.stderr)
            self._is_same_job(claim)  # a third may have come in the meantime
            write_json(self._owner_path, claim)
        except Timeout as error:
            raise UserError(
                f"--output-dir {self.path} is being trained in by another process; wait for it, or give another folder"
            ) from error
        except OSError as error:
            raise UserError(f"--output-dir {self.path}: {error.strerror}; give another folder") from error
        self._claim = claim

    def _is_same_job(self, claim: dict[str, Any]) -> bool:
        """Whether the folder is an earlier restart's of this job. Raises TakenOver if it is a later one's."""
        owner = self._owner()
        if not claim["job"] or owner.get("job") != claim["job"]:
            return False
        if owner["restart"] > claim["restart"]:
            raise TakenOver(f"restart {owner['restart']} of job {owner['job']} trains in {self.path} now")
        return True

    def check_owned(self) -> None:
        """Raises TakenOver if this process has locked the folder and a newer restart has taken it since."""
        claim, owner = self._claim, self._owner()
        if claim is None or not owner or owner["token"] == claim["token"]:
            return
        if self._is_same_job(claim):  # an earlier one has claimed the folder in the same moment
            write_json(self._owner_path, claim)
            return
        raise TakenOver(f"restart {owner['restart']} of job {owner['job']} trains in {self.path} now")

    def _owner(self) -> dict[str, Any]:
        try:
            return _read_json(self._owner_path, "token", "job", "restart")
        except (UserError, OSError):  # none yet, or damaged: the lock still tells
            return {}

    def create(self, settings: Settings, ds_config: dict[str, Any], corpus_md5: str) -> None:
        """Makes the folder and writes config.json (again, if the run goes on under another DeepSpeed config)."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self.config_path.exists():
            config = _read_json(self.config_path, "settings", "corpus_md5")
            if _differences(config, settings) or config["corpus_md5"] != corpus_md5:  # a failed start began another run
                (self.path / "mlflow.json").unlink(missing_ok=True)
        write_json(
            self.config_path,
            {
                "settings": settings.to_json(),
                "deepspeed": ds_config,
                "corpus_md5": corpus_md5,
                "git_commit": git_commit(),
                "versions": versions(),
            },
        )
        self.checkpoints.mkdir(exist_ok=True)

    # -- metrics

    def truncate_metrics(self, step: int) -> None:
        """Drops the lines after `step` (and a torn last one): the resumed run writes them again."""
        self.check_owned()
        if self.metrics_path.exists():
            kept = [json.dumps(values) + "\n" for values in self.read_metrics() if values["step"] <= step]
            replace_file(self.metrics_path, "".join(kept).encode())

    def append_metrics(self, values: dict[str, Any]) -> None:
        """One line: `values` (which have a "step") and the time of day."""
        self.check_owned()
        with self.metrics_path.open("a") as f:
            f.write(json.dumps({**values, "time": time.time()}) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every line, in order; without a last one that a kill tore or that is being written."""
        lines = self.metrics_path.read_bytes().split(b"\n") if self.metrics_path.exists() else []
        found: list[dict[str, Any]] = []
        for number, line in enumerate(lines[:-1], 1):  # after the last newline there is nothing, or a torn line
            try:
                found.append(json.loads(line))
                int(found[-1]["step"])
            except (ValueError, LookupError, TypeError) as error:
                raise UserError(f"{self.metrics_path}:{number}: damaged; delete that line") from error
        return found

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Says how the run ended."""
        self.check_owned()
        write_json(self.summary_path, summary)

    def read_summary(self) -> dict[str, Any] | None:
        """How the run ended; None while it has not. Raises UserError if that is damaged."""
        if not self.summary_path.exists():
            return None
        summary = _read_json(self.summary_path, "finished", "step", "without_best")
        return _read_json(self.summary_path, *_RESULTS) if summary["finished"] else summary

    def mlflow_run_id(self) -> str | None:
        """The MLflow run that follows this folder; None if none does yet."""
        followed = self.path / "mlflow.json"
        return _read_json(followed, "run_id")["run_id"] if followed.exists() else None

    # -- checkpoints

    def named_checkpoint(self, name: str) -> Path | None:
        """The folder that `latest` or `best` names; None if there is none yet. Raises UserError if it is not there.

        Without `latest` (lost, or killed before it was first written) it is the last step's.
        """
        pointer = self.checkpoints / name
        if not pointer.exists():
            return max(self.checkpoints.glob("step-*"), default=None) if name == "latest" else None
        named = pointer.read_bytes().decode(errors="replace").strip()
        if not _STEP.fullmatch(named) or not (self.checkpoints / named).is_dir():
            raise UserError(f"{pointer} names {named!r}, no checkpoint there; write the name of another one into it")
        return self.checkpoints / named

    def save(self, checkpoint: Checkpoint, step: int, *, best: bool, keep_last: int) -> Path:
        """Writes a checkpoint so that a kill at any instant leaves a usable latest one; removes old ones."""
        self.check_owned()
        target = self.checkpoints / f"step-{step:08d}"
        for stale in self.checkpoints.glob(".writing-*"):
            shutil.rmtree(stale)
        if self.named_checkpoint("latest") == target:  # this very step again: only what is known about it is new
            _save_trainer(target, checkpoint)
        else:
            writing = self.checkpoints / f".writing-{target.name}"
            writing.mkdir()
            save_tensors(writing / "weights.safetensors", checkpoint.weights)
            if checkpoint.averages is not None:
                save_tensors(writing / "averages.safetensors", checkpoint.averages)
            flat = {f"{key}/{name}": t for key, named in checkpoint.optimizer.items() for name, t in named.items()}
            save_tensors(writing / "optimizer.safetensors", flat)
            save_tensors(writing / "state.safetensors", checkpoint.state)
            _save_trainer(writing, checkpoint)
            sync(writing)
            self.check_owned()  # again: writing takes its time
            if target.exists():  # a kill came between its renaming and `latest`, and the run may have gone another way
                self._remove(target)
            writing.rename(target)
            sync(self.checkpoints)
        if best:  # before `latest`, whose trainer.json says which step is the best
            replace_file(self.checkpoints / "best", target.name.encode())
        replace_file(self.checkpoints / "latest", target.name.encode())
        self._remove_old(keep_last)
        return target

    def _remove_old(self, keep_last: int) -> None:
        found = sorted(path for path in self.checkpoints.iterdir() if _STEP.fullmatch(path.name))  # not a user's copies
        keep = {*found[-keep_last:], self.named_checkpoint("latest"), self.named_checkpoint("best")}
        for path in found:
            if path not in keep:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        # renamed first: a half-removed folder must not look like a checkpoint
        shutil.rmtree(path.rename(self.checkpoints / f".writing-old-{path.name}"))


# ------------------------------------------------------------------------------------------ finding and loading


def find_checkpoint(run: str | Path) -> Path:
    """The folder that RUN means: a run folder's best (else latest) checkpoint, a checkpoint, or a model that ships.

    A path that is there comes before a name. Raises UserError if there is none.
    """
    path = shipped.find_shipped(run) or Path(run)
    if (path / "trainer.json").exists() or shipped.is_shipped(path):
        return path
    if not path.is_dir():
        raise UserError(f"{run} is neither a run folder nor a checkpoint: no such folder{shipped.names_known(run)}")
    folder = RunFolder(path)
    found = folder.named_checkpoint("best") or folder.named_checkpoint("latest")
    if found is None:
        raise UserError(f"{run} has no checkpoint yet: is it the folder given to train.py as --output-dir?")
    return found


def checkpoint_origin(path: Path) -> tuple[Settings, str | None]:
    """What a checkpoint was trained with: settings, MD5 of the text. Raises UserError if the file is damaged."""
    trainer = shipped.read_config(path) if _is_shipped(path) else _read_json(path / "trainer.json", "settings")
    return Settings.from_json(trainer["settings"]), trainer.get("corpus_md5")


def checkpoint_step(path: Path) -> int:
    """Updates after which a checkpoint was written. Raises UserError if the file is damaged."""
    if _is_shipped(path):
        return int(shipped.read_config(path)["step"])
    return int(_read_json(path / "trainer.json", "position")["position"]["step"])


def checkpoint_results(path: Path) -> tuple[str, str, dict[str, float]]:
    """(the run as MLflow, else its folder calls it; the checkpoint's name; the run's BPC, valid and test if known).

    Of a model that ships: its own name, and its own BPC.
    """
    if _is_shipped(path):
        config = shipped.read_config(path)
        return path.resolve().name, f"step-{config['step']:08d}", config["bpc"]
    folder = RunFolder(path.parent.parent)
    summary = folder.read_summary() or {}
    bpc = {name: summary[f"{name}_bpc"] for name in ("valid", "test") if summary.get(f"{name}_bpc") is not None}
    return folder.mlflow_run_id() or folder.path.resolve().name, path.resolve().name, bpc


def _is_shipped(path: Path) -> bool:
    return not (path / "trainer.json").exists() and shipped.is_shipped(path)


def load_checkpoint(path: Path, *, weights_only: bool = False) -> Checkpoint:
    """Reads a checkpoint folder; weights_only leaves the optimizer's and the carried state out.

    Raises UserError if a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    ships = _is_shipped(path)
    mend = "install gfrnn again, or ship the model again" if ships else f"start from another one under {path.parent}"

    def tensors(name: str) -> TensorsByName:
        try:
            (path / name).open("rb").close()  # safetensors calls every failure a missing file
            return load_file(path / name)
        except (SafetensorError, FileNotFoundError) as error:
            raise UserError(f"checkpoint {path / name} is missing or damaged ({error}); {mend}") from error

    if ships:
        config = shipped.read_config(path)
        weights, moments = shipped.unpack(tensors(shipped.WEIGHTS))
        optimizer = {"exp_avg_sq": moments} if moments and not weights_only else {}
        checkpoint = Checkpoint(weights, optimizer, trainer=config, is_shipped=True)
        _check_content(checkpoint, path)
        return checkpoint
    trainer = _read_json(path / "trainer.json", "settings", _HAS_AVERAGES)
    has_averages = trainer.pop(_HAS_AVERAGES)
    checkpoint = Checkpoint(weights=tensors("weights.safetensors"), trainer=trainer)
    if has_averages:
        checkpoint.averages = tensors("averages.safetensors")
    if not weights_only:
        for full_name, tensor in tensors("optimizer.safetensors").items():
            key, _, name = full_name.partition("/")
            checkpoint.optimizer.setdefault(key, {})[name] = tensor
        checkpoint.state = tensors("state.safetensors")
    _check_content(checkpoint, path)
    return checkpoint


def _check_content(checkpoint: Checkpoint, path: Path) -> None:
    """Raises UserError if a file is of another checkpoint than weights.safetensors."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.weights.items()}
    copies = {"averages": [checkpoint.averages] if checkpoint.averages is not None else []}
    copies["optimizer"] = list(checkpoint.optimizer.values())
    for file, found in copies.items():
        for tensors in found:
            if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
                raise UserError(f"{path / file}.safetensors is not of the model in weights.safetensors: damaged?")


def load_weights(model: Model, weights: TensorsByName, where: Path | str) -> None:
    """Loads weights by name into a model; raises UserError if they are another model's."""
    own = model.state_dict()
    for name in sorted({*own, *weights}):
        if name not in weights or name not in own or weights[name].shape != own[name].shape:
            has = tuple(weights[name].shape) if name in weights else "nothing"
            wants = tuple(own[name].shape) if name in own else "nothing"
            raise UserError(f"checkpoint {where} is of another model: {name} is {has} there and {wants} here")
    model.load_state_dict(weights)


def load_model(run: str | Path, dtype: str | None = None, *, averages: bool = True) -> tuple[Model, Settings, Path]:
    """The model of RUN at its best, its settings and the checkpoint's folder. averages: of the weights, where kept."""
    from gfrnn.nn import build_model

    path = find_checkpoint(run)
    checkpoint = load_checkpoint(path, weights_only=True)
    weights = checkpoint.best_weights if averages else checkpoint.weights
    settings = Settings.from_json(checkpoint.trainer["settings"])
    if unfit := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise UserError(f"{path} cannot be used: {unfit[0]} is not finite")
    model = build_model(settings, dtype)
    load_weights(model, weights, path)
    return model.eval(), settings, path


# ------------------------------------------------------------------------------------------------------- helpers


def _differences(config: dict[str, Any], settings: Settings) -> list[tuple[str, Any, Any]]:
    """(flag, value in config.json, value now) of settings that must not change in a run."""
    then, now = Settings.from_json(config["settings"]).to_json(), settings.to_json()
    found: list[tuple[str, Any, Any]] = []
    for name in {**then, **now}:
        old, new = then.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            free = _FREE.get(name, set())
            if free is not None:
                found += [
                    (f"--{key.replace('_', '-')}", old.get(key), new.get(key))
                    for key in {**old, **new}
                    if old.get(key) != new.get(key) and key not in free
                ]
        elif old != new and name not in (_FREE[""] or ()):
            found.append((f"--{name.replace('_', '-')}", old, new))
    return found


def _read_json(path: Path, *needed: str) -> dict[str, Any]:
    """An object that has the names needed; raises UserError."""
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: not a run of gfrnn, or an incomplete copy of one") from error
    except ValueError as error:  # not JSON, or not even text
        raise UserError(f"{path} is damaged: not valid JSON ({error})") from error
    if not isinstance(values, dict) or any(name not in values for name in needed):
        raise UserError(f"{path} was not written by gfrnn: it has no {' or '.join(map(repr, needed))}")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Atomically, indented."""
    replace_file(path, (json.dumps(values, indent=2) + "\n").encode())


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file so that at any instant either the old or the new content is there."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        with beside.open("wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write does not say which file
    beside.rename(path)
    sync(path.parent)


@contextlib.contextmanager
def hidden_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to make it in before it is put in place; removed at the end.

    Those for the same path that killed programs have left are removed first: what is under way is locked.
    """
    from filelock import FileLock

    beginning = f".{path.name}.making-"
    for left in path.parent.glob(f"{glob.escape(beginning)}*"):
        with contextlib.suppress(OSError), FileLock(left / "lock").acquire(timeout=0):  # in use, or another user's
            shutil.rmtree(left, ignore_errors=True)
    made = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.new-"))
    try:
        with FileLock(made / "lock"):  # by another name until then, or it would be taken for left
            made = made.rename(path.parent / (beginning + made.name.rpartition("-")[2]))
            yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)  # unlocked, another program may be about it too


def _save_trainer(folder: Path, checkpoint: Checkpoint) -> None:
    write_json(folder / "trainer.json", {**checkpoint.trainer, _HAS_AVERAGES: checkpoint.averages is not None})


def save_tensors(path: Path, tensors: TensorsByName) -> None:
    """A safetensors file, synced. Raises OSError where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))  # a full disk, say: raised without an errno
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it private; the folder has the user's umask
    sync(path)


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's entries, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def git_commit() -> str | None:
    """The commit of the source tree, with '+' if it has changes; None outside a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=here.parent, capture_output=True, text=True, check=True).stdout.strip()

    here = Path(__file__)
    try:
        git("ls-files", "--error-unmatch", here.name)  # fails where this is installed inside another project's checkout
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def code_hash() -> str:
    """Of this package's own files, whatever git knows of them."""
    found, home = hashlib.sha256(), Path(__file__).parent
    for path in sorted(home.rglob("*.py")):
        found.update(str(path.relative_to(home)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Versions of what a result depends on, as far as it is installed."""
    import importlib.metadata
    import platform

    found = {"python": platform.python_version(), "gfrnn": __version__}
    for name in ("torch", "deepspeed", "datasets", "mlflow", "safetensors", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
