"""Batches: who draws what, and that it never depends on workers, processes or micro-batches."""
import os
import random
import signal

import pytest
import torch
from PIL import Image

from common.training import options as cli
from common.data.batches import (STAND_INS, Batches, Drawn, Mixture, EvalData, draw_rng,
                                 open_world, world_tokenizer)
from common.data.collators import ImageTextBatch, PackedTexts
from common.data.files import Files
from common.data.tokenizer import BOS, EOS, PAD, Tokenizer
from common.data.emoji.world import Emoji
from common.data.shapes.world import Shapes


class Numbers:
    """A world whose record is its index and a draw: batches can be read back."""
    name = "numbers"

    def size(self, split):
        return {"train": 52, "test": 5}[split]

    def record(self, split, index, rng=None):
        return {"images": [Image.new("RGB", (4, 4))], "texts": ["a", "b"], "source": index,
                "draw": rng.random() if rng else 0.0}


def together(records, rngs):
    """A collate that keeps what was drawn for whom, here and later by the rng."""
    return {"index": torch.tensor([r["source"] for r in records]),
            "draw": torch.tensor([r["draw"] for r in records]),
            "later": torch.tensor([rng.random() for rng in rngs])}


class Damaged(Numbers):
    def record(self, split, index, rng=None):
        raise ValueError(f"record {index} is damaged")


class Whereabouts(Numbers):
    """Its records say in which process group they were made, and what signals do there."""

    def record(self, split, index, rng=None):
        here = [os.getpgrp(), *map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))]
        return {"source": here, "draw": 0.0}


class Patchy(Files):
    """Files of 53 records, those of `bad` unreadable; nothing is on a disk."""
    name, skip = "patchy", 0.05

    def __init__(self, bad=()):
        self.bad = set(bad)

    def size(self, split):
        return 53

    def order(self, generator):
        return torch.randperm(53, generator=generator)

    def record(self, split, index, rng=None):
        draw = rng.random()
        if index in self.bad:
            raise ValueError(f"record {index} is damaged")
        return {"source": index, "draw": draw}

    def blank(self, split, index):
        return {"source": -1 - index, "draw": 0.0}


@pytest.fixture(scope="module")
def pairs():
    return ImageTextBatch(Tokenizer.train(["a red circle and a blue star"] * 9), 11, 8)


def batches(**more):
    return Batches(Numbers(), together, **{"batch_size": 12, "seed": 3, **more})


