"""BLIP-2: a Q-Former between a frozen image encoder and a frozen language model.

BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language
Models (Li, Li, Savarese, Hoi, 2023), and InstructBLIP (Dai et al., 2023).

    stage 1   image -> frozen ViT -> norm ---+ keys, values of every second layer
                                             v
              [ Q learned queries | text ] -> self-attention -> two MLPs -> ITC, ITM, ITG
                                              three masks: masks.unimodal draws them
    stage 2   queries -> linear -> [ visual prompt | text ] -> frozen language model -> next word

    python train.py clip && python train.py lm             what is frozen
    python train.py blip2-stage1 && python blip2.py runs/blip2-stage1 search "a red circle" FOLDER
    python train.py blip2-stage2 && python blip2.py runs/blip2-stage2 caption PICTURE
    python blip2.py runs/blip2-stage2 answer PICTURE "what colour is the circle?"
    python train.py lm --preset t5-tiny && python train.py blip2-stage2-t5       the same with a T5
    python train.py blip2-instruct                         InstructBLIP, from stage 2
    python blip.py runs/blip-captioner bootstrap runs/clip OUT.jsonl --captions 10 --best 2
    python train.py blip2-stage1 --data shapes:texts=OUT.jsonl         the paper's texts (3.4)

In place of a run: a Hugging Face folder, or LAVIS's .pth file of stage 1.

Differs from the papers
- Data: the shapes world stands for 129 million web pairs. The presets tiny and small and their
  recipes are ours: Muon (optimizer.py) for the matrices of attention and MLPs, AdamW for the rest
  (papers: AdamW); softer negatives (`hardness`); the learning rate falls by a line or a cosine to 0
  (paper: to 5e-5 in stage 2). There is no dropout and no augmentation but a crop.
- The Q-Former starts from random weights (paper: BERT's), narrow ones with larger weights. Its text
  ends with <eos>, where BERT has [SEP].
- Contrast has gradients through the features of all processes (released code: of its own alone),
  and other captions of an image count as wrong (released code for retrieval: as right). Negatives
  are sampled as BLIP's, by numbers that come with each pair.
- Stage 2 learns captions and questions at once, so that it answers without fine-tuning (paper:
  captions; it answers zero-shot). A T5 gets the first words of half of the captions as its prefix.
  The text's weights of the Q-Former stay in stage 2, unused and frozen, for questions and
  instructions after it (released code: drops them).
- Fine-tuning keeps the image size unless --set resize_to=... (paper: 364 or 490).
- InstructBLIP also trains the image norm and the projection, as released (paper: the Q-Former).
  Three held-in data sets of the world with eight templates, drawn a record at a time (paper: 13
  with 10 to 15 each, some shares set by hand; released code: a batch at a time).
- Published weights: images are cropped to a square (released code: squeezed to one), captions are
  not cleaned, beams have no least length and no repetition penalty.
"""
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from clip import PRESETS as CLIP_PRESETS
from clip import CLIPConfig, image_tower
from common import losses
from common.bert import LMHead, starts_with
from common.cache import KVCache
from common.data.batches import DataSource
from common.data.collators import CaptionBatch, PromptBatch, as_turns
from common.data.images import center_crop, normalize_pixels, to_tensor
from common.data.tokenizer import CLS, DEC, EOS, PAD
from common.evaluation import matching, questions, retrieval, writing
from common.evaluation.sheet import stack
from common.language import LanguageConfig
from common.t5 import language_config, make_language
from common.masks import causal, padding
from common.pretrained import blip2 as pretrained
from common.pretrained.files import open_weights
from common.prompts import QUESTION_PROMPT, Segment, collate, labels_of, render
from common.training import checkpoint, options
from common.training.optimizer import Recipe, eval_frozen
from common.transformer import MLP, Attention, LayerNorm, LearnedPositions, to_float32, vit_block
from common.vision import ViT, adapt_weights

ALL_LOSSES = "itc,itm,itg"
FIRST, SECOND = (ALL_LOSSES, "itc,itm"), ("lm", "captions", "vqa", "instruct")
VISUAL = -1                              # in ids: the place of a visual token

# InstructBLIP in small: data sets with their numbers of records, and templates. Some of those of
# short answers say so; what a teacher wrote stays as it is. Other tasks are held out.
INSTRUCT_SIZES = {"caption": 16384, "question": 4096, "instruction": 1024}
HELD_OUT = ("statement", "dialogue", "choice")
CAPTION_TEMPLATES = ("a short description of the picture:", "describe the picture briefly.",
                     "what does the picture show? answer in one sentence.")
