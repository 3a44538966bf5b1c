"""The page and the picture of check=agreement."""

from pathlib import Path

from runtime.plots import plot_intervals
from runtime.report import bullets, heading, interval_cell, paragraph, picture, table, write_page, write_result


def show_agreement(directory: Path, result: dict) -> None:
    """report.html with agreement.png, and result.json with the verdicts."""
    alpha = result["krippendorff_alpha"]
    lines = [
        f"{'passed' if result['passed'] else 'NOT passed'}: {result['level']} alpha {alpha['value']:.3f}, 95 % "
        f"interval [{alpha['lower']:.3f}, {alpha['upper']:.3f}], whose lower end must be at least {result['threshold']}"
    ]
    weak = result["unacceptable"]
    if weak["value"] > 0:
        lines.append(
            f"{weak['verdict']}: {weak['value']:.1%} of the votes accept neither answer [{weak['lower']:.1%}, "
            f"{weak['upper']:.1%}], the limit is {weak['most']:.0%}"
        )
    people = result["per_annotator"]
    lines += [f"annotator {name}: {facts['verdict']}" for name, facts in people.items() if facts["verdict"] != "ok"]
    shown = {"alpha": alpha, "Fleiss": result["fleiss_kappa"]} | {
        f"alpha: {name}": found for name, found in result["categories"].items()
    }
    worst = sorted(
        (n for n in people if people[n]["kappa_with_others"]), key=lambda n: people[n]["kappa_with_others"]["value"]
    )
    shown |= {f"{name} and the others": people[name]["kappa_with_others"] for name in worst[:25]}
    estimates = [(name, *(found[key] for key in ("value", "lower", "upper"))) for name, found in shown.items()]
    drawn = directory / "agreement.png"
    plot_intervals(drawn, "agreement beyond chance, and the threshold", estimates, null=result["threshold"])
    rows = [["annotator", "votes", "share of ties", "kappa with the others", "items with a majority", "verdict"]]
    for name, facts in people.items():
        kappa = facts["kappa_with_others"]
        shares = (facts["ties"], interval_cell(kappa), kappa and kappa["n"])
        rows.append([name, facts["votes"], *shares, facts["verdict"]])
    blocks = [bullets(lines), table(rows), picture(drawn)]
    disputed = [["item", "prompt", "category", "first vote", "disagreement", "votes"]]
    for one in result["most_disputed"]:
        votes = ", ".join(f"{name}: {label}" for name, label in one["votes"].items())
        prompt = one["prompt"] and one["prompt"][:200]
        disputed.append([one["item"], prompt, one["category"], one["where"], one["disagreement"], votes])
    if disputed[1:]:
        sentence = "Read these with the annotators: disagreement is the mean distance between two votes on the item."
        blocks += [heading("Most disputed items"), paragraph(sentence), table(disputed)]
    write_page(directory / "report.html", "Agreement of annotators", *blocks)
    result["verdicts"] = lines
    write_result(directory, result)
