"""The Writer of any model that writes, also of a Flamingo; its sheet, its shots, its commands."""
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from common.data.collators import as_turns
from common.data.shapes.world import Shapes
from common.data.tokenizer import BOS, EOC, EOS, IMAGE
from common.evaluation import writing
from common.evaluation.writing import Writer, answers, read_support, samples
from common.prompts import collate
from common.training import options
from tests.fuzz import one_line
from tests.helpers import Words, assert_close, drawing, page, toy_flamingo, toy_lm

CANDIDATES = [["cat", "a red dog"], ["blue cat", "dog"], ["red", "a blue blue dog"]]


def caption():
    return {"images": drawing("green"), "texts": [""]}


@pytest.fixture
def records():
    return [page(("red", "", "a red cat"), ("blue", "what is this ?", "")), caption(),
            page(("blue", "", "cat"), ("white", "", "dog"), ("red", "what ?", ""))]


class Toy:
    """A random language model whose embeddings depend on the last image, too."""
    stop_ids, banned_ids = (EOC, EOS), (IMAGE,)

    def __init__(self):
        self.lm = toy_lm(vocab_size=28)
        self.config = self.lm.config
        self.lm.output.weight.data[:16] *= 0.4       # words are likelier than special tokens,
        self.lm.output.weight.data[IMAGE] *= 5       # but for <image>,
        self.lm.pos_embed.weight.data *= 5           # and texts do not repeat one word
        self.shift = torch.randn(3, 24, dtype=torch.float64)

    def prepare(self, records, tokenizer):
        rows, colours, encode = [], [], Words().encode
        for *shots, last in map(as_turns, records):
            said = [[*encode(f"{shot['prompt']} {shot['answer']}"), EOC] for shot in shots]
            rows.append([BOS, *sum(said, []), *encode(last["prompt"] or "output:")])
            colours.append(last["images"][0][0].getpixel((0, 0)))
        batch = collate([(ids, ids) for ids in rows], side="left")
        visual = torch.tensor(colours).double() / 255 @ self.shift    # (B, D)
        return batch["ids"], batch["mask"], {"visual": visual[:, None]}

    def logits(self, x, mask=None, cache=None, last=False, *, visual):
        return self.lm(self.lm.embed(x) + visual, mask, cache, last)


class Follows(Toy):
    """After "output:" comes "cat", then what a table says, else "dog"."""

    def __init__(self, **table):
        super().__init__()
        self.output, self.cat, self.dog = Words().encode("output: cat dog")
        self.table = {self.output: self.cat} | {getattr(self, a): b for a, b in table.items()}

    def logits(self, x, mask=None, cache=None, last=False, *, visual):
        follow = torch.tensor([[self.table.get(i, self.dog) for i in row] for row in x.tolist()])
        return 50 * F.one_hot(follow[:, -1:] if last else follow, 28).double()


@pytest.fixture(params=["toy", "flamingo", "flamingo with all images"])
def writer(request):
    if request.param == "toy":
        return Writer(Toy(), Words())
    model = toy_flamingo(only_latest_image=request.param == "flamingo")
    model.lm.new.rows.data[0] *= 30                  # <image> is often the likeliest
    return Writer(model, Words())


def next_logits(model, record, new):
    """Logits (T, V) after a record's prompt and new ids, without <image>, and the likeliest id."""
    ids, _, state = model.prepare([record], Words())
    logits = model.logits(torch.cat([ids, torch.tensor([new]).long()], dim=1), **state)[0]
    likeliest = logits[-1].argmax().item()
    logits[:, IMAGE] = -math.inf
    return logits[ids.shape[1] - 1:], likeliest


