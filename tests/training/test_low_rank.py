"""GaLore's optimizer: projections, its step, and its state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import build_model
from palimpsest.errors import PalimpsestError
from palimpsest.training import low_rank
from palimpsest.training.eight_bit import Quantised, dynamic_levels
from palimpsest.training.low_rank import GaLoreAdamW, down, galore_groups, projector, side_of, state_bytes, up


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stepped(weight, gradients, **options):
    """What becomes of a weight after steps with these gradients."""
    weight = nn.Parameter(weight.clone())
    rank = options.pop("rank", None)
    optimizer = GaLoreAdamW([{"params": [weight], "rank": rank}], **options)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach(), optimizer


@pytest.mark.parametrize(
    ("shape", "choice", "expected"),
    [
        ((3, 5), "std", "left"),
        ((5, 3), "std", "right"),
        ((4, 4), "std", "right"),
        ((3, 5), "reverse_std", "right"),
        ((5, 3), "reverse_std", "left"),
        ((3, 5), "right", "right"),
        ((5, 3), "left", "left"),
    ],
)
def test_the_shorter_side_is_projected(shape, choice, expected):
    assert side_of(*shape, choice) == expected


@given(seed=st.integers(0, 30), rank=st.integers(1, 4), side=st.sampled_from(["left", "right"]))
def test_a_projection_keeps_what_lies_in_its_directions(seed, rank, side):
    gradient = drawn(4, 6, seed=seed)
    basis = projector(gradient, rank, side)
    assert torch.allclose(basis @ basis.mT, torch.eye(rank), atol=1e-5)
    inside = up(down(gradient, basis, side), basis, side)
    assert torch.linalg.matrix_rank(inside) <= rank
    assert torch.allclose(up(down(inside, basis, side), basis, side), inside, atol=1e-5)
    assert inside.norm() <= gradient.norm() * (1 + 1e-5)
    if rank == 4:
        assert torch.allclose(inside, gradient, atol=1e-4)


def test_of_a_matrix_of_that_rank_nothing_is_lost():
    gradient = drawn(8, 2) @ drawn(2, 6, seed=1)
    for exact in (True, False):
        basis = projector(gradient, 2, "right", exact)
        assert torch.allclose(up(down(gradient, basis, "right"), basis, "right"), gradient, atol=1e-4)


def test_the_first_step_is_the_worked_example():
    """Whatever the sign of the singular vector: the leading direction moves by lr times scale, the other not at all."""
    gradient = torch.diag(torch.tensor([3.0, 1.0]))
    for sign in (1, -1):
        weight, _ = stepped(torch.zeros(2, 2), [sign * gradient], lr=0.1, rank=1, eps=1e-12)
        expected = torch.tensor([[-0.025 * sign, 0.0], [0.0, 0.0]])
        assert torch.allclose(weight, expected, atol=1e-6)


def test_a_group_without_rank_is_adamw():
    """eps stands before the bias correction here, and after it in torch: without eps the two agree."""
    gradients = [drawn(4, 3, seed=seed) for seed in range(7)]
    own, _ = stepped(drawn(4, 3, seed=9), gradients, lr=0.01, eps=1e-30)
    weight = nn.Parameter(drawn(4, 3, seed=9))
    adam = torch.optim.AdamW([weight], lr=0.01, weight_decay=0.0, eps=1e-30)
    for gradient in gradients:
        weight.grad = gradient
        adam.step()
    assert torch.allclose(own, weight, atol=1e-6)


def test_weight_decay_is_not_projected():
    weight, _ = stepped(torch.ones(4, 3), [torch.zeros(4, 3)], lr=0.1, rank=1, weight_decay=0.5)
    assert torch.allclose(weight, torch.full((4, 3), 0.95))


def test_every_update_lies_in_the_projected_directions():
    start = drawn(6, 4)
    weight, optimizer = stepped(start, [drawn(6, 4, seed=1), drawn(6, 4, seed=2)], rank=2, gap=100)
    basis = next(iter(optimizer.state.values()))["basis"]
    moved = weight - start
    assert torch.linalg.matrix_rank(moved, atol=1e-6) <= 2
    assert (moved @ (torch.eye(4) - basis.mT @ basis)).abs().max() < 1e-7


@pytest.mark.parametrize(("gap", "count"), [(1, 4), (2, 2), (3, 2), (100, 1)])
def test_the_projector_is_found_anew_every_gap_steps(gap, count, monkeypatch):
    from palimpsest.training import low_rank

    calls = []
    monkeypatch.setattr(low_rank, "projector", lambda *given: calls.append(1) or projector(*given))
    stepped(drawn(6, 4), [drawn(6, 4, seed=seed) for seed in range(4)], rank=2, gap=gap)
    assert len(calls) == count


@pytest.mark.parametrize(("moments", "gap"), [("reproject", 2), ("reset", 2), ("keep", 9)])
def test_turning_a_matrix_over_turns_its_update_over(moments, gap):
    """But for moments that outlive their basis: the signs of singular vectors are not those of the transpose's."""
    gradients = [drawn(6, 4, seed=seed) for seed in range(5)]
    tall, _ = stepped(drawn(6, 4, seed=9), gradients, rank=2, gap=gap, moments=moments)
    wide, _ = stepped(drawn(6, 4, seed=9).mT, [g.mT for g in gradients], rank=2, gap=gap, moments=moments)
    assert torch.allclose(tall, wide.mT, atol=1e-6)


