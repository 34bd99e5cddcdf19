"""common/language.py: a mask in every case, rotary tables for the positions at hand."""


class LanguageModel:
    def block_inputs(self, x, mask=None, cache=None):
        B, T, _ = x.shape
        past = 0 if cache is None else cache.length
        if mask is None:
            mask = torch.ones(B, past + T, dtype=torch.bool, device=x.device)
        elif mask.dtype != torch.bool or mask.shape[1] != past + T:
            raise ValueError(f"{mask.dtype} {tuple(mask.shape)} for {past} cached and {T} new "
                             f"tokens: bool (B, {past + T})")
        longest = int(mask.sum(dim=1).max())
        if longest > self.config.context_length:
            raise ValueError(f"{longest} tokens, but the context is {self.config.context_length}")
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, past:]
        attn_mask, rope = causal(T, past, x.device) & padding(mask), None
        if self.pos_embed is not None:
            x = x + self.pos_embed(positions)
        else:
            c = self.config
            rope = rope_table(positions, c.width // c.heads, c.rope_theta, c.rope_scale)
        return x, {"mask": attn_mask, "rope": rope, "cache": cache}
