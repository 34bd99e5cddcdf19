"""The papers' claims at small size: every claim of lessons/CLAIMS.md, tried with three seeds.

    python train.py clip && python train.py lm && python train.py lm --preset t5-tiny    the start
    python lessons/ablations.py run              every setting, two at a time on a thread each
    python lessons/ablations.py run llava-mlp    the settings of one claim, or one setting
    python lessons/ablations.py report           the verdicts, into lessons/RESULTS.md

Runs are in RUNS/claims/SETTING-SEED. Ctrl-C stops all of them; the same command goes on with broken
ones and skips finished ones. All runs share the frozen CLIP and language models of --runs.
"""
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image, ImageDraw                                      # noqa: E402

from common.data.safe_read import read_json                           # noqa: E402
from common.evaluation.sheet import FONT, GREEN, GREY, INK, RED       # noqa: E402
from common.training.options import parser, run_main                  # noqa: E402

CLAIMS, RESULTS = ROOT / "lessons/CLAIMS.md", ROOT / "lessons/RESULTS.md"
BEGIN, END = "<!-- claims: begin -->\n", "<!-- claims: end -->\n"     # in RESULTS.md
# {setting: the command that makes it, with --seed and --out}. {name} is the folder of that setting
# with the same seed, {runs} is --runs. Steps are about a third of a recipe's.
BLIP = "train.py blip --steps 200 --from vision={runs}/clip"
FLAMINGO = "train.py flamingo --steps 210"
INSTRUCT = "train.py blip2-instruct --init {blip2} --steps 200"
STAGE2 = "train.py llava-stage2 --init {llava-aligned} --steps 300"
SETTINGS = {
    "contrastive": "train.py clip --steps 200",
    "prompts": "lessons/experiments.py prompts {contrastive}",
    **{name: f"lessons/experiments.py {name}" for name in ("words", "captions", "supervised")},
    # As many pairs as 400 steps of 128; the rate grows with the square root of the batch.
    "contrastive-32": "train.py clip --batch_size 32 --steps 1600 --lr 5e-4",
    "contrastive-512": "train.py clip --batch_size 512 --steps 100 --lr 2e-3",
    "sigmoid-32": "train.py clip --batch_size 32 --steps 1600 --lr 5e-4 --set loss=sigmoid",
    "flamingo": FLAMINGO,
    "flamingo-open": f"{FLAMINGO} --set gate_init=3",
    "flamingo-mlp": f"{FLAMINGO} --set resampler=mlp",
    "flamingo-every-4": f"{FLAMINGO} --set cross_attn_every=4",
    "flamingo-all-images": f"{FLAMINGO} --set only_latest_image=false",
    "flamingo-no-pages": f"{FLAMINGO} --set interleaved=false",
    "flamingo-unfrozen": f"{FLAMINGO} --unfreeze lm.*",
    "blip": BLIP,
    "blip-share-all": f"{BLIP} --set sharing=all",
    "blip-share-none": f"{BLIP} --set sharing=none",
    "blip-random-negatives": f"{BLIP} --set hardness=0",
    "blip-hard-targets": f"{BLIP} --set alpha=0",
    "captioner": "train.py blip --losses lm --init {blip} --steps 100",
    "filter": "train.py blip --losses itc,itm --init {blip} --steps 100",
    "one-model": "train.py blip --init {blip} --set human_only=true --steps 100",
    "written": "lessons/experiments.py written {captioner} {filter}",
    "written-beams": "lessons/experiments.py written_beams {captioner} {filter}",
    "written-one-model": "lessons/experiments.py written {one-model} {one-model}",
    **{f"texts-{name}": f"{BLIP} --data shapes:texts={{{file}.jsonl" for name, file in (
        ("filtered", "written}/filtered"), ("captioned", "written}/captioned"),
        ("both", "written}/both"), ("beams", "written-beams}/both"),
        ("one-model", "written-one-model}/both"))},
    "qformer": "train.py blip2-stage1 --steps 130",
    "qformer-no-itg": "train.py blip2-stage1 --steps 130 --losses itc,itm",
    "blip2": "train.py blip2-stage2 --init {qformer} --steps 400",
    "blip2-shots": "lessons/experiments.py shots {blip2}",
    "blip2-no-stage1": "train.py blip2-stage2 --init none --steps 400",
    "blip2-t5": "train.py blip2-stage2-t5 --init {qformer} --steps 700",
    "blip2-t5-no-stage1": "train.py blip2-stage2-t5 --init none --steps 700",
    "instructblip": INSTRUCT,
    "instructblip-blind": f"{INSTRUCT} --set qformer_text=false",
    "instructblip-plain": f"{INSTRUCT} --set balance=1",
    "llava-aligned": "train.py llava-stage1 --steps 100",
    "llava-aligned-linear": "train.py llava-stage1 --steps 100 --set projector=linear",
    "llava": STAGE2,
    "llava-one-stage": "train.py llava-stage2 --init none --steps 400",
    "llava-linear": "train.py llava-stage2 --init {llava-aligned-linear} --steps 300",
    "llava-full-data": f"{STAGE2} --set mix=conversation=58,detail=23,reasoning=77",
    "llava-detail-reasoning": f"{STAGE2} --set mix=detail=23,reasoning=77",
    "llava-conversation": f"{STAGE2} --set mix=conversation=1",
    "llava-no-data": "train.py llava-stage2 --init {llava-aligned} --steps 20 --lr 1e-12 "
                     "--set mix=conversation=1",
    "llava-tiles": "train.py llava-tiles --init {llava-aligned} --steps 400",
    "llava-whole": "train.py llava-tiles --init {llava-aligned} --steps 400 --set views=pad",
    **{f"bridge-{name}": f"lessons/bridges.py {name}" for name in (
        "gated", "mixture", "qformer", "projector", "projector-tuned")},
}


