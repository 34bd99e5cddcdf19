"""BLIP: one model that understands and writes, and a data engine that cleans its own captions.

BLIP: Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding and
Generation (Li, Li, Xiong, Hoi, 2022).

    image -> ViT -> class token and patches --+--------------------+
              |                               v keys, values       v keys, values
    ITC: [CLS] text -> encoder   ITM: [ENC] text -> encoder   LM: [DEC] text -> decoder (causal)
         cosines: which pair?         yes or no: a pair?           the next word
         encoder and decoder share all their weights but self-attention (paper, Figure 2)

    python train.py clip && python train.py blip          from noisy web texts, 40% of them false
    python train.py bootstrap --resume                    captioner, filter, new texts, a new model
    python blip.py runs/blip caption PICTURE
    python blip.py runs/blip match PICTURE "a red circle"
    python train.py blip-vqa && python blip.py runs/blip-vqa answer PICTURE "what colour is it?"

Differs from the paper
- Data: the shapes world stands for web and human pairs; emoji and files of your own work as well.
  An epoch has each image once, with one of its captions or questions. The presets tiny and small
  and their recipes are ours: Muon (optimizer.py) for the matrices of attention and MLPs, AdamW for
  the rest (paper: AdamW); a faster momentum (0.98, 0.99), since a run is short; softer negatives
  (`hardness`), since the most similar text may be true here. The learning rate falls by a cosine
  or a line (paper: by 0.85 an epoch), gains and biases do not decay.
- The image encoder starts as that of a CLIP run, or from random weights (--from vision=none), the
  text transformer from random weights (paper: an ImageNet ViT and BERT). Narrow towers start with
  larger weights. There is no dropout, no drop-path and no augmentation but a crop; fine-tuning
  keeps the image size (paper: 384 or 480).
- Published weights: images are cropped to a square (released code: squeezed to one), captions are
  not cleaned, beams have no least length and nucleus sampling no repetition penalty.
- Tokens: a text ends with <eos>, where BERT has [SEP].
- The batch's keys and the hard negatives come from all processes (released code: from its own). Two
  uniform numbers that come with each pair draw its negatives: any number of processes draws alike.
- Other captions of an image that are in the queue count as wrong, for a filter as well (released
  code for retrieval: as right). Re-ranking takes the 16 best (released code: 128 or 256).
- VQA has one answer to a question unless the data gives several. All candidates are ranked by their
  log p (released code: the 128 with the likeliest first token, by the smoothed loss).
- Visual dialogue has no released code: `Dialogue` is our reading of the paper's Figure 5 (c).
"""
import contextlib
import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from clip import CLIPConfig, image_tower
from clip import from_pretrained as clip_from_pretrained
from common import losses
from common.bert import Bert, starts_with
from common.data.batches import DataSource
from common.data.collators import (CaptionBatch, DialogueBatch, PairBatch, QuestionBatch,
                                    as_turns)
from common.data.images import center_crop, normalize_pixels, to_tensor
from common.data.tokenizer import CLS, DEC, ENC, EOS, PAD
from common.evaluation import judging, matching, questions, retrieval, writing
from common.evaluation.sheet import stack
from common.prompts import labels_of
from common.pretrained import blip as pretrained
from common.pretrained.files import open_weights
from common.training import checkpoint, options
from common.training.optimizer import Recipe
from common.transformer import LayerNorm, LearnedPositions, to_float32, vit_block
from common.vision import ViT

# The modules of a block that encoder and decoder share (paper, Table 3).
FEED_FORWARD, CROSS, SELF = ("mlp", "mlp_norm"), ("cross", "cross_norm"), ("attn", "attn_norm")
SHARING = {
    "all": FEED_FORWARD + CROSS + SELF,
    "all-but-sa": FEED_FORWARD + CROSS,
    "all-but-ca": FEED_FORWARD + SELF,
    "none": (),
}
EMBEDDINGS = ("token_embed", "pos_embed", "norm")    # shared, too, except with "none"
MOMENTUM_PARTS = ("vision", "encoder", "image_projection", "text_projection")
ALL_LOSSES = "itc,itm,lm"
LOSSES = (ALL_LOSSES, "itc,itm", "itc,lm", "itc", "lm", "vqa", "two-images", "dialogue")


