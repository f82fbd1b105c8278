"""The training loop: one, on `transformers.Trainer`, for every method that fine-tunes.

A method says which records go into a step (`schedule`) and what is minimised (an objective over a `Batch`); the loop
owns everything else. The whole schedule is drawn before the first step, from the seed, so a run that was killed goes on
exactly where it was, and the same global batch gives the same gradients however it is cut into micro-batches or
processes: every micro-batch is weighed by its share of the step's examples, and token-weighted means use the step's
token count, not the micro-batch's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from palimpsest.data.encoding import Encoded, Encoder
from palimpsest.data.packing import Packed, packer
from palimpsest.data.records import Record
from palimpsest.errors import PalimpsestError
from palimpsest.models.hooks import capture, places
from palimpsest.models.loading import quiet_transformers
from palimpsest.models.model import Model
from palimpsest.run import Run, console
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
    lora_rank: int = setting(
        default=0, at_least=0, origin="ours", help="0 trains all weights, else adapters of this rank, merged at the end"
    )
    micro_tokens: int = setting(
        default=512, at_least=1, origin="ours, measured", help="tokens computed at once: memory, not result"
    )


# --- the schedule ----------------------------------------------------------------------------------------------------

Drawn = Callable[[int, np.random.Generator], Encoded]
"""A sequence drawn anew for the anchor of this index, for instance its prompt with a random refusal."""


@dataclasses.dataclass(frozen=True)
class Micro:
    """One micro-batch: for each role the positions of its sequences in `Schedule.sequences`."""

    rows: Mapping[str, tuple[int, ...]]
    share: float
    tokens_per_example: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Every micro-batch of a run, drawn in advance. `sequences[role]` are distinct; micro-batches point there."""

    sequences: Mapping[str, list[Encoded]]
    steps: tuple[tuple[Micro, ...], ...]
    steps_per_epoch: int

    def digest(self) -> str:
        """SHA-256 over everything that will be trained on, in order."""
        sha = hashlib.sha256()
        for role, sequences in self.sequences.items():
            sha.update(repr((role, [(s.tokens, s.start) for s in sequences])).encode())
        sha.update(repr([[sorted(m.rows.items()) for m in step] for step in self.steps]).encode())
        return sha.hexdigest()


