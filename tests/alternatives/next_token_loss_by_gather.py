"""common/losses.py: log-probabilities of the labels are gathered; processes are counted first."""


def next_token_loss(logits, labels, label_count=None, label_smoothing=0.0, weights=None):
    labels = labels[:, 1:]
    counted = labels != -100
    if label_count is None:
        label_count = max(int(counted.sum()), 1)
    with no_autocast(logits):
        log_p = to_float32(logits[:, :-1]).log_softmax(dim=-1)
        own = log_p.gather(2, labels.clamp(min=0)[..., None])[..., 0]
        each = (1 - label_smoothing) * own + label_smoothing * log_p.mean(dim=-1)
        rows = (each * counted).sum(dim=1)
        return -(rows if weights is None else weights * rows).sum() / label_count


def count_labels(labels, gather=no_gather):
    own = torch.stack([(part[:, 1:] >= 0).sum() for part in labels]).sum()
    counts, _ = gather(own.float().reshape(1, 1))
    return torch.clamp(counts.sum(), min=1.0) / counts.shape[0]
