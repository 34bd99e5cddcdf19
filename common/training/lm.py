"""The lm stage: a language model learns the world's texts, for the stages that freeze one."""
import itertools
import math
import random
from dataclasses import replace

import torch
from torch import nn

from common.data.batches import DataSource
from common.data.collators import PackedTexts, as_text
from common.data.tokenizer import BOS
from common.evaluation.sheet import sheet
from common.language import PRESETS, LanguageModel  # noqa: F401  a stage's file has its presets
from common.losses import next_token_loss, no_gather
from common.prompts import Segment, collate, labels_of, render
from common.training.optimizer import Recipe

TRAINS = {"lm": ("*",)}
ADAMW = Recipe(steps=4000, batch_size=64, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
MUON = replace(ADAMW, optimizer="muon", muon_lr_multiplier=1.25, schedule="linear", steps=1080)
RECIPES = {"tiny": MUON, "small": MUON, "": ADAMW}


def data_sources(world, tokenizer, config):
    """The world's own texts where it has them, else its captions, in rows of 80 tokens."""
    return [DataSource(world, PackedTexts(tokenizer, config.context_length, 80),
                       kinds={"text": 1} if hasattr(world, "text") else None)]


@torch.no_grad()
def perplexity(lm, ids, labels=None, rows=64):
    """exp of the mean negative log-likelihood over all labels of all texts.

    ids int64 (N, T), padded right, each row beginning with <bos>. labels int64 (N, T), -100 = not
    counted; None: `labels_of`.
    """
    labels = labels_of(ids, lm.config) if labels is None else labels
    total = sum(next_token_loss(lm(ids[k:k + rows]), labels[k:k + rows], label_count=1).item()
                for k in range(0, len(ids), rows))
    count = max(1, int((labels[:, 1:] != -100).sum()))
    return torch.tensor(total / count).exp().item()          # inf, where math.exp raises


def unigram_perplexity(train_ids, ids, config):
    """Perplexity of ids (N, T) by the token frequencies of train_ids (add-one smoothing)."""
    counts = torch.ones(config.vocab_size, device=train_ids.device)
    labels = labels_of(train_ids, config)[:, 1:]
    counts += torch.bincount(labels[labels != -100], minlength=config.vocab_size)
    labels = labels_of(ids, config)[:, 1:]
    return (counts / counts.sum()).log()[labels[labels != -100]].mean().neg().exp().item()


class Pretraining(nn.Module):
    """A language model in training; its weights are lm.*, as in models that freeze one."""

    def __init__(self, config):
        super().__init__()
        self.config, self.lm = config, LanguageModel(config)

    def forward(self, batch, gather=no_gather):
        """{"ids", "labels": int64 (B, T), "label_count"} -> {"lm": mean -log p(token | past)}."""
        return {"lm": next_token_loss(self.lm(batch["ids"]), batch["labels"],
                                      batch.get("label_count"))}

    def texts(self, data, split="test", count=1000):
        """Texts of a split as int64 (N, T): what the world gives to read, else its captions."""
        world = data.world
        if hasattr(world, "text"):
            return data.ids([as_text(world.text(random.Random(f"{split} reading/{i}")))
                             for i in range(count)])
        if split == "train":
            return data.ids(list(itertools.islice(world.corpus(), count)))
        return data.ids([as_text(record) for record in data.records(split)])

    def evaluate(self, data):
        """Perplexity of unseen texts beside a unigram model's -> {name: number}.

        perplexity_labels: of words that the world draws with known odds, beside the entropy of
        those odds, which no model can go below.
        """
        ids = self.texts(data)
        figures = {"perplexity": perplexity(self.lm, ids),
                   "perplexity_unigram": unigram_perplexity(self.texts(data, "train"), ids,
                                                            self.config),
                   "perplexity_chance": float(self.config.vocab_size)}
        if hasattr(data.world, "labelled"):
            drawn = [data.world.labelled(random.Random(f"labels/{i}")) for i in range(400)]
            batch = collate([render([Segment((BOS,)), *(Segment(*part) for part in parts)],
                                    data.tokenizer) for parts, _ in drawn])
            entropy = sum(nats for _, nats in drawn) / int((batch["labels"] != -100).sum())
            figures |= {"perplexity_labels": perplexity(self.lm, batch["ids"].to(ids.device),
                                                        batch["labels"].to(ids.device)),
                        "perplexity_labels_entropy": math.exp(entropy)}
        return figures

    @torch.no_grad()
    def samples(self, data, count=6, words=3):
        """An image for people: how the model continues the first tokens of unseen texts."""
        ids = self.texts(data)[:count, :1 + words]
        room = self.config.context_length - ids.shape[1]
        new = self.lm.generate(ids, max_new_tokens=min(32, room))
        decode = data.tokenizer.decode
        return sheet("Unseen texts: the first words, then what the model writes.",
                     [(decode(row.tolist()), None, [(None, decode(both.tolist()), None)])
                      for row, both in zip(ids, torch.cat([ids, new], dim=1))])
