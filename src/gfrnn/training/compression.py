"""Less to send than whole gradients: what may stand in place of the engine's all-reduce at ZeRO stage 0.

    none      the engine's all-reduce of all P elements
    powersgd  of every matrix [n, m] a product of rank r, 2 all-reduces of r n and r m elements; the rest as it is.
              Vogels et al. 2019 (arXiv 1905.13727), algorithms 1 and 2: one power iteration from where the last ended
    topk      of all gradients together the share of the largest elements, an all-gather of values and indices.
              Stich et al. 2018 (arXiv 1809.07599)
    local     nothing; every K updates weights and moments are averaged. Stich 2019 (arXiv 1805.09767)

powersgd and topk keep what they did not send in an error memory and add it to the next update's gradient, so all of it
is applied in the end. A checkpoint has the mean of the processes' memories, which suits any number of them. For
powersgd, whose decisions depend on the mean alone, going on from it is the same up to rounding; for topk what is sent
first changes, while what is left to be sent stays the same.

local: every process takes optimizer steps with the gradient of its own rows, scaled so that the mean over processes
is the global gradient, and clips by its own norm. The mean over processes is taken before every look at the weights
as well (validation, checkpoint), and the next K updates count from there; so a checkpoint has one set of weights, and
a resumed run does what the uninterrupted one did. The loss in the logs is of the processes' own weights, each on its
own rows; the gradient norm is the root of the mean square of the processes' own.

Everything is called by all processes alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gfrnn.config import CommunicationSettings
from gfrnn.training.shards import Shards, leave_clipping, leave_gradients

TensorsByKey = dict[str, dict[str, Tensor]]
"""What is kept: by kind, then by parameter name."""


class Exchange:
    """How gradients become those of the whole batch. This one leaves it to the engine's own all-reduce.

    parameters: all that are trained, by name.
    """

    apart = False
    """Whether processes' gradients, and their weights, differ between one averaging and the next."""
    clip = 0.0
    """Where they do: the largest norm of a process's own gradient; 0 does not clip."""

    def __init__(self, parameters: Mapping[str, Tensor]):
        self.parameters = dict(parameters)

    def reduce(self) -> None:
        """Before an optimizer step: makes every parameter's own gradient that of all processes, as far as it goes."""

    def stepped(self) -> None:
        """After the step."""

    def settle(self) -> None:
        """Before a look at the weights: makes them, moments and running averages the same on every process."""

    def gather(self) -> TensorsByKey:
        """What must survive a restart, in full, on every process."""
        return {}

    def load(self, saved: TensorsByKey) -> None:
        """The inverse, of another kind's too, as far as this one keeps the like; the rest begins anew."""

    def gradients(self) -> dict[str, Tensor]:
        """By name; zeros where there is none."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}


def make_exchange(settings: CommunicationSettings, shards: Shards, averages: Sequence[Tensor] = ()) -> Exchange:
    """The settings' one, for the engine of these shards. averages: running ones of the weights."""
    parameters, kind = shards.parameters, settings.compression
    if kind != "none":
        leave_gradients(shards.engine)
    if kind == "powersgd":
        return PowerSGD(parameters, settings.compression_rank)
    if kind == "topk":
        return TopK(parameters, settings.compression_share)
    if kind == "local":
        clip = leave_clipping(shards.engine)
        return LocalUpdates(parameters, shards.engine.basic_optimizer, settings.local_updates, averages, clip)
    return Exchange(parameters)


def low_rank(shape: Sequence[int], rank: int) -> tuple[int, int, int] | None:
    """(n, m, r) of a parameter that powersgd sends as two matrices; None if it is less to send it as it is."""
    if len(shape) < 2:
        return None
    n, m = shape[0], math.prod(shape[1:])
    r = min(rank, n, m)
    return (n, m, r) if r * (n + m) < n * m else None


def largest(elements: int, share: float) -> int:
    """Elements that topk sends of so many."""
    return math.ceil(share * elements)


