"""LLMU: gradient ascent, random answers and a divergence from the model as given, added up.

Unlearns from unwanted outputs: raises the loss on them, teaches unrelated normal answers instead, and keeps the
predictions on normal data. Use it for harmful or copyrighted outputs, where what comes out instead does not matter.

Source: Yao et al. 2023 (arXiv 2310.10683), eq. 3-6, and the authors' code. Differs: the code finds the answer by
counting tokenizer dictionary keys and padding by the literal id 1; here the answer mask is exact. Its third term is the
cross-entropy to the reference, which differs from the divergence by a constant and has the same gradient.

    y_rand  random        K answers to other questions for each forget prompt
    p_ref   reference     predictions of the model as given on normal data (the retain set)

    L = w_forget (-CE(x_f, y_f)) + w_random CE(x_f, y_rand) + w_normal KL(p_ref || p) on normal data
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from palimpsest.data.records import Roles
from palimpsest.erase.gradient_ascent import retain_loss
from palimpsest.erase.preference import answers_of, other_answers
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Method, setting, system
from palimpsest.train import Batch, Training, schedule, train


@system(
    "llmu",
    verb="erase",
    title="Large language model unlearning (LLMU)",
    paper="Yao et al. 2023 (arXiv 2310.10683)",
    takes="causal-lm",
    needs={"forget", "retain"},
    fidelity="matches the official code",
    deviations=("the answer mask is exact; the code's starts at the third token",),
)
class LLMU(Method):
    """Ascent on the forget answers, random answers instead, and predictions held on the retain set."""

    forget_weight: float = setting(default=0.5, above=0, origin="official code", help="weight of the ascent")
    random_weight: float = setting(default=1.0, at_least=0, origin="official code", help="weight of the random answers")
    normal_weight: float = setting(default=1.0, at_least=0, origin="official code", help="weight of the divergence")
    answers: int = setting(default=5, at_least=1, origin="official code", help="K, random answers a forget prompt")
    enough: float = setting(
        default=100.0, above=0, origin="official code", help="stop when the forget loss exceeds this, nats a token"
    )
    training: Training = setting(
        default=Training(
            learning_rate=2e-6, epochs=1000, max_steps=1000, batch_size=2, decay="constant", warmup_epochs=0.0
        ),
        origin="official code",
        help="how to train",
    )

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The model after the three forces."""
        drawn = other_answers(model, data.forget, answers_of(data.retain), self.training)
        randoms: dict[str, Any] = {f"random_{k}": drawn for k in range(self.answers)}
        plan = schedule(model, self.training, run, forget=data.forget, normal=data.retain, **randoms)
        divergence = retain_loss("kl", model, plan, run, role="normal")
        seen: list[tuple[float, float]] = []

        def objective(batch: Batch) -> Float[Tensor, ""]:
            forget = batch.forget.cross_entropy
            seen.append((float(batch.forget.nll.detach().sum()), float(batch.forget.count.sum())))
            views = [getattr(batch, name) for name in randoms]
            tokens = sum(view.tokens_per_example for view in views)
            random = sum(view.tokens_per_example * view.cross_entropy for view in views) / tokens
            held = self.normal_weight * divergence(batch)
            return -self.forget_weight * forget + self.random_weight * random + held

        def enough(step: int, student: Model) -> bool:
            nll, tokens = map(sum, zip(*seen, strict=True))
            seen.clear()
            return nll / tokens > self.enough

        return train(model, plan, objective, self.training, run, stop=enough)
