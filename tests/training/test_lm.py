"""The lm stage: the loss of a step, perplexity, and the figures of its result.json."""
import functools
import math
import random
from types import SimpleNamespace

import pytest
import torch

from common.data.collators import SplitTexts
from common.data.files import Files
from common.data.tokenizer import BOS, EOS, PAD, Tokenizer
from common.language import LanguageConfig
from common.t5 import T5Config
from common.training.lm import (PRESETS, RECIPES, Pretraining, data_sources, logits_of, perplexity,
                                unigram_perplexity)
from tests.helpers import V, assert_close, listed, prompts, randomize, toy_lm

T, LENGTHS = 11, (11, 8, 3, 2, 11, 5)


def pretraining(vocab_size=V):
    return Pretraining(LanguageConfig(
        vocab_size=vocab_size, context_length=19, width=24, layers=2, heads=3, kv_heads=1,
        hidden=37, tie_embeddings=False))


def t5_pretraining(vocab_size=V):
    return Pretraining(T5Config(vocab_size=vocab_size, context_length=19, width=24, layers=1,
                                heads=3, head_width=5, hidden=37))


def t5_nll(lm, ids, place):
    """Of each token from `place` on: -log p given those before; ids without <bos>."""
    prompt, target = torch.tensor([[*ids[:place], EOS]]), torch.tensor([[PAD, *ids[place:]]])
    return nll(lambda text: lm(prompt, text), [target])


def nll(lm, texts):
    """Of each token after the first of texts (1, T): -log p(token | past)."""
    return [-lm(text)[0, t - 1].log_softmax(dim=-1)[text[0, t]].item()
            for text in texts for t in range(1, text.shape[1])]


class Captions:
    def corpus(self):
        return iter(["a red circle", "a red star"])


class WithTexts(Captions):
    def text(self, rng):
        return {"texts": [rng.choice(["a red circle", "two blue stars"])]}

    def labelled(self, rng):
        return [("a red", False), (rng.choice([" circle", " star"]), True)], math.log(2)


class TestDataSources:
    @pytest.mark.parametrize("world, kinds", [(WithTexts, {"text": 1}), (Captions, None)])
    def test_it_reads_texts_where_the_world_has_them_and_captions_elsewhere(self, world, kinds):
        here, config = world(), LanguageConfig(context_length=19)
        source, = data_sources(here, "tokenizer", config)
        assert (source.world, source.kinds, source.weight) == (here, kinds, 1.0)
        assert (source.collate.tokenizer, source.collate.length) == ("tokenizer", 19)

    def test_of_the_users_own_no_picture_is_read(self, tmp_path):
        world = Files("jsonl", listed(tmp_path, 40, bad=range(40))[6:], image_size=7)
        source, = data_sources(world, "tokenizer", LanguageConfig())
        world.check_pictures()
        texts = [record["texts"] for record in [*world.records("test"), source.record(0, None)]]
        assert len(texts) == 6 and all(text.startswith("number") for text, in texts)

    def test_texts_for_t5_are_split(self):
        source, = data_sources(WithTexts(), "tokenizer", T5Config(context_length=19))
        assert (type(source.collate).__name__, source.collate.length) == ("SplitTexts", 19)
        assert {"tiny", "t5-tiny", "flan-t5-xl"} | set(RECIPES) - {""} <= set(PRESETS)


class TestPerplexity:
    @pytest.mark.parametrize("rows", [64, 6, 4, 1])
    def test_it_is_the_exponential_of_the_mean_over_all_tokens(self, rows):
        model, (ids, _, texts) = toy_lm(), prompts(*LENGTHS, side="right")
        terms = nll(model, texts)
        assert_close("perplexity", perplexity(model, ids, rows=rows),
                     math.exp(sum(terms) / len(terms)))

    def test_labels_of_minus_100_do_not_count(self):
        model, ids = toy_lm(), prompts(T)[0]
        labels = torch.full_like(ids, -100)
        assert perplexity(model, ids, labels) == 1, "no labels at all"
        labels[0, 0] = labels[0, 6] = ids[0, 6]              # nothing predicts the first token
        assert_close("perplexity", perplexity(model, ids, labels), math.exp(nll(model, [ids])[5]))

    def test_beyond_all_numbers_it_is_infinite(self):
        model = randomize(toy_lm(), 100.0)                   # logits of tens of thousands
        assert perplexity(model, prompts(T)[0]) == math.inf


class TestLogitsOf:
    def test_each_text_of_a_row_reads_its_own_prompt_alone(self):
        lm, texts = t5_pretraining().lm.double(), [([5, 6, 7, EOS], 1), ([8, 9, EOS], 2),
                                                   ([4, EOS], 0), ([5, EOS], 1)]
        batch = SplitTexts.split([(ids, ids, place) for ids, place in texts], length=9)
        assert [row.count(EOS) for row in batch["prompt_ids"].tolist()] == [3, 1]
        found = logits_of(lm, batch["ids"], batch["prompt_ids"])
        expected = [lm(torch.tensor([[*ids[:place], EOS]]), torch.tensor([[PAD, *ids[place:]]]))
                    for ids, place in texts]
        assert_close("logits of the first row", found[:1], torch.cat(expected[:3], dim=1))
        assert_close("logits of the second row", found[1:, :2], expected[3])
        decoder = toy_lm()
        ids = batch["ids"]
        assert_close("logits of a decoder", logits_of(decoder, ids), decoder(ids))


