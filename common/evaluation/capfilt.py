"""What CapFilt keeps: a file of texts for train.py --data, figures, and a sheet of examples."""
import json
from pathlib import Path

from tqdm import tqdm

from common.data.files import Files
from common.evaluation.sheet import sheet
from common.training import checkpoint


def line(world, index, record):
    """The line for one text of web record `index`, a dict."""
    text, = record["texts"]
    if isinstance(world, Files):
        return {"image": record["source"]["images"][0], "text": text, "web": True}
    scene = world.web_texts[index][0] if world.web_texts else index
    return {"scene": scene, "text": text}


def write(rows, world, out):
    """Write the kept texts to `out`, JSON lines, with the human pairs of a user's file; print what
    was kept, and draw examples beside it.

    rows: (index, record with one text, is synthetic, is kept), see blip.capfilt_texts. In a world
    that can tell, is_true judges how many texts are true before and after.
    """
    lines, examples, found = [], {}, {False: [], True: []}
    for index, record, synthetic, kept in tqdm(rows, "filtering", unit="text", disable=None):
        true = world.is_true(record["texts"][0], record["source"]) \
            if not isinstance(world, Files) else None
        found[synthetic].append((kept, true))
        lines += [line(world, index, record)] * kept
        if len(examples) < 8 or index in examples:
            examples.setdefault(index, (record["images"][0], []))[1].append(
                (None, f"{'written' if synthetic else 'web'}: {record['texts'][0]}", kept))
    if isinstance(world, Files):
        humans = [world.blank(split, i)["source"] for split in ("test", "human")
                  for i in range(world.size(split))]     # the next run's test split is the same
        lines += [{"image": entry["images"][0], "texts": entry["texts"]} for entry in humans]
    text = "".join(json.dumps(item) + "\n" for item in lines)
    checkpoint.write(out, lambda part: part.write_text(text, encoding="utf-8"))
    for synthetic, judged in found.items():
        summary = f"{'written' if synthetic else 'web'}: {sum(k for k, _ in judged):,d} of " \
                  f"{len(judged):,d} texts kept"
        if judged and judged[0][1] is not None:
            truth = [sum(t for _, t in part) / max(1, len(part))
                     for part in (judged, [pair for pair in judged if pair[0]])]
            summary += f", true {truth[0]:.1%} before and {truth[1]:.1%} after"
        print(summary)
    drawn = Path(out).with_suffix(".png")
    sheet("Pictures, their texts from the web and the written ones: kept with a check mark, "
          "dropped with a cross.", [("", picture, cells) for picture, cells in examples.values()]
          ).save(drawn)
    flags = f"jsonl:{out} --images {world.folder}" if isinstance(world, Files) else \
        f"shapes:texts={out} --from vision=RUN"
    print(f"examples in {drawn}; {len(lines):,d} lines for python train.py blip --data {flags}")
