"""What is compared with transformers: for each case the reference, and ours from the same weights.

`reference(seed)` builds transformers' module with every parameter random and returns (weights under
our names, inputs, outputs), all numpy arrays; `ours(weights, inputs)` returns our outputs. Sizes are
pairwise distinct and masks ragged, so that nothing agrees by accident.
"""
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import blip2
import llava
from blip import BLIPConfig, make_model
from clip import CLIP, CLIPConfig
from common.bert import starts_with
from common.data.images import normalize_pixels
from common.generation import generate
from common.language import LanguageConfig, LanguageModel
from common.losses import best_cosine
from common.masks import causal, padding
from common.pretrained import blip
from common.pretrained import blip2 as blip2_weights
from common.pretrained import llava as llava_weights
from common.pretrained.language import config_fields, translated
from common.t5 import RelativeBias, T5, T5Config
from common.transformer import (GatedMLP, MLP, bert_block, gelu_tanh, gpt2_block, llama_block,
                                opt_block, rope_table, t5_block)

B, T, S = 3, 5, 7
REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()       # padded right


def randomize(module, seed):
    """Every parameter random, norms and biases included; returns the module in eval mode."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


def renamed(module, names):
    """The module's weights under our names: names is {theirs: ours}, prefixes of parameter names."""
    out = {}
    for name, value in module.state_dict().items():
        head = next((n for n in names if name == n or name.startswith(n + ".")), None)
        if head is not None:
            out[names[head] + name[len(head):]] = value
    return out


def transposed(weights):
    """GPT-2 keeps its matrices transposed (Conv1D)."""
    return {name: value.T if value.ndim == 2 else value for name, value in weights.items()}


def arrays(values):
    """Tensors as numpy arrays."""
    return {name: value.detach().numpy() for name, value in values.items()}


def load(module, weights):
    """Our module with the weights, strictly, in eval mode."""
    module.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
    return module.eval()


class ClipCase:
    """The whole of CLIPModel: features, logits, loss."""
    name = "clip"
    config = CLIPConfig(image_size=15, patch_size=5, vision_width=24, vision_layers=2,
                        vision_heads=3, text_width=28, text_layers=3, text_heads=2,
                        context_length=11, vocab_size=53, eos_id=31, embed_dim=17,
                        act="quick_gelu")

    def reference(self, seed):
        from transformers import CLIPConfig as Config, CLIPModel
        c = self.config
        model = randomize(CLIPModel(Config(
            projection_dim=c.embed_dim,
            text_config=dict(hidden_size=28, intermediate_size=112, num_hidden_layers=3,
                             num_attention_heads=2, max_position_embeddings=11, vocab_size=53,
                             eos_token_id=31, bos_token_id=30, pad_token_id=0, projection_dim=17),
            vision_config=dict(hidden_size=24, intermediate_size=96, num_hidden_layers=2,
                               num_attention_heads=3, image_size=15, patch_size=5,
                               projection_dim=17))), seed)
        model.logit_scale.data.fill_(1.7)
        images = torch.randn(B, 3, 15, 15)
        ids = torch.randint(32, 53, (B, T + 2))
        for row, end in enumerate((2, 4, 6)):
            ids[row, end], ids[row, end + 1:] = 31, 0
        out = model(input_ids=ids, pixel_values=images, return_loss=True)
        names = {"logit_scale": "logit_scale",
                 "vision_model.embeddings.class_embedding": "vision.cls_token",
                 "vision_model.embeddings.patch_embedding": "vision.patch_embed",
                 "vision_model.embeddings.position_embedding.weight": "vision.pos_embed",
                 "vision_model.pre_layrnorm": "vision.ln_pre",
                 "vision_model.post_layernorm": "vision.ln_post",
                 "visual_projection": "image_projection",
                 "text_model.embeddings.token_embedding": "text.token_embed",
                 "text_model.embeddings.position_embedding.weight": "text.pos_embed",
                 "text_model.final_layer_norm": "text.transformer.norm",
                 "text_projection": "text_projection"}
        for theirs, own, layers in (("vision_model", "vision", 2), ("text_model", "text", 3)):
            for i in range(layers):
                head, ours = f"{theirs}.encoder.layers.{i}", f"{own}.transformer.blocks.{i}"
                names |= {f"{head}.self_attn": f"{ours}.attn", f"{head}.mlp": f"{ours}.mlp",
                          f"{head}.layer_norm1": f"{ours}.attn_norm",
                          f"{head}.layer_norm2": f"{ours}.mlp_norm"}
        weights = renamed(model, names)
        weights["vision.patch_embed.weight"] = weights["vision.patch_embed.weight"].flatten(1)
        outputs = {"image": out.image_embeds, "text": out.text_embeds, "loss": out.loss,
                   "logits": out.logits_per_image}
        return arrays(weights), arrays({"images": images, "ids": ids}), arrays(outputs)

    def ours(self, weights, inputs):
        model = load(CLIP(self.config), weights)
        image = model.encode_image(torch.as_tensor(inputs["images"]))
        text = model.encode_text(torch.as_tensor(inputs["ids"]))
        return {"image": image, "text": text, "loss": model.loss(image, text, model.scalars()),
                "logits": model.logit_scale.exp() * image @ text.T}


