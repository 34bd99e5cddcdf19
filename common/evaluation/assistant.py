"""What a visual assistant is asked: probes, descriptions, reviews, choices, letters and boxes.

`writer` is an evaluation.writing.Writer, `world` the shapes world, count the number of test records
of a question's kind. The figures are fractions in [0, 1], with a chance level where there is one.
"""
import re

from common.data.instruct import ask_short
from common.data.shapes.conversations import TEACHERS
from common.data.shapes.grounding import box_of
from common.data.shapes.questions import SETTINGS, YES_NO
from common.data.shapes.words import holds, matching, pairs_of, parse_phrase, statements
from common.evaluation.questions import draw_tasks, exact, in_words
from common.evaluation.sheet import sheet

SENTENCES = ("count", "existence", "relation")     # kinds that conversations answer in sentences
OPTIONS = "abcd"
BOX = r"\(\s*(\d+)\s*,\s*(\d+)\s*\)\s*,\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)"
NAMED_BOX = rf"(?:\s|,|\band\b)*([^(),]+?)\s*{BOX}"


def with_other_pictures(records):
    """Records of one turn, each with the picture of the next one."""
    return [r | {"turns": [r["turns"][0] | {"images": other["turns"][0]["images"]}]}
            for r, other in zip(records, records[1:] + records[:1])]


