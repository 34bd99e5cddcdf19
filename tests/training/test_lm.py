"""The lm stage: the loss of a step, perplexity, and the figures of its result.json."""
import math
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from common.data.collators import PackedTexts
from common.data.tokenizer import Tokenizer
from common.language import LanguageConfig
from common.losses import count_labels
from common.prompts import collate
from common.training import lm
from common.training.lm import Pretraining, data_sources, perplexity, unigram_perplexity
from common.training.optimizer import freeze
from tests.helpers import V, prompts, toy_lm

T = 11
SMALL = LanguageConfig(vocab_size=V, context_length=19, width=24, layers=2, heads=3, kv_heads=3,
                       hidden=37)
KINDS = {"gpt2": replace(SMALL, kind="gpt2"), "opt": replace(SMALL, kind="opt"),
         "llama": replace(SMALL, kv_heads=1, tie_embeddings=False)}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def pretraining(kind="llama", **changes):
    torch.manual_seed(0)
    return Pretraining(replace(KINDS[kind], **changes))


def ragged():
    """Six texts padded right: {"ids", "labels": int64 (6, T)}."""
    ids, mask, _ = prompts(T, 8, 3, 2, T, 5, side="right")
    return {"ids": ids, "labels": ids.masked_fill(~mask, -100)}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


class TestPretraining:
    def parts(self, batch):
        """Rows 0-1, 2-4 and 5 as batches."""
        return [{name: value[rows] for name, value in batch.items()}
                for rows in (slice(0, 2), slice(2, 5), slice(5, 6))]

    def test_the_loss_by_hand(self):
        model, batch = pretraining("gpt2").double(), ragged()
        logs, terms = model.lm(batch["ids"]).log_softmax(dim=-1), []
        for row, length in enumerate((T, 8, 3, 2, T, 5)):
            terms += [-logs[row, t - 1, batch["ids"][row, t]].item() for t in range(1, length)]
        assert model(batch)["lm"].item() == pytest.approx(sum(terms) / len(terms), rel=1e-6)

    def test_only_the_labels_of_the_batch_count(self):
        model, batch = pretraining().double(), ragged()
        labels = torch.full_like(batch["ids"], -100)
        labels[0, 4] = batch["ids"][0, 4]
        want = -model.lm(batch["ids"])[0, 3].log_softmax(dim=-1)[batch["ids"][0, 4]]
        assert model(batch | {"labels": labels})["lm"].item() == pytest.approx(want.item())

    def test_micro_batches_weigh_every_token_alike(self, kind):
        model, batch = pretraining(kind).double(), ragged()
        want, parts = gradients(model, model(batch)["lm"]), self.parts(batch)
        count = count_labels([part["labels"] for part in parts])
        losses = [model(part | {"label_count": count})["lm"] for part in parts]
        assert sum(losses).item() == pytest.approx(model(batch)["lm"].item(), rel=1e-5)
        for a, b in zip(gradients(model, sum(losses)), want):
            torch.testing.assert_close(a, b)

    def test_processes_weigh_every_token_alike(self):
        model, batch = pretraining().double(), ragged()
        want, parts = gradients(model, model(batch)["lm"]), self.parts(batch)
        counts = torch.cat([(part["labels"][:, 1:] != -100).sum().view(1, 1) for part in parts])
        losses = [model(part | {"label_count": count_labels(
            [part["labels"]], lambda x: (counts.float(), 0))})["lm"] / 3    # DDP averages
            for part in parts]
        for a, b in zip(gradients(model, sum(losses)), want):
            torch.testing.assert_close(a, b)

    def test_it_learns_a_text_by_heart(self, kind):
        model, ids = pretraining(kind), prompts(T)[0]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            model({"ids": ids, "labels": ids})["lm"].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model.lm(ids)[0, :-1].argmax(dim=-1).tolist() == ids[0, 1:].tolist()
        written = model.lm.generate(ids[:, :1], max_new_tokens=T - 1, stop=())
        assert written.tolist() == ids[:, 1:].tolist()

    def test_the_stage_trains_all_of_it_and_names_it_lm(self):
        model = pretraining()
        freeze(model, lm.TRAINS["lm"])
        assert all(p.requires_grad for p in model.parameters())
        assert all(name.startswith("lm.") for name in model.state_dict())


class TestDataSources:
    def test_it_reads_texts_where_the_world_has_them_and_captions_elsewhere(self):
        for world, kinds in ((WithTexts(), {"text": 1}), (Captions(), None)):
            source, = data_sources(world, "tokenizer", KINDS["llama"])
            assert (source.world, source.kinds, source.weight) == (world, kinds, 1.0)
            assert isinstance(source.collate, PackedTexts) and source.collate.length == 19
            assert source.collate.tokenizer == "tokenizer"


