"""BLIP-2's and InstructBLIP's published weights: names, sizes, vocabularies, what is refused."""
import json
import re
from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch

import blip2
from blip2 import TRAINS, BLIP2Config, EVAConfig, make_model
from clip import PRESETS as CLIPS
from common.language import PRESETS as LANGUAGES
from common.pretrained import blip2 as pretrained
from common.pretrained.bpe import OPT
from common.t5 import PRESETS as T5S
from tests.fuzz import damages, one_line
from tests.helpers import assert_close, page, randomize
from tests.parity import blip2_layout
from tests.pretrained.writers import (byte_vocabulary, check_weights, sentencepieces, write_run,
                                      write_safetensors, write_vocabulary)

PIECES = ["[UNK]", "[PAD]", "a", "[CLS]", "[SEP]", *"bcdefghijklmnopqrstuvwxyz"]
ROWS = 307                               # of the language models, more than any vocabulary has
TEXT = {
    "opt": {"model_type": "opt", "hidden_size": 24, "ffn_dim": 37, "num_hidden_layers": 2,
            "num_attention_heads": 3, "max_position_embeddings": 19, "vocab_size": ROWS},
    "t5": {"model_type": "t5", "d_model": 16, "d_kv": 5, "d_ff": 37, "num_layers": 2,
           "num_heads": 4, "vocab_size": ROWS, "feed_forward_proj": "gated-gelu",
           "dense_act_fn": "gelu", "tie_word_embeddings": False},
    "llama": {"model_type": "llama", "hidden_size": 24, "intermediate_size": 37,
              "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": ROWS}}
LM = dict(vocab_size=ROWS, width=24, layers=2, hidden=37)
LANGUAGE = {                             # 198: a line break, which ends the texts of OPT
    "opt": LM | dict(kind="opt", context_length=19, heads=3, kv_heads=3, eos_id=198, pad_id=257),
    "t5": LM | dict(kind="t5", width=16, heads=4, head_width=5, act="gelu", context_length=512,
                    eos_id=1, pad_id=0),
    "llama": LM | dict(kind="llama", context_length=2048, heads=2, kv_heads=2, eps=1e-6,
                       tie_embeddings=False, eos_id=2, pad_id=0)}
VISION = dict(image_size=15, patch_size=5, vision_width=20, vision_layers=2, vision_heads=5,
              vision_hidden=37, vision_eps=0.1, norm_eps=0.1)
FIELDS = dict(num_queries=7, qformer_width=12, qformer_layers=3, qformer_heads=3)
WORDS = dict(qformer_context_length=11, pad_id=1, cls_id=3, eos_id=4, dec_id=30, vocab_size=31)
WIDE = dict(FIELDS, qformer_width=128, qformer_heads=2, embed_dim=17, losses="itc,itm,itg", **WORDS,
            vision=dict(VISION, vision_width=176, vision_heads=2, vision_eps=1e-6, norm_eps=1e-5))
PART = {
    "vision": {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 5,
               "intermediate_size": 37, "image_size": 15, "patch_size": 5, "layer_norm_eps": 0.1},
    "qformer": {"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 3,
                "max_position_embeddings": 11, "vocab_size": 99}}
KINDS = {"opt": ("lm", "opt"), "t5": ("lm", "t5"), "retrieval": ("itc,itm", None),
         "instruct-t5": ("instruct", "t5"), "instruct-llama": ("instruct", "llama")}


def part(name, **changes):
    """Changes of a config.json within one of its parts."""
    return {f"{name}_config": (PART | TEXT)[name] | changes}


def config_of(kind):
    """What a folder of a kind holds: the fields of our config."""
    losses, lm = KINDS[kind]
    fields = FIELDS | dict(vision=VISION, losses=losses, qformer_text=losses != "lm",
                           qformer_context_length=11, prompt=pretrained.PROMPTS.get(losses, ""))
    fields |= {} if losses == "lm" else WORDS
    fields |= {"embed_dim": 17} if not lm else {
        "language": LANGUAGE[lm],
        "question_prompt": f"Question: {{}} {'Short answer:' if lm == 't5' else 'Answer:'}"}
    return BLIP2Config(**fields)