class TestWriter:
    def test_it_writes_the_likeliest_token_that_is_not_banned_up_to_the_end(self, writer, records):
        texts, banned = [], 0
        for record in records:
            written = []
            while len(written) < 7:
                logits, likeliest = next_logits(writer.model, record, written)
                banned += likeliest == IMAGE
                if logits[-1].argmax().item() in (EOC, EOS):
                    break
                written.append(logits[-1].argmax().item())
            texts.append(Words().decode(written).strip())
        assert writer.generate(records, max_new_tokens=7) == texts and banned > 3

    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_records_together_are_written_as_alone(self, writer, records, num_beams):
        how = {"max_new_tokens": 6, "num_beams": num_beams}
        together = writer.generate(records, **how)
        assert len(set(together)) > 1
        assert together == [writer.generate([record], **how)[0] for record in records]
        assert together == writer.generate(records, **how, batch_size=2)

    @pytest.mark.parametrize("end", [EOC, EOS])
    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_a_text_ends_with_either_stop_id_and_without_blanks(self, end, num_beams):
        writer = Writer(Follows(cat=end), Words())
        writer.tokenizer.decode = lambda ids: f" {Words().decode(ids)} "
        assert writer.generate([caption()], max_new_tokens=9, num_beams=num_beams) == ["cat"]
        assert writer.generate([], num_beams=num_beams) == []

    @pytest.mark.parametrize("written, text", [
        (" red. question: what", "red"), ("red. question", "red"), ("red.", "red."),
        ("there are two. one is red.", "there are two. one is red."), ("a question", "a question")])
    def test_another_question_is_not_of_the_text(self, written, text):
        writer = Writer(Follows(cat=EOC), Words())
        writer.tokenizer.decode = lambda ids: written
        assert writer.generate([caption()], max_new_tokens=9) == [text]

    @pytest.mark.parametrize("end, text", [
        ("dog", "cat"), ("", "cat dog"), ("no", "cat dog. question: dog dog")])
    def test_a_text_ends_before_the_models_stop_string(self, end, text):
        model = Follows()
        model.stop_string, model.calls = end, []
        logits = model.logits
        model.logits = lambda *inputs, **more: model.calls.append(1) or logits(*inputs, **more)
        writer = Writer(model, Words())
        writer.tokenizer.decode = lambda ids: Words().decode(ids).replace("cat dog dog",
                                                                          "cat dog. question: dog")
        assert writer.generate([caption()], max_new_tokens=4) == [text]
        assert len(model.calls) == (2 if end == "dog" else 4), "it is asked on"

    def test_options_are_those_of_generate(self, writer, records):
        draws = [writer.generate(records, temperature=5.0, max_new_tokens=5,
                                 generator=torch.Generator().manual_seed(seed))
                 for seed in (0, 1, 0)]
        assert draws[0] == draws[2] != draws[1]

    def test_log_probabilities_of_candidates_hold_their_end_and_no_banned_id(self, writer, records):
        want = []
        for record, texts in zip(records, CANDIDATES):
            for text in texts:
                new = Words().encode(text) + [EOC]
                logs = next_logits(writer.model, record, new)[0].log_softmax(-1)
                want.append(sum(logs[t, token].item() for t, token in enumerate(new)))
        want = torch.tensor(want, dtype=torch.float64).view(3, 2)
        for batch_size in (256, 2, 1):                   # together, in parts, alone
            scores = writer.score_candidates(records, CANDIDATES, batch_size=batch_size)
            assert_close("log p (records, candidates)", torch.stack(scores), want, 1e-6)
        best = [texts[i] for texts, i in zip(CANDIDATES, want.argmax(dim=1))]
        for candidates in (CANDIDATES, [texts[::-1] for texts in CANDIDATES]):
            assert writer.choose(records, candidates) == best

    def test_an_answer_that_would_go_on_is_not_the_likeliest(self):
        writer = Writer(Follows(dog=EOC), Words())
        assert writer.choose([caption()], [["cat", "cat dog"]]) == ["cat dog"]

    def test_candidates_follow_the_prompt_after_a_space(self):
        class Spaced(Words):
            def encode(self, text):
                return super().encode(text if text[0] == " " else "dog")
        spaced, plain = (Writer(Toy(), tokenizer).score_candidates([caption()], [["cat"]])[0]
                         for tokenizer in (Spaced(), Words()))
        assert_close("log p", spaced, plain)

    def test_a_prompt_or_candidates_beyond_the_context_are_refused(self):
        writer = Writer(Toy(), Words())
        with one_line("18 tokens .* 7 new .* 25, .* 23"):
            writer.generate([page(("red", "a " * 17, ""))], max_new_tokens=7)
        with one_line("22 tokens .* 3 of a candidate .* 25, .* 23"):
            writer.choose([page(("red", "a " * 21, ""))], [["cat", "a dog"]])


class Knows:
    """Writes true captions or false ones, and chooses the right label or the wrong one."""

    def __init__(self, right):
        self.right = right

    def generate(self, records):
        return [r["texts"][0] if self.right else "a photo of nothing" for r in records]

    def choose(self, records, candidates):
        return [next(c for c in own if (c == record["turns"][-1]["answer"]) == self.right)
                for own, record in zip(candidates, records)]


class TestSamples:
    @pytest.mark.parametrize("right, colour, other", [
        (True, (20, 150, 60), (210, 40, 40)), (False, (210, 40, 40), (20, 150, 60))])
    def test_answers_are_marked_and_episodes_show_their_shots(self, right, colour, other):
        def sheet(*tasks, records=4, **flags):
            world = Shapes(image_size=16)
            world.tasks = tasks
            data = SimpleNamespace(world=world, records=lambda split: [
                world.record(split, i) for i in range(records)])
            return samples(Knows(right), data, count=2, **flags)
        plain, more = sheet(), sheet("episode")
        for made in (plain, more):
            counts = {value: n for n, value in made.getcolors(1 << 20)}
            assert counts[colour] > 300 and counts.get(other, 0) < 30
        assert plain.height == sheet(records=2).height           # of the first two
        assert plain.height == sheet("episode", shots=False).height
        assert more.height > 1.8 * plain.height
        assert len(more.getcolors(1 << 20)) > 2 * len(plain.getcolors(1 << 20))


