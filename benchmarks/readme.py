"""Builds the README's tables from benchmarks/results: `python -m benchmarks.readme [--check]`.

Every table says of which commits and dates its numbers are, and marks those that are older than what they measure.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import ages

ROOT = Path(__file__).parent.parent
ACCURACY = ROOT / "benchmarks" / "results" / "accuracy-fashion-mnist.json"
STUDENTS = ROOT / "benchmarks" / "results" / "students-fashion-mnist.json"
KERNELS = ROOT / "benchmarks" / "results" / "kernels-cpu-intel-xeon-processor.json"
INTEGER = [
    ROOT / "benchmarks" / "results" / f"integer-cpu-{name}.json" for name in ("intel-xeon-processor", "amd-epyc")
]
NETWORKS = ROOT / "benchmarks" / "results" / "networks-cpu-amd-epyc.json"
ZOO = ROOT / "benchmarks" / "results" / "zoo.json"
STAGES = {"prepare": "prepared", "train": "trained: finite gradients", "calibrate": "calibrated",
          "engine": "in integers, bit-equal", "onnx": "in ONNX Runtime, within 5 %"}  # fmt: skip
FLOAT_PART = "floating-point part"
ONNX = ROOT / "benchmarks" / "results" / "onnx-cpu-amd-epyc.json"
STEPS = ROOT / "benchmarks" / "results" / "steps-cpu-intel-xeon-processor.json"
PRESETS = ("W8A8", "W4A8", "W4A4", "W3A3", "W2A4", "W2A2")


Ages = dict[str, ages.Age]


def commits_of(rows: list[dict[str, Any]]) -> set[str]:
    return {row["commit"] for row in rows}


def main_table(data: dict[str, Any], known: Ages) -> str:
    """The paper's columns as rows: accuracy in percent for each preset."""
    rows = [row for row in data["rows"] if row["table"] == "main"]

    def cell(method: str, preset: str, key: str = "accuracy") -> str:
        values = [row[key] for row in rows if row["method"] == method and row["preset"] == preset and key in row]
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}" if values else "—"

    def marked(name: str, method: str) -> str:
        mine = [row for row in rows if row["method"] == method]
        return f"{name} {ages.mark(known, commits_of(mine))}".rstrip()

    default = {item["preset"]: item for item in data["default"]}

    def default_cell(preset: str) -> str:
        if preset not in default:
            return "—"
        item = default[preset]
        spread = f" ± {item['deviation']:.2f}" if item["deviation"] is not None else ""
        return f"**{item['mean']:.2f}**{spread}"

    default_method, paper = "DF-QAT-KD default", "DF-QAT-KD paper"
    lines = [
        ("DF-Q, recipe `paper` (ranges calibrated on synthetic images)", paper,
         [cell(paper, p, "calibrated") for p in PRESETS]),
        ("DF-QAT-KD, recipe `paper`", paper, [cell(paper, p) for p in PRESETS]),
        ("analytic (no image, no step)", default_method, [cell(default_method, p, "analytic") for p in PRESETS]),
        ("**DF-QAT-KD, recipe `default`**", default_method, [default_cell(p) for p in PRESETS]),
        ("Q, real images", "QAT-KD", [cell("QAT-KD", p, "calibrated") for p in PRESETS]),
        ("QAT, real images", "QAT", [cell("QAT", p) for p in PRESETS]),
        ("QAT-KD, real images", "QAT-KD", [cell("QAT-KD", p) for p in PRESETS]),
    ]  # fmt: skip
    head = [f"| float teacher: {data['teacher']:.2f} | {' | '.join(PRESETS)} |", f"| --- {'| ---: ' * len(PRESETS)}|"]
    body = [f"| {marked(name, method)} | {' | '.join(cells)} |" for name, method, cells in lines]
    return "\n".join([*head, *body, "", rows_sentence(data, rows, known)])


