"""Charts and pictures for a page that has no network and no script: inline SVG coloured by the page's style sheet, PNG as data URLs.

A colour is a CSS class (see report.css), so one drawing serves a light and a dark page. Text given to a chart is escaped here.
"""

import base64
import html
import math
import struct
import zlib

import numpy as np


def short(value, scale=None):
    """A number as an axis shows it: 0, 0.25, 12, 20k, 1.5M. `scale` is the largest of the axis, which gives all its numbers one unit."""
    if not math.isfinite(value):
        return str(value)
    scale = abs(value if scale is None else scale)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if scale >= unit * (10 if unit == 1e3 else 1) and value:
            return f"{value / unit:.4g}{name}".replace("-", "−")
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}").replace("-", "−")


def ticks(low, high, count=5):
    """About `count` round numbers within [low, high], 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def extent(*arrays, include=(), margin=0.06, tails=0.0):
    """A range that shows the arrays (without a fraction `tails` of their points at each end) and the values in `include`."""
    values = np.concatenate([np.ravel(np.asarray(a, np.float64)) for a in arrays] + [np.asarray(include, np.float64)])
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    low, high = np.quantile(values, [tails, 1 - tails]) if tails else (values.min(), values.max())
    low, high = min([low, *include]), max([high, *include])
    pad = (high - low) * margin or abs(high) * 0.1 or 0.5
    return float(low - (0 if low == 0 else pad)), float(high + pad)


def thin(x, y, points=360):
    """Means of x and of y (T,) or (T, K) in at most `points` consecutive bins, so that a long run draws as small as a short one."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    keep = np.isfinite(x) & np.isfinite(y.reshape(len(y), -1)).all(1)
    x, y = x[keep], y[keep]
    if len(x) <= points:
        return x, y
    edges = np.linspace(0, len(x), points + 1).astype(int)[:-1]
    size = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / size, np.add.reduceat(y, edges, axis=0) / size.reshape(-1, *[1] * (y.ndim - 1))


def smooth(y, span):
    """Running mean over a centred window of `span` points, bell-shaped and cut at the ends."""
    window = np.hanning(2 * max(int(min(span, len(y) / 2)), 1) + 1)[1:-1]
    return np.convolve(y, window, "same") / np.convolve(np.ones(len(y)), window, "same")


