"""Beam search: the likeliest continuations of each prompt, several at a time."""
import torch


class BeamSearch:
    """The best texts of each prompt, found by extending its W = num_beams likeliest ones in step.

    Each step extends the W unfinished texts (beams) of a prompt by every token, keeps the W
    likeliest unfinished results as the new beams and adds the finished ones (see `step`) to its W
    best so far.
    A finished text scores log p / length ** length_penalty, where the length counts its new tokens
    and its end: a penalty above 0 favours long texts, below 0 short ones. A prompt is done when it
    has W finished texts and, unless early_stopping, its best beam scores no better at its present
    length than the worst of them. At the last token every beam counts as finished. The search ends
    when every prompt is done. These are the rules of transformers.

    decoding: a DecodingState. stop: int64 (n,), the ids that end a text.
    """

    def __init__(self, decoding, num_beams, max_new_tokens, stop, pad_id, length_penalty,
                 early_stopping):
        B, W, device = len(decoding.logits), num_beams, decoding.logits.device
        self.decoding, self.num_beams, self.max_new_tokens = decoding, num_beams, max_new_tokens
        self.stop, self.length_penalty, self.early_stopping = stop, length_penalty, early_stopping
        decoding.repeat(W)               # every tensor of the model now has B * W rows
        self.ids = torch.full((B, W, max_new_tokens), pad_id, device=device)
        # At first all beams of a prompt are equal: -inf keeps all but one from being continued.
        self.scores = torch.full((B, W), -torch.inf, device=device)   # log p
        self.scores[:, 0] = 0
        self.finished_ids = self.ids.clone()
        self.finished_scores = torch.full((B, W), -torch.inf, device=device)
        self.finished_lengths = torch.zeros(B, W, dtype=torch.int64, device=device)
        self.done = torch.zeros(B, 1, dtype=torch.bool, device=device)

    def search(self):
        """The best finished text of each prompt, int64 (B, N), padded with pad_id."""
        decoding, prompt_length = self.decoding, self.decoding.length
        for n in range(self.max_new_tokens):
            log_p = decoding.penalize(decoding.logits.log_softmax(dim=-1))            # (B * W, V)
            rows, token = self.step(log_p.unflatten(0, (-1, self.num_beams)), n)
            if n + 1 == self.max_new_tokens or bool(self.done.all()):
                break
            decoding.reorder(rows, since=prompt_length)
            decoding.feed(token)
        return self.finished_ids[:, 0, :int(self.finished_lengths[:, 0].max())]

    def step(self, log_p, n):
        """Choose token n of every beam, given log_p (B, W, V) of that token -> (rows, token).

        rows int64 (B * W,): the row of the batch that each new beam continues; token (B * W, 1),
        the likeliest beam of each prompt first. Of the W * V results in order of log p, those that
        end among the first W become finished texts, and the first W that do not end go on. Equal
        ones come in any order.
        """
        B, W, V = log_p.shape
        # Enough candidates for W unfinished ones even if every beam's likeliest tokens are ends.
        count = min(max(2, 1 + len(self.stop)) * W, W * V)
        scores, choice = (self.scores[..., None] + log_p).flatten(1).topk(count)      # (B, count)
        beam, token = choice // V, choice % V
        ids = self.ids.gather(1, beam[..., None].expand(B, count, self.max_new_tokens))
        ids[:, :, n] = token
        ends = torch.isin(token, self.stop) | (n + 1 == self.max_new_tokens)
        self.finish(ids[:, :W], scores.masked_fill(~ends, -torch.inf)[:, :W], n + 1)
        self.scores, kept = scores.masked_fill(ends, -torch.inf).topk(W)              # (B, W)
        self.ids = ids.gather(1, kept[..., None].expand(B, W, self.max_new_tokens))
        self.close(n + 1)
        rows = beam.gather(1, kept) + W * torch.arange(B, device=kept.device)[:, None]
        return rows.flatten(), token.gather(1, kept).view(-1, 1)

    def finish(self, ids, scores, length):
        """Add texts ids (B, W, N) with log p scores (B, W), -inf where unfinished; keep W best."""
        scores = (scores / length ** self.length_penalty).masked_fill(self.done, -torch.inf)
        scores = torch.cat([self.finished_scores, scores], dim=1)     # (B, 2 * W)
        ids = torch.cat([self.finished_ids, ids], dim=1)
        lengths = torch.cat([self.finished_lengths,
                             torch.full_like(self.finished_lengths, length)], dim=1)
        self.finished_scores, kept = scores.topk(self.num_beams)      # (B, W)
        self.finished_lengths = lengths.gather(1, kept)
        self.finished_ids = ids.gather(1, kept[..., None].expand(self.finished_ids.shape))

    def close(self, length):
        """Mark the prompts that are done."""
        worst = self.finished_scores.min(dim=1, keepdim=True).values  # -inf until W are finished
        best_beam = self.scores[:, :1] / length ** self.length_penalty
        self.done |= worst.isfinite() & (self.early_stopping | (best_beam <= worst))
