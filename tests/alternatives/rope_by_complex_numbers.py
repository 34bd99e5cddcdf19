"""common/transformer.py: each pair (i, i + K/2) is a complex number that is multiplied."""


def apply_rope(x, rope):
    cos, sin = (part.chunk(2, dim=-1)[1].float() for part in rope)
    half = x.shape[-1] // 2
    wide = x.double() if x.dtype == torch.float64 else x.float()
    pairs = torch.complex(wide[..., :half], wide[..., half:])
    turned = pairs * torch.complex(cos.to(wide.dtype), sin.to(wide.dtype))
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)
