"""Batches: who draws what, and that it never depends on workers, processes or micro-batches."""
import os
import random
import re
import signal

import pytest
import torch
from PIL import Image

from common.data.batches import (REPLACEMENTS, WORLDS, Batches, DataSource,
                                 modality_length_order, open_world, world_tokenizer)
from common.data.files import Files
from common.data.shapes.world import Shapes
from common.training import options
from tests.fuzz import one_line
from tests.helpers import assert_close, listed

BAD = (5, 23, 31, 47)
DRAWN = ("index", "draw", "later")


class Numbers:
    """A world whose record is its index and a draw: batches can be read back."""
    name = "numbers"

    def __init__(self, bad=(), count=52):
        self.bad, self.count = set(bad), count

    def size(self, split):
        return self.count

    def record(self, split, index, rng=None):
        draw = rng.random() if rng else 0.0
        if index in self.bad:
            raise ValueError(f"record {index} is damaged")
        return {"images": [Image.new("RGB", (4, 4))], "source": index, "draw": draw}

    def task(self, kind, rng):
        return {"source": {"square": -2, "line": -3}[kind], "draw": rng.random()}

    def text(self, rng):
        return {"source": -1, "draw": rng.random()}


class Own(Numbers, Files):
    """Files of the user's own; nothing is on a disk."""

    def order(self, generator):
        return 51 - torch.randperm(52, generator=generator)

    def blank(self, split, index):
        return {"source": -1 - index, "draw": 0.0}


class Splits(Own):
    """Three splits; a record is the number of its split, FIRST, plus its index."""
    FIRST = {"train": 0, "web": 100, "human": 200}

    def size(self, split):
        return {"train": 52, "web": 23, "human": 7}[split]

    def record(self, split, index, rng=None):
        return super().record(split, index, rng) | {"source": self.FIRST[split] + index}

    def blank(self, split, index):
        return super().blank(split, self.FIRST[split] + index)


def together(records, rngs):
    """A collate that keeps what was drawn for whom, here and later by the rng."""
    return {"index": torch.tensor([r["source"] for r in records]),
            "draw": torch.tensor([r["draw"] for r in records]),
            "later": torch.tensor([rng.random() for rng in rngs])}


def batches(world=None, **more):
    more = {"batch_size": 12, "seed": 3} | more
    return Batches([DataSource(world or Numbers(), together)], **more)


def several(**more):
    sources = [DataSource(Own(BAD), together), DataSource(Numbers((), 41), together, 2, 0.5),
               DataSource(Numbers(), together, 3, 2.5, {"square": 1, "text": 3})]
    return Batches(sources, **{"batch_size": 36, "seed": 3, **more})


def whole(step, world=None, world_size=1, **more):
    """What all processes see in a step of one data set, in their order."""
    parts = [part for rank in range(world_size)
             for part in batches(world, rank=rank, world_size=world_size, **more)[step]]
    return {"refused": sum((part["refused"] for part in parts), [])} | {
        name: torch.cat([part[name] for part in parts]) for name in DRAWN}


def compare(name, one, other):
    """Two micro-batches."""
    for key in DRAWN:
        assert_close(f"{key} {name}", one[key], other[key], tolerance=0)
    for key in one.keys() - DRAWN:
        assert one[key] == other[key], f"{key} {name}"


def ordered(lengths, size, seed=0):
    """The order of `modality_length_order` for a seed, in batches."""
    order = modality_length_order(lengths, size, torch.Generator().manual_seed(seed))
    assert sorted(order.tolist()) == list(range(len(lengths))), "no permutation"
    return [batch.tolist() for batch in order.split(size)]


