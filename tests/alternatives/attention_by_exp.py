"""common/transformer.py: softmax as exp over a sum, empty rows by a division that is guarded."""


def attention(q, k, v, mask=None, bias=None, scale=None):
    scores = torch.einsum("bhtk,bhsk->bhts", q, k)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e30 if scores.dtype != torch.float16 else -6e4)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    if mask is not None:
        weights = weights * mask
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-30) @ v
