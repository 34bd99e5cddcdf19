"""The KV cache: keys and values that are already computed."""
import torch


def extended(past, new, buffer):
    """past (B, H, P, K) and new (B, H, T, K) in a row, and the buffer they stand in or None.

    To copy all of the past for each new token takes a quarter of a tiny model's step, so the new is
    written behind it where there is room for it. With gradients on it is copied: they need the past.
    """
    if torch.is_grad_enabled():
        return torch.cat([past, new], dim=2), None
    (B, H, P, K), S = past.shape, past.shape[2] + new.shape[2]
    if buffer is None or buffer.shape[2] < S:
        buffer = past.new_empty(B, H, S + 32 + P // 8, K)
        buffer[:, :, :P] = past
    buffer[:, :, P:S] = new
    return buffer[:, :, :S], buffer


class KVCache:
    """Keys and values already computed by each attention layer of one model, for one batch.

    Pass the same object to every call of a model; a new prompt takes a new object. Self-attention
    appends to its entry; cross-attention fills its entry once and reads it from then on.
    """

    def __init__(self):
        self.entries = {}                # attention module -> (k, v), each (B, H, S, K)
        self.buffers = {}                  # the same with room behind, where they are written
        self.length = 0                  # positions seen so far; masks and positions start here
        self.state = {}                  # name -> tensor (B, ...): what else a model remembers

    def append(self, layer, k, v):
        """Add k, v (B, H, T, K) to the layer's entry; returns all of it, (B, H, S, K)."""
        if layer in self.entries:
            buffers = self.buffers.get(layer, (None, None))
            (k, v), self.buffers[layer] = zip(*map(extended, self.entries[layer], (k, v), buffers))
        self.entries[layer] = k, v
        self.length = k.shape[2]
        return k, v

    def get_or_compute(self, layer, length, compute):
        """The layer's entry; compute() -> (k, v) makes it, and anew for another number of keys."""
        if layer not in self.entries or self.entries[layer][0].shape[2] != length:
            self.entries[layer] = compute()
        return self.entries[layer]

    def invalidate(self, layer):
        """Drop the layer's entry: what it reads has changed."""
        self.entries.pop(layer, None)

    def reorder(self, rows, since=0):
        """Keep these batch rows in this order: rows (B',) int64, as beam search chooses them.

        since: the rows are alike before this position, as the beams of one prompt are; without
        gradients only what came later is moved. Then B' = B.
        """
        self.state = {name: value[rows] for name, value in self.state.items()}
        if since and not torch.is_grad_enabled():
            for buffer in (b for pair in self.buffers.values() for b in pair if b is not None):
                buffer[:, :, since:self.length] = buffer[rows, :, since:self.length]
            return
        for layer, entry in self.entries.items():
            buffers = [None if buffer is None else buffer[rows]
                       for buffer in self.buffers.get(layer, (None, None))]
            self.entries[layer] = tuple(x[rows] if buffer is None else buffer[:, :, :x.shape[2]]
                                        for x, buffer in zip(entry, buffers))
            self.buffers[layer] = buffers

    def select(self, rows):
        """A new cache of these batch rows in this order; rows (B',) int64 may repeat."""
        new = KVCache()
        new.entries, new.buffers = dict(self.entries), dict(self.buffers)
        new.length, new.state = self.length, self.state
        new.reorder(rows)
        return new
