"""LLaVA: image patches as words of a language model, tuned on visual instructions.

Visual Instruction Tuning (Liu, Li, Wu, Lee, 2023), Improved Baselines with Visual Instruction
Tuning (LLaVA-1.5, 2023), LLaVA-NeXT's tiles (2024), and Qwen-VL's adapter (Bai et al., 2023).

    picture -> frozen ViT -> patches -> projector ---+
                                                     v
    "USER: <image> what is it? ASSISTANT:" -> [ text | patches | text ] -> language model -> answer

    python train.py clip && python train.py lm             what it starts from
    python train.py llava-stage1                           the projector learns from captions
    python train.py llava-stage2                           projector and language model: the chat
    python llava.py runs/llava-stage2 ask PICTURE "what can you see in the picture?"
    python llava.py runs/llava-stage2 chat PICTURE
    python train.py llava-tiles                            small letters in large pictures
    python train.py qwen-stage1 && python train.py qwen-stage2 && python train.py qwen-stage3

In place of a run: a Hugging Face folder of LLaVA-1.5 or LLaVA-NeXT.

Differs from the papers
- Data: the shapes world stands for CC3M, LLaVA-Instruct and the academic tasks. Its teacher is a
  program that gets captions and boxes (paper: GPT-4); teacher_messages in common/data/instruct.py
  makes the prompts for a real one. The presets tiny and small and their recipes are ours: Muon
  (optimizer.py) for the matrices of attention and MLPs, AdamW for the rest (papers: AdamW).
- The template "house" marks turns by special tokens; the released templates are in
  common/prompts.py. Captions end with <eos> in stage 1 (released code: a new line, which a world's
  vocabulary lacks).
- A row that is longer than the context loses its end after its images are put in (as released). A
  batch without images gets one black picture that no row uses, so that the projector is always in
  the graph (released code: one for each row).
- Stage 1 asks no question (released code; paper: one of eleven) and pads pictures to squares
  (released code: crops them; 1.5 pads in stage 2).
- Tiles train the image encoder, too, as LLaVA-NeXT does (LLaVA-1.5-HD: frozen).
- Qwen-VL: the image encoder is CLIP's without its last block (paper: OpenCLIP's bigG, whole). The
  adapter's queries attend to their own places from the start. The decoder is a LLaMA without Qwen's
  biases. Images stand without <img> and "Picture 1:", turns in the template "house" (paper:
  ChatML).
"""
import math
from dataclasses import dataclass, replace
from random import Random

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from clip import PRESETS as CLIP_PRESETS
from clip import CLIPConfig, image_tower
from common import losses
from common.data.batches import DataSource
from common.data.collators import as_turns
from common.data.images import (best_grid, center_crop, normalize_pixels, pack_tiles, pad_to_square,
                                tiles, to_tensor)
from common.data.instruct import (CAPTION_REQUEST, LETTERS, SHORT_ANSWER, ask_short,
                                  choice_prompt)
from common.data.tokenizer import PAD
from common.evaluation import assistant, chat, questions, writing
from common.evaluation.sheet import stack
from common.language import PRESETS as LANGUAGE_PRESETS
from common.language import LanguageConfig, LanguageModel
from common.pretrained import llava as pretrained
from common.pretrained.files import open_weights
from common.prompts import IGNORED, STOP, collate, find_template, render
from common.training import checkpoint, options
from common.training.devices import to_device
from common.training.optimizer import Recipe, eval_frozen
from common.transformer import Attention, LayerNorm, attend
from common.vision import adapt_weights, resize_positions

PROJECTORS, VIEWS = ("linear", "mlp", "adapter"), ("crop", "pad", "squash", "tiles")
TASKS = ("captions", "instruct")
MIX = ("questions=8,chat=2,conversation=2,caption=1,detail=1,reasoning=1,probe=1,"
       "text_question=1,choice=0.25")
TEXT = -1                                # in feature_index: no visual token


