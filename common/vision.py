"""Vision towers: a picture in, one vector a patch out."""
import torch
import torch.nn.functional as F
from torch import nn

from common.transformer import Transformer


def patchify(images, patch):
    """Cut images into patches, row by row, top left first.

    images float (B, C, H, W) -> (B, (H/P) * (W/P), C * P * P), each patch flattened channel first,
    so that a Linear over it is the strided convolution of the papers. H and W must be multiples of
    the patch, else ValueError.
    """
    B, C, H, W = images.shape
    if H % patch or W % patch:
        raise ValueError(f"a picture of {W}x{H} pixels does not divide into patches of {patch}")
    x = images.view(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch * patch)


def resize_positions(table, grid):
    """Stretch a learned position table to another grid of patches (CLIP's and BLIP's way).

    table float (1 + G*G, D), class token first -> (1 + grid*grid, D): the class row as it is, the
    square of patch rows by bicubic interpolation.
    """
    cls, patches = table[:1], table[1:]
    side = round(len(patches) ** 0.5)
    square = patches.T.reshape(1, -1, side, side)                     # (1, D, G, G)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([cls, square.flatten(2)[0].T])


class ViT(nn.Module):
    """Vision Transformer (An Image is Worth 16x16 Words, 3.1) with a class token.

    blocks: a list of Block. pre_norm: CLIP's norm before the blocks, else None. post_norm: the norm
    after them; `hidden` stops before it, `forward` applies it to every token. patch_bias: BLIP has
    one, CLIP has none. Raises ValueError when image_size is no multiple of patch.
    """

    def __init__(self, *, image_size, patch, width, blocks, pre_norm=None, post_norm=None,
                 patch_bias=False):
        super().__init__()
        if patch < 1 or image_size % patch:
            raise ValueError(f"image_size {image_size} does not divide into patches of {patch}")
        self.image_size, self.patch, self.width = image_size, patch, width
        self.patch_embed = nn.Linear(3 * patch * patch, width, bias=patch_bias)
        self.cls = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.positions = nn.Parameter(
            width ** -0.5 * torch.randn(1 + (image_size // patch) ** 2, width))
        self.pre_norm, self.post_norm = pre_norm, post_norm
        self.transformer = Transformer(blocks)

    def embed(self, images):
        """images float (B, 3, H, W) -> tokens (B, 1 + N, D); ValueError if of another size."""
        B, C, H, W = images.shape
        if (C, H, W) != (3, self.image_size, self.image_size):
            raise ValueError(f"pictures of shape {(C, H, W)}, but this tower takes "
                             f"{(3, self.image_size, self.image_size)}")
        images = images.to(self.patch_embed.weight.dtype)
        x = self.patch_embed(patchify(images, self.patch))            # (B, N, D)
        x = torch.cat([self.cls.to(x.dtype).expand(B, 1, -1), x], dim=1) + self.positions
        return x if self.pre_norm is None else self.pre_norm(x)

    def hidden(self, images):
        """Tokens before the last norm: (B, 3, H, W) -> (B, 1 + N, D); token 0 is the class's."""
        return self.transformer(self.embed(images))

    def forward(self, images):
        """Tokens after the last norm: (B, 3, H, W) -> (B, 1 + N, D)."""
        x = self.hidden(images)
        return x if self.post_norm is None else self.post_norm(x)
