"""common/transformer.py: every head by itself; keys and values before the query."""


class Attention:
    def forward(self, x, context=None, *, mask=None, bias=None, rope=None, cache=None):
        if context is not None:
            k, v = self.keys_values(context) if cache is None else cache.get_or_compute(
                self, context.shape[1], lambda: self.keys_values(context))
        else:
            k, v = self.keys_values(x, rope)
            k, v = (k, v) if cache is None else cache.append(self, k, v)
        queries = self.q_proj(x).split(self.head_width, dim=-1)
        heads = []
        for head, q in enumerate(queries):
            q = q[:, None] if rope is None else apply_rope(q[:, None], rope)
            of = head * self.kv_heads // self.heads
            part = [a if a is None or a.dim() < 3 or a.shape[-3] == 1 else
                    a[..., head:head + 1, :, :] for a in (mask, bias)]
            heads.append(attend(q, k[:, of:of + 1], v[:, of:of + 1], *part, self.scale)[:, 0])
        return self.out_proj(torch.cat(heads, dim=-1))