class BlockCase:
    """One block under a causal and a padding mask: x (B, T, D) -> (B, T, D)."""
    width, heads, hidden = 24, 4, 37

    def run(self, block, inputs, **arguments):
        x = torch.as_tensor(inputs["x"])
        return {"y": block(x, mask=causal(T) & padding(REAL), **arguments)}

    def additive(self):
        """Our mask in the reference's additive form. Every row sees at least itself or column 0."""
        mask = causal(T) & padding(REAL)
        return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)

    def draw(self):
        return torch.randn(B, T, self.width)


class Gpt2Case(BlockCase):
    name = "gpt2_block"

    def reference(self, seed):
        from transformers import GPT2Config
        from transformers.models.gpt2.modeling_gpt2 import GPT2Block
        layer = randomize(GPT2Block(GPT2Config(n_embd=24, n_head=4, n_inner=37,
                                               attn_implementation="eager"), layer_idx=0), seed)
        x = self.draw()
        y = layer(x, attention_mask=self.additive())
        parts = renamed(layer, {"ln_1": "attn_norm", "ln_2": "mlp_norm"}) | transposed(renamed(
            layer, {"attn.c_proj": "attn.out_proj", "mlp.c_fc": "mlp.fc1",
                    "mlp.c_proj": "mlp.fc2"}))
        fused = transposed(renamed(layer, {"attn.c_attn": ""}))
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", fused[f".{kind}"].chunk(3)):
                parts[f"attn.{name}_proj.{kind}"] = part
        return arrays(parts), arrays({"x": x}), arrays({"y": y[0] if isinstance(y, tuple) else y})

    def ours(self, weights, inputs):
        return self.run(load(gpt2_block(width=24, heads=4, hidden=37), weights), inputs)


class OptCase(BlockCase):
    name = "opt_block"

    def reference(self, seed):
        from transformers import OPTConfig
        from transformers.models.opt.modeling_opt import OPTDecoderLayer
        layer = randomize(OPTDecoderLayer(OPTConfig(
            hidden_size=24, num_attention_heads=4, ffn_dim=37, dropout=0.0,
            attn_implementation="eager"), layer_idx=0), seed)
        x = self.draw()
        y = layer(x, attention_mask=self.additive())
        weights = renamed(layer, {"self_attn_layer_norm": "attn_norm", "self_attn": "attn",
                                  "final_layer_norm": "mlp_norm", "fc1": "mlp.fc1",
                                  "fc2": "mlp.fc2"})
        return arrays(weights), arrays({"x": x}), arrays({"y": y[0] if isinstance(y, tuple) else y})

    def ours(self, weights, inputs):
        return self.run(load(opt_block(width=24, heads=4, hidden=37), weights), inputs)


class LlamaCase(BlockCase):
    name = "llama_block"

    def reference(self, seed):
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
        config = LlamaConfig(hidden_size=24, num_attention_heads=4, num_key_value_heads=2,
                             intermediate_size=37, rms_norm_eps=1e-5, attn_implementation="eager")
        layer = randomize(LlamaDecoderLayer(config, layer_idx=0), seed)
        x, positions = self.draw(), torch.arange(11, 11 + T)[None]
        turns = LlamaRotaryEmbedding(config)(x, positions)
        y = layer(x, attention_mask=self.additive(), position_embeddings=turns)
        weights = renamed(layer, {"self_attn.o_proj": "attn.out_proj", "self_attn": "attn",
                                  "mlp": "mlp", "input_layernorm": "attn_norm",
                                  "post_attention_layernorm": "mlp_norm"})
        return arrays(weights), arrays({"x": x}), arrays({"y": y[0] if isinstance(y, tuple) else y})

    def ours(self, weights, inputs):
        block = load(llama_block(width=24, heads=4, kv_heads=2, hidden=37), weights)
        return self.run(block, inputs, rope=rope_table(torch.arange(11, 11 + T), 6))


class BertCase(BlockCase):
    name = "bert_block"

    def reference(self, seed):
        from transformers import BertConfig
        from transformers.models.bert.modeling_bert import BertLayer
        layer = randomize(BertLayer(BertConfig(
            hidden_size=24, num_attention_heads=4, intermediate_size=37, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, is_decoder=True, add_cross_attention=True,
            attn_implementation="eager"), layer_idx=0), seed)
        x, context = self.draw(), torch.randn(B, S, 24)
        y = layer(x, attention_mask=self.additive(), encoder_hidden_states=context)
        names = {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
                 "output.LayerNorm": "mlp_norm"}
        for theirs, own in (("attention", "attn"), ("crossattention", "cross")):
            norm = "attn_norm" if own == "attn" else "cross_norm"
            names |= {f"{theirs}.self.query": f"{own}.q_proj",
                      f"{theirs}.self.key": f"{own}.k_proj",
                      f"{theirs}.self.value": f"{own}.v_proj",
                      f"{theirs}.output.dense": f"{own}.out_proj",
                      f"{theirs}.output.LayerNorm": norm}
        return (arrays(renamed(layer, names)), arrays({"x": x, "context": context}),
                arrays({"y": y[0] if isinstance(y, tuple) else y}))

    def ours(self, weights, inputs):
        block = load(bert_block(width=24, heads=4, hidden=37, context_width=24), weights)
        return self.run(block, inputs, context=torch.as_tensor(inputs["context"]))


