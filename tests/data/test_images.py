"""Opening any picture file, crops, tensors."""
import io
import math
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import images
from common.data.images import (best_grid, center_crop, count_tokens, decoding, normalize_pixels,
                                open_folder, open_frames, open_image, pack_tiles, pad_to_square,
                                random_crop, tiles, to_rgb, to_tensor, unpad)
from tests.fuzz import limit, mutations, one_line
from tests.helpers import assert_close, unchanged

KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "PPM")


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(picture, kind="PNG", *frames, orientation=1, **more):
    """The bytes of a file of one picture or of several frames."""
    out, exif = io.BytesIO(), Image.Exif()
    exif[274] = orientation
    more |= {"save_all": True, "append_images": frames} if frames else {}
    picture.save(out, kind, **{"exif": exif} | more)
    return out.getvalue()


def compare(name, picture, want, within=0):
    """Two pictures of one size, whose pixels differ by at most so much."""
    assert picture.mode == "RGB", f"{name}: mode {picture.mode}"
    got, want = np.array(picture, float), np.array(want, float)
    if got.shape == want.shape:
        got = np.where(abs(got - want) <= within, want, got)
    assert_close(f"pixels (H, W, 3) {name}", got, want)


def png(width, height):
    """A PNG of one byte that claims this size."""
    data, header = encoded(Image.new("L", (1, 1))), struct.pack(">IIB4x", width, height, 8)
    return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]