@dataclass(frozen=True)
class BLIPConfig:
    """Sizes of image encoder and text transformers, and how they are trained.

    Raises ValueError that names the field and its value for one that no model can have.
    """
    image_size: int = 32
    patch_size: int = 8
    vision_width: int = 128
    vision_layers: int = 4
    vision_heads: int = 4
    vision_eps: float = 1e-6
    vision: CLIPConfig | None = None     # the image encoder of a CLIP run in place of these sizes
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4
    context_length: int = 64
    vocab_size: int = 1024
    pad_id: int = PAD
    eos_id: int = EOS
    cls_id: int = CLS
    enc_id: int = ENC
    dec_id: int = DEC
    embed_dim: int = 128                 # E, of the joint space
    losses: str = ALL_LOSSES             # parts that no loss needs are left out
    sharing: str = "all-but-sa"          # of SHARING
    momentum: float = 0.98               # of the second pair of encoders; 0: there is none
    queue_size: int = 960                # K, momentum features that are kept
    alpha: float = 0.4                   # weight of the soft targets after their ramp
    hardness: float = 1.0                # of the negatives: 0 random, 1 as the paper's
    label_smoothing: float = 0.1
    prompt: str = "a picture of "        # before every caption where lm is the only loss
    human_only: bool = False             # all three losses learn from human pairs alone

    def __post_init__(self):
        if isinstance(self.vision, dict):                             # as JSON has it
            part = checkpoint.config_of(CLIPConfig, self.vision, "vision")
            object.__setattr__(self, "vision", part)
        if self.vision:
            if self.vision.stages:
                raise ValueError("vision: a ResNet; BLIP takes the tokens of a ViT")
            for name in ("image_size", "patch_size", "vision_width"):
                object.__setattr__(self, name, getattr(self.vision, name))
        fractions = ("momentum", "alpha", "label_smoothing")
        options.check_fields(
            self, {"losses": LOSSES, "sharing": SHARING},
            dict.fromkeys((*fractions, "hardness", "queue_size", "pad_id", "eos_id", "cls_id",
                           "enc_id", "dec_id"), 0), dict.fromkeys(fractions, 1))


# ------------------------------------------------------------------ the mixture of encoder-decoder

def make_vision(c):
    """The image encoder: a ViT, whose tokens all feed cross-attention. (B, 3, H, W) -> (B, S, D)"""
    if c.vision:
        return image_tower(c.vision)
    blocks = [vit_block(width=c.vision_width, heads=c.vision_heads, eps=c.vision_eps)
              for _ in range(c.vision_layers)]
    return ViT(image_size=c.image_size, patch_size=c.patch_size, width=c.vision_width,
               blocks=blocks, ln_post=LayerNorm(c.vision_width, c.vision_eps), patch_bias=True)


def make_text(c, context_width, has_head=False):
    """One text transformer of the config; context_width: D of what it cross-attends to, or None."""
    return Bert(vocab_size=c.vocab_size, context_length=c.context_length, width=c.text_width,
                layers=c.text_layers, heads=c.text_heads, context_width=context_width,
                has_head=has_head)


def share(encoder, decoder, sharing):
    """Let the decoder use the encoder's modules that `sharing` names (paper, 3.1 and Table 3)."""
    for encoder_block, decoder_block in zip(encoder.blocks, decoder.blocks):
        for part in SHARING[sharing]:
            if getattr(encoder_block, part) is not None:              # without itm: no cross
                setattr(decoder_block, part, getattr(encoder_block, part))
    for part in EMBEDDINGS if sharing != "none" else ():
        setattr(decoder, part, getattr(encoder, part))