def hugging_face(folder, kind, change=None, **changes):
    """Write a folder of random weights -> the weights under our names."""
    losses, lm = KINDS[kind]
    config = {"model_type": "instructblip" if losses == "instruct" else "blip-2",
              "num_query_tokens": 7, "image_text_hidden_size": 17, **part("vision"),
              **part("qformer")} | ({"text_config": TEXT[lm]} if lm else {}) | changes
    (folder / "config.json").write_text(json.dumps(config))
    write_vocabulary(folder, byte_vocabulary(OPT, []), [])
    (folder / "tokenizer.model").write_bytes(sentencepieces())
    (folder / "spiece.model").write_bytes(sentencepieces(pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
    words = folder / "qformer_tokenizer" if losses == "instruct" else folder
    words.mkdir(exist_ok=True)
    (words / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    ours = randomize(make_model(config_of(kind))).state_dict()
    theirs = blip2_layout.hugging_face(ours, 5, lm, losses == "instruct")
    if change:
        change(theirs)
    write_safetensors(folder / "model.safetensors", theirs)
    return ours


def lavis(folder, change=None):
    """Write a .pth file, changed by change(weights) -> (its path, the weights under our names)."""
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    ours = randomize(make_model(BLIP2Config(**WIDE))).state_dict()
    for name in ours:
        if name.startswith("vision.vit.") and name.endswith("k_proj.bias"):
            ours[name].zero_()
    theirs = blip2_layout.lavis(ours, 5)
    if change:
        change(theirs)
    torch.save({"model": theirs, "epoch": 9}, folder / "model.pth")
    return folder / "model.pth", ours


class TestRead:
    @pytest.mark.parametrize("kind, words", [("retrieval", "."),
                                             ("instruct-llama", "qformer_tokenizer")])
    def test_a_vocabulary_larger_than_the_table_is_told(self, tmp_path, kind, words):
        hugging_face(tmp_path, kind)
        (tmp_path / words / "vocab.txt").write_text("\n".join([*PIECES, "zz"]))
        with one_line("32 pieces, .* 31"):
            pretrained.read(tmp_path)

    @pytest.mark.parametrize("kind", ["retrieval", "t5", "instruct-llama"])
    def test_damaged_configs_are_a_model_or_one_line(self, tmp_path, kind):
        hugging_face(tmp_path, kind)
        for _ in damages(tmp_path / "config.json", 100):
            with one_line(maybe=True):
                BLIP2Config(**pretrained.read(tmp_path)[0])

    def test_other_pictures_than_ours_are_refused(self, tmp_path):
        hugging_face(tmp_path, "opt")
        (tmp_path / "preprocessor_config.json").write_text('{"image_std": [0.5, 0.5, 0.5]}')
        with one_line(re.escape("image_std is [0.5, 0.5, 0.5]")):
            pretrained.read(tmp_path)


class TestCheckTied:
    @pytest.mark.parametrize("kind, name, twin", [
        ("opt", "language_model.lm_head.weight", "model.decoder.embed_tokens.weight"),
        ("t5", "language_model.decoder.embed_tokens.weight", "language_model.shared.weight"),
        ("instruct-t5", "language_model.encoder.embed_tokens.weight", "shared.weight"),
        (None, "Qformer.cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
        (None, "Qformer.cls.predictions.decoder.bias", "Qformer.cls.predictions.bias")])
    def test_what_training_ties_must_be_equal(self, tmp_path, kind, name, twin):
        def change(theirs):
            theirs[name] = theirs[name] + 1
        path = tmp_path if kind else lavis(tmp_path, change)[0]
        if kind:
            hugging_face(tmp_path, kind, change)
        with one_line(f"^{path}: {name} and .*{twin} differ"):
            pretrained.read(path)


class TestHuggingFace:
    @pytest.mark.parametrize("kind, change, message", [
        ("opt", {"model_type": "blip"}, "model_type is 'blip'"),
        ("opt", {"num_query_tokens": 8}, r"query_tokens is \(7, 12\), the model's \(8, 12\)"),
        ("opt", {"text_config": {"model_type": "mamba"}}, "text_config .*'mamba'"),
        ("opt", {"text_config": [1]}, r"text_config is \[1\]"),
        ("opt", part("vision", hidden_act="quick_gelu"),
         "vision_config: hidden_act is 'quick_gelu'"),
        ("opt", part("vision", qkv_bias=False), "vision_config: qkv_bias is False"),
        ("opt", part("vision", layer_norm_eps=0), "layer_norm_eps is 0, not"),
        ("opt", part("vision", num_hidden_layers=1), "unexpected vision_model.encoder.layers.1"),
        ("opt", part("vision", image_size=[15, 15]), r"vision_config: image_size is \[15, 15\]"),
        ("opt", part("qformer", layer_norm_eps=1e-6), "qformer_config: layer_norm_eps is 1e-06"),
        ("opt", part("qformer", cross_attention_frequency=3), r"unexpected .*\.2\.cross"),
        ("opt", part("qformer", num_attention_heads=5), "width 12 does not divide into 5"),
        ("retrieval", {"image_text_hidden_size": 19}, r"\(17, 12\), the model's \(19, 12\)"),
        ("t5", {"text_config": TEXT["t5"] | {"d_kv": 6}}, r"\(20, 16\), the model's \(24, 16\)"),
        ("t5", {"text_config": TEXT["t5"] | {"dense_act_fn": "relu"}}, "dense_act_fn is 'relu'")],
        ids=str)
    def test_a_config_at_odds_with_the_weights_is_one_line(self, tmp_path, kind, change, message):
        hugging_face(tmp_path, kind, **change)
        with one_line(message):
            blip2.from_pretrained(tmp_path)


SIZES = dict(qformer_width=768, qformer_layers=12, qformer_heads=12, qformer_context_length=512,
             num_queries=32)
LMS = LANGUAGES | T5S


class TestPublishedSizes:
    """On device meta, against the papers' counts of trained parameters (BLIP-2, Table 2)."""

    def model(self, losses, name=None, vision=None, **more):
        lm = LMS[name] if name else None
        if lm and lm.kind == "t5":
            lm = replace(lm, act="gelu")
        with torch.device("meta"):
            return make_model(BLIP2Config(**SIZES, vision=vision or EVAConfig(norm_eps=1e-6),
                                          embed_dim=128 if name else 256, language=lm,
                                          losses=losses, **more))

    @pytest.mark.parametrize("vision, name, count", [
        ("ViT-L/14", "opt-2.7b", 103_591_936), (None, "opt-2.7b", 107_130_880),
        (None, "flan-t5-xl", 106_737_152), (None, "opt-6.7b", 108_312_064),
        (None, "flan-t5-xxl", 108_312_064)])
    def test_second_stage(self, vision, name, count):
        """The paper's 104, 107, 107, 108 and 108 million, without the norm of the image encoder."""
        model = self.model("lm", name, vision and CLIPS[vision], qformer_text=False)
        trained = {key: p.numel() for key, p in model.named_parameters()
                   if any(fnmatchcase(key, pattern) for pattern in TRAINS["blip2-stage2"])}
        assert {key.split(".")[0] for key in trained} == {"vision", "qformer", "projection"}
        width = model.config.vision.vision_width
        assert sum(trained.values()) == count + 2 * width

    @pytest.mark.parametrize("losses, name, count", [
        ("itc,itm,itg", None, 186_705_470), ("instruct", "flan-t5-xl", 187_262_464),
        ("instruct", "llama-7b", 188_837_376)])
    def test_first_stage_and_instructions(self, losses, name, count):
        """The papers' 188 million."""
        model = self.model(losses, name, vocab_size=30523)
        assert sum(p.numel() for key, p in model.named_parameters()
                   if not key.startswith(("vision.vit.", "lm."))) == count

    @pytest.mark.parametrize("losses, name", [
        ("lm", "opt-2.7b"), ("lm", "flan-t5-xl"), ("itc,itm", None), ("instruct", "flan-t5-xl"),
        ("instruct", "llama-7b")])
    def test_sizes_left_out_are_the_papers(self, losses, name):
        model = self.model(losses, name, vocab_size=1024 if losses == "lm" else 30523,
                           qformer_text=losses != "lm", prompt=pretrained.PROMPTS.get(losses, ""))
        kind, own = name and LMS[name].kind, model.state_dict()
        question = f"Question: {{}} {'Short answer:' if kind == 't5' else 'Answer:'}"
        text = {"model_type": kind} | {
            "opt": {"hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32,
                    "num_attention_heads": 32},
            "t5": TEXT["t5"] | {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24,
                                "num_heads": 32, "vocab_size": 32128}}.get(kind, {})
        fields, weights = pretrained.hugging_face(
            blip2_layout.hugging_face(own, 14, kind, losses == "instruct"),
            {"model_type": "instructblip" if losses == "instruct" else "blip-2",
             "text_config": text}, "here")
        if name:
            fields["language"] |= {"eos_id": LMS[name].eos_id, "pad_id": LMS[name].pad_id}
            assert fields.pop("question_prompt") == question
        assert BLIP2Config(**fields) == model.config
        assert {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in own.items()}


class TestWithImageEncoder:
    def split(self, theirs, folder):
        """Move the image encoder to its own file, where it has one block more and a head."""
        head = "visual_encoder."
        eva = {name.removeprefix(head): theirs.pop(name) for name in [*theirs] if head in name}
        eva |= {name.replace("blocks.1.", "blocks.2."): weight + 1 for name, weight in eva.items()
                if name.startswith("blocks.1.")}
        torch.save(eva | {"head.weight": torch.ones(3), "fc_norm.bias": torch.ones(3)},
                   folder / "eva_vit_g.pth")

    def test_a_file_of_its_own_without_its_last_block(self, tmp_path):
        path, ours = lavis(tmp_path, lambda theirs: self.split(theirs, tmp_path))
        check_weights(blip2.from_pretrained(path)[0], ours)

    def test_its_absence_is_told(self, tmp_path):
        path, _ = lavis(tmp_path, lambda theirs: self.split(theirs, tmp_path))
        (tmp_path / "eva_vit_g.pth").unlink()
        with one_line(f"^{tmp_path}/eva_vit_g.pth: no such file"):
            blip2.from_pretrained(path)


class TestLavis:
    def test_names_that_the_published_files_have(self):
        """From the specification of the layout, not from our own writer of it."""
        names = {"visual_encoder.blocks.1.attn.qkv.weight": (528, 176),
                 "visual_encoder.blocks.0.attn.v_bias": (176,), "ln_vision.weight": (176,),
                 "query_tokens": (1, 7, 128), "Qformer.bert.embeddings.LayerNorm.bias": (128,),
                 "Qformer.bert.encoder.layer.2.crossattention.self.key.weight": (128, 176),
                 "Qformer.bert.encoder.layer.1.output_query.LayerNorm.weight": (128,),
                 "Qformer.bert.encoder.layer.0.intermediate.dense.weight": (512, 128),
                 "Qformer.cls.predictions.transform.dense.weight": (128, 128), "temp": ()}
        own = randomize(make_model(BLIP2Config(**WIDE))).state_dict()
        theirs = blip2_layout.lavis(own, 5)
        assert {name: tuple(theirs[name].shape) for name in names} == names
        fields, ours = pretrained.lavis(theirs, "here")
        assert BLIP2Config(**fields | {key: WORDS[key] for key in WORDS if "id" in key}) \
            == BLIP2Config(**WIDE)
        for head, names in (("q_proj", "q_bias"), ("v_proj", "v_bias"), ("k_proj", None)):
            expected = (theirs[f"visual_encoder.blocks.1.attn.{names}"] if names else
                        torch.zeros(176))
            assert_close(head, ours[f"vision.vit.transformer.blocks.1.attn.{head}.bias"], expected)

    @pytest.mark.parametrize("name, shape, message", [
        ("itm_head", None, "not LAVIS's weights of BLIP-2's first stage"),
        ("query_tokens", None, "no matrix qformer.query_tokens"),
        ("vision_proj.weight", None, "no matrix image_projection.weight"),
        ("visual_encoder.patch_embed.proj.weight", (176, 3, 25, 1), r"\(176, 3, 25, 1\), which"),
        ("visual_encoder.pos_embed", (1, 11, 176), r"\(11, 176\), the model's \(10, 176\)"),
        ("visual_encoder.blocks", None, "no matrix vision.vit.transformer.blocks.0.mlp.fc1"),
        ("visual_encoder.patch_embed.proj.weight", (175, 3, 5, 5), "heads are 88 wide"),
        ("opt_proj.weight", (1,), "unexpected opt_proj.weight"),
        ("ln_vision.bias", None, "missing vision.norm.bias")], ids=str)
    def test_a_file_of_other_weights_is_one_line(self, tmp_path, name, shape, message):
        def change(theirs):
            for key in [key for key in theirs if key.startswith(name) and not shape]:
                del theirs[key]
            if shape is not None:
                theirs[name] = torch.ones(shape)
        path, _ = lavis(tmp_path, change)
        with one_line(message):
            blip2.from_pretrained(path)


class TestFromPretrained:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_hugging_face_folder(self, tmp_path, kind):
        ours = hugging_face(tmp_path, kind)
        if kind == "retrieval":
            ours["temp"].fill_(0.07)     # their files have none
        model, tokenizer = blip2.from_pretrained(tmp_path)
        assert model.config == config_of(kind) and not model.training
        check_weights(model, ours)
        words = getattr(tokenizer, "qformer", tokenizer)
        if kind in ("opt", "t5"):
            assert not hasattr(tokenizer, "qformer")
            assert tokenizer.eos_id == {"opt": 256, "t5": 1}[kind]
        else:
            assert words.batch(["a b"], 9).tolist() == [[3, 2, 5, 4]]
        if kind == "instruct-llama":     # </s> begins its prompts
            assert tokenizer.bos_id == tokenizer.eos_id == 2

    @pytest.mark.parametrize("kind", ["instruct-t5", "instruct-llama"])
    def test_an_instruction_has_its_own_ids_in_the_qformer(self, tmp_path, kind):
        hugging_face(tmp_path, kind)
        model, tokenizer = blip2.from_pretrained(tmp_path)
        texts = ["a c", "b", ""]         # without an instruction: a caption's
        records = [page((color, text, "x")) for color, text in zip(("red", "blue", "red"), texts)]
        texts[2] = model.config.prompt
        with torch.no_grad():
            x, mask, state = model.prepare(records, tokenizer)
            visual = model.visual_prompt(model.pixels(records), tokenizer.qformer.batch(texts, 11))
            for k, text in enumerate(texts):
                if kind == "instruct-llama":
                    row = model.lm.embed(torch.tensor([2, *tokenizer.encode(text)]))
                    assert_close("prompt (Q + T, D)", x[k][mask[k]], torch.cat([visual[k], row]))
                    continue
                row = model.lm.embed(torch.tensor([*tokenizer.encode(text), 1]))
                states = model.lm.encode(torch.cat([visual[k], row])[None])
                assert_close("states (Q + T, D)", state["context"][k, :states.shape[1]], states[0],
                             1e-4)

    def test_laviss_file(self, tmp_path):
        path, ours = lavis(tmp_path)
        model, tokenizer = blip2.from_pretrained(path)
        assert model.config == BLIP2Config(**WIDE) and len(tokenizer) == 31
        check_weights(model, ours)

    def test_a_run_folder(self, tmp_path):
        config = blip2.PRESETS["tiny"]
        ours = randomize(make_model(config)).state_dict()
        tokenizer = write_run(tmp_path, "blip2", config, ours)
        model, found = blip2.from_pretrained(tmp_path)
        assert model.config == config and found.model == tokenizer.model
        check_weights(model, ours)