@dataclass(frozen=True)
class LLaVAConfig:
    """The configs of image encoder and language model, and what is between them.

    Raises ValueError that names field and value for one that no model can have.
    """
    vision: CLIPConfig = CLIP_PRESETS["tiny"]
    language: LanguageConfig = LANGUAGE_PRESETS["tiny"]
    projector: str = "mlp"               # LLaVA-1.5's; linear: LLaVA's; adapter: Qwen-VL's
    num_queries: int = 16                # Q, of the adapter: a square number
    views: str = "pad"                   # to a square; crop; squash (Qwen-VL); tiles (NeXT)
    grids: tuple = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))           # of tiles: (columns, rows)
    resize_to: int = 0                   # side of a view in pixels; 0: the image encoder's own
    draw_size: int = 0                   # side of a world's pictures; 0: that of a view
    template: str = "house"
    image_place: str = "first"           # in a turn; last; random (LLaVA's paper, 4.1)
    losses: str = "captions"             # the task: of stage 1; "instruct": of stage 2
    loss_on: str = "answers"             # or "all": prompts count, too
    mix: str = MIX                       # of stage 2: a world's tasks and their shares

    def __post_init__(self):
        for name, kind in (("vision", CLIPConfig), ("language", LanguageConfig)):
            part = getattr(self, name)
            if isinstance(part, dict):                                # as JSON has it
                object.__setattr__(self, name, checkpoint.config_of(kind, part, name))
        object.__setattr__(self, "grids", tuple(map(tuple, self.grids)))
        self.shares()
        if self.vision.stages:
            raise ValueError("vision: a ResNet; LLaVA takes the patches of a ViT")
        find_template(self.template)
        options.check_fields(
            self, {"projector": PROJECTORS, "views": VIEWS, "losses": TASKS,
                   "image_place": ("first", "last", "random"),
                   "loss_on": ("answers", "all")}, {"resize_to": 0, "draw_size": 0})
        if not self.grids or not all(len(grid) == 2 and all(type(n) is int and n > 0 for n in grid)
                                     for grid in self.grids):
            raise ValueError(f"grids={self.grids}: pairs of numbers of columns and rows")
        if self.most_tokens >= self.context_length:
            raise ValueError(f"{self.most_tokens} visual tokens in a context of "
                             f"{self.context_length}: no room for text")

    def shares(self):
        """mix as {task: share}. Raises ValueError for a text that is none."""
        try:
            pairs = [part.split("=") for part in self.mix.split(",")]
            shares = {task: float(share) for task, share in pairs}
            if not all(0 < share < math.inf for share in shares.values()):
                raise ValueError
            return shares
        except ValueError:
            raise ValueError(f"mix={self.mix}: write task=share,task=share, shares above 0") \
                from None

    @property
    def view_size(self):
        """Pixels a side of what the image encoder gets."""
        return self.resize_to or self.vision.image_size

    @property
    def image_size(self):
        """Pixels a side of the pictures that a world draws."""
        return self.draw_size or self.view_size

    @property
    def tokens_per_view(self):
        """How many visual tokens a view becomes."""
        patches = (self.view_size // self.vision.patch_size) ** 2
        return self.num_queries if self.projector == "adapter" else patches

    @property
    def most_tokens(self):
        """Of a picture that fills its largest grid."""
        P = self.tokens_per_view
        if self.views != "tiles":
            return P
        return P + max(columns * rows * P + rows * math.isqrt(P) for columns, rows in self.grids)

    @property
    def context_length(self):
        """Of text and visual tokens together."""
        return self.language.context_length


# ------------------------------------------------------------------ projectors

def grid_positions(grid_size, width, device=None):
    """Fixed positions of a grid, row by row: float32 (grid_size ** 2, D).

    Half of the features are sines and cosines of the column, the others of the row (MAE's). Rows
    and columns go from 0 to 16, as the paper's, in a grid of any size.
    """
    steps = 10000 ** -(torch.arange(width // 4, device=device) / (width // 4))
    places = torch.arange(grid_size, device=device) * (16 / grid_size)
    y, x = torch.meshgrid(places, places, indexing="ij")
    angles = [place.flatten()[:, None] * steps for place in (x, y)]   # (G * G, D/4) each
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1)


class Adapter(nn.Module):
    """Qwen-VL's adapter: learned queries, one layer of cross-attention, no MLP (its 2.1).

    Queries and keys have the positions of a grid, values have none. The number of its outputs does
    not depend on the number of patches. Raises ValueError for a number of queries that is no
    square.
    """

    def __init__(self, *, context_width, width, heads, num_queries):
        super().__init__()
        if math.isqrt(num_queries) ** 2 != num_queries:
            raise ValueError(f"num_queries={num_queries}: they form a grid, so a square number")
        if width % 4:
            raise ValueError(f"width {width} is no multiple of 4: sines and cosines of two axes")
        self.kv_proj = nn.Linear(context_width, width, bias=False)
        self.ln_q, self.ln_kv = LayerNorm(width, 1e-6), LayerNorm(width, 1e-6)
        self.queries = nn.Parameter(torch.empty(num_queries, width))
        self.attn = Attention(width=width, heads=heads)
        self.ln_post, self.out = LayerNorm(width, 1e-6), nn.Linear(width, width, bias=False)

    def forward(self, patches):
        """patches (N, S, C), a square grid row by row -> (N, Q, D)."""
        attn, (Q, D), S = self.attn, self.queries.shape, patches.shape[1]
        positions = grid_positions(math.isqrt(Q), D, patches.device)  # (Q, D)
        table = F.pad(positions, (0, 0, 1, 0))                        # a class token's row
        key_positions = resize_positions(table, math.isqrt(S))[1:]    # (S, D)
        values = self.ln_kv(self.kv_proj(patches))                    # (N, S, D)
        queries = self.ln_q(self.queries) + positions.to(values.dtype)
        q, k, v = (project(x).unflatten(-1, (attn.heads, -1)).transpose(-3, -2)
                   for project, x in ((attn.q_proj, queries.expand(len(patches), -1, -1)),
                                      (attn.k_proj, values + key_positions.to(values.dtype)),
                                      (attn.v_proj, values)))
        out = attend(q, k, v)                                         # (N, H, Q, head width)
        return self.out(self.ln_post(attn.out_proj(out.transpose(1, 2).flatten(2))))


def make_projector(c):
    """What turns patches (N, P, C) into embeddings of the language model (N, P or Q, D)."""
    inputs, width = c.vision.vision_width, c.language.width
    if c.projector == "adapter":
        heads = width // 128 if width > 128 else 4    # paper: 128 wide each; a small one has four
        return Adapter(context_width=inputs, width=width, heads=heads, num_queries=c.num_queries)
    if c.projector == "linear":
        return nn.Linear(inputs, width)
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))