class BLIP(nn.Module):
    """A ViT and one text transformer with three uses (paper, Figure 2)."""

    banned_ids = ()                      # ids that are never written
    caption_options, answer_options = {"num_beams": 3}, {}

    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        self.losses, self.stop_ids = c.losses.split(","), (c.eos_id,)
        self.vision = make_vision(c)
        self.encoder = self.decoder = None
        self.make_text()
        if "itc" in self.losses:
            self.image_projection = nn.Linear(c.vision_width, c.embed_dim)
            self.text_projection = nn.Linear(c.text_width, c.embed_dim)
            self.temp = nn.Parameter(torch.tensor(0.07))              # it divides the cosines
        if "itm" in self.losses:
            self.itm_head = nn.Linear(c.text_width, 2)                # class 1: a pair
        init_weights(self)
        if "itc" in self.losses:
            self.make_momentum()

    def make_text(self):
        """The text encoder and the decoder, each where a loss needs it."""
        c = self.config
        if "itc" in self.losses:
            self.encoder = make_text(c, c.vision_width if "itm" in self.losses else None)
        if "lm" in self.losses:
            self.decoder = make_text(c, c.vision_width, has_head=True)
        if self.encoder and self.decoder:
            share(self.encoder, self.decoder, c.sharing)

    def make_momentum(self):
        """The momentum encoders, equal to the trained ones at the start, and two queues (K, E)."""
        c = self.config
        self.momentum = nn.Module()
        for name in MOMENTUM_PARTS if c.momentum else ():
            setattr(self.momentum, name, copy.deepcopy(getattr(self, name)).requires_grad_(False))
        for name in ("image_queue", "text_queue"):
            noise = torch.randn(c.queue_size, c.embed_dim)
            self.register_buffer(name, F.normalize(noise, dim=-1))
        self.register_buffer("queue_next", torch.zeros((), dtype=torch.int64))
        self.register_buffer("alpha", torch.zeros(()), persistent=False)

    def adapt(self, weights):
        """The weights of another run of BLIP without those of parts that this model lacks."""
        own = self.state_dict()
        return {name: value for name, value in weights.items() if name in own}

    # -------------------------------------------------------------- three uses of one text model

    def image_feature(self, cls, model=None):
        """The class token (B, D) -> unit vectors (B, E); model: self, or its momentum copy."""
        projection = (model or self).image_projection
        return F.normalize(to_float32(projection(cls)), dim=-1)

    def text_feature(self, ids, model=None):
        """[CLS] text, without the image: ids int64 (B, T) -> unit vectors (B, E)."""
        model, c = model or self, self.config
        x = model.encoder.first(starts_with(ids, c.cls_id), mask=ids != c.pad_id)      # (B, D)
        return F.normalize(to_float32(model.text_projection(x)), dim=-1)

    def match(self, image, ids):
        """[ENC] text that attends to image tokens (B, S, D): ids (B, T) -> logits (B, 2).

        Class 1: they are a pair.
        """
        c = self.config
        x = self.encoder.first(starts_with(ids, c.enc_id), image, mask=ids != c.pad_id)
        return self.itm_head(x)                                       # from (B, D)

    def logits(self, ids, mask=None, cache=None, last=False, *, context, context_mask=None):
        """Causal text that attends to context (B, S, C): ids (B, T) -> logits (B, T, V).

        The caller puts [DEC] first. The arguments are those of `Bert.logits`.
        """
        return self.decoder.logits(ids, context, mask=mask, context_mask=context_mask, cache=cache,
                                   last=last)

    def encode_image(self, images):
        """images float (B, 3, H, W), normalized -> unit vectors (B, E), float32 or wider."""
        return self.image_feature(self.vision.pooled(images))

    def encode_text(self, ids):
        """ids int64 (B, T) -> unit vectors (B, E), float32 or wider."""
        return self.text_feature(ids)

    # -------------------------------------------------------------- three losses

    def forward(self, batch, gather=losses.no_gather):
        """A batch of `CaptionBatch` with "label_count" -> {"itc", "itm", "lm": scalar, in nats}.

        One pass through the ViT, three through the text transformer (paper, 3.2). Called once for a
        step: it also adds the step's keys to the queues.
        """
        pixels, ids, found = normalize_pixels(batch["images"]), batch["ids"], {}
        image = self.vision(pixels)                                   # (B, S, D)
        if "itc" in self.losses:
            features = self.image_feature(image[:, 0]), self.text_feature(ids)   # (B, E) each
            found["itc"], scores = self.itc(*features, *self.keys(pixels, ids, features), gather)
        if "itm" in self.losses:
            found["itm"] = self.itm(image, ids, *scores, batch["draws"], gather)
        if "lm" in self.losses:
            found["lm"] = self.lm(image, ids, batch["labels"], batch.get("label_count"))
        return found

    @torch.no_grad()
    def keys(self, pixels, ids, features):
        """What the queries are compared with: momentum features of the batch, two (B, E)."""
        if not self.config.momentum:
            return [x.detach() for x in features]
        return (self.image_feature(self.momentum.vision.pooled(pixels), self.momentum),
                self.text_feature(ids, self.momentum))

    def itc(self, image, text, image_keys, text_keys, gather=losses.no_gather):
        """Image-text contrast (ALBEF, 3.2 and 3.3) -> (loss, (image scores, text scores)).

        image, text (B, E): queries. image_keys, text_keys (B, E), without gradient: momentum
        features of the same pairs. Keys are those of all processes and the K of the queue. Targets:
        (1 - alpha) * one-hot + alpha * the softmax that the momentum feature gives in the query's
        place. Scores (B, B_all): the logits of the batch's keys, without the queue's.
        """
        (image_keys, first), (text_keys, _) = gather(image_keys), gather(text_keys)   # (B_all, E)
        own = torch.arange(len(image), device=image.device) + first   # the positives' columns

        def direction(queries, momentum_queries, keys, queue):
            keys = torch.cat([keys, queue])                           # (B_all + K, E)
            logits = queries @ keys.T / self.temp                     # (B, B_all + K)
            with torch.no_grad():
                hard = F.one_hot(own, len(keys))
                soft = (momentum_queries @ keys.T / self.temp).softmax(dim=1)
                target = self.alpha * soft + (1 - self.alpha) * hard
            return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean(), logits.detach()
        rows = slice(first, first + len(image))
        with losses.no_autocast(image):
            image_loss, image_logits = direction(image, image_keys[rows], text_keys,
                                                 self.text_queue)
            text_loss, text_logits = direction(text, text_keys[rows], image_keys, self.image_queue)
        self.enqueue(image_keys, text_keys)
        scores = image_logits[:, :len(image_keys)], text_logits[:, :len(image_keys)]
        return (image_loss + text_loss) / 2, scores

    @torch.no_grad()
    def enqueue(self, image_keys, text_keys):
        """Replace the oldest keys of the queues by these, two (B_all, E), and wrap around."""
        size = self.config.queue_size
        if size:
            places = torch.arange(len(image_keys), device=image_keys.device)
            places = (self.queue_next + places) % size
            self.image_queue[places], self.text_queue[places] = image_keys, text_keys
            self.queue_next.copy_((self.queue_next + len(image_keys)) % size)

    def itm(self, image, ids, image_scores, text_scores, draws, gather=losses.no_gather):
        """Image-text matching with hard negatives (ALBEF, 3.2) -> scalar, in nats.

        image (B, S, D) and ids (B, T) are pairs; scores (B, B_all) as `itc` gives them; draws
        (B, 2), uniform.
        """
        c = self.config
        return losses.matching(self.match, image, ids, c.hardness * image_scores,
                               c.hardness * text_scores, draws, gather, c.context_length, c.pad_id)

    def lm(self, image, ids, labels, label_count=None):
        """Language modeling: each next token of a text, given the image (B, S, D) -> scalar, nats.

        ids, labels int64 (B, T), aligned, -100 where the loss does not count: padding, and the
        prompt of a captioner.
        """
        c = self.config
        logits = self.logits(starts_with(ids, c.dec_id), mask=ids != c.pad_id, context=image)
        return losses.next_token_loss(logits, labels, label_count, c.label_smoothing)

    # -------------------------------------------------------------- hooks of the training loop

    def check_batch(self, batch_size, accumulate):
        """Raise ValueError for a batch that the queue or the losses cannot have."""
        size = self.config.queue_size
        if "itc" in self.losses and (size % batch_size or batch_size < 2):
            raise ValueError(f"queue_size={size} must be a multiple of the batch of {batch_size}, "
                             "which is at least 2; --set queue_size=0 does without a queue")
        if self.config.losses != "lm" and accumulate > 1:
            raise ValueError(f"--accumulate {accumulate}: hard negatives need the whole batch; "
                             "only --losses lm can be accumulated")

    def before_step(self, step, steps):
        """The weight of the soft targets rises from 0: at first they are as good as random."""
        if "itc" in self.losses:
            self.alpha.fill_(self.config.alpha * min(1.0, step / max(1, 0.1 * steps)))

    @torch.no_grad()
    def after_step(self, step):
        """Move the momentum encoders a little; keep the temperature in bounds."""
        if "itc" in self.losses:
            self.temp.clamp_(0.001, 0.5)
            self.move_momentum(1 - self.config.momentum)

    @torch.no_grad()
    def move_momentum(self, weight=1.0):
        """Move the momentum encoders towards the trained ones; 1: they become equal."""
        for name, part in self.momentum.named_children():
            for old, new in zip(part.parameters(), getattr(self, name).parameters()):
                old.lerp_(new, weight)

    # -------------------------------------------------------------- use and figures

    def prepare(self, records, tokenizer):
        """Records -> (ids, mask, {"context"}): [DEC] and the prompt, to be continued."""
        prompt = self.config.prompt if self.config.losses == "lm" else ""
        ids = [self.config.dec_id, *tokenizer.encode(prompt)]
        image = self.vision(self.pixels(records))                     # (B, S, D)
        ids = torch.tensor(ids, device=image.device).expand(len(records), -1)
        return ids, torch.ones_like(ids, dtype=torch.bool), {"context": image}

    def pixels(self, records):
        """The first image of each record -> float (B, 3, H, W), normalized."""
        images = [center_crop(as_turns(r)[0]["images"][0][0], self.config.image_size)
                  for r in records]
        return normalize_pixels(to_tensor(images).to(self.vision.pos_embed.device))

    @torch.no_grad()
    def evaluate(self, data, count=400):
        """Retrieval, matching and captions, as far as the losses train them -> {name: number}."""
        figures = {}
        if "itc" in self.losses:
            pool = retrieval.make_pool(self, data)
            figures = pool.figures() | retrieval.zero_shot(self, data)
        if "itm" in self.losses:
            figures |= matching.evaluate(self, data, pool, count)
        if "lm" in self.losses:
            figures |= questions.captions(writing.Writer(self, data.tokenizer), data.world, count)
        return figures

    @torch.no_grad()
    def samples(self, data):
        """An image for people: captions of unseen images, and hard negatives beside theirs."""
        sheets = []
        if "lm" in self.losses:
            writer = writing.Writer(self, data.tokenizer)
            sheets.append(writing.samples(writer, data, shots=False))
        if "itm" in self.losses:
            sheets.append(matching.samples(self, data, retrieval.make_pool(self, data)))
        return stack(sheets) if sheets else retrieval.samples(self, data)


