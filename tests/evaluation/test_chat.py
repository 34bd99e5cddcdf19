"""A conversation in the terminal: what is encoded once, what is streamed, what a mistake costs."""
import contextlib
from dataclasses import replace

import pytest

from common.evaluation import chat
from common.evaluation.chat import Chat, talk, write
from tests.helpers import AnyWords, drawing, llava_config, toy_llava

LONG = "x " * 200


class Says:
    """A toy LLaVA that writes what a script says, whatever is asked, and notes its calls."""

    def __init__(self, *pieces, stop=""):
        language = replace(llava_config().language, context_length=199)
        self.model, self.words = toy_llava(language=language), AnyWords()
        self.config, self.stop_ids, self.stop_string = self.model.config, (2,), stop
        self.encoded, self.prompts, self.script, self.said = [], [], list(pieces), 0
        self.embed = self.model.embed
        self.words.decode = lambda ids: "".join(self.script[i - 20] for i in ids if i != 2)

    def prompt_batch(self, records, tokenizer):
        self.prompts.append([(len(turn["images"]), turn["prompt"], turn["answer"])
                             for turn in records[0]["turns"]])
        return self.model.prompt_batch(records, tokenizer)

    def encode_images(self, images):
        self.encoded.append(tuple(images[0, :, 7, 7].tolist()))
        return self.model.encode_images(images)

    def logits(self, x, mask=None, cache=None, last=False):
        """Ids from 20 on are the pieces of the script, then an end."""
        out = self.model.logits(x, mask, cache, last)
        self.said = 0 if x.shape[1] > 1 else self.said + 1
        if self.said < len(self.script) and isinstance(self.script[self.said], type):
            raise self.script[self.said]
        out[:, -1] = 0
        out[:, -1, 20 + self.said if self.said < len(self.script) else 2] = 9
        return out


