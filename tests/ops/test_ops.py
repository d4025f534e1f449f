import pytest

from foveate import ops
from foveate.errors import InputError
from foveate.ops import fast_allowed, use


@pytest.fixture(autouse=True)
def as_before():
    with use("fast"):
        yield


def test_fast_paths_are_allowed_unless_switched_off():
    assert fast_allowed()
    use("reference")
    assert not fast_allowed()
    use("fast")
    assert fast_allowed()


def test_as_a_context_manager_the_choice_is_undone_even_by_an_error():
    seen = []
    with pytest.raises(ZeroDivisionError), use("reference"):
        seen.append(fast_allowed() or 1 / 0)
    assert not seen
    assert fast_allowed()


def test_choices_nest():
    with use("reference"):
        with use("fast"):
            assert fast_allowed()
            with use("reference"):
                assert not fast_allowed()
            assert fast_allowed()
        assert not fast_allowed()
    assert fast_allowed()


@pytest.mark.parametrize("path", ["quick", "", "Fast", None])
def test_another_path_is_refused_and_changes_nothing(path):
    with use("reference"):
        with pytest.raises(InputError, match=f"no path {path!r}; use one of 'fast', 'reference'"):
            use(path)
        assert not ops.fast_allowed()