@torch.no_grad()
def init_weights(model):
    """Linear layers and embeddings: N(0, 0.02) at the paper's width of 768, biases 0.

    A narrow tower with 0.02 starts with small outputs and learns slowly: the deviation grows with
    the square root of 768 / text_width. The ViT's positions and class token keep theirs.
    """
    std = 0.02 * (768 / model.config.text_width) ** 0.5
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding, LearnedPositions)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


# ------------------------------------------------------------------ fine-tuned on other tasks

class VQA(BLIP):
    """Questions: an encoder reads question and image, a decoder answers (paper, 5.3).

    The decoder attends to the encoder's states of the question, not to the image (Figure 5 a).
    """

    def make_text(self):
        """Two separate transformers; the decoder's cross-attention takes the text's width."""
        c = self.config
        self.encoder = make_text(c, c.vision_width)
        self.decoder = make_text(c, c.text_width, has_head=True)

    def adapt(self, weights):
        """As in BLIP; the decoder's cross-attention is new where image and text differ in width."""
        own = self.state_dict()
        return {name: value if value.shape == own[name].shape else own[name]
                for name, value in super().adapt(weights).items()}

    def encode_question(self, pixels, ids):
        """[ENC] question: pixels (B, 3, H, W), ids (B, T) -> states (B, T, D), mask bool (B, T)."""
        mask = ids != self.config.pad_id
        ids = starts_with(ids, self.config.enc_id)
        return self.encoder(ids, self.vision(pixels), mask=mask), mask

    def forward(self, batch, gather=losses.no_gather):
        """A batch of `QuestionBatch` -> {"vqa": scalar}.

        The sum over an answer's tokens, times its weight, over all answers to the B questions,
        divided by B (released code).
        """
        c, ids, index = self.config, batch["answer_ids"], batch["question_index"]
        states, mask = self.encode_question(normalize_pixels(batch["images"]), batch["ids"])
        logits = self.logits(starts_with(ids, c.dec_id), mask=ids != c.pad_id,
                             context=states[index], context_mask=mask[index])
        return {"vqa": losses.next_token_loss(logits, labels_of(ids, c), len(states),
                                              c.label_smoothing, batch["weights"])}

    def prepare(self, records, tokenizer):
        """Records, the last answer open -> ([DEC], mask, {"context", "context_mask"})."""
        pixels = self.pixels(records)
        prompts = [as_turns(record)[-1]["prompt"] for record in records]
        ids = tokenizer.batch(prompts, self.config.context_length).to(pixels.device)
        states, mask = self.encode_question(pixels, ids)
        ids = torch.full((len(records), 1), self.config.dec_id, device=pixels.device)
        return ids, torch.ones_like(ids, dtype=torch.bool), {"context": states,
                                                             "context_mask": mask}

    @torch.no_grad()
    def evaluate(self, data, count=400):
        """Questions in new wordings, and with a wrong image; answers written and ranked."""
        writer = writing.Writer(self, data.tokenizer)
        return questions.visual_questions(writer, data.world, count) \
            | questions.ranked_answers(writer, data.world, count)

    @torch.no_grad()
    def samples(self, data):
        """An image for people: unseen images, questions and the written answers."""
        return writing.answers(writing.Writer(self, data.tokenizer), data)