# ------------------------------------------------------------------ pictures and rows

def make_views(picture, c):
    """A picture -> (its views, RGB of view_size pixels a side; the order of their tokens).

    The order: a list of int, k: token k, counted through all views; -1: the end of a row of tiles.
    """
    side, P = c.view_size, c.tokens_per_view
    if c.views == "tiles":
        grid = best_grid(picture.size, c.grids, side)
        views = tiles(picture, c.grids, side)
        tokens = torch.arange(len(views) * P).view(len(views), P, 1)
        return views, pack_tiles(tokens, picture.size, grid, torch.tensor([-1])).flatten().tolist()
    if c.views == "squash":
        return [picture.resize((side, side), Image.Resampling.BICUBIC)], list(range(P))
    picture = pad_to_square(picture) if c.views == "pad" else picture
    return [center_crop(picture, side)], list(range(P))


def merge_image_tokens(rows, images, image_id, *, side="right", context_length=None):
    """Put the visual tokens at their places in the text (released code: the same on embeddings).

    rows: [(ids, labels), ...], lists of int with one image_id for each image. images: for each row
    a list of its images, each a list of int: rows of the table of `LLaVA.encode_images`.
    What exceeds context_length afterwards is cut off at the end. side: of the padding.
    -> {"ids", "labels", "feature_index": int64 (B, T), "mask": bool (B, T)}. feature_index: -1 at
    text and padding; elsewhere ids are <pad> and labels -100. Raises ValueError with the row and
    both numbers when images and image_id differ in number.
    """
    merged, index = [], []
    for number, ((ids, labels), own) in enumerate(zip(rows, images, strict=True)):
        if ids.count(image_id) != len(own):
            raise ValueError(f"row {number}: {ids.count(image_id)} places for {len(own)} images")
        own, tokens = iter(own), []
        for token, label in zip(ids, labels, strict=True):
            tokens += ([(PAD, IGNORED, row) for row in next(own)] if token == image_id
                       else [(token, label, TEXT)])
        tokens = tokens[:context_length]
        merged.append(([token for token, _, _ in tokens], [label for _, label, _ in tokens]))
        index += [row for _, _, row in tokens]
    batch = collate(merged, side=side)
    batch["feature_index"] = torch.full_like(batch["ids"], TEXT)
    batch["feature_index"][batch["mask"]] = torch.tensor(index)
    return batch


