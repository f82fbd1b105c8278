"""How a method fine-tunes: the settings that all of them share."""

from __future__ import annotations

from typing import Literal

from palimpsest.system import setting, settings


@settings
class Training:
    """How a method fine-tunes. The defaults are those of OpenUnlearning on TOFU."""

    learning_rate: float = setting(default=1e-5, above=0, origin="OpenUnlearning", help="peak learning rate")
    epochs: int = setting(default=10, at_least=1, origin="OpenUnlearning", help="passes over the anchor records")
    max_steps: int | None = setting(
        default=None, at_least=1, origin="ours", help="stop after this many steps; None: all epochs"
    )
    batch_size: int = setting(
        default=32, at_least=1, origin="OpenUnlearning", help="records a step, over all processes"
    )
    weight_decay: float = setting(default=0.01, at_least=0, origin="OpenUnlearning", help="AdamW weight decay")
    warmup_epochs: float = setting(default=1.0, at_least=0, origin="OpenUnlearning", help="epochs of linear warm-up")
    decay: Literal["linear", "constant", "cosine"] = setting(
        default="linear", origin="OpenUnlearning", help="schedule after warm-up"
    )
    max_grad_norm: float = setting(default=1.0, above=0, origin="transformers", help="gradient clipping, L2 norm")
    max_length: int | None = setting(
        default=512, at_least=2, origin="OpenUnlearning", help="longest sequence, tokens; None: the model's"
    )
    optimizer: Literal["adamw", "galore", "galore-8bit"] = setting(
        default="adamw", origin="OpenUnlearning", help="galore: AdamW on projected gradients (see `fit galore`)"
    )
    lora_rank: int = setting(
        default=0, at_least=0, origin="ours", help="0 trains all weights, else adapters of this rank, merged at the end"
    )
    lora_alpha: float | None = setting(
        default=None, above=0, origin="ours", help="scale of the adapters, divided by their rank; None: twice the rank"
    )
    lora_dropout: float = setting(
        default=0.0, at_least=0, below=1, origin="peft", help="share of an adapter's inputs dropped in training"
    )
    micro_tokens: int = setting(
        default=512,
        at_least=1,
        origin="ours, measured",
        help="tokens computed at once (an image is one): memory, not result",
    )
