"""Ours against outputs of transformers 5.23.0 that are kept in tests/goldens."""
from pathlib import Path

import numpy as np
import pytest

from tests.parity.cases import CASES, compare

GOLDENS = Path(__file__).parent / "goldens"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours_equals_the_golden_outputs(case):
    with np.load(GOLDENS / f"{case.name}.npz") as file:
        weights, inputs, outputs = ({name[2:]: file[name] for name in file if name.startswith(head)}
                                    for head in ("w.", "i.", "o."))
    compare(case.ours(weights, inputs), outputs)
