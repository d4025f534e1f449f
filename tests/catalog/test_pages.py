from pathlib import Path

from foveate.catalog import load, pages

ROOT = Path(__file__).parents[2]


def test_the_readme_shows_what_works_today():
    readme = (ROOT / "README.md").read_text()
    assert pages.with_table(readme) == readme, "run: python -m foveate.catalog.pages"


def test_the_catalogue_page_is_up_to_date():
    assert (ROOT / "docs" / "catalogue.md").read_text() == pages.catalogue_page(), (
        "run: python -m foveate.catalog.pages"
    )


def test_every_working_system_and_no_other_is_in_the_table():
    table = pages.works_table()
    for card in load().values():
        assert (f"[{card.slug}](" in table) == card.works
