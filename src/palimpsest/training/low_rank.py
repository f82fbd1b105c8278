"""AdamW in the low-rank space of each gradient (GaLore), an optimizer of torch; `palimpsest.fit.galore` says what for.

Source: Zhao et al. 2024 (arXiv 2403.03507) and the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.errors import PalimpsestError
from palimpsest.finite import is_finite
from palimpsest.models.anatomy import anatomy
from palimpsest.training.eight_bit import LEAST, Quantised, blocks
from palimpsest.training.settings import Training

Side = Literal["right", "left"]
Moments = Literal["keep", "reset", "reproject"]
Choice = Literal["std", "reverse_std", "left", "right"]
MATRICES = (2, 4)
"""Dimensions of the weights that can be projected; fused experts have three."""
MOMENTS = ("m", "v")
PIECE = 1 << 17
"""Numbers that are updated at once: all that is made of them stays in the processor's cache."""


def side_of(rows: int, columns: int, choice: Choice = "std") -> Side:
    """Which side of a matrix is projected: the shorter one, with `reverse_std` the longer."""
    if choice in ("left", "right"):
        return "left" if choice == "left" else "right"
    return "right" if (rows >= columns) == (choice == "std") else "left"


def projector(gradient: Float[Tensor, "m n"], rank: int, side: Side, exact: bool = True) -> Float[Tensor, "r k"]:
    """The first `rank` singular directions of that side as orthonormal rows, in float32.

    Without `exact` they come from a randomised decomposition with two power iterations.
    """
    if exact:
        u, _, vt = torch.linalg.svd(gradient.float(), full_matrices=False)
    else:
        u, _, v = torch.svd_lowrank(gradient.float(), q=min(rank + 8, *gradient.shape), niter=2)
        vt = v.mT
    # not the transpose's right vectors: their signs are other ones, and moments outlive a basis
    return vt[:rank] if side == "right" else u.mT[:rank]


def down(matrix: Float[Tensor, "m n"], basis: Float[Tensor, "r k"], side: Side) -> Tensor:
    """The matrix in the small space."""
    return matrix.float() @ basis.mT if side == "right" else basis @ matrix.float()


