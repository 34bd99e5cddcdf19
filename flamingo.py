"""Flamingo: a frozen vision encoder and a frozen language model, with trained layers between them.

Flamingo: a Visual Language Model for Few-Shot Learning (Alayrac et al., 2022).

    images, clips -> frozen ViT -> Perceiver resampler -> Q visual tokens each ---+ keys, values
                                                                                  v
    <image> text <eoc> -> frozen embed -> [ gated cross-attention -> frozen block ] x L -> head

    python train.py clip && python train.py lm && python train.py flamingo
    python flamingo.py runs/flamingo answer PICTURE "what colour is the circle?"

Differs from the paper
- The vision encoder is a CLIP of clip.py (paper: an NFNet-F6); its class token is one of the
  features. The presets 3B, 9B and 80B have a ViT of NFNet's width in its place, so their parameter
  counts are not the published ones (see `paper_size`).
- Data: the tasks of the shapes world stand for M3W (documents, albums), ALIGN and LTIP (captions),
  VTP (clips). Questions, labels drawn anew in each episode and glossaries are trained tasks: the
  few-shot figures of our runs are of new labels and new pictures, not of new tasks.
- Cross-attention outputs start 10 times as large (attn_init_scale; the paper's presets: 1) in all
  but the first block, and gates learn 10 times as fast: a small model learns in half the steps.
- In half of the documents and albums text attends to the next image (paper, A.3.2). The paper
  changes only the mask of a page; we also write <image> after its text, so the pairs stay true.
- The loss counts answers and their <eoc> alone, and nothing before the first image (OpenFlamingo's
  rule; paper: all text). Labels and names of shots stand behind <image> without "output:".
- Images are cropped to a square, clips thinned to 32 frames; all clips of a prompt or batch have
  one number of frames. Pages are cut at the end (paper: random crops of 256 tokens, 5 images).
- The commands and figures are zero-shot without the paper's two shots in words, and not ensembled.
- The loss of a data set is the mean over its tokens (paper, 2.4: a sum). The learning rate falls
  to zero (paper: constant). The presets tiny and small train the matrices of attention and MLPs
  with Muon (optimizer.py; paper: AdamW alone). Images are not augmented.
"""
from dataclasses import dataclass, replace
from random import Random

import torch
import torch.nn.functional as F
from torch import nn

from clip import CLIPConfig, image_tower
from clip import PRESETS as CLIP_PRESETS
from common import losses, masks
from common.data.batches import DataSource
from common.data.collators import InterleavedCollator, as_turns
from common.data.images import normalize_pixels
from common.data.tokenizer import BOS, EOC, EOS, IMAGE
from common.evaluation import questions, writing
from common.language import PRESETS as LANGUAGE_PRESETS
from common.language import LanguageConfig, LanguageModel
from common.prompts import CAPTION_PROMPT, IGNORED, QUESTION_PROMPT, Segment, render
from common.training import checkpoint, options
from common.training.devices import to_device
from common.training.optimizer import Recipe, eval_frozen
from common.transformer import MLP, Attention, LayerNorm, gelu, squared_relu

ACTIVATIONS = {"squared_relu": squared_relu, "gelu": gelu}
RESAMPLERS, PLACEMENTS = ("perceiver", "mlp"), ("paper", "openflamingo")


