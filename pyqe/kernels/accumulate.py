r"""Per-row accumulators, folded tile by tile and merged by the same formulas.

With m the best logit so far and d = z - m <= 0, a row keeps

    softmax   total = sum e^d,  weighted = sum d e^d  (entropy = log total - weighted / total),
              tempered = sum e^(d / T)
    moments   total = sum e^(b d),  mean = sum d e^(b d) / total,  spread = sum (d - mean)^2 e^(b d),  b = |beta|
    sigmoid   total = sum sigmoid(z),  above = number of z > threshold

A better best logit m' rescales them: with s = m - m', total' = e^s total and weighted' = e^s (weighted + s total).
The moments are central, and merge as Chan et al. 1979 do: at small beta a difference of raw ones would lose all digits.

Logits of minus infinity have weight zero. NaN and plus infinity make a total NaN, and only its own row's: that is how
the end recognises rows without a distribution. No weight at all leaves a total of 0, which it takes for the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NOWHERE = tl.constexpr(2**31 - 1)
# Stands in for a best logit of minus infinity, whose difference to another would be NaN.
_LOWEST = tl.constexpr(-3.4028234663852886e38)
# Differences this far below the best have weight zero; cut there, products with that zero stay finite.
_FAR = tl.constexpr(-1e15)


@triton.jit
def fold_best(z, ids, best, best_id):
    """Best logit of each row and the lowest id that has it, after one more tile with higher ids; NaN is passed over."""
    tile_best = tl.max(z, 1)
    tile_id = tl.min(tl.where(z == tile_best[:, None], ids, NOWHERE), 1)
    return tl.maximum(best, tile_best), tl.where(tile_best > best, tile_id, best_id)


@triton.jit
def _relative(z, old_best, best):
    """Logits, and the old best one, relative to the best one."""
    reference = tl.maximum(best, _LOWEST)
    return z - reference[:, None], tl.maximum(old_best, _LOWEST) - reference


@triton.jit
def fold_softmax(
    z, old_best, best, total, weighted, tempered, tempered_scale, ENTROPY: tl.constexpr, TEMPERED: tl.constexpr
):
    """Sums after one more tile; ``best`` has seen it, ``old_best`` has not; tempered_scale is log2(e) / T."""
    d, shift = _relative(z, old_best, best)
    e = tl.exp2(d * LOG2E)
    carry = tl.exp2(shift * LOG2E)
    if ENTROPY:
        weighted = carry * (weighted + tl.maximum(shift, _FAR) * total) + tl.sum(tl.maximum(d, _FAR) * e, 1)
    if TEMPERED:
        tempered = tl.exp2(shift * tempered_scale) * tempered + tl.sum(tl.exp2(d * tempered_scale), 1)
    return carry * total + tl.sum(e, 1), weighted, tempered


@triton.jit
def merge_softmax(
    bests,
    totals,
    weighteds,
    tempereds,
    old_best,
    best,
    total,
    weighted,
    tempered,
    tempered_scale,
    ENTROPY: tl.constexpr,
    TEMPERED: tl.constexpr,
):
    """The same with a tile [rows, parts] of sums, each relative to its own best logit."""
    d, shift = _relative(tl.maximum(bests, _LOWEST), old_best, best)
    e = tl.exp2(d * LOG2E)
    carry = tl.exp2(shift * LOG2E)
    if ENTROPY:
        tile_weighted = tl.sum(e * (weighteds + tl.maximum(d, _FAR) * totals), 1)
        weighted = carry * (weighted + tl.maximum(shift, _FAR) * total) + tile_weighted
    if TEMPERED:
        tile_tempered = tl.sum(tl.exp2(d * tempered_scale) * tempereds, 1)
        tempered = tl.exp2(shift * tempered_scale) * tempered + tile_tempered
    return carry * total + tl.sum(e * totals, 1), weighted, tempered


@triton.jit
def _share(part, whole):
    """part / whole; 0 where the whole is 0 or NaN."""
    return tl.where(whole > 0, part / tl.where(whole > 0, whole, 1.0), 0.0)


@triton.jit
def _join_moments(total, mean, spread, tile_total, tile_mean, tile_spread):
    joined = total + tile_total
    difference = tile_mean - mean
    spread += tile_spread + difference * difference * total * _share(tile_total, joined)
    return joined, _share(total * mean + tile_total * tile_mean, joined), spread


@triton.jit
def moments_power(slope):
    """|beta| for powers of 2; not quite 0, at which a logit of minus infinity would lose its weight of zero."""
    return tl.maximum(tl.abs(slope), 1e-37) * LOG2E


@triton.jit
def fold_moments(z, old_best, best, total, mean, spread, power):
    """Moments after one more tile; power is log2(e) |beta|."""
    d, shift = _relative(z, old_best, best)
    e = tl.exp2(d * power)
    d = tl.maximum(d, _FAR)
    tile_total = tl.sum(e, 1)
    tile_mean = _share(tl.sum(d * e, 1), tile_total)
    # In these words, or the compiler keeps all d and e of the tile in registers from above.
    deviation = z - (tl.maximum(best, _LOWEST) + tile_mean)[:, None]
    e = tl.exp2((deviation + tile_mean[:, None]) * power)
    deviation = tl.maximum(deviation, _FAR)
    tile_spread = tl.sum(deviation * deviation * e, 1)
    carry = tl.exp2(shift * power)
    mean += tl.maximum(shift, _FAR)
    return _join_moments(total * carry, mean, spread * carry, tile_total, tile_mean, tile_spread)


@triton.jit
def merge_moments(bests, totals, means, spreads, old_best, best, total, mean, spread, power):
    """The same with a tile [rows, parts] of moments, each relative to its own best logit."""
    d, shift = _relative(tl.maximum(bests, _LOWEST), old_best, best)
    e = tl.exp2(d * power)
    totals, means = totals * e, means + tl.maximum(d, _FAR)
    tile_total = tl.sum(totals, 1)
    tile_mean = _share(tl.sum(totals * means, 1), tile_total)
    deviation = means - tile_mean[:, None]
    tile_spread = tl.sum(spreads * e + totals * deviation * deviation, 1)
    carry = tl.exp2(shift * power)
    mean += tl.maximum(shift, _FAR)
    return _join_moments(total * carry, mean, spread * carry, tile_total, tile_mean, tile_spread)


@triton.jit
def fold_soft_labels(z, labels, old_best, best, target, mass):
    """Sum of label * (z - best), and of the labels, after one more tile; a label of 0 ignores its logit."""
    d, shift = _relative(z, old_best, best)
    target += tl.where(mass == 0, 0.0, shift * mass) + tl.sum(tl.where(labels == 0, 0.0, labels * d), 1)
    return target, mass + tl.sum(labels, 1)


@triton.jit
def merge_soft_labels(bests, targets, masses, old_best, best, target, mass):
    d, shift = _relative(tl.maximum(bests, _LOWEST), old_best, best)
    target += tl.where(mass == 0, 0.0, shift * mass) + tl.sum(targets + tl.where(masses == 0, 0.0, d * masses), 1)
    return target, mass + tl.sum(masses, 1)


@triton.jit
def fold_sigmoid(z, total, above, threshold, COUNT: tl.constexpr):
    """Sum of sigmoid(z), and number of z above the threshold, after one more tile."""
    if COUNT:
        above += tl.sum((z > threshold).to(tl.int32), 1)
    return total + tl.sum(1.0 / (1.0 + tl.exp2(z * -LOG2E)), 1), above


@triton.jit
def as_float(integers):
    """Their bits, to be kept beside floats."""
    return integers.to(tl.float32, bitcast=True)


@triton.jit
def store_slots(place, plane, mask, first, second, third, fourth, fifth, FOURTH: tl.constexpr, FIFTH: tl.constexpr):
    """Write three to five accumulators, each to a plane of its own; without a fourth the fifth takes its plane."""
    tl.store(place, first, mask=mask)
    tl.store(place + plane, second, mask=mask)
    tl.store(place + 2 * plane, third, mask=mask)
    if FOURTH:
        tl.store(place + 3 * plane, fourth, mask=mask)
    if FIFTH:
        tl.store(place + (3 + FOURTH) * plane, fifth, mask=mask)
