import subprocess
import sys

import pytest

import foveate.meter


def test_names_come_without_torch_until_they_are_used():
    code = "import sys, foveate.meter; assert 'torch' not in sys.modules; assert 'psnr' in dir(foveate.meter)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_and_no_other():
    for name in foveate.meter.__all__:
        assert getattr(foveate.meter, name).__name__ == name
    with pytest.raises(AttributeError, match="speed"):
        foveate.meter.speed  # noqa: B018
