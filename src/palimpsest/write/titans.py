"""A language model with a neural memory that learns while it reads, trained from a text corpus.

The layer with its equations is in `palimpsest.layers.titans` and `neural_memory`; the model around it and its training
are those of `train-lm`, so that the two differ in the token mixer only. The variants put the memory beside attention
over a short span in three ways, or leave attention out: `memory-only`, `mac` (as context), `mag` (as gate), `mal` (as
layer). The cache does not grow with what was read. `momentum` and `decay` off, `depth` 1 and `persistent` 0 are the
ablations of the paper.

Source: Behrouz et al. 2024 (arXiv 2501.00663), sections 3 and 4; there is no official code.
"""

from __future__ import annotations

from typing import Any

from palimpsest.data.records import Roles
from palimpsest.layers.titans import Variant
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Method, setting, system
from palimpsest.train import Training
from palimpsest.write.train_lm import TRAINING, Corpus, Size, trained_memory


@system(
    "titans",
    verb="write",
    title="Titans (a memory that learns at test time)",
    paper="Behrouz et al. 2024 (arXiv 2501.00663)",
    needs={"train"},
    uses={"validation"},
    fidelity="paper only",
    deviations=(
        "sizes for one machine: 4 layers of width 256; the paper trains 170M to 760M parameters",
        "not stated there: heads, convolution of width 4, sigmoid gates, largest step (1 - eta) / chunk, expansion 2",
        "a token's gradient is clipped at a norm of 10, without which deep memories have been seen to diverge",
        "in `mac` a token sees what the memory recalls for tokens up to its own only, so that the model stays causal",
    ),
)
class Titans(Method):
    """Trains a decoder whose token mixer has a neural memory on the role `train`."""

    variant: Variant = setting(default="mag", origin="paper", help="how memory and attention go together")
    depth: int = setting(default=2, at_least=1, origin="paper: 1 to 4", help="layers of the memory; 1: a matrix")
    expansion: float = setting(default=2.0, above=0, origin="ours", help="hidden width of the memory, in heads' widths")
    chunk: int = setting(default=16, at_least=1, origin="ours", help="tokens that share one point of the gradient")
    clip: float | None = setting(
        default=10.0, above=0, origin="ours", help="largest norm of a token's gradient; None: any"
    )
    window: int = setting(default=64, at_least=1, origin="ours", help="tokens that attention looks back, or a segment")
    persistent: int = setting(default=4, at_least=0, origin="ours", help="learned vectors before the sequence")
    momentum: bool = setting(default=True, origin="paper", help="surprise carries over to the next tokens")
    decay: bool = setting(default=True, origin="paper", help="the memory forgets")
    size: Size = setting(default=Size(), origin="ours", help="how large the model is")
    corpus: Corpus = setting(default=Corpus(), origin="ours", help="how texts become windows")
    training: Training = setting(default=TRAINING, origin="ours", help="how to train")

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The new model; perplexity over the steps is in its ledger entry."""
        fields = ("depth", "expansion", "chunk", "clip", "persistent", "momentum", "decay")
        chosen: dict[str, Any] = {"variant": self.variant, **{name: getattr(self, name) for name in fields}}
        if self.variant != "memory-only":
            chosen["window"] = self.window
        return trained_memory(self, model, data, run, "titans", chosen)