@dataclass(frozen=True)
class FlamingoConfig:
    """The configs of the two frozen models, and the sizes of the trained layers.

    Raises ValueError that names field and value for one that no model can have.
    """
    vision: CLIPConfig = CLIP_PRESETS["tiny"]
    language: LanguageConfig = LANGUAGE_PRESETS["tiny"]
    use_class_token: bool = True         # beside the patches; OpenFlamingo does not
    resampler: str = "perceiver"         # or mlp, the paper's ablation: one token for each feature
    num_latents: int = 8                 # Q, visual tokens of an image or clip
    resampler_layers: int = 2
    resampler_heads: int = 4
    resampler_head_width: int = 32
    max_frames: int = 8                  # of a clip in training; 0: no frame embeddings
    cross_attn_every: int = 1            # a gated block before every so many blocks of the LM
    placement: str = "paper"             # before blocks 0, every, ...; openflamingo: every - 1, ...
    heads: int = 4                       # of a gated block
    head_width: int = 32
    act: str = "squared_relu"            # OpenFlamingo has gelu
    gate_init: float = 0.0               # both gates at the start, before tanh
    attn_init_scale: float = 10.0        # of the cross-attention's output at the start
    only_latest_image: bool = True       # text attends to the latest image alone, not to all before
    p_next_image: float = 0.5            # share of training pages whose text attends to the next
    interleaved: bool = True             # train on pages with several images, too

    def __post_init__(self):
        for name, kind in (("vision", CLIPConfig), ("language", LanguageConfig)):
            if isinstance(getattr(self, name), dict):                 # as JSON has it
                part = checkpoint.config_of(kind, getattr(self, name), name)
                object.__setattr__(self, name, part)
        options.check_fields(
            self, {"resampler": RESAMPLERS, "placement": PLACEMENTS, "act": ACTIVATIONS},
            {"max_frames": 0, "p_next_image": 0}, {"p_next_image": 1})
        if not any(self.is_gated(i) for i in range(self.language.layers)):
            raise ValueError(f"cross_attn_every={self.cross_attn_every}: no gated block among "
                             f"{self.language.layers} blocks")

    def is_gated(self, block):
        """Whether a gated block stands before block number `block` of the language model."""
        first = 0 if self.placement == "paper" else self.cross_attn_every - 1
        return block % self.cross_attn_every == first

    image_size = property(lambda self: self.vision.image_size)
    context_length = property(lambda self: self.language.context_length)


# ------------------------------------------------------------------ the resampler

class ResamplerLayer(nn.Module):
    """Latents attend to the features and to one another, then an MLP (paper, Figure 5).

    media_norm norms the features; latents_norm the latents, as queries and as keys alike. Attention
    and MLP are each added to the latents.
    """

    def __init__(self, *, width, heads, head_width, act):
        super().__init__()
        self.media_norm, self.latents_norm = LayerNorm(width), LayerNorm(width)
        self.attn = Attention(width=width, heads=heads, head_width=head_width,
                              context_width=width, bias=False)
        self.mlp_norm, self.mlp = LayerNorm(width), MLP(width=width, act=act, bias=False)

    def forward(self, latents, media):
        """latents (B, Q, D), media (B, S, D) -> new latents (B, Q, D)."""
        queries = self.latents_norm(latents)
        # Keys and values: the features and the latents, in one sequence.
        context = torch.cat([self.media_norm(media), queries], dim=1) # (B, S + Q, D)
        latents = latents + self.attn(queries, context)
        return latents + self.mlp(self.mlp_norm(latents))


class FrameEmbed(nn.Module):
    """Adds to every feature of frame t the learned vector t; within a frame there is no position.

    For a clip of another length the table is interpolated linearly from its first row to its last,
    in the table's dtype (paper, B.1.2). An image is frame 0. max_frames=0: adds nothing.
    """

    def __init__(self, max_frames, width):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(max_frames, width)) if max_frames else None

    def forward(self, features):
        """features (B, N, F, S, D) -> (B, N, F, S, D), in their dtype."""
        table, frames = self.weight, features.shape[2]
        if table is None:
            return features
        if frames > 1 and frames != len(table):
            table = F.interpolate(table.T[None], size=frames, mode="linear", align_corners=True)
            table = table[0].T                                        # (F, D)
        return features + table[:frames, None].to(features.dtype)     # (F, 1, D)


