"""Losses as pure functions of tensors. What processes share comes in as the argument `gather`.

Every loss is computed in float32 (float64 stays float64) and outside autocast: near a scale of
100, neighbouring bfloat16 logits are 0.5 apart.
"""
import contextlib

import torch
import torch.nn.functional as F

from common.transformer import to_float32


def no_gather(x):
    """The gather of a single process: all features there are, (B, D), and its first row, 0."""
    return x, 0


def no_autocast(x):
    """A context without autocast on the device of x."""
    device = x.device.type
    has_autocast = torch.amp.is_autocast_available(device)            # "meta" has none
    return torch.autocast(device, enabled=False) if has_autocast else contextlib.nullcontext()


def softmax_contrastive(image, text, scale, gather=no_gather):
    """CLIP's loss (Learning Transferable Visual Models, Figure 3) -> float32 scalar, in nats.

    image, text: float (B, E), rows of norm 1; row i of one belongs to row i of the other.
    scale: the factor of the cosines, exp(t), a scalar tensor or a number.
    gather (training/distributed.py): (B, E) -> ((B_all, E), first): the features of all processes
    with gradients, and the first row of this process. Each process scores its rows against all.
    The mean of the losses over the processes is the loss of the whole batch.
    """
    (images, first), (texts, _) = gather(image), gather(text)         # (B_all, E)
    labels = torch.arange(len(image), device=image.device) + first    # the positives' columns
    with no_autocast(image):
        image_logits = scale * to_float32(image) @ to_float32(texts).T           # (B, B_all)
        text_logits = scale * to_float32(text) @ to_float32(images).T
        return (F.cross_entropy(image_logits, labels) + F.cross_entropy(text_logits, labels)) / 2


def sigmoid_contrastive(image, text, scale, bias, gather=no_gather):
    """SigLIP's loss (Sigmoid Loss for Language Image Pre-Training, Algorithm 1) -> float32 scalar.

    Arguments as in `softmax_contrastive`. bias: added to every logit, -10 at the start. Each of the
    B * B_all pairs is a binary classification; the sum is divided by B, not by the number of pairs.
    """
    texts, first = gather(text)
    labels = torch.arange(len(image), device=image.device) + first
    with no_autocast(image):
        logits = scale * to_float32(image) @ to_float32(texts).T + bias          # (B, B_all)
        sign = 2 * F.one_hot(labels, len(texts)) - 1                  # +1 for positives, else -1
        return -F.logsigmoid(sign * logits).sum() / len(image)


def sample_negatives(scores, own, draws):
    """Hard negatives: another column for each query, with probability softmax(scores) + 1e-4.

    scores float (B, B_all): cosines / temperature (weights as in BLIP's released code). own int64
    (B,): each query's own column, which is never drawn. draws float (B,), uniform in [0, 1) ->
    columns int64 (B,).
    """
    weights = (scores.softmax(dim=1) + 1e-4).scatter(1, own[:, None], 0)
    cumulative = weights.cumsum(dim=1)                                # (B, B_all)
    # Inverse transform: the first column whose cumulative weight exceeds draws * the whole weight.
    # Rounding must not lead past the last column that has a weight, hence the clamp.
    threshold = draws.clamp(max=1 - 1e-6)[:, None] * cumulative[:, -1:]
    return (cumulative <= threshold).sum(dim=1)


def best_cosine(images, texts):
    """Cosines (N, M) of unit vectors images (N, E) and texts (M, E).

    Images with Q vectors each, (N, Q, E): the largest of the Q cosines (BLIP-2, 3.2).
    """
    scores = images @ texts.T
    return scores if scores.dim() == 2 else scores.amax(dim=1)        # from (N, Q, M)


def matching(match, image, ids, image_scores, text_scores, draws, gather=no_gather,
             context_length=None, pad_id=0):
    """Image-text matching with hard negatives (ALBEF, 3.2) -> float32 scalar, in nats.

    match: image tokens, ids -> logits (B, 2), class 1: they are a pair. image (B, S, D) and ids
    (B, T) are pairs; scores (B, B_all): logits of each image with all texts and of each text with
    all images; draws (B, 2), uniform. The batch has B pairs, B images with a sampled text and B
    texts with a sampled image: labels 1, 0, 0.
    """
    B = len(ids)
    images, first = gather(image)                                     # (B_all, S, D), with gradient
    if len(images) > B:                  # texts of other processes have other lengths
        ids = F.pad(ids, (0, context_length - ids.shape[1]), value=pad_id)
    texts, _ = gather(ids)                                            # (B_all, T)
    own = torch.arange(B, device=ids.device) + first
    text_index = sample_negatives(image_scores, own, draws[:, 0])
    image_index = sample_negatives(text_scores, own, draws[:, 1])
    logits = match(torch.cat([image, image, images[image_index]]),
                   torch.cat([ids, texts[text_index], ids]))          # (3 * B, 2)
    labels = torch.arange(3 * B, device=ids.device) < B
    with no_autocast(logits):
        return F.cross_entropy(to_float32(logits), labels.long())


def next_token_loss(logits, labels, label_count=None, label_smoothing=0.0, weights=None):
    """Cross-entropy of each next token -> float32 scalar; the one place where labels are shifted.

    logits float (B, T, V). labels int64 (B, T), aligned with the inputs: labels[:, t] is the token
    at t, predicted from the logits at t - 1; -100 is ignored. label_count: what the sum is divided
    by, from `count_labels`; None: the labels of this batch. weights: float (B,), factors of the
    rows' sums. A batch without labels gives 0 and zero gradients. No tensor's shape depends on the
    labels (torch.compile).
    """
    logits, labels = logits[:, :-1], labels[:, 1:]
    if label_count is None:
        label_count = (labels != -100).sum().clamp(min=1)
    with no_autocast(logits):
        loss = F.cross_entropy(to_float32(logits).flatten(0, 1), labels.flatten(),
                               ignore_index=-100, label_smoothing=label_smoothing,
                               reduction="sum" if weights is None else "none")
        if weights is not None:
            loss = weights @ loss.view(labels.shape).sum(dim=1)
        return loss / label_count


def count_labels(labels, gather=no_gather):
    """The labels of a whole step, at least 1, divided by the number of processes -> float32 scalar.

    labels: a list of int64 (B, T), one for each micro-batch of this process; a row's first label
    and -100 do not count. gather: here of this process's count, (1, 1). Losses divided by it,
    summed over the micro-batches and averaged over the processes (as DDP averages gradients), give
    every token of the step the same weight.
    """
    own = sum((part[:, 1:] != -100).sum() for part in labels)
    counts, _ = gather(own.float().view(1, 1))                        # (processes, 1)
    return counts.sum().clamp(min=1) / len(counts)
