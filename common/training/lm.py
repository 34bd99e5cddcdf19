"""The lm stage: a language model in training, and its figures."""
import itertools
import math
import random

import torch
from torch import nn

from common import losses
from common.evaluation.sheet import sheet
from common.data.tokenizer import BOS
from common.language import PRESETS, TRAINS, LanguageModel, perplexity, unpadded  # noqa: F401
from common.losses import next_token_loss
from common.prompts import Segment, collate, render


def unigram(seen, ids, config):
    """Perplexity of ids (N, T) when each token is told by its share of `seen`, plus one each."""
    counts = torch.ones(config.vocab_size, device=seen.device)
    labels = unpadded(seen, config)[:, 1:]
    counts += torch.bincount(labels[labels != -100], minlength=config.vocab_size)
    labels = unpadded(ids, config)[:, 1:]
    return (counts / counts.sum()).log()[labels[labels != -100]].mean().neg().exp().item()


class Pretraining(nn.Module):
    """A language model in training: the mean of -log p(token | all before it), in nats.

    Its weights are named lm.*, as in every model that reads a language model's run.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.lm = config, LanguageModel(config)

    def labels(self, batch):
        """The batch's own labels, or all its ids but the padding."""
        return batch["labels"] if "labels" in batch else unpadded(batch["ids"], self.config)

    def forward(self, batch, gather=losses.no_gather, cached=None):
        """{"ids": int64 (B, T), padded right, "labels" likewise or absent} -> {"lm": scalar}.

        cached: the label count of the whole step, from `accumulate`.
        """
        labels = self.labels(batch)
        count = losses.label_count([labels], gather) if cached is None else cached
        return {"lm": next_token_loss(self.lm(batch["ids"]), labels, count=count)}

    def accumulate(self, batches, gather=losses.no_gather):
        """Micro-batches -> for each the number that their summed losses divide by.

        A token weighs the same in whichever micro-batch and process it stands.
        """
        return [losses.label_count(map(self.labels, batches), gather)] * len(batches)

    def after_step(self, step):
        """Nothing to keep in bounds."""

    def texts(self, data, split="test", count=1000):
        """Unseen texts, what the world gives to read or its records' own: int64 (N, T)."""
        if hasattr(data.world, "reading"):
            return data.ids([data.world.reading(random.Random(f"{split} reading/{i}"))
                             for i in range(count)])
        if split == "train":
            return data.ids(list(itertools.islice(data.world.corpus(), count)))
        return data.ids([record["texts"][0] for record in data.records(split)])

    def evaluate(self, data):
        """Perplexity of unseen texts of a data.View beside what knows less and what knows all.

        unigram: tokens told by how often they occur alone, as counted in as many training texts.
        labels: of words that the world draws by known odds, with the corpus's own entropy.
        """
        ids = self.texts(data)
        figures = {"perplexity": perplexity(self.lm, ids),
                   "perplexity_unigram": unigram(self.texts(data, "train"), ids, self.config),
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

    def samples(self, data, count=6, begun=3):
        """A picture for people: how the model goes on from the first words of unseen texts."""
        ids = self.texts(data)[:count, :1 + begun]
        more = self.lm.generate(ids, max_new_tokens=min(32, self.config.context_length - ids.shape[1]))
        decode = data.tokenizer.decode
        return sheet("Unseen texts: their beginning, then what the model writes.",
                     [(decode(row.tolist()), None, [(None, decode(both.tolist()), None)])
                      for row, both in zip(ids, torch.cat([ids, more], dim=1))])