class PairAttention(nn.Module):
    """Cross-attention to two images: a layer for each, merged by their mean or by a linear layer.

    layer: an Attention of this width. See `TwoImages.adapt` for how both start.
    """

    def __init__(self, layer, width, concat):
        super().__init__()
        self.first, self.second = layer, copy.deepcopy(layer)
        self.merge = nn.Linear(2 * width, width) if concat else None

    def forward(self, x, context, *, mask=None, cache=None):
        """x (B, T, D), context (B, 2 * S, C): the tokens of both images -> (B, T, D)."""
        one, other = context.chunk(2, dim=1)
        one, other = self.first(x, one), self.second(x, other)
        return (one + other) / 2 if self.merge is None else \
            self.merge(torch.cat([one, other], dim=-1))


class Judge(BLIP):
    """The encoder as a judge of statements: a subclass has `make_text` and `predict`."""

    def forward(self, batch, gather=losses.no_gather):
        """A batch with "truth", int64 (B,), 0 or 1 -> {"judge": scalar, in nats}."""
        logits = self.predict(batch)                                  # (B, 2)
        with losses.no_autocast(logits):
            return {"judge": F.cross_entropy(to_float32(logits), batch["truth"])}

    @torch.no_grad()
    def evaluate(self, data, count=400):
        """Accuracy on unseen statements, or of the likeliest candidate -> {name: number}."""
        figures = {"two_pictures": judging.two_images, "dialogue": judging.dialogue}
        return figures[self.task](self, data, count)

    @torch.no_grad()
    def samples(self, data):
        """An image for people: statements or dialogues, and what the model takes for true."""
        return judging.samples(self, data, self.task)


