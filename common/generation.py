"""Generation: `generate` for every model that writes, and `score_candidates` for given answers.

A model is a function model(x, mask=None, cache=None, last=False, **state) -> logits (B, T, V):
  x: ids int64 (B, T) or embeddings float (B, T, D) of the tokens after those in the cache
  mask: bool (B, S), True at real tokens, the cached ones included; None where there is no padding
  last: only the newest token's logits, (B, 1, V)
  state: tensors (B, ...) given to every call unchanged, such as visual tokens. What changes from
         call to call is the model's to keep in cache.state.

    generate(lm, ids, mask, max_new_tokens=20, stop=(EOS,), temperature=0.7, top_p=0.9)
"""
import torch

from common.beam_search import BeamSearch
from common.cache import KVCache
from common.transformer import to_float32


# ------------------------------------------------------------------ sampling

def keep_top_k(logits, k):
    """logits (B, V) with -inf below each row's k-th largest; ties with it stay, k may exceed V."""
    kth = logits.topk(min(k, logits.shape[-1])).values[..., -1:]      # (B, 1)
    return logits.masked_fill(logits < kth, -torch.inf)


def keep_top_p(logits, p):
    """logits (B, V) with -inf outside the smallest set of tokens whose probability reaches p.

    The token that reaches p stays, so at least one does (Holtzman et al., 2020, 3.1).
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities             # mass of the likelier tokens
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(drop, -torch.inf)


def sample(logits, temperature=1.0, top_k=None, top_p=1.0, generator=None):
    """One token for each row, int64 (B,): temperature first, then top-k, then top-p.

    logits float (B, V). temperature 0 takes the likeliest token. generator: a torch.Generator, or a
    list with one for each row, so that a row's draws do not depend on the rows beside it.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    logits = logits if top_k is None else keep_top_k(logits, top_k)
    logits = logits if top_p == 1 else keep_top_p(logits, top_p)
    # argmax of p / Exponential(1) noise is a draw from p, and the CPU need not wait for a GPU.
    noise = torch.empty_like(logits)
    if isinstance(generator, (list, tuple)):
        if len(generator) != len(noise):
            raise ValueError(f"{len(generator)} generators for {len(noise)} rows")
        for row, row_generator in zip(noise, generator):
            row.exponential_(generator=row_generator)
    else:
        noise.exponential_(generator=generator)
    return (logits.softmax(dim=-1) / noise).argmax(dim=-1)


# ------------------------------------------------------------------ prompts and checks

def pad_left(prompt, mask):
    """Move each row's real tokens to its right end -> (prompt, mask), mask None without padding.

    prompt: ids (B, T) or embeddings (B, T, D); mask bool (B, T). Afterwards the newest token is
    real in every row, whichever side the padding was on.
    """
    if mask is None or bool(mask.all()):
        return prompt, None
    order = mask.int().argsort(dim=1, stable=True)     # (B, T): padding first, real tokens in order
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    return prompt[rows, order], mask[rows, order]


def check_prompt(prompt, mask, more, context_length, name="new ones"):
    """Raise ValueError for a prompt without tokens, or too long for the context with `more`."""
    if prompt.dim() != (3 if prompt.is_floating_point() else 2):
        raise ValueError(f"a prompt of shape {tuple(prompt.shape)}: ids are (B, T), embeddings "
                         "(B, T, D)")
    longest = prompt.shape[1]
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != prompt.shape[:2]:
            raise ValueError(f"a mask of {mask.dtype} {tuple(mask.shape)} for a prompt of "
                             f"{tuple(prompt.shape[:2])}: it must be bool, one for each token")
        longest = int(mask.sum(dim=1).max())
    if longest == 0 or mask is not None and not mask.any(dim=1).all():
        raise ValueError("an empty prompt: begin with <bos>")
    if context_length is not None and longest + more > context_length:
        raise ValueError(f"a prompt of {longest} tokens and {more} {name} are {longest + more}, "
                         f"but the context is {context_length}")


def check_options(max_new_tokens, num_beams, early_stopping, pad_id, temperature, top_k, top_p,
                  repetition_penalty):
    """Raise ValueError for options of `generate` that are out of range or contradict each other."""
    for name, value, allowed, valid in (
            ("max_new_tokens", max_new_tokens, "at least 1", max_new_tokens >= 1),
            ("num_beams", num_beams, "at least 1", num_beams >= 1),
            ("early_stopping", early_stopping, "True or False", early_stopping in (True, False)),
            ("pad_id", pad_id, "at least 0", pad_id >= 0),
            ("temperature", temperature, "at least 0", temperature >= 0),
            ("top_k", top_k, "at least 1", top_k is None or top_k >= 1),
            ("top_p", top_p, "in (0, 1]", 0 < top_p <= 1),
            ("repetition_penalty", repetition_penalty, "above 0", repetition_penalty > 0)):
        if not valid:
            raise ValueError(f"{name}={value}: must be {allowed}")
    if temperature == 0 and (top_k is not None or top_p < 1):
        raise ValueError(f"top_k={top_k}, top_p={top_p}: sampling needs a temperature above 0")
    if num_beams > 1 and temperature > 0:
        raise ValueError(f"num_beams={num_beams} searches, temperature={temperature} samples: "
                         "choose one")