class Resampler(nn.Module):
    """The features of an image or clip, however many -> Q visual tokens (paper, 2.1 and A.1.1)."""

    def __init__(self, *, width, num_latents, layers, heads, head_width, max_frames, act):
        super().__init__()
        # std 0.02: with latents as large as the features, the outputs for different images are
        # almost equal at the start and stay so for long.
        self.latents = nn.Parameter(0.02 * torch.randn(num_latents, width))
        self.frames = FrameEmbed(max_frames, width)
        self.layers = nn.ModuleList(
            ResamplerLayer(width=width, heads=heads, head_width=head_width, act=act)
            for _ in range(layers))
        self.norm = LayerNorm(width)

    def forward(self, features):
        """features float (B, N, F, S, D): N images or clips of F frames -> (B, N, Q, D)."""
        B, N = features.shape[:2]
        media = self.frames(features).flatten(2, 3).flatten(0, 1)     # (B*N, F*S, D)
        latents = self.latents.to(media.dtype).expand(B * N, -1, -1)  # (B*N, Q, D)
        for layer in self.layers:
            latents = layer(latents, media)
        return self.norm(latents).unflatten(0, (B, N))


class MLPResampler(nn.Module):
    """Our reading of the paper's ablation (3.3): an MLP on every feature, so Q = F*S."""

    def __init__(self, *, width, max_frames, act):
        super().__init__()
        self.frames = FrameEmbed(max_frames, width)
        self.mlp_norm, self.mlp = LayerNorm(width), MLP(width=width, act=act, bias=False)
        self.norm = LayerNorm(width)

    def forward(self, features):
        """features float (B, N, F, S, D) -> (B, N, F*S, D)."""
        x = self.frames(features).flatten(2, 3)                       # (B, N, F*S, D)
        return self.norm(x + self.mlp(self.mlp_norm(x)))


# ------------------------------------------------------------------ the gated block

class GatedBlock(nn.Module):
    """Cross-attention to the visual tokens, then an MLP, each times tanh(gate) (paper, Figure 4).

    With gates at 0 the block is the identity: training starts from the frozen language model.
    attn_init_scale multiplies out_proj at the start: after its first block the LM's hidden states
    have 20 to 60 times the norm of its embeddings; an unscaled output would change them little.
    """

    def __init__(self, *, width, context_width, heads, head_width, act, gate_init, attn_init_scale):
        super().__init__()
        self.attn_norm, self.mlp_norm = LayerNorm(width), LayerNorm(width)
        self.attn = Attention(width=width, heads=heads, head_width=head_width,
                              context_width=context_width, bias=False)
        self.mlp = MLP(width=width, act=act, bias=False)
        with torch.no_grad():
            self.attn.out_proj.weight.mul_(attn_init_scale)
        self.attn_gate = nn.Parameter(torch.full((1,), float(gate_init)))
        self.mlp_gate = nn.Parameter(torch.full((1,), float(gate_init)))

    def forward(self, x, visual, media_mask, cache=None):
        """x (B, T, D), visual (B, N*Q, C), media_mask bool (B, 1, T, N*Q) -> (B, T, D).

        Text that may attend to no image gets exactly 0 from the attention; the MLP applies to it.
        cache: keeps the keys and values of the visual tokens.
        """
        attended = self.attn(self.attn_norm(x), visual, mask=media_mask, cache=cache)
        x = x + self.attn_gate.tanh() * attended
        return x + self.mlp_gate.tanh() * self.mlp(self.mlp_norm(x))


# ------------------------------------------------------------------ the model

