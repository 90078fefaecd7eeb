"""Learning a text: segments in turn, the state carried from one to the next."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gfrnn.config import Settings, UserError, sizes
from gfrnn.data import Bytes, Streams, Text
from gfrnn.nn import LanguageModel, State
from gfrnn.nn.noise import hash_numbers
from gfrnn.runs import Checkpoint, TensorsByName
from gfrnn.training.dynamics import Dynamics
from gfrnn.training.evaluation import score
from gfrnn.training.objective import SegmentLoss
from gfrnn.training.sample import generate

_RESETS = 0x5E5E7  # keeps the random numbers of resets apart from those of masks


class TextTask:
    """See task.py. Legend: L layers, B rows of a micro-batch, R global rows, H units."""

    figures: tuple[str, ...] = ("bpc",)
    rate_scale = 1.0
    as_hard_as_validation = True

    def __init__(self, settings: Settings, text: Text, device: torch.device):
        batch = settings.batch
        self.settings, self.text, self.device = settings, text, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.streams = Streams(
            text.train,
            batch.rows,
            batch.steps,
            world_size=self.world_size,
            rank=self.rank,
            accumulation=batch.accumulation,
            device=device,
        )
        self.name, self.corpus_md5 = text.name, text.md5
        self.updates_per_epoch = self.streams.segments_per_epoch
        self.update_size = f"{batch.rows} x {batch.steps} characters"
        dropped = self.streams.dropped_bytes
        self.notices = (
            [f"{dropped:,} bytes at the rows' ends, less than a segment each, are left out"] if dropped else []
        )
        self._flops = sizes(settings).train_flops * self.streams.count_per_update
        self.states: list[State] = []
        self._dynamics: dict[str, Any] = {}

    def objective(self, model: LanguageModel) -> SegmentLoss:
        self._zero_state = partial(model.zero_state, self.streams.rows_per_micro, self.device)
        self._zero_states()
        return SegmentLoss(model)

    def _zero_states(self) -> None:
        self.states = [self._zero_state() for _ in range(self.settings.batch.accumulation)]

    def begin(self, update: int) -> None:
        if update % self.updates_per_epoch == 0 or self._reset_due(update):
            self._zero_states()

    def _reset_due(self, update: int) -> bool:
        batch = self.settings.batch
        if batch.reset_every and update % batch.reset_every == 0:
            return True
        return hash_numbers(self.settings.seed, update, _RESETS) < batch.reset_probability * 2**32

    def count(self, update: int) -> int:
        return self.streams.count_per_update

    characters = count

    def counted(self, update: int, micro: int) -> int:
        return self.streams.counted(micro)

    def flops(self, update: int) -> int:
        return self._flops

    def micro_rows(self, micro: int) -> Tensor:
        return self.streams.micro_rows(micro)

    def read(self, update: int, micro: int) -> tuple[Any, ...]:
        inputs_TB, targets_TB = self.streams.batch(update % self.updates_per_epoch, micro)
        return inputs_TB, targets_TB, self.streams.weights(micro), self.states[micro]

    def keep(self, micro: int, state: State) -> None:
        self.states[micro] = state

    def see(self, figures: dict[str, float]) -> None:
        pass

    def progress(self) -> dict[str, float]:
        return {}

    def validate(self, model: LanguageModel) -> dict[str, float]:
        seen = None
        if self.settings.run.gates:
            gated = self.settings.model.feedback == "gated" and self.settings.model.unit != "mrnn"
            seen = Dynamics(model.rnn.num_layers, model.rnn.hidden_size, gated=gated, device=self.device)
        bpc = self._score(model, self.text.valid[: self.settings.run.valid_bytes or None], seen)
        self._dynamics = seen.figures(dist.all_reduce) if seen is not None else {}
        return {"bpc": bpc}

    def dynamics(self) -> dict[str, Any]:
        return self._dynamics

    def check(self, update: int, model: LanguageModel) -> None:
        pass

    def test(self, model: LanguageModel) -> dict[str, Any]:
        bpc = self._score(model, self.text.test)
        sample = b""
        if self.rank == 0:
            sample = generate(model, b"", self.settings.run.sample_length, temperature=0.8)
        return {"bpc": bpc, "sample": sample.decode("utf-8", "replace")}

    def _score(self, model: LanguageModel, text: Bytes, dynamics: Dynamics | None = None) -> float:
        """BPC, the text's streams shared out among the processes."""
        run = self.settings.run
        own = score(
            model,
            text,
            streams=run.eval_streams,
            warmup=run.eval_warmup,
            rank=self.rank,
            world_size=self.world_size,
            dynamics=dynamics,
        )
        both = torch.tensor([own.bits, own.characters], dtype=torch.float64, device=self.device)
        dist.all_reduce(both)
        bits, characters = both.tolist()
        return float(bits / characters)

    def gather(self) -> tuple[TensorsByName, dict[str, Any]]:
        """The carried state by global row: h (and c) [L, R, H]."""
        full: TensorsByName = {}
        for key, parts in _by_key(self.states).items():
            L, _, H = parts[0].shape
            whole = parts[0].new_zeros(L, self.streams.rows, H)
            for micro, part in enumerate(parts):
                rows, own = self._own_rows(micro)
                whole[:, rows] = part[:, own]
            dist.all_reduce(whole)  # every row belongs to one process, the others have zeros
            full[key] = whole.cpu()
        return full, {}

    def load(self, saved: Checkpoint) -> None:
        """Each micro-batch's slice of the carried state; padding rows start at zero."""
        if saved.trainer["settings"]["batch"]["rows"] != self.streams.rows:
            return  # other rows of the text: they start at zero
        for micro in range(len(self.states)):
            state = self._zero_state()
            rows, own = self._own_rows(micro)
            for key, (part,) in _by_key([state]).items():
                L, _, H = part.shape
                if key not in saved.state or saved.state[key].shape != (L, self.streams.rows, H):
                    raise UserError("state.safetensors of the checkpoint is not of this model and --rows: damaged?")
                part[:, own] = saved.state[key].to(self.device)[:, rows]
            self.states[micro] = state

    def _own_rows(self, micro: int) -> tuple[Tensor, Tensor]:
        """Global rows of a micro-batch, and their places in it, padding left out."""
        own = self.streams.weights(micro) > 0
        return self.streams.micro_rows(micro)[own], own


def _by_key(states: Sequence[State]) -> dict[str, list[Tensor]]:
    if isinstance(states[0], tuple):
        return {"h": [s[0] for s in states], "c": [s[1] for s in states]}
    return {"h": [s for s in states if isinstance(s, Tensor)]}