def test_the_state_has_the_sizes_that_the_paper_states():
    _, optimizer = stepped(drawn(6, 10), [drawn(6, 10, seed=1)], rank=2)
    assert state_bytes(optimizer) == 4 * (6 * 2 + 2 * 10 * 2)
    _, plain = stepped(drawn(6, 10), [drawn(6, 10, seed=1)])
    assert state_bytes(plain) == 4 * 2 * 60


@pytest.mark.parametrize("moments", ["keep", "reset", "reproject"])
def test_what_becomes_of_the_moments_is_a_choice(moments):
    gradients = [drawn(6, 4, seed=1), drawn(6, 4, seed=2)]
    _, optimizer = stepped(drawn(6, 4), gradients, rank=2, gap=1, moments=moments)
    state = next(iter(optimizer.state.values()))
    bases = [projector(g, 2, "right") for g in gradients]
    first, second = (down(g, b, "right") for g, b in zip(gradients, bases, strict=True))
    before = {"keep": 0.1 * first, "reset": 0 * first, "reproject": 0.1 * first @ bases[0] @ bases[1].mT}[moments]
    assert torch.allclose(state["m"], 0.9 * before + 0.1 * second, atol=1e-6)


@pytest.mark.parametrize("moments", ["keep", "reset", "reproject"])
def test_steps_stay_of_one_size_when_the_projector_changes(moments):
    base, sizes = drawn(12, 8, seed=1), []
    weight = nn.Parameter(torch.zeros(12, 8))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 4}], lr=1e-3, scale=1.0, gap=50, moments=moments)
    for seed in range(160):
        weight.grad = base + 0.1 * drawn(12, 8, seed=seed)
        before = weight.detach().clone()
        optimizer.step()
        sizes.append(float((weight.detach() - before).norm()))
    assert max(sizes[50:]) < 2 * max(sizes[20:50])


@pytest.mark.parametrize("bits", [32, 8])
def test_a_saved_state_goes_on_to_the_last_bit(bits, tmp_path):
    gradients = [drawn(80, 120, seed=seed) for seed in range(6)]
    options = {"rank": 60, "gap": 4, "state_bits": bits}
    whole, _ = stepped(drawn(80, 120, seed=9), gradients, **options)
    half, first = stepped(drawn(80, 120, seed=9), gradients[:3], **options)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    weight = nn.Parameter(half.clone())
    options.pop("rank")
    second = GaLoreAdamW([{"params": [weight], "rank": 60}], **options)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for gradient in gradients[3:]:
        weight.grad = gradient.clone()
        second.step()
    assert torch.equal(weight, whole)
    other = GaLoreAdamW([{"params": [nn.Parameter(half.clone())], "rank": 30}])
    saved = first.state_dict()
    saved["param_groups"][0]["rank"] = 30
    with pytest.raises(PalimpsestError, match="projector has rank 60, not 30"):
        other.load_state_dict(saved)


def test_levels_are_256_and_dense_towards_0():
    for signed in (True, False):
        levels = dynamic_levels(signed)
        assert len(levels) <= 256
        assert (levels.diff() > 0).all()
        assert levels.max() == 1
        assert bool((levels < 0).any()) == signed
    signed = dynamic_levels(True)
    assert signed.abs()[signed != 0].min() < 1e-6
    assert (signed > 0.1).sum() == pytest.approx(65, abs=1)


def test_eight_bits_are_within_half_a_level():
    values = drawn(70, 100)
    coder = Quantised(True, torch.device("cpu"))
    code, scale = coder.write(values)
    assert code.dtype == torch.uint8
    assert len(code) == 7000
    assert len(scale) == math.ceil(7000 / 256)
    back = coder.read(code, scale).view_as(values)
    assert (back - values).abs().max() <= 0.01 * scale.max()
    assert torch.equal(coder.read(*coder.write(torch.zeros(300))), torch.zeros(300))


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_that_of_the_nearest_level(signed):
    coder = Quantised(signed, torch.device("cpu"))
    values = drawn(64, 256) * drawn(64, 256, seed=1).abs() ** 8  # down to where levels are dense
    values = values if signed else values.abs()
    code, scale = coder.write(values)
    scaled = values / scale[:, None]
    off = (coder.levels[code.int()].view_as(scaled) - scaled).abs()
    nearest = torch.stack([(coder.levels - x[:, None]).abs().amin(1) for x in scaled])
    assert (off > nearest + 1e-7).float().mean() < 0.01
    assert ((off - nearest) <= 2**-10 * scaled.abs() + 2**-24).all()  # what half precision rounds, twice


