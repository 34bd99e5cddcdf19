"""Writing: one `generate` for every model, and `rank` for answers that are given.

A model here is a function `model(x, mask=None, cache=None, last=False, **state)` -> logits: x are
ids int64 (B, T) or embeddings float (B, T, D), the tokens after those in the cache; mask, bool
(B, S), tells real tokens from padding, the cached ones included, or is None; last asks for the
newest token's logits alone, (B, 1, V). state: tensors (B, ...) handed to every call as they are,
such as what cross-attention reads; what changes on the way a model keeps in `cache.state`.

    generate(lm, ids, mask, tokens=20, stop=(EOS,), temperature=0.7, top_p=0.9)
"""
import functools

import torch

from common.transformer import KVCache, full

# After how many tokens it is asked whether all rows have ended. Asking a GPU makes it wait: there,
# with 8, a few tokens too many are cheaper, and cut off at the end.
ASKED_EVERY = {"cpu": 1}


# ------------------------------------------------------------------ choosing a token

def penalise(scores, seen, penalty):
    """Make tokens that occurred less likely (CTRL, 4.1): positive scores / penalty, negative * it.

    scores float (B, V), seen bool (B, V) or None.
    """
    if seen is None:
        return scores
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


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


def check(prompt, mask, tokens, context, more="new ones"):
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
    if context is not None and longest + tokens > context:
        raise ValueError(f"a prompt of {longest} tokens and {tokens} {more} are "
                         f"{longest + tokens}, but the context is {context}")


def check_options(tokens, beams, pad, temperature, top_k, top_p, repetition_penalty):
    """Raise ValueError for what no generation can do."""
    for name, value, least in (("temperature", temperature, 0), ("top_k", top_k, 1),
                               ("tokens", tokens, 1), ("beams", beams, 1), ("pad", pad, 0)):
        if value is not None and not value >= least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be in (0, 1]")
    if not repetition_penalty > 0:
        raise ValueError(f"repetition_penalty={repetition_penalty}: must be more than 0")
    if temperature == 0 and (top_k is not None or top_p < 1):
        raise ValueError(f"top_k={top_k}, top_p={top_p}: they are of draws; at temperature=0 "
                         "nothing is drawn")
    if beams > 1 and temperature > 0:
        raise ValueError(f"beams={beams} search, temperature={temperature} draws: choose one")


def without_gradients(function):
    """Run a function in inference mode; what it returns may be trained on all the same."""
    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch.inference_mode():
            result = function(*args, **kwargs)
        return result.clone()
    return run


