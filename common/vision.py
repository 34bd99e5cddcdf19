"""The Vision Transformer: an image in, a vector for each patch or one vector for the image out."""
import torch
import torch.nn.functional as F
from torch import nn

from common.transformer import Transformer


def check_image_size(images, size):
    """Raise ValueError unless images (B, C, H, W) are RGB and size x size pixels."""
    if images.shape[1:] != (3, size, size):
        raise ValueError(f"images of shape {tuple(images.shape[1:])}, but this tower takes "
                         f"{(3, size, size)}")


def patchify(images, patch_size):
    """Cut images into patches, row by row from the top left.

    images float (B, C, H, W) -> (B, (H/P) * (W/P), C * P * P), each patch flattened channel first,
    so that a Linear over it is the papers' strided convolution. Raises ValueError with the sizes
    when P does not divide H and W.
    """
    (B, C, H, W), P = images.shape, patch_size
    if H % P or W % P:
        raise ValueError(f"an image of {W}x{H} pixels does not divide into patches of {P}")
    x = images.view(B, C, H // P, P, W // P, P)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * P * P)      # from (B, H/P, W/P, C, P, P)


def resize_positions(pos_embed, grid_size):
    """Interpolate learned positions to another grid of patches (as CLIP and BLIP do).

    pos_embed float (1 + G * G, D), class token first (the mean, in a ResNet's pool) ->
    (1 + grid_size ** 2, D): the first row unchanged, the patches' rows by bicubic interpolation
    (F.interpolate without align_corners).
    """
    cls, patches = pos_embed[:1], pos_embed[1:]
    G = round(len(patches) ** 0.5)
    square = patches.T.reshape(1, -1, G, G)                           # (1, D, G, G)
    square = F.interpolate(square, size=(grid_size, grid_size), mode="bicubic", align_corners=False)
    return torch.cat([cls, square.flatten(2)[0].T])


def adapt_weights(model, weights, name="vision.pos_embed"):
    """The weights of another run with the names of `model`; what is new in it stays as it is.

    name: of the positions of its image encoder, (1 + G * G, D), which are interpolated to its grid.
    """
    own = model.state_dict()
    if name in weights:
        grid_size = round((len(own[name]) - 1) ** 0.5)
        weights = weights | {name: resize_positions(weights[name], grid_size)}
    return own | {key: value for key, value in weights.items() if key in own}


class ViT(nn.Module):
    """Vision Transformer (An Image is Worth 16x16 Words, 3.1) with a class token.

    blocks: a list of Block. ln_pre: CLIP's norm before the blocks, or None. ln_post: the norm after
    them, or None. patch_bias: BLIP's patch embedding has a bias, CLIP's has none. The class token
    and the positions start with deviation width ** -0.5. Raises ValueError when patch_size does not
    divide image_size, and for images of another size.
    """

    def __init__(self, *, image_size, patch_size, width, blocks, ln_pre=None, ln_post=None,
                 patch_bias=False):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} does not divide into patches of "
                             f"{patch_size}")
        self.image_size, self.patch_size, self.width = image_size, patch_size, width
        self.patch_embed = nn.Linear(3 * patch_size * patch_size, width, bias=patch_bias)
        self.cls_token = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.pos_embed = nn.Parameter(
            width ** -0.5 * torch.randn(1 + (image_size // patch_size) ** 2, width))
        self.ln_pre, self.ln_post = ln_pre, ln_post
        self.transformer = Transformer(blocks)

    def embed(self, images):
        """images float (B, 3, H, W) -> the first block's input (B, 1 + N, D)."""
        check_image_size(images, self.image_size)
        images = images.to(self.patch_embed.weight.dtype)
        x = self.patch_embed(patchify(images, self.patch_size))       # (B, N, D)
        cls = self.cls_token.to(x.dtype).expand(len(x), 1, -1)        # (B, 1, D)
        x = torch.cat([cls, x], dim=1) + self.pos_embed               # (B, 1 + N, D)
        return x if self.ln_pre is None else self.ln_pre(x)

    def hidden(self, images):
        """All tokens before the last norm: (B, 3, H, W) -> (B, 1 + N, D), the class token first."""
        x = self.embed(images)
        for block in self.transformer.blocks:
            x = block(x)
        return x

    def patches(self, images):
        """`hidden` without the class token: (B, 3, H, W) -> (B, N, D), row by row."""
        return self.hidden(images)[:, 1:]

    def pooled(self, images):
        """Each image in one vector: the class token after the last norm, (B, 3, H, W) -> (B, D).

        The same as self(images)[:, 0]; `forward_at` leaves the last block's other tokens out.
        """
        x = self.embed(images)
        first = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        x = self.transformer.forward_at(x, first)
        return x if self.ln_post is None else self.ln_post(x)

    def forward(self, images):
        """All tokens after the last norm: (B, 3, H, W) -> (B, 1 + N, D)."""
        x = self.hidden(images)
        return x if self.ln_post is None else self.ln_post(x)
