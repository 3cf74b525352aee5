"""Draws one dashboard as Grafana would show it: same places, titles, units and colours, with matplotlib. Not a test."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.dates import AutoDateLocator, DateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from PIL import Image

from tests.deploy.boards import queries
from tests.deploy.monitored import Prometheus

COLUMNS, COLUMN_INCHES, ROW_INCHES = 24, 0.75, 0.42
MARGIN_INCHES = 0.14
BACKGROUND, PANEL, EDGE, TEXT, FAINT = "#111217", "#181b1f", "#2c3235", "#d8d9da", "#8e9297"
PALETTE = (
    "#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#56a64b", "#ffb357", "#9fa7b3",
)  # fmt: skip
THRESHOLDS = {"green": "#73bf69", "orange": "#ff9830", "red": "#f2495c", "blue": "#5794f2", "text": TEXT}
Series = dict[str, Any]


class Board:
    """A dashboard and the span of time that it shows."""

    def __init__(
        self, board: Mapping[str, Any], source: Prometheus, begin: float, end: float, *, step: float, rate_interval: str
    ) -> None:
        self._board = board
        self._source = source
        self._begin, self._end, self._step = begin, end, step
        self._rate_interval = rate_interval

    def save(self, path: Path) -> None:
        places = [panel["gridPos"] for panel in self._board["panels"]]
        rows = max(place["y"] + place["h"] for place in places)
        width, height = COLUMNS * COLUMN_INCHES, (rows + 1.4) * ROW_INCHES
        with mpl.rc_context({"text.color": TEXT, "font.family": "DejaVu Sans", "font.size": 8}):
            figure = plt.figure(figsize=(width, height), facecolor=BACKGROUND)
            top = height - 1.4 * ROW_INCHES
            figure.text(0.012, (top + 0.3) / height, self._board["title"], size=15, weight="bold")
            clock = f"{datetime.fromtimestamp(self._begin):%H:%M:%S} to {datetime.fromtimestamp(self._end):%H:%M:%S}"
            figure.text(0.988, (top + 0.3) / height, clock, size=10, ha="right", color=FAINT)
            for panel in self._board["panels"]:
                place = panel["gridPos"]
                left, bottom = place["x"] * COLUMN_INCHES, top - (place["y"] + place["h"]) * ROW_INCHES
                box = (left, bottom, place["w"] * COLUMN_INCHES, place["h"] * ROW_INCHES)
                if panel["type"] == "row":
                    figure.text(0.012, (bottom + 0.12) / height, panel["title"], size=11, weight="bold", color=TEXT)
                else:
                    self._panel(figure, panel, box)
            drawn = io.BytesIO()
            figure.savefig(drawn, dpi=100, facecolor=BACKGROUND)
            plt.close(figure)
        # Few colours are in it: with a palette the file is a third as large.
        Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)

    def _panel(self, figure: Figure, panel: Mapping[str, Any], box: tuple[float, float, float, float]) -> None:
        width, height = figure.get_size_inches()
        left, bottom, wide, high = box
        inner = 0.06
        frame = (
            (left + inner) / width,
            (bottom + inner) / height,
            (wide - 2 * inner) / width,
            (high - 2 * inner) / height,
        )
        background = figure.add_axes(frame)
        background.set_axis_off()
        background.add_patch(
            FancyBboxPatch(
                (0, 0), 1, 1, boxstyle="square,pad=0", transform=background.transAxes, facecolor=PANEL, edgecolor=EDGE
            )
        )
        head = (high - 2 * inner - 0.2) / (high - 2 * inner)
        background.text(
            MARGIN_INCHES / (wide - 2 * inner),
            head,
            panel["title"],
            size=10,
            weight="bold",
            transform=background.transAxes,
        )
        draw = {
            "timeseries": self._timeseries,
            "stat": self._stat,
            "bargauge": self._bars,
            "table": self._table,
            "heatmap": self._heatmap,
            "state-timeline": self._timeline,
        }[panel["type"]]
        axes = figure.add_axes(_inside(frame, wide - 2 * inner, high - 2 * inner, panel["type"]), facecolor=PANEL)
        draw(axes, panel)

    def _now(self, panel: Mapping[str, Any]) -> list[tuple[str, float]]:
        found = []
        for query in queries(panel):
            for one in self._source.query(query.promql(self._rate_interval), time=self._end):
                found.append((_legend(query.legend, one["metric"]), float(one["value"][1])))
        return sorted(found)

    def _history(self, panel: Mapping[str, Any]) -> list[tuple[str, list[float], list[float]]]:
        found = []
        for query in queries(panel):
            expression = query.promql(self._rate_interval)
            for one in self._source.range(expression, self._begin, self._end, self._step):
                values = {round((time - self._begin) / self._step): float(text) for time, text in one["values"]}
                steps = range(round((self._end - self._begin) / self._step) + 1)
                times = [self._begin + step * self._step for step in steps]
                found.append(
                    (_legend(query.legend, one["metric"]), times, [values.get(step, math.nan) for step in steps])
                )
        return found

    def _timeseries(self, axes: Axes, panel: Mapping[str, Any]) -> None:
        history = self._history(panel)
        defaults = panel["fieldConfig"]["defaults"]
        stacked = defaults["custom"]["stacking"]["mode"] == "normal"
        base = [0.0] * len(history[0][1]) if history else []
        highest = lowest = 0.0
        for number, (name, times, values) in enumerate(history):
            color = PALETTE[number % len(PALETTE)]
            moments = [moment(time) for time in times]
            if stacked:
                upper = [low + (0.0 if math.isnan(value) else value) for low, value in zip(base, values, strict=True)]
                axes.fill_between(moments, base, upper, color=color, alpha=0.6, linewidth=0, label=name)
                base = upper
            else:
                axes.plot(moments, values, color=color, linewidth=1.4, label=name)
                upper = values
            highest = max([highest, *(value for value in upper if math.isfinite(value))])
            lowest = min([lowest, *(value for value in upper if math.isfinite(value))])
        axes.set_xlim(moment(self._begin), moment(self._end))
        axes.set_ylim(min(0.0, lowest * 1.08), defaults.get("max") or highest * 1.08 or 1)
        self._style(axes, defaults["unit"])
        if history:
            self._write_legend(axes)

    def _write_legend(self, axes: Axes) -> None:
        """Two lines below the axes; what does not fit is counted."""
        handles, labels = axes.get_legend_handles_labels()
        width = axes.figure.get_size_inches()[0] * axes.get_position().width  # type: ignore[union-attr]
        columns = max(1, int(12.5 * width / (max(map(len, labels)) + 4)))
        if len(labels) > 2 * columns:
            rest = len(labels) - 2 * columns
            handles, labels = handles[: 2 * columns], labels[: 2 * columns]
            labels[-1] += f"  ... {rest} more"
        axes.legend(
            handles,
            labels,
            loc="upper left",
            bbox_to_anchor=(-0.02, -0.13),
            ncols=columns,
            frameon=False,
            fontsize=8,
            labelcolor=TEXT,
            handlelength=1,
            columnspacing=1.2,
            borderaxespad=0,
        )

    def _style(self, axes: Axes, unit: str) -> None:
        for side in axes.spines.values():
            side.set_visible(False)
        axes.grid(visible=True, color=EDGE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(colors=FAINT, labelsize=8, length=0)
        axes.xaxis.set_major_formatter(DateFormatter("%H:%M:%S"))  # type: ignore[no-untyped-call]
        axes.xaxis.set_major_locator(AutoDateLocator(minticks=2, maxticks=5))  # type: ignore[no-untyped-call]
        if unit == "bytes":
            axes.yaxis.set_major_locator(FixedLocator(_byte_ticks(axes.get_ylim()[1])))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, unit)))

    def _stat(self, axes: Axes, panel: Mapping[str, Any]) -> None:
        axes.set_axis_off()
        defaults = panel["fieldConfig"]["defaults"]
        found = self._now(panel)[:4]
        for number, (name, value) in enumerate(found):
            text = _mapped(value, defaults) or shown(value, defaults["unit"])
            place = (number + 0.5) / len(found)
            several = len(found) > 1
            axes.text(
                place,
                0.62 if several else 0.5,
                text,
                size=15 if several else 21,
                weight="bold",
                ha="center",
                va="center",
                color=_threshold(value, defaults),
                transform=axes.transAxes,
            )
            if several:
                axes.text(place, 0.2, name, size=8, ha="center", va="center", color=FAINT, transform=axes.transAxes)

    def _bars(self, axes: Axes, panel: Mapping[str, Any]) -> None:
        defaults = panel["fieldConfig"]["defaults"]
        found = self._now(panel)[:20][::-1]
        values = [value for _, value in found]
        colors = [_threshold(value, defaults) for value in values]
        positions = list(range(len(found)))
        most = max([abs(value) for value in values] + [1e-12])
        axes.barh(positions, [most * 1.0] * len(found), color="#22252b", height=0.62)
        axes.barh(positions, values, color=colors, height=0.62)
        axes.set_xlim(0, most * 1.25)
        axes.set_ylim(-0.6, max(len(found), 4) - 0.4)
        axes.set_yticks(positions, [name for name, _ in found])
        for place, value in zip(positions, values, strict=True):
            axes.text(most * 1.02, place, shown(value, defaults["unit"]), size=8.5, va="center")
        axes.tick_params(colors=TEXT, labelsize=8.5, length=0)
        axes.xaxis.set_visible(False)
        for side in axes.spines.values():
            side.set_visible(False)

    def _table(self, axes: Axes, panel: Mapping[str, Any]) -> None:
        axes.set_axis_off()
        (query,) = queries(panel)
        rows = [one["metric"] for one in self._source.query(query.promql(self._rate_interval), time=self._end)]
        options = panel["transformations"][0]["options"]
        names = sorted({name for row in rows for name in row if not options["excludeByName"].get(name)})
        names.sort(key=lambda name: options["indexByName"].get(name, 99))
        head = [options["renameByName"].get(name, name) for name in names]
        body = [[row.get(name, "") for name in names] for row in rows]
        widths = [max(len(text) for text in column) + 2 for column in zip(head, *body, strict=True)]
        table = axes.table(
            cellText=body,
            colLabels=head,
            loc="upper left",
            cellLoc="left",
            colLoc="left",
            edges="horizontal",
            colWidths=[width / sum(widths) for width in widths],
        )
        table.auto_set_font_size(False)
        table.set_fontsize(8.5)
        for (row, _), cell in table.get_celld().items():
            cell.set_edgecolor(EDGE)
            cell.set_text_props(color=FAINT if row == 0 else TEXT)
            cell.set_height(0.19)

    def _timeline(self, axes: Axes, panel: Mapping[str, Any]) -> None:
        history = sorted(self._history(panel), reverse=True)
        for place, (name, times, values) in enumerate(history):
            there = [(moment(t), self._step / 86400) for t, v in zip(times, values, strict=True) if not math.isnan(v)]
            color = "#73bf69" if name.endswith("ready") else "#ff9830"
            axes.broken_barh(there, (place - 0.35, 0.7), facecolors=color, alpha=0.75, linewidth=0)
        axes.set_ylim(-0.6, len(history) - 0.4)
        axes.set_xlim(moment(self._begin), moment(self._end))
        self._style(axes, "none")
        axes.grid(visible=False)
        axes.set_yticks(range(len(history)), [name for name, _, _ in history])

    def _heatmap(self, axes: Axes, panel: Mapping[str, Any]) -> None:
        history = sorted(self._history(panel), key=lambda one: float(one[0].replace("+Inf", "inf")))
        counts = [[0.0 if math.isnan(value) else value for value in values] for _, _, values in history]
        # Buckets are cumulative; what is in one is its difference to the one below.
        own = [
            counts[0],
            *([max(0.0, b - a) for a, b in zip(low, high, strict=True)] for low, high in pairwise(counts)),
        ]
        used = [number for number, values in enumerate(own) if any(values)]
        first, last = (used[0], used[-1] + 1) if used else (0, 1)
        moments = [moment(time) for time in history[0][1]]
        drawn = [[value if value >= 0.05 else math.nan for value in values] for values in own[first:last]]
        axes.pcolormesh(
            moments,
            range(last - first),
            drawn,
            cmap="YlGnBu_r",
            norm=LogNorm(vmin=0.1),
            shading="nearest",
        )
        self._style(axes, "none")
        axes.grid(visible=False)
        labels = [shown(float(name), "s") if name != "+Inf" else "more" for name, _, _ in history[first:last]]
        axes.set_yticks(range(last - first), labels)
        axes.set_xlim(moments[0], moments[-1])


def _inside(
    frame: tuple[float, float, float, float], wide: float, high: float, kind: str
) -> tuple[float, float, float, float]:
    """Where a panel's axes are in its frame, in parts of the figure; `wide` and `high` are the frame's inches."""
    margins = {
        "timeseries": (0.72, 0.66, 0.16, 0.38),
        "heatmap": (0.72, 0.3, 0.16, 0.38),
        "state-timeline": (1.45, 0.3, 0.16, 0.38),
        "bargauge": (2.35 if wide > 7 else 1.6, 0.1, 0.1, 0.36),
        "stat": (0.1, 0.1, 0.1, 0.3),
        "table": (MARGIN_INCHES, 0.1, 0.14, 0.4),
    }
    left, bottom, right, top = margins[kind]
    x, y, width, height = frame
    return (
        x + left / wide * width,
        y + bottom / high * height,
        width * (1 - (left + right) / wide),
        height * (1 - (bottom + top) / high),
    )


def moment(time: float) -> float:
    """A Unix time as matplotlib counts days, in this machine's time zone."""
    return float(date2num(datetime.fromtimestamp(time)))  # type: ignore[no-untyped-call]


