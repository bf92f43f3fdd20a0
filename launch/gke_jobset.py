"""Renders launch/gke_jobset.yaml for one TPU slice.

    python launch/gke_jobset.py --name stage1 --topology v5e:8x8 --image IMAGE -- --config ... | kubectl apply -f -

The image holds this project, its root being the WORKDIR, and what `pip install .[tpu]` brings. Arguments after -- go
to tghmoe_jax.main.
"""

import argparse
import json
import math
import re
import string
import sys
from pathlib import Path

TEMPLATE = Path(__file__).with_suffix(".yaml")
ACCELERATORS = {"v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
CHIPS = 4  # of a host of a slice


def render(
    name: str, topology: str, image: str, arguments: list[str], spot: bool = False, restarts: int = 100,
    service_account: str = "default",
) -> str:  # fmt: skip
    """The manifest as YAML. ValueError for a name or a topology that cannot be."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):  # the names of pods grow from it
        raise ValueError(f"--name {name} must be at most 40 lower-case letters, digits and hyphens.")
    kind, _, shape = topology.partition(":")
    if kind not in ACCELERATORS or not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        raise ValueError(f"--topology {topology} is unknown; give one as v5e:8x8, v5p:2x2x4 or v6e:4x4.")
    if len(shape.split("x")) != (3 if kind == "v5p" else 2):
        raise ValueError(f"--topology {topology} has a wrong number of sides; v5p has three, the others two.")
    chips = math.prod(int(side) for side in shape.split("x"))
    if chips > CHIPS and chips % CHIPS:
        raise ValueError(f"--topology {topology} has {chips} chips, which do not fill hosts of {CHIPS}.")
    selector = {"cloud.google.com/gke-tpu-accelerator": ACCELERATORS[kind], "cloud.google.com/gke-tpu-topology": shape}
    if spot:
        selector["cloud.google.com/gke-spot"] = "true"
    values = {
        "name": name, "image": image, "arguments": arguments, "selector": selector, "restarts": restarts,
        "service_account": service_account, "hosts": max(1, chips // CHIPS), "chips": min(chips, CHIPS),
    }  # fmt: skip
    text = "".join(line for line in TEMPLATE.read_text().splitlines(True) if not line.lstrip().startswith("#"))
    return string.Template(text).substitute({key: json.dumps(value) for key, value in values.items()})


def main(argv: list[str]) -> int:
    """Prints the manifest; returns the exit code."""
    arguments = []
    if "--" in argv:
        place = argv.index("--")
        argv, arguments = argv[:place], argv[place + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the JobSet")
    parser.add_argument("--topology", required=True, help="v5e:8x8, v5p:2x2x4, v6e:4x4, ...")
    parser.add_argument("--image", required=True, help="container image")
    parser.add_argument("--service-account", default="default", help="which may read and write the bucket")
    parser.add_argument("--restarts", type=int, default=100, help="how often a preempted run is started again")
    parser.add_argument("--spot", action="store_true", help="on spot nodes")
    args = parser.parse_args(argv)
    if not arguments:
        parser.error(
            "name what to run, e.g. -- --config configs/stage1.py:phi3v,pod=v5e-64 --workdir gs://bucket/runs/stage1"
        )
    try:
        text = render(args.name, args.topology, args.image, arguments, args.spot, args.restarts, args.service_account)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
