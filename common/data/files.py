"""The user's own pictures and captions, in public formats; each is one generator of records.

    coco:FILE     COCO captions: a JSON object with "images" and "annotations"
    flickr:FILE   CSV: image_name| comment_number| comment (Flickr30k) or image,caption (Flickr8k)
    jsonl:FILE    a JSON object in each line: {"image": "a.jpg", "text": "..."}, or "texts": [...]
    tar:GLOB      webdataset shards as img2dataset writes them; {00000..00099} is expanded
    llava:FILE    LLaVA-Instruct, conversations: a JSON list, or an object in each line (.jsonl)
    interleaved:FILE  pages as in OBELICS: JSON lines with lists "images" and "texts" of one length,
                  each with null where the other has an entry

A record is {"images": [a file's name or a place in a tar], "texts": [captions], "source": name};
the texts of a conversation are its prompts and answers in turn. A record that cannot be used is
counted and left out. No picture is read from outside its folder.
"""
import contextlib
import csv
import functools
import glob
import hashlib
import itertools
import os
import re
import unicodedata
from pathlib import PureWindowsPath

import torch
from PIL import Image
from tqdm import tqdm

from common.data.images import center_crop, open_image, random_crop
from common.data.safe_read import (open_text, parse_json, printable, read_bytes, read_json,
                                   tar_members)

MOST_JSON = 2_000_000_000            # bytes of a file that has to be read as a whole
FEWEST, MOST_TESTS = 5, 1000         # records of the test split
SUFFIXES = ("jpg", "jpeg", "png", "webp")
LONGEST = 1344                       # pixels of the longer side of a whole picture
MOST_PICTURES = 5                    # of a page (Flamingo, A.1.2); a longer one is several


class Refusals:
    """The records that cannot be used: their count and the first three reasons; `skip` may be."""

    def __init__(self, skip):
        self.skip, self.count, self.reasons = skip, 0, []

    def add(self, reason):
        """Count one more."""
        self.count += 1
        if len(self.reasons) < 3:
            self.reasons.append(printable(reason, 500))

    def summary(self, tried):
        """How many of the records tried were refused, and an example, in one line."""
        return ", e.g. ".join([f"{self.count:,} of {tried:,} records refused", *self.reasons[:1]])

    def check(self, tried):
        """Raise ValueError when more than the fraction of those tried (at least 100) is refused."""
        if self.count > self.skip * max(tried, 100):
            raise ValueError(f"{self.summary(tried)}: more than --skip {self.skip:g} allows")


@contextlib.contextmanager
def refusing(refuse, where):
    """A ValueError or a broken CSV row inside the block is passed to refuse(reason), not raised."""
    try:
        yield
    except UnicodeError:
        refuse(f"{where}: not UTF-8")
    except (ValueError, csv.Error) as error:
        refuse(f"{where}: {error}")


def field(row, *keys, kind=str):
    """The value of the first of the keys that a row has. Raises ValueError for another kind."""
    found = [row[key] for key in keys if key in row] if isinstance(row, dict) else []
    if not found or not isinstance(found[0], kind):
        raise ValueError(f"no usable {keys[0]!r}")
    return found[0]


def coco(path, refuse):
    """COCO captions (Chen et al., 2015): a record for each picture, with all its captions."""
    data, captions = read_json(path, dict, MOST_JSON), {}
    if not all(isinstance(data.get(key), list) for key in ("images", "annotations")):
        raise ValueError(f"{printable(path)}: not COCO captions: no lists images and annotations")
    for number, row in enumerate(data["annotations"]):
        with refusing(refuse, f"{path}: annotation {number}"):
            image, text = field(row, "image_id", kind=(int, str)), field(row, "caption")
            captions.setdefault(image, []).append(text)
    for number, row in enumerate(data["images"]):
        with refusing(refuse, f"{path}: image {number}"):
            image, name = field(row, "id", kind=(int, str)), field(row, "file_name")
            yield {"images": [name], "texts": captions.pop(image, []), "source": name}


