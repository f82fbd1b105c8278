"""The ledger: what was done to a model, in order, with digests of data and weights. Never the data itself.

It is saved as `palimpsest.json` beside the weights; `verify` recomputes the digest of the saved weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.errors import PalimpsestError

if TYPE_CHECKING:
    import torch

FILE = "palimpsest.json"
FORMAT = 1
ADJUSTED = "adjust"
"""What an entry is called that changed settings of a network without a method."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One change: the method with its hyperparameters and seed, digests before and after, cost, readings."""

    method: str
    settings: dict[str, Any]
    seed: int
    version: str
    data: dict[str, str]
    weights_before: str
    weights_after: str
    seconds: float = 0.0
    peak_bytes: float = 0.0
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    readings: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ledger:
    """Where the model came from and every change since."""

    source: str = ""
    entries: tuple[Entry, ...] = ()

    def add(self, entry: Entry) -> Ledger:
        """A ledger with one more entry."""
        return dataclasses.replace(self, entries=(*self.entries, entry))

    @property
    def made_by(self) -> Entry | None:
        """The last method that changed the model; settings that were adjusted since are no method."""
        return next((entry for entry in reversed(self.entries) if entry.method != ADJUSTED), None)

    def to_dict(self, weights: str) -> dict[str, Any]:
        """The ledger as JSON values, sealed with the digest of the weights it lies beside."""
        return {"format": FORMAT, "weights": weights, **dataclasses.asdict(self)}

    @classmethod
    def read(cls, folder: Path) -> Ledger | None:
        """The ledger of a saved model; None where the folder has none."""
        saved = read_file(folder)
        if saved is None:
            return None
        return cls(source=saved["source"], entries=tuple(Entry(**entry) for entry in saved["entries"]))


def read_file(folder: Path) -> dict[str, Any] | None:
    """The content of `palimpsest.json`; None where there is none, an error where it cannot be read."""
    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        found = saved["format"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise PalimpsestError(f"{path} is damaged and cannot be read as a ledger ({error}).") from None
    if found > FORMAT:
        raise PalimpsestError(
            f"{path} has format {found}; this version of palimpsest reads up to {FORMAT}. Upgrade it."
        )
    if missing := {"weights", "source", "entries"} - saved.keys():
        raise PalimpsestError(f"{path} is damaged and cannot be read as a ledger (it has no {min(missing)}).")
    return saved


def check_replaceable(folder: Path) -> None:
    """Raises where the folder holds files but no model, which nobody means to have replaced."""
    if any(folder.iterdir()) and not any((folder / name).exists() for name in ("config.json", FILE)):
        raise PalimpsestError(f"{folder} holds files, but no model: they are not overwritten. Choose another folder.")


def weights_digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of the tensors, in order of name; shared tensors count once."""
    import torch

    sha = hashlib.sha256()
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for name in sorted(state):
        tensor = state[name].detach()
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        sha.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        sha.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def saved_weights_digest(folder: Path) -> str:
    """SHA-256 of the safetensors files of a saved model, file by file in order of name."""
    files = sorted(Path(folder).rglob("*.safetensors"))
    if not files:
        raise PalimpsestError(f"{folder} holds no safetensors weights.")
    sha = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                sha.update(chunk)
    return sha.hexdigest()


def verify(folder: Path) -> dict[str, Any]:
    """The saved ledger of a model, after checking that the weights beside it are the ones it was sealed with."""
    saved = read_file(folder)
    if saved is None and not Path(folder).is_dir():
        raise PalimpsestError(f"the folder {folder} does not exist.")
    if saved is None:
        raise PalimpsestError(f"{folder} has no {FILE}: it was not saved by palimpsest.")
    found = saved_weights_digest(folder)
    if found != saved["weights"]:
        raise PalimpsestError(
            f"the weights in {folder} are not those of its ledger (SHA-256 {found[:12]}..., expected "
            f"{saved['weights'][:12]}...): they are damaged or were changed by other means. Nothing was loaded."
        )
    return saved
