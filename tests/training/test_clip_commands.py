"""clip.py on a run: what the stage learns from, the commands that users type, their mistakes."""
import json
from pathlib import Path

import pytest
from PIL import Image

import clip
import train
from common.data.collators import ImageTextBatch
from common.data.safe_read import read_json
from tests.helpers import assert_close, command, drawing, mistake
from tests.training.runs import TOY, build


class TestDataSources:
    def test_the_stage_learns_from_pictures_with_one_caption_each(self):
        config = clip.CLIPConfig(image_size=24, context_length=9)
        source, = clip.data_sources("world", "tokenizer", config)
        assert (source.world, source.weight, source.kinds) == ("world", 1.0, None)
        assert vars(source.collate) == vars(ImageTextBatch("tokenizer", 9, 24))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run at step 0."""
    made = build(tmp_path_factory.mktemp("runs"))
    train.save(made)
    return made.folder.path


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """The current folder: three pictures, a file that is none, and a folder."""
    monkeypatch.chdir(tmp_path)
    for name, colour in (("red", "red"), ("blue", "blue"), ("a long name of a picture", "green")):
        drawing(colour, size=40)[0].save(tmp_path / f"{name}.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "inner").mkdir()
    return tmp_path


class TestMain:
    def test_classify_prints_the_models_probability_of_each_name_the_likeliest_first(
            self, run, pictures):
        names = ["a red circle", "a <eos> star", "猫"]
        status, out, err = command("clip.py", run, "classify", "red.png", *names)
        assert (status, err) == (0, "")
        shares, printed = zip(*(line.split("%  ") for line in out.splitlines()))
        trained = clip.from_pretrained(run)
        image = trained.encode_images([Image.open("red.png")])
        cosines = image @ trained.model.encode_text(trained.ids(names)).T
        want = (trained.model.logit_scale.exp() * cosines)[0].softmax(dim=0)
        best = want.argsort(descending=True)
        assert list(printed) == [names[i] for i in best]
        assert_close("shares", [float(x) / 100 for x in shares], want[best], tolerance=6e-5)

    def test_search_prints_and_draws_the_best(self, run, pictures):
        status, out, err = command("clip.py", run, "search", "a red circle", ".")
        assert status == 0 and err.startswith("passed over 1 of 4 files")
        *lines, last = out.splitlines()
        assert last == f"drawn in {run / 'search.png'}"
        cosines = [float(line.split()[0]) for line in lines]
        assert len(cosines) == 3 and 1 >= cosines[0] >= cosines[1] >= cosines[2] >= -1
        colours = {colour for _, colour in Image.open(run / "search.png").getcolors(100000)}
        assert colours >= {(255, 0, 0), (0, 0, 255), (0, 128, 0)}
        (run / "search.png").unlink()

    def test_a_resnet_is_trained_resumed_measured_and_used(self, pictures):
        flags = [*TOY, "--out", "resnet", "--set", "vision_width=4", "--set", "vision_heads=2",
                 "--steps", "2"]
        stages = ["--set", "stages=1,1,2,1"]
        assert command("train.py", *flags, *stages)[0] == 0
        for flag in ("--resume", "--eval_only"):
            status, out, err = command("train.py", *flags, *stages, flag)
            assert status == 0 and "resumed from step 2\n" in out, err
        assert "stages=[1, 1, 2, 1] (now [])" in mistake("train.py", *flags, "--resume")
        config = clip.from_pretrained("resnet").model.config
        assert config == clip.CLIPConfig(**read_json("resnet/config.json")["config"])
        assert config.stages == (1, 1, 2, 1)
        assert command("clip.py", "resnet", "classify", "red.png", "a red ring", "x")[0] == 0

    def test_the_help_explains_the_commands(self):
        status, out, _ = command("clip.py", "--help")
        assert status == 0 and clip.__doc__.splitlines()[0] in out
        for words in ("classify", "search", "print the probability of each NAME", "RUN"):
            assert words in out

    @pytest.mark.parametrize("argv, words", [
        ("", "RUN"), ("{run}", "COMMAND"), ("{run} sing", "'sing'"),
        ("{run} classify red.png", "NAME"),
        ("{run} classify nothing.png x", "nothing.png: no such picture"),
        ("{run} classify notes.txt x", "notes.txt: not a readable picture"),
        ("{run} classify inner x", "inner: a folder, not a picture"),
        ("{run} search red inner", "inner: no pictures in it"),
        ("{run} search red nothing", "nothing: no such folder"),
        ("nowhere classify red.png x", "nowhere")])
    def test_a_mistake_is_told_in_one_line_and_nothing_is_drawn(self, run, pictures, argv, words):
        assert words in mistake("clip.py", *argv.format(run=run).split())
        assert not (run / "search.png").exists() and not Path("search.png").exists()

    @pytest.mark.parametrize("parts, words", [
        ({"model": "blip"}, "a run of 'blip', not of 'clip'"),
        ({"config": {"wings": 2}}, "'wings'"),
        ({"config": {}}, "weights of another model or config")])
    def test_a_run_that_does_not_fit_is_told_in_one_line(self, run, pictures, parts, words):
        for name in ("last.pt", "tokenizer.model"):
            (pictures / name).write_bytes((run / name).read_bytes())
        Path("config.json").write_text(json.dumps(read_json(run / "config.json") | parts))
        assert words in mistake("clip.py", ".", "classify", "red.png", "a red circle")