SHORT_TEMPLATES = ("{}", "question: {} answer:", "question: {} short answer:",
                   "{} answer in one word.", "look at the picture. {} a short answer:")


@dataclass(frozen=True)
class EVAConfig:
    """The paper's ViT-g/14 (EVA-CLIP) without its last block."""
    image_size: int = 224
    patch_size: int = 14
    vision_width: int = 1408
    vision_layers: int = 39
    vision_heads: int = 16
    vision_hidden: int = 6144
    vision_eps: float = 1e-6
    norm_eps: float = 1e-5               # of the trained norm behind it; Hugging Face: 1e-6


@dataclass(frozen=True)
class BLIP2Config:
    """The configs of the frozen models, and the sizes of the Q-Former.

    Raises ValueError that names field and value for one that no model can have.
    """
    vision: CLIPConfig | EVAConfig = CLIP_PRESETS["tiny"]
    language: LanguageConfig | None = None           # or a T5Config; None: the first stage
    resize_to: int = 0                   # image size; 0: the vision encoder's own
    num_queries: int = 8                 # Q
    qformer_width: int = 128
    qformer_layers: int = 4
    qformer_heads: int = 4
    cross_attn_every: int = 2            # layers 0, 2, 4, ... have cross-attention
    qformer_text: bool = True            # False: without the text's embeddings and MLPs
    qformer_context_length: int = 64
    vocab_size: int = 1024               # of the Q-Former's text
    pad_id: int = PAD
    eos_id: int = EOS
    cls_id: int = CLS
    dec_id: int = DEC
    embed_dim: int = 128                 # E, of the joint space
    losses: str = ALL_LOSSES             # of the first stage; of the second one its task
    prompt: str = ""                     # before a caption; published weights: "a photo of"
    question_prompt: str = QUESTION_PROMPT           # of the language model; instructions have none
    balance: float = 0.5                 # instruct: a data set's share grows with size ** balance
    hardness: float = 1.0                # of the negatives: 0 random, 1 as the paper's
    label_smoothing: float = 0.1

    def __post_init__(self):
        if isinstance(self.vision, dict):                             # as JSON has it
            kind = EVAConfig if "vision_hidden" in self.vision else CLIPConfig
            part = checkpoint.config_of(kind, self.vision, "vision")
            object.__setattr__(self, "vision", part)
        if isinstance(self.language, dict):
            part = language_config(self.language)
            object.__setattr__(self, "language", part)
        if getattr(self.vision, "stages", ()):
            raise ValueError("vision: a ResNet; BLIP-2 takes the tokens of a ViT")
        options.check_fields(
            self, {"losses": FIRST + SECOND},
            dict.fromkeys(("resize_to", "balance", "hardness", "label_smoothing", "pad_id",
                           "eos_id", "cls_id", "dec_id"), 0), {"label_smoothing": 1})

    @property
    def image_size(self):
        """Pixels a side; positions of another size are interpolated, see `BLIP2.adapt`."""
        return self.resize_to or self.vision.image_size

    @property
    def asks_qformer(self):
        """Whether the Q-Former gets the question or instruction, too."""
        return self.losses in ("vqa", "instruct") and self.qformer_text

    def wording(self, prompt):
        """A question, or "" where a caption is wanted, as the language model gets it."""
        if self.losses == "instruct":
            return prompt or self.prompt or CAPTION_TEMPLATES[0]
        return self.question_prompt.format(prompt) if prompt else self.prompt

    @property
    def context_length(self):
        """Of the text that is written: the language model's, in the first stage the Q-Former's."""
        return self.language.context_length if self.language else self.qformer_context_length


# ------------------------------------------------------------------ the frozen image encoder

class ImageEncoder(nn.Module):
    """The tokens of a frozen ViT's second-last layer (paper, 3.4), then a trained norm (code)."""

    def __init__(self, c):
        super().__init__()
        v = c.vision
        if isinstance(v, CLIPConfig):
            self.vit = image_tower(replace(v, image_size=c.image_size))
            del self.vit.transformer.blocks[-1]
            self.vit.ln_post = None
            eps = 1e-5
        else:
            blocks = [vit_block(width=v.vision_width, heads=v.vision_heads, hidden=v.vision_hidden,
                                eps=v.vision_eps) for _ in range(v.vision_layers)]
            self.vit = ViT(image_size=c.image_size, patch_size=v.patch_size, width=v.vision_width,
                           blocks=blocks, patch_bias=True)
            eps = v.norm_eps
        self.norm = LayerNorm(v.vision_width, eps)

    def forward(self, images):
        """images float (B, 3, H, W), normalized -> (B, S, C), the class token first."""
        return self.norm(self.vit(images))


