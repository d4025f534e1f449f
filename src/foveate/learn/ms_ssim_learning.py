"""Learning with perceptual similarity: structural similarity, at one scale or several, as the objective.

Snell, Ridgeway, Liao, Roads, Mozer, Zemel 2015, "Learning to Generate Images with Perceptual Similarity Metrics",
arXiv:1511.06409. A squared error counts every pixel alike. Structural similarity compares what the eye does, local
luminance, contrast and structure, each relative to what is there, so that an error in a flat region weighs more than
the same error in a busy one:

    L = 1 - MS-SSIM(x, y),   MS-SSIM = mean(l_M cs_M)^b_M * prod_{j<M} mean(cs_j)^b_j       (`foveate.meter.quality`)

M scales, b the published weights of the finest M, divided by their sum. A window of 11 has room at scale M when
min(H, W) >= 10 * 2^(M-1) + 1, so M follows from the pictures: 2 at 32 pixels, 3 at 64, 5 from 161 on. With
`per_pixel`, the product is taken at every place and averaged at the end, as the paper writes it.

Only the coarsest scale sees luminance, so a mean level may drift; `mix` adds a share of the mean absolute error
(0.16 in Zhao, Gallo, Frosio, Kautz 2015, arXiv:1511.08861, who weigh it by the coarsest Gaussian too).

With any such distance D in the place of a likelihood, a variational autoencoder minimises the expected loss (EL-VAE):

    L = C * E_{z ~ q(z|x)} [D(x, dec(z))] + KL(q(z|x) || N(0, I))
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.meter.quality import MS_SSIM_WEIGHTS, ms_ssim, ssim

EPS = 1e-6


def scales_for(height: int, width: int, window: int = 11, most: int = len(MS_SSIM_WEIGHTS)) -> int:
    """How many scales pictures have room for, at most `most`.

    Raises: InputError when not even one window fits.

    >>> [scales_for(side, side) for side in (16, 32, 64, 96, 161)]
    [1, 2, 3, 4, 5]
    """
    side = min(height, width)
    if side < window:
        raise InputError(
            f"pictures of {width} x {height} pixels hold no window of {window} pixels; "
            "use larger ones or a smaller window."
        )
    fitting = (m for m in range(most, 0, -1) if side >= _least(m, window))
    return next(fitting)


def _least(scales: int, window: int) -> int:
    return (window - 1) * 2 ** (scales - 1) + 1


class SSIMLoss(nn.Module):
    """1 - SSIM, the mean over a batch.

    Args:
        peak: the value of white.
        window, sigma: side and standard deviation of the Gaussian window.

    Shape: x, y [B, C, H, W] -> [].
    Raises: InputError for pictures that do not match, or are smaller than the window.
    """

    def __init__(self, peak: float = 1.0, window: int = 11, sigma: float = 1.5) -> None:
        super().__init__()
        self.peak, self.window, self.sigma = peak, window, sigma

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 1 - ssim(x, y, peak=self.peak, window=self.window, sigma=self.sigma).mean()


class MSSSIMLoss(nn.Module):
    """1 - MS-SSIM, the mean over a batch, with as many scales as the pictures have room for.

    Args:
        scales: M; None takes the most that fit, up to the number of weights.
        peak: the value of white.
        weights: exponent of each scale, the finest first; those kept are divided by their sum.
        window, sigma: side and standard deviation of the Gaussian window.
        per_pixel: multiply the scales at every place and average at the end.
        mix: share of the mean absolute error (of values divided by `peak`) in the loss; 0.16 is a known choice.
        eps: keeps slopes finite where contrast and structure are opposite.

    Shape: x, y [B, C, H, W] -> [].
    Raises: InputError for pictures that do not match, or too small for the scales asked for.

    >>> loss = MSSSIMLoss()
    >>> x = torch.rand(2, 1, 32, 32)
    >>> bool(loss(x, x) < 1e-6), bool(loss(x, 1 - x) > 0.5)
    (True, True)
    """

    def __init__(
        self,
        scales: int | None = None,
        peak: float = 1.0,
        weights: tuple[float, ...] = MS_SSIM_WEIGHTS,
        window: int = 11,
        sigma: float = 1.5,
        per_pixel: bool = False,
        mix: float = 0.0,
        eps: float = EPS,
    ) -> None:
        super().__init__()
        if scales is not None and not 1 <= scales <= len(weights):
            raise InputError(f"scales={scales} with {len(weights)} weights; ask for 1 to {len(weights)}, or give more.")
        if not 0 <= mix <= 1 or eps < 0:
            raise InputError(f"mix={mix} and eps={eps}: a mix is a share from 0 to 1, eps is 0 or more.")
        self.scales, self.peak, self.weights, self.window, self.sigma = scales, peak, weights, window, sigma
        self.per_pixel, self.mix, self.eps = per_pixel, mix, eps

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        kept = self.weights[: self._scales(x)]
        similarity = ms_ssim(
            x, y, self.peak, tuple(w / sum(kept) for w in kept), self.window, self.sigma,
            eps=self.eps, per_pixel=self.per_pixel,
        ).mean()  # fmt: skip
        loss = 1 - similarity
        return torch.lerp(loss, (x - y).abs().mean().to(loss) / self.peak, self.mix) if self.mix else loss

    def _scales(self, x: Tensor) -> int:
        if not isinstance(x, Tensor) or x.dim() != 4:
            return 1  # ms_ssim says what is wrong
        height, width = x.shape[2:]
        if self.scales is None:
            return scales_for(height, width, self.window, len(self.weights))
        least = _least(self.scales, self.window)
        if min(height, width) < least:
            fit = scales_for(height, width, self.window)
            raise InputError(
                f"pictures of {width} x {height} pixels are too small for {self.scales} scales with a window of "
                f"{self.window}, which need {least} x {least}; use scales={fit}, or None to choose by size."
            )
        return self.scales

    @staticmethod
    def conformance_example() -> tuple["MSSSIMLoss", tuple[Tensor, Tensor]]:
        """Two scales of a small window, on noise."""
        x, y = (torch.rand(1, 1, 12, 11, dtype=torch.float64, requires_grad=True) for _ in range(2))
        return MSSSIMLoss(window=5), (x, y)


def kl_to_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, diag exp(log_variance)) || N(0, I)) in nats. Shape: [B, k] twice -> [B]."""
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1)


