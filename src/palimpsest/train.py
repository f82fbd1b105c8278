"""The training loop: one, on `transformers.Trainer`, for every method that fine-tunes.

A method says which records go into a step (`schedule`) and what is minimised (an objective over a `Batch`); the loop
owns everything else. The parts are in `palimpsest.training`; everything that a method needs can be imported from here.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from palimpsest.data.packing import packer
from palimpsest.errors import PalimpsestError
from palimpsest.guard import looks_up
from palimpsest.models.loading import quiet_transformers
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.training.checkpoints import COMPLETE, job_folder, last_good, remember, remembered
from palimpsest.training.low_rank import named
from palimpsest.training.precision import measured_precision, precision_of
from palimpsest.training.schedule import Drawn, Micro, Schedule, alternated, schedule
from palimpsest.training.settings import Training
from palimpsest.training.views import Batch, View, batch_of

__all__ = [
    "COMPLETE",
    "Batch",
    "Drawn",
    "MakeOptimizer",
    "Micro",
    "Mode",
    "Objective",
    "Schedule",
    "Stop",
    "Training",
    "View",
    "alternated",
    "measured_precision",
    "schedule",
    "train",
]

Objective = Callable[[Batch], Float[Tensor, ""]]
Mode = Literal["train", "eval"]
Stop = Callable[[int, Model], bool]
MakeOptimizer = Callable[[nn.Module, Training], torch.optim.Optimizer]


def train(
    model: Model,
    plan: Schedule,
    objective: Objective,
    training: Training,
    run: Run,
    *,
    watch: str | None = None,
    mode: Mode = "train",
    trainable: Callable[[str], bool] | None = None,
    optimizer: MakeOptimizer | None = None,
    stop: Stop | None = None,
    memory: dict[str, Any] | None = None,
    label: str = "training",
) -> Model:
    """A model trained to minimise the objective; the given one is unchanged unless `run.in_place`.

    `watch` names a module whose output becomes `View.hidden`; `trainable` chooses parameters by name; `stop` and
    `run.stop` are asked after every step. What the objective or `stop` must remember from one step to the next goes
    into `memory`, JSON values by name: it is saved with every checkpoint and put back with it. Raises where the loss
    stops being a number, naming the step and the last good checkpoint.

    In the mode `train`, dropout is active, and batch normalisation uses the statistics of the micro-batch, role by
    role, and moves its running averages, which are saved with the model; the result then depends on how steps are cut
    (`Training.micro_tokens`). `eval` trains the weights without either: no dropout, and the running averages are used
    and stay as they were.
    """
    optimizer = optimizer or named(training)
    _check_weights(model, run)
    if training.warmup_epochs * plan.steps_per_epoch >= len(plan.steps):
        run.warn(
            f"{label}: all {len(plan.steps)} steps are warm-up, which begins at a learning rate of 0 and does not "
            f"reach {training.learning_rate:g}. Train longer, or lower warmup_epochs."
        )
    student = model if run.in_place else model.copy()
    network = student.network.to(run.torch_device())
    job = None if run.folder is None else job_folder(run.folder, model, plan, training, run, label)
    memory = {} if memory is None else memory
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.seeded())
        stack.enter_context(_only(network, trainable, training))
        stack.callback(network.eval)
        learner = stack.enter_context(_with_adapters(network, training))
        stack.callback(_leave_mixed_precision, learner)
        work = job or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="palimpsest-")))
        advance = stack.enter_context(run.bar(label, len(plan.steps)))
        checkpoint = last_good(work) if run.resume else None
        asked = [each for each in (stop, run.stop) if each is not None]
        watcher = _Watch(student, asked, memory, advance, run.checkpoint_seconds if job is not None else math.inf)
        loop = _Loop(
            plan,
            objective,
            run.penalty,
            watch,
            mode,
            model=learner,
            args=_arguments(plan, training, run, work, precision_of(run, network)),
            optimizers=(optimizer(learner, training) if optimizer is not None else None, None),
            callbacks=[watcher],
        )
        loop.remove_callback(PrinterCallback)
        if checkpoint is not None:
            memory.update(remembered(checkpoint, loop.args.process_index))
        loop.train(resume_from_checkpoint=checkpoint)
        trained: Any = loop.accelerator.unwrap_model(loop.model)
    student.network = trained.merge_and_unload().requires_grad_(True) if training.lora_rank else trained
    if job is not None:
        shutil.rmtree(job, ignore_errors=True)
    return student


def _arguments(plan: Schedule, training: Training, run: Run, work: Path, precision: str) -> TrainingArguments:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = run.torch_device().type == "cpu"
    warmup = min(round(training.warmup_epochs * plan.steps_per_epoch), len(plan.steps))
    return TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(plan.steps[0]) // world,
        num_train_epochs=1,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        warmup_steps=warmup,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(training.decay, training.decay),
        max_grad_norm=training.max_grad_norm,
        seed=run.seed,
        bf16=precision == "bfloat16",
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

    def __init__(
        self,
        plan: Schedule,
        objective: Objective,
        penalty: Objective | None,
        watch: str | None,
        mode: Mode,
        **keywords: Any,
    ) -> None:
        self.plan = plan
        self.objective: Objective = objective
        self.penalty: Objective | None = penalty
        self.watch = watch
        self.micros = [micro for step in plan.steps for micro in step]
        self.arrange = None if plan.classifies else packer(keywords["model"])
        self.mode = mode
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
        if self.mode == "eval":
            model.eval()  # the trainer says train() before every micro-batch
        micro = self.micros[int(inputs["micro"])]
        batch = batch_of(model, self.plan, micro, self.arrange, self.watch, self.args.device)
        loss = self.objective(batch)
        loss = loss if self.penalty is None else loss + self.penalty(batch)
        if not torch.isfinite(loss):
            raise _diverged("loss", float(loss.detach()), self.state.global_step + 1, self.args)
        # gradients are averaged over processes; the shares already add up to one over all of them
        return loss * micro.share * max(1, self.args.world_size)


class _Watch(TrainerCallback):
    """After every step: shows progress, asks each `stop`, and saves when `every` seconds have passed."""

    def __init__(
        self,
        student: Model,
        stops: Sequence[Stop],
        memory: Mapping[str, Any],
        advance: Callable[..., None],
        every: float,
    ) -> None:
        self.student = student
        self.stops = stops
        self.memory = memory
        self.advance = advance
        self.every = every
        self.saved = time.monotonic()
        self.shown = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Asks for a checkpoint where one is due, and for the end where a `stop` says so."""
        asked = [stop(state.global_step, self.student) for stop in self.stops]  # every one sees every step
        due, ended = _any_process([time.monotonic() - self.saved >= self.every, any(asked)], args)
        if due:
            control.should_save = state.global_step < state.max_steps
            self.saved = time.monotonic()
        control.should_training_stop = control.should_training_stop or ended

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Makes the checkpoint one that `load` takes, and marks it as written to its end."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        remember(self.memory, checkpoint, args.process_index)
        if args.world_size > 1:
            torch.distributed.barrier()
        if state.is_world_process_zero:
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


