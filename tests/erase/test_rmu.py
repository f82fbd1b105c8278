from __future__ import annotations

import pytest
import torch

from memorised import data, probability, quiet, reciting
from palimpsest.erase.rmu import RMU, hidden_states, sequence_mse
from palimpsest.errors import PalimpsestError
from palimpsest.models.hooks import no_hooks_left
from palimpsest.train import Training, schedule

SHORT = Training(learning_rate=3e-3, epochs=15, warmup_epochs=0.0)


def test_the_squared_error_is_averaged_over_each_sequence_s_own_tokens():
    """Squared errors [[1, 1, 1, -], [2, -, -, -]]: 1.5, not 1.6667 as where lengths are mixed."""
    hidden = torch.tensor([[1.0], [1.0], [1.0], [2.0**0.5]], dtype=torch.float64)
    loss = sequence_mse(hidden, torch.zeros(1).double(), torch.tensor([0, 0, 0, 1]), torch.tensor([3.0, 1.0]).double())
    assert float(loss) == pytest.approx(1.5, abs=1e-6)


def test_rmu_moves_the_states_of_forget_tokens_and_holds_those_of_retain_tokens():
    before, roles = reciting(), data()
    after = RMU(layer=1, steering=20.0, retain_weight=10.0, training=SHORT).apply(before, roles, quiet())
    plan = schedule(before, SHORT, quiet(), forget=roles.forget, retain=roles.retain)
    moved = {}
    for role, sequences in plan.sequences.items():
        old = torch.cat(hidden_states(before, sequences, "model.layers.1", quiet()))
        new = torch.cat(hidden_states(after, sequences, "model.layers.1", quiet()))
        moved[role] = float((new - old).square().mean())
    assert moved["forget"] > 2 * moved["retain"]
    assert probability(after, roles.forget) < probability(before, roles.forget)
    assert no_hooks_left(after.network)


def test_states_are_those_of_each_sequence_alone(causal_lm):
    block = {"gpt2": "transformer.h.0"}.get(causal_lm.network.config.model_type, "model.layers.0")
    sequences = schedule(causal_lm, SHORT, quiet(), forget=data().forget).sequences["forget"]
    together = hidden_states(causal_lm, sequences, block, quiet())
    for sequence, states in zip(sequences, together, strict=True):
        (alone,) = hidden_states(causal_lm, [sequence], block, quiet())
        torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-5)


def test_low_rank_training_finds_the_block_too():
    before, roles = reciting(), data()
    low = Training(learning_rate=1e-2, epochs=3, lora_rank=2)
    assert RMU(layer=0, training=low).apply(before, roles, quiet()).digest() != before.digest()


def test_a_layer_that_is_not_there_is_refused(llama):
    with pytest.raises(PalimpsestError, match="rmu: layer is 2, but LlamaForCausalLM has 2 blocks"):
        RMU(layer=2).apply(llama, data(), quiet())