def schedule(
    model: Model,
    training: Training,
    run: Run,
    anchors: int | None = None,
    **roles: Sequence[Record] | Sequence[Encoded] | Drawn | None,
) -> Schedule:
    """The micro-batches of `training.epochs` passes over the first role, the anchor.

    Other roles are paired to it: of a list, one entry an anchor, drawn uniformly with replacement; of a function, what
    it draws for that anchor. Roles that are None are left out. With `anchors`, the passes are over that many anchors
    that are no sequences themselves, and every role is paired.
    """
    encoder = Encoder.of(model, training.max_length)
    names = [name for name, given in roles.items() if given is not None]
    lists: dict[str, list[Encoded]] = {}
    for name in names:
        given = roles[name]
        lists[name] = [] if callable(given) or given is None else _encoded(given, encoder, run)
    anchor = names[0] if anchors is None else None
    count = len(lists[anchor]) if anchor is not None else anchors or 0
    if not count:
        raise PalimpsestError(f"the {names[0]} set is empty.")
    rng = np.random.default_rng([run.seed, count])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    per_epoch = math.ceil(count / training.batch_size)
    if count // per_epoch < world:
        raise PalimpsestError(f"a step has {count // per_epoch} records for {world} processes. Use fewer processes.")
    interned: dict[str, dict[tuple[tuple[int, ...], int], int]] = {name: {} for name in names}

    def draw(name: str, example: int) -> int:
        given = roles[name]
        if name == anchor:
            return example
        if callable(given):
            sequence = given(example, rng)
            known = interned[name]
            place = known.setdefault((sequence.tokens, sequence.start), len(known))
            if place == len(lists[name]):
                lists[name].append(dataclasses.replace(sequence, index=place))
            return place
        return int(rng.integers(len(lists[name])))

    def passes() -> Iterator[list[dict[str, int]]]:
        for _ in range(training.epochs):
            for chosen in np.array_split(rng.permutation(count), per_epoch):
                yield [{name: draw(name, int(example)) for name in names} for example in chosen]

    drawn = list(itertools.islice(passes(), training.max_steps))

    def width(row: Mapping[str, int]) -> int:
        return sum(len(lists[name][place].tokens) for name, place in row.items())

    heaviest = max(sum(map(width, step)) for step in drawn)
    micros = min(math.ceil(heaviest / (training.micro_tokens * world)) * world, count // per_epoch // world * world)
    steps = tuple(_cut(sorted(step, key=width), micros, lists) for step in drawn)
    return Schedule(lists, steps, per_epoch)


def _encoded(given: Any, encoder: Encoder, run: Run) -> list[Encoded]:
    if given and isinstance(given[0], Encoded):
        return list(given)
    return encoder.records(
        given, warn=lambda text: console().print(f"[yellow]{text}[/yellow]") if run.progress else None
    )


def _cut(step: list[dict[str, int]], micros: int, lists: Mapping[str, list[Encoded]]) -> tuple[Micro, ...]:
    names = list(step[0])
    mean = {name: sum(len(lists[name][row[name]].targets) for row in step) / len(step) for name in names}
    cuts = np.array_split(np.arange(len(step)), micros)
    return tuple(
        Micro({name: tuple(step[i][name] for i in cut) for name in names}, len(cut) / len(step), mean) for cut in cuts
    )


# --- what an objective sees ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class View:
    """One role's part of a micro-batch, after the forward pass.

    Everything per target is over all scored tokens of the role's sequences, one after the other.
    """

    index: Int[Tensor, " batch"]
    targets: Int[Tensor, " targets"]
    owner: Int[Tensor, " targets"]
    tokens_per_example: float
    place: slice
    forward: _Forward

    @cached_property
    def logits(self) -> Float[Tensor, "targets vocabulary"]:
        """Float32 logits that predict each target."""
        return self.forward.logits[self.place]

    @cached_property
    def log_probs(self) -> Float[Tensor, " targets"]:
        """Log-probability of each target, nats."""
        return -F.cross_entropy(self.logits, self.targets, reduction="none")

    @cached_property
    def count(self) -> Float[Tensor, " batch"]:
        """Scored tokens of each sequence."""
        return torch.bincount(self.owner, minlength=len(self.index)).to(torch.float32)

    @cached_property
    def nll(self) -> Float[Tensor, " batch"]:
        """S: summed negative log-likelihood of each sequence, nats."""
        return self.sum_tokens(-self.log_probs)

    @cached_property
    def mean_nll(self) -> Float[Tensor, " batch"]:
        """A: negative log-likelihood a token of each sequence, nats."""
        return self.nll / self.count

    @property
    def cross_entropy(self) -> Float[Tensor, ""]:
        """Token-weighted mean negative log-likelihood over the whole step (what a causal LM returns as its loss)."""
        return self.mean_tokens(-self.log_probs)

    def sum_tokens(self, values: Float[Tensor, " targets"]) -> Float[Tensor, " batch"]:
        """Sums over the targets of each sequence."""
        return values.new_zeros(len(self.index)).index_add(0, self.owner, values)

    def mean_tokens(self, values: Float[Tensor, " targets"]) -> Float[Tensor, ""]:
        """This micro-batch's part of the mean over all targets of the step."""
        return values.sum() / (self.tokens_per_example * len(self.index))

    @cached_property
    def hidden(self) -> Float[Tensor, "targets width"]:
        """The watched module's output at each scored token itself (not at the token before it)."""
        return self.forward.hidden[self.place]


@dataclasses.dataclass
class _Forward:
    network: Any
    packed: Packed
    watch: str | None

    @cached_property
    def logits(self) -> Float[Tensor, "targets vocabulary"]:
        return self.packed.target_logits(self.network)

    @cached_property
    def hidden(self) -> Float[Tensor, "targets width"]:
        assert self.watch is not None
        bare = getattr(self.network, "module", self.network)
        with capture({self.watch: places(bare)[self.watch].module}) as outputs:
            self.network(**self.packed.inputs(), logits_to_keep=torch.zeros(1, dtype=torch.long))
        return outputs[self.watch][self.packed.row, self.packed.here].float()


class Batch:
    """A micro-batch: one `View` a role, as attributes; one forward pass serves all roles."""

    def __init__(self, views: Mapping[str, View]) -> None:
        self._views = dict(views)

    def __getattr__(self, role: str) -> View:
        if role.startswith("_") or role not in self._views:
            raise AttributeError(f"the batch has no role {role!r} (given: {', '.join(self._views)})")
        return self._views[role]

    def __contains__(self, role: str) -> bool:
        return role in self._views


Objective = Callable[[Batch], Float[Tensor, ""]]
Stop = Callable[[int, Model], bool]
MakeOptimizer = Callable[[nn.Module, Training], torch.optim.Optimizer]


# --- the loop --------------------------------------------------------------------------------------------------------


def train(
    model: Model,
    plan: Schedule,
    objective: Objective,
    training: Training,
    run: Run,
    *,
    watch: str | None = None,
    trainable: Callable[[str], bool] | None = None,
    optimizer: MakeOptimizer | None = None,
    stop: Stop | None = None,
    label: str = "training",
) -> Model:
    """A model trained to minimise the objective; the given one is unchanged unless `run.in_place`.

    `watch` names a module whose output becomes `View.hidden`; `trainable` chooses parameters by name; `stop`, or else
    `run.stop`, is asked after every step. Raises where the loss stops being a number, naming the step and the last good
    checkpoint.
    """
    student = model if run.in_place else model.copy()
    network = student.network.to(run.torch_device())
    job = None if run.folder is None else _job_folder(run.folder, model, plan, training, run)
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.seeded())
        stack.enter_context(_only(network, trainable, training))
        learner = _with_adapters(network, training) if training.lora_rank else network
        stack.callback(_leave_mixed_precision, learner)
        work = job or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="palimpsest-")))
        advance = stack.enter_context(run.bar(label, len(plan.steps)))
        loop = _Loop(
            plan,
            objective,
            watch,
            model=learner,
            args=_arguments(plan, training, run, work),
            optimizers=(optimizer(learner, training) if optimizer is not None else None, None),
            callbacks=[
                _Watch(student, stop or run.stop, advance, run.checkpoint_seconds if job is not None else math.inf)
            ],
        )
        loop.remove_callback(PrinterCallback)
        loop.train(resume_from_checkpoint=_last_good(work) if run.resume else None)
        trained: Any = loop.accelerator.unwrap_model(loop.model)
    student.network = trained.merge_and_unload().requires_grad_(True) if training.lora_rank else trained
    student.network.eval()
    if job is not None:
        shutil.rmtree(job, ignore_errors=True)
    return student


