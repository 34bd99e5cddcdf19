"""The user's own pictures and captions, in public formats; each is one generator of records.

    coco:FILE     COCO captions: a JSON object with "images" and "annotations"
    flickr:FILE   CSV: image_name| comment_number| comment (Flickr30k) or image,caption (Flickr8k)
    jsonl:FILE    a JSON object in each line: {"image": "a.jpg", "text": "..."}, or "texts": [...]
    tar:GLOB      webdataset shards as img2dataset writes them; {00000..00099} is expanded

None of this is trusted: what cannot be used is counted and passed over, nothing is extracted, and
no picture is read from outside the folder of pictures.
"""
import csv
import glob
import hashlib
import itertools
import json
import os
import re
import tarfile
import unicodedata

import torch
from PIL import Image
from tqdm import tqdm

from common.training import distributed
from common.data.images import center_crop, open_image, random_crop
from common.data.safe_read import open_regular, printable

LONGEST = 1_000_000      # bytes of a line, of a tar's header, of a text in a tar
MOST_JSON = 2_000_000_000            # bytes of a file that has to be read as a whole
MOST_TEXT = 10_000       # characters of a caption
MOST_SHARDS = 100_000
MOST_REASONS = 1000      # kept in memory and in refused.jsonl
FEWEST, MOST_TESTS = 5, 1000         # records of the test split
SUFFIXES = ("jpg", "jpeg", "png", "webp")


class Refusals:
    """What was passed over: how often, and the first reasons. skip: the fraction that may be."""

    def __init__(self, skip, count=0):
        self.skip, self.count, self.reasons = skip, count, []

    def add(self, reason):
        """Count one more."""
        self.count += 1
        if len(self.reasons) < MOST_REASONS:
            self.reasons.append(printable(reason, 500))

    def told(self, tried):
        """In words: how many of so many, and an example."""
        example = f", e.g. {self.reasons[0]}" if self.reasons else ""
        return f"{self.count:,} of {tried:,} records refused{example}"

    def check(self, tried):
        """Raise ValueError when more than the fraction of what was tried (at least 100) is lost."""
        if self.count > self.skip * max(tried, 100):
            raise ValueError(f"{self.told(tried)}: more than --skip {self.skip:g} allows")


# ------------------------------------------------------------------ reading what nobody checked

def parse(text):
    """The value of a JSON text (str or bytes). Raises ValueError in one line."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None


def lines(path, refuse):
    """(number, text) of every line of a file that is UTF-8 and not endless."""
    with open_regular(path) as file:
        for number in itertools.count(1):
            line = file.readline(LONGEST)
            if not line:
                return
            if len(line) == LONGEST and not line.endswith(b"\n"):
                refuse(f"{path}: line {number}: longer than {LONGEST:,} bytes")
                parts = iter(lambda: file.readline(LONGEST), b"")
                if not any(part.endswith(b"\n") for part in itertools.islice(parts, 1000)):
                    return               # the end, or a line without one
                continue
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                refuse(f"{path}: line {number}: not UTF-8")


def table(path, refuse):
    """The rows of a CSV file, lists of str; | divides its cells if its first line has one."""
    text = (line for _, line in lines(path, refuse))
    first = next(text, "")
    form = {"delimiter": "|", "quoting": csv.QUOTE_NONE} if "|" in first else {}
    rows = csv.reader(itertools.chain([first], text), **form)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            refuse(f"{path}: line {rows.line_num}: {error}")
            continue
        if row:
            yield row


def field(row, key, kind):
    """row[key]. Raises ValueError when it is missing or of another kind."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"no usable {key!r}")
    return value


def several(row, *keys):
    """The list of str under the first of the keys that the row has; one str is a list of one."""
    key = next((key for key in keys if isinstance(row, dict) and key in row), keys[0])
    value = field(row, key, (str, list))
    return [value] if isinstance(value, str) else value


# ------------------------------------------------------------------ formats

