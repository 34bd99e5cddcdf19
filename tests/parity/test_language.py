"""Folders that transformers wrote, read back: logits, in every form and precision of the files."""
import pytest
import torch

from common.language import PRESETS, LanguageConfig, LanguageModel
from common.pretrained.language import read_model
from tests.parity.cases import CASES, REAL, B, LanguageCase, T, load, randomize

pytest.importorskip("transformers",
                    reason="needs transformers: pip install -r tests/requirements.txt")

LANGUAGE = [case for case in CASES if isinstance(case, LanguageCase)]


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("case", LANGUAGE, ids=lambda case: case.name)
def test_a_saved_folder_gives_the_same_logits(case, shards, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model(**case.config, bos_token_id=3, pad_token_id=1)
    model = randomize(AutoModelForCausalLM.from_config(config), 5)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors").exists() != shards
    fields, weights = read_model(tmp_path)
    ids, real = torch.randint(3, 31, (B, T)), REAL.flip(1)
    places = {} if config.model_type == "opt" else {
        "position_ids": (real.long().cumsum(dim=1) - 1).clamp(min=0)}
    want = model(input_ids=ids, attention_mask=real.long(), **places).logits
    got = load(LanguageModel(LanguageConfig(**fields)), weights)(ids, real)
    torch.testing.assert_close(got[real], want[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("preset, config", [
    ("gpt2", {"model_type": "gpt2"}),
    ("gpt2-xl", {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25}),
    ("opt-125m", {"model_type": "opt"}),
    ("opt-2.7b", {"model_type": "opt", "hidden_size": 2560, "num_hidden_layers": 32,
                  "num_attention_heads": 32, "ffn_dim": 10240, "word_embed_proj_dim": 2560}),
    ("llama-7b", {"model_type": "llama"})])
def test_a_preset_has_the_parameters_of_the_published_model(preset, config):
    from transformers import AutoConfig, AutoModelForCausalLM
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        ours = LanguageModel(PRESETS[preset])
    theirs.tie_weights()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