# ------------------------------------------------------------------ the Q-Former

class QFormerBlock(nn.Module):
    """A BERT layer that queries and text share but for two parts (paper, Figure 2).

    The queries alone cross-attend to the image (context_width None: in this layer they do not), and
    queries and text have an MLP each. A norm follows each sum.
    """

    def __init__(self, *, width, heads, context_width=None, has_text=True):
        super().__init__()
        norm = partial(LayerNorm, width, 1e-12)
        self.attn, self.attn_norm = Attention(width=width, heads=heads), norm()
        self.cross = self.cross_norm = self.text_mlp = self.text_mlp_norm = None
        if context_width:
            self.cross = Attention(width=width, heads=heads, context_width=context_width)
            self.cross_norm = norm()
        self.mlp, self.mlp_norm = MLP(width=width), norm()
        if has_text:
            self.text_mlp, self.text_mlp_norm = MLP(width=width), norm()

    def forward(self, x, Q, image=None, *, mask=None, cache=None, keep=None):
        """x (B, Q + T, D): Q queries, then text; image (B, S, C) -> (B, Q + T, D).

        mask, cache: of the self-attention, as in `Attention`. keep: the outputs of the first `keep`
        positions alone, without a cache; of the others only keys and values are computed.
        """
        x, context = (x, None) if keep is None else (x[:, :keep], x)
        x = self.attn_norm(x + self.attn(x, context, mask=mask, cache=cache))
        queries, text = x.split([Q, x.shape[1] - Q], dim=1)
        if Q and self.cross is not None:
            queries = self.cross_norm(queries + self.cross(queries, image))
        if Q:
            queries = self.mlp_norm(queries + self.mlp(queries))
        if text.shape[1]:
            text = self.text_mlp_norm(text + self.text_mlp(text))
        return torch.cat([queries, text], dim=1)


class QFormer(nn.Module):
    """Learned queries that extract from an image what a text needs (paper, 3.1)."""

    def __init__(self, c):
        super().__init__()
        width, self.num_queries = c.qformer_width, c.num_queries
        self.query_tokens = nn.Parameter(torch.empty(c.num_queries, width))
        self.token_embed = self.pos_embed = self.head = None
        if c.qformer_text:
            self.token_embed = nn.Embedding(c.vocab_size, width)
            self.pos_embed = LearnedPositions(count=c.qformer_context_length, width=width)
        self.norm = LayerNorm(width, 1e-12)
        self.blocks = nn.ModuleList(QFormerBlock(
            width=width, heads=c.qformer_heads, has_text=c.qformer_text,
            context_width=None if i % c.cross_attn_every else c.vision.vision_width)
            for i in range(c.qformer_layers))
        if "itg" in c.losses:
            self.head = LMHead(vocab_size=c.vocab_size, width=width)

    def forward(self, image=None, ids=None, *, mask=None, cache=None, keep=None):
        """Queries, a text, or both in one sequence -> (B, Q + T, D), the queries first.

        image float (B, S, C): what the queries attend to; None: there are none. ids int64 (B, T),
        padded right; None: no text. mask bool, of the self-attention, broadcastable to
        (B, H, Q + T, Q + T). cache: a KVCache of what came before. Queries have no positions; those
        of the text begin at 0. keep: the outputs of the first `keep` positions alone, without a
        cache; the mask is then (B, 1, 1, Q + T) or None.
        """
        parts, Q = [], 0
        if image is not None:
            parts, Q = [self.query_tokens.expand(len(image), -1, -1)], self.num_queries
        if ids is not None:
            parts.append(self.token_embed(ids) + self.pos_embed.span(0, ids.shape[1]))
        x = self.norm(torch.cat(parts, dim=1))                        # one norm over both
        for block in self.blocks[:-1]:
            x = block(x, Q, image, mask=mask, cache=cache)
        return self.blocks[-1](x, Q, image, mask=mask, cache=cache, keep=keep)

    def text_mask(self, ids, pad_id):
        """Queries and the tokens of ids (B, T) are keys, padding is none: bool (B, 1, 1, Q + T)."""
        queries = ids.new_ones(len(ids), self.num_queries, dtype=torch.bool)
        return padding(torch.cat([queries, ids != pad_id], dim=1))