class TestModalityLengthOrder:
    LENGTHS = [(1 + 37 * k % 101) * (-1 if k % 3 == 0 else 1) for k in range(400)]

    def kinds(self, batches):
        """For each batch: "image", "text" or "mixed"."""
        found = [{self.LENGTHS[place] > 0 for place in batch} for batch in batches]
        return ["mixed" if len(kind) > 1 else "image" if kind == {True} else "text"
                for kind in found]

    def test_a_batch_is_of_one_modality_but_for_the_rest_at_the_end(self):
        for seed in range(5):
            kinds = self.kinds(ordered(self.LENGTHS, 7, seed))         # of 266 and 134 records
            assert kinds[:57].count("image") == 38 and kinds[:57].count("text") == 19
            assert kinds[57:] == ["text"]
            kinds = self.kinds(ordered(self.LENGTHS, 30, seed))        # 26 and 14 are left: 40
            assert kinds[:12].count("image") == 8 and kinds[:12].count("text") == 4
            assert kinds[12:] == ["mixed", "mixed"], "both kinds are shuffled in the rest"
            assert len(kinds) == 14

    def test_batches_of_both_kinds_stand_in_any_order(self):
        orders = {tuple(self.kinds(ordered(self.LENGTHS, 7, seed))[:57]) for seed in range(5)}
        changes = [sum(a != b for a, b in zip(order, order[1:])) for order in orders]
        assert len(orders) == 5 and min(changes) > 10

    def test_a_batch_has_records_of_similar_lengths_in_a_part_of_the_group(self):
        spread = 0
        for batch in ordered(self.LENGTHS, 4):
            lengths = [abs(self.LENGTHS[place]) for place in batch]
            assert lengths == sorted(lengths, reverse=True)
            spread += lengths[0] - lengths[-1]
        # Of 4 of 1 .. 101 drawn at random it is 60; of a group that is sorted as a whole 2.
        assert 5 < spread / 100 < 25

    def test_each_seed_groups_other_records_and_leaves_out_others(self):
        orders = [ordered(self.LENGTHS, 30, seed) for seed in range(4)]
        groups = [{frozenset(batch) for batch in order[:-2]} for order in orders]
        assert not set.intersection(*groups) and len(set.union(*groups)) > 40
        assert len({frozenset(sum(order[-2:], [])) for order in orders}) == 4
        assert orders[0] == ordered(self.LENGTHS, 30, 0)

    @pytest.mark.parametrize("lengths", [[5, 3, 4, 9, 1], [-2, -3, -1, -4, -4], [3, -1], [2]])
    def test_one_kind_alone_and_less_than_a_batch(self, lengths):
        assert {len(ordered(lengths, 2, seed)) for seed in range(3)} == {(len(lengths) + 1) // 2}
        with one_line("record 2 .* 0"):
            ordered([3, -1, 0, 4], 2)


class TestBatches:
    @pytest.mark.parametrize("world_size, accumulate", [(1, 4), (3, 1), (12, 1), (2, 3)])
    @pytest.mark.parametrize("kind", [Numbers, Own])
    def test_processes_and_micro_batches_share_out_the_same_batch(
            self, kind, world_size, accumulate):
        world = kind(BAD if kind is Own else ())
        split = {"world_size": world_size, "accumulate": accumulate}
        for step in (0, 3, 4, 9):
            compare(f"of step {step}", whole(step, world, **split), whole(step, world))
        sizes = [len(part["index"]) for part in batches(world, **split)[1]]
        assert sizes == [12 // world_size // accumulate] * accumulate

    @pytest.mark.parametrize("workers", [0, 1, 2])
    def test_workers_and_a_later_start_change_nothing(self, workers):
        made = list(several(accumulate=2).loader(2, 7, workers))
        assert len(made) == 5
        for step, parts in zip(range(2, 7), made):
            for part, want in zip(parts, several(accumulate=2)[step], strict=True):
                compare(f"of step {step}", part, want)

    @pytest.mark.parametrize("world", [Numbers, Own])
    def test_an_epoch_uses_a_record_once_and_the_next_is_in_another_order(self, world):
        made = [part for part, in batches(world()).loader(0, 12, 0)]
        epochs = [torch.cat([part["index"] for part in made[k:k + 4]]).tolist() for k in (0, 4, 8)]
        assert [len(set(epoch) & set(range(52))) for epoch in epochs] == [48] * 3
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0], "the order repeats"
        assert len(set(map(frozenset, epochs))) > 1, "each epoch leaves out the same records"
        draws = torch.cat([part["draw"] for part in made]).tolist()
        assert len(set(draws)) == 3 * 48, "draws repeat in the next epoch"

    def test_a_world_with_an_order_of_its_own_is_read_in_it(self):
        assert_close("index of step 5 (B,)", whole(5, Own())["index"], 51 - whole(5)["index"])

    def test_a_step_of_conversations_is_of_one_modality_for_all_processes(self):
        world = Own()
        world.lengths = [1 + k % 7 if k < 29 else -1 - k % 5 for k in range(52)]
        steps = [whole(step, world, processes, batch_size=6)["index"].tolist()
                 for processes in (1, 2) for step in range(16)]
        assert [len({index < 29 for index in step}) for step in steps] == ([1] * 7 + [2]) * 4
        source = DataSource(world, together, split="human")           # lengths are those of train
        plain = Batches([source], batch_size=6, seed=3)
        assert_close("order (N,)", plain.order(0, 0), batches(batch_size=6).order(0, 0))

    def test_each_seed_has_its_order_and_draws(self):
        steps = [whole(step, seed=seed) for seed in (-5, 0, 3, 4, 10 ** 17) for step in (0, 4)]
        assert len({tuple(step["index"].tolist()) for step in steps}) == 10, "orders repeat"
        assert len(set(torch.cat([step["draw"] for step in steps]).tolist())) == 120

    def test_drawing_leaves_the_models_random_numbers_alone(self):
        random.seed(0)
        before, plain = torch.get_rng_state(), random.getstate()
        for workers in (0, 1):
            list(batches().loader(0, 4, workers))
        assert_close("the state of torch's generator", torch.get_rng_state(), before)
        assert random.getstate() == plain

    @pytest.mark.parametrize("more, numbers", [
        ({"batch_size": 53}, "53 .*52 .*numbers"), ({"world_size": 5}, "12 .* 5 "),
        ({"accumulate": 5}, "12 .* 5 "), ({"world_size": 3, "accumulate": 8}, "12 .* 3 .* 8 ")])
    def test_an_impossible_batch_size_is_refused(self, more, numbers):
        with one_line(numbers):
            batches(**more)
        assert sorted(whole(0, batch_size=52)["index"].tolist()) == list(range(52))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_mistake_in_a_world_is_raised_and_told_in_one_line(self, workers, capsys):
        with pytest.raises(SystemExit):
            options.run_main(lambda: list(batches(Numbers(range(52))).loader(0, 1, workers)))
        assert re.fullmatch(r"error: record \d+ is damaged\n", capsys.readouterr().err)

    def test_a_record_of_the_users_is_replaced_and_the_reason_is_with_the_batch(self):
        for step in range(8):
            (part,), (clean,) = batches(Own(BAD))[step], batches(Own())[step]
            wanted = clean["index"].tolist()
            hit = [place for place, index in enumerate(wanted) if index in BAD]
            assert {f"record {wanted[place]} is damaged" for place in hit} <= set(part["refused"])
            assert (hit or part["refused"] == []) and clean["refused"] == []
            assert not set(part["index"].tolist()) & set(BAD) and part["index"].min() >= 0
            rest = [place for place in range(12) if place not in hit]
            for key in DRAWN:
                assert_close(f"{key} of the others", part[key][rest], clean[key][rest])

    def test_replacements_are_drawn_by_epoch_and_index_and_draw_like_the_rest(self):
        parts, clean = ([part for part, in batches(Own(bad)).loader(0, 12, 0)]
                        for bad in (range(0, 52, 2), ()))
        wanted, found = (torch.cat([part["index"] for part in made]) for made in (clean, parts))
        pairs = set(zip(wanted.tolist(), found.tolist())) - {(k, k) for k in range(52)}
        assert len(pairs) > 60, "a record has the same replacement in each of three epochs"
        draws = torch.cat([part[key] for part in parts for key in ("draw", "later")])
        assert len(set(draws.tolist())) == 2 * 3 * 48, "a replacement repeats the draws of another"

    def test_after_so_many_tries_the_record_is_blank(self):
        (part,), (clean,) = batches(Own(range(52)))[0], batches(Own())[0]
        assert len(part["refused"]) == 12 * (1 + REPLACEMENTS)
        assert_close("index (B,)", part["index"], -1 - clean["index"])


class TestStartWorker:
    def test_a_worker_has_one_thread_is_out_of_reach_of_ctrl_c_and_can_be_ended(self):
        before = {number: signal.signal(number, lambda number, frame: None)    # as a run's handler
                  for number in (signal.SIGINT, signal.SIGTERM)}
        torch.set_num_threads(2)
        world = Numbers()
        world.record = lambda split, index, rng: {"draw": 0.0, "source": [
            os.getpgrp(), torch.get_num_threads(), *[int(signal.getsignal(n)) for n in before]]}
        try:
            (one,), = batches(world, batch_size=1).loader(0, 1, 1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            torch.set_num_threads(1)
        group, *rest = one["index"][0].tolist()
        assert group != os.getpgrp() and rest == [1, signal.SIG_IGN, signal.SIG_DFL]


class TestDataSource:
    def test_a_step_has_the_micro_batches_of_every_data_set_by_their_shares(self):
        for step in (0, 3, 9):
            parts = several(accumulate=3)[step]
            assert [(len(part["index"]), part["source"], part["weight"]) for part in parts] == (
                [(2, 0, 1.0)] * 3 + [(4, 1, 0.5)] * 3 + [(6, 2, 2.5)] * 3)

    def test_a_data_set_draws_as_if_it_were_alone_and_in_parts_for_each_process(self):
        for number, source in enumerate(several().sources):
            alone, = Batches([source], batch_size=6 * source.share, seed=3)[2]
            halves = [several(rank=rank, world_size=2)[2][number] for rank in (0, 1)]
            compare(f"of set {number}", several()[2][number], alone | {"source": number})
            for key in DRAWN:
                both = torch.cat([half[key] for half in halves])
                assert_close(f"{key} of two processes", both, alone[key])

    def test_each_split_has_its_own_epochs_order_and_replacements(self):
        sources = [DataSource(Splits((5,)), together, split=split) for split in Splits.FIRST]
        steps = list(Batches(sources, batch_size=15, seed=3).loader(0, 24, 0))
        orders = []
        for number, (split, first) in enumerate(Splits.FIRST.items()):
            drawn = torch.stack([step[number]["index"] for step in steps])
            size, refused = sources[0].world.size(split), [s[number]["refused"] for s in steps]
            clean = set(range(first, first + size)) - {first + 5}
            assert set(drawn.flatten().tolist()) == clean and sum(refused, []), split
            epochs = range(0, 24, size // 5)
            for k in epochs:
                own = drawn[k:k + size // 5]
                assert len(own.unique()) == own.numel() or any(refused[k:k + size // 5])
            assert len({tuple(drawn[k].tolist()) for k in epochs}) == len(epochs), "order repeats"
            orders.append(drawn[0].tolist())
        # A world orders "train" alone by itself.
        order = torch.randperm(52, generator=torch.Generator().manual_seed(3 * 1_000_003))
        assert orders[0] == (51 - order)[:5].tolist() and orders[1][0] != 100 + orders[0][0]

    def test_a_split_has_its_own_size_and_blank_records(self):
        source = DataSource(Splits(range(52)), together, split="human")
        with one_line("8 .*7 human"):
            Batches([source], batch_size=8)
        (part,) = Batches([source], batch_size=7)[0]
        assert sorted(part["index"].tolist()) == list(range(-207, -200))

    def test_records_are_drawn_from_tasks_as_often_as_kinds_says(self):
        source = DataSource(Numbers(), together, kinds={"square": 1, "text": 4, "line": 3})
        found = [source.record(5, random.Random(i))["source"] for i in range(800)]
        counts = [found.count(kind) for kind in (-2, -1, -3)]
        assert counts == pytest.approx([100, 400, 300], abs=50)


class TestOpenWorld:
    def test_worlds_by_name_with_their_dials(self):
        for name, world in WORLDS.items():
            assert isinstance(open_world(name, 32), world)
        world = open_world("shapes:objects=3,noise=1,style=outline", 16)
        got = repr([world.objects, world.noise, world.style, world.image_size])
        assert got == "[3, 1.0, 'outline', 16]", "dials have the types of the world's defaults"

    def test_files_of_the_users_own_get_every_option(self, tmp_path):
        spec = listed(tmp_path, 20)
        (tmp_path / "data.jsonl").rename(tmp_path / "a:b")
        (tmp_path / "in").mkdir()
        world = open_world(f"jsonl:{tmp_path}/a:b", 16, f"{tmp_path}/in", 0.5, 3, whole=True)
        assert (world.image_size, world.skip, world.shuffle, world.whole) == (16, 0.5, 3, True)
        assert not open_world(f"jsonl:{tmp_path}/a:b", 16).whole
        assert open_world("emoji", 16, whole=True).record("train", 0)["images"][0].size == (16, 16)
        assert world.folder == f"{tmp_path}/in"
        with one_line(f"--data {spec}: .*no such file"):
            open_world(spec, 16)

    @pytest.mark.parametrize("spec, value", [
        ("nothing", "'nothing'.* shapes, emoji.* coco:FILE, flickr:FILE"), ("", "''.* shapes, em"),
        ("shapes:sides=3", "'sides'.* objects, noise, clutter, style"), ("shapes:noise=-1", ""),
        ("emoji:objects=3", "'objects'.* none"), ("shapes:noise=loud", "noise .*float.* 'loud'"),
        ("shapes:image_size=64", "'image_size'"), ("shapes:objects", "objects .*int.* ''"),
        ("shapes:texts=none.jsonl", "none.jsonl: no such file"), ("shapes:web_noise=nan", "nan"),
        ("shapes --images in", "--images in: "), ("jsonl:x --images none", "--images none: ")])
    def test_what_does_not_exist_is_refused_and_what_does_is_named(self, spec, value):
        spec, *images = spec.split(" --images ")
        with one_line(f"^--data {spec}: .*{value}"):
            open_world(spec, 32, *images)


class TestWorldTokenizer:
    def test_words_of_the_world_and_of_prompts_are_single_pieces(self):
        tokenizer = world_tokenizer(Shapes())
        words = "red circle triangle purple output : question : answer :"
        assert len(tokenizer.encode(words.replace(" :", ":"))) == len(words.split())
        assert len(tokenizer) == Shapes.vocab_size
