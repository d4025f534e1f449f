"""LayerNorm over the channels of each place of a map."""

from torch import Tensor, nn


class MapNorm(nn.LayerNorm):
    """Normalise channels, place by place; no copies where maps are channels-last. Shape: [B, C, H, W] -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
