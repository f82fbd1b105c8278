"""Selective synaptic dampening (SSD): shrink the weights that matter far more to the forget set than to all the rest.

No training step is taken: two passes measure how much each weight matters to the forget set and to the whole training
set, and the one-sided weights are multiplied by less than 1. Once the second pass is stored (`diagonal_fisher` and its
`save`, the setting `importance`), a deletion needs the forget records alone. Use it where a whole class or topic goes,
or where the training data is gone; single records that resemble the others stay, because no weight is theirs alone.
Look at `dry_run` first: selecting more than a tenth of the weights wrecks the model.

Source: Foster et al. 2024 (arXiv 2308.07707) and the authors' code; `label_free`: arXiv 2402.19308, by the same.
Differs: importances are means of squared gradients of single records, as the definition says; the code squares the
gradients of mini-batch means (`batch`), whose result depends on how the data is sorted. The factor is bounded as in
the code; the paper's min(beta theta, theta) never dampens a negative weight.

    I_D   importance         [weights]  mean over the training records of the squared gradient of their loss
    I_F   forget_importance  [weights]  the same over the forget records
    a     alpha              how many times more a weight must matter to the forget set
    l     dampening          lambda, strength: below 1 it shrinks further

    selected_i = I_F_i > a I_D_i
    beta_i     = min(l I_D_i / I_F_i, 1)
    theta_i   <- beta_i theta_i  where selected

Where the training records hold the forget records, I_D >= |F| / |D| I_F, so a >= |D| / |F| selects nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.anatomy import anatomy
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.examples import Reduction
from palimpsest.statistics.fisher import Fisher, Mode, check_importances, diagonal_fisher
from palimpsest.system import Method, setting, system

DANGER = 0.1
"""Share of selected weights above which models have been seen to collapse."""
BINS = 10


def factors(
    importance: Float[Tensor, "*weight"], forget_importance: Float[Tensor, "*weight"], alpha: float, dampening: float
) -> tuple[Bool[Tensor, "*weight"], Float[Tensor, "*weight"]]:
    """Which weights are selected, and beta for each of them; 1 for the others."""
    selected = forget_importance > alpha * importance
    beta = torch.ones_like(importance)
    # only where selected: elsewhere it may be 0 / 0
    beta[selected] = (dampening * importance[selected] / forget_importance[selected]).clamp_max(1)
    return selected, beta


@torch.no_grad()
def dampen(
    network: nn.Module,
    importance: Mapping[str, Tensor],
    forget_importance: Mapping[str, Tensor],
    alpha: float,
    dampening: float = 1.0,
    *,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Dampens the network's weights in place and reports the shares selected, by layer, and the histogram of beta.

    Names are those of `named_parameters`, so tied weights are dampened once; buffers are never touched. With `dry_run`
    nothing is changed.
    """
    for name, value in (("alpha", alpha), ("dampening", dampening)):
        if not value > 0:
            raise PalimpsestError(f"ssd: {name} is {value}, expected above 0.")
    for given in (importance, forget_importance):
        check_importances(given, network)
    where = _layers(network)
    selected_in: dict[str, int] = defaultdict(int)
    size_of: dict[str, int] = defaultdict(int)
    histogram = torch.zeros(BINS)
    for name, weight in network.named_parameters():
        selected, beta = factors(importance[name], forget_importance[name], alpha, dampening)
        layer = where.get(name, name.rpartition(".")[0] or name)
        selected_in[layer] += int(selected.sum())
        size_of[layer] += weight.numel()
        histogram += torch.histc(beta[selected].float().cpu(), BINS, 0, 1)
        if not dry_run:
            weight.copy_(torch.where(selected, (weight.to(beta.dtype) * beta).to(weight.dtype), weight))
    return {
        "selected": sum(selected_in.values()) / sum(size_of.values()),
        "selected_by_layer": {layer: selected_in[layer] / size_of[layer] for layer in size_of},
        "beta_histogram": [int(count) for count in histogram],
    }


