"""flamingo.py: a page is written turn by turn; labels without their image go from the end."""


def page_segments(turns, attend_next=False, is_prompt=False):
    page, seen = [Segment((BOS,))], bool(attend_next)
    for place, turn in enumerate(turns, start=1):
        tags = Segment((IMAGE,) * len(turn["images"]))
        seen = seen or len(turn["images"]) > 0
        if not attend_next:
            page.append(tags)
        if turn.get("caption"):
            page.append(Segment(CAPTION_PROMPT))
        elif turn["prompt"]:
            page.append(Segment(QUESTION_PROMPT.format(turn["prompt"])))
        if place < len(turns) or not is_prompt:
            learn = seen and turn.get("learn", True)
            page += [Segment(" " + turn["answer"], learn), Segment((EOC,), learn)]
        if attend_next:
            page.append(tags)
    return page if is_prompt else [*page, Segment((EOS,))]


def render_page(turns, tokenizer, context_length=None, attend_next=False, is_prompt=False):
    ids, labels = render(page_segments(turns, attend_next, is_prompt), tokenizer, context_length)
    if attend_next and not is_prompt:
        place = len(ids) - 1
        while place >= 0 and ids[place] != IMAGE:
            labels[place] = IGNORED
            place -= 1
    return ids, labels
