"""The command line's help must not wait for torch."""

import subprocess
import sys


def test_import_and_check_leave_torch_unimported() -> None:
    code = (
        "import sys; import tlgc_mp.data as data; data.check_dataset('digits', None); "
        "print([name for name in ('torch', 'torchvision', 'sklearn') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def test_every_public_name_resolves() -> None:
    import tlgc_mp.data as data

    for name in data.__all__:
        assert getattr(data, name) is not None
