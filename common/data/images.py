"""Pictures: opening files, crops, tensors."""
import contextlib
import io
import itertools
import math
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence

from common.data.safe_read import printable, read_bytes

MEAN = (0.48145466, 0.4578275, 0.40821073)            # CLIP's, also BLIP's and LLaVA's
STD = (0.26862954, 0.26130258, 0.27577711)
MOST_PIXELS = 64_000_000                              # more in a small file is a decompression bomb
MOST_FRAMES = 1_000                                   # of a clip
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")   # others may start programs
MOVING = ("GIF", "WEBP", "PNG")                       # in others a second picture is no next frame


@contextlib.contextmanager
def decoding(source, name=None):
    """The Pillow picture of a path or of bytes. An error inside is one ValueError with the name."""
    data = source if isinstance(source, bytes) else read_bytes(source, kind="picture")
    name = printable(name or ("a picture in memory" if isinstance(source, bytes) else source))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")          # Pillow's warnings do not name the file
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    raise Image.DecompressionBombError
                yield picture
    except Image.DecompressionBombError:
        raise ValueError(f"{name}: a picture of more than {MOST_PIXELS:,} pixels") from None
    except Exception as error:           # Pillow's decoders raise many kinds on hostile input
        raise ValueError(f"{name}: not a readable picture ({type(error).__name__})") from None


def open_image(source, name=None):
    """The picture in a file, upright, RGB (transparency on white; the first frame of an animation).

    Raises ValueError in one line: missing, no picture in one of FORMATS, cut off, too big.
    """
    with decoding(source, name) as picture:
        return to_rgb(picture)


def to_rgb(picture):
    """Any Pillow picture as RGB: upright, transparency over white, 16 bits scaled to 8."""
    picture.load()                       # raises for a cut picture, before errors are ignored below
    try:
        picture = ImageOps.exif_transpose(picture)
    except Exception:                    # broken EXIF data around a whole picture
        pass
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(picture, dtype=np.float32))
        top = 65535 if picture.mode.startswith("I;16") or values.max() > 255 else 255
        picture = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


def open_frames(path, most=32):
    """The frames of a clip, RGB: an animation's, or the pictures of a folder by name.

    More than `most` are thinned out evenly; a still picture is a clip of one frame. Raises
    ValueError as `open_image`, and for an animation of more than MOST_FRAMES frames.
    """
    if Path(path).is_dir():
        frames = open_folder(path)[1]
    else:
        with decoding(path) as picture:
            room = min(MOST_FRAMES, 4 * MOST_PIXELS // (picture.width * picture.height))
            found = ImageSequence.Iterator(picture) if picture.format in MOVING else [picture]
            frames = [to_rgb(frame) for frame in itertools.islice(found, room + 1)]
        if len(frames) > room:
            raise ValueError(f"{printable(path)}: a clip of more than {room:,} frames")
    count = min(most, len(frames))
    return [frames[round(i * (len(frames) - 1) / max(1, count - 1))] for i in range(count)]


def center_crop(picture, size, resample=Image.Resampling.BICUBIC):
    """CLIP's evaluation crop: the shorter side to `size` (antialiased), its middle.

    resample: Pillow's filter. The pixels are those of OpenAI's code, but for a very long picture.
    """
    W, H = picture.size
    if (W, H) == (size, size):
        return picture
    wide, high = (int(size * side / min(W, H)) for side in (W, H))    # the whole picture, resized
    left, top = round((wide - size) / 2), round((high - size) / 2)
    if wide * high <= MOST_PIXELS:
        whole = picture.resize((wide, high), resample)
        return whole.crop((left, top, left + size, top + size))
    # Only this box is resized, which saves the memory for the whole. It is rounded otherwise.
    box = left * W / wide, top * H / high, (left + size) * W / wide, (top + size) * H / high
    return picture.resize((size, size), resample, box=box)


def random_crop(picture, size, rng, least=0.9):
    """CLIP's training crop, its only augmentation: a random square of the picture (paper, 2.3).

    It has `least` to all of the area of the picture's largest square; rng: a random.Random.
    open_clip takes 0.9 to all of the whole picture with an aspect ratio of 3/4 to 4/3 instead
    (RandomResizedCrop), and so distorts what it cuts.
    """
    W, H = picture.size
    side = min(W, H) * math.sqrt(rng.uniform(least, 1))
    left, top = (W - side) * rng.random(), (H - side) * rng.random()
    box = left, top, min(left + side, W), min(top + side, H)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box)


