"""Settings of every test: one thread, and the same random numbers."""
import common                            # noqa: F401  before torch: it sets how threads wait

import pytest
import torch

torch.set_num_threads(1)                 # on tiny tensors several threads mostly wait


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
