"""Write the pictures of a world as PNG files.

    python -m common.data shapes FOLDER      100 unseen pictures
    python -m common.data emoji FOLDER       all pictures
"""
import sys
from pathlib import Path

from common.data.batches import WORLDS


def main(arguments):
    """Write the pictures of the world that the arguments name."""
    if len(arguments) != 2 or arguments[0] not in WORLDS:
        sys.exit(f"usage: python -m common.data {'|'.join(WORLDS)} FOLDER")
    world, folder = WORLDS[arguments[0]](image_size=96), Path(arguments[1])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for count, (name, picture) in enumerate(world.named_pictures(), 1):
            picture.save(folder / name)
    except OSError as error:
        sys.exit(f"cannot write to {folder}: {error.strerror}")
    print(f"{count} pictures in {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
