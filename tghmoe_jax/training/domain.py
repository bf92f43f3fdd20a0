"""The data that a run and the runs before it were trained on, and what the run may therefore not be asked.

A run on real data that was started from one on drawn data keeps that origin, as in `phantom+m3d`, until it and the runs
before it have trained on ENOUGH samples (questions and reports, repeated ones counted) of real data.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from tghmoe_jax.errors import UserError
from tghmoe_jax.evaluation.router_tests import task_by_keyword
from tghmoe_jax.training import run_folder

ENOUGH = 10_000


def of(manifest: Mapping[str, Any], config: Mapping[str, Any], step: int) -> str:
    """The domain of a run at a step, from what it recorded: `phantom`, `m3d`, or `phantom+m3d`."""
    own = manifest.get("domain") or config["data"]["name"]
    origin = _origin(own, manifest, config, step)
    return own if origin is None or own in run_folder.SYNTHETIC else f"{origin['domain']}+{own}"


def _origin(own: str, manifest: Mapping[str, Any], config: Mapping[str, Any], step: int) -> dict[str, Any] | None:
    """The drawn data at the beginning of a run's line and the real samples since; None where there is none, or enough.

    Runs of earlier versions recorded no origin.
    """
    if own in run_folder.SYNTHETIC:
        return {"domain": own, "real_samples": 0}
    if not (before := manifest.get("origin")):
        return None
    samples = before["real_samples"] + step * config["train"]["batch"]
    return {"domain": before["domain"], "real_samples": samples} if samples < ENOUGH else None


def inherited(folder: epath.PathLike, step: int) -> dict[str, Any]:
    """What the manifest of a run that starts from step `step` of another says of that: {"origin": ...}, or nothing."""
    manifest, config = run_folder.read_manifest(folder), run_folder.read_config(folder)
    own = manifest.get("domain") or config["data"]["name"]
    origin = _origin(own, manifest, config, step)
    return {} if origin is None else {"origin": origin}


def synthetic(domain: str) -> bool:
    """Whether a checkpoint of this domain has seen too few patients to report on one."""
    return domain.partition("+")[0] in run_folder.SYNTHETIC


def seen(domain: str) -> str:
    """What a checkpoint of a synthetic domain has seen."""
    drawn, _, real = domain.partition("+")
    patients = f"fewer than {ENOUGH:,} samples of {real}" if real else "no scan of a patient"
    return f"{run_folder.SYNTHETIC[drawn]} and {patients}"


def warning(name: str, domain: str) -> str:
    """What stands beside each answer of the checkpoint `name`."""
    if not synthetic(domain):
        return f"domain {domain}: the checkpoint was trained on this data and may fail on scans of other origin"
    who = "the reader embedded in the package (no --checkpoint was named)" if name == "embedded" else "the checkpoint"
    return (
        f"domain {domain}: {who} has seen {seen(domain)}; "
        "its answer on a real scan shows that the path works, not what the scan holds"
    )


def refuse_report(name: str, domain: str, flag: str) -> None:
    """UserError where a checkpoint of this domain must not report on a scan; `flag` is what asked for a report."""
    if synthetic(domain):
        raise UserError(
            f"{flag} is refused because the checkpoint {name} has seen {seen(domain)} (domain {domain}); "
            "ask single questions, or add --allow-out-of-domain."
        )


def asks_report(question: str | None, choices: Sequence[str], task: str | None) -> str:
    """What of a request asks for a report; empty where nothing does. Without a question it does as a whole."""
    if question is None:
        return "--report"
    if task == "report":
        return "--task report"
    return "--question asks for a report, which" if not choices and task_by_keyword(question) == "report" else ""
