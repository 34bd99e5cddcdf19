"""Matching: does a text fit an image? For any model with `match` (BLIP, BLIP-2's first stage).

match: image tokens float (B, S, D), ids int64 (B, T) -> logits (B, 2), class 1: they are a pair.
vision: images float (B, 3, H, W) -> image tokens. pixels: records -> such images.
"""
import torch

from common.data.batches import open_world
from common.data.images import normalize_pixels, open_image
from common.data.shapes.captions import HARDNESSES
from common.evaluation import capfilt
from common.evaluation.questions import draw_tasks
from common.evaluation.retrieval import Retriever, rerank, search_folder
from common.evaluation.sheet import sheet
from common.evaluation.writing import Writer
from common.training import options


def image_tokens(model, data, records, chunk=256):
    """The image tokens of an EvalData's records: float (N, S, D)."""
    return torch.cat([model.vision(normalize_pixels(data.images(records[k:k + chunk])))
                      for k in range(0, len(records), chunk)])


def match_scores(model, tokens, ids, chunk=512):
    """The logit of class 1 for each row of image tokens (N, S, D) and ids (N, T) -> (N,)."""
    return torch.cat([model.match(tokens[k:k + chunk], ids[k:k + chunk])[:, 1].float()
                      for k in range(0, len(ids), chunk)])


@torch.no_grad()
def probabilities(model, tokenizer, records, chunk=256):
    """The probability that each record's first text fits its image: float (N,), on the CPU."""
    found = []
    for part in (records[k:k + chunk] for k in range(0, len(records), chunk)):
        pixels = model.pixels(part)                                   # (B, 3, H, W)
        ids = tokenizer.batch([r["texts"][0] for r in part], model.config.context_length)
        logits = model.match(model.vision(pixels), ids.to(pixels.device))        # (B, 2)
        found.append(logits.float().softmax(dim=1)[:, 1].cpu())
    return torch.cat(found)


def reranked(model, data, pool, k=16):
    """A Pool's scores after matching: (images, texts) and (texts, images), both float (N, N)."""
    tokens = image_tokens(model, data, pool.records)
    ids = data.ids(pool.texts)

    def match(images, texts):            # chunks: the tokens of all pairs would fill the memory
        return torch.cat([match_scores(model, tokens[i.to(ids.device)], ids[t.to(ids.device)]).cpu()
                          for i, t in zip(images.split(2048), texts.split(2048))])
    return (rerank(pool.scores, match, k),
            rerank(pool.scores.T, lambda texts, images: match(images, texts), k))


def most_similar(retriever, kept):
    """keep(records) -> bool (N,): of an image's texts the `kept` most similar to it (BLIP-2, 3.4).

    retriever: a retrieval.Retriever. The records of an image, wherever they stand, share it.
    """
    def keep(records):
        images = {id(r["images"][0]): r["images"][0] for r in records}
        features = dict(zip(images, retriever.encode_images(list(images.values()))))
        own = torch.stack([features[id(r["images"][0])] for r in records])       # (N, E)
        with torch.no_grad():
            texts = retriever.model.encode_text(retriever.ids([r["texts"][0] for r in records]))
        scores, best = (own * texts).sum(dim=1).tolist(), {}
        for i in sorted(range(len(records)), key=lambda i: -scores[i]):
            best.setdefault(id(records[i]["images"][0]), {}).setdefault(records[i]["texts"][0], i)
        first = {i for found in best.values() for i in list(found.values())[:kept]}
        return torch.tensor([i in first for i in range(len(records))])
    return keep


def judgement(keeps, truth):
    """Precision and recall of kept texts: two bool (N,) -> (of the kept the true ones, of the true
    ones the kept)."""
    both = float((keeps & truth).sum())
    return both / max(1, int(keeps.sum())), both / max(1, int(truth.sum()))


def filter_figures(model, data, count):
    """Captions of which half are false, in each hardness -> accuracy, precision and recall."""
    figures, world = {}, data.world
    found = {hardness: draw_tasks(world, "noisy", count, hardness=hardness)
             for hardness in HARDNESSES}
    judged = {hardness: (probabilities(model, data.tokenizer, records) > 0.5,
                         torch.tensor([r["truth"] for r in records]))
              for hardness, records in found.items()}
    for name, (keeps, truth) in [("", map(torch.cat, zip(*judged.values()))), *(
            (f"/{hardness}", pair) for hardness, pair in judged.items())]:
        figures[f"itm_accuracy{name}"] = (keeps == truth).float().mean().item()
        figures[f"filter_precision{name}"], figures[f"filter_recall{name}"] = \
            judgement(keeps, truth)
    return figures | {"itm_accuracy_chance": 0.5}


