"""Measure `sdops merge` on full-size files against the floor and against other programs.

    make bench
    python tools/bench_merge.py --folder bench-data --only sd15 sdxl
    python tools/bench_merge.py --folder bench-data --peers-python PEERS/bin/python --kohya merge_models.py

Makes the files it needs in the folder (kept for the next time), times every program in turn, round after round, and
writes results.json and results.md there. The floor (tools/floor.py) runs in every round, and a ratio is the median of
the ratios within a round. One round more, the first, only warms up; other programs run once. The page cache is warm,
outputs are removed and the disk is synced between runs. In a folder on tmpfs no disk takes part.

Other programs are scripts in tools/peers, run by the Python of an environment of their own:

    python -m venv PEERS; PEERS/bin/pip install torch==2.13.0; PEERS/bin/pip install sd-mecha==1.1.8 mergekit==0.1.5
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from measure import Cost, run

HERE = Path(__file__).parent
SDOPS = [sys.executable, "-m", "sdops"]
ALPHA = "0.3"
GB = 10**9
LITTLE = 700_000_000  # free memory below which nothing is gained by filling more


@dataclass(frozen=True)
class Model:
    """A file to merge: the arguments of fixtures/make.py, and its size in bytes."""

    name: str
    arguments: tuple[str, ...]
    size: int


def halves(name: str, size: int, tuned: int | None = None) -> Model:
    """A full-size fp16 model, or a fine-tune of it."""
    extra = ("--tuned", str(tuned)) if tuned else ()
    return Model(f"{name}-{tuned or 'base'}", ("full", name, "--dtype", "fp16", *extra), size)


SD15 = [halves("sd15", 2_132_625_918, tuned) for tuned in (None, 1, 2, 3, 4, 5, 6, 7, 8)]
SDXL = [halves("sdxl", 6_938_000_000, tuned) for tuned in (None, 1)]
FLUX = [Model(f"flux-{n}", ("full", "flux1-dev", "--sparse"), 0) for n in (1, 2)]  # all holes


@dataclass(frozen=True)
class Case:
    """One comparison with the floor.

    Attributes:
        group: What `--only` selects.
        title: In the table.
        models: In the order of the command line.
        options: Of `sdops merge`; "BASE" stands for the first model, which is then not given by position.
        passes: How often the inputs must be read.
        output_size: Bytes of the result.
        fresh: Whether remembered hashes are forgotten before every run.
        peers: Whether the other programs run, too.
    """

    group: str
    title: str
    models: Sequence[Model]
    options: tuple[str, ...] = ()
    passes: int = 1
    output_size: int = SD15[0].size
    fresh: bool = False
    peers: bool = False


def method(name: str, count: int, *options: str, passes: int = 1) -> Case:
    """A merge of `count` SD1.5 models by another method."""
    title = " ".join([name, *(option for option in options if option not in ("--base", "BASE"))])
    return Case("methods", f"{title}, SD1.5 x {count}", SD15[:count], ("-m", name, *options), passes)


CASES = [
    Case("sd15", "weighted-sum, SD1.5", SD15[:2], ("--alpha", ALPHA), peers=True),
    Case("sd15", "the same, inputs hashed for the first time", SD15[:2], ("--alpha", ALPHA), fresh=True),
    Case("sd15", "the same, without hashes", SD15[:2], ("--alpha", ALPHA, "--no-hash")),
    Case("sdxl", "weighted-sum, SDXL", SDXL, ("--alpha", ALPHA), output_size=SDXL[0].size, peers=True),
    method("add-difference", 3),
    method("train-difference", 3),
    method("multiply-difference", 3),
    method("multiply-difference", 3, "--alpha", ALPHA),
    method("similarity-add-difference", 3),
    method("nearswap", 2),
    method("magmax", 3, "--base", "BASE"),
    method("clamp", 3),
    method("dare-linear", 3, "--base", "BASE"),
    method("dare-ties", 3, "--base", "BASE"),
    method("euclidean-add-difference", 3, passes=2),
    method("slerp", 2, passes=2),
    method("karcher", 3, passes=2),
    method("model-stock", 3, "--base", "BASE", passes=2),
    method("perpendicular", 3, passes=2),
    method("plus-random", 1),
    method("ties", 3, "--base", "BASE", passes=2),
    Case("many", "average, SD1.5 x 8", SD15[1:9], ("-m", "average")),
    Case("flux", "weighted-sum, 24 GB Flux-shaped", FLUX, ("--alpha", ALPHA), output_size=23_803_000_000),
]


@dataclass
class Series:
    """All measured runs of one program on one case."""

    program: str
    costs: list[Cost] = field(default_factory=list)

    @property
    def failed(self) -> Cost | None:
        """The first run that did not succeed."""
        return next((cost for cost in self.costs if cost.code), None)

    def middle(self, name: str) -> float:
        """Median of a field over the rounds."""
        return float(median(getattr(cost, name) for cost in self.costs))


class Bench:
    """The folder with the files, and how programs are run in it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.folder
        self.output = self.folder / "output.safetensors"
        self.cache = self.folder / "cache"
        self.peers = peer_commands(options)

    def path(self, model: Model) -> Path:
        """The model's file."""
        return self.folder / f"{model.name}.safetensors"

    def prepare(self, models: Sequence[Model]) -> None:
        """Make the files that are not there yet."""
        for model in models:
            if not self.path(model).exists():
                say(f"making {self.path(model).name}")
                arguments = [*model.arguments]
                if self.options.small:
                    arguments = ["small", *(word for word in model.arguments[1:] if word != "--sparse")]
                command = [sys.executable, str(HERE.parent / "fixtures" / "make.py"), *arguments]
                subprocess.run([*command, "-o", str(self.path(model))], check=True, stdout=subprocess.DEVNULL)

    def measure(self, case: Case) -> dict[str, Any]:
        """Time all programs of a case, in turn."""
        commands = {"floor": self.floor_command(case), "sdops": self.sdops_command(case)}
        if case.peers:
            commands |= {name: [*start, *self.pair(case), ALPHA] for name, start in self.peers.items()}
        series = {name: Series(name) for name in commands}
        exactness = {}
        for number in range(self.options.rounds + 1):
            for name, command in commands.items():
                is_peer = name not in ("floor", "sdops")
                if series[name].failed or (is_peer and not 0 < number <= self.options.peer_rounds):
                    continue
                settle(self.folder, {self.path(model) for model in case.models})
                cost = self.once(command, case, is_peer=is_peer)
                say(f"  {case.title}: {name} {cost.wall:.2f} s {cost.error}")
                if number or cost.code:  # the first round warms up
                    series[name].costs.append(cost)
                if case.peers and name not in ("floor", *exactness) and not cost.code:
                    exactness[name] = self.judge(case)
                self.clear()
        return self.result(case, series, exactness)

    def once(self, command: Sequence[str], case: Case, *, is_peer: bool) -> Cost:
        """One run, in a clean state."""
        if case.fresh:
            shutil.rmtree(self.cache, ignore_errors=True)
        environment = {"SDOPS_CACHE": str(self.cache), "KOHYA_MERGE": str(self.options.kohya)}
        return run(command, environment=environment, limit_mb=self.options.peer_memory * 1000 if is_peer else 1e9)

    def clear(self) -> None:
        """Remove the output and let the disk come to rest."""
        self.output.unlink(missing_ok=True)
        os.sync()

    def pair(self, case: Case) -> list[str]:
        """Two models and the output, as the scripts of the other programs want them."""
        return [*(str(self.path(model)) for model in case.models[:2]), str(self.output)]

    def floor_command(self, case: Case) -> list[str]:
        """Read all inputs as often as the method must, write one output."""
        inputs = [str(self.path(model)) for model in case.models]
        return [sys.executable, str(HERE / "floor.py"), str(self.output), *inputs, "--passes", str(case.passes)]

    def sdops_command(self, case: Case) -> list[str]:
        """The merge as a user types it."""
        inputs = [str(self.path(model)) for model in case.models]
        options = [inputs[0] if option == "BASE" else option for option in case.options]
        return [*SDOPS, "merge", *inputs["BASE" in case.options :], *options, "-o", str(self.output), "--no-progress"]

    def judge(self, case: Case) -> dict[str, Any]:
        """How many elements of the output are not the exact result rounded once."""
        command = [sys.executable, str(HERE / "oracle.py"), *self.pair(case), "--alpha", ALPHA]
        found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        return found

    def result(self, case: Case, series: dict[str, Series], exactness: dict[str, Any]) -> dict[str, Any]:
        """The case's figures, medians over the rounds."""
        floor, rows = series["floor"], {}
        for name, one in series.items():
            if failure := one.failed:
                rows[name] = {"failed": failure.error or f"exit code {failure.code}"}
                continue
            ratios = [cost.wall / base.wall for cost, base in zip(one.costs, floor.costs, strict=False)]
            rows[name] = {field: one.middle(field) for field in ("wall", "user", "system", "peak_mb", "anonymous_mb")}
            rows[name] |= {"ratio": median(ratios), "runs": [cost.as_dict() for cost in one.costs]}
            if name in exactness:
                rows[name]["exactness"] = exactness[name]
        command = " ".join(self.sdops_command(case)).replace(f"{self.folder}/", "").replace(sys.executable, "python")
        return {"group": case.group, "title": case.title, "passes": case.passes, "command": command, "programs": rows}

    def space_missing(self, case: Case) -> int:
        """Bytes that the folder lacks for a case's missing files and its output."""
        if self.options.small:
            return 0
        needed = case.output_size + sum(model.size for model in case.models if not self.path(model).exists())
        return max(needed - shutil.disk_usage(self.folder).free, 0)

    def starts(self) -> list[dict[str, Any]]:
        """How long it takes to answer, medians of many runs."""
        model = SDXL[0] if self.path(SDXL[0]).exists() else SD15[0]
        self.prepare([model])
        path = str(self.path(model))
        questions = {
            "sdops --help": ["--help"],
            f"sdops inspect {model.name}.safetensors": ["inspect", path],
            "sdops methods": ["methods"],
            "sdops merge --help": ["merge", "--help"],
            "a typo in an option": ["merge", path, path, "--alhpa", "0.3"],
            "a typo in a method": ["merge", path, path, "-m", "weighted-smu"],
            "sdops merge --dry-run": ["merge", path, path, "--dry-run", "-o", str(self.output)],
            "python -c pass": [],
        }
        rows = []
        for title, arguments in questions.items():
            command = [*SDOPS, *arguments] if arguments else [sys.executable, "-c", "pass"]
            costs = [self.once(command, CASES[0], is_peer=False) for _ in range(11)][1:]
            say(f"  {title}: {median(cost.wall for cost in costs):.3f} s")
            walls = {"wall": median(cost.wall for cost in costs), "worst": max(cost.wall for cost in costs)}
            rows.append(
                {"title": title, **walls, "peak_mb": max(cost.peak_mb for cost in costs), "code": costs[0].code}
            )
        return rows


