"""Real texts for what keeps a model: new domains to learn (GSM8K, PubMedQA), and text that it should not forget.

That is WikiText-2. A model that never read such text has nothing to lose: `reader` is the embedded one after some.

Read from the folder that `PALIMPSEST_DATA` names (`gsm8k/test.jsonl`, `pubmedqa/ori_pqal.json`, `wikitext2/valid.txt`
and `test.txt`), else from the hub. Pieces are drawn from the seed; what is measured on is never learned or probed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from palimpsest.data.encoding import Encoded, Encoder
from palimpsest.data.records import Record, Roles
from palimpsest.models.loading import load
from palimpsest.models.model import Model
from palimpsest.reproduce.runner import Figure
from palimpsest.run import Run
from palimpsest.statistics.likelihood import score
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune

LENGTH = 128
"""Tokens of a piece, at most."""
WORDS = (50, 120)
"""How long a paragraph of WikiText must be."""

READ = 128
"""Paragraphs that the reader reads."""
READING = Finetune(
    training=Training(
        learning_rate=3e-5,
        epochs=1,
        batch_size=4,
        weight_decay=0.0,
        warmup_epochs=0.1,
        decay="constant",
        max_length=LENGTH,
    )
)

Source = Literal["gsm8k", "pubmedqa", "wikitext-valid", "wikitext-test"]


def texts(source: Source) -> list[str]:
    """Problems with their solutions, questions of medicine with their answers, or paragraphs."""
    folder = os.environ.get("PALIMPSEST_DATA")
    if source == "gsm8k":
        if folder:
            lines = Path(folder, "gsm8k", "test.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
        else:
            from datasets import load_dataset

            rows = list(load_dataset("openai/gsm8k", "main", split="test"))
        return [f"{row['question']}\n{row['answer']}" for row in rows]
    if source == "pubmedqa":
        if folder:
            asked = json.loads(Path(folder, "pubmedqa", "ori_pqal.json").read_text(encoding="utf-8")).values()
        else:
            from datasets import load_dataset

            loaded = load_dataset("qiaojin/PubMedQA", "pqa_labeled", split="train")
            asked = [{key.upper(): value for key, value in row.items()} for row in loaded]
        return [f"{row['QUESTION']}\n{row['LONG_ANSWER']}" for row in asked]
    part = source.partition("-")[2]
    if folder:
        paragraphs = Path(folder, "wikitext2", f"{part}.txt").read_text(encoding="utf-8").splitlines()
    else:
        from datasets import load_dataset

        split = {"valid": "validation"}.get(part, part)
        paragraphs = load_dataset("Salesforce/wikitext", "wikitext-2-v1", split=split)["text"]
    return [text.strip() for text in paragraphs if WORDS[0] <= len(text.split()) <= WORDS[1] and " = " not in text]


def domain_roles(seed: int, learn: int, measure: int, probe: int) -> Roles:
    """`train` and `domain` from GSM8K; `general` to probe with, `read` and `kept` to measure on from WikiText-2."""
    rng = np.random.default_rng([seed, learn])
    problems, before, after = (texts(name) for name in ("gsm8k", "wikitext-valid", "wikitext-test"))
    order, known = rng.permutation(len(problems)), rng.permutation(len(before))

    def drawn(pool: list[str], at: np.ndarray) -> list[Record]:
        return [Record(text=pool[i]) for i in at]

    return Roles(
        train=drawn(problems, order[measure : measure + learn]),
        domain=drawn(problems, order[:measure]),
        general=drawn(before, known[:probe]),
        read=drawn(before, known[probe : probe + READ]),
        kept=drawn(after, rng.permutation(len(after))[:measure]),
    )


def medical_roles(seed: int, learn: int, measure: int) -> Roles:
    """`train` and `medical`, to learn from and to measure on, from PubMedQA."""
    asked = texts("pubmedqa")
    order = np.random.default_rng([seed, learn]).permutation(len(asked))
    measured, learned = order[:measure], order[measure : measure + learn]
    return Roles(
        train=[Record(text=asked[i]) for i in learned],
        medical=[Record(text=asked[i]) for i in measured],
    )


def reader(seed: int, data: Roles, folder: Path, run: Run) -> Path:
    """Where the embedded model is that has read `read`; trained where it is not there yet."""
    saved = folder / f"reader-{seed}"
    if not saved.exists():
        own = run.replace(seed=seed, in_place=True, folder=None)
        READING.apply(load(run=run), Roles(train=data.read), own).save_pretrained(saved)
    return saved


class Losses:
    """Mean negative log-likelihood a token, nats, on each role: the new domain and the text to keep."""

    def __init__(self, model: Model, data: Roles, run: Run, roles: Sequence[str] = ("domain", "kept")) -> None:
        encoder = Encoder.of(model, LENGTH)
        self.sequences: list[list[Encoded]] = [encoder.records(data[role]) for role in roles]
        self.run = run.replace(progress=False)

    def __call__(self, model: Model) -> tuple[float, ...]:
        """One loss a role, in their order."""
        return tuple(-float(score(model, own, self.run).log_prob.mean()) for own in self.sequences)


def at_equal_domain_loss(curve: np.ndarray, level: float) -> float:
    """What is kept where a curve of (domain, kept) losses reaches this domain loss; nan where it never does."""
    order = np.argsort(curve[:, 0])
    domain, kept = curve[order, 0], curve[order, 1]
    return float(np.interp(level, domain, kept)) if domain[0] <= level <= domain[-1] else float("nan")


def learning_against_forgetting(name: str, curves: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """The plane of both losses, for each curve its mean over seeds; the lower left is best."""
    means = {title: np.mean(own, 0).T.tolist() for title, own in curves.items()}
    return Figure(
        name=name,
        across="loss on the new domain, nats a token",
        up="loss on the text to keep",
        lines={title: (domain, kept) for title, (domain, kept) in means.items()},
    )
