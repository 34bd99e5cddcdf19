"""Losses as pure functions of tensors; whatever is shared between processes is passed in."""
import torch
import torch.nn.functional as F

from common.transformer import to_float32


def no_gather(x):
    """The gather of a single process: every feature there is, (B, D), and its first row, 0."""
    return x, 0


def softmax_contrastive(image, text, scale, gather=no_gather):
    """CLIP's loss (Learning Transferable Visual Models, Figure 3), in nats.

    image, text: float (B, D), rows of norm 1, row i of one belongs to row i of the other.
    scale: the multiplier of the cosines, exp(t), a scalar tensor or number.
    gather: (B, D) -> ((B_all, D), first), the features of all processes with gradients and the row
    where this process's own begin. Each process scores its rows against all; the mean over the
    processes is the loss of the whole batch, and so are its gradients.
    """
    (images, first), (texts, _) = gather(image), gather(text)
    labels = torch.arange(len(image), device=image.device) + first
    return (F.cross_entropy(scale * image @ texts.T, labels)
            + F.cross_entropy(scale * text @ images.T, labels)) / 2


def sigmoid_contrastive(image, text, scale, bias, gather=no_gather):
    """SigLIP's loss (Sigmoid Loss for Language Image Pre-Training, Algorithm 1), in nats.

    Arguments as for `softmax_contrastive`; bias: added to every logit, starts at -10. Every pair is
    a yes/no question of its own; the sum is divided by B, not by B * B.
    """
    texts, first = gather(text)
    logits = scale * image @ texts.T + bias                           # (B, B_all)
    own = torch.arange(len(image), device=image.device)
    sign = -torch.ones_like(logits)
    sign[own, own + first] = 1
    return -F.logsigmoid(sign * logits).sum() / len(image)


def next_token_loss(logits, labels, smoothing=0.0, count=None):
    """Cross-entropy of each next token; the one place where logits and labels shift.

    logits float (B, T, V). labels int64 (B, T), aligned with the inputs: labels[t] is the token at
    t, predicted from t - 1; -100 is ignored. smoothing: the mass spread over all V tokens.
    count: divide by this instead of the number of labels here (the number over all processes and
    micro-batches divided by how many of them are averaged). Nothing to predict gives 0.
    """
    logits, labels = logits[:, :-1], labels[:, 1:]
    count = (labels != -100).sum().clamp(min=1) if count is None else count
    return F.cross_entropy(to_float32(logits).flatten(0, 1), labels.flatten(), ignore_index=-100,
                           label_smoothing=smoothing, reduction="sum") / count


def label_count(labels, gather=no_gather):
    """The count for `next_token_loss`: what a step predicts, divided by its processes.

    labels: int64 (B, T), one for each micro-batch of this process. Losses divided by it, summed
    over the micro-batches and averaged over the processes, as DDP averages gradients, are the mean
    over the tokens of the whole batch. At least one token is counted.
    """
    own = torch.stack([(part[:, 1:] != -100).sum() for part in labels]).sum()
    counts, _ = gather(own.float().view(1, 1))
    return counts.sum().clamp(min=1) / len(counts)