@dataclass(frozen=True)
class Claim:
    """A line of CLAIMS.md: figures "SETTING:NAME" of which one is better by at least `by`."""
    name: str
    section: str
    says: str
    better: str
    than: str
    by: float

    @property
    def settings(self):
        """The two settings."""
        return [side.partition(":")[0] for side in (self.better, self.than)]


def read_claims(path=CLAIMS):
    """{heading: [Claim, ...]}. Raises ValueError for a line of a table that is none."""
    claims, heading = {}, ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("## "):
            heading = line[3:]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or cells[0] in ("claim", "---"):
            continue
        try:
            *words, by = cells
            claim = Claim(*words, float(by))
        except (TypeError, ValueError):
            raise ValueError(f"{path}: line {number}: six cells, the last one a number") from None
        if unknown := {*claim.settings} - {*SETTINGS}:
            raise ValueError(f"{path}: line {number}: no setting {', '.join(sorted(unknown))}")
        claims.setdefault(heading, []).append(claim)
    return claims


# ------------------------------------------------------------------ running

def needs(setting):
    """The settings whose runs a setting starts from."""
    return [name for name in re.findall(r"{([^}]*)}", SETTINGS[setting]) if name != "runs"]


def wanted(names):
    """Claims and settings -> settings with all that they need, in the order of SETTINGS.

    No names: all. Raises ValueError for a name that is neither.
    """
    claims = {claim.name: claim for own in read_claims().values() for claim in own}
    found = set()
    for name in names or SETTINGS:       # a few names are both
        found |= {*claims[name].settings} if name in claims else {name}
    if unknown := found - {*SETTINGS}:
        raise ValueError(f"{', '.join(sorted(unknown))}: no claim of CLAIMS.md and no setting")
    for setting in reversed(SETTINGS):   # what a setting needs stands above it
        found |= {*needs(setting)} if setting in found else set()
    return [setting for setting in SETTINGS if setting in found]


def folder(runs, setting, seed):
    """Where the run of a setting is."""
    return Path(runs) / "claims" / f"{setting}-{seed}"


def result_of(runs, setting, seed):
    """result.json of a finished run; None for one that is missing, broken off, or was made by
    another command than the setting's, which the first line of its output.txt has."""
    out, command = folder(runs, setting, seed), SETTINGS[setting]
    if not (out / "result.json").exists() or not (out / "output.txt").exists():
        return None
    result, made = read_json(out / "result.json"), (out / "output.txt").read_text().splitlines()
    steps = re.search(r"^train.*--steps (\d+)", command)     # --eval_only may have measured others
    same = made[:1] == [command] and (not steps or int(steps[1]) == result.get("steps"))
    return result if same else None


