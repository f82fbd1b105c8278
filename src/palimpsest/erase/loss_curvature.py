"""Loss-curvature editing: cut the directions of a weight matrix that the loss, on average over data, hardly bends in.

A memorised text makes the loss sharp in directions of its own, which differ from text to text and so are flat on
average; what many inputs share stays curved. K-FAC gives that average curvature for each pair of an input and an
output direction, and the flattest pairs are taken out of the matrix. What was memorised need not be known: use it
against recitation in general, not to delete one record. Arithmetic and facts recalled without a context live in flat
directions as well, and suffer first; look at them before trusting the result.

Source: Merullo et al. 2025 (arXiv 2510.24256) and the authors' code. Differs: labels are drawn from the model's own
predictions (the code's default are the given ones), which is what the paper's text says.

    W     weight              [out, in]
    A     mean of a a^T       [in, in]    inputs a, uncentred      A = V diag(mu) V^T
    G     mean of g g^T       [out, out]  output gradients g       G = U diag(lambda) U^T
    Pi    curvature of pairs  [out, in]   Pi_ij = lambda_i mu_j
    rho   share of the curvature that is kept

    M  <- the largest Pi, until together they reach rho of the sum; equal ones row by row
    W' <- U ((U^T W V) * M) V^T
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.guard import kind_of
from palimpsest.models.anatomy import Anatomy, anatomy
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.curvature import Factors, Labels, Positions, eigenbasis, kfac_factors
from palimpsest.system import Method, setting, system

Sides = Literal["both", "inputs", "gradients"]


def kept_pairs(curvature: Float[Tensor, "out in"], rho: float) -> Bool[Tensor, "out in"]:
    """M: the pairs of largest curvature that together first reach the share rho of its sum."""
    order = curvature.flatten().argsort(descending=True, stable=True)
    mass = curvature.flatten()[order].double().cumsum(0)  # in float32 the sum of millions of terms drifts
    count = int(torch.searchsorted(mass, rho * mass[-1] * (1 - 1e-12))) + 1
    kept = torch.zeros(curvature.numel(), dtype=torch.bool, device=curvature.device)
    kept[order[:count]] = True
    return kept.view_as(curvature)


def spread(curvature: Float[Tensor, " directions"], share: float = 0.95) -> int:
    """How many directions hold this share of the curvature."""
    mass = curvature.sort(descending=True).values.double().cumsum(0)
    return int(torch.searchsorted(mass, share * mass[-1])) + 1


@dataclasses.dataclass(frozen=True)
class Cut:
    """What an edit kept of one matrix: pairs, curvature, directions that hold 95 % of it, and how far W moved."""

    pairs: float
    mass: float
    input_directions: int
    output_directions: int
    change: float


class SpectrumEdit:
    """Edits of the same matrices at any rho, from one decomposition of their factors, each from the first weights.

    `sides` leaves a factor out: `inputs` knows A alone (G = identity), `gradients` G alone.
    """

    def __init__(self, network: nn.Module, factors: Mapping[str, Factors], sides: Sides = "both") -> None:
        if not factors:
            raise PalimpsestError("there are no curvature factors: nothing would be edited.")
        self._matrices = {
            name: _Matrix(name, network.get_submodule(name), given, sides) for name, given in factors.items()
        }

    @torch.no_grad()
    def apply(self, rho: float) -> dict[str, Cut]:
        """Leaves the share rho of the curvature in every matrix, in place; what was kept, by name."""
        if not rho > 0:
            raise PalimpsestError(f"rho is {rho}, expected above 0.")
        return {name: matrix.cut(rho) for name, matrix in self._matrices.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the first weights back."""
        for matrix in self._matrices.values():
            matrix.weight.copy_(matrix.original)


