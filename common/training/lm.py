"""The lm stage: a language model learns the world's texts, for the stages that freeze one.

A decoder writes whole texts. T5's encoder reads the first part of a text, its decoder writes the
rest.
"""
import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import language, t5
from common.data.batches import DataSource
from common.data.collators import PackedTexts, SplitTexts, as_text
from common.data.safe_read import read_json
from common.data.tokenizer import BOS, EOS
from common.evaluation.sheet import sheet
from common.losses import next_token_loss, no_gather
from common.pretrained import language as pretrained
from common.pretrained import t5 as published_t5
from common.pretrained.files import read_weights
from common.prompts import IGNORED, Segment, collate, labels_of, render
from common.t5 import T5, T5Config, make_language
from common.training.optimizer import Recipe

PRESETS = language.PRESETS | t5.PRESETS
TRAINS = {"lm": ("*",)}
ADAMW = Recipe(steps=4000, batch_size=64, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
MUON = replace(ADAMW, optimizer="muon", muon_lr_multiplier=1.25, schedule="linear", steps=2000,
               batch_size=32)
# Relative biases grow from 0.1 to several units before a token attends to its neighbour alone, and
# scores are not scaled, so that the same step of a query moves them K ** 0.5 times as far. Half of
# the tokens are labels, hence twice the batch.
T5_MUON = replace(MUON, batch_size=64, no_decay=("*_bias.weight",),
                  lr_multipliers={"*_bias.weight": 10, "*.q_proj.weight": 0.3})
RECIPES = {"tiny": MUON, "small": MUON, "t5-tiny": T5_MUON, "t5-small": T5_MUON, "": ADAMW}


def data_sources(world, tokenizer, config):
    """The world's own texts where it has them, else its captions, in rows of 80 tokens."""
    world.reads_pictures = False         # the user's own captions are enough
    collate = SplitTexts if isinstance(config, T5Config) else PackedTexts
    return [DataSource(world, collate(tokenizer, config.context_length, 80),
                       kinds={"text": 1} if hasattr(world, "text") else None)]


def read_part(path):
    """A published GPT-2, OPT, LLaMA or FLAN-T5 as the part of a model: its weights are lm.*."""
    config = read_json(Path(path) / "config.json", dict)
    names = published_t5 if config.get("model_type") == "t5" else pretrained
    fields = names.config_fields(config, path)
    weights = names.translated(read_weights(path), fields, path)
    tokenizer = pretrained.load_tokenizer(path, fields)
    fields |= {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    return fields, {f"lm.{name}": weight for name, weight in weights.items()}, tokenizer


def logits_of(lm, ids, prompt_ids=None):
    """Logits (B, T, V) of ids int64 (B, T); prompt_ids int64 (B, S): what T5's encoder reads.

    Each text of a row has its own prompt, see `SplitTexts`, and no token attends to another text.
    """
    if prompt_ids is None:
        return lm(ids)
    text = (ids == lm.config.pad_id).cumsum(dim=1)[:, :, None]        # (B, T, 1): 1, 2, ...
    is_end = prompt_ids == lm.config.eos_id
    prompt = (1 + is_end.cumsum(dim=1) - is_end.long())[:, :, None]   # (B, S, 1)
    states = lm.encode(prompt_ids, prompt == prompt.mT)
    return lm.logits(ids, text == text.mT, context=states, context_mask=text == prompt.mT)


@torch.no_grad()
def perplexity(lm, ids, labels=None, rows=64, prompt_ids=None):
    """exp of the mean negative log-likelihood over all labels of all texts.

    ids int64 (N, T), padded right, each row beginning with <bos> (T5: <pad>, after prompt_ids).
    labels int64 (N, T), -100 = not counted; None: `labels_of`.
    """
    labels = labels_of(ids, lm.config) if labels is None else labels
    total = 0.0
    for k in range(0, len(ids), rows):
        prompts = None if prompt_ids is None else prompt_ids[k:k + rows]
        total += next_token_loss(logits_of(lm, ids[k:k + rows], prompts), labels[k:k + rows],
                                 label_count=1).item()
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
    """A decoder or T5 in training; its weights are lm.*, as in models that freeze one."""

    def __init__(self, config):
        super().__init__()
        self.config, self.lm = config, make_language(config)

    def forward(self, batch, gather=no_gather):
        """{"ids", "labels": int64 (B, T), "label_count"} -> {"lm": mean -log p(token | past)}.

        T5's batch has "prompt_ids" int64 (B, S) as well.
        """
        logits = logits_of(self.lm, batch["ids"], batch.get("prompt_ids"))
        return {"lm": next_token_loss(logits, batch["labels"], batch.get("label_count"))}

    def texts(self, data, split="test", count=1000):
        """Texts of a split as int64 (N, T): what the world gives to read, else its captions."""
        world = data.world
        if hasattr(world, "text"):
            return data.ids([as_text(world.text(random.Random(f"{split} reading/{i}")))
                             for i in range(count)])
        if split == "train":
            return data.ids(list(itertools.islice(world.corpus(), count)))
        return data.ids([as_text(record) for record in data.records(split)])

    def batch_of(self, texts, device):
        """[(ids, labels, place), ...] -> {"ids", "labels", for T5 "prompt_ids"}, a text a row.

        The ids begin with <bos>; T5's encoder reads the others before the place.
        """
        if isinstance(self.lm, T5):
            batch = SplitTexts.split([(ids[1:], labels[1:], place - 1)
                                      for ids, labels, place in texts])
        else:
            batch = collate([(ids, labels) for ids, labels, _ in texts])
            del batch["mask"]
        return {name: value.to(device) for name, value in batch.items()}

    def evaluate(self, data):
        """Perplexity of unseen texts beside a unigram model's -> {name: number}.

        For T5 that of each text's second half. perplexity_labels: of words that the world draws
        with known odds, beside the entropy of those odds, which no model can go below.
        """
        ids = self.texts(data)
        texts = [row[:row.index(EOS) + 1] for row in ids.tolist()]
        batch = self.batch_of([(text, text, (1 + len(text)) // 2) for text in texts], ids.device)
        figures = {"perplexity": perplexity(self.lm, **batch),
                   "perplexity_unigram": unigram_perplexity(self.texts(data, "train"),
                                                            batch["ids"], self.config),
                   "perplexity_chance": float(self.config.vocab_size)}
        if hasattr(data.world, "labelled"):
            drawn = [data.world.labelled(random.Random(f"labels/{i}")) for i in range(400)]
            texts = [render([Segment((BOS,)), *(Segment(*part) for part in parts)], data.tokenizer)
                     for parts, _ in drawn]
            first = [[label != IGNORED for label in labels].index(True) for _, labels in texts]
            batch = self.batch_of([(*text, place) for text, place in zip(texts, first)], ids.device)
            entropy = sum(nats for _, nats in drawn) / int((batch["labels"] != IGNORED).sum())
            figures |= {"perplexity_labels": perplexity(self.lm, **batch),
                        "perplexity_labels_entropy": math.exp(entropy)}
        return figures

    @torch.no_grad()
    def samples(self, data, count=6, words=3):
        """An image for people: how the model continues the first tokens of unseen texts."""
        ids = self.texts(data)[:count, :1 + words]
        room = self.config.context_length - ids.shape[1]
        prompts = F.pad(ids[:, 1:], (0, 1), value=EOS) if isinstance(self.lm, T5) else ids
        new = self.lm.generate(prompts, max_new_tokens=min(32, room))
        decode = data.tokenizer.decode
        return sheet("Unseen texts: the first words, then what the model writes.",
                     [(decode(row.tolist()), None, [(None, decode(both.tolist()), None)])
                      for row, both in zip(ids, torch.cat([ids, new], dim=1))])