class Flamingo(nn.Module):
    """The two frozen models, a resampler and gated blocks between them (paper, Figure 3)."""

    stop_ids, banned_ids = (EOC, EOS), (IMAGE,)      # a written <image> would have no image
    towers = ("vision", "lm")            # stored in half precision where they are frozen

    def __init__(self, config):
        super().__init__()
        self.config, c, act = config, config, ACTIVATIONS[config.act]
        self.vision = image_tower(c.vision)
        self.lm = LanguageModel(c.language)
        self.lm.add_tokens((IMAGE, EOC))             # learned rows over the frozen table
        width = self.vision.width
        self.resampler = MLPResampler(width=width, max_frames=c.max_frames, act=act) \
            if c.resampler == "mlp" else Resampler(
                width=width, num_latents=c.num_latents, layers=c.resampler_layers, act=act,
                max_frames=c.max_frames, heads=c.resampler_heads, head_width=c.resampler_head_width)
        self.gated = nn.ModuleList(                  # one for each block of the LM, or None
            GatedBlock(width=c.language.width, context_width=width, heads=c.heads,
                       head_width=c.head_width, act=act, gate_init=c.gate_init,
                       attn_init_scale=c.attn_init_scale if i else 1.0)
            if c.is_gated(i) else None for i in range(c.language.layers))

    def train(self, mode=True):
        """As of every module, but frozen parts stay in eval mode."""
        return eval_frozen(super().train(mode))

    def encode_images(self, images):
        """Images uint8 (B, N, F, 3, H, W), clips of F frames or F = 1 -> (B, N, Q, D).

        While the vision encoder is frozen, autograd records nothing of it.
        """
        x = normalize_pixels(images.flatten(0, 2))                    # (B*N*F, 3, H, W)
        tokens = self.vision.hidden if self.config.use_class_token else self.vision.patches
        return self.resampler(tokens(x).unflatten(0, images.shape[:3]))

    def logits(self, ids, mask=None, cache=None, last=False, *, visual, attend_next=None):
        """Interleaved text: ids int64 (B, T) -> logits (B, T, V), with last (B, 1, V).

        visual (B, N, Q, D): from `encode_images`, in the order of each row's <image> tokens; rows
        with fewer images are padded. attend_next bool (B,): rows whose text attends to the next
        image instead of the latest one (not with a cache).
        cache: a KVCache. The first call stores the prompt, later ones add the tokens that follow;
        mask bool (B, S) and visual then cover all calls: visual is the same tensor again, or a new
        one with more images or other rows. Raises ValueError for a mask of another shape and for
        more tokens than the context.
        """
        media_mask = self.media_mask(ids, visual, attend_next, cache)
        x, inputs = self.lm.block_inputs(self.lm.embed(ids), mask, cache)        # (B, T, D)
        for gated, block in zip(self.gated, self.lm.blocks):
            if gated is not None:
                x = gated(x, visual.flatten(1, 2), media_mask, cache)
            x = block(x, **inputs)
        return self.lm.head(x[:, -1:] if last else x)

    def media_mask(self, ids, visual, attend_next=None, cache=None):
        """Which visual tokens each text token attends to -> bool (B, 1, T, N*Q).

        With a cache this call also updates it: it adds the chunk's images to each row's count, and
        drops the images' keys and values when `visual` is a new tensor.
        """
        is_image, before = ids == IMAGE, 0
        if cache is not None:
            before = cache.state.get("images", 0)                     # (B, 1)
            cache.state["images"] = before + is_image.sum(dim=1, keepdim=True)
            if cache.context is not visual:
                for gated in filter(None, self.gated):
                    cache.invalidate(gated.attn)
                cache.context = visual
        image_index = masks.image_index(is_image, before, None if attend_next is None
                                        else attend_next[:, None])    # (B, T), 0: no image
        return masks.media(image_index, *visual.shape[1:3], self.config.only_latest_image)

    def forward(self, batch, gather=losses.no_gather):
        """A batch of `InterleavedCollator` with "label_count" -> {"lm": scalar, in nats}."""
        logits = self.logits(batch["ids"], visual=self.encode_images(batch["images"]),
                             attend_next=batch["attend_next"])
        return {"lm": losses.next_token_loss(logits, batch["labels"], batch.get("label_count"))}

    def prepare(self, records, tokenizer):
        """Records, the last answer open -> (ids, mask, {"visual"}), padded left and never cut."""
        collator = InterleavedCollator(tokenizer, self.config, render_page)
        batch = collator.prompts([as_turns(record) for record in records])
        ids, mask, images = (batch[key].to(self.resampler.norm.weight.device)
                             for key in ("ids", "mask", "images"))
        return ids, mask, {"visual": self.encode_images(images)}

    @torch.no_grad()
    def evaluate(self, data, count=400):
        """Captions; in a world with tasks also questions, few-shot episodes, clips and text."""
        writer = writing.Writer(self, data.tokenizer)
        if getattr(data.world, "has_turns", False):
            return self.page_perplexity(data)
        return questions.evaluate(writer, data, count, self.select_shots) \
            | questions.text_perplexity(self, data, count)

    def page_perplexity(self, data, rows=16):
        """Perplexity of the texts of unseen pages, with their images and with those of others."""
        records, total, count = data.records("test"), torch.zeros(2, device=data.device), 0
        for k in range(0, len(records), rows):
            pages = records[k:k + rows]
            batch = to_device(data.collate(pages, [Random(0)] * len(pages)), data.device)
            others = batch | {"images": batch["images"].roll(1, dims=0)}
            total += torch.stack([self(pages | {"label_count": 1})["lm"]
                                  for pages in (batch, others)])
            count += int((batch["labels"][:, 1:] != IGNORED).sum())
        own, other = (total / max(1, count)).exp().tolist()
        return {"perplexity": own, "perplexity_wrong_image": other}

    @torch.no_grad()
    def samples(self, data):
        """An image for people: captions of unseen images, and labels learned from shots."""
        if getattr(data.world, "has_turns", False):
            return writing.page_samples(writing.Writer(self, data.tokenizer), data)
        return writing.samples(writing.Writer(self, data.tokenizer), data)

    @torch.no_grad()
    def select_shots(self, queries, support, count):
        """RICES (paper, A.2): for each query the records of support with the most similar images.

        queries: images or clips, lists of frames. Similarity: the cosine of the frozen encoder's
        pooled features, of a clip their mean. The most similar record comes last.
        """
        collator = InterleavedCollator(None, self.config, render_page)

        def features(clips):
            images = [collator.images([[{"images": [frames]}]])[0, 0] for frames in clips]
            images = [normalize_pixels(x.to(self.lm.new.rows.device)) for x in images]
            vectors = [self.vision.pooled(x).mean(dim=0) for x in images]        # (D,)
            return F.normalize(torch.stack(vectors), dim=-1)
        keys = features([record["turns"][0]["images"][0] for record in support])
        best = (features(queries) @ keys.T).topk(min(count, len(support)), dim=1).indices
        return [[support[i] for i in row[::-1]] for row in best.tolist()]