class T5Case(BlockCase):
    """T5's block with its relative bias: encoder or decoder, plain or gated MLP."""

    def __init__(self, decoder, gated):
        self.decoder, self.gated = decoder, gated
        self.name = f"t5_{'decoder' if decoder else 'encoder'}_block{'_gated' if gated else ''}"

    def reference(self, seed):
        from transformers import T5Config
        from transformers.models.t5.modeling_t5 import T5Block
        layer = randomize(T5Block(T5Config(
            d_model=24, d_kv=5, num_heads=4, d_ff=37, is_decoder=self.decoder, dropout_rate=0.0,
            relative_attention_num_buckets=8, relative_attention_max_distance=6,
            feed_forward_proj="gated-gelu" if self.gated else "relu"),
            has_relative_attention_bias=True, layer_idx=0), seed)
        x, context = self.draw(), torch.randn(B, S, 24)
        y = layer(x, attention_mask=self.additive(),
                  encoder_hidden_states=context if self.decoder else None)
        mlp = f"layer.{2 if self.decoder else 1}"
        names = {"layer.0.layer_norm": "attn_norm", f"{mlp}.layer_norm": "mlp_norm",
                 "layer.0.SelfAttention.relative_attention_bias.weight": "bias.weight"}
        attentions = {"layer.0.SelfAttention": "attn"}
        if self.decoder:
            names["layer.1.layer_norm"] = "cross_norm"
            attentions["layer.1.EncDecAttention"] = "cross"
        for theirs, own in attentions.items():
            names |= {f"{theirs}.{a}": f"{own}.{b}_proj" for a, b in
                      (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))}
        dense = f"{mlp}.DenseReluDense"
        names |= ({f"{dense}.wi_0": "mlp.gate_proj", f"{dense}.wi_1": "mlp.up_proj",
                   f"{dense}.wo": "mlp.down_proj"} if self.gated else
                  {f"{dense}.wi": "mlp.fc1", f"{dense}.wo": "mlp.fc2"})
        return (arrays(renamed(layer, names)), arrays({"x": x, "context": context}),
                arrays({"y": y[0] if isinstance(y, tuple) else y}))

    def ours(self, weights, inputs):
        mlp = (GatedMLP(width=24, hidden=37, act=gelu_tanh) if self.gated
               else MLP(width=24, hidden=37, act=F.relu, bias=False))
        weights = dict(weights)
        bias = load(RelativeBias(heads=4, buckets=8, max_distance=6,
                                 bidirectional=not self.decoder),
                    {"weight": weights.pop("bias.weight")})
        block = load(t5_block(width=24, heads=4, head_width=5, mlp=mlp, decoder=self.decoder),
                     weights)
        context = torch.as_tensor(inputs["context"]) if self.decoder else None
        return self.run(block, inputs, context=context, bias=bias(T, T))


class T5ModelCase:
    """A whole T5 of version 1.1: the encoder's states, logits and texts, with padded prompts.

    Both of its activations: BLIP-2's released code sets dense_act_fn to the exact one.
    """
    name, acts = "t5", {"gelu": "gelu", "gelu_tanh": "gelu_new"}
    searches = {"greedy": {}, "beams": {"num_beams": 3}}
    stop = [2, 5, 19]                    # so many that some rows end early

    def reference(self, seed):
        from transformers import T5Config as Config, T5ForConditionalGeneration
        c = Config(vocab_size=31, d_model=28, d_kv=5, d_ff=37, num_layers=2, num_heads=4,
                   relative_attention_num_buckets=8, relative_attention_max_distance=7,
                   dropout_rate=0.0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                   eos_token_id=2, pad_token_id=1, decoder_start_token_id=1)   # it takes 0 for None
        prompts, ids = torch.randint(3, 31, (B, T)), torch.randint(3, 31, (B, S))
        ids[:, 0], outputs = 1, {}
        prompt = {"input_ids": prompts.where(REAL, 1), "attention_mask": REAL.long()}
        for act, c.dense_act_fn in self.acts.items():
            model = randomize(T5ForConditionalGeneration(c), seed)
            for name, parameter in model.named_parameters():          # so that texts differ
                parameter.data += "layer_norm" in name
            out = model(**prompt, decoder_input_ids=ids)
            outputs |= {f"{act} states": out.encoder_last_hidden_state[REAL],
                        f"{act} logits": out.logits}
            for name, options in self.searches.items():
                outputs[f"{act} {name}"] = model.generate(
                    **prompt, max_new_tokens=8, do_sample=False, eos_token_id=self.stop,
                    **options)[:, 1:]
        names = {"shared": "token_embed", "lm_head": "output"}
        for stack, mlp in (("encoder", 1), ("decoder", 2)):
            names[f"{stack}.final_layer_norm"] = f"{stack}.norm"
            names[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"] = f"{stack}_bias"
            for i in range(2):
                theirs, own = f"{stack}.block.{i}.layer", f"{stack}.blocks.{i}"
                names |= {f"{theirs}.0.layer_norm": f"{own}.attn_norm",
                          f"{theirs}.1.layer_norm": f"{own}.cross_norm",
                          f"{theirs}.{mlp}.layer_norm": f"{own}.mlp_norm"}
                names |= {f"{theirs}.{k}.{attn}.{a}": f"{own}.{name}.{b}_proj"
                          for k, attn, name in ((0, "SelfAttention", "attn"),
                                                (1, "EncDecAttention", "cross"))
                          for a, b in zip("qkvo", ("q", "k", "v", "out"))}
                names |= {f"{theirs}.{mlp}.DenseReluDense.{a}": f"{own}.mlp.{b}_proj"
                          for a, b in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))}
        return (arrays(renamed(model, names)), arrays({"prompts": prompts, "ids": ids}),
                arrays(outputs))

    def ours(self, weights, inputs):
        prompts, ids = (torch.as_tensor(inputs[name]) for name in ("prompts", "ids"))
        outputs = {}
        for act in self.acts:
            t5 = load(T5(T5Config(vocab_size=31, width=28, layers=2, heads=4, head_width=5,
                                  hidden=37, act=act, buckets=8, max_distance=7,
                                  pad_id=1)), weights)
            outputs |= {f"{act} states": t5.encode(prompts, REAL)[REAL],
                        f"{act} logits": t5(prompts, ids, REAL)}
            for name, options in self.searches.items():
                outputs[f"{act} {name}"] = t5.generate(prompts, REAL, max_new_tokens=8,
                                                       stop=self.stop, **options)
        return outputs


