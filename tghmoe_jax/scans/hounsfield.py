"""Are these values Hounsfield units? Decided by where air lies, the lowest mode of the voxels that are no padding.

Rescaled once, air lies near -1000; twice, near -2000; never, near 0. A scan without air cannot be judged: it is
read with a warning. Axis legend: D slices toward Superior, H rows toward Posterior, W columns toward Left.
"""

import numpy as np

from tghmoe_jax.errors import UserError
from tghmoe_jax.scans.volume import check_finite

HIGHEST = 32_000  # the extended scale of CT ends at 30,710: beyond, a sign was read wrongly
LOWEST = -2_300  # air that was rescaled twice lies above, and what lies below is padding
_NEVER = (-80, 250)  # where air (or lung) lies that was never rescaled
_BIN, _WINDOW = 10, 60  # HU: of the histogram, and the width of a mode


def check_hu(array: np.ndarray, name: str, assumed: bool = False) -> tuple[str, ...]:
    """Refuse a volume (D, H, W) whose values cannot be HU: unscaled, windowed, normalised, a label map, rescaled twice.

    Returns the warnings for values that may or may not be HU. `assumed`: the user says that they are, so what would be
    refused is a warning too. UserError names the volume by `name`.
    """
    low, high = check_finite(array, name)
    step = max(1, round((array.size / 2**21) ** (1 / 3)))
    sample = array[::step, ::step, ::step]
    problem, warnings = _judged(sample, low, high)
    if problem and not assumed:
        raise UserError(
            f"{name} runs from {low:g} to {high:g} and {problem}: write it again as HU (rescale slope and "
            "intercept applied once; no window, no label map), or give predict --assume-hu if you know that it is HU."
        )
    return (*((f"rescale: the scan {problem}; it was read as HU, as you said",) if problem else ()), *warnings)


def _judged(sample: np.ndarray, low: float, high: float) -> tuple[str | None, list[str]]:
    """Why the values cannot be HU, or None; and the warnings."""
    if low > -50 or high < -500 or low < -70_000 or high > 70_000:
        return "these are not Hounsfield units (air is near -1000)", []
    inner = (sample >= LOWEST) & (sample <= HIGHEST)
    if np.count_nonzero(inner) < 0.01 * sample.size:
        return "these are not Hounsfield units (air is near -1000)", []
    inner &= ~_padding(sample, inner)
    values = sample[inner]
    air = _lowest_mode(values)
    warnings = _ends(values)
    beyond = np.count_nonzero(sample > HIGHEST) / sample.size
    if high > HIGHEST:
        warnings.append(f"values: some pass {HIGHEST}, as padding or air whose sign was read wrongly; check the export")
    if air < -1500:
        return f"has its air near {air:.0f}, as if its rescale had been applied twice", warnings
    if air <= -500:
        dense, airy, tissue = (_share(values, *limits) for limits in ((700, 1400), (-1200, -500), (-250, 350)))
        if air < -1080 or tissue < 0.002 or dense > min(tissue, 3 * airy) or _inside_out(sample, air):
            warnings.insert(0, "rescale: the values do not lie as air and soft tissue do; check that they are HU")
        return None, warnings
    if beyond > 0.05:
        return "holds signed values that were read as unsigned", warnings
    if _never_rescaled(sample, values, air):
        return f"has its air near {air:.0f}, as if its rescale had never been applied", warnings
    warnings.insert(
        0, "rescale: the scan shows no air, so nothing tells whether its values are HU; check that they are"
    )
    return None, warnings


def _share(values: np.ndarray, low: float, high: float) -> float:
    return np.count_nonzero((values > low) & (values < high)) / max(values.size, 1)


