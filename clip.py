"""CLIP: two towers that agree on which picture belongs to which sentence.

Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021), and
the sigmoid loss of SigLIP (Zhai et al., 2023).

    picture -> ViT -> class token -> norm -> projection -> unit vector -+
           (or ResNet -> attention pool)                                +-> cosines * scale -> loss
    words -> causal transformer -> norm -> EOT token -> projection -----+

    python train.py clip                                       train one on the shapes world
    python clip.py runs/clip classify PICTURE "a red circle" "a blue star"
    python clip.py runs/clip search "a small green ring" FOLDER

In place of runs/clip: a Hugging Face folder, or OpenAI's .pt file with its vocabulary beside it.
"""
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.training import checkpoint, options as cli
from common.evaluation import writing as evaluation
from common import losses
from common.data.images import center_crop, normalize_pixels, open_folder, open_image, to_tensor
from common.evaluation.sheet import sheet
from common.masks import causal
from common.pretrained import clip as pretrained
from common.pretrained.files import is_published
from common.transformer import Block, LayerNorm, Transformer, to_float32, gelu, quick_gelu, vit_block
from common.resnet import ModifiedResNet, freeze_bn_stats
from common.vision import ViT

ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}
LOSSES = ("softmax", "sigmoid")


@dataclass
class CLIPConfig:
    """Sizes of the two towers. vocab and eos belong to the tokenizer.

    With stages the picture's tower is a ResNet: vision_width is that of its stem, vision_heads are
    those of its pool, patch and vision_layers say nothing.
    """
    image_size: int = 32
    stages: tuple[int, ...] = ()         # blocks in each of a ResNet's four stages; empty: a ViT
    patch_size: int = 8
    vision_width: int = 128
    vision_layers: int = 4
    vision_heads: int = 4
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4
    context_length: int = 32
    vocab_size: int = 1024
    eos_id: int = 2
    embed_dim: int = 128
    act: str = "gelu"                    # published weights need quick_gelu
    loss: str = "softmax"                # or sigmoid, SigLIP's

    def __post_init__(self):
        self.stages = tuple(self.stages)                          # JSON has no tuples
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss} is not one of {', '.join(LOSSES)}")
        if self.act not in ACTIVATIONS:
            raise ValueError(f"act={self.act} is not one of {', '.join(ACTIVATIONS)}")
        for name, value in vars(self).items():
            least = {"context_length": 3, "eos_id": 0}.get(name, 1)         # context: begin, a word, end
            if isinstance(value, int) and value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")


def published(image_size, patch_size, width, layers, text_width, embed):
    """A config of the paper's Table 20: heads are always 64 wide, the text tower has 12 layers."""
    return CLIPConfig(
        image_size=image_size, patch_size=patch_size, vision_width=width, vision_layers=layers,
        vision_heads=width // 64, text_width=text_width, text_layers=12,
        text_heads=text_width // 64, context_length=77, vocab_size=49408, eos_id=49407, embed_dim=embed,
        act="quick_gelu")


