"""SEUF: unlearn through one expert of a mixture, and keep it chosen.

The usual losses change which experts the routers choose: tokens of the forget set drift to experts that have nothing to
do with it, and these are unlearned too. Here the expert that the forget set uses most is found, it and its row of the
router alone are trained, and an anchor holds the router to it. Any eraser that trains can be plugged in. Use it on
mixtures of experts whose experts have specialised; where all are used alike (it warns), one expert holds nothing.

Source: Zhuang et al. 2025 (arXiv 2411.18797); no code is published. Where the paper is silent: the anchor is taken at
the scored tokens of the forget batch, and on the whole softmax, because an expert that is no longer chosen has the
masked weight 0 and no gradient that could bring it back; of the router, the row of the expert is trained.

    s_t    softmax of the router's logits     [experts]  of a token t
    g_t    weights of the chosen experts      [experts]  0 elsewhere (masked)
    a      affinity                           [layers, experts]  mean over forget records of the mean over tokens of g_t
    E      the M pairs (layer, expert) of the largest a; e is 1 at those of a layer, else 0
    alpha  anchor

    L = L_method + alpha mean_layers mean_t |s_t - e|^2
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from palimpsest.data.encoding import Encoded, Encoder
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.anatomy import Anatomy, anatomy
from palimpsest.models.hooks import Call, watch
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.experts import ExpertUsage, expert_usage, routing, routing_overlap
from palimpsest.system import Method, create, facts_of, setting, system
from palimpsest.train import Batch, Training

Scope = Literal["network", "layer", "every layer"]
Choice = Literal["most", "least", "random"]
FEW_TOKENS = 1000
UNFIT = ("seuf", "balanced-subnet", "selective-amnesia", "retrain", "uld", "whp-decode")
"""Erasers that choose weights themselves, or give another network than the one they were given."""
SPECIALISED = 1.5
"""Times the affinity of an even use, below which an expert has hardly specialised."""


def anchor_loss(
    weights: Float[Tensor, "tokens experts"], chosen: Int[Tensor, " targets"], aim: float = 1.0
) -> Float[Tensor, ""]:
    """Mean over tokens of |s - e|^2, where e is `aim` at the chosen experts."""
    target = torch.zeros_like(weights[0]).index_fill(0, chosen, aim)
    return (weights - target).square().sum(-1).mean()


def select_experts(
    affinity: Float[Tensor, "layers experts"],
    count: int,
    scope: Scope = "network",
    choice: Choice = "most",
    seed: int = 0,
) -> list[tuple[int, int]]:
    """M pairs (row, expert): of the whole network, of the one best layer, or M of every layer."""
    most = affinity.shape[1] * (affinity.shape[0] if scope == "network" else 1)
    if not 1 <= count <= most:
        raise PalimpsestError(f"seuf: experts is {count}, expected 1 to {most}, the routed experts there are.")
    order = {"most": affinity, "least": -affinity}.get(choice)
    if order is None:
        order = torch.rand(affinity.shape, generator=torch.Generator().manual_seed(seed))
    if scope == "network":
        flat = order.flatten().argsort(descending=True, stable=True)[:count].tolist()
        return sorted(divmod(place, affinity.shape[1]) for place in flat)
    layers = range(len(order)) if scope == "every layer" else [int(order.max(1).values.argmax())]
    return [(row, int(e)) for row in layers for e in sorted(order[row].argsort(descending=True, stable=True)[:count])]


class Rows(nn.Module):
    """A parametrisation of torch: some first-dimension slices of a weight are trained, the others are as they were."""

    def __init__(self, weight: Tensor, index: Int[Tensor, " rows"]) -> None:
        super().__init__()
        self.register_buffer("index", index, persistent=False)
        self.rows = nn.Parameter(weight.detach()[index].clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with these slices in their places."""
        return weight.index_copy(0, self.index, self.rows)  # type: ignore[arg-type]


