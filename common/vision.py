"""Vision towers, the ViT and CLIP's ResNet: a picture in, a grid of vectors or one vector out."""
import contextlib
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from common.transformer import Attention, Transformer


def check_size(images, size):
    """Raise ValueError when images (B, C, H, W) are not RGB pictures of size x size pixels."""
    if images.shape[1:] != (3, size, size):
        raise ValueError(f"pictures of shape {tuple(images.shape[1:])}, but this tower takes "
                         f"{(3, size, size)}")


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
        check_size(images, self.image_size)
        images = images.to(self.patch_embed.weight.dtype)
        x = self.patch_embed(patchify(images, self.patch))            # (B, N, D)
        x = torch.cat([self.cls.to(x.dtype).expand(len(x), 1, -1), x], dim=1) + self.positions
        return x if self.pre_norm is None else self.pre_norm(x)

    def hidden(self, images, skip=0):
        """Tokens before the last norm: (B, 3, H, W) -> (B, 1 + N, D); token 0 is the class's.

        skip: so many of the last blocks are left out.
        """
        x = self.embed(images)
        for block in self.transformer.blocks[:len(self.transformer.blocks) - skip]:
            x = block(x)
        return x

    def grid(self, images, skip=0):
        """The patches' tokens alone, row by row: (B, 3, H, W) -> (B, N, D)."""
        return self.hidden(images, skip)[:, 1:]

    def features(self, images):
        """The picture in one vector, the class token after the last norm: -> (B, D)."""
        x = self.embed(images)
        x = self.transformer.read(x, torch.zeros(len(x), dtype=torch.long, device=x.device))
        return x if self.post_norm is None else self.post_norm(x)

    def forward(self, images):
        """Tokens after the last norm: (B, 3, H, W) -> (B, 1 + N, D)."""
        x = self.hidden(images)
        return x if self.post_norm is None else self.post_norm(x)


# ------------------------------------------------------------------ CLIP's ResNet

class Bottleneck(nn.Module):
    """ResNet's block of three convolutions, with average pools in place of strides.

    channels -> 4 * planes channels, sides divided by stride. The pools let no pixel fall through a
    stride's holes: one after conv2's ReLU, one before the 1x1 convolution of the shortcut (CLIP,
    2.4; Bag of Tricks for Image Classification, 4.2). It starts as its shortcut: bn3's gain is 0.
    """

    def __init__(self, *, channels, planes, stride=1):
        super().__init__()
        out = 4 * planes
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.pool = nn.AvgPool2d(stride)
        self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.shortcut = nn.Identity()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(OrderedDict(
                pool=nn.AvgPool2d(stride), conv=nn.Conv2d(channels, out, 1, bias=False),
                bn=nn.BatchNorm2d(out)))
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x):
        """x (B, channels, H, W) -> (B, 4 * planes, H / stride, W / stride)."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(self.pool(h)))
        return F.relu(h + self.shortcut(x))


class AttentionPool(Attention):
    """A grid in one vector: its mean asks, the mean and every cell answer (CLIP, 2.4).

    It is cross-attention of one query, whose out_proj leads to another width: in CLIP it is the
    projection into the joint space. grid: cells of a side. heads must divide width.
    """

    def __init__(self, *, grid, width, heads, embed):
        super().__init__(width=width, heads=heads)
        self.out_proj = nn.Linear(width, embed)
        self.positions = nn.Parameter(width ** -0.5 * torch.randn(1 + grid ** 2, width))
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=width ** -0.5)

    def forward(self, x):
        """x (B, N, C), the N = grid * grid cells row by row -> (B, E)."""
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positions
        return super().forward(x[:, :1], x)[:, 0]


class ModifiedResNet(nn.Module):
    """CLIP's ResNet (paper, 2.4): a stem of three convolutions, pools for strides, attention pool.

    stages: blocks in each of the four. width: channels after the stem, doubled by every stage; the
    grid has 32 * width channels and image_size / 32 cells a side. heads: the pool's. embed: width
    of the joint space. Raises ValueError for sizes that no such network has.

    In training BatchNorm uses the statistics of one process's micro-batch, and keeps a running mean
    of them for eval mode.
    """

    def __init__(self, *, image_size, stages, width, heads, embed):
        super().__init__()
        if image_size < 32 or image_size % 32:
            raise ValueError(f"image_size {image_size}: a ResNet takes a multiple of 32")
        if len(stages) != 4 or min(stages) < 1 or width < 2:
            raise ValueError(f"stages {tuple(stages)} of width {width}: a ResNet has four stages, "
                             "each of at least 1 block, and a width of at least 2")
        self.image_size, self.width = image_size, 32 * width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.layer1 = self.layer(stages[0], channels=width, planes=width, stride=1)
        self.layer2 = self.layer(stages[1], channels=4 * width, planes=2 * width, stride=2)
        self.layer3 = self.layer(stages[2], channels=8 * width, planes=4 * width, stride=2)
        self.layer4 = self.layer(stages[3], channels=16 * width, planes=8 * width, stride=2)
        self.pool = AttentionPool(grid=image_size // 32, width=self.width, heads=heads, embed=embed)

    def layer(self, blocks, *, channels, planes, stride):
        """A stage: one block that changes channels and size, then blocks that change neither."""
        first = Bottleneck(channels=channels, planes=planes, stride=stride)
        return nn.Sequential(first, *(Bottleneck(channels=4 * planes, planes=planes)
                                      for _ in range(blocks - 1)))

    def stem(self, images):
        """images float (B, 3, H, W) -> (B, width, H / 4, W / 4)."""
        x = images.to(self.conv1.weight.dtype)
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        return F.avg_pool2d(x, 2)

    def grid(self, images, skip=0):
        """The cells before the pool, row by row: float (B, 3, H, W) -> (B, H / 32 * W / 32, C).

        skip: 0, for no two of its stages have cells of one width. Raises ValueError for pictures of
        another size.
        """
        if skip:
            raise ValueError(f"skip={skip}: no block of a ResNet can be left out")
        check_size(images, self.image_size)
        x = self.stem(images)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return x.flatten(2).transpose(1, 2)

    hidden = grid                        # there is no class token

    def features(self, images):
        """The picture in one vector, already in the joint space: -> (B, E)."""
        return self.pool(self.grid(images))

    def forward(self, images):
        """images float (B, 3, H, W) -> (B, E)."""
        return self.features(images)


@contextlib.contextmanager
def statistics_at_rest(model):
    """Within it a forward in train mode normalises as ever, but moves no running statistics.

    For a pass whose pictures come a second time: `CLIP.accumulate`.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
