"""Build emoji.zip: a picture, a name and keywords for every emoji, from three Debian packages.

    apt-get install fonts-noto-color-emoji unicode-cldr-core unicode-data
    python -m common.data.emoji.build            # or with ROOT, where the packages lie unpacked

Only needed to renew the archive, which is in the repository. The first package has the pictures
(Noto Color Emoji), the second the names and keywords (Unicode CLDR), the third the list of emoji
with its groups (emoji-test.txt). Many emoji are several characters drawn as one picture (a flag
is two letters, "woman farmer: dark skin tone" four characters), so Pillow must come with raqm,
which its wheels do. The same packages and the same Pillow give the same bytes.
"""

import io
import json
import re
import sys
import unicodedata
import zipfile
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image, ImageDraw, ImageFont, features

FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
EMOJI_TEST = "usr/share/unicode/emoji/emoji-test.txt"
CLDR = "usr/share/unicode/cldr/common"
LICENCES = {
    "noto-emoji.txt": "usr/share/doc/fonts-noto-color-emoji/copyright",
    "cldr.txt": "usr/share/doc/unicode-cldr-core/copyright",
    "unicode-data.txt": "usr/share/doc/unicode-data/copyright",
    "Apache-2.0.txt": "usr/share/common-licenses/Apache-2.0",
}
LICENCES_HEAD = """\
Licences of emoji.zip

The pictures are rendered from the font Noto Color Emoji: its images are under the Apache License
2.0, the font itself (not contained here) is under the SIL Open Font License 1.1. Names and
keywords come from Unicode CLDR, the list of emoji and its groups from the Unicode Character
Database; both are under the Unicode licence. Changes: pictures cropped, halved to 64 x 64 pixels
and reduced to {colours} colours; typographic quotation marks in names made straight.
The texts below are those of the Debian packages from which the archive was made.
"""
STRIKE = 109  # the one size, in pixels, at which the font has bitmaps; they are 136 x 128
COLOURS = 128  # per picture: hardly visible at 64 x 64, and a third of the size of full colour
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark",
         "1F3FF": "dark"}


def read_list(root):
    """Yield (group, subgroup, codepoints, text, name) of every fully-qualified emoji, in order."""
    group = subgroup = None
    for line in (root / EMOJI_TEST).read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        elif match := re.match(r"([0-9A-F ]+?) +; fully-qualified +# (\S+) E[\d.]+ (.+)", line):
            yield group, subgroup, match[1].split(), match[2], match[3]


def read_cldr(root):
    """Return ({emoji: name}, {emoji: [keyword, ...]}); CLDR leaves U+FE0F out of its keys."""
    names, keywords = {}, {}
    for folder in ("annotations", "annotationsDerived"):
        for node in ElementTree.parse(root / CLDR / folder / "en.xml").iter("annotation"):
            if node.get("type") == "tts":
                names[node.get("cp")] = straight(node.text)
            else:
                words = re.split(r" \| |, ", straight(node.text))
                # Not "×" or "無": signs of which one emoji alone would teach the tokenizer.
                keywords[node.get("cp")] = [w for w in words if re.search("[A-Za-z0-9]", w)]
    return names, keywords


def straight(text):
    """Quotation marks as a person types them: twelve o'clock, Japanese "here" button."""
    return text.translate(str.maketrans("’‘“”", "''\"\""))


def render(font, text):
    """Return the emoji as a 64 x 64 RGBA picture, or None where the font has no single glyph."""
    if round(font.getlength(text)) != 136:  # a sequence that falls apart is several glyphs wide
        return None
    glyph = Image.new("RGBA", (136, 128))
    ImageDraw.Draw(glyph).text((0, 0), text, font=font, embedded_color=True, anchor="lt")
    # All ink lies within columns 4..131, so the square around it halves exactly to 64 x 64.
    return glyph.crop((4, 0, 132, 128)).reduce(2)


def slug(name):
    """A file name: "St. Barthélemy" -> "st-barthelemy"."""
    name = name.replace("#", "hash").replace("*", "asterisk").replace("'", "")
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name).strip("-")