def _lowest_mode(values: np.ndarray) -> float:
    """The mean of the lowest peak of the histogram that holds half a percent of the values; without one the median.

    No peak is found where nearly all values pass 4,000: bone and soft tissue lie below.
    """
    counts, edges = np.histogram(values, np.arange(LOWEST, 4000, _BIN))
    near = np.convolve(counts, np.ones(_WINDOW // _BIN), "valid")  # near[i]: from edges[i] on
    reach = _WINDOW // _BIN
    around = np.lib.stride_tricks.sliding_window_view(np.pad(near, reach), 2 * reach + 1).max(axis=1)
    peaks = np.flatnonzero((near == around) & (near >= 0.005 * values.size))
    if not peaks.size:
        return float(np.median(values))
    first = edges[peaks[0]]
    return float(values[(values >= first) & (values < first + _WINDOW)].mean())


def _padding(sample: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """bool (D, H, W): the lowest of the values where it marks what lies outside the reconstruction.

    Such a value stands alone, with nothing near it, around values that have noise. Without noise air looks the same;
    then the shape tells: padding leaves a field that spans the slices.
    """
    none = np.zeros(sample.shape, bool)
    if np.count_nonzero(sample < LOWEST) > 1e-3 * sample.size:  # that is the padding
        return none
    values = sample[inner]
    lowest = values.min()
    spike = sample == lowest
    count = np.count_nonzero(spike)
    if count < 1e-3 * sample.size or np.count_nonzero(values <= lowest + 200) > 1.1 * count:
        return none
    rest = values[values > lowest]
    if not rest.size:
        return none
    mode = _lowest_mode(rest)
    near = rest[np.abs(rest - mode) < _WINDOW]
    noisy = np.unique(near, return_counts=True)[1].max() < 0.5 * near.size
    if not (noisy or _fills(~spike)):
        return none
    if lowest > -1500:  # air (or a background that was set to it), but where other air lies near 0
        return spike if _NEVER[0] < mode < _NEVER[1] else none
    # Rescaled twice, nothing but dense bone lies near 0.
    return spike if _share(rest, -200, 300) > 0.002 else none


def _fills(mask: np.ndarray) -> bool:
    """Whether a mask (D, H, W) spans the slices in both directions, as a field does and a body in it seldom."""
    seen = mask.any(axis=0)
    spans = (np.flatnonzero(seen.any(axis=axis)) for axis in (1, 0))
    return all(np.ptp(span) + 1 > 0.8 * size for span, size in zip(spans, seen.shape, strict=True))


def _radius(mask: np.ndarray) -> float:
    """The mean distance of a mask's voxels from the middle of the slices, in half sides."""
    y, x = (np.linspace(-1, 1, n) for n in mask.shape[1:])
    weights = mask.sum(axis=0)
    return float((weights * np.hypot(y[:, None], x[None, :])).sum() / max(weights.sum(), 1))


def _between(sample: np.ndarray, low: float, high: float) -> np.ndarray:
    return (sample > low) & (sample < high)


def _inside_out(sample: np.ndarray, air: float) -> bool:
    """Whether air lies within and tissue around it: brain and skull, rescaled twice. Lungs are not near -1000."""
    return air < -930 and _radius(_between(sample, air - 100, air + 100)) < _radius(_between(sample, -250, 350))


def _never_rescaled(sample: np.ndarray, values: np.ndarray, air: float) -> bool:
    """Whether around a mode near 0 there is nothing but tissue a thousand above, and that in the middle."""
    tissue, between = _share(values, air + 850, air + 1250), _share(values, air + 300, air + 700)
    if not _NEVER[0] < air < _NEVER[1] or tissue < 0.002 or tissue < 2 * between:
        return False
    return _radius(_between(sample, air + 850, air + 1250)) < _radius(_between(sample, air - 100, air + 100))


def _ends(values: np.ndarray) -> list[str]:
    """Warnings of a scan that was clipped: many voxels sit exactly on its lowest or highest value."""
    low, high = float(values.min()), float(values.max())
    found = []
    if low > -800 and np.count_nonzero(values == low) > 0.01 * values.size:
        found.append(f"values: over 1 % of the voxels sit exactly on the lowest, {low:g}, as after a window")
    levels = np.count_nonzero(np.histogram(values, np.arange(-1200, high + 1))[0])
    # Without noise every value is such a spike; then only a scan without any bone is suspicious.
    top, tissue = np.count_nonzero(values == high), np.count_nonzero(values > 0)
    if 0 < high < (1000 if levels > 60 else 300) and top > max(30, 0.01 * tissue):
        found.append(f"values: over 1 % of the tissue sits exactly on the highest, {high:g}, as after a window")
    return found
