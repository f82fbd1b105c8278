"""Numbers that the authors' own code gives for the inputs below, recorded once; nothing of that code is needed here.

The inputs are samples of a sine, so that they are the same on every machine. Each expectation names its repository,
commit and function. Where this library differs on purpose, its documentation says so and the test has the matching
setting.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from palimpsest.audit.answers import Answer
from palimpsest.audit.membership import min_k, min_k_plus
from palimpsest.erase.flat import flat_loss
from palimpsest.erase.gradient_ascent import kl_divergence
from palimpsest.erase.loss_curvature import kept_pairs
from palimpsest.erase.npo import npo_loss
from palimpsest.erase.preference import dpo_loss
from palimpsest.erase.rmu import sequence_mse
from palimpsest.erase.simnpo import simnpo_loss
from palimpsest.erase.ssd import dampen
from palimpsest.erase.undial import lowered
from palimpsest.keep.lines import coefficients
from palimpsest.layers.recurrences import Inputs, chunk_recurrence, naive_recurrence
from palimpsest.models.combination import difference, interpolate
from palimpsest.statistics.klom import klom
from palimpsest.statistics.likelihood import token_scores
from palimpsest.statistics.predictions import margins
from palimpsest.statistics.representations import linear_cka
from palimpsest.statistics.targets import Soft
from palimpsest.training.low_rank import GaLoreAdamW
from palimpsest.write.memory_decoder import hybrid_loss


def wave(*shape: int, phase: float = 0.0) -> Tensor:
    """2 sin(0.7 i + phase) for i = 0, 1, ... in this shape, float64."""
    return 2 * torch.sin(0.7 * torch.arange(math.prod(shape), dtype=torch.float64) + phase).reshape(shape)


LOGITS, REFERENCE = wave(2, 5, 7), wave(2, 5, 7, phase=1.3)
"""[sequences, positions, vocabulary]; position i predicts token i + 1."""
LABELS = torch.tensor([[-100, 3, 5, 1, 6], [-100, -100, 2, 0, 4]])
OTHER = torch.tensor([[-100, 2, 2, 0, 1], [-100, -100, 6, 3, 5]])


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed negative log-likelihood of each sequence."""
    found = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return found.sum(1)


# --- erasers: locuslab/open-unlearning at d3d7cf9, src/trainer -------------------------------------------------------


def test_the_likelihoods_that_the_losses_start_from():
    """`compute_batch_nll` of trainer/utils.py."""
    assert nll(LOGITS, LABELS).tolist() == pytest.approx([9.03449767, 10.19922032])
    assert nll(REFERENCE, LABELS).tolist() == pytest.approx([11.79964396, 9.67418285])


def test_npo():
    """`compute_dpo_loss` with lose_inputs alone, beta 0.1."""
    assert float(npo_loss(nll(LOGITS, LABELS), nll(REFERENCE, LABELS), 0.1)) == pytest.approx(15.08171591)


def test_dpo():
    """`compute_dpo_loss`, beta 0.5."""
    of = [nll(logits, labels) for labels in (OTHER, LABELS) for logits in (LOGITS, REFERENCE)]
    assert float(dpo_loss(*of, beta=0.5)) == pytest.approx(2.99680191)


def test_simnpo():
    """The forget loss of unlearn/simnpo.py, beta 4.5, delta 3."""
    mean = nll(LOGITS, LABELS) / (LABELS != -100).sum(1)
    assert float(simnpo_loss(mean, beta=4.5, delta=3.0)) == pytest.approx(0.78317508)


def test_undial():
    """`compute_undial_loss`, beta 10, every label given."""
    labels = torch.tensor([[3, 5, 1, 6], [2, 2, 0, 4]]).flatten()
    taught = lowered(REFERENCE[:, :-1].flatten(0, 1), labels, torch.ones(8, dtype=torch.bool), 10.0).softmax(-1)
    loss = nn.functional.cross_entropy(LOGITS[:, :-1].flatten(0, 1), taught)
    assert float(loss) == pytest.approx(2.52660537)


def test_kl_minimisation():
    """`compute_kl_divergence`: the mean over all positions."""
    assert float(kl_divergence(REFERENCE, LOGITS).mean()) == pytest.approx(0.9724924)


def test_rmu():
    """`compute_activation_loss` of unlearn/rmu.py on activations [2, 4, 3], two tokens of each in the mask.

    Of sequences of different lengths that code divides each by the length of every one, by broadcasting; here it is
    its own.
    """
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 1]], dtype=torch.bool)
    loss = sequence_mse(wave(2, 4, 3)[mask], wave(2, 4, 3, phase=0.4)[mask], mask.nonzero()[:, 0], mask.sum(1).double())
    assert float(loss) == pytest.approx(0.36458766)


