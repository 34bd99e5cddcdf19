"""CLIP: an image encoder and a text encoder, trained so that matching pairs have similar features.

Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021), with
SigLIP's sigmoid loss as an option (Zhai et al., 2023).

    image -> ViT -> class token -> norm -> linear -> unit vector --+
             (or ResNet -> attention pool)                         +-- cosines * scale -> loss
    text -> causal transformer -> norm -> EOS token -> linear -> --+   (B, B), diagonal = positives

    python train.py clip                                       train one on the shapes world
    python clip.py runs/clip classify PICTURE "a red circle" "a blue star"
    python clip.py runs/clip search "a small green ring" FOLDER

In place of runs/clip: a Hugging Face folder, or OpenAI's .pt file with its vocabulary beside it, or
open_clip's (with --act gelu where no open_clip_config.json beside it says so).

Differs from the paper
- Data: the shapes and emoji worlds or your files, not 400 million pairs. The presets tiny, small
  and RN-tiny and their recipes are ours: Muon (optimizer.py) for the matrices of attention and MLPs
  and AdamW for the rest (paper: AdamW), a linear decay, clipped gradients.
- Crops (files.Files.record): a square of 0.9 to 1 of the largest square's area, from anywhere
  (paper: a random square of the resized image). The worlds' own pictures are not cropped.
- Tokenizer: SentencePiece with 1,024 or 2,048 pieces (paper: byte pairs, 49,152).
- Position tables decay as matrices do, the class token does not (paper: all but gains and biases).
- BatchNorm of a ResNet uses the statistics of each process's micro-batch, so that accumulation is
  exact for a ViT only.
- loss=sigmoid is CLIP with SigLIP's loss (scale starts at 10, bias at -10, no clamp); SigLIP's own
  towers are not here.
"""
import functools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from common import losses
from common.data.batches import DataSource
from common.data.collators import ImageTextBatch
from common.data.images import normalize_pixels
from common.evaluation import retrieval
from common.masks import causal
from common.pretrained import clip as pretrained
from common.pretrained.files import is_published, open_weights
from common.resnet import ModifiedResNet, freeze_bn_stats
from common.training import checkpoint, options
from common.training.optimizer import Recipe
from common.transformer import (Block, LayerNorm, Transformer, gelu, quick_gelu, to_float32,
                                vit_block)
from common.vision import ViT

ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}
LOSSES = ("softmax", "sigmoid")


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of the two encoders. vocab_size and eos_id belong to the tokenizer.

    With stages the image encoder is a ResNet: vision_width is then the width of its stem,
    vision_heads are those of its pool; patch_size and vision_layers are not used.
    Raises ValueError that names the field and its value for one that no model can have.
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
    embed_dim: int = 128                 # of the joint space
    act: str = "gelu"                    # OpenAI's weights need quick_gelu
    loss: str = "softmax"                # or sigmoid, SigLIP's

    def __post_init__(self):
        object.__setattr__(self, "stages", tuple(self.stages))        # JSON has no tuples
        options.check_fields(self, {"loss": LOSSES, "act": ACTIVATIONS},
                             {"context_length": 3, "eos_id": 0})      # 3: <bos>, a word, <eos>


# ------------------------------------------------------------------ the two encoders

class TextTower(nn.Module):
    """A causal transformer; the text feature is its output at the EOS token (paper, 2.4)."""

    def __init__(self, *, vocab_size, context_length, width, blocks, eos_id):
        super().__init__()
        self.eos_id = eos_id
        self.token_embed = nn.Embedding(vocab_size, width)
        self.pos_embed = nn.Parameter(torch.empty(context_length, width))
        self.transformer = Transformer(blocks, LayerNorm(width))

    def forward(self, ids):
        """ids int64 (B, T), each row with an EOS (the tokenizer adds it) -> (B, D).

        The feature is that of the first EOS, found by its id, which need not be the largest.
        There is no padding mask: behind a causal mask, EOS does not attend to what follows it.
        Raises ValueError with both numbers when T is larger than the context.
        """
        B, T = ids.shape
        if T > len(self.pos_embed):
            raise ValueError(f"{T} tokens, but the context is {len(self.pos_embed)}")
        x = self.token_embed(ids) + self.pos_embed[:T]                # (B, T, D)
        mask = causal(T, device=ids.device)
        eos_index = (ids == self.eos_id).int().argmax(dim=1)          # (B,), the first EOS
        # The plain line: return self.transformer(x, mask=mask)[torch.arange(B), eos_index]
        # The same, faster: the last block computes this one position of each text.
        return self.transformer.forward_at(x, eos_index, mask=mask)


