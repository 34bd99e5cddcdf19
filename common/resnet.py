"""CLIP's ResNet: a picture in, a grid of vectors or one vector out."""
import contextlib
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from common.transformer import Attention
from common.vision import check_image_size


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
    projection into the joint space. grid_size: cells of a side. heads must divide width.
    """

    def __init__(self, *, grid_size, width, heads, embed_dim):
        super().__init__(width=width, heads=heads)
        self.out_proj = nn.Linear(width, embed_dim)
        self.pos_embed = nn.Parameter(width ** -0.5 * torch.randn(1 + grid_size ** 2, width))
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=width ** -0.5)

    def forward(self, x):
        """x (B, N, C), the N = grid_size * grid_size cells row by row -> (B, E)."""
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.pos_embed
        return super().forward(x[:, :1], x)[:, 0]


class ModifiedResNet(nn.Module):
    """CLIP's ResNet (paper, 2.4): a stem of three convolutions, pools for strides, attention pool.

    stages: blocks in each of the four. width: channels after the stem, doubled by every stage; the
    grid has 32 * width channels and image_size / 32 cells a side. heads: the pool's. embed: width
    of the joint space. Raises ValueError for sizes that no such network has.

    In training BatchNorm uses the statistics of one process's micro-batch, and keeps a running mean
    of them for eval mode.
    """

    def __init__(self, *, image_size, stages, width, heads, embed_dim):
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
        self.pool = AttentionPool(grid_size=image_size // 32, width=self.width, heads=heads, embed_dim=embed_dim)

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

    def patches(self, images, skip_blocks=0):
        """The cells before the pool, row by row: float (B, 3, H, W) -> (B, H / 32 * W / 32, C).

        skip_blocks: 0, for no two of its stages have cells of one width. Raises ValueError for pictures of
        another size.
        """
        if skip_blocks:
            raise ValueError(f"skip_blocks={skip_blocks}: no block of a ResNet can be left out")
        check_image_size(images, self.image_size)
        x = self.stem(images)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        return x.flatten(2).transpose(1, 2)

    hidden = patches                      # there is no class token

    def pooled(self, images):
        """The picture in one vector, already in the joint space: -> (B, E)."""
        return self.pool(self.patches(images))

    def forward(self, images):
        """images float (B, 3, H, W) -> (B, E)."""
        return self.pooled(images)


@contextlib.contextmanager
def freeze_bn_stats(model):
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
