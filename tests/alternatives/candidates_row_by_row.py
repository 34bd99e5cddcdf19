"""common/generation.py: the tokens of a candidate are scored row by row, each with its own cache."""


def later_log_p(decoding, ids, of):
    found = torch.zeros(len(ids), ids.shape[1] - 1)
    for row, (tokens, prompt) in enumerate(zip(ids.clamp(min=0), of.view(-1, 1))):
        mask = None if decoding.mask is None else \
            decoding.mask[prompt, :decoding.length + len(tokens) - 1]
        state = {name: value[prompt] for name, value in decoding.state.items()}
        logits = decoding.model(tokens[None, :-1], mask=mask, cache=decoding.cache.select(prompt),
                                **state)
        for place, token in enumerate(tokens[1:]):
            found[row, place] = to_float32(logits)[0, place].log_softmax(dim=0)[token]
    return found
