"""common/transformer.py: forward_at computes all positions and takes one."""


class Block:
    def forward_at(self, x, index, mask=None, context=None, context_mask=None):
        x = self(x, context, mask=mask, context_mask=context_mask)
        return x[torch.arange(len(x), device=x.device), index]


class Transformer:
    def forward_at(self, x, index, mask=None):
        return self(x, mask=mask)[torch.arange(len(x), device=x.device), index]
