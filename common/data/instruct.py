"""LLaVA's instruction data: what a teacher without eyes is asked, response formats, ScienceQA.

    messages = teacher_messages("reasoning", captions, [("dog", (0.1, 0.25, 0.4, 0.9))])
    turns = parse_reply("reasoning", reply)              # any language model's -> question, answer
    turn = science_turn(problem)                         # a problem of ScienceQA
    place = parse_choice("Dogs bark. The answer is B.", count=3)                      # 1

The teacher (LLaVA, section 3) is a text-only language model. It gets captions and boxes in place of
a picture and writes as if it saw the picture.
"""
import re
import string

LETTERS = string.ascii_uppercase
# A prompt of LLaVA-1.5 ends with the line that asks for its form of answer; in open chat with none.
SHORT_ANSWER = "Answer the question using a single word or phrase."
CHOICE_ANSWER = "Answer with the option's letter from the given choices directly."
CAPTION_REQUEST = "Provide a one-sentence caption for the provided image."
DETAIL_REQUESTS = ("Describe this picture in detail.", "What does the picture show, exactly?",
                   "Write a thorough description of the picture.",
                   "Explain at length what there is to see here.")

CAPTIONS = ("You assist people who ask about a picture. In place of it you get captions of the "
            "picture, as a rule five, one on each line. ")
BOXES = ("Behind them stand the boxes of objects, as name: [x1, y1, x2, y2], the left, top, right "
         "and bottom edges in fractions of the picture's width and height. ")
RULES = (" Write as somebody who sees the picture. State only what the input makes certain. Never "
         "mention captions, boxes or coordinates, or that you were given any text. The output is ")
BLOCK = "\nQuestion:\n<the question>\n===\nAnswer:\n<the answer>\n==="
TASKS = {
    "conversation": CAPTIONS + "Write a conversation in which a person asks about the picture and "
        "you answer. Ask about different things: which objects there are, how many, what they do, "
        "where they are, how they are placed to one another. Ask only questions with a definite "
        "answer: the input shows the thing asked for, or rules it out with certainty. Add "
        "questions that need background knowledge, and answer these with examples and reasons."
        + RULES + "one such block for each question, and nothing else:" + BLOCK,
    "detail": CAPTIONS + BOXES + "Describe the whole picture in detail: its objects, their number, "
        "their places and how they relate to one another." + RULES + "the description alone.",
    "reasoning": CAPTIONS + BOXES + "Think of one question that takes reasoning beyond what is "
        "seen: why something is so, what may follow, what background knowledge explains it. Ask "
        "only what has a definite answer. The question must not give away visual details: whoever "
        "answers it has to find them in the picture. Answer it step by step, with reasons."
        + RULES + "this and nothing else:" + BLOCK,
}


def check_kind(kind):
    """Raise ValueError for a kind that is none of TASKS."""
    if kind not in TASKS:
        raise ValueError(f"no kind {kind!r} of instructions; there are {', '.join(TASKS)}")


def teacher_messages(kind, captions, boxes, examples=()):
    """The chat that asks a text-only language model for instructions on a picture.

    kind: one of TASKS; boxes: [(name, (left, top, right, bottom)), ...], fractions of the picture,
    not used by "conversation"; examples: [(context, reply), ...], a context being the last message
    on another picture. -> [{"role": "system", "user" or "assistant", "content": str}, ...]. Raises
    ValueError for another kind, no captions, and a box outside 0 .. 1.
    """
    check_kind(kind)
    if not captions:
        raise ValueError("no captions: the teacher would know nothing of the picture")
    for name, box in boxes:
        if len(box) != 4 or not all(0 <= edge <= 1 for edge in box):
            raise ValueError(f"the box of {name!r} is {list(box)}, not four fractions from 0 to 1")
    lines = [" ".join(caption.split()) for caption in captions]
    if kind != "conversation":
        lines += [f"{name}: [{', '.join(f'{edge:.3f}' for edge in box)}]" for name, box in boxes]
    chat = [("system", TASKS[kind])]
    for context, reply in examples:
        chat += [("user", context), ("assistant", reply)]
    return [{"role": role, "content": text} for role, text in [*chat, ("user", "\n".join(lines))]]