def students_table(data: dict[str, Any], known: Ages) -> str:
    """Float students: without data and on real images, mean and deviation over the seeds there are."""

    def same(row: dict[str, Any], item: dict[str, Any]) -> bool:
        return (row["table"], row["method"], row["students"][0]) == (item["table"], item["method"], item["student"])

    lines = [f"| float student of a teacher of {data['teacher']:.2f} | steps | seeds | accuracy % |",
             "| --- | ---: | ---: | ---: |"]  # fmt: skip
    for item in data["summary"]:
        if item["table"] == "main":
            mine = [row for row in data["rows"] if same(row, item)]
            name = f"{item['student']}, {item['method']} {ages.mark(known, commits_of(mine))}".rstrip()
            lines.append(f"| {name} | {data['recipe']['steps']:,} | {item['seeds']} | {mean_of(mine)} |")
    main = [row for row in data["rows"] if row["table"] == "main"]
    return "\n".join([*lines, "", rows_sentence(data, main, known)])


def compared_table(data: dict[str, Any], known: Ages) -> str:
    """Float students of fewer steps: what is changed in the recipe, how many generators and students there are."""
    rows = [row for row in data["rows"] if row["table"] in ("ablation", "generators")]

    def name(row: dict[str, Any]) -> str:
        return (
            f"generators x students {row['method']} (1x1: as it is)" if row["table"] == "generators" else row["method"]
        )

    lines = [f"| {rows[0]['students'][0]}, {rows[0]['steps']:,} steps | seeds | accuracy % |", "| --- | ---: | ---: |"]
    for method, mine in grouped(rows, name).items():
        marked = f"{method} {ages.mark(known, commits_of(mine))}".rstrip()
        lines.append(f"| {marked} | {len(mine)} | {mean_of(mine)} |")
    return "\n".join([*lines, "", rows_sentence(data, rows, known)])


def mean_of(rows: list[dict[str, Any]]) -> str:
    """Mean accuracy, and its deviation where there are several seeds."""
    values = [row["accuracy"] for row in rows]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def gdfq_table(data: dict[str, Any], known: Ages) -> str:
    """The convention of later work: ranges, images, mean over seeds and its distance from the teacher."""
    rows = [row for row in data["rows"] if row["table"] == "gdfq"]

    def name(row: dict[str, Any]) -> str:
        ranges = "min/max ranges" if "min/max" in row["method"] else "learned ranges"
        return f"{row['preset']}, {ranges}, {row['steps'] * data['batch']:,} images"

    return means_table(data, "convention of later work", grouped(rows, name), known)


def ablation_table(data: dict[str, Any], known: Ages) -> str:
    """What is changed in the default recipe at W3A3; where an adversary could matter, with and without it."""

    def name(row: dict[str, Any]) -> str:
        if row["table"] == "ablation" or (row["table"] == "main" and row["preset"] == "W3A3"):
            return str(row["method"])
        return f"{row['preset']}: {row['method']}"

    def wanted(row: dict[str, Any]) -> bool:
        default = row["table"] == "main" and row["method"] == "DF-QAT-KD default" and row["preset"] in ("W3A3", "W2A4")
        minmax = row["table"] == "gdfq" and "min/max" in row["method"] and row["preset"] == "gdfq-W3A3"
        return default or minmax or row["table"] in ("ablation", "adversary")

    rows = [row for row in data["rows"] if wanted(row)]
    rows.sort(key=lambda row: (row["preset"] != "W3A3", row["preset"], row["table"] in ("ablation", "adversary")))
    return means_table(data, "W3A3 where no bits are named, one change each", grouped(rows, name), known)


def grouped(rows: list[dict[str, Any]], name: Callable[[dict[str, Any]], str]) -> dict[str, list[dict[str, Any]]]:
    """Rows by what they are called, in the order of the first of each."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(name(row), []).append(row)
    return found


def means_table(data: dict[str, Any], title: str, groups: dict[str, list[dict[str, Any]]], known: Ages) -> str:
    """Mean and deviation over seeds, and the mean's distance from the teacher."""
    lines = [f"| {title} | seeds | accuracy % | below teacher |", "| --- | ---: | ---: | ---: |"]
    for name, rows in groups.items():
        below = data["teacher"] - statistics.mean(row["accuracy"] for row in rows)
        marked = f"{name} {ages.mark(known, commits_of(rows))}".rstrip()
        lines.append(f"| {marked} | {len(rows)} | {mean_of(rows)} | {below:.2f} |")
    every = [row for rows in groups.values() for row in rows]
    return "\n".join([*lines, "", rows_sentence(data, every, known)])


