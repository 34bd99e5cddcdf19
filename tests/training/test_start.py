"""Starting from a run or from published weights, and continuing a run without its flags."""
import json
import shutil
from dataclasses import replace

import pytest
import torch

import clip
import llava
import train
from clip import CLIP, CLIPConfig
from common.data.batches import open_world
from common.data.safe_read import read_json
from common.language import LanguageConfig, LanguageModel
from common.pretrained import language as pretrained
from common.pretrained.bpe import BPE, GPT2, OPT
from common.pretrained.bpe import CLIP as STYLE
from common.t5 import T5, T5Config
from common.training import checkpoint
from tests.fuzz import damages, one_line
from tests.helpers import assert_close, command, listed, mistake
from tests.parity import blip2_layout, hugging_face_layout
from tests.pretrained.writers import (byte_vocabulary, sentencepieces, write_safetensors,
                                      write_vocabulary)
from tests.training.runs import TOY, assert_same, build, log, own, weights

MERGES = [tuple(pair.split()) for pair in ("n u", "m b", "e r</w>", "nu mb", "numb er</w>")]
FIELDS = dict(image_size=15, patch_size=5, vision_width=12, vision_layers=2, vision_heads=3,
              text_width=10, text_layers=1, text_heads=2, context_length=11, vocab_size=519,
              eos_id=518, embed_dim=7, act="quick_gelu")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(the folder of a published CLIP with CLIP's kind of vocabulary, its weights)."""
    folder = tmp_path_factory.mktemp("published")
    write_vocabulary(folder, byte_vocabulary(STYLE, MERGES), MERGES)
    f = FIELDS
    (folder / "config.json").write_text(json.dumps({
        "model_type": "clip", "projection_dim": f["embed_dim"], "text_config": {
            "hidden_size": f["text_width"], "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": f["vocab_size"], "max_position_embeddings": f["context_length"]},
        "vision_config": {
            "hidden_size": f["vision_width"], "num_hidden_layers": 2, "num_attention_heads": 3,
            "image_size": f["image_size"], "patch_size": f["patch_size"]}}))
    model = CLIP(CLIPConfig(**FIELDS))
    write_safetensors(folder / "model.safetensors",
                      hugging_face_layout.clip(model.state_dict(), FIELDS))
    return folder, model.state_dict()


def begun(folder, **more):
    """A run of `build`, without settings of its own."""
    values = {"precision": "fp32", "out": str(folder)} | more
    return train.build("clip", train.Options(**values), [], 0.0)


class TestOpenStart:
    def test_a_run_of_other_words_keeps_its_vocabulary_sizes_and_weights(self, tmp_path):
        first = build(tmp_path / "first", "context_length=9", "image_size=24")
        train.save(first)
        run = begun(tmp_path / "second", data=listed(tmp_path / "data", 40), batch_size=6,
                    init=str(first.folder.path))
        assert run.tokenizer.model == first.tokenizer.model and run.config == first.config
        assert run.batches[0][0]["images"].shape == (6, 3, 24, 24)
        assert_same("weights", run.model.state_dict(), first.model.state_dict())

    def test_a_published_model_keeps_its_own_in_the_run_and_after_it(self, tmp_path, published):
        path, ours = published
        run = begun(tmp_path / "run", data=listed(tmp_path / "data", 40), init=str(path))
        assert run.config == CLIPConfig(**FIELDS)
        assert_same("weights", run.model.state_dict(), ours)
        batch, = run.batches[0]
        assert batch["images"].shape == (8, 3, 15, 15) and batch["ids"].shape[1] <= 11
        known = BPE.load(path, STYLE)
        wanted = [known.batch([f"number {n}"], 11)[0].tolist() for n in range(40)]
        assert all([i for i in row if i] in wanted for row in batch["ids"].tolist()), "0 pads"
        train.save(run)
        trained = clip.from_pretrained(run.folder.path)
        assert trained.model.config == run.config and trained.tokenizer.vocab == known.vocab
        assert trained.tokenizer.encode("Number 12 &amp; 猫") == known.encode("number 12 & 猫")
        again = begun(tmp_path / "run", resume=True)
        assert (again.config, again.options.init) == (run.config, str(path))
        assert again.tokenizer.model == run.tokenizer.model
        started = begun(tmp_path / "next", data=run.options.data, init=str(run.folder.path))
        assert started.tokenizer.ranks == known.ranks and started.config == run.config

    def test_it_is_trained_searched_and_overwritten_by_command(self, tmp_path, published):
        spec, out = listed(tmp_path / "data", 40), tmp_path / "run"
        argv = ["clip", "--data", spec, "--steps", "2", "--out", out]
        status, said, err = command("train.py", *argv, "--init", published[0])
        assert status == 0 and "data.jsonl: 35 records to learn from, 0.5 times each, at a rate " \
            "of 0.0001, pictures of 15 pixels" in said, err
        picture = tmp_path / "data/0.png"
        assert command("clip.py", out, "classify", picture, "number 1", "a cat")[0] == 0
        assert command("train.py", *argv, "--batch_size", "6", "--overwrite")[0] == 0
        assert not (out / "tokenizer.json").exists() and (out / "tokenizer.model").exists()
        assert command("clip.py", out, "classify", picture, "number 1", "a cat")[0] == 0

    @pytest.mark.parametrize("flags, words", [
        (["--init", "nowhere"], "--init nowhere: no run here"),
        (["--init", "{}", "--set", "vocab_size=7"], "vocab_size=7: it belongs to the tokenizer"),
        (["--init", "{}", "--set", "image_size=30"], "vision.pos_embed is (10, 12), the model's")])
    def test_a_start_that_does_not_fit_is_told(self, tmp_path, published, flags, words):
        argv = own(listed(tmp_path / "data", 40))[:3] + ["--out", tmp_path / "run"]
        said = mistake("train.py", *argv, *(flag.format(published[0]) for flag in flags))
        assert words in said and not (tmp_path / "run").exists()

    def test_pictures_that_are_normalized_otherwise_are_not_trained_on(self, tmp_path, published):
        folder = shutil.copytree(published[0], tmp_path / "other")
        for name, value in (("image_mean", [0.5, 0.5, 0.5]), ("resample", 2)):
            (folder / "preprocessor_config.json").write_text(json.dumps(
                {"size": 15, "crop_size": 15, "do_center_crop": True, name: value}))
            assert clip.from_pretrained(folder).model.config == CLIPConfig(**FIELDS)
            with one_line("other: .* can be searched, but not trained on"):
                begun(tmp_path / "run", data=listed(tmp_path / "data", 40), init=str(folder))

    def test_a_flamingo_has_no_published_layout(self, tmp_path, published):
        assert "'another program', not of 'flamingo'" in mistake(
            "train.py", "flamingo", "--init", published[0], "--out", tmp_path / "run")


def language(folder, kind):
    """Write a published GPT-2, OPT or LLaMA of random weights -> its weights under our names."""
    folder.mkdir()
    theirs = LANGUAGES[kind] | {"model_type": kind, "vocab_size": 320}
    (folder / "config.json").write_text(json.dumps(theirs))
    lm = LanguageModel(LanguageConfig(**pretrained.config_fields(theirs, "")))
    torch.save(hugging_face_layout.language(lm.state_dict(), kind), folder / "pytorch_model.bin")
    if kind == "llama":
        (folder / "tokenizer.model").write_bytes(sentencepieces())
    else:
        write_vocabulary(folder, byte_vocabulary(GPT2 if kind == "gpt2" else OPT, []), [])
    return lm.state_dict()


LANGUAGES = {
    "gpt2": {"n_embd": 12, "n_layer": 1, "n_head": 3, "n_positions": 64, "n_inner": 20},
    **{kind: {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, hidden: 20,
              "max_position_embeddings": 64}
       for kind, hidden in (("opt", "ffn_dim"), ("llama", "intermediate_size"))}}


class TestOpenParts:
    def begun(self, tmp_path, stage, settings=(), **more):
        """A run of a stage on 35 pictures, after a step."""
        spec = listed(tmp_path / "data", 40)
        run = train.build(stage, train.Options(**{
            "data": spec, "batch_size": 6, "precision": "fp32", "runs": str(tmp_path),
            "out": str(tmp_path / stage)} | more), list(settings), 0.0)
        assert train.update(run, run.model, run.batches[0]).isfinite()
        train.save(run)
        return run

    @pytest.mark.parametrize("stage, settings", [
        ("blip", ["text_width=10", "text_heads=2", "text_layers=1"]),
        ("blip2-stage1", ["qformer_width=10", "qformer_heads=2", "qformer_layers=2"])])
    def test_an_image_encoder_comes_without_its_vocabulary(
            self, tmp_path, published, stage, settings):
        run = self.begun(tmp_path, stage, settings, parts=[f"vision={published[0]}"])
        assert (run.config.image_size, run.tokenizer.file) == (15, "tokenizer.model")
        if stage == "blip2-stage1":
            assert_same("patches", run.model.vision.vit.patch_embed.weight,
                        published[1]["vision.patch_embed.weight"])

    @pytest.mark.parametrize("kind, file", [
        ("gpt2", "tokenizer.json"), ("opt", "tokenizer.json"), ("llama", "llama.model")])
    def test_llava_learns_over_published_parts_and_is_used(self, tmp_path, published, kind, file):
        ours = language(tmp_path / kind, kind)
        parts = [f"vision={published[0]}", f"language={tmp_path / kind}"]
        with one_line("llava-stage1: .* of the house template; --set template=v1"):
            self.begun(tmp_path, "llava-stage1", parts=parts)
        run = self.begun(tmp_path, "llava-stage1", ["template=v1"], parts=parts)
        assert run.config.language.eos_id == run.tokenizer.eos_id and run.config.image_size == 15
        assert_same("frozen", {name: w for name, w in run.model.lm.state_dict().items()}, ours)
        assert (run.folder.path / file).exists()
        model, tokenizer = llava.from_pretrained(run.folder.path)
        assert type(tokenizer) is type(run.tokenizer) and tokenizer.model == run.tokenizer.model
        assert_same("weights", model.state_dict(), run.model.state_dict())

    def test_a_second_stage_writes_by_another_vocabulary_than_the_first(self, tmp_path, published):
        first = self.begun(tmp_path, "blip2-stage1", [
            "qformer_width=10", "qformer_heads=2", "qformer_layers=2"],
            parts=[f"vision={published[0]}"])
        language(tmp_path / "opt", "opt")
        more = {"init": str(first.folder.path), "parts": [f"language={tmp_path / 'opt'}"]}
        with one_line("--from language=.*opt: a opt; blip2-stage2-t5 needs a t5"):
            self.begun(tmp_path, "blip2-stage2-t5", **more)
        run = self.begun(tmp_path, "blip2-stage2", **more)
        assert run.config.vocab_size == first.config.vocab_size and run.tokenizer.style == OPT
        with one_line("--from language=.*opt: another vocabulary than that of .*blip2-stage1"):
            self.begun(tmp_path, "blip2-stage2", ["losses=vqa"], **more)

    def test_a_t5_is_a_part_too(self, tmp_path, published):
        folder = tmp_path / "t5"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({
            "model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
            "vocab_size": 320, "d_model": 16, "num_heads": 3, "d_kv": 5, "d_ff": 37,
            "num_layers": 1}))
        ours = T5(T5Config(vocab_size=320, width=16, heads=3, head_width=5, hidden=37,
                           layers=1)).state_dict()
        torch.save(blip2_layout.language(ours, "t5"), folder / "pytorch_model.bin")
        (folder / "spiece.model").write_bytes(
            sentencepieces(pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
        run = self.begun(tmp_path, "blip2-stage2-t5", [
            "qformer_width=10", "qformer_heads=2", "qformer_layers=2"], init="none",
            parts=[f"vision={published[0]}", f"language={folder}"])
        assert_same("lm", run.model.lm.state_dict(), ours)
        again = checkpoint.open_tokenizer(run.folder.path)
        assert (again.bos_id, again.eos_id, again.pad_id) == (0, 1, 0) and run.config.pad_id == 0

    def test_a_flamingo_needs_our_tokens(self, tmp_path, published):
        language(tmp_path / "opt", "opt")
        with one_line("flamingo: a published vocabulary .* take a run of lm"):
            self.begun(tmp_path, "flamingo", parts=[f"vision={published[0]}",
                                                    f"language={tmp_path / 'opt'}"])

    def test_before_its_first_checkpoint_a_run_takes_its_parts_again(self, tmp_path, published):
        language(tmp_path / "opt", "opt")
        parts = [f"vision={published[0]}", f"language={tmp_path / 'opt'}"]
        run = self.begun(tmp_path, "llava-stage1", ["template=v1"], parts=parts)
        (run.folder.path / "last.pt").unlink()
        again = train.build("llava-stage1", train.Options(
            resume=True, out=str(run.folder.path)), [], 0.0)
        assert again.step == 0 and again.config == run.config
        assert_same("lm", again.model.lm.state_dict(), run.model.lm.state_dict())


class TestOpenTokenizer:
    def test_damaged_vocabularies_of_a_run_are_one_or_one_line(self, tmp_path, published):
        path = tmp_path / "tokenizer.json"
        path.write_bytes(BPE.load(published[0], STYLE).model)
        assert checkpoint.open_tokenizer(tmp_path).style == STYLE
        for _ in damages(path, 60):
            with one_line(maybe=True):
                checkpoint.open_tokenizer(tmp_path)
        for text in ('{"model": {}}', '{"style": ["clip"]}', '{"style": "elf"}'):
            path.write_text(text)
            with one_line(f"{path}: its style is .*not one of clip, gpt2, opt"):
                checkpoint.open_tokenizer(tmp_path)


class TestTakeUp:
    @pytest.fixture
    def run(self, tmp_path):
        """A run of several flags, at step 3 of 50."""
        run = build(tmp_path, "context_length=9", seed=3, accumulate=3, lr=0.01,
                    optimizer="adamw", unfreeze="text.*")
        run.step = 3
        train.save(run)
        return run

    def test_all_that_is_not_given_is_as_it_began(self, run):
        again = train.build("clip", train.Options(
            out=str(run.folder.path), resume=True, save_every=7, skip=0.5, workers=0, device="cpu",
            attention="hand"), [], 0.0)
        assert (again.step, again.config, again.recipe) == (3, run.config, run.recipe)
        assert again.options == replace(run.options, resume=True, save_every=7, skip=0.5,
                                        workers=0, device="cpu", attention="hand", steps=None,
                                        batch_size=None, lr=None, optimizer=None)
        assert again.batches[7][0]["ids"].tolist() == run.batches[7][0]["ids"].tolist()
        assert_same("weights", again.model.state_dict(), run.model.state_dict())

    @pytest.mark.parametrize("flags, words", [
        (["--seed", "0"], "options seed=3 (now 0); it goes on as it began"),
        (["--accumulate", "1"], "options accumulate=3 (now 1)"),
        (["--data", "shapes"], "data=toy (now shapes)"),
        (["--precision", "bf16"], "precision=fp32"),
        (["--optimizer", "muon"], "recipe optimizer=adamw (now muon)"),
        (["--steps", "49"], "recipe steps=50 (now 49)"),
        (["--set", "context_length=32"], "config context_length=9 (now 32)"),
        (["--init", "elsewhere"], "init=None (now elsewhere)")])
    def test_a_flag_that_differs_is_named_a_default_one_too(self, run, flags, words):
        argv = ["clip", "--resume", "--out", run.folder.path]
        assert words in mistake("train.py", *argv, *flags)

    def test_another_stage_is_told(self, run):
        with one_line("a run of 'clip', not of 'common.training.lm'"):
            train.build("lm", train.Options(out=str(run.folder.path), resume=True), [], 0.0)

    def test_before_its_first_checkpoint_it_begins_as_it_was_told_to(self, tmp_path, published):
        spec = listed(tmp_path / "data", 40)
        run = begun(tmp_path / "run", data=spec, init=str(published[0]), lr=0.5)
        again = begun(tmp_path / "run", resume=True)
        assert (again.step, again.recipe, again.options.data) == (0, run.recipe, spec)
        assert_same("weights", again.model.state_dict(), published[1])


class TestRestore:
    def test_more_steps_lengthen_the_schedule_from_the_step_on(self, tmp_path):
        run = build(tmp_path, steps=40, seed=3)
        run.step = 20
        train.save(run)
        longer = begun(run.folder.path, resume=True, steps=80)
        assert (longer.step, longer.recipe) == (20, replace(run.recipe, steps=80))
        assert_close("rate, warm-up of 8", train.learning_rate(longer.recipe, 20), 1e-3 * 5 / 6)
        assert read_json(run.folder.path / "config.json")["recipe"]["steps"] == 80
        assert begun(run.folder.path, resume=True).recipe.steps == 80

    def test_by_command_it_ends_at_the_new_step_and_then_no_more(self, tmp_path):
        argv = [*TOY, "--out", str(tmp_path / "run")]
        run = build(tmp_path, steps=20)
        run.step = 10
        train.save(run)
        argv = ["clip", "--resume", "--out", run.folder.path, "--steps"]
        assert command("train.py", *argv, "30")[0] == 0
        assert [line["step"] for line in log(run.folder.path)] == [20, 30]
        assert not torch.equal(weights(run.folder.path)["logit_scale"], run.model.logit_scale)
        assert "--steps 31: the run in" in mistake("train.py", *argv, "31")


class TestInterleaved:
    """`interleaved:FILE`, from the file to a trained Flamingo."""

    @pytest.fixture
    def spec(self, tmp_path):
        """30 pages: a text, a picture, its text, two pictures, their text, a picture."""
        listed(tmp_path / "data", 60)
        names = [f"{n}.png" for n in range(60)]
        lines = [json.dumps({
            "images": [None, names[n], None, names[n + 1], names[n + 2], None, names[0]],
            "texts": [f"hello {n}", None, f"number {n}", None, None, f" and {n} ", None]})
            for n in range(30)]
        lines.append(json.dumps({"images": [None, *names[30:37]] + [None, "59.png", None],
                                 "texts": ["long"] + [None] * 7 + ["seven", None, "one"]}))
        (tmp_path / "data/pages.jsonl").write_text("\n".join(lines))
        return f"interleaved:{tmp_path}/data/pages.jsonl"

    def test_a_text_has_the_pictures_since_the_text_before_it(self, spec):
        world = open_world(spec, 8)
        pages = [entry["source"] for split in ("train", "test") for entry in (
            world.record(split, i) for i in range(world.size(split)))]
        page = next(page for page in pages if page["images"][0] == "7.png")
        assert page["images"] == ["7.png", "8.png", "9.png"] and page["counts"] == [0, 1, 2]
        assert page["texts"] == ["", "hello 7", "", "number 7", "", "and 7"]
        long = [page for page in pages if page["source"] == "30.png"]
        assert [(page["counts"], page["texts"][1::2]) for page in long] == [
            ([7], ["seven"]), ([1], ["one"])], "a text without a picture before it is alone"
        record = world.record("train", 0)
        assert [len(turn["images"]) for turn in record["turns"]] in ([0, 1, 2], [7], [1])
        assert not {"", "hello"} & {*world.corpus()} and world.tried == 32

    @pytest.mark.parametrize("row", [
        {"images": ["0.png"], "texts": [None, "a"]}, {"images": ["0.png"], "texts": ["a"]},
        {"images": [None], "texts": [None]}, {"images": "0.png", "texts": "a"},
        {"images": [None, "0.png"], "texts": ["a", None]}, {"texts": ["a"]},
        {"images": ["../0.png", None], "texts": [None, "a"]}])
    def test_broken_pages_are_refused(self, spec, row):
        with open(spec.partition(":")[2], "a") as file:
            file.write("\n" + json.dumps(row))
        world = open_world(spec, 8)
        assert world.refused.count == 1 and ": line 32: " in world.refused.reasons[0]

    def test_flamingo_learns_from_them_and_no_other_model_does(self, tmp_path, spec):
        train.save(build(tmp_path / "clip"))
        lm = train.build("lm", train.Options(data="toy", out=str(tmp_path / "lm")), [
            "width=12", "layers=1", "heads=2", "kv_heads=2", "hidden=20"], 0.0)
        train.save(lm)
        options = {"data": spec, "batch_size": 4, "steps": 2, "precision": "fp32"}
        assert train.train("flamingo", train.Options(
            **options, out=str(tmp_path / "run"), parts=[
                f"vision={tmp_path / 'clip/run'}", f"language={tmp_path / 'lm'}"]), []) == 0
        figures = read_json(tmp_path / "run/result.json")
        assert figures["perplexity"] > 1 and figures["perplexity_wrong_image"] > 1
        assert (tmp_path / "run/samples.png").exists()
        with one_line("pages are for flamingo; clip learns from captions"):
            begun(tmp_path / "other", data=spec)
