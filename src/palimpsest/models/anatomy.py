"""Where things are in a network: from roles (`mlp_down`, `attention_query`) and name patterns to modules.

One table of names relative to a block covers the known families; any other network is read by structure (repeated
blocks, sizes of linear layers) and the report says so. Experts live in transformers 5 as 3-D parameters of one module:
a part then names module, parameter and expert. Names are those of the bare network: peft's wrappers do not show.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from palimpsest.errors import PalimpsestError, nearest
from palimpsest.models.hooks import Place, places

ROLES = (
    *("embedding", "patch_embedding", "unembedding", "classifier_head", "block", "norm", "final_norm"),
    *("attention", "attention_query", "attention_key", "attention_value", "attention_output"),
    *("mlp", "mlp_up", "mlp_gate", "mlp_down", "expert", "router", "convolution", "linear"),
)

# Names relative to a block, for all families at once; "module:parameter" is one expert's slice of that parameter.
NAMES = {
    "attention": "self_attn attn attention self_attention",
    "attention_query": "self_attn.q_proj attention.q_proj",
    "attention_key": "self_attn.k_proj attention.k_proj",
    "attention_value": "self_attn.v_proj attention.v_proj",
    "attention_output": "self_attn.o_proj self_attn.out_proj self_attn.dense attn.c_proj attention.o_proj "
    "attention.dense self_attention.dense",
    "mlp": "mlp",
    "mlp_up": "mlp.up_proj mlp.c_fc mlp.fc1 fc1 mlp.dense_h_to_4h mlp.gate_up_proj mlp.experts:gate_up_proj "
    "mlp.shared_expert.up_proj",
    "mlp_gate": "mlp.gate_proj mlp.gate_up_proj mlp.experts:gate_up_proj mlp.shared_expert.gate_proj",
    "mlp_down": "mlp.down_proj mlp.c_proj mlp.fc2 fc2 mlp.dense_4h_to_h mlp.experts:down_proj "
    "mlp.shared_expert.down_proj",
    "expert": "mlp.experts:",
    "router": "mlp.gate mlp.router",
}
FUSED = ("self_attn.qkv_proj", "attn.c_attn", "attention.query_key_value", "self_attention.query_key_value")
BLOCKS = re.compile(r"(^|\.)(layers|h)\.\d+$")
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo", "olmo2"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granite", "olmo3"),
    *("gpt2", "gpt_neox", "bloom", "opt", "phi", "vit", "resnet"),
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """One place in a network: a module, or one expert's share of a module.

    `path` finds the module in the network as it is, adapters included; `parameters` are names inside the module.
    `fused` lists the roles that share the same parameters (`c_attn` holds query, key and value).
    """

    name: str
    path: str
    module: nn.Module
    layer: int | None
    parameters: tuple[str, ...]
    expert: int | None = None
    fused: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by full name in the network; of an expert, the views `parameter[expert]`."""
        whole = {f"{self.path}.{name}": self.module.get_parameter(name) for name in self.parameters}
        return {name: value if self.expert is None else value[self.expert] for name, value in whole.items()}

    @property
    def pattern(self) -> str:
        """The name with its numbers left open."""
        inside = "" if self.expert is None else f"[expert].{'+'.join(self.parameters)}"
        return _general(self.name) + inside


