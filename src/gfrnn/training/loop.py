"""The training loop: batches in; updates, validations and checkpoints out. One Trainer a process.

What survives a restart is what checkpoint.py gathers; everything random is a function of (seed, update).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from typing import Any, NamedTuple, NoReturn

import torch
import torch._dynamo  # torch.optim imports it at its first use: here, so that it does not count as the run's memory
import torch.distributed as dist

from gfrnn import cli
from gfrnn.config import RunFailed, Settings, Stopped, UserError
from gfrnn.data import Corpus
from gfrnn.nn import Noise, build_model, cpu_kernels
from gfrnn.runs import RunFolder, find_checkpoint, load_checkpoint, load_weights
from gfrnn.training import shards as sharding
from gfrnn.training.checkpoint import (
    Position,
    Window,
    best_weights,
    gather_checkpoint,
    restore,
    write_checkpoint,
)
from gfrnn.training.compression import make_exchange
from gfrnn.training.ds_config import stage_of
from gfrnn.training.engine import build_optimizer, initialize
from gfrnn.training.flops import gemm_peak
from gfrnn.training.heartbeat import Heartbeat
from gfrnn.training.memory import peak_resident, resident
from gfrnn.training.noise_scale import NoiseScale, PartNorms
from gfrnn.training.profiling import UpdateProfiler
from gfrnn.training.progress import TrainingProgress
from gfrnn.training.schedule import ExplosionGuard, learning_rate
from gfrnn.training.stopping import StopFlag
from gfrnn.training.task import make_task

_NO_BEST: dict[str, Any] = {"best": {}, "best_step": 0, "without_best": 0}  # of a Position


class Done(NamedTuple):
    """An update, as all processes agree on it."""

    figures: dict[str, float]
    """Means of the global batch over its counted symbols: bpc is bits a symbol."""
    grad_norm: float
    """L2 norm of the global gradient before clipping."""
    rate: float
    stop: str | None
    """Why to stop, if so."""
    save: bool


class Trainer:
    """Trains one model on one corpus; `fit` does it all.

    Resumes from the run folder's latest checkpoint if there is one. The process group must be up.

    Args:
        settings, ds_config: checked and resolved. run: the folder. corpus: the task's. device: of this process.
        heart: told where this process is.
    """

    def __init__(
        self,
        settings: Settings,
        ds_config: dict[str, Any],
        run: RunFolder,
        corpus: Corpus,
        device: torch.device,
        heart: Heartbeat,
    ):
        self.settings, self.run, self.device, self.heart = settings, run, device, heart
        self.resident_before = resident()
        self.rank, self.world_size, self.stage = dist.get_rank(), dist.get_world_size(), stage_of(ds_config)
        optimization = settings.optimization
        self.task = make_task(settings, corpus, device)
        self.total = settings.run.max_updates or settings.run.max_epochs * self.task.updates_per_epoch
        self.stop = StopFlag(settings.run.time_limit)
        self.progress = TrainingProgress(self.total, 0, enabled=False)  # replaced when training begins

        own = run.named_checkpoint("latest")
        latest = find_checkpoint(settings.start_from) if own is None and settings.start_from is not None else own
        gathered = self.stage == 3  # weights are whole for the time of a call: graphs would keep them whole
        if gathered and device.type == "cuda":
            cli.say("note: at ZeRO stage 3 training runs without CUDA graphs, one kernel after another")
        model = build_model(settings, cuda="kernels" if gathered else "graphs")
        saved = None
        if latest is not None:
            saved = load_checkpoint(latest)
            load_weights(model, saved.weights, latest)  # before DeepSpeed makes its own copies
            if saved.is_shipped:  # weights are all that it has: a run begins with them
                saved = None
        # a plain copy for validation and sampling: neither ever touches the engine's weights
        self.plain_model = build_model(settings).to(device).eval()
        self.parameters = sum(p.numel() for p in model.parameters())
        objective = self.task.objective(model)
        self.engine = initialize(objective, build_optimizer(objective, optimization), ds_config)
        self.shards = sharding.Shards(self.engine)
        self.average: sharding.Average | None = None
        if optimization.average != "none":
            decay = optimization.average_decay if optimization.average == "ema" else None
            self.average = sharding.Average(self.shards, decay)
        averages = self.average.tensors if self.average is not None else []
        self.exchange = make_exchange(settings.communication, self.shards, averages)

        self.position = Position()
        if saved is not None:
            self.position = restore(saved, settings, self.shards, self.average, self.exchange)
            if own is None:  # another run's checkpoint
                self._begin_anew()
            elif self.position.best and _validates_otherwise(saved.trainer["settings"]["run"], settings):
                cli.say("note: validation is of other bytes or streams than before: the best is counted anew")
                self.position = dataclasses.replace(self.position, **_NO_BEST)
            self.task.load(saved)
        self.saved_step = self.position.step if saved is not None else -1
        self.last_save = time.monotonic()
        self.guard = ExplosionGuard(optimization.halve_on_explosion, self.position.rate_scale, self.position.mean_norm)
        measured = settings.run.noise_scale
        self.noise = NoiseScale(measured, self.position.noise_spread, self.position.noise_signal)
        self.parts = PartNorms(self.shards.parameters.values()) if measured else None
        self.last_norms: list[float] = []

    def _begin_anew(self) -> None:
        """Another run's best, and what its rate was halved to, are not this one's. Raises UserError at its end."""
        if self.position.step >= self.total:
            raise UserError(
                f"--start-from {self.settings.start_from} is at update {self.position.step}, and this run is to end at "
                f"{self.total}: give a larger --max-updates"
            )
        self.position = dataclasses.replace(self.position, **_NO_BEST, rate_scale=1.0)

    # ---------------------------------------------------------------------------------------------- the loop

    def fit(self) -> dict[str, Any]:
        """Trains to the end, tests the best weights and returns the summary. Raises Stopped or RunFailed.

        Call it while `stop` is listening.
        """
        run = self.settings.run
        self.peak = self._peak_flops()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # that product's operands are large
        self.progress = TrainingProgress(self.total, self.position.step, enabled=self.rank == 0)
        self.clock = time.monotonic()
        self._announce()
        trace = self.run.path / "profile" / f"from-{self.position.step:08d}-rank-{self.rank}.json.gz"
        profiler = UpdateProfiler(run.profile, trace, self.progress.say)
        with self.progress, contextlib.closing(profiler):
            while self.position.step < self.total and not self._gives_up():
                done = self.update()
                profiler.step()
                step = self.position.step
                if step % run.log_every == 0 or step == self.total:
                    self._log(done)
                due = bool(run.valid_every) and step % run.valid_every == 0
                if step == self.total or due:
                    self._validate(due=due)
                if done.stop or done.save or (run.checkpoint_every and step % run.checkpoint_every == 0):
                    self._save()
                if done.stop:
                    self._summarize("stopped")
                    raise Stopped(f"{done.stop} at update {step} of {self.total}; the same command goes on")
                if self._gives_up():
                    self.progress.say(f"no new best in {run.patience} validations: ending at update {step}")
            self._save()
            if not self.position.best:  # nothing was left to do, and nothing had been validated so
                self._validate()
        return self._finish()

    def _gives_up(self) -> bool:
        """Whether patience is at its end."""
        return 0 < self.settings.run.patience <= self.position.without_best

    def update(self) -> Done:
        """One update over the global batch."""
        begin = time.perf_counter()
        batch, task, step = self.settings.batch, self.task, self.position.step
        task.begin(step)
        self.position.window.overhead_seconds += time.perf_counter() - begin
        rate = self.guard.scale * task.rate_scale * learning_rate(self.settings.optimization, step, self.total)
        sharding.set_learning_rate(self.engine, rate)
        # DeepSpeed averages over processes and micro-batches; what is wanted is their sum over the global count
        count = task.count(step)
        divisor = count / (self.world_size * batch.accumulation)
        sums = torch.zeros(len(task.figures), device=self.device, dtype=torch.float64)
        norm = None
        self.engine.train()
        for micro in range(batch.accumulation):
            reading = time.perf_counter()
            with self.heart.phase("fetch"):
                inputs = task.read(step, micro)
            self.position.window.overhead_seconds += time.perf_counter() - reading
            noise = Noise(self.settings.seed, step, task.micro_rows(micro))
            with self.heart.phase("forward"):
                loss, micro_sums, state = self.engine(*inputs, noise, divisor)
            task.keep(micro, state)
            with self.heart.phase("backward"):
                self.engine.backward(loss)
            if self.parts is not None:
                # backward divides by the micro-batches once more
                self.parts.take(task.counted(step, micro), divisor * batch.accumulation)
            del loss  # it holds the activations, and the next micro-batch makes its own
            with self.heart.phase("optimizer"):
                norm = sharding.step(self.engine, self.exchange)
            sums += micro_sums
        assert norm is not None  # the last micro-batch is the boundary
        with self.heart.phase("agree"):
            done = self._agree(sums, count, norm, rate)
        self._check_finite(done)
        if self.guard.see(done.grad_norm):
            self.progress.say(f"update {step + 1}: gradient norm {done.grad_norm:.3g} exploded; learning rate halved")
        if self.average is not None and step >= self.settings.optimization.average_from:
            self.average.update()
        task.see(done.figures)
        self.position.step = self.heart.step = step + 1
        window, characters = self.position.window, task.characters(step)
        self.position.characters += characters
        window.figures = {name: window.figures.get(name, 0.0) + mean for name, mean in done.figures.items()}
        window.characters += characters
        window.flops += task.flops(step)
        window.updates += 1
        spent = time.perf_counter() - begin
        window.seconds += spent
        self.position.train_seconds += spent
        return done

    def _agree(self, sums: torch.Tensor, count: int, norm: torch.Tensor, rate: float) -> Done:
        """The update's one small all-reduce: the figures, why anyone wants to stop, whether the first wants to save."""
        minutes = self.settings.run.checkpoint_minutes
        save = self.rank == 0 and minutes > 0 and time.monotonic() - self.last_save > 60 * minutes
        flags = torch.tensor([save, *self.stop.wishes], dtype=torch.float64)
        more = [self.parts.shared(self.device)] if self.parts is not None else []
        if self.exchange.apart:  # each process has a norm of its own
            more.append(norm.double().square().view(1) / self.world_size)
        shared = torch.cat([sums, flags.to(self.device), *more])
        dist.all_reduce(shared)
        values = iter(shared.tolist())
        figures = {name: next(values) / count for name in self.task.figures}
        saves, *wishes = (next(values) for _ in flags)
        if self.parts is not None:
            self.noise.see(next(values), int(next(values)), count, float(norm))
        global_norm = math.sqrt(next(values)) if self.exchange.apart else float(norm)
        return Done(figures, global_norm, rate, self.stop.agreed(wishes), saves > 0)

    def _check_finite(self, done: Done) -> None:
        if math.isfinite(done.figures["bpc"]) and math.isfinite(done.grad_norm):
            self.last_norms = [*self.last_norms[-4:], done.grad_norm]
            return
        what = "gradient norm" if math.isfinite(done.figures["bpc"]) else "loss"
        self._fail(f"{what} is not finite at update {self.position.step + 1}")

    def _fail(self, what: str) -> NoReturn:
        norms = ", ".join(f"{norm:.3g}" for norm in self.last_norms) or "none"
        latest = self.run.named_checkpoint("latest")
        back = f"the last checkpoint is {latest}" if latest is not None else "there is no checkpoint yet"
        self._summarize("failed")
        raise RunFailed(
            f"{what}; gradient norms before it: {norms}; {back}; "
            "go on from it with --start-from, another --output-dir and a lower --learning-rate or --clip"
        )

    # --------------------------------------------------------------------------------- looking and reporting

    def score(self) -> dict[str, float]:
        """Figures of the validation data with the averaged weights (else the weights); collective."""
        self.heart.at("validation")
        self.exchange.settle()
        self.plain_model.load_state_dict(best_weights(self.shards, self.average))
        return self.task.validate(self.plain_model)

    def _validate(self, *, due: bool = False) -> None:
        """Scores the validation data with the averaged weights (else the weights); a new best is saved as such.

        due: at an update that --valid-every alone names, not at an end, which moves: the task looks too, and one
            without a new best counts towards --patience.
        """
        position = self.position
        figures = self.score()
        bpc = figures["bpc"]
        if not math.isfinite(bpc):  # an update whose own loss was still finite
            self._fail(f"validation loss is not finite after update {position.step}")
        best = not position.best or bpc < position.best["bpc"]
        if best:
            position.best, position.best_step, position.without_best = figures, position.step, 0
        else:
            position.without_best += due and self.task.as_hard_as_validation
        self._write_line(
            {"step": position.step, "epoch": self._epoch, **_named("valid", figures), **self.task.dynamics()}
        )
        self.progress.say(f"update {position.step}: validation {describe(figures)}{' (best so far)' if best else ''}")
        changed = self.task.check(position.step, self.plain_model) if due else None
        if changed is not None:
            self.progress.say(changed)
        if best:
            self._save(best=True)

    def _log(self, done: Done) -> None:
        begin, window = time.perf_counter(), self.position.window
        speed = window.characters / window.seconds
        mfu = window.flops / window.seconds / self.peak
        means = {name: total / window.updates for name, total in window.figures.items()}
        self._write_line(
            {
                "step": self.position.step,
                "epoch": self._epoch,
                **_named("train", means),
                **self.task.progress(),
                "learning_rate": done.rate,
                "grad_norm": done.grad_norm,
                **self.noise.figures(),
                "characters": self.position.characters,
                "characters_per_second": speed,
                "mfu": mfu,
                "overhead_share": window.overhead_seconds / window.seconds,
                "wall_clock_s": self._wall_clock(),
                "train_seconds": self.position.train_seconds,
            }
        )
        self.progress.show(self.position.step, describe(means), speed, mfu)
        spent = time.perf_counter() - begin
        self.position.window = Window(seconds=spent, overhead_seconds=spent)

    def _write_line(self, values: dict[str, Any]) -> None:
        if self.rank == 0:
            self.run.append_metrics(values)

    @property
    def _epoch(self) -> float:
        return self.position.step / self.task.updates_per_epoch

    def _wall_clock(self) -> float:
        return self.position.wall_clock_s + time.monotonic() - self.clock

    def _peak_flops(self) -> float:
        """FLOP/s of large products here and now, over all processes."""
        peak = torch.tensor([gemm_peak(self.device, self.products_dtype)], dtype=torch.float64, device=self.device)
        dist.all_reduce(peak)
        return peak.item()

    @property
    def products_dtype(self) -> torch.dtype:
        """bf16 with --dtype bf16, and where a DeepSpeed config keeps parameters so."""
        narrow = self.settings.batch.dtype == "bf16"
        narrow |= any(p.dtype == torch.bfloat16 for p in self.engine.module.parameters())
        return torch.bfloat16 if narrow else torch.float32

    def _announce(self) -> None:
        s = self.settings
        start = f"resumed at update {self.position.step}" if self.position.step else "from the start"
        self.progress.say(
            f"{s.preset}: {self.parameters:,} parameters, {self.task.name}, {self.world_size} "
            f"process{'es' * (self.world_size > 1)} on {self.device.type}, ZeRO stage {self.stage}, {s.batch.dtype}; "
            f"{self.total} updates of {self.task.update_size}, {start}"
        )
        if self.device.type == "cpu" and cpu_kernels.missing():
            self.progress.say(
                "note: the kernels for CPUs were not built; installed where there is a C compiler, gfrnn trains small "
                "models faster (docs/performance.md)"
            )
        for notice in self.task.notices:
            self.progress.say(notice)

    # ------------------------------------------------------------------------------------ saving and the end

    def _save(self, *, best: bool = False) -> None:
        """Writes a checkpoint of this step, unless it is there; collective."""
        position = self.position
        if self.saved_step == position.step and not best:
            return
        self.heart.at("checkpoint")
        self.exchange.settle()
        now = self._wall_clock()
        position.wall_clock_s, self.clock = now, time.monotonic()
        position.rate_scale, position.mean_norm = self.guard.scale, self.guard.mean
        position.noise_spread, position.noise_signal = self.noise.spread, self.noise.signal
        saved = gather_checkpoint(
            position,
            self.settings,
            self.shards,
            self.average,
            self.exchange,
            *self.task.gather(),
            self.run.mlflow_run_id(),
            self.task.corpus_md5,
        )
        keep_last = self.settings.run.keep_last
        write_checkpoint(self.run, saved, position.step, best=best, keep_last=keep_last, device=self.device)
        self.saved_step, self.last_save = position.step, time.monotonic()

    def _finish(self) -> dict[str, Any]:
        """Tests the best weights, samples from them and writes the summary."""
        self.heart.at("test")
        best = self.run.named_checkpoint("best")
        assert best is not None  # there has been a validation, and the first is the best so far
        self.plain_model.load_state_dict(load_checkpoint(best, weights_only=True).best_weights)
        self.progress.say(f"scoring the test data with the weights of {best.name}")
        return self._summarize("finished", **_named("test", self.task.test(self.plain_model)), checkpoint=str(best))

    def peak_memory(self) -> int:
        """Bytes that training took in this process at most: CUDA's tensors, or what is resident but the imports."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_resident() - self.resident_before

    def _summarize(self, status: str, **figures: Any) -> dict[str, Any]:
        position = self.position
        summary = {
            "finished": status == "finished",
            "status": status,
            "parameters": self.parameters,
            "step": position.step,
            "total_updates": self.total,
            "epoch": self._epoch,
            "characters": position.characters,
            "valid_bpc": None,
            **_named("valid", position.best),
            "best_step": position.best_step,
            "without_best": position.without_best,
            "wall_clock_s": self._wall_clock(),
            "train_seconds": position.train_seconds,
            "world_size": self.world_size,
            "zero_stage": self.stage,
            "peak_memory_bytes": self.peak_memory(),
            **figures,
        }
        if self.rank == 0:
            self.run.write_summary(summary)
        return summary


def _named(part: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Figures under the names that they have in metrics.jsonl and summary.json: bpc is valid_bpc, say."""
    return {name if name == "sample" else f"{part}_{name}": value for name, value in figures.items()}


def describe(figures: dict[str, float]) -> str:
    """Means in words: bits a character, characters right, whole targets right."""
    words = {"bpc": "{:.4f} BPC", "accuracy": "{:.1%} right", "exact": "{:.1%} exact"}
    return "  ".join(words[name].format(value) for name, value in figures.items())


def _validates_otherwise(then: dict[str, Any], settings: Settings) -> bool:
    """Whether a text's validation has figures that cannot be compared with those of a start with settings `then`."""
    names = ("valid_bytes", "eval_streams", "eval_warmup")
    return settings.task == "text" and any(then[name] != getattr(settings.run, name) for name in names)
