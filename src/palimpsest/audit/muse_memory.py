"""Verbatim and knowledge memory: continue an excerpt, answer questions after a few examples.

Verbatim memory gives the model the beginning of a forget record and scores the greedy continuation; knowledge memory
asks questions in a plain few-shot format, so that a model that only unlearned one chat format is found out.

Source: MUSE (Shi et al. 2024, arXiv 2407.06460), section 3. Choices where codes differ: stemmer on, as everywhere here;
the reference is cut to the length that may be generated.

    ROUGE-L F1 of the continuation (128 tokens), of the answer (32 tokens, cut at a blank line or a new question)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from palimpsest.audit.answers import asked
from palimpsest.audit.reading import Better, Reading, mean_value
from palimpsest.audit.rouge_recall import rouge_l
from palimpsest.data.encoding import Encoder
from palimpsest.data.records import Record, Roles
from palimpsest.errors import PalimpsestError
from palimpsest.models.generation import continue_tokens
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Probe, setting, system

ENDS = ("\n\n", "\nQuestion", "Question:")
END_OF_ANSWER = re.compile("|".join(ENDS))


@system(
    "verbatim-memory",
    verb="audit",
    title="Verbatim memory",
    paper="Shi et al. 2024 (arXiv 2407.06460)",
    needs={"forget"},
    fidelity="adapted",
    deviations=("the prefix is the first half of the scored tokens",),
)
class VerbatimMemory(Probe):
    """ROUGE-L F1 of the greedy continuation of the first half of each forget record."""

    max_new_tokens: int = setting(default=128, at_least=1, origin="paper", help="longest continuation, tokens")
    given: float = setting(
        default=0.5, above=0, below=1, origin="ours", help="share of the scored tokens that is given"
    )

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`verbatim_memory/forget`."""
        sequences = Encoder.of(model).records(data.require("forget", by=self.facts.slug))
        cuts = [s.start + max(1, int(self.given * len(s.targets))) for s in sequences]
        continued = continue_tokens(
            model, [s.tokens[:cut] for s, cut in zip(sequences, cuts, strict=True)], run, self.max_new_tokens
        )
        decode = model.tokenizer.batch_decode
        rests = [s.tokens[cut : cut + self.max_new_tokens] for s, cut in zip(sequences, cuts, strict=True)]
        references, texts = decode(rests, skip_special_tokens=True), decode(continued, skip_special_tokens=True)
        x = [rouge_l(r, t, "fmeasure") for r, t in zip(references, texts, strict=True) if r.strip()]
        value = mean_value("verbatim_memory/forget", x, better="lower", seed=run.seed)
        return Reading(probe=self.facts.slug, values=(value,), arrays={"verbatim_memory/forget": x})


@system(
    "knowledge-memory",
    verb="audit",
    title="Knowledge memory",
    paper="Shi et al. 2024 (arXiv 2407.06460)",
    needs={"forget"},
    uses={"retain"},
    fidelity="adapted",
    deviations=("examples come from the real and world sets",),
)
class KnowledgeMemory(Probe):
    """ROUGE-L F1 of few-shot answers on forget and retain questions."""

    max_new_tokens: int = setting(default=32, at_least=1, origin="paper", help="longest answer, tokens")
    shots: int = setting(
        default=2, at_least=0, origin="ours", help="solved examples before each question, from real or world"
    )

    def measure(self, model: Model, data: Roles, run: Run, gold: Model | None = None) -> Reading:
        """`knowledge_memory/<role>` for forget and retain."""
        examples = asked([*data.get("real", []), *data.get("world", [])])[: self.shots]
        roles = {role: records for role in ("forget", "retain") if (records := asked(data.probe(role)))}
        if not roles:
            raise PalimpsestError("knowledge memory asks questions, and neither forget nor retain has prompts.")
        scores = iter(self._scores(model, [record for records in roles.values() for record in records], examples, run))
        values, arrays = [], {}
        for role, records in roles.items():
            x = [next(scores) for _ in records]
            better: Better = "lower" if role == "forget" else "higher"
            values.append(mean_value(f"knowledge_memory/{role}", x, better=better, seed=run.seed))
            arrays[f"knowledge_memory/{role}"] = x
        return Reading(probe=self.facts.slug, values=tuple(values), arrays=arrays)

    def _scores(self, model: Model, records: Sequence[Record], examples: Sequence[Record], run: Run) -> list[float]:
        shots = "".join(f"Question: {record.prompt}\nAnswer: {record.answer}\n\n" for record in examples)
        prompts = [f"{shots}Question: {record.prompt}\nAnswer:" for record in records]
        encoder = Encoder.of(model)
        ids = [encoder.unfinished(prompt) for prompt in prompts]
        generated = continue_tokens(model, ids, run, self.max_new_tokens, ends=ENDS)
        texts = model.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return [
            rouge_l(record.answer or "", END_OF_ANSWER.split(text)[0].strip(), "fmeasure")
            for record, text in zip(records, texts, strict=True)
        ]
