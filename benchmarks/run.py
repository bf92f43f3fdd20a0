"""Speed side by side with PyTorch: the table of docs/speed.md.

    python -m benchmarks.run [--only NAME ...] [--runs 5] [--json] [--small]

Each case runs in a process of its own: this project and its peer in turn, after their outputs are found equal, the
median of several runs. The machine's peak fp32 matmul rate and memory bandwidth are measured before and after them.
Keeps the reports in docs/speed.json and writes the table between the marks of docs/speed.md anew, but with --small,
whose figures mean nothing. Exit codes: 0 all ran, 1 a case did not (outputs that differ among the reasons), 2 a wrong
name. A bound that is not reached is reported and is no failure.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time

from benchmarks.measure import ROOT, fill, machine, rates

CASES = ("vision", "train_step", "moe_layer", "decode", "pipeline", "depth", "compile")
REPORTS, PAGE = ROOT / "docs" / "speed.json", ROOT / "docs" / "speed.md"
MARKS = ("<!-- table: python -m benchmarks.run -->\n", "<!-- end of the table -->\n")
HEAD = ["case", "ours, s", "peer, s", "ratio", "bound", "reached", "limit, s", "runs"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help=f"one of {', '.join(CASES)}")
    parser.add_argument("--runs", type=int, default=5, help="measured runs of each side")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--here", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.here:
        print(json.dumps(here(args.here, args.small, args.runs)))
        return 0
    if unknown := [name for name in args.only if name not in CASES]:
        print(f"error: {unknown[0]!r} is no case; name some of {', '.join(CASES)}.", file=sys.stderr)
        return 2
    if args.runs < 1:
        print(f"error: --runs {args.runs} must be 1 or more.", file=sys.stderr)
        return 2

    flags = [f"--runs={args.runs}", *(["--small"] if args.small else [])]
    about = machine() | {"command": f"python -m benchmarks.run {' '.join(sys.argv[1:] if argv is None else argv)}"}
    measured, reports = [child("rates", flags)], {}
    if "error" in measured[0]:
        print(f"error: the machine's rates cannot be measured: {measured[0]['error']}", file=sys.stderr)
        return 1
    for name in args.only or CASES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        reports[name] = child(name, flags)
        print(lines(name, reports[name], measured[0]), file=sys.stderr, flush=True)
    measured += [] if args.small else [child("rates", flags)]
    measured = [one for one in measured if "error" not in one]
    peak = {key: max(one[key] for one in measured) for key in measured[0]}
    peak["worst_matmul"] = min(one["matmul"] for one in measured)
    reports = {name: report | {"machine": about, "rates": peak} for name, report in reports.items()}

    if args.json:
        print(json.dumps({"machine": about, "rates": peak, "cases": reports}, indent=1))
    else:
        print(f"{about['command']}\n{described(about, peak)}\n\n{table(reports)}", end="")
    if not args.small:
        keep(reports)
    return int(any("error" in report for report in reports.values()))


def here(name: str, small: bool, runs: int):
    """What a child process does: one case, or the machine's rates."""
    if name == "rates":
        return rates(small)
    case = importlib.import_module(f"benchmarks.cases.{name}")
    return {"rows": [row.record() for row in case.run(small, runs)]}


def child(name: str, flags: list[str]) -> dict:
    """The report of a case from a process of its own, or its error; what it says on stderr is let through."""
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, "JAX_PLATFORMS": "cpu"}
    begun = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.run", "--here", name, *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        told = done.stderr.strip().splitlines() or ["no report"]
        print(done.stderr, file=sys.stderr)
        return {"error": told[-1].removeprefix("error: ")}
    report = json.loads(done.stdout.strip().splitlines()[-1])
    return report if name == "rates" else report | {"seconds": round(time.perf_counter() - begun, 1)}


# ---- the table -------------------------------------------------------------------------------------------------------


def cells(case: str, row: dict, peak: dict) -> list[str]:
    number = lambda x: "" if x is None else f"{x:.3g}"  # noqa: E731
    limits = [max(flops / peak["matmul"], traffic / peak["bandwidth"]) for flops, traffic in row["work"]]
    counts = sorted({len(times) for times in row["runs"].values() if times})
    return [
        f"{case}: {row['name']}", number(row["ours"]), number(row["peer"]), number(row["ratio"]), number(row["bound"]),
        {None: "", True: "yes", False: "no"}[row["reached"]], number(sum(limits) or None),
        "-".join(map(str, counts)),
    ]  # fmt: skip


def lines(case: str, report: dict, peak: dict) -> str:
    """The rows of one report, for a terminal."""
    if "error" in report:
        return f"  {report['error']}"
    return "\n".join("  " + " | ".join(cells(case, row, peak)) for row in report["rows"])


def table(reports: dict[str, dict]) -> str:
    rows = [HEAD, ["---"] * len(HEAD)]
    for case, report in reports.items():
        if "error" in report:
            rows.append([case, report["error"], *[""] * (len(HEAD) - 2)])
        else:
            rows += [cells(case, row, report["rates"]) for row in report["rows"]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def described(about: dict, peak: dict) -> str:
    """The machine and what was measured on it, in a sentence or two."""
    busy = about["busy_before"] > 0.1 or peak["worst_matmul"] < 0.8 * peak["matmul"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    said = (
        f"{about.get('processor') or 'processor unknown'}, {about['cores']} cores, {about['busy_before']:.0%} busy "
        f"before the start; fp32 matmul {peak['matmul_torch'] / 1e9:.0f} GFLOP/s in torch, "
        f"{peak['matmul_jax'] / 1e9:.0f} in JAX ({peak['worst_matmul'] / 1e9:.0f} before or after the cases); "
        f"{peak['bandwidth'] / 1e9:.1f} GB/s read from memory. Python {about['python']}, {versions}; commit "
        f"{about['commit']}."
    )
    return said + (" **Other work ran meanwhile: these are no figures to rely on.**" if busy else "")


def keep(reports: dict[str, dict]) -> None:
    """The reports beside those of other cases, and the table of all of them between the marks of the page."""
    kept = (json.loads(REPORTS.read_text()) if REPORTS.is_file() else {}) | reports
    kept = {name: kept[name] for name in CASES if name in kept}
    REPORTS.write_text(json.dumps(kept, indent=1) + "\n")
    text = table(kept)
    for said in dict.fromkeys(described(one["machine"], one["rates"]) for one in kept.values()):
        own = [name for name, one in kept.items() if described(one["machine"], one["rates"]) == said]
        text += f"\n{', '.join(own)}: {said}\n"
    if missing := [name for name in CASES if name not in kept]:
        text += f"\nNot run yet: {', '.join(missing)}.\n"
    fill(PAGE, MARKS, text)


if __name__ == "__main__":
    sys.exit(main())