def pad_to_square(picture, fill=tuple(int(255 * mean) for mean in MEAN)):
    """The picture in the middle of a square of its longer side (LLaVA-1.5's expand2square).

    fill: the colour around it, (122, 116, 104) as released: MEAN is cut, not rounded. A very long
    picture is shrunk first, so that the square has no more than MOST_PIXELS.
    """
    longest = math.isqrt(MOST_PIXELS)
    if max(picture.size) > longest:
        scale = longest / max(picture.size)
        picture = picture.resize([max(1, int(length * scale)) for length in picture.size])
    W, H = picture.size
    if W == H:
        return picture
    side = max(W, H)
    square = Image.new("RGB", (side, side), fill)
    square.paste(picture, ((side - W) // 2, (side - H) // 2))
    return square


def best_grid(size, grids, side):
    """The grid of tiles that shows most of a picture (LLaVA-NeXT's select_best_resolution).

    size: (W, H) of the picture in pixels; grids: (columns, rows) in tiles, of side x side pixels
    each. It has the most pixels of the picture, at most the W * H that it has itself; of equal
    grids it is the smallest, and of these the first. Raises ValueError when there is no grid.
    """
    if not grids:
        raise ValueError(f"no grid of tiles for a picture of {size[0]} x {size[1]} pixels")
    W, H = size

    def order(grid):
        columns, rows = grid
        scale = min(columns * side / W, rows * side / H)
        return min(int(W * scale) * int(H * scale), W * H), -columns * rows
    return max(grids, key=order)                         # the first of equals


def tiles(picture, grids, side):
    """A picture's views in LLaVA-1.5-HD (paper, 3.4) and LLaVA-NeXT ("AnyRes", released code).

    -> 1 + columns * rows RGB pictures of side x side: the whole picture, distorted to a square;
    then, row by row, the tiles of its `best_grid`, in the middle of which it lies on black with its
    aspect ratio kept. Raises ValueError as `best_grid`.
    """
    W, H = picture.size
    columns, rows = best_grid(picture.size, grids, side)
    width, height = columns * side, rows * side
    scale = min(width / W, height / H)
    # W * (width / W) can be a little more than width.
    wide, high = min(math.ceil(W * scale), width), min(math.ceil(H * scale), height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(picture.resize((wide, high), Image.Resampling.BICUBIC),
                 ((width - wide) // 2, (height - high) // 2))
    return [picture.resize((side, side), Image.Resampling.BICUBIC),
            *(canvas.crop((x, y, x + side, y + side))
              for y in range(0, height, side) for x in range(0, width, side))]


def unpad(features, size):
    """The assembled tiles' features (h, w, D) without the rows or columns that are padding alone.

    size: (W, H) of the picture. The same number is cut on both sides, so that one row or column of
    padding may stay; of a picture much longer than its grid nothing may be left. LLaVA-NeXT's
    unpad_image.
    """
    h, w, _ = features.shape
    W, H = size
    # As transformers; without round() the released code takes int(27.999...) for 28.
    top = max(0, h - int(round(H * (w / W), 7))) // 2
    left = max(0, w - int(round(W * (h / H), 7))) // 2
    return features[top:h - top, left:w - left]


def pack_tiles(features, size, grid, row_end):
    """The features of the views that `tiles` makes, as one sequence (LLaVA-NeXT's spatial_unpad).

    features: float (1 + columns * rows, N, D), N = p * p patches of each view; size: (W, H) of the
    picture; grid: its `best_grid`, or None for the whole picture alone; row_end: float (D,), behind
    each row -> float (M, D), M = `count_tokens`: the whole picture's features, then the tiles'
    `unpad` map row by row. Raises ValueError when the features do not fit the grid.
    """
    columns, rows = grid or (0, 0)
    p = math.isqrt(features.shape[1])
    if features.shape[:2] != (1 + columns * rows, p * p):
        raise ValueError(f"features {tuple(features.shape)} are not those of a whole picture and "
                         f"{columns} x {rows} tiles, each of p * p patches")
    row_end = row_end.to(features.dtype)
    if not grid:
        return torch.cat([features[0], row_end[None]])
    assembled = features[1:].unflatten(1, (p, p)).unflatten(0, (rows, columns))
    assembled = assembled.transpose(1, 2)                # (rows, p, columns, p, D)
    assembled = unpad(assembled.flatten(2, 3).flatten(0, 1), size)                # (h, w, D)
    row_ends = row_end.expand(len(assembled), 1, -1)
    assembled = torch.cat([assembled, row_ends], dim=1)                           # (h, w + 1, D)
    return torch.cat([features[0], assembled.flatten(0, 1)])


def count_tokens(size, grid, p):
    """The length of `pack_tiles` for views of p x p patches, known before there are features."""
    if not grid:
        return p * p + 1
    columns, rows = grid
    h, w, _ = unpad(torch.empty(rows * p, columns * p, 0), size).shape
    return p * p + h * (w + 1)


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

    stderr says how many other files are passed over. Raises ValueError when there is no picture.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{printable(folder)}: no such folder")
    found, refused = {}, []              # {path: picture}, errors
    for path in sorted(filter(Path.is_file, Path(folder).iterdir()), key=by_numbers):
        try:
            found[path] = open_image(path)
        except ValueError as error:
            refused.append(error)
    if refused:
        print(f"passed over {len(refused)} of {len(refused) + len(found)} files, e.g. {refused[0]}",
              file=sys.stderr)
    if not found:
        raise ValueError(f"{printable(folder)}: no pictures in it")
    return list(found), list(found.values())


def by_numbers(path):
    """The sort key of a path: its name, where runs of digits count as numbers."""
    parts = re.split(r"([0-9]+)", path.name)             # every second part is a number
    return [int(part[:99]) if k % 2 else part for k, part in enumerate(parts)], path.name