class Chart:
    """One set of axes. Marks are drawn in the order they are added; `svg()` gives the element.

    x, y: the (low, high) that the axes show; marks outside are cut off. right: room for labels at the ends of lines.
    label: what the chart shows, for readers who do not see it.
    """

    def __init__(self, label, x, y, *, width=560, height=280, right=18, left=52, xlabel="", ylabel="", xticks=True, yticks=True):
        self.label, self.xlabel, self.ylabel = label, xlabel, ylabel
        self.x, self.y, self.width, self.height = x, y, width, height
        self.left, self.right, self.top, self.bottom = left, width - right, 26 if ylabel else 10, height - (44 if xlabel else 26)
        self.xticks = ticks(*x) if xticks is True else xticks or []
        self.yticks = ticks(*y) if yticks is True else yticks or []
        self.marks, self.free, self.ends = [], [], []

    def place(self, x, y):
        """Data to drawing coordinates."""
        (x0, x1), (y0, y1) = self.x, self.y
        return (
            self.left + (np.asarray(x, np.float64) - x0) / ((x1 - x0) or 1) * (self.right - self.left),
            self.bottom - (np.asarray(y, np.float64) - y0) / ((y1 - y0) or 1) * (self.bottom - self.top),
        )

    def line(self, x, y, style, end=None):
        """A curve; `end` labels it beside its last point."""
        points = _points(*self.place(x, y))
        if len(x) == 1:
            self.dots(x, y, style, radius=3.5)
        elif len(x):
            self.marks.append(f'<polyline class="line {style}" points="{points}"/>')
        if end and len(x):
            self.ends.append((float(np.clip(self.place(x[-1], y[-1])[1], self.top, self.bottom)), end, style))
        return self

    def band(self, x, low, high, style):
        """The area between two curves."""
        if len(x) > 1:
            outline = _points(*self.place(np.concatenate([x, x[::-1]]), np.concatenate([low, high[::-1]])))
            self.marks.append(f'<polygon class="band {style}" points="{outline}"/>')
        return self

    def dots(self, x, y, style, radius=2.5):
        """Points, all of one style, in one element."""
        px, py = self.place(x, y)
        path = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(np.ravel(px), np.ravel(py), strict=True))
        self.marks.append(f'<path class="dots {style}" stroke-width="{2 * radius:g}" d="{path}"/>')
        return self

    def rule(self, y, style, end=None):
        """A level across the whole chart."""
        _, py = self.place(0, y)
        self.marks.append(f'<line class="rule {style}" x1="{self.left}" x2="{self.right}" y1="{py:.1f}" y2="{py:.1f}"/>')
        if end:
            self.ends.append((float(py), end, style))
        return self

    def span(self, x0, x1, y, style, caps=True):
        """A horizontal interval at height y."""
        (a, b), (py, _) = self.place([x0, x1], [y, y])
        self.marks.append(f'<path class="span {style}" d="M{a:.1f} {py:.1f}H{b:.1f}"/>')
        if caps:
            self.marks.append("".join(f'<path class="span {style}" d="M{c:.1f} {py - 4:.1f}v8"/>' for c in (a, b)))
        return self

    def bar(self, x0, x1, height, style):
        """A bar that stands on the bottom axis."""
        (a, b), (py, base) = self.place([x0, x1], [height, self.y[0]])
        self.marks.append(f'<rect class="{style}" x="{a:.1f}" y="{py:.1f}" width="{max(b - a - 0.6, 0.6):.1f}" height="{base - py:.1f}"/>')
        return self

    def bar_across(self, x0, x1, y0, y1, style):
        """A bar between two heights, from x0 to x1."""
        (a, b), (low, high) = self.place([x0, x1], [y0, y1])
        self.marks.append(f'<rect class="{style}" x="{min(a, b):.1f}" y="{high:.1f}" width="{abs(b - a):.1f}" height="{low - high:.1f}"/>')
        return self

    def upright(self, x, style):
        """A level of x across the whole height."""
        px, _ = self.place(x, 0)
        self.marks.append(f'<line class="rule {style}" x1="{px:.1f}" x2="{px:.1f}" y1="{self.top}" y2="{self.bottom}"/>')
        return self

    def rings(self, x, y, names, style=""):
        """A circle around each point, and its name on the side where it is farthest from the other circles and names."""
        px, py = self.place(x, y)
        taken = list(zip(px, py, strict=True))
        for a, b, name in zip(px, py, names, strict=True):
            sides = [(a + 15 * math.cos(angle), b + 15 * math.sin(angle)) for angle in np.arange(12) * math.pi / 6 - math.pi / 4]
            at = max(sides, key=lambda side: min((math.dist(side, other) for other in taken if other != (a, b)), default=0))
            taken.append(at)
            self.free.append(f'<circle class="ring {style}" cx="{a:.1f}" cy="{b:.1f}" r="6.5"/>')
            self.free.append(f'<text class="name" x="{at[0]:.1f}" y="{at[1] + 4:.1f}" text-anchor="middle">{html.escape(name)}</text>')
        return self

    def text(self, x, y, text, style="", anchor="start", dx=0, dy=4):
        px, py = self.place(x, y)
        self.free.append(f'<text class="{style}" x="{px + dx:.1f}" y="{py + dy:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>')
        return self

    def svg(self):
        x, y, w, h = self.left - 6, self.top - 8, self.right - self.left + 12, self.bottom - self.top + 9
        out = [
            f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{html.escape(self.label)}">',
        ]
        for value in self.yticks:
            _, at = self.place(0, value)
            out.append(f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{at:.1f}" y2="{at:.1f}"/>')
            out.append(f'<text class="tick" x="{self.left - 8}" y="{at + 4:.1f}" text-anchor="end">{short(value, self.yticks[-1])}</text>')
        for value in self.xticks:
            at, _ = self.place(value, 0)
            out.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{self.bottom}" y2="{self.bottom + 4}"/>')
            out.append(
                f'<text class="tick" x="{at:.1f}" y="{self.bottom + 18}" text-anchor="middle">{short(value, self.xticks[-1])}</text>'
            )
        if self.xticks:
            out.append(f'<line class="axis" x1="{self.left}" x2="{self.right}" y1="{self.bottom}" y2="{self.bottom}"/>')
        if self.xlabel:
            out.append(
                f'<text class="axislabel" x="{self.right}" y="{self.height - 6}" text-anchor="end">{html.escape(self.xlabel)}</text>'
            )
        if self.ylabel:
            out.append(f'<text class="axislabel" x="{4}" y="12">{html.escape(self.ylabel)}</text>')
        # an svg within the svg cuts off what lies outside the axes, and needs no id
        out += [f'<svg x="{x}" y="{y}" width="{w}" height="{h}" viewBox="{x} {y} {w} {h}">', *self.marks, "</svg>", *self.free]
        for at, text, style in _spread(self.ends, 15, self.top, self.bottom):
            out.append(f'<text class="end {style}" x="{self.right + 8}" y="{at + 4:.1f}">{html.escape(text)}</text>')
        return "".join([*out, "</svg>"])


def png(image):
    """A uint8 picture, [H, W] or [H, W, 3], as a PNG data URL."""
    image = np.ascontiguousarray(image)
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise ValueError(f"image: must be uint8 [H, W] or [H, W, 3], got {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    rows = np.zeros((height, 1 + image[0].size), np.uint8)  # every row opens with its filter, 0: none
    rows[:, 1:] = image.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if image.ndim == 2 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return data_url(b"\x89PNG\r\n\x1a\n" + body, "image/png")


def data_url(content, kind):
    """Bytes as a URL that carries them."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _points(px, py):
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px, py, strict=True))


def _spread(ends, gap, top, bottom):
    """Labels at heights that keep `gap` between them, as near to where they belong as one pass down and one up can bring them."""
    ends = sorted(ends, key=lambda end: end[0])
    heights = [end[0] for end in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    if heights and heights[-1] > bottom:
        heights[-1] = bottom
        for i in range(len(heights) - 2, -1, -1):
            heights[i] = min(heights[i], heights[i + 1] - gap)
    return [(max(y, top - gap), text, style) for y, (_, text, style) in zip(heights, ends, strict=True)]