# ------------------------------------------------------------------ the state of decoding

class DecodingState:
    """Texts that are being continued: the model's cache, the mask, the tokens that occurred.

    `logits` float (B, V), at least float32: those of the next token of each text.
    """

    def __init__(self, model, prompt, mask, max_new_tokens, state, repetition_penalty=1.0):
        self.model, self.state, self.cache, self.mask = model, state, KVCache(), mask
        if mask is not None:             # new tokens are always real
            self.mask = torch.cat([mask, mask.new_ones(len(mask), max_new_tokens)], dim=1)
        self.length, self.token_seen, self.repetition_penalty = 0, None, repetition_penalty
        self.feed(prompt)
        if repetition_penalty != 1:
            self.token_seen = tokens_in(prompt, mask, self.logits.shape[1])           # bool (B, V)

    def feed(self, x):
        """Give the model the next tokens x, (B, T) or (B, T, D), and keep its logits."""
        self.length += x.shape[1]
        mask = None if self.mask is None else self.mask[:, :self.length]
        logits = self.model(x, mask=mask, cache=self.cache, last=True, **self.state)  # (B, 1, V)
        self.logits = to_float32(logits[:, -1])
        if self.token_seen is not None:
            self.token_seen = self.token_seen.scatter(1, x, True)

    def penalize(self, scores):
        """Apply the repetition penalty to scores (B, V), logits or log-probabilities (CTRL, 4.1).

        Scores of tokens that occurred: positive ones / penalty, negative ones * penalty.
        """
        if self.token_seen is None:
            return scores
        penalty = self.repetition_penalty
        lowered = torch.where(scores > 0, scores / penalty, scores * penalty)
        return torch.where(self.token_seen, lowered, scores)

    def repeat(self, times):
        """Repeat every row `times` times, for beams: rows 0 0 0 1 1 1 ..."""
        rows = torch.arange(len(self.logits), device=self.logits.device).repeat_interleave(times)
        self.reorder(rows)
        self.logits = self.logits[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        self.state = {name: value[rows] for name, value in self.state.items()}

    def reorder(self, rows, since=0):
        """Let each row go on from row rows[i]; they share a prompt when since > 0 (see KVCache)."""
        self.cache.reorder(rows, since)
        self.token_seen = None if self.token_seen is None else self.token_seen[rows]


def tokens_in(prompt, mask, V):
    """bool (B, V): the tokens that occur in the prompt; none for embeddings.

    Padding does not count, nor do ids outside the vocabulary, which stand for images.
    """
    seen = torch.zeros(len(prompt), V, dtype=torch.int32, device=prompt.device)
    if not prompt.is_floating_point():
        counted = (prompt >= 0) & (prompt < V) & (True if mask is None else mask)
        seen.scatter_add_(1, prompt.clamp(0, V - 1), counted.int())
    return seen > 0


# ------------------------------------------------------------------ generate

# Steps between two checks whether all rows are finished. On a GPU a check makes the CPU wait; a few
# extra tokens, cut off at the end, cost less.
CHECK_EVERY = {"cpu": 1, "cuda": 8}


@torch.no_grad()
def generate(model, prompt, mask=None, *, max_new_tokens=32, stop=(), pad_id=0,
             context_length=None, num_beams=1, length_penalty=1.0, early_stopping=False,
             temperature=0.0, top_k=None, top_p=1.0, repetition_penalty=1.0, generator=None,
             stop_strings=(), decode=None, state=None):
    """Continue each row of a prompt -> the new ids only, int64 (B, N), N <= max_new_tokens.

    prompt: ids int64 (B, T) or embeddings float (B, T, D). mask: bool (B, T), True at real tokens,
    with the padding on either side; None without padding. A row ends with its first id of `stop`,
    or when its text decode(ids) contains one of `stop_strings`; both stay in it, and pad_id
    follows; the model is not called any more soon after all rows have ended. temperature 0 takes
    the likeliest token, above 0 `sample` draws; num_beams > 1 is `BeamSearch`. A row's result does
    not depend on the rows beside it (sampling: with a list of generators). state: tensors (B, ...)
    for every call of the model. The tensors that are given never change. Raises ValueError for
    contradictory options and for more tokens than context_length.
    """
    check_options(max_new_tokens, num_beams, early_stopping, pad_id, temperature, top_k, top_p,
                  repetition_penalty)
    check_prompt(prompt, mask, max_new_tokens, context_length)
    stop_strings = (stop_strings,) if isinstance(stop_strings, str) else stop_strings
    if stop_strings and (decode is None or num_beams > 1):
        raise ValueError("stop_strings need decode, and num_beams=1")
    B, device = len(prompt), prompt.device
    stop = torch.tensor([stop] if isinstance(stop, int) else list(stop), dtype=torch.int64,
                        device=device)
    prompt, mask = pad_left(prompt, mask)
    decoding = DecodingState(model, prompt, mask, max_new_tokens, state or {}, repetition_penalty)
    if num_beams > 1:
        return BeamSearch(decoding, num_beams, max_new_tokens, stop, pad_id, length_penalty,
                          early_stopping).search()

    new = torch.full((B, max_new_tokens), pad_id, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    lengths = torch.zeros(B, dtype=torch.int64, device=device)        # the ends included
    check_every = CHECK_EVERY.get(device.type, 8)
    for n in range(max_new_tokens):
        token = sample(decoding.penalize(decoding.logits), temperature, top_k, top_p, generator)
        new[:, n] = token = token.masked_fill(finished, pad_id)       # (B,)
        lengths += ~finished
        ends = torch.isin(token, stop)
        if stop_strings:
            ends |= contains_any(stop_strings, decode, new[:, :n + 1], finished)
        finished |= ends
        if n + 1 == max_new_tokens or (n + 1) % check_every == 0 and bool(finished.all()):
            break
        decoding.feed(token[:, None])
    return new[:, :int(lengths.max())]


@torch.no_grad()
def stream(model, prompt, *, max_new_tokens=32, stop=(), context_length=None, state=None,
           **options):
    """Yield the new ids of one prompt, as they are written: what `generate` would return.

    prompt: ids int64 (1, T) or embeddings (1, T, D) without padding; options: those of `sample`. An
    id of `stop` is the last one. Raises ValueError for more tokens than context_length; an answer
    that reaches the context ends there.
    """
    check_prompt(prompt, None, 1, context_length)
    if context_length is not None:
        max_new_tokens = min(max_new_tokens, context_length - prompt.shape[1])
    decoding = DecodingState(model, prompt, None, max_new_tokens, state or {})
    for n in range(max_new_tokens):
        token = sample(decoding.logits, **{"temperature": 0.0} | options)        # (1,)
        yield int(token)
        if int(token) in stop or n + 1 == max_new_tokens:
            return
        decoding.feed(token[:, None])


def contains_any(strings, decode, ids, finished):
    """bool (B,): which unfinished rows of ids (B, N) decode to a text with one of the strings."""
    found = [not done and any(s in decode(row) for s in strings)
             for row, done in zip(ids.tolist(), finished.tolist())]
    return torch.tensor(found, device=ids.device)


# ------------------------------------------------------------------ score_candidates

@torch.no_grad()
def score_candidates(model, prompt, candidates, mask=None, *, mean=False, context_length=None,
                     rows=256, state=None):
    """log p(candidate | prompt) of every candidate, float (B, C), in nats.

    prompt, mask, state: as for `generate`. candidates: ids int64 (C, L), the same for every prompt,
    or (B, C, L), padded right with -100; an end token counts if it is given. mean: the mean over a
    candidate's tokens, not their sum. The prompt goes through the model once, then its candidates,
    `rows` at a time. Raises ValueError for candidates of another shape, with the shape and B, for
    one without a token or with padding before a token, and for more tokens than context_length.
    """
    if candidates.dim() not in (2, 3) or candidates.dim() == 3 and len(candidates) != len(prompt):
        raise ValueError(f"candidates of shape {tuple(candidates.shape)} for {len(prompt)} prompts:"
                         " (C, L) for all, or (B, C, L)")
    real = candidates >= 0
    if not real.any(dim=-1).all():
        raise ValueError("a candidate without a token")
    if (real[..., 1:] & ~real[..., :-1]).any():
        raise ValueError("a candidate with padding before a token: it belongs on the right")
    check_prompt(prompt, mask, candidates.shape[-1], context_length, "of a candidate")
    prompt, mask = pad_left(prompt, mask)
    candidates = candidates.expand(len(prompt), *candidates.shape[-2:])
    B, C, L = candidates.shape
    decoding = DecodingState(model, prompt, mask, L, state or {})
    first = decoding.logits.log_softmax(dim=-1)                       # (B, V): of the first token
    prompt_of = torch.arange(B, device=prompt.device).repeat_interleave(C)            # (B * C,)
    scores = []
    for ids, of in zip(candidates.reshape(B * C, L).split(rows), prompt_of.split(rows)):
        log_p = first[of].gather(1, ids[:, :1].clamp(min=0))          # (R, 1)
        if L > 1:
            log_p = torch.cat([log_p, later_log_p(decoding, ids, of)], dim=1)         # (R, L)
        log_p = log_p.masked_fill(ids < 0, 0).sum(dim=1)              # (R,)
        scores.append(log_p / (ids >= 0).sum(dim=1) if mean else log_p)
    return torch.cat(scores).view(B, C)


def later_log_p(decoding, ids, of):
    """log p of all tokens but the first -> (R, L - 1); ids (R, L) follow the prompts of, (R,)."""
    mask = None if decoding.mask is None else decoding.mask[of, :decoding.length + ids.shape[1] - 1]
    logits = decoding.model(ids[:, :-1].clamp(min=0), mask=mask, cache=decoding.cache.select(of),
                            **{name: value[of] for name, value in decoding.state.items()})
    log_p = to_float32(logits).log_softmax(dim=-1)                    # (R, L - 1, V)
    return log_p.gather(2, ids[:, 1:, None].clamp(min=0))[..., 0]