class BLIP2(nn.Module):
    """What both stages have: the frozen image encoder, its norm and the Q-Former."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision, self.qformer = ImageEncoder(config), QFormer(config)

    def train(self, mode=True):
        """As of every module, but frozen parts stay in eval mode."""
        return eval_frozen(super().train(mode))

    def pixels(self, records):
        """The images of all turns of all records -> float (N, 3, H, W), normalized."""
        images = [center_crop(frame, self.config.image_size) for record in records
                  for turn in as_turns(record) for frames in turn["images"] for frame in frames]
        return normalize_pixels(to_tensor(images).to(self.qformer.query_tokens.device))

    def adapt(self, weights):
        """The weights of another run for this model, see `adapt_weights`."""
        return adapt_weights(self, weights, "vision.vit.pos_embed")


# ------------------------------------------------------------------ stage 1

class Stage1(BLIP2):
    """Vision-language representation learning from a frozen image encoder (paper, 3.2)."""

    towers = ("vision.vit",)             # stored in half precision where they are frozen

    def __init__(self, config):
        super().__init__(config)
        c = config
        self.image_projection = nn.Linear(c.qformer_width, c.embed_dim)
        self.text_projection = nn.Linear(c.qformer_width, c.embed_dim)
        self.temp = nn.Parameter(torch.tensor(0.07))                  # it divides the cosines
        self.itm_head = nn.Linear(c.qformer_width, 2)                 # class 1: a pair
        init_weights(self)

    def image_feature(self, queries):
        """The queries' outputs (B, Q, D) -> unit vectors (B, Q, E)."""
        return F.normalize(to_float32(self.image_projection(queries)), dim=-1)

    def encode_image(self, images):
        """images float (B, 3, H, W), normalized -> unit vectors (B, Q, E), one for each query."""
        return self.image_feature(self.qformer(self.vision(images)))

    def encode_text(self, ids):
        """[CLS] text, without the queries: ids int64 (B, T) -> unit vectors (B, E)."""
        c = self.config
        x = self.qformer(ids=starts_with(ids, c.cls_id), mask=padding(ids != c.pad_id), keep=1)
        return F.normalize(to_float32(self.text_projection(x[:, 0])), dim=-1)

    def match(self, image, ids):
        """Queries and [CLS] text that all attend to each other: image tokens (B, S, C), ids (B, T)
        -> logits (B, 2), the mean over the queries. Class 1: they are a pair."""
        c = self.config
        x = self.qformer(image, starts_with(ids, c.cls_id), keep=c.num_queries,
                         mask=self.qformer.text_mask(ids, c.pad_id))  # (B, Q, D)
        return self.itm_head(x).mean(dim=1)

    def forward(self, batch, gather=losses.no_gather):
        """A batch of `CaptionBatch` with "label_count" -> {"itc", "itm", "itg": scalar, in nats}.

        The queries attend to the text in matching alone; the two others share one pass of them.
        """
        ids, cache = batch["ids"], KVCache()
        image = self.vision(normalize_pixels(batch["images"]))        # (B, S, C)
        queries = self.qformer(image, cache=cache)                    # (B, Q, D)
        itc, *scores = self.itc(self.image_feature(queries), self.encode_text(ids), gather)
        found = {"itc": itc, "itm": self.itm(image, ids, *scores, batch["draws"], gather)}
        if self.qformer.head is not None:
            found["itg"] = self.itg(ids, batch["labels"], batch.get("label_count"), cache)
        return found

    def itc(self, image, text, gather=losses.no_gather):
        """Image-text contrast: image (B, Q, E), text (B, E) -> (loss, image and text scores).

        A pair's similarity is the largest cosine of its queries. Scores (B, B_all): the logits of
        all processes' texts and images, without gradient.
        """
        (images, first), (texts, _) = gather(image), gather(text)     # (B_all, Q, E), (B_all, E)
        own = torch.arange(len(image), device=image.device) + first   # the positives' columns
        with losses.no_autocast(image):
            image_logits = losses.best_cosine(image, texts) / self.temp          # (B, B_all)
            text_logits = losses.best_cosine(images, text).T / self.temp
            loss = sum(F.cross_entropy(logits, own, label_smoothing=self.config.label_smoothing)
                       for logits in (image_logits, text_logits)) / 2
        return loss, image_logits.detach(), text_logits.detach()

    def itm(self, image, ids, image_scores, text_scores, draws, gather=losses.no_gather):
        """Image-text matching with hard negatives, as BLIP's -> scalar, in nats."""
        c = self.config
        return losses.matching(self.match, image, ids, c.hardness * image_scores,
                               c.hardness * text_scores, draws, gather,
                               c.context_length, c.pad_id)

    def text_logits(self, ids, cache):
        """Image-grounded text generation: ids int64 (B, T) -> logits (B, T, V).

        [DEC] replaces the first id. cache: the queries' keys and values in every layer. Text
        attends to them and to the text before it, never to the image itself.
        """
        c, T = self.config, ids.shape[1]
        mask = causal(T, c.num_queries, ids.device)                   # padding comes last
        x = self.qformer(ids=starts_with(ids, c.dec_id), mask=mask, cache=cache)
        return self.qformer.head(x, self.qformer.token_embed.weight)

    def itg(self, ids, labels, label_count, cache):
        """Each next token of a text, given the queries: see `text_logits` -> scalar, in nats."""
        return losses.next_token_loss(self.text_logits(ids, cache), labels, label_count,
                                      self.config.label_smoothing)

    def check_batch(self, batch_size, accumulate):
        """Raise ValueError for a batch that the losses cannot have."""
        if batch_size < 2 or accumulate > 1:
            raise ValueError(f"--batch_size {batch_size} --accumulate {accumulate}: hard negatives "
                             "need a whole batch of at least 2")

    @torch.no_grad()
    def evaluate(self, data, count=400):
        """Retrieval, re-ranked, matching, and the ITG loss of unseen captions."""
        pool = retrieval.make_pool(self, data)
        figures = pool.figures() | retrieval.zero_shot(self, data) \
            | matching.evaluate(self, data, pool, count)
        return figures | (self.caption_loss(data, count) if self.qformer.head is not None else {})

    def caption_loss(self, data, count):
        """The ITG loss of unseen captions, and with the images of other records."""
        records = data.records("test")[:count]
        ids = data.ids([record["texts"][0] for record in records])
        image, figures = self.vision(normalize_pixels(data.images(records))), {}
        for name, tokens in (("itg_loss", image), ("itg_loss_wrong_image", image.roll(1, 0))):
            cache = KVCache()
            self.qformer(tokens, cache=cache)
            figures[name] = losses.next_token_loss(self.text_logits(ids, cache),
                                                   labels_of(ids, self.config)).item()
        return figures

    @torch.no_grad()
    def samples(self, data):
        """An image for people: captions and false ones that look similar, and what matches."""
        return matching.samples(self, data, retrieval.make_pool(self, data))


