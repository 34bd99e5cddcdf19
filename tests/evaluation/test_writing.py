"""The Writer of any model that writes, its sheet and its commands, on toy models."""
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
from common.evaluation.questions import draw_tasks
from common.evaluation.writing import Writer, read_support, samples
from common.prompts import collate
from common.training import options
from tests.helpers import Words, drawing, page, toy_lm

CAPTION = {"images": drawing("green"), "texts": [""]}
RECORDS = [page(("red", "", "a red cat"), ("blue", "what is this ?", "")), CAPTION,
           page(("blue", "", "cat"), ("white", "", "dog"), ("red", "what ?", ""))]
CANDIDATES = [["cat", "a red dog"], ["blue cat", "dog"], ["red", "a blue blue dog"]]


class Toy:
    """A random language model whose embeddings depend on the last image, too."""

    stop_ids, banned_ids = (EOC, EOS), (IMAGE,)

    def __init__(self):
        self.lm = toy_lm(vocab_size=28)
        self.config = self.lm.config
        self.lm.output.weight.data[:16] *= 0.4       # words are likelier than special tokens,
        self.lm.pos_embed.weight.data *= 5           # and texts do not repeat one word
        self.shift = torch.randn(3, 24, dtype=torch.float64)

    def prepare(self, records, tokenizer):
        rows, colours = [], []
        for record in records:
            *shots, last = as_turns(record)
            ids = [BOS]
            for shot in shots:
                ids += [*tokenizer.encode(f"{shot['prompt']} {shot['answer']}"), EOC]
            ids += tokenizer.encode(last["prompt"] or "output:")
            rows.append((ids, ids))
            colours.append(last["images"][0][0].getpixel((0, 0)))
        batch = collate(rows, side="left")
        visual = torch.tensor(colours).double() / 255 @ self.shift    # (B, D)
        return batch["ids"], batch["mask"], {"visual": visual[:, None]}

    def logits(self, x, mask=None, cache=None, last=False, *, visual):
        return self.lm(self.lm.embed(x) + visual, mask, cache, last)


class Follows(Toy):
    """After each word comes the one of a table, else "dog"."""

    def __init__(self, table):
        super().__init__()
        ids = Words().encode
        self.table = {ids(a)[0]: ids(b)[0] if isinstance(b, str) else b for a, b in table.items()}

    def logits(self, x, mask=None, cache=None, last=False, *, visual):
        dog, = Words().encode("dog")
        follow = torch.tensor([[self.table.get(i, dog) for i in row] for row in x.tolist()])
        return 50 * F.one_hot(follow[:, -1:] if last else follow, 28).double()


@pytest.fixture
def writer():
    return Writer(Toy(), Words())


