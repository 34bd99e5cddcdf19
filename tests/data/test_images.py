"""Opening any picture file, crops, tensors."""
import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import images
from common.data.images import (center_crop, decoding, normalize_pixels, open_folder, open_frames,
                                open_image, random_crop, to_rgb, to_tensor)
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
    @pytest.mark.parametrize("W, H", [(64, 47), (47, 64), (100, 37), (31, 90), (13, 11), (23, 23)])
    def test_it_is_resizing_the_shorter_side_and_then_cutting(self, W, H):
        size, ramp = 23, np.add.outer(np.arange(H), np.arange(W)) * 255.0
        picture = Image.fromarray((ramp / (H + W)).astype(np.uint8)).convert("RGB")
        wide, high = int(size * W / min(W, H)), int(size * H / min(W, H))
        left, top = round((wide - size) / 2), round((high - size) / 2)
        whole = picture.resize((wide, high), Image.Resampling.BICUBIC)
        want = whole.crop((left, top, left + size, top + size))
        compare(f"of {W} x {H}", center_crop(picture, size), want, within=1)

    def test_a_sliver_costs_no_memory(self):
        assert center_crop(Image.new("RGB", (10_000_000, 1)), 16).size == (16, 16)


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