def image_tower(c):
    """The image encoder of a config: ViT or ResNet. CLIP takes its `pooled(images)`, (B, width)."""
    if c.stages:
        return ModifiedResNet(image_size=c.image_size, stages=c.stages, width=c.vision_width,
                              heads=c.vision_heads, embed_dim=c.embed_dim)
    blocks = [vit_block(width=c.vision_width, heads=c.vision_heads, act=ACTIVATIONS[c.act])
              for _ in range(c.vision_layers)]
    return ViT(image_size=c.image_size, patch_size=c.patch_size, width=c.vision_width,
               blocks=blocks, ln_pre=LayerNorm(c.vision_width), ln_post=LayerNorm(c.vision_width))


# ------------------------------------------------------------------ the model

@dataclass
class FeatureGradients:
    """The gradients of a large batch's loss that one micro-batch needs; see CLIP.cache_features."""
    image: torch.Tensor                  # (B, E), with respect to its image features
    text: torch.Tensor                   # (B, E), with respect to its text features
    scalars: tuple                       # with respect to `CLIP.scalars`
    whole_loss: torch.Tensor
    parts: int                           # micro-batches in the large batch

    def loss(self, image, text, scalars):
        """A surrogate: its value is whole_loss / parts, its gradients are the stored ones, for the
        scalars stored / parts."""
        share = (image * self.image).sum() + (text * self.text).sum()
        share = share + sum((s * g).sum() for s, g in zip(scalars, self.scalars)) / self.parts
        return share - share.detach() + self.whole_loss / self.parts