class TestAnswers:
    @pytest.mark.parametrize("right, colour", [(True, (20, 150, 60)), (False, (210, 40, 40))])
    def test_questions_stand_beside_their_picture_and_the_marked_answer(self, right, colour):
        asked, world = [], Shapes(image_size=16)

        def generate(records, max_new_tokens):
            asked.extend(records)
            return [r["turns"][0]["answer"] if right else "nothing" for r in records]
        heights = []
        for count in (2, 5):
            page = answers(SimpleNamespace(generate=generate), SimpleNamespace(world=world), count)
            found = {colour for _, colour in page.getcolors(1 << 20)}
            assert found & {(20, 150, 60), (210, 40, 40)} == {colour}
            heights.append(page.height)
        assert len(asked) == 7 and heights[1] > 2 * heights[0]
        assert asked[:2] == asked[2:4], "the questions are the same in every evaluation"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder above the current one: pictures, a clip of three frames, a file of five shots."""
    red, blue = drawing("red", "blue", size=20)
    red.save(tmp_path / "red.png"), blue.save(tmp_path / "blue.png")
    red.save(tmp_path / "film.gif", save_all=True, append_images=[blue, red])
    (tmp_path / "shots.jsonl").write_text("".join(json.dumps(
        {"image": "blue.png", "question": f"is it {i}?", "answer": str(i)}) + "\n"
        for i in range(5)))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


class TestReadSupport:
    def test_images_are_looked_for_beside_the_file(self, folder):
        (folder / "shots.jsonl").write_text(
            '{"image": "red.png", "question": "is it red?", "answer": "yes"}\n'
            '{"image": "film.gif", "question": "what?", "answer": "a film"}')
        one, two = (turn for record in read_support("../shots.jsonl") for turn in record["turns"])
        assert (one["prompt"], one["answer"]) == ("is it red?", "yes")
        assert (two["prompt"], two["answer"]) == ("what?", "a film")
        assert [len(turn["images"][0]) for turn in (one, two)] == [1, 3]
        assert one["images"][0][0].getpixel((0, 0)) == (255, 0, 0)

    @pytest.mark.parametrize("line, words", [
        ("{", "line 6"), ("[1]", "line 6"), ('{"image": "red.png", "question": "?"}', "line 6.*an"),
        ('{"image": 3, "question": "?", "answer": "a"}', "line 6.*image"),
        ('{"image": "none.png", "question": "?", "answer": "a"}', "none.png")])
    def test_a_broken_line_is_refused_in_one_line(self, folder, line, words):
        with open("../shots.jsonl", "a") as file:
            file.write(line)
        with one_line(words):
            read_support("../shots.jsonl")


class TestMain:
    @pytest.fixture
    def call(self, folder, monkeypatch, capsys):
        """call(*argv) -> the turns that are written to; what is written is printed."""
        asked = []

        class Notes:
            def __init__(self, run):
                self.model, self.run = self, run

            def select_shots(self, queries, support, count):
                return [support[-count:] for _ in queries]

            def generate(self, records, **how):
                asked[:] = [record["turns"] for record in records]
                assert how["num_beams"] > 1
                return [f"yes of {self.run}"]

        def call(*argv):
            monkeypatch.setattr(sys, "argv", ["model.py", "RUN", *argv])
            with pytest.raises(SystemExit) as caught:
                options.run_main(lambda: writing.main("about", Notes))
            out = capsys.readouterr()
            assert not caught.value.code, out.err
            assert out.out == "yes of RUN\n"
            call.err = out.err
            return asked[0]
        return call

    @pytest.mark.parametrize("name, frames", [("red.png", 1), ("film.gif", 3)])
    def test_caption(self, call, name, frames):
        turn, = call("caption", f"../{name}")
        assert (turn["caption"], turn["answer"]) == (True, "")
        assert [len(own) for own in turn["images"]] == [frames]

    def test_a_folder_is_told_to_be_a_clip(self, call, folder):
        (folder / "frames").mkdir()
        for name in ("red.png", "blue.png"):
            (folder / name).rename(folder / "frames" / name)
        turn, = call("caption", "../frames")
        assert len(turn["images"][0]) == 2
        assert call.err == "../frames: taken as a clip of 2 frames\n"

    def test_answer_after_shots(self, call):
        turns = call("answer", "../red.png", "is it red?", "--shot", "../blue.png", "is it blue?",
                     "yes", "--shot", "../red.png", "and this?", "no")
        assert [(t["prompt"], t["answer"], t["images"][0][0].getpixel((0, 0))) for t in turns] == [
            ("is it blue?", "yes", (0, 0, 255)), ("and this?", "no", (255, 0, 0)),
            ("is it red?", "", (255, 0, 0))]

    @pytest.mark.parametrize("flags, answers", [
        ([], ["1", "2", "3", "4", ""]), (["--shots", "2"], ["3", "4", ""]),
        (["--shots", "1", "--shot", "../red.png", "?", "no"], ["no", "4", ""])])
    def test_answer_after_retrieved_shots(self, call, flags, answers):
        turns = call("answer", "../red.png", "what?", "--support", "../shots.jsonl", *flags)
        assert [turn["answer"] for turn in turns] == answers and turns[-1]["prompt"] == "what?"
