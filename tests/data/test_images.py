"""Opening any picture file, crops, tensors."""
import io
import os
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from common.data import images
from common.data.images import (MEAN, MOST_PIXELS, STD, center_crop, normalize_pixels, open_folder,
                                open_frames, open_image, random_crop, to_rgb, to_tensor)
from common.data.safe_read import MOST_BYTES


def halves(size=(6, 4), left=(200, 30, 40), right=(10, 60, 220)):
    """An RGB picture, its left half of one colour, its right half of another."""
    picture = Image.new("RGB", size, left)
    picture.paste(right, (size[0] // 2, 0, *size))
    return picture


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def saved(folder, picture, name="picture.png", **more):
    picture.save(folder / name, **more)
    return open_image(folder / name)


def chunk(kind, data):
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def refusal(path):
    """What open_image says of a file; one line that names it."""
    with pytest.raises(ValueError) as caught:
        open_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


class TestOpenImage:
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "PPM"])
    def test_every_kind_is_opened(self, tmp_path, kind):
        Image.new("RGB", (9, 7), "red").save(tmp_path / "a", kind)
        picture = open_image(tmp_path / "a")
        assert picture.size == (9, 7) and picture.getpixel((4, 3))[0] > 240
        Image.new("L", (9, 7), 200).save(tmp_path / "b.pgm", "PPM")
        assert open_image(tmp_path / "b.pgm").getpixel((4, 3)) == (200, 200, 200)

    def test_a_plain_picture_comes_back_as_it_is(self, tmp_path):
        opened = saved(tmp_path, noise(7, 5))
        assert opened.mode == "RGB" and opened.size == (7, 5)
        assert np.array_equal(opened, noise(7, 5))

    @pytest.mark.parametrize("orientation, turned", [
        (1, lambda p: p), (2, ImageOps.mirror), (3, lambda p: p.rotate(180)), (4, ImageOps.flip),
        (5, lambda p: p.transpose(Image.Transpose.TRANSPOSE)),
        (6, lambda p: p.rotate(-90, expand=True)),
        (7, lambda p: p.transpose(Image.Transpose.TRANSVERSE)),
        (8, lambda p: p.rotate(90, expand=True))])
    def test_exif_says_which_side_is_up(self, tmp_path, orientation, turned):
        exif = Image.Exif()
        exif[274] = orientation
        assert np.array_equal(saved(tmp_path, noise(7, 5), exif=exif), turned(noise(7, 5)))

    def test_cmyk_becomes_rgb(self, tmp_path):
        opened = saved(tmp_path, halves((32, 16)).convert("CMYK"), "picture.jpg", quality=100)
        assert opened.mode == "RGB"
        assert np.abs(np.asarray(opened, int) - np.asarray(halves((32, 16)), int)).max() < 8

    def test_palettes_are_looked_up(self, tmp_path):
        picture = Image.new("P", (2, 1))
        picture.putpalette([9, 8, 7, 250, 240, 230])
        picture.putpixel((1, 0), 1)
        opened = saved(tmp_path, picture)
        assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(9, 8, 7), (250, 240, 230)]

    def test_a_transparent_palette_entry_is_white(self, tmp_path):
        picture = Image.new("P", (2, 1))
        picture.putpalette([9, 8, 7, 250, 240, 230])
        picture.putpixel((1, 0), 1)
        opened = saved(tmp_path, picture, transparency=0)
        assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (250, 240, 230)]

    @pytest.mark.parametrize("mode, pixel, want", [
        ("RGBA", (200, 0, 100, 255), (200, 0, 100)), ("RGBA", (200, 0, 100, 0), (255, 255, 255)),
        ("RGBA", (200, 0, 100, 51), (244, 204, 224)),          # a fifth of it, four of white
        ("LA", (100, 255), (100, 100, 100)), ("LA", (100, 51), (224, 224, 224))])
    def test_transparency_is_laid_over_white(self, tmp_path, mode, pixel, want):
        opened = saved(tmp_path, Image.new(mode, (3, 2), pixel))
        assert opened.getpixel((1, 1)) == pytest.approx(want, abs=1)

    def test_sixteen_bits_are_scaled_to_eight(self, tmp_path):
        values = np.array([[0, 257 * 51, 257 * 102, 65535]], dtype=np.uint16)
        opened = saved(tmp_path, Image.fromarray(values))
        assert [opened.getpixel((x, 0))[0] for x in range(4)] == [0, 51, 102, 255]

    def test_sixteen_dark_bits_stay_dark(self, tmp_path):
        opened = saved(tmp_path, Image.fromarray(np.full((2, 3), 200, dtype=np.uint16)))
        assert opened.getpixel((0, 0)) == (0, 0, 0)

    def test_numbers_up_to_255_are_taken_as_they_are(self):
        assert to_rgb(Image.new("F", (1, 1), 51.0)).getpixel((0, 0)) == (51, 51, 51)
        assert to_rgb(Image.new("I", (1, 1), 51)).getpixel((0, 0)) == (51, 51, 51)

    def test_two_colours_of_one_bit_are_black_and_white(self, tmp_path):
        opened = saved(tmp_path, Image.new("1", (3, 2), 1))
        assert opened.getpixel((0, 0)) == (255, 255, 255)

    @pytest.mark.parametrize("name", ["moves.gif", "moves.webp", "moves.png"])
    def test_of_an_animation_the_first_frame_is_taken(self, tmp_path, name):
        frames = [Image.new("RGB", (16, 8), c) for c in ("black", "white", "white")]
        opened = saved(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
        assert opened.size == (16, 8) and max(opened.getpixel((8, 4))) < 8

    def test_a_missing_file_is_said_to_be_missing(self, tmp_path):
        assert "no such picture" in refusal(tmp_path / "nothing.png")

    def test_a_folder_is_no_picture(self, tmp_path):
        assert "a folder" in refusal(tmp_path)

    @pytest.mark.parametrize("content", [
        b"", b"a line of text\n", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF89a\x05\x00\x05\x00",
        b"\xff\xd8\xff\xe0\x00\x10JFIF"])
    def test_what_is_no_picture_is_refused(self, tmp_path, content):
        (tmp_path / "picture.png").write_bytes(content)
        assert "not a readable picture" in refusal(tmp_path / "picture.png")

    @pytest.mark.parametrize("name", ["picture.png", "picture.jpg", "picture.gif", "picture.bmp"])
    def test_a_picture_that_is_cut_off_is_refused(self, tmp_path, name):
        path = tmp_path / name
        noise(40, 30).save(path)
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
        assert "not a readable picture" in refusal(path)

    @pytest.mark.parametrize("name", ["picture.png", "picture.gif"])
    def test_a_picture_that_is_damaged_in_the_middle_is_refused(self, tmp_path, name):
        path = tmp_path / name
        noise(40, 30).save(path)
        data = path.read_bytes()
        path.write_bytes(data[:len(data) // 2] + data[len(data) // 2 + 99:])
        assert "not a readable picture" in refusal(path)

    @pytest.mark.parametrize("width, height", [(MOST_PIXELS // 1000 + 1, 1000), (60000, 60000)])
    def test_a_decompression_bomb_is_refused_by_its_header(self, tmp_path, width, height):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        (tmp_path / "bomb.png").write_bytes(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0"))
            + chunk(b"IEND", b""))
        assert "more than 64,000,000 pixels" in refusal(tmp_path / "bomb.png")

    def test_an_error_of_the_decoder_names_the_file(self, tmp_path, monkeypatch):
        def broken(*arguments):
            raise ValueError("something\nlong")
        saved(tmp_path, noise(7, 5))
        monkeypatch.setattr(Image.Image, "convert", broken)
        assert "not a readable picture" in refusal(tmp_path / "picture.png")

    @pytest.mark.parametrize("mode", ["P", "1", "LA", "RGBA", "CMYK", "I;16", "F"])
    def test_pictures_of_every_mode_are_turned(self, tmp_path, mode):
        grey = noise(7, 5).convert("L")
        picture = Image.fromarray(np.asarray(grey, np.uint16) * 257) if mode == "I;16" \
            else grey.convert("RGB").convert(mode) if mode in ("P", "CMYK") else grey.convert(mode)
        exif, kind = Image.Exif(), {"CMYK": "JPEG", "F": "TIFF"}.get(mode, "PNG")
        exif[274] = 6
        picture.save(tmp_path / "plain", kind)
        picture.save(tmp_path / "turned", kind, exif=exif)
        want = open_image(tmp_path / "plain").rotate(-90, expand=True)
        assert np.array_equal(open_image(tmp_path / "turned"), want)

    def test_broken_exif_does_not_cost_the_picture(self, tmp_path):
        noise(7, 5).save(tmp_path / "a.png", exif=b"Exif\0\0nonsense, not a header")
        assert np.array_equal(open_image(tmp_path / "a.png"), noise(7, 5))

    def test_bytes_are_as_good_as_paths(self, tmp_path):
        noise(7, 5).save(tmp_path / "a.png")
        data = (tmp_path / "a.png").read_bytes()
        for source in (data, tmp_path / "a.png", str(tmp_path / "a.png")):
            assert np.array_equal(open_image(source), noise(7, 5))

    def test_what_is_in_memory_has_the_name_it_is_given(self):
        with pytest.raises(ValueError, match="^s.tar: 7.jpg: not a readable picture"):
            open_image(b"nothing", "s.tar: 7.jpg")
        with pytest.raises(ValueError, match="^a picture in memory: not"):
            open_image(b"")

    def test_a_pipe_or_a_device_is_refused_and_not_waited_for(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for path in (tmp_path / "pipe", "/dev/zero", "/dev/null"):
            assert "a pipe or a device, not a picture" in refusal(path)

    def test_a_file_without_end_is_refused_by_its_size(self, tmp_path):
        with open(tmp_path / "a.jpg", "wb") as file:
            file.write(b"\xff\xd8" + b"\xff" * 9)
            file.truncate(MOST_BYTES + 1)                    # takes no room on the disk
        assert "larger than 100,000,000 bytes" in refusal(tmp_path / "a.jpg")

    def test_strange_names_stay_on_their_line(self, tmp_path):
        for name in ("a\nb.png", "a\x1b[2Jb.png", "\udcff.png", "n" * 300, "a\0b"):
            with pytest.raises(ValueError) as caught:
                open_image(tmp_path / name)
            assert str(caught.value).isprintable()

    def test_text_that_unpacks_without_end_is_refused(self, tmp_path):
        header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
        text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000)))
        (tmp_path / "a.png").write_bytes(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + text
            + chunk(b"IDAT", zlib.compress(b"\0\1\2\3")) + chunk(b"IEND", b""))
        assert "not a readable picture" in refusal(tmp_path / "a.png")

    def test_a_frame_larger_than_the_header_says_is_refused(self, tmp_path):
        frame = b",\0\0\0\0" + struct.pack("<HH", 60000, 60000) + b"\0\x02\x02L\x01\0;"
        (tmp_path / "a.gif").write_bytes(b"GIF89a\x05\0\x05\0\x80\0\0" + bytes(6) + frame)
        assert "more than 64,000,000 pixels" in refusal(tmp_path / "a.gif")

    def test_of_many_frames_one_is_decoded(self, tmp_path, monkeypatch):
        frames = [Image.new("P", (16, 8), number % 7) for number in range(300)]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        decoded, load = [], Image.Image.load
        monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(1) or load(self))
        assert open_image(tmp_path / "a.gif").size == (16, 8) and len(decoded) < 20

    @pytest.mark.parametrize("form", ["EPS", "PCX", "TGA", "ICO"])
    def test_rare_formats_are_not_opened(self, tmp_path, form):
        noise(16, 16).save(tmp_path / "a.png", form)
        assert "not a readable picture" in refusal(tmp_path / "a.png")

    def test_a_picture_cut_off_anywhere_is_refused_or_whole(self):
        for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
            out = io.BytesIO()
            noise(11, 7).save(out, form)
            data = out.getvalue()
            for end in range(len(data)):
                try:
                    assert np.array_equal(open_image(data[:end]), open_image(data))
                except ValueError as error:
                    assert "\n" not in str(error)

    def test_numbers_that_are_none_are_black(self, tmp_path):
        values = np.array([[np.nan, np.inf, -np.inf, 51]], dtype=np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert to_rgb(Image.fromarray(values)).getpixel((0, 0)) == (0, 0, 0)
            opened = saved(tmp_path, Image.fromarray(values), "a.tiff")
        assert [opened.getpixel((x, 0))[0] for x in (0, 1, 2)] == [0, 255, 0]


class TestCentreCrop:
    def test_the_middle_of_a_wide_picture_by_hand(self):
        picture = Image.new("RGB", (12, 4), "black")
        picture.paste("white", (4, 0, 8, 4))                   # the middle third
        assert np.asarray(center_crop(picture, 4)).min() == 255

    def test_the_middle_of_a_high_picture_by_hand(self):
        picture = Image.new("RGB", (4, 12), "black")
        picture.paste("white", (0, 4, 4, 8))
        assert np.asarray(center_crop(picture, 4)).min() == 255

    def test_an_odd_margin_is_cut_where_torchvision_cuts_it(self):
        columns = np.arange(7, dtype=np.uint8)[None, :, None].repeat(4, 0).repeat(3, 2)
        crop = np.asarray(center_crop(Image.fromarray(columns), 4))
        assert crop[0, :, 0].tolist() == [2, 3, 4, 5]          # round(1.5) columns are left out

    @pytest.mark.parametrize("width, height", [(64, 47), (47, 64), (100, 37), (31, 90), (13, 11)])
    def test_it_is_resizing_the_shorter_side_and_then_cutting(self, width, height):
        size, ramp = 23, np.add.outer(np.arange(height), np.arange(width)) * 255.0
        picture = Image.fromarray((ramp / (height + width)).astype(np.uint8)).convert("RGB")
        short = min(width, height)
        wide, high = int(size * width / short), int(size * height / short)
        left, top = round((wide - size) / 2), round((high - size) / 2)
        whole = picture.resize((wide, high), Image.Resampling.BICUBIC)
        want = np.asarray(whole.crop((left, top, left + size, top + size)), int)
        assert np.abs(np.asarray(center_crop(picture, size), int) - want).max() <= 1

    def test_shrinking_averages(self):
        checkers = Image.fromarray(((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8))
        assert np.abs(np.asarray(center_crop(checkers, 8), int) - 127).max() <= 2

    def test_a_picture_of_the_size_is_left_alone(self):
        picture = noise(9, 9)
        assert np.array_equal(center_crop(picture, 9), picture)

    def test_a_sliver_costs_no_memory(self):
        assert center_crop(Image.new("RGB", (1_000_000, 1)), 16).size == (16, 16)


class TestRandomCrop:
    """A picture whose red is the column and whose green is the row: a crop says where it lay."""

    def crops(self, width, height, least, count=300):
        where = np.zeros((height, width, 3), dtype=np.uint8)
        where[..., 0], where[..., 1] = np.arange(width), np.arange(height)[:, None]
        rng = random.Random(0)
        made = [random_crop(Image.fromarray(where), 23, rng, least) for _ in range(count)]
        assert all(crop.size == (23, 23) for crop in made)
        return np.stack([np.asarray(crop, float) for crop in made])

    @pytest.mark.parametrize("width, height", [(200, 71), (71, 200)])
    def test_the_shorter_side_is_whole_and_the_longer_is_cut_anywhere(self, width, height):
        crops = self.crops(width, height, 1)
        along, across = (0, 1) if width > height else (1, 0)
        middle = crops[:, 11, 11]
        assert np.ptp(middle[:, across]) == 0 and middle[0, across] == pytest.approx(35, abs=1)
        low, high = 35, 200 - 36         # the middles of the first and the last square
        assert middle[:, along].min() < low + 3 and middle[:, along].max() > high - 3
        assert middle[:, along].mean() == pytest.approx((low + high) / 2, abs=8)

    def test_a_square_loses_up_to_a_tenth_of_its_area(self):
        crops = self.crops(100, 100, 0.9)
        sides = (crops[:, 11, -1, 0] - crops[:, 11, 0, 0]) * 23 / 22
        assert 100 * 0.9 ** 0.5 - 1.5 < sides.min() < 97 and 98 < sides.max() < 101
        assert np.allclose(sides, (crops[:, -1, 11, 1] - crops[:, 0, 11, 1]) * 23 / 22, atol=1.5)
        assert crops[:, 11, 11, 0].std() > 0.5 < crops[:, 11, 11, 1].std()

    def test_it_is_a_function_of_the_rng(self):
        one, same, other = (random_crop(noise(40, 31), 8, random.Random(s)) for s in (1, 1, 2))
        assert np.array_equal(one, same) and not np.array_equal(one, other)

    def test_slivers_and_tiny_pictures_are_cut_too(self):
        for size in ((1_000_000, 1), (1, 7), (1, 1)):
            assert random_crop(Image.new("RGB", size), 16, random.Random(0)).size == (16, 16)


class TestTensors:
    def test_rows_are_height_and_channels_come_first(self):
        made = to_tensor([noise(7, 5, 1), noise(7, 5, 2)])
        assert made.shape == (2, 3, 5, 7) and made.dtype == torch.uint8
        assert made[1, :, 4, 6].tolist() == list(noise(7, 5, 2).getpixel((6, 4)))

    def test_normalise_has_the_published_values(self):
        pixels = torch.tensor([[0, 0, 0], [255, 255, 255], [124, 117, 104]], dtype=torch.uint8)
        made = normalize_pixels(pixels[:, :, None, None])
        want = torch.tensor([[-1.7922625, -1.7520971, -1.4802198],
                             [1.9303361, 2.0748837, 2.1458969],
                             [0.0179424, 0.0038118, -0.0013330]])
        assert made.dtype == torch.float32
        torch.testing.assert_close(made[:, :, 0, 0], want, atol=2e-6, rtol=0)

    def test_normalise_is_by_channel(self):
        made = normalize_pixels(torch.full((2, 3, 5, 7), 128, dtype=torch.uint8))
        for c in range(3):
            want = (128 / 255 - MEAN[c]) / STD[c]
            torch.testing.assert_close(made[:, c], torch.full((2, 5, 7), want))


class TestOpenFolder:
    def test_pictures_come_by_name_and_other_files_are_counted(self, tmp_path, capsys):
        for name, colour in (("b.png", "red"), ("a.jpg", "blue")):
            Image.new("RGB", (8, 8), colour).save(tmp_path / name)
        (tmp_path / "notes.txt").write_text("not a picture")
        (tmp_path / "inner").mkdir()
        paths, pictures = open_folder(tmp_path)
        assert [p.name for p in paths] == ["a.jpg", "b.png"]
        assert pictures[1].getpixel((0, 0)) == (255, 0, 0)
        said = capsys.readouterr()
        assert "passed over 1 of 3 files" in said.err and "notes.txt" in said.err and not said.out

    def test_numbers_in_names_count_as_numbers(self, tmp_path):
        names = ["1.png", "2.png", "10.png", "a2b1.png", "a2b10.png", "a10.png", "b.png"]
        for name in reversed(names):
            Image.new("RGB", (4, 4)).save(tmp_path / name)
        assert [path.name for path in open_folder(tmp_path)[0]] == names

    def test_a_folder_without_pictures_is_refused(self, tmp_path):
        (tmp_path / "notes.txt").write_text("not a picture")
        with pytest.raises(ValueError, match="no pictures in it"):
            open_folder(tmp_path)

    def test_a_missing_folder_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="no such folder"):
            open_folder(tmp_path / "nothing")


class TestOpenFrames:
    def test_a_photo_with_a_second_picture_in_its_file_is_no_clip(self, tmp_path):
        for name, kind in (("a.jpg", "MPO"), ("a.tif", "TIFF")):
            large, small = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (8, 6), "blue")
            large.save(tmp_path / name, kind, save_all=True, append_images=[small])
            frame, = open_frames(tmp_path / name)
            assert frame.size == (40, 30)

    def test_every_frame_is_turned_as_the_first(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        frames = [Image.new("RGB", (40, 20), colour) for colour in ("red", "blue", "white")]
        frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], exif=exif)
        assert [frame.size for frame in open_frames(tmp_path / "a.webp")] == [(20, 40)] * 3

    """Clips whose frame number i is i * 20 bright."""

    def frames(self, count, size=(8, 6)):
        return [Image.new("RGB", size, (20 * i % 256, 20 * i // 256, 0)) for i in range(count)]

    def numbers(self, frames):
        assert all(frame.mode == "RGB" for frame in frames)
        pixels = [frame.getpixel((0, 0)) for frame in frames]
        return [(red + 256 * green) // 20 for red, green, _ in pixels]

    def film(self, path, count, size=(8, 6)):
        first, *rest = self.frames(count, size)
        first.save(path, save_all=True, append_images=rest, duration=40, lossless=True)
        return path

    @pytest.mark.parametrize("name", ["a.png", "a.webp"])
    def test_an_animation_is_its_frames_in_order(self, tmp_path, name):
        assert self.numbers(open_frames(self.film(tmp_path / name, 5))) == [0, 1, 2, 3, 4]

    def test_a_gif_of_colours_is_its_frames_in_order(self, tmp_path):
        assert self.numbers(open_frames(self.film(tmp_path / "a.gif", 5))) == [0, 1, 2, 3, 4]

    def test_transparency_is_laid_over_white_in_every_frame(self, tmp_path):
        first, *rest = (Image.new("RGBA", (8, 6), (20 * i, 0, 0, 0)) for i in range(4))
        path = tmp_path / "a.webp"
        first.save(path, save_all=True, append_images=rest, lossless=True, exact=True)
        frames = open_frames(path)
        assert [frame.getpixel((0, 0)) for frame in frames] == [(255, 255, 255)] * 4

    def test_a_picture_at_rest_is_one_frame(self, tmp_path):
        for name in ("a.png", "a.jpg", "a.gif"):
            halves().save(tmp_path / name, quality=95)
            assert len(open_frames(tmp_path / name)) == 1
        frame, = open_frames(tmp_path / "a.png")
        assert frame.tobytes() == open_image(tmp_path / "a.png").tobytes()

    def test_a_folder_is_its_pictures_by_name(self, tmp_path):
        for i, frame in enumerate(self.frames(4)):
            frame.save(tmp_path / f"{(i + 2) % 4}.png")
        assert self.numbers(open_frames(tmp_path)) == [2, 3, 0, 1]

    @pytest.mark.parametrize("count, most, want", [
        (9, 5, [0, 2, 4, 6, 8]), (9, 2, [0, 8]), (9, 1, [0]), (3, 5, [0, 1, 2]),
        (64, 32, None)])
    def test_too_many_are_thinned_out_evenly_and_keep_both_ends(self, tmp_path, count, most, want):
        film = self.film(tmp_path / "a.png", count)
        found = self.numbers(open_frames(film, most))
        assert found == want if want else found[0] == 0 and found[-1] == count - 1
        assert len(found) == min(most, count) and len(set(found)) == len(found)
        steps = {b - a for a, b in zip(found, found[1:])}
        assert len(steps) <= 1 or max(steps) - min(steps) == 1
        if count == 64:
            assert found == self.numbers(open_frames(film))              # 32 unless told

    def test_a_clip_that_goes_on_too_long_is_refused(self, tmp_path, monkeypatch):
        film = self.film(tmp_path / "a.png", 8)
        monkeypatch.setattr(images, "MOST_FRAMES", 7)
        with pytest.raises(ValueError, match="a.png: a clip of more than 7 frames$"):
            open_frames(film)
        monkeypatch.setattr(images, "MOST_FRAMES", 8)
        assert len(open_frames(film)) == 8
        monkeypatch.setattr(images, "MOST_PIXELS", 48)                    # four frames of these
        with pytest.raises(ValueError, match="a clip of more than 4 frames$"):
            open_frames(film)

    def test_what_is_no_clip_is_refused_in_one_line(self, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "notes.txt").write_text("not a picture")
        for name, words in (("empty", "no pictures in it"), ("notes.txt", "not a readable picture"),
                            ("absent.gif", "no such picture")):
            with pytest.raises(ValueError, match=words) as caught:
                open_frames(tmp_path / name)
            assert name in str(caught.value) and "\n" not in str(caught.value)

    def test_an_animation_that_is_cut_off_is_refused_or_told_without_its_end(self, tmp_path):
        whole = self.film(tmp_path / "a.gif", 5, (40, 30)).read_bytes()
        path = tmp_path / "cut.gif"
        for cut in range(1, len(whole), 7):
            path.write_bytes(whole[:cut])
            try:
                found = self.numbers(open_frames(path))
                assert found == list(range(len(found))) and found
            except ValueError as error:
                assert "cut.gif: not a readable " in str(error) and "\n" not in str(error)
