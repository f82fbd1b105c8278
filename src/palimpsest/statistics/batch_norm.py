"""Running averages of batch norms, taken again after their network's weights were edited.

They are measured in training, not learned: weights that were averaged or scaled leave them behind. Networks without
batch norms, as nearly all language models are, need nothing.

Source: Izmailov et al. 2018 (arXiv 1803.05407), section 3.3, as torch has it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.statistics.examples import Examples

BATCH_SIZE = 64


def has_averages(network: nn.Module) -> bool:
    """Whether the network has batch norms with running averages."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats for m in network.modules())


def recompute_averages(model: Model, data: Roles, run: Run, by: str) -> None:
    """Sets the running averages to those of the role `train`, in place; warns where that role is not given.

    Raises where there is but one record: it has no variance.
    """
    if not has_averages(model.network):
        return
    if not data.get("train"):
        run.warn(f"{by}: the running averages of the batch norms are those of before; the role train renews them.")
        return
    if len(data.train) < 2:
        raise PalimpsestError(f"{by}: the running averages of batch norms need at least 2 records in train.")
    examples = Examples(model, data.train)
    order = torch.randperm(len(examples), generator=run.generator())
    # of nearly equal size: every batch counts the same in the average
    groups = order.tensor_split(-(-len(order) // BATCH_SIZE))
    update_bn((examples.batch(group.tolist()).inputs["pixel_values"] for group in groups), model.network)