def flickr(path, refuse):
    """Flickr30k's results.csv or Flickr8k's captions.txt: a record for each caption."""
    with open_text(path) as file:
        first = file.readline().lower()
        bars = {"delimiter": "|", "quoting": csv.QUOTE_NONE} if "|" in first else {}
        row = header = re.findall(r"\w+", first)
        if not {"image_name", "comment"} <= {*header} and not {"image", "caption"} <= {*header}:
            raise ValueError(f"{printable(path)}: its first line names neither image_name| "
                             "comment_number| comment (Flickr30k) nor image,caption (Flickr8k)")
        rows = csv.DictReader(file, header, **bars)
        while row is not None:
            with refusing(refuse, f"{path}: line {rows.line_num + 2}"):
                row = next(rows, None)
                if row and None in row:
                    raise ValueError(f"more than {len(header)} cells")
                if row:
                    name, text = field(row, "image_name", "image"), field(row, "comment", "caption")
                    yield {"images": [name.strip()], "texts": [text], "source": name.strip()}


def jsonl(path, refuse):
    """JSON lines: "image" or "images", and "text", "caption", "texts" or "captions".

    "web": true marks a pair that was collected from the web and that nobody has read.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            with refusing(refuse, f"{path}: line {number}"):
                if line.strip():
                    row = parse_json(line)
                    names = field(row, "image", "images", kind=(str, list))
                    texts = field(row, "text", "caption", "texts", "captions", kind=(str, list))
                    names, texts = ([v] if isinstance(v, str) else v for v in (names, texts))
                    yield {"images": names, "texts": texts, "source": str((names or [""])[0]),
                           "web": "web" in row and field(row, "web", kind=bool)}


def tar(pattern, refuse):
    """Webdataset shards: the members of one name up to its first dot are a record."""
    for path in tqdm(shards(pattern), "reading tar headers", unit="shard", disable=None):
        samples = {}
        for name, place in tar_members(path, refuse):
            key, suffix = re.fullmatch(r"((?:.*/)?[^.]*)\.?(.*)", name, re.DOTALL).groups()
            samples.setdefault(key, {}).setdefault(suffix.lower(), place)
        for key, parts in samples.items():
            with refusing(refuse, f"{path}: {key}"):
                texts = [read_bytes(*parts["txt"]).decode()] if "txt" in parts else []
                if "json" in parts and not texts:
                    texts = [field(parse_json(read_bytes(*parts["json"])), "caption")]
                yield {"images": [parts[s] for s in SUFFIXES if s in parts][:1], "texts": texts,
                       "source": f"{os.path.basename(path)}/{key}"}


def llava(path, refuse):
    """LLaVA-Instruct (Liu et al., 2023): a record for each conversation, with or without pictures.

    "conversations" has {"from": "human" or "gpt", "value"} in turn. Each "<image>" is taken out of
    the texts: the model's template says where a picture stands.
    """
    data = read_bytes(path, most=MOST_JSON)
    samples = [line for line in data.splitlines() if line.strip()] if path.endswith(".jsonl") \
        else parse_json(data, path)
    if not isinstance(samples, list):
        raise ValueError(f"{printable(path)}: not LLaVA-Instruct: no list of conversations")
    for number, sample in enumerate(samples, 1):
        with refusing(refuse, f"{path}: conversation {number}"):
            sample = parse_json(sample) if isinstance(sample, bytes) else sample
            turns = field(sample, "conversations", kind=list)
            roles, values = ([field(t, key) for t in turns] for key in ("from", "value"))
            if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
                raise ValueError(f"turns in the order {', '.join(roles)}, not human, gpt, ...")
            names = field(sample, "image", "images", kind=(str, list)) \
                if sample.get("image") or sample.get("images") else []
            names = [names] if isinstance(names, str) else names
            counts = [(a + b).count("<image>") for a, b in zip(values[::2], values[1::2])]
            if sum(counts) != len(names):
                raise ValueError(f'{sum(counts)} "<image>" in the texts and {len(names)} pictures')
            texts = [usable_text(re.sub("<image>\n?|\n<image>", "", value)) for value in values]
            images = [usable_name(name) for name in names]
            # A picture has several conversations: of the same name, they are in the same split.
            source = str(images[0] if images else sample.get("id") or number)
            yield {"images": images, "texts": texts, "source": source, "web": False,
                   "counts": counts}     # of pictures, in each turn


def interleaved(path, refuse):
    """OBELICS's form (Laurençon et al., 2023): a record for each page, of several for a long one.

    A turn is a text with the pictures since the text before it; what follows the last text is left
    out.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            with refusing(refuse, f"{path}: line {number}"):
                if line.strip():
                    row = parse_json(line)
                    images, texts = (field(row, key, kind=list) for key in ("images", "texts"))
                    if len(images) != len(texts) or any(
                            (a is None) == (b is None) for a, b in zip(images, texts)):
                        raise ValueError('"images" and "texts" are not of one length with null '
                                         "where the other stands")
                    pages, waiting = [], []
                    for name, text in zip(images, texts):
                        if text is None:
                            waiting.append(usable_name(name))
                            continue
                        if not pages or len(pages[-1]["images"]) + len(waiting) > MOST_PICTURES:
                            pages.append({"images": [], "texts": [], "counts": [], "web": False})
                        pages[-1]["images"] += waiting
                        pages[-1]["texts"] += ["", usable_text(text)]
                        pages[-1]["counts"].append(len(waiting))
                        waiting = []
                    pages = [page for page in pages if page["images"]]
                    if not pages:
                        raise ValueError("no text behind a picture")
                    for page in pages:               # of one source: in the same split
                        yield page | {"source": str(pages[0]["images"][0])}


