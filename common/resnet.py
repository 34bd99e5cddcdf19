"""CLIP's ResNet: an image in, a vector for each grid cell or one vector for the image out."""
import contextlib
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from common.transformer import Attention
from common.vision import check_image_size


class Bottleneck(nn.Module):
    """A residual block of three convolutions: channels -> 4 * planes, sides divided by stride.

    Average pools replace strides: after conv2, against aliasing, and before the shortcut's 1x1
    convolution, as in ResNet-D (CLIP, 2.4; Bag of Tricks for Image Classification, 4.2).
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
        nn.init.zeros_(self.bn3.weight)  # at the start the block is its shortcut

    def forward(self, x):
        """x (B, channels, H, W) -> (B, 4 * planes, H / stride, W / stride)."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(self.pool(h)))
        return F.relu(h + self.shortcut(x))


class AttentionPool(Attention):
    """A grid of features pooled into one vector by attention (CLIP, 2.4).

    The query is the mean feature; keys and values are the mean and all grid cells, each with its
    position (the mean's is the first row). No norm, MLP or residual follows: out_proj, with a bias,
    maps to the joint space. grid_size: cells of a side. Weights and positions start with deviation
    width ** -0.5.
    """

    def __init__(self, *, grid_size, width, heads, embed_dim):
        super().__init__(width=width, heads=heads)
        self.out_proj = nn.Linear(width, embed_dim)
        self.pos_embed = nn.Parameter(width ** -0.5 * torch.randn(1 + grid_size ** 2, width))
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=width ** -0.5)

    def forward(self, x):
        """x (B, N, C), the N = grid_size ** 2 cells row by row -> (B, E)."""
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.pos_embed   # (B, 1 + N, C)
        return super().forward(x[:, :1], context=x)[:, 0]


class ModifiedResNet(nn.Module):
    """CLIP's ResNet (paper, 2.4): a stem of three convolutions, pooled strides, an attention pool.

    stages: the number of blocks in each of the four stages. width: channels after the stem; each
    stage but the first doubles the channels and halves the sides, so the grid has 32 * width
    channels and image_size / 32 cells a side. heads: the pool's. embed_dim: the joint space's.
    In train mode BatchNorm uses the statistics of one process's micro-batch.
    Raises ValueError for sizes that no such network has.
    """

    def __init__(self, *, image_size, stages, width, heads, embed_dim):
        super().__init__()
        if image_size < 32 or image_size % 32:
            raise ValueError(f"image_size {image_size}: a ResNet takes a multiple of 32")
        if len(stages) != 4 or min(stages) < 1 or width < 2:
            raise ValueError(f"stages {tuple(stages)} of width {width}: a ResNet has four stages, "
                             "each of at least 1 block, and a width of at least 2")
        self.image_size, self.width = image_size, 32 * width      # of `hidden`
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.layer1 = self.stage(stages[0], channels=width, planes=width, stride=1)
        self.layer2 = self.stage(stages[1], channels=4 * width, planes=2 * width, stride=2)
        self.layer3 = self.stage(stages[2], channels=8 * width, planes=4 * width, stride=2)
        self.layer4 = self.stage(stages[3], channels=16 * width, planes=8 * width, stride=2)
        self.pool = AttentionPool(grid_size=image_size // 32, width=self.width, heads=heads,
                                  embed_dim=embed_dim)

    def stage(self, blocks, *, channels, planes, stride):
        """So many blocks, of which the first changes channels and sides."""
        first = Bottleneck(channels=channels, planes=planes, stride=stride)
        return nn.Sequential(first, *(Bottleneck(channels=4 * planes, planes=planes)
                                      for _ in range(blocks - 1)))

    def stem(self, images):
        """images float (B, 3, H, W) -> (B, width, H / 4, W / 4)."""
        x = images.to(self.conv1.weight.dtype)
        x = F.relu(self.bn1(self.conv1(x)))                           # (B, width / 2, H / 2, W / 2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))                           # (B, width, H / 2, W / 2)
        return F.avg_pool2d(x, 2)

    def hidden(self, images):
        """The grid cells before the pool, row by row: float (B, 3, H, W) -> (B, H/32 * W/32, C).

        Raises ValueError for images of another size.
        """
        check_image_size(images, self.image_size)
        x = self.stem(images)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return x.flatten(2).transpose(1, 2)

    patches = hidden                     # as in ViT, where `hidden` has a class token too

    def pooled(self, images):
        """Each image in one vector, already in the joint space: (B, 3, H, W) -> (B, E)."""
        return self.pool(self.hidden(images))

    forward = pooled


@contextlib.contextmanager
def freeze_bn_stats(model):
    """Inside it, forward in train mode gives the same outputs but updates no running statistics.

    Behind it, also after an exception, they are updated as before.
    For an extra forward pass over the same images, such as CLIP's feature caching.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