def evaluate(model, data, pool, count=400):
    """Retrieval re-ranked by matching; where the world makes false captions, the filter's figures.

    pool: the retrieval.Pool of the same model.
    """
    figures = pool.recalls(*reranked(model, data, pool), suffix="_reranked")
    return figures | (filter_figures(model, data, count) if "noisy" in data.world.tasks else {})


def samples(model, data, pool, count=6, wrong=2):
    """An image for people: a picture, its caption and the false ones that look most similar, each
    with the probability that they match."""
    tokens, rows = image_tokens(model, data, pool.records[:count]), []
    for i in range(min(count, len(pool.records))):
        order = pool.scores[i].argsort(descending=True).tolist()
        texts = [i] + [t for t in order if not pool.is_true(t, i)][:wrong]
        ids = data.ids([pool.texts[t] for t in texts])
        p = model.match(tokens[i:i + 1].expand(len(ids), -1, -1), ids).softmax(dim=1)[:, 1].tolist()
        rows.append(("", pool.records[i]["images"][0],
                     [(None, f"{q:.0%} {pool.texts[t]}", (q > 0.5) == pool.is_true(t, i))
                      for t, q in zip(texts, p)]))
    return sheet("A picture, its caption and two false ones that look similar, with the "
                 "probability that they match.", rows)


# ------------------------------------------------------------------ commands

def check_losses(path, losses, can, needs):
    """Raise ValueError unless a run with these losses can do one of what a command needs.

    losses, can: lists with commas, such as "itc,itm".
    """
    if not {*needs} & {*can.split(",")}:
        raise ValueError(f"{path}: its losses are {losses}; this needs one with "
                         + " or ".join(needs))


def main(description, open_trained, capfilt_texts=None, open_clip=None):
    """The command line of a model that matches and writes: caption, match, answer, search, and
    with capfilt_texts bootstrap.

    open_trained(run, losses) -> (model, tokenizer) of a run with one of these losses;
    capfilt_texts: see blip.py; open_clip(run) -> a Retriever.
    """
    def caption(run, picture):
        """write a caption of a picture"""
        record, writer = {"images": [open_image(picture)], "texts": [""]}, \
            Writer(*open_trained(run, ("lm",)))
        print(writer.generate([record], **writer.model.caption_options)[0])

    def answer(run, picture, question):
        """answer a question about a picture, with a run that has learned to"""
        turn = {"images": [[open_image(picture)]], "prompt": question, "answer": ""}
        writer = Writer(*open_trained(run, ("vqa",)))
        print(writer.generate([{"turns": [turn]}], **writer.model.answer_options)[0])

    def match(run, picture, *texts):
        """print the probability that each TEXT is true of a picture"""
        model, tokenizer = open_trained(run, ("itm",))
        records = [{"images": [open_image(picture)], "texts": [text]} for text in texts]
        for text, p in zip(texts, probabilities(model, tokenizer, records).tolist()):
            print(f"{p:7.2%}  {text}")

    def search(run, text, folder):
        """print the pictures of a folder that fit a text best, and draw them in RUN/search.png"""
        search_folder(run, Retriever(*open_trained(run, ("itc",))), text, folder)

    def bootstrap(run, filter, out, *, data="shapes", images=None, captions=1, best=0):
        """write new texts for the web pictures of --data to OUT, a .jsonl for train.py --data: RUN
        is a captioner, FILTER the run of a filter; with --best 2 of a CLIP, which keeps the 2 most
        similar texts of a picture and of its --captions (BLIP-2: 10)"""
        captioner = Writer(*open_trained(run, ("lm",)))
        if best:
            keep = most_similar(open_clip(filter), best)
        else:
            judge = open_trained(filter, ("itm",))
            keep = lambda records: probabilities(*judge, records) > 0.5           # noqa: E731
        world = open_world(data, captioner.model.config.image_size, images)
        if not world.has_web:
            raise ValueError(f"--data {data}: no web pairs in it, nothing to bootstrap")
        capfilt.write(capfilt_texts(captioner, keep, world, count=captions), world, out)

    commands = [caption, match, answer, search] + [bootstrap] * bool(capfilt_texts)
    return options.run_command(description, *commands)
