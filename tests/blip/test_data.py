"""BLIP's own data: the texts that CapFilt keeps; and the losses that a command needs."""
from types import SimpleNamespace

import pytest
import torch

import blip
from blip import capfilt_texts, open_trained
from tests.helpers import drawing, refused, toy_blip


class Captioner:
    """Writes what it was asked for: the image and its seed; nothing for image 3."""

    def __init__(self):
        self.model = SimpleNamespace(vision=SimpleNamespace(pos_embed=torch.zeros(2)))
        self.given = []

    def generate(self, records, generator, **given):
        self.given.append(given)
        return ["" if r["source"] == 3 else f"written {r['source']} {g.initial_seed()}"
                for r, g in zip(records, generator, strict=True)]


class Web:
    """Image i has the texts "i a" and "i b"."""
    size = {"web": 7, "human": 4}.get

    def record(self, split, index):
        assert split == "web", f"a record of {split}"
        return {"images": drawing("red"), "texts": [f"{index} a", f"{index} b"], "source": index}


class TestCapfiltTexts:
    def rows(self, chunk, **how):
        captioner, judged = Captioner(), []

        def keep(records):
            judged.extend(text for record in records for text in record["texts"])
            return torch.tensor([record["texts"][0][-1:] in ("a", "1") for record in records])
        rows = list(capfilt_texts(captioner, keep, Web(), chunk, **how))
        assert judged == [record["texts"][0] for _, record, *_ in rows], "each text is judged once"
        return rows, captioner

    @pytest.mark.parametrize("chunk", [512, 7, 3, 1])
    def test_each_web_image_has_its_texts_and_a_written_one_in_every_chunking(self, chunk):
        rows, _ = self.rows(chunk)
        found = sorted((i, is_new, r["texts"], kept) for i, r, is_new, kept in rows)
        own = [(i, False, [f"{i} {letter}"], letter == "a") for i in range(7) for letter in "ab"]
        new = [(i, True, [f"written {i} {i}"], i == 1) for i in range(7) if i != 3]
        assert found == sorted(own + new), f"{found}"
        assert all(record["source"] == i and record["images"] for i, record, *_ in rows), "records"

    def test_it_writes_by_nucleus_sampling_unless_told_how(self):
        usual = {"temperature": 1.0, "top_p": 0.9, "batch_size": 512}      # one batch, one generator
        assert self.rows(512)[1].given == [usual], "by default"                     # for each row
        assert self.rows(512, top_p=0.5)[1].given == [usual | {"top_p": 0.5}], "told"


class TestOpenTrained:
    @pytest.mark.parametrize("losses, wanted, is_right", [
        ("itc,itm,lm", ("lm",), True), ("lm", ("lm",), True), ("itc,itm", ("lm", "itm"), True),
        ("itc,itm", ("lm",), False), ("lm", ("vqa",), False), ("vqa", ("lm", "itm"), False)])
    def test_a_model_without_the_losses_that_a_command_needs_is_refused(
            self, losses, wanted, is_right, monkeypatch):
        model = toy_blip(losses=losses)
        monkeypatch.setattr(blip, "from_pretrained", lambda path: (model, path))
        if is_right:
            assert open_trained("runs/x", wanted) == (model, "runs/x")
        else:
            with refused(f"runs/x.*{losses}.*" + ".*".join(wanted)):
                open_trained("runs/x", wanted)
