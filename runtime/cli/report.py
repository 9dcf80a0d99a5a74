"""A profile as tables, as a trace for Chrome or Perfetto, and as a picture of its timeline."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..files import printable
from ..profile import Profile

# Okabe and Ito's colours, which colour-blind people can tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")


def tables(profile: Profile, launches: dict[str, int] | None = None) -> list[Any]:
    """rich tables: stages, modules, and what did not run where it could have been faster."""
    from rich.markup import escape
    from rich.table import Table

    stages = Table("stage", "evaluations", "calls", "seconds", "share", "ms a call", title="stages")
    total = sum(profile.seconds.values()) or 1.0
    for name, seconds in profile.seconds.items():
        calls = profile.calls.get(name, 0)
        evaluations, per_call = profile.evaluations.get(name, 0), f"{1e3 * seconds / calls:.2f}" if calls else ""
        stages.add_row(name, str(evaluations), str(calls), f"{seconds:.4f}", f"{seconds / total:.0%}", per_call)
    evaluated, called = sum(profile.evaluations.values()), sum(profile.calls.values())
    stages.add_row("total", str(evaluated), str(called), f"{total:.4f}", "100%")
    outside, peak = profile.outside_modules(), profile.peak_bytes / 2**20
    stages.caption = f"{outside:.4f} s ({outside / total:.1%}) outside the networks; peak {peak:.0f} MiB"
    if launches is not None:
        stages.caption += "; " + ", ".join(f"{n} {what}" for what, n in launches.items())
    headings = ("module", "backend", "calls", "samples", "seconds", "ms a sample", "cold calls", "cold seconds")
    modules = Table(*headings, title="modules")
    for row in profile.by_module():
        warm = row["seconds"] - row["cold_seconds"]
        samples = sum(
            c.batch for c in profile.modules if (c.module, c.backend) == (row["module"], row["backend"]) and not c.cold
        )
        per_sample = f"{1e3 * warm / samples:.2f}" if samples else ""
        counts = (row["module"], row["backend"], str(row["calls"]), str(row["samples"]), f"{row['seconds']:.4f}")
        modules.add_row(*counts, per_sample, str(row["cold_calls"]), f"{row['cold_seconds']:.4f}")
    shown = [stages, modules]
    if profile.fallbacks:
        down = Table("module", "backend", "why not", title="steps down")
        for (module, backend), why in profile.fallbacks.items():
            down.add_row(module, backend, escape(printable("; ".join(why))))  # [gpu] is no markup
        shown.append(down)
    return shown


def trace(profile: Profile) -> dict[str, Any]:
    """The Trace Event format: one row for stages, one for steps, one for each module; microseconds."""

    def event(name: str, row: int, start: float, seconds: float, **more: Any) -> dict[str, Any]:
        when = {"ts": round(start * 1e6, 1), "dur": round(seconds * 1e6, 1)}
        return {"name": name, "ph": "X", "pid": 1, "tid": row} | when | {"args": more}

    names = list(dict.fromkeys(c.module for c in profile.modules))
    rows = {0: "stages", 1: "steps"} | {2 + i: name for i, name in enumerate(names)}
    events: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "iedit"}}]
    events += [{"name": "thread_name", "ph": "M", "pid": 1, "tid": i, "args": {"name": n}} for i, n in rows.items()]
    for name, start, end in spans(profile):
        evaluations = sum(profile.evaluations.get(n, 0) for n in name.split(" + "))
        events.append(event(name, 0, start, end - start, evaluations=evaluations))
    for step in profile.steps:
        if step.step:
            events.append(event(f"{step.stage} {step.step}", 1, step.start, step.seconds))
    for call in profile.modules:
        facts = {
            "batch": call.batch,
            "backend": call.backend,
            "cold": call.cold,
            "stage": call.stage,
            "step": call.step,
        }
        events.append(event(call.module, 2 + names.index(call.module), call.start, call.seconds, **facts))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def spans(profile: Profile) -> list[tuple[str, float, float]]:
    """(stage, start, end) on the host's clock, in order; stages that run together are one."""
    stages: list[tuple[str, float, float]] = []
    for step in profile.steps:
        end = step.start + max(0.0, step.seconds)
        if stages and stages[-1][0] == step.stage:
            stages[-1] = (step.stage, stages[-1][1], end)
        else:
            stages.append((step.stage, step.start, end))
    return stages