# ------------------------------------------------------------------ stage 2

class Stage2(BLIP2):
    """Generative learning: the queries' outputs are a prompt of a frozen LM (paper, 3.3)."""

    banned_ids = ()                      # ids that are never written
    towers = ("vision.vit", "lm")
    caption_options = {"num_beams": 5, "length_penalty": 1.0}         # paper, 4.1 and 4.2
    answer_options = {"num_beams": 5, "length_penalty": -1.0, "max_new_tokens": 10}

    def __init__(self, config):
        super().__init__(config)
        self.projection = nn.Linear(config.qformer_width, config.language.width)
        init_weights(self)
        self.lm = make_language(config.language)
        self.has_encoder = config.language.kind == "t5"
        self.stop_ids = (config.language.eos_id,)

    def visual_prompt(self, images, ids=None):
        """images float (N, 3, H, W), normalized -> (N, Q, D of the language model).

        ids int64 (N, T): an instruction, to which the queries attend (InstructBLIP, 2.3), or None.
        """
        c, image, mask = self.config, self.vision(images), None       # (N, S, C)
        if ids is not None:
            ids, mask = starts_with(ids, c.cls_id), self.qformer.text_mask(ids, c.pad_id)
        queries = self.qformer(image, ids, mask=mask)[:, :c.num_queries]
        return self.projection(queries)

    def embed(self, ids, visual):
        """ids int64 (B, T), VISUAL at the places of all visual tokens (N, Q, D) -> (B, T, D)."""
        is_visual = ids == VISUAL
        x = self.lm.embed(ids.masked_fill(is_visual, 0))
        return x.masked_scatter(is_visual[..., None], visual.to(x.dtype))

    def logits(self, x, mask=None, cache=None, last=False, **state):
        """ids (B, T) or embeddings (B, T, D) of what is written -> logits (B, T, V).

        state: what a T5's decoder attends to; see `LanguageModel.forward` and `T5.logits`.
        """
        if self.has_encoder:
            return self.lm.logits(x, mask, cache, last, **state)
        return self.lm(x, mask, cache, last)

    def forward(self, batch, gather=losses.no_gather):
        """A batch of `PromptBatch` with "label_count" -> {"lm": scalar, in nats}."""
        visual = self.visual_prompt(normalize_pixels(batch["images"]), batch.get("question_ids"))
        x = self.embed(batch["ids"], visual)                          # (B, T, D)
        if self.has_encoder:
            state = {"context": self.lm.encode(x, batch["mask"]), "context_mask": batch["mask"]}
            logits = self.logits(batch["answer_ids"], **state)
        else:                            # padding is behind the text, and causal attention
            logits = self.logits(x)
        return {"lm": losses.next_token_loss(logits, batch["labels"], batch.get("label_count"))}

    def prepare(self, records, tokenizer):
        """Records, the last answer open -> (prompt, mask, state) for evaluation/writing.py.

        A decoder continues the prompt, a T5 encodes it and begins with its start token, <pad>.
        """
        c, pages, pixels = self.config, [as_turns(r) for r in records], self.pixels(records)
        # T5's positions count padding, so it must not stand between the image and the text.
        rows = [render(prompt_segments(turns, c, tokenizer.bos_id), tokenizer) for turns in pages]
        batch = collate(rows, side="right" if self.has_encoder else "left")
        ids, mask = batch["ids"].to(pixels.device), batch["mask"].to(pixels.device)
        asked = None
        if c.asks_qformer:
            prompts = [turn["prompt"] or c.wording("") for turns in pages for turn in turns
                       for frames in turn["images"] for _ in frames]
            vocabulary = getattr(tokenizer, "qformer", tokenizer)     # InstructBLIP has two
            asked = vocabulary.batch(prompts, c.qformer_context_length).to(pixels.device)
        x = self.embed(ids, self.visual_prompt(pixels, asked))
        if not self.has_encoder:
            return x, mask, {}
        start = torch.full((len(ids), 1), c.language.pad_id, device=ids.device)
        return start, None, {"context": self.lm.encode(x, mask), "context_mask": mask}

    @torch.no_grad()
    def evaluate(self, data, count=400):
        """Captions and questions, as far as the task has them -> {name: number}."""
        writer, world, task = writing.Writer(self, data.tokenizer), data.world, self.config.losses
        # Instructions are taken as they are, so that questions need their template here.
        template = self.config.question_prompt if task == "instruct" else "{}"
        figures = questions.captions(writer, world, count) if task != "vqa" else {}
        if task != "captions" and world.tasks:
            figures |= questions.visual_questions(writer, world, count, template)
        if task == "instruct" and world.tasks:
            figures |= questions.ranked_tasks(writer, world, count, HELD_OUT, template)
        return figures

    @torch.no_grad()
    def samples(self, data):
        """An image for people: captions of unseen images, questions and the written answers."""
        writer = writing.Writer(self, data.tokenizer)
        sheets = [writing.samples(writer, data, shots=False)]
        return stack(sheets + [writing.answers(writer, data)] if data.world.tasks else sheets)