def coco(path, refuse):
    """COCO captions (Chen et al., 2015): a record for each picture, with all its captions."""
    with open_regular(path) as file:
        try:
            if os.fstat(file.fileno()).st_size > MOST_JSON:
                raise ValueError(f"more than {MOST_JSON:,} bytes")
            data = parse(file.read())
            pictures, captions = (field(data, key, list) for key in ("images", "annotations"))
        except ValueError as error:
            raise ValueError(f"{path}: not COCO captions: {error}") from None
    said = {}
    for number, row in enumerate(captions):
        try:
            said.setdefault(field(row, "image_id", (int, str)), []).append(
                field(row, "caption", str))
        except ValueError as error:
            refuse(f"{path}: annotation {number}: {error}")
    for number, row in enumerate(pictures):
        try:
            key, name = field(row, "id", (int, str)), field(row, "file_name", str)
            yield {"images": [name], "texts": said.pop(key, []), "source": name}
        except ValueError as error:
            refuse(f"{path}: image {number}: {error}")
    for key in said:
        refuse(f"{path}: captions of image {key}, which is not among the images")


def flickr(path, refuse):
    """Flickr30k's results.csv or Flickr8k's captions.txt: a record for each picture."""
    rows = table(path, refuse)
    header = [cell.strip().lower() for cell in next(rows, [])]
    columns = next((pair for pair in (("image_name", "comment"), ("image", "caption"))
                    if set(pair) <= set(header)), None)
    if columns is None:
        raise ValueError(f"{path}: its first line names neither image_name| comment_number| comment"
                         " (Flickr30k) nor image,caption (Flickr8k)")
    image, text = map(header.index, columns)
    said = {}
    for number, row in enumerate(rows, 1):
        if len(row) == len(header):
            said.setdefault(row[image].strip(), []).append(row[text])
        else:
            refuse(f"{path}: row {number}: {len(row)} cells instead of {len(header)}")
    for name, texts in said.items():
        yield {"images": [name], "texts": texts, "source": name}


def jsonl(path, refuse):
    """JSON lines: "image" or "images", and "text", "caption", "texts" or "captions"."""
    for number, line in lines(path, refuse):
        if not line.strip():
            continue
        try:
            row = parse(line)
            names = several(row, "image", "images")
            yield {"images": names, "texts": several(row, "text", "caption", "texts", "captions"),
                   "source": str(names[0]) if names else ""}
        except ValueError as error:
            refuse(f"{path}: line {number}: {error}")


def tar(pattern, refuse):
    """Webdataset shards: the members of one name up to its first dot are a record."""
    for path in tqdm(shards(pattern), "reading tar headers", unit="shard",
                     disable=None if distributed.rank() == 0 else True):
        samples = {}
        for name, place in members(path, refuse):
            folder, slash, base = name.rpartition("/")
            stem, _, suffix = base.partition(".")
            parts = samples.setdefault(folder + slash + stem, {})
            twice = ValueError("twice in the shard") if suffix.lower() in parts else None
            parts[suffix.lower()] = twice or place
        for key, parts in samples.items():
            try:
                for problem in (part for part in parts.values() if isinstance(part, ValueError)):
                    raise problem
                picture = next((parts[s] for s in SUFFIXES if s in parts), None)
                if picture is None and not {"txt", "json"} & set(parts):
                    continue             # a file beside the records
                yield {"images": [picture] if picture else [], "texts": [words(parts)],
                       "source": f"{os.path.basename(path)}/{key}"}
            except ValueError as error:
                refuse(f"{path}: {key}: {error}")


FORMATS = {"coco": coco, "flickr": flickr, "jsonl": jsonl, "tar": tar}


# ------------------------------------------------------------------ tar shards