class LanguageCase:
    """A whole language model from its config.json: logits under padding left and right, and texts.

    The weights keep their names, so that the table of names is compared too.
    """
    searches = {"greedy": {}, "shorter": {"num_beams": 3, "length_penalty": 0.7},
                "beams": {"num_beams": 3}, "longer": {"num_beams": 3, "length_penalty": 1.3},
                "first": {"num_beams": 3, "early_stopping": True},
                "unlike": {"repetition_penalty": 1.3}}
    stop = [2, 5, 11, 13]                # so many that some rows end early

    def __init__(self, name, **config):
        self.name, self.config = name, config | {"vocab_size": 31, "eos_token_id": 2}

    def reference(self, seed):
        from transformers import AutoConfig, AutoModelForCausalLM
        config = AutoConfig.for_model(**self.config, attn_implementation="eager", pad_token_id=1,
                                      bos_token_id=3)
        model = randomize(AutoModelForCausalLM.from_config(config), seed)
        for name, parameter in model.named_parameters():              # so that texts differ
            if name.endswith(("ln_f.bias", "decoder.final_layer_norm.bias")):
                parameter.data *= 0.2
            if name.endswith(("wpe.weight", "embed_positions.weight")):
                parameter.data *= 4
        ids = torch.randint(3, 31, (B, T))
        outputs = {}
        for side, real in (("right", REAL), ("left", REAL.flip(1))):
            places = {} if config.model_type == "opt" else {
                "position_ids": (real.long().cumsum(dim=1) - 1).clamp(min=0)}
            logits = model(input_ids=ids, attention_mask=real.long(), **places).logits
            outputs[side] = logits[real]
        for name, options in self.searches.items():
            new = model.generate(
                input_ids=ids.where(REAL.flip(1), 1), attention_mask=REAL.flip(1).long(),
                max_new_tokens=8, do_sample=False, eos_token_id=self.stop, pad_token_id=1,
                **options)
            outputs[name] = new[:, T:]
        weights = {name: value for name, value in model.state_dict().items()
                   if name != "lm_head.weight" or not config.tie_word_embeddings}
        return arrays(weights), arrays({"ids": ids}), arrays(outputs)

    def ours(self, weights, inputs):
        fields = config_fields(self.config, "config.json")
        weights = {name: torch.as_tensor(value) for name, value in weights.items()}
        lm = load(LanguageModel(LanguageConfig(**fields)), translated(weights, fields, "weights"))
        ids = torch.as_tensor(inputs["ids"])
        outputs = {"right": lm(ids, REAL)[REAL],
                   "left": lm(ids, REAL.flip(1))[REAL.flip(1)]}
        for name, options in self.searches.items():
            outputs[name] = lm.generate(ids, REAL.flip(1), max_new_tokens=8, stop=self.stop,
                                        pad_id=1, **options)
        return outputs


