"""Pictures in and out: opening files, resizing, tensors, sheets to look at."""
import io
import math
import os
import re
import stat
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

MEAN = (0.48145466, 0.4578275, 0.40821073)            # CLIP's, also BLIP's and LLaVA's
STD = (0.26862954, 0.26130258, 0.27577711)
MOST_PIXELS = 64_000_000                              # more in a small file is a decompression bomb
MOST_BYTES = 100_000_000                              # of a picture's file
MOST_FRAMES = 1_000                                   # of a clip
KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")     # others may start programs
MOVING = ("GIF", "WEBP", "PNG")                       # in others a second picture is no next frame
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}                # by the number in EXIF's orientation


def printable(name, most=300):
    """A name from outside as a part of one printable line: no control characters, not too long."""
    name = "".join(c if c.isprintable() else "?" for c in str(name)[:most + 1])
    return name if len(name) <= most else name[:most] + "..."


def open_regular(path, kind="file"):
    """The file at a path, open for reading bytes.

    Raises ValueError in one line when there is none, or when it is a folder, a pipe or a device:
    reading those may wait or go on for ever.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ValueError(f"a folder, not a {kind}")
        if not stat.S_ISREG(mode):
            raise ValueError(f"a pipe or a device, not a {kind}")
        wait_for_none = getattr(os, "O_NONBLOCK", 0)
        return open(path, "rb", opener=lambda name, flags: os.open(name, flags | wait_for_none))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{printable(path)}: no such {kind}") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{printable(path)}: {why}") from None


def open_image(source, name=None):
    """The picture in a file, upright, RGB (transparency on white; the first frame of an animation).

    source: a path, the bytes of a file, or a file open for reading bytes; name: what to call it.
    Raises ValueError with one line that says what is wrong: missing, no picture (of one of KINDS),
    cut off, too big.
    """
    if isinstance(source, (bytes, bytearray)):
        source, name = io.BytesIO(source), name or "a picture in memory"
    elif not hasattr(source, "read"):
        with open_regular(source, "picture") as file:
            return open_image(file, name or source)
    name = printable(name or getattr(source, "name", "a picture"))
    if source.seek(0, os.SEEK_END) > MOST_BYTES:
        raise ValueError(f"{name}: a file of more than {MOST_BYTES:,} bytes")
    source.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")          # on stderr nobody knows whose they are
            return _decoded(source)
    except Image.DecompressionBombError:
        raise ValueError(f"{name}: a picture of more than {MOST_PIXELS:,} pixels") from None
    except Exception as error:           # Pillow's decoders raise many kinds on hostile input
        raise ValueError(f"{name}: not a readable picture ({type(error).__name__})") from None


def _decoded(file):
    with Image.open(file, formats=KINDS) as picture:
        if picture.width * picture.height > MOST_PIXELS:
            raise Image.DecompressionBombError
        picture.load()
        if not picture.width or not picture.height:
            raise ValueError("no pixels")
        return upright(to_rgb(picture), turn_of(picture))


def turn_of(picture):
    """How a Pillow picture is to be turned, by its EXIF; None when as it is."""
    try:
        return TURNS.get(picture.getexif().get(0x0112))
    except Exception:                    # broken EXIF around a picture that is whole
        return None


def upright(picture, turn):
    """A picture turned as `turn_of` says."""
    return picture if turn is None else picture.transpose(turn)


def open_frames(path, most=32):
    """The frames of a clip, RGB: an animation's, or the pictures of a folder by name.

    Numbers in names count as numbers: 2.png comes before 10.png. More than `most` are thinned out
    evenly; a picture at rest is a clip of one frame. Raises ValueError in one line, as
    `open_image`, and for an animation that goes on too long.
    """
    if Path(path).is_dir():
        frames = open_folder(path)[1]
    else:
        frames = [open_image(path)]      # whatever is wrong with the file is told here
        with open_regular(path, "clip") as file:
            frames += _later_frames(file, printable(path))
    count = min(most, len(frames))
    return [frames[round(i * (len(frames) - 1) / max(1, count - 1))] for i in range(count)]


def _later_frames(file, name):
    frames = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=MOVING) as picture:
                most = min(MOST_FRAMES, 4 * MOST_PIXELS // (picture.width * picture.height))
                turn = turn_of(picture)
                while len(frames) < most:          # the first is not among them
                    picture.seek(len(frames) + 1)
                    frames.append(upright(to_rgb(picture), turn))
    except (EOFError, UnidentifiedImageError):     # the end of an animation; a picture at rest
        return frames
    except Exception as error:
        raise ValueError(f"{name}: not a readable clip ({type(error).__name__})") from None
    raise ValueError(f"{name}: a clip of more than {most:,} frames")


def to_rgb(picture):
    """Any Pillow picture as RGB: transparency over white, 16 bits scaled to 8."""
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(picture, dtype=np.float32))
        wide = picture.mode.startswith("I;16") or values.max(initial=0) > 255
        top = 65535 if wide else 255
        picture = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def center_crop(picture, size):
    """CLIP's evaluation crop: the shorter side to `size` (bicubic, antialiased), its middle."""
    W, H = picture.size
    if (W, H) == (size, size):
        return picture
    wide, high = (int(size * side / min(W, H)) for side in (W, H))    # the whole picture, resized
    left, top = round((wide - size) / 2), round((high - size) / 2)
    box = left * W / wide, top * H / high, (left + size) * W / wide, (top + size) * H / high
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box)


