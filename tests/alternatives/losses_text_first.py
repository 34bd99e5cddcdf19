"""common/losses.py: texts are gathered before images; SigLIP's loss gathers the images."""


def softmax_contrastive(image, text, scale, gather=no_gather):
    (texts, first), (images, _) = gather(text), gather(image)
    positives = slice(first, first + len(image))
    with no_autocast(image):
        wide = [to_float32(x) for x in (image, text, images, texts)]
        rows = (scale * wide[0] @ wide[3].T).log_softmax(dim=1)[:, positives]
        columns = (scale * wide[1] @ wide[2].T).log_softmax(dim=1)[:, positives]
        return -(rows.diagonal().mean() + columns.diagonal().mean()) / 2


def sigmoid_contrastive(image, text, scale, bias, gather=no_gather):
    images, first = gather(image)
    with no_autocast(image):
        logits = scale * to_float32(text) @ to_float32(images).T + bias
        own = torch.zeros_like(logits, dtype=torch.bool)
        own[torch.arange(len(text)), first + torch.arange(len(text))] = True
        return F.softplus(torch.where(own, -logits, logits)).sum() / len(text)