def plot(profile: Profile, width: int = 1600) -> Image.Image:
    """The timeline: stages, and under them every call of every module by step; hatched where it was cold."""
    font, small = ImageFont.load_default(18), ImageFont.load_default(14)
    names = list(dict.fromkeys(c.module for c in profile.modules))
    colour = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    ends = [s.start + max(0.0, s.seconds) for s in profile.steps] or [1.0]
    begin, end = min((s.start for s in profile.steps), default=0.0), max(ends)
    left, lane, top = 190, 46, 60
    image = Image.new("RGB", (width, top + lane * (2 + len(names)) + 50), "white")
    draw = ImageDraw.Draw(image)

    def x(seconds: float) -> float:
        return left + (seconds - begin) / max(end - begin, 1e-9) * (width - left - 20)

    total = sum(profile.seconds.values())
    title = f"{total:.3f} s, {sum(profile.evaluations.values())} evaluations in {sum(profile.calls.values())} calls"
    draw.text((left, 16), title, fill="black", font=font)
    draw.text((12, top + 10), "stages", fill="black", font=font)
    for i, (name, start, stop) in enumerate(spans(profile)):
        box = (x(start), top, max(x(start) + 1, x(stop)), top + lane - 8)
        draw.rectangle(box, fill=("#e8e8e8", "#d0d0d0")[i % 2])
        if draw.textlength(name, font=small) < box[2] - box[0] - 4:
            draw.text((box[0] + 4, top + 10), name, fill="black", font=small)
    draw.text((12, top + lane + 10), "steps", fill="black", font=font)
    for i, step in enumerate(s for s in profile.steps if s.step):
        box = (x(step.start), top + lane, max(x(step.start) + 1, x(step.start + step.seconds) - 1), top + 2 * lane - 8)
        draw.rectangle(box, fill=("#bcd4e6", "#8fb8d8")[i % 2])
    for row, name in enumerate(names):
        y = top + lane * (2 + row)
        draw.text((12, y + 10), name[:18], fill="black", font=font)
        for call in profile.modules:
            if call.module == name:
                box = (x(call.start), y, max(x(call.start) + 1, x(call.start + call.seconds) - 1), y + lane - 8)
                draw.rectangle(box, fill=None if call.cold else colour[name], outline=colour[name])
    axis = top + lane * (2 + len(names))
    for i in range(11):
        at = begin + (end - begin) * i / 10
        draw.line((x(at), axis, x(at), axis + 6), fill="black")
        draw.text((x(at) - 18, axis + 10), f"{at - begin:.2f} s", fill="black", font=small)
    if any(c.cold for c in profile.modules):
        draw.text((width - 420, 18), "outlined only: cold (compiling, loading)", fill="black", font=small)
    return image


def count_launches(run: Any) -> dict[str, int]:
    """Call `run()` under torch's profiler: kernel launches and graph replays on CUDA, operators on a CPU."""
    import torch
    from torch.profiler import ProfilerActivity

    cuda = torch.cuda.is_available()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        run()
    counts: dict[str, int] = {"kernel launches": 0, "graph replays": 0} if cuda else {"operators": 0}
    for row in profiler.key_averages():
        if cuda and ("LaunchKernel" in row.key):
            counts["kernel launches"] += row.count
        elif cuda and "GraphLaunch" in row.key:
            counts["graph replays"] += row.count
        elif not cuda and row.key.startswith("aten::") and row.self_cpu_time_total > 0:
            counts["operators"] += row.count
    return counts
