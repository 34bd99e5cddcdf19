"""Writing: one `generate` for every model, and `rank` for answers that are given.

A model here is a function `model(x, mask=None, cache=None, last=False, **state)` -> logits: x are
ids int64 (B, T) or embeddings float (B, T, D), the tokens after those in the cache; mask, bool
(B, S), tells real tokens from padding, the cached ones included, or is None; last asks for the
newest token's logits alone, (B, 1, V). state: tensors (B, ...) handed to every call as they are,
such as what cross-attention reads; what changes on the way a model keeps in `cache.state`.

    generate(lm, ids, mask, max_new_tokens=20, stop=(EOS,), temperature=0.7, top_p=0.9)
"""
import functools

import torch

from common.cache import KVCache
from common.transformer import to_float32

# After how many tokens it is asked whether all rows have ended. Asking a GPU makes it wait: there,
# with 8, a few tokens too many are cheaper, and cut off at the end.
CHECK_EVERY = {"cpu": 1}


# ------------------------------------------------------------------ choosing a token

def penalize(scores, token_seen, penalty):
    """Make tokens that occurred less likely (CTRL, 4.1): positive scores / penalty, negative * it.

    scores float (B, V), token_seen bool (B, V) or None.
    """
    if token_seen is None:
        return scores
    return torch.where(token_seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def keep_top_k(logits, k):
    """logits (B, V) with -inf below each row's k-th largest; ties with it stay, k may exceed V."""
    least = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits, p):
    """logits (B, V) with -inf outside the smallest set of tokens whose probability reaches p.

    The token that reaches p is kept, so at least one is (Holtzman et al., 2020, 3.1).
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(drop, -torch.inf)


def sample(logits, temperature=1.0, top_k=None, top_p=1.0, generator=None):
    """One token of each row, int64 (B,): temperature first, then top-k, then top-p.

    logits float (B, V). temperature 0: the likeliest. generator: a torch.Generator, or a list of
    one for each row, so that a row's draws do not depend on the rows beside it. Raises ValueError
    for a list of another length.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    logits = logits if top_k is None else keep_top_k(logits, top_k)
    logits = logits if top_p == 1 else keep_top_p(logits, top_p)
    # The largest of p / Exponential(1) is a draw from p, without waiting for the device.
    noise = torch.empty_like(logits)
    if isinstance(generator, (list, tuple)):
        if len(generator) != len(noise):
            raise ValueError(f"{len(generator)} generators for {len(noise)} rows: one each, or one "
                             "for all")
        for row, own in zip(noise, generator):
            row.exponential_(generator=own)
    else:
        noise.exponential_(generator=generator)
    return (logits.softmax(dim=-1) / noise).argmax(dim=-1)


# ------------------------------------------------------------------ prompts

def pad_left(prompt, mask):
    """Move every row's real tokens to the right end, in their order; returns (prompt, mask).

    prompt: ids (B, T) or embeddings (B, T, D); mask bool (B, T). Then the newest position is real
    in every row, whichever side the padding was on. A mask without padding comes back as None.
    """
    if mask is None or bool(mask.all()):
        return prompt, None
    order = mask.int().argsort(dim=1, stable=True)             # padding first, then as they stood
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    return prompt[rows, order], mask[rows, order]


def check(prompt, mask, max_new_tokens, context_length, more="new ones"):
    """Raise ValueError for a prompt that cannot be gone on from, by so many tokens."""
    if prompt.dim() != (3 if prompt.is_floating_point() else 2):
        raise ValueError(f"a prompt of shape {tuple(prompt.shape)}: ids are (B, T), embeddings "
                         "(B, T, D)")
    if prompt.shape[1] == 0:
        raise ValueError("an empty prompt: begin with <bos>")
    longest = prompt.shape[1]
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != prompt.shape[:2]:
            raise ValueError(f"a mask of {mask.dtype} {tuple(mask.shape)} for a prompt of "
                             f"{tuple(prompt.shape[:2])}: it must be bool, one for each token")
        if not mask.any(dim=1).all():
            raise ValueError("a prompt without a real token")
        longest = int(mask.sum(dim=1).max())
    if context_length is not None and longest + max_new_tokens > context_length:
        raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} {more} are "
                         f"{longest + max_new_tokens}, but the context is {context_length}")


