"""Flamingo: a frozen vision tower and a frozen language model, and what is learned between them.

Flamingo: a Visual Language Model for Few-Shot Learning (Alayrac et al., 2022).

    pictures -> frozen ViT -> resampler: a few latents for each picture or clip ---+ keys, values
                                                                                   |
    <image> words <eoc> -> frozen embed -> [ gated block -> frozen block ] x L -> frozen head

    python train.py clip && python train.py lm && python train.py flamingo
    python flamingo.py runs/flamingo caption PICTURE
    python flamingo.py runs/flamingo answer PICTURE "what colour is the circle?"
"""
import dataclasses
import random
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import clip
from common.training import checkpoint, options as cli
from common.evaluation import writing as evaluation
from common import language, losses, masks
from common.prompts import ANSWER, OUTPUT, collate
from common.data.batches import Drawn
from common.generation import generate, score_candidates
from common.data.images import normalize_pixels, open_frames, sheet
from common.language import LanguageConfig, LanguageModel
from common.data.interleaved import InterleavedCollator
from common.data.tokenizer import EOC, EOS, IMAGE
from common.transformer import MLP, Attention, LayerNorm, gelu, squared_relu

ACTIVATIONS = {"squared_relu": squared_relu, "gelu": gelu}
RESAMPLERS = ("perceiver", "mlp")
PLACEMENTS = {"paper": lambda i, every: i % every == 0,
              "openflamingo": lambda i, every: (i + 1) % every == 0}


@dataclass
class FlamingoConfig:
    """The two frozen models' own configs, and the sizes of what is learned."""
    vision: dict = field(default_factory=lambda: dataclasses.asdict(clip.PRESETS["tiny"]))
    language: dict = field(default_factory=lambda: dataclasses.asdict(language.PRESETS["tiny"]))
    vision_skip_blocks: int = 0          # last blocks of the vision tower that are left out
    use_class_token: bool = True         # read it beside the patches; OpenFlamingo does not
    resampler: str = "perceiver"         # or mlp, the paper's ablation: every token, each alone
    num_latents: int = 8                 # visual tokens of a picture or clip
    resampler_layers: int = 2
    resampler_heads: int = 4
    resampler_head_width: int = 32
    max_frames: int = 8                  # of a clip in training; 0: no frame embeddings
    cross_attn_every: int = 1            # a gated block before every so many blocks
    placement: str = "paper"             # block 0 first; openflamingo: block cross_attn_every - 1 first
    heads: int = 4                       # of a gated block
    head_width: int = 32
    act: str = "squared_relu"            # OpenFlamingo has gelu
    gate_init: float = 0.0               # what both gates start at, before their tanh
    attn_init_scale: float = 10.0        # times the usual size an attention's output starts at
    only_latest_image: bool = True       # text attends to the latest picture alone, not to all
    p_next_image: float = 0.5            # share of training's pages whose text sees the next one
    interleaved: bool = True             # train on interleaved pages and episodes too

    def __post_init__(self):
        for name, kinds in (("resampler", RESAMPLERS), ("placement", PLACEMENTS),
                            ("act", ACTIVATIONS)):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name}={getattr(self, name)} is not one of {', '.join(kinds)}")
        for name, value in vars(self).items():
            least = 0 if name in ("max_frames", "vision_skip_blocks") else 1
            if type(value) is int and value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        if not 0 <= self.p_next_image <= 1:
            raise ValueError(f"p_next_image={self.p_next_image}: a probability is in [0, 1]")
        for name, kind in (("vision", clip.CLIPConfig), ("language", LanguageConfig)):
            checkpoint.config_of(kind, getattr(self, name), name)

    @property
    def image_size(self):
        """Pixels of a side, the vision tower's."""
        return self.vision["image_size"]

    @property
    def context_length(self):
        """The most tokens, the language model's."""
        return self.language["context_length"]


