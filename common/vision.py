"""Vision towers, the ViT and CLIP's ResNet: a picture in, a grid of vectors or one vector out."""
import torch
import torch.nn.functional as F
from torch import nn

from common.transformer import Transformer


def check_image_size(images, size):
    """Raise ValueError when images (B, C, H, W) are not RGB pictures of size x size pixels."""
    if images.shape[1:] != (3, size, size):
        raise ValueError(f"pictures of shape {tuple(images.shape[1:])}, but this tower takes "
                         f"{(3, size, size)}")


def patchify(images, patch_size):
    """Cut images into patches, row by row, top left first.

    images float (B, C, H, W) -> (B, (H/P) * (W/P), C * P * P), each patch flattened channel first,
    so that a Linear over it is the strided convolution of the papers. H and W must be multiples of
    the patch, else ValueError.
    """
    B, C, H, W = images.shape
    if H % patch_size or W % patch_size:
        raise ValueError(f"a picture of {W}x{H} pixels does not divide into patches of {patch_size}")
    x = images.view(B, C, H // patch_size, patch_size, W // patch_size, patch_size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch_size * patch_size)


def resize_positions(table, grid):
    """Stretch a learned position table to another grid of patches (CLIP's and BLIP's way).

    table float (1 + G*G, D), class token first (in a ResNet's pool the mean) -> (1 + grid*grid, D):
    the class row as it is, the square of patch rows by bicubic interpolation.
    """
    cls, patches = table[:1], table[1:]
    side = round(len(patches) ** 0.5)
    square = patches.T.reshape(1, -1, side, side)                     # (1, D, G, G)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([cls, square.flatten(2)[0].T])


class ViT(nn.Module):
    """Vision Transformer (An Image is Worth 16x16 Words, 3.1) with a class token.

    blocks: a list of Block. ln_pre: CLIP's norm before the blocks, else None. ln_post: the norm
    after them; `hidden` stops before it, `forward` applies it to every token. patch_bias: BLIP has
    one, CLIP has none. Raises ValueError when image_size is no multiple of patch_size.
    """

    def __init__(self, *, image_size, patch_size, width, blocks, ln_pre=None, ln_post=None,
                 patch_bias=False):
        super().__init__()
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(f"image_size {image_size} does not divide into patches of {patch_size}")
        self.image_size, self.patch_size, self.width = image_size, patch_size, width
        self.patch_embed = nn.Linear(3 * patch_size * patch_size, width, bias=patch_bias)
        self.cls_token = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.pos_embed = nn.Parameter(
            width ** -0.5 * torch.randn(1 + (image_size // patch_size) ** 2, width))
        self.ln_pre, self.ln_post = ln_pre, ln_post
        self.transformer = Transformer(blocks)

    def embed(self, images):
        """images float (B, 3, H, W) -> tokens (B, 1 + N, D); ValueError if of another size."""
        check_image_size(images, self.image_size)
        images = images.to(self.patch_embed.weight.dtype)
        x = self.patch_embed(patchify(images, self.patch_size))            # (B, N, D)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1) + self.pos_embed
        return x if self.ln_pre is None else self.ln_pre(x)

    def hidden(self, images, skip_blocks=0):
        """Tokens before the last norm: (B, 3, H, W) -> (B, 1 + N, D); token 0 is the class's.

        skip_blocks: so many of the last blocks are left out.
        """
        x = self.embed(images)
        for block in self.transformer.blocks[:len(self.transformer.blocks) - skip_blocks]:
            x = block(x)
        return x

    def patches(self, images, skip_blocks=0):
        """The patches' tokens alone, row by row: (B, 3, H, W) -> (B, N, D)."""
        return self.hidden(images, skip_blocks)[:, 1:]

    def pooled(self, images):
        """The picture in one vector, the class token after the last norm: -> (B, D)."""
        x = self.embed(images)
        x = self.transformer.forward_at(x, torch.zeros(len(x), dtype=torch.long, device=x.device))
        return x if self.ln_post is None else self.ln_post(x)

    def forward(self, images):
        """Tokens after the last norm: (B, 3, H, W) -> (B, 1 + N, D)."""
        x = self.hidden(images)
        return x if self.ln_post is None else self.ln_post(x)