def whole(step, **more):
    """Everything that all processes see in a step, in their order: {name: (12,)}."""
    ranks = more.pop("world_size", 1)
    parts = [part for rank in range(ranks)
             for part in batches(rank=rank, world_size=ranks, **more)[step]]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class TestBatches:
    @pytest.mark.parametrize("split", [{"accumulate": 4}, {"world_size": 3},
                                       {"world_size": 2, "accumulate": 3}, {"world_size": 12}])
    def test_processes_and_micro_batches_share_out_the_same_batch(self, split):
        for step in (0, 3, 4, 9):
            assert same(whole(step, **split), whole(step))

    def test_micro_batches_are_equal_parts_of_a_process(self):
        for rank in (0, 1):
            made = batches(world_size=2, rank=rank, accumulate=3)[1]
            assert [len(part["index"]) for part in made] == [2, 2, 2]
            assert torch.equal(torch.cat([p["index"] for p in made]),
                               whole(1)["index"][6 * rank:6 * rank + 6])

    @pytest.mark.parametrize("workers", [1, 2])
    def test_workers_make_the_same_batches(self, workers):
        alone, many = (list(batches(accumulate=2).loader(2, 9, count)) for count in (0, workers))
        assert len(alone) == len(many) == 7
        for one, other in zip(alone, many):
            assert len(one) == 2 and all(same(*pair) for pair in zip(one, other))

    def test_going_on_at_a_step_gives_that_step(self):
        through = list(batches().loader(0, 9, 0))
        for step, late in zip(range(5, 9), batches().loader(5, 9, 0)):
            assert same(through[step][0], late[0])

    def test_an_epoch_uses_a_record_once(self):
        for epoch in range(3):
            steps = [whole(4 * epoch + place)["index"] for place in range(4)]
            seen = torch.cat(steps).tolist()
            assert len(seen) == len(set(seen)) == 48 and set(seen) <= set(range(52))

    def test_epochs_differ_in_order_and_in_draws(self):
        first, second = ({name: torch.cat([whole(step)[name] for step in steps])
                          for name in ("index", "draw")} for steps in (range(4), range(4, 8)))
        assert not torch.equal(first["index"], second["index"])
        assert set(first["index"].tolist()) != set(second["index"].tolist())    # other leftovers
        assert not set(first["draw"].tolist()) & set(second["draw"].tolist())

    def test_a_draw_belongs_to_seed_epoch_and_index(self):
        made = whole(6)                                                  # epoch 1
        for index, draw, later in torch.stack(list(made.values()), dim=1).tolist():
            index = int(index)
            rng = draw_rng(3, 1, index)
            assert draw == pytest.approx(rng.random()) and later == pytest.approx(rng.random())
        keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 11, 1), (11, 1, 1), (1, 1, 11)]
        assert len({draw_rng(*key).random() for key in keys}) == len(keys)

    def test_seeds_differ(self):
        assert not same(whole(0, seed=3), whole(0, seed=4))
        orders = {tuple(whole(0, seed=seed)["index"].tolist()) for seed in (-5, 0, 10 ** 17)}
        assert len(orders) == 3

    def test_drawing_leaves_the_models_random_numbers_alone(self):
        torch.manual_seed(0)
        random.seed(0)
        before, plain = torch.get_rng_state(), random.getstate()
        list(batches().loader(0, 4, 0))
        list(batches().loader(0, 4, 1))
        assert torch.equal(torch.get_rng_state(), before) and random.getstate() == plain

    def test_a_batch_as_large_as_the_data_is_an_epoch(self):
        assert sorted(whole(0, batch_size=52)["index"].tolist()) == list(range(52))

    def test_a_batch_larger_than_the_data_is_refused(self):
        with pytest.raises(ValueError, match=r"batch_size 53 is larger than the data \(52 records"):
            batches(batch_size=53)

    @pytest.mark.parametrize("more", [{"world_size": 5}, {"accumulate": 5},
                                      {"world_size": 3, "accumulate": 8}])
    def test_an_indivisible_batch_is_refused(self, more):
        with pytest.raises(ValueError, match="batch_size 12 does not divide into"):
            batches(**more)

    def test_a_mistake_in_a_worker_is_told_in_one_line(self, capsys):
        with pytest.raises(ValueError) as caught:
            list(Batches(Damaged(), together, batch_size=1).loader(0, 1, 1))
        cli.fail(caught.value)
        index = batches(batch_size=1, seed=0).keys(0)[1][0]
        assert capsys.readouterr().err == f"error: record {index} is damaged\n"

    def test_a_worker_is_out_of_reach_of_ctrl_c_and_can_be_ended(self):
        before = signal.signal(signal.SIGTERM, lambda number, frame: None)     # as a run's handler
        try:
            one, = Batches(Whereabouts(), together, batch_size=1).loader(0, 1, 1)
        finally:
            signal.signal(signal.SIGTERM, before)
        group, interrupt, terminate = one[0]["index"][0].tolist()
        assert group != os.getpgrp()
        assert (interrupt, terminate) == (signal.SIG_IGN, signal.SIG_DFL)


class TestRefusedRecords:
    BAD = (5, 23, 31, 47)

    def batches(self, bad=BAD, **more):
        return Batches(Patchy(bad), together, **{"batch_size": 12, "seed": 3, **more})

    def test_one_is_replaced_by_another_and_said_with_the_batch(self):
        for step in range(8):
            (part,), (whole,) = self.batches()[step], self.batches(())[step]
            asked = whole["index"].tolist()
            hit = [place for place, index in enumerate(asked) if index in self.BAD]
            assert [r for r in part["refused"] if r == f"record {asked[hit[0]]} is damaged"] \
                if hit else part["refused"] == []
            assert not set(part["index"].tolist()) & set(self.BAD) and not part["lost"]
            assert len(part["refused"]) >= len(hit)
            for place in range(12):      # the others are as they were, draws and all
                if place not in hit:
                    assert all(part[k][place] == whole[k][place] for k in ("index", "draw", "later"))
        assert whole["refused"] == []

    def test_stand_ins_differ_and_are_drawn_like_the_rest(self):
        seen, draws = set(), set()
        for step in range(80):
            (part,), asked = self.batches((5,))[step], self.batches((5,)).keys(step)[1]
            if 5 in asked:
                place = asked.index(5)
                seen.add(part["index"][place].item())
                draws.add(part["draw"][place].item())
                assert part["later"][place] not in part["draw"]
        assert len(draws) >= 15 and len(seen) > 8

    def test_each_has_a_stand_in_of_its_own(self):
        bad = range(0, 53, 2)
        steps = [self.batches(bad)[step][0] for step in range(4)]           # one epoch
        draws = torch.cat([part["draw"] for part in steps]).tolist()
        assert len(set(draws)) == len(draws) == 48

    @pytest.mark.parametrize("more", [{"world_size": 3}, {"world_size": 2, "accumulate": 3}])
    def test_processes_and_micro_batches_share_out_the_same_batch(self, more):
        ranks = more.pop("world_size")
        for step in range(8):
            (whole,) = self.batches()[step]
            parts = [part for rank in range(ranks)
                     for part in self.batches(rank=rank, world_size=ranks, **more)[step]]
            for name in ("index", "draw", "later"):
                assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
            assert sum((part.get("refused", []) for part in parts), []) == whole["refused"]

    @pytest.mark.parametrize("workers", [1, 2])
    def test_the_reasons_come_out_of_workers(self, workers):
        alone, many = (list(self.batches().loader(0, 9, count)) for count in (0, workers))
        assert [part["refused"] for (part,) in many] == [part["refused"] for (part,) in alone]
        assert all(same(*({k: v for k, v in part.items() if k in ("index", "draw")}
                          for (part,) in pair)) for pair in zip(alone, many))
        assert sum(len(part["refused"]) for (part,) in many) > 5

    def test_a_search_ends_and_says_so(self):
        (part,) = self.batches(range(53))[0]
        assert part["lost"] and len(part["refused"]) == 12 * (1 + STAND_INS)
        assert (part["index"] < 0).all()

    def test_of_a_world_a_mistake_is_raised(self):
        with pytest.raises(ValueError, match="is damaged"):
            Batches(Damaged(), together, batch_size=1)[0]
        assert "refused" not in batches()[0][0]

    def test_other_mistakes_are_raised(self, monkeypatch):
        def broken(*arguments):
            raise TypeError("a mistake of the code")
        monkeypatch.setattr(Patchy, "record", broken)
        with pytest.raises(TypeError):
            self.batches()[0]


