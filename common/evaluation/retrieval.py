"""Retrieval and zero-shot classification with any model that has encode_image and encode_text.

encode_image: float (B, 3, H, W), normalized -> unit vectors (B, E), of BLIP-2 (B, Q, E), of which
the one nearest to a text counts. encode_text: int64 (B, T) -> unit vectors (B, E). Figures are
fractions in [0, 1].

Any caption that is true of an image counts as right, so recalls are higher than in the papers.
"""
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from common.data.images import (MEAN, STD, center_crop, normalize_pixels, open_folder, open_image,
                                to_tensor)
from common.evaluation.sheet import sheet
from common.losses import best_cosine, no_autocast
from common.training import options


def encode_records(model, data, records, chunk=256):
    """Unit vectors (N, E) of the images of an EvalData's records."""
    return torch.cat([model.encode_image(normalize_pixels(data.images(records[k:k + chunk])))
                      for k in range(0, len(records), chunk)])


def zero_shot_classifier(model, ids, names, templates, chunk=256):
    """CLIP's zero-shot classifier (paper, 3.1.4): float (E, C), one unit column for each name.

    ids: texts -> int64 (N, T). Prompts are ensembled in embedding space: the mean of a name's unit
    vectors in all templates, normalized again.
    """
    texts = [template.format(name) for name in names for template in templates]
    vectors = torch.cat([model.encode_text(ids(texts[k:k + chunk]))
                         for k in range(0, len(texts), chunk)])       # (C * templates, E)
    return F.normalize(vectors.view(len(names), len(templates), -1).mean(dim=1), dim=-1).T


# ------------------------------------------------------------------ figures

def accuracy(scores, labels):
    """The fraction of rows with the largest score at the label: (N, C), labels int64 (N,)."""
    return (scores.argmax(dim=1) == labels).float().mean().item()


def recalls(scores, is_right, ks=(1, 5, 10)):
    """{k: the fraction of queries with a right item among their k best}; scores float (Q, N).

    is_right(query, item) -> bool judges the k best alone, so a caption that happens to be true of
    another image counts as right.
    """
    top = scores.topk(min(max(ks), scores.shape[1]), dim=1).indices.tolist()
    first = [next((place for place, item in enumerate(items) if is_right(query, item)), math.inf)
             for query, items in enumerate(top)]
    return {k: sum(place < k for place in first) / len(first) for k in ks}


def rerank(cosines, match, k):
    """Scores for retrieval in two stages (BLIP's released code): float (Q, N) -> float (Q, N).

    The k items of the largest cosine score match logit + cosine, all others -100. match(queries,
    items), two int64 (M,), -> the match logits (M,) of these pairs.
    """
    best = cosines.topk(min(k, cosines.shape[1]), dim=1)
    queries = torch.arange(len(cosines), device=cosines.device)
    queries = queries.repeat_interleave(best.indices.shape[1])        # (Q * k,)
    logits = match(queries, best.indices.flatten()).view(best.indices.shape)
    scores = logits.to(cosines) + best.values                         # (Q, k)
    return torch.full_like(cosines, -100.0).scatter(1, best.indices, scores)


