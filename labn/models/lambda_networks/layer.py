"""Lambda layer: long-range interactions without attention maps (Bello, ICLR 2021; JSAI 2022, eq. 3-5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from labn.errors import InputError
from labn.inference.folding import SplitNorms
from labn.lrp.weighted_product import weighted
from labn.models.lambda_networks.linear_map import LambdaWeights, apply_lambdas, content_lambdas
from labn.models.lambda_networks.position import FORMULATIONS


class LambdaLayer(SplitNorms):
    """A layer that replaces a k x k convolution: lambdas, linear maps computed from the context, act on each query.

    With positions n, m, heads h, key depth k, intra-depth u and values v (Bello 2021, eq. 1-3):

        K = softmax over m,   lambda_c[k,v]   = sum_{u,m} K[u,k,m] V[u,v,m]
                              lambda_p[n,k,v] = sum_{u,m} E[k,u,m-n] V[u,v,m]     m in the r x r window around n
        Y[h,v,n] = sum_k Q[h,k,n] (lambda_c[k,v] + lambda_p[n,k,v] + b[k])

    Relevance propagation treats queries and keys as constants and passes relevance to the values, see
    `labn.models.lambda_networks.linear_map.LambdaWeights`.

    Args:
        channels: number of input and output channels d, a multiple of `heads`.
        dim_k: depth of queries and keys.
        dim_u: intra-depth.
        heads: number of heads; each has d / heads values.
        r: side of the position window, odd; it may be larger than the map.
        stride: 1, or 2 for a 3 x 3 average pooling with stride 2 behind the layer.
        pos_bias: learn the bias b, which the released convolution has and Bello's equations do not.
        formulation: computation of the position path, see `FORMULATIONS`; all give the same result.

    Shapes:
        (B, d, H, W) -> (B, d, H, W), or (B, d, ceil(H / 2), ceil(W / 2)) with stride 2.

    Raises:
        InputError: an argument is outside the values above.

    Example:
        >>> LambdaLayer(channels=8, r=5, stride=2)(torch.zeros(2, 8, 6, 7)).shape
        torch.Size([2, 8, 3, 4])
    """

    def __init__(
        self,
        channels: int,
        dim_k: int = 16,
        dim_u: int = 1,
        heads: int = 4,
        r: int = 23,
        stride: int = 1,
        pos_bias: bool = True,
        formulation: str = "auto",
    ) -> None:
        super().__init__()
        _check(channels, heads, r, stride, formulation)
        self.channels, self.dim_k, self.dim_u, self.heads, self.r = channels, dim_k, dim_u, heads, r
        self.dim_v = channels // heads
        self.formulation = formulation
        self.to_qkv = nn.Conv2d(channels, sum(self._widths()), kernel_size=1, bias=False)
        self.norm_q = nn.BatchNorm2d(heads * dim_k)
        self.norm_v = nn.BatchNorm2d(self.dim_v * dim_u)
        self.position_weight = nn.Parameter(torch.empty(dim_k, dim_u, r, r))
        self.position_bias = nn.Parameter(torch.empty(dim_k)) if pos_bias else None
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else nn.Identity()
        self.reset_position()

    def reset_position(self) -> None:
        """Draw window and bias of the position path uniformly from +-1 / sqrt(dim_u r^2), as PyTorch's convolutions."""
        bound = (self.dim_u * self.r**2) ** -0.5
        nn.init.uniform_(self.position_weight, -bound, bound)
        if self.position_bias is not None:
            nn.init.uniform_(self.position_bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Compute Y (B, d, H, W), average-pooled where the stride is 2."""
        query, key, value = self.project(x)
        position = (self.position_weight, self.position_bias, self.dim_v, self.formulation)
        return weighted(value, LambdaWeights, query, key, *position, self.pool)

    def content(self, x: Tensor) -> Tensor:
        """Compute the content path alone, Y_c[h,v,n] = sum_k Q[h,k,n] lambda_c[k,v], (B, d, H, W), before any pooling.

        Its mean over channels is the papers' lambda attention map (JSAI 2022, section 4.2).
        """
        query, key, value = self.project(x)
        return apply_lambdas(content_lambdas(key, value), query).flatten(1, 2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries (B, heads, dim_k, H, W), keys (B, dim_u, dim_k, H, W) and values (B, dim_u, dim_v, H, W).

        Queries and values pass a BatchNorm; keys pass a softmax over the positions.
        """
        query, key, value = self.to_qkv(x).contiguous().split(self._widths(), dim=1)
        query = self.norm_q(query).unflatten(1, (self.heads, self.dim_k))
        value = self.norm_v(value).unflatten(1, (self.dim_u, self.dim_v))
        # Autocast computes the softmax in float32; the cast below keeps keys and values in one dtype.
        # `unflatten` and not `view`: len(x) would fix the number of images in an exported network.
        key = key.flatten(2).softmax(dim=2).unflatten(1, (self.dim_u, self.dim_k)).unflatten(3, x.shape[-2:])
        return query, key.to(value.dtype), value

    def norm_parts(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d, slice]]:
        """The BatchNorms of queries and values, and their channels of `to_qkv`."""
        queries, _, values = self._widths()
        return [(self.to_qkv, self.norm_q, slice(queries)), (self.to_qkv, self.norm_v, slice(-values, None))]

    def extra_repr(self) -> str:
        """The sizes, for the text of the module."""
        return f"{self.channels}, dim_k={self.dim_k}, dim_u={self.dim_u}, heads={self.heads}, r={self.r}"

    def _widths(self) -> list[int]:
        return [self.heads * self.dim_k, self.dim_k * self.dim_u, self.dim_v * self.dim_u]


def _check(channels: int, heads: int, r: int, stride: int, formulation: str) -> None:
    if channels % heads:
        raise InputError(f"channels is {channels}; it must be a multiple of heads ({heads}).")
    if r < 1 or r % 2 == 0:
        raise InputError(f"r is {r}; the side of the position window must be odd and positive.")
    if stride not in (1, 2):
        raise InputError(f"stride is {stride}; it must be 1 or 2.")
    if formulation != "auto" and formulation not in FORMULATIONS:
        raise InputError(f"formulation is {formulation!r}; it must be auto or one of {', '.join(FORMULATIONS)}.")