class BlipCase:
    """A BLIP whose weights keep their names, so that the tables of names are compared too.

    Texts begin with the id that the paper puts there: transformers leaves that to its caller for
    [ENC], and its retrieval and question examples keep [CLS].
    """
    ids = {"pad_id": 0, "cls_id": 4, "eos_id": 5, "dec_id": 29, "enc_id": 30}
    searches = {"greedy": {}, "beams": {"num_beams": 3}, "unlike": {"repetition_penalty": 1.5}}

    def __init__(self, losses, kind, vision_width):
        self.name, self.losses, self.kind = f"blip_{losses.replace(',', '_')}", losses, kind
        self.config = {
            "model_type": "blip", "image_text_hidden_size": 17,
            "text_config": dict(hidden_size=28, intermediate_size=112, num_hidden_layers=2,
                                num_attention_heads=2, vocab_size=31, max_position_embeddings=19,
                                bos_token_id=29, sep_token_id=5, pad_token_id=0,
                                label_smoothing=0.1),
            "vision_config": dict(hidden_size=vision_width, intermediate_size=4 * vision_width,
                                  num_hidden_layers=3, num_attention_heads=4, image_size=15,
                                  patch_size=5, layer_norm_eps=0.1)}

    def reference(self, seed):
        import transformers
        model = randomize(getattr(transformers, self.kind)(
            transformers.BlipConfig(**self.config)), seed)
        for name, parameter in model.named_parameters():              # so that texts differ
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "LayerNorm.weight")):
                parameter.data += 1
            if name.endswith("bias"):
                parameter.data *= 0.2
            if name.endswith("_embeddings.weight"):
                parameter.data *= 3
        inputs = {"images": torch.randint(256, (B, 3, 15, 15), dtype=torch.uint8),
                  "ids": torch.randint(6, 29, (B, T)).where(REAL, 0),
                  "answers": torch.randint(6, 29, (B, 1 + T)).where(
                      F.pad(REAL.flip(0), (1, 0), value=True), 0)}
        with torch.no_grad():
            outputs = getattr(self, f"their_{self.losses[:3]}")(
                model, normalize_pixels(inputs["images"]), inputs["ids"], inputs["answers"])
        return arrays(model.state_dict()), arrays(inputs), arrays(outputs)

    def ours(self, weights, inputs):
        weights = {name: torch.as_tensor(value) for name, value in weights.items()}
        fields, weights = blip.hugging_face(weights, self.config, "config.json")
        model = make_model(BLIPConfig(**fields, **self.ids, losses=self.losses, sharing="none",
                                      momentum=0.0, queue_size=0))
        own = model.state_dict()
        absent = {name: own[name] for name in ("temp", "image_queue", "text_queue", "queue_next")
                  if name in own}        # retrieval's, of which the files have none
        inputs = {name: torch.as_tensor(value) for name, value in inputs.items()}
        with torch.no_grad():
            return getattr(self, f"our_{self.losses[:3]}")(load(model, absent | weights), **inputs)

    def first(self, ids, name):
        return torch.cat([torch.full_like(ids[:, :1], self.ids[name]), ids[:, 1:]], dim=1)

    def write(self, model, ids, **state):
        """Our texts by each search; ids int64 (B, T) of the prompt."""
        return {name: generate(model.logits, ids, max_new_tokens=8, stop=(self.ids["eos_id"],),
                               state=state, **options) for name, options in self.searches.items()}

    def their_lm(self, model, pixels, ids, answers):
        ids, prompt = self.first(ids, "dec_id"), ids[:1, :3].repeat(B, 1)
        out = model(pixel_values=pixels, input_ids=ids, attention_mask=REAL.long(),
                    labels=ids.masked_fill(~REAL, -100))
        new = {name: model.generate(pixel_values=pixels, input_ids=prompt.clone(), max_new_tokens=8,
                                    do_sample=False, **options)[:, 2:]      # its end is cut off
               for name, options in self.searches.items()}
        return {"logits": out.logits[REAL], "loss": out.loss} | new

    def our_lm(self, model, images, ids, answers):
        image, prompt = model.vision(normalize_pixels(images)), ids[:1, :2].repeat(B, 1)
        logits = model.logits(starts_with(ids, model.config.dec_id), mask=REAL, context=image)
        loss = model.lm(image, ids, ids.masked_fill(~REAL, -100))
        return {"logits": logits[REAL], "loss": loss} | self.write(
            model, self.first(prompt, "dec_id"), context=image)

    def their_vqa(self, model, pixels, ids, answers):
        """Row by row without padding: in 5.23 the mask never arrives in cross-attention."""
        loss, new = 0, {name: torch.zeros(B, 8, dtype=torch.int64) for name in self.searches}
        for b in range(B):
            question = {"pixel_values": pixels[b:b + 1],
                        "input_ids": self.first(ids[b:b + 1, :REAL[b].sum()], "enc_id")}
            answer = answers[b:b + 1, :(answers[b] != 0).sum()]
            mean = model(**question, labels=answer, decoder_input_ids=self.first(answer, "dec_id"))
            loss = loss + mean.loss * (answer.shape[1] - 1)
            for name, options in self.searches.items():
                text = model.generate(**question, max_new_tokens=8, do_sample=False, **options)
                new[name][b, :text.shape[1] - 1] = text[0, 1:]
        return {"loss": loss / (answers[:, 1:] != 0).sum()} | new

    def our_vqa(self, model, images, ids, answers):
        loss = model({"images": images, "ids": ids, "answer_ids": answers, "weights": torch.ones(B),
                      "question_index": torch.arange(B)})["vqa"] * B / (answers[:, 1:] != 0).sum()
        states, mask = model.encode_question(normalize_pixels(images), ids)
        new = self.write(model, torch.full((B, 1), self.ids["dec_id"]), context=states,
                         context_mask=mask)
        return {"loss": loss} | {name: F.pad(text, (0, 8 - text.shape[1]))
                                     for name, text in new.items()}

    def their_itc(self, model, pixels, ids, answers):
        inputs = {"pixel_values": pixels, "attention_mask": REAL.long()}
        return {"cosines": model(input_ids=self.first(ids, "cls_id"), use_itm_head=False,
                                 **inputs).itm_score,
                "logits": model(input_ids=self.first(ids, "enc_id"), **inputs).itm_score}

    def our_itc(self, model, images, ids, answers):
        pixels = normalize_pixels(images)
        return {"cosines": model.encode_image(pixels) @ model.encode_text(ids).T,
                "logits": model.match(model.vision(pixels), ids)}