def settle(folder: Path, inputs: set[Path]) -> None:
    """Fill free memory with the page cache of a file without content, then read the inputs that fit with an output.

    A virtual machine may have given free memory back to its host, and getting it again costs more than the
    merge: with memory full of cache every run finds the same state.
    """
    filler = folder / "filler"
    if not filler.exists():
        with filler.open("wb") as file:
            file.truncate(memory())
    read(filler, while_free=LITTLE)
    for path in inputs:
        if path.stat().st_size < 0.7 * memory():
            read(path)


def free_memory() -> int:
    """Bytes that hold nothing, not even cache."""
    return int(Path("/proc/meminfo").read_text().partition("MemFree:")[2].split()[0]) * 1024


def memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read(path: Path, *, while_free: int = 0) -> None:
    """Bring a file into the page cache, as long as so much memory holds nothing."""
    buffer = bytearray(1 << 22)
    with path.open("rb", buffering=0) as file:
        while free_memory() >= while_free and file.readinto(buffer):
            pass


def peer_commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """Name -> how to start the other programs there are."""
    if options.peers_python is None:
        return {}
    scripts = {"load_file + lerp": "naive", "sd-mecha": "sd_mecha", "mergekit": "mergekit"}
    if options.kohya:
        scripts["kohya"] = "kohya"
    return {title: [options.peers_python, str(HERE / "peers" / f"run_{name}.py")] for title, name in scripts.items()}


