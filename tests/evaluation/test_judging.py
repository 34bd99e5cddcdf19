"""Judging statements and candidate answers, by models whose probabilities are known."""
import pytest
import torch

from common.data.batches import EvalData
from common.data.collators import DialogueBatch, PairBatch
from common.data.shapes.world import Shapes
from common.evaluation import judging
from common.evaluation.judging import probabilities, two_images
from common.evaluation.questions import draw_tasks
from common.evaluation.sheet import GREEN, RED


class Lengths:
    """A tokenizer that counts letters."""

    def encode(self, text):
        return text

    def batch(self, texts, context_length):
        return torch.tensor([[len(text)] for text in texts])


def data(batch):
    world = Shapes(image_size=16)
    return EvalData(world, Lengths(), batch(Lengths(), 999, 16), "cpu")


class Says:
    """A model: say(batch) is the logit of class 1, that of class 0 is 0."""

    def __init__(self, say):
        self.say, self.sizes = say, []

    def predict(self, batch):
        self.sizes.append(len(batch["ids"]))
        found = self.say(batch)
        return torch.stack([torch.zeros(len(found)), found], dim=1)


def knows(batch):
    return 2.0 * batch["truth"] - 1


def second(batch):
    """The first candidate, or the second if the first is right, is likelier than the right one."""
    rows = batch["truth"].view(-1, 6).float()
    likeliest = torch.where(rows[:, 0] == 1, 1, 0)
    return rows.scatter(1, likeliest[:, None], 2.0).flatten()


class TestProbabilities:
    def test_they_are_of_class_1_in_order_whatever_the_chunk(self):
        numbers = torch.randn(7)
        for chunk, sizes in ((256, [7]), (3, [3, 3, 1])):
            model = Says(lambda batch: batch["x"])
            found = probabilities(model, {"ids": torch.zeros(7, 2), "x": numbers}, "cpu", chunk)
            assert torch.allclose(found, numbers.sigmoid()) and model.sizes == sizes, chunk


class TestTwoImages:
    @pytest.mark.parametrize("say, share", [
        (knows, lambda truth: 1), (lambda batch: -knows(batch), lambda truth: 0),
        (lambda batch: torch.ones(len(batch["ids"])), lambda truth: sum(truth) / len(truth))])
    def test_accuracy_is_of_true_and_false_statements(self, say, share):
        given = data(PairBatch)
        truth = [record["turns"][0]["answer"] == "true"
                 for record in draw_tasks(given.world, "two_pictures", 23)]
        assert 0 < sum(truth) < 23
        assert two_images(Says(say), given, 23) == pytest.approx(
            {"two_images_accuracy": share(truth), "two_images_accuracy_chance": 0.5})


class TestDialogue:
    @pytest.mark.parametrize("say, accuracy, mrr", [
        (knows, 1, 1), (lambda batch: -knows(batch), 0, 1 / 6), (second, 0, 1 / 2),
        (lambda batch: torch.zeros(len(batch["ids"])), 0, 1 / 6)])       # ties are lost
    def test_the_rank_of_the_right_candidate(self, say, accuracy, mrr):
        assert judging.dialogue(Says(say), data(DialogueBatch), 13) == pytest.approx({
            "dialogue_accuracy": accuracy, "dialogue_accuracy_chance": 1 / 6, "dialogue_mrr": mrr})


class TestSamples:
    @pytest.mark.parametrize("kind, batch", [
        ("two_pictures", PairBatch), ("dialogue", DialogueBatch)])
    @pytest.mark.parametrize("sign, colours", [(1, {GREEN}), (-1, {RED})])
    def test_right_answers_are_green(self, kind, batch, sign, colours):
        page = judging.samples(Says(lambda batch: sign * knows(batch)), data(batch), kind, 2)
        assert {colour for _, colour in page.getcolors(1 << 20)} & {GREEN, RED} == colours
