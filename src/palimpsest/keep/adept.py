"""ADEPT: room for a new domain where general text needs the network least, and tensors that learn at their own pace.

Training on a narrow domain overwrites what a model could do before. Here the blocks whose absence hurts general text
least are copied, the copies begin as nothing (`models.depth`), and only they are trained. While they train, each of
their tensors has a learning rate that falls with how much general text needs it, measured again every `refresh` steps.
Use it for continued pre-training on a domain; the result is k blocks deeper.

Source: Zhang et al. 2025 (arXiv 2510.10071) and the authors' code. `llama-pro` is the comparison that spreads its
copies evenly and trains them at one rate (Wu et al. 2024, arXiv 2401.02415).

    I(l)       [layers]   what the general loss gains with block l skipped (`statistics.bypass`)
    S                     the k blocks with the smallest I(l); each is copied
    I_u        [units]    mean over a tensor of |theta_j| |g_j|; |g| is averaged over batches of general text
    w_u = 2 (max I - I_u) / (max I - min I)      1 where all are alike
    lr_u(step) = learning rate(step) * w_u

At the first step the copies' outputs are zero, so that all I_u are: nothing is measured before `refresh` steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.data.encoding import Encoder
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.anatomy import anatomy
from palimpsest.models.depth import expand
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.bypass import bypass_importance
from palimpsest.statistics.examples import Examples, evaluating
from palimpsest.system import Method, configuration, setting, system
from palimpsest.train import Training, schedule, train

Choice = Literal["least", "most", "uniform"]


def multipliers(importance: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """w of each unit: 0 for the most needed, 2 for the least, 1 where all are alike."""
    reach = importance.max() - importance.min()
    return torch.ones_like(importance) if reach == 0 else 2 * (importance.max() - importance) / reach


def chosen_layers(importance: Sequence[float], k: int, choice: Choice = "least") -> list[int]:
    """The blocks to copy, in order; equal importances go to the first."""
    layers = len(importance)
    if not 0 < k <= layers:
        raise PalimpsestError(f"adept: {k} of {layers} blocks cannot be copied, expected 1 to {layers}.")
    if choice == "uniform":
        return [(i + 1) * layers // k - 1 for i in range(k)]
    sign = 1 if choice == "least" else -1
    return sorted(sorted(range(layers), key=lambda layer: sign * importance[layer])[:k])


def unit_importance(
    model: Model, units: Mapping[str, nn.Parameter], examples: Examples, batch_size: int
) -> Float[Tensor, " units"]:
    """I of each unit on the examples, in float32; gradients are left as they were."""
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in units.items()}
    groups = examples.groups(batch_size)
    with evaluating(model.network):
        for group in groups:
            batch = examples.batch(group)
            loss = batch.losses(model.network).sum() / batch.count.sum()
            for name, gradient in zip(units, torch.autograd.grad(loss, list(units.values())), strict=True):
                sums[name] += gradient.float().abs() / len(groups)
    return torch.stack([(weight.detach().float().abs() * sums[name]).mean() for name, weight in units.items()])


class UnitAdamW(torch.optim.AdamW):
    """AdamW with a group a tensor, whose `multiplier` scales the scheduled learning rate; norms are not decayed."""

    def __init__(self, units: Mapping[str, nn.Parameter], training: Training) -> None:
        decay = {name: training.weight_decay if weight.ndim > 1 else 0.0 for name, weight in units.items()}
        groups = [{"params": [w], "weight_decay": decay[n], "multiplier": 1.0} for n, w in units.items()]
        super().__init__(groups, lr=training.learning_rate)

    def set(self, values: Float[Tensor, " units"]) -> None:
        """The multipliers from now on."""
        for group, value in zip(self.param_groups, values.tolist(), strict=True):
            group["multiplier"] = value

    def step(self, closure: Any = None) -> Any:
        """One step; the rates that the scheduler sees stay as they are."""
        scheduled = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = group["lr"] * group["multiplier"]
        try:
            return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, scheduled, strict=True):
                group["lr"] = rate


@configuration(
    "llama-pro",
    title="LLaMA-Pro (copies spread evenly, one learning rate)",
    paper="Wu et al. 2024 (arXiv 2401.02415)",
    preset={"choice": "uniform", "unit_rates": False},
    deviations=("copies are chosen and begin as in ADEPT's code, of which this is a setting",),
)
@system(
    "adept",
    verb="keep",
    title="ADEPT (selective expansion, unit-wise learning rates)",
    paper="Zhang et al. 2025 (arXiv 2510.10071)",
    needs={"train", "general"},
    fidelity="adapted",
    deviations=(
        "one parameter group a tensor, as the paper means; the released trainer has two groups, so that only two "
        "learning rates change",
        "importance of units is unsigned and scaled by its range, as in the code; the paper's formula is signed",
        "as many copies as a seventh of the blocks where none is given; the paper states 4 or 8 for each model",
    ),
)
class Adept(Method):
    """Copies the blocks that general text needs least and trains the copies on the role `train`."""

    copies: int | None = setting(
        default=None, at_least=1, origin="ours", help="k: blocks that are copied; None: a seventh of them"
    )
    layers: tuple[int, ...] | None = setting(
        default=None, origin="ours", help="the blocks to copy, in place of choosing; negative ones count from the end"
    )
    choice: Choice = setting(default="least", origin="paper", help="which blocks: least needed; others are controls")
    unit_rates: bool = setting(default=True, origin="paper", help="learning rates by tensor, or one for all")
    refresh: int = setting(default=500, at_least=1, origin="official code", help="steps between measuring the tensors")
    probe_batch: int = setting(default=2, at_least=1, origin="official code", help="general records a batch")
    probed: int = setting(default=64, at_least=1, origin="ours", help="general records that are measured on, at most")
    training: Training = setting(
        default=Training(learning_rate=1e-4, epochs=1, batch_size=8, warmup_epochs=0.05, decay="cosine"),
        origin="LLaMA-Factory's schedule; rate and batch: ours, the paper's are not known",
        help="how to train",
    )

    def __post_init__(self) -> None:
        if self.layers is not None and self.copies is not None:
            raise PalimpsestError("adept: layers already says which blocks are copied. Leave out copies.")

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The deeper model after training its copies on `train`."""
        if self.training.lora_rank:
            raise PalimpsestError("adept trains the copied blocks themselves: set training.lora_rank to 0.")
        student = model if run.in_place else model.copy()
        before = student.parameters
        probe = data.general[: self.probed]
        copied = expand(student.network, self._chosen(student, probe, run))
        units = {
            name: weight
            for name, weight in student.network.named_parameters()
            if any(name.startswith(f"{path}.") for path in copied)
        }
        run.note(copies=copied, trainable_share=sum(w.numel() for w in units.values()) / student.parameters)
        run.note(parameters_before=before, parameters=student.parameters)
        optimizer = UnitAdamW(units, self.training)
        plan = schedule(student, self.training, run, train=data.train)
        memory: dict[str, Any] = {"rates": []}
        trained = train(
            student,
            plan,
            lambda batch: batch.train.cross_entropy,
            self.training,
            run.replace(in_place=True),
            trainable=units.__contains__,
            optimizer=lambda network, training: optimizer,
            stop=self._refreshing(optimizer, units, probe, memory) if self.unit_rates else None,
            memory=memory,
            label="learning",
        )
        if memory["rates"]:
            run.note(unit_rates=memory["rates"])
        return trained

    def _chosen(self, model: Model, probe: Sequence[Record], run: Run) -> list[int]:
        if self.layers is not None:
            return list(self.layers)
        count = len(anatomy(model.network).blocks())
        k = self.copies or max(1, round(count / 7))
        if self.choice == "uniform":
            return chosen_layers([0.0] * count, k, "uniform")
        importance = bypass_importance(model, Encoder.of(model, self.training.max_length).records(probe, run.warn), run)
        run.note(layer_importance=importance)
        return chosen_layers(importance.tolist(), k, self.choice)

    def _refreshing(
        self,
        optimizer: UnitAdamW,
        units: Mapping[str, nn.Parameter],
        probe: Sequence[Record],
        memory: dict[str, Any],
    ) -> Any:
        """Measures the units anew every `refresh` steps."""

        def stop(step: int, model: Model) -> bool:
            if step % self.refresh == 0:
                examples = Examples(model, probe, self.training.max_length, role="general")
                optimizer.set(multipliers(unit_importance(model, units, examples, self.probe_batch)))
                memory["rates"].append([group["multiplier"] for group in optimizer.param_groups])
            return False

        return stop
