"""Memory Decoder: a small network that has learned what a datastore would say, beside a model that stays as it is.

kNN-LM looks up, at every step, what followed the most similar moments of a corpus. Memory Decoder does that search
once, over the corpus itself, and trains a small decoder on what it says: sharp distributions with several right
answers, which hold long-tail facts without the overfitting of single labels. At inference the decoder runs beside the
model and their probabilities are averaged. The model is not changed, so nothing in it is forgotten: with alpha 0 it is
what it was, bit for bit. One memory serves every model with the same tokenizer: `attach`, or `--memory FOLDER --model
OTHER`, which trains nothing. Use it to teach a domain to one or more models that must not be touched. It works best
where the teacher is the largest model at hand, fine-tuned on the domain (`write finetune`), and the student begins
fine-tuned, too.

Source: Cao et al. 2025 (arXiv 2508.09874), equations 2 to 6, and the authors' code.

    p_kNN   targets       [targets, vocabulary]  sparse: what the neighbours of a training token say, without itself
    p_M     student       [targets, vocabulary]
    p_P     base          [targets, vocabulary]
    y       labels        [targets]
    beta                                         weight of the neighbours in training
    alpha                                        share of the memory in the mixture

    L = beta KL(p_kNN || p_M) - (1 - beta) log p_M(y)
      = CE(beta p_kNN + (1 - beta) onehot(y), p_M) - beta H(p_kNN)
    p = alpha p_M + (1 - alpha) p_P
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.data.encoding import Encoded, context_length
from palimpsest.data.records import Record, Roles
from palimpsest.data.windows import WIDTH, windows
from palimpsest.errors import PalimpsestError
from palimpsest.models.combination import Interpolate
from palimpsest.models.depth import first_blocks
from palimpsest.models.loading import load
from palimpsest.models.mixture import MixtureForCausalLM, mixture
from palimpsest.models.model import Model
from palimpsest.models.neighbours import check_asked
from palimpsest.run import Run
from palimpsest.statistics.datastore import WEIGHTS, KNNDatastore, mixed_nll, tokenizer_digest
from palimpsest.statistics.likelihood import score
from palimpsest.statistics.targets import Soft, SparseTargets
from palimpsest.system import Method, setting, system
from palimpsest.train import Batch, Training, schedule, train
from palimpsest.write.knn_lm import MOST, held_out, note_curve

AT_ONCE = 1 << 20
"""Logits that are summed up at once: memory, not result."""


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy to sparse distributions; nothing else is as wide as the logits but their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, row: Tensor, token: Tensor, share: Tensor) -> Tensor:
        parts = logits.split(max(1, AT_ONCE // logits.shape[1]))
        normaliser = torch.cat([part.logsumexp(1) for part in parts])
        ctx.save_for_backward(logits, normaliser, row, token, share)
        return normaliser.index_add(0, row, -share * logits[row, token])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, normaliser, row, token, share = ctx.saved_tensors
        result = (logits - normaliser[:, None]).exp_()
        result.index_put_((row, token), -share, accumulate=True)
        return result.mul_(gradient[:, None]), None, None, None


def hybrid_loss(
    logits: Float[Tensor, "targets vocabulary"], labels: Int[Tensor, " targets"], soft: Soft, beta: float
) -> Float[Tensor, " targets"]:
    """L of each target, nats; eq. 5. The gradient is p_M - (beta p_kNN + (1 - beta) onehot)."""
    place = torch.arange(len(labels), device=labels.device)
    share = soft.share.to(logits.dtype)
    row, token = torch.cat([soft.row, place]), torch.cat([soft.token, labels])
    shares = torch.cat([beta * share, torch.full_like(place, 1 - beta, dtype=logits.dtype)])
    entropy = logits.new_zeros(len(labels)).index_add(0, soft.row, torch.special.entr(share))
    crossed: Tensor = _CrossEntropy.apply(logits, row, token, shares)
    return crossed - beta * entropy


def attach(base: Model, memory: Model, alpha: float) -> Model:
    """The base with a memory beside it, `alpha` of the probability from the memory; the base's history goes on.

    Base and memory may differ in everything but their tokens. Raises where those differ, as strings or in number. The
    memory itself goes into the mixture, or a copy of it where the base is on another device or in another precision.
    """
    like, own = next(base.network.parameters()), next(memory.network.parameters())
    if (own.device, own.dtype) != (like.device, like.dtype):
        memory = memory.copy()
        memory.network.to(like)
    return mixture(Interpolate(weight=alpha), base=base, memory=memory)


def memory_of(model: Model) -> Model:
    """The memory inside a model that has one, as a model of its own that can be saved or attached to another."""
    if not isinstance(model.network, MixtureForCausalLM):
        return model
    if "memory" not in (model.network.config.names or ()):
        raise PalimpsestError(
            f"the mixture has no memory to take out, only {' and '.join(model.network.config.names or ())}."
        )
    return Model(model.network.member("memory"), model.processor)


@system(
    "memory-decoder",
    verb="write",
    title="Memory Decoder",
    paper="Cao et al. 2025 (arXiv 2508.09874)",
    takes="causal-lm",
    uses={"train", "validation"},
    fidelity="adapted",
    deviations=(
        "needs train, unless a saved memory is named",
        "a token's own row is excluded by its number and k others remain; the code drops the first and keeps k - 1",
        "the search is exact up to a million rows; above that distances are computed again from the keys",
        "every text is cut into windows by itself; the code joins the texts of a batch (the setting join does)",
        "the temperature is tuned on validation data; the code has 16 for its teacher",
        "teacher and student are used as they are given; the paper's were fine-tuned on the corpus before",
        "no transfer to another tokenizer",
    ),
)
class MemoryDecoder(Method):
    """Trains a memory on what the neighbours of every token of `train` say, and puts it beside the model."""

    student: str | None = setting(
        default=None, origin="paper: the smallest of the family", help="model that the memory begins as; None: the base"
    )
    layers: int | None = setting(
        default=None, at_least=1, origin="ours", help="only the first blocks of it; None: all of them"
    )
    teacher: str | None = setting(
        default=None, origin="paper: the largest, fine-tuned", help="model whose states are searched; None: the base"
    )
    beta: float = setting(default=0.5, at_least=0, at_most=1, origin="paper", help="weight of the neighbours")
    alpha: float | None = setting(
        default=None, at_least=0, at_most=1, origin="paper: tuned, 0.55 to 0.8", help="share of the memory; None: tuned"
    )
    k: int | None = setting(
        default=None, at_least=1, origin="code: 1024", help="neighbours; None: 1024, or all rows where there are fewer"
    )
    temperature: float | None = setting(
        default=None, above=0, origin="ours; code: 16", help="tau of the neighbours; None: tuned as that of kNN-LM"
    )
    stride: int | None = setting(
        default=None, at_least=1, origin="code: 512", help="from window to window; None: half a window"
    )
    join: bool = setting(default=False, origin="ours; code: True", help="consecutive texts are one stream")
    held_out: float = setting(
        default=0.1, above=0, below=1, origin="ours", help="share of train to tune on where there is no validation"
    )
    memory: str | None = setting(
        default=None, origin="paper", help="saved memory, or a model that has one; it is attached, nothing is trained"
    )
    training: Training = setting(
        default=Training(
            learning_rate=1e-4, epochs=14, batch_size=64, weight_decay=0.0, warmup_epochs=0.0, max_length=WIDTH
        ),
        origin="paper, Qwen2.5-0.5B: FLOPs of one epoch of a 7B model; GPT-2: 1e-3, 70",
        help="how the memory learns; batch_size counts windows, max_length is their width",
    )

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model with its memory."""
        if self.memory is not None:
            return self._attached(model, memory_of(load(self.memory, run=run)), data.get("validation", []), run)
        learn, validation = self._records(data, run)
        teacher = model if self.teacher is None else load(self.teacher, run=run)
        student = self._student(model, run)
        for other in (teacher, student):
            if tokenizer_digest(other.tokenizer) != tokenizer_digest(model.tokenizer):
                raise PalimpsestError("memory-decoder: base, teacher and student must have the same tokenizer.")
        sequences = self._cut(learn, model, teacher, student)
        plan = schedule(student, self.training, run, train=sequences)
        targets = self._targets(teacher, sequences, validation, run) if self.beta else None

        def objective(batch: Batch) -> Float[Tensor, ""]:
            if targets is None:
                return batch.train.cross_entropy
            soft = targets.of(batch.train.index, batch.train.targets)
            return batch.train.mean_tokens(hybrid_loss(batch.train.logits, batch.train.targets, soft, self.beta))

        own = run.replace(in_place=True)
        memory = train(student, plan, objective, self.training, own, label="training the memory")
        return self._attached(model, memory, validation, run)

    def _records(self, data: Roles, run: Run) -> tuple[list[Record], list[Record]]:
        """What is learned, and what alpha and temperature are tuned on."""
        if self.alpha is not None and (self.temperature is not None or not self.beta):
            return data.require("train", by="memory-decoder"), []
        return held_out(data, self.held_out, run, "memory-decoder")

    def _student(self, model: Model, run: Run) -> Model:
        start = model if self.student is None else load(self.student, run=run)
        if self.layers is not None:
            return first_blocks(start, self.layers)
        return start.copy() if start is model else start

    def _cut(self, records: list[Record], *models: Model) -> list[Encoded]:
        limit = min(context_length(each.network.config) for each in models)
        width = min(limit, self.training.max_length or limit)
        return windows(models[0], records, width, self.stride, join=self.join)

    def _targets(self, teacher: Model, learn: list[Encoded], validation: list[Record], run: Run) -> SparseTargets:
        """p_kNN of every scored token."""
        rows = sum(len(sequence.targets) for sequence in learn)
        k = min(MOST, rows - 1) if self.k is None else self.k
        check_asked(k, 1.0, rows - 1)
        store = KNNDatastore.build(teacher, learn, run)
        temperature = self.temperature
        if temperature is None:
            temperature = store.tune(teacher, self._cut(validation, teacher), run, k).temperature
        targets = store.targets(run, k=k, temperature=temperature)
        noticeable = torch.bincount(targets.noticeable().clamp_max(20), minlength=2)[1:]
        run.note(
            temperature=temperature,
            k=k,
            rows=rows,
            datastore_megabytes=store.rows.keys.nbytes / 1e6,
            rows_repeated=targets.repeated,
            likeliest_token=float(targets.likeliest.mean()),
            sharpness={
                "tokens of at least 1 % (20: or more)": torch.arange(1, len(noticeable) + 1),
                "share of the targets": noticeable / len(targets),
            },
        )
        return targets

    def _attached(self, model: Model, memory: Model, validation: list[Record], run: Run) -> Model:
        alpha = self.alpha
        base = model if run.in_place else model.copy()
        both = attach(base, memory, alpha if alpha is not None else 0.5)  # raises where the two do not fit
        if alpha is None:
            if not validation:
                raise PalimpsestError(
                    "memory-decoder: alpha of an attached memory is tuned on the role validation. Give it, or alpha."
                )
            sequences = self._cut(validation, model, memory)
            plain, said = (score(each, sequences, run, "validation").log_prob for each in (base, memory))
            nll = mixed_nll(plain, said, WEIGHTS)
            alpha = WEIGHTS[int(nll.argmin())]
            note_curve(run, torch.tensor(WEIGHTS).numpy(), nll)
            both.network.adjust(weight=alpha)
        if not alpha:
            run.warn("memory-decoder: on the validation data the memory does not help; alpha is 0.")
        run.note(alpha=alpha, memory_megabytes=sum(p.nbytes for p in memory.network.parameters()) / 1e6)
        return both