# --------------------------------------------------------------------------------------------------------------- report


def machine(folder: Path, peers_python: str | None) -> dict[str, str]:
    """What was measured on."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], check=False, capture_output=True, text=True)
    ours = {name: metadata.version(name) for name in ("sdops", "numpy", "torch")}
    found = {
        "processor": cpu.partition(": ")[2] or platform.processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory() / GB:.0f} GB",
        "file system": kind.stdout.strip(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **ours,
    }
    if peers_python:
        code = "from importlib.metadata import version as v; print(*[n + ' ' + v(n) for n in "
        code += "('torch', 'safetensors', 'sd-mecha', 'mergekit')], sep=', ')"
        done = subprocess.run([peers_python, "-c", code], check=False, capture_output=True, text=True)
        found["other programs' environment"] = done.stdout.strip()
    return found


def markdown(results: dict[str, Any]) -> Iterator[str]:
    """The results as tables, line by line."""
    yield f"Machine: {', '.join(f'{name} {value}' for name, value in results['machine'].items())}."
    yield f"Command: `{results['command']}`; medians of {results['rounds']} rounds."
    yield from (
        "",
        "| case | program | wall s | x floor | user s | system s | peak MB | own MB | wrong, by float32 | best |",
    )
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for case in results["cases"]:
        for name, row in case["programs"].items():
            title = case["title"] + (f" ({case['passes']} passes)" if case["passes"] > 1 else "")
            yield f"| {title} | {name} | {cells(row)} |"
    if results["starts"]:
        yield from ("", "| answer | median s | worst of 10 s | peak MB |", "|---|---:|---:|---:|")
    for row in results["starts"]:
        yield f"| {row['title']} | {row['wall']:.3f} | {row['worst']:.3f} | {row['peak_mb']:.0f} |"
    for line in results["skipped"]:
        yield from ("", f"Left out: {line}.")


def cells(row: dict[str, Any]) -> str:
    """A program's figures between the bars of a table."""
    if "failed" in row:
        return f"{row['failed']} | | | | | | |"
    figures = [f"{row['wall']:.2f}", f"{row['ratio']:.2f}", f"{row['user']:.2f}", f"{row['system']:.2f}"]
    figures += [f"{row['peak_mb']:.0f}", f"{row['anonymous_mb']:.0f}", *shares(row.get("exactness"))]
    return " | ".join(figures)


