"""Text health: is what the model now says still language?

Stands beside every measure of forgetting, so that a model that collapsed into gibberish or refuses everything cannot
pass for a good eraser. An answer is gibberish where it is empty, repeats itself, or a judge that writes well finds it
absurdly improbable.

    repetition   share of 4-grams of words that occurred before in the same answer
    refusals     share of answers with a refusal phrase
    judged       negative log-likelihood a token of the answer under the judge, nats
    gibberish    empty, or repetition > 0.3, or judged > limit
"""

from __future__ import annotations

import numpy as np

from palimpsest.audit.answers import asked, generated, scored
from palimpsest.audit.reading import Better, Reading, mean_value
from palimpsest.data.encoding import Encoder
from palimpsest.data.records import Roles
from palimpsest.data.refusals import is_refusal
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Probe, setting, system


def repetition(text: str, size: int = 4) -> float:
    """The share of word n-grams that occurred before in the text; 0 where it is too short to have two."""
    words = text.split()
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@system(
    "text-health",
    verb="audit",
    title="Text health",
    paper="",
    uses={"forget", "retain", "world"},
    fidelity="standard practice",
)
class TextHealth(Probe):
    """Repetition, refusals and gibberish in the greedy answers of every role."""

    max_new_tokens: int = setting(default=200, at_least=1, origin="as ROUGE-L recall", help="longest answer, tokens")
    limit: float = setting(
        default=5.0, above=0, origin="ours", help="nats a token under the judge above which an answer is gibberish"
    )

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`repetition/<role>`, `refusals/<role>`, `gibberish/<role>`; the judge is gold, else the model itself."""
        judge = gold if gold is not None else model
        values, arrays = [], {}
        for role in ("forget", "retain", "world"):
            if not (records := asked(data.probe(role))):
                continue
            texts = generated(model, records, run, self.max_new_tokens)
            encoder = Encoder.of(judge)
            pairs = [encoder.pair(r.prompt or "", text) for r, text in zip(records, texts, strict=True)]
            judged = [answer.mean_nll for answer in scored(judge, pairs, run)]
            repeated = [repetition(text) for text in texts]
            gibberish = [
                float(not text or again > 0.3 or nll > self.limit)
                for text, again, nll in zip(texts, repeated, judged, strict=True)
            ]
            refused = [float(is_refusal(text)) for text in texts]
            for name, x in (("repetition", repeated), ("refusals", refused), ("gibberish", gibberish)):
                better: Better = "none" if name == "refusals" and role == "forget" else "lower"
                values.append(mean_value(f"{name}/{role}", x, better=better, seed=run.seed))
                arrays[f"{name}/{role}"] = np.asarray(x, dtype=float).tolist()
        caveats = (
            () if gold is not None else ("gibberish is judged by the model itself, since no gold model was given",)
        )
        return Reading(probe=self.facts.slug, values=tuple(values), arrays=arrays, caveats=caveats)