def paper(layers, width, every):
    """A size of the paper's Table 5: heads are 128 wide, 96 in the resampler.

    Its vision tower is an NFNet-F6 with 1,536 channels, which has no place here: a ViT of that
    width stands for it. What is learned counts 1.16B + 170M, 1.80B + 170M and 8.36B + 170M
    parameters by the formula of these layers; the table says 1.2B, 1.6B and 10B + 194M.
    """
    vision = dict(dataclasses.asdict(clip.PRESETS["ViT-L/14"]), vision_width=1536, vision_heads=24)
    words = LanguageConfig(kind="gpt2", vocab_size=32000, context_length=2048, width=width, layers=layers,
                           heads=width // 128, kv_heads=width // 128, hidden=4 * width)
    return FlamingoConfig(
        vision=vision, language=dataclasses.asdict(words), use_class_token=False, num_latents=64,
        resampler_layers=6, resampler_heads=16, resampler_head_width=96, cross_attn_every=every,
        heads=width // 128, head_width=128)


PRESETS = {
    "tiny": FlamingoConfig(),
    "small": FlamingoConfig(
        vision=dataclasses.asdict(clip.PRESETS["small"]),
        language=dataclasses.asdict(language.PRESETS["small"]), num_latents=32, resampler_layers=4,
        resampler_heads=6, resampler_head_width=64, cross_attn_every=2, heads=8, head_width=64),
    "3B": paper(24, 2048, every=1),
    "9B": paper(40, 4096, every=4),
    "80B": paper(80, 8192, every=7),
}

TRAINS = {"flamingo": ("resampler.*", "gated.*", "lm.new.*")}


# ------------------------------------------------------------------ the resampler

class ResamplerLayer(nn.Module):
    """Latents read the picture and one another, then an MLP (paper, Figure 5)."""

    def __init__(self, *, width, heads, head_width, act):
        super().__init__()
        self.media_norm, self.latents_norm = LayerNorm(width), LayerNorm(width)
        self.attn = Attention(width=width, heads=heads, head_width=head_width,
                              context_width=width, bias=False)
        self.mlp_norm, self.mlp = LayerNorm(width), MLP(width=width, act=act, bias=False)

    def forward(self, latents, media):
        """latents (B, Q, D), media (B, S, D) -> new latents (B, Q, D)."""
        own = self.latents_norm(latents)
        latents = latents + self.attn(own, torch.cat([self.media_norm(media), own], dim=1))
        return latents + self.mlp(self.mlp_norm(latents))


class Resampler(nn.Module):
    """Any number of features of one picture or clip -> Q latents (paper, 2.1 and A.1.1).

    Each picture or clip is resampled on its own. frames: learned embeddings, one a frame, 0: none.
    """

    def __init__(self, *, width, latents, layers, heads, head_width, frames, act):
        super().__init__()
        # Small beside what they read: else all pictures come out nearly alike, and long stay so.
        self.latents = nn.Parameter(0.02 * torch.randn(latents, width))
        self.frames = nn.Parameter(0.3 * torch.randn(frames, width)) if frames else None
        self.layers = nn.ModuleList(
            ResamplerLayer(width=width, heads=heads, head_width=head_width, act=act)
            for _ in range(layers))
        self.norm = LayerNorm(width)

    def forward(self, features):
        """features float (B, N, F, S, D) of N pictures or clips -> (B, N, Q, D)."""
        B, N = features.shape[:2]
        media = add_frames(features, self.frames).flatten(2, 3).flatten(0, 1)     # (B*N, F*S, D)
        latents = self.latents.to(media.dtype).expand(B * N, -1, -1)
        for layer in self.layers:
            latents = layer(latents, media)
        return self.norm(latents).unflatten(0, (B, N))


class MLPResampler(nn.Module):
    """The ablation's: every feature through one MLP by itself; none is left out (paper, 3.3)."""

    def __init__(self, *, width, frames, act):
        super().__init__()
        self.frames = nn.Parameter(0.3 * torch.randn(frames, width)) if frames else None
        self.mlp_norm, self.mlp = LayerNorm(width), MLP(width=width, act=act, bias=False)
        self.norm = LayerNorm(width)

    def forward(self, features):
        """features float (B, N, F, S, D) -> (B, N, F*S, D)."""
        x = add_frames(features, self.frames).flatten(2, 3)
        return self.norm(x + self.mlp(self.mlp_norm(x)))


def add_frames(features, table):
    """The same learned vector for every feature of a frame, told apart by time alone.

    features (B, N, F, S, D), table (frames, D) or None. A clip of more or fewer frames takes the
    table stretched linearly from its first row to its last (paper, B.1.2); a picture takes row 0.
    """
    if table is None:
        return features
    F_ = features.shape[2]
    if F_ > 1 and F_ != len(table):
        table = F.interpolate(table.T[None], size=F_, mode="linear", align_corners=True)[0].T
    return features + table[:F_, None].to(features.dtype)             # (F, 1, D)


# ------------------------------------------------------------------ the gated block

class GatedBlock(nn.Module):
    """Cross-attention to the pictures and an MLP, each behind its own tanh gate (paper, Figure 4).

    At a gate of 0 the block is the identity, so that training starts from the language model as it
    is; its own weights get their first gradient when the gates have moved. attn_init_scale: how
    much larger than usual the output of the attention starts, beside what it is added to.
    """

    def __init__(self, *, width, context_width, heads, head_width, act, gate, attn_init_scale):
        super().__init__()
        self.attn_norm, self.mlp_norm = LayerNorm(width), LayerNorm(width)
        self.attn = Attention(width=width, heads=heads, head_width=head_width,
                              context_width=context_width, bias=False)
        self.mlp = MLP(width=width, act=act, bias=False)
        with torch.no_grad():
            self.attn.out_proj.weight.mul_(attn_init_scale)
        self.attn_gate = nn.Parameter(torch.full((1,), float(gate)))
        self.mlp_gate = nn.Parameter(torch.full((1,), float(gate)))

    def forward(self, x, visual, mask, cache=None):
        """x (B, T, D), visual (B, N*Q, C), mask bool (B, 1, T, N*Q) -> (B, T, D).

        Where the mask has no True the attention adds exactly 0; the MLP applies to every position.
        """
        seen = self.attn(self.attn_norm(x), visual, mask=mask, cache=cache)
        x = x + self.attn_gate.tanh() * seen
        return x + self.mlp_gate.tanh() * self.mlp(self.mlp_norm(x))


# ------------------------------------------------------------------ the model

class Flamingo(nn.Module):
    """The two frozen models with a resampler and gated blocks between them (paper, Figure 3)."""

    def __init__(self, config):
        super().__init__()
        self.config, c, act = config, config, ACTIVATIONS[config.act]
        blocks = 1 if c.vision["stages"] else c.vision["vision_layers"]       # of a ResNet all
        if c.vision_skip_blocks >= blocks:
            raise ValueError(f"vision_skip_blocks={c.vision_skip_blocks} leaves nothing of a vision tower of {blocks} blocks")
        self.vision = clip.image_tower(clip.CLIPConfig(**c.vision))
        self.lm = LanguageModel(LanguageConfig(**c.language))
        self.lm.add_tokens((IMAGE, EOC))
        width = self.vision.width
        if c.resampler == "mlp":
            self.resampler = MLPResampler(width=width, frames=c.max_frames, act=act)
        else:
            self.resampler = Resampler(
                width=width, latents=c.num_latents, layers=c.resampler_layers, frames=c.max_frames,
                heads=c.resampler_heads, head_width=c.resampler_head_width, act=act)
        # Behind a language model's first block its stream is many times longer than the embeddings
        # before it (tiny: about 20 and 1), so there one must speak louder to be heard.
        self.gated = nn.ModuleDict({
            str(i): GatedBlock(width=self.lm.config.width, context_width=width, heads=c.heads,
                               head_width=c.head_width, act=act, gate=c.gate_init,
                               attn_init_scale=c.attn_init_scale if i else 1.0)
            for i in range(len(self.lm.blocks)) if PLACEMENTS[c.placement](i, c.cross_attn_every)})
        if not self.gated:
            raise ValueError(f"cross_attn_every={c.cross_attn_every}: no gated block among {len(self.lm.blocks)} blocks")

    def look(self, images):
        """Pictures uint8 (B, N, F, 3, H, W), clips of F frames or F = 1 -> tokens (B, N, Q, D).

        The frozen tower runs without gradients: nothing before it learns.
        """
        learns = any(p.requires_grad for p in self.vision.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            x = normalize_pixels(images.flatten(0, 2))
            tokens = self.vision.hidden if self.config.use_class_token else self.vision.grid
            x = tokens(x, self.config.vision_skip_blocks)                           # (B*N*F, S, D)
        return self.resampler(x.unflatten(0, images.shape[:3]))

    def read(self, ids, mask=None, cache=None, last=False, *, visual, following=None):
        """Logits of interleaved text: ids int64 (B, T) -> (B, T, V); last: (B, 1, V).

        visual (B, N, Q, D): what `look` made of each row's pictures, in the order of their tags;
        rows with fewer end in padding. mask, cache: as for the language model. following bool
        (B,): rows whose text sees the next picture. Raises ValueError for more tags than N; `Pages`
        sees to each row's own number.
        """
        tags, N, Q = ids == IMAGE, visual.shape[1], visual.shape[2]
        before = 0 if cache is None else cache.state.get("pictures", 0)
        pictures = masks.image_index(tags, before, None if following is None else following[:, None])
        if pictures.numel() and pictures.max() > N:
            raise ValueError(f"a text with {int(pictures.max())} <image> tags, but {N} pictures")
        if cache is not None:            # a new token belongs to the last tag of its row
            cache.state["pictures"] = before + tags.sum(dim=1, keepdim=True)
            if tags.any():               # with a new picture, where there was padding perhaps
                for block in self.gated.values():
                    cache.invalidate(block.attn)
        seen = masks.media(pictures, N, Q, self.config.only_latest_image)
        visual = visual.flatten(1, 2)                                 # (B, N*Q, D)
        x, places = self.lm.place(self.lm.embed(ids), mask, cache)
        for i, block in enumerate(self.lm.blocks):
            if str(i) in self.gated:
                x = self.gated[str(i)](x, visual, seen, cache)
            x = block(x, **places)
        return self.lm.head(x[:, -1:] if last else x)

    def forward(self, batch, gather=losses.no_gather, cached=None):
        """{"images", "ids", "labels", "following", "weight", "dataset"} -> {"lm": scalar, in nats}.

        images uint8 (B, N, F, 3, H, W); ids, labels int64 (B, T); following bool (B,); dataset: its
        number, weight: its share, scalars. cached: the step's label count, from `accumulate`.
        """
        count = losses.label_count([batch["labels"]], gather) if cached is None else cached
        logits = self.read(batch["ids"], visual=self.look(batch["images"]),
                           following=batch["following"])
        loss = losses.next_token_loss(logits, batch["labels"], count=count)
        return {"lm": batch["weight"] * loss}

    def accumulate(self, batches, gather=losses.no_gather):
        """Micro-batches of one or more data sets -> for each its own data set's label count.

        So that a step's loss is the weighted sum, over the data sets, of the mean over each one's
        tokens (paper, 2.4): gradients of all data sets in every step, not of one after another.
        """
        sets = [int(batch["dataset"]) for batch in batches]
        counts = {s: losses.label_count([b["labels"] for b, own in zip(batches, sets) if own == s],
                                        gather) for s in sorted(set(sets))}
        return [counts[s] for s in sets]

    def after_step(self, step):
        """Nothing to keep in bounds: tanh does."""

    @torch.no_grad()
    def evaluate(self, data, count=400):
        """Captions, and of a world with more: questions, clips, shots -> {name: number}."""
        pupil, world = Pupil(self, data.collate, data.device), data.world

        def write(records):
            return pupil.write([{"images": [r["images"][:1]], "texts": [(OUTPUT, "")]}
                                for r in records])
        figures = evaluation.captions(world, write, count)
        if hasattr(world, "interleaved"):
            for asks in (evaluation.about_two, evaluation.about_questions,
                         evaluation.about_clips, evaluation.about_shots):
                figures |= asks(pupil, world, count)
            figures |= self.text_perplexity(data, [world.reading(random.Random(f"flamingo/{i}"))
                                                   for i in range(count)])
        return figures

    def text_perplexity(self, data, texts):
        """How well text without a picture is predicted, by all of it and past the gated blocks."""
        ids = data.ids(texts)
        none = torch.zeros(len(ids), 1, 1, self.vision.width, device=ids.device)
        labels = language.unpadded(ids, self.lm.config)
        whole, alone = (losses.next_token_loss(logits, labels).exp().item() for logits in (
            self.read(ids, visual=none), self.lm(ids)))
        return {"perplexity": whole, "perplexity_lm": alone}

    @torch.no_grad()
    def samples(self, data, count=6):
        """A picture for people: captions of unseen pictures, and what a few shots teach."""
        pupil, world = Pupil(self, data.collate, data.device), data.world
        records = data.records("test")[:count]
        said = pupil.write([{"images": [r["images"][:1]], "texts": [(OUTPUT, "")]}
                            for r in records])
        rows = [("", r["images"][0], [(None, text, evaluation.describes(world, text, r["source"]))])
                for r, text in zip(records, said)]
        if hasattr(world, "interleaved"):
            shown = evaluation.draws(world, "episode", count, shots=4)
            chosen = pupil.choose(evaluation.asked(shown), [s["candidates"] for s in shown])
            for sample, choice in zip(shown, chosen):
                answer = sample["candidates"][choice]
                *shots, (query, _) = zip(sample["images"], sample["texts"])
                rows.append(("", query[0], [(None, answer, answer == sample["answer"])] + [
                    (frames[0], learned, None) for frames, (_, learned) in shots]))
        return sheet(f"Unseen {world.name}: a picture and the caption written for it; then a "
                     "picture, the label chosen for it, and the shots that told the labels.", rows)


# ------------------------------------------------------------------ data

# {data set: (parts of a step's samples, what its mean loss counts, {kind: how often})}. Pages stand
# for the paper's M3W, pictures for ALIGN and LTIP, clips for VTP. What few-shot prompts need is
# learned from labels and glossaries: a handful of pages does not teach it as a web of them does.
DATASETS = {"pages": (2, 1.0, {"document": 3, "album": 1}),
            "labels": (3, 2.0, {"names": 2, "episode": 1}),
            "glossaries": (5, 1.0, {"glossary": 1}),
            "pictures": (9, 2.5, {"caption": 1, "question": 2}),
            "clips": (1, 1.0, {"clip": 1})}
INTERLEAVED = ("pages", "labels", "glossaries")


def feeds(world, tokenizer, config):
    """What Flamingo learns from: the world's data sets, else its pictures with their texts."""
    if not hasattr(world, "interleaved"):
        return [(world, InterleavedCollator(tokenizer, config), 1)]

    nexts = {"pages": config.p_next_image}                 # of web pages alone (paper, A.3.2)
    found = []
    for name, (parts, weight, kinds) in DATASETS.items():
        if config.interleaved or name not in INTERLEAVED:
            found.append((Drawn(world, partial(one_of, world, kinds)), InterleavedCollator(
                tokenizer, config, len(found), weight, nexts.get(name, 0.0)), parts))
    return found


def one_of(world, kinds, split, rng):
    """A sample of one of the kinds; a function that can be sent to processes that make batches."""
    kind, = rng.choices(list(kinds), weights=kinds.values())
    return world.interleaved(kind, rng, split)


# ------------------------------------------------------------------ prompts and answers

def prompt(frames, told, shots=()):
    """A few-shot prompt (paper, A.2): a sample, shots first, whose last text is open.

    frames, told: the query's picture or clip, and its words, "output:" or "question: ... answer:".
    shots: (frames, told, answer) each; frames None: a shot in words alone, two of which are the
    paper's "0 shots". Returns {"images", "texts", "shown"} as `Pupil` and `segments` take them.
    """
    pictures = [own for own, _, _ in shots] + [frames]
    return {"images": [own for own in pictures if own is not None],
            "texts": [(words, f" {answer}") for _, words, answer in shots] + [(told, "")],
            "shown": [own is not None for own in pictures]}


def rices(query, support, count):
    """Which shots to show (RICES; paper, A.2): the most similar ones, the best one last.

    query (D,), support (M, D): frozen vision features -> int64 (count,), by rising cosine.
    """
    cosines = F.normalize(support, dim=-1) @ F.normalize(query, dim=-1)
    return cosines.topk(min(count, len(support))).indices.flip(0)


class Pupil:
    """A Flamingo asked with a tokenizer: samples in, texts or choices out.

    A sample is {"images", "texts"} and perhaps "shown", as `Pages` and `prompt` have them; its last
    text is open.
    """

    def __init__(self, model, collate, device="cpu"):
        self.model, self.pages, self.device = model, collate, device
        self.tokenizer = collate.tokenizer

    def read(self, samples):
        """Samples as prompts -> ids, mask, {"visual"}: for `generate` and `rank`."""
        batch = collate([self.pages.row(sample, end=False) for sample in samples], side="left")
        visual = self.model.look(self.pages.images(samples).to(self.device))
        return batch["ids"].to(self.device), batch["mask"].to(self.device), {"visual": visual}

    def say(self, ids, **given):
        """`Flamingo.read` for writing: never <image>, no picture would come with it."""
        logits = self.model.read(ids, **given)
        logits[..., IMAGE] = -torch.inf
        return logits

    @torch.inference_mode()
    def most_alike(self, frames, shots, count):
        """The `count` shots (as `prompt` takes them) whose pictures are most like one, by `rices`.

        Compared are the frozen tower's features of a picture in one vector, of a clip their mean.
        """
        query, *support = (
            self.model.vision.features(normalize_pixels(self.pages.images([{"images": [own]}])[0, 0].to(
                self.device))).mean(dim=0) for own in [frames, *(shot[0] for shot in shots)])
        return [shots[i] for i in rices(query, torch.stack(support), count).tolist()]

    @torch.inference_mode()
    def write(self, samples, max_new_tokens=24, num_beams=1, rows=256):
        """What the model says next, a string for each sample."""
        said = []
        for k in range(0, len(samples), rows):
            ids, mask, state = self.read(samples[k:k + rows])
            new = generate(self.say, ids, mask, max_new_tokens=max_new_tokens, num_beams=num_beams, state=state,
                           stop=(EOC, EOS), context_length=self.model.config.context_length)
            said += [self.tokenizer.decode(row).strip() for row in new.tolist()]
        return said

    @torch.inference_mode()
    def choose(self, samples, candidates, rows=256):
        """Which answer is the likeliest: candidates, a list of strings a sample -> their indices.

        Each candidate is scored with the <eoc> that ends it.
        """
        chosen = []
        for k in range(0, len(samples), rows):
            part, answers = samples[k:k + rows], candidates[k:k + rows]
            ids, mask, state = self.read(part)
            made = [[self.tokenizer.encode(f" {a}") + [EOC] for a in own] for own in answers]
            longest = max(len(a) for own in made for a in own)
            table = torch.tensor([[a + [-100] * (longest - len(a)) for a in own] for own in made])
            scores = score_candidates(self.model.read, ids, table.to(self.device), mask, state=state,
                          context_length=self.model.config.context_length)
            chosen += scores.argmax(dim=1).tolist()
        return chosen


# ------------------------------------------------------------------ using a trained model

def from_pretrained(path):
    """A Pupil of the Flamingo in a run folder. Raises ValueError in one line when it is none."""
    config, tokenizer, weights = checkpoint.open_run(path, "flamingo")
    model = Flamingo(checkpoint.config_of(FlamingoConfig, config, path))
    checkpoint.load_weights(model, weights, path)
    return Pupil(model.eval(), InterleavedCollator(tokenizer, model.config))


def ask(run, image, told, shots=()):
    """Print what the model says of a picture or clip after `told`, by a beam search of 3."""
    pupil = from_pretrained(run)
    shots = [(open_frames(path), words, answer) for path, words, answer in shots]
    print(pupil.write([prompt(open_frames(image), told, shots)], num_beams=3)[0])


def caption(run, image):
    """Print a caption of a picture, or of a clip: an animation, or a folder of frames."""
    ask(run, image, OUTPUT)


def answer(run, image, question, shot=()):
    """Print the answer to a question on a picture or clip, after examples if any are given."""
    ask(run, image, ANSWER.format(question),
        [(path, ANSWER.format(words), said) for path, words, said in shot])


def main():
    """The command line: caption and answer."""
    commands = cli.Commands(__doc__)
    commands.add(caption, image="a picture, an animation or a folder of frames")
    commands.add(answer, image="a picture, an animation or a folder of frames",
                 question="in quotes",
                 shot="--IMAGE QUESTION ANSWER: an example first; may be given again")
    return commands.run()


if __name__ == "__main__":
    cli.run(main)