@dataclass(frozen=True, eq=False)
class Match:
    """What a selection found: parts by the pattern or role that found them."""

    network: str
    found: Mapping[str, list[Part]]
    guessed: bool = False

    @property
    def parts(self) -> list[Part]:
        """Every part once, in order."""
        return list({(p.name, p.parameters, p.expert): p for parts in self.found.values() for p in parts}.values())

    def modules(self) -> dict[str, nn.Module]:
        """The modules by name, each once."""
        return {part.name: part.module for part in self.parts}

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by full name in the network; parameters that several experts share appear whole."""
        return {f"{p.path}.{name}": p.module.get_parameter(name) for p in self.parts for name in p.parameters}

    def report(self) -> str:
        """One line per kind of place: its name with the numbers left open, and how many there are."""
        lines = []
        for asked, parts in self.found.items():
            for pattern, count in Counter(part.pattern for part in parts).items():
                fused = next(part.fused for part in parts if part.pattern == pattern)
                role = f"{asked} = " if asked in ROLES else ""
                note = f" (the same parameters hold {', '.join(fused)})" if fused else ""
                lines.append(f"{role}{pattern}: {_matches(count)}{note}")
        if self.guessed:
            lines.append(f"Guessed from the structure of {self.network}, which is in no table: check the names above.")
        return "\n".join(lines)


class Anatomy:
    """The parts of one network by role and by name."""

    def __init__(self, network: nn.Module) -> None:
        self._places = places(network)
        bare = self._places[""].module
        self.network = type(bare).__name__
        self.guessed = getattr(getattr(bare, "config", None), "model_type", "") not in FAMILIES
        self._blocks = _blocks(self._places, self.guessed)
        self._layer_of = {name: layer for layer, name in enumerate(self._blocks)}
        self._roles: dict[str, list[Part]] = defaultdict(list)
        for place in self._places.values():
            for role in place.kinds:
                self._roles[role].append(self._part(place))
        for block, place in self._blocks.items():
            self._roles["block"].append(self._part(place))
            members = {n[len(block) + 1 :]: p for n, p in self._places.items() if n.startswith(block + ".")}
            for relative, roles in (_guess(members) if self.guessed else _by_table()).items():
                name, _, parameter = relative.partition(":")
                if name in members:
                    for role in roles:
                        fused = tuple(other for other in roles if other != role)
                        self._roles[role] += self._parts(members[name], ":" in relative, parameter, fused)
        self._outside(bare)

    def _outside(self, bare: Any) -> None:
        """The roles that are not in the blocks."""
        for role, getter in (("embedding", "get_input_embeddings"), ("unembedding", "get_output_embeddings")):
            module = None
            with suppress(AttributeError, NotImplementedError):  # image networks have none
                module = getattr(bare, getter)()
            if module is not None:
                ends = [place for place in self._places.values() if module in (place.module, place.core)]
                self._roles[role] = [self._part(p) for p in ends if isinstance(p.core, nn.Embedding | nn.Linear)]
        outside = [place for place in self._places.values() if self._layer(place.name) is None]
        heads = [p for p in outside if isinstance(p.core, nn.Linear)] if "Classification" in self.network else []
        self._roles["classifier_head"] = [self._part(heads[-1])] if heads else []
        convolutions = [p for p in outside if isinstance(p.core, nn.Conv2d) and p.core.kernel_size == p.core.stride]
        self._roles["patch_embedding"] = [self._part(p) for p in convolutions if p.core.kernel_size != (1, 1)][:1]
        order = list(self._places)
        after = order.index(list(self._blocks)[-1]) if self._blocks else len(order)
        late = {name for place, name in enumerate(order) if place > after or "final" in name}  # OPT's comes first
        norms = [p for p in outside if "norm" in p.kinds and p.name in late]
        self._roles["final_norm"] = [self._part(norms[-1])] if norms else []

    def find(self, role: str) -> list[Part]:
        """The parts of a role in order of layers; empty where this network has none. An unknown role raises."""
        if role not in ROLES:
            raise PalimpsestError(f"there is no role {role!r}. {nearest(role, ROLES)}")
        return list(self._roles.get(role, []))

    def blocks(self) -> list[Part]:
        """The repeated layers, in order."""
        return self.find("block")

    def select(self, wanted: str | Iterable[str], layers: Iterable[int] | slice | None = None) -> Match:
        """The parts of roles or of glob patterns on module names (`*` spans dots), in the given layers.

        Anything that selects nothing raises and names what is close; negative layers count from the end.
        """
        if not (wanted := [wanted] if isinstance(wanted, str) else list(wanted)):
            raise PalimpsestError("no layers were named: the list of patterns is empty.")
        chosen = self._layers(layers)
        found: dict[str, list[Part]] = {}
        for asked in wanted:
            named = [self._part(place) for name, place in self._places.items() if name and fnmatchcase(name, asked)]
            parts = self.find(asked) if asked in ROLES else named
            if not parts:
                raise PalimpsestError(f'layers "{asked}" match nothing in {self.network}. {self._close(asked)}')
            found[asked] = [part for part in parts if chosen is None or part.layer in chosen]
            if not found[asked]:
                count = _matches(len(parts))
                raise PalimpsestError(f'layers "{asked}" have {count}, none in layers {sorted(chosen or ())}.')
        by_role = any(asked in ROLES and asked not in ("linear", "convolution", "norm") for asked in wanted)
        return Match(self.network, found, self.guessed and by_role)

    def _layers(self, layers: Iterable[int] | slice | None) -> set[int] | None:
        if layers is None:
            return None
        count = len(self._blocks)
        layers = range(count)[layers] if isinstance(layers, slice) else list(layers)
        for layer in layers:
            if not -count <= layer < count:
                raise PalimpsestError(f"layer {layer} does not exist: {self.network} has layers 0 to {count - 1}.")
        return {layer % count for layer in layers}

    def _close(self, asked: str) -> str:
        counts = Counter(_general(name) for name in self._places if name)
        counts.update({role: len(parts) for role, parts in self._roles.items() if parts})
        depth = asked.count(".")

        def closeness(name: str) -> tuple[bool, float]:
            return name.count(".") == depth, SequenceMatcher(None, name, asked).ratio()

        best = sorted(counts, key=closeness, reverse=True)[:3]
        near = [name for name in best if closeness(name)[1] > 0.5][: 1 if "." in asked else 3]
        shown = near or [role for role in ROLES if counts[role]]
        listed = ", ".join(f'"{name}" ({_matches(counts[name])})' for name in shown)
        return f"{'Close' if near else 'Roles'}: {listed}."

    def _layer(self, name: str) -> int | None:
        while name:
            if name in self._layer_of:
                return self._layer_of[name]
            name = name.rpartition(".")[0]
        return None

    def _part(self, place: Place, **more: Any) -> Part:
        below = [p for p in self._places.values() if f"{p.name}.".startswith(f"{place.name}.")]
        full = [f"{p.core_path}.{n}" for p in below for n in _own_parameters(p.core)]
        fields = {"layer": self._layer(place.name), "parameters": tuple(n[len(place.path) + 1 :] for n in full), **more}
        return Part(name=place.name, path=place.path, module=place.module, **fields)

    def _parts(self, place: Place, experts: bool, parameter: str, fused: tuple[str, ...]) -> Iterator[Part]:
        if not experts:
            yield self._part(place, fused=fused)
        elif isinstance(place.core, nn.ModuleList):
            for number in range(0 if parameter else len(place.core)):
                yield self._part(self._places[f"{place.name}.{number}"])
        else:
            whole = self._part(place)
            names = tuple(n for n in whole.parameters if not parameter or n.startswith(parameter))
            for number in range(len(attrgetter(names[0])(whole.module))):
                yield self._part(place, parameters=names, expert=number, fused=fused)


def anatomy(network: Any) -> Anatomy:
    """The anatomy of a network, bare or wrapped by peft, or of that of a `Model`."""
    return Anatomy(network if isinstance(network, nn.Module) else network.network)


def _own_parameters(module: Any) -> list[str]:
    """Names of the module's own parameters; those that torch has parametrised are known by their first name."""
    return [*(name for name, _ in module.named_parameters(recurse=False)), *getattr(module, "parametrizations", ())]


