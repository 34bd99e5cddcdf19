"""Beam search: the likeliest texts of each row."""
import torch

from common.generation import penalize


class Beams:
    """The K likeliest beginnings of each row, and the K best finished texts so far.

    A finished text scores its log-probability / length ** length_penalty, the length being its new
    tokens, the end included: above 0 long texts gain, below 0 short ones. early_stopping: True
    ends a row as soon as K texts are finished; False when its best beginning, scored at its present
    length, is worse than all of them. At the last token every beginning counts as finished. These are the rules of transformers.
    """

    def __init__(self, decoding, K, max_new_tokens, stop, pad_id, length_penalty, early_stopping):
        B, device = len(decoding.logits), decoding.logits.device
        self.decoding, self.K, self.max_new_tokens, self.stop = decoding, K, max_new_tokens, stop
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        decoding.repeat(K)
        self.prompt = decoding.length     # up to here the beams of a row are alike
        self.ids = torch.full((B, K, max_new_tokens), pad_id, device=device)     # the beginnings
        # All beams begin alike: only the first may be continued, else each text comes K times.
        self.scores = torch.full((B, K), -torch.inf, device=device)
        self.scores[:, 0] = 0
        self.texts, self.finished = self.ids.clone(), torch.full_like(self.scores, -torch.inf)
        self.lengths = torch.zeros(B, K, dtype=torch.int64, device=device)
        self.closed = torch.zeros(B, 1, dtype=torch.bool, device=device)

    def search(self, token_seen=None, repetition_penalty=1.0):
        """The best text of each row, int64 (B, N); token_seen: bool (B, V), for the penalty."""
        token_seen = None if token_seen is None else token_seen.repeat_interleave(self.K, dim=0)
        for n in range(self.max_new_tokens):
            logs = self.decoding.logits.log_softmax(dim=-1)            # (B * K, V)
            logs = penalize(logs, token_seen, repetition_penalty)
            rows, token = self.step(logs.unflatten(0, (-1, self.K)), n)
            if n + 1 == self.max_new_tokens or bool(self.closed.all()):
                break
            self.decoding.cache.reorder(rows, self.prompt)
            token_seen = None if token_seen is None else token_seen[rows].scatter(1, token, True)
            self.decoding.feed(token)
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
        ids = self.ids.gather(1, beam[..., None].expand(B, width, self.max_new_tokens))
        ids[:, :, n] = token
        ends = torch.isin(token, self.stop) | (n + 1 == self.max_new_tokens)
        self.finish(ids, scores.masked_fill(~ends, -torch.inf)[:, :K], n + 1)
        self.scores, kept = scores.masked_fill(ends, -torch.inf).topk(K)
        self.ids = ids.gather(1, kept[..., None].expand(B, K, self.max_new_tokens))
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
        hope = self.scores[:, :1] / length ** self.length_penalty
        worst = self.finished.min(dim=1, keepdim=True).values         # -inf until K are finished
        self.closed |= (hope <= worst) & worst.isfinite()
        if self.early_stopping is True:
            self.closed |= worst.isfinite()