class _Matrix:
    """One weight matrix in the eigenbases of its factors; W is [out, in] also where the module stores its transpose."""

    def __init__(self, name: str, module: nn.Module, factors: Factors, sides: Sides) -> None:
        if not isinstance(module, nn.Linear | Conv1D):
            raise PalimpsestError(f"{name} is a {type(module).__name__}, expected a linear layer (Linear or Conv1D).")
        self.weight = module.get_parameter("weight")
        self.original = self.weight.detach().clone()
        self.transposed = factors.transposed
        w = self._turned(self.original)
        sizes = (len(factors.gradients), len(factors.inputs))
        if sizes != tuple(w.shape):
            raise PalimpsestError(f"{name} is a matrix {tuple(w.shape)}, but its factors are for {sizes}.")
        self.lam, self.mu = (torch.ones(size, dtype=w.dtype, device=w.device) for size in sizes)
        self.v: Tensor | None = None
        self.u: Tensor | None = None
        if sides != "gradients":
            self.mu, self.v = eigenbasis(factors.inputs.to(w))
        if sides != "inputs":
            self.lam, self.u = eigenbasis(factors.gradients.to(w))
        rotated = w if self.u is None else self.u.mT @ w
        self.rotated = rotated if self.v is None else rotated @ self.v

    def _turned(self, weight: Tensor) -> Float[Tensor, "out in"]:
        weight = weight if weight.dtype == torch.float64 else weight.float()
        return weight.mT if self.transposed else weight

    def cut(self, rho: float) -> Cut:
        """The edit at this share; at 1 or more the weight is exactly the first one."""
        curvature = torch.outer(self.lam, self.mu)
        if not curvature.any():
            raise PalimpsestError("the curvature is 0 everywhere: the model's loss does not depend on this matrix.")
        if rho >= 1:  # pairs without curvature are never reached, so the sum below would still cut them
            self.weight.copy_(self.original)
            kept = torch.ones_like(curvature, dtype=torch.bool)
        else:
            kept = kept_pairs(curvature, rho)
            made = self.rotated * kept
            made = made if self.u is None else self.u @ made
            made = made if self.v is None else made @ self.v.mT
            self.weight.copy_(made.mT if self.transposed else made)
        left = curvature * kept
        original = self._turned(self.original)
        return Cut(
            pairs=float(kept.float().mean()),
            mass=float(left.sum(dtype=torch.float64) / curvature.sum(dtype=torch.float64)),
            input_directions=spread(left.sum(0)),
            output_directions=spread(left.sum(1)),
            change=float((self._turned(self.weight) - original).norm() / original.norm()),
        )


