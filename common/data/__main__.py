"""Write the pictures of a world as PNG files.

    python -m common.data shapes FOLDER      100 unseen pictures
    python -m common.data emoji FOLDER       all pictures
"""
import sys

from common.data.emoji import Emoji
from common.data.shapes import Shapes

WORLDS = {"shapes": lambda: Shapes(image_size=96), "emoji": Emoji}


def main(arguments):
    """Write the pictures of the world that the arguments name."""
    if len(arguments) != 2 or arguments[0] not in WORLDS:
        sys.exit(f"usage: python -m common.data {'|'.join(WORLDS)} FOLDER")
    world, folder = arguments
    try:
        print(f"{WORLDS[world]().extract(folder)} pictures in {folder}")
    except OSError as error:
        sys.exit(f"cannot write to {folder}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
