"""common/prompts.py: padding by lists; the labels of padded ids by a loop from the end."""


def merge_texts(segments):
    merged = []
    for segment in segments:
        if merged and isinstance(segment.content, str) and isinstance(merged[-1].content, str) \
                and merged[-1].learn is segment.learn:
            segment = Segment(merged.pop().content + segment.content, segment.learn)
        merged.append(segment)
    return merged


def collate(rows, pad_id=PAD, side="right"):
    if not rows:
        raise ValueError("no rows")
    T = max(len(ids) for ids, _ in rows)
    columns = {"ids": [], "labels": [], "mask": []}
    for ids, labels in rows:
        if len(ids) == 0 or len(ids) != len(labels):
            raise ValueError(f"{len(ids)} ids, {len(labels)} labels in row {len(columns['ids'])}")
        empty = T - len(ids)
        labels = [IGNORED, *labels[1:]] if side == "left" and empty else list(labels)
        for name, row, pad in (("ids", list(ids), pad_id), ("labels", labels, IGNORED),
                               ("mask", [True] * len(ids), False)):
            pads = [pad] * empty
            columns[name].append(pads + row if side == "left" else row + pads)
    return {name: torch.tensor(value) for name, value in columns.items()}


def labels_of(ids, config):
    labels = ids.clone()
    for row in labels:
        end = len(row)
        while end and row[end - 1] == config.pad_id:
            end -= 1
        row[end + (config.pad_id == config.eos_id):] = IGNORED
    return labels