def broken():
    """{name: bytes} of what is no picture; a bomb unpacks to more than 64,000,000 pixels."""
    frame = b",\0\0\0\0" + struct.pack("<HH", 60000, 60000) + b"\0\x02\x02L\x01\0;"
    halves = {kind: encoded(noise(40, 30), kind) for kind in ("PNG", "JPEG", "GIF", "BMP")}
    return {"nothing": b"", "text": b"a line of text\n", "start": b"GIF89a\5\0\5\0",
            "bomb": png(64001, 1000), "huge bomb": png(60000, 60000),
            "frame bomb": b"GIF89a\5\0\5\0\x80\0\0" + bytes(6) + frame,
            "program": encoded(noise(16, 16), "EPS"), "rare": encoded(noise(16, 16), "PCX"),
            **{f"half a {kind}": data[:len(data) // 2] for kind, data in halves.items()}}


class TestOpenImage:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_format_is_opened_from_bytes_and_paths(self, tmp_path, kind):
        plain, lossy = Image.new("RGB", (9, 7), (250, 5, 5)), kind in ("JPEG", "WEBP", "GIF", "MPO")
        (tmp_path / "a").write_bytes(encoded(plain, kind))
        for source in (tmp_path / "a", str(tmp_path / "a"), encoded(plain, kind)):
            compare(kind, open_image(source), plain, within=5 * lossy)

    def test_it_is_upright_and_over_white_and_broken_exif_does_not_cost_it(self):
        clear = encoded(Image.new("RGBA", (3, 2), (200, 0, 100, 0)), orientation=6)
        compare("of nothing, turned", open_image(clear), np.full((3, 2, 3), 255))
        data = encoded(noise(7, 5), exif=b"Exif\0\0nonsense, not a header")
        compare("with broken EXIF data", open_image(data), noise(7, 5))

    def test_what_is_broken_is_refused_in_one_line_that_names_it(self, tmp_path):
        for name, data in broken().items():
            (tmp_path / name).write_bytes(data)
            value = "64,000,000" if "bomb" in name else ""
            with limit(5), one_line(f"{name}: .*{value}"):
                open_image(tmp_path / name)
            with limit(5), one_line(f"^b of {name}: .*{value}"):
                open_image(data, f"b of {name}")

    @pytest.mark.parametrize("error", [KeyError("a"), MemoryError(), ValueError("two\nlines")])
    def test_any_error_of_a_decoder_is_one_line(self, error):
        with one_line("^7.jpg: "), decoding(encoded(noise(7, 5)), "7.jpg"):
            raise error

    def test_a_damaged_picture_is_opened_or_refused_in_one_line(self):
        refused = []
        for kind in KINDS:
            for damaged in mutations(encoded(noise(13, 11), kind, orientation=6), 40):
                with limit(5), one_line(maybe=True) as said:
                    picture = open_image(damaged)
                    assert picture.mode == "RGB" and min(picture.size) > 0
                refused += said
        assert 60 < len(refused) < 260


class TestToRgb:
    @pytest.mark.parametrize("mode, pixel, want", [
        ("RGB", (9, 8, 7), (9, 8, 7)), ("L", 200, 200), ("1", 1, 255),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)), ("RGBA", (200, 0, 100, 0), 255),
        ("RGBA", (200, 0, 100, 51), (244, 204, 224)),          # a fifth of it, four of white
        ("LA", (100, 255), 100), ("LA", (100, 51), 224), ("I;16", 257 * 51, 51), ("I;16", 200, 0),
        ("I", 51, 51), ("I", 257 * 51, 51), ("F", -7.0, 0), ("F", float("nan"), 0)])
    @pytest.mark.filterwarnings("error")
    def test_any_mode_becomes_eight_bits_of_three_colours(self, mode, pixel, want):
        picture = Image.new(mode, (3, 2), pixel)
        compare(f"of {mode}", to_rgb(picture), np.full((2, 3, 3), want), within=1)
        assert picture.mode == mode, "the caller's picture is changed"

    @pytest.mark.parametrize("mode, clear, other", [("RGB", (9, 8, 7), (5, 5, 5)), ("L", 9, 5)])
    def test_the_transparent_colour_is_white(self, mode, clear, other):
        picture = Image.new(mode, (2, 1), clear)
        picture.putpixel((1, 0), other)
        picture.info["transparency"] = clear
        compare(mode, to_rgb(picture), [[(255, 255, 255), (5, 5, 5)]])

    def test_exif_says_which_side_is_up(self):
        for mode in ("RGB", "L", "1", "LA", "RGBA", "CMYK", "I", "F"):
            picture = noise(7, 5).convert("RGB" if mode == "CMYK" else "L").convert(mode)
            want = to_rgb(picture).rotate(-90, expand=True)
            picture.getexif()[274] = 6
            compare(f"of {mode}, turned", to_rgb(picture), want)


def film(path, count):
    """A clip of frames that are 20 i bright; WebP and PNG keep them exactly."""
    first, *rest = (Image.new("RGB", (8, 6), (20 * i % 256, 20 * i // 256, 0))
                    for i in range(count))
    path.write_bytes(encoded(first, path.suffix[1:].upper(), *rest, duration=40, lossless=True))
    return path


def numbers(frames):
    """i of each frame."""
    assert {frame.mode for frame in frames} == {"RGB"}
    return [(red + 256 * green) // 20 for red, green, _ in (f.getpixel((0, 0)) for f in frames)]


class TestOpenFrames:
    @pytest.mark.parametrize("name", ["a.png", "a.webp", "a.gif"])
    def test_an_animation_is_its_frames_in_order_and_a_picture_the_first(self, tmp_path, name):
        path = film(tmp_path / name, 5)
        assert numbers(open_frames(path)) == [0, 1, 2, 3, 4] and numbers([open_image(path)]) == [0]

    def test_every_frame_is_turned_and_laid_over_white(self, tmp_path):
        first, *rest = (Image.new("RGBA", (8, 6), (20 * i, 0, 0, 0)) for i in range(4))
        (tmp_path / "a").write_bytes(encoded(first, "WEBP", *rest, lossless=True, exact=True,
                                               orientation=6))
        found = [(frame.size, frame.getpixel((0, 0))) for frame in open_frames(tmp_path / "a")]
        assert found == [((6, 8), (255, 255, 255))] * 4

    def test_a_picture_at_rest_is_one_frame_whatever_else_its_file_holds(self, tmp_path):
        for kind in KINDS:
            more = [noise(4, 3)] if kind in ("MPO", "TIFF") else []
            (tmp_path / "a").write_bytes(encoded(noise(7, 5), kind, *more))
            frame, = open_frames(tmp_path / "a")
            compare(kind, frame, open_image(tmp_path / "a"))

    def test_a_folder_is_its_pictures_by_name(self, tmp_path):
        for place, name in enumerate(("a2b10", "10", "2", "a2b1", "a10")):
            Image.new("RGB", (8, 6), (20 * place, 0, 0)).save(tmp_path / f"{name}.png")
        assert numbers(open_frames(tmp_path)) == [2, 1, 3, 0, 4]
        assert numbers(open_frames(tmp_path, 2)) == [2, 4]

    @pytest.mark.parametrize("count, most, want", [
        (9, 5, [0, 2, 4, 6, 8]), (9, 2, [0, 8]), (9, 1, [0]), (3, 5, [0, 1, 2]),
        (7, 4, [0, 2, 4, 6]), (64, 32, [round(i * 63 / 31) for i in range(32)])])
    def test_too_many_are_thinned_out_evenly_and_keep_both_ends(self, tmp_path, count, most, want):
        path = film(tmp_path / "a.png", count)
        assert numbers(open_frames(path, most)) == want
        assert most < 32 or numbers(open_frames(path)) == want, "most is 32 by default"

    def test_a_clip_that_goes_on_too_long_or_is_none_is_refused(self, tmp_path, monkeypatch):
        path = film(tmp_path / "a.png", 8)
        monkeypatch.setattr(images, "MOST_FRAMES", 8)
        assert len(open_frames(path)) == 8
        for what, value, number in (("FRAMES", 7, 7), ("PIXELS", 48, 4)):     # four frames of 48
            monkeypatch.setattr(images, f"MOST_{what}", value)
            with one_line(f"a.png.* {number} "):
                open_frames(path)
        with one_line("absent.gif: .*picture"):
            open_frames(tmp_path / "absent.gif")


class TestCenterCrop:
    @pytest.mark.parametrize("W, H", [(64, 47), (47, 64), (100, 37), (31, 90), (13, 11), (23, 23),
                                      (23, 50), (7, 720), (720, 7), (198, 652), (43, 548)])
    @pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
    def test_it_is_resizing_the_shorter_side_and_then_cutting(self, W, H, resample):
        size, picture = 23, noise(W, H)
        wide, high = int(size * W / min(W, H)), int(size * H / min(W, H))
        left, top = round((wide - size) / 2), round((high - size) / 2)
        want = picture.resize((wide, high), resample).crop((left, top, left + size, top + size))
        compare(f"of {W} x {H}", center_crop(picture, size, resample), want)
        if resample == Image.Resampling.BICUBIC:
            compare("by default", center_crop(picture, size), want)

    def test_a_sliver_costs_no_memory(self, monkeypatch):
        assert center_crop(Image.new("RGB", (10_000_000, 1)), 16).size == (16, 16)
        whole = center_crop(noise(64, 47), 23)
        monkeypatch.setattr(images, "MOST_PIXELS", 23 * 31 - 1)
        compare("of the box alone", center_crop(noise(64, 47), 23), whole, within=1)


class TestRandomCrop:
    """A picture whose red is the column and whose green is the row: a crop says where it lay."""

    def crops(self, width, height, *least):
        where = np.zeros((height, width, 3), dtype=np.uint8)
        where[..., 0], where[..., 1] = np.arange(width), np.arange(height)[:, None]
        rng = random.Random(0)
        made = [random_crop(Image.fromarray(where), 23, rng, *least) for _ in range(300)]
        assert {crop.size for crop in made} == {(23, 23)}
        return np.stack([np.array(crop, float) for crop in made])

    @pytest.mark.parametrize("width, height", [(200, 71), (71, 200)])
    def test_the_shorter_side_is_whole_and_the_longer_is_cut_anywhere(self, width, height):
        along, across = (0, 1) if width > height else (1, 0)
        middle = self.crops(width, height, 1)[:, 11, 11]
        assert np.ptp(middle[:, across]) == 0 and middle[0, across] == pytest.approx(35, abs=1)
        low, high = 35, 200 - 36         # the middles of the first and the last square
        assert middle[:, along].min() < low + 3 and middle[:, along].max() > high - 3
        assert middle[:, along].mean() == pytest.approx((low + high) / 2, abs=8)

    @pytest.mark.parametrize("least", [(), (0.9,), (0.5,)])
    def test_a_square_keeps_least_to_all_of_its_area(self, least):
        crops, smallest = self.crops(100, 100, *least), 100 * (least or (0.9,))[0] ** 0.5
        sides = (crops[:, 11, -1, 0] - crops[:, 11, 0, 0]) * 23 / 22
        assert smallest - 1.5 < sides.min() < smallest + 2.2 and 98 < sides.max() < 101
        high = (crops[:, -1, 11, 1] - crops[:, 0, 11, 1]) * 23 / 22
        assert abs(high - sides).max() < 1.5, "a crop is no square"
        assert crops[:, 11, 11, 0].std() > 0.5 < crops[:, 11, 11, 1].std()

    def test_it_is_a_function_of_the_rng(self):
        one, same, other = (random_crop(noise(40, 31), 8, random.Random(s)) for s in (1, 1, 2))
        compare("of the same rng", one, same)
        assert not np.array_equal(one, other), "another rng gives the same crop"

    def test_slivers_and_tiny_pictures_are_cut_too(self):
        for size in ((1_000_000, 1), (1, 7), (1, 1), (3, 3)):
            for seed in range(20):
                assert random_crop(Image.new("RGB", size), 16, random.Random(seed)).size == (16, 16)


class TestPadToSquare:
    def test_the_picture_lies_in_the_middle_of_clips_mean_colour(self):
        for width, height, left, top in ((4, 2, 0, 1), (2, 5, 1, 0), (11, 4, 0, 3), (4, 13, 4, 0)):
            want = Image.new("RGB", (max(width, height),) * 2, (122, 116, 104))
            want.paste(noise(width, height), (left, top))
            compare(f"of {width} x {height}", pad_to_square(noise(width, height)), want)

    def test_a_square_stays_and_any_colour_can_be_given(self):
        compare("of a square", pad_to_square(noise(7, 7)), noise(7, 7))
        assert pad_to_square(noise(5, 3), (1, 2, 3)).getpixel((4, 0)) == (1, 2, 3)

    def test_a_very_long_picture_is_shrunk_first(self, monkeypatch):
        monkeypatch.setattr(images, "MOST_PIXELS", 20 * 20 + 5)
        assert pad_to_square(noise(21, 1)).size == pad_to_square(noise(4, 90)).size == (20, 20)
        compare("of 20 x 20", pad_to_square(noise(20, 20)), noise(20, 20))


NEXT = (1, 2), (2, 1), (2, 2), (3, 1), (1, 3)      # LLaVA-NeXT's grids: columns, rows
SMALL = (1, 2), (2, 1), (2, 2)
CHOICES = [     # size (W, H), grids, side, patches on a side, the grid, tokens
    ((336, 336), NEXT, 336, 24, (1, 2), 1176), ((100, 100), NEXT, 336, 24, (1, 2), 1176),
    ((672, 672), NEXT, 336, 24, (2, 2), 2928), ((640, 480), NEXT, 336, 24, (2, 2), 2340),
    ((480, 640), NEXT, 336, 24, (2, 2), 2352), ((1000, 200), NEXT, 336, 24, (3, 1), 1598),
    ((200, 1000), NEXT, 336, 24, (1, 3), 1656), ((800, 300), NEXT, 336, 24, (3, 1), 2136),
    ((500, 333), NEXT, 336, 24, (2, 1), 1464), ((1344, 336), NEXT, 336, 24, (3, 1), 1890),
    ((16, 8), SMALL, 8, 4, (2, 1), 52), ((8, 16), SMALL, 8, 4, (1, 2), 56),
    ((10, 10), SMALL, 8, 4, (2, 2), 88), ((12, 5), SMALL, 8, 4, (2, 1), 52),
    ((32, 8), SMALL, 8, 4, (2, 1), 34)]


class TestBestGrid:
    @pytest.mark.parametrize("size, grids, side, p, grid, tokens", CHOICES)
    def test_it_is_the_one_that_llava_next_takes(self, size, grids, side, p, grid, tokens):
        assert best_grid(size, grids, side) == grid

    def test_of_grids_that_show_as_much_the_smallest_and_then_the_first_is_taken(self):
        for grids in (((1, 2), (2, 1)), ((2, 1), (1, 2))):
            assert best_grid((7, 7), grids, 7) == grids[0]
        assert best_grid((7, 7), [(3, 2), (2, 2), (1, 2), (2, 1)], 7) == (1, 2)

    def test_a_sliver_has_a_grid_and_no_grids_are_refused(self):
        assert best_grid((100_000, 1), SMALL, 8) == (1, 2)       # not one whole pixel is shown
        with one_line("no grid .* 13 x 7 "):
            best_grid((13, 7), (), 8)


def assembled(views, columns):
    """The tiles of `tiles` (without the first view) put together again: (H, W, 3)."""
    values = [np.array(view) for view in views[1:]]
    rows = [np.concatenate(values[i:i + columns], 1) for i in range(0, len(values), columns)]
    return np.concatenate(rows, 0)


class TestTiles:
    @pytest.mark.parametrize("width, height, grid, left, top", [
        (14, 4, (2, 1), 0, 1), (4, 14, (1, 2), 1, 0), (21, 11, (3, 2), 0, 1),
        (11, 21, (2, 3), 1, 0), (21, 14, (3, 2), 0, 0)])
    def test_the_tiles_of_a_picture_that_needs_no_resizing_are_its_pixels_on_black(
            self, width, height, grid, left, top):
        views = tiles(noise(width, height), [grid], 7)
        assert {view.size for view in views} == {(7, 7)} and len(views) == 1 + grid[0] * grid[1]
        want = np.zeros((7 * grid[1], 7 * grid[0], 3))
        want[top:top + height, left:left + width] = np.array(noise(width, height))
        for k, view in enumerate(views[1:]):
            row, column = divmod(k, grid[0])
            part = want[7 * row:7 * row + 7, 7 * column:7 * column + 7]
            compare(f"of tile {k}", view, part)

    @pytest.mark.parametrize("width, height", [(23, 5), (5, 23), (13, 11)])
    def test_the_first_view_is_the_whole_picture_as_a_square(self, width, height):
        view = tiles(noise(width, height), SMALL, 7)[0]
        want = noise(width, height).resize((7, 7), Image.Resampling.BICUBIC)
        compare(f"of {width} x {height}", view, want)

    @pytest.mark.parametrize("width, height, grid, wide, high", [
        (20, 9, (2, 1), 14, 7), (9, 20, (1, 2), 7, 14),          # 6.3 rows are 7, nothing is black
        (25, 4, (2, 1), 14, 3), (4, 25, (1, 2), 3, 14),          # 25 * (14 / 25) > 14 in floats
        (5, 3, (3, 2), 21, 13), (3, 5, (2, 3), 13, 21)])
    def test_the_picture_is_resized_with_its_aspect_ratio_kept(
            self, width, height, grid, wide, high):
        canvas = assembled(tiles(noise(width, height), [grid], 7), grid[0])
        top, left = (canvas.shape[0] - high) // 2, (canvas.shape[1] - wide) // 2
        want = np.zeros_like(canvas)
        want[top:top + high, left:left + wide] = np.array(
            noise(width, height).resize((wide, high), Image.Resampling.BICUBIC))
        assert_close("canvas (H, W, 3)", canvas, want)

    def test_the_grid_is_the_best_one(self):
        for size, grids, side, _, (columns, rows), _ in CHOICES[10:]:
            assert len(tiles(noise(*size), grids, side)) == 1 + columns * rows
        with one_line("no grid "):
            tiles(noise(5, 3), (), 7)

    def test_a_sliver_is_cut_too(self):
        for size in ((10_000, 1), (1, 10_000), (1, 1)):
            assert {view.size for view in tiles(noise(*size), SMALL, 7)} == {(7, 7)}


def numbered(*shape):
    return torch.arange(math.prod(shape), dtype=torch.float32).view(shape)


class TestUnpad:
    @pytest.mark.parametrize("size, h, w, top, left", [
        ((31, 13), 10, 15, 2, 0), ((13, 31), 15, 10, 0, 2),      # 6.3 rows of 10, 6.3 columns
        ((17, 7), 11, 13, 3, 0), ((7, 17), 13, 11, 0, 3),        # 5.4 of 11
        ((9, 4), 10, 15, 2, 0), ((4, 9), 15, 10, 0, 2),          # 6.7 of 10 count as 6
        ((12, 5), 4, 8, 0, 0), ((5, 12), 8, 4, 0, 0),            # 3.3 of 4: the odd one stays
        ((13, 7), 11, 5, 4, 0), ((7, 13), 5, 11, 0, 4)])         # wider than the map, and higher
    def test_it_cuts_as_much_on_both_sides(self, size, h, w, top, left):
        features = numbered(h, w, 3)
        with unchanged(features=features):
            made = unpad(features, size)
        assert_close(f"features of {size} (h, w, D)", made, features[top:h - top, left:w - left])

    def test_a_picture_that_fills_the_map_keeps_all_of_it(self):
        features = numbered(10, 15, 2)
        for size in ((15, 10), (30, 20), (300_003, 200_002)):
            assert_close("features (h, w, D)", unpad(features, size), features)

    def test_a_whole_number_of_rows_is_not_lost_to_rounding(self):
        # 47 * (6 / 47) is 5.999... in floats.
        wide, high = numbered(6, 9, 2), numbered(9, 6, 2)
        assert_close("wide features (h, w, D)", unpad(wide, (47, 47)), wide[:, 1:8])
        assert_close("high features (h, w, D)", unpad(high, (47, 47)), high[1:8])

    def test_of_a_sliver_nothing_may_be_left(self):
        assert unpad(numbered(4, 8, 3), (1000, 1)).shape == (0, 8, 3)
        assert unpad(numbered(8, 4, 3), (1, 1000)).shape == (8, 0, 3)


class TestPackTiles:
    @pytest.mark.parametrize("size, grid, top, left", [
        ((33, 22), (3, 2), 0, 0), ((31, 13), (3, 2), 2, 0), ((13, 31), (2, 3), 0, 2),
        ((23, 23), (1, 2), 2, 0), ((23, 23), (2, 1), 0, 2)])
    @pytest.mark.parametrize("kind", ["of each tile its number", "all different"])
    def test_every_feature_lies_where_its_pixels_lay(self, size, grid, top, left, kind):
        (columns, rows), p, D = grid, 5, 7
        features = numbered(1 + columns * rows, p * p, D)
        if kind != "all different":
            features = features.div(p * p * D, rounding_mode="floor")
        row_end = -1 - numbered(D)
        want = list(features[0])
        for y in range(top, rows * p - top):
            for x in range(left, columns * p - left):
                tile = 1 + y // p * columns + x // p
                want.append(features[tile, y % p * p + x % p])
            want.append(row_end)
        with unchanged(features=features, row_end=row_end):
            made = pack_tiles(features, size, grid, row_end)
        assert_close("tokens (M, D)", made, torch.stack(want))

    def test_a_single_view_ends_one_row(self):
        features, row_end = numbered(1, 9, 5), -1 - numbered(5)
        made = pack_tiles(features, (13, 7), None, row_end)
        assert_close("tokens (M, D)", made, torch.stack([*features[0], row_end]))

    def test_gradients_reach_all_that_is_kept_and_the_row_end(self):
        features = numbered(3, 4, 5).requires_grad_()
        row_end = torch.zeros(5, requires_grad=True)
        pack_tiles(features, (12, 5), (2, 1), row_end).sum().backward()
        assert_close("gradient of features (1 + tiles, N, D)", features.grad, torch.ones(3, 4, 5))
        assert_close("gradient of row_end (D,)", row_end.grad, torch.full((5,), 2.0))

    def test_it_has_the_dtype_of_the_features(self):
        for grid, views in ((None, 1), ((2, 1), 3)):
            made = pack_tiles(numbered(views, 4, 5).bfloat16(), (9, 7), grid, numbered(5))
            assert made.dtype == torch.bfloat16

    def test_features_that_do_not_fit_the_grid_are_refused(self):
        for views, patches, grid in ((6, 4, (3, 2)), (8, 4, (3, 2)), (7, 5, (3, 2)), (2, 4, None),
                                     (1, 4, (3, 2))):
            columns, rows = grid or (0, 0)
            with one_line(rf"\({views}, {patches}, 5\) .* {columns} x {rows} "):
                pack_tiles(numbered(views, patches, 5), (31, 13), grid, numbered(5))


class TestCountTokens:
    @pytest.mark.parametrize("size, grids, side, p, grid, tokens", CHOICES)
    def test_it_is_the_length_that_llava_next_has(self, size, grids, side, p, grid, tokens):
        features = torch.zeros(1 + grid[0] * grid[1], p * p, 1)
        assert count_tokens(size, grid, p) == tokens
        assert len(pack_tiles(features, size, grid, torch.zeros(1))) == tokens

    def test_it_is_the_length_of_slivers_and_of_a_single_view(self):
        for size, grid in (((1000, 1), (2, 1)), ((1, 1000), (1, 2)), ((5, 3), None)):
            features = torch.zeros(3 if grid else 1, 16, 1)
            want = len(pack_tiles(features, size, grid, torch.zeros(1)))
            assert count_tokens(size, grid, 4) == want


class TestToTensor:
    def test_rows_are_height_and_channels_come_first(self):
        made = to_tensor([noise(7, 5, seed) for seed in (1, 2)])
        want = [[[[noise(7, 5, seed).getpixel((x, y))[c] for x in range(7)] for y in range(5)]
                 for c in range(3)] for seed in (1, 2)]
        assert_close("images (B, 3, H, W)", made, want)
        assert made.dtype == torch.uint8


class TestNormalizePixels:
    def test_it_is_by_channel_and_has_the_published_values(self):
        images = torch.tensor([[0, 0, 0], [255, 255, 255], [124, 117, 104]], dtype=torch.uint8)
        images = images[:, :, None, None].expand(3, 3, 5, 7).clone()
        want = torch.tensor([[-1.7922625, -1.7520971, -1.4802198],
                             [1.9303361, 2.0748837, 2.1458969], [0.0179424, 0.0038118, -0.0013330]])
        with unchanged(images=images):
            made = normalize_pixels(images)
        assert_close("pixels (B, 3, H, W)", made, want[:, :, None, None].expand(3, 3, 5, 7))
        made = normalize_pixels(images, mean=(0.2, 0.0, 0.7), std=(0.5, 0.25, 1.0))[1, :, 0, 0]
        assert_close("of 255 (3,)", made, [0.8 / 0.5, 1 / 0.25, 0.3])


class TestOpenFolder:
    def test_pictures_come_by_name_and_other_files_are_counted(self, tmp_path, capsys):
        for name, colour in (("10.png", "red"), ("9.jpg", "blue")):
            Image.new("RGB", (8, 8), colour).save(tmp_path / name)
        (tmp_path / "notes.txt").write_text("not a picture")
        (tmp_path / "inner").mkdir()
        paths, pictures = open_folder(tmp_path)
        assert [p.name for p in paths] == ["9.jpg", "10.png"]
        assert pictures[1].getpixel((0, 0)) == (255, 0, 0)
        out, err = capsys.readouterr()
        assert "1 of 3" in err and "notes.txt" in err and err.count("\n") == 1 and not out

    def test_a_folder_without_pictures_or_none_is_refused(self, tmp_path):
        (tmp_path / "notes.txt").write_text("not a picture")
        for folder in (tmp_path, tmp_path / "absent", tmp_path / "notes.txt"):
            with one_line(f"{folder}: "):
                open_folder(folder)
