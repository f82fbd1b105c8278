"""RMU (representation misdirection): steer the inner state on forget records to noise, keep it elsewhere.

Acts on hidden states instead of answers: at one block, the state on forget tokens is drawn to one random direction and
the state on retain tokens to what it was. Use it to make a topic unusable rather than an answer unlikely; its answers
turn to gibberish when pushed, which the text-health measures show.

Source: Li et al. 2024 (arXiv 2403.03218), section 4, in OpenUnlearning's TOFU configuration (all weights are trained).
Differs: OpenUnlearning divides per-sequence sums [B] by counts [B, 1], which mixes the lengths of different sequences;
here each sequence is averaged over its own tokens. The reference states are computed once.

    h      hidden           [targets, width]  output of the block at each scored token
    h_ref  reference        [targets, width]  the same under the model as given
    u      direction        [width]           iid uniform on [0, 1), scaled to norm 1, times c
    c      steering

    L = gamma mse(h_forget, u) + alpha mse(h_retain, h_ref)        mse: over width, tokens of a sequence, sequences
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.data.encoding import Encoded
from palimpsest.data.packing import packer, rows
from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.anatomy import anatomy
from palimpsest.models.hooks import capture
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.likelihood import ROW_TOKENS
from palimpsest.system import Method, setting, system
from palimpsest.train import Batch, Training, schedule, train


def sequence_mse(
    hidden: Float[Tensor, "targets width"],
    aim: Float[Tensor, "targets width"] | Float[Tensor, " width"],
    owner: Int[Tensor, " targets"],
    count: Float[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """Squared error averaged over the width, then over each sequence's own tokens, then over sequences."""
    error = (hidden - aim).square().mean(-1)
    return (error.new_zeros(len(count)).index_add(0, owner, error) / count).mean()


def hidden_states(
    model: Model, sequences: list[Encoded], module: str, run: Run
) -> list[Float[Tensor, "targets width"]]:
    """The module's output at the scored tokens of each sequence, under the model as it is now."""
    network, arrange = model.network, packer(model.network)
    states: list[Tensor] = [torch.empty(0)] * len(sequences)
    with torch.no_grad():
        for group in run.track(list(rows(sequences, ROW_TOKENS)), "reference"):
            packed = arrange([sequences[i] for i in group]).to(model.device)
            with capture({module: network.get_submodule(module)}) as outputs:
                network(**packed.inputs(), logits_to_keep=torch.zeros(1, dtype=torch.long))
            at_targets = outputs[module][packed.row, packed.here].float()
            for place, i in enumerate(group):
                states[i] = at_targets[packed.owner == place].clone()
    return states


@system(
    "rmu",
    verb="erase",
    title="Representation misdirection (RMU)",
    paper="Li et al. 2024 (arXiv 2403.03218)",
    takes="causal-lm",
    needs={"forget", "retain"},
    fidelity="adapted",
    deviations=("each sequence is averaged over its own tokens; OpenUnlearning's division mixes lengths",),
)
class RMU(Method):
    """Steers one block's output on forget tokens to a random direction; holds it on retain tokens."""

    layer: int | None = setting(
        default=None,
        at_least=0,
        origin="OpenUnlearning: 7 of 16",
        help="block whose output is steered; None: at 7/16 of the depth",
    )
    steering: float = setting(
        default=2.0, above=0, origin="OpenUnlearning; WMDP 7B: about 6.5", help="c, norm of the direction"
    )
    forget_weight: float = setting(default=1.0, above=0, origin="OpenUnlearning", help="gamma")
    retain_weight: float = setting(default=1.0, at_least=0, origin="OpenUnlearning; WMDP 7B: about 1200", help="alpha")
    training: Training = setting(default=Training(), origin="OpenUnlearning", help="how to train")

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after the steering."""
        blocks = anatomy(model.network).blocks()
        layer = self.layer if self.layer is not None else 7 * len(blocks) // 16
        if layer >= len(blocks):
            raise PalimpsestError(
                f"rmu: layer is {layer}, but {type(model.network).__name__} has {len(blocks)} blocks."
            )
        block = blocks[layer].name
        plan = schedule(model, self.training, run, forget=data.forget, retain=data.retain)
        reference = hidden_states(model, plan.sequences["retain"], block, run)
        noise = torch.rand(model.network.config.get_text_config().hidden_size, generator=run.generator())
        direction = (self.steering * noise / noise.norm()).to(model.device)

        def objective(batch: Batch) -> Float[Tensor, ""]:
            forget, retain = batch.forget, batch.retain
            kept = torch.cat([reference[int(i)] for i in retain.index])
            steer = sequence_mse(forget.hidden, direction, forget.owner, forget.count)
            hold = sequence_mse(retain.hidden, kept, retain.owner, retain.count)
            return self.forget_weight * steer + self.retain_weight * hold

        return train(model, plan, objective, self.training, run, watch=block)