class TwoImages(Judge):
    """Is a statement about two images true? (NLVR2; paper, 5.4 and Figure 5 b)."""

    task = "two_pictures"

    def make_text(self):
        """The encoder with twin cross-attention; its second half merges by a layer."""
        c = self.config
        self.encoder = make_text(c, c.vision_width)
        for number, block in enumerate(self.encoder.blocks):
            block.cross = PairAttention(block.cross, c.text_width, number >= c.text_layers // 2)
        self.head = nn.Sequential(nn.Linear(c.text_width, c.text_width), nn.ReLU(),
                                  nn.Linear(c.text_width, 2))

    def adapt(self, weights):
        """Weights of a pre-training run under this model's names: both layers of a pair start from
        the same weights (paper, 5.4); what is new stays as it is."""
        twins = {name.replace(".cross.", f".cross.{twin}."): value
                 for name, value in weights.items() for twin in ("first", "second")}
        new = {name: value for name, value in self.state_dict().items()
               if name.startswith("head.") or ".merge." in name}
        return new | super().adapt(twins)

    def predict(self, batch):
        """A batch of `PairBatch` -> logits (B, 2), class 1: the statement is true."""
        c, ids = self.config, batch["ids"]
        tokens = self.vision(normalize_pixels(batch["images"].flatten(0, 1)))    # (2 * B, S, D)
        both = tokens.view(len(ids), -1, c.vision_width)              # (B, 2 * S, D)
        x = self.encoder.first(starts_with(ids, c.enc_id), both, mask=ids != c.pad_id)
        return self.head(x)                                           # from (B, D)


class Dialogue(Judge):
    """Which candidate answers the last question of a dialogue? (VisDial; paper, 5.5).

    The encoder of question, history and candidate attends to the image and to the caption's states,
    one after the other in one sequence; the matching head says whether the candidate is right.
    """

    task = "dialogue"

    def make_text(self):
        """The encoder and the matching head of the pre-trained model."""
        c = self.config
        if c.vision_width != c.text_width:
            raise ValueError(f"vision_width={c.vision_width} and text_width={c.text_width}: image "
                             "and caption stand in one sequence and must be equally wide")
        self.encoder, self.itm_head = make_text(c, c.vision_width), nn.Linear(c.text_width, 2)

    def predict(self, batch):
        """A batch of `DialogueBatch` -> logits (B, 2), class 1: the answer is right."""
        c, ids, caption = self.config, batch["ids"], batch["caption_ids"]
        image = self.vision(normalize_pixels(batch["images"]))        # (B, S, D)
        caption_mask = caption != c.pad_id                            # (B, T')
        caption = self.encoder(starts_with(caption, c.cls_id), mask=caption_mask)
        context = torch.cat([image, caption], dim=1)                  # (B, S + T', D)
        context_mask = torch.cat([caption_mask.new_ones(image.shape[:2]), caption_mask], dim=1)
        x = self.encoder.first(starts_with(ids, c.enc_id), context, mask=ids != c.pad_id,
                               context_mask=context_mask)
        return self.itm_head(x)


# ------------------------------------------------------------------ presets and recipes

BASE = BLIPConfig(
    image_size=224, patch_size=16, vision_width=768, vision_layers=12, vision_heads=12,
    text_width=768, text_layers=12, text_heads=12, context_length=512, vocab_size=30524,
    pad_id=0, eos_id=102, cls_id=101, dec_id=30522, enc_id=30523, embed_dim=256, momentum=0.995,
    queue_size=57600)
PRESETS = {
    "tiny": BLIPConfig(hardness=0.3),
    "small": BLIPConfig(image_size=64, vision_width=384, vision_layers=8, vision_heads=6,
                        text_width=256, text_layers=6, text_heads=4, context_length=64,
                        embed_dim=256, momentum=0.99, queue_size=8192, hardness=0.3),
    "base": BASE,
    "large": replace(BASE, vision_width=1024, vision_layers=24, vision_heads=16),
}
# All but the momentum encoders.
TRAINS = dict.fromkeys(("blip", "blip-vqa", "blip-two-images", "blip-dialogue"), ("[!m]*",))

# The paper's: 20 epochs of 14M images (its 4.1).
PAPER = Recipe(steps=97000, batch_size=2880, lr=3e-4, warmup=3000, weight_decay=0.05,
               betas=(0.9, 0.999), eps=1e-8, grad_clip=None)
# Its Table 14: 5, 6, 10, 15, 20 epochs of its data sets at 256; the numbers of steps are rounded.
PAPER_FINE_TUNING = {"lm": (1e-5, 11000), "itc,itm": (1e-5, 13300), "vqa": (2e-5, 54000),
                     "two-images": (3e-5, 5000), "dialogue": (2e-5, 9600)}
TINY = Recipe(steps=740, batch_size=96, lr=1e-3, weight_decay=0.05, schedule="linear",
              optimizer="muon", muon_lr_multiplier=4.0, lr_multipliers={"temp": 0.1})
RECIPES = {
    "tiny": TINY,
    "tiny lm": replace(TINY, steps=300, batch_size=128, lr=5e-4),
    "tiny itc,itm": replace(TINY, steps=400, lr=5e-4),
    "tiny vqa": replace(TINY, steps=640, batch_size=128, lr=5e-4),
    "tiny two-images": replace(TINY, steps=500), "tiny dialogue": replace(TINY, steps=500),
    "small": replace(TINY, steps=6000, batch_size=512, lr=5e-4, warmup=300),
    "large": replace(PAPER, batch_size=2400, lr=2e-4), "": PAPER,
    **{f"{size} {losses}": replace(PAPER, batch_size=256, warmup=0, lr=lr, steps=steps)
       for size in ("base", "large") for losses, (lr, steps) in PAPER_FINE_TUNING.items()},
}
# The models that are fine-tuned: class, batch, records of the world.
TASKS = {"vqa": (VQA, QuestionBatch, "question"),
         "two-images": (TwoImages, PairBatch, TwoImages.task),
         "dialogue": (Dialogue, DialogueBatch, Dialogue.task)}


def make_model(config):
    """The model of a config: its `losses` say which."""
    return TASKS[config.losses][0](config) if config.losses in TASKS else BLIP(config)


def data_sources(world, tokenizer, config):
    """All three losses learn from web and human pairs, fewer (a captioner, a filter) from human
    pairs alone (paper, 3.3). A world or file without a web part is all human.

    Raises ValueError for a world without the task, and for a web file without human pairs.
    """
    c = config
    if c.losses in TASKS:
        _, batch, kind = TASKS[c.losses]
        if kind not in world.tasks:
            raise ValueError(f"{c.losses}: {world.name} has no {kind} records")
        collate = batch(tokenizer, c.context_length, c.image_size)
        return [DataSource(world, collate, kinds={kind: 1})]
    collate = CaptionBatch(tokenizer, c, c.prompt if c.losses == "lm" else "")
    if not world.has_web:
        return [DataSource(world, collate)]
    if c.losses == ALL_LOSSES and not c.human_only:
        return [DataSource(world, collate, split="web+human")]
    if not world.size("human"):
        raise ValueError(f'{world.name}: all its pairs are marked "web"; captioner and filter '
                         "learn from human pairs (paper, 3.3)")
    return [DataSource(world, collate, split="human")]


# ------------------------------------------------------------------ CapFilt

def capfilt_texts(captioner, keep, world, chunk=256, count=1, **how):
    """CapFilt (paper, 3.3): the texts of the web images and new ones, judged by a filter.

    captioner: a writing.Writer; keep: the filter, records -> bool (N,). For each image of the
    world's web part: its own texts, and `count` captions by nucleus sampling, p = 0.9 (how: other
    options of generation). chunk: images at a time. Yields (index, record with one text, whether it
    is synthetic, whether the filter keeps it). An image that cannot be read is left out.
    """
    device = captioner.model.vision.pos_embed.device
    for first in range(0, world.size("web"), chunk):
        places, records = [], []
        for i in range(first, min(first + chunk, world.size("web"))):
            with contextlib.suppress(ValueError):    # a picture of the user's that is not readable
                records.append(world.record("web", i))
                places.append(i)
        seeds = [torch.Generator(device).manual_seed(i) for i in places]
        options = {"temperature": 1.0, "top_p": 0.9, "generator": seeds, "batch_size": chunk} | how
        rows = [(i, record | {"texts": [text]}, False)
                for i, record in zip(places, records) for text in record["texts"]]
        for _ in range(count):           # the generators go on
            rows += [(i, record | {"texts": [text]}, True) for i, record, text in zip(
                places, records, captioner.generate(records, **options)) if text]
        for row, kept in zip(rows, keep([record for _, record, _ in rows]).tolist()):
            yield *row, kept


# ------------------------------------------------------------------ using a trained model

def from_pretrained(path):
    """(BLIP in eval mode, tokenizer) of a run folder, of Hugging Face's or of the official weights.

    Raises ValueError in one line when it is none of them, damaged, or of another model.
    """
    config, tokenizer, weights = open_weights(path, "blip", pretrained.read)
    with torch.device("meta"):           # no time spent on random weights
        model = make_model(checkpoint.config_of(BLIPConfig, config, path))
    checkpoint.load_weights(model, weights, path)
    return model.eval(), tokenizer


def open_trained(path, needs):
    """`from_pretrained` of a model with one of these losses. Raises ValueError for another."""
    model, tokenizer = from_pretrained(path)
    matching.check_losses(path, model.config.losses, model.config.losses, needs)
    return model, tokenizer


def main():
    """The command line: caption, match, answer, search and bootstrap."""
    return matching.main(__doc__, open_trained, capfilt_texts, clip_from_pretrained)


if __name__ == "__main__":
    options.run_main(main)