def parse_reply(kind, text, rng=None):
    """A teacher's reply -> [(question, answer), ...].

    The question of "detail" is drawn from DETAIL_REQUESTS by the rng (None: the first). Raises
    ValueError for a reply of another form.
    """
    check_kind(kind)
    parts = [part.strip() for part in re.split("={3,}", text)]
    if kind == "detail":
        if len(parts) > 1 or not text.strip() or text.lstrip().startswith("Question:"):
            raise ValueError(f"a description was expected, not {text[:80]!r}")
        return [(rng.choice(DETAIL_REQUESTS) if rng else DETAIL_REQUESTS[0], text.strip())]
    if not parts[-1]:
        parts.pop()                      # behind the last ===
    heads, contents = zip(*(part.partition(":")[::2] for part in parts or [""]))
    contents = [content.strip() for content in contents]
    if heads != ("Question", "Answer") * (len(heads) // 2) or not all(contents):
        raise ValueError("blocks Question: ... === Answer: ... === were expected, not "
                         f"{text[:80]!r}")
    return list(zip(contents[::2], contents[1::2]))


def ask_short(turns):
    """Turns with SHORT_ANSWER behind the prompts of answers of one word; where all answers are, the
    first alone has it, as in LLaVA-1.5's data."""
    short = [isinstance(t["answer"], str) and " " not in t["answer"] for t in turns]
    return [t | {"prompt": f"{t['prompt']}\n{SHORT_ANSWER}"} if own and (first or not all(short))
            else t for t, own, first in zip(turns, short, [True] + [False] * len(turns))]


def lettered(choices):
    """[("A", the first), ...]. Raises ValueError for none and for more than there are letters."""
    if not 1 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{len(choices)} choices: there are letters for 1 to {len(LETTERS)}")
    return list(zip(LETTERS, choices))


def choice_prompt(question, choices):
    """The question, a line "A. ..." for each choice, and LLaVA-1.5's CHOICE_ANSWER."""
    lines = [f"{letter}. {choice}" for letter, choice in lettered(choices)]
    return "\n".join([question, *lines, CHOICE_ANSWER])


def science_turn(problem):
    """A problem of ScienceQA (Lu et al., 2022) as a turn; the answer reasons first ("QCM-LEA").

    problem: "question", "choices", "answer" (an index) and perhaps "hint", "lecture", "solution",
    "image" (a picture). Raises ValueError when the answer is none of the choices.
    """
    options = lettered(problem["choices"])
    if not 0 <= problem["answer"] < len(options):
        raise ValueError(f"answer {problem['answer']} of {len(options)} choices")
    prompt = (f"{problem['question']}\nContext: {problem.get('hint') or 'N/A'}\nOptions: "
              + " ".join(f"({letter}) {choice}" for letter, choice in options))
    reasons = [problem.get(key) for key in ("lecture", "solution")]
    last = f"The answer is {LETTERS[problem['answer']]}."
    return {"images": [[problem["image"]]] if problem.get("image") else [], "prompt": prompt,
            "answer": " ".join(filter(None, [*reasons, last]))}


def parse_choice(text, count):
    """The index of the choice, of `count`, that an answer names, or None (LLaVA's ScienceQA).

    The answer is the letter alone, begins "B. ", or says "The answer is B." exactly once. In the
    released code that full stop is any character, so that "The answer is Bread" means B.
    """
    options, text = LETTERS[:count], text.strip()
    if text and text[0] in options and (len(text) == 1 or text[1:3] == ". "):
        return options.index(text[0])
    found = re.findall(r"The answer is ([A-Z])\.", text)
    return options.index(found[0]) if len(found) == 1 and found[0] in options else None