class TestPerplexity:
    def test_it_is_the_exponential_of_the_mean_over_all_tokens(self):
        model, (ids, _, texts) = toy_lm(), prompts(T, 4, T, 2, T, side="right")
        total, count = 0.0, 0
        for text in texts:
            logs = model(text)[0].log_softmax(dim=-1)
            total -= sum(logs[t - 1, text[0, t]].item() for t in range(1, text.shape[1]))
            count += text.shape[1] - 1
        want = pytest.approx(math.exp(total / count), rel=1e-4)
        assert perplexity(model, ids) == want
        assert perplexity(model, ids, rows=2) == want
        batch = collate([(text[0].tolist(),) * 2 for text in texts])
        assert perplexity(model, batch["ids"], batch["labels"]) == want

    def test_labels_of_minus_100_do_not_count(self):
        model, ids = toy_lm(), prompts(T)[0]
        labels = torch.full_like(ids, -100)
        labels[0, 0] = labels[0, 6] = ids[0, 6]              # nothing predicts the first token
        want = -model(ids)[0, 5].log_softmax(dim=-1)[ids[0, 6]]
        assert perplexity(model, ids, labels) == pytest.approx(want.exp().item(), rel=1e-5)

    def test_beyond_all_numbers_it_is_infinite(self):
        model = toy_lm()
        for parameter, value in ((model.norm.weight, 0.0), (model.norm.bias, 1.0),
                                 (model.output.weight, 0.0)):
            nn.init.constant_(parameter, value)
        model.output.weight.data[5] = 1e3                # token 5 has a logit of 24,000, all else 0
        assert perplexity(model, torch.tensor([[1, 5, 5]])) == 1
        assert perplexity(model, torch.tensor([[1, 6, 7]])) == math.inf

    def test_a_uniform_model_has_the_size_of_its_vocabulary(self):
        model = toy_lm()
        nn.init.zeros_(model.output.weight)
        assert perplexity(model, prompts(T, T, T)[0]) == pytest.approx(V, rel=1e-5)


def test_unigram_perplexity_predicts_each_token_by_its_frequency():
    config = replace(SMALL, vocab_size=11)
    train_ids, ids = torch.tensor([[1, 5, 5, 7, 2, 0]]), torch.tensor([[1, 5, 9, 0]])
    shares = 3 / 15, 1 / 15                # 5 twice and one more; 9 never and one more
    want = math.exp(-(math.log(shares[0]) + math.log(shares[1])) / 2)
    assert unigram_perplexity(train_ids, ids, config) == pytest.approx(want, rel=1e-5)


class Captions:
    """A world of captions alone."""

    def corpus(self):
        return iter(["a red circle", "a red star"])


class WithTexts(Captions):
    """A world with texts to read, and with texts that end in a word of known odds."""

    def text(self, rng):
        return {"texts": [rng.choice(["a red circle", "two blue stars"])]}

    def labelled(self, rng):
        return [("a red", False), (rng.choice([" circle", " star"]), True)], math.log(2)


class Data:
    """What `Pretraining.evaluate` needs of an EvalData."""

    def __init__(self, world):
        self.tokenizer = Tokenizer.train(["a red circle", "two blue stars"], 400)
        self.world = world

    def records(self, split):
        assert split == "test"
        return [{"texts": [text, "another caption"]} for text in (
            "a red circle", "two blue stars", "a blue circle", "red stars", "two", "a")]

    def ids(self, texts):
        return self.tokenizer.batch(texts, 19)


class TestEvaluate:
    def model(self, data):
        return pretraining(vocab_size=len(data.tokenizer))

    def test_of_a_world_of_captions_the_first_of_each_test_record_counts(self):
        data = Data(Captions())
        model = self.model(data)
        ids = data.ids([record["texts"][0] for record in data.records("test")])
        train_ids = data.ids(["a red circle", "a red star"])
        assert model.evaluate(data) == {
            "perplexity": perplexity(model.lm, ids),
            "perplexity_unigram": unigram_perplexity(train_ids, ids, model.config),
            "perplexity_chance": len(data.tokenizer)}

    def test_texts_of_test_are_not_those_of_train(self):
        data = Data(WithTexts())
        test, train = (self.model(data).texts(data, split, count=30) for split in ("test", "train"))
        want = [data.world.text(random.Random(f"test reading/{i}"))["texts"][0] for i in range(30)]
        assert torch.equal(test, data.ids(want)) and not torch.equal(test, train)

    def test_words_of_known_odds_stand_beside_their_entropy(self):
        data = Data(WithTexts())
        model = self.model(data)
        nn.init.zeros_(model.lm.output.weight)             # every token is equally likely
        figures = model.evaluate(data)
        pieces = [len(data.tokenizer.encode(word)) for word in (" circle", " star")]
        assert figures["perplexity_labels"] == pytest.approx(len(data.tokenizer), rel=1e-4)
        drawn = [data.world.labelled(random.Random(f"labels/{i}"))[0][1][0] for i in range(400)]
        tokens = sum(pieces[word == " star"] for word in drawn)
        want = math.exp(400 * math.log(2) / tokens)
        assert figures["perplexity_labels_entropy"] == pytest.approx(want, rel=1e-6)

    def test_samples_are_a_picture(self):
        data = Data(Captions())
        page = self.model(data).samples(data)
        assert page.mode == "RGB" and min(page.size) > 100
        assert len(page.getcolors(1 << 24)) > 2