def check_options(max_new_tokens, num_beams, early_stopping, pad_id, temperature, top_k, top_p,
                  repetition_penalty):
    """Raise ValueError for what no generation can do."""
    for name, value, least in (("temperature", temperature, 0), ("top_k", top_k, 1),
                               ("max_new_tokens", max_new_tokens, 1), ("num_beams", num_beams, 1), ("pad_id", pad_id, 0)):
        if value is not None and not value >= least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be in (0, 1]")
    if not repetition_penalty > 0:
        raise ValueError(f"repetition_penalty={repetition_penalty}: must be more than 0")
    if temperature == 0 and (top_k is not None or top_p < 1):
        raise ValueError(f"top_k={top_k}, top_p={top_p}: they are of draws; at temperature=0 "
                         "nothing is drawn")
    if early_stopping not in (True, False):
        raise ValueError(f"early_stopping={early_stopping}: must be True or False")
    if num_beams > 1 and temperature > 0:
        raise ValueError(f"num_beams={num_beams} search, temperature={temperature} draws: choose one")


def without_gradients(function):
    """Run a function in inference mode; what it returns may be trained on all the same."""
    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch.inference_mode():
            result = function(*args, **kwargs)
        return result.clone()
    return run


class DecodingState:
    """A prompt being continued: the model's cache and the mask that grows with it."""

    def __init__(self, model, prompt, mask, max_new_tokens, state):
        self.model, self.state, self.cache, self.mask = model, state, KVCache(), mask
        if mask is not None:             # new tokens are always real
            self.mask = torch.cat([mask, mask.new_ones(len(mask), max_new_tokens)], dim=1)
        self.length = 0
        self.feed(prompt)

    def feed(self, x):
        """Feed the next tokens x; self.logits (B, V) of what follows, in float32 or wider."""
        self.length += x.shape[1]
        mask = None if self.mask is None else self.mask[:, :self.length]
        logits = self.model(x, mask=mask, cache=self.cache, last=True, **self.state)[:, -1]
        self.logits = to_float32(logits)

    def repeat(self, times):
        """Every row `times` times in a row, for beams."""
        rows = torch.arange(len(self.logits), device=self.logits.device).repeat_interleave(times)
        self.cache.reorder(rows)
        self.logits = self.logits[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        self.state = {name: value[rows] for name, value in self.state.items()}


def tokens_seen(prompt, mask, logits):
    """bool (B, V), as logits: the tokens that occur in the prompt; none when it is embeddings.

    Padding does not count, nor an id outside the vocabulary, which stands for a picture.
    """
    token_seen = torch.zeros_like(logits, dtype=torch.bool)
    if prompt.is_floating_point():
        return token_seen
    real = (prompt >= 0) & (prompt < logits.shape[1])
    real = real if mask is None else real & mask
    counts = torch.zeros(token_seen.shape, dtype=torch.int32, device=prompt.device)
    return counts.scatter_add_(1, prompt.clamp(0, logits.shape[1] - 1), real.int()) > 0


# ------------------------------------------------------------------ generate

@without_gradients
def generate(model, prompt, mask=None, *, max_new_tokens=32, stop=(), pad_id=0, context_length=None, num_beams=1,
             length_penalty=1.0, early_stopping=False, temperature=0.0, top_k=None, top_p=1.0,
             repetition_penalty=1.0, generator=None, stop_strings=(), decode=None, state=None):
    """Continue each row of a prompt -> the new ids alone, int64 (B, N), N <= tokens.

    prompt: ids int64 (B, T) or embeddings float (B, T, D); mask: bool (B, T), True at real tokens,
    padding on either side; None when there is none. A row ends with its first id of `stop`, or
    when its text, decode(ids), holds one of `stop_strings`, which stays in it; `pad` follows.
    temperature 0 takes the likeliest token; else `sample` draws. beams > 1: `Beams`. Every row is
    what it would be alone (for draws: with a generator each). state: tensors (B, ...) for every
    call of the model. Raises ValueError for options that contradict each other or exceed `context`.
    """
    choice = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    check_options(max_new_tokens, num_beams, early_stopping, pad_id, **choice, repetition_penalty=repetition_penalty)
    check(prompt, mask, max_new_tokens, context_length)
    prompt, mask = pad_left(prompt, mask)
    stop = (stop,) if isinstance(stop, int) else stop
    stop_strings = (stop_strings,) if isinstance(stop_strings, str) else stop_strings
    if stop_strings and (decode is None or num_beams > 1):
        raise ValueError("stop_strings need decode, and num_beams=1")
    decoding = DecodingState(model, prompt, mask, max_new_tokens, state or {})
    token_seen = tokens_seen(prompt, mask, decoding.logits) if repetition_penalty != 1 else None
    stop = torch.tensor(list(stop), dtype=torch.int64, device=prompt.device)
    if num_beams > 1:
        from common.beam_search import Beams  # it needs this file
        return Beams(decoding, num_beams, max_new_tokens, stop, pad_id, length_penalty, early_stopping).search(
            token_seen, repetition_penalty)
    new = torch.full((len(prompt), max_new_tokens), pad_id, device=prompt.device)
    going = torch.ones(len(prompt), dtype=torch.bool, device=prompt.device)
    lengths = going.long()               # of each row's text, its end included
    for n in range(max_new_tokens):
        logits = penalize(decoding.logits, token_seen, repetition_penalty)
        token = torch.where(going, sample(logits, **choice, generator=generator), pad_id)
        new[:, n] = token
        finished = torch.isin(token, stop)
        if stop_strings:
            finished |= holds(stop_strings, decode, new[:, :n + 1], going)
        going &= ~finished
        every = CHECK_EVERY.get(prompt.device.type, 8)
        if n + 1 == max_new_tokens or n % every == every - 1 and not bool(going.any()):
            break
        lengths += going
        token_seen = None if token_seen is None else token_seen.scatter(1, token[:, None], True)
        decoding.feed(token[:, None])
    return new[:, :int(lengths.max())]


def holds(strings, decode, ids, open_rows):
    """bool (B,): the open rows of ids (B, N) whose text holds one of the strings."""
    found = [is_open and any(s in decode(row) for s in strings)
             for row, is_open in zip(ids.tolist(), open_rows.tolist())]
    return torch.tensor(found, device=ids.device)


# ------------------------------------------------------------------ ranking

@without_gradients
def score_candidates(model, prompt, candidates, mask=None, *, mean=False, context_length=None, rows=256, state=None):
    """log p(candidate | prompt) of every candidate, float (B, C), in nats.

    prompt, mask, state: as for `generate`. candidates int64 (C, L), the same for every prompt, or
    (B, C, L): ids padded right with -100; an end token counts if it is given. mean: the mean over
    the candidate's tokens instead of their sum. The prompt is read once for all its candidates,
    which follow `rows` at a time. Raises ValueError for a candidate without a token, or too long.
    """
    if candidates.dim() not in (2, 3) or candidates.dim() == 3 and len(candidates) != len(prompt):
        raise ValueError(f"candidates of shape {tuple(candidates.shape)} for {len(prompt)} prompts:"
                         " (C, L) for all, or (B, C, L)")
    real = candidates >= 0
    if not real.any(dim=-1).all():
        raise ValueError("a candidate without a token")
    if (real[..., 1:] & ~real[..., :-1]).any():
        raise ValueError("a candidate with padding before a token: it belongs on the right")
    check(prompt, mask, candidates.shape[-1], context_length, "of a candidate")
    prompt, mask = pad_left(prompt, mask)
    candidates = candidates.expand(len(prompt), *candidates.shape[-2:])
    B, C, L = candidates.shape
    read = DecodingState(model, prompt, mask, L, state or {})
    first = read.logits.log_softmax(dim=-1)                           # (B, V)
    flat, owner = candidates.reshape(B * C, L), torch.arange(B, device=prompt.device)
    owner, scores = owner.repeat_interleave(C), []
    for part, own in zip(flat.split(rows), owner.split(rows)):
        logs = [first[own].gather(1, part[:, :1].clamp(min=0))]
        if L > 1:
            logs.append(follow(read, part, own))
        logs = torch.cat(logs, dim=1).masked_fill(part < 0, 0)        # (rows, L)
        scores.append(logs.sum(dim=1) / ((part >= 0).sum(dim=1) if mean else 1))
    return torch.cat(scores).view(B, C)


def follow(read, part, own):
    """log p of every token but the first: part int64 (R, L), own (R,) its prompts -> (R, L - 1)."""
    mask = None if read.mask is None else read.mask[own, :read.length + part.shape[1] - 1]
    logits = read.model(part[:, :-1].clamp(min=0), mask=mask, cache=read.cache.select(own),
                        **{name: value[own] for name, value in read.state.items()})
    return to_float32(logits).log_softmax(dim=-1).gather(2, part[:, 1:, None].clamp(min=0))[..., 0]