def rows_sentence(data: dict[str, Any], rows: list[dict[str, Any]], known: Ages) -> str:
    """Where the rows were measured, and what their marks mean."""
    dates = {row["commit"]: row["date"] for row in rows}
    commits = ", ".join(f"commit {commit} ({date})" for commit, date in sorted(dates.items(), key=lambda item: item[1]))
    machine = data["machine"]
    sentence = f"{machine['cpu']}, torch {machine['torch']}, {commits}."
    return f"{sentence} {ages.legend(known, set(dates))}".rstrip()


def kernel_table(data: dict[str, Any], known: Ages) -> str:
    """Per operator and pass, in fp32: the least and the largest ratio over all shapes and layouts."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        if row.get("dtype", "fp32") == "fp32" and "times_torch" in row:
            name = f"`{row['op']}`{', ' if row['case'] else ''}{row['case']}"
            cases.setdefault(f"{name} | {row['pass']}", []).append(row)

    def spread(rows: list[dict[str, Any]], key: str) -> str:
        values = sorted({f"{row[key]:.2g}" for row in rows if key in row}, key=float)
        return " to ".join(dict.fromkeys([values[0], values[-1]])) if values else "—"

    head = "| operator | pass | times torch | times `torch.compile` | of the copy rate |"
    lines = [head, "| --- | --- | ---: | ---: | ---: |"]
    for name, rows in cases.items():
        cells = [spread(rows, key) for key in ("times_torch", "times_compiled", "of_copy")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", machine_sentence(data, known)])


def step_table(data: dict[str, Any], known: Ages) -> str:
    """Training steps per second of each variant, and ours as they are against torch.ao's."""
    measured = [row for row in data["rows"] if "steps_per_second" in row]
    names = list(dict.fromkeys(row["variant"] for row in measured))
    lines = [f"| WRN-16-1, W4A4, batch 128, steps/s | {' | '.join(names)} | ratio |",
             f"| --- |{' ---: |' * (len(names) + 1)}"]  # fmt: skip
    for case in dict.fromkeys((row["precision"], row["ranges"]) for row in measured):
        rates = {
            row["variant"]: row["steps_per_second"] for row in measured if (row["precision"], row["ranges"]) == case
        }
        ranges = {"minmax": "moving ranges", "lsq": "learned ranges"}[case[1]]
        cells = [f"{rates[name]:.2f}" if name in rates else "—" for name in names]
        ratio = f"{rates['dfq-kernels'] / rates['torch.ao']:.2f}"
        lines.append(f"| {case[0]}, {ranges} | {' | '.join(cells)} | {ratio} |")
    return "\n".join([*lines, "", machine_sentence(data, known)])


