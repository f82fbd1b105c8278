"""The kNN-LM datastore: for every scored token of a corpus, the hidden state before it and the token itself.

    K    keys      [rows, width]  float16: the input of the last block's feed-forward layer where a token is predicted
    V    values    [rows]         that token
         offsets   [sequences+1]  the rows of sequence i are offsets[i] to offsets[i + 1]

Row and (sequence, target) correspond one to one, in order, so that what the neighbours of a training token say can be
looked up while training on it (`targets`). A token's own row must not count then: it is excluded by its number,
wherever the search finds it. Other rows at distance zero are legitimate (overlapping or repeated text) and counted.

On disk a datastore is a folder with two arrays, the offsets and a header that tells whose states they are; keys are
mapped into memory, not read. Sources: Khandelwal et al. 2020 (arXiv 1911.00172), Cao et al. 2025 (arXiv 2508.09874)
and its official code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.data.encoding import Encoded
from palimpsest.data.packing import packer, rows
from palimpsest.errors import PalimpsestError
from palimpsest.models.datastore import DatastoreForCausalLM, key_place
from palimpsest.models.hooks import INPUT, capture
from palimpsest.models.mixture import foundation
from palimpsest.models.model import Model
from palimpsest.models.neighbours import EXACT_UP_TO, Neighbours, check_asked, closeness, distribution
from palimpsest.run import Run
from palimpsest.statistics.examples import evaluating
from palimpsest.statistics.likelihood import ROW_TOKENS, score
from palimpsest.statistics.targets import SparseTargets, sparse

FORMAT = 1
HEADER, KEYS, VALUES, OFFSETS = "datastore.json", "keys.npy", "values.npy", "offsets.npy"
QUERIES = 1024
RANK, SAMPLE = 8, 4096
"""The temperature to start from is the median squared distance to the neighbour of this rank, over so many rows."""
TEMPERATURES = tuple(2.0**power for power in range(-6, 3))
WEIGHTS = tuple(step / 40 for step in range(41))
"""What is tried on validation: multiples of that temperature, and interpolation weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Whose hidden states the keys are: the place in the network, and digests of weights and tokenizer."""

    reads: str
    model: str
    tokenizer: str
    vocabulary: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned:
    """Temperature and weight with the lowest validation NLL, and the NLL (nats a token) at every weight tried."""

    temperature: float
    weight: float
    weights: Float[np.ndarray, " weights"]
    nll: Float[np.ndarray, " weights"]


@dataclasses.dataclass(frozen=True, eq=False)
class KNNDatastore:
    """Rows with their index, the rows of each sequence, and where they come from."""

    rows: Neighbours
    offsets: Int[np.ndarray, " sequences+1"]
    origin: Origin

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def build(
        cls,
        model: Model,
        sequences: Sequence[Encoded],
        run: Run,
        *,
        folder: str | Path | None = None,
        exact_up_to: int = EXACT_UP_TO,
    ) -> KNNDatastore:
        """The datastore of the sequences, in one pass over them; with a folder, keys go straight to the disk.

        Raises where a state is no number, or too large for float16.
        """
        if not sequences:
            raise PalimpsestError("the datastore would be empty: no sequence was given.")
        origin = origin_of(model)
        offsets = np.cumsum([0, *(len(sequence.targets) for sequence in sequences)])
        values = np.array([token for sequence in sequences for token in sequence.targets], dtype=np.int32)
        shape = (len(values), _width(model))
        with _writing(folder) as staging:
            keys: Any = (
                np.empty(shape, np.float16)
                if staging is None
                else np.lib.format.open_memmap(staging / KEYS, "w+", np.float16, shape)
            )
            for place, found in states(model, sequences, run, "datastore"):
                keys[place] = _halved(found, origin.reads)
            made = cls(Neighbours(keys, values, exact_up_to=exact_up_to), offsets, origin)
            if staging is not None:
                keys.flush()
                made._describe(staging)
        return made if folder is None else cls.load(folder, exact_up_to=exact_up_to, verify=False)

    # --- asking ------------------------------------------------------------------------------------------------------

    def search(
        self, queries: Float[Tensor, "queries width"], k: int, exclude: Int[Tensor, " queries"] | None = None
    ) -> tuple[Float[Tensor, "queries k"], Int[Tensor, "queries k"]]:
        """Squared distances and rows of the k nearest keys; see `Neighbours.search`."""
        return self.rows.search(queries, k, exclude)

    def distribution(
        self, hidden: Float[Tensor, "queries width"], k: int, temperature: float
    ) -> Float[Tensor, "queries vocabulary"]:
        """p: the next-token distribution after each hidden state."""
        near, found = self.search(hidden, k)
        tokens = self.rows.values[found.clamp_min(0)]
        return distribution(closeness(near, temperature), tokens, self.origin.vocabulary)

    def temperature(self) -> float:
        """Median squared distance of a row to its eighth neighbour (the last one, where there are fewer)."""
        chosen = torch.from_numpy(np.linspace(0, len(self) - 1, min(SAMPLE, len(self))).astype(int)).unique()
        if len(self) < 2:
            raise PalimpsestError("the datastore has one row: there is no distance to start a temperature from.")
        near = self.search(self.rows.keys[chosen].float(), min(RANK, len(self) - 1), chosen)[0]
        apart = near[near > 0]
        median = float(near[:, -1].median())
        return median if median > 0 else float(apart.median()) if len(apart) else 1.0

    def targets(self, run: Run, *, k: int, temperature: float, self_exclude: bool = True) -> SparseTargets:
        """What the neighbours of every row say would follow it, without the row itself unless that is asked for.

        In the folder of a run the result is kept, and read where the same was found out before.
        """
        kept = None
        if run.folder is not None:
            kept = run.folder / "targets" / f"{self._job(k, temperature, self_exclude)}.safetensors"
        if kept is not None and kept.is_file():
            return SparseTargets.load(kept)
        parts, repeated = [], 0
        for block in run.track(torch.arange(len(self)).split(QUERIES), "neighbours"):
            keys = self.rows.keys[block].float()
            near, ids = self.search(keys, k, block if self_exclude else None)
            repeated += int(((near == 0) & (ids != block[:, None])).any(1).sum())
            tokens = self.rows.values[ids.clamp_min(0)]
            parts.append(sparse(closeness(near, temperature), tokens, self.origin.vocabulary))
        found = SparseTargets.joined(parts, self.rows.values, torch.from_numpy(self.offsets), repeated)
        if kept is not None:
            found.save(kept)
        return found

    def _job(self, *asked: Any) -> str:
        """What tells this question to this datastore from any other."""
        sha = hashlib.sha256(repr((self.origin, asked)).encode())
        for array in (self.rows.keys, self.rows.values):
            sha.update(array.numpy().data)
        sha.update(self.offsets.astype(np.int64).tobytes())
        return sha.hexdigest()[:16]

    def member(self, k: int, temperature: float) -> DatastoreForCausalLM:
        """The datastore as a member of a mixture."""
        return DatastoreForCausalLM.of(
            self.rows, reads=self.origin.reads, vocabulary=self.origin.vocabulary, k=k, temperature=temperature
        )

    def tune(
        self,
        model: Model,
        sequences: Sequence[Encoded],
        run: Run,
        k: int,
        *,
        temperatures: Sequence[float] | None = None,
        weights: Sequence[float] = WEIGHTS,
    ) -> Tuned:
        """Temperature and interpolation weight with which sequences that are not in the datastore are likeliest."""
        self.check(model)
        check_asked(k, 1.0, len(self))
        tried = temperatures or [self.temperature() * multiple for multiple in TEMPERATURES]
        base = score(model, sequences, run, "validation").log_prob
        found = np.empty((len(tried), len(base)))
        for place, queries in states(model, sequences, run, "validation"):
            near, ids = self.search(queries, k)
            right = torch.tensor([t for s in sequences for t in s.targets])[place]
            hits = self.rows.values[ids.clamp_min(0)] == right[:, None]
            for number, temperature in enumerate(tried):
                found[number, place] = (closeness(near, temperature) * hits).sum(1).double().numpy()
        with np.errstate(divide="ignore"):
            nll = np.array([mixed_nll(base, np.log(p), weights) for p in found])
        best, weight = divmod(int(nll.argmin()), len(weights))
        return Tuned(
            temperature=float(tried[best]), weight=float(weights[weight]), weights=np.array(weights), nll=nll[best]
        )

    # --- whose it is -------------------------------------------------------------------------------------------------

    def check(self, model: Model) -> None:
        """Raises where the keys are not hidden states of this model, or its tokens have other numbers."""
        width = _width(model)
        if width != self.rows.width:
            raise PalimpsestError(
                f"the keys of the datastore are {self.rows.width} wide and the states of the model {width}: "
                "it was made with another model."
            )
        if tokenizer_digest(model.tokenizer) != self.origin.tokenizer:
            raise PalimpsestError(
                "the datastore was made with another tokenizer: its tokens are not those of the model."
            )
        if model.digest() != self.origin.model:
            raise PalimpsestError(
                f"the datastore holds the states of another model (weights {self.origin.model[:12]}..., this one has "
                f"{model.digest()[:12]}...). Build it again with this model."
            )

    # --- on disk -----------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Writes the datastore; the folder is complete or not there."""
        with _writing(folder) as staging:
            assert staging is not None
            np.save(staging / KEYS, self.rows.keys.numpy())
            self._describe(staging)
        return Path(folder)

    def _describe(self, staging: Path) -> None:
        np.save(staging / VALUES, self.rows.values.to(torch.int32).numpy())
        np.save(staging / OFFSETS, self.offsets.astype(np.int64))
        digests = {name: _file_digest(staging / name) for name in (KEYS, VALUES, OFFSETS)}
        header = {
            "format": FORMAT,
            "rows": len(self),
            "width": self.rows.width,
            "sequences": len(self.offsets) - 1,
            **dataclasses.asdict(self.origin),
            "files": digests,
        }
        (staging / HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls, folder: str | Path, model: Model | None = None, *, exact_up_to: int = EXACT_UP_TO, verify: bool = True
    ) -> KNNDatastore:
        """A saved datastore, its keys mapped into memory; with a model, only if they are that model's states.

        Raises where a file is missing, damaged or of a newer version. `verify` reads every byte once.
        """
        folder = Path(folder)
        header = _header(folder)
        arrays = {name: _array(folder, name, header["files"], verify) for name in (KEYS, VALUES, OFFSETS)}
        keys, values, offsets = arrays.values()
        if keys.shape != (header["rows"], header["width"]) or keys.dtype != np.float16 or len(values) != len(keys):
            raise PalimpsestError(f"{folder} is damaged: its arrays are not those that its header describes.")
        if len(offsets) != header["sequences"] + 1 or offsets[-1] != len(keys):
            raise PalimpsestError(f"{folder} is damaged: its sequences do not cover its rows.")
        origin = Origin(**{field.name: header[field.name] for field in dataclasses.fields(Origin)})
        found = cls(Neighbours(keys, values, exact_up_to=exact_up_to), offsets, origin)
        if model is not None:
            found.check(model)
        return found