def expanded(pattern):
    """The names that a pattern stands for: "a-{08..11}.tar" is a-08.tar to a-11.tar."""
    found = re.search(r"\{([0-9]{1,12})\.\.([0-9]{1,12})\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    numbers, rest = range(int(first), int(last) + 1), expanded(pattern[found.end():])
    if not 0 < len(numbers) * len(rest) <= MOST_SHARDS:
        raise ValueError(f"{printable(pattern)}: braces of {len(numbers) * len(rest):,} names; "
                         f"1 to {MOST_SHARDS:,} are possible")
    return [f"{pattern[:found.start()]}{number:0{len(first)}d}{tail}"
            for number in numbers for tail in rest]


def shards(pattern):
    """The tar files of a pattern. Raises ValueError for none, or one that is named but missing."""
    paths = []
    for name in expanded(pattern):
        magic = glob.has_magic(name) and not os.path.lexists(name)
        paths += sorted(glob.glob(name)) if magic else [name]
        if not magic and not os.path.lexists(name):
            raise ValueError(f"{printable(name)}: no such tar file")
    if not paths:
        raise ValueError(f"{printable(pattern)}: no such tar files")
    return list(dict.fromkeys(paths))


class Headers:
    """A file that tarfile reads headers from: none of them may be as large as memory."""

    def __init__(self, file):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size=-1):
        """The next `size` bytes."""
        if not 0 <= size <= LONGEST:
            raise tarfile.ReadError("a header of absurd size")
        return self.file.read(size)


def members(path, refuse):
    """(name, place) of what is in a tar, from its headers alone; place: (path, offset, size).

    A ValueError stands in the place of what is no plain file inside the tar.
    """
    end = 0
    try:
        with open_regular(path) as file, tarfile.open(fileobj=Headers(file), mode="r:") as archive:
            size = os.fstat(file.fileno()).st_size
            while (member := archive.next()) is not None:
                archive.members.clear()              # it would keep millions of them
                if member.offset < end:              # backwards, and round again for ever
                    raise tarfile.ReadError("its members overlap")
                end = member.offset_data + max(member.size, 0)
                if not member.isdir():
                    yield member.name, place_of(member, path, size)
            file.seek(archive.offset)
            if file.read(512).strip(b"\0"):
                raise tarfile.ReadError("a header that is none")
    except Exception as error:           # tarfile raises many kinds on hostile input
        refuse(f"{path}: not a tar file, damaged or compressed, from byte {end:,} on ({error})")


def place_of(member, path, size):
    """Where a member's bytes lie in a tar of `size` bytes; a ValueError when nowhere in it."""
    if not member.isreg() or member.issparse():
        return ValueError("a link or a device")
    if is_outside(member.name):
        return ValueError("points outside the tar")
    if member.size < 0 or member.offset_data + member.size > size:
        return ValueError("cut off")
    return path, member.offset_data, member.size


def read_slice(place, most):
    """The bytes at (path, offset, size). Raises ValueError for more than `most`, or if cut off."""
    path, offset, size = place
    if size > most:
        raise ValueError(f"{printable(path)}: a member of more than {most:,} bytes")
    try:
        with open_regular(path) as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise ValueError(f"{printable(path)}: {error.strerror}") from None
    if len(data) < size:
        raise ValueError(f"{printable(path)}: cut off since it was indexed")
    return data


def words(parts):
    """The caption among the members of a record, from its .txt or the "caption" in its .json."""
    if "txt" in parts:
        return read_slice(parts["txt"], LONGEST).decode()
    if "json" not in parts:
        raise ValueError("no text")
    return field(parse(read_slice(parts["json"], LONGEST)), "caption", str)


# ------------------------------------------------------------------ names and texts

def is_outside(name):
    """Whether a path leaves the folder it is told to lie in."""
    parts = re.split(r"[/\\]", name)
    return not parts[0] or ".." in parts or re.match("[A-Za-z]:", name) is not None