def random_crop(picture, size, rng, least=0.9):
    """CLIP's training crop, its only augmentation: a square from anywhere in the picture.

    Its side is the shorter side (paper, 2.3) with `least` to all of that square's area kept, as
    open_clip draws it, so that square pictures vary too. rng: a random.Random.
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
    """uint8 (B, 3, H, W) in 0 .. 255 -> float32, by channel (x / 255 - mean) / std."""
    scale = torch.tensor(std, device=images.device)[:, None, None] * 255
    shift = torch.tensor(mean, device=images.device)[:, None, None] * 255
    return (images.float() - shift) / scale


def open_folder(folder):
    """Every readable picture of a folder, by name, 2.png before 10.png -> (paths, pictures).

    Files that are no pictures are passed over; how many is said on stderr. Raises ValueError when
    the folder is missing or has none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
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
        raise ValueError(f"{folder}: no pictures in it")
    return paths, pictures


def by_numbers(path):
    """What paths are sorted by: their names, runs of digits as the numbers they spell."""
    parts = re.split(r"([0-9]+)", path.name)             # every second one is a number
    return [int(part[:99]) if k % 2 else part for k, part in enumerate(parts)], path.name


# ------------------------------------------------------------------ sheets to look at

GREEN, RED, INK = (20, 150, 60), (210, 40, 40), (30, 30, 30)


def wrap(text, font, width):
    """The text broken into lines at most `width` pixels wide."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
        while len(last := lines[-1]) > 1 and font.getlength(last) > width:     # one long word
            fits = sum(font.getlength(last[:n + 1]) <= width for n in range(len(last)))
            lines[-1:] = [last[:max(1, fits)], last[max(1, fits):]]
    return lines


def sheet(title, rows, cell=112):
    """Rows of pictures and words as one RGB picture.

    rows: (text, picture or None, cells) each; what was asked stands left, as words or a picture. A
    cell is (picture or None, caption, right): right True or False frames it green or red, None not.
    """
    font, gap = ImageFont.load_default(13), 8
    left = 2 * cell if any(text or asked for text, asked, _ in rows) else gap

    def room(picture):                   # words need twice a picture's width
        return cell + gap if picture else 2 * cell + gap

    width = max(6 * cell, gap + left + max(sum(room(c[0]) for c in cells) for _, _, cells in rows))
    heading = wrap(title, font, width - 2 * gap)
    top, height = 18 * len(heading) + 2 * gap, cell + 40          # two lines of caption
    page = Image.new("RGB", (width, top + (height + gap) * len(rows)), "white")
    canvas = ImageDraw.Draw(page)

    def words(text, x, y, width, colour=INK, most=99):
        for number, line in enumerate(wrap(text, font, width)[:most]):
            canvas.text((x, y + 16 * number), line, fill=colour, font=font)

    words(title, gap, gap, width - 2 * gap)
    for row, (text, asked, cells) in enumerate(rows):
        y = top + row * (height + gap)
        if asked is not None:
            page.paste(asked.resize((cell, cell), Image.Resampling.LANCZOS), (gap, y))
        words(text, gap, y + 4, left - 2 * gap, most=height // 16)
        x = left
        for picture, caption, right in cells:
            colour = INK if right is None else GREEN if right else RED
            if picture is None:
                words(caption, x, y + 4, 2 * cell - gap, colour, most=height // 16)
            else:
                canvas.rectangle((x - 3, y - 3, x + cell + 2, y + cell + 2),
                                 fill=(225, 225, 225) if right is None else colour)
                page.paste(picture.resize((cell, cell), Image.Resampling.LANCZOS), (x, y))
                words(caption, x, y + cell + 4, cell, most=2)
            x += room(picture)
    return page
