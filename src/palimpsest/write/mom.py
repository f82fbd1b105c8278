"""A language model whose memory is a mixture of memories, trained from a text corpus.

The layer with its equations is in `palimpsest.layers.mom`; the model around it and its training are those of
`train-lm`, so that the two differ in the token mixer only. `memories=1` is the plain recurrent layer of the same rule,
the comparison that the paper makes. Its balance loss keeps the router from sending every token to the same memories.

    loss = mean token NLL + balance * sum over layers of M sum_m f_m P_m

Source: Du et al. 2025 (arXiv 2502.13685v4), section 3; balance 0.01 is the code's default, the paper's best is 0.001.
"""

from __future__ import annotations

from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.layers.recurrences import Rule
from palimpsest.models.model import Model
from palimpsest.run import Run
from palimpsest.system import Method, setting, system
from palimpsest.train import Training
from palimpsest.write.train_lm import TRAINING, Corpus, Size, trained_memory


@system(
    "mom",
    verb="write",
    title="Mixture of memories",
    paper="Du et al. 2025 (arXiv 2502.13685)",
    needs={"train"},
    uses={"validation"},
    fidelity="adapted",
    deviations=(
        "sizes for one machine: 4 layers of width 256; the paper trains 380M and 1.3B parameters",
        "the convolution keeps to one memory's tokens in training too; the ported code lets it cross",
        "queries and keys have length 1 under every rule",
    ),
)
class MixtureOfMemoriesLM(Method):
    """Trains a decoder whose token mixer is a mixture of memories on the role `train`."""

    memories: int = setting(default=4, at_least=1, origin="paper", help="M: routed memories")
    top_k: int = setting(default=2, at_least=1, origin="paper", help="k: memories a token is written to and read from")
    shared: bool = setting(default=True, origin="paper", help="a further memory that sees every token")
    rule: Rule = setting(default="gated-delta", origin="paper", help="how a memory is updated")
    single_kv: bool = setting(
        default=False, origin="official code", help="one key and value projection for all memories"
    )
    balance: float = setting(default=0.01, at_least=0, origin="official code", help="weight of the balance loss")
    convolution: int = setting(default=4, at_least=1, origin="official code", help="width of the causal convolution")
    chunk: int = setting(
        default=64, at_least=1, origin="ours, measured", help="tokens computed at once: speed, not result"
    )
    size: Size = setting(default=Size(), origin="ours", help="how large the model is")
    corpus: Corpus = setting(default=Corpus(), origin="ours", help="how texts become windows")
    training: Training = setting(default=TRAINING, origin="ours", help="how to train")

    def __post_init__(self) -> None:
        if self.top_k > self.memories:
            raise PalimpsestError(f"mom: top_k is {self.top_k}, expected at most memories ({self.memories}).")

    def apply(self, model: Model, data: Roles, run: Run) -> Model:
        """The new model; perplexity over the steps is in its ledger entry."""
        fields = ("memories", "top_k", "shared", "rule", "single_kv", "convolution", "chunk")
        chosen = {name: getattr(self, name) for name in fields}
        return trained_memory(self, model, data, run, "mom", chosen, self.balance)
