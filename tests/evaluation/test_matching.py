"""Matching: a table of logits stands for the model, red tones and numbers for images and texts."""
from types import SimpleNamespace

import pytest
import torch

from common.data.images import MEAN, STD, normalize_pixels
from common.evaluation import matching
from common.evaluation.matching import (check_losses, filter_figures, image_tokens, judgement,
                                        match_scores, most_similar, probabilities, reranked)
from common.evaluation.questions import draw_tasks
from common.evaluation.retrieval import Pool
from common.evaluation.sheet import GREEN, RED
from tests.helpers import Numbers, NumbersData, assert_close, drawing, refused


class Model:
    """The logit of class 1 of image i and text t is table[i, t], that of class 0 is 0."""
    config = SimpleNamespace(context_length=5)

    def __init__(self, table):
        self.table = table

    def pixels(self, records):
        return normalize_pixels(NumbersData().images(records))

    def vision(self, images):
        """Float (B, 3, H, W), normalized -> the number of each image (B, 1, 1)."""
        red = images[:, :1].mean(dim=(2, 3)) * STD[0] + MEAN[0]
        return (red * 255 / 20).round()[:, None]

    def match(self, tokens, ids):
        assert tokens.shape[1:] == (1, 1) and len(tokens) == len(ids)
        found = self.table[tokens[:, 0, 0].long(), ids[:, 0]]
        return torch.stack([torch.zeros_like(found), found], dim=1)


def pool(scores):
    """A Pool of 13 images and texts with these cosines."""
    return Pool(Numbers(), NumbersData().records("test"), scores, torch.eye(13))


class TestCheckLosses:
    def test_one_of_what_a_command_needs_is_enough(self):
        try:
            check_losses("runs/x", "itc,itm", "itc,itm", ("lm", "itm"))
        except ValueError as error:
            raise AssertionError("one of two is enough") from error
        with refused("runs/x.*its losses are vqa; .* lm or itm"):
            check_losses("runs/x", "vqa", "vqa", ("lm", "itm"))


class TestMostSimilar:
    def test_each_image_keeps_its_best_texts_and_each_text_once(self):
        pictures = drawing("red", "blue")
        vectors = {"red": torch.tensor([1.0, 0.0]), "blue": torch.tensor([0.0, 1.0]),
                   "both": torch.tensor([0.6, 0.8]), "none": torch.tensor([-1.0, 0.0])}
        retriever = SimpleNamespace(
            encode_images=lambda found: torch.stack([vectors[str(
                ("red", "blue")[p.getpixel((0, 0)) == (0, 0, 255)])] for p in found]),
            ids=lambda texts: texts, model=SimpleNamespace(
                encode_text=lambda texts: torch.stack([vectors[t] for t in texts])))
        rows = [(0, "none"), (0, "red"), (1, "red"), (1, "both"), (0, "both"), (1, "blue"),
                (0, "red")]
        records = [{"images": [pictures[i]], "texts": [text]} for i, text in rows]
        for kept, expected in ((1, [1, 5]), (2, [1, 3, 4, 5]), (9, [0, 1, 2, 3, 4, 5])):
            found = most_similar(retriever, kept)(records)
            assert_close(f"the best {kept} (N,)", found, [i in expected for i in range(7)])


@pytest.mark.parametrize("chunk", [1, 5, 256])
class TestChunks:
    """Whatever the chunk, rows keep their order."""

    def test_image_tokens(self, chunk):
        found = image_tokens(Model(None), NumbersData(), NumbersData().records("test"), chunk)
        assert_close("tokens (N, S, D)", found, torch.arange(13.0)[:, None, None])

    def test_scores_are_the_logits_of_a_pair(self, chunk):
        table, (images, texts) = torch.randn(13, 13), torch.randint(13, (2, 11))
        found = match_scores(Model(table), images[:, None, None].float(), texts[:, None], chunk)
        assert_close("scores (N,)", found, table[images, texts])

    def test_probabilities_are_of_each_records_first_text(self, chunk):
        table = torch.randn(13, 13)
        shown = [record | {"texts": [str(12 - i), "3"]}
                 for i, record in enumerate(NumbersData().records("test"))]
        assert_close("p (N,)", probabilities(Model(table), NumbersData(), shown, chunk),
                     table.flip(1).diagonal().sigmoid())


class TestReranked:
    @pytest.mark.parametrize("k", [2, 13, 16])
    def test_each_query_adds_the_logits_of_its_k_best(self, k):
        cosines, table = torch.rand(13, 13), torch.randn(13, 13)
        both = reranked(Model(table), NumbersData(), pool(cosines), k)
        for found, own, logits in zip(both, (cosines, cosines.T), (table, table.T)):
            best = own >= own.sort(descending=True).values[:, min(k, 13) - 1:][:, :1]
            assert_close("scores (N, N)", found, (own + logits).where(best, -100.0))