@system(
    "ssd",
    verb="erase",
    title="Selective synaptic dampening (SSD)",
    paper="Foster et al. 2024 (arXiv 2308.07707)",
    takes="causal-lm or classifier",
    needs={"forget"},
    uses={"train", "retain"},
    fidelity="adapted",
    deviations=(
        "by default importances are squared gradients of single records; the code's mini-batch form is a setting",
        "alpha follows from the sizes of the sets by default; the paper sets it by task (10 for ResNet18)",
        "language models are ours: a record's loss is that of its whole answer",
    ),
)
class SSD(Method):
    """Shrinks the weights that matter to `forget` far more than to `train` (or, without it, `retain` and `forget`)."""

    alpha: float | Literal["auto"] = setting(
        default="auto",
        origin="ours: half the bound; paper: 10, ViT 5 to 25, faces 50",
        help="how many times more a weight must matter to the forget set; auto: 0.5 |D| / |F|",
    )
    dampening: float = setting(default=1.0, above=0, origin="official code", help="lambda; faces: 0.1")
    mode: Mode = setting(
        default="per_sample", origin="paper's definition; official code: batch", help="how importances are measured"
    )
    importance: str | None = setting(
        default=None, origin="ours", help="file of stored importances of the training data; it is then not needed"
    )
    dry_run: bool = setting(default=False, origin="ours", help="report the selection and change nothing")
    reduction: Reduction = setting(
        default="sum", origin="ours", help="loss of a language model's record: summed over its answer, or the mean"
    )
    batch_size: int = setting(
        default=128, at_least=1, origin="official code", help="records a mini-batch; per_sample: computed at once"
    )
    max_length: int | None = setting(
        default=512, at_least=2, origin="ours", help="longest sequence, tokens; None: the model's"
    )

    def __post_init__(self) -> None:
        if self.alpha != "auto" and (isinstance(self.alpha, str | bool) or not 0 < self.alpha < math.inf):
            raise PalimpsestError(f"ssd: alpha is {self.alpha!r}, expected a number above 0, or auto.")

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after the dampening; its ledger entry says what was selected."""
        stored = self._stored(model)
        known = [] if stored is not None else self._training(data)
        contained = stored is None and {r.key for r in data.forget} <= {r.key for r in known}
        if self.alpha == "auto" and stored is None and not contained:
            raise PalimpsestError(
                "ssd: some forget records are not in train, so alpha cannot follow from the sizes of the sets. "
                "Add them to train, or set alpha."
            )
        forget = self._measure(model, data.forget, run, "forget")
        whole = stored if stored is not None else self._measure(model, known, run, "train")
        bound = whole.examples / forget.examples
        alpha = 0.5 * bound if self.alpha == "auto" else float(self.alpha)
        nothing = contained and self.mode == "per_sample" and alpha >= bound
        edited = model if run.in_place else model.copy()
        # at the bound rounding alone would decide, where in truth nothing can be selected
        limit = math.inf if nothing else alpha
        report = dampen(edited.network, whole.values, forget.values, limit, self.dampening, dry_run=self.dry_run)
        run.note(
            alpha=alpha,
            bound=bound,
            **report,
            zero_importances={"train": whole.zeros, "forget": forget.zeros},
            importances={"train": whole.digest(), "forget": forget.digest()},
            examples={"train": whole.examples, "forget": forget.examples},
        )
        for text in _doubts(report["selected"], alpha, bound, nothing):
            run.warn(text)
        return edited

    def _training(self, data: Roles) -> list[Record]:
        if "train" in data:
            return data.train
        if "retain" in data:
            return [*data.retain, *data.forget]
        raise PalimpsestError('ssd needs the role "train" or "retain", or importances stored in a file (importance).')

    def _stored(self, model: Model) -> Fisher | None:
        if self.importance is None:
            return None
        stored = Fisher.load(self.importance, model)
        for name in ("mode", "reduction") if model.processor is not None else ("mode",):
            if getattr(stored, name) != getattr(self, name):
                raise PalimpsestError(
                    f"ssd: the stored importances have {name} {getattr(stored, name)}, expected {getattr(self, name)}."
                )
        return stored

    def _measure(self, model: Model, records: list[Record], run: Run, role: str) -> Fisher:
        return diagonal_fisher(
            model,
            records,
            run,
            self.mode,
            reduction=self.reduction,
            batch_size=self.batch_size,
            max_length=self.max_length,
            role=role,
        )


def _doubts(selected: float, alpha: float, bound: float, nothing: bool) -> list[str]:
    if nothing:
        return [f"ssd: alpha is {alpha:g}, but no ratio can be above |D| / |F| = {bound:g}: nothing can be selected."]
    if not selected:
        return [f"ssd: no weight matters {alpha:g} times more to the forget set: nothing was changed."]
    if selected > DANGER:
        return [f"ssd: {selected:.0%} of the weights are selected; above {DANGER:.0%} models collapse. Raise alpha."]
    return []


def _layers(network: nn.Module) -> dict[str, str]:
    """The block of every parameter inside one."""
    return {name: block.name for block in anatomy(network).blocks() for name in block.tensors()}