class TestGenerate:
    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_an_answer_ends_with_the_first_stop_id(self, num_beams):
        for end in (EOC, EOS):
            writer = Writer(Follows({"output:": "cat", "cat": end}), Words())
            texts = writer.generate([CAPTION], max_new_tokens=9, num_beams=num_beams)
            assert texts == ["cat"]

    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_records_together_are_written_as_alone(self, writer, num_beams):
        together = writer.generate(RECORDS, max_new_tokens=6, num_beams=num_beams)
        assert len(set(together)) == 3
        assert together == [writer.generate([r], max_new_tokens=6, num_beams=num_beams)[0]
                            for r in RECORDS]
        assert together == writer.generate(RECORDS, max_new_tokens=6, num_beams=num_beams,
                                           batch_size=2)

    def test_it_writes_the_likeliest_token_that_is_not_banned_up_to_the_end(self, writer):
        model, texts, banned = writer.model, [], 0
        model.lm.output.weight.data[IMAGE] *= 5
        for record in RECORDS:
            ids, mask, state = model.prepare([record], Words())
            written = []
            for _ in range(7):
                logits = model.logits(ids, **state)[0, -1]
                banned += logits.argmax().item() == IMAGE
                logits[IMAGE] = -math.inf
                ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
                if ids[0, -1] in (EOC, EOS):
                    break
                written.append(ids[0, -1].item())
            texts.append(Words().decode(written))
        assert writer.generate(RECORDS, max_new_tokens=7) == texts and banned > 3

    def test_options_are_those_of_generate(self, writer):
        draws = [writer.generate(RECORDS, temperature=5.0, max_new_tokens=5,
                                 generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
        assert draws[0] != draws[1]

    def test_a_prompt_beyond_the_context_is_refused(self, writer):
        long = page(("red", "a " * 17, ""))
        with pytest.raises(ValueError, match="a prompt of 18 tokens and 7 new ones are 25, but the "
                                             "context is 23"):
            writer.generate([long], max_new_tokens=7)


class TestScoreCandidates:
    def scores(self, model, record, texts):
        """By a loop, without cache, mask and batch."""
        ids, _, state = model.prepare([record], Words())
        found = []
        for text in texts:
            new = Words().encode(text) + [EOC]
            logits = model.logits(torch.cat([ids, torch.tensor([new])], dim=1), **state)[0]
            logits[:, IMAGE] = -math.inf
            logs = logits.log_softmax(-1)
            found.append(sum(logs[ids.shape[1] + i - 1, t].item() for i, t in enumerate(new)))
        return found

    def test_they_are_log_probabilities_with_the_end_and_without_banned_ids(self, writer):
        writer.model.lm.output.weight.data[IMAGE] *= 5
        scores = writer.score_candidates(RECORDS, CANDIDATES)
        for record, texts, own in zip(RECORDS, CANDIDATES, scores, strict=True):
            assert own.tolist() == pytest.approx(self.scores(writer.model, record, texts))

    def test_records_together_are_scored_as_alone(self, writer):
        together = torch.stack(writer.score_candidates(RECORDS, CANDIDATES))
        for own in (torch.stack(writer.score_candidates(RECORDS, CANDIDATES, batch_size=2)),
                    torch.cat([torch.stack(writer.score_candidates([r], [c]))
                               for r, c in zip(RECORDS, CANDIDATES)])):
            torch.testing.assert_close(own, together)

    def test_an_answer_that_would_go_on_is_not_the_likeliest(self):
        writer = Writer(Follows({"output:": "cat", "cat": "dog", "dog": EOC}), Words())
        assert writer.choose([CAPTION], [["cat", "cat dog"]]) == ["cat dog"]

    def test_candidates_follow_the_prompt_after_a_space(self, writer):
        class Spaced(Words):
            def encode(self, text):
                assert text == " cat"
                return super().encode(text)
        tokenizer, prepared = writer.tokenizer, writer.model.prepare([CAPTION], Words())
        writer.tokenizer, writer.model.prepare = Spaced(), lambda records, tokenizer: prepared
        scores, = writer.score_candidates([CAPTION], [["cat"]])
        writer.tokenizer = tokenizer
        assert torch.equal(scores, writer.score_candidates([CAPTION], [["cat"]])[0])

    def test_choose_takes_the_best(self, writer):
        scores = writer.score_candidates(RECORDS, CANDIDATES)
        want = [texts[own.argmax()] for texts, own in zip(CANDIDATES, scores)]
        assert writer.choose(RECORDS, CANDIDATES) == want
        assert writer.choose(RECORDS, [texts[::-1] for texts in CANDIDATES]) == want

    def test_candidates_beyond_the_context_are_refused(self, writer):
        with pytest.raises(ValueError, match="a prompt of 22 tokens and 3 of a candidate are 25, "
                                             "but the context is 23"):
            writer.choose([page(("red", "a " * 21, ""))], [["cat", "a dog"]])


class TestSamples:
    """Captions of test images; episodes where the world has them."""
    green, red = (20, 150, 60), (210, 40, 40)

    class Knows:
        """Writes true captions or false ones, and chooses the right label or the wrong one."""

        def __init__(self, right):
            self.right = right

        def generate(self, records):
            return [r["texts"][0] if self.right else "a photo of nothing" for r in records]

        def choose(self, records, candidates):
            answers = [record["turns"][-1]["answer"] for record in records]
            assert all(set(own) >= {answer} for own, answer in zip(candidates, answers))
            return [next(c for c in own if (c == answer) == self.right)
                    for own, answer in zip(candidates, answers)]

    def sheet(self, right, world):
        data = SimpleNamespace(world=world, records=lambda split: [
            world.record(split, i) for i in range(4)])
        return samples(self.Knows(right), data, count=2)

    @pytest.mark.parametrize("tasks", [(), Shapes.tasks])
    def test_right_and_wrong_answers_are_marked(self, tasks):
        class World(Shapes):
            pass
        World.tasks = tasks
        for right, colour, other in ((True, self.green, self.red), (False, self.red, self.green)):
            page = self.sheet(right, World(image_size=16))
            counts = {value: n for n, value in page.getcolors(1 << 20)}
            assert counts[colour] > 300 and counts.get(other, 0) < 30

    def test_episodes_show_their_shots(self):
        world = Shapes(image_size=16)
        plain = self.sheet(True, world).height
        world.tasks = ()
        assert plain > 1.8 * self.sheet(True, world).height
        assert len(draw_tasks(Shapes(image_size=16), "episode", 1, shots=4)[0]["turns"]) == 5


class TestReadSupport:
    LINES = [{"image": "red.png", "question": "is it red?", "answer": "yes"},
             {"image": "film.gif", "question": "what?", "answer": "a film"}]

    @pytest.fixture
    def support(self, tmp_path):
        red, blue = drawing("red", "blue", size=20)
        red.save(tmp_path / "red.png")
        red.save(tmp_path / "film.gif", save_all=True, append_images=[blue])

        def write(lines):
            path = tmp_path / "shots.jsonl"
            path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line)
                                      for line in lines))
            return path
        return write

    def test_images_are_looked_for_beside_the_file(self, support, tmp_path, monkeypatch):
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        for name in ("red.png", "film.gif"):
            drawing("green")[0].save(name)
        records = read_support(support(self.LINES))
        turns = [turn for record in records for turn in record["turns"]]
        assert [(t["prompt"], t["answer"]) for t in turns] == [("is it red?", "yes"),
                                                               ("what?", "a film")]
        assert [len(t["images"][0]) for t in turns] == [1, 2]
        assert turns[0]["images"][0][0].getpixel((0, 0)) == (255, 0, 0)

    @pytest.mark.parametrize("line, words", [
        ("{", "line 2: "), ("[1]", "line 2: "),
        ('{"image": "red.png", "question": "what?"}',
         "line 2: image, question and answer were expected"),
        ('{"image": 3, "question": "what?", "answer": "a"}', "line 2: image, question and answer"),
        ('{"image": "none.png", "question": "what?", "answer": "a"}', "none.png: no such picture")])
    def test_a_broken_line_is_refused_in_one_line(self, support, line, words):
        with pytest.raises(ValueError, match=words) as caught:
            read_support(support([self.LINES[0], line]))
        assert "\n" not in str(caught.value)


