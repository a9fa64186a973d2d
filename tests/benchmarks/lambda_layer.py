"""Lambda layer against the Conv3d form: `python tests/benchmarks/lambda_layer.py [--threads 1 2] [--rounds 7]`.

Ratios of process CPU time, ours / Conv3d, interleaved A B B A in one process, medians over the rounds; with
`--device cuda` the columns of wall time are the ones to read. `--folded` measures forwards of the fast copy of a lambda
ResNet-50 with the BatchNorms of queries and values folded as well, against a folded one that keeps these.
"""

from __future__ import annotations

import argparse
import copy
import platform
import time
from collections.abc import Callable
from statistics import median
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labn.inference.fast_copy import fast_copy
from labn.models.lambda_networks.layer import LambdaLayer
from labn.models.lambda_networks.position import choose
from labn.models.lambda_networks.resnet import lambda_resnet50

SHAPES = {(16, 256, 28, 28): 0.45, (16, 512, 14, 14): 0.22, (8, 64, 56, 56): 0.65, (2, 8, 128, 128): None}


class Conv3dLambda(LambdaLayer):
    """The same layer with the position lambdas by one Conv3d over the whole batch, kept until the backward."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x)
        query, key = query.flatten(3), key.flatten(3)
        content = torch.einsum("bukm,buvm->bkv", key, value.flatten(3))
        reach = self.r // 2
        position = F.conv3d(value, self.position_weight.unsqueeze(2), self.position_bias, padding=(0, reach, reach))
        result = torch.einsum("bhkm,bkv->bhvm", query, content) + torch.einsum(
            "bhkm,bkvm->bhvm", query, position.flatten(3)
        )
        return self.pool(result.reshape(x.shape))


def now(device: torch.device) -> tuple[float, float]:
    """CPU and wall seconds, once the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time(), time.perf_counter()


def cost(layer: LambdaLayer, x: Tensor, grad: Tensor) -> tuple[float, float, float, float]:
    """CPU seconds of forward and of forward + backward, then wall seconds of both."""
    start = now(x.device)
    y = layer(x)
    forward = now(x.device)
    torch.autograd.grad(y, [x, *layer.parameters()], grad)
    end = now(x.device)
    return forward[0] - start[0], end[0] - start[0], forward[1] - start[1], end[1] - start[1]


def inference(layer: nn.Module, x: Tensor) -> float:
    """Seconds of a forward without gradient: of the CPU, or wall seconds on another device."""
    clock = 0 if x.device.type == "cpu" else 1
    with torch.no_grad():
        start = now(x.device)
        layer(x)
        return now(x.device)[clock] - start[clock]


def ratios(ours: Callable[[], list[float]], theirs: Callable[[], list[float]], rounds: int) -> list[float]:
    """Medians over `rounds` of (A + A) / (B + B), in the order A B B A."""
    ours(), theirs()
    found = []
    for _ in range(rounds):
        a, b, c, d = ours(), theirs(), theirs(), ours()
        found.append([(p + s) / (q + r) for p, q, r, s in zip(a, b, c, d)])
    return [median(column) for column in zip(*found)]


def folded(rounds: int, device: torch.device) -> None:
    """Print the ratio of forwards of a lambda ResNet-50, all BatchNorms folded / all but those of the lambda layers."""
    torch.manual_seed(0)
    model = lambda_resnet50().to(device).eval().to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 224, 224, device=device).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        ours = fast_copy(model, x).copy
        with mock.patch.object(LambdaLayer, "norm_parts", return_value=[]):
            theirs = fast_copy(copy.deepcopy(model), x).copy
    assert ours is not None
    assert theirs is not None
    (ratio,) = ratios(lambda: [inference(ours, x)], lambda: [inference(theirs, x)], rounds)
    print(f"lambda ResNet-50, batch 4, 224 px: {ratio:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folded", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.folded:
        torch.set_num_threads(1)
        return folded(arguments.rounds, device)
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    print(f"{machine}, r=23, dk=16, 4 heads")
    print("threads  shape               formulation   forward  (wall)  no grad  fwd+bwd  (wall)   bar")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for shape, bar in SHAPES.items():
            torch.manual_seed(0)
            ours, theirs = LambdaLayer(shape[1]).to(device), Conv3dLambda(shape[1]).to(device)
            theirs.load_state_dict(ours.state_dict())
            x, grad = torch.randn(shape, device=device, requires_grad=True), torch.randn(shape, device=device)
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
            f, s, fw, sw, n = ratios(
                lambda: [*cost(ours, x, grad), inference(ours, x)],  # noqa: B023
                lambda: [*cost(theirs, x, grad), inference(theirs, x)],  # noqa: B023
                arguments.rounds,
            )
            query, _, value = ours.project(x.detach())
            name = choose(query.shape, ours.position_weight.shape, value.shape)
            limit = "    -" if bar is None else f"{bar:5.2f}"
            print(
                f"{threads:7d}  {shape!s:18}  {name:12}  {f:7.2f} {fw:7.2f}  {n:7.2f}  {s:7.2f} {sw:7.2f} {limit}",
                flush=True,
            )


if __name__ == "__main__":
    main()
