"""Measure `sdops convert` on full-size files against `cp` of the output and against other programs.

    python tools/bench_convert.py --folder bench-data --only sd15 sdxl
    python tools/bench_convert.py --folder bench-data --diffusers-python D/bin/python \
        --kohya SD_SCRIPTS --kohya-python K/bin/python

Makes the files it needs in the folder (kept for the next time), runs every program in turn, round after round, and
writes convert.json and convert.md there. The floor is `cp` of what sdops wrote, followed by the same fsync of every
file; a ratio is the median of the ratios within a round. The first round only warms up, and its output is what `cp`
copies; other programs run once. Inputs are in the page cache, outputs are removed and the disk is synced between runs.

    diffusers   0.42.1 with torch, transformers, accelerate: `from_single_file(...).save_pretrained`
    kohya       tools/convert_diffusers20_original_sd.py of sd-scripts (bench_lora.py tells its environment)
    load, save  `load_file` or `torch.load`, then `save_file` (tools/peers/run_load_save.py), in diffusers' environment
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench_merge import GB, HERE, SDOPS, Series, machine, memory, say, settle
from measure import run

MAKE = [sys.executable, str(HERE.parent / "fixtures" / "make.py")]
CP = 'cp -r "$0" "$1" && find "$1" -type f -exec sync {} +'
PIPELINES = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}

# File -> what makes it: arguments of fixtures/make.py, or a file and the options of `sdops convert`.
FILES: dict[str, tuple[str, ...]] = {
    "sd15.safetensors": ("full", "sd15", "--dtype", "fp16"),
    "sd15-fp32.safetensors": ("full", "sd15", "--dtype", "fp32"),
    "sd15-ema.safetensors": ("full", "sd15-ema", "--dtype", "fp16"),
    "sd15.ckpt": ("sd15.safetensors", "--to", "ckpt"),
    "sd15-folder": ("sd15.safetensors", "--to", "diffusers"),
    "sd15-shards": ("sd15.safetensors", "--to", "safetensors", "--shard", "500MB"),
    "sdxl.safetensors": ("full", "sdxl", "--dtype", "fp16"),
    "sdxl-fp32.safetensors": ("full", "sdxl", "--dtype", "fp32"),
    "sdxl.ckpt": ("sdxl.safetensors", "--to", "ckpt"),
    "sdxl-folder": ("sdxl.safetensors", "--to", "diffusers"),
    "sdxl-shards": ("sdxl.safetensors", "--to", "safetensors", "--shard", "2GB"),
}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Case:
    """One conversion.

    Attributes:
        group: What `--only` selects.
        title: In the table.
        source: One of FILES.
        output: Its name, whose ending tells what it is.
        options: Of `sdops convert`.
        script: Options of the load and save script; None: it cannot do this.
        bar: Largest ratio to `cp` that is good enough.
    """

    group: str
    title: str
    source: str
    output: str
    options: tuple[str, ...]
    script: tuple[str, ...] | None = ()
    bar: float = 1.3


def cases(family: str, title: str) -> list[Case]:
    """The conversions of a family."""
    single, unet = f"{family}.safetensors", "model.diffusion_model."
    plain = ("--to", "safetensors")
    return [
        Case(family, f"{title}: ckpt to safetensors", f"{family}.ckpt", "out.safetensors", plain),
        Case(family, f"{title}: single file to diffusers folder", single, "out", ("--to", "diffusers"), None),
        Case(
            family, f"{title}: folder to single file", f"{family}-folder", "out.safetensors", ("--to", "original"), None
        ),
        Case(family, f"{title}: join shards", f"{family}-shards", "out.safetensors", plain),
        Case(
            family,
            f"{title}: extract the U-Net",
            single,
            "out.safetensors",
            (*plain, "--components", "unet"),
            ("--keep", unet),
        ),
        Case(
            f"{family}-fp32",
            f"{title}: fp32 to fp16",
            f"{family}-fp32.safetensors",
            "out.safetensors",
            (*plain, "--dtype", "fp16"),
            ("--half",),
            bar=1.6,
        ),
    ]


CASES = [
    *cases("sd15", "SD1.5"),
    Case(
        "sd15-ema",
        "SD1.5: drop the moving average",
        "sd15-ema.safetensors",
        "out.safetensors",
        ("--to", "safetensors", "--ema", "drop"),
        ("--drop", "model_ema"),
    ),
    Case(
        "small",
        "SD1.5: extract the VAE (167 MB)",
        "sd15.safetensors",
        "out.safetensors",
        ("--to", "safetensors", "--components", "vae"),
        ("--keep", "first_stage_model."),
    ),
    *cases("sdxl", "SDXL"),
]


class Bench:
    """The folder with the files, and how programs are run in it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.folder.resolve()
        # As after an installation: modules are compiled, whatever the user's environment says of that.
        self.environment = {
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": str(self.folder / "bytecode"),
            "SDOPS_CACHE": str(self.folder / "cache"),
        }

    def prepare(self, name: str) -> Path:
        """Make a file of FILES, and those it is made of, if it is not there yet; returns what sdops is given."""
        path, recipe = self.folder / name, FILES[name]
        if not path.exists():
            if recipe[0] not in FILES:
                size = "small" if self.options.small else recipe[0]
                command = [*MAKE, size, *recipe[1:], "-o", str(path)]
            else:
                source = self.prepare(recipe[0])
                target = path / "model.safetensors" if "--shard" in recipe else path
                target.parent.mkdir(exist_ok=True)
                command = [*SDOPS, "convert", str(source), *recipe[1:], "-o", str(target), "--no-progress"]
            say(f"making {name}")
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return path / INDEX if (path / INDEX).exists() else path

    def commands(self, case: Case) -> Iterator[tuple[str, list[str], dict[str, str]]]:
        """Program, command and environment."""
        source, output = self.prepare(case.source), self.folder / case.output
        reference = self.reference(case)
        yield "cp", ["sh", "-c", CP, str(reference), str(output)], {}
        sdops = [*SDOPS, "convert", str(source), *case.options, "-o", str(output), "--no-progress"]
        yield "sdops", sdops, self.environment
        theirs, family = {"PYTHONDONTWRITEBYTECODE": ""}, case.group.partition("-")[0]
        if self.options.diffusers_python and case.script is not None:
            inputs = sorted(source.parent.glob("*.safetensors")) if source.name == INDEX else [source]
            files = [*map(str, inputs), str(output)]
            yield "load, save", self.peer("run_load_save.py", *files, *case.script), theirs
        if self.options.diffusers_python and case.options[1] == "diffusers":
            config = str(self.prepare(f"{family}-folder"))
            yield (
                "diffusers",
                self.peer("run_diffusers_convert.py", PIPELINES[family], str(source), str(output), config),
                theirs,
            )
        if self.options.kohya and case.source == "sd15-folder":
            script = [self.options.kohya_python, "tools/convert_diffusers20_original_sd.py"]
            command = ["env", "-C", str(self.options.kohya.resolve()), *script, "--v1", "--fp16"]
            path = {"PYTHONPATH": f"{self.options.kohya.resolve()}{os.pathsep}{stub(self.folder)}"}
            yield "kohya", [*command, str(source), str(output)], {**theirs, **path}

    def peer(self, script: str, *arguments: str) -> list[str]:
        """A script of tools/peers in its environment."""
        return [self.options.diffusers_python, str(HERE / "peers" / script), *arguments]

    def reference(self, case: Case) -> Path:
        """What sdops wrote in the first round: `cp` copies it."""
        return self.folder / f"reference-{case.output}"

    def measure(self, case: Case) -> dict[str, Any]:
        """Run all programs in turn."""
        commands = list(self.commands(case))
        source, output, reference = self.folder / case.source, self.folder / case.output, self.reference(case)
        remove(output)
        series = {name: Series(name) for name, _, _ in commands}
        for number in range(self.options.rounds + 1):
            for name, command, environment in sorted(commands, key=lambda each: number == 0 and each[0] == "cp"):
                if series[name].failed or (name not in ("cp", "sdops") and number != 1):
                    continue
                settle(self.folder, files_of(reference if name == "cp" else source))
                cost = run(command, environment=environment, limit_mb=self.options.peer_memory * 1000)
                say(f"  {case.title}: {name} {cost.wall:.2f} s, {cost.peak_mb:.0f} MB {cost.error}")
                if number or cost.code:
                    series[name].costs.append(cost)
                if not number and name == "sdops" and not cost.code:
                    remove(reference)
                    output.rename(reference)
                remove(output)
                os.sync()
        size = sum(path.stat().st_size for path in files_of(reference))
        remove(reference)
        return self.result(case, commands[1][1], size, series)

    def result(self, case: Case, command: list[str], size: int, series: dict[str, Series]) -> dict[str, Any]:
        """The case's figures, medians over the rounds."""
        floor, rows = series["cp"], {}
        for name, one in series.items():
            if one.failed or not one.costs:
                rows[name] = {"failed": one.failed.error if one.failed else "not run"}
                continue
            ratios = [cost.wall / base.wall for cost, base in zip(one.costs, floor.costs, strict=False)]
            rows[name] = {field: one.middle(field) for field in ("wall", "user", "system", "peak_mb", "anonymous_mb")}
            rows[name] |= {"ratio": median(ratios), "runs": [cost.as_dict() for cost in one.costs]}
        text = " ".join(command).replace(f"{self.folder}/", "").replace(sys.executable, "python")
        return {"title": case.title, "bytes": size, "bar": case.bar, "command": text, "programs": rows}

    def space_missing(self, case: Case) -> int:
        """Bytes that the folder lacks for a case, roughly: twice the output, and its input if it is not there."""
        if self.options.small:
            return 0
        size = (7 if case.group.startswith("sdxl") else 2.2) * GB
        needed = 2 * size + (0 if (self.folder / case.source).exists() else 2 * size)
        return max(int(needed) - shutil.disk_usage(self.folder).free, 0)


