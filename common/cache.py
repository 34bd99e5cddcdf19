"""The KV cache: keys and values that attention layers have already computed.

Without it each new token would compute the keys and values of the whole text again:

    cache = KVCache()
    logits = model(prompt, cache=cache)          # stores the prompt's keys and values
    logits = model(next_token, cache=cache)      # adds one key and one value in each layer
"""
import torch


def extend(past, new, buffer):
    """past (B, H, P, K) followed by new (B, H, T, K): (B, H, P + T, K), and the buffer it views.

    torch.cat copies the whole past for each new token, which took a quarter of a tiny model's
    step. A buffer is longer than what it holds, so new tokens are written behind the past, and the
    result is a view. With gradients on we copy: backward needs the past as it was. Then the buffer
    is the result itself. `past` and `new` stay as they are.
    """
    if torch.is_grad_enabled():
        whole = torch.cat([past, new], dim=2)
        return whole, whole
    (B, H, P, K), S = past.shape, past.shape[2] + new.shape[2]
    if buffer is None or buffer.shape[2] < S:
        buffer = past.new_empty(B, H, S + 32 + P // 8, K)
        buffer[:, :, :P] = past
    buffer[:, :, P:S] = new
    return buffer[:, :, :S], buffer


class KVCache:
    """Keys and values of each attention layer of one model, for one batch of texts.

    Pass the same object to every call of the model; a new prompt takes a new object.
    Self-attention appends to its entry; cross-attention computes its entry once.
    """

    def __init__(self):
        self.length = 0                  # tokens stored so far: the next token's position
        self.state = {}                  # name -> tensor (B, ...): what else a model remembers
        self.context = None              # what cross-attention's entries were computed from
        self.entries = {}                # attention layer -> (k, v), each (B, H, S, K)
        self.buffers = {}                # attention layer -> what k and v of its entry view

    def append(self, layer, k, v):
        """Add k and v (B, H, T, K) to the layer's entry; returns the whole entry, (B, H, S, K).

        Afterwards `length` is S, however many layers there are. The given k and v never change.
        """
        past_k, past_v = self.entries.get(layer) or (k[:, :, :0], v[:, :, :0])
        k_buffer, v_buffer = self.buffers.get(layer, (None, None))
        k, k_buffer = extend(past_k, k, k_buffer)
        v, v_buffer = extend(past_v, v, v_buffer)
        self.buffers[layer] = k_buffer, v_buffer
        self.entries[layer] = k, v
        self.length = k.shape[2]
        return k, v

    def get_or_compute(self, layer, length, compute):
        """The layer's entry; compute() -> (k, v) makes it unless there is one of `length` keys."""
        if layer not in self.entries or self.entries[layer][0].shape[2] != length:
            self.entries[layer] = compute()
        return self.entries[layer]

    def invalidate(self, layer):
        """Drop the layer's entry, because its context has changed."""
        self.entries.pop(layer, None)

    def reorder(self, rows, since=0):
        """Replace the batch by its rows `rows`, int64 (B',), which may repeat or leave out some.

        since > 0: B' = B, and new row i equals old row i before position `since` and in
        cross-attention (beams of one prompt). Without gradients only later positions are moved.
        """
        self.state = {name: value[rows] for name, value in self.state.items()}
        if since and not torch.is_grad_enabled():
            for buffer in sum(self.buffers.values(), ()):
                buffer[:, :, since:self.length] = buffer[rows, :, since:self.length]
        else:
            self.entries = {layer: (k[rows], v[rows]) for layer, (k, v) in self.entries.items()}
            self.buffers = {layer: self.entries[layer] for layer in self.buffers}

    def select(self, rows):
        """A new cache with the rows `rows`, int64 (B',); this one stays as it is."""
        new = KVCache()
        new.length, new.state = self.length, self.state
        new.entries, new.buffers = self.entries, self.buffers
        new.reorder(rows)
        return new