# ------------------------------------------------------------------ pages and prompts

def page_segments(turns, attend_next=False, is_prompt=False):
    """Figure 7: <bos>, then for each turn <image>, its text, <eoc>; <eos> (Figure 8: a prompt).

    turns: [{"images", "prompt", "answer"}, ...], one <image> for each of its images. The text is
    QUESTION_PROMPT with the prompt, CAPTION_PROMPT where "caption" is True, or neither for an empty
    prompt; then " " and the answer. The loss counts an answer and its <eoc>, unless the turn has
    "learn": False or no image before it or in it. attend_next: <image> comes after its text and
    <eoc>, and every text has one to attend to. is_prompt: the last answer and its <eoc> are left
    out for the model to write; earlier turns are the shots.
    """
    segments, image_seen = [Segment((BOS,))], attend_next
    for number, turn in enumerate(turns):
        images = [Segment((IMAGE,))] * len(turn["images"])
        image_seen = image_seen or bool(images)
        prompt = CAPTION_PROMPT if turn.get("caption") else \
            QUESTION_PROMPT.format(turn["prompt"]) if turn["prompt"] else ""
        text = [Segment(prompt)]
        if not is_prompt or number + 1 < len(turns):
            learn = image_seen and turn.get("learn", True)
            text += [Segment(f" {turn['answer']}", learn), Segment((EOC,), learn)]
        segments += text + images if attend_next else images + text
    return segments if is_prompt else segments + [Segment((EOS,))]


def render_page(turns, tokenizer, context_length=None, attend_next=False, is_prompt=False):
    """Turns -> (ids, labels), `page_segments` as tokens; what exceeds the context is cut off.

    Raises ValueError when that is all labels, and for a vocabulary without <image> and <eoc>. Text
    whose next image is cut off has no labels.
    """
    if tokenizer.image_id != IMAGE:
        raise ValueError(f"a vocabulary whose ids {IMAGE} and {EOC} are not <image> and <eoc>")
    ids, labels = render(page_segments(turns, attend_next, is_prompt), tokenizer, context_length)
    if attend_next and not is_prompt:    # the cut may have removed the image of the last text
        last_image = max((i for i, token in enumerate(ids) if token == IMAGE), default=0)
        labels = labels[:last_image] + [IGNORED] * (len(labels) - last_image)
    return ids, labels


