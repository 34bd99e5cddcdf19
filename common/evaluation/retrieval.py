"""Numbers that say how good a model is. Figures are fractions in [0, 1]."""
import math

import torch


def accuracy(scores, labels):
    """Share of rows whose highest score is at the label. scores (N, C), labels int64 (N,)."""
    return (scores.argmax(dim=1) == labels).float().mean().item()


def recalls(scores, right, ks=(1, 5, 10)):
    """{k: share of queries with a right item among the k best}.

    scores float (Q, N), row a query. right(query, item) -> bool is asked of the k best alone; it is
    how a caption that happens to be true of another picture counts as right.
    """
    top = scores.topk(min(max(ks), scores.shape[1]), dim=1).indices.tolist()
    first = [next((place for place, item in enumerate(items) if right(query, item)), math.inf)
             for query, items in enumerate(top)]
    return {k: sum(place < k for place in first) / len(first) for k in ks}


def retrieval(images, texts, is_true, ks=(1, 5, 10)):
    """Retrieval both ways among N pairs, by the names of result.json.

    images, texts: unit vectors (N, E). is_true(text, image) -> bool over their indices.
    """
    scores = images @ texts.T
    there = recalls(scores, lambda image, text: is_true(text, image), ks)
    back = recalls(scores.T, is_true, ks)
    return ({f"image_to_text_recall@{k}": v for k, v in there.items()}
            | {f"text_to_image_recall@{k}": v for k, v in back.items()})


def chance(is_true, count, draws=20000):
    """How often a random pair of `count` items is right: recall@1 of guessing."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(count, (draws, 2), generator=generator).tolist()
    return sum(is_true(text, image) for text, image in pairs) / draws


def logistic_regression(features, labels, classes, l2, steps=100):
    """Multinomial logistic regression by L-BFGS, as CLIP's linear probe (A.3).

    features float (N, D), labels int64 (N,), l2: strength of the squared penalty on the weights.
    Returns predict(features (M, D)) -> scores (M, classes). Features are standardised inside.
    """
    mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    x = (features - mean) / std
    weight = x.new_zeros(x.shape[1], classes).requires_grad_()
    bias = x.new_zeros(classes).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        fit = torch.nn.functional.cross_entropy(x @ weight + bias, labels)
        loss = fit + l2 * weight.square().sum() / 2
        loss.backward()
        return loss
    optimizer.step(closure)
    return lambda other: ((other - mean) / std @ weight + bias).detach()
