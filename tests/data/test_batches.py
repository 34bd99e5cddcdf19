"""Batches: who draws what, and that it never depends on workers, processes or micro-batches."""
import os
import random
import signal

import pytest
import torch
from PIL import Image

from common.data.batches import (REPLACEMENTS, Batches, DataSource, EvalData, draw_rng,
                                 open_world, world_tokenizer)
from common.data.collators import ImageTextBatch
from common.data.emoji.world import Emoji
from common.data.files import Files
from common.data.shapes.world import Shapes
from common.data.tokenizer import Tokenizer
from common.training import options


class Numbers:
    """A world whose record is its index and a draw: batches can be read back."""
    name = "numbers"

    def size(self, split):
        return {"train": 52, "test": 5}[split]

    def record(self, split, index, rng=None):
        return {"images": [Image.new("RGB", (4, 4))], "texts": ["a", "b"], "source": index,
                "draw": rng.random() if rng else 0.0}

    def task(self, kind, rng):
        return {"source": -2, "draw": rng.random()}

    def text(self, rng):
        return {"source": -1, "draw": rng.random()}


def together(records, rngs):
    """A collate that keeps what was drawn for whom, here and later by the rng."""
    return {"index": torch.tensor([r["source"] for r in records]),
            "draw": torch.tensor([r["draw"] for r in records]),
            "later": torch.tensor([rng.random() for rng in rngs])}


class Damaged(Numbers):
    def record(self, split, index, rng=None):
        raise ValueError(f"record {index} is damaged")

    def blank(self, split, index):
        return {"source": index, "draw": 0.0}


class Whereabouts(Numbers):
    """Its records say in which process group they were made, and what signals do there."""

    def record(self, split, index, rng=None):
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return {"draw": 0.0, "source": [os.getpgrp(), *(
            handler if isinstance(handler, int) else -1 for handler in handlers)]}


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


def batches(world=None, collate=together, **more):
    source = DataSource(world or Numbers(), collate)
    return Batches([source], **{"batch_size": 12, "seed": 3, **more})


def joined(parts):
    """The micro-batches of one data set, whoever made them, as one."""
    return {name: torch.cat([part[name] for part in parts]) if isinstance(value, torch.Tensor)
            else sum([part[name] for part in parts], []) if isinstance(value, list) else value
            for name, value in parts[0].items()}


def whole(step, world=None, world_size=1, **more):
    """What all processes see in a step, in their order: {name: (12,)}."""
    return joined([part for rank in range(world_size) for part in batches(
        world, rank=rank, world_size=world_size, **more)[step]])


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items())


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

    def test_a_resumed_run_gets_the_same_steps(self):
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
        for index, draw, later in zip(*(made[k].tolist() for k in ("index", "draw", "later"))):
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
        with pytest.raises(ValueError, match=r"53 is larger than the data \(52 records in numbers"):
            batches(batch_size=53)

    @pytest.mark.parametrize("more", [{"world_size": 5}, {"accumulate": 5},
                                      {"world_size": 3, "accumulate": 8}])
    def test_an_indivisible_batch_is_refused(self, more):
        with pytest.raises(ValueError, match="batch_size 12 does not divide into"):
            batches(**more)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_mistake_in_a_world_is_raised_and_told_in_one_line(self, workers, capsys):
        index = batches(seed=0, batch_size=1).keys(0, 0)[1][0]
        with pytest.raises(SystemExit):
            options.run_main(lambda: list(
                batches(Damaged(), seed=0, batch_size=1).loader(0, 1, workers)))
        assert capsys.readouterr().err == f"error: record {index} is damaged\n"

    def test_a_worker_is_out_of_reach_of_ctrl_c_and_can_be_ended(self):
        before = signal.signal(signal.SIGTERM, lambda number, frame: None)     # as a run's handler
        try:
            one, = batches(Whereabouts(), batch_size=1).loader(0, 1, 1)
        finally:
            signal.signal(signal.SIGTERM, before)
        group, interrupt, terminate = one[0]["index"][0].tolist()
        assert group != os.getpgrp()
        assert (interrupt, terminate) == (signal.SIG_IGN, signal.SIG_DFL)


