"""Settings of every test, and what several modules ask for."""
import common                            # noqa: F401  before torch: it sets how threads wait

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Several threads on tiny tensors wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
