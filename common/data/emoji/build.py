"""Build emoji.zip: a picture, a name and keywords for every emoji, from three Debian packages.

    apt-get install fonts-noto-color-emoji unicode-cldr-core unicode-data
    python -m common.data.emoji.build            # or with ROOT, where the packages lie unpacked

Only needed to renew the archive; the same packages and the same Pillow give the same bytes. Pillow
must come with raqm, as its wheels do: many emoji are several characters drawn as one picture.
"""
import argparse
import io
import itertools
import json
import re
import unicodedata
import zipfile
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image, ImageDraw, ImageFont

LICENCES = {"noto-emoji.txt": "doc/fonts-noto-color-emoji/copyright",
            "cldr.txt": "doc/unicode-cldr-core/copyright",
            "unicode-data.txt": "doc/unicode-data/copyright",
            "Apache-2.0.txt": "common-licenses/Apache-2.0"}
STRAIGHT = str.maketrans("’‘“”", "''\"\"")          # quotation marks as a person types them


def entry(codepoints, name, keywords, group, subgroup):
    """One emoji of index.json.

    Besides the name as it is, "man: dark skin tone, beard": `base`, without tones, "man: beard";
    `tones`, ["dark"]; `phrase`, as one would say it, "man with dark skin tone and beard".
    """
    head, _, tail = name.partition(": ")
    parts = tail.split(", ") if tail else []
    tones = [part for part in parts if part.endswith(" skin tone")]
    looks = tones + [part for part in parts if part.endswith(("hair", "beard", "bald"))]
    what = [part for part in parts if part not in looks]               # kiss: woman, man
    phrase = head
    for link, words in ((" " if head == "keycap" else " of ", what), (" with ", looks)):
        if words:
            phrase += link + " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    file = name.replace("#", "hash").replace("*", "asterisk").replace("'", "")
    file = unicodedata.normalize("NFKD", file).encode("ascii", "ignore").decode().lower()
    rest = ", ".join(part for part in parts if part not in tones)
    return {"file": re.sub(r"[^a-z0-9]+", "-", file).strip("-") + ".png", "codepoints": codepoints,
            "name": name, "phrase": re.sub("bald$", "bald head", phrase), "keywords": keywords,
            "group": group, "subgroup": subgroup, "base": f"{head}: {rest}" if rest else head,
            "tones": [tone.removesuffix(" skin tone") for tone in tones]}


def collect(share):
    """[(entry, 64 x 64 RGBA picture), ...] of the fully-qualified emoji that the font has."""
    font = ImageFont.truetype(share / "fonts/truetype/noto/NotoColorEmoji.ttf", 109)  # its one size

    def render(text):
        glyph = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(glyph).text((0, 0), text, font=font, embedded_color=True, anchor="lt")
        # All ink lies within columns 4..131, so the square around it halves exactly to 64 x 64.
        return glyph.crop((4, 0, 132, 128)).reduce(2)
    trees = [ElementTree.parse(share / "unicode/cldr/common" / folder / "en.xml")
             for folder in ("annotations", "annotationsDerived")]
    cldr = {(node.get("cp"), node.get("type")): node.text.translate(STRAIGHT)
            for tree in trees for node in tree.iter("annotation")}
    found, groups = {}, {}
    for line in (share / "unicode/emoji/emoji-test.txt").read_text("utf-8").splitlines():
        if heading := re.match("# (group|subgroup): (.+)", line):
            groups[heading[1]] = heading[2]
        if match := re.match(r"([0-9A-F ]+?) +; fully-qualified +# (\S+) E[\d.]+ (.+)", line):
            codepoints, text, name = match.groups()
            key, picture = text.replace("\ufe0f", ""), render(text)        # CLDR leaves U+FE0F out
            name = cldr.get((key, "tts"), name.translate(STRAIGHT))
            # Not "×" or "無": signs of which one emoji alone would teach the tokenizer.
            keywords = [word for word in re.split(r" \| |, ", cldr.get((key, None), ""))
                        if re.search("[A-Za-z0-9]", word)]
            keywords = keywords or re.findall(r"[\w-]+ skin tone|[\w-]+", name)
            if round(font.getlength(text)) == 136:       # else it falls apart into several glyphs
                item = entry(codepoints, name, keywords, **groups), picture
                found.setdefault(picture.tobytes(), []).append(item)
    found.pop(render("\U0003FFFD").tobytes(), None)      # what the font shows for what it lacks
    # Some emoji share one picture (Norway and Bouvet Island): the shortest name stands for all.
    return [min(items, key=lambda item: len(item[0]["name"])) for items in found.values()]


def build(share, folder):
    """Renew emoji.zip and LICENSES-emoji.txt in the folder; return the number of emoji."""
    items, rule, beside = collect(share), f"\n{'=' * 98}\n", folder / "LICENSES-emoji.txt"
    head = beside.read_text("utf-8").split(rule)[0]
    texts = {name: (share / path).read_text("utf-8") for name, path in LICENCES.items()}
    beside.write_text(rule.join([head, *itertools.chain(*texts.items())]), "utf-8")
    files = {f"licences/{name}": text for name, text in {"README.txt": head, **texts}.items()}
    files["index.json"] = json.dumps([item for item, _ in items], ensure_ascii=False, indent=0)
    for item, picture in items:
        data = io.BytesIO()                # 128 colours: a third of the size of full colour
        picture.quantize(128, Image.Quantize.FASTOCTREE).save(data, "PNG", optimize=True)
        files[item["file"]] = data.getvalue()
    with zipfile.ZipFile(folder / "emoji.zip", "w") as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)   # of 1980-01-01, so that two builds are identical
            info.create_system, info.external_attr = 3, 0o644 << 16
            method = zipfile.ZIP_STORED if name.endswith(".png") else zipfile.ZIP_DEFLATED
            archive.writestr(info, data, method, compresslevel=9)
    return len(items)


if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    args.add_argument("root", nargs="?", default="/", help="where the packages lie unpacked")
    share = Path(args.parse_args().root, "usr/share")
    print("emoji:", build(share, Path(__file__).parent))