class Writing:
    """A prompt being continued: the model's cache and the mask that grows with it."""

    def __init__(self, model, prompt, mask, tokens, state):
        self.model, self.state, self.cache, self.mask = model, state, KVCache(), mask
        if mask is not None:             # new tokens are always real
            self.mask = torch.cat([mask, mask.new_ones(len(mask), tokens)], dim=1)
        self.length = 0
        self.read(prompt)

    def read(self, x):
        """Feed the next tokens x; self.logits (B, V) of what follows, in float32 or wider."""
        self.length += x.shape[1]
        mask = None if self.mask is None else self.mask[:, :self.length]
        logits = self.model(x, mask=mask, cache=self.cache, last=True, **self.state)[:, -1]
        self.logits = full(logits)

    def repeat(self, times):
        """Every row `times` times in a row, for beams."""
        rows = torch.arange(len(self.logits), device=self.logits.device).repeat_interleave(times)
        self.cache.reorder(rows)
        self.logits = self.logits[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        self.state = {name: value[rows] for name, value in self.state.items()}


def seen_tokens(prompt, mask, logits):
    """bool (B, V), as logits: the tokens that occur in the prompt; none when it is embeddings.

    Padding does not count, nor an id outside the vocabulary, which stands for a picture.
    """
    seen = torch.zeros_like(logits, dtype=torch.bool)
    if prompt.is_floating_point():
        return seen
    real = (prompt >= 0) & (prompt < logits.shape[1])
    real = real if mask is None else real & mask
    counts = torch.zeros(seen.shape, dtype=torch.int32, device=prompt.device)
    return counts.scatter_add_(1, prompt.clamp(0, logits.shape[1] - 1), real.int()) > 0


# ------------------------------------------------------------------ beam search

class Beams:
    """The K likeliest beginnings of each row, and the K best finished texts so far.

    A finished text scores its log-probability / length ** length_penalty, the length being its new
    tokens, the end included: above 0 long texts gain, below 0 short ones. early_stopping: True
    ends a row as soon as K texts are finished; False when its best beginning, scored at its present
    length, is worse than all of them; "never" scores it at the best length it may still reach. At
    the last token every beginning counts as finished. These are the rules of transformers.
    """

    def __init__(self, writing, K, tokens, stop, pad, length_penalty, early_stopping):
        if early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping={early_stopping}: True, False or 'never'")
        B, device = len(writing.logits), writing.logits.device
        self.writing, self.K, self.tokens, self.stop = writing, K, tokens, stop
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        writing.repeat(K)
        self.prompt = writing.length     # up to here the beams of a row are alike
        self.ids = torch.full((B, K, tokens), pad, device=device)     # the beginnings
        # All beams begin alike: only the first may be continued, else each text comes K times.
        self.scores = torch.full((B, K), -torch.inf, device=device)
        self.scores[:, 0] = 0
        self.texts, self.finished = self.ids.clone(), torch.full_like(self.scores, -torch.inf)
        self.lengths = torch.zeros(B, K, dtype=torch.int64, device=device)
        self.closed = torch.zeros(B, 1, dtype=torch.bool, device=device)

    def search(self, seen=None, repetition_penalty=1.0):
        """The best text of each row, int64 (B, N); seen: bool (B, V), for the penalty."""
        seen = None if seen is None else seen.repeat_interleave(self.K, dim=0)
        for n in range(self.tokens):
            logs = self.writing.logits.log_softmax(dim=-1)            # (B * K, V)
            logs = penalise(logs, seen, repetition_penalty)
            rows, token = self.step(logs.unflatten(0, (-1, self.K)), n)
            if n + 1 == self.tokens or bool(self.closed.all()):
                break
            self.writing.cache.exchange(rows, self.prompt)
            seen = None if seen is None else seen[rows].scatter(1, token, True)
            self.writing.read(token)
        return self.texts[:, 0, :int(self.lengths[:, 0].max())]

    def step(self, logs, n):
        """Token n: the next beginnings and texts from logs (B, K, V) -> (rows, token) to go on.

        rows int64 (B * K,): which row of the cache each beginning continues; token (B * K, 1).
        """
        B, K, V = logs.shape
        # So many that K remain when every beam's likeliest tokens are ends.
        width = min(max(2, 1 + len(self.stop)) * K, K * V)
        scores, place = (self.scores[..., None] + logs).flatten(1).topk(width)       # (B, width)
        beam, token = place // V, place % V
        ids = self.ids.gather(1, beam[..., None].expand(B, width, self.tokens))
        ids[:, :, n] = token
        ends = torch.isin(token, self.stop) | (n + 1 == self.tokens)
        self.finish(ids, scores.masked_fill(~ends, -torch.inf)[:, :K], n + 1)
        self.scores, kept = scores.masked_fill(ends, -torch.inf).topk(K)
        self.ids = ids.gather(1, kept[..., None].expand(B, K, self.tokens))
        self.close(n + 1)
        rows = beam.gather(1, kept) + K * torch.arange(B, device=kept.device)[:, None]
        return rows.flatten(), token.gather(1, kept).view(-1, 1)

    def finish(self, ids, scores, length):
        """Keep the K best texts of those before and now; ids (B, width, N), scores (B, K)."""
        scores = (scores / length ** self.length_penalty).masked_fill(self.closed, -torch.inf)
        scores = torch.cat([self.finished, scores], dim=1)
        texts = torch.cat([self.texts, ids[:, :self.K]], dim=1)
        lengths = torch.cat([self.lengths, torch.full_like(self.lengths, length)], dim=1)
        self.finished, kept = scores.topk(self.K)
        self.lengths = lengths.gather(1, kept)
        self.texts = texts.gather(1, kept[..., None].expand(self.texts.shape))

    def close(self, length):
        """Close the rows whose beginnings can no longer better their K finished texts."""
        longest = self.tokens if self.early_stopping == "never" and self.length_penalty > 0 \
            else length
        hope = self.scores[:, :1] / longest ** self.length_penalty
        worst = self.finished.min(dim=1, keepdim=True).values         # -inf until K are finished
        self.closed |= (hope <= worst) & worst.isfinite()
        if self.early_stopping is True:
            self.closed |= worst.isfinite()


# ------------------------------------------------------------------ generate

@without_gradients
def generate(model, prompt, mask=None, *, tokens=32, stop=(), pad=0, context=None, beams=1,
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
    check_options(tokens, beams, pad, **choice, repetition_penalty=repetition_penalty)
    check(prompt, mask, tokens, context)
    prompt, mask = pad_left(prompt, mask)
    stop = (stop,) if isinstance(stop, int) else stop
    stop_strings = (stop_strings,) if isinstance(stop_strings, str) else stop_strings
    if stop_strings and (decode is None or beams > 1):
        raise ValueError("stop_strings need decode, and beams=1")
    writing = Writing(model, prompt, mask, tokens, state or {})
    seen = seen_tokens(prompt, mask, writing.logits) if repetition_penalty != 1 else None
    stop = torch.tensor(list(stop), dtype=torch.int64, device=prompt.device)
    if beams > 1:
        return Beams(writing, beams, tokens, stop, pad, length_penalty, early_stopping).search(
            seen, repetition_penalty)
    new = torch.full((len(prompt), tokens), pad, device=prompt.device)
    going = torch.ones(len(prompt), dtype=torch.bool, device=prompt.device)
    lengths = going.long()               # of each row's text, its end included
    for n in range(tokens):
        logits = penalise(writing.logits, seen, repetition_penalty)
        token = torch.where(going, sample(logits, **choice, generator=generator), pad)
        new[:, n] = token
        over = torch.isin(token, stop)
        if stop_strings:
            over |= holds(stop_strings, decode, new[:, :n + 1], going)
        going &= ~over
        every = ASKED_EVERY.get(prompt.device.type, 8)
        if n + 1 == tokens or n % every == every - 1 and not bool(going.any()):
            break
        lengths += going
        seen = None if seen is None else seen.scatter(1, token[:, None], True)
        writing.read(token[:, None])
    return new[:, :int(lengths.max())]


def holds(strings, decode, ids, open_rows):
    """bool (B,): the open rows of ids (B, N) whose text holds one of the strings."""
    found = [is_open and any(s in decode(row) for s in strings)
             for row, is_open in zip(ids.tolist(), open_rows.tolist())]
    return torch.tensor(found, device=ids.device)


# ------------------------------------------------------------------ ranking

@without_gradients
def rank(model, prompt, candidates, mask=None, *, mean=False, context=None, rows=256, state=None):
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
    check(prompt, mask, candidates.shape[-1], context, "of a candidate")
    prompt, mask = pad_left(prompt, mask)
    candidates = candidates.expand(len(prompt), *candidates.shape[-2:])
    B, C, L = candidates.shape
    read = Writing(model, prompt, mask, L, state or {})
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
    return full(logits).log_softmax(dim=-1).gather(2, part[:, 1:, None].clamp(min=0))[..., 0]
