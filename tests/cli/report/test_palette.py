"""Colours: contrast by WCAG 2.2, and what the colour-blind see of them."""

import itertools

import numpy as np
import pytest

from eplb.cli.report.palette import DARK, LIGHT

# Machado, Oliveira, Fernandes, IEEE TVCG 15 (2009), severity 1, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
         [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
         [0.004733, 0.691367, 0.303900]]),
}  # fmt: skip


def linear(colour):
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def luminance(colour, vision="normal"):
    return float(np.clip(VISION[vision] @ linear(colour), 0, 1) @ [0.2126, 0.7152, 0.0722])


def contrast(a, b):
    """WCAG 2.2, definition of contrast ratio."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def lab(colour, vision):
    rgb = np.clip(VISION[vision] @ linear(colour), 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    t = xyz @ rgb / [0.9505, 1, 1.089]
    f = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("ground", ["page", "card"])
def test_text_has_contrast_aa(palette, ground):
    for name in ("text", "muted", "link"):
        assert contrast(palette[name], palette[ground]) >= 4.5, name


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_lines_have_the_contrast_of_graphics_also_on_shaded_ground(palette):
    for name, ground in itertools.product(
        ("after", "before", "bound", "extra"), ("card", "fitted")
    ):
        assert contrast(palette[name], palette[ground]) >= 3, (name, ground)
    assert contrast(palette["muted"], palette["fitted"]) >= 4.5


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_differ_as_everyone_sees_them(palette, vision):
    # 10 is well above the just noticeable difference of about 2.3 (CIE 1976).
    for a, b in itertools.combinations(("after", "before", "bound"), 2):
        distance = np.linalg.norm(lab(palette[a], vision) - lab(palette[b], vision))
        assert distance > 10, (a, b)
    for scale in ("loads", "cost", "count"):
        for a, b in itertools.pairwise(palette[scale]):
            assert np.linalg.norm(lab(a, vision) - lab(b, vision)) > 6, (scale, a, b)
        ends = [lab(palette[scale][i], vision) for i in (0, -1)]
        assert np.linalg.norm(ends[0] - ends[1]) > 25


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_scales_change_lightness_one_way(palette, vision):
    for scale in ("cost", "count"):
        steps = np.diff([luminance(colour, vision) for colour in palette[scale]])
        assert (steps > 0).all() or (steps < 0).all(), scale
    loads = [luminance(colour, vision) for colour in palette["loads"]]
    middle = len(loads) // 2
    for half in (loads[: middle + 1], loads[middle:][::-1]):
        steps = np.diff(half)
        assert (steps > 0).all() or (steps < 0).all()


def test_both_palettes_name_the_same_colours():
    assert set(LIGHT) == set(DARK)
