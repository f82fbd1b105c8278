from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from memorised import data, quiet, reciting
from palimpsest.data.records import Roles
from palimpsest.errors import PalimpsestError
from palimpsest.run import Run
from palimpsest.system import Method, system


@system("noting", verb="erase", title="Noting", paper="", takes="causal-lm", needs={"forget"}, fidelity="adapted")
class Noting(Method):
    """Changes nothing and says so."""

    def apply(self, model, data: Roles, run: Run):
        run.note(curve=torch.tensor([0.5, 0.25]), map=np.eye(2), share=0.25, layers={0: (1, 2)})
        run.warn("nothing was changed")
        return model.copy()


def test_what_a_method_notes_is_in_its_ledger_entry_as_plain_json():
    notes = Noting().apply(reciting(), data(), quiet()).ledger.entries[-1].notes
    expected = {"curve": [0.5, 0.25], "map": [[1, 0], [0, 1]], "share": 0.25, "layers": {"0": [1, 2]}}
    assert json.loads(json.dumps(notes)) == {**expected, "warnings": ["nothing was changed"]}


def test_notes_of_one_method_are_not_those_of_the_next():
    run = quiet()
    first = Noting().apply(reciting(), data(), run)
    second = Noting().apply(first, data(), run)
    assert [entry.notes["warnings"] for entry in second.ledger.entries[-2:]] == [["nothing was changed"]] * 2
    assert not run.notes


def test_what_cannot_be_computed_with_is_refused():
    with pytest.raises(PalimpsestError, match="precision is 'fp16'"):
        Run(precision="fp16")
    with pytest.raises(PalimpsestError, match="the device 'gpu' cannot be used here"):
        Run(device="gpu").torch_device()


def test_a_negative_seed_is_refused():
    with pytest.raises(PalimpsestError, match="seed is -1, expected 0 or more"):
        Run(seed=-1)