def up(small: Tensor, basis: Float[Tensor, "r k"], side: Side) -> Float[Tensor, "m n"]:
    """Back to full size."""
    return small @ basis if side == "right" else basis.mT @ small


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW whose groups with a `rank` work on projected gradients; groups without one are plain AdamW.

    With `per_layer`, every weight is stepped as soon as its gradient is known, and the gradient is freed: `step` then
    does nothing, and neither clipping over all weights nor accumulation is possible. Steps whose gradient is not finite
    leave the weight as it is and are counted in `skipped`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        gap: int = 200,
        scale: float = 0.25,
        choice: Choice = "std",
        moments: Moments = "keep",
        exact: bool = True,
        state_bits: Literal[32, 8] = 32,
        per_layer: bool = False,
    ) -> None:
        for name, value in (("gap", gap), ("scale", scale), ("lr", lr)):
            if not value > 0:
                raise PalimpsestError(f"galore: {name} is {value}, expected above 0.")
        own = {"gap": gap, "scale": scale, "choice": choice, "moments": moments, "exact": exact}
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": None, **own}
        )
        self.state_bits, self.skipped = state_bits, 0
        self._coders: dict[tuple[str, torch.device], Quantised] = {}
        for group in self.param_groups:
            for weight in group["params"] if group["rank"] is not None else ():
                _check_rank(weight, group["rank"])
        self._hooks = list(self._attach()) if per_layer else []
        self.per_layer = per_layer

    def _attach(self) -> Iterator[Any]:
        for group in self.param_groups:
            for weight in group["params"]:

                def stepped(weight: Tensor, group: dict[str, Any] = group) -> None:
                    self._update(weight, group)
                    weight.grad = None

                yield weight.register_post_accumulate_grad_hook(stepped)

    def detach(self) -> None:
        """Takes the hooks of `per_layer` off the weights."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.per_layer:
            for group in self.param_groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        self._update(weight, group)
        return loss

    @torch.no_grad()
    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        gradient = weight.grad
        assert gradient is not None
        if not is_finite(gradient):
            self.skipped += 1
            return
        state = self.state[weight]
        projected = group["rank"] is not None
        gradient = gradient.flatten(1) if projected else gradient  # a convolution's kernel is one row a channel
        t = state.setdefault("step", 0)
        side = side_of(len(gradient), gradient.shape[-1], group["choice"]) if projected else "right"
        if projected and t % group["gap"] == 0:
            self._refresh(state, gradient, group, side)
        normal = self._direction(state, down(gradient, state["basis"], side) if projected else gradient, group)
        state["step"] = t = t + 1
        age = t - state.get("emptied", 0)
        b1, b2 = group["betas"]
        size = group["lr"] * math.sqrt(1 - b2**age) / (1 - b1**age)
        change = up(normal, state["basis"], side).mul_(group["scale"]) if projected else normal
        weight.sub_(change.mul_(size).to(weight.dtype).view_as(weight))
        if group["weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])

    def _direction(self, state: dict[str, Any], small: Tensor, group: dict[str, Any]) -> Tensor:
        """m / (sqrt(v) + eps) in float32, once the moments have taken the gradient up: in pieces, since a large weight
        would otherwise leave the processor's cache a dozen times."""
        b1, b2 = group["betas"]
        for name in MOMENTS:
            if not (name in state or f"{name}_code" in state):
                self._keep(state, name, small.new_zeros(small.shape, dtype=torch.float32))
        flat, found = small.flatten(), small.new_empty(small.numel(), dtype=torch.float32)
        for start in range(0, len(flat), PIECE):
            part = slice(start, start + PIECE)
            g, m, v = flat[part].float(), self._read(state, "m", part), self._read(state, "v", part)
            m.mul_(b1).add_(g, alpha=1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            torch.div(m, v.sqrt().add_(group["eps"]), out=found[part])
            self._write(state, "m", part, m)
            self._write(state, "v", part, v)
        return found.view(small.shape)

    def _refresh(self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any], side: Side) -> None:
        """A new projector; what becomes of moments in the old one's coordinates is the setting `moments`."""
        basis = self._basis(gradient, group, side)
        old = state.get("basis")
        state["basis"] = basis
        if old is None or group["moments"] == "keep":
            return
        small = down(gradient, basis, side)
        m, v = (self._read(state, name, slice(None)).view_as(small) for name in MOMENTS)
        if group["moments"] == "reset":
            state["emptied"] = state["step"]
            m, v = torch.zeros_like(m), torch.zeros_like(v)
        else:
            turn = old @ basis.mT
            # what the old basis does not cover of a new direction has no past: it begins with its own square
            fresh = (1 - turn.square().sum(0)).clamp_min(0) * (1 - group["betas"][1] ** state["step"])
            if side == "right":
                m, v = m @ turn, v @ turn.square() + fresh * small.square()
            else:
                m, v = turn.mT @ m, turn.mT.square() @ v + fresh[:, None] * small.square()
        self._keep(state, "m", m)
        self._keep(state, "v", v)

    def _basis(self, gradient: Tensor, group: dict[str, Any], side: Side) -> Float[Tensor, "r k"]:
        return projector(gradient, group["rank"], side, group["exact"])

    def _keep(self, state: dict[str, Any], name: str, value: Tensor) -> None:
        """Takes a whole moment into the state."""
        if self.state_bits == 32 or value.numel() < LEAST:
            state[name] = value
        else:
            state[f"{name}_code"], state[f"{name}_scale"] = self._coder(name, value.device).write(value)

    def _read(self, state: dict[str, Any], name: str, part: slice) -> Tensor:
        """A part of a moment, flat: the state itself, or what its codes stand for."""
        if name in state:
            return state[name].view(-1)[part]
        code, scale = state[f"{name}_code"], state[f"{name}_scale"]
        return self._coder(name, code.device).read(code[part], scale[blocks(part)])

    def _write(self, state: dict[str, Any], name: str, part: slice, value: Tensor) -> None:
        if name not in state:
            code, scale = self._coder(name, value.device).write(value)
            state[f"{name}_code"][part], state[f"{name}_scale"][blocks(part)] = code, scale

    def _coder(self, name: str, device: torch.device) -> Quantised:
        if (name, device) not in self._coders:
            self._coders[name, device] = Quantised(name == "m", device)
        return self._coders[name, device]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a saved state, in the types that it was saved in; raises where a projector is of another rank."""
        held = {
            place: {name: x for name, x in entries.items() if isinstance(x, Tensor)}
            for place, entries in state_dict["state"].items()
        }
        super().load_state_dict(state_dict)
        order = [weight for group in self.param_groups for weight in group["params"]]
        for place, tensors in held.items():  # torch casts states to the type of the weight
            self.state[order[place]].update({name: x.to(order[place].device) for name, x in tensors.items()})
        for group in self.param_groups:
            for weight in group["params"] if group["rank"] is not None else ():
                basis = self.state[weight].get("basis")
                if basis is not None and len(basis) != group["rank"]:
                    raise PalimpsestError(f"galore: the saved projector has rank {len(basis)}, not {group['rank']}.")


def _check_rank(weight: Tensor, rank: int) -> None:
    if weight.ndim not in MATRICES:
        raise PalimpsestError(f"galore projects matrices and kernels, found a weight of shape {list(weight.shape)}.")
    if not isinstance(rank, int) or not 1 <= rank <= _shorter(weight):
        raise PalimpsestError(f"galore: rank is {rank}, expected 1 to {_shorter(weight)}, the matrix's shorter side.")


def _shorter(weight: Tensor) -> int:
    return min(len(weight), weight.numel() // len(weight))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors that the optimizer holds, projectors included."""
    return sum(x.nbytes for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))


def galore_groups(network: nn.Module, rank: int, targets: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Parameter groups: matrices of the targets by rank, everything else. Rank 0 is a quarter of the shorter side.

    Without targets they are attention and MLPs, or the convolutions of a network that has neither.
    """
    parts = anatomy(network)
    found = [role for role in ("attention", "mlp") if parts.find(role)] or ["convolution"]
    wanted = found if targets is None else list(targets)
    chosen = parts.select(wanted).tensors()
    held = {id(weight) for weight in chosen.values() if weight.ndim in MATRICES and weight.requires_grad}
    if not held:
        raise PalimpsestError(f"{', '.join(wanted)}: no matrix to project was found among them.")
    by_rank: dict[int | None, list[Tensor]] = {}
    for weight in network.parameters():
        if weight.requires_grad:
            own = None if id(weight) not in held else rank or max(1, _shorter(weight) // 4)
            by_rank.setdefault(own, []).append(weight)
    return [{"params": weights, "rank": own} for own, weights in by_rank.items()]


def named(training: Training) -> Callable[[nn.Module, Training], torch.optim.Optimizer] | None:
    """What makes the optimizer that the settings name, with the paper's defaults; None for the trainer's own AdamW."""
    if training.optimizer == "adamw":
        return None
    if training.lora_rank:
        raise PalimpsestError(f"optimizer {training.optimizer} trains the weights themselves: set lora_rank to 0.")

    def make(network: nn.Module, training: Training) -> GaLoreAdamW:
        return GaLoreAdamW(
            galore_groups(network, 0),
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            state_bits=8 if training.optimizer == "galore-8bit" else 32,
        )

    return make
