"""Sheets of samples to look at: rows of pictures and words, right and wrong answers marked."""
from PIL import Image, ImageDraw, ImageFont

GREEN, RED, INK, GREY = (20, 150, 60), (210, 40, 40), (30, 30, 30), (225, 225, 225)
GAP, LINE, MARK = 8, 16, 16              # pixels: between cells, a line's height, a mark's width
MOST_LINES = 12                          # of words that stand alone; below a picture there are two
CHECK = [((1, 8), (5, 12)), ((5, 12), (11, 3))]          # strokes of MARK x LINE pixels
CROSS = [((2, 3), (11, 12)), ((2, 12), (11, 3))]
FONT = ImageFont.load_default(13)


def wrap(text, width):
    """The text broken into lines at most `width` pixels wide."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if FONT.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
        while len(last := lines[-1]) > 1 and FONT.getlength(last) > width:     # one long word
            fits = sum(FONT.getlength(last[:n + 1]) <= width for n in range(len(last)))
            lines[-1:] = [last[:max(1, fits)], last[max(1, fits):]]
    return lines


def sheet(title, rows, cell=112):
    """Rows of pictures and words as one RGB picture.

    rows: (text, picture or None, cells); the question stands left, as words or as a picture. A cell
    is (picture or None, caption, right). right: True draws a check mark and a green frame, False a
    cross and a red frame (colour alone does not tell every reader), None neither. cell: a picture's
    side in pixels; words that stand alone are twice as wide.
    """
    left = 2 * cell if any(text or asked for text, asked, _ in rows) else GAP
    widths = [sum((1 if picture else 2) * cell + GAP for picture, _, _ in cells)
              for _, _, cells in rows]
    width = max(6 * cell, GAP + left + max(widths))
    bound = (cell + MOST_LINES * LINE) * (len(rows) + 1) + LINE * len(title)
    page = Image.new("RGB", (width, bound), "white")      # its unused end is cut off below
    canvas = ImageDraw.Draw(page)

    def write(text, x, y, width, colour=INK, most=MOST_LINES):
        lines = wrap(text, width)[:most]
        for number, line in enumerate(lines):
            canvas.text((x, y + LINE * number), line, fill=colour, font=FONT)
        return y + LINE * len(lines)     # where the words end

    def paste(picture, x, y):
        page.paste(picture.resize((cell, cell), Image.Resampling.LANCZOS), (x, y))
        return y + cell

    end = write(title, GAP, GAP, width - 2 * GAP, most=99)
    for text, asked, cells in rows:
        x, top = left, end + 2 * GAP
        end = max(write(text, GAP, top, left - 2 * GAP), paste(asked, GAP, top) if asked else 0)
        for picture, caption, right in cells:
            colour = INK if right is None else GREEN if right else RED
            mark, y, room = (0 if right is None else MARK), top, (1 if picture else 2) * cell
            if picture:
                canvas.rectangle((x - 3, y - 3, x + cell + 2, y + cell + 2),
                                 fill=GREY if right is None else colour)
                y = paste(picture, x, y) + 4
            if right is not None:
                for stroke in CHECK if right else CROSS:
                    canvas.line([(x + dx, y + dy) for dx, dy in stroke], fill=colour, width=3)
            end = max(end, write(caption, x + mark, y, room - mark, colour,
                                 2 if picture else MOST_LINES))
            x += room + GAP
    return page.crop((0, 0, width, end + GAP))


def stack(sheets):
    """Sheets below one another as one RGB picture."""
    page = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    for number, part in enumerate(sheets):
        page.paste(part, (0, sum(s.height for s in sheets[:number])))
    return page