@system(
    "seuf",
    verb="erase",
    title="One expert of a mixture (SEUF)",
    paper="Zhuang et al. 2025 (arXiv 2411.18797)",
    takes="mixture-of-experts",
    needs={"forget"},
    uses={"retain"},
    fidelity="paper only",
    deviations=(
        "the anchor is taken on the whole softmax by default: the masked weight of an expert no longer chosen is 0",
        "the anchor is taken at the scored tokens; the paper does not say where",
        "of a router the row of the expert is trained; the paper says its router",
    ),
)
class SEUF(Method):
    """Another eraser, confined to the expert that the forget set uses most, with an anchor on the router."""

    method: str = setting(
        default="gradient-difference",
        origin="paper: ascent, difference, NPO or RMU",
        help="the eraser that is confined",
    )
    experts: int = setting(default=1, at_least=1, origin="paper", help="M, how many experts")
    scope: Scope = setting(
        default="network", origin="paper", help="M of the network, of its best layer, or of each layer"
    )
    choice: Choice = setting(default="most", origin="paper; its ablations", help="by affinity to the forget set")
    anchor: float = setting(default=1.0, at_least=0, origin="paper", help="alpha")
    anchor_on: Literal["softmax", "masked"] = setting(
        default="softmax",
        origin="ours; paper: masked",
        help="the router's whole softmax, or the chosen experts' weights",
    )
    target: Literal["one", "uniform"] = setting(
        default="one", origin="paper", help="e: 1 at each chosen expert of a layer, or 1 shared among them"
    )
    router: Literal["row", "layer", "none"] = setting(
        default="row", origin="ours; paper: the router", help="what is trained of a chosen expert's router"
    )
    retain_weight: float = setting(default=1.0, at_least=0, origin="paper", help="lambda, where the eraser has one")
    beta: float = setting(default=0.001, above=0, origin="paper", help="beta of NPO")
    steering: float = setting(default=8000.0, above=0, origin="paper: Qwen; DeepSeek 32000", help="c of RMU")
    attribution_tokens: int = setting(
        default=100_000, at_least=1, origin="paper", help="tokens of the forget set that affinity is measured on"
    )
    training: Training = setting(
        default=Training(learning_rate=1e-4, batch_size=16, weight_decay=0.0, warmup_epochs=0.0, decay="constant"),
        origin="paper; schedule ours",
        help="how the eraser trains",
    )

    def __post_init__(self) -> None:
        facts = facts_of(self.method)
        if facts.verb != "erase" or self.method in UNFIT or "training" not in self._fields():
            raise PalimpsestError(
                f"seuf: method is {self.method!r}, expected an eraser that trains the weights it is given, npo for "
                "instance."
            )
        if self.training.lora_rank:
            raise PalimpsestError("seuf trains experts themselves: set training.lora_rank to 0.")

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after the eraser; its ledger entry has affinities, the share trained and how the routing moved."""
        usage = expert_usage(model, self._sample(model, data.forget, run), run, max_length=self.training.max_length)
        chosen = select_experts(usage.affinity, self.experts, self.scope, self.choice, run.seed)
        self._doubt(usage, chosen, run)
        student = model if run.in_place else model.copy()
        original = model.copy() if run.in_place else model
        attached = _attach(student.network, chosen, self.router)
        routers = {usage.routers[row]: student.network.get_submodule(usage.routers[row]) for row, _ in chosen}
        seen: dict[str, Any] = {}

        def keep(call: Call, output: Any) -> None:
            seen[call.key] = output

        anchored = False

        def penalty(batch: Batch) -> Float[Tensor, ""]:
            nonlocal anchored
            if "forget" not in batch:  # a step of some erasers is for the retain set alone
                return torch.zeros((), device=model.device)
            anchored = True
            losses = [self._anchor(name, seen[name], batch, usage, chosen) for name in routers]
            return self.anchor * torch.stack(losses).mean()

        # a folder is for checkpoints, and none can be read into the class that torch gives a parametrised module
        work = run.replace(in_place=True, folder=None, penalty=penalty if self.anchor else None)
        share, done = sum(w.numel() for w in student.network.parameters() if w.requires_grad), False
        try:
            with watch(routers, forward=keep), _without_jitter(student.network):
                trained = self._method(chosen, anatomy(student.network)).apply(student, data, work)
            done = True
        finally:
            for module, name in attached:
                parametrize.remove_parametrizations(module, name, leave_parametrized=done)
            student.network.requires_grad_(True)
        if self.anchor and not anchored:
            run.warn(f"seuf: {self.method} takes no step on the forget answers themselves, so the anchor never acted.")
        known = [role for role in ("forget", "retain") if role in data]
        run.note(
            experts=[f"layer {row}, expert {expert}" for row, expert in chosen],
            trained_share=share / sum(w.numel() for w in original.network.parameters()),
            affinity=usage.affinity,
            routing_overlap={role: routing_overlap(trained, original, data[role], run) for role in known},
        )
        return trained

    def _anchor(
        self, name: str, output: Any, batch: Batch, usage: ExpertUsage, chosen: Sequence[tuple[int, int]]
    ) -> Float[Tensor, ""]:
        """The anchor of one router at the forget tokens, from what the router last gave."""
        masked, softmax, _ = routing(name, output)
        weights = softmax if self.anchor_on == "softmax" else masked
        own = [expert for row, expert in chosen if usage.routers[row] == name]
        aim = 1.0 if self.target == "one" else 1 / len(own)
        return anchor_loss(weights[batch.forget.nodes], torch.tensor(own, device=weights.device), aim)

    def _fields(self) -> set[str]:
        return {field.name for field in dataclasses.fields(create(self.method))}

    def _method(self, chosen: Sequence[tuple[int, int]], parts: Anatomy) -> Method:
        """The eraser with the settings that it shares with this one."""
        own = self._fields() & {"training", "retain_weight", "beta", "steering"}
        fields = {name: getattr(self, name) for name in own}
        if "layer" in self._fields():
            fields["layer"] = parts.find("router")[chosen[0][0]].layer
        return create(self.method, **fields)

    def _sample(self, model: Model, records: list[Record], run: Run) -> list[Encoded]:
        """Forget records in random order until they have as many tokens as are wanted."""
        sequences = Encoder.of(model, self.training.max_length).records(records, run.warn)
        taken, tokens = [], 0
        for i in torch.randperm(len(sequences), generator=run.generator()).tolist():
            if tokens < self.attribution_tokens:
                taken.append(sequences[i])
                tokens += len(sequences[i].tokens)
        if tokens < FEW_TOKENS:
            run.warn(f"seuf: the forget set has {tokens} tokens; affinities from fewer than {FEW_TOKENS} are noisy.")
        return taken

    def _doubt(self, usage: ExpertUsage, chosen: Sequence[tuple[int, int]], run: Run) -> None:
        row, expert = max(chosen, key=lambda pair: float(usage.affinity[pair]))
        times = float(usage.affinity[row, expert] / usage.affinity[row].mean())
        if self.choice == "most" and times < SPECIALISED:
            run.warn(
                f"seuf: expert {expert} of layer {row} is used {times:.2f} times as much as on average, below "
                f"{SPECIALISED}: the experts have hardly specialised, and one of them holds little of the forget set."
            )


def _attach(
    network: nn.Module, chosen: Sequence[tuple[int, int]], router: Literal["row", "layer", "none"]
) -> list[tuple[nn.Module, str]]:
    """Freezes the network but for the chosen experts and their routers; the weights of which slices are trained."""
    parts = anatomy(network)
    routers = parts.find("router")
    network.requires_grad_(False)
    slices: dict[tuple[Any, str], list[int]] = {}
    for row, expert in chosen:
        layer = [part for part in parts.find("expert") if part.layer == routers[row].layer]
        if expert >= len(layer):
            raise PalimpsestError(f"seuf: layer {row} has {len(layer)} experts that can be trained, wanted {expert}.")
        for name in layer[expert].parameters:
            module, _, own = name.rpartition(".")
            holder = layer[expert].module.get_submodule(module)
            weight = holder.get_parameter(own)
            if not weight.is_floating_point():
                raise PalimpsestError(
                    f"seuf: {layer[expert].name} holds {weight.dtype} weights, which cannot be trained."
                )
            if layer[expert].expert is None:
                weight.requires_grad_(True)
            else:
                slices.setdefault((holder, own), []).append(expert)
        if router == "layer":
            routers[row].module.requires_grad_(True)
        elif router == "row":
            for name in routers[row].parameters:
                slices.setdefault((routers[row].module, name), []).append(expert)
    for (holder, name), places in slices.items():
        weight = holder.get_parameter(name)
        rows = Rows(weight, torch.tensor(sorted(places), device=weight.device))
        parametrize.register_parametrization(holder, name, rows, unsafe=True)
    return list(slices)


@contextlib.contextmanager
def _without_jitter(network: nn.Module) -> Iterator[None]:
    """Routers that add noise in training do not inside."""
    noisy: dict[Any, float] = {
        module: float(module.jitter_noise)  # type: ignore[arg-type]
        for module in network.modules()
        if getattr(module, "jitter_noise", 0)
    }
    for module in noisy:
        module.jitter_noise = 0.0
    try:
        yield
    finally:
        for module, noise in noisy.items():
            module.jitter_noise = noise
