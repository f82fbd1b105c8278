"""What networks have in common that hold other networks: the sizes they show, and how configs inside are read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig


class WrapperConfig(PreTrainedConfig):
    """The sizes that the rest of the library asks a language model for; `sizes_of` fills them in."""

    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    max_position_embeddings: int | None = None
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


def sizes_of(configs: Sequence[Any]) -> dict[str, Any]:
    """The sizes of several networks as one: words and width of the first, what all can do of the rest."""
    first = configs[0]

    def least(field: str) -> Any:
        return min((x for config in configs if (x := getattr(config, field, None))), default=None)

    return {
        "vocab_size": first.vocab_size,
        "hidden_size": first.hidden_size,
        "num_hidden_layers": sum(getattr(config, "num_hidden_layers", 0) for config in configs),
        "max_position_embeddings": least("max_position_embeddings"),
        "sliding_window": least("sliding_window"),
        **{field: getattr(first, field, None) for field in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def config_of(saved: Mapping[str, Any]) -> Any:
    """The config of a network inside, from what a saved config holds of it."""
    fields = {name: value for name, value in saved.items() if name not in ("model_type", "transformers_version")}
    return AutoConfig.for_model(saved["model_type"], **fields)
