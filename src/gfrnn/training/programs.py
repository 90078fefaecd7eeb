"""Learning what programs print: batches of about one length, and the curriculum that says how hard they are."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gfrnn.config import Settings, UserError, networks
from gfrnn.data import ProgramBatches, ProgramCorpus, ProgramTable
from gfrnn.nn import EncoderDecoder
from gfrnn.nn.noise import hash_numbers
from gfrnn.runs import Checkpoint, TensorsByName
from gfrnn.training.curriculum import Curriculum
from gfrnn.training.objective import ProgramLoss
from gfrnn.training.program_evaluation import predict, score_programs

_SHOWN = 5  # programs in a run's sample
_OF_CURRICULUM = ("curriculum", "nesting", "length", "num_programs", "level_programs", "program_seed")


class ProgramTask:
    """See task.py."""

    figures: tuple[str, ...] = ("bpc", "accuracy")

    def __init__(self, settings: Settings, corpus: ProgramCorpus, device: torch.device):
        self.settings, self.corpus, self.device = settings, corpus, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        p, rows = settings.programs, settings.batch.rows
        self.name, self.corpus_md5 = corpus.name, corpus.md5
        self.updates_per_epoch = p.num_programs // rows
        self.update_size = f"{rows} programs"
        self.notices: list[str] = []
        self.curriculum = Curriculum()
        self._part = (-1, -1)  # level and pass that `batches` are of
        self._at = 0
        encoder, decoder = networks(settings)
        self._flops_per_source, self._flops_per_target = encoder.train_flops, decoder.train_flops

    @property
    def rate_scale(self) -> float:
        return self.curriculum.rate_scale

    @property
    def as_hard_as_validation(self) -> bool:
        return not self.corpus.has_levels or self.curriculum.level == len(self.corpus.levels) - 1

    def objective(self, model: EncoderDecoder) -> ProgramLoss:
        return ProgramLoss(model)

    def begin(self, update: int) -> None:
        settings, level = self.settings, self.curriculum.level
        programs = settings.programs.level_programs if self.corpus.has_levels else settings.programs.num_programs
        part, self._at = divmod(update - self.curriculum.begun, programs // settings.batch.rows)
        if self._part != (level, part):
            self.batches = ProgramBatches(
                self.corpus.train(level, part),
                settings.batch.rows,
                seed=hash_numbers(settings.programs.program_seed, level, part),
                world_size=self.world_size,
                rank=self.rank,
                accumulation=settings.batch.accumulation,
                device=self.device,
            )
            self._part = level, part

    def count(self, update: int) -> int:
        return self.batches.target_characters(self._at)

    def counted(self, update: int, micro: int) -> int:
        return self.batches.counted(self._at, micro)

    def characters(self, update: int) -> int:
        return self.batches.source_characters(self._at) + self.batches.target_characters(self._at)

    def flops(self, update: int) -> int:
        sources, targets = self.batches.source_characters(self._at), self.batches.target_characters(self._at)
        return self._flops_per_source * sources + self._flops_per_target * targets

    def micro_rows(self, micro: int) -> Tensor:
        return self.batches.micro_rows(micro)

    def read(self, update: int, micro: int) -> tuple[Any, ...]:
        return (self.batches.batch(self._at, micro),)

    def keep(self, micro: int, state: Any) -> None:
        pass

    def see(self, figures: dict[str, float]) -> None:
        self.curriculum.see(figures["accuracy"])

    def progress(self) -> dict[str, float]:
        if not self.corpus.has_levels:
            return {}
        length, nesting = self.corpus.levels[self.curriculum.level]
        return {"level_length": length, "level_nesting": nesting}

    def validate(self, model: EncoderDecoder) -> dict[str, float]:
        return self._score(model, self.corpus.valid)

    def dynamics(self) -> dict[str, Any]:
        return {}

    def check(self, update: int, model: EncoderDecoder) -> str | None:
        if not self.corpus.has_levels:
            return None
        accuracy = self._score(model, self.corpus.level_valid(self.curriculum.level))["accuracy"]
        length, nesting = self.corpus.levels[self.curriculum.level]
        level = f"length {length}, nesting {nesting}"
        if not self.curriculum.check(update, accuracy, len(self.corpus.levels) - 1):
            return f"update {update}: {accuracy:.1%} right at {level}, which goes on"
        if self.curriculum.begun != update:
            return f"update {update}: learning rate x {self.rate_scale:.3g} after the last level"
        length, nesting = self.corpus.levels[self.curriculum.level]
        return f"update {update}: {accuracy:.1%} right at {level}; now length {length}, nesting {nesting}"

    def test(self, model: EncoderDecoder) -> dict[str, Any]:
        table = self.corpus.test
        found = self._score(model, table)
        sample = ""
        if self.rank == 0:
            for number in range(min(_SHOWN, len(table))):
                target, written = table.target(number).removesuffix("."), predict(model, table.program(number))
                sample += f"{table.program(number).strip()}\n# {target}, predicted {written}\n\n"
        return {**found, "sample": sample}

    def _score(self, model: EncoderDecoder, table: ProgramTable) -> dict[str, float]:
        """Means over a table, shared out among the processes."""
        own = score_programs(model, table, rank=self.rank, world_size=self.world_size)
        parts = (own.bits, own.right, own.characters, own.exact)
        sums = torch.tensor([float(part.sum()) for part in parts], dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        bits, right, characters, exact = sums.tolist()
        return {"bpc": bits / characters, "accuracy": right / characters, "exact": exact / len(table)}

    def gather(self) -> tuple[TensorsByName, dict[str, Any]]:
        return {}, {"curriculum": dataclasses.asdict(self.curriculum)}

    def load(self, saved: Checkpoint) -> None:
        """Where the curriculum was; of another run's it begins anew."""
        theirs = saved.trainer["settings"]["programs"]
        if any(theirs.get(name) != getattr(self.settings.programs, name) for name in _OF_CURRICULUM):
            self.curriculum = Curriculum(begun=int(saved.trainer["position"]["step"]))
            self.notices = ["another run's curriculum does not go on here: programs and their levels begin anew"]
            return
        try:
            self.curriculum = Curriculum(**saved.trainer["curriculum"])
        except (KeyError, TypeError) as error:
            raise UserError(
                f"trainer.json of the checkpoint has no curriculum, or another version's ({error})"
            ) from error