def _matches(count: int) -> str:
    return f"{count} match" if count == 1 else f"{count} matches"


def _general(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def _by_table() -> dict[str, list[str]]:
    roles: dict[str, list[str]] = defaultdict(list)
    for role, names in NAMES.items():
        for name in names.split():
            roles[name].append(role)
    return roles | {name: ["attention_query", "attention_key", "attention_value"] for name in FUSED}


def _blocks(places: Mapping[str, Place], guess: bool) -> dict[str, Place]:
    """The stack of repeated layers that holds the most parameters."""
    stacks: dict[str, dict[str, Place]] = defaultdict(dict)
    for name, place in places.items():
        parent = places.get(name.rpartition(".")[0])
        repeated = parent is not None and isinstance(parent.core, nn.ModuleList) and list(place.core.children())
        if (repeated and guess) or (BLOCKS.search(name) and not guess):
            stacks[_general(name)][name] = place

    def size(stack: Mapping[str, Place]) -> int:
        return sum(parameter.numel() for place in stack.values() for parameter in place.core.parameters())

    return max(stacks.values(), key=size, default={})


def _guess(members: Mapping[str, Place]) -> dict[str, list[str]]:
    """Roles inside a block that is in no table: by name where attention is concerned, by sizes elsewhere."""
    roles: dict[str, list[str]] = {}
    attention = next((name for name in members if re.search(r"attn|attention", name)), "")
    if attention:
        roles[attention] = ["attention"]
    parts = {"q": "attention_query", "k": "attention_key", "v": "attention_value", "o": "attention_output"}
    for name, place in members.items():
        if "linear" not in place.kinds:
            continue
        size_in, size_out = place.features
        last = name.rpartition(".")[2].lower()
        if attention and name.startswith(attention + "."):
            roles[name] = list(parts.values())[:3] if size_out == 3 * size_in else [parts.get(last[0], parts["o"])]
        elif size_out > size_in:
            roles[name] = ["mlp_gate" if "gate" in last else "mlp_up"]
        elif size_out < size_in:
            roles[name] = ["mlp_down"]
            if "." in name:
                roles.setdefault(name.rpartition(".")[0], ["mlp"])
    return roles
