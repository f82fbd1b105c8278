"""A model as this library hands it around: a transformers network, its tokenizer or processor, and its ledger."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from palimpsest import __version__
from palimpsest.errors import PalimpsestError
from palimpsest.ledger import ADJUSTED, FILE, Entry, Ledger, check_replaceable, saved_weights_digest, weights_digest


class Model:
    """A network with what belongs to it. `forward`, `generate` and `save_pretrained` are the network's own."""

    def __init__(self, network: Any, processor: Any = None, ledger: Ledger | None = None) -> None:
        self.network = network
        self.processor = processor
        self.story: Any = None  # what the one-call path chose, and why: a `palimpsest.forgetting.Story`
        self.ledger = ledger if ledger is not None else Ledger(source=getattr(network.config, "_name_or_path", ""))

    def __repr__(self) -> str:
        done = ", ".join(entry.method for entry in self.ledger.entries) or "as loaded"
        return f"Model({type(self.network).__name__}, {self.parameters:,} parameters, {done})"

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; a model without one raises."""
        if self.processor is None:
            raise PalimpsestError(
                f"{type(self.network).__name__} has no tokenizer. Pass one: Model(network, tokenizer)."
            )
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def parameters(self) -> int:
        """How many numbers the network has, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def device(self) -> torch.device:
        """Where the network's weights are."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> Model:
        """The same model with its weights moved."""
        self.network.to(device)
        return self

    def copy(self) -> Model:
        """A model of its own with equal weights and the same history."""
        return Model(copy.deepcopy(self.network), self.processor, self.ledger)

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """The network's `forward`."""
        return self.network(*inputs, **keywords)

    __call__ = forward

    def generate(self, *inputs: Any, **keywords: Any) -> Any:
        """The network's `generate`."""
        return self.network.generate(*inputs, **keywords)

    def answer(self, questions: str | Sequence[str], max_new_tokens: int = 64) -> list[str]:
        """The greedy answer to each question, asked through the chat template where the tokenizer has one."""
        from palimpsest.models.generation import greedy_answers
        from palimpsest.run import Run

        questions = [questions] if isinstance(questions, str) else questions
        return greedy_answers(self, questions, Run(progress=False), max_new_tokens=max_new_tokens)

    def digest(self) -> str:
        """SHA-256 of the weights in memory; computed again only after they changed.

        A change shows in the version or, since fused optimizers leave that as it is, in the sum of a tensor.
        """
        tensors = (*self.network.parameters(), *self.network.buffers())
        version = tuple((t.data_ptr(), t._version, float(t.detach().sum(dtype=torch.float32))) for t in tensors)
        if getattr(self, "_digest", (None, ""))[0] != version:
            self._digest = (version, weights_digest(self.network.state_dict()))
        return self._digest[1]

    def adjust(self, member: str | None = None, **changes: Any) -> Model:
        """Changes settings of a mixture, a datastore or a guard, such as `alpha`, without training; the ledger says so.

        `member` names the part of a mixture that is meant. Raises where the network has no such settings.
        """
        part = self.network if member is None else self.network.member(member)
        if not hasattr(part, "adjust"):
            raise PalimpsestError(f"{type(part).__name__} has no settings to change: it is no mixture and no guard.")
        before, settings = self.digest(), changes if member is None else {"member": member, **changes}
        part.adjust(**changes)
        entry = Entry(
            method=ADJUSTED,
            settings=settings,
            seed=0,
            version=__version__,
            data={},
            weights_before=before,
            weights_after=self.digest(),
        )
        self.ledger = self.ledger.add(entry)
        return self

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Saves weights, tokenizer and ledger; the folder is complete or, where anything fails, as it was before.

        A folder that already holds a model is refused unless `overwrite`.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise PalimpsestError(f"{folder} is a file, expected a folder.")
        if folder.exists() and any(folder.iterdir()) and not overwrite:
            raise PalimpsestError(f"{folder} already holds files. Choose another folder, or say overwrite.")
        from palimpsest.models.loading import quiet_transformers

        named, folder = folder, folder.resolve()  # a link stays one: what it points to is replaced
        if folder.exists():
            check_replaceable(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            with quiet_transformers():
                self.network.save_pretrained(staging, safe_serialization=True)
                if self.processor is not None:
                    self.processor.save_pretrained(staging)
            sealed = self.ledger.to_dict(saved_weights_digest(staging))
            (staging / FILE).write_text(json.dumps(sealed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            _share(staging)
            _swap(staging, folder)
        except (OSError, SafetensorError) as error:
            cause = getattr(error, "strerror", None) or error
            raise PalimpsestError(f"saving to {named} failed ({cause}); what was there is intact.") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return named


def _share(staging: Path) -> None:
    """Gives a private temporary folder the permissions of any other new folder and file."""
    umask = os.umask(0)
    os.umask(umask)
    staging.chmod(0o777 & ~umask)
    for path in staging.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _swap(staging: Path, folder: Path) -> None:
    """Puts the finished folder in place; the old one is set aside first and removed last.

    A kill between the two renames leaves the old model whole beside it, under a name that says so.
    """
    if not folder.exists():
        os.replace(staging, folder)
        return
    aside = folder.with_name(f"{folder.name}-old-{os.getpid()}")
    os.replace(folder, aside)
    try:
        os.replace(staging, folder)
    except OSError:
        os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