class Blip2Case:
    """A BLIP-2 or InstructBLIP whose weights keep their names, as BlipCase.

    `lm`: the language model's config.json; None: the model for retrieval.
    """
    Q, image_id, searches = 7, 30, {"greedy": {}, "beams": {"num_beams": 3}}
    stop = [2, 5, 11]                    # so many that some rows end early

    def __init__(self, name, kind, model_type, lm=None, **qformer):
        self.name, self.kind, self.lm = name, kind, lm
        self.is_t5, self.instructs = lm and lm["model_type"] == "t5", model_type == "instructblip"
        self.config = {
            "model_type": model_type, "num_query_tokens": self.Q, "image_text_hidden_size": 17,
            "image_token_index": self.image_id if lm else None,
            "vision_config": dict(hidden_size=20, intermediate_size=37, num_hidden_layers=2,
                                  num_attention_heads=5, image_size=15, patch_size=5,
                                  layer_norm_eps=0.1),
            "qformer_config": dict(hidden_size=12, intermediate_size=48, num_hidden_layers=3,
                                   num_attention_heads=3, max_position_embeddings=11,
                                   vocab_size=29, **qformer)}
        if lm:
            self.config["text_config"] = lm | {"vocab_size": 31, "pad_token_id": 1,
                                               "eos_token_id": 2, "bos_token_id": 3,
                                               "decoder_start_token_id": 1}

    def model(self, seed):
        """Transformers' model with random weights."""
        import transformers
        kind = transformers.InstructBlipConfig if self.instructs else transformers.Blip2Config
        model = getattr(transformers, self.kind)(kind(**self.config))
        if self.is_t5:                   # transformers ties what FLAN-T5 does not
            head = model.language_model.lm_head
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
        randomize(model, seed)
        for name, parameter in model.named_parameters():              # so that texts differ
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.data += 1
            if name.endswith("bias"):
                parameter.data *= 0.2
            if name.startswith(("language_projection", "language_model.lm_head")):
                parameter.data *= 3
        return model

    def reference(self, seed):
        model = self.model(seed)
        inputs = {"images": torch.randint(256, (B, 3, 15, 15), dtype=torch.uint8),
                  "ids": torch.randint(6, 29, (B, T)).where(REAL, 1),
                  "answers": torch.randint(6, 29, (B, T)).where(REAL.flip(0), 1),
                  "question": torch.randint(6, 29, (B, T)).where(REAL.roll(1, 0), 0)}
        inputs["question"][:, 0] = 4     # [CLS]
        return arrays(model.state_dict()), arrays(inputs), arrays(self.theirs(model, inputs))

    def theirs(self, model, inputs):
        """The outputs of transformers' model."""
        with torch.no_grad():
            return (self.their_texts if self.lm else self.their_scores)(
                model, normalize_pixels(inputs["images"]), **inputs)

    def ours(self, weights, inputs):
        weights = {name: torch.as_tensor(value) for name, value in weights.items()}
        fields, weights = blip2_weights.hugging_face(weights, self.config, "config.json")
        if self.lm:
            fields["language"] |= {"pad_id": 1, "eos_id": 2}
        model = blip2.make_model(blip2.BLIP2Config(**fields, pad_id=0, cls_id=4))
        return self.outputs(load(model, weights), inputs)

    def outputs(self, model, inputs):
        """The outputs of our model."""
        with torch.no_grad():
            return (self.our_texts if self.lm else self.our_scores)(
                model, **{name: torch.as_tensor(value) for name, value in inputs.items()})

    def their_scores(self, model, pixels, question, **_):
        inputs = {"pixel_values": pixels, "input_ids": question,
                  "attention_mask": (question != 0).long()}
        return {"cosines": model(**inputs).logits_per_image,
                "logits": model(**inputs, use_image_text_matching_head=True).logits_per_image}

    def our_scores(self, model, images, question, **_):
        pixels, ids = normalize_pixels(images), F.pad(question[:, 1:], (1, 0), value=3)
        return {"cosines": best_cosine(model.encode_image(pixels), model.encode_text(ids)),
                "logits": model.match(model.vision(pixels), ids)}

    def prompts(self, ids, side="right"):
        """Q places for the image, then the text: ids and mask (B, Q + T), padded on a side."""
        ids = F.pad(ids, (self.Q, 0), value=self.image_id)
        mask = F.pad(REAL, (self.Q, 0), value=True)
        if side == "left":
            shifts = [int(n) for n in (~mask).sum(dim=1)]
            ids, mask = (torch.stack([row.roll(n) for row, n in zip(x, shifts)])
                         for x in (ids, mask))
        return ids, mask

    def their_texts(self, model, pixels, ids, answers, question, **_):
        (right, mask), (left, left_mask) = self.prompts(ids), self.prompts(ids, "left")
        inputs = {"pixel_values": pixels} | ({
            "qformer_input_ids": question, "qformer_attention_mask": (question != 0).long()}
            if self.instructs else {})
        labels = (answers.where(REAL.flip(0), -100) if self.is_t5 else
                  right.where(mask & (right != self.image_id), -100))
        out = model(**inputs, input_ids=right, attention_mask=mask.long(), labels=labels)
        found = {"logits": out.logits[REAL.flip(0) if self.is_t5 else mask], "loss": out.loss}
        prompt, attended = (right, mask) if self.is_t5 else (left, left_mask)
        for name, options in self.searches.items():
            new = model.generate(**inputs, input_ids=prompt, attention_mask=attended.long(),
                                 max_new_tokens=8, do_sample=False, eos_token_id=self.stop,
                                 pad_token_id=1, **options)
            found[name] = new[:, 1 if self.is_t5 else self.Q + T:]
        return found

    def our_texts(self, model, images, ids, answers, question):
        question = F.pad(question[:, 1:], (1, 0), value=3) if self.instructs else None
        visual = model.visual_prompt(normalize_pixels(images), question)

        def embed(side):
            rows, mask = self.prompts(ids, side)
            return model.embed(rows.masked_fill(rows == self.image_id, blip2.VISUAL), visual), mask
        rows, mask = self.prompts(ids)
        x = embed("right")[0]
        batch = {"images": images, "ids": rows.masked_fill(rows == self.image_id, blip2.VISUAL),
                 "labels": rows.where(mask & (rows != self.image_id), -100)}
        if question is not None:
            batch["question_ids"] = question
        if self.is_t5:
            written = F.pad(answers, (1, 0), value=1)
            real = F.pad(REAL.flip(0), (1, 0))
            batch |= {"mask": mask, "answer_ids": written, "labels": written.where(real, -100)}
            state = {"context": model.lm.encode(x, mask), "context_mask": mask}
            found = {"logits": model.logits(written, **state)[:, :-1][REAL.flip(0)]}
            prompt, prompt_mask = torch.full((B, 1), 1), None
        else:
            found, state = {"logits": model.logits(x, mask)[mask]}, {}
            prompt, prompt_mask = embed("left")
        found["loss"] = model(batch)["lm"]
        return found | {name: generate(model.logits, prompt, prompt_mask, max_new_tokens=8,
                                       stop=self.stop, pad_id=1, state=state, **options)
                        for name, options in self.searches.items()}