# --- other erasers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("divergence", "batch_first", "example"),
    [
        ("kl", 0.5107079764250577, 0.5156283544061305),
        ("tv", 0.17734696274829917, 0.17854009245391034),
        ("js", 0.3529528589318734, 0.3567999436647855),
        ("pearson", 0.6806249999999998, 0.6835416666666666),
    ],
)
def test_flat(divergence, batch_first, example):
    """UCSC-REAL/FLAT at bf2ef07, `get_contrastive_loss` of dataloader.py: a batch, and the mean of batches of one."""
    template, forget = torch.tensor([0.3, 0.55, 0.2]).double(), torch.tensor([0.9, 0.7, 0.95]).double()
    assert float(flat_loss(template, forget, divergence, "batch_first")) == pytest.approx(batch_first, rel=1e-6)
    assert float(flat_loss(template, forget, divergence)) == pytest.approx(example, rel=1e-6)


def test_ssd():
    """if-loops/selective-synaptic-dampening at cdfdc0e, `modify_weight` of src/ssd.py: alpha 2, lambda 0.7."""
    network = nn.Linear(4, 3).double()
    with torch.no_grad():
        network.weight.copy_(wave(3, 4))
        network.bias.copy_(wave(3, phase=2.0))
    whole = {"weight": 0.3 * wave(3, 4, phase=0.5).square(), "bias": 0.3 * wave(3, phase=0.8).square()}
    forget = {"weight": wave(3, 4, phase=1.5).square(), "bias": wave(3, phase=1.8).square()}
    dampen(network, whole, forget, alpha=2.0, dampening=0.7)
    expected = [
        [0.0, 0.35957873, 1.97089946, 0.49199244],
        [0.00417105, -0.0917666, -1.74315155, -1.96490526],
        [-0.01655625, 0.00172917, 0.38078135, 1.97633648],
    ]
    assert_close(network.weight.detach(), torch.tensor(expected).double(), rtol=0, atol=1e-5)
    assert network.bias.tolist() == pytest.approx([0.20722531, 0.85475975, -0.51108223], abs=1e-5)


def test_uld():
    """UCSB-NLP-Chang/ULD at 858608c, `relative_top_filter` and the step after it: weight -0.75, filter 0.2.

    Tokens that are filtered out get -1000 there and -inf here.
    """
    mixed = difference(wave(2, 12), wave(2, 12, phase=0.5), 0.75, 0.2, centre=False, decoding=True)
    out = -math.inf
    expected = [
        [out, -0.10962325, 0.55144933, 0.95316668, 0.90659484, out, out, out, out, out, -0.09302677, 0.56524063],
        [0.95766653, 0.8996869, out, out, out, out, out, -0.07640398, 0.57887213, 0.96189563, 0.89252459, out],
    ]
    assert_close(mixed, torch.tensor(expected).double(), rtol=0, atol=1e-6)


def test_scrub():
    """meghdadk/SCRUB at 98ffb11, `DistillKL` of thirdparty/repdistiller: temperature 4, student first."""
    loss = 16 * kl_divergence(REFERENCE[0] / 4, LOGITS[0] / 4).mean()
    assert float(loss) == pytest.approx(1.27918561)


def test_loss_curvature_keeps_the_same_pairs():
    """goodfire-ai/memorization_kfac at 8d059db, `_top_pairs_by_product` of kfac_treatment_pairwise.py: ratio 0.85."""
    curvature = torch.tensor([4.0, 2.0, 1.0, 0.5])[:, None] * torch.tensor([3.0, 1.0, 0.25])
    expected = [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [3, 0]]
    assert kept_pairs(curvature, 0.85).nonzero().tolist() == expected


# --- write -----------------------------------------------------------------------------------------------------------


def test_memory_decoder():
    """LUMIA-Group/MemoryDecoder at 1aad746, `kl_loss_token` of utils/cal_loss.py: alpha 0.3 of the neighbours."""
    rows = [((3, 1), (0.75, 0.25)), ((5,), (1.0,)), ((0, 1, 2), (0.5, 0.3, 0.2)), ((6, 4), (0.1, 0.9))]
    soft = Soft(
        row=torch.tensor([i for i, (tokens, _) in enumerate(rows) for _ in tokens]),
        token=torch.tensor([token for tokens, _ in rows for token in tokens]),
        share=torch.tensor([share for _, shares in rows for share in shares]).double(),
    )
    loss = hybrid_loss(LOGITS[0, :-1], LABELS[0, 1:], soft, beta=0.3).mean()
    assert float(loss) == pytest.approx(2.22606606)


def test_knn_lm():
    """The same repository, `interpolate` of utils/cal_loss.py: a quarter from the neighbours."""
    expected = [-1.12816973, -1.12583014, -1.62979522, -2.33045475, -3.40570748, -4.39334326, -4.32541936]
    assert interpolate(REFERENCE[0, 0], LOGITS[0, 0], 0.25).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("form", [naive_recurrence, chunk_recurrence])