class TestUnigramPerplexity:
    def test_it_predicts_each_token_by_its_frequency(self):
        train_ids, ids = torch.tensor([[1, 5, 5, 7, 2, 0]]), torch.tensor([[1, 5, 9, 0]])
        want = (3 / 15 * 1 / 15) ** -0.5       # 5 twice and one more; 9 never and one more
        config = LanguageConfig(vocab_size=11)
        assert_close("perplexity", unigram_perplexity(train_ids, ids, config), want)


class TestPretraining:
    def test_the_loss_is_the_mean_over_the_labels_or_over_the_whole_steps(self):
        model, (ids, mask, texts) = pretraining().double(), prompts(*LENGTHS, side="right")
        batch, terms = {"ids": ids, "labels": ids.masked_fill(~mask, -100)}, nll(model.lm, texts)
        assert_close("loss", model(batch)["lm"], sum(terms) / len(terms))
        more = batch | {"label_count": torch.tensor(70.0)}
        assert_close("share of a step of 70 labels", model(more)["lm"], sum(terms) / 70)

    def test_only_the_labels_of_the_batch_count(self):
        model, ids = pretraining().double(), prompts(T)[0]
        labels = torch.full_like(ids, -100)
        labels[0, 4] = 7                       # not the id that stands there
        want = -model.lm(ids)[0, 3].log_softmax(dim=-1)[7]
        assert_close("loss", model({"ids": ids, "labels": labels})["lm"], want.item())

    def test_of_t5_the_labels_follow_the_prompts(self):
        model, rows = t5_pretraining().double(), [([5, 6, 7, EOS], 1), ([8, EOS], 1), ([4, EOS], 0)]
        batch = SplitTexts.split([(ids, ids, place) for ids, place in rows])
        terms = sum((t5_nll(model.lm, *row) for row in rows), [])
        assert_close("loss", model(batch)["lm"], sum(terms) / len(terms))
        assert_close("share of a step of 70 labels", sum(terms) / 70,
                     model(batch | {"label_count": torch.tensor(70.0)})["lm"].item())

    def data(self, world, pretraining=pretraining):
        """A model and what it needs of an EvalData."""
        tokenizer = Tokenizer.train(["a red circle", "two blue stars"], 400)
        records = [{"texts": [text, "another caption"]}
                   for text in ("a red circle", "two blue stars", "a blue star", "red", "a", "two")]
        return pretraining(len(tokenizer)), SimpleNamespace(
            world=world, tokenizer=tokenizer, records={"test": records}.get,
            ids=lambda texts: tokenizer.batch(texts, 19))

    def test_of_a_world_of_captions_the_first_of_each_test_record_counts(self):
        model, data = self.data(Captions())
        ids = data.ids([record["texts"][0] for record in data.records("test")])
        train_ids = data.ids(["a red circle", "a red star"])
        assert model.evaluate(data) == {
            "perplexity": perplexity(model.lm, ids),
            "perplexity_unigram": unigram_perplexity(train_ids, ids, model.config),
            "perplexity_chance": len(data.tokenizer)}

    def test_texts_of_test_are_not_those_of_train(self):
        model, data = self.data(WithTexts())
        test, train = (model.texts(data, split, count=30) for split in ("test", "train"))
        assert_close("texts", test, model.texts(data, "test", count=30))
        assert test.shape[0] == len(train) == 30 and test.tolist() != train.tolist()

    def test_words_of_known_odds_stand_beside_their_entropy(self):
        model, data = self.data(WithTexts())
        figures, pieces = model.evaluate(data), data.tokenizer.encode
        first, terms = [BOS, *pieces("a red")], {}
        for word in (" circle", " star"):      # of the word's own tokens alone
            text = torch.tensor([first + pieces(word)])
            terms[word] = nll(model.lm, [text])[len(first) - 1:]
        drawn = [data.world.labelled(random.Random(f"labels/{i}"))[0][1][0] for i in range(400)]
        counted = [term for word in drawn for term in terms[word]]
        assert_close("perplexity", figures["perplexity_labels"],
                     math.exp(sum(counted) / len(counted)), tolerance=1e-4)
        assert_close("entropy", figures["perplexity_labels_entropy"],
                     math.exp(400 * math.log(2) / len(counted)))

    def test_t5_writes_the_second_halves_and_labels_after_all_that_precedes_them(self):
        model, data = self.data(WithTexts(), t5_pretraining)
        figures, encode = model.evaluate(data), data.tokenizer.encode
        nll_of = functools.cache(lambda ids, place: t5_nll(model.lm, ids, place))
        texts = [tuple(row[1:row.index(EOS) + 1]) for row in model.texts(data).tolist()]
        words = [data.world.labelled(random.Random(f"labels/{i}"))[0][1][0] for i in range(400)]
        for name, rows in (
                ("perplexity", [(ids, len(ids) // 2) for ids in texts]),
                ("perplexity_labels", [((*encode("a red"), *encode(word)), len(encode("a red")))
                                       for word in words])):
            terms = sum((nll_of(*row) for row in rows), [])
            assert_close(name, figures[name], math.exp(sum(terms) / len(terms)), 1e-4)
        assert set(figures) == set(self.data(WithTexts())[0].evaluate(data)), "other figures"

    @pytest.mark.parametrize("pretraining", [pretraining, t5_pretraining])
    def test_samples_are_a_picture(self, pretraining):
        model, data = self.data(Captions(), pretraining)
        page = model.samples(data)
        assert page.mode == "RGB" and min(page.size) > 100 and len(page.getcolors(1 << 24)) > 2