def make(runs, setting, seed, before):
    """Make one run on a thread of its own, after those that it needs -> whether it is there."""
    out, command = folder(runs, setting, seed), SETTINGS[setting]
    ready = all([future.result() for future in before])
    if not ready or result_of(runs, setting, seed):
        return ready
    places = {name: folder(runs, name, seed) for name in needs(setting)}
    script, *words = (word.format(runs=runs, **places) for word in command.split())
    words += ["--runs", str(runs)] if script != "lessons/experiments.py" else []
    words += ["--resume"] if script == "train.py" else []
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").unlink(missing_ok=True)    # of another command
    with open(out / "output.txt", "w", encoding="utf-8") as output:
        print(command, file=output, flush=True)
        status = subprocess.run(
            [sys.executable, str(ROOT / script), *words, "--seed", str(seed), "--out", str(out)],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=output, stderr=output).returncode
    print(f"{setting}, seed {seed}: {f'failed, see {output.name}' if status else 'finished'}",
          flush=True)
    return not status


def run(names, runs, seeds, jobs):
    """Make the runs of claims or settings, `jobs` at a time -> the exit status."""
    for part in ("clip", "lm", "lm-t5-tiny"):
        if not (Path(runs) / part / "result.json").exists():
            stage = part.replace("-t5", " --preset t5")
            raise ValueError(f"{runs}/{part}: no finished run; train.py {stage} --runs {runs}")
    futures = {}                         # what a run needs is submitted before it, so none waits
    with ThreadPoolExecutor(jobs) as pool:                            # for one that cannot start
        try:
            for seed in range(seeds):
                for setting in wanted(names):
                    before = [futures[name, seed] for name in needs(setting)]
                    futures[setting, seed] = pool.submit(make, runs, setting, seed, before)
            missing = [f"{setting}-{seed}" for (setting, seed), future in futures.items()
                       if not future.result()]
        finally:                         # after Ctrl-C no other run starts
            pool.shutdown(cancel_futures=True)
    print(f"{len(futures) - len(missing)} of {len(futures)} runs are there"
          + f"; missing: {', '.join(missing)}" * bool(missing))
    return 1 if missing else 0


# ------------------------------------------------------------------ judging

def values(runs, side, seeds, optional=False):
    """The figure "SETTING:NAME" of every finished run, sorted; "-NAME" with the sign changed.

    Raises ValueError for a run without it, unless it is optional.
    """
    setting, _, name = side.partition(":")
    sign, name = -1 if name.startswith("-") else 1, name.lstrip("-")
    results = [found for seed in range(seeds) if (found := result_of(runs, setting, seed))]
    if not optional and not all(name in result for result in results):
        raise ValueError(f"{side}: a run of {setting} has no {name} in its result.json")
    return sorted(sign * result[name] for result in results if name in result)


def levels(runs, side, seeds):
    """{"chance" and "wrong image": the median of that level of a figure, where it has one}."""
    base = re.sub(r"(?<=:shots)_\d+$|_reranked$", "", side)          # they share one chance
    found = {name: values(runs, f"{base}_{end}", seeds, optional=True)
             for name, end in (("chance", "chance"), ("wrong image", "blind"))}
    return {name: statistics.median(own) for name, own in found.items() if own}


def judge(better, than, by):
    """Two sorted lists of values -> the verdict, see CLAIMS.md, and the range of the difference.

    "no runs" and "-" when one of them is empty.
    """
    if not better or not than:
        return "no runs", "-"
    # Rounded: 0.57 - 0.55 is a little less than 0.02 in floating point.
    low, high = round(better[0] - than[-1], 9), round(better[-1] - than[0], 9)
    verdict = "reproduced" if low >= by else "not reproduced" if high < by else "undecided"
    return verdict, f"{low:+.3f} to {high:+.3f}"


def shown(found):
    """A median with its range: "0.512 (0.500 to 0.530)"."""
    return f"{statistics.median(found):.3f} ({found[0]:.3f} to {found[-1]:.3f})" if found else "-"


def report(runs, seeds):
    """The verdicts as Markdown, and a picture for each heading: {heading: (lines, picture)}."""
    found = {}
    for heading, claims in read_claims().items():
        lines, rows = ["| claim | better | than | levels | difference | claimed | verdict |",
                       "|---" * 7 + "|"], []
        for claim in claims:
            sides = [values(runs, side, seeds) for side in (claim.better, claim.than)]
            verdict, difference = judge(*sides, claim.by)
            marks = levels(runs, claim.better, seeds)
            count = f" (seeds: {len(sides[0])}, {len(sides[1])})" * ({*map(len, sides)} != {seeds})
            cells = [f"{claim.name} ({claim.section}): {claim.says}",
                     f"`{claim.better}` {shown(sides[0])}", f"`{claim.than}` {shown(sides[1])}",
                     ", ".join(f"{name} {value:.3f}" for name, value in marks.items()) or "-",
                     difference, f"{claim.by:+.3f}", f"**{verdict}**{count}"]
            lines.append(f"| {' | '.join(cells)} |")
            rows.append((claim, *sides, verdict, difference, marks))
        found[heading] = "\n".join(lines), plot(heading, rows)
    return found