def hallucination(writer, world, count, template="{}"):
    """Is an object in the picture? Yes and no evenly in each setting of POPE.

    As in POPE's code, an answer whose first sentence has "no" or "not" says no, any other says yes.
    """
    figures, said_yes = {}, []
    for setting in SETTINGS:
        records = in_words([r for answer in YES_NO for r in draw_tasks(
            world, "probe", (count + 1) // 2, setting=setting, answer=answer)], template)
        texts = writer.generate(records, max_new_tokens=12)
        said = ["no" if {"no", "not"} & {*re.findall(r"\w+", text.lower().partition(".")[0])}
                else "yes" for text in texts]
        figures[f"hallucination_accuracy/{setting}"] = exact(said, records)
        said_yes += [text == "yes" for text in said]
    return {"hallucination_accuracy": sum(figures.values()) / len(SETTINGS), **figures,
            "hallucination_accuracy_chance": 0.5,
            "hallucination_yes_rate": sum(said_yes) / len(said_yes)}


def answer_lengths(writer, world, count, short):
    """How many answers are one word, with a response-format prompt (LLaVA-1.5) and without it.

    short: its text, behind the question after a line break. Only kinds of SENTENCES are asked.
    """
    drawn, figures = draw_tasks(world, "question", 3 * count), {}
    records = [r for r in drawn if r["kind"] in SENTENCES][:count]
    for name, template in (("one_word_asked", f"{{}}\n{short}"), ("one_word_unasked", "{}")):
        texts = writer.generate(in_words(records, template), max_new_tokens=24)
        figures[name] = sum(len(text.split()) == 1 for text in texts) / len(records)
    return figures


def sentences(text):
    """The sentences of a text, without their ends."""
    return [part.strip() for part in re.split(r"[.!?]", text) if part.strip()]


def named_objects(text, scene):
    """The (colour, shape) of every object that a true statement of the text names."""
    found = [s for sentence in sentences(text) for s in statements(sentence) or ()
             if holds(s, scene)]
    phrases = [p for s in found for p in s[1:] if isinstance(p, tuple) and p[0] != 0]
    return {(colour, shape) for _, _, colour, shape in phrases} & pairs_of(scene.items)


def descriptions(writer, world, count):
    """Detailed descriptions: which of their sentences are true, and which objects do they name?

    A sentence that the world cannot read is false. blind: with the pictures of other records.
    """
    records, figures = draw_tasks(world, "instruction", count, kind="detail"), {}
    scenes = [r["source"] for r in records]
    for end, own in (("", records), ("_blind", with_other_pictures(records))):
        texts = writer.generate(own, max_new_tokens=32 * world.objects)
        true = [world.is_true(s, scene) for text, scene in zip(texts, scenes)
                for s in sentences(text)]
        named = sum(len(named_objects(text, scene)) for text, scene in zip(texts, scenes))
        figures |= {f"true_statements{end}": sum(true) / max(1, len(true)),
                    f"described_objects{end}": named / sum(len(s.items) for s in scenes)}
    return figures


def parse_review(text):
    """A judge's reply -> (reference score, candidate score), or None if it is malformed.

    Its first line has two numbers from 1 to 10, with a space or a comma between them.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)(?:\s*,\s*|\s+)(\d+(?:\.\d+)?)\s*",
                         text.split("\n")[0])
    scores = found and tuple(map(float, found.groups()))
    return scores if found and 1 <= min(scores) <= max(scores) <= 10 else None


def relative_score(reviews):
    """[(reference score, candidate score), ...] -> mean candidate score / mean reference score.

    It is the ratio of the means and not the mean of ratios (LLaVA, 5.1). Reviews that are None are
    left out; the released code averages them as (-1, -1). Raises ValueError for no reviews, and for
    references whose mean is 0.
    """
    reviews = [review for review in reviews if review is not None]
    reference, candidate = (sum(scores) for scores in zip(*reviews)) if reviews else (0, 0)
    if not reference:
        raise ValueError(f"{len(reviews)} reviews, the sum of the reference scores is {reference}")
    return candidate / reference


def judge_messages(context, question, reference, candidate):
    """The chat for a judge that is a language model; its reply is for `parse_review`."""
    task = ("Two assistants answered a question about a picture that you cannot see; the context "
            "says what it shows. Score each answer from 1 to 10 for helpfulness, relevance, "
            "accuracy and detail; the order of the answers must not matter. The first line of your "
            "reply has the two scores alone, that of the first answer before that of the second, "
            "with a space between them. Give your reasons on the lines below.")
    parts = {"Context": context, "Question": question, "Answer 1": reference, "Answer 2": candidate}
    return [{"role": "system", "content": task},
            {"role": "user", "content": "\n\n".join(f"[{name}]\n{text}"
                                                    for name, text in parts.items())}]


def exact_review(world, record, candidate):
    """The world as the judge -> (score of the teacher's answer, score of the candidate).

    Conversation and detail: 1 + 9 * the fraction of sentences that are true; it does not matter
    whether they are complete or to the point. Reasoning: 10 for the teacher's answer, else 1.
    """
    def score(text):
        if record["kind"] == "reasoning":
            return 1 + 9 * exact([text], [record])
        true = [world.is_true(sentence, record["source"]) for sentence in sentences(text)]
        return 1 + 9 * sum(true) / max(1, len(true))
    return score(record["turns"][-1]["answer"]), score(candidate)


def relative_scores(writer, world, count, judge=None):
    """`relative_score` against the teacher's answers, to one question of each kind on each scene.

    judge(context, question, reference, candidate) -> (score, score) or None, see `judge_messages`;
    None: `exact_review`.
    """
    reviews = {}
    for kind in TEACHERS:
        records = []
        for number, record in enumerate(draw_tasks(world, "instruction", count, kind=kind)):
            turns = record["turns"]      # the questions of a conversation in turn
            asked = turns[number % len(turns)] | {"images": turns[0]["images"]}
            records.append(record | {"turns": [asked]})
        texts = writer.generate(records, max_new_tokens=32 * world.objects)
        reviews[kind] = [
            judge(r["context"], r["turns"][0]["prompt"], r["turns"][0]["answer"], text) if judge
            else exact_review(world, r, text) for r, text in zip(records, texts)]
    return {"relative_score": relative_score(sum(reviews.values(), [])),
            **{f"relative_score/{kind}": relative_score(own) for kind, own in reviews.items()}}


def chats(writer, world, count):
    """The last answers of conversations that mix questions of all kinds, after the right ones.

    Where a word is asked for, the answer must be that word. Elsewhere it must be the teacher's, or
    sentences that are all true.
    """
    records = draw_tasks(world, "chat", count)
    records = [r | {"turns": ask_short(r["turns"])} for r in records]
    right = {"word": [], "sentence": []}
    for record, text in zip(records, writer.generate(records, max_new_tokens=32 * world.objects)):
        form = "sentence" if " " in record["turns"][-1]["answer"] else "word"
        true = [world.is_true(sentence, record["source"]) for sentence in sentences(text)]
        all_true = form == "sentence" and bool(true) and all(true)
        right[form].append(exact([text], [record]) or all_true)
    return {f"chat_accuracy/{form}": sum(own) / max(1, len(own)) for form, own in right.items()}


def samples(writer, world, records):
    """An image for people: the first questions of conversations and what the assistant replies. Of
    the shapes world a reply is right when `exact_review` finds nothing wrong."""
    records, rows = [r | {"turns": r["turns"][:1]} for r in records], []
    for record, text in zip(records, writer.generate(records, max_new_tokens=64)):
        asked = record["turns"][0]
        # 10: all of it is true.
        right = exact_review(world, record, text)[1] == 10 if "kind" in record else None
        image = asked["images"][0][0] if asked["images"] else None
        rows.append(("", image, [(None, f"{asked['prompt']} {text}", right)]))
    return sheet(f"Unseen {world.name}: what the assistant replies.", rows, cell=140)


def choices(writer, world, count, prompt_of):
    """Multiple choice: right when the first letter that is written is that of the right option.

    prompt_of(question, choices) -> the text with its "A. 12" lines; the context stands before it.
    """
    records = draw_tasks(world, "choice", count)
    asked = [r | {"turns": [r["turns"][0] | {
        "prompt": f"{r['context']}\n{prompt_of(r['question'], r['candidates'])}"}]}
        for r in records]
    right = 0
    for text, record in zip(writer.generate(asked, max_new_tokens=6), records):
        answer = OPTIONS[record["candidates"].index(record["turns"][0]["answer"])]
        right += re.findall("[a-z]", text.lower())[:1] == [answer]
    return {"choice_accuracy": right / count, "choice_accuracy_chance": 1 / len(OPTIONS)}


def reading(writer, world, count, length=2, dot=1):
    """Letters in the picture: whole strings, and letter by letter in its place."""
    records = draw_tasks(world, "reading", count, length=length, dot=dot)
    texts = writer.generate(records, max_new_tokens=2 * length + 2)
    pairs = [["".join(t.lower().split()) for t in (text, record["turns"][0]["answer"])]
             for text, record in zip(texts, records)]
    letters = sum(a == b for pair in pairs for a, b in zip(*pair)) / (count * length)
    return {"reading_accuracy": sum(text == answer for text, answer in pairs) / count,
            "reading_accuracy_chance": 10 ** -length,
            "reading_accuracy/letters": letters, "reading_accuracy/letters_chance": 1 / 10}


def box_of_text(text):
    """The first box of a text, "(120,340),(355,575)", as integers (x1, y1, x2, y2), or None."""
    found = re.search(BOX, text)
    return tuple(map(int, found.groups())) if found else None


def iou(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 where a box has no area."""
    def area(x1, y1, x2, y2):
        return max(0, x2 - x1) * max(0, y2 - y1)
    shared = area(*map(max, a[:2], b[:2]), *map(min, a[2:], b[2:]))
    return shared / (area(*a) + area(*b) - shared) if shared else 0.0


def is_true_with_boxes(text, scene):
    """Whether a text is pairs of a phrase and a box, and nothing else, and each pair is true.

    A pair is true when its phrase fits an item whose box has an IoU of at least 0.5 with it.
    """
    pairs = re.findall(NAMED_BOX, text)
    for words, *box in pairs:
        named = parse_phrase(words)
        fitting = matching(scene, *named[1:]) if named and named[0] in (None, 1) else ()
        if not any(iou(tuple(map(int, box)), box_of(item)) >= 0.5 for item in fitting):
            return False
    return bool(pairs) and not re.sub(NAMED_BOX, "", text).strip(" .")


def grounding(writer, world, count):
    """Boxes of phrases, right at an IoU of at least 0.5 (RefCOCO), and captions with boxes.

    blind: with the pictures of other records. chance: the best one box for all the questions, of
    the boxes that they have. A caption is right when `is_true_with_boxes`.
    """
    records = draw_tasks(world, "grounding", count, kind="ground")
    boxes, figures = [r["boxes"][0] for r in records], {}

    def accuracy(given):
        return sum(box is not None and iou(box, right) >= 0.5
                   for box, right in zip(given, boxes)) / count
    for end, own in (("", records), ("_blind", with_other_pictures(records))):
        texts = writer.generate(own, max_new_tokens=24)
        figures[f"grounding_accuracy{end}"] = accuracy(map(box_of_text, texts))
    captioned = draw_tasks(world, "grounding", count, kind="caption")
    texts = writer.generate(captioned, max_new_tokens=24 * world.objects)
    true = [is_true_with_boxes(text, r["source"]) for text, r in zip(texts, captioned)]
    return figures | {
        "grounding_accuracy_chance": max(accuracy([box] * count) for box in boxes),
        "grounded_caption_accuracy": sum(true) / count}
