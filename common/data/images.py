"""Pictures: opening files, crops, tensors."""
import functools
import io
import math
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from common.data.safe_read import open_regular, printable, read_bytes

MEAN = (0.48145466, 0.4578275, 0.40821073)            # CLIP's, also BLIP's and LLaVA's
STD = (0.26862954, 0.26130258, 0.27577711)
MOST_PIXELS = 64_000_000                              # more in a small file is a decompression bomb
MOST_BYTES = 100_000_000                              # of a picture's file
MOST_FRAMES = 1_000                                   # of a clip
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")   # others may start programs
MOVING = ("GIF", "WEBP", "PNG")                       # in others a second picture is no next frame

read_picture = functools.partial(read_bytes, most=MOST_BYTES,
                                 open=functools.partial(open_regular, kind="picture"))


def open_image(source, name=None):
    """The picture in a file, upright, RGB (transparency on white; the first frame of an animation).

    source: a path or the bytes of a file; name: what messages call it. Raises ValueError with one
    line that says what is wrong: missing, no picture in one of FORMATS, cut off, too big.
    """
    data = source if isinstance(source, bytes) else read_picture(source)
    name = printable(name or ("a picture in memory" if isinstance(source, bytes) else source))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")          # Pillow's warnings do not name the file
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    raise Image.DecompressionBombError
                return to_rgb(picture)
    except Image.DecompressionBombError:
        raise ValueError(f"{name}: a picture of more than {MOST_PIXELS:,} pixels") from None
    except Exception as error:           # Pillow's decoders raise many kinds on hostile input
        raise ValueError(f"{name}: not a readable picture ({type(error).__name__})") from None


def to_rgb(picture):
    """Any Pillow picture as RGB: upright, transparency over white, 16 bits scaled to 8."""
    picture.load()                       # raises for a cut picture, before errors are ignored below
    try:
        picture = ImageOps.exif_transpose(picture)
    except Exception:                    # broken EXIF data around a whole picture
        pass
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(picture, dtype=np.float32))
        wide = picture.mode.startswith("I;16") or values.max(initial=0) > 255
        top = 65535 if wide else 255
        picture = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def open_frames(path, most=32):
    """The frames of a clip, RGB: an animation's, or the pictures of a folder by name.

    Numbers in names count as numbers: 2.png comes before 10.png. More than `most` are thinned out
    evenly; a still picture is a clip of one frame. Raises ValueError in one line as `open_image`,
    and for an animation of more than MOST_FRAMES frames.
    """
    if Path(path).is_dir():
        frames = open_folder(path)[1]
    else:
        data = read_picture(path)
        frames = [open_image(data, path), *_later_frames(data, printable(path))]
    count = min(most, len(frames))
    return [frames[round(i * (len(frames) - 1) / max(1, count - 1))] for i in range(count)]


def _later_frames(data, name):
    """The frames of an animation after its first; of a still picture none."""
    frames = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=MOVING) as picture:
                most = min(MOST_FRAMES, 4 * MOST_PIXELS // (picture.width * picture.height))
                while len(frames) < most:
                    picture.seek(len(frames) + 1)
                    frames.append(to_rgb(picture))
    except (EOFError, UnidentifiedImageError):       # the end, or a format without animations
        return frames
    except Exception as error:
        raise ValueError(f"{name}: not a readable clip ({type(error).__name__})") from None
    raise ValueError(f"{name}: a clip of more than {most:,} frames")


def center_crop(picture, size):
    """CLIP's evaluation crop: the shorter side to `size` (bicubic, antialiased), its middle.

    Equals resizing the whole picture and then cutting, without the memory for a very long one.
    """
    W, H = picture.size
    if (W, H) == (size, size):
        return picture
    wide, high = (int(size * side / min(W, H)) for side in (W, H))    # the whole picture, resized
    left, top = round((wide - size) / 2), round((high - size) / 2)
    box = left * W / wide, top * H / high, (left + size) * W / wide, (top + size) * H / high
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box)


def random_crop(picture, size, rng, least=0.9):
    """CLIP's training crop, its only augmentation: a random square of the picture (paper, 2.3).

    The square keeps `least` to all of the area of the largest square, whose side is the picture's
    shorter side. open_clip instead takes 0.9 to all of the WHOLE picture's area with an aspect
    ratio of 3/4 to 4/3 (RandomResizedCrop), and so distorts what it cuts; ours never does.
    rng: a random.Random. Returns a Pillow picture of (size, size).
    """
    W, H = picture.size
    side = min(W, H) * math.sqrt(rng.uniform(least, 1))
    left, top = (W - side) * rng.random(), (H - side) * rng.random()
    box = left, top, min(left + side, W), min(top + side, H)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box)


def to_tensor(pictures):
    """Pillow RGB pictures of one size -> uint8 (B, 3, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)


def normalize_pixels(images, mean=MEAN, std=STD):
    """uint8 (B, 3, H, W), 0 .. 255 -> float32 (B, 3, H, W), by channel (x / 255 - mean) / std."""
    scale = torch.tensor(std, device=images.device)[:, None, None] * 255
    shift = torch.tensor(mean, device=images.device)[:, None, None] * 255
    return (images.float() - shift) / scale


def open_folder(folder):
    """Every readable picture of a folder, by name, 2.png before 10.png -> (paths, pictures).

    Other files are passed over; stderr says how many. Raises ValueError when the folder is missing
    or has no picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{printable(folder)}: no such folder")
    paths, pictures, refused = [], [], []
    for path in sorted((p for p in folder.iterdir() if p.is_file()), key=by_numbers):
        try:
            pictures.append(open_image(path))
            paths.append(path)
        except ValueError as error:
            refused.append(error)
    if refused:
        print(f"passed over {len(refused)} of {len(refused) + len(paths)} files, e.g. {refused[0]}",
              file=sys.stderr)
    if not paths:
        raise ValueError(f"{printable(folder)}: no pictures in it")
    return paths, pictures


def by_numbers(path):
    """The sort key of a path: its name, where runs of digits count as numbers."""
    parts = re.split(r"([0-9]+)", path.name)             # every second part is a number
    return [int(part[:99]) if k % 2 else part for k, part in enumerate(parts)], path.name