class LlavaCase:
    """A LLaVA, or with tiles a LLaVA-NeXT, whose weights keep their names, as BlipCase.

    Three texts hold an image, two images and none; sizes: (W, H) of the pictures.
    """
    image_id, lengths, stop = 30, (9, 7, 5), [2, 5, 11]
    # [height, width]: not in an order that swapping both would keep.
    pinpoints = [[15, 30], [30, 15], [30, 30], [45, 15], [15, 45], [45, 30]]

    def __init__(self, name, kind, sizes, **text):
        self.name, self.kind, self.sizes = name, kind, sizes
        self.tiles = kind == "LlavaNext"
        self.config = {
            "model_type": "llava_next" if self.tiles else "llava", "image_token_index": 30,
            "vision_config": dict(model_type="clip_vision_model", hidden_size=15, patch_size=5,
                                  intermediate_size=60, num_hidden_layers=3, image_size=15,
                                  num_attention_heads=3),
            "text_config": VICUNA | {"vocab_size": 31, "max_position_embeddings": 199,
                                     "num_key_value_heads": 2, "pad_token_id": 1,
                                     "eos_token_id": 2, "bos_token_id": 3} | text}
        if self.tiles:
            self.config["image_grid_pinpoints"] = self.pinpoints

    def model(self, seed):
        """Transformers' model with random weights."""
        import transformers
        model = getattr(transformers, f"{self.kind}ForConditionalGeneration")(
            getattr(transformers, f"{self.kind}Config")(**self.config))
        randomize(model, seed)
        for name, parameter in model.named_parameters():              # so that texts differ
            if "norm" in name and name.endswith("weight"):
                parameter.data += 1
            if name.startswith(("model.multi_modal_projector", "lm_head")):
                parameter.data *= 3
        return model

    def reference(self, seed):
        model = self.model(seed)
        inputs = {f"picture{i}": torch.randint(256, (H, W, 3), dtype=torch.uint8)
                  for i, (W, H) in enumerate(self.sizes)}
        inputs["ids"] = torch.randint(6, 29, (B, max(self.lengths)))
        for row, place in ((0, 2), (1, 0), (1, 4)):
            inputs["ids"][row, place] = self.image_id
        return arrays(model.state_dict()), arrays(inputs), arrays(self.theirs(model, inputs))

    def ours(self, weights, inputs):
        weights = {name: torch.as_tensor(value) for name, value in weights.items()}
        fields = llava_weights.config_fields(self.config, "config.json")
        weights = llava_weights.translated(weights, fields, "weights")
        return self.outputs(load(llava.LLaVA(llava.LLaVAConfig(**fields)), weights), inputs)

    def rows(self, ids):
        """The texts without padding, each with its labels: those of even ids count."""
        rows = [row[:length].tolist() for row, length in zip(ids, self.lengths)]
        return [(row, [i if i % 2 == 0 and i != self.image_id else -100 for i in row])
                for row in rows]

    def their_images(self, pictures):
        """Pictures uint8 (H, W, 3) -> the keyword arguments that describe them."""
        pictures = [picture.permute(2, 0, 1) for picture in pictures]
        if not self.tiles:
            return {"pixel_values": normalize_pixels(torch.stack(pictures))}
        from transformers.models.llava_next.image_processing_pil_llava_next import (
            LlavaNextImageProcessorPil)
        views = [np.stack(LlavaNextImageProcessorPil().get_image_patches(
            picture.numpy(), self.pinpoints, size=(15, 15), patch_size=15,
            resample=Image.Resampling.BICUBIC)) for picture in pictures]
        most = max(map(len, views))
        pixels = [F.pad(normalize_pixels(torch.from_numpy(view)), (0,) * 7 + (most - len(view),))
                  for view in views]
        return {"pixel_values": torch.stack(pixels),
                "image_sizes": torch.tensor([picture.shape[1:] for picture in pictures])}

    @torch.no_grad()
    def theirs(self, model, inputs):
        """The outputs of transformers' model, to whom the caller repeats the image's token."""
        images, found = self.their_images([*inputs.values()][:-1]), {}
        counts = map(len, model.get_image_features(**images).pooler_output)
        rows = [[torch.tensor([pair for pair in zip(*row) for _ in range(
            next(counts) if pair[0] == self.image_id else 1)])] for row in self.rows(inputs["ids"])]
        for side in ("right", "left"):
            ids, labels = torch.nn.utils.rnn.pad_sequence(
                [row for row, in rows], batch_first=True, padding_value=-1,
                padding_side=side).unbind(-1)
            mask = ids >= 0
            ids, labels = ids.where(mask, 1), labels.where(mask, -100)
            out = model(**images, input_ids=ids, labels=labels, attention_mask=mask.long(),
                        position_ids=(mask.long().cumsum(dim=1) - 1).clamp(min=0))
            found[side] = out.logits[mask]
            if side == "right":
                found["loss"] = out.loss
        new = model.generate(**images, input_ids=ids, attention_mask=mask.long(), do_sample=False,
                             max_new_tokens=8, eos_token_id=self.stop, pad_token_id=1)
        return found | {"greedy": new[:, ids.shape[1]:]}

    @torch.no_grad()
    def outputs(self, model, inputs):
        """The outputs of our model."""
        c, views, orders, found = model.config, [], [], {}
        for picture in [*inputs.values()][:-1]:
            new, order = llava.make_views(Image.fromarray(np.asarray(picture)), c)
            first = 1 + len(views) * c.tokens_per_view
            orders.append([first + k if k >= 0 else 0 for k in order])
            views += new
        images = llava.to_tensor(views)
        features = model.encode_images(images)
        for side in ("right", "left"):
            batch = llava.merge_image_tokens(
                self.rows(torch.as_tensor(inputs["ids"])), [orders[:1], orders[1:], []],
                self.image_id, side=side)
            x = model.embed(batch["ids"], batch["feature_index"], features)
            found[side] = model.logits(x, batch["mask"])[batch["mask"]]
            if side == "right":
                batch |= {"images": images, "places": llava.answer_places(batch["labels"])}
                found["loss"] = model(batch)["lm"]
        return found | {"greedy": generate(model.logits, x, batch["mask"], max_new_tokens=8,
                                           stop=self.stop, pad_id=1)}


