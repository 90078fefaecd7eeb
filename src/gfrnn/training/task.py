"""What is learned, as the training loop sees it: text.py and programs.py say what an update reads and what counts."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gfrnn.config import Settings
from gfrnn.data import Corpus, Text
from gfrnn.runs import Checkpoint, TensorsByName
from gfrnn.training.programs import ProgramTask
from gfrnn.training.text import TextTask


class Task(Protocol):
    """One process's share of the work; all processes make the same calls."""

    name: str
    """Of the corpus."""
    corpus_md5: str
    """Another one is another corpus."""
    updates_per_epoch: int
    update_size: str
    """What an update reads, in words."""
    notices: list[str]
    """What to say at the start."""
    figures: tuple[str, ...]
    """Names of the means, over what counts, of the sums that the objective returns: the first is bpc."""

    @property
    def rate_scale(self) -> float:
        """What the learning rate is multiplied by."""

    @property
    def as_hard_as_validation(self) -> bool:
        """Whether what is learned now is what validation asks: until then no new best means nothing."""

    def objective(self, model: Any) -> nn.Module:
        """The module that DeepSpeed wraps: what `read` gives, noise and a divisor -> (loss, sums [figures], state)."""

    def begin(self, update: int) -> None:
        """Before an update is read."""

    def count(self, update: int) -> int:
        """Symbols of the global batch that count."""

    def counted(self, update: int, micro: int) -> int:
        """Those of this process's micro-batch."""

    def characters(self, update: int) -> int:
        """Symbols of the global batch that are read."""

    def flops(self, update: int) -> int:
        """Floating-point operations of training on the global batch."""

    def micro_rows(self, micro: int) -> Tensor:
        """Global row ids of a micro-batch, int64 [B]."""

    def read(self, update: int, micro: int) -> tuple[Any, ...]:
        """What the objective takes of a micro-batch."""

    def keep(self, micro: int, state: Any) -> None:
        """The objective's state goes into the micro-batch's next update."""

    def see(self, figures: dict[str, float]) -> None:
        """After an update, its means over the global batch."""

    def progress(self) -> dict[str, float]:
        """What a logged line has besides."""

    def validate(self, model: Any) -> dict[str, float]:
        """Means by name over the validation data; collective."""

    def dynamics(self) -> dict[str, Any]:
        """What the last validation saw of how the net works, as its line of metrics.jsonl has it."""

    def check(self, update: int, model: Any) -> str | None:
        """After a validation that the settings ask for: what it changes, in words; collective."""

    def test(self, model: Any) -> dict[str, Any]:
        """Means by name over the test data, collective, and of the first process a `sample`."""

    def gather(self) -> tuple[TensorsByName, dict[str, Any]]:
        """What must survive a restart: tensors, and plain values; collective."""

    def load(self, saved: Checkpoint) -> None:
        """The inverse."""


def make_task(settings: Settings, corpus: Corpus, device: torch.device) -> Task:
    """The settings' task on its corpus; the process group must be up."""
    if isinstance(corpus, Text):
        return TextTask(settings, corpus, device)
    return ProgramTask(settings, corpus, device)
