"""A causal language model with a guard on its decoding: prompts about what is to be forgotten are answered around it.

Nothing in the weights changes: the network lies unchanged inside (`unguarded`). A detector looks at every prompt; where
it sees nothing, `generate` is the network's own, bit for bit. Elsewhere the phrases of the most similar forget items
are looked up and the decoder is turned away from them (`palimpsest.models.restriction`). The guarded model is a
transformers model of its own: `forward`, `generate`, one folder when it is saved. The sentence encoder is named in the
config, not copied; the tokenizer is read from the folder. The index lies in the config: THE FOLDER TELLS WHAT IS TO BE
FORGOTTEN. Its digest is among the weights, so that the ledger covers it.

`forward` scores: charges of tokens alone make no more than a filter, but a distribution is needed for probabilities, so
log p' = log p - charge - log Z after the prompt, with hard matches and begun phrases only, and a finite charge for the
former. Likeness of meaning is a matter of whole beams and is left out. Where the prompt ends is told by
`prompt_lengths`, as the library's own scoring does, or found by the words that end a prompt; a text without them has a
prompt of one token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

from palimpsest.data.encoding import context_length
from palimpsest.errors import PalimpsestError
from palimpsest.models.guard_index import GuardedConfig, GuardIndex
from palimpsest.models.hooks import capture
from palimpsest.models.restriction import Decision, Restriction
from palimpsest.models.wording import Watcher, Wording


class GuardedForCausalLM(GuardIndex, GenerationMixin):
    """The guarded language model: generation, scoring, saving and loading."""

    reads_prompts = True  # scoring tells where prompts end
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def explain(self, prompt: str, max_new_tokens: int = 0) -> Decision:
        """What would be done about a prompt: probability, matched items and phrases.

        With `max_new_tokens` it is answered, too, and the trace says at every step of the best beam which candidates
        were dropped or charged.
        """
        ids = torch.tensor([self._words.prompt(prompt)], device=self._device)
        if not max_new_tokens:
            return self._decide(self._states(ids, torch.ones_like(ids)), [self._words.text(ids[0].tolist())])[0]
        made = self.generate(input_ids=ids, max_new_tokens=max_new_tokens, do_sample=False, tracing=True)
        self.decisions[0].answer = self._words.answer(made[0, ids.shape[1] :].tolist())
        return self.decisions[0]

    def add(
        self,
        records: Sequence[Any],
        *,
        phrases: Sequence[Sequence[str]] | None = None,
        retain: Sequence[Any] = (),
        seed: int = 0,
    ) -> list[str]:
        """Guards more records and returns their ids; only a detector of theirs is trained.

        It is asked only where one of them is retrieved, so nothing changes for other prompts. `phrases` gives each
        record's own; `retain` keeps words of its answers from being forbidden.
        """
        from palimpsest.models.guarding import extend

        return extend(self, records, phrases=phrases, retain=retain, seed=seed)

    # --- generation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *, tracing: bool = False, **keywords: Any) -> Any:
        """The network's own `generate` for prompts that are not guarded; `decisions` says what was done about each.

        A guarded prompt is searched with `beams` beams, unless num_beams or do_sample says otherwise, and without a
        cache that was passed.
        """
        ids = keywords.pop("input_ids", None) if inputs is None else inputs
        if ids is None:
            raise PalimpsestError("a guarded model takes input_ids: the prompt decides how it is answered.")
        longest = context_length(self.config)
        if ids.shape[1] >= longest:
            raise PalimpsestError(
                f"the prompt has {ids.shape[1]} tokens; prompt and answer may have {longest}. Shorten the prompt."
            )
        self.unguarded.generation_config = self.generation_config
        mask = keywords.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        texts = [self._words.text(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)]
        if keywords.get("streamer") is not None or not self._watches:  # nothing may be shown before it is decided
            states = None if not self._watches else self._states(ids, mask)
            self.decisions = self._decide(states, texts)
            plain = None
        else:
            plain = self._generate_watched(ids, texts, keywords)
        guarded = [i for i, decision in enumerate(self.decisions) if decision.guarded]
        if plain is None and len(guarded) < len(texts):
            plain = self.unguarded.generate(ids, **keywords)
        if not guarded:
            return plain
        own = {**keywords, "attention_mask": mask}
        made = self._generate_guarded(ids, texts, guarded, own, tracing)
        return made if len(guarded) == len(texts) else self._together(plain, made, guarded, len(texts))

    def _generate_watched(self, ids: Tensor, texts: Sequence[str], keywords: Mapping[str, Any]) -> Any:
        """One generation that decides at its first step; None where all prompts are guarded and it was given up."""
        module = self.unguarded.get_submodule(self.config.watched)
        with capture({"states": module}) as seen:

            def look() -> bool:
                states = seen["states"][:, -1]
                self.decisions = self._decide(states[:: len(states) // len(texts)], texts)
                return all(decision.guarded for decision in self.decisions)

            watcher = Watcher(look)
            own = {
                "logits_processor": [*(keywords.get("logits_processor") or ()), watcher.processor],
                "stopping_criteria": StoppingCriteriaList(
                    [*(keywords.get("stopping_criteria") or ()), watcher.criterion]
                ),
            }
            made = self.unguarded.generate(ids, **{**keywords, **own})
        return None if watcher.stopped else made

    def _generate_guarded(
        self, ids: Tensor, texts: Sequence[str], rows: Sequence[int], keywords: Mapping[str, Any], tracing: bool
    ) -> Any:
        def asked(name: str) -> Any:
            given = keywords.get("generation_config") or self.generation_config
            return keywords.get(name, getattr(given, name, None))

        count = len(texts)
        own = {
            name: value[list(rows)] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
            for name, value in keywords.items()
            if name not in ("cache", "logits_processor")
        }
        sampling = bool(asked("do_sample"))
        single = sampling or keywords.get("streamer") is not None  # beams are known only at the end
        configured = asked("num_beams") or 1
        beams = configured if "num_beams" in keywords or configured > 1 else 1 if single else self.rule.beams
        returned = asked("num_return_sequences") or 1
        beams = beams if sampling else max(beams, returned)
        stop = asked("eos_token_id")
        stop = [] if stop is None else stop if isinstance(stop, list) else [stop]
        chosen = [self.decisions[i] for i in rows]
        restriction = Restriction(
            self.rule,
            [self._phrases(decision.items) for decision in chosen],
            [texts[i] for i in rows],
            chosen,
            stop or [self._words.end],
            self._words.tokens(self.rule.refusal),
            rows=max(beams, returned),
            sampling=sampling,
            tracing=tracing,
        )
        own |= {"num_beams": beams, "logits_processor": [*(keywords.get("logits_processor") or ()), restriction]}
        return self.unguarded.generate(ids[list(rows)], **own)

    def _together(self, plain: Any, guarded: Any, rows: Sequence[int], count: int) -> Tensor:
        """Both kinds of answers in the order of their prompts, filled up to one length."""
        if not isinstance(plain, Tensor):
            raise PalimpsestError(
                "some of the prompts are guarded and some are not; return_dict_in_generate cannot tell of both. "
                "Generate them one by one."
            )
        each = len(plain) // count
        fill = self.generation_config.pad_token_id
        fill = self._words.end if fill is None else fill
        whole = plain.new_full((len(plain), max(plain.shape[1], guarded.shape[1])), fill)
        whole[:, : plain.shape[1]] = plain
        place = torch.tensor([i * each + k for i in rows for k in range(each)], device=plain.device)
        whole[place] = fill
        whole[place, : guarded.shape[1]] = guarded
        return whole

    # --- scoring -----------------------------------------------------------------------------------------------------

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        prompt_lengths: Tensor | None = None,
        return_dict: bool | None = None,
        **more: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits; of a guarded row, those after the prompt are charged and normalised log-probabilities."""
        if input_ids is None:
            raise PalimpsestError("a guarded model takes input_ids: the prompt decides how an answer is scored.")
        if cache is not None and cache.get_seq_length():
            raise PalimpsestError(
                "a guarded model scores whole sequences, and decodes by its own `generate`; it cannot go on from a "
                "cache. Mix or change the network inside (`unguarded`), and guard the result."
            )
        if attention_mask is not None and attention_mask.ndim != 2:
            raise PalimpsestError("a guarded model takes an attention_mask of one row a sequence.")
        watched = {"states": self.unguarded.get_submodule(self.config.watched)} if self._watches else {}
        with capture(watched) as seen:
            output = self.unguarded(
                input_ids=input_ids,
                attention_mask=attention_mask,
                cache=cache,
                logits_to_keep=logits_to_keep,
                **more,
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        places = places[-logits_to_keep:] if isinstance(logits_to_keep, int) else places[logits_to_keep]
        logits = self._scored(output.logits, input_ids, mask, places.tolist(), prompt_lengths, seen.get("states"))
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **more)
        given = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=getattr(output, "cache", None),
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )
        return given if self.config.return_dict and return_dict is not False else given.to_tuple()

    def _scored(
        self,
        logits: Tensor,
        input_ids: Tensor,
        mask: Tensor,
        places: Sequence[int],
        lengths: Tensor | None,
        states: Tensor | None,
    ) -> Tensor:
        """The logits with the charges at positions from the last of each prompt on."""
        real = [row.nonzero()[:, 0].tolist() for row in mask]
        tokens = [[int(t) for t in ids[own]] for ids, own in zip(input_ids, real, strict=True)]
        ends = self._words.ends(tokens) if lengths is None else lengths.tolist()
        scored = [row for row, end in enumerate(ends) if end <= len(real[row]) and max(places) >= real[row][end - 1]]
        if not scored:
            return logits
        texts = [self._words.text(tokens[row][: ends[row]]) for row in scored]
        last = torch.tensor([real[row][ends[row] - 1] for row in scored], device=input_ids.device)
        decided = self._decide(None if states is None else states[scored, last].detach(), texts)
        changed = [i for i, decision in enumerate(decided) if decision.guarded]
        if not changed:
            return logits
        result = logits.float().clone()
        column = {place: k for k, place in enumerate(places)}
        for i in changed:
            row, end = scored[i], ends[scored[i]]
            charges = self._phrases(decided[i].items).scored(tokens[row][end:], texts[i], self.rule, logits.device)
            for at, (token, charge) in zip(real[row][end - 1 :], charges, strict=False):
                if at in column:
                    taken = torch.zeros_like(result[row, column[at]]).index_put((token,), charge)
                    result[row, column[at]] = (logits[row, column[at]].float().log_softmax(-1) - taken).log_softmax(-1)
        return result

    # --- what transformers asks of a model ---------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, *arguments: Any, **keywords: Any) -> Any:
        """The saved model with its tokenizer; raises where index or settings are not those it was saved with."""
        found = super().from_pretrained(*arguments, **keywords)
        network = found[0] if isinstance(found, tuple) else found
        if not torch.equal(network.recipe.cpu(), network._recipe()):
            raise PalimpsestError(
                f"the config of {arguments[0]} does not have the index and settings that this guarded model was saved "
                "with: it was changed by other means. Change them with `adjust`, `add` and `remove`, and save again."
            )
        network.wording = Wording(AutoTokenizer.from_pretrained(arguments[0], trust_remote_code=False))
        return found

    def save_pretrained(self, *arguments: Any, **keywords: Any) -> None:
        """Saves the network as it is now with the guard and the tokenizer, in one folder."""
        if hasattr(self.unguarded, "_describe"):  # a mixture writes its members into its config where it is saved
            self.unguarded._describe()
        self.config.network = self.unguarded.config.to_dict()
        super().save_pretrained(*arguments, **keywords)
        self._words.tokenizer.save_pretrained(arguments[0] if arguments else keywords["save_directory"])

    def get_input_embeddings(self) -> nn.Module:
        """The network's."""
        return self.unguarded.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """None: the guard stands between the network's last layer and the result."""

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Those of the network."""
        return super().get_expanded_tied_weights_keys(all_submodels=True) if all_submodels else {}

    def init_weights(self) -> None:
        """The network has made its own weights."""
        self.tie_weights(recompute_mapping=False)

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> dict[str, Any]:
        """The network's; decoding is its own."""
        return self.unguarded.prepare_inputs_for_generation(input_ids, **kwargs)

    def _supports_default_dynamic_cache(self) -> bool:  # type: ignore[override]
        return self.unguarded._supports_default_dynamic_cache()


AutoConfig.register(GuardedConfig.model_type, GuardedConfig, exist_ok=True)
AutoModelForCausalLM.register(GuardedConfig, GuardedForCausalLM, exist_ok=True)
