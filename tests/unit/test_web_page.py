"""What can be said of the web page without a browser: its files, its words, its colours."""

from __future__ import annotations

import gzip
import re

import pytest

from deployments.gateway.app import PAGE

LIMIT = 150_000  # bytes of all files on the wire, without the fallback's codec
FILES = [file for file in sorted(PAGE.rglob("*")) if file.is_file() and "vendor" not in file.parts]
SCRIPTS = [file for file in FILES if file.suffix == ".js"]

Colour = tuple[float, float, float]


def test_all_of_it_is_small() -> None:
    assert 20_000 < sum(len(gzip.compress(file.read_bytes(), 6)) for file in FILES) < LIMIT


def test_every_import_is_a_file_of_the_page() -> None:
    """So nothing is fetched from elsewhere, and no name is misspelt."""
    found = 0
    for file in SCRIPTS:
        for name in re.findall(r"""(?:from|import\(?)\s*"([^"]+)\"""", file.read_text()):
            assert name.startswith("."), f"{file.name}: {name}"
            assert (file.parent / name).is_file(), f"{file.name}: {name}"
            found += 1
    assert found > 80
    for file in FILES:
        if file.suffix in {".js", ".css", ".html"}:
            hosts = set(re.findall(r"(?:https?|wss?)://([\w-]+(?:\.[\w-]+)*)", file.read_text()))
            assert hosts <= {"www.w3.org", "localhost"}, file.name  # a name space, and an advice


def words(language: str) -> dict[str, str]:
    text = (PAGE / "words" / f"{language}.js").read_text()
    return dict(re.findall(r'^  "?([\w.-]+)"?: "(.*)",$', text, re.MULTILINE))


def test_both_languages_say_the_same() -> None:
    english, chinese = words("en"), words("zh")
    assert len(english) > 200
    assert english.keys() == {key for key in chinese if not key.startswith("role.label.")}
    for key, text in english.items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", chinese[key])), key


def test_every_word_that_is_asked_for_is_there() -> None:
    asked = set(re.findall(r'data-t(?:-label|-placeholder)?="([\w.-]+)"', (PAGE / "index.html").read_text()))
    for file in SCRIPTS:
        asked |= set(re.findall(r'\bt\("([\w.-]+)"[,)]', file.read_text()))
    assert len(asked) > 130
    assert asked <= words("en").keys()


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_apart(scheme: int) -> None:
    """WCAG 2: 4.5 for text, 3 for borders of controls and signs."""
    blocks = re.findall(r":root[^{]*\{(.*?)\}", (PAGE / "style.css").read_text(), re.DOTALL)
    named: dict[str, Colour] = {
        name: (int(code[:2], 16), int(code[2:4], 16), int(code[4:], 16))
        for name, code in re.findall(r"--([a-z-]+): #([0-9a-f]{6})", blocks[scheme])
    }
    card, ink, quiet = named["card"], named["ink"], named["quiet"]
    turns = {side: mix(named[side], card, share) for side, share in (("agent", 0.10), ("you", 0.11))}
    for ground in (card, named["page"], named["raised"], named["accent-soft"], *turns.values()):
        assert contrast(ink, ground) >= 4.5
        assert contrast(quiet, ground) >= 4.5
        assert contrast(named["warn"], ground) >= 4.5
    assert contrast(quiet, mix(ink, named["page"], 0.06)) >= 4.5, "the page's other view"
    assert contrast(mix(named["agent"], ink, 0.75), turns["agent"]) >= 4.5
    assert contrast(mix(named["you"], ink, 0.80), turns["you"]) >= 4.5
    assert contrast(named["bad"], named["bad-soft"]) >= 4.5
    assert contrast(named["bad"], named["raised"]) >= 4.5
    assert contrast(named["accent-ink"], named["accent"]) >= 4.5
    assert contrast(card, named["bad"]) >= 4.5, "the button that ends"
    assert contrast(card, named["you"]) >= 4.5, "the button that is held"
    for sign in ("field", "accent", "you", "agent", "both"):
        assert contrast(named[sign], card) >= 3, sign


def mix(one: Colour, other: Colour, share: float) -> Colour:
    """As color-mix in srgb does: `share` of the one."""
    red, green, blue = (share * a + (1 - share) * b for a, b in zip(one, other, strict=True))
    return red, green, blue


def contrast(one: Colour, other: Colour) -> float:
    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def luminance(colour: Colour) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
