"""common/masks.py: triangles, positions of images, one-hot images."""


def causal(T, past=0, device=None):
    return torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)


def prefix(T, length, past=0, device=None):
    mask = causal(T, past, device)
    if not isinstance(length, torch.Tensor):
        mask[:, :length] = True
        return mask
    rows = [prefix(T, int(n), past, device) for n in length]
    return torch.stack(rows)[:, None]


def image_index(is_image, before=0, attend_next=None):
    rows = []
    for b, row in enumerate(is_image.tolist()):
        count = int(before[b]) if isinstance(before, torch.Tensor) else before
        latest = [count := count + image for image in row]
        if attend_next is not None and attend_next[b]:
            latest = [n if image else (n + 1) * (n < count) for n, image in zip(latest, row)]
        rows.append(latest)
    return torch.tensor(rows, device=is_image.device)


def media(image_index, N, Q, only_latest_image=True):
    one_hot = torch.nn.functional.one_hot(image_index, max(N, int(image_index.max())) + 1)
    if not only_latest_image:
        one_hot = one_hot.flip(-1).cumsum(-1).flip(-1)
    images = one_hot[..., 1:N + 1].bool()
    return images[..., None].expand(*images.shape, Q).flatten(2)[:, None]