@system(
    "loss-curvature",
    verb="erase",
    title="Loss-curvature editing (K-FAC spectrum)",
    paper="Merullo et al. 2025 (arXiv 2510.24256)",
    takes="causal-lm or classifier",
    uses={"train", "general", "retain"},
    fidelity="adapted",
    deviations=(
        "labels are sampled from the model, as in the paper's text; given ones, the code's default, are a setting",
        "the layers follow from the depth by default; the paper finds them by a sweep against a memorised set",
    ),
)
class LossCurvature(Method):
    """Cuts the directions of low average curvature out of MLP matrices; no forget set is needed."""

    rho: float | None = setting(
        default=None, above=0, origin="paper", help="share of the curvature kept; None: 0.6, of a classifier 0.75"
    )
    layers: Literal["auto", "all"] | tuple[int, ...] = setting(
        default="auto",
        origin="paper: 23 to 25 of 32; ViT first and last",
        help="which blocks; auto: three from 23/32 of the depth on, of a classifier the first and the last",
    )
    matrices: Literal["auto"] | tuple[str, ...] = setting(
        default="auto",
        origin="paper",
        help="roles or name patterns; auto: gate and up, of a classifier up and down; where these are not linear "
        "layers, attention's or whatever linear layers there are",
    )
    sides: Sides = setting(
        default="both", origin="paper; its ablations", help="both factors, or A (inputs) or G (gradients) alone"
    )
    taken_on: Literal["auto", "train", "general", "retain"] = setting(
        default="auto", origin="ours", help="role that curvature is taken on; auto: the first of these that is given"
    )
    labels: Labels = setting(
        default="sampled", origin="paper's text; code: gold", help="labels drawn from the model, or the given ones"
    )
    positions: Positions = setting(
        default="auto", origin="paper", help="what counts; auto: all but the last, of a classifier the first (CLS)"
    )
    batch_size: int = setting(default=32, at_least=1, origin="paper", help="records computed at once, not the result")
    max_length: int | None = setting(default=512, at_least=2, origin="paper", help="longest sequence, tokens")

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after the edit; its ledger entry says what was kept of each matrix."""
        classifies = kind_of(model) == "classifier"
        names = self._names(model, classifies)
        _check_unedited(model, names)
        measured = kfac_factors(
            model,
            self._records(data),
            names,
            run,
            labels=self.labels,
            positions=self.positions,
            batch_size=self.batch_size,
            max_length=self.max_length,
        )
        edited = model if run.in_place else model.copy()
        rho = self.rho or (0.75 if classifies else 0.6)
        cuts = SpectrumEdit(edited.network, measured.factors, self.sides).apply(rho)
        fields = [field.name for field in dataclasses.fields(Cut)]
        run.note(
            rho=rho,
            matrices=names,
            positions=min(given.positions for given in measured.factors.values()),
            mean_loss=measured.loss,
            **{field: {name: getattr(cut, field) for name, cut in cuts.items()} for field in fields},
        )
        for text in (*measured.warnings, *_few(measured.factors)):
            run.warn(f"loss-curvature: {text}.")
        return edited

    def _records(self, data: Roles) -> list[Record]:
        wanted = ("train", "general", "retain") if self.taken_on == "auto" else (self.taken_on,)
        for role in wanted:
            if role in data:
                return data.require(role)
        raise PalimpsestError(
            f"loss-curvature needs the role {' or '.join(wanted)}: data like that which the model learned from."
        )

    def _names(self, model: Model, classifies: bool) -> list[str]:
        """The matrices to edit, by name."""
        parts = anatomy(model.network)
        depth = len(parts.blocks())
        layers: list[int] | None = None
        if self.layers == "auto":
            first = int(23 / 32 * depth)
            layers = [0, depth - 1] if classifies else list(range(first, min(first + 3, depth)))
        elif self.layers != "all":
            layers = [int(layer) for layer in self.layers]
            if not layers:
                raise PalimpsestError("layers is empty: no block was named to edit.")
        if self.matrices != "auto":
            return [part.name for part in parts.select(self.matrices, layers).parts]
        wanted = ("mlp_up", "mlp_down") if classifies else ("mlp_gate", "mlp_up")
        return _linear(parts, wanted, layers) or _linear(parts, ATTENTION, layers) or _linear(parts, ("linear",), None)


ATTENTION = ("attention_query", "attention_key", "attention_value", "attention_output")


def _linear(parts: Anatomy, wanted: tuple[str, ...], layers: list[int] | None) -> list[str]:
    """The names of the linear layers of these roles; none where there are no such, or they are fused experts."""
    given = [role for role in wanted if parts.find(role)]
    found = parts.select(given, layers).parts if given else []
    return [p.name for p in found if p.expert is None and isinstance(p.module, nn.Linear | Conv1D)]


def _check_unedited(model: Model, names: list[str]) -> None:
    for entry in model.ledger.entries:
        if shared := set(entry.notes.get("matrices", ())) & set(names) if entry.method == "loss-curvature" else ():
            raise PalimpsestError(
                f"{sorted(shared)[0]} has been edited by loss-curvature already: edit the model it came from, with "
                "another rho."
            )


def _few(factors: Mapping[str, Factors]) -> list[str]:
    for name, given in factors.items():
        if given.positions < max(len(given.inputs), len(given.gradients)):
            return [f"{given.positions} positions are fewer than {name} has directions: give it more data"]
    return []
