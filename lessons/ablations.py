"""The papers' claims at small size: every claim of lessons/CLAIMS.md, tried with three seeds.

    python train.py clip && python train.py lm && python train.py lm --preset t5-tiny    the start
    python lessons/ablations.py run              every setting, two at a time on a thread each
    python lessons/ablations.py run llava-mlp    the settings of one claim, or one setting
    python lessons/ablations.py report           the verdicts, into lessons/RESULTS.md

Runs are in RUNS/claims/SETTING-SEED; finished ones are skipped and broken ones go on, so a night's
work may be stopped at any moment. All runs share the frozen CLIP and language models of --runs.
"""
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
    "instructblip": "train.py blip2-instruct --init {blip2} --steps 200",
    "instructblip-blind": "train.py blip2-instruct --init {blip2} --steps 200 --set qformer_text=false",
    "instructblip-plain": "train.py blip2-instruct --init {blip2} --steps 200 --set balance=1",

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
    found, left = set(), []
    for name in names or SETTINGS:
        if name not in claims and name not in SETTINGS:
            raise ValueError(f"{name}: no claim of CLAIMS.md and no setting")
        left += [name] if name in SETTINGS else claims[name].settings
    while left:
        setting = left.pop()
        found.add(setting)
        left += needs(setting)
    return [setting for setting in SETTINGS if setting in found]


def folder(runs, setting, seed):
    """Where the run of a setting is."""
    return Path(runs) / "claims" / f"{setting}-{seed}"


def make(runs, setting, seed, before):
    """Wait for the runs `before` and make one, on a thread of its own. True when it is there."""
    out = folder(runs, setting, seed)
    if not all(future.result() for future in before):
        return False
    if (out / "result.json").exists():
        return True
    places = {name: folder(runs, name, seed) for name in needs(setting)}
    script, *words = SETTINGS[setting].format(runs=runs, **places).split()
    words += ["--runs", str(runs), "--resume"] if script == "train.py" else []
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "output.txt", "w", encoding="utf-8") as output:
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
            raise ValueError(f"{runs}/{part}: no finished run; python train.py {stage} --runs {runs}")
    futures = {}                         # what a run needs is submitted before it, so none waits
    with ThreadPoolExecutor(jobs) as pool:                            # for one that cannot start
        for seed in range(seeds):
            for setting in wanted(names):
                before = [futures[name, seed] for name in needs(setting)]
                futures[setting, seed] = pool.submit(make, runs, setting, seed, before)
    return 0 if all(future.result() for future in futures.values()) else 1


# ------------------------------------------------------------------ judging

def values(runs, side):
    """The figure "SETTING:NAME" of every seed that has it, sorted; "-NAME" with the sign changed."""
    setting, _, name = side.partition(":")
    found = []
    for path in sorted((Path(runs) / "claims").glob(f"{setting}-[0-9]/result.json")):
        value = read_json(path).get(name.lstrip("-"))
        found += [] if value is None else [-value if name.startswith("-") else value]
    return sorted(found)


def judge(better, than, by):
    """The verdict on two sorted lists of values, see CLAIMS.md; "no runs" when one is empty."""
    if not better or not than:
        return "no runs"
    if better[0] - than[-1] >= by:
        return "reproduced"
    return "not reproduced" if better[-1] - than[0] < by else "undecided"


def shown(found):
    """A median with its range: "0.512 (0.500-0.530)"."""
    if not found:
        return "-"
    low, middle, high = found[0], statistics.median(found), found[-1]
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def report(runs):
    """The verdicts as Markdown, and a picture for each heading: {heading: (lines, picture)}."""
    found = {}
    for heading, claims in read_claims().items():
        lines = ["| claim | better | than | by at least | verdict |", "|---|---|---|---|---|"]
        rows = []
        for claim in claims:
            sides = [values(runs, side) for side in (claim.better, claim.than)]
            verdict = judge(*sides, claim.by)
            cells = [f"{claim.name} ({claim.section}): {claim.says}",
                     *(f"`{side}` {shown(own)}" for side, own in zip(
                         (claim.better, claim.than), sides)), f"{claim.by:+.3f}",
                     f"**{verdict}**" + f" ({min(map(len, sides))} seeds)" * any(sides)]
            lines.append(f"| {' | '.join(cells)} |")
            levels = [level for mark in ("chance", "blind") if (level := values(
                runs, f"{claim.better}_{mark}"))]
            rows.append((claim, *sides, verdict, levels))
        found[heading] = "\n".join(lines), plot(heading, rows)
    return found


