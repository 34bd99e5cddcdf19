"""The same random numbers in every test, and two-step runs of clip, lm and flamingo."""
import pytest
import torch
from PIL import Image

import train
from common.training.lm import Pretraining
from flamingo import Flamingo
from tests.flamingo.toys import SETTINGS, options

EVALUATE = Flamingo.evaluate


@pytest.fixture(autouse=True)
def seed(one_thread):
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def short_evaluation(monkeypatch):
    """Evaluate on 4 records instead of 400."""
    monkeypatch.setattr(Flamingo, "evaluate", lambda self, data: EVALUATE(self, data, count=4))


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with two-step runs of clip (clip-toy), lm (lm-toy) and flamingo (one)."""
    import tests.runs                    # noqa: F401  the toy world
    folder, threads = tmp_path_factory.mktemp("flamingo"), torch.get_num_threads()
    torch.set_num_threads(1)             # as the runs that are compared with these, bit for bit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flamingo, "evaluate", lambda self, data: EVALUATE(self, data, count=4))
        patch.setattr(Pretraining, "evaluate", lambda self, data: {})
        patch.setattr(Pretraining, "samples", lambda self, data: Image.new("RGB", (2, 2)))
        for stage, out in (("clip", "clip-toy"), ("lm", "lm-toy"), ("flamingo", "one")):
            assert train.train(stage, options(runs=str(folder), out=str(folder / out)),
                               SETTINGS[stage]) == 0
    torch.set_num_threads(threads)
    return folder
