"""CapFilt's files: the kept texts of a world and of the user's own pictures, figures, examples."""
import json

import pytest
from PIL import Image

from common.data.batches import open_world
from common.data.shapes.world import Shapes
from common.evaluation.capfilt import line, write
from common.evaluation.sheet import GREEN, RED
from tests.helpers import listed, names


def rows(world, kept, count=3):
    """Of each web image its text, and a false one that was written; kept: those that are kept."""
    for synthetic in (False, True):
        for i in range(count):
            record = world.record("web", i)
            text = "a photo of nothing" if synthetic else record["texts"][0]
            yield i, record | {"texts": [text]}, synthetic, (i, synthetic) in kept


def lines(path):
    return [json.loads(row) for row in path.read_text().splitlines()]


class TestLine:
    def test_a_scene_has_its_number_also_where_texts_of_a_file_are_filtered_again(self, tmp_path):
        (tmp_path / "texts").write_text('{"scene": 7, "text": "a"}\n{"scene": 5, "text": "b"}\n')
        again = Shapes(image_size=8, texts=str(tmp_path / "texts"))
        for world, scene in ((Shapes(image_size=8), 1), (again, 7)):
            assert line(world, 1, world.record("web", 1) | {"texts": ["x y"]}) == {
                "scene": scene, "text": "x y"}


class TestWrite:
    @pytest.mark.parametrize("kept, colours", [
        ({(0, False), (2, False), (2, True)}, {GREEN, RED}), (set(), {RED}),
        ({(i, new) for i in range(3) for new in (False, True)}, {GREEN})])
    def test_kept_texts_are_written_counted_and_drawn(self, tmp_path, capsys, kept, colours):
        world, out = Shapes(image_size=8, web_noise=0.5), tmp_path / "out.jsonl"
        write(rows(world, kept), world, out)
        web = [world.record("web", i) for i in range(3)]
        assert lines(out) == [
            {"scene": i, "text": "a photo of nothing" if new else web[i]["texts"][0]}
            for new in (False, True) for i in range(3) if (i, new) in kept]
        truth = [web[i]["truth"] for i, new in sorted(kept) if not new]
        after = sum(truth) / len(truth) if truth else 0
        before = sum(record["truth"] for record in web) / 3
        assert 0 < before < 1
        assert capsys.readouterr().out.splitlines() == [
            f"web: {len(truth)} of 3 texts kept, true {before:.1%} before and {after:.1%} after",
            f"written: {len(kept) - len(truth)} of 3 texts kept, true 0.0% before and 0.0% after",
            f"examples in {tmp_path / 'out.png'}; {len(kept)} lines for python train.py blip --data "
            f"shapes:texts={out} --from vision=RUN"]
        found = Image.open(tmp_path / "out.png").getcolors(1 << 20)
        assert {colour for _, colour in found} & {GREEN, RED} == colours

    def test_a_file_of_ones_own_is_read_again_with_its_human_pairs_and_its_test_split(
            self, tmp_path, capsys):
        spec = listed(tmp_path, 60)
        file, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
        file.write_text("".join(
            json.dumps(row | {"web": number % 2 == 0}) + "\n" for number, row in
            enumerate(lines(file))))
        world = open_world(spec, 8)
        write(rows(world, {(0, False), (1, False), (1, True)}), world, out)
        again = open_world(f"jsonl:{out}", 8)
        for split in ("human", "test"):
            assert sorted(names(again, split)) == sorted(names(world, split))
        texts = {again.blank("web", i)["source"]["source"]: again.blank("web", i)["texts"]
                 for i in range(again.size("web"))}
        own = [world.blank("web", i) for i in range(2)]
        assert texts == {own[0]["source"]["source"]: own[0]["texts"],
                         own[1]["source"]["source"]: [*own[1]["texts"], "a photo of nothing"]}
        assert "web: 2 of 3 texts kept\nwritten: 1 of 3 texts kept\n" in capsys.readouterr().out