def _arguments(plan: Schedule, training: Training, run: Run, work: Path) -> TrainingArguments:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = run.torch_device().type == "cpu"
    return TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(plan.steps[0]) // world,
        num_train_epochs=1,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        warmup_steps=min(round(training.warmup_epochs * plan.steps_per_epoch), len(plan.steps)),
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(training.decay, training.decay),
        max_grad_norm=training.max_grad_norm,
        seed=run.seed,
        bf16=_precision(run) == "bfloat16",
        use_cpu=on_cpu,
        ddp_backend="gloo" if world > 1 and on_cpu else None,
        save_strategy="no",
        save_total_limit=2,
        report_to="none",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )


class _Loop(Trainer):
    """Goes through the micro-batches of a schedule in order, each weighted by its share of the step."""

    loss_is_scaled_for_ga = True

    def __init__(self, plan: Schedule, objective: Objective, watch: str | None, **keywords: Any) -> None:
        self.plan = plan
        self.objective: Objective = objective
        self.watch = watch
        self.micros = [micro for step in plan.steps for micro in step]
        self.arrange = packer(keywords["model"])
        super().__init__(train_dataset=[{"micro": i} for i in range(len(self.micros))], **keywords)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return SequentialSampler(self.micros)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted."""
        return 0

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with quiet_transformers():
            super()._save_checkpoint(model, trial)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The objective on one micro-batch, so weighted that the step's gradient is that of its whole batch."""
        micro = self.micros[int(inputs["micro"])]
        loss = self.objective(_batch(model, self.plan, micro, self.arrange, self.watch, self.args.device))
        if not torch.isfinite(loss):
            raise _diverged("loss", float(loss), self.state.global_step + 1, self.args)
        # gradients are averaged over processes; the shares already add up to one over all of them
        return loss * micro.share * max(1, self.args.world_size)