def prompt_segments(turns, c, bos_id):
    """Turns whose last answer is open -> segments: of each turn its visual tokens, then its text.

    Without an encoder <bos> follows the first image; a T5's prompt ends with <eos> (released code).
    """
    segments, is_t5 = [], c.language.kind == "t5"
    for number, turn in enumerate(turns):
        frames = sum(map(len, turn["images"]))
        segments.append(Segment((VISUAL,) * (c.num_queries * frames)))
        if not number and not is_t5:
            segments.append(Segment((bos_id,)))
        segments.append(Segment(f"{c.wording(turn['prompt'])} {turn.get('prefix', '')}".strip()))
        if number + 1 < len(turns):
            segments.append(Segment(f" {turn['answer']}. "))
    return segments + [Segment((c.language.eos_id,))] * is_t5


def training_rows(turn, tokenizer, rng, c):
    """A turn -> {"ids": (ids, labels)}, of a T5 {"ids", "answer_ids"}, each a pair; where the
    Q-Former gets the question also {"question_ids": text}.

    A T5 learns captions by prefix language modeling: the encoder gets their first words, the
    decoder writes the others (paper, 3.3; where a text is split is our choice).
    """
    turn, is_t5, end = turn | {"images": [[None]]}, c.language.kind == "t5", (c.language.eos_id,)
    if c.losses == "instruct":
        turn |= {"prompt": instruction(turn, rng)}
    elif is_t5 and not turn["prompt"]:
        words = turn["answer"].split()
        k = rng.choice((0, rng.randrange(len(words))))       # none in half of them, as in use
        turn |= {"prefix": " ".join(words[:k]), "answer": " ".join(words[k:])}
    rows = {"question_ids": turn["prompt"]} if c.asks_qformer else {}
    prompt = prompt_segments([turn], c, tokenizer.bos_id)
    answer = [Segment(f" {turn['answer']}", learn=True), Segment(end, learn=True)]
    if not is_t5:
        return rows | {"ids": render(prompt + answer, tokenizer, c.context_length)}
    answer = [Segment((c.language.pad_id,)), *answer]                 # its start token
    return rows | {"ids": render(prompt, tokenizer, c.context_length),
                   "answer_ids": render(answer, tokenizer, c.context_length)}


