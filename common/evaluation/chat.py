"""Talking about a picture in the terminal: one question, or a conversation.

For a model with `prompt_batch`, `encode_images`, `embed`, `logits`, stop_ids, stop_string and
config.context_length, as LLaVA has.
"""
import contextlib

import torch

from common.data.images import open_image
from common.generation import stream
from common.training import options

HELP = 'a line is a question; "/show PICTURE" begins anew; Ctrl-C stops an answer; Ctrl-D ends'


class Chat:
    """A conversation about a picture, which is encoded once."""

    def __init__(self, model, tokenizer, max_new_tokens=128):
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.picture, self.turns, self.features = None, [], None

    def show(self, path):
        """Begin anew with the picture in a file. ValueError for an unreadable one: the conversation
        goes on."""
        self.picture, self.turns, self.features = open_image(path), [], None

    @torch.no_grad()
    def reply(self, question):
        """Yield the answer to a question, piece by piece; what is broken off stays in the turns.

        Raises ValueError without a picture, and for a conversation longer than the context.
        """
        if self.picture is None:
            raise ValueError("no picture yet: /show PICTURE")
        images = [] if self.turns else [[self.picture]]
        turn = {"images": images, "prompt": question, "answer": ""}
        batch = self.model.prompt_batch([{"turns": [*self.turns, turn]}], self.tokenizer)
        if self.features is None:
            self.features = self.model.encode_images(batch["images"])
        x = self.model.embed(batch["ids"], batch["feature_index"], self.features)
        ids, stop = [], self.model.stop_string
        try:
            for token in stream(self.model.logits, x, max_new_tokens=self.max_new_tokens,
                                stop=self.model.stop_ids,
                                context_length=self.model.config.context_length):
                ids.append(token)
                whole = self.tokenizer.decode(ids)
                text, ended, _ = whole.partition(stop) if stop else (whole, "", "")
                piece = (text if ended else settled(text, stop))[len(turn["answer"]):]
                turn["answer"] += piece
                yield piece
                if ended:
                    return
            piece = whole[len(turn["answer"]):]
            turn["answer"] += piece
            yield piece
        finally:
            if ids:                      # else nothing was asked: too long, or stopped before
                turn["answer"] = turn["answer"].strip() or "..."      # an empty one is refused
                self.turns.append(turn)


def settled(text, stop):
    """The part of a text that later tokens cannot change: without half a character or half of
    `stop` at its end."""
    text = text.rstrip("\ufffd")
    half = next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
    return text[:len(text) - half]


def write(pieces):
    """Print pieces as they come, then end the line."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print()


def talk(chat, picture, read=input):
    """Read questions and print answers until the input ends; a mistake costs one line."""
    line = f"/show {picture}"
    while True:
        try:
            if line.split()[:1] == ["/show"]:
                chat.show(line.strip().removeprefix("/show").strip())
                print(HELP)
            elif line.strip():
                with contextlib.closing(chat.reply(line.strip())) as pieces:
                    write(pieces)
        except (ValueError, OSError) as error:
            print("error:", error)
        except KeyboardInterrupt:        # stops an answer
            print("stopped")
        try:
            line = read("> ")
        except UnicodeDecodeError:
            print("error: a line that is no UTF-8")
            line = ""
        except (EOFError, KeyboardInterrupt):
            print()
            return


def main(description, from_pretrained):
    """The command line of a model that talks: ask and chat."""
    def ask(run, picture, question):
        """answer a question about a picture"""
        one = Chat(*from_pretrained(run))
        one.show(picture)
        write(one.reply(question))

    def chat(run, picture):
        """talk about a picture: each line is a question"""
        talk(Chat(*from_pretrained(run)), picture)

    return options.run_command(description, ask, chat)
