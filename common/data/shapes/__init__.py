"""The shapes world: endless pictures of coloured shapes with exact captions and questions."""
from common.data.shapes.world import Shapes  # noqa: F401
