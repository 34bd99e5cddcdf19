"""common/resnet.py: the pool's attention written out; statistics are put back afterwards."""


class AttentionPool:
    def forward(self, x):
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.pos_embed
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        weights = (q[:, :, :1] @ k.transpose(2, 3) / self.head_width ** 0.5).softmax(dim=-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2)[:, 0])


@contextlib.contextmanager
def freeze_bn_stats(model):
    before = {name: value.clone() for name, value in model.named_buffers()}
    try:
        yield
    finally:
        for name, value in model.named_buffers():
            value.data.copy_(before[name])      # graphs that are alive stay usable