def test_updates_with_eight_bit_states_are_close():
    gradients = [drawn(96, 128, seed=seed) for seed in range(20)]
    full, whole = stepped(torch.zeros(96, 128), gradients, rank=64, gap=100)
    small, coded = stepped(torch.zeros(96, 128), gradients, rank=64, gap=100, state_bits=8)
    assert (small - full).norm() < 0.05 * full.norm()
    moments = state_bytes(whole) - 96 * 64 * 4
    assert state_bytes(coded) - 96 * 64 * 4 < 0.27 * moments


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("rank", [None, 60])
def test_what_is_updated_at_once_does_not_matter(bits, rank, monkeypatch):
    gradients = [drawn(130, 90, seed=seed).T for seed in range(5)]  # in another order than the weight's in memory
    options = {"rank": rank, "gap": 2, "moments": "reproject", "state_bits": bits}
    whole, _ = stepped(drawn(90, 130, seed=9), gradients, **options)
    monkeypatch.setattr(low_rank, "PIECE", 512)
    pieces, optimizer = stepped(drawn(90, 130, seed=9), gradients, **options)
    assert torch.equal(pieces, whole)
    (state,) = optimizer.state.values()
    assert ("m_code" in state) == (bits == 8)


def test_stepping_layer_by_layer_is_the_same_and_frees_the_gradients():
    def run(per_layer):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        groups = [{"params": [m.weight for m in (network[0], network[2])], "rank": 2}]
        groups.append({"params": [m.bias for m in (network[0], network[2])]})
        optimizer = GaLoreAdamW(groups, lr=0.01, gap=2, per_layer=per_layer)
        for seed in range(5):
            network(drawn(7, 6, seed=seed)).square().mean().backward()
            assert all((weight.grad is None) == per_layer for weight in network.parameters())
            optimizer.step()
            optimizer.zero_grad()
        optimizer.detach()
        return network, optimizer

    (first, _), (second, optimizer) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert {state["step"] for state in optimizer.state.values()} == {5}
    assert not any(weight._post_accumulate_grad_hooks for weight in second.parameters())


def test_a_gradient_that_is_no_number_is_skipped_and_counted():
    broken = drawn(6, 4)
    broken[0, 0] = torch.nan
    good = [drawn(6, 4, seed=1), drawn(6, 4, seed=2)]
    weight, optimizer = stepped(drawn(6, 4, seed=9), [good[0], broken, good[1]], rank=2, gap=100)
    expected, _ = stepped(drawn(6, 4, seed=9), good, rank=2, gap=100)
    assert torch.equal(weight, expected)
    assert optimizer.skipped == 1


def test_a_closure_may_go_backward():
    weight = nn.Parameter(drawn(6, 4))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 2}])

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    before = closure().item()
    assert optimizer.step(closure).item() == before
    assert closure().item() < before


def test_groups_take_the_matrices_of_the_targets():
    network = build_model("llama").network
    groups = {group["rank"]: group["params"] for group in galore_groups(network, 0)}
    assert sum(len(params) for params in groups.values()) == len(list(network.parameters()))
    assert set(groups) == {None, 4, 8}  # keys and values are 16 wide, the rest 32
    assert any(weight is network.model.embed_tokens.weight for weight in groups[None])
    with_embedding = galore_groups(network, 4, ("attention", "mlp", "embedding"))
    assert not any(
        w is network.model.embed_tokens.weight for g in with_embedding if g["rank"] is None for w in g["params"]
    )


def test_a_kernel_is_a_matrix_with_a_row_a_channel():
    gradients = [drawn(6, 2, 3, 3, seed=seed) for seed in range(3)]
    kernel, _ = stepped(drawn(6, 2, 3, 3, seed=9), gradients, rank=2, gap=2)
    matrix, _ = stepped(drawn(6, 2, 3, 3, seed=9).flatten(1), [g.flatten(1) for g in gradients], rank=2, gap=2)
    assert torch.equal(kernel.flatten(1), matrix)
    groups = {group["rank"]: group["params"] for group in galore_groups(build_model("convnet").network, 2)}
    assert all(weight.ndim == 4 for weight in groups[2])


def test_bad_input():
    weight = nn.Parameter(drawn(6, 4))
    for rank in (0, 5, 2.5):
        with pytest.raises(PalimpsestError, match="expected 1 to 4"):
            GaLoreAdamW([{"params": [weight], "rank": rank}])
    with pytest.raises(PalimpsestError, match="projects matrices and kernels"):
        GaLoreAdamW([{"params": [nn.Parameter(torch.ones(3))], "rank": 1}])
    for wrong in ({"gap": 0}, {"scale": 0.0}, {"lr": -1.0}):
        with pytest.raises(PalimpsestError, match="expected above 0"):
            GaLoreAdamW([weight], **wrong)
    with pytest.raises(ValueError, match="more than one parameter group"):
        GaLoreAdamW([{"params": [weight]}, {"params": [weight], "rank": 1}])
    with pytest.raises(PalimpsestError, match="no matrix to project"):
        galore_groups(build_model("llama").network, 0, ("norm",))
    assert copy.deepcopy(weight).grad is None
