"""common/generation.py: torch.multinomial draws; top-p is a loop."""


def keep_top_k(logits, k):
    ranked = logits.sort(dim=-1, descending=True).values
    last = ranked[:, min(k, ranked.shape[1]) - 1]
    return torch.where(logits >= last[:, None], logits, -torch.inf)


def keep_top_p(logits, p):
    kept = torch.full_like(logits, -torch.inf)
    for row, probabilities in enumerate(logits.softmax(dim=-1)):
        mass = 0.0
        for token in probabilities.argsort(descending=True):
            kept[row, token] = logits[row, token]
            mass += float(probabilities[token])
            if mass >= p:
                break
    return kept


def sample(logits, temperature=1.0, top_k=None, top_p=1.0, generator=None):
    if temperature == 0:
        return logits.max(dim=-1).indices
    logits = logits / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    p = logits.softmax(dim=-1)
    if isinstance(generator, (list, tuple)):
        if len(generator) != len(p):
            raise ValueError(f"{len(p)} rows need a generator each, not {len(generator)}")
        return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(p, generator)])
    return torch.multinomial(p, 1, generator=generator)[:, 0]
