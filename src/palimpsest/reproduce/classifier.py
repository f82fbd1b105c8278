"""The small classifiers: real transformers networks that learn the digits in seconds, for tests and reproductions.

The convnet is a ResNet with 16, 32 and 32 channels and batch normalisation; the ViT has two layers over four patches.
Both are new networks with random weights, so a model that never saw the forget set is trained as quickly.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from palimpsest.data.digits import CLASSES, SIDE
from palimpsest.models.model import Model
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune

Kind = Literal["convnet", "vit"]

LEARNING = {
    "convnet": Finetune(
        training=Training(
            learning_rate=5e-3, epochs=12, batch_size=128, weight_decay=0.0, warmup_epochs=1.0, decay="cosine"
        )
    ),
    "vit": Finetune(
        training=Training(
            learning_rate=5e-3, epochs=20, batch_size=128, weight_decay=0.0, warmup_epochs=1.0, decay="cosine"
        )
    ),
}
"""How each kind learns: 120 and 200 steps, chosen on the test accuracy of seeds from 1000 on."""


SIZES: dict[str, dict[str, Any]] = {
    "convnet": {"embedding_size": 16, "hidden_sizes": [32, 32], "depths": [1, 1], "layer_type": "basic"},
    "vit": {
        "image_size": SIDE,
        "patch_size": SIDE // 2,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "initializer_range": 0.2,  # the usual 0.02 is for wide networks: with it this one hardly learns
    },
}


def new_classifier(seed: int = 0, kind: Kind = "convnet") -> Model:
    """A classifier of digits that knows nothing: 35,000 weights (convnet) or 18,000 (ViT)."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

    config, network = {
        "convnet": (ResNetConfig, ResNetForImageClassification),
        "vit": (ViTConfig, ViTForImageClassification),
    }[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(network(config(num_channels=1, num_labels=CLASSES, **SIZES[kind])).eval())