def entry(group, subgroup, codepoints, name, keywords):
    """Return one emoji of index.json.

    Besides the name as it is, "man: dark skin tone, beard": `base`, without tones, "man: beard";
    `tones`, ["dark"]; `phrase`, as one would say it, "man with dark skin tone and beard".
    """
    head, colon, tail = name.partition(": ")
    parts = tail.split(", ") if colon else []
    tones = [part for part in parts if part.endswith(" skin tone")]
    looks = [part for part in parts if part.endswith(("hair", "beard", "bald"))]
    what = [part for part in parts if part not in tones + looks]  # kiss: woman, man
    phrase = head
    if what:
        phrase += (" " if head == "keycap" else " of ") + listed(what)
    if tones or looks:
        phrase += " with " + listed(tones + looks).replace("bald", "bald head")
    rest = [part for part in parts if part not in tones]
    tones = [tone.removesuffix(" skin tone") for tone in tones]
    assert set(tones) == {TONES[c] for c in codepoints if c in TONES}, name
    return {"file": slug(name) + ".png", "codepoints": " ".join(codepoints), "name": name,
            "phrase": phrase, "keywords": keywords, "group": group, "subgroup": subgroup,
            "base": head + ": " + ", ".join(rest) if rest else head, "tones": tones}


def listed(words):
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def collect(root):
    """Return [(entry, picture), ...] and print what was left out and why."""
    font = ImageFont.truetype(root / FONT, STRIKE, layout_engine=ImageFont.Layout.RAQM)
    unknown = render(font, "\U0003FFFD").tobytes()  # what the font shows for what it lacks
    names, keywords = read_cldr(root)
    found, dropped = {}, []
    for group, subgroup, codepoints, text, name in read_list(root):
        key = text.replace("\ufe0f", "")
        name = names.get(key, straight(name))
        words = keywords.get(key) or re.findall(r"[\w-]+ skin tone|[\w-]+", name)
        picture = render(font, text)
        if picture is None or not picture.getbbox() or picture.tobytes() == unknown:
            dropped.append(name)
            continue
        item = entry(group, subgroup, codepoints, name, words), picture
        found.setdefault(picture.tobytes(), []).append(item)
    # Some emoji share one picture (Norway and Bouvet Island): the shortest name stands for all.
    kept = [min(items, key=lambda item: len(item[0]["name"])) for items in found.values()]
    for items in found.values():
        if len(items) > 1:
            print("one picture:", "; ".join(item[0]["name"] for item in items))
    print(f"dropped, not one glyph: {len(dropped)} {dropped}")
    print(f"dropped, same picture as another: {sum(map(len, found.values())) - len(kept)}")
    return kept


def add(archive, name, data, method=zipfile.ZIP_STORED):
    """Write one file with a fixed time and mode, so that two builds are identical."""
    info = zipfile.ZipInfo(name)  # its default time is 1980-01-01
    info.create_system, info.external_attr = 3, 0o644 << 16
    archive.writestr(info, data, compress_type=method, compresslevel=9)


def png(picture):
    """Return the bytes of a palette PNG with transparency."""
    data = io.BytesIO()
    picture.quantize(COLOURS, Image.Quantize.FASTOCTREE).save(data, "PNG", optimize=True)
    return data.getvalue()


def build(root, folder):
    """Write emoji.zip and LICENSES-emoji.txt into the folder; return the number of emoji."""
    items = collect(root)
    for field in ("name", "file", "codepoints"):
        assert len({item[0][field] for item in items}) == len(items), f"{field} is not unique"
    index = [item[0] for item in items]
    head = LICENCES_HEAD.format(colours=COLOURS)
    licences = {name: (root / path).read_text("utf-8") for name, path in LICENCES.items()}
    with zipfile.ZipFile(folder / "emoji.zip", "w") as archive:
        for name, text in {"README.txt": head, **licences}.items():
            add(archive, "licences/" + name, text, zipfile.ZIP_DEFLATED)
        text = json.dumps(index, ensure_ascii=False, indent=0)
        add(archive, "index.json", text, zipfile.ZIP_DEFLATED)
        for item, picture in items:
            add(archive, item["file"], png(picture))
    rule = "\n" + "=" * 98 + "\n"
    texts = [head] + [f"{name}{rule}{text}" for name, text in licences.items()]
    (folder / "LICENSES-emoji.txt").write_text(rule.join(texts), encoding="utf-8")
    return len(items)


if __name__ == "__main__":
    if not features.check("raqm"):
        sys.exit("this Pillow has no raqm: sequences would fall apart into several pictures")
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "/")
    if not (root / FONT).is_file():
        sys.exit(f"no {FONT} under {root}: install or unpack the packages named in this file")
    print("emoji:", build(root, Path(__file__).parent))
