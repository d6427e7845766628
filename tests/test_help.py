"""A command that is alone says what there is, and one that is mistyped which was meant."""

from __future__ import annotations

import pytest

from tlgc_mp.cli.main import main


@pytest.mark.parametrize(("words", "parts"), [([], ["train", "predict"]), (["bench"], ["scaling", "zero", "saving"])])
def test_a_command_alone_prints_its_help(
    words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert not left.value.code
    out, err = capsys.readouterr()
    assert out.startswith("usage: ") and err == ""
    assert all(part in out for part in parts)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["train", "--lerning-rate", "0.1"],
            "unrecognized arguments: --lerning-rate 0.1; --learning-rate may be meant",
        ),
        (["train", "--batchsize=8"], "unrecognized arguments: --batchsize=8; --batch-size may be meant"),
        (["bench", "scaling", "--width", "4"], "unrecognized arguments: --width 4; --widths may be meant"),
        (["params", "--layouts"], "unrecognized arguments: --layouts; --layout may be meant"),
        (["train", "--zzzzzz"], "unrecognized arguments: --zzzzzz (see "),
        (["trian"], "argument COMMAND: invalid choice: 'trian'"),
    ],
)
def test_a_mistyped_flag_suggests_the_right_one(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tlgc-mp: error: {said}"), line