def answer_places(labels):
    """labels int64 (B, T) -> int64 (B, K): in each row the places of its labels and of the token
    before each of them, in order. Shorter rows are filled with place 0; its label never counts."""
    learned = labels != IGNORED
    learned[:, 0] = False
    kept = learned | F.pad(learned[:, 1:], (0, 1))                    # (B, T)
    K = max(1, int(kept.sum(dim=1).max()))
    places = (~kept).int().argsort(dim=1, stable=True)[:, :K]         # the kept ones come first
    return places.masked_fill(~kept.gather(1, places), 0)


def make_batch(pages, tokenizer, c, rngs=None):
    """Lists of turns -> {"images": uint8 (V, 3, H, W), all views, and `merge_image_tokens`}.

    rngs: a random.Random for each; there is "places", too, see `answer_places`. None: the last
    answer of each is to be written; padding is left.
    """
    template, place = template_of(c), {"first": True, "last": False}.get(c.image_place, "random")
    rows, image_rows, views = [], [], []
    for turns, rng in zip(pages, rngs or [None] * len(pages)):
        turns = [turn | {"images": sum(turn["images"], [])} for turn in turns]        # no clips
        segments = template.segments(turns, is_prompt=rng is None, image_first=place, rng=rng)
        ids, labels = render(segments, tokenizer)
        rows.append((ids, ids if c.loss_on == "all" else labels))
        own = []
        for image in sum((turn["images"] for turn in turns), []):
            first = 1 + len(views) * c.tokens_per_view        # row 0 of the table ends a row
            new, order = make_views(image, c)
            own.append([first + k if k >= 0 else 0 for k in order])
            views += new
        image_rows.append(own)
    batch = merge_image_tokens(rows, image_rows, tokenizer.image_id,
                               context_length=c.context_length if rngs else None,
                               side="right" if rngs else "left")
    if rngs:
        batch["places"] = answer_places(batch["labels"])
    black = torch.zeros(1, 3, c.view_size, c.view_size, dtype=torch.uint8)
    return batch | {"images": to_tensor(views) if views else black}


def template_of(c):
    """The config's template; in stage 1 "plain": image and caption without a question."""
    if c.losses != "captions":
        return find_template(c.template)
    plain = find_template("plain")
    return replace(plain, end=(STOP,)) if c.template == "house" else plain


class ConversationBatch:
    """Conversations on images, or on none, as ids, labels and images."""

    def __init__(self, tokenizer, config):
        self.tokenizer, self.config = tokenizer, config
        self.context_length = config.context_length

    def __call__(self, records, rngs):
        """-> the batch of `make_batch`, padded right."""
        pages = [instruction_turns(record, self.config, rng) for record, rng in zip(records, rngs)]
        return make_batch(pages, self.tokenizer, self.config, rngs)


REQUESTS = ("what is this?", "describe the picture briefly.", "what does the picture show?",
            CAPTION_REQUEST)


def instruction_turns(record, c, rng=None):
    """The turns of a record, in training (with rng) in LLaVA-1.5's wordings: a question with an
    answer of one word or a letter gets the line that asks for it. Evaluations and the user's
    conversations have their own."""
    turns = as_turns(record, rng)
    if rng and "question" in record:     # multiple choice
        choices, answer = record["candidates"], turns[0]["answer"]
        prompt = choice_prompt(f"{record['context']}\n{record['question']}", choices)
        return [turns[0] | {"prompt": prompt, "answer": LETTERS[choices.index(answer)]}]
    if turns[0].get("caption") and c.losses != "captions":
        return [turns[0] | {"prompt": rng.choice(REQUESTS) if rng else REQUESTS[0]}]
    return ask_short(turns) if rng and "kind" in record else turns        # "kind": a world's


# ------------------------------------------------------------------ the model

