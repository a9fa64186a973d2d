"""Which of 65 networks each method explains, what arrives at the pixels, and what it costs.

    python tests/benchmarks/lrp_matrix.py [--out runs/lrp_matrix.csv] [--networks swin_t resnet18]
        [--methods lrp gradcam] [--only_table]

The networks have random weights (seed 0) and get one random image, of 96 pixels where they allow it, else of their own
size. Every pair of network and method is one row of the CSV, written as soon as it is known, so that a second call goes
on where the first one ended. The last lines printed are the table of `labn/lrp/README.md`. Nothing is downloaded; about
15 minutes on one core.

`arrived` is the share of the initial relevance, the logit, at the pixels; for `contrastive_lrp`, whose initial
relevance adds up to 0, it is the sum at the pixels over the 2 units that start. `error` is
|initial - arrived - booked| over the initial relevance. `cost` is process CPU time over that of gradient x input in the
same process, of one call each after a first one.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from labn.explainers import C3LRP, LRP, AttentionRollout, ContrastiveLRP, GradCAM
from labn.explainers.base import Explainer
from labn.explainers.gradient import GradientTimesInput
from labn.lrp import relevance

TORCHVISION = [
    "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "vgg16_bn", "alexnet",
    "squeezenet1_1", "googlenet", "inception_v3", "shufflenet_v2_x1_0", "mnasnet1_0", "mobilenet_v2",
    "mobilenet_v3_large", "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf", "convnext_tiny", "swin_t",
    "swin_v2_t", "maxvit_t", "vit_b_16",
]  # fmt: skip
TIMM = [
    "resnet50d", "seresnet50", "resnest14d", "res2net50_26w_4s", "dla34", "hrnet_w18_small", "nf_resnet50",
    "dm_nfnet_f0", "ghostnet_100", "rexnet_100", "repvgg_a2", "cspresnet50", "xception41", "mobilenetv4_conv_small",
    "tf_efficientnet_lite0", "tf_efficientnetv2_b0", "eca_resnet33ts", "skresnet18", "selecsls42b", "resnetv2_50",
    "convnextv2_atto", "convmixer_768_32", "edgenext_xx_small", "poolformer_s12", "caformer_s18", "fastvit_t8",
    "mobilevit_s", "efficientformer_l1", "coatnet_nano_rw_224", "vit_tiny_patch16_224", "deit_tiny_patch16_224",
    "cait_xxs24_224", "beit_base_patch16_224", "swin_tiny_patch4_window7_224", "davit_tiny", "pvt_v2_b0",
    "volo_d1_224", "levit_128s", "mixer_s32_224", "botnet26t_256", "lambda_resnet26t", "lambda_resnet26rpt_256",
    "lambda_resnet50ts",
]  # fmt: skip
EXPLAINERS: dict[str, Callable[[], Explainer]] = {
    "lrp": partial(LRP, init="logit"),  # the probability of a network with random weights may be 0
    "contrastive_lrp": ContrastiveLRP,
    "c3lrp": partial(C3LRP, init="logit"),
    "gradcam": partial(GradCAM, relu=False),  # with random weights, the ReLU may leave nothing
    "rollout": AttentionRollout,
}
COLUMNS = ("network", "method", "result", "arrived", "error", "cost", "note")
SIDE = 96  # pixels, for networks that take images of any size
TARGET = torch.tensor([3])


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights in eval mode, and one image of its size."""
    torch.manual_seed(0)
    if name in TORCHVISION:
        options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model, side = torchvision.models.get_model(name, weights=None, **options), 224
    else:
        model = timm.create_model(name, pretrained=False)
        side = model.default_cfg["input_size"][-1]
    for module in model.modules():
        # A head of zeros has no relevance to start from.
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval(), image_for(model, side)


def image_for(model: nn.Module, side: int) -> Tensor:
    """A small image, or one of `side` pixels for a network that refuses it."""
    large = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    small = large[..., :SIDE, :SIDE].contiguous()
    try:
        with torch.no_grad():
            model(small)
    except (RuntimeError, ValueError, AssertionError):
        return large
    return small