def published_resnet(image_size, stages, width, text_width, embed):
    """A config of the paper's Table 19: the pool's heads are 64 wide, too, of 32 * width."""
    vit = published(image_size, 32, width, 12, text_width, embed)
    return replace(vit, stages=stages, vision_heads=width * 32 // 64)


PRESETS = {
    "tiny": CLIPConfig(),
    "small": CLIPConfig(image_size=64, vision_width=384, vision_layers=8, vision_heads=6,
                        text_width=256, text_layers=6, text_heads=4, context_length=64, embed_dim=256),
    "ViT-B/32": published(224, 32, 768, 12, 512, 512),
    "ViT-B/16": published(224, 16, 768, 12, 512, 512),
    "ViT-L/14": published(224, 14, 1024, 24, 768, 768),
    "ViT-L/14@336": published(336, 14, 1024, 24, 768, 768),
    "RN-tiny": CLIPConfig(image_size=64, stages=(1, 1, 1, 1), vision_width=16, vision_heads=8),
    "RN50": published_resnet(224, (3, 4, 6, 3), 64, 512, 1024),
    "RN101": published_resnet(224, (3, 4, 23, 3), 64, 512, 512),
    "RN50x4": published_resnet(288, (4, 6, 10, 6), 80, 640, 640),
    "RN50x16": published_resnet(384, (6, 8, 18, 8), 96, 768, 768),
    "RN50x64": published_resnet(448, (3, 15, 36, 10), 128, 1024, 1024),
}


TRAINS = {"clip": ("*",)}                # by stage: patterns of the parameters that learn


class TextTower(nn.Module):
    """A causal transformer over token ids, read at the end-of-text token (paper, 2.4)."""

    def __init__(self, *, vocab_size, context_length, width, blocks, eos_id):
        super().__init__()
        self.eos_id = eos_id
        self.token_embed = nn.Embedding(vocab_size, width)
        self.pos_embed = nn.Parameter(torch.empty(context_length, width))
        self.transformer = Transformer(blocks, LayerNorm(width))

    def forward(self, ids):
        """ids int64 (B, T), each row with an eos -> (B, D), the state at the first eos.

        Found by its id: that it is the largest id, as in the published vocabulary, need not hold.
        No padding mask is needed: behind a causal mask nothing after eos reaches it.
        """
        T = ids.shape[1]
        if T > len(self.pos_embed):
            raise ValueError(f"{T} tokens, but the context is {len(self.pos_embed)}")
        ends = ids == self.eos_id
        if not ends.any(dim=1).all():
            raise ValueError(f"a text without the end-of-text id {self.eos_id}")
        x = self.token_embed(ids) + self.pos_embed[:T]
        first = ends.int().argmax(dim=1)         # argmax of 0/1 is the first 1
        return self.transformer.read(x, first, causal(T, device=ids.device))


def image_tower(c):
    """The picture's tower, a ViT or a ResNet, as the config says.

    Of either CLIP reads `features(images)`; a ResNet's are in the joint space already.
    """
    if c.stages:
        return ModifiedResNet(image_size=c.image_size, stages=c.stages, width=c.vision_width,
                              heads=c.vision_heads, embed_dim=c.embed_dim)
    blocks = [vit_block(width=c.vision_width, heads=c.vision_heads, act=ACTIVATIONS[c.act])
              for _ in range(c.vision_layers)]
    return ViT(image_size=c.image_size, patch_size=c.patch_size, width=c.vision_width, blocks=blocks,
               ln_pre=LayerNorm(c.vision_width), ln_post=LayerNorm(c.vision_width))


@dataclass
class FeatureGradients:
    """What one micro-batch needs of the whole batch's loss; made by `CLIP.accumulate`."""
    by_image: torch.Tensor               # gradient of the whole loss, (B, E)
    by_text: torch.Tensor
    by_scalars: list
    whole: torch.Tensor                  # the whole loss
    parts: int                           # micro-batches in the whole batch

    def loss(self, image, text, scalars):
        """A scalar worth 1/parts of the whole loss whose gradient is this micro-batch's share."""
        share = (image * self.by_image).sum() + (text * self.by_text).sum()
        share = share + sum((s * g).sum() for s, g in zip(scalars, self.by_scalars)) / self.parts
        return share - share.detach() + self.whole / self.parts


def blocks_of(tower):
    """The transformer's blocks in a tower; a ResNet has none."""
    return [module for module in tower.modules() if isinstance(module, Block)]


class CLIP(nn.Module):
    """Both towers, their bias-free projections and the learned scale (paper, Figure 3)."""

    def __init__(self, config):
        super().__init__()
        self.config, c, act = config, config, ACTIVATIONS[config.act]
        self.vision = image_tower(c)
        self.text = TextTower(
            vocab_size=c.vocab_size, context_length=c.context_length, width=c.text_width, eos_id=c.eos_id,
            blocks=[vit_block(width=c.text_width, heads=c.text_heads, act=act)
                    for _ in range(c.text_layers)])
        # A ResNet's pool ends in the projection, and that one has a bias.
        self.image_projection = nn.Identity() if c.stages else \
            nn.Linear(c.vision_width, c.embed_dim, bias=False)
        self.text_projection = nn.Linear(c.text_width, c.embed_dim, bias=False)
        # Its logarithm is learned; the multiplier itself starts at 1 / 0.07, SigLIP's at 10.
        sigmoid = c.loss == "sigmoid"
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10 if sigmoid else 1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if sigmoid else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """OpenAI's initialisation: text by width and depth, a ViT as torch's own layers.

        A ResNet comes with its own.
        """
        width, layers = self.config.text_width, self.config.text_layers
        nn.init.normal_(self.text.token_embed.weight, std=0.02)
        nn.init.normal_(self.text.pos_embed, std=0.01)
        for projection in (self.text_projection, self.image_projection):
            for weight in projection.parameters():
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        for block in blocks_of(self.text):
            residual = width ** -0.5 * (2 * layers) ** -0.5
            for linear in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj):
                nn.init.normal_(linear.weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=residual)
        for block in blocks_of(self.vision):
            for linear in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj):
                # Xavier over the fused (3D, D) matrix of torch's layer, hence the 4.
                bound = (6 / (4 * linear.in_features)) ** 0.5
                nn.init.uniform_(linear.weight, -bound, bound)
        for block in (*blocks_of(self.text), *blocks_of(self.vision)):
            for linear in block.attn.children():
                nn.init.zeros_(linear.bias)

    def encode_image(self, images):
        """images float (B, 3, H, W), normalised -> unit vectors (B, E), float32 or wider."""
        return F.normalize(to_float32(self.image_projection(self.image_features(images))), dim=-1)

    def image_features(self, images):
        """What a linear probe reads: (B, D).

        A ViT's class token before the projection (paper, A.3), what a ResNet's pool returns.
        """
        return self.vision.features(images)

    def encode_text(self, ids):
        """ids int64 (B, T) -> unit vectors (B, E), float32 or wider."""
        return F.normalize(to_float32(self.text_projection(self.text(ids))), dim=-1)

    def features(self, batch):
        """batch: images uint8 (B, 3, H, W), ids int64 (B, T) -> unit vectors (B, E), (B, E)."""
        return self.encode_image(normalize_pixels(batch["images"])), self.encode_text(batch["ids"])

    def scalars(self):
        """The learned numbers of the loss: [logit_scale], for SigLIP [logit_scale, logit_bias]."""
        return [s for s in (self.logit_scale, self.logit_bias) if s is not None]

    def loss(self, image, text, scalars, gather=losses.no_gather):
        """The contrastive loss of unit vectors (B, E), (B, E) under the numbers of `scalars`."""
        kind = losses.softmax_contrastive if len(scalars) == 1 else losses.sigmoid_contrastive
        return kind(image, text, scalars[0].exp(), *scalars[1:], gather=gather)

    def forward(self, batch, gather=losses.no_gather, cached=None):
        """A batch as in `features` -> {"contrastive": scalar, in nats}.

        cached: this micro-batch's part of a larger batch, from `accumulate`.
        """
        image, text = self.features(batch)
        if cached is not None:
            return {"contrastive": cached.loss(image, text, self.scalars())}
        return {"contrastive": self.loss(image, text, self.scalars(), gather)}

    def accumulate(self, batches, gather=losses.no_gather):
        """Micro-batches -> one Cached for each, so that their losses add up to the whole batch's.

        Averaging the losses of micro-batches would shrink the negatives to a micro-batch. Instead
        all features are made without gradients, the loss is taken once over all of them, and its
        gradient with respect to each feature is kept; then `forward` makes each micro-batch's
        features again and pushes that gradient through its tower (feature caching, as in BASIC and
        GradCache). The scale and the bias meet the whole loss once, so their gradient is exact too:
        re-running the loss for each of K micro-batches would give them K times theirs.

        A ResNet's BatchNorm sees micro-batches in both passes, so a step is exact for pictures
        normalised in these groups, not for one large group. Its running statistics move once.
        """
        with torch.no_grad(), freeze_bn_stats(self.vision):
            made = [self.features(batch) for batch in batches]
        image, text = (torch.cat(side).requires_grad_() for side in zip(*made))
        scalars = [s.detach().requires_grad_() for s in self.scalars()]
        loss = self.loss(image, text, scalars, gather)
        by_image, by_text, *by_scalars = torch.autograd.grad(loss, [image, text, *scalars])
        sizes = [len(batch["ids"]) for batch in batches]
        return [FeatureGradients(i, t, by_scalars, loss.detach(), len(batches))
                for i, t in zip(by_image.split(sizes), by_text.split(sizes))]

    @torch.no_grad()
    def after_step(self, step):
        """The multiplier never passes 100 (paper, 2.5)."""
        self.logit_scale.clamp_(max=math.log(100))

    @torch.no_grad()
    def evaluate(self, data):
        """Retrieval both ways, and zero-shot accuracy where there are classes -> {name: number}."""
        world, figures = data.world, evaluation.retrieval(self.pool(data))
        if not world.zero_shot:
            return figures
        classifier = self.classifier(data.ids, world.all_classes, world.templates)
        return figures | evaluation.zero_shot(
            world, lambda records: self.encode_records(data, records), classifier)

    @torch.no_grad()
    def samples(self, data):
        """A picture for people: what the model finds for unseen sentences and pictures."""
        return evaluation.retrieval_sheet(self.pool(data))

    def pool(self, data):
        """The test pictures and sentences of a data.View, encoded."""
        return evaluation.Pool(data.world, lambda records: self.encode_records(data, records),
                               lambda texts: self.encode_text(data.ids(texts)))

    def encode_records(self, data, records, chunk=256):
        """Unit vectors (N, E) of the records' pictures."""
        parts = [records[k:k + chunk] for k in range(0, len(records), chunk)]
        return torch.cat([self.encode_image(normalize_pixels(data.images(part))) for part in parts])

    def classifier(self, ids, names, templates):
        """A zero-shot classifier (paper, 3.1.4): float (E, C), one unit column for each name.

        ids: texts -> int64 (N, T). Each name is put into every template; the ensemble is taken in
        embedding space: unit vectors, their mean, and that as a unit vector again.
        """
        texts = [template.format(name) for name in names for template in templates]
        vectors = self.encode_text(ids(texts)).view(len(names), len(templates), -1)
        return F.normalize(vectors.mean(dim=1), dim=-1).T


