"""Write the pictures of a world as PNG files.

    python -m common.data shapes FOLDER      100 unseen pictures
    python -m common.data emoji FOLDER       all pictures
"""
from pathlib import Path

from common.data.batches import WORLDS
from common.training.options import parser, run_main


def main(arguments=None):
    """Write the pictures of the world that the arguments name."""
    args = parser(__doc__, prog="python -m common.data")
    args.add_argument("world", choices=WORLDS)
    args.add_argument("folder", type=Path)
    args = args.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    for count, (name, picture) in enumerate(WORLDS[args.world](image_size=96).named_pictures(), 1):
        picture.save(args.folder / name)
    print(f"{count} pictures in {args.folder}")


if __name__ == "__main__":
    run_main(main)
