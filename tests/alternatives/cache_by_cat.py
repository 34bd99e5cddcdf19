"""common/cache.py: a copy for each token, no buffers."""


def extend(past, new, buffer):
    return torch.cat([past, new], dim=2), None


class KVCache:
    def append(self, layer, k, v):
        if layer in self.entries:
            past_k, past_v = self.entries[layer]
            k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        self.entries[layer] = k, v
        self.length = k.shape[2]
        return k, v

    def reorder(self, rows, since=0):
        self.state = {name: value.index_select(0, rows) for name, value in self.state.items()}
        self.entries = {layer: (k.index_select(0, rows), v.index_select(0, rows))
                        for layer, (k, v) in self.entries.items()}
