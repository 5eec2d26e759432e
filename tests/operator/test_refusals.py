"""Every public function with wrong things for each argument: it takes them, or says what is wrong.

Whatever is refused is refused by a TypeError or ValueError of clinattn's, before torch has a word.
"""

import pytest
from public_calls import CALLS, wrong_for

pytestmark = pytest.mark.filterwarnings("ignore")


def told(error):
    """True for a message that names what was given or what was expected."""
    words = str(error)
    return "got" in words or "expected" in words or "unknown" in words


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_are_named(name):
    function, arguments = CALLS[name]
    function(**arguments)
    unclear = []
    for argument, value in arguments.items():
        for kind, wrong in wrong_for(value):
            try:
                function(**arguments | {argument: wrong})
            except (TypeError, ValueError, NotImplementedError) as error:
                if not told(error):
                    unclear.append((argument, kind, repr(error)[:200]))
            except Exception as error:
                unclear.append((argument, kind, repr(error)[:200]))
    assert not unclear, unclear