def data_sources(world, tokenizer, config):
    """The data sets of a step; its loss is the weighted sum of their means (paper, 2.4).

    Names, episodes and glossaries teach the model to use shots; in the paper web pages do.
    """
    if not world.tasks:                  # captions are all there is, or pages
        p = config.p_next_image if getattr(world, "has_turns", False) else 0.0
        return [DataSource(world, InterleavedCollator(tokenizer, config, render_page, p))]
    def source(share, weight, p_next_image=0.0, **kinds):
        collate = InterleavedCollator(tokenizer, config, render_page, p_next_image)
        return DataSource(world, collate, share, weight, kinds)
    pages = [source(share=2, weight=1.0, document=3, album=1, p_next_image=config.p_next_image),
             source(share=2, weight=2.0, names=2, episode=1),
             source(share=2, weight=1.0, glossary=1)]
    return (pages if config.interleaved else []) + [
        source(share=8, weight=2.5, caption=1, question=1), source(share=2, weight=2.0, clip=1)]


# ------------------------------------------------------------------ presets and recipes

def paper_size(layers, width, cross_attn_every):
    """A size of the paper's Table 5: heads are 128 wide, 96 in the resampler.

    By these layers' formula 1.16B + 170M, 1.80B + 170M and 8.36B + 170M parameters are trained; the
    table says 1.2B, 1.6B and 10B, and 194M each. The language model, like the vision encoder, is a
    stand-in: a GPT-2 of that size.
    """
    vision = replace(CLIP_PRESETS["ViT-L/14"], vision_width=1536, vision_heads=24)
    language = LanguageConfig(kind="gpt2", vocab_size=32000, context_length=2048, width=width,
                              layers=layers, heads=width // 128, kv_heads=width // 128,
                              hidden=4 * width)
    return FlamingoConfig(
        vision=vision, language=language, use_class_token=False, num_latents=64, resampler_layers=6,
        resampler_heads=16, resampler_head_width=96, cross_attn_every=cross_attn_every,
        heads=width // 128, head_width=128, attn_init_scale=1.0)


PRESETS = {
    "tiny": FlamingoConfig(),
    "small": FlamingoConfig(
        vision=CLIP_PRESETS["small"], language=LANGUAGE_PRESETS["small"], num_latents=32,
        resampler_layers=4, resampler_heads=6, resampler_head_width=64, cross_attn_every=2,
        heads=8, head_width=64),
    "3B": paper_size(24, 2048, cross_attn_every=1),
    "9B": paper_size(40, 4096, cross_attn_every=4),
    "80B": paper_size(80, 8192, cross_attn_every=7),
}
TRAINS = {"flamingo": ("resampler.*", "gated.*", "lm.new.*")}
ADAMW = Recipe(steps=750, batch_size=160, lr=1.5e-3, weight_decay=0.1, eps=1e-8,
               no_decay=("resampler.*",), lr_multipliers={"*_gate": 10.0})
MUON = replace(ADAMW, steps=620, batch_size=80, schedule="linear", optimizer="muon",
               muon_lr_multiplier=3.0)
RECIPES = {"tiny": MUON, "small": MUON, "": ADAMW}


def from_pretrained(path):
    """A writing.Writer of the Flamingo in a run folder. Raises ValueError in one line."""
    config, tokenizer, weights = checkpoint.open_run(path, "flamingo")
    model = Flamingo(checkpoint.config_of(FlamingoConfig, config, path))
    checkpoint.load_weights(model, weights, path)
    return writing.Writer(model.eval(), tokenizer)


def main():
    """The command line: caption and answer."""
    return writing.main(__doc__, from_pretrained)


if __name__ == "__main__":
    options.run_main(main)