class PowerSGD(Exchange):
    """Legend: a matrix is [n, m], sent as P Q^T, P [n, r] with orthonormal columns, Q [m, r]."""

    def __init__(self, parameters: Mapping[str, Tensor], rank: int):
        super().__init__(parameters)
        self.errors: dict[str, Tensor] = {}  # [n, m]
        self.queries: dict[str, Tensor] = {}  # Q, the same on every process
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.parameters.items():
            sizes = low_rank(parameter.shape, rank)
            if sizes is not None:
                n, m, r = sizes
                self.errors[name] = parameter.new_zeros(n, m, requires_grad=False)
                self.queries[name] = torch.randn(m, r, generator=generator).to(parameter.device)

    @torch.no_grad()
    def reduce(self) -> None:
        gradients = self.gradients()
        for name, error in self.errors.items():  # until it is sent: what is wanted, with what was left before
            error += gradients[name].reshape(error.shape)
        bases = {name: self.errors[name] @ query for name, query in self.queries.items()}
        whole = [gradient for name, gradient in gradients.items() if name not in bases]
        average([*bases.values(), *whole])
        for name, basis in bases.items():
            # not Gram-Schmidt: columns that depend on one another, or are zero, still give an orthonormal basis
            bases[name] = torch.linalg.qr(basis).Q
            self.queries[name] = self.errors[name].T @ bases[name]
        for name, basis in bases.items():  # what this process itself did not send; not what all together did not
            self.errors[name].addmm_(basis, self.queries[name].T, alpha=-1)
        average(list(self.queries.values()))
        for name, basis in bases.items():
            gradients[name].copy_((basis @ self.queries[name].T).view_as(gradients[name]))

    def gather(self) -> TensorsByKey:
        errors = {name: error.clone() for name, error in self.errors.items()}
        average(list(errors.values()))
        return {"error": errors, "query": dict(self.queries)}

    def load(self, saved: TensorsByKey) -> None:
        for kept, found in ((self.errors, saved.get("error", {})), (self.queries, saved.get("query", {}))):
            for name, tensor in kept.items():
                if name in found and found[name].shape == tensor.shape:
                    tensor.copy_(found[name])


class TopK(Exchange):
    """Legend: P elements of all gradients, k of them sent by each of W processes."""

    def __init__(self, parameters: Mapping[str, Tensor], share: float):
        super().__init__(parameters)
        self.sizes = [parameter.numel() for parameter in self.parameters.values()]
        self.k = largest(sum(self.sizes), share)
        first = next(iter(self.parameters.values()))
        self.error_P = first.new_zeros(sum(self.sizes), requires_grad=False)

    @torch.no_grad()
    def reduce(self) -> None:
        gradients = list(self.gradients().values())
        self.error_P += torch.cat([gradient.reshape(-1) for gradient in gradients])
        index_k = self.error_P.abs().topk(self.k, sorted=False).indices
        own_2k = torch.cat([self.error_P[index_k].view(torch.int32), index_k.to(torch.int32)])  # one message
        self.error_P[index_k] = 0
        world_size = dist.get_world_size()
        all_W2k = own_2k.new_empty(world_size, 2 * self.k)
        dist.all_gather(list(all_W2k.unbind()), own_2k)
        mean_P = torch.zeros_like(self.error_P)
        for value_k, other_k in all_W2k.view(
            world_size, 2, self.k
        ):  # one process after another: the same sums everywhere
            mean_P.index_add_(0, other_k, value_k.view(torch.float32))
        mean_P /= world_size
        for gradient, part in zip(gradients, mean_P.split(self.sizes), strict=True):
            gradient.copy_(part.view_as(gradient))

    def gather(self) -> TensorsByKey:
        mean_P = self.error_P.clone()
        average([mean_P])
        parts = zip(self.parameters.items(), mean_P.split(self.sizes), strict=True)
        return {"error": {name: part.view(parameter.shape) for (name, parameter), part in parts}}

    def load(self, saved: TensorsByKey) -> None:
        found = saved.get("error", {})
        for name, part in zip(self.parameters, self.error_P.split(self.sizes), strict=True):
            if name in found:
                part.copy_(found[name].reshape(-1))


class LocalUpdates(Exchange):
    """K updates (`every`) from one averaging to the next.

    optimizer: whose state is kept by these very parameters, as it is at stage 0.
    """

    apart = True

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        every: int,
        averages: Sequence[Tensor] = (),
        clip: float = 0.0,
    ):
        super().__init__(parameters)
        self.optimizer, self.every, self.averages, self.clip, self.updates = optimizer, every, averages, clip, 0

    def reduce(self) -> None:
        self.gradients()

    def stepped(self) -> None:
        self.updates += 1
        if self.updates == self.every:
            self._meet()

    def settle(self) -> None:
        if self.updates:
            self._meet()
        # only here: they are linear in the weights, so the mean of the averages is the average of the means
        average(self.averages)

    def _meet(self) -> None:
        self.updates = 0
        kinds: dict[str, list[Tensor]] = {"weights": list(self.parameters.values())}
        for parameter in self.parameters.values():
            for key, moment in self.optimizer.state[parameter].items():
                if key != "step":
                    kinds.setdefault(key, []).append(moment)
        for tensors in kinds.values():
            average(tensors)


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Makes tensors, in place, their mean over the processes: one all-reduce of them laid end to end."""
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
