"""A CLIP in the layout of OpenAI's files, made of torch's own layers: a second opinion.

Its parameter names are those of the published .pt files; its forward is written from the paper and
shares no code with ours.
"""
import copy
import warnings
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


class Quick(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=Quick(),
                                             c_proj=nn.Linear(4 * width, width)))

    def forward(self, x, mask):              # (T, B, D): torch's order
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Stack(nn.Module):
    def __init__(self, width, layers, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x, mask=None):         # (B, T, D)
        x = x.transpose(0, 1)
        for block in self.resblocks:
            x = block(x, mask)
        return x.transpose(0, 1)


class Vit(nn.Module):
    def __init__(self, image_size, patch, width, layers, embed):
        super().__init__()
        self.image_size = image_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + (image_size // patch) ** 2, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Stack(width, layers, width // 64)
        self.proj = nn.Parameter(torch.empty(width, embed))

    def forward(self, images):
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class Bottleneck(nn.Module):
    def __init__(self, channels, planes, stride):
        super().__init__()
        self.stride = stride
        for n, (a, b, k) in enumerate(((channels, planes, 1), (planes, planes, 3),
                                       (planes, 4 * planes, 1)), 1):
            setattr(self, f"conv{n}", nn.Conv2d(a, b, k, padding=k // 2, bias=False))
            setattr(self, f"bn{n}", nn.BatchNorm2d(b))
        self.downsample = None
        if stride > 1 or channels != 4 * planes:
            self.downsample = nn.Sequential(OrderedDict([
                ("-1", nn.AvgPool2d(stride)), ("0", nn.Conv2d(channels, 4 * planes, 1, bias=False)),
                ("1", nn.BatchNorm2d(4 * planes))]))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.avg_pool2d(F.relu(self.bn2(self.conv2(h))), self.stride)
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn3(self.conv3(h)) + shortcut)


class Pool(nn.Module):
    def __init__(self, grid, width, embed):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(1 + grid ** 2, width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed)

    def forward(self, x):
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x]) + self.positional_embedding[:, None]
        q, k, v = self.q_proj, self.k_proj, self.v_proj
        return F.multi_head_attention_forward(
            x[:1], x, x, x.shape[-1], x.shape[-1] // 64, None,
            torch.cat([q.bias, k.bias, v.bias]), None, None, False, 0.0, self.c_proj.weight,
            self.c_proj.bias, use_separate_proj_weight=True, q_proj_weight=q.weight,
            k_proj_weight=k.weight, v_proj_weight=v.weight, need_weights=False)[0][0]


class ResNet(nn.Module):
    def __init__(self, image_size, stages, width, embed):
        super().__init__()
        self.image_size = image_size
        for n, (a, b) in enumerate(((3, width // 2), (width // 2,) * 2, (width // 2, width)), 1):
            setattr(self, f"conv{n}", nn.Conv2d(a, b, 3, 2 if n == 1 else 1, 1, bias=False))
            setattr(self, f"bn{n}", nn.BatchNorm2d(b))
        channels = width
        for n, blocks in enumerate(stages):
            planes = width * 2 ** n
            setattr(self, f"layer{n + 1}", nn.Sequential(*(
                Bottleneck(channels if k == 0 else 4 * planes, planes, 2 if n and k == 0 else 1)
                for k in range(blocks))))
            channels = 4 * planes
        self.attnpool = Pool(image_size // 32, 32 * width, embed)

    def forward(self, x):
        for n in (1, 2, 3):
            x = F.relu(getattr(self, f"bn{n}")(getattr(self, f"conv{n}")(x)))
        x = F.avg_pool2d(x, 2)
        for n in (1, 2, 3, 4):
            x = getattr(self, f"layer{n}")(x)
        return self.attnpool(x)


class OpenAI(nn.Module):
    """The whole model: forward(images, ids) -> unit vectors (B, E), (B, E)."""

    def __init__(self, visual, *, vocab_size, context_length, width, layers, embed_dim, eos_id):
        super().__init__()
        self.visual, self.eos_id = visual, eos_id
        self.transformer = Stack(width, layers, width // 64)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1.7))
        for name, value in (("input_resolution", visual.image_size),
                            ("context_length", context_length), ("vocab_size", vocab_size)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, images, ids):
        T = ids.shape[1]
        mask = torch.full((T, T), -torch.inf).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding[:T]
        x = self.ln_final(self.transformer(x, mask))
        ends = (ids == self.eos_id).int().argmax(1)
        text = x[torch.arange(len(ids)), ends] @ self.text_projection
        return F.normalize(self.visual(images), dim=-1), F.normalize(text, dim=-1)


def randomised(model):
    """Every number of it random, norms and running statistics included; in eval mode."""
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point() and name != "logit_scale":
            value.normal_(std=0.1)
    return model.eval()


SIZES = {"vocab_size": 523, "context_length": 11, "width": 192, "layers": 3, "eos_id": 522}


def vit(seed=0, embed_dim=67, **changes):
    """A small ViT CLIP; widths are multiples of 64, as heads are 64 wide."""
    torch.manual_seed(seed)
    sizes = SIZES | {"embed_dim": embed_dim} | changes
    return randomised(OpenAI(Vit(28, 7, 128, 2, embed_dim), **sizes))


def resnet(seed=0, embed_dim=67, **changes):
    """A small ResNet CLIP."""
    torch.manual_seed(seed)
    sizes = SIZES | {"embed_dim": embed_dim} | changes
    return randomised(OpenAI(ResNet(64, (1, 2, 1, 3), 4, embed_dim), **sizes))


def save_script(model, path, half=True):
    """Write the model as the published files are: a TorchScript archive, in fp16."""
    images = torch.randn(1, 3, model.visual.image_size, model.visual.image_size)
    ids = torch.full((1, 4), model.eos_id)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(copy.deepcopy(model), (images, ids), check_trace=False)
        (script.half() if half else script).save(str(path))