def mixed_nll(
    first: Float[np.ndarray, " targets"], second: Float[np.ndarray, " targets"], weights: Sequence[float]
) -> Float[np.ndarray, " weights"]:
    """Mean NLL (nats a token) of two models' mixture for each share of the second, from their log-probabilities."""
    with np.errstate(divide="ignore"):
        shares = np.log(np.array(weights))[:, None]
        rest = np.log1p(-np.array(weights))[:, None]
    return -np.logaddexp(first + rest, second + shares).mean(1)


@torch.no_grad()
def states(
    model: Model, sequences: Sequence[Encoded], run: Run, label: str
) -> Iterator[tuple[Int[np.ndarray, " targets"], Float[Tensor, "targets width"]]]:
    """Batch after batch, the keys of the sequences' targets, and which of all targets in order they are of."""
    place = key_place(model.network)
    arrange = packer(model.network)
    first = np.cumsum([0, *(len(sequence.targets) for sequence in sequences)])
    module = model.network.get_submodule(place.removesuffix(INPUT))
    with evaluating(model.network), capture({place: module}) as seen:
        for group in run.track(list(rows(sequences, ROW_TOKENS)), label):
            packed = arrange([sequences[i] for i in group]).to(model.device)
            model.network(**packed.inputs(), logits_to_keep=torch.zeros(1, dtype=torch.long))
            found = seen[place].reshape(*packed.tokens.shape, -1)[packed.row, packed.at]
            yield np.concatenate([np.arange(first[i], first[i + 1]) for i in group]), found.float().cpu()