def test_gated_delta_rule(form):
    """fla-org/flash-linear-attention at bc3b101, `naive_recurrent_gated_delta_rule` of fla/ops, scale 1."""
    q, k, v = (wave(1, 5, 2, 3, phase=phase).transpose(1, 2) for phase in (0.0, 0.4, 1.1))
    beta, log_decay = wave(1, 5, 2, phase=0.2).sigmoid(), -0.3 * wave(1, 5, 2, phase=0.6).abs()
    unit = nn.functional.normalize
    given = Inputs(unit(q, dim=-1), unit(k, dim=-1), v, beta.transpose(1, 2), log_decay.transpose(1, 2))
    out, memory = form(given, torch.zeros(1, 2, 3, 3).double())
    last = [[-1.0641216, -0.50587791, 0.29028815], [1.22616041, 1.39108825, 0.90176558]]
    state = [
        [0.62485027, -0.02449716, -0.66232318],
        [0.71936476, 0.38981012, -0.12307838],
        [0.47555086, 0.62078363, 0.4740521],
    ]
    assert_close(out[0, :, -1], torch.tensor(last).double(), rtol=0, atol=1e-6)
    assert_close(memory[0, 0], torch.tensor(state).double(), rtol=0, atol=1e-6)


# --- keep and fit ----------------------------------------------------------------------------------------------------


def test_lines():
    """wang-kee/LiNeS at 43a7bdd, `LiNeS_scaling` of src/eval/eval.py: 12 blocks, alpha 0.3, beta 0.7."""
    expected = [0.3, 0.36363637, 0.42727274, 0.4909091, 0.55454546, 0.61818182]
    expected += [0.68181819, 0.74545455, 0.80909091, 0.87272727, 0.93636364, 1.0]
    assert coefficients(12, 0.3, 0.7).tolist() == pytest.approx(expected, abs=1e-7)


TALL = [
    [-0.02448029, 1.23654771, 1.916008],
    [1.67739952, 0.66716802, -0.65684307],
    [-1.66688383, -1.91101873, -1.25637162],
    [0.00807364, 1.26168108, 1.92190039],
    [1.66975307, 0.65214896, -0.67217088],
]
WIDE = [
    [-0.01401085, 1.23272204, 1.88629699, 1.66477764, 0.66262567],
    [-0.66056818, -1.68604708, -1.91224289, -1.2392571, 0.00595109],
    [1.25119781, 1.92509818, 1.69516778, 0.65624326, -0.6737715],
]


@pytest.mark.parametrize("expected", [TALL, WIDE], ids=["tall", "wide"])
def test_galore(expected):
    """jiaweizzhao/GaLore at 2cc66f8, `AdamW` of galore_torch/adamw.py: rank 2, four steps, a projector for two each."""
    shape = len(expected), len(expected[0])
    weight = nn.Parameter(wave(*shape).float())
    group = {"params": [weight], "rank": 2, "gap": 2, "scale": 0.25}
    optimizer = GaLoreAdamW([group], lr=0.05, weight_decay=0.1)
    for step in range(4):
        weight.grad = wave(*shape, phase=0.9 * step + 0.2).float()
        optimizer.step()
    assert_close(weight.detach(), torch.tensor(expected), rtol=0, atol=1e-5)


# --- audit and statistics --------------------------------------------------------------------------------------------


def test_min_k_and_min_k_plus():
    """locuslab/open-unlearning at d3d7cf9, `compute_score` of evals/metrics/mia/min_k.py, min_k_plus_plus.py: k 0.4."""
    targets = torch.tensor([3, 5, 1, 6, 2])
    log_prob, mean, deviation, correct = (x.numpy() for x in token_scores(LOGITS[0].clone(), targets))
    answer = Answer(log_prob, mean, deviation, correct, end=0)
    assert min_k(answer.log_prob, 0.4) == pytest.approx(3.24280429, rel=1e-6)
    assert min_k_plus(answer, 0.4) == pytest.approx(2.09423834, rel=1e-6)


def test_klom():
    """RoyRin/data-unlearning-bench at eb261f9, `compute_binned_KL_div` and the margins of unlearning_bench/eval.py.

    That code takes the divergence of the oracles from the unlearned models (`compat="bench"`).
    """
    first, second = 3 * wave(40, phase=0.3)[:, None], 2.5 * wave(40, phase=1.1)[:, None] + 1
    assert float(klom(second, first, compat="bench")) == pytest.approx(5.08449202)
    found = margins(LOGITS, torch.tensor([3, 5, 1, 6, 2]))
    expected = [
        [-0.94283543, -0.95019107, -4.32809564, -2.01982049, -0.94638914],
        [-0.563799, -0.40943597, -2.90050758, -3.78879137, -0.53782611],
    ]
    assert np.allclose(found.numpy(), expected, atol=1e-7)


def test_linear_cka():
    """yongwookim1/UUEF at 3e65d87, `linear_CKA` of CKA/CKA.py."""
    assert linear_cka(wave(6, 4), wave(6, 3, phase=0.9).square()) == pytest.approx(0.26540602, rel=1e-6)