class CLIP(nn.Module):
    """Two encoders, a projection each, and the learned scale of the cosines (paper, Figure 3)."""

    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        self.vision = image_tower(c)
        self.text = TextTower(
            vocab_size=c.vocab_size, context_length=c.context_length, width=c.text_width,
            eos_id=c.eos_id,
            blocks=[vit_block(width=c.text_width, heads=c.text_heads, act=ACTIVATIONS[c.act])
                    for _ in range(c.text_layers)])
        # The projections have no bias. A ResNet's attention pool ends in its own, which has one.
        self.image_projection = nn.Identity() if c.stages else \
            nn.Linear(c.vision_width, c.embed_dim, bias=False)
        self.text_projection = nn.Linear(c.text_width, c.embed_dim, bias=False)
        # logits = exp(t) * cosine; exp(t) = 1 / temperature starts at 1 / 0.07, in SigLIP at 10. A
        # scalar never decays, see parameter_groups.
        sigmoid = c.loss == "sigmoid"
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10 if sigmoid else 1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if sigmoid else None
        init_weights(self)

    def encode_image(self, images):
        """images float (B, 3, H, W), normalized -> unit vectors (B, E), float32 or wider."""
        return F.normalize(to_float32(self.image_projection(self.image_features(images))), dim=-1)

    def image_features(self, images):
        """images float (B, 3, H, W) -> (B, D): what a linear probe is trained on (paper, A.3).

        The class token before the projection; of a ResNet what its attention pool returns.
        """
        return self.vision.pooled(images)

    def encode_text(self, ids):
        """ids int64 (B, T) -> unit vectors (B, E), float32 or wider."""
        return F.normalize(to_float32(self.text_projection(self.text(ids))), dim=-1)

    def forward(self, batch, gather=losses.no_gather):
        """{"images": uint8 (B, 3, H, W), "ids": int64 (B, T)} -> {"contrastive": scalar, in nats}.

        The paper's Figure 3, line by line (E features, scale exp(t)):
            I_e = l2_normalize(image_encoder(I) @ W_i)         (B, E)
            T_e = l2_normalize(text_encoder(T) @ W_t)          (B, E)
            logits = I_e @ T_e.T * exp(t)                      (B, B)
            loss = (cross_entropy(logits, arange(B)) + cross_entropy(logits.T, arange(B))) / 2
        """
        image = self.encode_image(normalize_pixels(batch["images"]))  # (B, E)
        text = self.encode_text(batch["ids"])                         # (B, E)
        if "feature_gradients" in batch:             # a part of a larger batch, see cache_features
            return {"contrastive": batch["feature_gradients"].loss(image, text, self.scalars())}
        return {"contrastive": self.loss(image, text, self.scalars(), gather)}

    def scalars(self):
        """The learned scalars of the loss: [logit_scale], for SigLIP [logit_scale, logit_bias]."""
        return [s for s in (self.logit_scale, self.logit_bias) if s is not None]

    def loss(self, image, text, scalars, gather=losses.no_gather):
        """The contrastive loss of unit vectors (B, E), (B, E); scalars as in `scalars`."""
        loss = losses.softmax_contrastive if len(scalars) == 1 else losses.sigmoid_contrastive
        return loss(image, text, scalars[0].exp(), *scalars[1:], gather=gather)

    def cache_features(self, batches, gather=losses.no_gather):
        """K micro-batches -> a FeatureGradients each: the K losses add up to the large batch's.

        The mean of the micro-batches' own losses would have fewer negatives. So all features are
        first computed without gradients, and the loss of the whole batch gives the gradient of each
        feature. Then `forward` computes each micro-batch again and passes that gradient on to the
        encoders (feature caching, as in BASIC and GradCache). Each micro-batch takes a K-th of the
        scale's gradient; the whole loss in each of them would give it K times. With a ResNet the
        gradients are not exact: BatchNorm normalizes by micro-batch.
        """
        with torch.no_grad(), freeze_bn_stats(self.vision):
            features = [(self.encode_image(normalize_pixels(batch["images"])),
                         self.encode_text(batch["ids"])) for batch in batches]
        image, text = (torch.cat(side).requires_grad_() for side in zip(*features))
        scalars = [s.detach().requires_grad_() for s in self.scalars()]
        loss = self.loss(image, text, scalars, gather)
        grads = torch.autograd.grad(loss, [image, text, *scalars])
        sizes = [len(batch["ids"]) for batch in batches]
        return [FeatureGradients(i, t, grads[2:], loss.detach(), len(batches))
                for i, t in zip(grads[0].split(sizes), grads[1].split(sizes))]

    @torch.no_grad()
    def after_step(self, step):
        """The scale never exceeds 100 (paper, 2.5); SigLIP has no such limit."""
        if self.logit_bias is None:
            self.logit_scale.clamp_(max=math.log(100))

    def class_probabilities(self, image, classifier):
        """image (B, E), classifier (E, C), unit vectors -> (B, C); SigLIP's do not sum to 1."""
        logits = self.logit_scale.exp() * image @ classifier
        return logits.softmax(dim=1) if self.logit_bias is None else \
            (logits + self.logit_bias).sigmoid()

    def check_batch(self, batch_size, accumulate):
        """Raise ValueError for a batch without a wrong pair."""
        if batch_size < 2:
            raise ValueError(f"--batch_size {batch_size}: a contrastive loss needs at least two")

    @torch.no_grad()
    def evaluate(self, data):
        """Retrieval in both directions, and zero-shot accuracy where the world has classes."""
        return retrieval.evaluate(self, data)

    @torch.no_grad()
    def samples(self, data):
        """An image for people: what is retrieved for unseen texts and images."""
        return retrieval.samples(self, data)


@torch.no_grad()
def init_weights(model):
    """OpenAI's initialization: the text encoder by its width and depth, a ViT as torch's layers.

    A ResNet initializes itself.
    """
    width, layers = model.config.text_width, model.config.text_layers
    nn.init.normal_(model.text.token_embed.weight, std=0.02)
    nn.init.normal_(model.text.pos_embed, std=0.01)
    for projection in (model.text_projection, model.image_projection):
        for weight in projection.parameters():
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    for block in model.text.transformer.blocks:
        residual_std = width ** -0.5 * (2 * layers) ** -0.5           # smaller in deeper towers
        for linear in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj):
            nn.init.normal_(linear.weight, std=width ** -0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
        nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.fc2.weight, std=residual_std)
    for block in (m for m in model.vision.modules() if isinstance(m, Block)):
        for linear in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj):
            # Xavier's bound for the fused (3D, D) matrix of torch's layer, hence the 4.
            bound = (6 / (4 * linear.in_features)) ** 0.5
            nn.init.uniform_(linear.weight, -bound, bound)
    for block in (m for m in model.modules() if isinstance(m, Block)):
        for linear in block.attn.children():
            nn.init.zeros_(linear.bias)


# ------------------------------------------------------------------ presets and recipes

def paper_vit(image_size, patch_size, width, layers, text_width, embed_dim):
    """A config of the paper's Table 20: heads are 64 wide, the text encoder has 12 layers."""
    return CLIPConfig(
        image_size=image_size, patch_size=patch_size, vision_width=width, vision_layers=layers,
        vision_heads=width // 64, text_width=text_width, text_layers=12,
        text_heads=text_width // 64, context_length=77, vocab_size=49408, eos_id=49407,
        embed_dim=embed_dim, act="quick_gelu")