def instruction(turn, rng):
    """A turn's prompt in one of the templates of its task (InstructBLIP, 2.1 and Appendix C)."""
    if not turn["prompt"]:
        return rng.choice(CAPTION_TEMPLATES)
    is_short = " " not in turn["answer"]
    return rng.choice(SHORT_TEMPLATES if is_short else ("{}",)).format(turn["prompt"])


@torch.no_grad()
def init_weights(model):
    """Linear layers and embeddings: N(0, 0.02) at the paper's width of 768, biases 0.

    A narrow Q-Former starts with larger weights, as in blip.py. The text's MLPs start as copies of
    the queries' (released code: both are BERT's).
    """
    std = 0.02 * (768 / model.config.qformer_width) ** 0.5
    for name, module in model.named_modules():
        if name.startswith("vision."):
            continue
        if isinstance(module, (nn.Linear, nn.Embedding, LearnedPositions)):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.qformer.query_tokens, std=std)
    for block in model.qformer.blocks:
        if block.text_mlp is not None:
            block.text_mlp.load_state_dict(block.mlp.state_dict())


# ------------------------------------------------------------------ presets and recipes

BERT = BLIP2Config(
    num_queries=32, qformer_width=768, qformer_layers=12, qformer_heads=12,
    qformer_context_length=512, vocab_size=30523, pad_id=0, eos_id=102, cls_id=101, dec_id=30522,
    embed_dim=256)
PRESETS = {
    "tiny": BLIP2Config(hardness=0.5),
    "small": BLIP2Config(vision=CLIP_PRESETS["small"], num_queries=16, qformer_width=256,
                         qformer_layers=6, embed_dim=256, hardness=0.3),
    "vit-l": replace(BERT, vision=CLIP_PRESETS["ViT-L/14"]),
    "vit-g": replace(BERT, vision=EVAConfig()),
}
NORM, VISION, QFORMER = "vision.norm.*", "vision.*", "qformer.*"
QUERIES = ("qformer.query_tokens", "qformer.norm.*", "qformer.blocks.*.attn*",
           "qformer.blocks.*.cross*", "qformer.blocks.*.mlp*", "projection.*")
TRAINS = {"blip2-stage1": (NORM, "[!v]*"), "blip2-stage2": (NORM, *QUERIES),
          "blip2-stage2-t5": (NORM, *QUERIES), "blip2-instruct": (NORM, QFORMER, "projection.*"),
          "blip2-vqa": (VISION, QFORMER, "projection.*"), "blip2-captions": (VISION, *QUERIES),
          "blip2-retrieval": ("*",)}

# The paper's (its 3.4 and Tables 7 to 9; the numbers of steps of fine-tuning are rounded), and
# InstructBLIP's.
PAPER = Recipe(steps=250000, batch_size=2320, lr=1e-4, warmup=2000, weight_decay=0.05, eps=1e-8,
               grad_clip=None)
FINE_TUNING = replace(PAPER, lr=1e-5, warmup=1000, betas=(0.9, 0.999))
PAPERS = {"": PAPER, "blip2-stage2": replace(PAPER, steps=80000, batch_size=1920),
          "blip2-stage2-t5": replace(PAPER, steps=80000, batch_size=1520),
          "blip2-captions": replace(FINE_TUNING, steps=11000, batch_size=256),
          "blip2-vqa": replace(FINE_TUNING, steps=54000, batch_size=128, layer_decay=0.95),
          "blip2-retrieval": replace(FINE_TUNING, steps=12600, batch_size=224, layer_decay=0.95),
          "blip2-instruct": replace(FINE_TUNING, steps=60000, batch_size=128)}
