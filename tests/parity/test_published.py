"""Published weights and vocabularies: what we read against what the reference libraries read."""
import copy
import importlib
import json
import random
import unicodedata
from dataclasses import replace

import pytest
import torch
from PIL import Image

import blip
import blip2
import clip
import llava
from common.data.images import MEAN, STD, center_crop, normalize_pixels, to_tensor
from common.pretrained import blip as blip_pretrained
from common.pretrained import blip2 as blip2_pretrained
from common.pretrained.bpe import BPE, BYTES, CLIP, GPT2, OPT
from common.pretrained import clip as pretrained
from common.pretrained import language
from common.pretrained import llava as llava_pretrained
from common.pretrained import safetensors, t5
from common.pretrained.names import plan
from common.transformer import rope_table
from tests.fuzz import mutations
from tests.helpers import assert_close
from tests.parity import openai_layout
from tests.parity.cases import CASES, Blip2Case, BlipCase, LlavaCase, arrays, compare, randomize
from tests.pretrained.writers import byte_vocabulary, sentencepieces, write_vocabulary

WHY = "needs transformers and safetensors: pip install -r tests/requirements.txt"
pytest.importorskip("transformers", reason=WHY)
library = pytest.importorskip("safetensors", reason=WHY)

MERGES = [("a", "b"), ("t", "h"), ("th", "e</w>"), ("th", "e"), ("r", "e"), ("re", "d</w>"),
          ("c", "ab"), ("d", "o"), ("do", "g</w>"), ("Ġ", "the"), ("Ġ", "do"), ("l", "l</w>"),
          ("'", "s</w>"), ("Ã", "©</w>"), ("Ã", "©"), ("Ġ", "Ġ"), ("1", "2</w>"), ("!", "!</w>")]


def vocabulary(folder, style):
    """vocab.json and merges.txt -> how many pieces."""
    merges = [m for m in MERGES if style.end or not m[1].endswith("</w>")]
    merges = [m for m in merges if not (style.end and "Ġ" in m)]
    pieces = [c + end for end in dict.fromkeys(("", style.end)) for c in BYTES.values()]
    pieces = list(dict.fromkeys([*pieces, *map("".join, merges), style.bos, style.eos]))
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return len(pieces)


def reference(vocab, seed=0, vision=24, text=28, embed_dim=17, heads=(3, 2)):
    """A random CLIPModel."""
    from transformers import CLIPConfig, CLIPModel
    return randomize(CLIPModel(CLIPConfig(
        projection_dim=embed_dim,
        text_config=dict(hidden_size=text, intermediate_size=4 * text, num_hidden_layers=3,
                         num_attention_heads=heads[1], max_position_embeddings=11,
                         vocab_size=vocab, eos_token_id=vocab - 1, bos_token_id=vocab - 2,
                         pad_token_id=0),
        vision_config=dict(hidden_size=vision, intermediate_size=4 * vision, num_hidden_layers=2,
                           num_attention_heads=heads[0], image_size=15, patch_size=5))), seed)


def save_whole(model, folder):
    model.save_pretrained(folder)
    assert (folder / "model.safetensors").exists()


def save_shards(model, folder):
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3


def save_pickle(model, folder):
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def agree(use, model, ids):
    """Our features and logits are the reference's."""
    torch.manual_seed(3)
    pictures = torch.randn(3, 3, 15, 15)
    with torch.no_grad():
        want = model(input_ids=ids, pixel_values=pictures)
        image, text = use.model.encode_image(pictures), use.model.encode_text(ids)
    torch.testing.assert_close(image, want.image_embeds, atol=1e-4, rtol=0)
    torch.testing.assert_close(text, want.text_embeds, atol=1e-4, rtol=0)
    logits = use.model.logit_scale.exp() * image @ text.T
    torch.testing.assert_close(logits, want.logits_per_image, atol=1e-4, rtol=0)


@pytest.mark.parametrize("save", [save_whole, save_shards, save_pickle])
def test_a_folder_that_transformers_wrote_gives_the_same_features_and_logits(tmp_path, save):
    vocab = vocabulary(tmp_path, CLIP)
    model = reference(vocab)
    model.logit_scale.data.fill_(1.7)
    save(model, tmp_path)
    use = clip.from_pretrained(tmp_path)
    agree(use, model, use.ids(["the red dog", "a cab", "é"]))