class LLaVA(nn.Module):
    """A ViT, a projector and a language model that gets patches and words in one sequence."""

    towers = ("vision", "lm")            # stored in half precision where they are frozen
    banned_ids = ()

    def __init__(self, config):
        super().__init__()
        self.config, c = config, config
        self.vision = image_tower(replace(c.vision, image_size=c.view_size))
        # Features before the last block (paper, 4.1); after it ScienceQA loses a point (5.2).
        del self.vision.transformer.blocks[-1]
        self.vision.ln_post = None
        self.projector = make_projector(c)
        self.row_end = None              # of tiles: behind each row of visual tokens
        if c.views == "tiles":
            self.row_end = nn.Parameter(torch.empty(c.language.width))
        init_weights(self)
        self.lm = LanguageModel(c.language)
        self.stop_ids, self.stop_string = (c.language.eos_id,), template_of(c).stop_string

    def train(self, mode=True):
        """As of every module, but frozen parts stay in eval mode."""
        return eval_frozen(super().train(mode))

    def encode_images(self, images):
        """All views uint8 (V, 3, H, W) -> the feature table (1 + V * P, D), P tokens a view.

        Row 0 stands at the end of each row of tiles; without tiles nothing uses it.
        """
        patches = self.vision.patches(normalize_pixels(images))       # (V, S, C), no class token
        features = self.projector(patches).flatten(0, 1)              # (V * P, D)
        first = features.new_zeros(features.shape[1]) if self.row_end is None else self.row_end
        return torch.cat([first[None].to(features.dtype), features])

    def embed(self, ids, feature_index, features):
        """ids, feature_index int64 (B, T) of `merge_image_tokens`, features (1 + V * P, D) ->
        (B, T, D): the features at their places, the words' embeddings elsewhere."""
        words = self.lm.embed(ids)
        visual = features[feature_index.clamp(min=0)].to(words.dtype)   # (B, T, D)
        return torch.where((feature_index == TEXT)[..., None], words, visual)

    def forward(self, batch, gather=losses.no_gather):
        """A batch of `make_batch` with "label_count" -> {"lm": scalar, in nats}.

        Causal attention, of the visual tokens as well; padding is behind the text. The plain line:
            logits = self.lm(self.embed(ids, feature_index, features))
        Only the places of answers go through the head: each answer token and the one before it,
        which predicts it. They stay neighbours, so the loss shifts as in the plain line.
        """
        features, places = self.encode_images(batch["images"]), batch["places"]
        x = self.embed(batch["ids"], batch["feature_index"], features)           # (B, T, D)
        x, inputs = self.lm.block_inputs(x)
        for block in self.lm.blocks:
            x = block(x, **inputs)
        x = x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))            # (B, K, D)
        labels = batch["labels"].gather(1, places).masked_fill(places == 0, IGNORED)      # (B, K)
        return {"lm": losses.next_token_loss(self.lm.head(x), labels, batch.get("label_count"))}

    def logits(self, x, mask=None, cache=None, last=False):
        """ids (B, T) or embeddings (B, T, D) -> logits (B, T, V); see `LanguageModel.forward`."""
        return self.lm(x, mask, cache, last)

    def prompt_batch(self, records, tokenizer):
        """Records, the last answer open -> the batch of `make_batch`, on the model's device."""
        pages = [instruction_turns(record, self.config) for record in records]
        return to_device(make_batch(pages, tokenizer, self.config),
                         self.lm.token_embed.weight.device)

    def prepare(self, records, tokenizer):
        """Records, the last answer open -> (embeddings, mask, {}) for evaluation/writing.py."""
        batch = self.prompt_batch(records, tokenizer)
        features = self.encode_images(batch["images"])
        return self.embed(batch["ids"], batch["feature_index"], features), batch["mask"], {}

    def adapt(self, weights):
        """The weights of another run for this model, see `adapt_weights`."""
        return adapt_weights(self, weights)

    @torch.no_grad()
    def evaluate(self, data, count=400):
        """Captions; of stage 2 what the world can ask, see evaluation/assistant.py."""
        writer, world, c = writing.Writer(self, data.tokenizer), data.world, self.config
        if getattr(world, "has_turns", False):
            return {"perplexity": self.perplexity(data.records("test"), data.tokenizer)}
        figures = questions.captions(writer, world, count)
        if c.losses == "captions" or not world.tasks:
            return figures
        short, asked = f"{{}}\n{SHORT_ANSWER}", c.shares()
        figures |= questions.visual_questions(writer, world, count, short)
        figures |= questions.unseen_kinds(writer, world, count // 2, short)
        figures |= assistant.hallucination(writer, world, count, short)
        if {"conversation", "detail", "reasoning"} & {*asked}:
            figures |= assistant.answer_lengths(writer, world, count // 2, SHORT_ANSWER)
            figures |= assistant.descriptions(writer, world, count // 4)
            figures |= assistant.relative_scores(writer, world, count // 4)
        if "chat" in asked:
            figures |= assistant.chats(writer, world, count // 2)
        if "choice" in asked:
            figures |= assistant.choices(writer, world, count, choice_prompt)
        for task in ("reading", "grounding"):
            figures |= getattr(assistant, task)(writer, world, count) if task in asked else {}
        return figures

    def perplexity(self, records, tokenizer, rows=32):
        """exp of the mean negative log-likelihood of the answers of conversations."""
        total = count = 0
        for k in range(0, len(records), rows):
            pages = [instruction_turns(record, self.config, Random(0))
                     for record in records[k:k + rows]]
            batch = make_batch(pages, tokenizer, self.config, [Random(0)] * len(pages))
            batch = to_device(batch, self.lm.token_embed.weight.device)
            total += self(batch | {"label_count": 1})["lm"].item()
            count += int((batch["labels"][:, 1:] != IGNORED).sum())
        return math.exp(total / max(1, count))

    @torch.no_grad()
    def samples(self, data):
        """An image for people: captions of unseen images, answers and replies to instructions."""
        writer, world = writing.Writer(self, data.tokenizer), data.world
        if getattr(world, "has_turns", False):
            room = self.config.context_length - self.config.most_tokens - 96     # of its reply, too
            short = [record for record in data.records("test") if len(data.tokenizer.encode(
                record["turns"][0]["prompt"])) < room]
            return assistant.samples(writer, world, short[:6])
        sheets = [writing.samples(writer, data, shots=False)]
        if world.tasks and self.config.losses == "instruct":
            sheets += [writing.answers(writer, data, template=f"{{}}\n{SHORT_ANSWER}"),
                       assistant.samples(writer, world,
                                         questions.draw_tasks(world, "instruction", 6))]
        return stack(sheets)


@torch.no_grad()
def init_weights(model):
    """Linear layers as torch's, as released; a row's end and the adapter's queries start small.

    The first rows of each head's q_proj and k_proj are the main axes (SVD) of the positions, times
    2 for a sharper softmax: so a query attends to its own place (released code: has to learn that).
    """
    if model.row_end is not None:
        nn.init.normal_(model.row_end, std=len(model.row_end) ** -0.5)
    if isinstance(model.projector, Adapter):
        queries, attn = model.projector.queries, model.projector.attn
        nn.init.trunc_normal_(queries, std=0.02)
        positions = grid_positions(math.isqrt(len(queries)), queries.shape[1], queries.device)
        _, _, axes = torch.linalg.svd(positions - positions.mean(dim=0), full_matrices=False)
        axes = 2 * axes[:min(8, attn.head_width)]
        for linear in (attn.q_proj, attn.k_proj):
            linear.weight.unflatten(0, (attn.heads, -1))[:, :len(axes)] = axes


# ------------------------------------------------------------------ presets and recipes

V1_5 = LLaVAConfig(vision=CLIP_PRESETS["ViT-L/14@336"], language=LANGUAGE_PRESETS["vicuna-7b-v1.5"],
                   template="v1")
PRESETS = {
    "tiny": LLaVAConfig(),
    "small": LLaVAConfig(vision=CLIP_PRESETS["small"], language=LANGUAGE_PRESETS["small"],
                         num_queries=64),
    "v1-7b": replace(V1_5, vision=CLIP_PRESETS["ViT-L/14"], language=LANGUAGE_PRESETS["llama-7b"],
                     projector="linear", image_place="random", template="v0", views="crop"),
    "v1.5-7b": V1_5,
    "v1.5-13b": replace(V1_5, language=LANGUAGE_PRESETS["vicuna-13b-v1.5"]),
    "next-7b": replace(V1_5, views="tiles"),
}
# All but vision.*: there is not always a row_end, and a pattern must match.
PROJECTOR, NOT_VISION = "projector.*", ("[!v]*",)
TRAINS = {"llava-stage1": (PROJECTOR,), "llava-stage2": NOT_VISION, "llava-tiles": ("*",),
          "qwen-stage1": ("vision.*", PROJECTOR), "qwen-stage2": ("*",), "qwen-stage3": NOT_VISION}

# The papers' and the released scripts', one epoch (LLaVA's stage 2: three); warm-up 3%.
PAPER = Recipe(steps=2180, batch_size=256, lr=1e-3, warmup=66, weight_decay=0.0, betas=(0.9, 0.999),
               eps=1e-8)
PAPERS = {
    "": PAPER, "llava-stage2": replace(PAPER, steps=5198, batch_size=128, lr=2e-5, warmup=156),
    "llava-tiles": replace(PAPER, steps=5938, batch_size=128, lr=2e-5, warmup=179,
                           lr_multipliers={"vision.*": 0.1}),
    # Qwen-VL's (its Table 8; find_recipe keeps a warm-up within a fifth of the steps).
    "qwen-stage1": replace(PAPER, steps=50000, batch_size=30720, lr=2e-4, warmup=500,
                           weight_decay=0.05, betas=(0.9, 0.98), eps=1e-6),
    "qwen-stage2": replace(PAPER, steps=19000, batch_size=4096, lr=5e-5, warmup=400,
                           weight_decay=0.05, betas=(0.9, 0.98), eps=1e-6),
    "qwen-stage3": replace(PAPER, steps=8000, batch_size=128, lr=1e-5, warmup=3000,
                           weight_decay=0.05, betas=(0.9, 0.98), eps=1e-6)}
V1 = PAPERS | {
    "": replace(PAPER, steps=4650, batch_size=128, lr=2e-3, warmup=140),
    "llava-stage2": replace(PAPER, steps=14813, batch_size=32, lr=2e-5, warmup=445)}
TINY = Recipe(steps=300, batch_size=64, lr=2e-3, weight_decay=0.0, schedule="linear",
              optimizer="muon", betas=(0.9, 0.95), eps=1e-8)
TUNE = replace(TINY, steps=900, batch_size=32, lr=1e-3, weight_decay=0.05)
RECIPES = {
    "tiny": TUNE, "tiny llava-stage1": TINY, "tiny qwen-stage1": TINY,
    "small": replace(TUNE, steps=6000, batch_size=256, lr=5e-4, warmup=300),
    **{f"{size} {stage}".rstrip(): recipe for size, recipes in
       (("v1-7b", V1), ("v1.5-7b", PAPERS), ("v1.5-13b", PAPERS), ("next-7b", PAPERS))
       for stage, recipe in recipes.items()},
    "": PAPER,
}


def data_sources(world, tokenizer, config):
    """Captions in stage 1; in stage 2 the tasks of `mix`, a world's captions or the user's
    conversations. Raises ValueError for a task that the world does not have."""
    collate = ConversationBatch(tokenizer, config)
    if config.losses == "captions" or not world.tasks:
        return [DataSource(world, collate)]
    shares = config.shares()
    if not {*shares} <= {*world.tasks}:
        raise ValueError(f"mix={config.mix}: {world.name} has {', '.join(world.tasks)}")
    return [DataSource(world, collate, kinds=shares)]


# ------------------------------------------------------------------ using a trained model

def from_pretrained(path):
    """(LLaVA in eval mode, tokenizer) of a run folder, or of Hugging Face's weights.

    Raises ValueError in one line when it is none of them, damaged, or of another model.
    """
    config, tokenizer, weights = open_weights(path, "llava", pretrained.read)
    with torch.device("meta"):           # no time spent on random weights
        model = LLaVA(checkpoint.config_of(LLaVAConfig, config, path))
    checkpoint.load_weights(model, weights, path)
    return model.eval(), tokenizer


def open_trained(path):
    """`from_pretrained` of a model that answers. Raises ValueError for one of stage 1."""
    model, tokenizer = from_pretrained(path)
    if model.config.losses != "instruct":
        raise ValueError(f"{path}: a run of stage 1, which writes captions alone; python train.py "
                         f"llava-stage2 --init {path} makes one that answers")
    return model, tokenizer


def main():
    """The command line: ask and chat."""
    return chat.main(__doc__, open_trained)


if __name__ == "__main__":
    options.run_main(main)