class TestMain:
    @pytest.fixture
    def call(self, tmp_path, monkeypatch, capsys):
        """call(*argv) -> (what is printed, the records and options of generate, the writer)."""
        red, blue = drawing("red", "blue", size=20)
        red.save(tmp_path / "red.png"), blue.save(tmp_path / "blue.png")
        red.save(tmp_path / "film.gif", save_all=True, append_images=[blue, red])
        (tmp_path / "shots.jsonl").write_text("".join(json.dumps(
            {"image": "blue.png", "question": f"is it {i}?", "answer": str(i)}) + "\n"
            for i in range(5)))
        monkeypatch.chdir(tmp_path)

        class Notes:
            def __init__(self, run):
                assert run == "RUN"
                self.model = self

            def select_shots(self, queries, support, count):
                assert [len(frames) for frames in queries] == [1]
                return [support[-count:]]

            def generate(self, records, **how):
                self.asked = records, how
                made.append(self)
                return ["yes"]
        made = []

        def call(*argv):
            monkeypatch.setattr(sys, "argv", ["model.py", "RUN", *argv])
            with pytest.raises(SystemExit) as caught:
                options.run_main(lambda: writing.main("about", Notes))
            out = capsys.readouterr()
            assert not caught.value.code, out.err
            return out.out, *made[-1].asked
        return call

    def test_caption(self, call):
        for name, frames in (("red.png", 1), ("film.gif", 3)):
            out, (record,), how = call("caption", name)
            assert out == "yes\n" and how == {"num_beams": 3}
            (turn,) = record["turns"]
            assert (turn["caption"], turn["answer"]) == (True, "") and len(turn["images"]) == 1
            assert len(turn["images"][0]) == frames

    def test_answer_after_shots(self, call):
        out, (record,), how = call("answer", "red.png", "is it red?", "--shot", "blue.png",
                                   "is it blue?", "yes", "--shot", "red.png", "and this?", "no")
        assert out == "yes\n" and how == {"num_beams": 3}
        assert [(t["prompt"], t["answer"]) for t in record["turns"]] == [
            ("is it blue?", "yes"), ("and this?", "no"), ("is it red?", "")]
        assert [t["images"][0][0].getpixel((0, 0)) for t in record["turns"]] == [
            (0, 0, 255), (255, 0, 0), (255, 0, 0)]

    @pytest.mark.parametrize("flags, numbers", [([], "1234"), (["--shots", "2"], "34")])
    def test_answer_after_retrieved_shots(self, call, flags, numbers):
        _, (record,), _ = call("answer", "red.png", "what?", "--support", "shots.jsonl", *flags)
        assert "".join(turn["answer"] for turn in record["turns"][:-1]) == numbers
        assert record["turns"][-1]["prompt"] == "what?"