COLOURS = {"reproduced": GREEN, "not reproduced": RED}
TOP, HEIGHT, LEFT, RIGHT, WIDTH = 36, 96, 400, 24, 840     # pixels: heading, a claim, margins


def plot(title, rows):
    """A part for each claim: every seed of the better side as a filled dot and of the other one as
    an open dot, a line over each range; chance and the wrong image as dashed strokes.

    An axis is from 0 to 1, so that lengths compare, unless a number lies outside.
    """
    page = Image.new("RGB", (WIDTH, TOP + HEIGHT * len(rows)), "white")
    canvas = ImageDraw.Draw(page)
    write = partial(canvas.text, font=FONT, fill=INK)
    write((8, 10), f"{title}. Filled dots: the side that is said to be better")
    for number, (claim, better, than, verdict, difference, marks) in enumerate(rows):
        top, colour = TOP + HEIGHT * number, COLOURS.get(verdict, INK)
        low, high = min([0, *better, *than, *marks.values()]), max([0, *better, *than])
        low, high = (0, 1) if low == 0 and high <= 1 else (low, max(high, low + 1e-3))

        def place(value):
            return round(LEFT + (value - low) / (high - low) * (WIDTH - RIGHT - LEFT))
        canvas.line([(0, top), (WIDTH, top)], fill=GREY)
        for line, text in enumerate((claim.name, verdict, f"difference {difference}",
                                     f"claimed: at least {claim.by:+.3f}")):
            write((8, top + 8 + 18 * line), text, fill=colour if text == verdict else INK)
        for name, value in marks.items():
            for dash in range(top + 22, top + 58, 6):
                canvas.line([(place(value), dash), (place(value), dash + 3)], fill=INK)
            write((place(value), top + (6 if name == "chance" else 58)), name, anchor="ma")
        # What differs, setting or figure or both, names the sides; what they share, the axis.
        sides = [side.split(":") for side in (claim.better, claim.than)]
        differs = [a != b for a, b in zip(*sides)]
        shared = ":".join(part for part in sides[0] if part in sides[1])
        write(((LEFT + WIDTH - RIGHT) / 2, top + 76), shared, anchor="ma")
        for side, own, y, fill in ((sides[0], better, top + 30, colour),
                                   (sides[1], than, top + 50, "white")):
            write((LEFT - 12, y), ":".join(compress(side, differs)), anchor="rm")
            canvas.line([(LEFT, y), (WIDTH - RIGHT, y)], fill=GREY)
            canvas.line([(place(value), y) for value in own[:1] + own[-1:]], fill=colour, width=3)
            for x in map(place, own):
                canvas.ellipse((x - 5, y - 5, x + 5, y + 5), fill=fill, outline=colour, width=2)
        for value, anchor in ((low, "la"), (high, "ra")):
            write((place(value), top + 76), f"{value:.4g}", anchor=anchor)
    return page


def write_report(runs, seeds):
    """Put the verdicts into RESULTS.md, between its marks, and the pictures beside it."""
    page = RESULTS.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{RESULTS}: no marks {BEGIN.strip()} and {END.strip()}")
    parts = []
    for heading, (lines, picture) in report(runs, seeds).items():
        name = "claims-" + re.sub("[^a-z0-9]+", "-", heading.lower().partition("(")[0]).strip("-")
        picture.save(RESULTS.parent / "pictures" / f"{name}.png")
        parts.append(f"### {heading}\n\n{lines}\n\n![the same as a picture: each side's seeds, "
                     f"chance and a wrong image](pictures/{name}.png)\n\n")
        print(f"{heading}\n{lines}\n")
    RESULTS.write_text(before + begin + "".join(parts) + end + after, encoding="utf-8")


def main():
    """Read the command line: run or report."""
    options = parser(__doc__)
    options.add_argument("command", choices=("run", "report"))
    options.add_argument("names", nargs="*", metavar="NAME", help="claims or settings to run")
    options.add_argument("--runs", default="runs", help="where all runs are")
    options.add_argument("--seeds", type=int, default=3, help="0, 1, ... (default 3)")
    options.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    args = options.parse_intermixed_args()
    if args.command == "report":
        return write_report(args.runs, args.seeds)
    return run(args.names, args.runs, args.seeds, args.jobs)


if __name__ == "__main__":
    run_main(main)