TINY = Recipe(steps=390, batch_size=64, lr=1e-3, weight_decay=0.05, schedule="linear",
              optimizer="muon", muon_lr_multiplier=4.0, lr_multipliers={"temp": 0.1})
WRITE = replace(TINY, steps=1200, batch_size=48)
TUNE = replace(WRITE, steps=600, lr=5e-4, layer_decay=0.8)
RECIPES = {
    "tiny": TINY, "tiny blip2-stage2": WRITE,
    "tiny blip2-stage2-t5": replace(WRITE, steps=2200, batch_size=24),
    "tiny blip2-instruct": replace(WRITE, steps=600),
    "tiny blip2-vqa": TUNE, "tiny blip2-captions": TUNE, "tiny blip2-retrieval": TUNE,
    "small": replace(TINY, steps=6000, batch_size=512, lr=5e-4, warmup=300),
    "vit-l blip2-retrieval": replace(PAPERS["blip2-retrieval"], lr=5e-6, layer_decay=1.0),
    **{f"{size} {stage}".rstrip(): recipe for size in ("vit-l", "vit-g")
       for stage, recipe in PAPERS.items() if (size, stage) != ("vit-l", "blip2-retrieval")},
    "vit-g": replace(PAPER, batch_size=1680), "": PAPER,
}


def stage_of(config):
    """Stage1 or Stage2: with a language model the second. ValueError for losses of the other."""
    stage, own = (Stage1, FIRST) if config.language is None else (Stage2, SECOND)
    if config.losses not in own:
        raise ValueError(f"losses={config.losses}: the stage "
                         f"{'without' if stage is Stage1 else 'with'} a language model has "
                         + ", ".join(own))
    return stage


def make_model(config):
    """The model of a config."""
    return stage_of(config)(config)


def data_sources(world, tokenizer, config):
    """Captions; in the second stage captions and questions, one of the two, or instructions.

    Raises ValueError for a world without the task.
    """
    c = config
    if stage_of(c) is Stage1:            # of a file of texts for shapes (blip.py bootstrap) those
        split = "web" if getattr(world, "web_texts", None) else "train"
        return [DataSource(world, CaptionBatch(tokenizer, c), split=split)]
    collate = PromptBatch(tokenizer, c, training_rows)
    kinds = {"lm": {"caption": 4, "question": 1}, "captions": {"caption": 1},
             "vqa": {"question": 1}, "instruct": INSTRUCT_SIZES}[c.losses]       # {task: its share}
    if not world.tasks and "caption" in kinds:       # captions are all there is
        return [DataSource(world, collate)]
    if not {*kinds} <= {*world.tasks}:
        raise ValueError(f"{c.losses}: {world.name} has no question records")
    if c.losses != "instruct":
        return [DataSource(world, collate, kinds=kinds)]
    # Balanced: by the square root of their number (InstructBLIP, 2.4).
    shares = {name: size ** c.balance for name, size in kinds.items()}
    return [DataSource(world, collate, kinds=shares, sizes=kinds)]


# ------------------------------------------------------------------ using a trained model

def from_pretrained(path):
    """(BLIP-2 in eval mode, tokenizer) of a run folder, of Hugging Face's or of LAVIS's weights.

    Raises ValueError in one line when it is none of them, damaged, or of another model.
    """
    config, tokenizer, weights = open_weights(path, "blip2", pretrained.read)
    with torch.device("meta"):           # no time spent on random weights
        model = make_model(checkpoint.config_of(BLIP2Config, config, path))
    checkpoint.load_weights(model, weights, path)
    return model.eval(), tokenizer


def open_trained(path, needs):
    """`from_pretrained` of a model that has learned one of `needs`: itc, itm, lm (captions), vqa.

    Raises ValueError for another.
    """
    model, tokenizer = from_pretrained(path)
    losses = model.config.losses
    can = {"lm": "lm,vqa", "captions": "lm", "instruct": "lm,vqa"}.get(losses, losses)
    matching.check_losses(path, losses, can, needs)
    return model, tokenizer


def main():
    """The command line: caption, match, answer and search."""
    return matching.main(__doc__, open_trained)


if __name__ == "__main__":
    options.run_main(main)
