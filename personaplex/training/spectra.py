"""How far apart two waves are to an ear: a loss over bands of short spectra, in which what is faint counts as
much as what is loud.

A waveform's own error is all but the vowels' lowest formants. Bands are compared by what they hold
themselves: a consonant 40 dB below a vowel weighs as much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from personaplex.config import SAMPLE_RATE

_WINDOW, _HOP = 480, 240
_BANDS = 48
_FLOOR = 3e-4  # of a band's mean power: what is fainter counts as silence
LEVEL_WEIGHT = 0.3  # of a neper of power against a relative error of one


def bands() -> Tensor:
    """[bands, bins] of ones: the bins that lie in each, of about equal mel width, one bin at least."""
    bins = _WINDOW // 2 + 1
    mel = 2595 * torch.log10(1 + torch.arange(bins) * (SAMPLE_RATE / _WINDOW) / 700)
    _, place = torch.unique((mel / mel[-1] * (_BANDS - 1e-3)).floor(), return_inverse=True)
    return torch.nn.functional.one_hot(place).t().float()


class Loss:
    """`floor` [bands] is the power that counts as silence; see `floor_of`."""

    def __init__(self, floor: Tensor) -> None:
        self._bands, self._floor = bands().to(floor.device), floor[:, None]
        self._window = torch.hann_window(_WINDOW, device=floor.device)

    @classmethod
    def of(cls, wave: Tensor) -> Loss:
        """The loss for speech like `wave` [samples]."""
        made = cls(torch.zeros(len(bands()), device=wave.device))
        return cls(_FLOOR * made._power(made._spectra(wave[None])).mean((0, 2)))

    def __call__(self, made: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Waves [N, samples] twice -> (relative error of the spectra, error of levels in nepers of power).

        The first is 0 .. 2, and 1 for silence in place of speech; the second alone does not see phases.
        """
        ours, theirs = self._spectra(made), self._spectra(wanted)
        power, goal = self._power(ours), self._power(theirs)
        apart = self._power(ours - theirs) / (goal + power.detach() + self._floor)
        level = ((power + self._floor) / (goal + self._floor)).log().abs()
        return apart.mean(), level.mean()

    def _spectra(self, wave: Tensor) -> Tensor:
        return torch.stft(wave, _WINDOW, _HOP, window=self._window, center=False, return_complex=True)

    def _power(self, spectra: Tensor) -> Tensor:
        """[N, bins, frames] complex -> [N, bands, frames]."""
        return self._bands @ (spectra.real.square() + spectra.imag.square())
