"""common/generation.py: all logits are computed, padding moves row by row, stops are a loop."""


def pad_left(prompt, mask):
    if mask is None or mask.all():
        return prompt, None
    new, real = prompt.clone(), mask.clone()
    for row, keep in enumerate(mask):
        new[row] = torch.cat([prompt[row][~keep], prompt[row][keep]])
        real[row] = torch.cat([keep[~keep], keep[keep]])
    return new, real


class DecodingState:
    def feed(self, x):
        self.length += x.shape[1]
        mask = None if self.mask is None else self.mask[:, :self.length]
        logits = self.model(x, mask=mask, cache=self.cache, **self.state)
        self.logits = to_float32(logits[:, -1])
        if self.token_seen is not None:
            self.token_seen = self.token_seen.clone()
            for row, tokens in enumerate(x.tolist()):
                self.token_seen[row, tokens] = True


def tokens_in(prompt, mask, V):
    seen = torch.zeros(len(prompt), V, dtype=torch.bool, device=prompt.device)
    if not prompt.is_floating_point():
        for row, tokens in enumerate(prompt.tolist()):
            for place, token in enumerate(tokens):
                if 0 <= token < V and (mask is None or mask[row, place]):
                    seen[row, token] = True
    return seen


def contains_any(strings, decode, ids, finished):
    found = torch.zeros_like(finished)
    for row in range(len(ids)):
        if not finished[row]:
            text = decode(ids[row].tolist())
            found[row] = any(string in text for string in strings)
    return found
