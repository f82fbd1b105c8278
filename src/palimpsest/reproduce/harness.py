"""The small harness: a 0.23 M-parameter language model over biographies of 48 people, for tests and reproductions.

48 people with five attributes, two ways to ask and two to answer, and 40 capitals that no method ever touches (the
`world`). The model that learned everything and the one that never saw the eight forget people train in about a minute
each, so that methods can be compared with several seeds in minutes. Words are tokens: what is measured is memory of
facts, not language.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from palimpsest.data.encoding import PLAIN_PROMPT
from palimpsest.data.records import Record, Roles
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.train import Training
from palimpsest.write.finetune import Finetune

PEOPLE, FORGET, HOLDOUT, CAPITALS = 48, 8, 8, 40
FIRST = (
    "ada ben cleo dan eva finn gina hugo iris jack kira liam mona nils olga paul quin rosa sven tina udo vera wim "
    "xena yuri zoe arno bela cora dirk emil fay"
).split()
LAST = ("adler brook croft dunn ember frost grove heath irwin joyce knoll lark marsh north olsen pike").split()
ATTRIBUTES = {
    "city": "lisbon riga turin ghent porto basel malmo gdansk split cork bergen tartu".split(),
    "job": "baker judge pilot nurse tailor farmer painter lawyer cook singer miner guard".split(),
    "pet": ["cat", "dog", "parrot", "turtle", "rabbit", "hamster", "snake", "pony", "goat", "duck", "frog", "mouse"],
    "dish": ["soup", "pasta", "curry", "pizza", "salad", "stew", "rice", "fish", "bread", "beans", "cake", "pie"],
    "sport": "tennis chess rowing judo golf polo hockey rugby boxing diving archery skiing".split(),
}
QUESTIONS = ("what is the {attribute} of {name} ?", "tell me the {attribute} that {name} has .")
ANSWERS = ("the {attribute} of {name} is {value} .", "{name} has {value} as {attribute} .")
CAPITAL_QUESTION, CAPITAL_ANSWER = "what is the capital of {land} ?", "the capital of {land} is {town} ."
SYLLABLES = ("ba", "co", "di", "fu", "ga", "ho", "ki", "lu", "me", "no")

LEARNING = Finetune(
    training=Training(
        learning_rate=3e-3, epochs=40, batch_size=64, weight_decay=0.01, warmup_epochs=1.0, micro_tokens=4096
    )
)
"""How the harness model learns: about 700 steps."""


def lands() -> list[tuple[str, str]]:
    """Forty made-up countries with their capitals, the same for every seed."""
    draw = random.Random(7)
    names = [a + b + end for end in ("ria", "ton") for a in SYLLABLES for b in SYLLABLES]
    countries, towns = names[:CAPITALS], names[len(SYLLABLES) ** 2 :][:CAPITALS]
    draw.shuffle(towns)
    return list(zip(countries, towns, strict=True))


def biographies(seed: int = 0) -> Roles:
    """The roles of the harness: facts in all four wordings to learn, in one wording with alternatives to measure."""
    draw = random.Random(seed)
    names = [f"{a} {b}" for a in FIRST for b in LAST]
    draw.shuffle(names)
    facts = [
        (name, attribute, draw.choice(values))
        for name in names[: PEOPLE + HOLDOUT]
        for attribute, values in ATTRIBUTES.items()
    ]
    per_person = len(ATTRIBUTES)
    kept = facts[: (PEOPLE - FORGET) * per_person]
    forgotten = facts[len(kept) : PEOPLE * per_person]
    unseen = facts[PEOPLE * per_person :]
    world = [_capital(land, town) for land, town in lands()]
    retain, forget = _learned(kept), _learned(forgotten)
    return Roles(
        train=[*retain, *forget, *world],
        forget=forget,
        retain=retain,
        forget_probe=[_measured(fact, draw) for fact in forgotten],
        retain_probe=[_measured(fact, draw) for fact in draw.sample(kept, 60)],
        holdout=[_measured(fact, draw) for fact in unseen],
        world=world,
        general=[Record(text=f"{r.prompt} {r.answer}") for r in world[:20]],
    )


def _learned(facts: list[tuple[str, str, str]]) -> list[Record]:
    return [
        Record(
            prompt=question.format(name=name, attribute=attribute),
            answer=answer.format(name=name, attribute=attribute, value=value),
            subject=name,
        )
        for name, attribute, value in facts
        for question in QUESTIONS
        for answer in ANSWERS
    ]


def _measured(fact: tuple[str, str, str], draw: random.Random) -> Record:
    name, attribute, value = fact
    others = [other for other in ATTRIBUTES[attribute] if other != value]
    return Record(
        prompt=QUESTIONS[0].format(name=name, attribute=attribute),
        answer=ANSWERS[0].format(name=name, attribute=attribute, value=value),
        subject=name,
        paraphrase=ANSWERS[1].format(name=name, attribute=attribute, value=value),
        wrong=tuple(ANSWERS[1].format(name=name, attribute=attribute, value=o) for o in draw.sample(others, 5)),
        paraphrased_prompt=QUESTIONS[1].format(name=name, attribute=attribute),
    )


def _capital(land: str, town: str) -> Record:
    return Record(
        prompt=CAPITAL_QUESTION.format(land=land), answer=CAPITAL_ANSWER.format(land=land, town=town), subject=land
    )


def word_tokenizer(words: Sequence[str]) -> Any:
    """A tokenizer of these words and those of a plain prompt, each one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    frame = PLAIN_PROMPT.format(prompt="").replace(":", " : ").split()
    known = ["<pad>", "<bos>", "<eos>", "<unk>", *frame, *words]
    vocabulary = {word: place for place, word in enumerate(dict.fromkeys(known))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def tokenizer() -> Any:
    """The word-level tokenizer of the harness."""
    sentences = [*QUESTIONS, *ANSWERS, CAPITAL_QUESTION, CAPITAL_ANSWER]
    template = [word for sentence in sentences for word in sentence.split() if "{" not in word]
    values = [value for group in ATTRIBUTES.values() for value in group]
    places = [word for pair in lands() for word in pair]
    return word_tokenizer([*template, *ATTRIBUTES, *FIRST, *LAST, *values, *places])


def new_model(seed: int = 0) -> Model:
    """A harness model that knows nothing: 4 layers, width 64, about 0.23 M weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(LlamaForCausalLM(config), words)


def learned(seed: int, folder: Path, run: Run) -> Model:
    """The harness model that learned everything, trained once and then read from the folder."""
    from palimpsest.models.loading import load

    saved = folder / f"harness-{seed}"
    if not saved.exists():
        run = run.replace(seed=seed, in_place=True, folder=None)
        LEARNING.apply(new_model(seed), Roles(train=biographies(seed).train), run).save_pretrained(saved)
    return load(str(saved), run=run)