class TestPairs:
    def test_pictures_are_cut_and_one_text_is_chosen_by_the_rng(self, pairs):
        picture = Image.new("RGB", (24, 8), "black")
        picture.paste("white", (8, 0, 16, 8))
        records = [{"images": [picture], "texts": ["a", "red", "blue star"]} for _ in range(30)]
        rngs = [random.Random(i) for i in range(30)]
        made = pairs(records, rngs)
        assert made["images"].shape == (30, 3, 8, 8) and made["images"].min() == 255
        said = [pairs.tokenizer.decode(row) for row in made["ids"].tolist()]
        assert said == [random.Random(i).choice(["a", "red", "blue star"]) for i in range(30)]
        assert set(said) == {"a", "red", "blue star"}

    def test_a_view_batches_whole_splits(self, pairs):
        view = EvalData(Numbers(), pairs.tokenizer, pairs, "cpu")
        assert [r["source"] for r in view.records("test")] == list(range(5))
        assert view.images(view.records("test")).shape == (5, 3, 8, 8)
        assert view.ids(["a", "red circle " * 40]).shape == (2, 11)


class Letters:
    """A vocabulary of letters: a is 97."""

    def encode(self, text):
        return [ord(letter) for letter in text]


def rows(texts, context_length=37, length=11):
    """What `Texts` makes of records with one text each: (ids, labels), lists of lists."""
    made = PackedTexts(Letters(), context_length, length)(
        [{"texts": [text]} for text in texts], [random.Random(0)] * len(texts))
    assert made["ids"].dtype == made["labels"].dtype == torch.int64
    return made["ids"].tolist(), made["labels"].tolist()


class TestTexts:
    def test_texts_share_a_row_while_they_fit(self):
        a, b, c, d = map(ord, "abcd")
        ids, labels = rows(["aaa", "bb", "c", "dddd"])
        assert ids == [[BOS, a, a, a, EOS, BOS, b, b, EOS], [BOS, c, EOS, BOS, d, d, d, d, EOS]]
        assert labels == [[-100 if i == BOS else i for i in row] for row in ids]

    def test_a_row_may_be_full_to_the_last_token(self):
        ids, labels = rows(["aaa", "bbbb", "c"])
        assert [len(row) for row in ids] == [11, 11]
        assert ids[0][-1] == EOS and ids[1] == [BOS, ord("c"), EOS] + [PAD] * 8
        assert labels[1] == [-100, ord("c"), EOS] + [-100] * 8

    def test_no_text_is_lost_and_their_order_stays(self):
        rng = random.Random(3)
        texts = [rng.choice("abcdef") * rng.randint(0, 9) for _ in range(50)]
        ids, _ = rows(texts)
        flat = [i for row in ids for i in row if i not in (BOS, PAD)]
        assert flat == [i for text in texts for i in (*map(ord, text), EOS)]
        assert all(len(row) <= 11 for row in ids)

    def test_a_longer_text_is_cut_before_its_end_token(self):
        assert rows(["a" * 30, "b"])[0] == [[BOS] + [97] * 9 + [EOS],
                                           [BOS, 98, EOS] + [PAD] * 8]

    def test_a_row_is_never_longer_than_the_context(self):
        assert rows(["a" * 30], context_length=5)[0] == [[BOS, 97, 97, 97, EOS]]

    def test_one_text_of_a_record_is_chosen_by_its_rng(self):
        records = [{"texts": ["a", "b", "c"]}] * 30
        made = PackedTexts(Letters(), 200, 200)(records, [random.Random(i) for i in range(30)])
        said = [chr(i) for i in made["ids"].flatten().tolist() if i > 90]
        assert said == [random.Random(i).choice("abc") for i in range(30)]