def usable_name(name):
    """A picture's name in a file of captions, without its detours. Raises ValueError."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError("no usable name of a picture")
    name.encode()                        # what cannot be encoded can be no file
    if is_outside(name):
        raise ValueError(f"{name}: points outside the folder of pictures")
    return os.path.normpath(name)


def usable_text(text):
    """A caption without the spaces around it. Raises ValueError when empty, endless or no text."""
    if not isinstance(text, str):
        raise ValueError("a caption that is no text")
    text = text.strip()
    if not any(c.isprintable() and not c.isspace() for c in text):
        raise ValueError("an empty caption")
    if len(text) > MOST_TEXT:
        raise ValueError(f"a caption of {len(text):,} characters")
    text.encode()                        # half a surrogate pair has no UTF-8
    return text


# ------------------------------------------------------------------ the source of records

class Files:
    """Records of files of the user's own. The test split never depends on a run's seed.

    test: the records with the lowest hashes of their names, 1 in 20, at least 5, at most 1,000.
    kind: one of FORMATS; where: its file or pattern; images: the folder of the pictures (default:
    the file's own); skip: the fraction of records that may be refused; shuffle: for tar, how many
    samples apart two samples of a shard may change places. refused: what indexing passed over.

    Raises ValueError in one line for a file that cannot be read, for too much that is refused, and
    for fewer than 20 records.
    """
    zero_shot, classes, all_classes, templates = None, (), (), ()      # captions name no classes

    def __init__(self, kind, where, *, image_size, images=None, skip=0.05, shuffle=10_000):
        if not 0 <= skip < 1:
            raise ValueError(f"--skip {skip}: a fraction, from 0 to less than 1")
        if shuffle < 1:
            raise ValueError(f"--shuffle {shuffle}: must be at least 1")
        if images is not None and (kind == "tar" or not os.path.isdir(images)):
            why = "a tar holds its own pictures" if kind == "tar" else "no such folder"
            raise ValueError(f"--images {printable(images)}: {why}")
        self.image_size, self.skip, self.shuffle = image_size, skip, shuffle
        self.name = printable(os.path.basename(where))
        self.folder = os.path.realpath(images or os.path.dirname(where))
        self.refused, self._readable = Refusals(skip), {}
        entries, seen = self._index(FORMATS[kind](where, self.refused.add))
        self.tried = seen + self.refused.count
        self.refused.check(self.tried)
        if len(entries) < 4 * FEWEST:
            lost = f" ({self.refused.told(self.tried)})" if self.refused.count else ""
            raise ValueError(f"{printable(where)}: {len(entries)} usable records{lost}; it takes "
                             f"{4 * FEWEST} at least")
        self._splits = make_splits(entries)
        by_shard = itertools.groupby(self._splits["train"], lambda entry: entry["images"][0][0])
        self._shards = [len(list(group)) for _, group in by_shard] if kind == "tar" else None
        self.vocabulary = self._pieces()

    def _index(self, found):
        """([entry], how many were found): what names the same pictures becomes one entry."""
        entries, seen = {}, 0
        for record in found:
            try:
                images = tuple(name if isinstance(name, tuple) else usable_name(name)
                               for name in record["images"])
                if not images:
                    raise ValueError("no picture")
                if not record["texts"]:
                    raise ValueError("no caption")
            except ValueError as error:
                self.refused.add(f"{self.name}: {record['source']}: {error}")
                continue
            texts = list(self._texts(record))
            seen += bool(texts)
            if texts:
                blank = {"images": images, "texts": {}, "source": record["source"]}
                entries.setdefault(images, blank)["texts"].update(dict.fromkeys(texts))
        return [entry | {"texts": list(entry["texts"])} for entry in entries.values()], seen

    def _texts(self, record):
        for text in record["texts"]:
            try:
                yield usable_text(text)
            except ValueError as error:
                self.refused.add(f"{self.name}: {record['source']}: {error}")

    def _pieces(self):
        """How many pieces the vocabulary may have: every character, then the words, up to 8192."""
        letters, words = set(), set()
        for text in self.corpus():
            letters.update(unicodedata.normalize("NFKC", text).casefold())
            words.update(text.split())
        return max(min(8192, 512 + len(words)), 512 + len(letters))

    def size(self, split):
        """The number of records in "train" or "test"."""
        return len(self._splits[split])

    def order(self, generator):
        """The order of an epoch, int64 (size of train,); of tar shards one that disks like.

        Their shards are permuted; then each sample moves, as in a shuffle buffer, but by less than
        `shuffle` places either way, so that reading goes on nearly in a row.
        """
        count = self.size("train")
        if self._shards is None or self.shuffle >= count:
            return torch.randperm(count, generator=generator)
        blocks = torch.arange(count).split(self._shards)
        order = torch.cat([blocks[i] for i in torch.randperm(len(blocks), generator=generator)])
        late = torch.rand(count, generator=generator, dtype=torch.float64) * self.shuffle
        return order[(torch.arange(count) + late).argsort(stable=True)]

    def record(self, split, index, rng=None):
        """{"images": [RGB, image_size square], "texts": [captions], "source": entry}.

        In train, a random.Random cuts a square at random, else the middle is cut. Raises
        ValueError in one line when a picture cannot be read.
        """
        entry, pictures = self._splits[split][index], []
        for place in entry["images"]:
            picture = self._open(place, entry)
            pictures.append(center_crop(picture, self.image_size) if rng is None or split != "train"
                            else random_crop(picture, self.image_size, rng))
        return {"images": pictures, "texts": entry["texts"], "source": entry}

    def blank(self, split, index):
        """The record with grey in the place of its pictures; nothing is read."""
        entry = self._splits[split][index]
        grey = Image.new("RGB", (self.image_size, self.image_size), "grey")
        return {"images": [grey] * len(entry["images"]), "texts": entry["texts"], "source": entry}

    def records(self, split):
        """Every readable record of a split. Raises ValueError when too many are not."""
        if split not in self._readable:
            records, lost = [], Refusals(self.skip)
            for index in range(self.size(split)):
                try:
                    records.append(self.record(split, index))
                except ValueError as error:
                    lost.add(str(error))
            if len(records) < 2:
                raise ValueError(f"no two of them readable in {split}: {lost.told(index + 1)}")
            lost.check(self.size(split))
            self._readable[split] = records, lost
        return self._readable[split][0]

    def unreadable(self, split):
        """The Refusals of `records`."""
        return self._readable[split][1] if split in self._readable else Refusals(self.skip)

    def is_true(self, text, source):
        """Whether the text is one of the captions of the picture."""
        return text in source["texts"]

    def corpus(self):
        """Texts for the tokenizer, of training records alone; of very many a part."""
        entries = self._splits["train"]
        for entry in entries[::1 + len(entries) // 200_000]:
            yield from (text[:1000] for text in entry["texts"])

    def _open(self, place, entry):
        if isinstance(place, tuple):
            return open_image(read_slice(place, 10 ** 8), f"{place[0]}: {entry['source']}")
        path = os.path.join(self.folder, place)
        if os.path.commonpath([os.path.realpath(path), self.folder]) != self.folder:
            raise ValueError(f"{printable(path)}: a link to outside the folder of pictures")
        return open_image(path)


def make_splits(entries):
    """{"train", "test"}: entries by the hash of their source, each split in the order they have."""
    places = [int.from_bytes(hashlib.sha256(entry["source"].encode(errors="replace")).digest()[:8],
                             "big")
              for entry in entries]
    wanted = sum(place < 2 ** 64 // 20 for place in places)
    last = sorted(places)[min(max(wanted, FEWEST), MOST_TESTS) - 1]
    return {"train": [entry for entry, place in zip(entries, places) if place > last],
            "test": [entry for entry, place in zip(entries, places) if place <= last]}


def all_records(world, split):
    """Every record of a split of any world; of `Files`, every one that can be read."""
    if isinstance(world, Files):
        return world.records(split)
    return [world.record(split, index) for index in range(world.size(split))]