COLOURS = {"reproduced": GREEN, "not reproduced": RED}


def plot(title, rows, width=760, height=64, left=300):
    """A line for each claim: the seeds' values of the better side (filled) and of the other one
    (open), from the smallest to the largest; chance and the wrong image as gray strokes."""
    page = Image.new("RGB", (width, 32 + height * len(rows)), "white")
    canvas = ImageDraw.Draw(page)
    canvas.text((8, 8), f"{title}: filled: better, open: than", fill=INK, font=FONT)
    for number, (claim, better, than, verdict, levels) in enumerate(rows):
        top, every = 32 + height * number, [*better, *than, *(v for own in levels for v in own)]
        colour = COLOURS.get(verdict, INK)
        canvas.text((8, top + 8), claim.name, fill=INK, font=FONT)
        canvas.text((8, top + 26), verdict, fill=colour, font=FONT)
        if not every:
            continue
        low, high = min(every), max(every)

        def place(value):
            return left + (value - low) / ((high - low) or 1) * (width - left - 60)
        canvas.line([(left, top + 28), (width - 60, top + 28)], fill=GREY, width=2)
        for value in (v for own in levels for v in own):
            canvas.line([(place(value), top + 16), (place(value), top + 40)], fill=GREY, width=3)
        for own, y, fill in ((better, top + 20, colour), (than, top + 36, "white")):
            if own:
                canvas.line([(place(own[0]), y), (place(own[-1]), y)], fill=colour, width=2)
            for x in map(place, own):
                canvas.ellipse((x - 4, y - 4, x + 4, y + 4), fill=fill, outline=colour, width=2)
        canvas.text((left, top + 44), f"{low:.3f}", fill=INK, font=FONT)
        canvas.text((width - 60, top + 44), f"{high:.3f}", fill=INK, font=FONT, anchor="ra")
    return page


def write_report(runs):
    """Put the verdicts into RESULTS.md, between its marks, and the pictures beside it."""
    page = RESULTS.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{RESULTS}: the marks {BEGIN.strip()} and {END.strip()} are missing")
    before, rest = page.split(BEGIN)
    parts = []
    for heading, (lines, picture) in report(runs).items():
        name = "claims-" + re.sub("[^a-z0-9]+", "-", heading.lower().partition("(")[0]).strip("-")
        picture.save(RESULTS.parent / "pictures" / f"{name}.png")
        parts.append(f"### {heading}\n\n{lines}\n\n![the same as a picture: each side's seeds, "
                     f"chance and a wrong image]({'pictures/' + name}.png)\n\n")
        print(f"{heading}\n{lines}\n")
    RESULTS.write_text(before + BEGIN + "".join(parts) + END + rest.split(END)[1],
                       encoding="utf-8")


def main():
    """Read the command line: run or report."""
    options = parser(__doc__)
    options.add_argument("command", choices=("run", "report"))
    options.add_argument("names", nargs="*", metavar="NAME", help="claims or settings to run")
    options.add_argument("--runs", default="runs", help="where all runs are")
    options.add_argument("--seeds", type=int, default=3, help="0, 1, ... (default 3)")
    options.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    args = options.parse_args()
    if args.command == "report":
        return write_report(args.runs)
    return run(args.names, args.runs, args.seeds, args.jobs)


if __name__ == "__main__":
    run_main(main)