class _Watch(TrainerCallback):
    """After every step: shows progress, asks whether to stop, and saves when `every` seconds have passed."""

    def __init__(self, student: Model, stop: Stop | None, advance: Callable[..., None], every: float) -> None:
        self.student = student
        self.stop = stop
        self.advance = advance
        self.every = every
        self.saved = time.monotonic()
        self.shown = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Asks for a checkpoint where one is due, and for the end where `stop` says so."""
        if time.monotonic() - self.saved >= self.every:
            control.should_save = state.global_step < state.max_steps
            self.saved = time.monotonic()
        if self.stop is not None and self.stop(state.global_step, self.student):
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Makes the checkpoint one that `load` takes, and marks it as written to its end."""
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if self.student.processor is not None:
                self.student.processor.save_pretrained(checkpoint)
            (checkpoint / COMPLETE).touch()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Shows the loss; weights that a gradient without a value has spoilt are never saved."""
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(norm := logs.get("grad_norm", 0.0)):
            raise _diverged("gradient norm", norm, state.global_step, args)
        self.advance(state.global_step - self.shown, f"loss {logs['loss']:.4f}")
        self.shown = state.global_step


def _diverged(what: str, value: float, step: int, args: TrainingArguments) -> PalimpsestError:
    good = _last_good(Path(args.output_dir or ""))
    kept = f"the last good checkpoint is {good}" if good else "no checkpoint was due yet"
    return PalimpsestError(
        f"the {what} is {value} at step {step}; {kept}. Lower the learning rate (now {args.learning_rate:g})."
    )


def _batch(network: Any, plan: Schedule, micro: Micro, arrange: Any, watch: str | None, device: torch.device) -> Batch:
    chosen = {role: [plan.sequences[role][i] for i in rows] for role, rows in micro.rows.items()}
    packed = arrange([sequence for sequences in chosen.values() for sequence in sequences]).to(device)
    forward = _Forward(network, packed, watch)
    views, first, start = {}, 0, 0
    for role, sequences in chosen.items():
        end = start + sum(len(sequence.targets) for sequence in sequences)
        views[role] = View(
            index=torch.tensor(micro.rows[role], device=device),
            targets=packed.targets[start:end],
            owner=packed.owner[start:end] - first,
            tokens_per_example=micro.tokens_per_example[role],
            place=slice(start, end),
            forward=forward,
        )
        first, start = first + len(sequences), end
    return Batch(views)


@contextlib.contextmanager
def _only(network: nn.Module, trainable: Callable[[str], bool] | None, training: Training) -> Iterator[None]:
    """Inside, only the parameters of the chosen names train; raises where there are none."""
    if trainable is None:
        yield
        return
    if training.lora_rank:
        raise PalimpsestError(
            "lora_rank trains adapters of all linear layers, but this method chooses parameters. Set it to 0."
        )
    chosen = {name for name, weight in network.named_parameters() if weight.requires_grad and trainable(name)}
    if not chosen:
        raise PalimpsestError("no parameter is left to train: the chosen names match none.")
    frozen = [weight for name, weight in network.named_parameters() if weight.requires_grad and name not in chosen]
    for weight in frozen:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(True)


def _leave_mixed_precision(network: nn.Module) -> None:
    """Takes off the wrappers that accelerate leaves around `forward`, so that the result computes as it is saved."""
    for name in ("forward", "_original_forward"):
        vars(network).pop(name, None)


def _with_adapters(network: Any, training: Training) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=training.lora_rank, lora_alpha=2 * training.lora_rank, target_modules="all-linear")
    return get_peft_model(network, config)


# --- precision and resume --------------------------------------------------------------------------------------------

COMPLETE = "complete"


def _precision(run: Run) -> str:
    return measured_precision(str(run.torch_device())) if run.precision == "auto" else run.precision


def measured_precision(device: str, trials: int = 3) -> str:
    """`bfloat16` where this device multiplies matrices at least 1.3 times as fast in it as in float32."""
    if device not in _MEASURED:
        _MEASURED[device] = (
            "bfloat16"
            if _seconds(device, torch.float32, trials) > 1.3 * _seconds(device, torch.bfloat16, trials)
            else "float32"
        )
    return _MEASURED[device]


_MEASURED: dict[str, str] = {}


def _seconds(device: str, dtype: torch.dtype, trials: int) -> float:
    a, b = torch.ones(512, 1024, dtype=dtype, device=device), torch.ones(1024, 1024, dtype=dtype, device=device)
    times = []
    for _ in range(trials + 1):
        start = time.perf_counter()
        float((a @ b)[0, 0])
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _job_folder(folder: Path, model: Model, plan: Schedule, training: Training, run: Run) -> Path:
    """A folder of its own for exactly this job: no checkpoint of another is taken up, an old one only to resume."""
    settings = json.dumps([dataclasses.asdict(training), run.seed, model.digest(), plan.digest()])
    job = Path(folder) / "checkpoints" / hashlib.sha256(settings.encode()).hexdigest()[:16]
    if not run.resume:
        shutil.rmtree(job, ignore_errors=True)
    job.mkdir(parents=True, exist_ok=True)
    return job


def _last_good(job: Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    whole = [path.parent for path in job.glob(f"checkpoint-*/{COMPLETE}")]
    return str(max(whole, key=lambda path: int(path.name.partition("-")[2]))) if whole else None