def seconds(call: Callable[[], object]) -> float:
    """Process CPU time of a call that has run once before."""
    start = time.process_time()
    call()
    return time.process_time() - start


def look(model: nn.Module, image: Tensor, method: str, unit: float) -> dict[str, Any]:
    """One row: the map and its account, or the sentence with which the method refuses the network."""
    explainer = EXPLAINERS[method]()
    try:
        maps = explainer(model, image, TARGET)  # also makes the plan, and the parts that later calls share
        account: dict[str, Any] = {}
        if isinstance(explainer, LRP):
            found = relevance(model, image, TARGET, explainer.config, explainer.init, report=True)
            started = 2.0 if method == "contrastive_lrp" else float(found.initial)
            error = abs(float(found.initial - found.arrived - found.leaked) / started)
            account = {"arrived": f"{float(found.arrived) / started:.3f}", "error": f"{error:.0e}"}
        cost = seconds(lambda: explainer(model, image, TARGET)) / unit
    except (ValueError, NotImplementedError) as error:
        return {"result": "refused", "note": str(error)}
    except Exception as error:  # a row says so, and the next network follows
        return {"result": "failed", "note": f"{type(error).__name__}: {error}".splitlines()[0]}
    finite = bool(maps.isfinite().all())
    kind = "map" if finite and bool(maps.any()) else "empty map" if finite else "not finite"
    return {"result": kind, "cost": f"{cost:.2f}", **account}


def read(path: Path) -> list[dict[str, str]]:
    """The rows of an earlier call."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, Any]) -> None:
    """Write one row at once, so that a call that is ended loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if first:
            writer.writeheader()
        writer.writerow(row)


def measure(path: Path, networks: list[str], methods: list[str]) -> None:
    """Add the rows that are missing."""
    known = {(row["network"], row["method"]) for row in read(path)}
    for name in networks:
        missing = [method for method in methods if (name, method) not in known]
        if not missing:
            continue
        model, image = build(name)
        gradient = GradientTimesInput()
        gradient(model, image, TARGET)
        unit = seconds(partial(gradient, model, image, TARGET))
        for method in missing:
            append(path, {"network": name, "method": method, **look(model, image, method, unit)})
            print(name, method, read(path)[-1]["result"], flush=True)


def cell(row: dict[str, str] | None) -> str:
    """Arrived share and cost of a map, or what the method said."""
    if row is None:
        return ""
    if row["result"] != "map":
        return row["result"]
    return " / ".join(value for value in (row["arrived"], row["cost"]) if value)


def table(rows: list[dict[str, str]], methods: list[str]) -> None:
    """Print the table of all networks, the number of maps, and the sentences of refusals."""
    by_pair = {(row["network"], row["method"]): row for row in rows}
    print("| network |", " | ".join(f"`{method}`" for method in methods), "| largest error |")
    print("|---" * (len(methods) + 2) + "|")
    for name in dict.fromkeys(row["network"] for row in rows):
        errors = [row["error"] for row in rows if row["network"] == name and row["error"]]
        cells = [cell(by_pair.get((name, method))) for method in methods]
        print(f"| {name} |", " | ".join(cells), f"| {max(errors, key=float, default='')} |")
    for method in methods:
        of_method = [row for row in rows if row["method"] == method]
        closed = [row for row in of_method if row["result"] == "map" and float(row["error"] or 0) <= 1e-4]
        print(f"{method}: {len(closed)} maps of {len(of_method)} networks")
        for row in of_method:
            if row["result"] != "map":
                print(f"  {row['network']}: {row['result']}; {row['note']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lrp_matrix.csv"))
    parser.add_argument("--networks", nargs="+", default=TORCHVISION + TIMM)
    parser.add_argument("--methods", nargs="+", default=list(EXPLAINERS), choices=list(EXPLAINERS))
    parser.add_argument("--only_table", action="store_true", help="print the table of the rows that are there")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if not args.only_table:
        measure(args.out, args.networks, args.methods)
    table(read(args.out), args.methods)


if __name__ == "__main__":
    main()
