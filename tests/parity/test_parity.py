"""Live comparison with transformers, over several seeds (pip install -r tests/requirements.txt)."""
import pytest

from tests.parity.cases import CASES, compare

pytest.importorskip("transformers", reason="needs transformers: pip install -r tests/requirements.txt")


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours_equals_transformers_with_the_same_weights(case, seed):
    weights, inputs, outputs = case.reference(seed)
    compare(case.ours(weights, inputs), outputs)
