"""The shapes world: endless pictures of coloured shapes with exact texts, nothing to download.

    scene.py          sampling and drawing            words.py      phrases, sentences, truth
    captions.py       captions that are not true      questions.py  questions, yes-no probes
    interleaved.py    pages, episodes, clips          grounding.py  boxes, letters to be read
    conversations.py  dialogues, teachers' texts      texts.py      for language models
    world.py          class Shapes: all of it as a source of records

A picture with captions is {"images": [picture], "texts": [...], "source": Scene}. Every other
record is {"turns": [{"images": [[frame, ...], ...], "prompt": str, "answer": str}, ...],
"source": ...}. "images" are a turn's pictures or clips, each a list of frames; [] if it has none.
A turn with "learn": False is context: the loss does not count its answer. "candidates" are the
possible answers to the last turn.
"""
from common.data.shapes.world import Shapes  # noqa: F401