# ------------------------------------------------------------------ using a trained model

class Trained:
    """A CLIP with its tokenizer, ready for pictures and words."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model.eval(), tokenizer

    @torch.no_grad()
    def images(self, pictures):
        """Pillow pictures -> unit vectors (N, E)."""
        size = self.model.config.image_size
        pictures = to_tensor([center_crop(p, size) for p in pictures])
        return self.model.encode_image(normalize_pixels(pictures))

    def ids(self, texts):
        """Texts -> int64 (N, T)."""
        return self.tokenizer.batch(texts, self.model.config.context_length)

    @torch.no_grad()
    def classify(self, picture, names, templates=("{}",)):
        """[(name, probability)], the likeliest first, among the names given."""
        columns = self.model.classifier(self.ids, names, templates)
        logits = self.model.logit_scale.exp() * self.images([picture]) @ columns
        return sorted(zip(names, logits[0].softmax(dim=0).tolist()), key=lambda pair: -pair[1])

    @torch.no_grad()
    def search(self, text, pictures, count=12):
        """[(index, cosine)] of the pictures that fit the text best."""
        parts = [self.images(pictures[k:k + 256]) for k in range(0, len(pictures), 256)]
        cosines = (torch.cat(parts) @ self.model.encode_text(self.ids([text])).T)[:, 0]
        best = cosines.topk(min(count, len(pictures)))
        return list(zip(best.indices.tolist(), best.values.tolist()))


def from_pretrained(path, act=None):
    """A Trained CLIP from a run folder, a Hugging Face folder, or OpenAI's or open_clip's file.

    act: "gelu" or "quick_gelu", for an open_clip file that cannot say which (pretrained/clip.py).
    Raises ValueError in one line when it is none of them, damaged, or of another model.
    """
    if is_published(path):
        config, weights, tokenizer = pretrained.read(path, act)
    else:
        config, tokenizer, weights = checkpoint.open_run(path, "clip")
    model = CLIP(checkpoint.config_of(CLIPConfig, config, path))
    checkpoint.load_weights(model, weights, path)
    return Trained(model, tokenizer)


def classify(run, image, texts):
    """Print how likely each text fits the picture, the likeliest first."""
    for name, probability in from_pretrained(run).classify(open_image(image), texts):
        print(f"{probability:7.2%}  {name}")


def search(run, text, folder):
    """Print the pictures of a folder that fit the text best; draws them in RUN/search.png.

    With published weights the drawing is search.png in the current directory.
    """
    trained = from_pretrained(run)
    paths, pictures = open_folder(folder)
    best = trained.search(text, pictures)
    for index, cosine in best:
        print(f"{cosine:6.3f}  {paths[index]}")
    cells = [(pictures[i], f"{cosine:.2f} {paths[i].stem}", None) for i, cosine in best]
    out = Path("." if is_published(run) else run) / "search.png"
    sheet(f"the best of {len(paths)} pictures for: {text}",
          [("", None, cells[k:k + 6]) for k in range(0, len(cells), 6)]).save(out)
    print(f"drawn in {out}")


def main():
    """The command line: classify and search."""
    commands = cli.Commands(__doc__, "a run folder, or a published CLIP's folder or .pt file")
    commands.add(classify, image="a picture", texts="... what it may show, each in quotes")
    commands.add(search, text="what to look for, in quotes", folder="a folder of pictures")
    return commands.run()


if __name__ == "__main__":
    cli.run(main)