@pytest.mark.parametrize("embed_dim", [67, 192, 128], ids=["", "square text", "square vision"])
def test_openais_layout_of_the_same_weights_gives_the_same_features(tmp_path, embed_dim):
    vocab = vocabulary(tmp_path, CLIP)
    model = reference(vocab, 0, 128, 192, embed_dim, heads=(2, 3))
    model.logit_scale.data.fill_(1.7)
    theirs = openai_layout.OpenAI(
        openai_layout.Vit(15, 5, 128, 2, embed_dim), vocab_size=vocab, context_length=11,
        width=192, layers=3, embed_dim=embed_dim, eos_id=vocab - 1)
    state = {}
    for name, value in theirs.state_dict().items():
        state[name] = fused(name, model.state_dict()) if value.ndim or name == "logit_scale" \
            else value
    theirs.load_state_dict(state)
    openai_layout.save_script(theirs.eval(), tmp_path / "model.pt", half=False)
    use = clip.from_pretrained(tmp_path / "model.pt")
    agree(use, model, use.ids(["the red dog", "a cab", "é"]))


def fused(name, hf):
    """The tensor of an OpenAI name, from Hugging Face's weights, by words and by hand."""
    for a, b in (("visual.transformer.resblocks", "vision_model.encoder.layers"),
                 ("transformer.resblocks", "text_model.encoder.layers"), (".ln_1", ".layer_norm1"),
                 (".ln_2", ".layer_norm2"), ("c_fc", "fc1"), ("c_proj", "fc2"),
                 ("attn.out", "self_attn.out"),
                 ("visual.ln_pre", "vision_model.pre_layrnorm"),
                 ("visual.ln_post", "vision_model.post_layernorm"),
                 ("visual.conv1", "vision_model.embeddings.patch_embedding"),
                 ("visual.class_", "vision_model.embeddings.class_"),
                 ("visual.positional_embedding",
                  "vision_model.embeddings.position_embedding.weight"),
                 ("ln_final", "text_model.final_layer_norm"),
                 ("token_embedding", "text_model.embeddings.token_embedding")):
        name = name.replace(a, b)
    if ".in_proj_" in name:
        head, kind = name.split("attn.in_proj_")
        return torch.cat([hf[f"{head}self_attn.{part}_proj.{kind}"] for part in "qkv"])
    if name in ("visual.proj", "text_projection"):
        return hf[{"visual.proj": "visual_projection"}.get(name, name) + ".weight"].T
    if name == "positional_embedding":
        return hf["text_model.embeddings.position_embedding.weight"]
    return hf[name]


def test_the_table_names_exactly_what_a_vit_b_32_of_transformers_holds():
    from transformers import CLIPConfig, CLIPModel
    with torch.device("meta"):
        names = set(CLIPModel(CLIPConfig()).state_dict())
    assert len(names) == 398
    assert names == set(plan(pretrained.HUGGING_FACE, {"text": 12, "vision": 12}))


BLIPS = [case for case in CASES if isinstance(case, BlipCase)]


@pytest.mark.parametrize("case", BLIPS, ids=lambda case: case.name)
def test_the_table_names_exactly_what_a_blip_base_of_transformers_holds(case):
    import transformers
    config = {"model_type": "blip", "text_config": {"num_attention_heads": 12}}
    with torch.device("meta"):
        theirs = getattr(transformers, case.kind)(transformers.BlipConfig(**config)).state_dict()
        own = blip.make_model(replace(blip.PRESETS["base"], image_size=384, losses=case.losses,
                                      momentum=0.0, queue_size=0)).state_dict()
    _, weights = blip_pretrained.hugging_face(theirs, config, "here")
    assert {name: weight.shape for name, weight in weights.items()} == {
        name: weight.shape for name, weight in own.items()
        if name not in ("temp", "image_queue", "text_queue", "queue_next")}