@pytest.fixture(autouse=True)
def pictures(tmp_path, monkeypatch):
    """The current folder: two pictures, and a file that is none."""
    monkeypatch.chdir(tmp_path)
    for name in ("red", "blue"):
        drawing(name)[0].save(f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")


def chat_with(*pieces, stop="", picture="red.png"):
    model = Says(*pieces, stop=stop)
    chat = Chat(model, model.words)
    if picture:
        chat.show(picture)
    return chat


def lines(*texts):
    """A reader of these lines, then of the end of the input; an exception is raised."""
    rest = iter(texts)

    def read(prompt):
        line = next(rest, EOFError)
        if isinstance(line, (type, Exception)):
            raise line
        return line
    return read


class TestChat:
    def test_the_picture_is_encoded_once_and_stands_in_the_first_turn(self):
        chat = chat_with("a", " dog")
        for question in ("what", "who", "x"):
            assert [piece for piece in chat.reply(question) if piece] == ["a", " dog"]
        assert chat.model.encoded == [(255, 0, 0)]
        assert chat.model.prompts[-1] == [(1, "what", "a dog"), (0, "who", "a dog"), (0, "x", "")]

    def test_another_picture_begins_anew_and_an_unreadable_one_changes_nothing(self):
        chat = chat_with("a")
        list(chat.reply("what"))
        with pytest.raises(ValueError, match="broken.png: not a readable picture"):
            chat.show("broken.png")
        list(chat.reply("who"))
        chat.show("blue.png")
        list(chat.reply("x"))
        assert chat.model.encoded == [(255, 0, 0), (0, 0, 255)]
        assert chat.model.prompts[1:] == [[(1, "what", "a"), (0, "who", "")], [(1, "x", "")]]

    @pytest.mark.parametrize("pieces, stop, answer", [
        (("a ", "red", " dog"), "", "a red dog"), (("no", "###", "x"), "###", "no"),
        (("no", "\n#", "##", "x"), "###", "no"), (("a", "b<e", "nd>c"), "<end>", "ab"),
        (("a", " #", "b"), "###", "a #b"), (("a", " ##"), "###", "a ##")])
    def test_the_pieces_are_the_answer_without_what_ends_it(self, pieces, stop, answer):
        chat = chat_with(*pieces, stop=stop)
        assert "".join(chat.reply("what")).strip() == answer
        assert chat.turns[-1]["answer"] == answer

    def test_half_a_character_is_not_shown(self):
        chat = chat_with("a", "", "")
        texts = ["a", "a\ufffd", "a\ufffd\ufffd", "a\u00e9"]
        chat.tokenizer.decode = lambda ids: texts[min(len(ids) - 1, 3)]
        assert "".join(chat.reply("what")) == "a\u00e9"

    def test_what_is_broken_off_stays(self):
        chat = chat_with("a", " red", " dog")
        with contextlib.closing(chat.reply("what")) as pieces:
            assert [next(pieces), next(pieces)] == ["a", " red"]
        assert chat.turns[-1]["answer"] == "a red"

    def test_an_answer_that_is_blank_is_no_empty_one(self):
        chat = chat_with(" ")
        list(chat.reply("what"))         # a template refuses a turn without an answer
        assert chat.turns[-1]["answer"].strip() and "".join(chat.reply("who")) == " "

    def test_it_writes_at_most_so_much_and_no_further_than_the_context(self):
        chat = chat_with(*["a"] * 40)
        chat.max_new_tokens, model = 7, chat.model
        assert "".join(chat.reply("what")) == "a" * 7
        model.config = replace(model.config, language=replace(model.config.language,
                                                              context_length=31))
        chat.show("red.png"), setattr(chat, "max_new_tokens", 99)
        prompt = len(model.prompt_batch([{"turns": [{"images": [[chat.picture]], "prompt": "what",
                                                     "answer": ""}]}], model.words)["ids"][0])
        assert prompt < 28 and "".join(chat.reply("what")) == "a" * (31 - prompt)

    def test_without_a_picture_there_is_no_answer(self):
        with pytest.raises(ValueError, match="no picture yet: /show PICTURE"):
            list(chat_with("a", picture=None).reply("what"))

    def test_a_question_that_is_too_long_is_no_turn(self):
        chat = chat_with("a")
        with pytest.raises(ValueError, match="context is 199"):
            list(chat.reply(LONG))
        assert "".join(chat.reply("what")) == "a"
        assert chat.model.prompts[-1] == [(1, "what", "")], "the picture, or the long question"


class TestWrite:
    def test_pieces_stand_in_one_line_which_ends_however_they_end(self, capsys):
        write(iter(["a", " dog"]))

        def broken():
            yield "a"
            raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            write(broken())
        assert capsys.readouterr().out == "a dog\na\n"


class TestTalk:
    def talk(self, chat, capsys, *texts, picture="red.png"):
        talk(chat, picture, lines(*texts))
        return capsys.readouterr().out.splitlines()

    def test_each_line_is_a_question_until_the_input_ends(self, capsys):
        found = self.talk(chat_with("a", " dog"), capsys, "what", "", "  ", " who ")
        assert found == [chat.HELP, "a dog", "a dog", ""]

    def test_an_unreadable_picture_costs_a_line(self, capsys):
        said = chat_with("a")
        found = self.talk(said, capsys, "what", "/show broken.png", "who", "/show blue.png", "x",
                          "/show none.png")
        assert [line.split(":")[0] for line in found] == [
            chat.HELP, "a", "error", "a", chat.HELP, "a", "error", ""]
        assert [len(turns) for turns in said.model.prompts] == [1, 2, 1]
        assert self.talk(chat_with("a"), capsys, "what", picture="none.png")[1] == "a"

    def test_a_line_of_other_bytes_costs_a_line(self, capsys):
        bad = UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "bad")
        found = self.talk(chat_with("a"), capsys, "what", bad, "who")
        assert found[1:] == ["a", "error: a line that is no UTF-8", "a", ""]

    def test_an_interrupt_stops_an_answer_and_the_conversation_goes_on(self, capsys):
        said = chat_with("a", " red", KeyboardInterrupt)
        found = self.talk(said, capsys, "what", "who")
        assert found == [chat.HELP, "a red", "stopped", "a red", "stopped", ""]
        assert said.model.prompts[-1] == [(1, "what", "a red"), (0, "who", "")]

    def test_an_interrupt_at_the_prompt_ends_it(self, capsys):
        assert self.talk(chat_with("a"), capsys, "what", KeyboardInterrupt, "who")[1:] == ["a", ""]

    def test_too_long_a_question_is_one_line(self, capsys):
        found = self.talk(chat_with("a"), capsys, LONG, "what")
        assert found[1] == "" and found[2].startswith("error: a prompt of 2"), f"{found}"