def _byte_ticks(highest: float) -> list[float]:
    """At most eight marks up to there, at multiples of a power of two."""
    step = 2.0 ** math.ceil(math.log2(max(highest, 1) / 7))
    return [step * number for number in range(int(highest / step) + 1)]


def _legend(pattern: str, labels: Mapping[str, str]) -> str:
    text = re.sub(r"{{\s*(\w+)\s*}}", lambda found: labels.get(found[1], ""), pattern)
    return text or labels.get("__name__", "")


def _threshold(value: float, defaults: Mapping[str, Any]) -> str:
    color = "text"
    for step in defaults["thresholds"]["steps"]:
        if step["value"] is None or value >= step["value"]:
            color = step["color"]
    return THRESHOLDS[color]


def _mapped(value: float, defaults: Mapping[str, Any]) -> str:
    for mapping in defaults["mappings"]:
        option = mapping["options"].get(f"{value:g}")
        if option is not None:
            return str(option["text"])
    return ""


def shown(value: float, unit: str) -> str:
    """A number as Grafana writes it in that unit."""
    scale: Callable[[float], str] = {
        "bytes": lambda v: _scaled(v, 1024, ("B", "KiB", "MiB", "GiB", "TiB")),
        "percentunit": lambda v: f"{100 * v:.3g}%",
        "s": lambda v: _seconds(v),
        "reqps": lambda v: f"{v:.3g} req/s",
        "ops": lambda v: f"{v:.3g} ops/s",
        "tok/s": lambda v: f"{v:.4g} tok/s",
    }.get(unit, lambda v: _scaled(v, 1000, ("", "K", "Mil", "Bil")))
    return scale(value)


def _scaled(value: float, base: float, names: Sequence[str]) -> str:
    place = 0
    while abs(value) >= base and place < len(names) - 1:
        value /= base
        place += 1
    return f"{value:.3g} {names[place]}".strip()


def _seconds(value: float) -> str:
    if value == 0:
        return "0 s"
    if abs(value) < 1:
        return f"{1000 * value:.3g} ms"
    return f"{value:.3g} s" if abs(value) < 60 else f"{value / 60:.3g} min"