OPT = dict(model_type="opt", hidden_size=24, ffn_dim=37, num_hidden_layers=2,
           num_attention_heads=4, max_position_embeddings=23, word_embed_proj_dim=24)
FLAN_T5 = dict(model_type="t5", d_model=16, d_kv=5, d_ff=37, num_layers=2, num_heads=4,
               feed_forward_proj="gated-gelu", tie_word_embeddings=False,
               relative_attention_num_buckets=8, relative_attention_max_distance=9)
VICUNA = dict(model_type="llama", hidden_size=24, intermediate_size=37, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=23)
CASES = [BlipCase("lm", "BlipForConditionalGeneration", 24),
         BlipCase("vqa", "BlipForQuestionAnswering", 28),          # theirs: both widths must agree
         BlipCase("itc,itm", "BlipForImageTextRetrieval", 24),
         Blip2Case("blip2_opt", "Blip2ForConditionalGeneration", "blip-2", OPT),
         Blip2Case("blip2_t5", "Blip2ForConditionalGeneration", "blip-2",
                   FLAN_T5 | {"dense_act_fn": "gelu"}),
         Blip2Case("blip2_retrieval", "Blip2ForImageTextRetrieval", "blip-2",
                   use_qformer_text_input=True),
         Blip2Case("instructblip_t5", "InstructBlipForConditionalGeneration", "instructblip",
                   FLAN_T5),
         Blip2Case("instructblip_llama", "InstructBlipForConditionalGeneration", "instructblip",
                   VICUNA), LlavaCase("llava", "Llava", [(15, 15)] * 3),
         LlavaCase("llava_next", "LlavaNext", [(14, 14), (40, 13), (11, 29)]),
         ClipCase(), Gpt2Case(), OptCase(), LlamaCase(), BertCase(), T5Case(decoder=True, gated=False),
         T5Case(decoder=True, gated=True), T5Case(decoder=False, gated=False),
         T5ModelCase(),
         LanguageCase("gpt2", model_type="gpt2", n_embd=24, n_layer=2, n_head=4, n_positions=19,
                      layer_norm_epsilon=1e-3),
         LanguageCase("opt", model_type="opt", hidden_size=24, ffn_dim=37, num_hidden_layers=2,
                      num_attention_heads=4, max_position_embeddings=19, word_embed_proj_dim=24),
         LanguageCase("llama", model_type="llama", hidden_size=24, intermediate_size=37,
                      num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                      max_position_embeddings=19, rms_norm_eps=1e-3,
                      rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
         LanguageCase("llama_tied", model_type="llama", hidden_size=24, intermediate_size=37,
                      num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=19,
                      tie_word_embeddings=True,
                      rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0})]


def compare(ours, theirs, atol=1e-4):
    """Assert that two dicts of outputs agree within atol, name by name."""
    assert set(ours) == set(theirs)
    for name, want in theirs.items():
        got = ours[name].detach().numpy()
        assert got.shape == want.shape, f"{name}: {got.shape}, the reference's {want.shape}"
        worst = np.abs(got - want).max()
        assert worst < atol, f"{name}: off by up to {worst:.2e}"
