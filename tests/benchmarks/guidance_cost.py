"""Cost of a training step with saliency guidance over one without, forward and backward, interleaved, with the
allocator set as the command line sets it.

python tests/benchmarks/guidance_cost.py --rounds 5 --threads 1
"""

import argparse
import platform
import time
from statistics import median

import torch

from labn.launch.allocator import keep_freed_memory
from labn.modules import LABN, SaliencyGuidance


def step_seconds(module: LABN, batch: dict[str, torch.Tensor]) -> float:
    """Process CPU seconds of one forward and backward."""
    start = time.process_time()
    terms, _ = module.losses(batch, "train")
    torch.autograd.grad(terms["loss"], [p for p in module.parameters() if p.requires_grad])
    return time.process_time() - start


def main() -> None:
    """Print the ratio for the quickstart's network and for LABN on a ResNet-18."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    print(
        f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, {options.rounds} rounds A B B A"
    )
    small = {"backbone_options": {"layers": [1, 1, 1], "width": 16, "stem_width": 32, "r": 7}}
    for name, size, split, more in (("lambda_resnet", 64, 1, small), ("resnet18", 224, 4, None)):
        batch = {"image": torch.randn(16, 3, size, size), "label": torch.arange(16) % 2, "index": torch.arange(16)}
        for mask_grad in ("straight_through", "detached"):
            guidance = SaliencyGuidance(fill="black", mask_grad=mask_grad)
            pair = [LABN(name, split=split, network_options=more, guidance=g) for g in (None, guidance)]
            for module in pair:
                module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
                module.on_fit_start()
                for _ in range(3):
                    step_seconds(module, batch)
            ratios = []
            for _ in range(options.rounds):
                a, b, c, d = (step_seconds(module, batch) for module in (pair[0], pair[1], pair[1], pair[0]))
                ratios.append((b + c) / (a + d))
            print(f"{name}, {size} px, {mask_grad}: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