class TestRefusedRecords:
    BAD = (5, 23, 31, 47)

    def test_one_is_replaced_by_another_and_its_reason_is_with_the_batch(self):
        for step in range(8):
            (part,), (clean,) = batches(Patchy(self.BAD))[step], batches(Patchy())[step]
            wanted = clean["index"].tolist()
            hit = [place for place, index in enumerate(wanted) if index in self.BAD]
            reasons = {f"record {wanted[place]} is damaged" for place in hit}
            assert reasons <= set(part["refused"])         # a replacement may be refused, too
            assert len(part["refused"]) >= len(hit) and (hit or part["refused"] == [])
            assert not set(part["index"].tolist()) & set(self.BAD) and part["index"].min() >= 0
            for place in range(12):      # the others are as they were, draws and all
                if place not in hit:
                    assert all(part[k][place] == clean[k][place]
                               for k in ("index", "draw", "later"))
        assert clean["refused"] == []

    def test_replacements_differ_and_are_drawn_like_the_rest(self):
        found, draws = set(), set()
        for step in range(80):
            (part,), wanted = batches(Patchy((5,)))[step], batches(Patchy((5,))).keys(0, step)[1]
            if 5 in wanted:
                place = wanted.index(5)
                found.add(part["index"][place].item())
                draws.add(part["draw"][place].item())
                assert part["later"][place] not in part["draw"]
        assert len(draws) >= 15 and len(found) > 8

    def test_each_has_a_replacement_of_its_own(self):
        steps = [batches(Patchy(range(0, 53, 2)))[step][0] for step in range(4)]     # one epoch
        draws = torch.cat([part["draw"] for part in steps]).tolist()
        assert len(set(draws)) == len(draws) == 48

    @pytest.mark.parametrize("split", [{"world_size": 3}, {"world_size": 2, "accumulate": 3}])
    def test_processes_and_micro_batches_share_out_the_same_batch(self, split):
        for step in range(8):
            assert same(whole(step, Patchy(self.BAD), **split), whole(step, Patchy(self.BAD)))

    @pytest.mark.parametrize("workers", [1, 2])
    def test_the_reasons_come_out_of_workers(self, workers):
        alone, many = (list(batches(Patchy(self.BAD)).loader(0, 9, count))
                       for count in (0, workers))
        assert all(same(a, b) for (a,), (b,) in zip(alone, many, strict=True))
        assert sum(len(part["refused"]) for (part,) in many) > 5

    def test_after_so_many_tries_the_record_is_blank(self):
        (part,) = batches(Patchy(range(53)))[0]
        assert len(part["refused"]) == 12 * (1 + REPLACEMENTS)
        assert part["index"].tolist() == [-1 - index for index in batches(Patchy()).keys(0, 0)[1]]

    def test_other_mistakes_are_raised(self, monkeypatch):
        def broken(*arguments):
            raise TypeError("a mistake of the code")
        monkeypatch.setattr(Patchy, "record", broken)
        with pytest.raises(TypeError):
            batches(Patchy())[0]


class TestDataSource:
    """Several data sets, of captions and of tasks."""

    def sources(self):
        numbers = Numbers()
        return [DataSource(numbers, together), DataSource(numbers, together, 2, 0.5),
                DataSource(numbers, together, 3, 2.5, {"square": 1, "text": 3})]

    def batches(self, **more):
        return Batches(self.sources(), **{"batch_size": 36, "seed": 3, **more})

    def test_a_step_has_the_micro_batches_of_every_data_set_by_their_shares(self):
        for step in (0, 3, 9):
            parts = self.batches(accumulate=3)[step]
            assert [len(part["index"]) for part in parts] == [2] * 3 + [4] * 3 + [6] * 3
            assert [(part["source"], part["weight"]) for part in parts] == (
                [(0, 1.0)] * 3 + [(1, 0.5)] * 3 + [(2, 2.5)] * 3)

    def test_a_data_set_draws_as_if_it_were_alone(self):
        for number, source in enumerate(self.sources()):
            alone, = Batches([source], batch_size=6 * source.share, seed=3)[5]
            assert same(self.batches()[5][number], alone | {"source": number})

    def test_records_are_drawn_from_tasks_as_often_as_kinds_says(self):
        source, found = self.sources()[2], []
        for i in range(400):
            rng = random.Random(i)
            kind = random.Random(i).choices(["square", "text"], [1, 3])[0]
            found.append(source.record(5, rng)["source"])
            assert found[-1] == {"square": -2, "text": -1}[kind]
        assert found.count(-1) == pytest.approx(300, abs=40)

    def test_tasks_are_drawn_afresh_in_each_epoch_and_with_each_seed(self):
        source = DataSource(Numbers(), together, kinds={"square": 1})
        draws = [Batches([source], batch_size=52, seed=seed)[epoch][0]["draw"].tolist()
                 for seed in (3, 4) for epoch in (0, 1)]
        assert len(set(sum(draws, []))) == 4 * 52

    @pytest.mark.parametrize("workers", [1, 2])
    def test_workers_make_the_same_steps(self, workers):
        alone, many = (list(self.batches(accumulate=2).loader(2, 7, count))
                       for count in (0, workers))
        assert len(alone) == len(many) == 5
        for one, other in zip(alone, many):
            assert all(same(*both) for both in zip(one, other, strict=True))

    def test_processes_share_out_the_same_step(self):
        parts = [self.batches(rank=rank, world_size=2)[4] for rank in (0, 1)]
        for number, whole in enumerate(self.batches()[4]):
            assert same(whole, joined([own[number] for own in parts]))


class TestEvalData:
    def test_it_has_whole_splits_in_the_models_tensors(self):
        tokenizer = Tokenizer.train(["a red circle and a blue star"] * 9)
        data = EvalData(Numbers(), tokenizer, ImageTextBatch(tokenizer, 11, 8), "cpu")
        assert [r["source"] for r in data.records("test")] == list(range(5))
        assert data.images(data.records("test")).shape == (5, 3, 8, 8)
        assert data.ids(["a", "red circle " * 40]).shape == (2, 11)


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
