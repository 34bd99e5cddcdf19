"""llava.py: rows are joined from pieces of tensors, answer places come from a loop, positions from
the cell's own coordinates, and the words are written into the feature rows."""


def merge_image_tokens(rows, images, image_id, *, side="right", context_length=None):
    merged = []
    for number, ((ids, labels), own) in enumerate(zip(rows, images, strict=True)):
        places = [i for i, token in enumerate(ids) if token == image_id]
        if len(places) != len(own):
            raise ValueError(f"{len(own)} images at {len(places)} places in row {number}")
        parts, start = [], 0
        for place, indices in zip([*places, len(ids)], [*own, []]):
            text = slice(start, place)
            parts += [torch.tensor([ids[text], labels[text], [TEXT] * (place - start)]),
                      torch.tensor([[PAD] * len(indices), [IGNORED] * len(indices), indices])]
            start = place + 1
        merged.append(torch.cat([part.long() for part in parts], dim=1)[:, :context_length])
    T, left = max(part.shape[1] for part in merged), side == "left"
    batch = torch.tensor([PAD, IGNORED, TEXT]).view(3, 1, 1).repeat(1, len(merged), T)
    mask = torch.zeros(len(merged), T, dtype=torch.bool)
    for row, part in enumerate(merged):
        empty = T - part.shape[1]
        span = slice(empty, T) if left else slice(0, T - empty)
        batch[:, row, span], mask[row, span] = part, True
        if left and empty:
            batch[1, row, empty] = IGNORED
    return {"ids": batch[0], "labels": batch[1], "feature_index": batch[2], "mask": mask}


def answer_places(labels):
    rows = []
    for row in labels.tolist():
        counted = [i for i, label in enumerate(row) if i and label != IGNORED]
        rows.append(sorted({*counted, *(i - 1 for i in counted)}))
    K = max(1, max(map(len, rows)))
    return torch.tensor([row + [0] * (K - len(row)) for row in rows], device=labels.device)


def grid_positions(grid_size, width, device=None):
    index = torch.arange(grid_size ** 2, device=device)
    frequency = 10000 ** -torch.linspace(0, 1, width // 4 + 1, device=device)[:-1]
    across, down = index % grid_size, index.div(grid_size, rounding_mode="floor")
    angles = torch.stack([across, down])[..., None] * frequency * 16 / grid_size
    both = torch.stack([angles.sin(), angles.cos()], dim=2)           # (2, G * G, 2, D/4)
    return both.permute(1, 0, 2, 3).reshape(len(index), width)


class LLaVA:
    def embed(self, ids, feature_index, features):
        x, is_image = self.lm.embed(ids), feature_index != TEXT
        x = x.masked_fill(is_image[..., None], 0)
        return x.masked_scatter(is_image[..., None], features[feature_index[is_image]].to(x.dtype))