def origin_of(model: Model) -> Origin:
    """What a datastore of this model's states says about where they come from."""
    return Origin(
        reads=key_place(model.network),
        model=model.digest(),
        tokenizer=tokenizer_digest(model.tokenizer),
        vocabulary=model.network.config.get_text_config().vocab_size,
    )


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over the tokens as strings, with their numbers."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _width(model: Model) -> int:
    return foundation(model.network).config.get_text_config().hidden_size


def _halved(found: Float[Tensor, "targets width"], reads: str) -> Float[np.ndarray, "targets width"]:
    if not torch.isfinite(found).all():
        raise PalimpsestError(f"the hidden states at {reads} are not all numbers; they cannot be keys of a datastore.")
    if (largest := float(found.abs().max())) > torch.finfo(torch.float16).max:
        raise PalimpsestError(f"the hidden states at {reads} reach {largest:.3g}, more than float16 holds (65504).")
    return found.half().numpy()


@contextmanager
def _writing(folder: str | Path | None) -> Iterator[Path | None]:
    """A folder beside the meant one that takes its place when all is written; None where nothing is to be."""
    if folder is None:
        yield None
        return
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PalimpsestError(f"{folder} already holds files. Choose another folder for the datastore.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield staging
            os.replace(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise PalimpsestError(f"the datastore cannot be written to {folder} ({error.strerror or error}).") from error


def _header(folder: Path) -> Mapping[str, Any]:
    path = folder / HEADER
    if not path.is_file():
        raise PalimpsestError(f"{folder} is no datastore: it has no {HEADER}.")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        found = int(header["format"])
        known = {*(field.name for field in dataclasses.fields(Origin)), "rows", "width", "sequences", "files"}
        missing = known - set(header)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        raise PalimpsestError(f"{path} is damaged and cannot be read as the header of a datastore.") from None
    if found > FORMAT:
        raise PalimpsestError(
            f"{path} has format {found}; this version of palimpsest reads up to {FORMAT}. Upgrade it."
        )
    if missing:
        raise PalimpsestError(f"{path} is no header of a datastore: {min(missing)} is missing.")
    return header


def _array(folder: Path, name: str, digests: Mapping[str, str], verify: bool) -> np.ndarray:
    path = folder / name
    if not path.is_file():
        raise PalimpsestError(f"the datastore {folder} is not complete: {name} is missing.")
    if verify and _file_digest(path) != digests.get(name):
        raise PalimpsestError(f"{path} is damaged: it is not what was saved. Build the datastore again.")
    try:
        # copy-on-write: torch wants memory that it could write to, the file stays as it is
        return np.load(path, mmap_mode="c" if name == KEYS else None, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise PalimpsestError(f"{path} is damaged and cannot be read ({error}).") from None


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
