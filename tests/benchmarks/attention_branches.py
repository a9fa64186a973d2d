"""Put an attention branch on every network of a list, behind two thirds of its blocks, and print what became of it.

    python tests/benchmarks/attention_branches.py [names]

For each network: its blocks, where it is cut, the map's size, and whether a training step reaches every parameter, the
branch can be built of the network's own blocks, and `labn`, `gradcam` and `lrp` give maps.
"""

from __future__ import annotations

import argparse
import warnings

import torch

from labn.errors import UserError
from labn.explainers.registry import explainer_by_name
from labn.models import AttentionBranchNetwork, build_network
from labn.models.cut import block_names

NETWORKS = [
    "resnet50d", "densenet121", "mobilenetv3_large_100", "efficientnet_b0", "regnety_004", "convnext_tiny",
    "convnextv2_atto", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "maxvit_tiny_tf_224",
    "vit_tiny_patch16_224", "deit_tiny_patch16_224", "cait_xxs24_224", "beit_base_patch16_224", "seresnet50",
    "res2net50_26w_4s", "dla34", "hrnet_w18_small", "nf_resnet50", "ghostnet_100", "rexnet_100", "repvgg_a2",
    "cspresnet50", "xception41", "mobilenetv4_conv_small", "resnetv2_50", "convmixer_768_32", "edgenext_xx_small",
    "poolformer_s12", "caformer_s18", "fastvit_t8", "mobilevit_s", "efficientformer_l1", "coatnet_nano_rw_224",
    "davit_tiny", "pvt_v2_b0", "volo_d1_224", "levit_128s", "mixer_s32_224", "botnet26t_256", "lambda_resnet26t",
    "lambda_resnet26rpt_256", "lambda_resnet50ts",
]  # fmt: skip
METHODS = ("labn", "gradcam", "lrp")
"""Explainers that are tried on every network."""


def row(name: str) -> list[str]:
    """Cells of one network."""
    torch.manual_seed(0)
    blocks = block_names(build_network(f"timm/{name}"))
    # A ResNet's blocks are counted without what stands before its first stage.
    split: int | str = blocks[2 * len(blocks) // 3 - 1]
    options = {"split": split, "theta": 0.0, "branch_options": {"planes": 32}}
    network = AttentionBranchNetwork(f"timm/{name}", **options)  # type: ignore[arg-type]
    _, *size = (getattr(network.network, "pretrained_cfg", None) or {"input_size": (3, 224, 224)})["input_size"]
    images = torch.randn(2, 3, *size)
    output = network.train()(images)
    (output.logits.square().sum() + output.branch_logits.square().sum()).backward()
    unreached = sum(parameter.grad is None for parameter in network.parameters())
    side = "x".join(map(str, output.attention.shape[2:]))
    cells = [str(len(blocks)), str(split), side, str(unreached), own(name, split)]
    network.eval().zero_grad()
    return cells + [explained(method, network, images) for method in METHODS]


def own(name: str, split: int | str) -> str:
    """Whether the branch can have the network's own blocks."""
    try:
        branch = AttentionBranchNetwork(f"timm/{name}", split=split, lab_block="own").attention_branch
    except UserError:
        return "no"
    return type(branch.blocks[0].block).__name__


def explained(method: str, network: AttentionBranchNetwork, images: torch.Tensor) -> str:
    """`yes` for a finite map, the error otherwise."""
    try:
        return "yes" if explainer_by_name(method)(network, images[:1], torch.tensor([1])).isfinite().all() else "NaN"
    except UserError as error:
        return str(error)


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NETWORKS, help="of timm")
    warnings.filterwarnings("ignore")
    head = ["network", "blocks", "cut behind", "map", "without gradient", "own blocks", *METHODS]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name in parser.parse_args().names:
        try:
            cells = row(name)
        except UserError as error:
            cells = [str(error)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
