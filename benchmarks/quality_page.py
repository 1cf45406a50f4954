"""Write what `benchmarks.quality` measured into its page.

python -m benchmarks.quality_page [--results benchmarks/results/quality.json] [--docs docs/quality.md] [--check]
"""

from __future__ import annotations

import json
import re
import sys

from benchmarks.pages import Figures, grid, number, parser_of, with_block, write_or_check

COMMAND = "python -m benchmarks.quality_page"


def decisions(figures: list[Figures]) -> str:
    """What the calibrations decided, of all tables: squared errors on the run held back, and the schedule."""
    rows = []
    for found in figures:
        for decision in found["calibration"]["decisions"]:
            start = [found["model"], str(found["steps"]), f"{decision['speedup']:g}"]
            if "refused" in decision:
                rows.append([*start, "", "", "", "", decision["refused"]])
                continue
            errors = [re.search(r": ([\d.]+)\.$", note) for note in decision["notes"]]
            shares = [error[1] for error in errors if error][:3]
            shares += [""] * (3 - len(shares))
            rows.append(
                [*start, f"`{decision['timeline']}`", *shares, decision["notes"][-1] if decision["notes"] else ""]
            )
    head = ["model", "steps", "asked", "schedule of OmniCache as shipped", "not corrected", "corrected"]
    return grid([*head, "corrected and filtered", "decision"], rows)


def measured_table(found: Figures) -> str:
    """One table of rows, with its heading."""
    forms = {
        "FLOPs ratio": ".2f",
        "time ratio": ".2f",
        "PSNR dB": ".1f",
        "p10 dB": ".1f",
        "SSIM": ".3f",
        "Frechet": ".2f",
    }
    rows = []
    for row in found["rows"]:
        start = ["" if row["method"] == "uncached" else f"{row['speedup']:g}", row["method"].replace("*", "\\*")]
        start += [str(row["steps"]), row["full/reuse"]]
        rows.append([*start, *(number(form)(row[key]) for key, form in forms.items()), number(".3f")(row["class"])])
    head = ["asked", "method", "steps", "full/reuse", "FLOPs ratio", "time ratio", "PSNR, dB", "10th percentile, dB"]
    return "\n\n".join(
        [
            f"### {found['model']}, {found['steps']} steps ({found['sampler']})",
            grid([*head, "SSIM", "Frechet", "class"], rows),
            f"Uncached: {found['uncached CPU s']:.1f} CPU seconds for a generation of {found['batch']} samples.",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Write or check the page; the exit status is 1 if the checked page differs."""
    args = parser_of(__doc__, results="benchmarks/results/quality.json", docs="docs/quality.md").parse_args(arguments)
    figures = json.loads(args.results.read_text(encoding="utf-8"))["figures"]
    block = "\n\n".join([decisions(figures), *map(measured_table, figures)])
    page = with_block(args.docs.read_text(encoding="utf-8"), block, COMMAND)
    return write_or_check({args.docs: page}, check=args.check, command=COMMAND)


if __name__ == "__main__":
    sys.exit(main())