def stub(folder: Path) -> Path:
    """A folder with an empty torchvision, which kohya's modules import without using it here."""
    package = folder / "stubs" / "torchvision"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    (package / "transforms.py").write_text(
        "class Compose:\n    def __init__(self, *_): pass\nToTensor = Normalize = Compose\n"
    )
    return package.parent


def files_of(path: Path) -> set[Path]:
    """A file, or all files below a folder."""
    return {each for each in path.rglob("*") if each.is_file()} if path.is_dir() else {path}


def remove(path: Path) -> None:
    """A file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------------------- report


def markdown(results: dict[str, Any]) -> Iterator[str]:
    """The results as a table, line by line."""
    yield f"Machine: {', '.join(f'{name} {value}' for name, value in results['machine'].items())}."
    yield f"Command: `{results['command']}`; medians of {results['rounds']} rounds."
    yield from ("", "| conversion | GB | program | wall s | x cp | bar | user s | system s | peak MB | own MB |")
    yield "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|"
    for case in results["cases"]:
        title, size = case["title"], f"{case['bytes'] / GB:.2f}"
        for name, row in case["programs"].items():
            bar = str(case["bar"]) if name == "sdops" else ""
            yield f"| {title} | {size} | {name} | {cells(row, bar)} |"
            title = size = ""
    for line in results["skipped"]:
        yield from ("", f"Left out: {line}.")


def cells(row: dict[str, Any], bar: str) -> str:
    """A program's figures between the bars of a table."""
    if "failed" in row:
        return f"{row['failed']} | | | | | |"
    return (
        f"{row['wall']:.2f} | {row['ratio']:.2f} | {bar} | {row['user']:.2f} | {row['system']:.2f} | "
        f"{row['peak_mb']:.0f} | {row['anonymous_mb']:.0f}"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = [*dict.fromkeys(case.group for case in CASES)]
    parser.add_argument("--folder", type=Path, default=Path("bench-data"), help="for the files; also on tmpfs")
    parser.add_argument("--only", nargs="+", choices=groups, default=groups, metavar="GROUP", help=", ".join(groups))
    parser.add_argument("--match", default="", help="only conversions whose title has this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prepare", action="store_true", help="make the files and stop")
    parser.add_argument("--diffusers-python", help="the Python that has diffusers and safetensors")
    parser.add_argument("--kohya", type=Path, help="folder of kohya-ss/sd-scripts")
    parser.add_argument("--kohya-python", default=sys.executable)
    parser.add_argument("--peer-memory", type=float, default=0.75 * memory() / GB, metavar="GB", help="more is killed")
    parser.add_argument("--small", action="store_true", help="small models in a folder of their own: does all work?")
    parser.add_argument("--output", type=Path, help="convert.json and convert.md go there; default: the folder")
    return parser.parse_args()


def main() -> None:
    """Run what was asked for."""
    options = parse()
    options.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    found, skipped = [], []
    for case in (case for case in CASES if case.group in options.only and options.match in case.title):
        if missing := bench.space_missing(case):
            skipped.append(f"{case.title}, which needs {missing / GB:.1f} GB more space")
            continue
        bench.prepare(case.source)
        if not options.prepare:
            found.append(bench.measure(case))
    results = {
        "machine": machine(options.folder, None),
        "command": "python " + " ".join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]]),
        "rounds": options.rounds,
        "cases": found,
        "skipped": skipped,
    }
    folder = options.output or options.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "convert.json").write_text(json.dumps(results, indent=1) + "\n")
    text = "\n".join(markdown(results))
    (folder / "convert.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