def integer_table(data: dict[str, Any], known: Ages) -> str:
    """Images per second of the integer engine, and of the strongest alternative."""
    lines = ["| network, batch | W8A8 | W4A4 | W2A2 | strongest alternative | ratio |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for row in data["rows"]:
        rates = row["images_per_second"]
        ours = " | ".join(f"{rates[f'dfq-kernels {preset}']:,.0f}" for preset in ("W8A8", "W4A4", "W2A2"))
        strongest = f"{rates[row['strongest']]:,.0f} ({row['strongest']})"
        lines.append(f"| {row['model']}, {row['batch']} | {ours} | {strongest} | {row['times_strongest']:.2f} |")
    return "\n".join([*lines, "", machine_sentence(data, known)])


def networks_table(data: dict[str, Any], known: Ages) -> str:
    """Images per second on other people's networks, beside OpenVINO."""
    lines = ["| network, batch | W8A8 | strongest alternative | ratio | OpenVINO int8 | ratio |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for row in data["rows"]:
        rates = row["images_per_second"]
        strongest = f"{rates[row['strongest']]:,.0f} ({row['strongest']})"
        openvino = (
            f"{rates['OpenVINO int8']:,.0f} | {row['times_openvino_int8']:.2f}" if "OpenVINO int8" in rates else "— | —"
        )
        cells = f"{rates['dfq-kernels W8A8']:,.0f} | {strongest} | {row['times_strongest']:.2f} | {openvino}"
        lines.append(f"| {row['model'].partition(':')[2]}, {row['batch']} | {cells} |")
    return "\n".join([*lines, "", machine_sentence(data, known)])


def zoo_table(data: dict[str, Any], known: Ages) -> str:
    """What became of the networks of torchvision and timm: random weights, batch norms that have seen noise, W8A8."""
    rows = data["rows"]
    whole = [row for row in rows if row.get("engine") != FLOAT_PART]
    lines = [f"| of {len(rows)} networks | all | without floating-point parts |", "| --- | ---: | ---: |"]
    for stage, name in STAGES.items():
        some = sum(row.get(stage) is True for row in whole)
        every = "—" if stage == "engine" else str(sum(row.get(stage) is True for row in rows))
        lines.append(f"| {name} | {every} | {some} of {len(whole)} |")
    return "\n".join([*lines, "", machine_sentence(data, known)])


def onnx_table(data: dict[str, Any], known: Ages) -> str:
    """Images per second of ONNX Runtime: the float network, and the file of its integers."""
    lines = ["| in ONNX Runtime | fp32 | W8A8 | ratio |", "| --- | ---: | ---: | ---: |"]
    for row in data["rows"]:
        fp32, int8 = (row["images_per_second"][f"ONNX Runtime {kind}"] for kind in ("fp32", "int8"))
        name = f"{row['model']}, {row['size']}x{row['size']}, batch {row['batch']}"
        lines.append(f"| {name} | {fp32:,.0f} | {int8:,.0f} | {row['onnx_int8_times_fp32']:.2f} |")
    return "\n".join([*lines, "", machine_sentence(data, known)])


def machine_sentence(data: dict[str, Any], known: Ages) -> str:
    """Where it was measured, when, and whether what was measured has changed since."""
    machine = data["machine"]
    commit = machine["commit"]
    place = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
    mark, legend = ages.mark(known, {commit}), ages.legend(known, {commit})
    return f"{place}commit {commit} ({machine['date']}){mark and f' {mark}'}. {legend}".rstrip()


def read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def measured_commits() -> dict[str, set[str]]:
    """Of every kind of table, the commits whose numbers it has."""
    single = {"kernels": [KERNELS], "integer": INTEGER, "steps": [STEPS], "onnx": [ONNX], "zoo": [ZOO],
              "networks": [NETWORKS]}  # fmt: skip
    found = {table: {read(path)["machine"]["commit"] for path in paths} for table, paths in single.items()}
    rows = {"accuracy": ACCURACY, "students": STUDENTS}
    return {**{table: commits_of(read(path)["rows"]) for table, path in rows.items()}, **found}


def build(text: str, known: dict[str, Ages] | None = None) -> str:
    """`text` with every generated block made anew; known: the ages, by default as `make readme` left them."""
    data, known = read(ACCURACY), ages.kept() if known is None else known
    of = {table: known.get(table, {}) for table in ages.MEASURED}
    blocks = {
        "kernels": kernel_table(read(KERNELS), of["kernels"]),
        "integer": "\n\n".join(integer_table(read(path), of["integer"]) for path in INTEGER),
        "networks": networks_table(read(NETWORKS), of["networks"]),
        "zoo": zoo_table(read(ZOO), of["zoo"]),
        "steps": step_table(read(STEPS), of["steps"]),
        "onnx": onnx_table(read(ONNX), of["onnx"]),
        "accuracy": main_table(data, of["accuracy"]),
        "students": students_table(read(STUDENTS), of["students"]),
        "compared": compared_table(read(STUDENTS), of["students"]),
        "gdfq": gdfq_table(data, of["accuracy"]),
        "ablation": ablation_table(data, of["accuracy"]),
    }
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda match, block=block: f"{match[1]}{block}\n{match[2]}", text)
    return text


def main() -> None:
    """Writes README.md, or with --check exits 1 if it is stale."""
    path = ROOT / "README.md"
    if "--check" in sys.argv:
        raise SystemExit(build(path.read_text()) != path.read_text())
    for line in ages.update(measured_commits()):
        print(line, file=sys.stderr)
    path.write_text(build(path.read_text()))


if __name__ == "__main__":
    main()
