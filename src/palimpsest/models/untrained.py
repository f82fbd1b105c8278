"""A model that knows nothing: the same architecture with random weights, as a reference or a teacher."""

from __future__ import annotations

import copy

import torch

from palimpsest.models.model import Model
from palimpsest.run import Run

SALT = 7919


def untrained(model: Model, run: Run) -> Model:
    """A network of the model's configuration with random weights, other ones than a training from this seed began with.

    It is in evaluation mode, on the same device and in the same precision.
    """
    network = model.network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.generator(SALT).initial_seed())
        random = type(network)(copy.deepcopy(network.config))
    return Model(random.to(device=network.device, dtype=network.dtype).eval(), model.processor)
