"""`palimpsest chat`: a conversation with any local model that remembers, across sessions, in a store of the user's own.

Every line is a turn: a prompt is compiled from the memory under a token budget, the model answers, and both sides are
stored before the answer is shown. Lines that begin with a slash are about the memory: see `HELP`.
"""

import dataclasses
import sys
from typing import Annotated, Any

from palimpsest.errors import PalimpsestError
from palimpsest.options import RunOptions, flat, parse
from palimpsest.recall.finding import Ranking
from palimpsest.recall.hema import ConversationMemory
from palimpsest.recall.prompt import Prompt
from palimpsest.run import Run, console

HELP = """/why          what the last prompt was made of, and why each memory was in it
/summary      the compact memory
/find WORDS   what is remembered about something
/forget ID    delete a memory for good
/stats        turns and memories
/quit         end (or Ctrl-D)"""


class Chat:
    """A model, a memory, and the prompt of the last turn."""

    def __init__(
        self, model: Any, memory: ConversationMemory, run: Run, *, system: str = "", max_new_tokens: int = 200
    ) -> None:
        from palimpsest.data.encoding import Encoder

        self.model, self.memory, self.run = model, memory, run
        self.system, self.max_new_tokens = system, max_new_tokens
        self.reader = Encoder.of(model)
        self.budget = min(memory.budget, self.reader.max_length - max_new_tokens)
        if self.budget < 1:
            raise PalimpsestError(
                f"max-new-tokens is {max_new_tokens}, but the model reads {self.reader.max_length} tokens in all."
            )
        self.prompt: Prompt | None = None

    def say(self, text: str) -> str:
        """The model's answer, stored together with the text."""
        from palimpsest.models.generation import continue_tokens

        tokenizer = self.model.tokenizer
        prompt = self.memory.compile_prompt(text, tokenizer, budget=self.budget, system=self.system, strict=False)
        tokens = self.reader.conversation(prompt.messages)
        quiet = self.run.replace(progress=False)
        (written,) = continue_tokens(self.model, [tokens], quiet, self.max_new_tokens)
        reply = tokenizer.decode(written, skip_special_tokens=True).strip()
        self.memory.add_turn(text, reply)
        self.prompt = prompt
        return reply

    def answer(self, line: str) -> str | None:
        """What to print for a line; None ends the conversation."""
        word, _, rest = line.strip().partition(" ")
        if not word.startswith("/"):
            return self.say(line) if word else ""
        if word == "/quit":
            return None
        if word == "/why":
            return _why(self.prompt)
        if word == "/summary":
            return self.memory.summary or "nothing yet"
        if word == "/find":
            hits = self.memory.search(rest, self.memory.k, touch=False)
            return "\n".join(f"{hit.identity:>6}  {hit.score:.2f}  {hit.text.strip()}" for hit in hits) or "nothing"
        if word == "/forget":
            gone = self.memory.forget(rest.strip())
            return f"forgotten: {', '.join(gone.identities)} ({gone.summaries} summaries rewritten)"
        if word == "/stats":
            return f"{self.memory.items.state.turn} turns, {len(self.memory.items.all())} memories"
        return HELP


def _why(prompt: Prompt | None) -> str:
    if prompt is None:
        return "nothing was asked yet"
    lines = [f"{prompt.tokens} tokens: " + ", ".join(f"{name} {n}" for name, n in prompt.shares.items())]
    if prompt.dropped or prompt.cut:
        lines.append(f"did not fit: {len(prompt.dropped)} memories, {prompt.cut} of the last messages")
    for hit in prompt.kept:
        why = ", ".join(f"{name} {value:.2f}" for name, value in hit.why.items() if name not in ("score", "turn"))
        lines.append(f"{hit.identity:>6}  turn {hit.memory.turn}  {why}  {hit.text.strip()}")
    return "\n".join(lines)


def command(words: list[str]) -> None:
    """`palimpsest chat`."""

    @dataclasses.dataclass(kw_only=True)
    class Options:
        """Talks with a local model that remembers; /help says what can be asked about its memory."""

        store: str
        """file of the memory (made where it is not there), or a postgresql:// address"""
        model: str = "smollm2-135m-instruct"
        """hub name, folder, .gguf file, or the embedded smollm2-135m-instruct"""
        user: str = "default"
        """whose memory it is"""
        system: str = "You are a helpful assistant. Use what you remember of the conversation."
        """what the model is told first"""
        budget: int = 3500
        """longest prompt, tokens"""
        k: int = 8
        """memories that are retrieved for a prompt"""
        ranking: Ranking = "fused"
        """fused: by meaning and by words (finds names better, measured); dense: by meaning alone, as published"""
        max_new_tokens: int = 200
        """longest answer, tokens"""
        run: Annotated[RunOptions, flat()] = dataclasses.field(default_factory=RunOptions)

    options = parse(Options, words, "chat")
    how = {name: getattr(options, name) for name in ("user", "budget", "k", "ranking")}
    memory = ConversationMemory.open(options.store, **how)
    from palimpsest.models.loading import load

    run = options.run.run()
    with memory:
        chat = Chat(
            load(options.model, run=run), memory, run, system=options.system, max_new_tokens=options.max_new_tokens
        )
        if sys.stdin.isatty():
            console().print(f"turn {memory.items.state.turn + 1}; /help, /quit", highlight=False)
        while True:
            if sys.stdin.isatty():
                console().print("> ", end="", highlight=False)
            line = sys.stdin.readline()
            if not line:
                return
            try:
                told = chat.answer(line.rstrip("\n"))
            except PalimpsestError as error:  # a wrong line does not end a conversation
                console().print(f"error: {error}", style="red", highlight=False, markup=False)
                continue
            if told is None:
                return
            if told:
                print(told, flush=True)
