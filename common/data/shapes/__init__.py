"""The shapes world: endless pictures of coloured shapes with exact texts, nothing to download.

A picture with captions is {"images": [picture], "texts": [...], "source": Scene}. Every other
record is {"turns": [{"images": [[frame, ...], ...], "prompt": str, "answer": str}, ...],
"source": ...}. "images" are a turn's pictures or clips, each a list of frames; [] if it has none.
A turn with "learn": False is context: the loss does not count its answer. "candidates" are the
possible answers to the last turn.
"""
from common.data.shapes.world import Shapes  # noqa: F401