def shares(found: dict[str, Any] | None) -> list[str]:
    """Wrongly rounded elements: alpha as the nearest float, and by the reading of alpha that suits the program best."""
    if found is None:
        return ["", ""]
    counts = (found["wrong"]["float32"], min(found["wrong"].values()))
    return [f"{100 * count / found['elements']:.4f} %" if count else "0" for count in counts]


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = [*dict.fromkeys(case.group for case in CASES), "start"]
    parser.add_argument("--folder", type=Path, default=Path("bench-data"), help="for the files; also on tmpfs")
    parser.add_argument("--only", nargs="+", choices=groups, default=groups, metavar="GROUP", help=", ".join(groups))
    parser.add_argument("--title", nargs="+", default=[""], metavar="WORD", help="only cases with one of these words")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, default=1, help="other programs take minutes, not seconds")
    parser.add_argument("--peers-python", help="the Python that has sd-mecha and mergekit")
    parser.add_argument("--kohya", type=Path, help="merge_models.py of kohya-ss/sd-scripts")
    parser.add_argument("--peer-memory", type=float, default=0.75 * memory() / GB, metavar="GB", help="more is killed")
    parser.add_argument("--small", action="store_true", help="small models in a folder of their own: does all work?")
    parser.add_argument("--output", type=Path, help="results.json and results.md go there; default: the folder")
    return parser.parse_args()


def main() -> None:
    """Run what was asked for."""
    options = parse()
    options.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    cases, skipped = [], []
    for case in CASES:
        if case.group not in options.only or not any(word in case.title for word in options.title):
            continue
        if missing := bench.space_missing(case):
            skipped.append(f"{case.title}, which needs {missing / GB:.1f} GB more space")
            continue
        bench.prepare(case.models)
        cases.append(bench.measure(case))
    results = {
        "machine": machine(options.folder, options.peers_python),
        "command": "python " + " ".join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]]),
        "rounds": options.rounds,
        "cases": cases,
        "starts": bench.starts() if "start" in options.only else [],
        "skipped": skipped,
    }
    folder = options.output or options.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = "\n".join(markdown(results))
    (folder / "results.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
