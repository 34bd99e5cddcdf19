"""Flamingo as a whole: its config, which image a token attends to, the cache, the loss, prompts."""
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flamingo import PRESETS, Flamingo, FlamingoConfig, paper_size
from tests.helpers import (EOC, EOS, IMAGE, Words, assert_close, drawing, flamingo_config,
                           loop_gated_block, loop_pixels, loop_resampler, make_batch, make_cache,
                           make_ids, make_images, make_visual, media_mask_of, page, refused,
                           toy_flamingo, unchanged)

RESNET = {"stages": (1, 1, 1, 1), "image_size": 64, "vision_width": 2, "vision_heads": 4}
ROWS = ("..I...I.I..", "I..........", "...........")         # I is <image>
TRAINED = ("resampler.", "gated.", "lm.new.")


def pixels(picture):
    """uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


class TestFlamingoConfig:
    def test_it_comes_back_from_json(self):
        config = flamingo_config(max_frames=0, p_next_image=1.0)       # the least and the most
        assert FlamingoConfig(**json.loads(json.dumps(asdict(config)))) == config
        assert (config.image_size, config.context_length) == (15, 37), "sizes of the two models"

    @pytest.mark.parametrize("changes, words", [
        ({"placement": "after"}, "placement.*after"), ({"resampler": "cnn"}, "resampler.*cnn"),
        ({"act": "relu"}, "act.*relu"), ({"num_latents": 0}, "num_latents.*0"),
        ({"cross_attn_every": 0}, "cross_attn_every.*0"), ({"max_frames": -1}, "max_frames.*-1"),
        ({"p_next_image": -0.1}, "p_next_image.*-0.1"),
        ({"p_next_image": 1.5}, "p_next_image.*1.5"),
        ({"placement": "openflamingo", "cross_attn_every": 4}, "cross_attn_every=4.*3 blocks")])
    def test_a_value_that_no_model_can_have_is_refused(self, changes, words):
        with refused(words):
            flamingo_config(**changes)

    @pytest.mark.parametrize("name", ["vision", "language"])
    def test_a_part_of_another_version_is_refused(self, name):
        fields = asdict(getattr(flamingo_config(), name)) | {"unheard": 1}
        with refused(f"{name}.*unheard"):
            flamingo_config(**{name: fields})

    @pytest.mark.parametrize("layers, every, paper, openflamingo", [
        (5, 1, range(5), range(5)), (40, 4, range(0, 40, 4), range(3, 40, 4)),
        (80, 7, range(0, 80, 7), range(6, 80, 7))])
    def test_gated_blocks_stand_before_these_blocks(self, layers, every, paper, openflamingo):
        language = replace(flamingo_config().language, layers=layers)
        for placement, expected in (("paper", paper), ("openflamingo", openflamingo)):
            config = flamingo_config(cross_attn_every=every, placement=placement, language=language)
            found = [block for block in range(layers) if config.is_gated(block)]
            assert found == list(expected), placement


def loop_logits(model, rows, ids, visual, attend_next):
    """A gated block, as a loop over its tokens, before every so many frozen blocks."""
    c = model.config
    mask = torch.cat([media_mask_of([row], only_latest_image=c.only_latest_image, attend_next=ahead)
                      for row, ahead in zip(rows, attend_next)])
    x, arguments = model.lm.block_inputs(model.lm.embed(ids))
    for i, block in enumerate(model.lm.blocks):
        if i % c.cross_attn_every == (0 if c.placement == "paper" else c.cross_attn_every - 1):
            x = loop_gated_block(model.gated[i], x, visual, mask, c.act)
        x = block(x, **arguments)
    return model.lm.head(x)


class TestFlamingo:
    def test_a_new_model_has_a_loss_of_about_log_v(self):
        loss = Flamingo(flamingo_config())(make_batch("I......" * 5, "..I...I" * 5, N=10))["lm"]
        assert_close("loss", loss, math.log(43), 0.02)

    def test_a_new_models_gates_and_attention_outputs_are_those_of_its_config(self):
        config = flamingo_config(attn_init_scale=7.0, gate_init=0.5)
        for i, block in enumerate(Flamingo(config).gated):
            assert_close(f"gates of block {i}", torch.cat([block.attn_gate, block.mlp_gate]),
                         [0.5, 0.5])
            scale = 7 if i else 1
            found = block.attn.out_proj.weight.abs().max() * 12 ** 0.5 / scale
            assert 0.9 < found <= 1, f"out_proj of block {i} is {found:.2f} of what it should be"

    def test_a_text_ends_at_eoc_or_eos_and_image_is_never_written(self):
        assert tuple(Flamingo.stop_ids) == (EOC, EOS) and tuple(Flamingo.banned_ids) == (IMAGE,)

    def test_train_leaves_frozen_parts_in_eval_mode(self):
        model = toy_flamingo()
        for part in (model.vision, model.lm.blocks):
            part.requires_grad_(False)
        for mode in (True, False):
            model.train(mode)
            modes = [{m.training for m in part.modules()} for part in (
                model.vision, model.lm.blocks, model.gated, model.resampler)]
            assert modes == [{False}, {False}, {mode}, {mode}], f"train({mode}): {modes}"

    @pytest.mark.parametrize("changes, encoder", [
        ({}, {}), ({"use_class_token": False}, {}), ({"act": "gelu"}, RESNET)])
    def test_images_are_resampled_from_all_tokens_before_the_encoders_last_norm(
            self, changes, encoder):
        vision = replace(flamingo_config().vision, **encoder)
        model = toy_flamingo(vision=vision, **changes)
        shape = (2, 3, 4, 3, vision.image_size, vision.image_size)
        images = torch.randint(256, shape, dtype=torch.uint8)
        tokens = model.vision.hidden(loop_pixels(images).flatten(0, 2)).unflatten(0, shape[:3])
        tokens = tokens if model.config.use_class_token else tokens[:, :, :, 1:]
        expected = loop_resampler(model.resampler, tokens, model.config.act)
        with unchanged(images=images):
            visual = model.encode_images(images)
        assert_close("visual tokens (B, N, Q, D)", visual, expected, 1e-4)
        visual.square().sum().backward()
        learned = [name for name, p in model.vision.named_parameters() if p.grad is not None]
        assert learned, "no gradient reaches the encoder, which is not frozen here"

    def test_with_the_mlp_resampler_every_feature_is_a_visual_token(self):
        visual = toy_flamingo(resampler="mlp").encode_images(make_images(2, 3, frames=4))
        assert visual.shape == (2, 3, 4 * 10, 22), f"{tuple(visual.shape)}"

    def ragged(self):
        """Rows with 3, 1 and 0 images, padded left -> (ids, mask, visual)."""
        rows = ("PPP..I....I..I...", "....I............", "PPPPPPPPP........")
        mask = torch.tensor([[letter != "P" for letter in row] for row in rows])
        return make_ids(*rows), mask, make_visual(3)

    @pytest.mark.parametrize("attend_next", [None, [False, True, True]])
    @pytest.mark.parametrize("changes", [
        {}, {"only_latest_image": False}, {"cross_attn_every": 2, "act": "gelu"},
        {"cross_attn_every": 2, "placement": "openflamingo"}])
    def test_a_gated_block_comes_before_every_so_many_frozen_blocks(self, changes, attend_next):
        model, ids, visual = toy_flamingo(**changes), make_ids(*ROWS), make_visual(3)
        flags = None if attend_next is None else torch.tensor(attend_next)
        expected = loop_logits(model, ROWS, ids, visual, attend_next or [False] * 3)
        for last, part in ((False, expected), (True, expected[:, -1:])):
            with unchanged(ids=ids):
                got = model.logits(ids, last=last, visual=visual, attend_next=flags)
            assert_close(f"logits (B, T, V) with last={last}", got, part)

    @pytest.mark.parametrize("attend_next", [True, False])
    @pytest.mark.parametrize("only_latest_image", [True, False])
    def test_the_media_mask_lets_a_token_attend_to_its_image(self, only_latest_image, attend_next):
        model = toy_flamingo(only_latest_image=only_latest_image)
        mask = model.media_mask(make_ids(*ROWS), make_visual(3), torch.tensor([attend_next] * 3))
        expected = media_mask_of(ROWS, only_latest_image=only_latest_image, attend_next=attend_next)
        assert_close("media mask (B, 1, T, N * Q)", mask, expected)

    def test_a_row_of_a_ragged_batch_is_that_row_alone(self):
        (ids, mask, visual), model = self.ragged(), toy_flamingo()
        logits = model.logits(ids, mask, visual=visual)
        for b in range(3):
            alone = model.logits(ids[b:b + 1, mask[b]], visual=visual[b:b + 1])[0]
            assert_close(f"logits of row {b}, padded left", logits[b, mask[b]], alone)

    def test_with_gates_at_0_it_is_the_language_model_bit_for_bit(self):
        for dtype in (torch.float64, torch.float32):
            model, ids = toy_flamingo(gate=0.0).to(dtype), make_ids("..I...I", "I......")
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                got, expected = model.logits(ids, visual=make_visual().to(dtype)), model.lm(ids)
            assert_close(f"logits (B, T, V) of a model in {dtype}", got, expected, tolerance=0)

    @torch.no_grad()
    def check_chunks(self, model, ids, mask, sizes, visuals):
        """Chunks of these sizes with these images, in one cache, give the logits of one forward."""
        cache, logits, end = make_cache(), [], 0
        for size, visual in zip(sizes, visuals, strict=True):
            start, end = end, end + size
            logits.append(model.logits(ids[:, start:end], mask[:, :end], cache, visual=visual))
        assert_close("logits at tokens", torch.cat(logits, dim=1)[mask],
                     model.logits(ids, mask, visual=visuals[-1])[mask])

    @pytest.mark.parametrize("only_latest", [True, False])
    @pytest.mark.parametrize("sizes, images", [
        ([1] * 17, [3] * 17), ([13, 1, 1, 1, 1], [3] * 5), ([6, 5, 6], [3] * 3), ([16, 1], [3] * 2),
        ([9, 1, 2, 1, 4], [1, 1, 2, 2, 3])])          # new images come with later chunks
    def test_any_chunks_give_the_logits_of_one_forward(self, sizes, images, only_latest):
        model, (ids, mask, visual) = toy_flamingo(only_latest_image=only_latest), self.ragged()
        self.check_chunks(model, ids, mask, sizes, [visual[:, :n] for n in images])

    def test_a_new_image_may_take_the_place_of_padding(self):
        ids, visual = make_ids("I.I......", "I.....I.."), make_visual(2, 2)
        padded = visual.clone()
        padded[1, 1] = 0
        mask = torch.ones(2, 9).bool()
        self.check_chunks(toy_flamingo(), ids, mask, [5, 1, 1, 1, 1], [padded] + [visual] * 4)

    def test_a_search_may_reorder_the_rows_between_calls(self):
        (ids, mask, visual), model, cache = self.ragged(), toy_flamingo(), make_cache()
        rows = torch.tensor([1, 0, 1])
        with torch.no_grad():
            model.logits(ids[:, :12], mask[:, :12], cache, visual=visual)
            cache.reorder(rows)
            got = model.logits(ids[rows, 12:], mask[rows], cache, visual=visual[rows])
        assert_close("logits of later tokens (B, T, V)", got,
                     model.logits(ids, mask, visual=visual)[rows, 12:])

    def test_the_loss_is_the_mean_over_labels_each_predicted_from_the_token_before(self):
        model, batch = toy_flamingo(), make_batch("..I...I", "I......", attend_next=[False, True])
        logits = model.logits(batch["ids"], visual=model.encode_images(batch["images"]),
                              attend_next=batch["attend_next"])
        labels = batch["labels"][:, 1:].flatten()
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="none")
        with unchanged(**batch):
            assert_close("loss", model(batch)["lm"], expected.sum() / (labels >= 0).sum(), 1e-5)
        counted = model(batch | {"label_count": torch.tensor(40.0)})["lm"]
        assert_close("loss with a label_count of 40", counted, expected.sum() / 40, 1e-5)

    @pytest.mark.parametrize("gate", [0.0, None])
    def test_with_gates_at_0_they_and_the_new_tokens_alone_learn_else_all_new_layers(self, gate):
        model = toy_flamingo(gate=gate)
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith(TRAINED))
        model(make_batch("..I...I", "I......"))["lm"].backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None) == name.startswith(TRAINED), f"gradient of {name}"
            if p.grad is not None:
                learns = gate is None or name.endswith("_gate") or "lm.new" in name
                assert (p.grad.abs().max() > 0) == learns, f"gradient of {name}"

    def test_prompts_leave_the_last_answer_open_padded_left_with_images_padded_right(self):
        ask, model = "what is this ?", toy_flamingo()
        asked = "question: what is this ? answer:"
        cases = [
            (page(("red", "", "a red cat"), ("blue", ask, "dog")), "red blue",
             f"<bos> <image> a red cat <eoc> <image> {asked}"),
            ({"images": drawing("green"), "texts": ["cat"]}, "green", "<bos> <image> output:"),
            (page(("white blue", "", "a " * 60), ("red", "", "cat")), "white blue red",
             "<bos> <image> <image> " + "a " * 60 + "<eoc> <image>"),
            (page(("", ask, "cat"), ("", ask, "")), "", f"<bos> {asked} cat <eoc> {asked}")]
        ids, mask, state = model.prepare([record for record, _, _ in cases], Words())
        assert mask.dtype == torch.bool and mask.shape == ids.shape == (4, 65), f"{mask.shape}"
        for b, (_, colours, prompt) in enumerate(cases):
            start = 65 - len(prompt.split())          # the context of 37 cuts nothing
            assert Words().spell(ids[b, start:].tolist()) == prompt
            assert_close(f"mask of row {b}", mask[b], torch.arange(65) >= start)
            images = torch.stack([pixels(x) for x in drawing(*(colours or "black").split())])
            visual = model.encode_images(images[None, :, None])[0]
            assert_close(f"visual tokens of row {b}", state["visual"][b, :len(visual)], visual)

    def test_the_shots_of_the_most_similar_images_are_selected_and_the_best_comes_last(self):
        model = toy_flamingo()

        def feature(frames):
            images = torch.stack([loop_pixels(pixels(frame)) for frame in frames])
            mean = sum(model.vision.pooled(images)) / len(frames)
            return mean / mean.norm()
        clips = [drawing(*colours.split()) for colours in (
            "red", "blue blue blue", "white blue", "green", "black red red")]
        queries = [drawing(*colours.split()) for colours in ("red blue green", "white", "blue")]
        support = [{"turns": [{"images": [clip], "prompt": "", "answer": f"{i}"}]}
                   for i, clip in enumerate(clips)]
        keys = torch.stack([feature(clip) for clip in clips])
        cosines = torch.stack([feature(query) for query in queries]) @ keys.T
        for count in (2, 5, 9):
            shots = model.select_shots(queries, support, count)
            found = [[int(shot["turns"][0]["answer"]) for shot in row] for row in shots]
            assert_close(f"the best {count} of {cosines.tolist()}", found,
                         cosines.argsort(dim=1)[:, -count:])


class TestPaperSize:
    @pytest.mark.parametrize("name, layers, D, every, gated, table", [
        ("3B", 24, 2048, 1, 24, 1.2e9), ("9B", 40, 4096, 4, 10, 1.6e9),
        ("80B", 80, 8192, 7, 12, 10e9)])
    def test_it_has_the_papers_layers_and_the_parameters_of_the_formula(
            self, name, layers, D, every, gated, table):
        config = paper_size(layers, D, every)
        assert config == PRESETS[name] == replace(
            config, heads=D // 128, head_width=128, resampler_heads=16, resampler_head_width=96,
            num_latents=64, max_frames=8, resampler_layers=6, cross_attn_every=every,
            act="squared_relu", attn_init_scale=1.0, placement="paper")
        with torch.device("meta"):
            model = Flamingo(config)
        gate, layer = 2 * (D + 1536) * D + 8 * D * D + 4 * D + 2, 12 * 1536 * 1536 + 6 * 1536
        for part, expected, told in (("gated", gated * gate, table),
                                     ("resampler", 6 * layer + (64 + 8 + 2) * 1536, 194e6)):
            found = sum(p.numel() for p in getattr(model, part).parameters())
            assert found == expected, f"{part}: {found} parameters, expected {expected}"
            assert found == pytest.approx(told, rel=0.2), f"{part}: Table 5 has {told}"
        assert model.lm.new.rows.shape == (2, D), "learned rows for <image> and <eoc>"
