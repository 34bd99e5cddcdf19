"""common/generation.py: each candidate goes through the model behind its whole prompt."""


@torch.no_grad()
def score_candidates(model, prompt, candidates, mask=None, *, mean=False, context_length=None,
                     rows=256, state=None):
    if candidates.dim() == 2:
        candidates = candidates.expand(len(prompt), *candidates.shape)
    if candidates.dim() != 3 or len(candidates) != len(prompt):
        raise ValueError(f"{tuple(candidates.shape)} candidates for {len(prompt)} prompts")
    real = candidates >= 0
    if not real[..., 0].all():
        raise ValueError("a candidate without a token, or with padding before it")
    if (real[..., 1:] & ~real[..., :-1]).any():
        raise ValueError("padding before a token of a candidate")
    check_prompt(prompt, mask, candidates.shape[-1], context_length, "of a candidate")
    scores = torch.zeros(candidates.shape[:2])
    for b, options in enumerate(candidates):
        keep = slice(None) if mask is None else mask[b]
        own = {name: value[b:b + 1] for name, value in (state or {}).items()}
        for c, ids in enumerate(options):
            ids, text = ids[ids >= 0], prompt[b][keep]
            if prompt.is_floating_point():
                written = DecodingState(model, text[None], None, len(ids), own)
                log_p = []
                for token in ids:
                    log_p.append(written.logits[0].log_softmax(dim=-1)[token])
                    written.feed(token.view(1, 1))
            else:
                logits = model(torch.cat([text, ids])[None], **own)
                logits = to_float32(logits)[0, len(text) - 1:-1].log_softmax(dim=-1)
                log_p = [row[token] for row, token in zip(logits, ids)]
            scores[b, c] = sum(log_p) / (len(ids) if mean else 1)
    return scores.to(prompt.device)