@pytest.mark.parametrize("save", [save_whole, save_shards, save_pickle])
def test_a_blip_folder_that_transformers_wrote_gives_the_same_logits(tmp_path, save):
    import transformers
    config = transformers.BlipConfig(**BLIPS[0].config)
    model = randomize(transformers.BlipForConditionalGeneration(config), 0)
    save(model, tmp_path)                # without the output matrix, which is tied
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(chr, range(97, 122))]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    ours, tokenizer = blip.from_pretrained(tmp_path)
    ids = tokenizer.batch(["a", "b c d"], 9)
    ids[:, 0], mask, pictures = tokenizer.dec_id, ids != 0, torch.randn(2, 3, 15, 15)
    with torch.no_grad():
        want = model(input_ids=ids, pixel_values=pictures, attention_mask=mask.long()).logits
        got = ours.logits(ids, mask, context=ours.vision(pictures))
    torch.testing.assert_close(got[mask], want[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("save", [save_whole, save_pickle])
@pytest.mark.parametrize("case", [case for case in CASES if isinstance(case, Blip2Case)],
                         ids=lambda case: case.name)
def test_a_blip_2_folder_that_transformers_wrote_gives_the_same_outputs(tmp_path, case, save):
    case = copy.deepcopy(case)
    if case.lm:
        case.config["text_config"]["vocab_size"] = 307       # more than the vocabularies have
    model, (_, inputs, _) = case.model(0), case.reference(0)
    inputs = {name: torch.as_tensor(value) for name, value in inputs.items()}
    save(model, tmp_path)
    words = tmp_path / "qformer_tokenizer" if case.instructs else tmp_path
    words.mkdir(exist_ok=True)
    pieces = ["[PAD]", "[UNK]", "a", "[SEP]", "[CLS]", *map(chr, range(98, 121))]
    (words / "vocab.txt").write_text("\n".join(pieces))
    write_vocabulary(tmp_path, byte_vocabulary(OPT, []), [])
    (tmp_path / "tokenizer.model").write_bytes(sentencepieces())
    (tmp_path / "spiece.model").write_bytes(sentencepieces(pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
    ours, _ = blip2.from_pretrained(tmp_path)
    compare(case.outputs(ours, inputs), arrays(case.theirs(model, inputs)))


def test_the_tables_name_exactly_what_a_blip_2_of_the_published_size_holds():
    import transformers
    lms = {"opt": {"model_type": "opt"}, "t5": {
        "model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}}
    for kind, config in lms.items():
        with torch.device("meta"):
            theirs = transformers.Blip2ForConditionalGeneration(
                transformers.Blip2Config(text_config=config)).state_dict()
        fields, weights = blip2_pretrained.hugging_face(
            theirs, {"model_type": "blip-2", "text_config": config}, "here")
        with torch.device("meta"):
            own = blip2.make_model(blip2.BLIP2Config(**fields)).state_dict()
        assert {name: weight.shape for name, weight in weights.items()} == {
            name: weight.shape for name, weight in own.items()}, kind


@pytest.mark.parametrize("save", [save_whole, save_shards, save_pickle])
@pytest.mark.parametrize("case", [case for case in CASES if isinstance(case, LlavaCase)],
                         ids=lambda case: case.name)
def test_a_llava_folder_that_transformers_wrote_gives_the_same_outputs(tmp_path, case, save):
    case = copy.deepcopy(case)
    case.config["text_config"]["vocab_size"] = 307           # more than the vocabulary has
    model, (_, inputs, _) = case.model(0), case.reference(0)
    inputs = {name: torch.as_tensor(value) for name, value in inputs.items()}
    save(model, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(sentencepieces())
    ours, _ = llava.from_pretrained(tmp_path)
    compare(case.outputs(ours, inputs), arrays(case.theirs(model, inputs)))


@pytest.mark.parametrize("preset, kind", [("v1.5-7b", "Llava"), ("next-7b", "LlavaNext")])
def test_the_tables_name_exactly_what_a_llava_of_the_published_size_holds(preset, kind):
    """Hugging Face's files have rows for 64 tokens more than the authors', all without use."""
    import transformers
    config = getattr(transformers, f"{kind}Config")(
        text_config={"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096,
                     "rms_norm_eps": 1e-5})
    with torch.device("meta"):
        theirs = getattr(transformers, f"{kind}ForConditionalGeneration")(config).state_dict()
        config = json.loads(config.to_json_string(use_diff=False))
        fields = llava_pretrained.config_fields(config, "here")
        weights = llava_pretrained.translated(theirs, fields, "here")
        own = llava.LLaVA(llava.LLaVAConfig(**fields)).state_dict()
    assert {name: weight.shape for name, weight in weights.items()} == {
        name: weight.shape for name, weight in own.items()}
    preset = llava.PRESETS[preset]
    assert llava.LLaVAConfig(**fields).language == replace(preset.language, vocab_size=32064)
    assert {name: getattr(preset.vision, name) for name in fields["vision"]} == fields["vision"]


# What files of transformers 4 hold besides, at the top and in each part.
OLDER = {
    "_name_or_path": "x", "add_cross_attention": False, "architectures": ["X"], "bos_token_id": 1,
    "begin_suppress_tokens": None, "cross_attention_hidden_size": None, "diversity_penalty": 0.0,
    "chunk_size_feed_forward": 0, "decoder_start_token_id": 0, "do_sample": False, "dropout": 0.1,
    "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "eos_token_id": 2,
    "finetuning_task": None, "forced_bos_token_id": None, "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0"}, "is_decoder": False, "label2id": {"LABEL_0": 0},
    "length_penalty": 1.0, "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 3,
    "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1, "output_past": True,
    "pad_token_id": 1, "prefix": "</s>", "pruned_heads": {}, "repetition_penalty": 1.0,
    "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None,
    "task_specific_params": {"x": {"max_length": 50}}, "temperature": 1.0, "top_k": 50,
    "tf_legacy_loss": False, "tokenizer_class": "X", "top_p": 1.0, "torch_dtype": "float16",
    "torchscript": False, "transformers_version": "4.21.0", "typical_p": 1.0, "use_cache": True,
    "use_bfloat16": False}


def readers():
    """{family: (a config of transformers by default, what reads its dict)}."""
    import transformers as hub
    gated = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    matrix = {"qformer.embeddings.word_embeddings.weight": torch.zeros(3, 5)}

    def one_file(config, where):
        where.write_text(json.dumps(config))
        return pretrained.hugging_face({}, where)

    def of(module, weights):
        return lambda config, where: module.hugging_face(weights, config, where)
    return {
        "clip": (hub.CLIPConfig(), one_file), "blip": (hub.BlipConfig(), of(blip_pretrained, {})),
        "blip-2": (hub.Blip2Config(), of(blip2_pretrained, {})),
        "blip-2 t5": (hub.Blip2Config(text_config=hub.T5Config(**gated).to_dict()),
                      of(blip2_pretrained, {})),
        "instructblip": (hub.InstructBlipConfig(), of(blip2_pretrained, matrix)),
        "llava": (hub.LlavaConfig(), llava_pretrained.config_fields),
        "llava_next": (hub.LlavaNextConfig(), llava_pretrained.config_fields),
        "gpt2": (hub.GPT2Config(), language.config_fields),
        "opt": (hub.OPTConfig(), language.config_fields),
        "llama": (hub.LlamaConfig(), language.config_fields),
        "t5": (hub.T5Config(**gated), t5.config_fields)}


def test_the_configs_that_transformers_saves_are_read(tmp_path):
    for name, (config, read) in readers().items():
        config.save_pretrained(tmp_path)                 # what is not at its default
        for whole in (json.loads((tmp_path / "config.json").read_text()),
                      json.loads(config.to_json_string(use_diff=False))):
            older = OLDER | whole
            older |= {part: OLDER | value for part, value in older.items()
                      if part.endswith("_config") and isinstance(value, dict)}
            for given in (whole, older):
                found = read(given, tmp_path / "config.json")
            assert found, name


@pytest.mark.parametrize("family, square", [
    ("clip", pretrained.CROP), ("blip", pretrained.OWN), ("llava", pretrained.OWN),
    ("llava_next", pretrained.OWN)])
def test_the_preprocessing_that_transformers_saves_is_read(tmp_path, family, square):
    module = importlib.import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    kind = next(getattr(module, name) for name in module.__all__)
    kind().save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").is_file()
    size = 384 if family == "blip" else 224
    assert pretrained.preprocessing(tmp_path, size, square) == {
        "mean": MEAN, "std": STD, "resample": 3}


def text(draw):
    """A text of letters, digits, marks and blanks of several scripts."""
    kinds = ("abcdthers", "the dog cab red ", " '!.,123", "éÉßÄ東京½²٣\u0301\u00a0\t\n", "🙂ñK’")
    return "".join(draw.choice(draw.choice(kinds)) for _ in range(draw.randrange(25)))


@pytest.mark.parametrize("W, H", [(64, 47), (47, 64), (30, 90), (13, 11), (7, 720), (720, 7)])
def test_our_crop_and_pixels_are_the_references(W, H):
    """Where an even number is cut off: of an odd one transformers cuts less in front."""
    import numpy as np
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    size, noise = 24, np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": size},
                                   crop_size={"height": size, "width": size})
    for mean, std in ((MEAN, STD), ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))):
        for resample in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR):
            want = theirs(Image.fromarray(noise), return_tensors="pt", resample=resample,
                          image_mean=list(mean), image_std=list(std)).pixel_values
            crop = center_crop(Image.fromarray(noise), size, resample)
            assert_close("pixels", normalize_pixels(to_tensor([crop]), mean, std), want, 1e-5)


@pytest.mark.parametrize("theta, factor, width", [
    (10000.0, 1.0, 128), (5e5, 1.0, 64), (10000.0, 4.0, 128), (1e6, 3.0, 80)])
def test_rotary_positions_are_exactly_the_references(theta, factor, width):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    theirs = LlamaRotaryEmbedding(LlamaConfig(
        hidden_size=2 * width, num_attention_heads=2, rope_parameters={
            "rope_type": "linear", "rope_theta": theta, "factor": factor}))
    positions = torch.arange(4096)
    cos, sin = theirs(torch.zeros(1), positions[None])
    ours = rope_table(positions, width, theta, factor)
    assert torch.equal(ours[0], cos[0])
    assert torch.equal(ours[1], torch.cat([-sin[0, :, :width // 2], sin[0, :, width // 2:]], -1))


def test_our_ids_are_those_of_the_reference_tokenizers(tmp_path):
    from transformers import CLIPTokenizer, GPT2Tokenizer
    for style, kind in ((CLIP, CLIPTokenizer), (GPT2, GPT2Tokenizer)):
        vocabulary(tmp_path, style)
        theirs, ours = kind.from_pretrained(tmp_path), BPE.load(tmp_path, style)
        assert len(theirs) == len(ours) and theirs.eos_token_id == ours.eos_id
        draw = random.Random(0)
        for _ in range(2000):
            given = text(draw)
            said = given.replace("’", "'") if style is CLIP else given    # OpenAI's, not theirs
            want = theirs(said, add_special_tokens=False).input_ids
            assert ours.encode(given) == want, repr(given)
            if style is GPT2:
                assert ours.decode(want) == given
        if style is CLIP:
            want = theirs(said).input_ids
            assert ours.batch([given], 99)[0].tolist() == want
        theirs.save_pretrained(tmp_path / style.bos)
        assert (tmp_path / style.bos / "tokenizer.json").exists()
        assert not (tmp_path / style.bos / "vocab.json").exists()
        again = BPE.load(tmp_path / style.bos, style)
        assert (again.vocab, again.ranks) == (ours.vocab, ours.ranks)


def test_character_classes_are_those_of_regex():
    """Of the characters that this Python's Unicode already knows."""
    regex = pytest.importorskip("regex", reason="comes with transformers")
    from common.pretrained.bpe import SPACE, characters, re
    for ours, theirs in ((characters("L"), r"\p{L}"), (characters("N"), r"\p{N}"), (SPACE, r"\s")):
        ours, theirs = re.compile(f"[{ours}]"), regex.compile(theirs)
        for code in range(0x110000):
            if unicodedata.category(chr(code)) != "Cn":
                assert bool(ours.match(chr(code))) == bool(theirs.match(chr(code))), hex(code)


def test_what_the_safetensors_library_writes_we_read_alike(tmp_path):
    from safetensors.torch import save_file
    torch.manual_seed(0)
    values = {code: (torch.randn(3, 5) * 9).to(kind) for code, kind in safetensors.DTYPES.items()}
    values |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 7), "odd": torch.ones(3).bool()}
    save_file(values, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = safetensors.read(tmp_path / "x.safetensors")
    assert set(found) == set(values)
    assert all(torch.equal(found[name], value) for name, value in values.items())


def test_whatever_damaged_file_the_library_accepts_we_accept_and_read_alike(tmp_path):
    from safetensors.torch import load, save
    whole, accepted = save({"a": torch.randn(2, 3), "b": torch.zeros(5).half()}), 0
    for data in mutations(whole, 1200):
        (tmp_path / "x").write_bytes(data)
        try:
            theirs = load(data)
        except library.SafetensorError:
            continue
        ours, accepted = safetensors.read(tmp_path / "x"), accepted + 1
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            assert value.dtype == ours[name].dtype
            assert torch.equal(value.flatten().view(torch.uint8),
                               ours[name].contiguous().flatten().view(torch.uint8))
    assert accepted > 50