def paper_resnet(image_size, stages, width, text_width, embed_dim):
    """A config of the paper's Table 19: the pool is 32 * width wide, its heads are 64 wide."""
    vit = paper_vit(image_size, 32, width, 12, text_width, embed_dim)
    return replace(vit, stages=stages, vision_heads=width * 32 // 64)


PRESETS = {
    "tiny": CLIPConfig(),
    "small": CLIPConfig(image_size=64, vision_width=384, vision_layers=8, vision_heads=6,
                        text_width=256, text_layers=6, text_heads=4, context_length=64,
                        embed_dim=256),
    "ViT-B/32": paper_vit(224, 32, 768, 12, 512, 512),
    "ViT-B/16": paper_vit(224, 16, 768, 12, 512, 512),
    "ViT-L/14": paper_vit(224, 14, 1024, 24, 768, 768),
    "ViT-L/14@336": paper_vit(336, 14, 1024, 24, 768, 768),
    "RN-tiny": CLIPConfig(image_size=64, stages=(1, 1, 1, 1), vision_width=16, vision_heads=8),
    "RN50": paper_resnet(224, (3, 4, 6, 3), 64, 512, 1024),
    "RN101": paper_resnet(224, (3, 4, 23, 3), 64, 512, 512),
    "RN50x4": paper_resnet(288, (4, 6, 10, 6), 80, 640, 640),
    "RN50x16": paper_resnet(384, (6, 8, 18, 8), 96, 768, 768),
    "RN50x64": paper_resnet(448, (3, 15, 36, 10), 128, 1024, 1024),
}
TRAINS = {"clip": ("*",)}

# The paper's (its 2.5 and appendix F): 32 epochs of 400M pairs. It clips no gradients.
PAPER = Recipe(steps=390000, batch_size=32768, lr=5e-4, warmup=2000, grad_clip=None)
PAPER_RESNET = replace(PAPER, betas=(0.9, 0.999), eps=1e-8)
TINY = Recipe(steps=600, batch_size=128, lr=1e-3, schedule="linear", optimizer="muon",
              muon_lr_multiplier=4.0)
RECIPES = {
    "tiny": TINY,
    "tiny emoji": replace(TINY, steps=400, batch_size=256, weight_decay=2.0,
                          muon_lr_multiplier=6.0),
    "small": replace(TINY, steps=3000, batch_size=1024, lr=5e-4, warmup=300),
    "RN-tiny": replace(TINY, steps=1200, betas=(0.9, 0.999), eps=1e-8),
    "ViT-L/14": replace(PAPER, lr=4e-4),
    "ViT-L/14@336": replace(PAPER, lr=2e-5, steps=12200),             # one more epoch
    "RN50": PAPER_RESNET, "RN101": PAPER_RESNET, "RN50x4": PAPER_RESNET,
    "RN50x16": replace(PAPER_RESNET, lr=4e-4), "RN50x64": replace(PAPER_RESNET, lr=3.6e-4),
    "": PAPER,
}


def data_sources(world, tokenizer, config):
    """What the clip stage learns from: images with one caption each."""
    return [DataSource(world, ImageTextBatch(tokenizer, config.context_length, config.image_size))]


# ------------------------------------------------------------------ using a trained model

def from_pretrained(path, act=None):
    """A Retriever of a run folder, a Hugging Face folder, or OpenAI's or open_clip's file.

    act: "gelu" or "quick_gelu", for an open_clip file that does not say which. The Retriever
    normalizes pictures as the folder says. Raises ValueError in one line when it is none of them,
    damaged, or of another model.
    """
    read = functools.partial(pretrained.read, act=act)
    config, tokenizer, weights = open_weights(path, "clip", read)
    config = config | ({"act": act} if act else {})
    pictures = pretrained.preprocessing(path, config["image_size"], pretrained.CROP) \
        if is_published(path) else {}
    with torch.device("meta"):           # no time spent on random weights
        model = CLIP(checkpoint.config_of(CLIPConfig, config, path))
    checkpoint.load_weights(model, weights, path)
    return retrieval.Retriever(model, tokenizer, **pictures)


def main():
    """The command line: classify and search."""
    return retrieval.main(__doc__, from_pretrained)


if __name__ == "__main__":
    options.run_main(main)
