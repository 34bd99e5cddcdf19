"""Two-step runs of clip, lm and flamingo."""
import pytest
import torch
from PIL import Image

import train
from common.training.lm import Pretraining
from flamingo import Flamingo
from tests.training.runs import SETTINGS, toy_options

EVALUATE = Flamingo.evaluate


@pytest.fixture(autouse=True)
def short_evaluation(monkeypatch):
    """Evaluate on 4 records instead of 400."""
    monkeypatch.setattr(Flamingo, "evaluate", lambda self, data: EVALUATE(self, data, count=4))


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with two-step runs of clip (clip-toy), lm (lm-toy) and flamingo (one)."""
    folder, threads = tmp_path_factory.mktemp("flamingo"), torch.get_num_threads()
    torch.set_num_threads(1)             # as the runs that are compared with these, bit for bit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flamingo, "evaluate", lambda self, data: EVALUATE(self, data, count=4))
        patch.setattr(Pretraining, "evaluate", lambda self, data: {})
        patch.setattr(Pretraining, "samples", lambda self, data: Image.new("RGB", (2, 2)))
        for stage, out in (("clip", "clip-toy"), ("lm", "lm-toy"), ("flamingo", "one")):
            assert train.train(stage, toy_options(runs=str(folder), out=str(folder / out)),
                               SETTINGS[stage]) == 0
    torch.set_num_threads(threads)
    return folder