def _any_process(flags: list[bool], args: TrainingArguments) -> list[bool]:
    """Which of the flags any process has set: all of them must save, and stop, at the same step."""
    if args.world_size == 1:
        return flags
    found = torch.tensor(flags, dtype=torch.int, device=args.device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return found.bool().tolist()


def _diverged(what: str, value: float, step: int, args: TrainingArguments) -> PalimpsestError:
    good = last_good(Path(args.output_dir or ""))
    kept = f"the last good checkpoint is {good}" if good else "no checkpoint was due yet"
    return PalimpsestError(
        f"the {what} is {value} at step {step}; {kept}. Lower the learning rate (now {args.learning_rate:g})."
    )


def _check_weights(model: Model, run: Run) -> None:
    """Raises where weights are in float16; warns where they are in bfloat16, or something holds their states."""
    if looks_up(model):
        run.warn(
            "this model looks up a datastore, whose keys are states of the weights before this training. Build it "
            "again afterwards (palimpsest write knn-lm)."
        )
    kinds = {weight.dtype for weight in model.network.parameters() if weight.requires_grad}
    if torch.float16 in kinds:
        raise PalimpsestError(
            "the weights are in float16, in which training breaks a model. Load it in float32 (network.float())."
        )
    if torch.bfloat16 in kinds:
        run.warn(
            "the weights are in bfloat16: a step that moves a weight by less than 0.4 % is lost in rounding. With "
            "float32 weights (precision auto) nothing is lost, and bfloat16 is still computed in where it is faster."
        )


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


@contextlib.contextmanager
def _with_adapters(network: Any, training: Training) -> Iterator[Any]:
    """The network, with adapters where they are wanted; they come off again where training does not reach its end."""
    if not training.lora_rank:
        yield network
        return
    from peft import LoraConfig, get_peft_model

    scale: Any = training.lora_alpha or 2 * training.lora_rank
    convolves = any(isinstance(module, nn.Conv2d) for module in network.modules())
    kinds = (nn.Linear, nn.Conv2d)  # a convnet's only linear layer is its head
    named = [name for name, module in network.named_modules() if isinstance(module, kinds)]
    config = LoraConfig(
        r=training.lora_rank,
        lora_alpha=scale,
        lora_dropout=training.lora_dropout,
        target_modules=named if convolves else "all-linear",
    )
    try:
        learner = get_peft_model(network, config)
    except ValueError as error:
        raise PalimpsestError(f"{type(network).__name__} cannot get such adapters: {error}") from error
    try:
        yield learner
    except BaseException:
        learner.unload().requires_grad_(True)
        raise
