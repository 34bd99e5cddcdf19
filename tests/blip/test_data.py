"""BLIP's data: which pairs each loss learns from, the texts that CapFilt keeps; trained models."""
from types import SimpleNamespace

import pytest
import torch

import blip
from blip import BLIPConfig, capfilt_texts, data_sources, open_trained
from tests.helpers import Words, drawing, refused, toy_blip


def world(web=0, human=9, has_web=True, tasks=()):
    return SimpleNamespace(name="stub", has_web=has_web, tasks=tasks,
                           size={"web": web, "human": human}.get)


class TestDataSources:
    @pytest.mark.parametrize("changes, has_web, split", [
        ({}, True, "web+human"), ({"human_only": True}, True, "human"), ({}, False, "train"),
        ({"losses": "itc,itm"}, True, "human"), ({"losses": "itc,itm"}, False, "train"),
        ({"losses": "lm"}, True, "human"), ({"losses": "lm"}, False, "train")], ids=str)
    def test_all_losses_learn_from_all_pairs_captioner_and_filter_from_human_ones(
            self, changes, has_web, split):
        given = world(has_web=has_web)
        source, = data_sources(given, Words(), BLIPConfig(**changes))
        assert (source.world, source.split, source.kinds) == (given, split, None), f"{source}"

    @pytest.mark.parametrize("losses, prompt", [("itc,itm,lm", ""), ("itc,itm", ""), ("lm", "a ")])
    def test_only_a_captioners_texts_have_a_prompt(self, losses, prompt):
        source, = data_sources(world(), Words(), BLIPConfig(losses=losses, prompt="a "))
        assert source.collate.prompt == prompt, f"prompt {source.collate.prompt!r}"

    @pytest.mark.parametrize("losses, kind, batch", [
        ("vqa", "question", "QuestionBatch"), ("two-images", "two_pictures", "PairBatch"),
        ("dialogue", "dialogue", "DialogueBatch")])
    def test_a_task_learns_from_its_records_and_is_refused_in_a_world_without_them(
            self, losses, kind, batch):
        config = BLIPConfig(losses=losses, context_length=11)
        source, = data_sources(world(tasks=("shots", kind)), Words(), config)
        assert source.kinds == {kind: 1} and type(source.collate).__name__ == batch, f"{source}"
        assert (source.collate.context_length, source.collate.image_size) == (11, 32), "sizes"
        with refused(f"{losses}.*stub.*{kind}"):
            data_sources(world(tasks=("shots",)), Words(), config)

    def test_a_captioner_without_human_pairs_is_refused(self):
        data_sources(world(web=9, human=0), Words(), BLIPConfig())
        with refused("stub.*human"):
            data_sources(world(web=9, human=0), Words(), BLIPConfig(losses="lm"))


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

    def test_a_chunks_own_texts_come_before_its_written_ones(self):
        rows, _ = self.rows(3)
        assert [(i, is_new) for i, _, is_new, _ in rows[:9]] == [
            (0, False), (0, False), (1, False), (1, False), (2, False), (2, False),
            (0, True), (1, True), (2, True)]

    def test_it_writes_by_nucleus_sampling_unless_told_how(self):
        assert self.rows(512)[1].given == [{"temperature": 1.0, "top_p": 0.9}], "by default"
        assert self.rows(512, top_p=0.5)[1].given == [{"temperature": 1.0, "top_p": 0.5}], "told"


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