FORMATS = {"coco": coco, "flickr": flickr, "jsonl": jsonl, "tar": tar, "llava": llava,
           "interleaved": interleaved}
# The models that learn from turns; the other formats have captions, for all.
LEARNERS = {"llava": "llava", "interleaved": "flamingo"}


def shards(pattern):
    """The tar files of a pattern: "a-{08..11}.tar" is a-08.tar to a-11.tar, globs as usual."""
    braces = re.fullmatch(r"(.*?)\{(\d+)\.\.(\d+)\}(.*)", pattern)
    if braces:
        before, first, last, after = braces.groups()
        return [path for number in range(int(first), int(last) + 1)
                for path in shards(f"{before}{number:0{len(first)}d}{after}")]
    if not glob.glob(pattern):
        raise ValueError(f"{printable(pattern)}: no such tar file")
    return sorted(glob.glob(pattern))


def usable_name(name):
    """A file's name without its detours, or a place in a tar as it is. Raises ValueError."""
    if isinstance(name, tuple):
        return name
    path = PureWindowsPath(name if isinstance(name, str) else "")     # knows / and \ and drives
    if not path.parts or path.anchor or ".." in path.parts:
        raise ValueError(f"{name!r:.300} is no name inside the folder of pictures")
    return path.as_posix()