class ExpectedLossVAE(nn.Module):
    """A variational autoencoder that minimises the expectation of any distance between pictures.

    Args:
        encoder: [B, C, H, W] -> [B, 2 k], means and log-variances of the code.
        decoder: [B, k] -> [B, C, H, W].
        distance: (picture, reconstruction) -> [], differentiable, the mean over the batch.
        weight: C; the larger, the more the code may say.

    Shape: [B, C, H, W] -> the reconstruction, from the mean of the code in evaluation, from a sample in training.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        distance: Callable[[Tensor, Tensor], Tensor] | None = None,
        weight: float = 1000.0,
    ) -> None:
        super().__init__()
        if not weight > 0:
            raise InputError(f"weight={weight}: the distance's weight C is above 0.")
        self.encoder, self.decoder, self.weight = encoder, decoder, weight
        self.distance = MSSSIMLoss() if distance is None else distance

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the code. Shape: [B, C, H, W] -> two of [B, k]."""
        mean, log_variance = self.encoder(x).chunk(2, 1)
        return mean, log_variance

    def forward(self, x: Tensor) -> Tensor:
        return self._decode(*self.encode(x))

    def loss(self, x: Tensor) -> Tensor:
        """C * D(x, reconstruction) + KL, with one sample of the code per picture in training."""
        mean, log_variance = self.encode(x)
        return (
            self.weight * self.distance(x, self._decode(mean, log_variance)) + kl_to_normal(mean, log_variance).mean()
        )

    def _decode(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        noise = torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else 0
        return self.decoder(mean + noise)
