"""`--mesh` where it cannot be: said in one line, before a model is looked for."""

import pytest

from jaxinfer.cli.main import main


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tensor", 'mesh must be AXIS=SIZE, several with commas, as in "tensor=2"'),
        ("model=2", "mesh axis must be among data, seq, tensor; got 'model'"),
        ("tensor=0", "mesh axis tensor must have a positive size"),
        ("tensor=99", "mesh 'tensor=99' needs 99 devices; there "),
        ("data=50,seq=1,tensor=2", "needs 100 devices"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat", "eval"])
def test_refused(capsys, command, mesh, message):
    if command == "eval":
        arguments = ["eval", "perplexity", "absent", "--text", __file__]
    else:
        arguments = [command, *(["Hi"] if command == "generate" else []), "--model", "absent"]
    assert main([*arguments, "--mesh", mesh, "--progress", "off"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
