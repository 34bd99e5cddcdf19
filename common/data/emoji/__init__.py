"""The emoji world: real pictures with real names, shipped in emoji.zip."""
from common.data.emoji.world import Emoji  # noqa: F401