class Pool:
    """The test images of a world with one caption each, and their cosines."""

    def __init__(self, world, records, images, texts):
        """images, texts: unit vectors (N, E) of the records' images and of their first captions."""
        self.world, self.records = world, records
        self.texts = [record["texts"][0] for record in records]
        with no_autocast(images.cpu()):  # in bf16 many cosines would be equal
            self.scores = best_cosine(images.cpu(), texts.cpu())      # (images, texts)

    def is_true(self, text, image):
        """Whether caption number `text` is true of image number `image`."""
        return self.world.is_true(self.texts[text], self.records[image]["source"])

    def recalls(self, image_scores, text_scores, suffix=""):
        """Recall at 1, 5, 10 of scores (images, texts) and (texts, images) -> {name: number}."""
        found = {"image_to_text": recalls(image_scores, lambda i, t: self.is_true(t, i)),
                 "text_to_image": recalls(text_scores, self.is_true)}
        return {f"{name}_recall@{k}{suffix}": value
                for name, by_k in found.items() for k, value in by_k.items()}

    def figures(self, draws=20000):
        """`recalls` of the cosines; beside each its chance, if all queries have equally many right
        items, as counted in all pairs or in so many random ones."""
        figures, count = self.recalls(self.scores, self.scores.T), len(self.records)
        pairs = [divmod(number, count) for number in range(count ** 2)] \
            if count ** 2 <= draws else torch.randint(
                count, (draws, 2), generator=torch.Generator().manual_seed(0)).tolist()
        wrong = count - count * sum(self.is_true(*pair) for pair in pairs) / len(pairs)
        for k in (1, 5, 10):             # missed: one after the other is wrong
            missed = math.prod(max(0.0, wrong - i) / (count - i) for i in range(min(k, count)))
            figures |= {f"{name}_recall@{k}_chance": 1 - missed
                        for name in ("image_to_text", "text_to_image")}
        return figures

    def sheet(self, count=6):
        """Texts with the images found for them; below, images with the texts found for them."""
        images = [record["images"][0] for record in self.records]
        count, answers = min(count, len(images) // 2), min(3, len(images))
        rows = [(self.texts[t], None, [(images[i], "", self.is_true(t, i))
                                       for i in self.scores[:, t].topk(count).indices.tolist()])
                for t in range(count)]
        rows += [("", images[i], [(None, self.texts[t], self.is_true(t, i))
                                  for t in self.scores[i].topk(answers).indices.tolist()])
                 for i in range(count, 2 * count)]
        return sheet(f"Unseen {self.world.name}: a sentence, then the pictures found for it; "
                     "below, a picture, then the sentences found for it.", rows)


def make_pool(model, data):
    """The Pool of an EvalData's test split."""
    records = data.records("test")
    texts = model.encode_text(data.ids([record["texts"][0] for record in records]))
    return Pool(data.world, records, encode_records(model, data, records), texts)


def zero_shot(model, data):
    """Accuracy over the world's classes, if any, and over colour-shape pairs never trained on."""
    world, figures = data.world, {}
    if not world.zero_shot:
        return figures
    classifier = zero_shot_classifier(model, data.ids, world.all_classes, world.templates)
    for name, split, classes in (("zero_shot_accuracy", world.zero_shot, world.classes),
                                 ("composition_accuracy", "composition", world.all_classes)):
        records = [world.record(split, i) for i in range(world.size(split))]
        labels = torch.tensor([world.label(record["source"]) for record in records])
        scores = best_cosine(encode_records(model, data, records), classifier[:, :len(classes)].T)
        figures[name] = accuracy(scores.cpu(), labels)
        figures[f"{name}_chance"] = 1 / len(classes)
    return figures


def evaluate(model, data):
    """Retrieval in both directions, and zero-shot accuracy where the world has classes."""
    return make_pool(model, data).figures() | zero_shot(model, data)


def samples(model, data):
    """An image for people: what the model retrieves for unseen texts and images."""
    return make_pool(model, data).sheet()


# ------------------------------------------------------------------ using a trained model

class Retriever:
    """A model with its tokenizer, for pictures and texts of the user's."""

    def __init__(self, model, tokenizer, *, mean=MEAN, std=STD, resample=3):
        """mean, std, resample: how published weights were shown pictures; 3: bicubic."""
        self.model, self.tokenizer = model.eval(), tokenizer
        self.mean, self.std, self.resample = mean, std, resample

    def pixels(self, pictures):
        """Pillow pictures -> float (N, 3, H, W), normalized."""
        size = self.model.config.image_size
        pixels = to_tensor([center_crop(p, size, self.resample) for p in pictures])
        return normalize_pixels(pixels, self.mean, self.std)

    @torch.no_grad()
    def encode_images(self, pictures):
        """Pillow pictures -> unit vectors (N, E)."""
        return self.model.encode_image(self.pixels(pictures))

    def ids(self, texts):
        """Texts -> int64 (N, T)."""
        return self.tokenizer.batch(texts, self.model.config.context_length)

    @torch.no_grad()
    def classify(self, picture, names, templates=("{}",)):
        """[(name, probability)], the most probable first."""
        classifier = zero_shot_classifier(self.model, self.ids, names, templates)
        p = self.model.class_probabilities(self.encode_images([picture]), classifier)[0]
        return sorted(zip(names, p.tolist()), key=lambda pair: -pair[1])

    @torch.no_grad()
    def search(self, text, pictures, count=12):
        """[(index, score)] of the pictures that fit the text best: by their cosines, of a model
        that matches by `rerank`."""
        features = torch.cat([self.encode_images(pictures[k:k + 256])
                              for k in range(0, len(pictures), 256)])
        ids = self.ids([text])
        scores = best_cosine(features, self.model.encode_text(ids)).T            # (1, N)
        if hasattr(self.model, "itm_head"):

            def match(_, items):         # the match logits (M,) of pictures with the text
                tokens = self.model.vision(self.pixels([pictures[i] for i in items]))
                return self.model.match(tokens, ids.expand(len(items), -1))[:, 1]
            scores = rerank(scores, match, 4 * count)
        best = scores[0].topk(min(count, len(pictures)))
        return list(zip(best.indices.tolist(), best.values.tolist()))


def search_folder(run, retriever, text, folder):
    """Print the pictures of a folder that fit a text best, and draw them in RUN/search.png."""
    paths, pictures = open_folder(folder)
    best = retriever.search(text, pictures)
    for index, score in best:
        print(f"{score:6.3f}  {paths[index]}")
    cells = [(pictures[i], f"{score:.2f} {paths[i].stem}", None) for i, score in best]
    is_run = (Path(run) / "last.pt").exists()        # nothing is written beside published ones
    out = Path(run if is_run and os.access(run, os.W_OK) else ".") / "search.png"
    sheet(f"the best of {len(paths)} pictures for: {text}",
          [("", None, cells[k:k + 6]) for k in range(0, len(cells), 6)]).save(out)
    what = "match logits plus cosines" if hasattr(retriever.model, "itm_head") else \
        "cosines of text and picture, from -1 to 1"
    print(f"the numbers are {what}; only their order counts", file=sys.stderr)
    print(f"drawn in {out}")


def main(description, from_pretrained):
    """The command line of a model that retrieves: classify and search."""
    def classify(run, picture, *names, act=None):
        """print the probability of each NAME for a picture, the most probable first"""
        for name, probability in from_pretrained(run, act).classify(open_image(picture), names):
            print(f"{probability:7.2%}  {name}")

    def search(run, text, folder, *, act=None):
        """print the pictures of a folder that fit a text best, and draw them in RUN/search.png"""
        search_folder(run, from_pretrained(run, act), text, folder)

    return options.run_command(description, classify, search)
