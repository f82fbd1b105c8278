"""Tensors by name in a file with a few facts about them: written whole or not at all, read only as what they are.

The files are safetensors; the facts are texts in its header, the format among them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from palimpsest.errors import PalimpsestError


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> Path:
    """Writes the file; what was there before stays until the new one is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    try:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, partial, metadata=dict(facts))
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise PalimpsestError(f"{path} cannot be written ({error}).") from error
    finally:
        Path(partial).unlink(missing_ok=True)
    return path


def read_tensors(
    path: str | Path, form: str, what: str, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and facts of a file; raises where it is missing, damaged or of another format. `what` names the kind."""
    path = Path(path)
    article = "an" if what[0] in "aeiou" else "a"
    if not path.is_file():
        raise PalimpsestError(f"the {what} file {path} does not exist.")
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PalimpsestError(f"{path} cannot be read as {article} {what} file ({error}).") from None
    if facts.get("format") != form:
        raise PalimpsestError(f"{path} is no {what} file: its format is {facts.get('format', 'not stated')!r}.")
    return tensors, facts