def usable_text(text):
    """A text without the spaces around it. Raises ValueError when it is empty or no UTF-8."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError("an empty text")
    text.encode()                        # UnicodeError: an odd byte, or half a surrogate pair
    return text.strip()


class Files:
    """Records of files of the user's own; the test split is a function of their names alone.

    web, human: the records of train that are marked as from the web, and the others. test: human
    records, if there are any. has_turns: whether the records are turns; learner: the file of the
    model that learns from them. lengths: then the
    words of each record of train, a list of int, negative for one without pictures; else None.

    kind: one of FORMATS; where: its file or pattern; images: the folder of the pictures (default:
    the file's own); skip: the fraction of records that may be refused; shuffle: for tar, the size
    of the shuffle window; whole: pictures are not cropped, only shrunk to LONGEST. Raises
    ValueError for too many refused or too few usable records.
    """
    zero_shot, classes, all_classes, templates, tasks = None, (), (), (), ()     # captions alone
    has_turns, learner, lengths = False, None, None
    reads_pictures = True                # False: records are blank (for a language model)

    def __init__(self, kind, where, *, image_size, images=None, skip=0.05, shuffle=10_000,
                 whole=False):
        if not 0 <= skip < 1:
            raise ValueError(f"--skip {skip}: a fraction, from 0 to less than 1")
        if shuffle < 1:
            raise ValueError(f"--shuffle {shuffle}: must be at least 1")
        if images is not None and (kind == "tar" or not os.path.isdir(images)):
            why = "a tar holds its own pictures" if kind == "tar" else "no such folder"
            raise ValueError(f"--images {printable(images)}: {why}")
        self.image_size, self.skip, self.shuffle, self.whole = image_size, skip, shuffle, whole
        self.name = printable(os.path.basename(where))
        self.folder = os.path.realpath(images or os.path.dirname(where))
        self.refused = Refusals(skip)
        self.has_turns, self.learner = kind in LEARNERS, LEARNERS.get(kind)
        entries = self._index(FORMATS[kind](where, self.refused.add))
        self.refused.check(self.tried)
        human = len({entry["source"] for entry in entries if not entry["web"]})
        self.has_web = any(entry["web"] for entry in entries)
        if (human or len(entries)) < 4 * FEWEST:
            what = "human" if human and self.has_web else "usable"
            raise ValueError(f"{printable(where)}: {human or len(entries)} {what} records of "
                             f"different names, at least {4 * FEWEST} are needed; "
                             f"{self.refused.summary(self.tried)}")
        self._splits = make_splits(entries)
        by_shard = itertools.groupby(self._splits["train"], lambda entry: entry["images"][0][0])
        self._shards = kind == "tar" and [len(list(group)) for _, group in by_shard]
        if self.has_turns:
            counts = ((sum(len(text.split()) for text in entry["texts"]), entry["images"])
                      for entry in self._splits["train"])
            self.lengths = [words if images else -words for words, images in counts]
        # Pieces of the tokenizer: every character, then the words, up to 8192.
        words = {word for text in self.corpus() for word in text.split()}
        letters = {*unicodedata.normalize("NFKC", " ".join(words)).casefold()}
        self.vocab_size = max(min(8192, 512 + len(words)), 512 + len(letters))

    def _index(self, records):
        """Set self.tried; return the entries: captions of the same pictures and kind are one."""
        if self.has_turns:
            entries = list(records)
            self.tried = len(entries) + self.refused.count
            return entries
        entries, self.tried = {}, 0
        for record in records:
            where, texts = f"{self.name}: {record['source']}", {}            # {text: None}
            with refusing(self.refused.add, where):
                images = tuple(map(usable_name, record["images"]))
                if not images or not record["texts"]:
                    raise ValueError("no caption" if images else "no picture")
                for text in record["texts"]:
                    with refusing(self.refused.add, where):
                        texts[usable_text(text)] = None
            if texts:
                self.tried += 1
                _, own = entries.setdefault(images, (record["source"], {}))
                own.setdefault(record.get("web", False), {}).update(texts)
        self.tried += self.refused.count
        return [{"images": images, "texts": list(texts), "source": source, "web": web}
                for images, (source, own) in entries.items() for web, texts in own.items()]

    def size(self, split):
        """The number of records in "train", "web", "human" or "test"."""
        return len(self._splits[split])

    def order(self, generator):
        """The order of an epoch: int64 (size of train,).

        Shards are permuted, then each sample moves by less than `shuffle` places either way.
        """
        count = self.size("train")
        if not self._shards or self.shuffle >= count:
            return torch.randperm(count, generator=generator)
        blocks = torch.arange(count).split(self._shards)
        order = torch.cat([blocks[i] for i in torch.randperm(len(blocks), generator=generator)])
        late = torch.rand(count, generator=generator, dtype=torch.float64) * self.shuffle
        return order[(torch.arange(count) + late).argsort(stable=True)]

    def record(self, split, index, rng=None):
        """{"images": [RGB, image_size square], "texts": [captions], "source": entry}, or
        {"turns": [{"images": [[RGB]], "prompt", "answer"}, ...], "source": entry}.

        A random.Random crops at random; without one, and in test, the center is cropped.
        """
        if not self.reads_pictures:
            return self.blank(split, index)
        entry = self._splits[split][index]
        crop = functools.partial(random_crop, rng=rng) if rng and split != "test" else center_crop
        pictures = [self._open(place, entry) for place in entry["images"]]
        for number, picture in enumerate(pictures):
            if self.whole:               # not larger than any grid of tiles
                picture.thumbnail((LONGEST, LONGEST))
            else:
                pictures[number] = crop(picture, self.image_size)
        return self._as_record(entry, pictures)

    def _as_record(self, entry, pictures):
        """An entry with its pictures; those of a conversation in the turns where they stand."""
        if not self.has_turns:
            return {"images": pictures, "texts": entry["texts"], "source": entry}
        pictures = iter(pictures)
        turns = [{"images": [[next(pictures)] for _ in range(count)], "prompt": prompt,
                  "answer": answer}
                 for count, prompt, answer in zip(entry["counts"], entry["texts"][::2],
                                                  entry["texts"][1::2])]
        return {"turns": turns, "source": entry}

    def _open(self, place, entry):
        if isinstance(place, tuple):
            return open_image(read_bytes(*place), f"{place[0]}: {entry['source']}")
        path = os.path.join(self.folder, place)
        if os.path.commonpath([os.path.realpath(path), self.folder]) != self.folder:
            raise ValueError(f"{printable(path)}: a link to outside the folder of pictures")
        return open_image(path)

    def check_pictures(self, count=20):
        """Raise ValueError when none of the first records of train can be read."""
        refused, count = Refusals(self.skip), min(count, self.size("train"))
        for index in range(count):
            with refusing(refused.add, self.name):
                return self.record("train", index)
        raise ValueError(f"the first {refused.summary(count)}; is --images their folder?")

    def blank(self, split, index):
        """The record with grey pictures in place of its own; nothing is read."""
        entry = self._splits[split][index]
        grey = Image.new("RGB", (self.image_size, self.image_size), "grey")
        return self._as_record(entry, [grey] * len(entry["images"]))

    @functools.cache
    def records(self, split):
        """Every readable record of a split. The others are refused; ValueError for too many."""
        records, lost, tried = [], Refusals(self.skip), self.size(split)
        for index in range(tried):
            with refusing(lost.add, self.name):
                records.append(self.record(split, index))
        if len(records) < 2:
            raise ValueError(f"no two of them readable in {split}: {lost.summary(tried)}")
        lost.check(tried)
        self.refused.count += lost.count
        return records

    def is_true(self, text, source):
        """Whether the text is one of the captions of the picture, or answers of a conversation."""
        return text in (source["texts"][1::2] if self.has_turns else source["texts"])

    def corpus(self):
        """Texts for the tokenizer, of training records alone; of very many a part."""
        entries = self._splits["train"]
        for entry in entries[::1 + len(entries) // 200_000]:
            yield from (text[:1000] for text in entry["texts"] if text)


def make_splits(entries):
    """{split: entries}; test: the lowest hashes of sources, 1 in 20, 5 to 1,000, human ones alone.

    Entries from the web with such a hash are in no split. Of no human entries, all are tested.
    """
    hashed = [(int(hashlib.sha256(entry["source"].encode(errors="replace")).hexdigest()[:16], 16),
               entry) for entry in entries]
    tested = [pair for pair in hashed if not pair[1]["web"]] or hashed
    places = sorted(place for place, _ in tested)
    wanted = sum(place < 2 ** 64 // 20 for place in places)
    last = places[min(max(wanted, FEWEST), MOST_TESTS) - 1]
    train = [entry for place, entry in hashed if place > last]
    return {"train": train, "test": [entry for place, entry in tested if place <= last],
            "web": [entry for entry in train if entry["web"]],
            "human": [entry for entry in train if not entry["web"]]}


def all_records(world, split):
    """Every record of a split of any world; of `Files`, every one that can be read."""
    return world.records(split) if isinstance(world, Files) else [
        world.record(split, index) for index in range(world.size(split))]