class TestJudgement:
    @pytest.mark.parametrize("keeps, truth, want", [
        ([1, 1, 1, 0, 0], [1, 0, 1, 1, 1], (2 / 3, 2 / 4)), ([0, 0], [1, 0], (0, 0)),
        ([1, 1], [0, 0], (0, 0)), ([1, 0], [1, 0], (1, 1))])
    def test_precision_is_of_the_kept_and_recall_of_the_true(self, keeps, truth, want):
        assert judgement(torch.tensor(keeps).bool(), torch.tensor(truth).bool()) == want


class Noisy(Numbers):
    """Image i has text i, or, by its hardness, that of image i + 1, i + 2 or i + 3."""
    tasks = ("noisy",)

    def task(self, kind, /, rng, split, hardness):
        assert (kind, split) == ("noisy", "test")
        i, truth = rng.randrange(9), rng.random() < 0.4
        wrong = 1 + ("random", "shares", "differs").index(hardness)
        return self.record("test", i) | {"texts": [str(i if truth else i + wrong)], "truth": truth}


class TestFilterFigures:
    def test_of_each_hardness_and_of_all_together(self):
        # The filter keeps what is true, and what differs; it misses the texts 0 to 2.
        table = torch.eye(13) + torch.eye(13).roll(3, dims=1) - 0.5
        table[:, :3] = -1
        found = filter_figures(Model(table), NumbersData(Noisy()), 40)
        judged = {}
        for hardness in ("random", "shares", "differs"):
            for record in draw_tasks(Noisy(), "noisy", 40, hardness=hardness):
                kept = int(record["texts"][0]) > 2 and (record["truth"] or hardness == "differs")
                for name in ("", f"/{hardness}"):
                    judged.setdefault(name, []).append((kept, record["truth"]))
        want = {"itm_accuracy_chance": 0.5}
        for name, pairs in judged.items():
            both = sum(kept and true for kept, true in pairs)
            want[f"itm_accuracy{name}"] = sum(kept == true for kept, true in pairs) / len(pairs)
            want[f"filter_precision{name}"] = both / sum(kept for kept, _ in pairs)
            want[f"filter_recall{name}"] = both / sum(true for _, true in pairs)
        assert found == pytest.approx(want) and len({*found.values()}) > 7


class TestEvaluate:
    @pytest.mark.parametrize("world, more", [(Numbers, 0), (Noisy, 13)])
    def test_recalls_are_those_after_matching_and_only_such_a_world_has_a_filters(
            self, world, more):
        # By their cosines images find the wrong texts.
        found = matching.evaluate(Model(9 * torch.eye(13)), NumbersData(world()),
                                  pool(torch.eye(13).roll(5, dims=1)), 7)
        recalls = {name: value for name, value in found.items() if name.endswith("_reranked")}
        assert recalls == {f"{way}_recall@{k}_reranked": 1.0 for k in (1, 5, 10)
                           for way in ("image_to_text", "text_to_image")}
        assert len(found) == 6 + more


class TestSamples:
    @pytest.mark.parametrize("logit, colours", [
        (lambda i, t: i in (t, t + 1), {GREEN}), (lambda i, t: i not in (t, t + 1), {RED}),
        (lambda i, t: True, {GREEN, RED})])
    def test_texts_that_are_judged_right_are_green(self, logit, colours):
        table = torch.tensor([[2.0 * logit(i, t) - 1 for t in range(13)] for i in range(13)])
        page = matching.samples(Model(table), NumbersData(), pool(torch.rand(13, 13)))
        assert {colour for _, colour in page.getcolors(1 << 20)} & {GREEN, RED} == colours

    def test_a_picture_stands_beside_its_text_and_the_false_ones_of_the_highest_cosines(self):
        asked, model = [], Model(torch.zeros(13, 13))
        model.match = lambda tokens, ids: asked.append(
            (tokens[:, 0, 0].tolist(), ids[:, 0].tolist())) or torch.zeros(len(ids), 2)
        cosines = torch.zeros(13, 13)
        cosines[1, 0], cosines[1, 4], cosines[1, 7] = 0.9, 0.3, 0.5        # text 0 is true of 1
        matching.samples(model, NumbersData(), pool(cosines), count=2)
        assert asked[1] == ([1, 1, 1], [1, 7, 4]) and len(asked) == 2