def made(split, rng):
    return {"source": len(split), "draw": rng.random()}


class TestDrawn:
    def test_it_has_as_many_records_as_the_world_and_its_name(self):
        drawn = Drawn(Numbers(), made)
        assert (drawn.size("train"), drawn.size("test"), drawn.name) == (52, 5, "numbers")

    def test_a_record_is_made_by_the_rng_or_never_changes(self):
        drawn = Drawn(Numbers(), made)
        want = {"source": 5, "draw": random.Random(7).random()}
        assert drawn.record("train", 3, random.Random(7)) == want
        fixed = [drawn.record("test", index)["draw"] for index in (0, 1, 0)]
        assert fixed[0] == fixed[2] != fixed[1]
        assert drawn.record("test", 0)["source"] == 4
        assert drawn.record("train", 0)["draw"] != fixed[0]

    def test_epochs_and_seeds_draw_afresh(self):
        draws = [Batches(Drawn(Numbers(), made), together, batch_size=52, seed=seed)[epoch][0]
                 for seed in (3, 4) for epoch in (0, 1)]
        assert len({d for part in draws for d in part["draw"].tolist()}) == 4 * 52


class TestMixture:
    def mixture(self, **more):
        return Mixture([batches(**more), batches(batch_size=24, **more),
                        Batches(Drawn(Numbers(), made), together, batch_size=6, **more)])

    def test_a_step_has_the_micro_batches_of_every_data_set_one_after_another(self):
        for step in (0, 3, 9):
            whole = self.mixture(accumulate=3)
            want = [batch for part in whole.parts for batch in part[step]]
            found = whole[step]
            assert [len(batch["index"]) for batch in found] == [4] * 3 + [8] * 3 + [2] * 3
            assert all(same(*both) for both in zip(found, want, strict=True))

    def test_a_data_set_draws_as_if_it_were_alone(self):
        assert same(self.mixture()[5][0], batches()[5][0])

    @pytest.mark.parametrize("workers", [1, 2])
    def test_workers_make_the_same_steps(self, workers):
        alone, many = (list(self.mixture(accumulate=2).loader(2, 7, count))
                       for count in (0, workers))
        assert len(alone) == len(many) == 5
        for one, other in zip(alone, many):
            assert all(same(*both) for both in zip(one, other, strict=True))

    def test_processes_share_out_the_same_step(self):
        parts = [self.mixture(rank=rank, world_size=2)[4] for rank in (0, 1)]
        for number, whole in enumerate(self.mixture()[4]):
            assert same(whole, {name: torch.cat([part[number][name] for part in parts])
                                for name in whole})


class TestOpenWorld:
    def test_worlds_by_name_with_their_dials(self):
        world = open_world("shapes:objects=3,noise=1,style=outline", 16)
        assert (world.objects, world.noise, world.style) == (3, 1.0, "outline")
        assert world.image_size == 16 and type(world.noise) is float
        assert isinstance(open_world("shapes", 32), Shapes)
        assert isinstance(open_world("emoji", 32), Emoji)

    @pytest.mark.parametrize("spec, words", [
        ("nothing", "no world 'nothing'; there are shapes, emoji.*, and coco:FILE, flickr:FILE"),
        ("", "no world ''; there are shapes, emoji"),
        ("shapes:sides=3", "shapes has no dial 'sides'; it has objects, noise, clutter, style"),
        ("emoji:objects=3", "emoji has no dial 'objects'; it has none"),
        ("shapes:image_size=64", "no dial 'image_size'"),
        ("shapes:objects=many", "objects takes int, not 'many'"),
        ("shapes:objects", "objects takes int, not ''"),
        ("shapes:objects=2.5", "objects takes int, not '2.5'"),
        ("shapes:noise=loud", "noise takes float, not 'loud'")])
    def test_what_does_not_exist_is_refused_and_what_does_is_named(self, spec, words):
        with pytest.raises(ValueError, match=words) as caught:
            open_world(spec, 32)
        assert "\n" not in str(caught.value) and f"--data {spec}" in str(caught.value)

    def test_the_vocabulary_is_a_function_of_the_world(self):
        assert world_tokenizer(Shapes()).model == world_tokenizer(Shapes()).model
